"""The output appears whole or not at all, whenever the conversion is killed and wherever the disk is full."""

import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from prmkit.dataset.publish import make_stage, publish, recover
from prmkit.dataset.settings import Split
from prmkit.errors import DataError
from tests.dataset.conftest import Convert, many_rows, snapshot, write_rows

KILLS = 12


def files(**content: str) -> dict[str, bytes]:
    return {name: text.encode() for name, text in content.items()}


def put(folder: Path, content: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in content.items():
        (folder / name).write_bytes(text)


STEPS = ("symlink", "rename", "replace", "unlink", "link", "mkdir", "fsync", "sync")


@pytest.mark.parametrize("survived", range(40))
def test_a_death_between_any_two_steps_leaves_all_old_or_all_new(
    tmp_path: Path, survived: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Die at the n-th system call that changes anything, then start again."""
    old, new, others = (
        files(a="old a", b="old b", gone="old"),
        files(a="new a", b="new b", c="new c"),
        files(mine="mine"),
    )
    put(tmp_path, old | others)
    stage = make_stage(tmp_path)
    put(stage / "new", new)

    class Died(BaseException):
        pass

    steps = 0

    def counted(call):  # type: ignore[no-untyped-def]
        def run(*arguments, **keywords):  # type: ignore[no-untyped-def]
            nonlocal steps
            steps += 1
            if steps > survived:
                raise Died
            return call(*arguments, **keywords)

        return run

    with monkeypatch.context() as patched:
        for name in STEPS:
            patched.setattr(os, name, counted(getattr(os, name)))
        died = True
        try:
            publish(tmp_path, stage, stage / "new", ["gone"])
            died = False
        except Died:
            pass
    found = snapshot(tmp_path)
    assert found in (old | others, new | others), f"a mixture after {survived} steps"
    recover(tmp_path)
    assert snapshot(tmp_path) == found
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(found)
    assert not any(path.is_symlink() for path in tmp_path.iterdir())
    if not died:
        assert found == new | others
    assert died or survived > 20, "the steps are not counted any more"


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(errno.EIO, "Input/output error")])
@pytest.mark.parametrize("survived", range(0, 60, 6))
def test_an_interruption_between_any_two_steps_of_publishing_loses_nothing(
    data: Path, convert_rows: Convert, survived: int, failure: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C and a failing disk, in the middle of the exchange, and the conversion that is interrupted tidies up."""
    convert_rows(many_rows(tasks=3), split=Split(seed=1))
    (data / "mine.jsonl").write_text("the user's")
    old = snapshot(data)
    steps = 0

    def counted(call):  # type: ignore[no-untyped-def]
        def run(*arguments, **keywords):  # type: ignore[no-untyped-def]
            nonlocal steps
            steps += 1
            if steps == survived + 1:
                raise failure
            return call(*arguments, **keywords)

        return run

    def publish_badly(*arguments: Any) -> None:
        with monkeypatch.context() as patched:
            for name in STEPS:
                patched.setattr(os, name, counted(getattr(os, name)))
            publish(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr("prmkit.dataset.conversion.publish", publish_badly)
        with pytest.raises((KeyboardInterrupt, DataError)) as raised:
            convert_rows(many_rows(tasks=2))
    found = snapshot(data)
    convert_rows(many_rows(tasks=2))
    new = snapshot(data)
    assert _without_report(found) in (_without_report(old), _without_report(new)), f"a mixture after {survived} steps"
    if "unchanged" in str(raised.value):
        assert found == old
    assert not any(path.is_symlink() for path in data.iterdir())


@pytest.mark.parametrize("target", ["../real/a", "nowhere"])
def test_a_link_of_the_users_outlives_a_kill(tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Died before the switch: what was in the place of a file comes back, a link that leads nowhere too."""
    put(tmp_path / "real", files(a="the user's"))
    data = tmp_path / "data"
    put(data, files(b="old b"))
    (data / "a").symlink_to(target)
    stage = make_stage(data)
    put(stage / "new", files(a="new a", b="new b"))
    with monkeypatch.context() as patched:
        patched.setattr("prmkit.dataset.publish.sync", _dies_at(data))
        with pytest.raises(KeyboardInterrupt):
            publish(data, stage, stage / "new", [])
    assert (data / ".current").is_symlink(), "it did not die in the middle"
    recover(data)
    assert (data / "a").readlink() == Path(target)
    assert (data / "b").read_text() == "old b"


def _dies_at(folder: Path) -> Callable[[Path], None]:
    def sync(path: Path) -> None:
        if path == folder:
            raise KeyboardInterrupt

    return sync


@pytest.mark.parametrize("target", ["../theirs", ".conversion-x/../../theirs", ".conversion-x/new", "tasks"])
def test_a_planted_link_moves_no_file_of_others(tmp_path: Path, data: Path, convert_rows: Convert, target: str) -> None:
    put(tmp_path / "theirs", files(precious="x"))
    (tmp_path / "theirs" / "new").mkdir()
    put(tmp_path / "theirs" / "new", files(precious="x"))
    data.mkdir()
    (data / ".conversion-x").symlink_to("../theirs")
    if target == "tasks":
        (data / "tasks").symlink_to("../theirs")
    else:
        (data / ".current").symlink_to(target)
    (data / "mine.txt").symlink_to(".current/precious")
    with pytest.raises(DataError, match=r"\.current: not created by prmkit|tasks is a symlink"):
        convert_rows(many_rows(tasks=2))
    assert (tmp_path / "theirs" / "precious").read_text() == "x"
    assert (tmp_path / "theirs" / "new" / "precious").read_text() == "x"
    assert (data / "mine.txt").is_symlink()


def test_files_of_tasks_are_exchanged_with_the_others(data: Path, convert_rows: Convert) -> None:
    convert_rows(many_rows(tasks=3))
    assert any((data / "tasks").iterdir())
    convert_rows(many_rows(tasks=3), task_variants=False)
    assert not (data / "tasks").exists()


def test_a_folder_in_the_way_is_named(tmp_path: Path) -> None:
    put(tmp_path, files(a="old"))
    (tmp_path / "b").mkdir()
    stage = make_stage(tmp_path)
    put(stage / "new", files(a="new", b="new"))
    with pytest.raises(DataError, match="is a folder, but a file must be written there"):
        publish(tmp_path, stage, stage / "new", [])
    assert (tmp_path / "a").read_text() == "old"


def start(root: Path, source: Path, data: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(root / "convert_dataset.py"), "--input", str(source), "--output-dir", str(data)]
    return subprocess.Popen(
        [*command, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


@pytest.mark.slow
def test_kill_at_any_moment(root: Path, tmp_path: Path) -> None:
    """Two inputs with other splits, converted in turn into one folder, and killed at random moments."""
    choose = random.Random(0)
    inputs = [write_rows(tmp_path / f"{tasks}.jsonl", many_rows(tasks=tasks)) for tasks in (12, 20)]
    expected = []
    for number, source in enumerate(inputs):
        started = time.monotonic()
        assert start(root, source, tmp_path / f"clean-{number}", "--split-seed", str(number)).wait(60) == 0
        seconds = time.monotonic() - started
        expected.append(snapshot(tmp_path / f"clean-{number}"))
    data = tmp_path / "data"
    assert start(root, inputs[0], data, "--split-seed", "0").wait(60) == 0
    killed, turn = 0, 1
    for _ in range(4 * KILLS):
        if killed == KILLS:
            break
        process = start(root, inputs[turn], data, "--split-seed", str(turn))
        try:
            process.wait(choose.uniform(0.1, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            killed += 1
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
        process.wait()
        found = _without_report(snapshot(data))
        assert found in [_without_report(content) for content in expected], f"a mixture after {killed} kills"
        turn = choose.randrange(2)
    assert killed == KILLS
    for turn in (0, 1):
        assert start(root, inputs[turn], data, "--split-seed", str(turn)).wait(60) == 0
        assert _without_report(snapshot(data)) == _without_report(expected[turn])
        assert sorted(path.name for path in data.iterdir() if path.name.startswith(".")) == [".lock"]


def _without_report(content: dict[str, bytes]) -> dict[str, bytes]:
    """The report names the output folder; the rest is the same in any folder."""
    return {name: text for name, text in content.items() if name != "conversion_report.json"}


def test_the_second_conversion_into_a_folder_says_so(root: Path, tmp_path: Path, convert_rows: Convert) -> None:
    data = tmp_path / "data"
    fifo = tmp_path / "slow.jsonl"
    os.mkfifo(fifo)
    first = start(root, fifo, data)
    with fifo.open("wb") as feed:  # opens when the first conversion has the folder and begins to read
        second = start(root, write_rows(tmp_path / "b.jsonl", many_rows(tasks=2)), data)
        _, error = second.communicate(timeout=60)
        assert second.returncode == 1
        assert f"process {first.pid} is converting here" in error
        feed.write(b"".join(json.dumps(row).encode() + b"\n" for row in many_rows(tasks=3)))
    assert first.wait(60) == 0
    assert (data / "tasks" / "reward_model_task_2.jsonl").exists()


@pytest.mark.parametrize("limit", [2_000, 60_000])
def test_a_full_disk_leaves_the_old_data(root: Path, tmp_path: Path, limit: int) -> None:
    """A limit on the size of files fails writes as a full disk does."""
    data = tmp_path / "data"
    source = write_rows(tmp_path / "a.jsonl", many_rows(tasks=40))
    assert start(root, source, data, "--eval-ratio", "0").wait(60) == 0
    before = snapshot(data)
    done = subprocess.run(
        [sys.executable, str(root / "convert_dataset.py"), "--input", str(source), "--output-dir", str(data)],
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 1
    assert "File too large" in done.stderr or "disk is full" in done.stderr
    assert "is unchanged" in done.stderr
    assert "Traceback" not in done.stderr
    assert snapshot(data) == before
    assert start(root, source, data).wait(60) == 0


def _stopped_by(process: subprocess.Popen[bytes], number: int) -> int:
    """Send a signal, and again if it came just before a read: Python notes it, and the read waits for data."""
    for _ in range(3):
        process.send_signal(number)
        with suppress(subprocess.TimeoutExpired):
            return process.wait(20)
    raise AssertionError(f"signal {number} is ignored")


def test_ctrl_c_and_terminate_leave_the_old_data_and_no_stage(root: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    fifo = tmp_path / "slow.jsonl"
    os.mkfifo(fifo)
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process = start(root, fifo, data)
        with fifo.open("wb"):
            assert _stopped_by(process, number) == code
        assert [path.name for path in data.iterdir()] == [".lock"]
