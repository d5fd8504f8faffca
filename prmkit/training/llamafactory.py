"""The only module that runs LLaMA Factory: starts it as a child process, and stops it.

What it left behind is checked elsewhere (`prmkit.training.attempt`, `prmkit.training.export`): its exit code alone is
not trusted.
"""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from prmkit.errors import DataError, ExitCode, Interrupted
from prmkit.training import supervisor
from prmkit.training.launch import Launch

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
_ONE_REQUEST = 1.0
"""Seconds within which several signals ask for the same."""


# --- commands -----------------------------------------------------------------------------------------------------


def cli_command(name: str, config: Path) -> list[str]:
    """`llamafactory-cli NAME CONFIG`, with the `llamafactory-cli` that stands beside this Python, whatever PATH says.

    Raises:
        DataError: LLaMA Factory is not installed for this Python.
    """
    program = Path(sys.executable).parent / "llamafactory-cli"
    if not program.exists():
        raise DataError(f"llamafactory-cli not found beside {sys.executable}. Run ./run_training.sh --install-deps")
    return [str(program), name, str(config)]


def train_command(config: Path, launch: Launch, processes: int, *, torchrun: bool) -> list[str]:
    """The command line that trains.

    LLaMA Factory's own launcher is passed by where several processes train: it looks for `torchrun` on PATH, splits
    paths at blanks, and leaves the workers training when it is stopped.

    Args:
        config: the rendered YAML.
        launch: how many nodes, and where they meet.
        processes: on this node.
        torchrun: start through torchrun, which DeepSpeed and FSDP need even for one process.

    Raises:
        DataError: LLaMA Factory is not installed for this Python.
    """
    if not torchrun:
        return cli_command("train", config)
    return [
        *(sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--nnodes={launch.nnodes}"),
        *_rendezvous(launch),
        *(f"--max-restarts={launch.max_restarts}", "-m", "prmkit.training.worker", str(config)),
    ]


def _rendezvous(launch: Launch) -> list[str]:
    address, port = launch.master_addr or "127.0.0.1", launch.master_port or 29500
    if launch.rdzv_id is not None:
        endpoint = f"{address}:{port}"
        return [f"--rdzv-id={launch.rdzv_id}", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}"]
    if launch.nnodes == "1" and launch.master_port is None:
        return ["--standalone"]
    return [f"--node-rank={launch.node_rank}", f"--master-addr={address}", f"--master-port={port}"]


# What LLaMA Factory and torchrun would read as orders, left over from somebody's shell.
_STRAY_VARIABLES = (
    "FORCE_TORCHRUN", "NPROC_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "RDZV_ID", "MIN_NNODES",
    "MAX_NNODES", "MAX_RESTARTS", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "USE_RAY", "USE_MCA",
    "USE_V1", "ALLOW_EXTRA_ARGS",
)  # fmt: skip


def child_environment() -> dict[str, str]:
    """The environment that LLaMA Factory runs in: ours, without stray orders, with what makes its log useful."""
    environment = {name: value for name, value in os.environ.items() if name not in _STRAY_VARIABLES}
    here = [str(Path(__file__).resolve().parents[2]), environment.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, here))  # torchrun's workers import prmkit from anywhere
    environment |= {"PYTHONUNBUFFERED": "1", "RECORD_VRAM": "1"}
    # FSDP2 else saves shards alone, and LLaMA Factory ends without having written an adapter.
    environment.setdefault("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT")
    # On a CPU that others use as well, threads that spin while they wait for each other take the time that they wait
    # for: the demo's steps took five times as long.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # What LLaMA Factory's launcher sets for several GPUs; row lengths differ so much that one GPU gains by it too.
    environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    return environment


# --- running ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Child:
    """A command that runs below the supervisor."""

    process: subprocess.Popen[bytes]

    def terminate(self) -> None:
        """Ask it to save and stop; asked twice, it is killed with all it started."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it and everything that it started, now."""
        if self.process.stdin:
            self.process.stdin.close()
        self.process.wait()
        # Only if somebody killed the supervisor itself is anything left.
        supervisor.kill_descendants(os.getpid())


@contextmanager
def started(
    command: Sequence[str], log_path: Path, *, held: int | None = None, through_torchrun: bool = False
) -> Iterator[Child]:
    """Start a command; when the block ends, nothing of it is left, whatever happened.

    Args:
        command: the program and its arguments.
        log_path: everything that it prints is appended there.
        held: a file descriptor that the supervisor holds open as long as anything of the command lives (a lock, so that
            it outlasts a kill of this process).
        through_torchrun: a request to stop goes to torchrun's workers.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    supervisor.become_subreaper()
    stop_whom = "grandchildren" if through_torchrun else "child"
    with log_path.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-I", supervisor.__file__, stop_whom, *command],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=child_environment(),
            pass_fds=() if held is None else (held,),
            start_new_session=True,
        )
    child = Child(process)
    try:
        yield child
    finally:
        child.kill()


def run_to_end(
    child: Child, on_poll: Callable[[], None], *, is_saved: Callable[[], bool], patience: Callable[[], float]
) -> int:
    """Wait until a child ends, passing SIGINT, SIGTERM and SIGHUP on as a request to save and stop.

    Args:
        child: from `started`.
        on_poll: called five times a second.
        is_saved: whether, after a request to stop, there is nothing more to wait for.
        patience: how many seconds to wait for that.

    Returns:
        The child's exit code; 128 plus the signal's number where a signal ended it.

    Raises:
        Interrupted: a signal stopped it.
    """
    with _stopping_signals():
        try:
            _wait(child, on_poll)
        except Interrupted as stop:
            _stop(child, on_poll, is_saved, patience())
            raise Interrupted("interrupted", stop.exit_code) from None
    # The last lines may have been written after the last poll.
    on_poll()
    code = child.process.returncode
    return code if code >= 0 else 128 - code


def _wait(child: Child, on_poll: Callable[[], None], until: Callable[[], bool] = lambda: False) -> None:
    while not until():
        try:
            child.process.wait(POLL_SECONDS)
            return
        except subprocess.TimeoutExpired:
            on_poll()


def _stop(child: Child, on_poll: Callable[[], None], is_saved: Callable[[], bool], patience: float) -> None:
    log.warning("Stopping; a checkpoint is saved first if training has begun. Once more stops at once.")
    deadline = time.monotonic() + patience
    child.terminate()
    try:
        _wait(child, on_poll, until=lambda: is_saved() or time.monotonic() > deadline)
    except Interrupted:
        log.warning("Stopped without saving.")


@contextmanager
def _stopping_signals() -> Iterator[None]:
    """Inside, SIGINT, SIGTERM and SIGHUP raise `Interrupted`.

    SIGINT too where the shell had it ignored, as it has for what a script starts with `&`. SIGHUP stays ignored where
    it was (nohup). Signals that come at once are one request: Ctrl-C reaches train.py from the terminal, and from
    run_training.sh as SIGTERM.
    """

    asked: float | None = None

    def stop(number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        now = time.monotonic()
        if asked is not None and now - asked < _ONE_REQUEST:
            return
        asked = now
        raise Interrupted("", ExitCode.INTERRUPTED if number == signal.SIGINT else ExitCode.TERMINATED)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
