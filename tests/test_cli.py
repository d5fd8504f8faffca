"""The border between scripts and library: exit codes, signals that nobody swallows, and streams as they come."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path

import pytest

from prmkit import cli

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
    ("error", "message"),
    [
        (
            "(28, 'No space left on device')",
            "error: No space left on device. Free some space or choose another folder, "
            "then run the same command again.\n",
        ),
        ("(2, 'No such file or directory', 'a.json')", "error: a.json: No such file or directory.\n"),
        ("(9, 'Bad file descriptor')", None),
    ],
)
def test_an_error_of_the_system_is_one_line(error: str, message: str | None) -> None:
    done = subprocess.run([sys.executable, "-c", FAILING, error], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    if message is None:
        assert "Traceback" in done.stderr, "a bug lost its traceback"
    else:
        assert done.stderr == message


# --- output -----------------------------------------------------------------------------------------------------------

OUTPUT = """
import argparse, json, logging, sys
from prmkit import cli
from prmkit.errors import ExitCode

COLUMNS = ("name", "n", "tasks", "MAE", "median", "skill", "Spearman", "pairs", "tied", "kappa")
ROWS = [["information_relevance", "36", "22", "0.24", "0.24", "0.41", "0.85 [0.73, 0.89]", "0.84", "0.00", "0.86"]]

def command(arguments):
    match arguments.what:
        case "table":
            cli.emit_table("", COLUMNS, ROWS, numeric=COLUMNS[1:], optional=("tied", "pairs", "median", "kappa"))
        case "lines":
            logging.getLogger("prmkit").info(
                "A sentence that is much longer than the terminal is wide ends at a space and never inside control "
                "characters or any other word of it.\\n  merge it:  python train.py --config training_config.yaml "
                "--export-only saves/reward_model_training"
            )
        case "data":
            cli.emit("task \\x1b]0;owned\\x07\\u202e\\x9b2J")
            cli.emit_table("", ["task"], [["\\x1b[2J\\nsecond"]])
            logging.getLogger("prmkit").info("judge %s", "\\x1b[31m")
        case "json":
            cli.emit_json({"judge": "\\x1b\\x9b\\x7f\\u202e \\u4e2d \\u00e9 \\U0001f600"})
        case "bar":
            with cli.progress_bar() as bar:
                bar.add_task("[red]working", total=2)
                cli.emit_json_line('{"a": 1}')
                logging.getLogger("prmkit").info("a line")
    return ExitCode.DONE

parser = argparse.ArgumentParser()
parser.add_argument("what")
parser.add_argument("more", nargs="?")
sys.exit(cli.run(command, parser))
"""


def write(what: str, *, redirect: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "-c", f'"$0" -c "$1" "$2" {redirect}', sys.executable, OUTPUT, what]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **environment})


def on_terminal(what: str, columns: int) -> list[str]:
    """The lines that a terminal of this width gets, stdout and stderr together."""
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, columns))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "NO_COLOR")}
    command = [sys.executable, "-c", OUTPUT, what]
    process = subprocess.Popen(command, stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    received = b""
    try:
        while part := os.read(leader, 4096):
            received += part
    except OSError:  # how Linux reports that the last writer has gone
        pass
    os.close(leader)
    assert process.wait(60) == 0, received
    return received.decode().splitlines()


def test_a_table_leaves_columns_out_until_it_fits() -> None:
    header, _, row, _, *note = on_terminal("table", 72)
    assert header.split() == ["name", "n", "tasks", "MAE", "skill", "Spearman", "kappa"]
    assert row.startswith("information_relevance  36") and row.endswith("0.85 [0.73, 0.89]   0.86")
    assert max(map(len, (header, row, *note))) <= 72
    assert note[0].startswith("Columns left out at this width: tied, pairs, median")
    assert "tied" in on_terminal("table", 200)[0]


def test_a_table_in_a_file_is_complete() -> None:
    assert write("table").stdout.splitlines()[0].split() == [
        "name", "n", "tasks", "MAE", "median", "skill", "Spearman", "pairs", "tied", "kappa"
    ]  # fmt: skip


def test_sentences_end_at_a_space_and_commands_are_not_broken() -> None:
    lines = on_terminal("lines", 60)
    command = lines[-1]
    assert command.endswith("--export-only saves/reward_model_training") and len(command) > 60
    assert all(len(line) <= 60 for line in lines[:-1]) and len(lines) == 4
    assert " ".join(lines[:-1]).endswith("never inside control characters or any other word of it.")


def test_what_a_terminal_would_obey_is_shown_escaped() -> None:
    done = write("data")
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(done.stdout + done.stderr)
    assert r"task \x1b]0;owned\x07\u202e\x9b2J" in done.stdout
    assert r"\x1b[2J\nsecond" in done.stdout
    assert done.stderr == "judge \\x1b[31m\n"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1", "cp1252"])
def test_json_is_valid_and_harmless_in_every_encoding(encoding: str) -> None:
    done = write("json", PYTHONIOENCODING=encoding, LC_ALL="C.UTF-8")
    assert done.returncode == 0, done.stderr
    assert not {"\x1b", "\x9b", "\x7f", "\u202e"} & set(done.stdout)
    assert json.loads(done.stdout) == {"judge": "\x1b\x9b\x7f\u202e 中 é 😀"}
    assert write("table", PYTHONIOENCODING=encoding).returncode == 0


@pytest.mark.parametrize("redirect", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_ends_nothing(redirect: str) -> None:
    done = write("data", redirect=redirect)
    assert done.returncode == 0
    assert not done.stderr or "Traceback" not in done.stderr


def test_a_name_that_is_not_utf8_is_refused_in_one_line() -> None:
    done = subprocess.run([sys.executable, "-c", OUTPUT, "data", b"bad\xff.jsonl"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        2, "error: bad\\xff.jsonl: not valid UTF-8. Rename it, then run the command again.\n"
    )  # fmt: skip


def test_lines_pass_a_progress_bar_unbroken() -> None:
    lines = on_terminal("bar", 80)
    assert any(line.endswith('{"a": 1}') for line in lines) and any(line.endswith("a line") for line in lines), lines
    assert any("[red]working" in line for line in lines)


HANGING = OUTPUT.replace("match arguments.what:", "import time; print('up', flush=True); time.sleep(60)\n    match 1:")


def test_a_closed_terminal_ends_like_a_sigterm() -> None:
    """Its HUP comes first; what is written afterwards meets EIO."""
    pid, leader = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", HANGING, "x"])
    assert b"up" in os.read(leader, 100)
    os.close(leader)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 143


WITHOUT_PACKAGE = """
import argparse, sys
from prmkit import cli

def command(arguments):
    import not_there.at_all

sys.exit(cli.run(command, argparse.ArgumentParser()))
"""


def test_a_missing_package_is_one_sentence_with_the_command(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_PACKAGE], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: the Python package not_there is not installed")
    assert "./run_training.sh --install-deps" in done.stderr


def test_a_missing_module_of_ours_is_a_bug(tmp_path: Path) -> None:
    program = WITHOUT_PACKAGE.replace("not_there.at_all", "prmkit.not_there")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert "Traceback" in done.stderr


def test_visible_keeps_every_language() -> None:
    assert cli.visible("日本語 العربية é 😀\ttab\r\nline\rline") == "日本語 العربية é 😀\ttab\nline\nline"


@pytest.mark.parametrize(
    ("kind", "allowed", "refused", "expected"),
    [
        (cli.positive, ["1", "40"], ["0", "-1", "1.5", "x", ""], "a whole number above 0"),
        (cli.share, ["0", "0.25", "1"], ["-0.1", "1.01", "nan", "x"], "a number from 0 to 1"),
        (cli.level, ["0.9"], ["0", "1", "nan", "90%"], "a number between 0 and 1"),
        (cli.amount, ["0", "2.5"], ["-1", "inf", "nan"], "a number of at least 0"),
        (cli.number, ["-0.5", "1e3"], ["nan", "-inf", "x"], "a finite number"),
        (cli.seconds, ["0.1", "60"], ["0", "inf", "nan", "1m"], "a number above 0"),
    ],
)
def test_a_refused_argument_is_named_with_what_is_allowed(
    kind: Callable[[str], float], allowed: list[str], refused: list[str], expected: str
) -> None:
    assert [kind(text) for text in allowed] == [float(text) for text in allowed]
    for text in refused:
        with pytest.raises(ArgumentTypeError, match=f"^'{re.escape(text)}' is not {expected}$"):
            kind(text)


def test_other_kinds_of_arguments_have_a_message_of_their_own() -> None:
    """argparse answers a plain ValueError with the name of the function: invalid _share value."""
    root = Path(__file__).resolve().parents[1]
    kinds = set[str]()
    for path in [*root.glob("*.py"), *root.glob("prmkit/**/*.py")]:
        kinds |= set(re.findall(r"\btype=([\w.]+), ", path.read_text(encoding="utf-8")))
    assert {kind for kind in kinds if not kind.startswith("cli.")} == {"Path", "int", "float", "_keys"}
    assert len(kinds) > 8
