"""Start something as a user does, and find every process that it left running."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent


@dataclass
class Started:
    """A running command; all its descendants carry its mark in their environment."""

    process: subprocess.Popen[str]
    mark: str

    def __enter__(self) -> "Started":
        return self

    def __exit__(self, *_: object) -> None:
        """End whatever a failed test left running."""
        for pid in self.living():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def living(self) -> dict[int, str]:
        """Process id and command line of what is still alive of it."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if self.mark.encode() in (entry / "environ").read_bytes():
                        found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                except OSError:
                    continue
        return found

    def pid_of(self, text: str, without: str = "nothing") -> int:
        """The process whose command line holds one text and not the other; 0 for none."""
        return next((pid for pid, line in self.living().items() if text in line and without not in line), 0)

    def ends(self, code: int, within: float = 900.0) -> str:
        """Wait for the end, see that nothing is left, and return what it wrote to stdout and stderr."""
        try:
            output, narration = self.process.communicate(timeout=within)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        assert self.process.returncode == code, f"exit code {self.process.returncode}\n{output}\n{narration}"
        assert "Traceback" not in narration, narration
        assert wait_for(lambda: not self.living(), 5.0), f"still running: {self.living()}"
        return output + narration


def start(project: Path, *arguments: str) -> Started:
    """Train in a project folder, without the checks before the run; the output is captured."""
    script = HERE / "training" / "without_checks.py"
    return start_command([sys.executable, str(script), "--config", "config.yaml", *arguments], project)


def start_command(command: Sequence[str], folder: Path, **environment: str) -> Started:
    """Start a command in a folder, in a new process group; the output is captured."""
    name, value = "PRMKIT_TEST", uuid.uuid4().hex
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, name: value, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    return Started(process, f"{name}={value}")


def wait_for(condition: Callable[[], object], seconds: float) -> bool:
    """Look ten times a second until a condition holds; whether it did."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
