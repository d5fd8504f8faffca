"""The lines of an input file, whatever its layout: what conversion and scoring read, one row at a time.

A file holds one row per line, or one JSON array, or objects that are spread over several lines; it may be packed.
"""

import codecs
import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import orjson

from prmkit.errors import DataError
from prmkit.files import PACKINGS, open_input, open_stdin, packing_of, unpacked_name

STDIN = "-"
LONGEST_LINE = 4 << 20
"""Bytes. A longer row is rejected unread: no model reads a prompt of a million tokens, and memory stays bounded."""


LINE_SUFFIXES = (".jsonl", ".ndjson")
"""How the names of files with one value a line end, packed or not."""
ROW_SUFFIXES = (*LINE_SUFFIXES, ".json")
"""How the names of files of rows end, packed or not."""


def is_named(path: Path, suffixes: tuple[str, ...]) -> bool:
    """Whether a file's name ends in one of the suffixes, packed or not."""
    return unpacked_name(path).lower().endswith(suffixes)


def bare_name(path: Path) -> str:
    """The name of a file of rows without its suffixes: `rows` for `rows.jsonl.gz`."""
    name = unpacked_name(path)
    return Path(name).stem if is_named(path, ROW_SUFFIXES) else name


class Line(NamedTuple):
    """One row as it is in the file."""

    number: int
    """Of the line, from 1; of the item in an array or where objects are spread over several lines."""
    text: bytes
    size: int
    """In bytes; more than `len(text)` if the row is too long and only its beginning is kept."""


@contextmanager
def open_rows(name: str) -> Iterator[Iterator[Line]]:
    """Open a file of rows, compressed or not; `-` is stdin.

    Raises:
        DataError: the file cannot be read or decompressed, or holds something other than rows of JSON.
    """
    if name == STDIN:
        with open_stdin() as stream:
            yield read_lines(stream, "stdin")
    else:
        with open_input(Path(name)) as stream:
            yield read_lines(stream, name)


def read_lines(stream: IO[bytes], name: str) -> Iterator[Line]:
    """The rows of a file, one at a time; empty lines are skipped.

    The first line is enough to recognise one row per line, so a slow pipe is read as it fills.

    Args:
        stream: uncompressed bytes.
        name: for messages.

    Raises:
        DataError: the file is a table or archive of another kind, or not UTF-8 throughout; an array is damaged.
    """
    number, first = 1, stream.readline(LONGEST_LINE + 1)
    _check_kind_of_file(first, name)
    first = first.removeprefix(codecs.BOM_UTF8)
    while first and first.isspace():
        number, first = number + 1, stream.readline(LONGEST_LINE + 1)
    if not _may_begin_a_document(first):
        yield from _numbered_lines(stream, first, number)
        return
    head = first + stream.read(LONGEST_LINE)
    if _is_document(head):
        yield from _items(stream, head, name)
    else:
        yield from _numbered_lines(stream, head, number)


_OTHER_FILES = {
    b"\xff\xfe": "written in UTF-16. Convert it first: iconv -f UTF-16 -t UTF-8 {name} > rows.jsonl",
    b"\xfe\xff": "written in UTF-16. Convert it first: iconv -f UTF-16 -t UTF-8 {name} > rows.jsonl",
    b"\x00\x00\xfe\xff": "written in UTF-32. Convert it first: iconv -f UTF-32 -t UTF-8 {name} > rows.jsonl",
    b"PAR1": "a Parquet file. Write its rows as lines: "
    "python -c \"import pandas; pandas.read_parquet('{name}').to_json('rows.jsonl', orient='records', lines=True)\"",
    b"ARROW1": "an Arrow file. Write its rows as lines of JSON, such as with datasets.Dataset.to_json.",
    b"PK\x03\x04": "a zip archive or a spreadsheet. Unpack it, and write its rows as lines of JSON.",
    b"SQLite format 3": "an SQLite database. Write its rows as lines of JSON.",
}


def check_unpacked(start: bytes, name: str) -> None:
    """Reject content that is still packed after its file was opened.

    Args:
        start: of the content.
        name: of the file, or `stdin`.

    Raises:
        DataError: it is packed; the message says what to do with it.
    """
    for suffix, packing in PACKINGS.items():
        if start.startswith(packing.magic):
            if packing_of(Path(name)):
                raise DataError(f"{name}: packed twice. Unpack it once.")
            advice = "Unpack it first" if name == "stdin" else f"Give it a name that ends in {suffix}"
            raise DataError(f"{name}: packed with {packing.name}. {advice}.")


def _check_kind_of_file(start: bytes, name: str) -> None:
    check_unpacked(start, name)
    for mark, advice in _OTHER_FILES.items():
        if start.startswith(mark):
            raise DataError(f"{name}: {advice.format(name=name)}")
    header = start.strip()
    if header and name.lower().endswith((".csv", ".tsv")) and header[:1] not in b"{[":
        reader = "read_csv('{name}', sep='\\t')" if name.lower().endswith(".tsv") else "read_csv('{name}')"
        command = (
            f"import pandas; pandas.{reader.format(name=name)}.to_json('rows.jsonl', orient='records', lines=True)"
        )
        raise DataError(f'{name}: a table of columns. Write its rows as lines: python -c "{command}"')


def _numbered_lines(stream: IO[bytes], ahead: bytes, number: int) -> Iterator[Line]:
    """The lines of `ahead`, which was already read, and of the rest of the stream."""
    buffered = io.BytesIO(ahead)
    while True:
        text = buffered.readline(LONGEST_LINE + 1)
        if len(text) <= LONGEST_LINE and not text.endswith(b"\n"):
            text += stream.readline(LONGEST_LINE + 1 - len(text))
        if not text:
            return
        if len(text) > LONGEST_LINE and not text.endswith(b"\n"):
            yield Line(number, text[:1000], len(text) + _skip_line(buffered) + _skip_line(stream))
        elif not text.isspace():
            text = text.rstrip(b"\n")
            yield Line(number, text, len(text))
        number += 1


def _skip_line(stream: IO[bytes]) -> int:
    skipped = 0
    while text := stream.readline(1 << 20):
        skipped += len(text)
        if text.endswith(b"\n"):
            break
    return skipped


def _may_begin_a_document(first: bytes) -> bool:
    """Whether the first non-empty line is an array, or may be a part of something larger."""
    if first.lstrip()[:1] not in (b"[", b"{"):
        return False
    try:
        return isinstance(orjson.loads(first), list)
    except orjson.JSONDecodeError:
        return True


_SPACE = re.compile(r"[ \t\r\n]*")
_BETWEEN = re.compile(r"[ \t\r\n]*,?[ \t\r\n]*")


def _is_document(head: bytes) -> bool:
    """Whether a file is one array, or objects spread over several lines, and not one row per line.

    An array that is complete in the first line, with more lines after it, is a line like any other.
    """
    text = head.decode(errors="replace").lstrip()
    start = _SPACE.match(text, 1).end() if text[0] == "[" else 0  # type: ignore[union-attr]
    if text[0] == "[" and text[start : start + 1] == "]":
        return not text[start + 1 :].strip()
    if text[start : start + 1] != "{":
        return False
    try:
        _, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return False
    after = text[_SPACE.match(text, end).end() :][:1]  # type: ignore[union-attr]
    if text[0] == "[":
        line, _, rest = head.lstrip().partition(b"\n")
        return after in (",", "]", "") and not (rest.strip() and _is_array(line))
    return after == "," or "\n" in text[:end]


def _is_array(line: bytes) -> bool:
    try:
        return isinstance(orjson.loads(line), list)
    except orjson.JSONDecodeError:
        return False


def _items(stream: IO[bytes], head: bytes, name: str) -> Iterator[Line]:
    """The items of an array, or objects one after another, with or without commas; the file may have any length."""
    decode = codecs.getincrementaldecoder("utf-8")().decode
    scan = json.JSONDecoder(strict=False).raw_decode
    number = 0
    try:
        text, ended = decode(head).lstrip(), False
        in_array = text.startswith("[")
        at = int(in_array)
        while True:
            at = _BETWEEN.match(text, at).end()  # type: ignore[union-attr]
            try:
                if in_array and text[at : at + 1] == "]" and ended:
                    break
                _, end = scan(text, at)
                complete = end < len(text) or ended
            except ValueError:
                complete = False
            if complete:
                number += 1
                item = text[at:end].encode(errors="surrogatepass")
                yield Line(number, item, len(item))
                at = end
            elif ended or len(text) - at > LONGEST_LINE:
                break
            else:
                more = stream.read(1 << 20)
                text, at, ended = text[at:] + decode(more, not more), 0, not more
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8, after item {number:,}.") from error
    except RecursionError as error:
        raise DataError(f"{name}: nested too deeply, after item {number:,}.") from error
    rest = text[at:].strip()
    if rest != ("]" if in_array else ""):
        what = "an array" if in_array else "objects"
        raise DataError(
            f"{name}: {what} of JSON that is damaged after item {number:,} ({rest[:40]!r}). "
            f"Repair it, or write one row per line: jq -c '.{'[]' * in_array}' {name} > rows.jsonl"
        )
