"""The generator of the sample that ships as finetune.jsonl."""
