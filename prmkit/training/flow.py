"""Training from the config to the checked adapter: resolve, check, launch, watch, verify, record, export."""

import logging
import math
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prmkit import cli
from prmkit.errors import ExitCode, Interrupted, LlamaFactoryError, UsageError
from prmkit.files import only_one, write_text
from prmkit.training import llamafactory, monitoring
from prmkit.training.checkpoints import checkpoint_folders, fault_of, newest_whole, read_log, read_state, weights_fault
from prmkit.training.config import Override, ResolvedConfig, parse_assignment, render_yaml, resolve_config
from prmkit.training.export import Source, check_target, export_run, find_source
from prmkit.training.failures import explain, log_tail
from prmkit.training.llamafactory import Launch
from prmkit.training.machine import this_machine
from prmkit.training.preflight import Check, errors_in, run_preflight
from prmkit.training.resume import (
    Plan,
    Step,
    clear_the_way,
    finish_from,
    free_folder,
    move_aside,
    plan_start,
    run_folder_of,
)
from prmkit.training.runs import (
    NUMERIC_COLUMNS,
    RENDERED,
    TABLE_COLUMNS,
    all_records,
    command_line,
    new_record,
    now,
    table_rows,
    write_record,
)

log = logging.getLogger(__name__)

LOGS = Path("logs")
FOLLOWED = "trainer_log.jsonl"
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
class Setting:
    """A resolved config and how it is launched."""

    config: ResolvedConfig
    processes: int
    """On this node."""
    world_size: int
    """On all nodes."""
    torchrun: bool


def execute(command: Command) -> ExitCode:
    """Do what `train.py` was asked to do.

    Raises:
        PrmkitError: as each part says.
    """
    if command.runs:
        return _show_runs(command)
    if command.export_only:
        return _export_existing(command, Path(command.export_only))
    setting = resolve(command)
    if command.export_only is not None:
        folder = run_folder_of(setting.config.values, setting.config.sources)
        return _export_existing(command, folder, setting.config.values.get("export_dir"))
    _narrate(setting.config)
    checks = run_preflight(setting.config, world_size=setting.world_size, torchrun=setting.torchrun)
    _show_checks(checks)
    if command.validate_only or command.doctor:
        return _report_checks(command, checks)
    if errors_in(checks) and not command.force:
        raise UsageError("The checks above found errors. Mend them, or go on all the same with --force.")
    return _train_and_export(command, setting)


# --- resolving ----------------------------------------------------------------------------------------------------


def resolve(command: Command) -> Setting:
    """Lay the command line over the config, and find out how many processes train.

    Raises:
        UsageError: something is wrong with the config or the overrides.
    """
    machine, launch = this_machine(), command.launch
    processes = launch.nproc or max(len(machine.gpus), 1)
    world_size = processes * int(launch.nnodes.rpartition(":")[2])
    overrides = _overrides(command)
    several = world_size > 1 or launch.rdzv_id is not None or len(machine.gpus) > 1
    config = resolve_config(command.config, overrides, machine=machine, torchrun=several)
    if not several and any(config.values.get(key) for key in ("deepspeed", "fsdp", "fsdp_config")):
        # They need torchrun even for one process, and that is known only now.
        config = resolve_config(command.config, overrides, machine=machine, torchrun=True)
        return Setting(config, processes, world_size, torchrun=True)
    return Setting(config, processes, world_size, several)


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
    lines = [f"  {check.status:<8}{check.name}: {check.found} {check.advice}".rstrip() for check in checks]
    log.info("\n".join(["Checks:", *lines]))


def _report_checks(command: Command, checks: Sequence[Check]) -> ExitCode:
    errors = errors_in(checks)
    if command.json:
        cli.emit_json([{"name": c.name, "status": c.status, "found": c.found, "advice": c.advice} for c in checks])
    else:
        cli.emit(f"{len(checks)} checks, {len(errors)} errors: {'not ready to train' if errors else 'ready to train'}")
    return ExitCode.USAGE if errors else ExitCode.DONE


# --- training -----------------------------------------------------------------------------------------------------


def _train_and_export(command: Command, setting: Setting) -> ExitCode:
    values = setting.config.values
    folder = run_folder_of(values, setting.config.sources)
    if not command.launch.is_first_node:
        _join(command, setting, folder)
        return ExitCode.DONE
    target = Path(str(values.get("export_dir") or "exported_model"))
    fresh = new_record(folder, setting.config, command_line(), setting.world_size)
    folder = _claim(folder, fresh, command)
    with only_one(folder, "training", patience=_LOCK_PATIENCE) as lock:
        plan = plan_start(folder, fresh)
        if command.export and plan.step is not Step.DONE:
            check_target(target, overwrite=command.overwrite)
        record = _train(command, setting, folder, plan, lock)
    exported = None
    if command.export:
        source = Source(folder, record)
        exported = export_run(source, target, log_path=LOGS / f"{folder.name}.log", overwrite=command.overwrite)
    _report(command, folder, record, exported, already=plan.step is Step.DONE)
    return ExitCode.DONE


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
        fresh["run"] = claimed.name
    return claimed


def _typed(command: Command) -> set[str]:
    return {parse_assignment(text).key for text in command.assignments}


def _train(command: Command, setting: Setting, folder: Path, plan: Plan, lock: int) -> dict[str, Any]:
    """Carry a plan out; the run's record as it is afterwards."""
    if plan.step is Step.DONE:
        return plan.record
    clear_the_way(folder, plan)
    record = {**plan.record, "status": "running", "ended": None}
    write_record(folder, record)
    with _recorded(folder, record):
        if plan.step is Step.FINISH and plan.checkpoint is not None:
            log.info("%s had trained all its steps; writing the final files.", folder)
            finish_from(plan.checkpoint, folder)
        else:
            _launch(command, setting, folder, plan, lock)
            _verify(folder, setting.config.values)
    return record


@contextmanager
def _recorded(folder: Path, record: dict[str, Any]) -> Iterator[None]:
    """Write into the record how the block ended, and the numbers that the run has reached."""
    status = "failed"
    try:
        yield
        status = "finished"
    except (Interrupted, KeyboardInterrupt):
        status = "interrupted"
        raise
    finally:
        record |= {"status": status, "ended": now(), **_numbers(folder, finished=status == "finished")}
        write_record(folder, record)
        state = _latest_state(folder, finished=status == "finished")
        monitoring.draw_curves(state.get("log_history", []), folder.name, folder / "loss.png")


def _latest_state(folder: Path, *, finished: bool) -> dict[str, Any]:
    if finished:
        return read_state(folder) or {}
    newest = newest_whole(folder, put_aside=False)
    return (read_state(newest.folder) if newest else None) or {}


def _numbers(folder: Path, *, finished: bool) -> dict[str, Any]:
    """Steps, tokens and last losses. LLaMA Factory's own `train_loss` is wrong after every resume."""
    state = _latest_state(folder, finished=finished)
    train, held_out = monitoring.curves(state.get("log_history", []))
    logged = list(read_log(folder / FOLLOWED))
    return {
        "steps": state.get("global_step", 0),
        "max_steps": state.get("max_steps") or next((line["total_steps"] for line in reversed(logged)), None),
        "tokens": state.get("num_input_tokens_seen") or None,
        "train_loss": train[-1][1] if train else None,
        "eval_loss": held_out[-1][1] if held_out else None,
    }


def _launch(command: Command, setting: Setting, folder: Path, plan: Plan, lock: int) -> None:
    """Run LLaMA Factory to its end.

    Raises:
        LlamaFactoryError: it failed.
        Interrupted: a signal stopped it.
    """
    values = _launch_values(setting.config.values, folder, plan, command.launch)
    rendered = folder / RENDERED
    write_text(rendered, render_yaml(values))
    checkpoint = plan.checkpoint
    start = monitoring.Start(checkpoint.step, checkpoint.tokens) if checkpoint else monitoring.Start()
    log_path = LOGS / f"{folder.name}.log"
    line = llamafactory.train_command(rendered, command.launch, setting.processes, torchrun=setting.torchrun)
    begin = _begin_log(log_path, line)
    where = f"goes on from step {start.step}" if checkpoint else "begins"
    log.info("Run %s %s; log: %s", folder, where, log_path)
    with (
        monitoring.followed(folder / FOLLOWED, LOGS / FOLLOWED, start) as follower,
        monitoring.progress(folder.name, start) as show,
        monitoring.echoed(log_path, begin) if command.verbose else nullcontext(lambda: None) as echo,
        llamafactory.started(line, log_path, held=lock, through_torchrun=setting.torchrun) as child,
    ):
        stopping = _Stopping(folder, start)

        def on_poll() -> None:
            for entry in follower.new_entries():
                stopping.see(entry)
                show(entry)
            echo()

        try:
            code = llamafactory.run_to_end(child, on_poll, is_saved=stopping.is_saved, patience=stopping.patience)
        except Interrupted as stop:
            raise Interrupted(_how_to_go_on(folder), stop.exit_code) from None
    if code != 0:
        failure = explain(log_tail(log_path, begin), code, values)
        raise LlamaFactoryError(f"{failure}\nThe whole log: {log_path}\n{_again('Mended')}")


def _launch_values(values: Mapping[str, Any], folder: Path, plan: Plan, launch: Launch) -> dict[str, Any]:
    kept = {
        key: value for key, value in values.items() if key not in {"resume_from_checkpoint", "overwrite_output_dir"}
    }
    kept["output_dir"] = str(folder)
    # An elastic run that torchrun starts again must find the newest checkpoint itself.
    if plan.checkpoint and not launch.max_restarts:
        kept["resume_from_checkpoint"] = str(plan.checkpoint.folder)
    return kept


def _begin_log(log_path: Path, line: Sequence[str]) -> int:
    """Write a heading for this launch; the byte from which on its output stands."""
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("ab") as stream:
        stream.write(f"=== {now()}  {shlex.join(line)}\n".encode())
        return stream.tell()


class _Stopping:
    """Knows when a run that was asked to stop has saved, and how long that may take."""

    def __init__(self, folder: Path, start: monitoring.Start) -> None:
        self.folder, self.start = folder, start
        self.before = {path.name for path in checkpoint_folders(folder)}
        self.seconds_a_step = 0.0

    def see(self, entry: Mapping[str, Any]) -> None:
        self.seconds_a_step = monitoring.seconds_a_step(entry, self.start)

    def patience(self) -> float:
        """Two steps and the saving: a checkpoint can only be written between steps."""
        self.before = {path.name for path in checkpoint_folders(self.folder) if fault_of(path) is None}
        return 40 + 2 * self.seconds_a_step

    def is_saved(self) -> bool:
        return any(path.name not in self.before and fault_of(path) is None for path in checkpoint_folders(self.folder))


def _how_to_go_on(folder: Path) -> str:
    newest = newest_whole(folder, put_aside=False)
    kept = f"{newest.folder} is kept." if newest else "No checkpoint was written yet."
    return f"interrupted. {kept} {_again('Go on')}"


def _again(what: str) -> str:
    return f"{what} with the same command: {shlex.join(['python', *sys.argv])}"


def _verify(folder: Path, values: Mapping[str, Any]) -> None:
    """LLaMA Factory's exit code 0 is not trusted.

    Raises:
        LlamaFactoryError: the weights are not whole, or not all steps were trained, or the loss is not a number.
    """
    if fault := weights_fault(folder):
        raise LlamaFactoryError(f"{folder}: LLaMA Factory ended without an error, but {fault}.")
    state = read_state(folder)
    if state is None:
        raise LlamaFactoryError(f"{folder}: LLaMA Factory ended without an error, but left no trainer_state.json.")
    if state["global_step"] < state["max_steps"] and not _stopped_by_itself(state, values):
        steps = f"{state['global_step']} of {state['max_steps']} steps"
        raise LlamaFactoryError(f"{folder}: training stopped early, after {steps}. {_again('Go on')}")
    train, held_out = monitoring.curves(state.get("log_history", []))
    if any(not math.isfinite(loss) for _, loss in train[-1:] + held_out[-1:]):
        raise LlamaFactoryError(f"{folder}: the loss is not a number any more. Try a lower learning rate: -lr X")


def _stopped_by_itself(state: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    callback = state.get("stateful_callbacks", {}).get("EarlyStoppingCallback")
    return bool(values.get("early_stopping_steps")) and callback is not None


def _join(command: Command, setting: Setting, folder: Path) -> None:
    """Take part in a run that another node leads: no lock, no record, a log of its own."""
    name = f"{folder.name}.node{command.launch.node_rank}"
    newest = newest_whole(folder, put_aside=False)
    plan = Plan(Step.GO_ON if newest else Step.BEGIN, {}, newest)
    rendered, log_path = LOGS / f"{name}.yaml", LOGS / f"{name}.log"
    values = _launch_values(setting.config.values, folder, plan, command.launch)
    write_text(rendered, render_yaml(values))
    line = llamafactory.train_command(rendered, command.launch, setting.processes, torchrun=True)
    begin = _begin_log(log_path, line)
    log.info("Node %s of %s; log: %s", command.launch.node_rank, command.launch.nnodes, log_path)
    with llamafactory.started(line, log_path, through_torchrun=True) as child:
        code = llamafactory.run_to_end(child, lambda: None, is_saved=lambda: False, patience=lambda: 60.0)
    if code != 0:
        raise LlamaFactoryError(f"{explain(log_tail(log_path, begin), code, values)}\nThe whole log: {log_path}")


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


def _export_existing(command: Command, folder: Path, target: Any = None) -> ExitCode:
    source = find_source(folder)
    chosen = target or next(
        (parse_assignment(text).text for text in command.assignments if text.startswith("export_dir=")),
        source.record["config"].get("export_dir") or "exported_model",
    )
    exported = export_run(
        source, Path(str(chosen)), log_path=LOGS / f"{source.record['run']}.log", overwrite=command.overwrite
    )
    if command.json:
        cli.emit_json({"folder": str(folder), "exported": str(exported)})
    else:
        cli.emit(f"Exported: {exported}")
    return ExitCode.DONE


def _show_runs(command: Command) -> ExitCode:
    saves = run_saves(command.config)
    records = list(all_records(saves))
    if command.json:
        cli.emit_json(records)
    elif records:
        cli.emit_table(str(saves), TABLE_COLUMNS, table_rows(records), numeric=NUMERIC_COLUMNS)
    else:
        cli.emit(f"{saves}: no runs yet")
    return ExitCode.DONE


def run_saves(config: Path) -> Path:
    """The folder that holds the runs of a config."""
    from prmkit.training.config import read_yaml

    return Path(str(read_yaml(config).get("output_dir", "saves/run"))).parent if config.exists() else Path("saves")
