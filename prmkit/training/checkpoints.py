"""Checkpoints: which are whole, which belong to this run, and which one to go on from.

LLaMA Factory itself takes the checkpoint with the highest number, also when a kill left it half written, and also when
it is a leftover of an earlier run. Some faults then end in a crash; a missing optimizer state goes unnoticed.
"""

import json
import logging
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

log = logging.getLogger(__name__)

_LARGEST_HEADER = 100_000_000  # the limit of the safetensors format itself


NO_OPTIMIZER = "the optimizer's state is missing or not whole"
"""The fault of a checkpoint that `save_only_model` wrote, or that a kill cut off."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint."""

    folder: Path
    step: int
    tokens: int
    """Input tokens seen up to here; 0 where they were not counted."""
    max_steps: int
    """The last step of the run that wrote it."""


def read_state(folder: Path) -> dict[str, Any] | None:
    """What `trainer_state.json` says; None when it is not there or not whole."""
    try:
        # Python's own reader, because a loss that is not a number stands there as NaN.
        state = json.loads((folder / "trainer_state.json").read_bytes())
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) and isinstance(state.get("global_step"), int) else None


def weights_fault(folder: Path) -> str | None:
    """What is wrong with the weights in a folder, be they an adapter or a model in one or several files.

    Only headers and sizes are looked at: a file that was cut off does not have the size that its header says.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(orjson.loads(index.read_bytes())["weight_map"].values()))
        except (OSError, orjson.JSONDecodeError, KeyError, AttributeError):
            return f"{index.name} is not readable"
    else:
        names = [name for name in ("adapter_model.safetensors", "model.safetensors") if (folder / name).exists()][:1]
    if not names:
        return "adapter_model.safetensors is missing"
    return next((f"{name} is not whole" for name in names if not is_whole_safetensors(folder / name)), None)


def is_whole_safetensors(path: Path) -> bool:
    """Whether a file is as long as its safetensors header says, and holds at least one tensor.

    Format: 8 bytes length N of the header (little endian), N bytes JSON, then the tensors' bytes
    (https://github.com/huggingface/safetensors#format).
    """
    try:
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = orjson.loads(stream.read(length)) if length < _LARGEST_HEADER else {}
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return bool(ends) and path.stat().st_size == 8 + length + max(ends)
    except (OSError, struct.error, orjson.JSONDecodeError, KeyError, TypeError, AttributeError, IndexError):
        return False


def fault_of(folder: Path) -> str | None:
    """Why nothing can go on from a checkpoint folder; None when it is whole."""
    if (folder / "checkpoint-is-incomplete.txt").exists():
        return "it was being written when the run ended"
    state = read_state(folder)
    if state is None:
        return "trainer_state.json is missing or not whole"
    if folder.name.startswith("checkpoint-") and folder.name != f"checkpoint-{state['global_step']}":
        return f"it is from step {state['global_step']}, not from the one in its name"
    if fault := weights_fault(folder):
        return fault
    if not _has_optimizer(folder):
        return NO_OPTIMIZER
    return None


def _has_optimizer(folder: Path) -> bool:
    # One process or DDP; FSDP; DeepSpeed, one file for each process. torch.save writes zip files, their index last.
    names = ("optimizer.pt", "optimizer.bin", "global_step*/*optim_states.pt")
    files = [path for name in names for path in folder.glob(name)]
    return bool(files) and all(map(zipfile.is_zipfile, files))


def stale_reason(folder: Path, own_log: Path) -> str | None:
    """Why a whole checkpoint is from another run than the one whose `trainer_log.jsonl` this is.

    The losses in the checkpoint's history must be those that this run logged. The last entry may be missing from the
    log, which is written a moment later.
    """
    logged: dict[int, set[float]] = {}
    totals: set[int] = set()
    for line in read_log(own_log):
        totals.add(line.get("total_steps", 0))
        if "loss" in line:
            logged.setdefault(line["current_steps"], set()).add(line["loss"])
    state = read_state(folder) or {}
    if totals and state.get("max_steps") not in totals:
        return f"it is from a run of {state.get('max_steps')} steps"
    history = [entry for entry in state.get("log_history", []) if "loss" in entry]
    if any(entry["loss"] not in logged.get(entry["step"], set()) for entry in history[:-1]):
        return "its losses are not those of this run"
    return None


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a `trainer_log.jsonl`; a line that a kill cut off is passed over."""
    if path.exists():
        for line in path.read_bytes().splitlines():
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict) and isinstance(value.get("current_steps"), int):
                yield value


def checkpoint_folders(run_folder: Path) -> list[Path]:
    """The `checkpoint-N` folders of a run, highest N first."""
    folders = [path for path in run_folder.glob("checkpoint-*") if path.is_dir() and path.name[11:].isdecimal()]
    return sorted(folders, key=lambda path: int(path.name[11:]), reverse=True)


def newest_whole(run_folder: Path, *, put_aside: bool) -> Checkpoint | None:
    """The newest checkpoint that is whole and from this run.

    Args:
        run_folder: holds `checkpoint-N` folders and the run's `trainer_log.jsonl`.
        put_aside: rename the higher-numbered ones that cannot be used: `incomplete.checkpoint-N`, `stale.checkpoint-N`.
    """
    for folder in checkpoint_folders(run_folder):
        fault, kind = fault_of(folder), "incomplete"
        if fault is None:
            fault, kind = stale_reason(folder, run_folder / "trainer_log.jsonl"), "stale"
        if fault is None:
            return load_checkpoint(folder)
        if put_aside:
            moved = rename_aside(folder, kind)
            log.warning("%s cannot be used: %s. Put aside as %s.", folder, fault, moved.name)
    return None


def load_checkpoint(folder: Path) -> Checkpoint:
    """Describe a checkpoint that is known to be whole."""
    state = read_state(folder) or {}
    return Checkpoint(folder, state["global_step"], int(state.get("num_input_tokens_seen") or 0), state["max_steps"])


def rename_aside(path: Path, why: str) -> Path:
    """Rename to `WHY.NAME`, or `WHY-2.NAME` and so on where that is taken.

    The word stands in front because LLaMA Factory deletes old folders whose names begin with `checkpoint-`.
    """
    target, number = path.with_name(f"{why}.{path.name}"), 1
    while target.exists():
        number += 1
        target = path.with_name(f"{why}-{number}.{path.name}")
    path.rename(target)
    return target
