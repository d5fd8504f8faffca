"""Appending to thousands of files with one open handle and bounded memory."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

_FILE_LIMIT = 256 << 10
_TOTAL_LIMIT = 24 << 20


class Appender:
    """Collects lines by file and writes them in large pieces; a file is open only while a piece is written.

    Holds at most about 24 MiB. Use as a context manager: what is still collected is written at the end.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pieces: dict[str, list[bytes]] = {}
        self._sizes: dict[str, int] = {}
        self._total = 0
        self._lines: dict[str, int] = {}

    @property
    def lines(self) -> Mapping[str, int]:
        """How many pieces were appended, by file."""
        return self._lines

    def append(self, name: str, line: bytes) -> None:
        """Append a line to the file of that name."""
        size = self._sizes.get(name, 0) + len(line)
        self._pieces.setdefault(name, []).append(line)
        self._sizes[name] = size
        self._lines[name] = self._lines.get(name, 0) + 1
        self._total += len(line)
        if size > _FILE_LIMIT:
            self._write(name)
        elif self._total > _TOTAL_LIMIT:
            self._write_all()

    def _write(self, name: str) -> None:
        with (self._folder / name).open("ab") as stream:
            stream.write(b"".join(self._pieces.pop(name)))
        self._total -= self._sizes.pop(name)

    def _write_all(self) -> None:
        for name in list(self._pieces):
            self._write(name)

    def __enter__(self) -> "Appender":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._write_all()
