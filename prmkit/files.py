"""Files that are whole or absent, locks, and reading lines from whatever they are packed in."""

import errno
import fcntl
import gzip
import hashlib
import io
import os
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

import orjson

from prmkit.errors import DataError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says when a file cannot grow: the disk, the quota, or the limit of a file's size."""


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that appears under its name only when it is complete.

    The bytes go to a temporary file in the same folder, which is synced and renamed over `path` when the block ends;
    an error inside the block leaves `path` as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    except OSError as error:
        error.filename = str(path)  # and not one that nobody has heard of
        raise
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk does not say where
        raise


def _umask() -> int:
    # mkstemp makes private files; results get the permissions that open() would have given them.
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Write a whole text file, or leave the old one."""
    with written_whole(path) as stream:
        stream.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write a whole, indented JSON file, or leave the old one."""
    with written_whole(path) as stream:
        stream.write(orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        DataError: the file is missing, unreadable or not JSON.
    """
    try:
        return orjson.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}.") from error
    except orjson.JSONDecodeError as error:
        raise DataError(f"{path}: not JSON ({error}).") from error


def read_jsonl(path: Path) -> Iterator[Any]:
    """Yield the value of every line of a JSONL file, one at a time; blank lines are passed over.

    Raises:
        DataError: the file is missing or unreadable, or a line is not JSON (its number is named).
    """
    with open_input(path) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield orjson.loads(line)
                except orjson.JSONDecodeError as error:
                    raise DataError(f"{path}:{number}: not JSON ({error}).") from error


@contextmanager
def open_input(path: Path) -> Iterator[IO[bytes]]:
    """Open a file of lines for reading bytes; `.gz` and `.zst` are unpacked on the way.

    What goes wrong with anything else while the file is open, such as writing what was read, is not translated.

    Raises:
        DataError: the file is missing, a folder, or not to be read; a packed one is damaged or stops in the middle.
    """
    try:
        raw = path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}.") from error
    with raw:
        unpacked: Any = raw
        if path.suffix == ".gz":
            unpacked = gzip.GzipFile(fileobj=raw)
        elif path.suffix == ".zst":
            unpacked = _ZstandardReader(raw)
        with io.BufferedReader(_Reading(unpacked, str(path)), _READ_AHEAD) as lines:
            yield lines


@contextmanager
def open_stdin() -> Iterator[IO[bytes]]:
    """As `open_input`, for what is piped in.

    Raises:
        DataError: there is no stdin, or it cannot be read.
    """
    if sys.stdin is None:
        raise DataError("stdin: closed. Pipe the lines in, or name a file.")
    yield io.BufferedReader(_Reading(sys.stdin.buffer, "stdin"), _READ_AHEAD)


_READ_AHEAD = 1 << 18


class _Reading(io.RawIOBase):
    """Another stream, whose errors of reading name it."""

    def __init__(self, stream: Any, name: str) -> None:
        # What is there is enough: a full buffer would keep a pipe's reader waiting for lines that are not written yet.
        self._read = getattr(stream, "readinto1", stream.readinto)
        self._name = name

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            return int(self._read(buffer))
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{self._name}: damaged, or cut off ({error}). Pack it again.") from error
        except OSError as error:
            raise DataError(f"{self._name}: {error.strerror or error}.") from error


class _ZstandardReader(io.RawIOBase):
    """Unpacks Zstandard frames, one or several; zstandard's own reader ends without a word where a frame is cut off."""

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self._raw, self._zstandard = raw, zstandard
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._packed = self._unpacked = b""
        self._inside = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked:
            self._packed = self._packed or self._raw.read(1 << 18)
            if not self._packed:
                if self._inside:
                    raise EOFError("the last frame is not complete")
                return 0
            self._unpack()
        size = min(len(buffer), len(self._unpacked))
        buffer[:size], self._unpacked = self._unpacked[:size], self._unpacked[size:]
        return size

    def _unpack(self) -> None:
        if not self._inside:
            self._frame = self._zstandard.ZstdDecompressor().decompressobj()
        try:
            self._unpacked = self._frame.decompress(self._packed)
        except self._zstandard.ZstdError as error:
            raise EOFError(error) from error
        self._inside, self._packed = not self._frame.eof, self._frame.unused_data


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def only_one(folder: Path, doing: str, *, lock: str = ".lock", patience: float = 0.0) -> Iterator[int]:
    """Hold a folder for this process; the lock goes with the process, so none is left behind by a kill.

    Args:
        folder: the folder to hold; made when it is missing.
        doing: what the holder is doing, for the message that the second process gets.
        lock: the name of the file that is locked; with one of its own, a job holds a part of the folder.
        patience: seconds to wait for a holder that is just going.

    Yields:
        The lock's file descriptor. A child that inherits it holds the folder too, as long as it lives.

    Raises:
        DataError: another process holds the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + patience
    with (folder / lock).open("a+") as stream:
        # A forked worker that outlives a killed parent for a moment must not hold its lock on.
        os.register_at_fork(after_in_child=stream.close)
        while not _locked(stream):
            if time.monotonic() >= deadline:
                stream.seek(0)
                holder = stream.read().strip() or f"another process is {doing}"
                raise DataError(f"{folder}: {holder} here. Wait for it, or choose another folder.")
            time.sleep(0.05)
        stream.truncate(0)
        stream.write(f"process {os.getpid()} is {doing}")
        stream.flush()
        yield stream.fileno()


def _locked(stream: IO[str]) -> bool:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
