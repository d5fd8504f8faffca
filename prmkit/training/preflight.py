"""The checks before a run: everything that would stop it or spoil it, found before the model loads.

This is the checklist of a careful person, done by the machine: each check says what it found and what to do.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prmkit.errors import DataError
from prmkit.training.check import Check, Status, error, ok, warning
from prmkit.training.config import ResolvedConfig
from prmkit.training.data_checks import check_datasets, check_held_out
from prmkit.training.deep import look_deep
from prmkit.training.environment_checks import (
    check_command,
    check_disk,
    check_gpu,
    check_packages,
    check_precision,
    check_python,
    check_swanlab,
    check_versions,
)
from prmkit.training.machine import GIBIBYTE, Machine, this_machine
from prmkit.training.memory import Memory, Model, checkpoint_bytes, estimate, read_model, remedies
from prmkit.training.model_folder import check_model_folder
from prmkit.training.settings_checks import check_settings

SURE_TO_FAIL = 1.15
"""The estimate is good to about 15 %: that much over a GPU's memory will not fit, less may."""
COMFORTABLE = 0.75
"""Below this share of the free memory there is room to trade memory for speed."""


def run_preflight(
    config: ResolvedConfig, *, machine: Machine | None = None, processes: int = 1, world_size: int = 1
) -> list[Check]:
    """Run every check and return them all, in the order of a training checklist. Takes under 15 seconds.

    Args:
        config: what the run would be started with.
        machine: what training can count on; this machine when it is None.
        processes: how many train on this machine.
        world_size: how many train, over all nodes.
    """
    machine = machine or this_machine()
    values = config.values
    model_check = check_model_folder(values)
    versions = [check_python(), check_versions(), check_command()]
    findings = None
    if not errors_in(versions):
        findings = look_deep(values, gpus=len(machine.gpus))
    model = _sizes(values, model_check)
    cutoff = int(values.get("cutoff_len", 2048))
    tokens = min(cutoff, findings.longest_row or cutoff) if findings else cutoff
    return [
        *versions,
        *(findings.checks[:1] if findings else []),
        model_check,
        check_datasets(values),
        check_held_out(values, config.dropped),
        *(findings.checks[1:] if findings else []),
        *check_settings(values),
        check_gpu(values, machine, processes=processes, parameters=model.parameters if model else 0),
        check_precision(values, config.dropped),
        *_memory(model, values, machine, tokens=tokens, world_size=world_size),
        check_disk(values, checkpoint_bytes(model, values) if model else None),
        check_packages(values, machine),
        check_swanlab(values, config.dropped, config.sources),
    ]


def errors_in(checks: Sequence[Check]) -> list[Check]:
    """The checks that stop a run."""
    return [check for check in checks if check.status is Status.ERROR]


def _sizes(values: Any, model_check: Check) -> Model | None:
    if model_check.status is not Status.OK:
        return None
    try:
        return read_model(Path(str(values["model_name_or_path"])))
    except DataError:
        return None


def _memory(model: Model | None, values: Any, machine: Machine, *, tokens: int, world_size: int) -> Iterator[Check]:
    room = machine.room
    if not room:
        return
    if model is None:
        yield warning("memory", "not estimated: the model's sizes are not known", "Watch nvidia-smi at the start.")
        return
    memory = estimate(model, values, tokens=tokens, world_size=world_size)
    found = f"about {_parts(memory)} at {tokens:,} tokens a row; {room / GIBIBYTE:.0f} GiB free"
    if memory.total <= room:
        yield ok("memory", found, _faster(model, values, room=room, tokens=tokens, world_size=world_size))
        return
    smaller = remedies(model, values, tokens=tokens, world_size=world_size, room=room)
    steps = [f"{step.flags} ({step.memory.total / GIBIBYTE:.0f} GiB)" for step in smaller]
    fits = bool(smaller) and smaller[-1].memory.total <= room
    last = "" if fits else "; then a shorter cutoff_len, or more GPUs with configs/multi_gpu_zero2.yaml"
    advice = "Try, in this order: " + "; ".join(steps) + last
    sure = memory.total > SURE_TO_FAIL * room
    yield error("memory", f"{found}: will not fit", advice) if sure else warning("memory", f"{found}: tight", advice)


def _parts(memory: Memory) -> str:
    parts = {
        "weights": memory.weights,
        "LoRA and optimizer" if memory.weights else "weights and optimizer": memory.states,
        "activations": memory.activations,
        "logits": memory.logits,
        "reserve": memory.reserve,
    }
    told = ", ".join(f"{name} {size / GIBIBYTE:.1f}" for name, size in parts.items() if size)
    return f"{memory.total / GIBIBYTE:.1f} GiB ({told})"


def _faster(model: Model, values: Any, *, room: float, tokens: int, world_size: int) -> str:
    if values.get("disable_gradient_checkpointing") or values.get("use_cpu"):
        return ""
    whole = {**values, "disable_gradient_checkpointing": True}
    memory = estimate(model, whole, tokens=tokens, world_size=world_size)
    if memory.total > COMFORTABLE * room:
        return ""
    return f"disable_gradient_checkpointing=true would be faster and take {memory.total / GIBIBYTE:.0f} GiB."
