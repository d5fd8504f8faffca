"""Training from the config to the checked adapter: resolve, check, launch, watch, verify, record, export."""

import errno
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prmkit import cli
from prmkit.config_file import read_yaml
from prmkit.errors import DataError, ExitCode, UsageError
from prmkit.files import only_one
from prmkit.training.attempt import Setting, carry_out, join
from prmkit.training.check import Check, error, ok
from prmkit.training.command import Command, overrides_of
from prmkit.training.config import ResolvedConfig, resolve_config, typed_values
from prmkit.training.export import EXPORT_KEYS, Source, check_target, export_run, find_source
from prmkit.training.launch import refuse_nonsense
from prmkit.training.machine import this_machine
from prmkit.training.next_steps import next_commands
from prmkit.training.preflight import errors_in, run_preflight
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
        raise DataError(f"{what}. See to it, or name another place; then start the same command again.") from error


_THE_DISK = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EISDIR,
    errno.ENAMETOOLONG,
}  # fmt: skip


def _execute(command: Command) -> Outcome:
    if command.export_only and "=" in command.export_only and not Path(command.export_only).exists():
        # `--export-only export_dir=x`: the folder was left out, and the next word taken for it.
        command = replace(command, export_only="", assignments=[*command.assignments, command.export_only])
    if command.runs:
        return _show_runs(command)
    if command.export_only is not None and command.validate_only:
        raise UsageError("--export-only exports and --validate-only only looks: choose.")
    if command.export_only:
        return _export_existing(command, Path(command.export_only), _typed_for_export(command))
    setting = resolve(command)
    values, sources = setting.config.values, setting.config.sources
    if command.export_only is not None:
        return _export_existing(command, run_folder_of(values, sources), _typed_for_export(command))
    if _is_finished(command, setting):
        return train(command, setting)
    _narrate(setting.config)
    checks = run_preflight(setting.config, processes=setting.processes, world_size=setting.world_size)
    checks = [*checks, *_check_run_folder(command, setting)]
    _show_checks(checks)
    if command.validate_only:
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
    refuse_nonsense(launch)
    processes = max(len(machine.gpus), 1) if launch.nproc is None else launch.nproc
    world_size = processes * launch.most_nodes
    overrides = overrides_of(command)
    several = world_size > 1 or launch.rdzv_id is not None or len(machine.gpus) > 1
    config = resolve_config(command.config, overrides, machine=machine, torchrun=several, files=True)
    if not several and any(config.values.get(key) for key in ("deepspeed", "fsdp", "fsdp_config")):
        # They need torchrun even for one process, and that is known only now.
        config = resolve_config(command.config, overrides, machine=machine, torchrun=True)
        return Setting(config, launch, processes, world_size, torchrun=True, verbose=command.verbose)
    return Setting(config, launch, processes, world_size, several, command.verbose)


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
    if command.validate_only or command.overwrite:
        return False
    folder = run_folder_of(setting.config.values, setting.config.sources)
    record = read_record(folder)
    if not record or record["status"] != "finished":
        return False
    return not differences(record, new_record(folder, setting.config, [], setting.world_size))


def _check_run_folder(command: Command, setting: Setting) -> Iterator[Check]:
    """Whether the run may stand where it is to stand; without touching anything."""
    if command.overwrite or not command.launch.is_first_node:
        return
    name = "run folder"
    try:
        folder = run_folder_of(setting.config.values, setting.config.sources)
        fresh = new_record(folder, setting.config, [], setting.world_size)
        folder = _place(folder, fresh, command)
        plan = plan_start(folder, fresh, put_aside=False)
    except (DataError, UsageError) as refusal:
        yield error(name, str(refusal), "")
    else:
        what = "is finished" if plan.step is Step.DONE else f"is to {plan.step}"
        where = f" from step {plan.checkpoint.step}" if plan.checkpoint else ""
        yield ok(name, f"{folder}: the run {what}{where}")


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
    if command.overwrite and folder.exists():
        with only_one(folder, "training", patience=_LOCK_PATIENCE):
            move_aside(folder)
    claimed = _place(folder, fresh, command)
    if claimed != folder:
        log.info("%s holds a finished run of another config; this one goes to %s.", folder, claimed)
        fresh["run"], fresh["config"]["output_dir"] = claimed.name, str(claimed)
    return claimed


def _place(folder: Path, fresh: dict[str, Any], command: Command) -> Path:
    """A folder that the user typed is meant; one from the file may be another run's by now."""
    typed = {override.key for override in overrides_of(command)}
    return folder if typed & {"output_dir", "run_name"} else free_folder(folder, fresh)


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
    for line in next_commands(command, folder, record, exported, already=already):
        cli.emit(line)


_FINDS_THE_RUN = ("output_dir", "run_name")


def _typed_for_export(command: Command) -> dict[str, Any]:
    """What was typed beside `--export-only`. Without a folder, `run_name` and `output_dir` say which run is meant.

    Raises:
        UsageError: it is nothing that an export takes, or no value of its key; a run is exported as it was trained.
    """
    found_by = () if command.export_only else _FINDS_THE_RUN
    overrides = [override for override in overrides_of(command) if override.key not in found_by]
    if strange := [override.key for override in overrides if override.key not in EXPORT_KEYS]:
        raise UsageError(
            f"{', '.join(strange)}: a run is exported as it was trained. An export takes {', '.join(EXPORT_KEYS)}."
        )
    return typed_values(overrides)


def _export_existing(command: Command, folder: Path, typed: Mapping[str, Any]) -> Outcome:
    source = find_source(folder)
    source = replace(source, record={**source.record, "config": {**source.record["config"], **typed}})
    target = Path(str(source.record["config"].get("export_dir") or "exported_model"))
    exported = export_run(source, target, log_path=log_of(source.run), overwrite=command.overwrite)
    if command.json:
        cli.emit_json({"folder": str(folder), "exported": str(exported)})
    else:
        cli.emit(f"Exported: {exported}")
    return Outcome(run=folder, exported=exported)


def _show_runs(command: Command) -> Outcome:
    saves = run_saves(command)
    records = list(all_records(saves))
    if command.json:
        cli.emit_json(records)
    elif records:
        cli.emit_table(str(saves), TABLE_COLUMNS, table_rows(records), numeric=NUMERIC_COLUMNS)
    else:
        cli.emit(f"{saves}: no runs yet")
    return Outcome()


def run_saves(command: Command) -> Path:
    """The folder that holds the runs of a config.

    Raises:
        UsageError: the config is not there, or no YAML.
    """
    values = {} if command.config == Command.config and not command.config.exists() else read_yaml(command.config)
    values |= {override.key: override.text for override in overrides_of(command)}
    return Path(str(values.get("output_dir") or "saves/run")).parent
