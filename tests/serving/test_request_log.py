"""The request log: one line a step, rotated, whole lines only, and never in the way of an answer."""

import json
import os
import resource
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from narrated import Narrated

from prmkit.errors import DataError, UsageError
from prmkit.judge.types import Request
from prmkit.scoring.rows import RowToScore
from prmkit.serving.request_log import RequestLog
from prmkit.trajectory import log_id
from prmkit.verdict import Shape

LINE = {"score": 0.5, "std": 0.1, "label_mass": 0.9, "status": "ok"}


def row(number: int, prompt: str = "good") -> RowToScore:
    request = Request(prompt, Shape(("step_score",), nested=False))
    return RowToScore(number, f"run-1#{number}", request, task="task-7", trajectory="run-1", is_step=True)


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def written(file: Path, count: int = 1, prompt: str = "good", **settings: Any) -> Counter[str]:
    """Log some lines; how many were written and lost."""
    outcomes: Counter[str] = Counter()
    request_log = RequestLog(file, on_outcome=lambda outcome, lines: outcomes.update({outcome: lines}), **settings)
    with request_log.writing():
        for number in range(count):
            request_log.add(row(number, prompt), LINE, "judge@3", "production")
    return outcomes


def test_a_line_has_exactly_its_fields_and_the_prompt_only_when_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    written(file)
    written(file, with_prompts=True)
    without, with_prompt = lines_of(file)
    assert list(without) == list(with_prompt) == [
        "time", "id", "judge", "role", "request_hash", "task", "trajectory", "is_step", "score", "std", "label_mass",
        "status", "characters", "keys", "prompt",
    ]  # fmt: skip
    assert without["prompt"] is None and with_prompt["prompt"] == "good"
    assert without["request_hash"] == row(0).request_hash and without["keys"] == ["step_score"]
    assert (without["id"], without["task"], without["trajectory"]) == ("run-1#0", "task-7", "run-1")
    assert (without["judge"], without["role"], without["characters"]) == ("judge@3", "production", 4)
    assert without["is_step"] is True
    assert file.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("value", ["Cancel order 17.", "x" * 129, "訂單", "", "\ud800", "a\nb"])
def test_an_id_that_may_be_text_is_a_hash(value: str) -> None:
    assert log_id(value) != value and log_id(value) == log_id(value)
    assert str(log_id(value)).startswith("sha256-")


def test_ids_that_are_ids_stay() -> None:
    assert [log_id(each) for each in ("task_12", "a/b#3", 7, None)] == ["task_12", "a/b#3", "7", None]


def test_half_a_surrogate_pair_in_a_prompt_is_written_as_valid_json(tmp_path: Path) -> None:
    written(tmp_path / "log", prompt="a\ud800b", with_prompts=True)
    assert lines_of(tmp_path / "log")[0]["prompt"] == "a?b"


def test_a_full_file_is_rotated_and_the_oldest_one_leaves(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    outcomes = written(file, 200, largest=4000, kept=3)
    assert outcomes == {"written": 200}
    assert sorted(path.name for path in tmp_path.glob("log*")) == ["log.jsonl", *(f"log.jsonl.{n}" for n in (1, 2, 3))]
    files = [tmp_path / f"log.jsonl.{number}" for number in (3, 2, 1)] + [file]
    assert all(path.stat().st_size <= 4000 for path in files)
    numbers = [int(line["id"].partition("#")[2]) for path in files for line in lines_of(path)]
    assert numbers == list(range(numbers[0], 200))


def test_a_reader_sees_every_line_of_a_file_that_is_rotated_away(tmp_path: Path) -> None:
    """A reader has the file open, and reads on where it stopped: the name moves, the file does not."""
    file = tmp_path / "log.jsonl"
    written(file, 5)
    with file.open() as reader:
        assert len(reader.readlines()) == 5
        written(file, 3)
        written(file, 50, largest=5000, kept=9)
        more = [json.loads(line) for line in reader]
    oldest = max(tmp_path.glob("log.jsonl.*"), key=lambda path: int(path.suffix[1:]))
    assert more == lines_of(oldest)[5:] and more


def test_many_threads_write_whole_lines(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    request_log = RequestLog(file, largest=20_000, kept=1000)

    def add(first: int) -> None:
        for number in range(first, first + 250):
            request_log.add(row(number, "x" * (number % 97)), LINE, "judge", "shadow")

    with request_log.writing():
        threads = [threading.Thread(target=add, args=(250 * each,)) for each in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found = [line["id"] for path in tmp_path.glob("log.jsonl*") for line in lines_of(path)]
    assert sorted(found) == sorted(f"run-1#{number}" for number in range(2000))


def test_a_full_disk_loses_whole_lines_counts_them_and_warns_once(tmp_path: Path, narrated: Narrated) -> None:
    """A limit on the size of files is a disk that is full after a part of a line."""
    file = tmp_path / "log.jsonl"
    outcomes: Counter[str] = Counter()
    request_log = RequestLog(file, on_outcome=lambda outcome, lines: outcomes.update({outcome: lines}))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with request_log.writing():

        def log_each(numbers: range) -> None:
            for number in numbers:
                request_log.add(row(number), LINE, "judge", "production")
                _wait_until(lambda wanted=number + 1: outcomes.total() == wanted)

        log_each(range(2))
        resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 100, before[1]))
        try:
            log_each(range(2, 5))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        log_each(range(5, 6))
    assert outcomes == {"written": 3, "lost": 3}
    assert [line["id"] for line in lines_of(file)] == ["run-1#0", "run-1#1", "run-1#5"]
    assert narrated.text.count("Request-log lines are being dropped") == 1


def _wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_slow_disk_fills_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prmkit.serving.request_log._MOST_WAITING", 2000)
    lost: Counter[str] = Counter()
    request_log = RequestLog(tmp_path / "log", on_outcome=lambda outcome, lines: lost.update({outcome: lines}))
    for number in range(100):  # nothing is being written
        request_log.add(row(number), LINE, "judge", "production")
    assert 90 < lost["lost"] < 100


def test_a_file_that_was_moved_or_deleted_is_made_again(tmp_path: Path) -> None:
    file = tmp_path / "log"
    outcomes: Counter[str] = Counter()
    request_log = RequestLog(file, on_outcome=lambda outcome, lines: outcomes.update({outcome: lines}))
    with request_log.writing():
        for number in range(2):
            request_log.add(row(number), LINE, "judge", "production")
            _wait_until(lambda wanted=number + 1: outcomes["written"] == wanted)
            if not number:
                file.rename(tmp_path / "moved")
    assert [len(lines_of(path)) for path in (tmp_path / "moved", file)] == [1, 1]


def test_a_line_that_a_killed_server_did_not_finish_is_removed(tmp_path: Path) -> None:
    file = tmp_path / "log"
    written(file, 3)
    whole = file.read_bytes()
    for left in (whole[:-7], whole[:20], whole[:3]):
        file.write_bytes(left)
        written(file)
        assert len(lines_of(file)) == left.count(b"\n") + 1


@pytest.mark.parametrize("content", ["a line\n", '{"time": 1}\n', "no line break", '{"prompt": "x"}\n'])
def test_other_files_are_left_as_they_are(tmp_path: Path, content: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(content)
    with pytest.raises(UsageError, match="not a request log"):
        written(file)
    assert file.read_text() == content


def test_a_place_that_cannot_be_a_log_is_refused(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    os.mkfifo(tmp_path / "pipe")
    for file in (tmp_path / "link", tmp_path / "link" / "log"):
        with pytest.raises((DataError, OSError)):
            written(file)
    for file in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(UsageError, match="regular file"):
            written(file)
    assert not (tmp_path / "target").read_text()


def test_two_servers_do_not_write_one_file(tmp_path: Path) -> None:
    with RequestLog(tmp_path / "log").writing(), pytest.raises(DataError, match="writing log"):
        written(tmp_path / "log")
