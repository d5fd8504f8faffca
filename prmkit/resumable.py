"""Outputs of one line per row, written as the rows come, and continued by the next run."""

import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import orjson

from prmkit.errors import DataError, UsageError
from prmkit.files import atomic_write, read_json, unpacked_name, write_all, write_json

log = logging.getLogger("prmkit")

JsonLine = Mapping[str, Any]


def companion_file(file: Path, what: str) -> Path:
    """The name of a file that goes with an output: `scores.what` for `scores.jsonl`, `scores.a.what` for `scores.a`.

    A packed output keeps the companion that it had before.
    """
    return file.with_name(f"{unpacked_name(file).removesuffix('.jsonl')}.{what}")


def fingerprint_file(file: Path) -> Path:
    """Path of the fingerprint file of an output, which says what made its lines."""
    return companion_file(file, "fingerprint.json")


def check_output(file: Path, source: Path | None) -> None:
    """Check an output path before anything is read or loaded: it must be writable and must not cost the user a file.

    Args:
        file: the output.
        source: the input; None for stdin.

    Raises:
        UsageError: the output is the input, has a name that ends in .gz or the like, or is a device or a pipe.
        DataError: it is a folder, or its folder is a file.
    """
    check_plain_name(file)
    folder = next(parent for parent in file.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise DataError(f"{file}: {folder} is not a folder. Name another output file.")
    if file.is_dir():
        raise DataError(f"{file}: is a folder. Name a file in it.")
    if file.exists() and not file.is_file():
        raise UsageError(f"{file}: is not a regular file. Name another output file.")
    if file.exists() and (file.samefile(source) if source and source.exists() else source is None and _is_stdin(file)):
        raise UsageError(f"{file}: is also the input. Name another output file.")


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
            raise UsageError(f"{other}: is the same file as {one}, which is written too. Each output needs a file.")


def check_plain_name(file: Path) -> None:
    """Reject the name of a packed file for an output.

    Raises:
        UsageError: it ends in .gz or the like.
    """
    if (name := unpacked_name(file)) != file.name:
        raise UsageError(f"{file}: lines are written as plain text. Name it {name}, and compress it later.")


def _is_stdin(file: Path) -> bool:
    try:
        return os.path.samestat(file.stat(), os.fstat(0))
    except OSError:  # there is no stdin
        return False


def reopen(file: Path, fingerprint: Mapping[str, Any], *, retry: Collection[str] = ()) -> list[dict[str, Any]]:
    """The lines that an earlier, possibly killed, run left in `file`, if they are of the same kind.

    A last line that was cut off is removed. Lines of another judge, mode or dataset are moved away, not mixed in.

    Args:
        file: the output.
        fingerprint: lines with the same fingerprint may be in one file; kept next to the file.
        retry: lines with one of these as their `status` are removed from the file, so that they are made again.

    Raises:
        UsageError: the file is not an output of such a run.
        DataError: a line in it is damaged.
    """
    marker = fingerprint_file(file)
    if file.is_file() and file.stat().st_size:
        if not marker.is_file():
            raise UsageError(
                f"{file}: exists and is not a scoring output (no {marker.name} next to it). "
                "Choose another --output, or move it away."
            )
        if read_json(marker) != fingerprint:
            backup = _free_name(file)
            file.replace(backup)
            log.info("%s: made with another judge, mode or dataset; kept as %s", file, backup.name)
    write_json(marker, fingerprint)
    if not file.is_file():
        return []
    with file.open("r+b") as stream:
        whole = stream.read()
        stream.truncate(whole.rfind(b"\n") + 1)
    lines = [_line(line, f"{file}:{number}") for number, line in enumerate(whole.split(b"\n")[:-1], start=1)]
    kept = [line for line in lines if line.get("status") not in retry]
    if len(kept) < len(lines):
        replace_rows(file, kept)
    return kept


def _line(text: bytes, place: str) -> dict[str, Any]:
    try:
        return dict(orjson.loads(text))
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{place}: damaged ({error}). Delete this line and all after it, or start again with another --output."
        ) from error


def _free_name(file: Path) -> Path:
    number = 1
    while (name := companion_file(file, f"old{number}.jsonl")).exists():
        number += 1
    return name


def append_rows(file: Path, rows: Iterable[JsonLine]) -> Iterator[JsonLine]:
    """Write each row to the end of `file` as it comes, and pass it on.

    Raises:
        OSError: the file cannot be written; the error has its name.
    """
    with appending(file) as append:
        for row in rows:
            append(row)
            yield row


@contextmanager
def appending(file: Path, *, synced: bool = False) -> Iterator[Callable[[JsonLine], None]]:
    """A function that writes a row to the end of `file`, at once.

    Args:
        file: complete lines, or nothing yet.
        synced: every row is on the disk when the function returns; otherwise all are when the block ends.

    Raises:
        OSError: the file cannot be written; the error has its name, which a full disk does not say by itself.
    """
    with file.open("ab", buffering=0) as stream:

        def append(row: JsonLine) -> None:
            try:
                write_all(stream.write, _packed(row))
                if synced:
                    os.fsync(stream.fileno())
            except OSError as error:
                error.filename = error.filename or str(file)
                raise

        yield append
        os.fsync(stream.fileno())


def replace_rows(file: Path, rows: Iterable[JsonLine]) -> None:
    """Replace the whole file; at any moment it holds either the old lines or the new ones."""
    with atomic_write(file.resolve()) as stream:  # resolved, or a link would become a file
        for row in rows:
            stream.write(_packed(row))


def _packed(row: JsonLine) -> bytes:
    return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)
