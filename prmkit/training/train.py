"""The commands of `train.py`, one function per command: check, train, export, list runs."""

import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prmkit import cli
from prmkit.errors import DataError, ExitCode, UsageError
from prmkit.files import exclusive_lock
from prmkit.llamafactory_schema import read_yaml
from prmkit.paths import export_folder
from prmkit.training.checks import Check, error, errors_in, ok
from prmkit.training.config import ResolvedConfig, resolve_config, typed_values
from prmkit.training.environment import this_machine
from prmkit.training.export import EXPORT_KEYS, Source, check_target, export_run, find_source
from prmkit.training.launcher import check_launch
from prmkit.training.options import DEFAULT_CONFIG, Outcome, TrainOptions, base_command, overrides_of, typed_command
from prmkit.training.preflight import run_checks
from prmkit.training.records import (
    NUMERIC_COLUMNS,
    TABLE_COLUMNS,
    all_records,
    contents_changed,
    differences,
    log_path_of,
    new_record,
    read_record,
    table_rows,
)
from prmkit.training.resume import Action, back_up, decide_start, run_folder_of
from prmkit.training.resume import free_folder as free_run_folder
from prmkit.training.run import Setup, carry_out, run_worker_node, write_card

log = logging.getLogger(__name__)

_LOCK_PATIENCE = 5.0  # seconds; a killed run's children end much sooner


def execute(options: TrainOptions) -> Outcome:
    """Run the command.

    Raises:
        PrmkitError: see the individual functions.
    """
    folder = options.export_only
    if folder and "=" in folder and not Path(folder).exists():
        # `--export-only export_dir=x`: the folder was omitted, so the next word was read as the folder.
        options = replace(options, export_only="", assignments=[*options.assignments, folder])
    if options.runs:
        return list_runs(options)
    if options.export_only is not None:
        if options.validate_only:
            raise UsageError("--export-only and --validate-only are mutually exclusive. Use only one.")
        return export_existing(options)
    request = _prepare(options)
    if options.validate_only:
        return validate(options, request)
    if not _is_finished(options, request):
        checks = _check(options, request)
        if errors_in(checks) and not options.force:
            count = _count(len(errors_in(checks)), "error")
            raise UsageError(f"the checks found {count}:\n{_list_errors(checks)}\nFix them, or add --force.")
    return train(options, request)


# --- resolving ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _TrainRequest:
    """What the command line requests: how to train, where, and the run.json of a run that would begin now."""

    setup: Setup
    folder: Path
    fresh: dict[str, Any]


def _prepare(options: TrainOptions) -> _TrainRequest:
    if options.lacks_config:
        raise UsageError(
            f"there is no {DEFAULT_CONFIG} in {Path.cwd()}. Run this from the project folder, or pass --config FILE"
        )
    setup = resolve(options)
    folder = run_folder_of(setup.config.values, setup.config.sources)
    return _TrainRequest(setup, folder, new_record(folder, setup.config, setup.world_size))


def resolve(options: TrainOptions) -> Setup:
    """Apply the command line to the config, and determine the number of training processes.

    Raises:
        UsageError: something is wrong with the config or the overrides.
    """
    machine, launch = this_machine(), options.launch
    check_launch(launch)
    processes = max(len(machine.gpus), 1) if launch.nproc is None else launch.nproc
    world_size = processes * launch.most_nodes
    overrides = overrides_of(options)
    torchrun = world_size > 1 or launch.rdzv_id is not None or len(machine.gpus) > 1
    config = resolve_config(options.config, overrides, machine=machine, torchrun=torchrun, files=True)
    if not torchrun and any(config.values.get(key) for key in ("deepspeed", "fsdp", "fsdp_config")):
        # DeepSpeed and FSDP need torchrun even for one process, and only the resolved config shows that they are used.
        torchrun = True
        config = resolve_config(options.config, overrides, machine=machine, torchrun=True)
    return Setup(config, launch, processes, world_size, torchrun, options.verbose)


# --- checking -----------------------------------------------------------------------------------------------------


def validate(options: TrainOptions, request: _TrainRequest) -> Outcome:
    """Run every check and report the results, without changing anything."""
    checks = _check(options, request)
    errors = errors_in(checks)
    found = f"{_count(len(checks), 'check')}, {_count(len(errors), 'error')}"
    if options.json:
        cli.emit_json([{"name": c.name, "status": c.status, "found": c.found, "advice": c.advice} for c in checks])
    elif errors:
        cli.emit(f"{found}: not ready to train\n{_list_errors(checks)}")
    else:
        command = typed_command(options) + ["--overwrite"] * options.overwrite
        cli.emit(f"{found}: ready to train\nNext:\n  train:  {shlex.join(command)}")
    return Outcome(ExitCode.USAGE if errors else ExitCode.DONE)


def _check(options: TrainOptions, request: _TrainRequest) -> list[Check]:
    _show_config(request.setup.config, options)
    log.info("Checks:")
    setup, config = request.setup, request.setup.config
    settings = {
        "values": dict(config.values), "dropped": dict(config.dropped), "sources": dict(config.sources),
        "processes": setup.processes, "world_size": setup.world_size, "evaluate": options.evaluate,
    }  # fmt: skip
    checks = run_checks(settings, _show_check)
    for check in _check_run_folder(options, request):
        _show_check(check)
        checks.append(check)
    return checks


def _show_config(config: ResolvedConfig, options: TrainOptions) -> None:
    """Show the keys that differ from the file; with `--verbose`, all keys."""
    wanted = [key for key in config.values if options.verbose or config.sources[key] != str(options.config)]
    same = len(config.values) - len(wanted)
    shown = {key: f"{config.values[key]}  ({config.sources[key]})" for key in wanted}
    rest = f"{_count(same, 'key')} as in {options.config} (--verbose shows them)"
    if shown:
        cli.narrate_mapping(f"Resolved config, besides {rest}:" if same else "Resolved config:", shown)
    else:
        log.info("Resolved config: %s", rest)
    if config.dropped:
        cli.narrate_mapping("Left out:", config.dropped)


def _show_check(check: Check | str) -> None:
    log.info("%s", f"  {'…':<9}{check}" if isinstance(check, str) else _check_lines(check))


def _check_lines(check: Check) -> str:
    return f"  {check.status:<9}{check.name}: {check.found}" + (f"\n  {'':<9}-> {check.advice}" if check.advice else "")


def _list_errors(checks: Sequence[Check]) -> str:
    return "\n".join(map(_check_lines, errors_in(checks)))


def _check_run_folder(options: TrainOptions, request: _TrainRequest) -> Iterator[Check]:
    """Check that the run may use its folder, without changing anything."""
    if options.overwrite or not options.launch.is_first_node:
        return
    name = "run folder"
    try:
        folder = _choose_folder(options, request)
        decision = decide_start(folder, request.fresh, rename=False)
    except (DataError, UsageError) as failure:
        yield error(name, str(failure))
        return
    step = decision.checkpoint.step if decision.checkpoint else 0
    descriptions = {
        Action.BEGIN: "a new run", Action.RESUME: f"the run resumes from step {step}",
        Action.FINISH: "all steps are trained; only the final files are missing", Action.DONE: "the run is finished",
    }  # fmt: skip
    yield ok(name, f"{folder}: {descriptions[decision.action]}")


def _is_finished(options: TrainOptions, request: _TrainRequest) -> bool:
    """Return whether there is nothing to train, and so nothing to check."""
    record = None if options.overwrite else read_record(_choose_folder(options, request))
    return record is not None and record["status"] == "finished" and not differences(record, request.fresh)


# --- training -----------------------------------------------------------------------------------------------------


def train(options: TrainOptions, request: _TrainRequest) -> Outcome:
    """Begin, resume, or finish the run of a config; then export it if requested.

    Raises:
        PrmkitError: see the individual functions.
    """
    if not options.launch.is_first_node:
        run_worker_node(request.setup, request.folder)
        return Outcome()
    target = export_folder(request.setup.config.values)
    folder = _claim(options, request)
    with exclusive_lock(folder, "training", patience=_LOCK_PATIENCE) as lock:
        decision = decide_start(folder, request.fresh)
        if options.export and decision.action is not Action.DONE:
            check_target(target, overwrite=options.overwrite)
        record = carry_out(request.setup, folder, decision, lock)
    done = decision.action is Action.DONE
    if not options.json:
        cli.emit(f"{'Already finished' if done else 'Trained'}: {folder} ({_reached(record)})")
    exported = _export(options, Source(folder, record), target) if options.export else None
    if options.json:
        keys = ("run", "status", "steps", "max_steps", "tokens", "train_loss", "eval_loss")
        exported_to = str(exported) if exported else None
        cli.emit_json({"folder": str(folder), **{key: record[key] for key in keys}, "exported": exported_to})
    return Outcome(ExitCode.DONE, folder, record, exported, was_finished=done)


def _claim(options: TrainOptions, request: _TrainRequest) -> Path:
    """Choose this run's folder, so that a finished run of another config is never overwritten."""
    if options.overwrite and request.folder.exists():
        with exclusive_lock(request.folder, "training", patience=_LOCK_PATIENCE):
            back_up(request.folder)
    claimed = _choose_folder(options, request)
    if claimed != request.folder:
        _check_training_is_meant(options, request, claimed)
        log.info("%s contains a finished run with different settings; using %s instead.", request.folder, claimed)
        request.fresh["run"], request.fresh["config"]["output_dir"] = claimed.name, str(claimed)
    return claimed


def _choose_folder(options: TrainOptions, request: _TrainRequest) -> Path:
    """Return the typed folder or, because the folder in the file may contain another run, the next free one."""
    typed = {override.key for override in overrides_of(options)}
    return request.folder if typed & {"output_dir", "run_name"} else free_run_folder(request.folder, request.fresh)


def _check_training_is_meant(options: TrainOptions, request: _TrainRequest, claimed: Path) -> None:
    """Refuse `--export` alone after a run with other settings: it most likely means that run, not hours of training.

    Raises:
        UsageError: nothing on the command line requests another training run.
    """
    typed = {override.key for override in overrides_of(options)} - set(EXPORT_KEYS)
    earlier = read_record(request.folder)
    if not options.export or options.evaluate or typed or earlier is None or read_record(claimed) is not None:
        return
    found = differences(earlier, request.fresh)
    if any(contents_changed(line) for line in found):
        return  # new data is a reason to train again
    changed = "\n".join(f"  {line}" for line in found)
    base = base_command(options)
    raise UsageError(
        f"{request.folder} was trained with settings that differ from {options.config}:\n{changed}\n"
        f"Nothing was trained. To export that run, or to train with the settings of {options.config}:\n"
        f"  {shlex.join([*base, '--export-only', str(request.folder)])}\n"
        f"  {shlex.join([*base, '--export', f'run_name={claimed.name}'])}"
    )


def _reached(record: Mapping[str, Any]) -> str:
    losses = [f"{name} loss {record[key]:.4f}"
              for name, key in (("last training", "train_loss"), ("held-out", "eval_loss"))
              if record[key] is not None]  # fmt: skip
    return ", ".join([_count(record["steps"], "step"), *losses])


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


# --- exporting ----------------------------------------------------------------------------------------------------


def export_existing(options: TrainOptions) -> Outcome:
    """Merge a training run or checkpoint that already exists.

    Raises:
        UsageError: a key was set that an export does not take; a run is exported as it was trained.
        PrmkitError: see the export.
    """
    finding: tuple[str, ...] = ()
    if options.export_only:
        folder = Path(options.export_only)
    else:
        config = resolve(options).config
        folder, finding = run_folder_of(config.values, config.sources), ("output_dir", "run_name")
    typed = _typed_for_export(options, finding)
    source = find_source(folder)
    if source.record["config"].get("trust_remote_code") and typed.get("trust_remote_code") is not True:
        raise UsageError(
            f"{folder}: its base model has its own code, which would run. If you trust "
            f"{source.record['base_model']['path']}, add trust_remote_code=true"
        )
    source = replace(source, record={**source.record, "config": {**source.record["config"], **typed}})
    target = export_folder(source.record["config"])
    exported = _export(options, source, target)
    if options.json:
        cli.emit_json({"folder": str(folder), "exported": str(exported)})
    return Outcome(ExitCode.DONE, folder, source.record, exported, was_finished=True)


def _typed_for_export(options: TrainOptions, finding: Sequence[str]) -> dict[str, Any]:
    allowed = (*EXPORT_KEYS, "trust_remote_code")
    overrides = [override for override in overrides_of(options) if override.key not in finding]
    if strange := [override.key for override in overrides if override.key not in allowed]:
        raise UsageError(
            f"{', '.join(strange)} cannot be set for an export, because a run is exported as it was trained. "
            f"Only {', '.join(EXPORT_KEYS)} can be set."
        )
    return typed_values(overrides)


def _export(options: TrainOptions, source: Source, target: Path) -> Path:
    exported = export_run(source, target, log_path=log_path_of(source.run), overwrite=options.overwrite)
    write_card(exported, source.run, source.record)
    if not options.json:
        cli.emit(f"Exported: {exported}")
    return exported


# --- listing ------------------------------------------------------------------------------------------------------


def list_runs(options: TrainOptions) -> Outcome:
    """List the training runs in the parent folder of the config's `output_dir`; works in any folder with a config.

    Raises:
        UsageError: the config is missing, or not YAML.
    """
    base = Path(__file__).resolve().parents[2] if options.lacks_config else Path()
    config = base / options.config
    values = {} if options.lacks_config and not config.exists() else read_yaml(config)
    values |= {override.key: override.text for override in overrides_of(options)}
    typed = any(override.key == "output_dir" for override in overrides_of(options))
    saves = (Path() if typed else base) / Path(str(values.get("output_dir") or "saves/run")).parent
    records = list(all_records(saves))
    if options.json:
        cli.emit_json(records)
    elif records:
        cli.emit_table(str(saves), TABLE_COLUMNS, table_rows(records), numeric=NUMERIC_COLUMNS)
    else:
        cli.emit(f"{saves}: no runs yet")
    return Outcome()
