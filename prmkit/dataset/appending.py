"""Appending to thousands of files with one open handle and bounded memory."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

Line = bytes | memoryview

_LINES_A_CALL = 1024
"""What one writev(2) takes on Linux."""


class Appender:
    """Collects lines by file and writes many at once; a file is open only while it is written to.

    Use as a context manager: what is still collected is written at the end.
    """

    def __init__(self, folder: Path, most_held: int) -> None:
        """
        Args:
            folder: of the files.
            most_held: bytes that are collected before they are written.
        """
        self._folder = folder
        self._most_held = most_held
        self._collected: dict[str, list[Line]] = {}
        self._size = 0
        self._lines: Counter[str] = Counter()

    @property
    def lines(self) -> Mapping[str, int]:
        """How many lines were written, by file; complete when the context has ended."""
        return self._lines

    def append(self, name: str, line: Line) -> None:
        """Append a line to the file of that name."""
        self.collected(name).append(line)
        self.count(len(line))

    def collected(self, name: str) -> list[Line]:
        """The lines that are yet to be written to a file, to be appended to in place; always the same list.

        For loops in which a call a line would be most of the work; `count` must then be told of the bytes.
        """
        return self._collected.setdefault(name, [])

    def count(self, size: int) -> None:
        """Add to the bytes that are held, and write everything when they are many."""
        self._size += size
        if self._size > self._most_held:
            self._write()

    def _write(self) -> None:
        for name, lines in self._collected.items():
            if lines:
                _write_lines(f"{self._folder}/{name}", lines)
                self._lines[name] += len(lines)
                lines.clear()
        self._size = 0

    def __enter__(self) -> "Appender":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._write()


def _write_lines(path: str, lines: Sequence[Line]) -> None:
    """Append lines to a file without copying them together first."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        for start in range(0, len(lines), _LINES_A_CALL):
            some = lines[start : start + _LINES_A_CALL]
            written = os.writev(descriptor, some)
            if written < sum(map(len, some)):  # a disk that is filling up takes a part, and says why with the next call
                rest = memoryview(b"".join(some))[written:]
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
    finally:
        os.close(descriptor)
