"""Start and stop LLaMA Factory, and explain why it failed. No other module starts it.

An exit code of 0 is not trusted: `prmkit.training.run` and `prmkit.training.export` check the files that LLaMA Factory
wrote.
"""

import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from prmkit.errors import DataError, ExitCode, Interrupted, UsageError
from prmkit.llamafactory_schema import setting
from prmkit.training import supervisor
from prmkit.training.model import savings

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
_ONE_REQUEST = 1.0
"""Several signals within this many seconds count as one request to stop."""
_SUPERVISOR_SECONDS = 15.0
"""Seconds that the supervisor may take to kill what it started; it takes longer only if it is stopped itself."""


# --- how many processes, and where --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """The number of training processes, and where they run. Names and meanings are torchrun's."""

    nproc: int | None = None
    """Processes on this node; None means one per visible GPU."""
    nnodes: str = "1"
    """The number of nodes, or `MIN:MAX` for an elastic run."""
    node_rank: int = 0
    master_addr: str | None = None
    """The address of the first node; None for this machine."""
    master_port: int | None = None
    """The port of the first node; None means a free port on a single node, 29500 on several."""
    rdzv_id: str | None = None
    """The id of an elastic run: nodes with the same id find each other at `master_addr`."""
    max_restarts: int = 0

    @property
    def is_first_node(self) -> bool:
        """Whether this node writes the run folder and run.json."""
        return self.node_rank == 0

    @property
    def most_nodes(self) -> int:
        """The number of nodes; for an elastic run, the maximum."""
        return int(self.nnodes.rpartition(":")[2])


def check_launch(launch: Launch) -> None:
    """Report all invalid flags for torchrun; torchrun itself would wait, or fail with a traceback.

    Raises:
        UsageError: with one line per error.
    """
    if not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", launch.nnodes):
        raise UsageError(f"--nnodes {launch.nnodes}: expected a number, or MIN:MAX for an elastic run.")
    if found := list(_wrong_flags(launch)):
        raise UsageError("\n  ".join(found))


def _wrong_flags(launch: Launch) -> Iterator[str]:
    fewest, most = int(launch.nnodes.partition(":")[0]), launch.most_nodes
    if launch.nproc is not None and launch.nproc < 1:
        yield f"--nproc {launch.nproc}: expected 1 or more"
    if fewest > most:
        yield f"--nnodes {launch.nnodes}: the first number must not be the larger one"
    if ":" in launch.nnodes and launch.rdzv_id is None:
        yield f"--nnodes {launch.nnodes}: an elastic run needs --rdzv-id, the same on every node"
    if most > 1 and launch.master_addr is None:
        yield "--nnodes: several nodes need --master-addr, the address of the first one"
    if not 0 <= launch.node_rank < most:
        yield f"--node-rank {launch.node_rank}: expected 0 to {most - 1}, as there are {most} nodes (--nnodes)"
    if launch.master_port is not None and not 0 < launch.master_port < 65536:
        yield f"--master-port {launch.master_port}: expected 1 to 65535"
    if launch.max_restarts < 0:
        yield f"--max-restarts {launch.max_restarts}: expected 0 or more"


# --- commands -----------------------------------------------------------------------------------------------------


def cli_command(name: str, config: Path) -> list[str]:
    """Return `llamafactory-cli NAME CONFIG`, with the `llamafactory-cli` of this Python, whatever PATH says.

    Raises:
        DataError: LLaMA Factory is not installed for this Python.
    """
    program = Path(sys.executable).parent / "llamafactory-cli"
    if not program.exists():
        raise DataError(f"llamafactory-cli not found for {sys.executable}. Run ./run_training.sh --install-deps")
    return [str(program), name, str(config)]


def train_command(config: Path, launch: Launch, processes: int, *, torchrun: bool) -> list[str]:
    """Return the command line that trains.

    LLaMA Factory's own launcher is not used for several processes: it looks for `torchrun` on PATH, splits paths at
    spaces, and leaves the workers training when it is stopped.

    Args:
        config: the rendered YAML.
        launch: how many nodes, and where they meet.
        processes: the number of processes on this node.
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


# Variables from the user's shell that LLaMA Factory and torchrun would obey.
_STRAY_VARIABLES = (
    "FORCE_TORCHRUN", "NPROC_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "RDZV_ID", "MIN_NNODES",
    "MAX_NNODES", "MAX_RESTARTS", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "USE_RAY", "USE_MCA",
    "USE_V1", "ALLOW_EXTRA_ARGS",
)  # fmt: skip


def child_environment() -> dict[str, str]:
    """Return the environment for LLaMA Factory: ours without stray variables, plus settings for logs and speed."""
    environment = {name: value for name, value in os.environ.items() if name not in _STRAY_VARIABLES}
    here = [str(Path(__file__).resolve().parents[2]), environment.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, here))  # torchrun's workers import prmkit from anywhere
    environment |= {"PYTHONUNBUFFERED": "1", "RECORD_VRAM": "1"}
    # Otherwise FSDP2 saves only shards, and LLaMA Factory ends without writing an adapter.
    environment.setdefault("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT")
    # On a shared CPU, threads that spin while they wait take time from the threads that they wait for: the demo's steps
    # took five times as long.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # glibc returns every large tensor to the kernel and asks for it again: a fifth to a third of a step on a CPU.
    environment.setdefault("MALLOC_MMAP_THRESHOLD_", str(8 << 30))
    environment.setdefault("MALLOC_TRIM_THRESHOLD_", str(16 << 30))
    environment.setdefault("MALLOC_TOP_PAD_", str(256 << 20))
    # LLaMA Factory's launcher sets it for several GPUs; row lengths differ so much that one GPU gains from it too.
    environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    return environment


# --- running ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Child:
    """A command that runs as a child of the supervisor."""

    process: subprocess.Popen[bytes]

    def terminate(self) -> None:
        """Send SIGTERM: the first asks the command to save and stop, the second kills it and all that it started."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill the command and everything that it started immediately."""
        if self.process.stdin:
            self.process.stdin.close()
        try:
            self.process.wait(_SUPERVISOR_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()  # it may be stopped (SIGSTOP), so that it cannot kill anything itself
            self.process.wait()
        # Something is left only if the supervisor itself was killed.
        supervisor.kill_descendants(os.getpid())


@contextmanager
def started(
    command: Sequence[str], log_path: Path, *, keep_open: int | None = None, through_torchrun: bool = False
) -> Iterator[Child]:
    """Start a command; when the block ends, for whatever reason, none of its processes are left.

    Args:
        command: the program and its arguments.
        log_path: its output is appended to this file.
        keep_open: a file descriptor that the supervisor keeps open as long as the command runs: a lock, which then
            survives if this process is killed.
        through_torchrun: whether a request to stop goes to torchrun's workers.
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
            pass_fds=() if keep_open is None else (keep_open,),
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
    """Wait until a child ends; SIGINT, SIGTERM and SIGHUP ask it to save and stop.

    Args:
        child: from `started`.
        on_poll: called five times per second.
        is_saved: returns whether the child has saved after a request to stop, so that there is nothing to wait for.
        patience: returns how many seconds to wait for that.

    Returns:
        The child's exit code; 128 plus the signal's number if a signal ended it.

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
    if patience:
        log.warning("Stopping; a checkpoint is saved first if training has begun. Interrupt again to stop immediately.")
    deadline = time.monotonic() + patience
    child.terminate()
    try:
        _wait(child, on_poll, until=lambda: is_saved() or time.monotonic() > deadline)
    except Interrupted:
        log.warning("Stopped without saving.")


@contextmanager
def _stopping_signals() -> Iterator[None]:
    """While the block runs, SIGINT, SIGTERM and SIGHUP raise `Interrupted`.

    SIGINT does so even if the shell ignores it, as it does for commands that a script starts with `&`. SIGHUP stays
    ignored if it was (nohup). Signals in quick succession are one request: Ctrl-C reaches train.py from the terminal,
    and again from run_training.sh as SIGTERM.
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


# --- why it failed ------------------------------------------------------------------------------------------------

_OUT_OF_MEMORY = re.compile(
    r"OutOfMemoryError|CUDA out of memory|CUBLAS_STATUS_ALLOC_FAILED|DefaultCPUAllocator: can't allocate memory"
    r"|not enough memory: you tried to allocate|std::bad_alloc|^MemoryError",
    re.MULTILINE,
)
_NO_SPACE = re.compile(r"No space left on device|Disk quota exceeded")
# The last line of a traceback; torchrun and LLaMA Factory's launcher add their own tracebacks after the cause.
_EXCEPTION = re.compile(
    r"^(?:\[rank\d+\]: ?)?((?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Exit|Iteration)\b.*)$", re.MULTILINE
)
_NOT_THE_CAUSE = ("torch.distributed.elastic", "ChildFailedError", "subprocess.CalledProcessError")
_LAST_LINES = 15
_READ_BYTES = 400_000


def log_tail(path: Path, begin: int) -> str:
    """Return the end of a log after byte `begin`, with only the last update of progress bars."""
    with path.open("rb") as stream:
        stream.seek(max(begin, path.stat().st_size - _READ_BYTES))
        text = stream.read().decode(errors="replace")
    return "\n".join(line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n"))


def diagnose(log: Path, begin: int, exit_code: int, values: Mapping[str, Any]) -> str:
    """Explain why a child failed, from its log after byte `begin`, and add the log's path. See `explain`."""
    return f"{explain(log_tail(log, begin), exit_code, values)}\nThe complete log: {log}"


def explain(tail: str, exit_code: int, values: Mapping[str, Any]) -> str:
    """Return the cause in one line, the last lines of the log, and advice if there is any.

    Args:
        tail: from `log_tail`.
        exit_code: 128 plus the signal's number if a signal ended the child.
        values: the run's resolved config.
    """
    causes = [cause for cause in _EXCEPTION.findall(tail) if not cause.startswith(_NOT_THE_CAUSE)]
    head = causes[-1] if causes else f"exit code {exit_code}"
    lines = [line for line in tail.splitlines() if line.strip()][-_LAST_LINES:]
    advice = _advice(tail, exit_code, values)
    return "\n".join([f"LLaMA Factory failed: {head}", *(f"  | {line}" for line in lines), *advice])


def _advice(tail: str, exit_code: int, values: Mapping[str, Any]) -> list[str]:
    if _OUT_OF_MEMORY.search(tail):
        return ["Out of memory. Try, in this order:", *_memory_advice(values)]
    if exit_code == 137:
        killed = "It was killed (SIGKILL), most likely by the out-of-memory killer (see dmesg). Try:"
        return [killed, *_memory_advice(values)]
    if _NO_SPACE.search(tail):
        return ["The disk is full. Free some space, or keep fewer checkpoints: save_total_limit=1"]
    return []


def _memory_advice(values: Mapping[str, Any]) -> list[str]:
    ways = [f"  {saving.flags}  {saving.why}" for saving in savings(values)]
    half = int(setting(values, "cutoff_len")) // 2
    ways.append(f"  cutoff_len={half}  convert again with the same cutoff_len, so that no row is cut")
    if not values.get("deepspeed") and not values.get("fsdp"):
        ways.append("  --nproc N  several GPUs with DeepSpeed ZeRO-2: see configs/multi_gpu_zero2.yaml")
    return ways
