"""Measure a command: seconds, CPU seconds including children, and the memory of all its processes."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

INTERVAL = 0.1
"""Seconds between two measurements of the memory."""


class Measured(NamedTuple):
    """The resources that a command used."""

    seconds: float
    cpu: float
    """CPU seconds of the command and its children."""
    peak_mb: float
    """The largest sum of the proportional set sizes (PSS) of the process and its children."""


def run_measured(
    command: Sequence[Any], *, watch: Callable[[], None] | None = None, **options: Any
) -> tuple[Measured, int]:
    """Run a command to its end.

    Args:
        command: the program and its arguments.
        watch: called with every measurement of the memory.
        options: passed to `subprocess.Popen`.

    Returns:
        The resources that it used, and its exit code.
    """
    before = os.times()
    started = time.perf_counter()
    child = subprocess.Popen([*map(str, command)], **options)
    peak = 0
    while child.poll() is None:
        peak = max(peak, sum(map(_proportional_set_size, _tree(child.pid))))
        if watch:
            watch()
        time.sleep(INTERVAL)
    seconds = time.perf_counter() - started
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Measured(seconds, cpu, peak / 1e6), child.returncode


def _tree(process: int) -> Iterator[int]:
    yield process
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return
    for child in children:
        yield from _tree(int(child))


def _proportional_set_size(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
