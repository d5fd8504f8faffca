"""The judge: a model that scores prompts. This package does not read row files."""
