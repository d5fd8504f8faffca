"""A program that runs in a fork of `preloaded.py` is, for whoever started it, the process that was started."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from preloaded import ADDRESS, forks_of
from processes import wait_for

PROGRAM = """
import os, sys, time
if sys.argv[1] == "wait":
    print(os.getpid(), flush=True)
    time.sleep(60)
print("colorsys" in sys.modules, os.getcwd(), os.environ["COLOUR"], sys.argv[1:], sys.stdin.read(), os.getppid())
sys.stderr.write("narration")
sys.exit(7)
"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with forks_of(["colorsys"]) as address:
        yield address


@pytest.fixture
def program(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A program with a name that is handed over."""
    monkeypatch.setenv(ADDRESS, address)
    (tmp_path / "train.py").write_text(PROGRAM)
    return [sys.executable, str(tmp_path / "train.py")]


def test_it_has_the_folder_environment_streams_parent_and_exit_code(program: list[str], tmp_path: Path) -> None:
    environment = os.environ | {"COLOUR": "blue"}
    done = subprocess.run([*program, "a b"], input="in", cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == f"True {tmp_path} blue ['a b'] in {os.getpid()}\n"
    assert (done.stderr, done.returncode) == ("narration", 7)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_the_process_that_was_started_ends_it(program: list[str], number: int) -> None:
    with subprocess.Popen([*program, "wait"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        fork = Path("/proc", process.stdout.readline().strip())
        process.send_signal(number)
        assert process.wait(10) == -number
        assert wait_for(lambda: not fork.exists(), 10)
