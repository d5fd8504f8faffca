"""Python programs in forks of a Python that has imported their packages already, because imports take most of a test.

A fork has its own memory, open files, environment and exit code, as any process that a user starts. Tests of starting
itself, of streams, terminals, signals and kills start Python anew.

    python preloaded.py MODULE …              import the modules, then run the scripts that standard input names
    python preloaded.py --at SOCKET MODULE …  import the modules once a program wants them, then run what is handed over
"""

import atexit
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

LIGHT = ("httpx", "json_repair", "numpy", "orjson", "rich.progress", "rich.table", "yaml")
"""What the scripts that load no model import, besides prmkit's own modules."""
HEAVY = (*LIGHT, "llamafactory.cli", "llamafactory.train.tuner", "scipy.stats")
"""What LLaMA Factory and the scripts that load a model import."""
ADDRESS = "PRMKIT_TESTS_PRELOADED"
"""The environment variable with the socket to which children/sitecustomize.py hands such programs over."""

ALL_NEW = os.environ.get(ADDRESS) == ""
"""Whether every process is to import its packages itself, as with `./run_tests.sh --all`."""


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
        if ALL_NEW:
            typed = [sys.executable, *words]
            return subprocess.run(typed, cwd=cwd, input=stdin, env=env, timeout=timeout, capture_output=True, text=True)
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


@contextmanager
def forks_of(modules: Sequence[str]) -> Iterator[str]:
    """A Python that waits with its imports done; the address at which it takes over programs, for `ADDRESS`."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # the path of a socket has at most 107 characters
        address = str(Path(folder, "socket"))
        command = [sys.executable, __file__, "--at", address, *modules]
        # It ends with its standard input.
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as python:
            assert python.stdout is not None
            python.stdout.readline()
            yield address


PRELOADED = Preloaded(LIGHT)
"""For scripts that load no model; one for each worker of pytest-xdist."""


# --- the Python that forks --------------------------------------------------------------------------------------------


def become(request: Mapping[str, Any], streams: Sequence[int]) -> int:
    """Turn this fork into the program that is asked for, run it to its end, and return its exit code."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    program, *arguments = request["command"]
    sys.argv = [program, *arguments]
    code = 1
    try:
        if program == "-m":
            sys.path[0], sys.argv = request["cwd"], arguments
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = str(Path(program).resolve().parent)
            runpy.run_path(program, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        if sys.exception():
            traceback.print_exc()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    return code


def run_scripts() -> None:
    """Fork for every line of standard input, and answer with the exit code."""
    while line := sys.stdin.readline():
        if not (child := os.fork()):
            code, request = 1, json.loads(line)
            try:
                code = become(request, [os.open(file, os.O_RDWR) for file in request["files"]])
            finally:
                os._exit(code)  # taking down what was imported would take a tenth of a second
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        sys.stdout.flush()


def run_programs(listener: socket.socket) -> None:
    """Fork for every program that is handed over, until standard input ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    while listener in select.select([listener, 0], [], [])[0]:
        connection = listener.accept()[0]
        if not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            run_program(connection)
        connection.close()


def run_program(connection: socket.socket) -> NoReturn:
    """Be the program of one process, which is at the other end of the connection."""
    code = 1
    try:
        message, streams, _, _ = socket.recv_fds(connection, 1 << 20, 3)
        request = json.loads(message)
        os.getppid = lambda: int(request["parent"])
        sys.path = ["", *request["path"]]
        threading.Thread(target=_obey, args=[connection], daemon=True).start()
        code = become(request, streams)
    finally:
        connection.sendall(bytes([code & 255]))
        os._exit(code)


def _obey(connection: socket.socket) -> None:
    """Pass on the signals of the process at the other end, and end with it."""
    while number := connection.recv(1):
        os.kill(os.getpid(), number[0])
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """See the top of this file."""
    modules = sys.argv[1:]
    if at_socket := modules[0] == "--at":
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(modules[1])
        listener.listen(64)
        sys.stdout.write("listening\n")
        sys.stdout.flush()
        if listener not in select.select([listener, 0], [], [])[0]:
            return
        modules = modules[2:]
    else:
        root = Path(__file__).resolve().parents[1]
        sys.path.insert(1, str(root))
        ours = [".".join(path.relative_to(root).with_suffix("").parts) for path in root.glob("prmkit/**/*.py")]
        modules += [name.removesuffix(".__init__") for name in ours if "rewards" not in name]
    for name in modules:
        __import__(name)
    gc.freeze()  # or every fork would copy what the collector marks
    if at_socket:
        run_programs(listener)
    else:
        run_scripts()


if __name__ == "__main__":
    main()
