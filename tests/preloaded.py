"""Scripts in forks of a Python that has imported their packages already: processes of their own that start at once.

A fork has its own memory, open files, environment and exit code, as any process that a user starts. Tests of starting
itself, of streams, terminals, signals and kills start Python anew.

    python preloaded.py MODULE …     import the modules, then read one request a line
"""

import atexit
import gc
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

LIGHT = ("httpx", "json_repair", "numpy", "orjson", "rich.progress", "rich.table", "yaml")
"""What the scripts that load no model import, besides prmkit's own modules."""


class Preloaded:
    """A Python that waits with its imports done; started by the first command."""

    def __init__(self, modules: Sequence[str]) -> None:
        """Name what is to be imported beforehand."""
        self._modules = modules
        self._lock = threading.Lock()
        self._python: subprocess.Popen[str] | None = None

    def run(
        self,
        *command: object,
        cwd: Path,
        stdin: str | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 300,
    ) -> subprocess.CompletedProcess[str]:
        """Run a script with arguments, as `subprocess.run` does with captured output."""
        words = list(map(str, command))
        with tempfile.TemporaryDirectory() as folder, self._lock:
            files = [Path(folder, name) for name in ("stdin", "stdout", "stderr")]
            for file, text in zip(files, (stdin or "", "", ""), strict=True):
                file.write_text(text)
            environment = dict(os.environ if env is None else env)
            request = {"command": words, "cwd": str(cwd), "env": environment, "files": list(map(str, files))}
            code = int(self._ask(json.dumps(request), timeout))
            return subprocess.CompletedProcess(words, code, files[1].read_text(), files[2].read_text())

    def _ask(self, line: str, timeout: float) -> str:
        # Tests of the launcher in this process end all processes below it.
        if self._python is None or self._python.poll() is not None:
            program = [sys.executable, __file__, *self._modules]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self._python = subprocess.Popen(program, **pipes, text=True, start_new_session=True)
        python = self._python
        assert python.stdin is not None and python.stdout is not None
        python.stdin.write(line + "\n")
        python.stdin.flush()
        if not select.select([python.stdout], [], [], timeout)[0]:
            os.killpg(python.pid, signal.SIGKILL)
            self._python = None
            raise subprocess.TimeoutExpired(line, timeout)
        return python.stdout.readline()


PRELOADED = Preloaded(LIGHT)
"""For scripts that load no model; one for each worker of pytest-xdist."""


def become(request: Mapping[str, Any]) -> NoReturn:
    """Turn this fork into the script that is asked for, and run it to its end."""
    for number, file in enumerate(request["files"]):
        os.dup2(os.open(file, os.O_RDWR), number)
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    script, *arguments = request["command"]
    sys.argv, sys.path[0] = [script, *arguments], str(Path(script).parent)
    code = 1
    try:
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        if sys.exception():
            traceback.print_exc()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(code)  # taking down what was imported would take a tenth of a second


def main() -> None:
    """Import, then fork for every request, and answer with its exit code."""
    root = Path(__file__).resolve().parents[1]
    sys.path.insert(1, str(root))
    ours = [".".join(path.relative_to(root).with_suffix("").parts) for path in root.glob("prmkit/**/*.py")]
    for name in (*sys.argv[1:], *(name.removesuffix(".__init__") for name in ours if "rewards" not in name)):
        __import__(name)
    gc.freeze()  # or every fork would copy what the collector marks
    while line := sys.stdin.readline():
        if not (child := os.fork()):
            become(json.loads(line))
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
