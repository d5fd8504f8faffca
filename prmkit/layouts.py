"""The JSON values of an input file, whatever its layout: what conversion, scoring and import read, one at a time.

A file holds one value per line, or one array, or objects one after another; it may be compressed. `rows` says what a
row means, `trajectories.readers` what a run means.
"""

import codecs
import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import orjson

from prmkit.errors import DataError
from prmkit.files import COMPRESSIONS, compression_of, open_input, open_stdin, uncompressed_name

STDIN = "-"
LONGEST_LINE = 4 << 20
"""Bytes. A longer row is rejected unread: no model reads a prompt of a million tokens, and memory stays bounded."""
ANY_LENGTH = 1 << 60
"""Bytes. A run may have any size that fits in memory."""

LINE_SUFFIXES = (".jsonl", ".ndjson")
"""How the names of files with one value a line end, compressed or not."""
ROW_SUFFIXES = (*LINE_SUFFIXES, ".json")
"""How the names of files of rows end, compressed or not."""
SUFFIXES = (*ROW_SUFFIXES, ".traj")
"""The suffixes of JSON files, compressed or not. In other files, anything that is not JSON is refused immediately."""


def is_named(path: Path, suffixes: tuple[str, ...]) -> bool:
    """Whether a file's name ends in one of the suffixes, compressed or not."""
    return uncompressed_name(path).lower().endswith(suffixes)


def bare_name(path: Path) -> str:
    """The name of a file of rows without its suffixes: `rows` for `rows.jsonl.gz`."""
    name = uncompressed_name(path)
    return Path(name).stem if is_named(path, ROW_SUFFIXES) else name


# --- values -----------------------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """One value as it is in the file."""

    number: int
    """Of the line, from 1; of the item in an array or where objects follow each other in another way."""
    text: bytes
    size: int
    """In bytes; more than `len(text)` if the value is too long and only its beginning is kept."""
    unit: str = "line"
    """What `number` counts: `line` or `item`."""


class Rejected(Exception):
    """A row or another value that cannot be used.

    Args:
        reason: what is wrong with it.
        kind: the name under which such values are counted; by default the reason.
    """

    def __init__(self, reason: str, kind: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.kind = kind or reason


def parse_line(line: Line, *, lenient: bool = False) -> Any:
    """The JSON value of a line. `NaN`, which pandas writes for a missing value, is read as null.

    Args:
        line: a line, or an item of a larger document.
        lenient: also accept what agents leave in their output: bare control characters, and a lone surrogate where an
            emoji was cut, which becomes a question mark because no file can hold it. Prompts of rows are not changed.

    Raises:
        Rejected: the value is too long, not JSON, not UTF-8, or nested too deeply for any parser.
    """
    if line.size > len(line.text):
        raise Rejected(f"row of {line.size:,} bytes; the limit is {LONGEST_LINE:,}", "row too long")
    try:
        return exact_loads(line.text) if lenient else orjson.loads(line.text)
    except orjson.JSONDecodeError as error:
        try:
            text = line.text.decode()
            if lenient or "NaN" in text or "Infinity" in text:
                return _parse_again(text, lenient=lenient)
        except UnicodeDecodeError as wrong:
            raise Rejected(f"not UTF-8 (byte {wrong.start + 1} of the {line.unit})", "not UTF-8") from error
        except (ValueError, RecursionError, orjson.JSONEncodeError):
            pass
        raise Rejected(f"not JSON ({error})", "not JSON") from error


def _parse_again(text: str, *, lenient: bool) -> Any:
    value = json.loads(text, strict=not lenient, parse_constant=lambda _: None)
    if lenient:
        text = json.dumps(value, ensure_ascii=False)  # `Infinity` for 1e999
        return json.loads(text.encode("utf-8", "replace"), parse_constant=lambda _: None)
    orjson.dumps(value)  # Python's parser accepts characters that cannot be written
    return value


_LONG_NUMBER = re.compile(r"[0-9]{20}")


def exact_loads(text: str | bytes) -> Any:
    """Parse JSON of a run: orjson alone would round integers of more than 64 bits, such as amounts in wei.

    Raises:
        orjson.JSONDecodeError: it is not JSON.
    """
    value = orjson.loads(text)
    if not _LONG_NUMBER.search(text if isinstance(text, str) else text.decode()):
        return value
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # an integer of 5,000 digits, or nested deeply
        return value


def read_values(path: Path) -> Iterator[tuple[int, Any]]:
    """The values of a file of runs, of any size, with the numbers of their lines or items; see `value_or_rejected`.

    Raises:
        DataError: see `open_lines`.
    """
    with open_lines(str(path), ANY_LENGTH) as lines:
        for line in lines:
            yield line.number, value_or_rejected(line)


def value_or_rejected(line: Line) -> Any:
    """What one line of a file of runs says; a `Rejected` if it cannot be read."""
    try:
        return parse_line(line, lenient=True)
    except Rejected as rejected:
        return rejected


# --- layouts ----------------------------------------------------------------------------------------------------------


@contextmanager
def open_lines(name: str, longest: int | None = None) -> Iterator[Iterator[Line]]:
    """Open a file, compressed or not, as by `read_lines`; `-` is stdin.

    Raises:
        DataError: the file cannot be read or decompressed, or holds something other than JSON.
    """
    if name == STDIN:
        with open_stdin() as stream:
            yield read_lines(stream, "stdin", longest)
    else:
        with open_input(Path(name)) as stream:
            yield read_lines(stream, name, longest)


def read_lines(stream: IO[bytes], name: str, longest: int | None = None) -> Iterator[Line]:
    """The lines of a file, or the items of a document, one at a time; empty lines are skipped.

    The first line is enough to recognise one value per line, so a slow pipe is read as it fills.

    Args:
        stream: uncompressed bytes.
        name: for messages.
        longest: bytes; of a longer line only the beginning is kept. None is `LONGEST_LINE`.

    Raises:
        DataError: the file is a table or archive of another kind; or a document is damaged, or not UTF-8 throughout.
    """
    longest = longest or LONGEST_LINE
    number, first = 1, stream.readline(LONGEST_LINE + 1)
    first = first.removeprefix(codecs.BOM_UTF8)
    while first.isspace():
        number, first = number + 1, stream.readline(LONGEST_LINE + 1)
    _check_kind_of_file(first, name)
    if first.lstrip()[:1] not in (b"[", b"{") or isinstance(_loaded(first), dict):
        yield from _numbered_lines(stream, first, number, longest)
        return
    head = first + (more := stream.read(LONGEST_LINE))
    if _is_document(head, is_whole=len(more) < LONGEST_LINE):
        yield from _items(stream, head, name, longest)
    else:
        yield from _numbered_lines(stream, head, number, longest)


_ENCODINGS = {
    b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16",
    b"{\0": "UTF-16LE", b"[\0": "UTF-16LE", b"\0{": "UTF-16BE", b"\0[": "UTF-16BE",
}  # fmt: skip
_OTHER_FILES = {
    b"PAR1": "a Parquet file. Write its rows as lines: "
    "python -c \"import pandas; pandas.read_parquet('{name}').to_json('rows.jsonl', orient='records', lines=True)\"",
    b"ARROW1": "an Arrow file. Write its rows as lines of JSON, such as with datasets.Dataset.to_json.",
    b"PK\x03\x04": "a zip archive or a spreadsheet. Unpack it, and write its rows as lines of JSON; "
    "an Inspect log: inspect log convert --to json",
    b"SQLite format 3": "an SQLite database. Write its rows as lines of JSON.",
}


def _check_kind_of_file(start: bytes, name: str) -> None:
    """Reject a file that is compressed, a table, or binary. `start` is its first line that is not empty."""
    for suffix, packing in COMPRESSIONS.items():
        if start.startswith(packing.magic):
            if compression_of(Path(name)):
                raise DataError(f"{name}: compressed twice. Decompress it once.")
            advice = "Decompress it first" if name == "stdin" else f"Give it a name that ends in {suffix}"
            raise DataError(f"{name}: compressed with {packing.name}. {advice}.")
    for mark, encoding in _ENCODINGS.items():
        if start.startswith(mark):
            command = f"iconv -f {encoding} -t UTF-8 {name} > lines.jsonl"
            raise DataError(f"{name}: written in {encoding}. Convert it first: {command}")
    for mark, advice in _OTHER_FILES.items():
        if start.startswith(mark):
            raise DataError(f"{name}: {advice.format(name=name)}")
    if b"\0" in start[:4096]:
        raise DataError(f"{name}: a binary file, not JSON.")
    path = Path(name)
    if not start or start.lstrip()[:1] in (b"{", b"[") or name == "stdin" or is_named(path, SUFFIXES):
        return
    if is_named(path, (".csv", ".tsv")):
        table = f"read_csv('{name}', sep='\\t')" if is_named(path, (".tsv",)) else f"read_csv('{name}')"
        command = f"import pandas; pandas.{table}.to_json('rows.jsonl', orient='records', lines=True)"
        raise DataError(f'{name}: a table of columns. Write its rows as lines: python -c "{command}"')
    raise DataError(f"{name}: not JSON.")


def _numbered_lines(stream: IO[bytes], ahead: bytes, number: int, longest: int) -> Iterator[Line]:
    """The lines of `ahead`, which was already read, and of the rest of the stream."""
    buffered = io.BytesIO(ahead)
    while True:
        text = buffered.readline(longest + 1)
        if len(text) <= longest and not text.endswith(b"\n"):
            text += stream.readline(longest + 1 - len(text))
        if not text:
            return
        if len(text) > longest and not text.endswith(b"\n"):
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


_SPACE = re.compile(r"[ \t\r\n]*")
_SPACE_IN_LINE = re.compile(r"[ \t\r]*")
_BETWEEN = re.compile(r"[ \t\r\n]*,?[ \t\r\n]*")


def _is_document(head: bytes, *, is_whole: bool) -> bool:
    """Whether a file whose first line is not an object is one array, or objects one after another.

    Otherwise it has one value per line, and the first is damaged, or a complete array with more lines after it.

    Args:
        head: the beginning of the file.
        is_whole: nothing follows it.
    """
    line, _, rest = head.lstrip().partition(b"\n")
    text = head.decode(errors="replace").lstrip()
    in_array = text[0] == "["
    start = _SPACE.match(text, 1).end() if in_array else 0  # type: ignore[union-attr]
    if in_array and text[start : start + 1] == "]":
        return not text[start + 1 :].strip()
    if in_array and isinstance(_loaded(line), list):
        return not rest.strip()
    try:
        _, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError) as error:
        if is_whole or _is_damage(error, text):
            return _looks_like_a_document(rest.lstrip(b"\r\n").partition(b"\n")[0], in_array=in_array)
        return in_array or len(line) <= LONGEST_LINE
    between = _SPACE if in_array else _SPACE_IN_LINE
    after = text[between.match(text, end).end() :][:1]  # type: ignore[union-attr]
    return after in (",", "]", "") if in_array else after in (",", "{") or "\n" in text[:end]


def _looks_like_a_document(second: bytes, *, in_array: bool) -> bool:
    """Whether something damaged is one document rather than lines, judging by its second line."""
    if in_array:
        return not isinstance(_loaded(second), dict)
    return bool(second) and (second[:1] != b"{" or second.rstrip().endswith(b","))


def _loaded(line: bytes) -> Any:
    """The value of a line; None if it is not JSON."""
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        return None


def _items(stream: IO[bytes], head: bytes, name: str, longest: int) -> Iterator[Line]:
    """The items of an array, or objects one after another, with or without commas; the file may have any length."""
    decode = codecs.getincrementaldecoder("utf-8")().decode
    scan = json.JSONDecoder(strict=False).raw_decode  # what is inside an item is checked when it is parsed
    number = 0
    try:
        text, ended = decode(head).lstrip(), False
        in_array = text.startswith("[")
        at = int(in_array)
        while True:
            at = _BETWEEN.match(text, at).end()  # type: ignore[union-attr]
            end = 0
            try:
                if not (in_array and text[at : at + 1] == "]"):
                    end = scan(text, at)[1]
            except ValueError as error:
                ended = ended or _is_damage(error, text)
            if end and (end < len(text) or ended):
                number += 1
                item = text[at:end].encode()
                yield Line(number, item[: 1000 if len(item) > longest else None], len(item), "item")
                at = end
            elif ended or len(text) - at > 2 * longest:
                break
            else:
                # Twice as much each time: a large item is scanned only a few times.
                more = stream.read(max(1 << 20, len(text) - at))
                text, at, ended = text[at:] + decode(more, not more), 0, not more
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8, after item {number:,}.") from error
    except RecursionError as error:
        raise DataError(f"{name}: nested too deeply, after item {number:,}.") from error
    if (rest := text[at:].strip()) != ("]" if in_array else ""):
        long = f", or has an item of more than {2 * longest:,} bytes," if len(rest) > 2 * longest else ""
        raise DataError(
            f"{name}: JSON that ends early or is damaged{long} after item {number:,} ({rest[:40]!r}). "
            "Repair it, or write one value per line, so that only damaged ones are rejected."
        )


def _is_damage(error: Exception, text: str) -> bool:
    """Whether a parser failed before the end of `text`, so that the rest of the file cannot help."""
    if not isinstance(error, json.JSONDecodeError):
        return True  # nested too deeply, or an integer of 5,000 digits
    return error.pos < len(text) - 16 and not error.msg.startswith("Unterminated")
