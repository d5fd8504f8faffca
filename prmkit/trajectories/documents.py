"""The JSON values of a file, one at a time: one per line, the elements of one array, or one document.

A run may be far larger than a row of judged steps, so a value may have any size that fits in memory; a file may have
any number of values.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import orjson

from prmkit.errors import DataError
from prmkit.files import open_input
from prmkit.row_lines import ROW_SUFFIXES, check_unpacked

SUFFIXES = (*ROW_SUFFIXES, ".traj")
"""How the names of files of JSON end, packed or not."""
_CHUNK = 1 << 20
_KINDS = {
    b"PK\x03\x04": "a zip archive. Unpack it; an Inspect log: inspect log convert --to json",
    b"\xff\xfe": "written in UTF-16. Convert it: iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "written in UTF-16. Convert it: iconv -f UTF-16 -t UTF-8",
    b"PAR1": "a Parquet file. Write its rows as lines of JSON",
    b"SQLite format 3": "an SQLite database. Export its rows as lines of JSON",
}


class Broken:
    """A line that is not JSON."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


class Document:
    """The values of a file with their line numbers (in an array: their positions); it can be read again and again."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """Yield numbers and values; a line that is not JSON is a `Broken`.

        Raises:
            DataError: the file cannot be read, is binary, or is one document that is damaged.
        """
        with open_input(self.path) as stream:
            head = stream.peek(64)[: 1 << 12] if hasattr(stream, "peek") else b""
            check_kind(head, str(self.path))
            number, first = 1, stream.readline()
            first = first.removeprefix(b"\xef\xbb\xbf")
            while first and first.isspace():
                number, first = number + 1, stream.readline()
            yield from self._values(stream, number, first)

    def _values(self, stream: IO[bytes], number: int, first: bytes) -> Iterator[tuple[int, Any]]:
        value = _parsed(first) if first else None
        if not first:
            return
        opening = first.lstrip()[:1]
        if isinstance(value, list):  # an array on one line: the whole file, or the first of many lines
            rest = stream.readline()
            while rest and rest.isspace():
                rest = stream.readline()
            if not rest:
                yield from enumerate(value, start=1)
            else:
                yield number, value
                yield from _lines(stream, number + 1, rest)
        elif not isinstance(value, Broken):
            yield number, value
            yield from _lines(stream, number + 1, stream.readline())
        elif opening == b"[":
            yield from _elements(stream, first, str(self.path))
        elif opening == b"{" and not _is_first_of_lines(first, second := stream.readline()):
            yield from _objects(stream, first + second, str(self.path))
        else:
            yield number, value
            yield from _lines(stream, number + 1, second if opening == b"{" else stream.readline())


def check_kind(head: bytes, name: str) -> None:
    """Reject a file that is not text.

    Raises:
        DataError: it is not text; the message says what to do with it.
    """
    check_unpacked(head, name)
    for mark, what in _KINDS.items():
        if head.startswith(mark):
            raise DataError(f"{name}: {what}.")
    if b"\0" in head:
        raise DataError(f"{name}: a binary file, not JSON.")


def _parsed(line: bytes) -> Any:
    """The value of a line. `NaN`, which Python and pandas write for missing values, is null."""
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        reason = f"not JSON ({error})"
    if any(sign in line for sign in (b"NaN", b"Infinity", b"\\ud", b"\\uD")):
        try:
            return _without_surrogates(json.loads(line, parse_constant=lambda _: None))
        except (ValueError, RecursionError):
            pass
    return Broken(reason)


def _without_surrogates(value: Any) -> Any:
    """A lone surrogate, left where output was cut inside an emoji, becomes a question mark: no file can hold it."""
    return json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))


def _is_first_of_lines(first: bytes, second: bytes) -> bool:
    """Whether a broken first line is one of many, rather than the beginning of a document that spans several lines."""
    return len(first.strip()) > 1 and second.lstrip()[:1] == b"{" and not isinstance(_parsed(second), Broken)


def _lines(stream: IO[bytes], number: int, line: bytes) -> Iterator[tuple[int, Any]]:
    while line:
        if not line.isspace():
            yield number, _parsed(line)
        number, line = number + 1, stream.readline()


def _elements(stream: IO[bytes], head: bytes, name: str) -> Iterator[tuple[int, Any]]:
    """The elements of an array that spans several lines; the whole file is never in memory."""
    yield from _scan(stream, head.lstrip()[1:], name, closing="]")


def _objects(stream: IO[bytes], head: bytes, name: str) -> Iterator[tuple[int, Any]]:
    """One object that spans several lines, or several objects one after another."""
    yield from _scan(stream, head, name, closing="")


def _scan(stream: IO[bytes], head: bytes, name: str, *, closing: str) -> Iterator[tuple[int, Any]]:
    import codecs

    decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
    scan = json.JSONDecoder(strict=False, parse_constant=lambda _: None).raw_decode
    text, at, ended, number, wanted = decode(head), 0, False, 0, _CHUNK
    while True:
        at = _skip(text, at)
        if at < len(text) and (text[at] == closing or not (ended or text[at] in "{[")):
            break
        try:
            if len(text) - at < wanted and not ended:
                raise ValueError  # read more first: a scan that fails at the end has to start again
            value, end = scan(text, at)
            if "\\ud" in text[at:end].lower():
                value = _without_surrogates(value)
            number, at, wanted = number + 1, end, _CHUNK
            yield number, value
        except ValueError:
            if ended:
                break
            more = stream.read(max(wanted, len(text) - at))  # doubles: a large value is scanned only a few times
            wanted = len(text) - at + len(more)
            text, at, ended = text[at:] + decode(more, not more), 0, not more
        except RecursionError:
            raise DataError(f"{name}: nested too deeply, at value {number + 1:,}.") from None
    if text[at:].strip() != closing:
        raise DataError(f"{name}: JSON that ends early or is damaged after value {number:,} ({text[at : at + 40]!r}).")


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n,":
        at += 1
    return at
