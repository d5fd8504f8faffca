"""What is suggested when a run is finished (next_steps.py)."""

import shlex
from pathlib import Path
from typing import Any

import pytest

from prmkit.training.command import Command
from prmkit.training.next_steps import next_commands


@pytest.mark.parametrize(
    ("config", "template", "weights"),
    [
        ({}, "qwen", "--model_name_or_path './my model' --adapter_name_or_path 'saves/a run' --finetuning_type lora"),
        ({"finetuning_type": "full"}, "qwen", "--model_name_or_path 'saves/a run'"),
        ({"finetuning_type": "full"}, None, "--model_name_or_path 'saves/a run'"),
    ],
)
def test_the_chat_fits_what_was_trained(config: dict[str, Any], template: str | None, weights: str) -> None:
    record = {"base_model": {"path": "./my model"}, "template": template, "config": config}
    (chat,) = (
        line.partition(":")[2].strip()
        for line in next_commands(Command(), Path("saves/a run"), record, None, already=False)
        if line.strip().startswith("talk to it")
    )
    assert shlex.split(chat) == shlex.split(f"llamafactory-cli chat {weights}") + (
        ["--template", template] if template else []
    )
