"""Appending to thousands of files with one open handle and bounded memory."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

Line = bytes | memoryview

_MOST_HELD = 24 << 20
"""Bytes."""


class Appender:
    """Collects lines by file and writes them in large pieces; a file is open only while its piece is written.

    Holds about 24 MiB. Use as a context manager: what is still collected is written at the end.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
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
        if self._size > _MOST_HELD:
            self._write()

    def _write(self) -> None:
        for name, lines in self._collected.items():
            if lines:
                with (self._folder / name).open("ab") as stream:
                    stream.write(b"".join(lines))
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
