"""Appending to very many files: nothing is lost or reordered, and memory stays bounded."""

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


def test_an_error_writes_nothing_more(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), Appender(tmp_path, 1 << 20) as appender:
        appender.append("a", b"line\n")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
