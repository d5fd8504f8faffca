"""Execute one start of a training run: launch and follow LLaMA Factory, check its results, write run.json."""

import logging
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prmkit.errors import DataError, Interrupted, LlamaFactoryError
from prmkit.files import read_json, write_text
from prmkit.model_card import write_model_card
from prmkit.paths import EVALUATION, METRICS_FILE
from prmkit.training import launcher
from prmkit.training.checkpoints import TRAINER_LOG, checkpoint_fault, content_fault, read_log, read_state
from prmkit.training.config import ResolvedConfig, render_yaml
from prmkit.training.launcher import Launch
from prmkit.training.monitoring import (
    ResumedAt,
    curves,
    draw_curves,
    echoed,
    followed,
    progress,
    reached,
    seconds_a_step,
)
from prmkit.training.records import RESOLVED_CONFIG, log_path_of, now, write_record
from prmkit.training.resume import (
    Action,
    Checkpoint,
    Decision,
    checkpoint_folders,
    newest_checkpoint,
    prepare_run_folder,
    rename_with_prefix,
    restore_final_files,
)

log = logging.getLogger(__name__)

_LARGEST_LOG = 16 << 20
"""Bytes of a run's log above which a new one is started; the previous one is kept as `NAME.log.1`."""


@dataclass(frozen=True)
class Setup:
    """A resolved config and how LLaMA Factory is started with it."""

    config: ResolvedConfig
    launch: Launch
    processes: int
    """The number of processes on this node."""
    world_size: int
    """The number of processes on all nodes."""
    torchrun: bool
    verbose: bool = False
    """Show everything that LLaMA Factory prints."""


def carry_out(setup: Setup, folder: Path, decision: Decision, lock: int) -> dict[str, Any]:
    """Carry out a decision of `decide_start`; return the run.json afterwards.

    Raises:
        LlamaFactoryError: LLaMA Factory failed, or did not leave a complete run.
        Interrupted: a signal stopped it.
    """
    if decision.action is Action.DONE:
        return decision.record
    prepare_run_folder(folder, decision)
    record = {**decision.record, "status": "running", "ended": None}
    write_record(folder, record)
    with _recorded(folder, record):
        if decision.action is not Action.FINISH:
            _train(setup, folder, decision.checkpoint, lock, record)
        elif decision.checkpoint is not None:
            log.info("%s had trained all its steps; writing the final files.", folder)
            restore_final_files(decision.checkpoint, folder)
        verify_run(folder, setup.config.values)
    return record


# --- run.json -----------------------------------------------------------------------------------------------------


@contextmanager
def _recorded(folder: Path, record: dict[str, Any]) -> Iterator[None]:
    """Record how the block ended, with the final measurements; for a finished run, also write its model card."""
    status = "failed"
    try:
        yield
        status = "finished"
    except (Interrupted, KeyboardInterrupt):
        status = "interrupted"
        raise
    finally:
        finished = status == "finished"
        record |= {"status": status, "ended": now(), **_reached_in(folder, finished=finished)}
        try:
            write_record(folder, record)
            _plot_losses(folder, finished=finished)
            if finished:
                write_card(folder, folder, record)
        except OSError as failure:
            if finished:
                raise
            # The error that made the run fail is more useful, and most likely has the same cause: a full disk.
            log.error("%s: the end of the run could not be recorded: %s.", failure.filename or folder, failure.strerror)


def write_card(target: Path, run_folder: Path, record: Mapping[str, Any]) -> None:
    """Write the model card of a training run or its export, with the judge's evaluation if there is one."""
    file = run_folder / EVALUATION / METRICS_FILE
    try:
        metrics = read_json(file) if file.exists() else None
    except DataError as failure:
        log.warning("%s The model card says nothing about agreement.", failure)
        metrics = None
    write_model_card(target, record, metrics)


def _latest_state(folder: Path, *, finished: bool) -> dict[str, Any]:
    if finished:
        return read_state(folder) or {}
    newest = newest_checkpoint(folder, contents=False)
    return (read_state(newest.folder) if newest else None) or {}


def _reached_in(folder: Path, *, finished: bool) -> dict[str, Any]:
    logged = list(read_log(folder / TRAINER_LOG))
    return reached(_latest_state(folder, finished=finished), logged, _final_loss(folder) if finished else None)


def _final_loss(folder: Path) -> float | None:
    try:
        loss = read_json(folder / "eval_results.json").get("eval_loss")
    except (DataError, AttributeError):
        return None
    return float(loss) if isinstance(loss, int | float) else None


def _plot_losses(folder: Path, *, finished: bool) -> None:
    history = _latest_state(folder, finished=finished).get("log_history", [])
    if not draw_curves(history, folder.name, folder / "loss.png") and finished:
        log.info("No loss.png, because no loss was logged, as in runs shorter than logging_steps. Set logging_steps=1")


# --- LLaMA Factory ------------------------------------------------------------------------------------------------


def _train(setup: Setup, folder: Path, first: Checkpoint | None, lock: int, record: dict[str, Any]) -> None:
    """Run LLaMA Factory to completion; if resuming from a checkpoint fails, retry with the previous one.

    Raises:
        LlamaFactoryError: LLaMA Factory failed.
        Interrupted: a signal stopped it.
    """
    try:
        _launch(setup, folder, first, lock)
        return
    except _FailedBeforeFirstStep as failed:
        failure = failed
    ours = first is not None and first.folder.resolve().parent == folder.resolve()
    if first is None or not ours or len(checkpoint_folders(folder)) < 2:
        raise LlamaFactoryError(str(failure)) from None
    unusable = rename_with_prefix(first.folder, "unusable")
    older = newest_checkpoint(folder)
    if older is None:
        unusable.rename(first.folder)
        raise LlamaFactoryError(str(failure)) from None
    log.warning("%s\nResuming from %s failed before its first step; trying %s.", failure, first.folder, older.folder)
    try:
        _launch(setup, folder, older, lock)
    except _FailedBeforeFirstStep:
        unusable.rename(first.folder)  # the checkpoint was not the cause
        raise LlamaFactoryError(str(failure)) from None
    record["resumed_from"] = [*record["resumed_from"][:-1], str(older.folder)]
    log.warning("%s could not be used; it is kept as %s.", first.folder, unusable.name)


class _FailedBeforeFirstStep(LlamaFactoryError):
    """LLaMA Factory failed while resuming; another checkpoint may help."""


def _launch(setup: Setup, folder: Path, checkpoint: Checkpoint | None, lock: int) -> None:
    values = _launch_values(setup.config.values, folder, checkpoint, setup.launch)
    write_text(folder / RESOLVED_CONFIG, render_yaml(values))
    log_path = log_path_of(folder)
    resumed_at = ResumedAt(checkpoint.step, checkpoint.tokens) if checkpoint else ResumedAt()
    launch, processes = setup.launch, setup.processes
    command = launcher.train_command(folder / RESOLVED_CONFIG, launch, processes, torchrun=setup.torchrun)
    begin = _begin_log(log_path, command)
    log.info("Run %s %s; log: %s", folder, f"resumes from step {resumed_at.step}" if checkpoint else "begins", log_path)
    if launch.most_nodes > 1:
        log.info("Waiting for the other nodes: run the same command there, with --node-rank 1 and so on.")
    with (
        followed(folder / TRAINER_LOG, log_path.parent / TRAINER_LOG, resumed_at) as follower,
        progress(folder.name, resumed_at) as show,
        echoed(log_path, begin) if setup.verbose else nullcontext(lambda: None) as echo,
        launcher.started(command, log_path, keep_open=lock, through_torchrun=setup.torchrun) as child,
    ):
        stopping = _Stopping(folder, resumed_at)

        def on_poll() -> None:
            for entry in follower.new_entries():
                stopping.observe(entry)
                show(entry)
            show(None)
            echo()

        try:
            code = launcher.run_to_end(child, on_poll, is_saved=stopping.is_saved, patience=stopping.begin_waiting)
        except Interrupted as stop:
            raise Interrupted(_how_to_resume(folder), stop.exit_code) from None
    if code != 0:
        message = f"{launcher.diagnose(log_path, begin, code, values)}\nOnce it is fixed, {_again('run')}"
        # A signal or a full disk is not the checkpoint's fault.
        may_be_checkpoint = checkpoint is not None and not stopping.has_stepped and code == 1
        raise (_FailedBeforeFirstStep if may_be_checkpoint else LlamaFactoryError)(message)


def _launch_values(
    values: Mapping[str, Any], folder: Path, checkpoint: Checkpoint | None, launch: Launch
) -> dict[str, Any]:
    kept = {
        key: value for key, value in values.items() if key not in {"resume_from_checkpoint", "overwrite_output_dir"}
    }
    kept["output_dir"] = str(folder)
    if values.get("use_swanlab"):
        kept.setdefault("swanlab_run_name", folder.name)
    # An elastic run that torchrun restarts must find the newest checkpoint itself.
    if checkpoint and not launch.max_restarts:
        kept["resume_from_checkpoint"] = str(checkpoint.folder)
    return kept


def _begin_log(log_path: Path, command: Sequence[str]) -> int:
    """Write a heading for this launch; return the byte at which its output begins."""
    log_path.parent.mkdir(parents=True, exist_ok=True)
    if log_path.exists() and log_path.stat().st_size > _LARGEST_LOG:
        log_path.replace(log_path.with_name(f"{log_path.name}.1"))
    with log_path.open("ab") as stream:
        stream.write(f"=== {now()}  {shlex.join(command)}\n".encode())
        return stream.tell()


class _Stopping:
    """Detects that a run has saved after a request to stop, and knows how long that may take."""

    def __init__(self, folder: Path, resumed_at: ResumedAt) -> None:
        self.folder, self.resumed_at = folder, resumed_at
        self.before = {path.name for path in checkpoint_folders(folder)}
        self.seconds_a_step = 0.0
        self.has_stepped = False

    def observe(self, entry: Mapping[str, Any]) -> None:
        self.seconds_a_step = seconds_a_step(entry, self.resumed_at)
        self.has_stepped = True

    def begin_waiting(self) -> float:
        """From now on, count only new checkpoints as saved.

        Returns:
            How many seconds to wait: for two steps and the saving, which happens between steps.
        """
        self.before = {path.name for path in self._complete()}
        return 40 + 2 * self.seconds_a_step

    def is_saved(self) -> bool:
        return any(path.name not in self.before for path in self._complete())

    def _complete(self) -> list[Path]:
        return [path for path in checkpoint_folders(self.folder) if checkpoint_fault(path, contents=False) is None]


def _how_to_resume(folder: Path) -> str:
    newest = newest_checkpoint(folder, contents=False)
    if newest is None and checkpoint_folders(folder):
        return f"interrupted. {folder} cannot be resumed: its checkpoints have no optimizer state (save_only_model)."
    state = f"{newest.folder} is kept." if newest else "No checkpoint was written yet."
    return f"interrupted. {state} {_again('To resume, run')}"


def _again(verb: str) -> str:
    words = [word for word in sys.argv if word != "--overwrite"]
    return f"{verb} the same command again: {shlex.join([python(), *words])}"


def python() -> str:
    """Return the command for this Python: `python` if the shell finds the same one, otherwise its path."""
    if shutil.which("python") == sys.executable:
        return "python"
    here = Path.cwd()
    return os.path.relpath(sys.executable, here) if Path(sys.executable).is_relative_to(here) else sys.executable


_IMPOSSIBLE_LOSS = 1e6
"""Nats per token. An untrained model has a loss of about 12; miscompiled kernels gave 1e30."""


def verify_run(folder: Path, values: Mapping[str, Any]) -> None:
    """Check LLaMA Factory's results, because its exit code 0 is not trusted.

    Raises:
        LlamaFactoryError: a file is not complete, not all steps were trained, or the loss is impossible.
    """
    see_log = f"See its log: {log_path_of(folder)}"
    if fault := content_fault(folder):
        raise LlamaFactoryError(f"{folder}: LLaMA Factory ended without an error, but {fault}. {see_log}")
    state = read_state(folder)
    if state is None:
        missing = "trainer_state.json is missing"
        raise LlamaFactoryError(f"{folder}: LLaMA Factory ended without an error, but {missing}. {see_log}")
    if state["global_step"] < state["max_steps"] and not _stopped_early(state, values):
        steps = f"{state['global_step']} of {state['max_steps']} steps"
        raise LlamaFactoryError(f"{folder}: training stopped early, after {steps}. {_again('To resume, run')}")
    train, held_out = curves(state["log_history"])
    if impossible := [loss for _, loss in train[-1:] + held_out[-1:] if not abs(loss) < _IMPOSSIBLE_LOSS]:
        raise LlamaFactoryError(
            f"{folder}: the last loss is {impossible[0]:g}, so the training diverged. Try a lower learning rate: -lr X"
        )


def _stopped_early(state: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    callbacks = state.get("stateful_callbacks")
    return bool(values.get("early_stopping_steps")) and "EarlyStoppingCallback" in (callbacks or {})


def run_worker_node(setup: Setup, folder: Path) -> None:
    """Take part in a run that another node leads, without a lock or run.json, and with a separate log."""
    launch = setup.launch
    name = f"{folder.name}.node{launch.node_rank}"
    log_path = log_path_of(folder.with_name(name))
    values = _launch_values(setup.config.values, folder, newest_checkpoint(folder), launch)
    rendered = log_path.with_suffix(".yaml")
    write_text(rendered, render_yaml(values))
    command = launcher.train_command(rendered, launch, setup.processes, torchrun=True)
    begin = _begin_log(log_path, command)
    log.info("Node %s of %s; log: %s", launch.node_rank, launch.nnodes, log_path)
    with launcher.started(command, log_path, through_torchrun=True) as child:
        code = launcher.run_to_end(child, lambda: None, is_saved=lambda: False, patience=lambda: 60.0)
    if code != 0:
        raise LlamaFactoryError(launcher.diagnose(log_path, begin, code, values))
