"""Training from the config to the checked adapter: resolve, check, launch, watch, verify, record, export."""

import errno
import logging
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prmkit import cli
from prmkit.config_file import read_yaml
from prmkit.errors import DataError, ExitCode, UsageError
from prmkit.files import only_one
from prmkit.training.attempt import Setting, carry_out, join
from prmkit.training.checkpoints import checkpoint_folders, fault_of
from prmkit.training.config import Override, ResolvedConfig, parse_assignment, resolve_config
from prmkit.training.export import Source, check_target, export_run, find_source
from prmkit.training.llamafactory import Launch
from prmkit.training.machine import this_machine
from prmkit.training.preflight import Check, errors_in, run_preflight
from prmkit.training.resume import Step, free_folder, move_aside, plan_start, run_folder_of
from prmkit.training.runs import (
    NUMERIC_COLUMNS,
    TABLE_COLUMNS,
    all_records,
    command_line,
    differences,
    log_of,
    new_record,
    read_record,
    table_rows,
)

log = logging.getLogger(__name__)

_LOCK_PATIENCE = 5.0  # seconds; a killed run's children are gone long before


@dataclass(frozen=True)
class Command:
    """What was asked for on the command line of `train.py`."""

    config: Path
    assignments: Sequence[str] = ()
    """`key=value` texts."""
    dataset: str | None = None
    epochs: str | None = None
    learning_rate: str | None = None
    batch_size: str | None = None
    export: bool = False
    export_only: str | None = None
    """A run or checkpoint folder; empty for the run of the config; None when it was not asked for."""
    validate_only: bool = False
    doctor: bool = False
    force: bool = False
    overwrite: bool = False
    runs: bool = False
    verbose: bool = False
    json: bool = False
    launch: Launch = field(default_factory=Launch)


@dataclass(frozen=True)
class Outcome:
    """What came of a command, for whoever goes on with it."""

    code: ExitCode = ExitCode.DONE
    run: Path | None = None
    """The folder of the run that is finished now."""
    exported: Path | None = None
    """The folder of the merged model."""


def execute(command: Command) -> Outcome:
    """Do what `train.py` was asked to do.

    Raises:
        PrmkitError: as each part says.
        DataError: the disk is full, or a folder may not be written to.
    """
    try:
        return _execute(command)
    except OSError as error:
        if error.errno not in _THE_DISK:
            raise
        what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        raise DataError(f"{what}. Make room or rights, then start the same command again.") from error


_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


def _execute(command: Command) -> Outcome:
    if command.export_only and "=" in command.export_only and not Path(command.export_only).exists():
        # `--export-only export_dir=x`: the folder was left out, and the next word taken for it.
        command = replace(command, export_only="", assignments=[*command.assignments, command.export_only])
    if command.runs:
        return _show_runs(command)
    if command.export_only:
        return _export_existing(command, Path(command.export_only))
    setting = resolve(command)
    if command.export_only is not None:
        folder = run_folder_of(setting.config.values, setting.config.sources)
        return _export_existing(command, folder, setting.config.values.get("export_dir"))
    if _is_finished(command, setting):
        return train(command, setting)
    _narrate(setting.config)
    checks = run_preflight(setting.config, processes=setting.processes, world_size=setting.world_size)
    _show_checks(checks)
    if command.validate_only or command.doctor:
        return _report_checks(command, checks)
    if errors_in(checks) and not command.force:
        raise UsageError("The checks above found errors. Mend them, or go on all the same with --force.")
    return train(command, setting)


# --- resolving ----------------------------------------------------------------------------------------------------


def resolve(command: Command) -> Setting:
    """Lay the command line over the config, and find out how many processes train.

    Raises:
        UsageError: something is wrong with the config or the overrides.
    """
    machine, launch = this_machine(), command.launch
    processes = max(len(machine.gpus), 1) if launch.nproc is None else launch.nproc
    world_size = processes * _nodes(launch)
    if world_size < 1:
        raise UsageError(f"--nproc {processes}: expected 1 or more.")
    overrides = _overrides(command)
    several = world_size > 1 or launch.rdzv_id is not None or len(machine.gpus) > 1
    config = resolve_config(command.config, overrides, machine=machine, torchrun=several)
    if not several and any(config.values.get(key) for key in ("deepspeed", "fsdp", "fsdp_config")):
        # They need torchrun even for one process, and that is known only now.
        config = resolve_config(command.config, overrides, machine=machine, torchrun=True)
        return Setting(config, launch, processes, world_size, torchrun=True, verbose=command.verbose)
    return Setting(config, launch, processes, world_size, several, command.verbose)


def _nodes(launch: Launch) -> int:
    """The number of nodes; of an elastic run the largest."""
    if not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", launch.nnodes):
        raise UsageError(f"--nnodes {launch.nnodes}: expected a number, or MIN:MAX for an elastic run.")
    return int(launch.nnodes.rpartition(":")[2])


def _overrides(command: Command) -> list[Override]:
    flags = {
        "dataset": ("--dataset", command.dataset),
        "num_train_epochs": ("--epochs", command.epochs),
        "learning_rate": ("--learning-rate", command.learning_rate),
        "per_device_train_batch_size": ("--batch-size", command.batch_size),
    }
    typed = [Override(key, text, flag) for key, (flag, text) in flags.items() if text is not None]
    return [*typed, *map(parse_assignment, command.assignments)]


def _narrate(config: ResolvedConfig) -> None:
    shown = {key: f"{value}  ({config.sources[key]})" for key, value in config.values.items()}
    cli.narrate_mapping("Resolved config:", shown)
    if config.dropped:
        cli.narrate_mapping("Left out:", config.dropped)


# --- checks -------------------------------------------------------------------------------------------------------


def _show_checks(checks: Sequence[Check]) -> None:
    lines = ["Checks:"]
    for check in checks:
        lines.append(f"  {check.status:<9}{check.name}: {check.found}")
        if check.advice:
            lines.append(f"  {'':<9}-> {check.advice}")
    log.info("\n".join(lines))


def _report_checks(command: Command, checks: Sequence[Check]) -> Outcome:
    errors = errors_in(checks)
    if command.json:
        cli.emit_json([{"name": c.name, "status": c.status, "found": c.found, "advice": c.advice} for c in checks])
    else:
        found = f"{len(errors)} error{'s' * (len(errors) != 1)}"
        cli.emit(f"{len(checks)} checks, {found}: {'not ready to train' if errors else 'ready to train'}")
    return Outcome(ExitCode.USAGE if errors else ExitCode.DONE)


def _is_finished(command: Command, setting: Setting) -> bool:
    """Whether there is nothing to train, so that no check is needed to say so."""
    folder = run_folder_of(setting.config.values, setting.config.sources)
    record = read_record(folder)
    if command.validate_only or command.doctor or command.overwrite or not record or record["status"] != "finished":
        return False
    return not differences(record, new_record(folder, setting.config, [], setting.world_size))


# --- training -----------------------------------------------------------------------------------------------------


def train(command: Command, setting: Setting) -> Outcome:
    """Begin, go on with, or finish the run of a config; then export it if that was asked for.

    Raises:
        PrmkitError: as each part says.
    """
    values = setting.config.values
    folder = run_folder_of(values, setting.config.sources)
    if not command.launch.is_first_node:
        join(setting, folder)
        return Outcome()
    target = Path(str(values.get("export_dir") or "exported_model"))
    fresh = new_record(folder, setting.config, command_line(), setting.world_size)
    folder = _claim(folder, fresh, command)
    with only_one(folder, "training", patience=_LOCK_PATIENCE) as lock:
        plan = plan_start(folder, fresh)
        if command.export and plan.step is not Step.DONE:
            check_target(target, overwrite=command.overwrite)
        record = carry_out(setting, folder, plan, lock)
    exported = None
    if command.export:
        source = Source(folder, record)
        exported = export_run(source, target, log_path=log_of(folder), overwrite=command.overwrite)
    _report(command, folder, record, exported, already=plan.step is Step.DONE)
    return Outcome(ExitCode.DONE, folder, exported)


def _claim(folder: Path, fresh: dict[str, Any], command: Command) -> Path:
    """The folder of this run, free for it: a finished run of another config is never overwritten."""
    if command.overwrite:
        if folder.exists():
            with only_one(folder, "training", patience=_LOCK_PATIENCE):
                move_aside(folder)
        return folder
    if "output_dir" in _typed(command) or "run_name" in _typed(command):
        return folder
    claimed = free_folder(folder, fresh)
    if claimed != folder:
        log.info("%s holds a finished run of another config; this one goes to %s.", folder, claimed)
        fresh["run"], fresh["config"]["output_dir"] = claimed.name, str(claimed)
    return claimed


def _typed(command: Command) -> set[str]:
    return {parse_assignment(text).key for text in command.assignments}


# --- results ------------------------------------------------------------------------------------------------------


def _report(command: Command, folder: Path, record: Mapping[str, Any], exported: Path | None, *, already: bool) -> None:
    if command.json:
        numbers = {
            key: record[key] for key in ("run", "status", "steps", "max_steps", "tokens", "train_loss", "eval_loss")
        }
        cli.emit_json({"folder": str(folder), **numbers, "exported": str(exported) if exported else None})
        return
    losses = [f"{name} loss {record[key]:.4f}" for name, key in (("training", "train_loss"), ("held-out", "eval_loss"))
              if record[key] is not None]  # fmt: skip
    reached = ", ".join([f"{record['steps']} steps", *losses])
    cli.emit(f"{'Already finished' if already else 'Trained'}: {folder} ({reached})")
    if exported:
        cli.emit(f"Exported: {exported}")
    for line in _next_commands(command, folder, record, exported, already=already):
        cli.emit(line)


def _next_commands(
    command: Command, folder: Path, record: Mapping[str, Any], exported: Path | None, *, already: bool
) -> list[str]:
    config = shlex.quote(str(command.config))
    place = shlex.quote(str(folder))
    lines = ["Next:"]
    if already:
        last = next((path for path in checkpoint_folders(folder) if fault_of(path) is None), None)
        epochs = float(record["config"].get("num_train_epochs", 3)) * 2
        if last:
            lines.append(
                f"  train longer:   python train.py --config {config} --epochs {epochs:g} "
                f"run_name={shlex.quote(folder.name)}-longer resume_from_checkpoint={shlex.quote(str(last))}"
            )
        lines.append(f"  train anew:     python train.py --config {config} --overwrite")
    lines.append(f"  measure it:     python evaluate_judge.py --run {place}")
    if not exported:
        lines.append(f"  merge it:       python train.py --config {config} --export-only {place}")
    base, template = shlex.quote(record["base_model"]["path"]), record["template"]
    lines.append(
        f"  talk to it:     llamafactory-cli chat --model_name_or_path {base} --adapter_name_or_path {place} "
        f"--template {template} --finetuning_type lora"
    )
    return lines


def _export_existing(command: Command, folder: Path, target: Any = None) -> Outcome:
    source = find_source(folder)
    chosen = target or next(
        (parse_assignment(text).text for text in command.assignments if text.startswith("export_dir=")),
        source.record["config"].get("export_dir") or "exported_model",
    )
    exported = export_run(source, Path(str(chosen)), log_path=log_of(source.run), overwrite=command.overwrite)
    if command.json:
        cli.emit_json({"folder": str(folder), "exported": str(exported)})
    else:
        cli.emit(f"Exported: {exported}")
    return Outcome(run=folder, exported=exported)


def _show_runs(command: Command) -> Outcome:
    saves = run_saves(command.config)
    records = list(all_records(saves))
    if command.json:
        cli.emit_json(records)
    elif records:
        cli.emit_table(str(saves), TABLE_COLUMNS, table_rows(records), numeric=NUMERIC_COLUMNS)
    else:
        cli.emit(f"{saves}: no runs yet")
    return Outcome()


def run_saves(config: Path) -> Path:
    """The folder that holds the runs of a config."""
    return Path(str(read_yaml(config).get("output_dir", "saves/run"))).parent if config.exists() else Path("saves")
