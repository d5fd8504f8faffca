"""A project folder with a tiny model and tiny data, and runs in it that tests share: LLaMA Factory takes 10 s to start."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROWS = 48

# Long enough to be killed in the middle, short enough to wait for: 60 steps take about 5 seconds.
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
    "num_train_epochs": 2.0,
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
    """One training row; its score is told by its text."""
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


@pytest.fixture(scope="session")
def micro_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model whose tokenizer was trained on the rows of these tests."""
    from prmkit.demo.tiny_model import build_tiny_model

    folder = tmp_path_factory.mktemp("micro")
    sample = folder / "sample.jsonl"
    rows = [row(number) for number in range(ROWS)]
    turns = [[{"value": "You are Qwen. " + each["instruction"]}, {"value": each["output"]}] for each in rows]
    sample.write_text("".join(json.dumps({"conversations": pair}) + "\n" for pair in turns), encoding="utf-8")
    build_tiny_model(sample, folder / "model")
    return folder / "model"


MakeProject = Callable[..., Path]


@pytest.fixture(scope="session")
def make_project(micro_model: Path) -> MakeProject:
    """Lay out a user's folder: model/, data/, config.yaml."""

    def make(folder: Path, **changes: Any) -> Path:
        (folder / "data").mkdir(parents=True)
        shutil.copytree(micro_model, folder / "model")
        rows = [json.dumps(row(number)) + "\n" for number in range(ROWS)]
        (folder / "data" / "steps.jsonl").write_text("".join(rows[8:]), encoding="utf-8")
        (folder / "data" / "steps_eval.jsonl").write_text("".join(rows[:8]), encoding="utf-8")
        entries = {name: {"file_name": f"{name}.jsonl"} for name in ("steps", "steps_eval")}
        (folder / "data" / "dataset_info.json").write_text(json.dumps(entries), encoding="utf-8")
        (folder / "data" / "conversion_report.json").write_text('{"held_out": {"tasks": 2, "sha256": "abc"}}')
        write_config(folder / "config.yaml", **changes)
        return folder

    return make
