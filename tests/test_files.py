"""Files that are whole or absent, inputs however they are packed, and one process at a time."""

import gzip
import os
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

from prmkit.errors import DataError
from prmkit.files import only_one, open_input, read_json, read_jsonl, sha256_of, write_json, write_text, written_whole

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
        case "one.jsonl.zst":
            return zstandard.compress(LINES)
        case _:
            return zstandard.compress(LINES[:half]) + zstandard.compress(LINES[half:])


@pytest.mark.parametrize("name", ["plain.jsonl", "one.jsonl.gz", "two.jsonl.gz", "one.jsonl.zst", "two.jsonl.zst"])
def test_lines_are_read_however_they_are_packed(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(packed(name))
    with open_input(path) as lines:
        assert b"".join(lines) == LINES
    assert [row["line"] for row in read_jsonl(path)] == list(range(50_000))


@pytest.mark.parametrize("name", ["one.jsonl.gz", "two.jsonl.gz", "one.jsonl.zst", "two.jsonl.zst"])
@pytest.mark.parametrize("missing", [1, 100])
def test_a_packed_file_that_is_cut_off_is_no_shorter_file(tmp_path: Path, name: str, missing: int) -> None:
    path = tmp_path / name
    path.write_bytes(packed(name)[:-missing])
    with pytest.raises(DataError, match=name), open_input(path) as lines:
        list(lines)


@pytest.mark.parametrize("name", ["a.gz", "a.zst"])
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


def test_a_line_that_is_no_json_is_numbered(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\noops\n')
    with pytest.raises(DataError, match=r"a\.jsonl:3: not JSON"):
        list(read_jsonl(tmp_path / "a.jsonl"))


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.json"
    write_json(path, {"a": "ü"})
    assert read_json(path) == {"a": "ü"}
    with pytest.raises(RuntimeError), written_whole(path) as stream:
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


def test_the_hash_is_that_of_sha256sum(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


HOLDER = """
import os, sys, time
from pathlib import Path
from prmkit.files import only_one
with only_one(Path(sys.argv[1]), "converting"):
    if os.fork() == 0:  # a worker that outlives its parent
        time.sleep(60)
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_second_process_is_told_and_a_kill_frees_the_folder(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    try:
        with pytest.raises(DataError, match=f"process {holder.pid} is converting here"), only_one(tmp_path, "x"):
            pass
        holder.kill()
        holder.wait()
        with only_one(tmp_path, "converting", patience=10):  # the worker may not have run yet
            pass
    finally:
        os.killpg(holder.pid, 9)
