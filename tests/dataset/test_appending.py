"""Appending to very many files: nothing is lost or reordered, and memory stays bounded."""

import os
import random
from pathlib import Path

import pytest

from prmkit.dataset.appending import Appender


@pytest.mark.parametrize("most_held", [1, 1_000, 1 << 30])
def test_every_file_gets_its_lines_in_order(tmp_path: Path, most_held: int) -> None:
    choose = random.Random(0)
    expected: dict[str, list[bytes]] = {}
    with Appender(tmp_path, most_held) as appender:
        for number in range(2_000):
            name = f"file-{choose.randrange(50)}"
            line = b"%d\n" % number * choose.randrange(1, 5)
            appender.append(name, line)
            expected.setdefault(name, []).append(line)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        name: b"".join(lines) for name, lines in expected.items()
    }
    assert appender.lines == {name: len(lines) for name, lines in expected.items()}


def test_more_lines_than_one_call_takes(tmp_path: Path) -> None:
    lines = [b"%d\n" % number for number in range(5_000)]
    with Appender(tmp_path, 1 << 30) as appender:
        for line in lines:
            appender.append("a", line)
    assert (tmp_path / "a").read_bytes() == b"".join(lines)


@pytest.mark.parametrize("taken", [0, 1, 7, 100])
def test_a_disk_that_takes_a_part_is_asked_again(tmp_path: Path, taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the system does when a disk fills up: fewer bytes written than were given, and no error yet."""
    write_all = os.writev
    monkeypatch.setattr(os, "writev", lambda file, parts: write_all(file, [b"".join(parts)[:taken]]))
    lines = [b"line %d\n" % number for number in range(3_000)]
    with Appender(tmp_path, 1 << 30) as appender:
        for line in lines:
            appender.append("a", memoryview(line))
    assert (tmp_path / "a").read_bytes() == b"".join(lines)


def test_an_error_writes_nothing_more(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), Appender(tmp_path, 1 << 20) as appender:
        appender.append("a", b"line\n")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
