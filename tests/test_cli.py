"""The border between scripts and library: exit codes, and signals that nobody swallows."""

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import argparse, logging, os, sys, time
from prmkit import cli

class Stream:
    signalled = False
    def write(self, text):
        if not self.signalled:
            self.signalled = True
            os.kill(os.getpid(), int(sys.argv[1]))
            time.sleep(0.1)
    def flush(self):
        pass

def command(arguments):
    logging.getLogger().addHandler(logging.StreamHandler(Stream()))
    logging.getLogger().info("a library at work, which catches every Exception")
    return 0

parser = argparse.ArgumentParser()
parser.add_argument("number")
sys.exit(cli.run(command, parser))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_inside_of_a_library_stops_the_work(number: signal.Signals, code: int) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(int(number))], capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr


FAILING = """
import argparse, sys
from prmkit import cli

def command(arguments):
    raise OSError(*eval(sys.argv[1]))

parser = argparse.ArgumentParser()
parser.add_argument("error")
sys.exit(cli.run(command, parser))
"""


@pytest.mark.parametrize(
    ("error", "told"),
    [
        ("(28, 'No space left on device')", "error: No space left on device.\n"),
        ("(2, 'No such file or directory', 'a.json')", "error: a.json: No such file or directory.\n"),
        ("(9, 'Bad file descriptor')", None),
    ],
)
def test_what_the_system_says_of_a_file_is_one_line(error: str, told: str | None) -> None:
    done = subprocess.run([sys.executable, "-c", FAILING, error], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    if told is None:
        assert "Traceback" in done.stderr, "an error of ours lost its traceback"
    else:
        assert done.stderr == told
