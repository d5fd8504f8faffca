"""Files that are complete or absent, inputs however they are compressed, and one process at a time."""

import bz2
import gzip
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zstandard

from prmkit.errors import DataError
from prmkit.files import (
    atomic_write,
    end_of_last_line,
    exclusive_lock,
    open_input,
    read_json,
    read_jsonl,
    sha256_of,
    write_all,
    write_json,
    write_text,
)
from prmkit.judge.sources import JudgeSource, fingerprint_of
from prmkit.training.records import model_fingerprint

LINES = b"".join(b'{"line": %d}\n' % number for number in range(50_000))


def packed(how: str) -> bytes:
    half = len(LINES) // 2
    match how:
        case "plain.jsonl":
            return LINES
        case "one.jsonl.gz":
            return gzip.compress(LINES)
        case "two.jsonl.gz":
            return gzip.compress(LINES[:half]) + gzip.compress(LINES[half:])
        case "one.jsonl.bz2" | "ONE.JSONL.BZ2":
            return bz2.compress(LINES)
        case "two.jsonl.bz2":
            return bz2.compress(LINES[:half]) + bz2.compress(LINES[half:])
        case "one.jsonl.zst":
            return zstandard.compress(LINES)
        case _:
            return zstandard.compress(LINES[:half]) + zstandard.compress(LINES[half:])


PACKED = [f"{count}.jsonl.{how}" for how in ("gz", "bz2", "zst") for count in ("one", "two")]


@pytest.mark.parametrize("name", ["plain.jsonl", "ONE.JSONL.BZ2", *PACKED])
def test_lines_are_read_however_they_are_compressed(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(packed(name))
    with open_input(path) as lines:
        assert b"".join(lines) == LINES
    assert [row["line"] for row in read_jsonl(path)] == list(range(50_000))


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("missing", [1, 100])
def test_a_truncated_compressed_file_is_not_a_shorter_file(tmp_path: Path, name: str, missing: int) -> None:
    path = tmp_path / name
    path.write_bytes(packed(name)[:-missing])
    with pytest.raises(DataError, match=name), open_input(path) as lines:
        list(lines)


@pytest.mark.parametrize("name", ["a.gz", "a.bz2", "a.zst"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"something else")
    with pytest.raises(DataError, match=name), open_input(tmp_path / name) as lines:
        list(lines)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    for path, why in ((tmp_path / "missing", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(DataError, match=why), open_input(path):
            pass
        with pytest.raises(DataError, match=why):
            read_json(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_only_errors_of_reading_are_the_inputs(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(packed("one" + name[1:]) if name != "a.jsonl" else LINES)
    for error in (OSError(13, "Permission denied", "another"), BrokenPipeError(), EOFError()):
        with pytest.raises(type(error)), open_input(path) as lines:
            next(lines)
            raise error


def test_a_line_that_is_not_json_is_numbered(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\noops\n')
    with pytest.raises(DataError, match=r"a\.jsonl:3: not JSON"):
        list(read_jsonl(tmp_path / "a.jsonl"))


def test_a_file_is_atomic_write_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.json"
    write_json(path, {"a": "ü"})
    assert read_json(path) == {"a": "ü"}
    with pytest.raises(RuntimeError), atomic_write(path) as stream:
        stream.write(b"half")
        raise RuntimeError
    assert read_json(path) == {"a": "ü"}
    assert [found.name for found in path.parent.iterdir()] == ["file.json"]
    write_text(path, "new")
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("whole", [b"", b"a\n", b"a\n" + b"b" * 700_000 + b"\n"])
@pytest.mark.parametrize("cut_off", [b"", b"c", b"c" * 300_000, b"c" * (1 << 18)])
def test_the_end_of_the_last_line_is_found_whatever_follows_it(tmp_path: Path, whole: bytes, cut_off: bytes) -> None:
    file = tmp_path / "lines"
    file.write_bytes(whole + cut_off)
    with file.open("ab+", buffering=0) as stream:
        assert end_of_last_line(stream.fileno()) == len(whole)
        stream.truncate(len(whole))
    assert file.read_bytes() == whole


def test_a_part_that_was_not_taken_is_written_again() -> None:
    taken = bytearray()

    def write(rest: memoryview) -> int:
        taken.extend(rest[:3])
        return min(3, len(rest))

    write_all(write, b"0123456789")
    assert taken == b"0123456789"


def test_the_hash_is_that_of_sha256sum(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_large_weights_have_the_hashes_that_runs_and_judges_recorded(tmp_path: Path) -> None:
    """Those that the first version computed; with others, no run could be resumed and no scores continued."""
    (tmp_path / "model.safetensors").write_bytes(np.arange(8_500_000, dtype="<u8").tobytes())
    (tmp_path / "small.bin").write_bytes(np.arange(1_000, dtype="<u8").tobytes())
    (tmp_path / "config.json").write_text("{}")
    fingerprint = model_fingerprint(tmp_path)
    assert fingerprint == "2:8649042ab73de9ab8b133905d9e4bf558cea5016021aa6b328284be041c88d5d"
    weights = fingerprint_of(JudgeSource(tmp_path))["weights"]["model"]
    sampled = "sampled f2a9f7959bd5d446dd5540bd35591405ad2c147e93c74ab1ca17413491153fd8"
    whole = "702746827e553786bb026ac120cb58745fef3d3f554c33891809001cc37639f0"
    assert (weights["model.safetensors"], weights["small.bin"]) == (sampled, whole)
    with (tmp_path / "model.safetensors").open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"x")
    assert model_fingerprint(tmp_path) != fingerprint
    assert fingerprint_of(JudgeSource(tmp_path))["weights"]["model"]["model.safetensors"] != sampled


HOLDER = """
import os, sys, time
from pathlib import Path
from prmkit.files import exclusive_lock
with exclusive_lock(Path(sys.argv[1]), "converting"):
    if os.fork() == 0:  # a worker that outlives its parent
        time.sleep(60)
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_second_process_is_refused_and_a_kill_frees_the_folder(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    try:
        with pytest.raises(DataError, match=f"process {holder.pid} is converting here"), exclusive_lock(tmp_path, "x"):
            pass
        holder.kill()
        holder.wait()
        with exclusive_lock(tmp_path, "converting", patience=10):  # the worker may not have run yet
            pass
    finally:
        os.killpg(holder.pid, 9)


def test_a_lock_follows_no_link_and_writes_into_nothing_that_has_another_name(tmp_path: Path) -> None:
    precious = tmp_path / "precious.txt"
    precious.write_text("precious")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / ".lock").symlink_to(precious)
    with pytest.raises(DataError, match="not a regular file"), exclusive_lock(folder, "x"):
        pass
    (folder / ".lock").unlink()
    (folder / ".lock").hardlink_to(precious)
    with exclusive_lock(folder, "x"):
        pass
    assert precious.read_text() == "precious"


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/null")])
def test_a_lock_is_a_regular_file(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / ".lock")
    with pytest.raises(DataError, match=r"\.lock: not a regular file"), exclusive_lock(tmp_path, "x"):
        pass


NO_FLOCK = """
import errno, fcntl, sys
from pathlib import Path

def refuse(*_):
    raise OSError(errno.ENOLCK, "No locks available")

fcntl.flock = refuse  # as a network file system does
from prmkit.files import exclusive_lock
from prmkit.errors import DataError
try:
    with exclusive_lock(Path(sys.argv[1]), "x"):
        pass
except DataError as error:
    print(error)
"""


def test_a_file_system_without_locks_is_named_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", NO_FLOCK, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout == (
        f"{tmp_path}: this file system does not support locks (No locks available). Choose a folder on a local disk.\n"
    )
