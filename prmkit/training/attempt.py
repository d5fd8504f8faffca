"""One start of a run: carry the plan out, watch LLaMA Factory, check what it left, and write the record."""

import logging
import math
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prmkit.errors import Interrupted, LlamaFactoryError
from prmkit.files import write_text
from prmkit.training import llamafactory, monitoring
from prmkit.training.checkpoints import checkpoint_folders, fault_of, newest_whole, read_log, read_state, weights_fault
from prmkit.training.config import ResolvedConfig, render_yaml
from prmkit.training.failures import told_by
from prmkit.training.launch import Launch
from prmkit.training.resume import Plan, Step, clear_the_way, finish_from
from prmkit.training.runs import RENDERED, log_of, now, write_record

log = logging.getLogger(__name__)

FOLLOWED = "trainer_log.jsonl"


@dataclass(frozen=True)
class Setting:
    """A resolved config and how LLaMA Factory is started with it."""

    config: ResolvedConfig
    launch: Launch
    processes: int
    """On this node."""
    world_size: int
    """On all nodes."""
    torchrun: bool
    verbose: bool = False
    """Show everything that LLaMA Factory prints."""


def carry_out(setting: Setting, folder: Path, plan: Plan, lock: int) -> dict[str, Any]:
    """Carry a plan out; the run's record as it is afterwards."""
    if plan.step is Step.DONE:
        return plan.record
    clear_the_way(folder, plan)
    record = {**plan.record, "status": "running", "ended": None}
    write_record(folder, record)
    with _recorded(folder, record):
        if plan.step is not Step.FINISH:
            _launch(setting, folder, plan, lock)
        elif plan.checkpoint is not None:
            log.info("%s had trained all its steps; writing the final files.", folder)
            finish_from(plan.checkpoint, folder)
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
        try:
            write_record(folder, record)
            state = _latest_state(folder, finished=status == "finished")
            monitoring.draw_curves(state.get("log_history", []), folder.name, folder / "loss.png")
        except OSError as error:
            if status == "finished":
                raise
            # What the run failed of says more, most likely the same: a full disk.
            log.error("%s: the end of the run could not be recorded: %s.", error.filename or folder, error.strerror)


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
    memory = max((line.get("vram_reserved", 0.0) for line in logged), default=0.0)
    return {
        "steps": state.get("global_step", 0),
        "max_steps": state.get("max_steps") or next((line["total_steps"] for line in reversed(logged)), None),
        "tokens": state.get("num_input_tokens_seen") or None,
        "train_loss": train[-1][1] if train else None,
        "eval_loss": held_out[-1][1] if held_out else None,
        "peak_gpu_memory_gib": memory if memory > 0 else None,
    }


def _launch(setting: Setting, folder: Path, plan: Plan, lock: int) -> None:
    """Run LLaMA Factory to its end.

    Raises:
        LlamaFactoryError: it failed.
        Interrupted: a signal stopped it.
    """
    values = _launch_values(setting.config.values, folder, plan, setting.launch)
    rendered = folder / RENDERED
    write_text(rendered, render_yaml(values))
    checkpoint = plan.checkpoint
    start = monitoring.Start(checkpoint.step, checkpoint.tokens) if checkpoint else monitoring.Start()
    log_path = log_of(folder)
    line = llamafactory.train_command(rendered, setting.launch, setting.processes, torchrun=setting.torchrun)
    begin = _begin_log(log_path, line)
    where = f"goes on from step {start.step}" if checkpoint else "begins"
    log.info("Run %s %s; log: %s", folder, where, log_path)
    if setting.launch.most_nodes > 1:
        log.info("Waiting for the other nodes: start the same command there, with --node-rank 1 and so on.")
    with (
        monitoring.followed(folder / FOLLOWED, log_path.parent / FOLLOWED, start) as follower,
        monitoring.progress(folder.name, start) as show,
        monitoring.echoed(log_path, begin) if setting.verbose else nullcontext(lambda: None) as echo,
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
        failure = told_by(log_path, begin, code, values)
        raise LlamaFactoryError(f"{failure}\nWhen it is mended, {_again('start')}")


def _launch_values(values: Mapping[str, Any], folder: Path, plan: Plan, launch: Launch) -> dict[str, Any]:
    kept = {
        key: value for key, value in values.items() if key not in {"resume_from_checkpoint", "overwrite_output_dir"}
    }
    kept["output_dir"] = str(folder)
    if values.get("use_swanlab"):
        kept.setdefault("swanlab_run_name", folder.name)
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
    if newest is None and checkpoint_folders(folder):
        return f"interrupted. {folder}: its checkpoints hold no optimizer's state (save_only_model): none goes on."
    kept = f"{newest.folder} is kept." if newest else "No checkpoint was written yet."
    return f"interrupted. {kept} {_again('To go on, start')}"


def _again(verb: str) -> str:
    words = [word for word in sys.argv if word != "--overwrite"]
    return f"{verb} the same command again: {shlex.join([_python(), *words])}"


def _python() -> str:
    """How this Python can be called from here: `python` where the shell finds the same one, else by its path."""
    if shutil.which("python") == sys.executable:
        return "python"
    here = Path.cwd()
    return os.path.relpath(sys.executable, here) if Path(sys.executable).is_relative_to(here) else sys.executable


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
        raise LlamaFactoryError(f"{folder}: training stopped early, after {steps}. {_again('To go on, start')}")
    train, held_out = monitoring.curves(state.get("log_history", []))
    if any(not math.isfinite(loss) for _, loss in train[-1:] + held_out[-1:]):
        raise LlamaFactoryError(f"{folder}: the loss is not a number any more. Try a lower learning rate: -lr X")


def _stopped_by_itself(state: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    callback = state.get("stateful_callbacks", {}).get("EarlyStoppingCallback")
    return bool(values.get("early_stopping_steps")) and callback is not None


def join(setting: Setting, folder: Path) -> None:
    """Take part in a run that another node leads: no lock, no record, a log of its own."""
    name = f"{folder.name}.node{setting.launch.node_rank}"
    newest = newest_whole(folder, put_aside=False)
    plan = Plan(Step.GO_ON if newest else Step.BEGIN, {}, newest)
    log_path = log_of(folder.with_name(name))
    rendered = log_path.with_suffix(".yaml")
    values = _launch_values(setting.config.values, folder, plan, setting.launch)
    write_text(rendered, render_yaml(values))
    line = llamafactory.train_command(rendered, setting.launch, setting.processes, torchrun=True)
    begin = _begin_log(log_path, line)
    log.info("Node %s of %s; log: %s", setting.launch.node_rank, setting.launch.nnodes, log_path)
    with llamafactory.started(line, log_path, through_torchrun=True) as child:
        code = llamafactory.run_to_end(child, lambda: None, is_saved=lambda: False, patience=lambda: 60.0)
    if code != 0:
        raise LlamaFactoryError(told_by(log_path, begin, code, values))
