"""Datasets that LLaMA Factory could not load, or would load wrongly, and held-out rows that leak."""

import json
from pathlib import Path
from typing import Any

import pytest

from prmkit.training.check import Check, Status
from prmkit.training.data_checks import check_datasets, check_held_out

GOOD = {"instruction": "Judge this.", "input": "", "output": '{"a": 0.50}'}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write(tmp_path, "steps", [GOOD] * 5)
    write(tmp_path, "steps_eval", [GOOD | {"instruction": "Judge that."}])
    return tmp_path


def write(folder: Path, name: str, rows: list[Any], **entry: Any) -> None:
    """Add one dataset to a folder; a row that is a text is written as it stands."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    path = folder / "dataset_info.json"
    info = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(info | {name: {"file_name": f"{name}.jsonl"} | entry}))


def trace(folder: Path, name: str, *rows: tuple[str, str]) -> None:
    """Write the sidecar that names the task and the prompt of every row."""
    lines = [json.dumps({"prompt_sha256": prompt, "metadata": {"task_id": task}}) for task, prompt in rows]
    (folder / f"{name}.meta.jsonl").write_text("\n".join(lines) + "\n")


def check(folder: Path, dataset: str = "steps", eval_dataset: str | None = "steps_eval") -> Check:
    return check_datasets({"dataset": dataset, "eval_dataset": eval_dataset, "dataset_dir": str(folder)})


def held_out(folder: Path, **values: Any) -> Check:
    base = {"dataset": "steps", "eval_dataset": "steps_eval", "dataset_dir": str(folder)}
    return check_held_out({**base, **values}, {})


def test_datasets_that_can_be_loaded(data: Path) -> None:
    found = check(data)
    assert (found.status, found.found) == (Status.OK, "steps (5 rows), steps_eval (1 rows)")


def test_before_the_conversion(tmp_path: Path) -> None:
    found = check(tmp_path)
    assert found.status is Status.ERROR
    assert found.found.endswith("dataset_info.json is missing")
    assert "python convert_dataset.py" in found.advice


def test_a_dataset_that_is_not_there(data: Path) -> None:
    assert "dataset not found: stepz (did you mean steps?)" in check(data, "stepz").found
    assert "there are steps, steps_eval" in check(data, "zzz").found


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([GOOD, "{"], ":2: not JSON"),
        ([GOOD, "[]"], ":2: not an object"),
        ([GOOD, {"instruction": "x"}], ":2: has no column output"),
        ([GOOD | {"output": {"a": 0.5}}], ":1: output is no text, and LLaMA Factory would drop the row"),
        ([GOOD | {"output": None}], ":1: output is no text"),
        ([GOOD | {"instruction": 5}], ":1: instruction is no text"),
        ([], "is empty"),
    ],
)
def test_rows_that_would_be_lost(data: Path, rows: list[Any], told: str) -> None:
    write(data, "bad", rows)
    found = check(data, "bad")
    assert (found.status, told in found.found) == (Status.ERROR, True), found.found


def test_columns_that_are_mapped(data: Path) -> None:
    columns = {"prompt": "question", "response": "verdict"}
    write(data, "mapped", [{"question": "a", "verdict": "b"}], columns=columns)
    assert check(data, "mapped").status is Status.OK
    write(data, "mapped", [GOOD], columns=columns)
    assert "has no column question" in check(data, "mapped").found


def test_conversations(data: Path) -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    write(data, "chat", [{"conversations": turns}], formatting="sharegpt")
    assert check(data, "chat").status is Status.OK
    write(data, "chat", [{"conversations": "a"}], formatting="sharegpt")
    assert "conversations is no list" in check(data, "chat").found


def test_a_column_whose_type_changes_late_is_found_only_where_it_harms(data: Path) -> None:
    rows: list[Any] = [GOOD | {"category": None, "output": "x" * 1000}]
    write(data, "small", rows * 5)
    assert check(data, "small").status is Status.OK
    write(data, "large", rows * 11_000)
    assert "column category is no text" in check(data, "large").found


def test_files_that_are_missing_or_of_another_kind(data: Path) -> None:
    (data / "steps.jsonl").unlink()
    assert "steps.jsonl is missing" in check(data).found
    write(data, "steps", [GOOD], file_name="steps.JSONL")
    (data / "steps.JSONL").write_text("{}")
    assert "LLaMA Factory reads .arrow" in check(data).found
    write(data, "odd", [GOOD], formatting="parrot")
    assert "formatting is parrot" in check(data, "odd").found


def test_a_dataset_that_is_a_folder(data: Path) -> None:
    """LLaMA Factory takes it; nothing is claimed of rows that are not looked at."""
    write(data, "parts", [GOOD], file_name="parts")
    (data / "parts").mkdir()
    assert "parts must hold files of one kind" in check(data, "parts").found
    (data / "parts" / "a.jsonl").write_text(json.dumps(GOOD))
    found = check(data, "parts")
    assert (found.status, "parts (a folder: its rows are not looked at)" in found.found) == (Status.WARNING, True)
    (data / "parts" / ".DS_Store").touch()
    assert check(data, "parts").status is Status.ERROR


def test_a_dataset_of_a_hub(data: Path) -> None:
    info = json.loads((data / "dataset_info.json").read_text())
    (data / "dataset_info.json").write_text(json.dumps(info | {"far": {"hf_hub_url": "someone/something"}}))
    found = check(data, "far")
    assert (found.status, "far (from a hub or a script: not looked at)" in found.found) == (Status.WARNING, True)


@pytest.mark.parametrize(("key", "value"), [("file_name", 5), ("columns", ["prompt"]), ("tags", "x")])
def test_an_entry_of_another_type(data: Path, key: str, value: Any) -> None:
    write(data, "odd", [GOOD], **{key: value})
    found = check(data)
    assert found.status is Status.ERROR
    assert f"dataset_info.json: odd: {key} is {value!r}" in found.found


@pytest.mark.parametrize("text", ["[]", "{", '{"held_out": 5}'])
def test_a_report_of_the_conversion_that_is_damaged(data: Path, text: str) -> None:
    """Every run records it, and would end in an error after all checks."""
    (data / "conversion_report.json").write_text(text)
    found = check(data)
    assert (found.status, "conversion_report.json: not" in found.found) == (Status.ERROR, True)
    assert "python convert_dataset.py" in found.advice
    held_out(data)


@pytest.mark.parametrize("stage", ["rm", "dpo", "kto"])
def test_a_stage_that_learns_from_other_rows(data: Path, stage: str) -> None:
    values = {"dataset": "steps", "dataset_dir": str(data), "stage": stage}
    found = check_datasets(values)
    assert (found.status, f"stage: {stage} learns from" in found.found) == (Status.ERROR, True)


def test_pairs_are_for_other_stages(data: Path) -> None:
    columns = {"prompt": "instruction", "chosen": "good", "rejected": "bad"}
    write(data, "pairs", [{"instruction": "a", "good": "b", "bad": "c"}], ranking=True, columns=columns)
    assert "pairs holds pairs" in check(data, "pairs", None).found
    assert check_datasets({"dataset": "pairs", "dataset_dir": str(data), "stage": "dpo"}).status is Status.OK


def test_held_out_rows_apart(data: Path) -> None:
    trace(data, "steps", ("task 1", "aa"), ("task 2", "bb"))
    trace(data, "steps_eval", ("task 3", "cc"))
    found = held_out(data)
    assert (found.status, found.found) == (Status.OK, "1 prompts of 1 tasks, none of them trained on")


@pytest.mark.parametrize(
    ("leaked", "told"), [(("task 1", "zz"), "1 tasks and 0 prompts"), (("task 9", "bb"), "0 tasks and 1 prompts")]
)
def test_held_out_rows_that_leak(data: Path, leaked: tuple[str, str], told: str) -> None:
    trace(data, "steps", ("task 1", "aa"), ("task 2", "bb"))
    trace(data, "steps_eval", ("task 3", "cc"), leaked)
    found = held_out(data)
    assert (found.status, told in found.found) == (Status.ERROR, True)


def test_what_the_conversion_found_is_believed(data: Path) -> None:
    audit = {"passed": False, "tasks_on_both_sides": 4}
    (data / "conversion_report.json").write_text(json.dumps({"leak_audit": audit}))
    found = held_out(data)
    assert (found.status, "4 tasks on both sides" in found.found) == (Status.ERROR, True)


def test_other_ways_to_have_no_honest_held_out_rows(data: Path) -> None:
    assert held_out(data, eval_dataset="steps").status is Status.ERROR
    assert "at random" in held_out(data, eval_dataset=None, val_size=0.1).found
    assert held_out(data, eval_dataset=None).status is Status.WARNING
    said = check_held_out(
        {"dataset": "steps", "dataset_dir": str(data)}, {"eval_dataset": "steps has no held-out rows"}
    )
    assert said.found == "none: steps has no held-out rows"


@pytest.mark.parametrize(
    ("values", "status"),
    [
        ({"val_size": 100000}, Status.ERROR),
        ({"val_size": 5}, Status.ERROR),
        ({"val_size": 4}, Status.WARNING),
        ({"val_size": 4, "max_samples": 3}, Status.ERROR),
        ({"val_size": 0.9}, Status.ERROR),
        ({"val_size": 0.2}, Status.WARNING),
        ({"val_size": 5, "streaming": True}, Status.WARNING),
        ({"val_size": 5, "dataset": "steps,steps_eval"}, Status.WARNING),
    ],
)
def test_a_val_size_that_leaves_nothing(data: Path, values: dict[str, Any], status: Status) -> None:
    found = held_out(data, eval_dataset=None, **values)
    assert (found.status, "none is left" in found.found) == (status, status is Status.ERROR)


def test_a_sidecar_that_is_damaged_stops_nothing(data: Path) -> None:
    trace(data, "steps", ("task 1", "aa"))
    (data / "steps_eval.meta.jsonl").write_text('{"no": "prompt"}\n')
    assert held_out(data).status is Status.WARNING
