"""Run one command and leave none of its processes running. Linux only; needs only the standard library.

    python -I supervisor.py (child|grandchildren) COMMAND [ARGUMENT...]

It runs between `train.py` and LLaMA Factory, because no process can clean up after its own `kill -9`. Its standard
input is a pipe that `train.py` keeps open and never writes to; when the pipe closes, `train.py` has ended, for whatever
reason.

- The pipe closes: every descendant is killed immediately.
- A first SIGTERM is passed on, so that the training can save a checkpoint. `child` passes it to the command,
  `grandchildren` past it: torchrun gives its workers 30 seconds after a SIGTERM, and a long training step takes more.
- A second SIGTERM: every descendant is killed immediately.
- The command ends: what it left running is killed, and its exit code is returned (128 plus the number of a signal).
- The supervisor is killed: the kernel kills the command, so that there are never two trainers in one folder.

A process group is not enough: torchrun starts each worker in a new session. So the supervisor is a subreaper: the
kernel makes it the parent of every orphan among its descendants, and it finds them all below itself.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def become_subreaper() -> None:
    """Make this process the parent of every descendant whose parent ends; see prctl(2)."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def die_with_parent(parent: int) -> None:
    """Let the kernel kill this process when its parent ends, for whatever reason; see prctl(2).

    Args:
        parent: the parent's process id, in case it ended before this call.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def children_of(parent: int) -> list[int]:
    """Return the process ids of the direct children, without zombies."""
    return [pid for pid, (its_parent, state) in _processes().items() if its_parent == parent and state != "Z"]


def descendants_of(ancestor: int) -> list[int]:
    """Return the process ids of children, their children, and so on, without zombies."""
    processes = _processes()
    found = {ancestor}
    while more := {pid for pid, (parent, _) in processes.items() if parent in found} - found:
        found |= more
    return [pid for pid in found - {ancestor} if processes[pid][1] != "Z"]


def kill_descendants(ancestor: int) -> None:
    """Kill until nothing is left: a killed process may just have started another."""
    while pids := descendants_of(ancestor):
        for pid in pids:
            _send(pid, signal.SIGKILL)
        _reap()
        select.select([], [], [], 0.01)


def _processes() -> dict[int, tuple[int, str]]:
    """Return the parent and state of every process."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                # The name in brackets may contain spaces and brackets; state and parent follow the last bracket.
                state, parent = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
            except OSError:
                continue
            found[int(entry.name)] = (int(parent), state)
    return found


def _reap() -> dict[int, int]:
    """Collect every child that has ended: process id -> exit code."""
    ended = {}
    with contextlib.suppress(ChildProcessError):
        while (waited := os.waitpid(-1, os.WNOHANG))[0]:
            code = os.waitstatus_to_exitcode(waited[1])
            ended[waited[0]] = code if code >= 0 else 128 - code
    return ended


def _send(pid: int, number: int) -> None:
    # The process may have ended since it was listed.
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def supervise(command: list[str], *, pass_to_grandchildren: bool) -> int:
    """Run the command as described at the top of this file, and return its exit code."""
    become_subreaper()
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    terminated = 0

    def count(_signal: int, _frame: object) -> None:
        nonlocal terminated
        terminated += 1

    signal.signal(signal.SIGTERM, count)
    # Without a handler SIGCHLD would not reach the wake-up pipe.
    signal.signal(signal.SIGCHLD, lambda _signal, _frame: None)
    # Kept in a variable, because a Popen that is garbage-collected takes the exit code of a child that has ended.
    pid = os.getpid()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=lambda: die_with_parent(pid))
    child = process.pid
    passed_on = False
    while True:
        readable, _, _ = select.select([sys.stdin, woken], [], [])
        if sys.stdin in readable or terminated > 1:
            kill_descendants(os.getpid())
            return 128 + signal.SIGKILL
        os.read(woken, 4096)
        ended = _reap()
        if child in ended:
            kill_descendants(os.getpid())
            return ended[child]
        if terminated and not passed_on:
            passed_on = True
            for pid in (children_of(child) if pass_to_grandchildren else []) or [child]:
                _send(pid, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(supervise(sys.argv[2:], pass_to_grandchildren=sys.argv[1] == "grandchildren"))
