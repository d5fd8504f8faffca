"""What one may do when a run is finished: commands to be typed as they are printed."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prmkit.training.checkpoints import checkpoint_folders, fault_of
from prmkit.training.command import Command, retyped


def next_commands(
    command: Command, folder: Path, record: Mapping[str, Any], exported: Path | None, *, already: bool
) -> list[str]:
    """Lines that name the commands one may type next.

    Args:
        command: the one that was typed.
        folder: of the run.
        record: of the run.
        exported: the folder of the merged model, if it was made.
        already: the run was finished before.
    """
    place = shlex.quote(str(folder))
    lines = ["Next:"]
    if already:
        last = next((path for path in checkpoint_folders(folder) if fault_of(path) is None), None)
        if last:
            lines.append(f"  train longer:   {shlex.join(_longer(command, folder, record, last))}")
        lines.append(f"  train anew:     {shlex.join([*retyped(command), '--overwrite'])}")
    lines.append(f"  measure it:     python evaluate_judge.py --run {place}")
    if not exported:
        config = shlex.quote(str(command.config))
        lines.append(f"  merge it:       python train.py --config {config} --export-only {place}")
    lines.append(f"  talk to it:     {shlex.join(_chat(folder, record))}")
    return lines


def _chat(folder: Path, record: Mapping[str, Any]) -> list[str]:
    if record["config"].get("finetuning_type", "lora") == "lora":
        weights = ["--model_name_or_path", record["base_model"]["path"], "--adapter_name_or_path", str(folder)]
        weights += ["--finetuning_type", "lora"]
    else:
        weights = ["--model_name_or_path", str(folder)]
    template = ["--template", record["template"]] if record["template"] else []
    return ["llamafactory-cli", "chat", *weights, *template]


def _longer(command: Command, folder: Path, record: Mapping[str, Any], last: Path) -> list[str]:
    """The command that goes on from the last checkpoint of a finished run, for as long again."""
    config = record["config"]
    by_steps = int(config.get("max_steps") or -1) > 0
    length = (
        f"max_steps={2 * int(config['max_steps'])}"
        if by_steps
        else f"num_train_epochs={2 * float(config.get('num_train_epochs', 3)):g}"
    )
    changed = {"run_name", "output_dir", "resume_from_checkpoint", "max_steps" if by_steps else "num_train_epochs"}
    longer = folder.with_name(f"{folder.name}-longer")
    return [*retyped(command, changed), length, f"output_dir={longer}", f"resume_from_checkpoint={last}"]
