"""Prompts: token ids as LLaMA Factory makes them, truncation, and text that must not become special tokens."""
