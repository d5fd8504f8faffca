"""`import_trajectories.py` as it is typed."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from preloaded import PRELOADED

ROOT = Path(__file__).resolve().parent.parent.parent
RUN = {"messages": [{"role": "user", "content": "Go."}, {"role": "assistant", "content": "Use ghp_" + "a1B2" * 9}]}


def typed(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return PRELOADED.run(ROOT / "import_trajectories.py", *arguments, cwd=folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "a.jsonl").write_text(json.dumps(RUN) + "\n" + '{"half a li')
    (runs / "notes.txt").write_text("notes")
    return tmp_path


def test_records_and_the_account(folder: Path) -> None:
    done = typed(folder, "runs", "--output", "trajectories.jsonl")
    assert done.returncode == 0, done.stderr
    (line,) = (folder / "trajectories.jsonl").read_text().splitlines()
    assert json.loads(line)["steps"][0]["text"] == "Use [secret: github token]"
    assert "messages" in done.stdout and "masked: 1 github token" in done.stdout
    assert "skipped runs/notes.txt" in done.stderr and "(line 2)" in done.stderr


def test_the_account_as_json(folder: Path) -> None:
    done = typed(folder, "runs", "--output", "t.jsonl", "--json")
    account: dict[str, Any] = json.loads(done.stdout)
    assert account["written"] == 1 and [file["runs"] for file in account["files"]] == [1, 0]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["none", "--output", "t.jsonl"], 1, "no such file"),
        (["runs/notes.txt", "--output", "t.jsonl"], 1, "not JSON"),
        (["runs", "--output", "runs/t.jsonl"], 2, "is one of the inputs or inside one"),
        (["runs", "--output", "t.jsonl", "--format", "x"], 2, "unknown format. Known: "),
        (["runs", "--output", "t.jsonl", "--labels", "x"], 2, "who-and-when"),
        (["runs", "--output", "t.jsonl", "--labels", "column"], 2, "--label-key"),
        (["runs", "--output", "t.jsonl", "--labels", "steps"], 1, "no step of these runs has a label"),
        (["runs", "--output", "t.jsonl", "--rubric", "r.yaml"], 2, "--labels"),
        (["runs", "--output", "t.jsonl", "--label-scale", "ternary"], 2, "--labels column"),
        (["runs", "--output", ""], 2, "the name of the output is empty"),
        (["runs", "--output", "pipe"], 1, "pipe: not a regular file"),
        (["runs", "--output", "other"], 1, "other: a folder"),
        (["runs"], 2, "--output"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(folder: Path, arguments: list[str], code: int, words: str) -> None:
    os.mkfifo(folder / "pipe")
    (folder / "other").mkdir()
    done = typed(folder, *arguments)
    assert done.returncode == code and words in done.stderr
    assert (folder / "pipe").is_fifo()
    assert "Traceback" not in done.stderr and not (folder / "t.jsonl").exists()


def test_rows_of_labelled_steps(folder: Path) -> None:
    (folder / "marked.jsonl").write_text(json.dumps(RUN | {"marks": [0.4]}))
    arguments = ["marked.jsonl", "--labels", "column", "--label-key", "marks", "--output", "rows.jsonl"]
    assert typed(folder, *arguments).returncode == 0
    (row,) = map(json.loads, (folder / "rows.jsonl").read_text().splitlines())
    assert row["metadata"]["model_name"] == "human"
    assert json.loads(row["conversations"][1]["value"]) == {"step_score": 0.4}
