"""answers.jsonl: everything that was paid for, one line an answer, written before anything is made of it."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson

from prmkit.errors import DataError

_KINDS: Mapping[str, Any] = {"key": str, "judge": str, "model": str, "text": str, "cost": (int, float)}


def read_answers(path: Path) -> dict[str, dict[str, Any]]:
    """The answers so far, by key; of two with one key the first. A last line that was cut off by a kill is dropped.

    Raises:
        DataError: a line is damaged.
    """
    if not path.exists():
        return {}
    answers: dict[str, dict[str, Any]] = {}
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.endswith(b"\n"):
                answer = _answer(line, f"{path}:{number}")
                answers.setdefault(answer["key"], answer)
    return answers


def _answer(line: bytes, place: str) -> dict[str, Any]:
    try:
        answer = orjson.loads(line)
        is_whole = isinstance(answer, dict) and all(isinstance(answer[key], kind) for key, kind in _KINDS.items())
    except (orjson.JSONDecodeError, KeyError):
        is_whole = False
    if not is_whole or "finish_reason" not in answer:
        raise DataError(f"{place}: damaged. It holds answers that were paid for; repair or delete this line.")
    return dict(answer)


@contextmanager
def recording(path: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A function that adds an answer to the file; when it returns, the answer is on the disk.

    Raises:
        OSError: the file cannot be written; the error has its name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+", buffering=0) as stream:
        _drop_half_a_line(stream)

        def record(answer: Mapping[str, Any]) -> None:
            try:
                rest = memoryview(orjson.dumps(answer, option=orjson.OPT_APPEND_NEWLINE))
                while rest:
                    rest = rest[stream.write(rest) or 0 :]
                os.fsync(stream.fileno())
            except OSError as error:
                error.filename = error.filename or str(path)
                raise

        yield record


def _drop_half_a_line(stream: Any) -> None:
    """What a kill left of a line would spoil the next one."""
    size = stream.seek(0, os.SEEK_END)
    end = size
    while end and not _ends_a_line(stream, end):
        end -= 1
    if end < size:
        stream.truncate(end)


def _ends_a_line(stream: Any, end: int) -> bool:
    stream.seek(end - 1)
    return bool(stream.read(1) == b"\n")
