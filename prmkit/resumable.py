"""Resumable JSONL outputs: one line per row, written as the rows arrive; the next run continues the file."""

import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import orjson

from prmkit.errors import DataError, UsageError
from prmkit.files import atomic_write, read_json, uncompressed_name, write_all, write_json

log = logging.getLogger("prmkit")

JsonLine = Mapping[str, Any]


def companion_file(file: Path, what: str) -> Path:
    """Name a file that belongs to an output: `scores.what` for `scores.jsonl`, `scores.a.what` for `scores.a`.

    An output that was compressed later keeps its companion: that of `scores.jsonl.gz` is `scores.what`, too.

    Raises:
        UsageError: the output has no name.
    """
    if not file.name:
        raise UsageError("the name of the output is empty. Pass the name of a file.")
    return file.with_name(f"{uncompressed_name(file).removesuffix('.jsonl')}.{what}")


def fingerprint_file(file: Path) -> Path:
    """Return the path of an output's fingerprint file, which records what made its lines."""
    return companion_file(file, "fingerprint.json")


def check_output(file: Path, source: Path | None) -> None:
    """Check an output path before anything is read or loaded: it must be usable and must not replace an input.

    Args:
        file: the output.
        source: the input; None for stdin.

    Raises:
        UsageError: the output is the input, has a compression suffix such as .gz, or is a device or a pipe.
        DataError: it is a folder, or its parent is a file.
    """
    check_plain_name(file)
    folder = next(parent for parent in file.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise DataError(f"{file}: its parent {folder} is not a folder. Choose another output file.")
    if file.is_dir():
        raise DataError(f"{file} is a folder. Pass the name of a file.")
    if file.exists() and not file.is_file():
        raise UsageError(f"{file} is not a regular file. Choose another output file.")
    if file.exists() and (file.samefile(source) if source and source.exists() else source is None and _is_stdin(file)):
        raise UsageError(f"{file} is also the input. Choose another output file.")


def check_outputs(files: Sequence[Path], sources: Sequence[Path | None]) -> None:
    """Check all the files that a command writes, each as in `check_output`: no two of them may be the same file.

    Raises:
        UsageError, DataError: as `check_output`; or two files are one, also through a link.
    """
    for file in files:
        for source in sources:
            check_output(file, source)
    for one, other in combinations(files, 2):
        if one.resolve() == other.resolve() or (one.exists() and other.exists() and one.samefile(other)):
            raise UsageError(f"{other} is the same file as {one}, which is also written. Choose another output file.")


def check_plain_name(file: Path) -> None:
    """Reject an output name with a compression suffix.

    Raises:
        UsageError: the name ends in .gz or another such suffix.
    """
    if (name := uncompressed_name(file)) != file.name:
        raise UsageError(f"{file}: the output is never compressed. Write to {name}, and compress it afterwards.")


def _is_stdin(file: Path) -> bool:
    try:
        return os.path.samestat(file.stat(), os.fstat(0))
    except OSError:  # there is no stdin
        return False


def reopen(file: Path, fingerprint: Mapping[str, Any], *, retry: Collection[str] = ()) -> list[dict[str, Any]]:
    """Read the lines that an earlier, possibly killed, run left in `file`, if they have the same fingerprint.

    Removes a last line that was cut off. Moves lines of another judge, mode or dataset to another file.

    Args:
        file: the output.
        fingerprint: only lines with the same fingerprint may share a file; it is stored next to the file.
        retry: lines with one of these values as `status` are removed from the file, so that they are made again.

    Raises:
        UsageError: the file was not written by such a run.
        DataError: a line is damaged.
    """
    marker = fingerprint_file(file)
    if file.is_file() and file.stat().st_size:
        if not marker.is_file():
            raise UsageError(
                f"{file} exists and is not a scoring output (no {marker.name} next to it). "
                "Choose another --output, or move it away."
            )
        if read_json(marker) != fingerprint:
            backup = _free_name(file)
            file.replace(backup)
            log.info("%s was made with another judge, mode or dataset; moved to %s", file, backup.name)
    write_json(marker, fingerprint)
    if not file.is_file():
        return []
    with file.open("r+b") as stream:
        content = stream.read()
        stream.truncate(content.rfind(b"\n") + 1)
    lines = [_line(line, f"{file}:{number}") for number, line in enumerate(content.split(b"\n")[:-1], start=1)]
    kept = [line for line in lines if line.get("status") not in retry]
    if len(kept) < len(lines):
        replace_rows(file, kept)
    return kept


def _line(text: bytes, location: str) -> dict[str, Any]:
    try:
        return dict(orjson.loads(text))
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{location}: damaged ({error}). Delete this line and all after it, or start again with another --output."
        ) from error


def _free_name(file: Path) -> Path:
    number = 1
    while (name := companion_file(file, f"old{number}.jsonl")).exists():
        number += 1
    return name


def append_rows(file: Path, rows: Iterable[JsonLine]) -> Iterator[JsonLine]:
    """Append each row to `file` as it arrives, and yield it.

    Raises:
        OSError: the file cannot be written; the error has its name.
    """
    with appending(file) as append:
        for row in rows:
            append(row)
            yield row


@contextmanager
def appending(file: Path, *, synced: bool = False) -> Iterator[Callable[[JsonLine], None]]:
    """Yield a function that appends a row to `file` immediately.

    Args:
        file: a file of complete lines; it may be empty or missing.
        synced: sync every row to the disk before the function returns; otherwise sync once, when the block ends.

    Raises:
        OSError: the file cannot be written; the error has its name, which the system leaves out if the disk is full.
    """
    with file.open("ab", buffering=0) as stream:

        def append(row: JsonLine) -> None:
            try:
                write_all(stream.write, _json_line(row))
                if synced:
                    os.fsync(stream.fileno())
            except OSError as error:
                error.filename = error.filename or str(file)
                raise

        yield append
        os.fsync(stream.fileno())


def replace_rows(file: Path, rows: Iterable[JsonLine]) -> None:
    """Replace the content of a file atomically: it always has either all old lines or all new ones."""
    with atomic_write(file.resolve()) as stream:  # resolved, or a link would become a file
        for row in rows:
            stream.write(_json_line(row))


def _json_line(row: JsonLine) -> bytes:
    return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)
