"""finetune.jsonl to data/: everything between the judges' answers and what LLaMA Factory trains on."""
