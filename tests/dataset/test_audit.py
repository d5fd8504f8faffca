"""The leak audit finds what stands on both sides, in anybody's datasets."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prmkit.dataset.audit import audit, read_datasets
from tests.dataset.conftest import Convert, many_rows, read_lines

Script = Callable[..., "subprocess.CompletedProcess[str]"]


def put(folder: Path, info: dict[str, Any], **files: list[dict[str, Any]] | str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset_info.json").write_text(json.dumps(info))
    for name, rows in files.items():
        lines = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)


def alpaca(*prompts: str) -> list[dict[str, Any]]:
    return [{"instruction": prompt, "input": "", "output": "x"} for prompt in prompts]


INFO = {"mine": {"file_name": "mine.jsonl"}, "mine_test": {"file_name": "mine_test.jsonl"}}


def test_a_clean_conversion_passes_and_a_doctored_one_does_not(
    convert_rows: Convert, data: Path, script: Script
) -> None:
    convert_rows(many_rows(tasks=40))
    assert "no leak" in script("convert_dataset.py", "--audit", data).stdout
    held_out = read_lines(data / "reward_model_full_eval.meta.jsonl")
    with (data / "reward_model_clip.meta.jsonl").open("a") as stream:
        stream.write(json.dumps(held_out[0]) + "\n")
    done = script("convert_dataset.py", "--audit", data, "--json", code=1)
    found = json.loads(done.stdout)
    assert found["tasks_on_both_sides"] == 1
    assert found["prompts_on_both_sides"] == 1
    assert {example["stands_in"] for example in found["examples"]} == {"reward_model_clip"}
    assert held_out[0]["metadata"]["task_id"] in done.stderr


def test_datasets_of_others_are_compared_by_prompt(tmp_path: Path, script: Script) -> None:
    put(tmp_path, INFO, mine=alpaca("a", "b"), mine_test=alpaca("c"))
    assert audit(read_datasets(tmp_path))["passed"]
    put(tmp_path, INFO, mine=alpaca("a", "b"), mine_test=alpaca("c", "b"))
    script("convert_dataset.py", "--audit", tmp_path, code=1)


def test_other_columns_and_other_formats(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "x"},
    ]
    info = {
        "mine": {"file_name": "mine.jsonl", "columns": {"prompt": "question", "query": "more"}},
        "mine-validation": {
            "file_name": "held.jsonl",
            "formatting": "sharegpt",
            "columns": {"messages": "turns"},
            "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "system_tag": "system"},
        },
    }
    put(tmp_path, info, mine=[{"question": "a", "more": "b"}], held=[{"turns": turns}, {"turns": None}])
    assert audit(read_datasets(tmp_path))["prompts_on_both_sides"] == 1


def test_more_prompts_than_are_compared_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prmkit.dataset.audit._PROMPTS_A_PASS", 7)
    held_out = [str(number) for number in range(100)]
    put(tmp_path, INFO, mine=alpaca("a", "13", "57", "99"), mine_test=alpaca(*held_out))
    found = audit(read_datasets(tmp_path))
    assert found["prompts_on_both_sides"] == 3
    assert found["held_out_rows"] == 100


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ("[]", "not an object of datasets"),
        ("{", "not JSON"),
        ('{"a": {"file_name": "gone.jsonl"}}', "gone.jsonl: missing"),
    ],
)
def test_a_damaged_folder_is_named(tmp_path: Path, script: Script, info: str, message: str) -> None:
    (tmp_path / "dataset_info.json").write_text(info)
    assert message in script("convert_dataset.py", "--audit", tmp_path, code=1).stderr


def test_a_folder_without_datasets(tmp_path: Path, script: Script) -> None:
    assert "dataset_info.json: No such file" in script("convert_dataset.py", "--audit", tmp_path, code=1).stderr
