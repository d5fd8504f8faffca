"""Decide what to do in a run's folder: begin, resume, finish what a killed process left, or nothing.

LLaMA Factory itself resumes from the checkpoint with the highest number, even if a killed process left it half written
or it is from an earlier run. Some faults then cause a crash; a missing optimizer state goes unnoticed. So every file is
checked here before a checkpoint is used, and its path is passed to LLaMA Factory explicitly.
"""

import logging
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from prmkit.errors import DataError, LlamaFactoryError, UsageError
from prmkit.llamafactory_schema import setting
from prmkit.training.checkpoints import (
    NO_OPTIMIZER,
    TRAINER_LOG,
    checkpoint_fault,
    content_fault,
    read_log,
    read_state,
    weights_fault,
)
from prmkit.training.records import differences, read_record

log = logging.getLogger(__name__)

_KEPT_BY_GIT = ".gitkeep"
_RENEWED = ("config", "sources", "command", "processes", "base_model")
"""The fields of run.json that a resume updates; all others are from the first start."""


# --- which checkpoint? --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    folder: Path
    step: int
    tokens: int
    """The number of input tokens seen so far; 0 if they were not counted."""
    max_steps: int
    """The last step of the run that wrote this checkpoint."""


def stale_reason(folder: Path, run_log: Path) -> str | None:
    """Say why a complete checkpoint does not belong to the training run that wrote `run_log`; None if it does.

    The losses in the checkpoint's history must be those that this run logged. The last entry may be missing from the
    log, which is written a moment later.
    """
    logged: dict[int, set[float]] = {}
    totals: set[int] = set()
    for line in read_log(run_log):
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


def checkpoint_folders(run_folder: Path) -> list[Path]:
    """List the `checkpoint-N` folders of a run, highest N first."""
    folders = [path for path in run_folder.glob("checkpoint-*") if path.is_dir() and path.name[11:].isdecimal()]
    return sorted(folders, key=lambda path: int(path.name[11:]), reverse=True)


def newest_checkpoint(run_folder: Path, *, rename: bool = False, contents: bool = True) -> Checkpoint | None:
    """Return the newest checkpoint that is complete and from this run; None if there is no such checkpoint.

    Args:
        run_folder: a folder with `checkpoint-N` folders and the run's `trainer_log.jsonl`.
        rename: rename higher-numbered ones that cannot be used: `incomplete.checkpoint-N`, `stale.checkpoint-N`.
        contents: see `checkpoint_fault`.
    """
    for folder in checkpoint_folders(run_folder):
        fault, kind = checkpoint_fault(folder, contents=contents), "incomplete"
        if fault is None:
            fault, kind = stale_reason(folder, run_folder / TRAINER_LOG), "stale"
        if fault is None:
            return _load_checkpoint(folder)
        if rename:
            moved = rename_with_prefix(folder, kind)
            log.warning("Skipping %s (%s); renamed to %s.", folder, fault, moved.name)
    return None


def _load_checkpoint(folder: Path) -> Checkpoint:
    state = read_state(folder) or {}
    return Checkpoint(folder, state["global_step"], state["num_input_tokens_seen"], state["max_steps"])


def rename_with_prefix(path: Path, prefix: str) -> Path:
    """Rename to `PREFIX.NAME`, or `PREFIX-2.NAME` and so on if that is taken; only one `incomplete` folder is kept.

    It is a prefix because LLaMA Factory deletes old folders whose names begin with `checkpoint-`.
    """
    if prefix == "incomplete" and path.is_dir():
        for older in path.parent.glob("incomplete*.checkpoint-*"):
            shutil.rmtree(older, ignore_errors=True)
    target, number = path.with_name(f"{prefix}.{path.name}"), 1
    while target.exists():
        number += 1
        target = path.with_name(f"{prefix}-{number}.{path.name}")
    path.rename(target)
    return target


# --- which folder? ------------------------------------------------------------------------------------------------


def run_folder_of(values: Mapping[str, Any], sources: Mapping[str, str]) -> Path:
    """Return the run's folder: `output_dir`, or `run_name` next to it; the command line overrides the file.

    Raises:
        UsageError: `run_name` is not a plain folder name.
    """
    folder = Path(str(values["output_dir"]))
    name = values.get("run_name")
    only_folder_typed = sources.get("output_dir") == "key=value" != sources.get("run_name")
    if name is None or only_folder_typed:
        return folder
    if Path(str(name)).name != str(name) or str(name).startswith("."):
        raise UsageError(f"run_name: '{name}' is not a plain folder name.")
    return folder.with_name(str(name))


def free_folder(folder: Path, fresh: Mapping[str, Any]) -> Path:
    """Return the first of `folder`, `folder-2`, `folder-3` … without a finished training run of another config.

    So no training run overwrites another, and the same command finds its run again, because its config is the same.
    """
    candidate, number = folder, 1
    while (record := read_record(candidate)) and record["status"] == "finished" and differences(record, fresh):
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def back_up(folder: Path) -> Path | None:
    """Rename a folder to `NAME.TIMESTAMP`, so that `--overwrite` loses nothing.

    Raises:
        UsageError: it is the current folder, or above it.
    """
    if not folder.exists():
        return None
    if Path.cwd().is_relative_to(folder.resolve()):
        raise UsageError(
            f"{folder} is the current folder and cannot be renamed. Choose another with output_dir=FOLDER."
        )
    target = folder.with_name(f"{folder.name}.{datetime.now().strftime('%Y%m%d-%H%M%S')}")
    while target.exists():
        target = target.with_name(target.name + "+")
    folder.rename(target)
    if (target / _KEPT_BY_GIT).exists():  # the folder belongs to the repository, its contents do not
        folder.mkdir()
        (target / _KEPT_BY_GIT).rename(folder / _KEPT_BY_GIT)
    log.info("Renamed %s to %s", folder, target)
    return target


# --- begin, resume, finish, or nothing? ---------------------------------------------------------------------------


class Action(StrEnum):
    """What to do in the run's folder."""

    BEGIN = "begin"
    RESUME = "resume"
    FINISH = "finish"
    """All steps were trained: check the final files, and copy missing ones from the last checkpoint."""
    DONE = "done"


@dataclass(frozen=True)
class Decision:
    """What to do in the run's folder, and the content of run.json afterwards."""

    action: Action
    record: dict[str, Any]
    checkpoint: Checkpoint | None = None


def decide_start(folder: Path, fresh: dict[str, Any], *, rename: bool = True) -> Decision:
    """Decide what to do in a run's folder.

    Args:
        folder: the run folder; locked by this process if something may be renamed.
        fresh: the run.json of a training run that would begin now.
        rename: rename damaged and foreign checkpoints.

    Raises:
        UsageError: the folder contains something other than this run, or there is nothing left to train.
        DataError: the checkpoint that the user chose is not complete.
    """
    record = read_record(folder)
    if record is None:
        return _decide_without_record(folder, fresh)
    changed = differences(record, fresh)
    if record["status"] == "finished" and changed:
        raise UsageError(_other_config(folder, "a finished", changed))
    if record["status"] == "finished" and content_fault(folder) is None:
        return Decision(Action.DONE, record)
    if changed:
        return _decide_with_other_config(folder, record, fresh, changed, rename=rename)
    return _decide_with_same_config(folder, record, fresh, rename=rename)


def _decide_without_record(folder: Path, fresh: dict[str, Any]) -> Decision:
    named = _named_checkpoint(fresh)
    if named is None or named.resolve().parent != folder.resolve():
        _check_unknown_content(folder)
    return _begin_or_resume(_check_chosen(named), fresh, folder)


def _decide_with_other_config(
    folder: Path, record: dict[str, Any], fresh: dict[str, Any], changed: list[str], *, rename: bool
) -> Decision:
    """Decide for an unfinished run of another config, which may only be replaced if it has saved nothing."""
    explicit = _not_resumed_from(_named_checkpoint(fresh), record)
    if record["config"].get("save_only_model"):
        _check_weights_only(folder)
    if newest_checkpoint(folder, rename=rename) is not None:
        raise UsageError(_other_config(folder, "an unfinished", changed))
    log.info("%s: config changed and no checkpoint exists; starting over.", folder)
    return _begin_or_resume(explicit, fresh, folder)


def _decide_with_same_config(folder: Path, record: dict[str, Any], fresh: dict[str, Any], *, rename: bool) -> Decision:
    named = _named_checkpoint(fresh)
    explicit = _not_resumed_from(named, record)
    weights_only = bool(record["config"].get("save_only_model"))
    if _has_final_files(folder):
        if rename and not weights_only:
            newest_checkpoint(folder, rename=True)  # called only to rename unusable checkpoints
        return Decision(Action.FINISH, record)
    if weights_only:
        _check_weights_only(folder)
    newest = newest_checkpoint(folder, rename=rename)
    if newest is not None and fresh["config"].get("resume_from_checkpoint") is False:
        raise UsageError(f"{newest.folder} exists, but resume_from_checkpoint is false. Add --overwrite.")
    record = {**record, **{key: fresh[key] for key in _RENEWED}}
    return _begin_or_resume(explicit or newest or _check_chosen(named), record, folder)


def _named_checkpoint(fresh: Mapping[str, Any]) -> Path | None:
    named = fresh["config"].get("resume_from_checkpoint")
    return Path(named) if isinstance(named, str) else None


def _not_resumed_from(named: Path | None, record: Mapping[str, Any]) -> Checkpoint | None:
    """Return the checkpoint that the user chose, unless the run has already resumed from it.

    In that case, the run continues from its own newest checkpoint. The chosen one may have been deleted, because LLaMA
    Factory keeps only the last few.
    """
    return None if str(named) in record["resumed_from"] else _check_chosen(named)


def _has_final_files(folder: Path) -> bool:
    """Return whether the final files are complete: the weights, and `trainer_state.json`, which is written last."""
    state = read_state(folder)
    return state is not None and state["global_step"] >= state["max_steps"] and content_fault(folder) is None


def _check_chosen(folder: Path | None) -> Checkpoint | None:
    """Load the checkpoint that the user chose in `resume_from_checkpoint`, if any.

    Raises:
        DataError: it is not complete.
    """
    if folder is None:
        return None
    fault = checkpoint_fault(folder) if folder.is_dir() else "there is no such folder"
    if fault is None:
        return _load_checkpoint(folder)
    others = [str(other) for other in checkpoint_folders(folder.parent) if checkpoint_fault(other) is None]
    choice = f"Complete checkpoints: {', '.join(others)}." if others else "Remove the key to start from the beginning."
    raise DataError(f"resume_from_checkpoint: {folder}: {fault}. {choice}")


def _check_unknown_content(folder: Path) -> None:
    if checkpoint_folders(folder) or (folder.exists() and weights_fault(folder) is None):
        raise UsageError(
            f"{folder} contains a model or checkpoints, but no run.json, so their data and settings are unknown.\n"
            f"  --overwrite             renames the folder\n"
            f"  run_name=NAME           trains in another folder\n"
            f"  resume_from_checkpoint={folder}/checkpoint-N   resumes from one of its checkpoints"
        )


def _check_weights_only(folder: Path) -> None:
    """Report checkpoints that have only weights: training cannot resume from them, but they are worth keeping."""
    faults = {path: checkpoint_fault(path, contents=False) for path in checkpoint_folders(folder)}
    if kept := [path for path, fault in faults.items() if fault == NO_OPTIMIZER]:
        raise UsageError(
            f"{folder} was saved with save_only_model, so training cannot be resumed from {kept[0].name}, which "
            "contains the weights, but not the optimizer state.\n"
            "  --overwrite renames the folder and starts from the beginning\n"
            f"  python evaluate_judge.py --run {shlex.quote(str(kept[0]))} measures this checkpoint"
        )


def _other_config(folder: Path, state: str, changed: list[str]) -> str:
    shown = "\n".join(f"  {line}" for line in changed)
    return (
        f"{folder} contains {state} run with a different config:\n{shown}\n"
        "Add run_name=NAME to train in another folder, or --overwrite to rename this one."
    )


def _begin_or_resume(checkpoint: Checkpoint | None, record: dict[str, Any], folder: Path) -> Decision:
    if checkpoint is None:
        return Decision(Action.BEGIN, record)
    is_ours = checkpoint.folder.resolve().parent == folder.resolve()
    if not is_ours:
        _check_something_left(checkpoint, record)
    record = {**record, "resumed_from": [*record["resumed_from"], str(checkpoint.folder)]}
    is_last = is_ours and checkpoint.step >= checkpoint.max_steps
    return Decision(Action.FINISH if is_last else Action.RESUME, record, checkpoint)


def _check_something_left(checkpoint: Checkpoint, record: Mapping[str, Any]) -> None:
    """Check that resuming from another run's checkpoint trains for longer; otherwise the run would only be a copy."""
    config, state = record["config"], read_state(checkpoint.folder) or {}
    steps, epochs = int(config.get("max_steps") or -1), float(setting(config, "num_train_epochs"))
    if 0 < steps <= checkpoint.step:
        raise UsageError(
            f"max_steps={steps}, but {checkpoint.folder} is already at step {checkpoint.step}. Increase max_steps."
        )
    trained_on = (read_record(checkpoint.folder.parent) or {}).get("dataset") or {}
    same_rows = trained_on.get("sha256") == (record["dataset"] or {}).get("sha256")
    if steps < 0 and same_rows and epochs <= float(state.get("epoch") or 0.0):
        raise UsageError(
            f"num_train_epochs={epochs:g}, but {checkpoint.folder} is already at epoch {state['epoch']:g} on this "
            "dataset. Set a larger number with --epochs."
        )


def prepare_run_folder(folder: Path, decision: Decision) -> None:
    """Rename files that would make LLaMA Factory refuse to start, or would be mistaken for this start's files."""
    if decision.action is Action.BEGIN:
        for name in ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json"):
            if (folder / name).exists():
                rename_with_prefix(folder / name, "incomplete")
        if (folder / TRAINER_LOG).exists():
            rename_with_prefix(folder / TRAINER_LOG, "before")
    used = decision.checkpoint
    if used is not None and used.folder.resolve().parent == folder.resolve():
        for higher in checkpoint_folders(folder):
            if int(higher.name[11:]) > used.step:
                moved = rename_with_prefix(higher, "superseded")
                log.info("Renamed %s to %s: this run resumes from step %s.", higher, moved.name, used.step)


def restore_final_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the final files of a run that had trained all its steps when it was killed.

    LLaMA Factory itself would train one step too many. Its final files equal those of the last checkpoint or, with
    `load_best_model_at_end`, of the best one.
    """
    state = read_state(checkpoint.folder) or {}
    best = state.get("best_model_checkpoint")
    source = folder / Path(best).name if best and (folder / Path(best).name).is_dir() else checkpoint.folder
    not_final = ("optimizer", "scheduler", "rng_state", "scaler", "global_step", "trainer_state", "pytorch_model_fsdp")
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.startswith(not_final):
            shutil.copy2(path, folder / path.name)
    # This file is last, because a folder with it counts as finished.
    shutil.copy2(checkpoint.folder / "trainer_state.json", folder / "trainer_state.json")
    if fault := content_fault(folder):
        raise LlamaFactoryError(f"{folder}: {fault}, and {source.name} has no intact copy. Start with --overwrite.")
