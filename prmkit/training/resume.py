"""What a start means for a run folder: begin, go on from a checkpoint, finish what a kill left, or nothing to do."""

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
from prmkit.training.checkpoints import (
    NO_OPTIMIZER,
    Checkpoint,
    checkpoint_folders,
    fault_of,
    load_checkpoint,
    newest_whole,
    read_state,
    rename_aside,
    weights_fault,
)
from prmkit.training.runs import differences, read_record

log = logging.getLogger(__name__)

_KEPT_BY_GIT = ".gitkeep"


class Step(StrEnum):
    """What is to be done."""

    BEGIN = "begin"
    GO_ON = "go on"
    FINISH = "finish"
    """All steps were trained; what is left is to check, and to take missing final files from the last checkpoint."""
    DONE = "done"


@dataclass(frozen=True)
class Plan:
    """What a start is going to do."""

    step: Step
    record: dict[str, Any]
    checkpoint: Checkpoint | None = None


def run_folder_of(values: Mapping[str, Any], sources: Mapping[str, str]) -> Path:
    """Where a run stands: `output_dir`, or beside it under `run_name`; what was typed wins over what is in the file.

    Raises:
        UsageError: the name is no plain folder name.
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
    """`folder`, or the first of `folder-2`, `folder-3` … that is not taken by a finished run of another config.

    A run never overwrites another one; and the same command finds its own run again, because its config is the same.
    """
    candidate, number = folder, 1
    while (record := read_record(candidate)) and record["status"] == "finished" and differences(record, fresh):
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def move_aside(folder: Path) -> Path | None:
    """Rename a folder to `NAME.TIMESTAMP`; nothing is lost by `--overwrite`.

    Raises:
        UsageError: it is the folder that all this runs in, or above it.
    """
    if not folder.exists():
        return None
    if Path.cwd().is_relative_to(folder.resolve()):
        raise UsageError(f"{folder}: is the folder that this was started in, and cannot be moved aside. Name another.")
    target = folder.with_name(f"{folder.name}.{datetime.now().strftime('%Y%m%d-%H%M%S')}")
    while target.exists():
        target = target.with_name(target.name + "+")
    folder.rename(target)
    if (target / _KEPT_BY_GIT).exists():  # the folder belongs to the repository, its contents do not
        folder.mkdir()
        (target / _KEPT_BY_GIT).rename(folder / _KEPT_BY_GIT)
    log.info("Moved %s aside to %s", folder, target)
    return target


def plan_start(folder: Path, fresh: dict[str, Any], *, put_aside: bool = True) -> Plan:
    """Decide what a start does.

    Args:
        folder: the run folder; held by this process, where something is put aside.
        fresh: the record of a run that would begin now.
        put_aside: rename broken and foreign checkpoints on the way.

    Raises:
        UsageError: the folder holds something else than this run, or there is nothing left to train.
        DataError: the checkpoint that the user chose is not whole.
    """
    record = read_record(folder)
    wanted = fresh["config"].get("resume_from_checkpoint")
    named = Path(wanted) if isinstance(wanted, str) else None
    if record is None:
        if named is None or named.resolve().parent != folder.resolve():
            _refuse_foreign(folder)
        return _from(_chosen(named), fresh, folder)
    changed = differences(record, fresh)
    if record["status"] == "finished" and weights_fault(folder) is None:
        if changed:
            raise UsageError(_another_config(folder, "finished", changed))
        return Plan(Step.DONE, record)
    # A run that has gone on from the named checkpoint goes on from its own newest one, not from there again; the named
    # one may be gone by then, for LLaMA Factory keeps the last few alone.
    explicit = None if str(named) in record["resumed_from"] else _chosen(named)
    complete = not changed and _is_complete(folder)
    weights_alone = bool(record["config"].get("save_only_model"))
    if weights_alone and not complete:
        _refuse_weights_alone(folder)
    newest = newest_whole(folder, put_aside=put_aside and not (weights_alone and complete))
    if complete:
        return Plan(Step.FINISH, record)
    if changed and newest is not None:
        raise UsageError(_another_config(folder, "unfinished", changed))
    if wanted is False and newest is not None:
        raise UsageError(f"{newest.folder}: stands there, but resume_from_checkpoint is false. Add --overwrite.")
    if changed:
        log.info("%s: the config has changed and nothing was saved yet; it begins anew.", folder)
        return _from(explicit, fresh, folder)
    record = {**record, **{key: fresh[key] for key in ("config", "sources", "command", "processes")}}
    return _from(explicit or newest or _chosen(named), record, folder)


def _is_complete(folder: Path) -> bool:
    """Whether the final files are there: LLaMA Factory writes the weights first and `trainer_state.json` last."""
    state = read_state(folder)
    return state is not None and state["global_step"] >= state["max_steps"] and weights_fault(folder) is None


def _chosen(folder: Path | None) -> Checkpoint | None:
    """The checkpoint that the user named in `resume_from_checkpoint`, if any."""
    if folder is None:
        return None
    fault = fault_of(folder) if folder.is_dir() else "there is no such folder"
    if fault is None:
        return load_checkpoint(folder)
    whole = [str(other) for other in checkpoint_folders(folder.parent) if fault_of(other) is None]
    choice = f"Whole ones: {', '.join(whole)}." if whole else "Take the key out to begin anew."
    raise DataError(f"resume_from_checkpoint: {folder}: {fault}. {choice}")


def _refuse_foreign(folder: Path) -> None:
    if checkpoint_folders(folder) or (folder.exists() and weights_fault(folder) is None):
        raise UsageError(
            f"{folder}: holds a model or checkpoints, but no run.json, so nobody knows what they were trained on.\n"
            f"  --overwrite             moves the folder aside\n"
            f"  run_name=NAME           trains in another folder\n"
            f"  resume_from_checkpoint={folder}/checkpoint-N   goes on from one of its checkpoints"
        )


def _refuse_weights_alone(folder: Path) -> None:
    """Nothing goes on from weights alone, but they are worth keeping."""
    if kept := [path for path in checkpoint_folders(folder) if fault_of(path) == NO_OPTIMIZER]:
        raise UsageError(
            f"{folder}: was saved with save_only_model, so training cannot go on from {kept[0].name}: it holds the "
            "weights, not the optimizer's state.\n"
            "  --overwrite moves the folder aside and begins anew\n"
            f"  python evaluate_judge.py --run {shlex.quote(str(kept[0]))} measures what is there"
        )


def _another_config(folder: Path, state: str, changed: list[str]) -> str:
    shown = "\n".join(f"  {line}" for line in changed)
    return (
        f"{folder}: holds {'a' if state == 'finished' else 'an'} {state} run of another config:\n{shown}\n"
        "Start with run_name=NAME to train in another folder, or with --overwrite to move this one aside."
    )


def _from(checkpoint: Checkpoint | None, record: dict[str, Any], folder: Path) -> Plan:
    if checkpoint is None:
        return Plan(Step.BEGIN, record)
    own = checkpoint.folder.resolve().parent == folder.resolve()
    if not own:
        _refuse_nothing_left(checkpoint, record)
    record = {**record, "resumed_from": [*record["resumed_from"], str(checkpoint.folder)]}
    is_last = own and checkpoint.step >= checkpoint.max_steps
    return Plan(Step.FINISH if is_last else Step.GO_ON, record, checkpoint)


def _refuse_nothing_left(checkpoint: Checkpoint, record: Mapping[str, Any]) -> None:
    """Going on from another run's checkpoint trains it for longer, or it is a copy under another name."""
    config, state = record["config"], read_state(checkpoint.folder) or {}
    steps, epochs = int(config.get("max_steps") or -1), float(config.get("num_train_epochs", 3.0))
    if 0 < steps <= checkpoint.step:
        raise UsageError(f"max_steps={steps}: {checkpoint.folder} has trained {checkpoint.step} already. Give more.")
    trained_on = (read_record(checkpoint.folder.parent) or {}).get("dataset")
    if steps < 0 and trained_on == record["dataset"] and epochs <= float(state.get("epoch") or 0.0):
        raise UsageError(
            f"num_train_epochs={epochs:g}: {checkpoint.folder} has trained {state['epoch']:g} on this dataset already. "
            "Give more with --epochs."
        )


def clear_the_way(folder: Path, plan: Plan) -> None:
    """Put aside what would make LLaMA Factory refuse, or would be mistaken for what this start writes."""
    if plan.step is Step.BEGIN:
        for name in ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json"):
            if (folder / name).exists():
                rename_aside(folder / name, "incomplete")
        if (folder / "trainer_log.jsonl").exists():
            rename_aside(folder / "trainer_log.jsonl", "before")
    if plan.checkpoint is not None and plan.checkpoint.folder.resolve().parent == folder.resolve():
        for higher in checkpoint_folders(folder):
            if int(higher.name[11:]) > plan.checkpoint.step:
                log.info("Put %s aside: this run goes on from step %s.", higher, plan.checkpoint.step)
                rename_aside(higher, "superseded")


def finish_from(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the final files of a run that had trained all its steps when it was killed.

    LLaMA Factory itself would train one step too many. What it saves at the end is what stands in the last checkpoint,
    or, with `load_best_model_at_end`, in the best one.
    """
    state = read_state(checkpoint.folder) or {}
    best = state.get("best_model_checkpoint")
    source = folder / Path(best).name if best and (folder / Path(best).name).is_dir() else checkpoint.folder
    not_final = ("optimizer", "scheduler", "rng_state", "scaler", "global_step", "trainer_state", "pytorch_model_fsdp")
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.startswith(not_final):
            shutil.copy2(path, folder / path.name)
    # Last: a folder with it counts as finished.
    shutil.copy2(checkpoint.folder / "trainer_state.json", folder / "trainer_state.json")
    if fault := weights_fault(folder):
        raise LlamaFactoryError(f"{folder}: {fault}, and {source.name} does not have it. Start with --overwrite.")
