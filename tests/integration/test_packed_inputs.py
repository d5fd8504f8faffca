"""Every packing of every kind of file is read wherever its unpacked form is, and what is refused says why."""

import bz2
import gzip
import importlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exam_fixtures as public
import pytest
import zstandard

from prmkit.dataset.conversion import convert
from prmkit.dataset.settings import Settings
from prmkit.errors import DataError, ExitCode, UsageError
from prmkit.evaluation.command import execute
from prmkit.evaluation.exam import read_exam
from prmkit.evaluation.exam_command import folder_of
from prmkit.layouts import open_lines, parse_line
from prmkit.layouts import read_lines as read_rows
from prmkit.prompts.step import load_rubric
from prmkit.rows import read_row
from prmkit.scoring.rows import RunsToScore, holds_runs
from prmkit.trajectories.command import import_runs
from tests.dataset.conftest import prompt_of, read_lines, row_of

import_parser = importlib.import_module("import_trajectories")._parser
evaluate_parser = importlib.import_module("evaluate_judge")._parser

PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zstandard.compress, ".GZ": gzip.compress,
}  # fmt: skip
PACKED = list(filter(None, PACK))
RUN = {"task_id": "t", "messages": [{"role": "user", "content": "Go."}, {"role": "assistant", "content": "Done."}]}


def written(folder: Path, name: str, *values: Any) -> Path:
    """A file with one value a line, packed as its name says."""
    lines = b"".join(json.dumps(value).encode() + b"\n" for value in values)
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(PACK.get(Path(name).suffix, bytes)(lines))
    return folder / name


def imported(source: Path, output: Path, *arguments: str) -> list[Any]:
    typed = [str(source), "--output", str(output), *arguments]
    assert import_runs(import_parser().parse_args(typed)) == ExitCode.DONE
    return read_lines(output)


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".ndjson", ".traj", ".txt", ".eval"])
def test_runs_are_imported_and_scored(tmp_path: Path, suffix: str, packing: str) -> None:
    file = written(tmp_path / "runs", f"r{suffix}{packing}", RUN)
    for source in (file, file.parent):
        (run,) = imported(source, tmp_path / "trajectories.jsonl")
        assert (run["task_id"], run["source"]["file"]) == ("t", file.name)
    assert holds_runs(str(file))
    assert [row.task for row in RunsToScore(str(file), load_rubric(), 0.5, "judge").rows()] == ["t"]


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize(("inside", "why"), [
    (b"# Notes", "not JSON"), (b"PK\x03\x04...", "a zip archive"), (b"\x7fELF\0", "a binary file"),
    (gzip.compress(b"{}"), "compressed twice"), (bz2.compress(b"{}"), "compressed twice"),
], ids=["text", "zip", "binary", "gzip", "bzip2"])  # fmt: skip
def test_what_is_in_a_packed_file_is_why_it_is_refused(tmp_path: Path, inside: bytes, why: str, packing: str) -> None:
    file = tmp_path / f"r.eval{packing}"
    file.write_bytes(PACK[packing](inside))
    with pytest.raises(DataError, match=f"{file.name}: {why}"):
        imported(file, tmp_path / "trajectories.jsonl")


NAMES = {".gz": "gzip", ".bz2": "bzip2", ".zst": "Zstandard"}


@pytest.mark.parametrize(
    ("packing", "suffix"),
    [(packing, suffix) for packing in NAMES for suffix in (".json", ".traj", ".txt", *NAMES) if suffix != packing],
)
def test_a_packed_file_with_a_wrong_name_is_refused(tmp_path: Path, packing: str, suffix: str) -> None:
    file = tmp_path / f"r{suffix}"
    file.write_bytes(PACK[packing](json.dumps(RUN).encode()))
    wrong = f"not a valid {suffix} file, or damaged"
    why = wrong if suffix in PACK else f"compressed with {NAMES[packing]}.*ends in {packing}"
    with pytest.raises(DataError, match=f"{file.name}: {why}"):
        imported(file, tmp_path / "trajectories.jsonl")
    with pytest.raises(DataError, match=f"{file.name}: {why}"):
        convert(Settings((str(file),), tmp_path / "data"))


@pytest.mark.parametrize("packing", NAMES)
def test_packed_rows_from_a_pipe_have_no_name_to_change(packing: str) -> None:
    with pytest.raises(DataError, match=f"stdin: compressed with {NAMES[packing]}. Decompress it first"):
        list(read_rows(io.BytesIO(PACK[packing](b"{}")), "stdin"))


@pytest.mark.parametrize("packing", PACKED)
def test_an_import_is_not_written_under_the_name_of_a_packed_file(tmp_path: Path, packing: str) -> None:
    with pytest.raises(UsageError, match=r"never compressed. Write to out\.jsonl"):
        imported(written(tmp_path, "r.jsonl", RUN), tmp_path / f"out.jsonl{packing}")


# --- rows and labelled runs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".ndjson"])
def test_rows_are_converted_and_scored(tmp_path: Path, suffix: str, packing: str) -> None:
    prompts = [prompt_of("a"), prompt_of("b")]
    file = written(tmp_path / "rows", f"r{suffix}{packing}", *map(row_of, prompts))
    for source in (file, file.parent):
        assert sum(convert(Settings((str(source),), tmp_path / "data"))["rows"].values()) == 2
    assert not holds_runs(str(file))
    with open_lines(str(file)) as lines:
        assert [read_row(parse_line(line)).prompt for line in lines] == prompts


@pytest.mark.parametrize("packing", PACK)
def test_labelled_runs_are_converted(tmp_path: Path, packing: str) -> None:
    raw = written(tmp_path / "raw", f"set.jsonl{packing}", *public.every_step_labelled())
    assert imported(raw, tmp_path / "rows.jsonl", "--labels", "agentprocessbench")
    runs = read_lines(tmp_path / "rows.runs.jsonl")
    plain, packed = (
        convert(Settings((str(written(tmp_path / "runs", name, *runs)),), tmp_path / name))["inputs"][0]
        for name in ("plain.jsonl", f"packed.jsonl{packing}")
    )
    assert (plain["sha256"], plain["bytes"]) == (packed["sha256"], packed["bytes"])
    plain, packed = ((tmp_path / name / "reward_model_full.jsonl").read_bytes()
                     for name in ("plain.jsonl", f"packed.jsonl{packing}"))  # fmt: skip
    assert plain == packed


# --- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", PACKED)
def test_a_packed_exam_is_the_same_exam_in_the_same_folder(tmp_path: Path, packing: str) -> None:
    """The whole runs next to its rows are found, packed or not; without them, no run has a first error to find."""
    raw = tmp_path / "set"
    raw.mkdir()
    for number, value in enumerate(public.first_error_marked()):
        written(raw, f"{number}.json", value)
    rows = imported(raw, tmp_path / "exam.jsonl", "--labels", "who-and-when")
    runs = read_lines(tmp_path / "exam.runs.jsonl")
    plain = read_exam(tmp_path / "exam.jsonl")
    assert all(run.is_whole for run in plain.runs)
    packed = written(tmp_path / "packed", f"exam.jsonl{packing}", *rows)
    written(tmp_path / "packed", "exam.runs.jsonl" + packing.lower(), *runs)
    assert read_exam(packed).runs == plain.runs
    given = evaluate_parser().parse_args(["--model", "judge"])
    assert folder_of(given, "exam", packed) == folder_of(given, "exam", tmp_path / "exam.jsonl")


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson"])
def test_the_best_of_packed_outcomes_with_packed_scores(tmp_path: Path, suffix: str, packing: str) -> None:
    names = [(task, f"{task}.{trial}", trial) for task in range(3) for trial in range(2)]
    outcomes = [{"task_id": task, "trajectory_id": name, "outcome": trial} for task, name, trial in names]
    scores = [{"trajectory_id": name, "step": 1, "score": trial / 2} for _, name, trial in names]
    typed = ["--best-of-n", written(tmp_path, f"outcomes{suffix}{packing}", *outcomes),
             "--predictions", written(tmp_path, f"scores{suffix}{packing}", *scores)]  # fmt: skip
    typed += ["--output", tmp_path / "out"]
    assert execute(evaluate_parser().parse_args(list(map(str, typed)))) == ExitCode.DONE
    picks = json.loads((tmp_path / "out" / "best_of_n.json").read_text())["picks"]
    assert picks["judge: last"]["2"]["value"] == 1
