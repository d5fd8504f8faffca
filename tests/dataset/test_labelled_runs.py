"""Runs whose steps carry labels, converted directly: split by task, rows by run, and the rubric in the report."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from prmkit.dataset.conversion import convert
from prmkit.dataset.settings import Settings
from prmkit.errors import DataError, UsageError
from prmkit.files import sha256_of
from prmkit.prompts.step import DEFAULT_RUBRIC, load_rubric
from prmkit.trajectories.importing import Options, read_runs
from prmkit.trajectories.rows import labelled_rows
from prmkit.trajectories.run import FieldNames
from prmkit.trajectory import dump
from tools.make_sample.runs import message_runs
from tools.make_sample.sample import write_rows

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """Twenty tasks with two runs each, every step labelled."""
    raw, path = tmp_path / "raw.jsonl", tmp_path / "trajectories.jsonl"
    write_rows(raw, message_runs(0, 20, labelled=True))
    path.write_bytes(b"".join(map(dump, read_runs([raw], Options(keys=FieldNames(labels="labels"))))))
    return path


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_runs_give_the_data_that_their_rows_give(records: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", labelled_rows(records, load_rubric()))
    report = convert(Settings((str(records),), tmp_path / "of runs"))
    convert(Settings((str(tmp_path / "rows.jsonl"),), tmp_path / "of rows"))
    for name in ("reward_model_full.jsonl", "reward_model_full_eval.jsonl"):
        assert (tmp_path / "of runs" / name).read_bytes() == (tmp_path / "of rows" / name).read_bytes()
    assert report["rubrics"] == [load_rubric().sha256]


def test_runs_have_one_hash_compressed_or_not(records: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(records.read_bytes()))
    first, second = (convert(Settings((str(file),), tmp_path / "data"))["inputs"][0] for file in (records, packed))
    assert first["sha256"] == second["sha256"] == sha256_of(records)
    assert first["bytes"] == second["bytes"] == records.stat().st_size


def test_all_runs_of_a_task_are_on_one_side(records: Path, tmp_path: Path) -> None:
    convert(Settings((str(records),), tmp_path / "data"))
    sides = {}
    for side in ("", "_eval"):
        sidecar = lines(tmp_path / "data" / f"reward_model_full{side}.meta.jsonl")
        sides[side] = {row["metadata"]["task_id"] for row in sidecar}
        runs = {row["metadata"]["trajectory_id"] for row in sidecar}
        assert len(runs) == 2 * len(sides[side]) > 0
    assert not sides[""] & sides["_eval"]


def test_runs_and_rows_of_judges_are_converted_together(records: Path, tmp_path: Path) -> None:
    report = convert(Settings((str(records), str(ROOT / "finetune.jsonl")), tmp_path / "data"))
    keys = report["score_keys"]["clip"]
    assert "step_score" in keys and "reasonableness_score" in keys
    assert report["rubrics"] == [load_rubric().sha256]


def test_rows_of_judges_alone_have_no_rubric(tmp_path: Path) -> None:
    assert convert(Settings((str(ROOT / "finetune.jsonl"),), tmp_path / "data"))["rubrics"] == []


def test_another_rubric_is_recorded(records: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(DEFAULT_RUBRIC.read_text()) | {"keys": ["safety_score"]}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(content))
    report = convert(Settings((str(records),), tmp_path / "data", rubric=tmp_path / "own.yaml"))
    assert report["rubrics"] == [load_rubric(tmp_path / "own.yaml").sha256] != [load_rubric().sha256]
    assert list(report["score_keys"]["clip"]) == ["safety_score"]


def test_runs_without_labels_and_rubrics_that_are_wrong_are_one_sentence(records: Path, tmp_path: Path) -> None:
    unlabelled = tmp_path / "unlabelled.jsonl"
    unlabelled.write_bytes(b"".join(map(dump, read_runs([tmp_path / "raw.jsonl"]))))
    with pytest.raises(DataError, match="no step of these runs has a label"):
        convert(Settings((str(unlabelled),), tmp_path / "data"))
    with pytest.raises(UsageError, match="No such file"):
        convert(Settings((str(records),), tmp_path / "data", rubric=tmp_path / "none.yaml"))
    assert not (tmp_path / "data" / "dataset_info.json").exists()


def test_as_it_is_typed(records: Path, tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "convert_dataset.py", "--input", records, "--rubric", DEFAULT_RUBRIC, "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rubrics"] == [load_rubric().sha256]


@pytest.mark.parametrize(
    "other", ['{"trajectory_id": 1}', '{"conversations": []}', "{"], ids=["damaged", "row", "cut off"]
)
def test_runs_that_cannot_be_read_are_not_left_out_silently(records: Path, tmp_path: Path, other: str) -> None:
    damaged = json.loads(records.read_bytes().splitlines()[0]) | json.loads(other if other != "{" else "{}")
    text = json.dumps(damaged) if "trajectory_id" in other else other
    records.write_text(f"{records.read_text()}{text}\n")
    with pytest.raises(DataError, match=r"trajectories.jsonl: not read: 1 x .* \(line 41\)"):
        convert(Settings((str(records),), tmp_path / "data"))


def test_runs_among_rows_are_called_runs(records: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    write_rows(rows, labelled_rows(records, load_rubric()))
    rows.write_text(rows.read_text() + records.read_text())
    report = convert(Settings((str(rows),), tmp_path / "data"))
    assert report["rejected"] == {"a run among rows": 40}


def test_runs_whose_ids_look_the_same_stay_apart(tmp_path: Path) -> None:
    """In rows, spaces around an id do not count."""
    said = [{"role": "user", "content": "Go."}, {"role": "assistant", "content": "Gone."}]
    given = [{"sessionId": name, "type": message["role"], "uuid": f"{name}{number}", "message": message}
             for name in ("s", "s ") for number, message in enumerate(said)]  # fmt: skip
    (tmp_path / "session.jsonl").write_text("".join(json.dumps(line) + "\n" for line in given))
    assert [run.trajectory_id for run in read_runs([tmp_path / "session.jsonl"])] == ["s", "s~2"]
