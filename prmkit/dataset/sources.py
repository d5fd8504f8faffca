"""The inputs as blocks of whole lines, so that several processes can read them at once and memory stays bounded."""

import logging
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from prmkit.dataset.record import LONGEST_LINE
from prmkit.errors import DataError
from prmkit.files import open_input

log = logging.getLogger(__name__)

STDIN = "-"
_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
_BLOCK = LONGEST_LINE
_BOMS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x00\x00\xfe\xff": "UTF-32"}


@dataclass(frozen=True)
class Source:
    """One input file that can be read at any offset."""

    name: str
    """What the user calls it."""
    path: Path
    """Where its plain text lies: the file itself, or its unpacked copy."""


@dataclass(frozen=True)
class Block:
    """Whole lines of a source, at most 4 MiB of them; or one line that is longer than that."""

    source: int
    offset: int
    size: int
    first_line: int
    too_long: bool = False


def find_inputs(inputs: Sequence[str], output: Path) -> list[str]:
    """The input files, folders replaced by the JSONL files in them.

    Args:
        inputs: paths of files and folders, and `-` for the standard input.
        output: is passed over inside folders: a conversion does not read itself.

    Raises:
        DataError: an input is missing, or a folder holds no JSONL file.
    """
    found: list[str] = []
    for name in inputs:
        path = Path(name)
        if name == STDIN:
            found.append(name)
        elif path.is_dir():
            found += _in_folder(path, output.resolve())
        elif path.exists():
            found.append(name)
        else:
            raise DataError(f"{name}: no such file. Name your judged trajectories with --input.")
    twice = sorted({name for name in found if found.count(name) > 1})
    if twice:
        raise DataError(f"{twice[0]}: named twice. Every row would stand twice in the data.")
    return found


def _in_folder(folder: Path, output: Path) -> list[str]:
    names = [
        str(path)
        for path in sorted(folder.rglob("*"))
        if path.name.endswith(_SUFFIXES)
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and output not in path.resolve().parents
        and path.is_file()
    ]
    if not names:
        raise DataError(f"{folder}: holds no file that ends in {', '.join(_SUFFIXES)}.")
    return names


def open_sources(names: Iterable[str], stage: Path) -> list[Source]:
    """Make every input readable at any offset: what is packed, or comes through a pipe, is copied into `stage`.

    Raises:
        DataError: an input cannot be read or unpacked, is empty, or is written in an encoding other than UTF-8.
    """
    sources = [_open_source(name, stage / f"input-{number}") for number, name in enumerate(names)]
    if not sum(source.path.stat().st_size for source in sources):
        raise DataError(f"{', '.join(source.name for source in sources)}: empty. Nothing to convert.")
    return sources


def _open_source(name: str, copy: Path) -> Source:
    if name == STDIN:
        _copy(sys.stdin.buffer, copy)
        source = Source("stdin", copy)
    else:
        path = Path(name)
        with open_input(path) as stream:
            if path.is_file() and path.suffix not in (".gz", ".zst"):
                source = Source(name, path)
            else:
                log.info("unpacking %s", name)
                _copy(stream, copy)
                source = Source(name, copy)
    with source.path.open("rb") as stream:
        start = stream.read(4)
    for mark, encoding in _BOMS.items():
        if start.startswith(mark):
            raise DataError(f"{source.name}: written in {encoding}. Convert it first: iconv -f {encoding} -t UTF-8.")
    return source


def _copy(stream: IO[bytes], copy: Path) -> None:
    with copy.open("wb") as written:
        shutil.copyfileobj(stream, written, 1 << 20)


def blocks_of(sources: Sequence[Source]) -> Iterator[Block]:
    """Cut the sources into blocks, in order. Reads every byte once, to count the lines."""
    for number, source in enumerate(sources):
        with source.path.open("rb") as stream:
            offset, line = 0, 1
            while chunk := stream.read(_BLOCK):
                size = len(chunk) if len(chunk) < _BLOCK else chunk.rfind(b"\n") + 1
                if size:
                    yield Block(number, offset, size, line)
                    line += chunk.count(b"\n", 0, size)
                else:
                    size = len(chunk) + _to_the_end_of_the_line(stream)
                    yield Block(number, offset, size, line, too_long=True)
                    line += 1
                offset += size
                stream.seek(offset)


def _to_the_end_of_the_line(stream: IO[bytes]) -> int:
    passed = 0
    while chunk := stream.read(_BLOCK):
        end = chunk.find(b"\n") + 1
        if end:
            return passed + end
        passed += len(chunk)
    return passed


def lines_of(block: Block, source: Source) -> Iterator[tuple[int, bytes]]:
    """The lines of a block with their numbers, without their ends; blank ones are passed over.

    Of a line that is too long only its beginning is read.
    """
    with source.path.open("rb") as stream:
        stream.seek(block.offset)
        if block.too_long:
            yield block.first_line, stream.read(1000)
            return
        text = stream.read(block.size)
    if block.offset == 0:
        text = text.removeprefix(b"\xef\xbb\xbf")
    for number, line in enumerate(text.split(b"\n"), start=block.first_line):
        if line and not line.isspace():
            yield number, line
