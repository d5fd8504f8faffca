"""The judge: a model that scores prompts. It knows nothing about files of rows."""
