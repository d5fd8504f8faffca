"""The leak audit finds what is in both splits, also in datasets of others; and what is nearly the same."""

import json
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prmkit.dataset.leaks import _prompts_of, audit_folder
from prmkit.dataset.settings import Split
from prmkit.dataset_info import Entry, identities, read_entries
from prmkit.errors import DataError
from tests.dataset.conftest import Convert, many_rows, prompt_of, read_lines, row_of

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
    with (data / "reward_model_clip.jsonl").open("a") as stream:
        stream.write((data / "reward_model_full_eval.jsonl").read_text().splitlines()[0] + "\n")
    assert "but its conversion wrote" in script("convert_dataset.py", "--audit", data, code=1).stderr
    with (data / "reward_model_clip.meta.jsonl").open("a") as stream:
        stream.write(json.dumps(held_out[0]) + "\n")
    done = script("convert_dataset.py", "--audit", data, "--json", code=1)
    found = json.loads(done.stdout)
    assert found["tasks_on_both_sides"] == 1
    assert found["prompts_on_both_sides"] == 1
    assert {example["dataset"] for example in found["examples"]} == {"reward_model_clip"}
    assert held_out[0]["metadata"]["task_id"] in done.stderr


def test_datasets_of_others_are_compared_by_prompt(tmp_path: Path, script: Script) -> None:
    put(tmp_path, INFO, mine=alpaca("a", "b"), mine_test=alpaca("c"))
    assert audit_folder(tmp_path)["passed"] is None
    assert "no row has a task_id" in script("convert_dataset.py", "--audit", tmp_path, code=4).stderr
    put(tmp_path, INFO, mine=alpaca("a", "b"), mine_test=alpaca("c", "b"))
    script("convert_dataset.py", "--audit", tmp_path, code=1)


def test_other_columns_and_other_formats(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "x"},
    ]
    info = {
        "mine": {"file_name": "mine.jsonl", "columns": {"prompt": "question", "query": "more"}},
        "mine-validation": {
            "file_name": "held.jsonl",
            "formatting": "sharegpt",
            "columns": {"messages": "turns"},
            "tags": {
                "role_tag": "role",
                "content_tag": "content",
                "user_tag": "user",
                "assistant_tag": "assistant",
                "system_tag": "system",
            },
        },
    }
    put(tmp_path, info, mine=[{"question": "a", "more": "b"}], held=[{"turns": turns}, {"turns": None}])
    assert audit_folder(tmp_path)["prompts_on_both_sides"] == 1


def test_more_prompts_than_are_compared_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prmkit.dataset.leaks._PROMPTS_PER_PASS", 7)
    held_out = [str(number) for number in range(100)]
    put(tmp_path, INFO, mine=alpaca("a", "13", "57", "99"), mine_test=alpaca(*held_out))
    found = audit_folder(tmp_path)
    assert found["prompts_on_both_sides"] == 3
    assert found["held_out_rows"] == 100


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ("[]", "not an object of dataset entries"),
        ("{", "not JSON"),
        ('{"a": {"file_name": "gone.jsonl"}}', "gone.jsonl: missing"),
    ],
)
def test_a_damaged_folder_is_named(tmp_path: Path, script: Script, info: str, message: str) -> None:
    (tmp_path / "dataset_info.json").write_text(info)
    assert message in script("convert_dataset.py", "--audit", tmp_path, code=1).stderr


@pytest.mark.parametrize("metadata", [{"task_id": 1.5}, {"task_id": ["a"], "trajectory_id": "r"}, None])
def test_a_sidecar_that_names_no_task_that_can_be_read_is_a_sentence(tmp_path: Path, metadata: Any) -> None:
    line = {"prompt_sha256": "0" * 64, "metadata": metadata}
    (tmp_path / "a.jsonl").write_text("{}\n")
    (tmp_path / "a.meta.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(DataError, match="not written by a conversion"):
        list(identities(Entry("a", tmp_path / "a.jsonl")))


def test_a_folder_without_datasets(tmp_path: Path, script: Script) -> None:
    assert "dataset_info.json is missing" in script("convert_dataset.py", "--audit", tmp_path, code=1).stderr
    (tmp_path / "dataset_info.json").write_text("{}")
    assert "nothing to check" in script("convert_dataset.py", "--audit", tmp_path, code=1).stderr


# --- nearly the same ----------------------------------------------------------------------------------------------

SYLLABLES = ("ba", "ko", "lu", "ti", "fen", "mor", "sha", "vel", "rin", "dak", "sol", "pim", "tor", "ga")
WORDS = [one + other for one in SYLLABLES for other in SYLLABLES]


def story(seed: int, words: int = 120) -> str:
    choose = random.Random(seed)
    return " ".join(choose.choice(WORDS) for _ in range(words))


def split_of(held: int) -> Split:
    return Split(tasks=frozenset(f"task_{number}" for number in range(held)))


def with_stories(tasks: int, words: int = 120) -> list[dict[str, Any]]:
    return [row_of(prompt_of(story(task, words)), task=f"task_{task}") for task in range(tasks)]


@pytest.mark.parametrize("words", [40, 120, 2_000])
def test_a_prompt_with_a_changed_name_or_number_is_found(convert_rows: Convert, words: int) -> None:
    content = story(0, words).split()
    content[10], content[30] = "Aldersgate", "1986"
    original = prompt_of(" ".join(content))
    repeated = original.replace("Aldersgate", "Fenchurch").replace("1986", "42").replace("(Clip 1)", "(Clip 7)")
    rows = [*with_stories(20, words), row_of(original, task="task_0"), row_of(repeated, task="task_99")]
    report = convert_rows(rows, split=split_of(3))
    near = report["leak_audit"]["near_duplicates"]
    assert near["prompts"] == 1
    assert near["compared"] == 18
    (example,) = near["examples"]
    assert example["training"].endswith(":22")
    assert example["held_out"].endswith(":21")
    assert report["leak_audit"]["passed"]
    report = convert_rows(rows, split=split_of(3), near_duplicates="drop")
    assert report["rejected"] == {"nearly repeats a held-out prompt": 1}


def test_a_long_template_is_no_repetition(convert_rows: Convert) -> None:
    guidelines = story(1_000, 600)
    rows = [
        row_of(prompt_of(f"{story(task, 30)} {guidelines}"), task=f"task_{task}", kind=kind)
        for task in range(12)
        for kind in ("clip", "final")
    ]
    for number, row in enumerate(rows):
        row["conversations"][0]["value"] += f" {story(5_000 + number, 10)}"
    assert convert_rows(rows, split=split_of(3))["leak_audit"]["near_duplicates"]["prompts"] == 0


def test_chinese_prompts_are_compared_by_character(convert_rows: Convert) -> None:
    choose = random.Random(1)
    texts = [
        "".join(choose.choice("天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏") for _ in range(90)) for _ in range(12)
    ]
    rows = [row_of(prompt_of(text), task=f"task_{number}") for number, text in enumerate(texts)]
    rows.append(row_of(prompt_of(texts[0].replace(texts[0][40], "龙")), task="task_99"))
    report = convert_rows(rows, split=split_of(2))
    assert report["leak_audit"]["near_duplicates"]["prompts"] == 1


@pytest.mark.parametrize("limits", [{"_HELD": 500}, {"_REMEMBERED": 0}])
def test_many_sequences_are_sampled_and_not_all_remembered(
    convert_rows: Convert, monkeypatch: pytest.MonkeyPatch, limits: dict[str, int]
) -> None:
    for name, limit in limits.items():
        monkeypatch.setattr(f"prmkit.dataset.leaks.{name}", limit)
    rows = with_stories(20, 600)
    rows.append(row_of(rows[0]["conversations"][0]["value"].replace(story(0, 600)[:20], "Fenchurch"), task="task_99"))
    report = convert_rows(rows, split=split_of(3))
    assert report["leak_audit"]["near_duplicates"]["prompts"] == 1


def test_a_skipped_row_or_line_shifts_neither_places_nor_metadata(tmp_path: Path) -> None:
    texts = [
        " ".join("".join(random.Random(n * 99 + word).choices("abcdef", k=9)) for word in range(30)) for n in range(6)
    ]
    several = json.dumps({"conversations": [{"from": "human", "value": "not in the columns of the entry"}]})
    rows = [json.dumps(row) for row in alpaca(*texts)]
    put(tmp_path, INFO, mine="\n".join([several, "", *rows[:5]]), mine_test="\n\n".join([several, rows[5], rows[3]]))
    traced = [{"prompt_sha256": "0", "metadata": {"task_id": f"of row {n}"}} for n in range(6)]
    (tmp_path / "mine.meta.jsonl").write_text("".join(json.dumps(each) + "\n" for each in traced))
    (example,) = audit_folder(tmp_path)["near_duplicates"]["examples"]
    assert example == {
        "training": f"{tmp_path}/mine.jsonl:6",
        "held_out": f"{tmp_path}/mine_test.jsonl:5",
        "share": 1.0,
    }
    found = [(prompt.unit, prompt.text) for prompt in _prompts_of(read_entries(tmp_path).values(), held_out=False)]
    assert found == [(f"of row {n + 1}", text) for n, text in enumerate(texts[:5])]


def test_the_audit_of_a_folder_finds_them_too(convert_rows: Convert, data: Path, script: Script) -> None:
    rows = with_stories(20)
    rows.append(row_of(rows[0]["conversations"][0]["value"].replace(" 1)", " 2)"), task="task_99"))
    convert_rows(rows, split=split_of(3))
    done = script("convert_dataset.py", "--audit", data)
    assert "1 training prompts nearly repeat a held-out one" in done.stdout
    assert "reward_model_full_eval.jsonl:1" in done.stdout
