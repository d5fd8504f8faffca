"""What a project of these tests holds: rows and a config of LLaMA Factory's keys."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

ROWS = 48

# Long enough to be killed in the middle, short enough to wait for: 80 steps take about 5 seconds.
CONFIG: dict[str, Any] = {
    "stage": "sft",
    "do_train": True,
    "model_name_or_path": "model",
    "template": "qwen",
    "finetuning_type": "lora",
    "lora_rank": 8,
    "lora_target": "all",
    "dataset": "steps",
    "dataset_dir": "data",
    "eval_dataset": "steps_eval",
    "cutoff_len": 256,
    "preprocessing_num_workers": 1,
    "output_dir": "saves/run",
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1.0e-3,
    "lr_scheduler_type": "cosine",
    "num_train_epochs": 8.0,
    "logging_steps": 2,
    "save_steps": 8,
    "save_total_limit": 2,
    "eval_strategy": "steps",
    "eval_steps": 12,
    "enable_jit_checkpoint": True,
    "include_num_input_tokens_seen": True,
    "report_to": "none",
    "seed": 7,
    "use_cpu": True,
}


def row(number: int) -> dict[str, str]:
    """One training row; its score is reported by its text."""
    good = number % 3
    return {
        "instruction": f"Judge step {number}: the tool {'answered ' * (good + 1)}.",
        "input": "",
        "output": json.dumps({"reasonableness_score": good / 2, "summary": f"step {number}"}),
    }


def write_config(path: Path, **changes: Any) -> Path:
    """Write the tests' config with some keys changed; None takes a key out."""
    values = {key: value for key, value in {**CONFIG, **changes}.items() if value is not None}
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


STEPS = 80

MakeProject = Callable[..., Path]
Script = Callable[..., subprocess.CompletedProcess[str]]
