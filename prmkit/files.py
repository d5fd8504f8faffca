"""Atomic writes, locks, and reading lines from compressed files."""

import bz2
import errno
import fcntl
import gzip
import hashlib
import io
import os
import stat
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

from prmkit.errors import DataError, UsageError

# orjson is imported where it is used, so that every script can show its --help without any package installed.


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing; it appears under its name only when it is complete.

    The bytes go to a temporary file in the same folder, which is synced and renamed to `path` when the block ends.
    After an error inside the block, `path` is unchanged.

    Raises:
        OSError: `path` is a folder or a device; root could replace /dev/null by a file.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "a folder" if path.is_dir() else "not a regular file", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    except OSError as error:
        error.filename = str(path)  # the user does not know the temporary name
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
            error.filename = str(path)  # the error of a full disk has no file name
        raise


def _umask() -> int:
    # mkstemp makes private files; results get the permissions that open() would have given them.
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_write(path) as stream:
        stream.write(text.encode())


def render_page(template: Path, filters: Mapping[str, Any] | None = None, **values: Any) -> str:
    """Render a Jinja template of a page; all values from the data are escaped."""
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= filters or {}
    return environment.from_string(template.read_text(encoding="utf-8")).render(**values)


def write_json(path: Path, value: Any) -> None:
    """Write an indented JSON file atomically."""
    import orjson

    with atomic_write(path) as stream:
        stream.write(orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        DataError: the file is missing, unreadable or not JSON.
    """
    import orjson

    try:
        return orjson.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}. Check the path.") from error
    except orjson.JSONDecodeError as error:
        raise DataError(f"{path}: not JSON ({error}).") from error


def read_plain_yaml(path: Path) -> Any:
    """Read one of prmkit's own YAML files (a rubric, a list of judges), not one of LLaMA Factory's.

    Raises:
        UsageError: the file is missing, unreadable or not YAML.
    """
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}. Check the path.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not YAML ({str(error).splitlines()[0]}).") from error


def read_jsonl(path: Path) -> Iterator[Any]:
    """Yield the value of every line of a JSONL file; see `numbered_jsonl`."""
    return (value for _, value in numbered_jsonl(path))


def numbered_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the number and the value of every line of a JSONL file, one at a time; empty lines are skipped.

    Raises:
        DataError: the file is missing or unreadable, or a line is not JSON (the message has its number).
    """
    import orjson

    with open_input(path) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield number, orjson.loads(line)
                except orjson.JSONDecodeError as error:
                    raise DataError(f"{path}:{number}: not JSON ({error}). Correct or remove this line.") from error


@contextmanager
def open_input(path: Path) -> Iterator[IO[bytes]]:
    """Open a file of lines for reading bytes; a compressed file (see `COMPRESSIONS`) is decompressed while reading.

    Only read errors become a `DataError`; other errors raised while the file is open, for example write errors, are
    passed on unchanged.

    Raises:
        DataError: the file is missing, a folder, or not readable; or a compressed file is damaged or truncated.
    """
    try:
        raw = path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}. Check the path.") from error
    with raw:
        packing = compression_of(path)
        content = packing.unpack(raw) if packing else raw
        with io.BufferedReader(_NamedStream(content, str(path)), _READ_AHEAD) as lines:
            yield lines


@contextmanager
def open_stdin() -> Iterator[IO[bytes]]:
    """Open stdin for reading lines of bytes.

    Raises:
        DataError: there is no stdin, or it cannot be read.
    """
    if sys.stdin is None:
        raise DataError("stdin is closed. Pipe the lines in, or pass a file.")
    yield io.BufferedReader(_NamedStream(sys.stdin.buffer, "stdin"), _READ_AHEAD)


_READ_AHEAD = 1 << 18


class _NamedStream(io.RawIOBase):
    """A stream whose read errors contain the name of the file."""

    def __init__(self, stream: Any, name: str) -> None:
        # readinto1 returns the bytes that have arrived; readinto would wait for a full buffer, and so for lines that
        # have not been written to the pipe yet.
        self._read = getattr(stream, "readinto1", stream.readinto)
        self._name = name

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            return int(self._read(buffer))
        except (EOFError, zlib.error, OSError) as error:
            if isinstance(error, OSError) and error.strerror:
                raise DataError(f"{self._name}: {error.strerror}.") from error
            raise DataError(
                f"{self._name}: not a valid {Path(self._name).suffix} file, or damaged ({error}). Compress it again."
            ) from error


class _ZstandardReader(io.RawIOBase):
    """A reader of one or several Zstandard frames; zstandard's own reader silently stops at a truncated frame."""

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self._raw, self._zstandard = raw, zstandard
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._compressed = self._content = b""
        self._inside = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._content:
            self._compressed = self._compressed or self._raw.read(1 << 18)
            if not self._compressed:
                if self._inside:
                    raise EOFError("the last frame is not complete")
                return 0
            self._decompress()
        size = min(len(buffer), len(self._content))
        buffer[:size], self._content = self._content[:size], self._content[size:]
        return size

    def _decompress(self) -> None:
        if not self._inside:
            self._frame = self._zstandard.ZstdDecompressor().decompressobj()
        try:
            self._content = self._frame.decompress(self._compressed)
        except self._zstandard.ZstdError as error:
            raise EOFError(error) from error
        self._inside, self._compressed = not self._frame.eof, self._frame.unused_data


class Compression(NamedTuple):
    """A compression format."""

    name: str
    magic: bytes
    """Magic bytes: the first bytes of a compressed file."""
    unpack: Callable[[BinaryIO], Any]
    """Function that opens a compressed stream for reading."""


COMPRESSIONS: Mapping[str, Compression] = {
    ".gz": Compression("gzip", b"\x1f\x8b", lambda raw: gzip.GzipFile(fileobj=raw)),
    ".bz2": Compression("bzip2", b"BZh", bz2.BZ2File),
    ".zst": Compression("Zstandard", b"\x28\xb5\x2f\xfd", _ZstandardReader),
}
"""File suffix -> compression format."""


def compression_of(path: Path) -> Compression | None:
    """Return the compression format of a file, by its suffix; None if it is not compressed."""
    return COMPRESSIONS.get(path.suffix.lower())


def uncompressed_name(path: Path) -> str:
    """Return the name of a file without its compression suffix: `rows.jsonl` for `rows.jsonl.gz` and `rows.jsonl`."""
    return path.stem if compression_of(path) else path.name


def stored_form(path: Path) -> Path | None:
    """Return the file or, if it does not exist, a compressed version of it; None if neither exists."""
    versions = (path.with_name(path.name + suffix) for suffix in ("", *COMPRESSIONS))
    return next((version for version in versions if version.is_file()), None)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_content(path: Path) -> tuple[str, int]:
    """Return the SHA-256, in hexadecimal, and the size in bytes of a file's content, decompressed.

    Raises:
        DataError: see `open_input`.
    """
    digest, size = hashlib.sha256(), 0
    with open_input(path) as stream:
        while part := stream.read(_READ_AHEAD):
            digest.update(part)
            size += len(part)
    return digest.hexdigest(), size


LARGE_FILE = 64 << 20
"""Bytes. The hash of a larger weight file is that of `spread_blocks`."""
_BLOCK = 64 << 10


def spread_blocks(path: Path, count: int) -> Iterator[bytes]:
    """Yield blocks of 64 KiB, evenly spread from the first to the last of a large file.

    Weights may take minutes to read. Hashing a sample is enough, because training changes weights everywhere.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        for number in range(count):
            stream.seek((size - _BLOCK) * number // (count - 1))
            yield stream.read(_BLOCK)


# --- files that grow line by line -------------------------------------------------------------------------------------


def write_all(write: Callable[[memoryview], int | None], data: bytes) -> None:
    """Write all of `data` with `write`, which may write only a part of it and returns how many bytes it wrote.

    A disk that is nearly full accepts a part, and reports the error at the next call.
    """
    rest = memoryview(data)
    while rest:
        rest = rest[write(rest) or 0 :]


def end_of_last_line(descriptor: int) -> int:
    """Return the position after the last line break of an open file, or 0; what follows is incomplete."""
    with open(descriptor, "rb", closefd=False) as stream:
        end = stream.seek(0, os.SEEK_END)
        while end:
            begin = max(0, end - _READ_AHEAD)
            stream.seek(begin)
            position = stream.read(end - begin).rfind(b"\n")
            if position >= 0:
                return begin + position + 1
            end = begin
    return 0


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- locks ------------------------------------------------------------------------------------------------------------


@contextmanager
def exclusive_lock(folder: Path, activity: str, *, lock: str = ".lock", patience: float = 0.0) -> Iterator[int]:
    """Lock a folder for this process. The system releases the lock when the process ends, even if it is killed.

    Args:
        folder: the folder to lock; it is created if it is missing.
        activity: what this process does ("converting"), for the message that a second process gets.
        lock: the name of the lock file; with another name, only a part of the folder is locked.
        patience: seconds to wait for a process that is about to release the lock.

    Yields:
        The lock's file descriptor. A child that inherits it holds the lock too, as long as the child lives.

    Raises:
        DataError: another process holds the lock, the lock is not a regular file, or the file system has no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + patience
    with _open_lock(folder / lock) as stream:
        # A forked worker that briefly outlives a killed parent must not keep its lock.
        os.register_at_fork(after_in_child=stream.close)
        while not _try_lock(stream, folder):
            if time.monotonic() >= deadline:
                holder = stream.read(200).strip() or f"another process is {activity}"
                raise DataError(f"{folder}: {holder} here. Wait for it, or choose another folder.")
            time.sleep(0.05)
        if os.fstat(stream.fileno()).st_nlink == 1:  # a hard link may be someone's file: lock it, but do not write
            stream.truncate(0)
            stream.write(f"process {os.getpid()} is {activity}")
            stream.flush()
        yield stream.fileno()


def _open_lock(path: Path) -> IO[str]:
    # In a folder that others can write to, a link planted here would make us truncate its target, and a pipe would make
    # us wait forever.
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise DataError(f"{path}: not a regular file. Remove it, then run the command again.") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DataError(f"{path}: not a regular file. Remove it, then run the command again.")
    return open(descriptor, "r+", encoding="utf-8", errors="replace")  # noqa: PTH123 - a descriptor is opened


def _try_lock(stream: IO[str], folder: Path) -> bool:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise DataError(
            f"{folder}: this file system does not support locks ({error.strerror}). Choose a folder on a local disk."
        ) from error
    return True
