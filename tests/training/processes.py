"""Start train.py as a user does, and find every process that it left behind."""

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Started:
    """A running train.py; all its descendants carry its mark in their environment."""

    process: subprocess.Popen[str]
    mark: str

    def living(self) -> list[str]:
        """The command lines of what is still alive of it."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if self.mark.encode() in (entry / "environ").read_bytes():
                        found.append(f"{entry.name}: {(entry / 'cmdline').read_bytes().decode(errors='replace')}")
                except OSError:
                    continue
        return found

    def nothing_lives(self, within: float = 5.0) -> bool:
        """Whether all of it is gone within some seconds."""
        return wait_for(lambda: not self.living(), within)


def start(project: Path, *arguments: str) -> Started:
    """Run train.py in a project folder; its output is caught."""
    mark = f"PRMKIT_TEST={uuid.uuid4().hex}"
    name, value = mark.split("=")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), "--config", "config.yaml", *arguments],
        cwd=project, env={**os.environ, name: value}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    return Started(process, mark)


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    """Look ten times a second until a condition holds; whether it did."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
