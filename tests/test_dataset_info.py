"""Entries of dataset_info.json are read as LLaMA Factory reads them."""

import json
from pathlib import Path
from typing import Any

import pytest

from prmkit.dataset.conversion import convert
from prmkit.dataset.settings import Settings, Split
from prmkit.dataset_info import (
    Format,
    RowTexts,
    data_folder_of,
    dataset_entry,
    held_out_names,
    label_shapes,
    read_entries,
    split_names,
    training_row,
)
from prmkit.errors import DataError
from prmkit.files import sha256_of
from prmkit.verdict import Scale


def entries_of(folder: Path, info: Any) -> Any:
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return read_entries(folder)


@pytest.mark.parametrize("form", ["alpaca", "sharegpt"])
@pytest.mark.parametrize("system", [None, "", "Be strict."])
def test_what_is_written_is_read_back(tmp_path: Path, form: Format, system: str | None) -> None:
    raw = dataset_entry("steps.jsonl", form, with_system=system is not None)
    entry = entries_of(tmp_path, {"steps": raw})["steps"]
    row = json.loads(training_row("Was it right?", "Yes.", form, system))
    assert entry.read(row) == RowTexts(system or None, "Was it right?", "Yes.")
    assert entry.file == tmp_path / "steps.jsonl"
    assert entry.sidecar is None
    (tmp_path / "steps.meta.jsonl").touch()
    assert entry.sidecar == tmp_path / "steps.meta.jsonl"


@pytest.mark.parametrize("labels", ["canonical", "verbatim"])
def test_the_shapes_of_labels_are_counted_by_evaluation_type(tmp_path: Path, labels: Any) -> None:
    answers = [
        *[("clip", '{"quality": 7, "why": "x"}')] * 3,
        *[("clip", '{"scores": {"quality": 7}, "why": "x"}')] * 2,
        ("final", '```json\n{"why": "x", "scores": {"b": 7, "a": 1}}\n```'),
        (None, '{"a_score": 3}'),
    ]
    rows = [
        {"prompt": f"Judge step {n}.", "response": answer, "metadata": {"evaluation_type": kind, "task_id": n}}
        for n, (kind, answer) in enumerate(answers)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = tmp_path / "data"
    convert(Settings((str(tmp_path / "rows.jsonl"),), data, labels=labels, scales={None: Scale(0, 10)}, split=Split(0)))
    shapes = label_shapes(data, ["reward_model_full"])
    assert shapes == {
        "clip": [{"keys": ["quality"], "nested": False, "rows": 3}, {"keys": ["quality"], "nested": True, "rows": 2}],
        "final": [{"keys": ["b", "a"], "nested": True, "rows": 1}],
        "": [{"keys": ["a_score"], "nested": False, "rows": 1}],
    }
    assert label_shapes(data, ["reward_model_clip", "reward_model_final"]) == {t: shapes[t] for t in ("clip", "final")}
    assert label_shapes(data, ["none"]) is label_shapes(tmp_path, ["steps"]) is None
    (data / "reward_model_full.meta.jsonl").unlink()
    assert label_shapes(data, ["reward_model_full"]) is None


@pytest.mark.parametrize(
    ("raw", "row"),
    [
        ({}, {"instruction": "Was it", "input": "right?", "output": "Yes."}),
        ({"columns": {"prompt": "q", "response": "a"}}, {"q": "Was it\nright?", "a": "Yes.", "input": "no column"}),
        (
            {"formatting": "sharegpt"},
            {"conversations": [{"from": "human", "value": "Was it\nright?"}, {"from": "gpt", "value": "Yes."}]},
        ),
        (
            {"formatting": "openai", "columns": {"messages": "m"},
             "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}},
            {"m": [{"role": "user", "content": "Was it\nright?"}, {"role": "assistant", "content": "Yes."}]},
        ),
    ],
)  # fmt: skip
def test_defaults_are_those_of_llamafactory(tmp_path: Path, raw: dict[str, Any], row: dict[str, Any]) -> None:
    from llamafactory.data.parser import get_dataset_list

    entry = entries_of(tmp_path, {"steps": {"file_name": "steps.jsonl", **raw}})["steps"]
    (theirs,) = get_dataset_list(["steps"], str(tmp_path))
    for name in ("prompt", "query", "response", "system", "messages"):
        assert entry.columns.get(name) == getattr(theirs, name)
    for name in ("role_tag", "content_tag", "user_tag", "assistant_tag", "system_tag"):
        assert entry.tags.get(name) == getattr(theirs, name)
    assert entry.read(row) == RowTexts(None, "Was it\nright?", "Yes.")
    with pytest.raises(ValueError, match="a row"):
        entry.read({"other": 1})


@pytest.mark.parametrize("info", [[], {"a": 1}, {"a": {"file_name": 3}}, {"a": {"columns": []}}])
def test_a_damaged_file_says_so(tmp_path: Path, info: Any) -> None:
    with pytest.raises(DataError, match=r"dataset_info\.json"):
        entries_of(tmp_path, info)


def test_names() -> None:
    assert split_names("a, b") == split_names(["a", " b"]) == ["a", "b"]
    assert split_names(None) == []
    assert held_out_names(["a", "b"], ["a", "b", "b_eval"]) == ["b_eval"]


def test_the_data_of_a_run_is_that_with_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither another project's, in which one stands, nor that of a folder above the run's, which may be a link."""
    run = tmp_path / "scratch" / "saves" / "run"
    folders = [tmp_path / name / "data" for name in ("project", "scratch", "other")]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "rows.jsonl").write_text(f"rows of {folder.parent.name}\n")
        (folder / "dataset_info.json").write_text(json.dumps({"full": {"file_name": "rows.jsonl"}}))
    project, scratch, other = folders
    for rows, here in ((project, project), (scratch, project), (scratch, other)):
        monkeypatch.chdir(here.parent)
        described = {"name": "full", "sha256": sha256_of(rows / "rows.jsonl")}
        assert data_folder_of(run, {"config": {"dataset_dir": "data"}, "dataset": described}).resolve() == rows
    unknown = {"config": {}, "dataset": {"name": "full", "sha256": "0" * 64}}
    assert data_folder_of(run, unknown).resolve() == other  # the caller's check of the hash then fails
    older = {"config": {}, "dataset": "full"}
    assert data_folder_of(run, older).resolve() == other
    monkeypatch.chdir(tmp_path)
    assert data_folder_of(tmp_path / "saves" / "run", unknown) is None
