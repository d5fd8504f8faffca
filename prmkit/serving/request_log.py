"""Write the request log: one JSON line per judged step, for A/B tests, drift and audits.

A separate thread writes the lines, so that a slow disk delays no response. Lines that cannot be written, because the
disk is full or too slow, are dropped and counted, and the failure is reported once; responses are not affected.
"""

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

import orjson

from prmkit.errors import DataError, UsageError
from prmkit.files import end_of_last_line, exclusive_lock, write_all
from prmkit.scoring.rows import RowToScore
from prmkit.scoring.score import ResultLine
from prmkit.trajectory import log_id

log = logging.getLogger("prmkit")

JudgeRole = Literal["production", "challenger", "shadow"]
"""`production` and `challenger` answers went to the client; a `shadow` answer was never returned."""

_MOST_WAITING = 64 << 20
"""The maximum number of bytes waiting for the disk; further lines are dropped, so that memory does not fill up."""
_AT_ONCE = 1 << 20
"""The maximum number of bytes that are written together."""
_PATIENCE = 5.0
"""Seconds to write the last lines when the server stops."""
_BEGINNING = b'{"time":"'


@dataclass
class RequestLog:
    """Appends lines to a file, and starts a new file when it is full."""

    file: Path
    with_prompts: bool = False
    largest: int = 100 << 20
    """Bytes after which a file is full; it then becomes FILE.1, FILE.1 becomes FILE.2, and so on."""
    kept: int = 10
    """The number of full files that are kept."""
    on_outcome: Callable[[str, int], None] = lambda outcome, lines: None
    """Called with `written` or `lost` and a number of lines."""
    _waiting: deque[bytes] = field(default_factory=deque)
    _bytes: int = 0
    """The number of bytes in the waiting lines."""
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _is_closing: bool = False
    _has_warned: bool = False
    _descriptor: int | None = None
    """The descriptor of the open file; None before the first line. Only the writing thread uses it."""

    def add(self, row: RowToScore, line: ResultLine, judge: str, role: JudgeRole) -> None:
        """Log one judged step. Returns immediately, whatever the disk does.

        Args:
            row: the row that was scored.
            line: the judge's answer.
            judge: the name of the judge that gave this answer.
            role: the judge's role for this answer.
        """
        self._put(orjson.dumps(self._entry(row, line, judge, role), option=orjson.OPT_APPEND_NEWLINE))

    def _entry(self, row: RowToScore, line: ResultLine, judge: str, role: JudgeRole) -> dict[str, Any]:
        request = row.request
        prompt = request.prompt if request else None
        return {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "id": log_id(row.id),
            "judge": judge,
            "role": role,
            "request_hash": row.request_hash,
            "task": log_id(row.task),
            "trajectory": log_id(row.trajectory),
            "is_step": row.is_step,
            "score": line["score"],
            "std": line["std"],
            "label_mass": line["label_mass"],
            "status": line["status"],
            "characters": len(prompt) if prompt is not None else None,
            "keys": list(map(_valid, request.shape.keys)) if request else [],
            "prompt": _valid(prompt) if prompt is not None and self.with_prompts else None,
        }

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Write lines while the block runs, with a lock that keeps other servers from writing to the same file.

        Raises:
            DataError: the file cannot be written, or another server is writing to it.
            UsageError: the file is not a request log, so nothing is appended to it.
        """
        if self.file.exists() and not self.file.is_file():
            raise UsageError(f"{self.file} is not a regular file. Choose another --log-requests.")
        with exclusive_lock(self.file.parent, f"writing {self.file.name}", lock=f".{self.file.name}.lock"):
            _check_file(self.file)
            writer = threading.Thread(target=self._write_lines, name="request log", daemon=True)
            writer.start()
            try:
                yield
            finally:
                with self._changed:
                    self._is_closing = True
                    self._changed.notify()
                writer.join(_PATIENCE)
                if left := len(self._waiting):
                    self._lose(left, "the disk is too slow")

    def _put(self, line: bytes) -> None:
        with self._changed:
            is_taken = not self._is_closing and self._bytes + len(line) <= _MOST_WAITING
            if is_taken:
                self._waiting.append(line)
                self._bytes += len(line)
                self._changed.notify()
        if not is_taken:
            self._lose(1, "the disk is too slow")

    # --- the writing thread

    def _write_lines(self) -> None:
        while lines := self._next_lines():
            text = b"".join(lines)
            try:
                self._append(text)
            except OSError as error:
                self._lose(len(lines), error.strerror or str(error))
            else:
                self.on_outcome("written", len(lines))

    def _next_lines(self) -> list[bytes]:
        """Return lines to write together; empty when the log is closed and everything is written."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closing)
            lines: list[bytes] = []
            size = 0
            limit = min(_AT_ONCE, self.largest)
            while self._waiting and (not lines or size + len(self._waiting[0]) <= limit):
                lines.append(self._waiting.popleft())
                size += len(lines[-1])
            self._bytes -= size
            return lines

    def _append(self, text: bytes) -> None:
        """Write complete lines or nothing, because an incomplete line would also damage the next one."""
        descriptor = self._open()
        size = os.fstat(descriptor).st_size
        if size and size + len(text) > self.largest:
            self._rotate()
            descriptor, size = self._open(), 0
        try:
            write_all(partial(os.write, descriptor), text)
        except OSError:
            os.ftruncate(descriptor, size)
            raise

    def _open(self) -> int:
        """Return the file's descriptor, reopened if the file was moved or deleted (logrotate)."""
        if self._descriptor is not None and not _is_at(self._descriptor, self.file):
            os.close(self._descriptor)
            self._descriptor = None
        if self._descriptor is None:
            self._descriptor = _open_file(self.file)
        return self._descriptor

    def _rotate(self) -> None:
        names = [self.file, *(self.file.with_name(f"{self.file.name}.{number}") for number in range(1, self.kept + 1))]
        for older, newer in zip(names[:0:-1], names[-2::-1], strict=True):
            if newer.exists():
                newer.replace(older)

    def _lose(self, lines: int, reason: str) -> None:
        self.on_outcome("lost", lines)
        if not self._has_warned:
            self._has_warned = True
            log.warning(
                "%s: %s. Request-log lines are being dropped; responses are not affected. This is reported once, and "
                "counted in /metrics (prmkit_request_log_lines).",
                self.file,
                reason,
            )


def _is_at(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.lstat())
    except FileNotFoundError:
        return False


def _open_file(file: Path) -> int:
    # Readable only by its owner, because it may contain prompts; a planted link into another file is not followed.
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    return os.open(file, flags, 0o600)


def _valid(text: str) -> str:
    """Make text encodable: a lone surrogate, which JSON allows, becomes a question mark."""
    return text.encode("utf-8", "replace").decode()


def _check_file(file: Path) -> None:
    """Check that lines can be appended, and remove an incomplete last line that a killed server left."""
    try:
        descriptor = _open_file(file)
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}. Choose another --log-requests.") from error
    with open(descriptor, "r+b") as stream:  # noqa: PTH123 - a descriptor is opened
        if not _may_be_ours(stream.readline()):
            raise UsageError(f"{file} exists and is not a request log. Choose another --log-requests.")
        end = end_of_last_line(descriptor)
        if end < os.fstat(descriptor).st_size:
            log.warning("%s: removed an incomplete last line", file)
            stream.truncate(end)


def _may_be_ours(first: bytes) -> bool:
    """Return whether the first line of a file is a line of a request log, complete or cut off, or missing."""
    if not first.endswith(b"\n"):
        return first[: len(_BEGINNING)] == _BEGINNING[: len(first)]
    try:
        line = orjson.loads(first)
    except orjson.JSONDecodeError:
        return False
    return isinstance(line, dict) and {"time", "judge", "role", "request_hash"} <= line.keys()
