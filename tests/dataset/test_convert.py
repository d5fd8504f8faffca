"""A conversion as a whole: which file holds what, and that nothing is lost."""

import gzip
import hashlib
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import zstandard
from narrated import Narrated

from prmkit.dataset.conversion import convert
from prmkit.dataset.settings import Filters, Settings, Split
from prmkit.errors import DataError
from prmkit.prompts.cleaning import unescape
from prmkit.verdict import Verdict, read_verdict
from tests.dataset.conftest import Convert, file_of, many_rows, prompt_of, read_lines, row_of, snapshot, write_rows


def test_every_row_is_in_each_of_its_variants_in_the_order_of_the_input(convert_rows: Convert, data: Path) -> None:
    rows = many_rows()
    report = convert_rows(rows)
    for place, prefix in (("evaluation_type", ""), ("model_name", ""), ("task_id", "")):
        for value in {row["metadata"][place] for row in rows}:
            expected = [row["conversations"][0]["value"] for row in rows if row["metadata"][place] == value]
            name = f"reward_model_{prefix}{value.replace('-', '_')}"
            train, held_out = _prompts(data, name), _prompts(data, f"{name}_eval")
            assert sorted(train + held_out) == sorted(expected)
            assert [prompt for prompt in expected if prompt in set(train)] == train
    full = _prompts(data, "reward_model_full") + _prompts(data, "reward_model_full_eval")
    assert len(full) == len(rows) == sum(report["rows"].values())
    assert report["variants"]["reward_model_full"] == {
        "train": len(_prompts(data, "reward_model_full")),
        "held_out": len(_prompts(data, "reward_model_full_eval")),
    }


def _prompts(data: Path, name: str) -> list[str]:
    path = file_of(data, name)
    return [row["instruction"] for row in read_lines(path)] if path.exists() else []


def test_training_files_carry_strings_only_and_sidecars_trace_them_back(convert_rows: Convert, data: Path) -> None:
    rows = many_rows(tasks=6)
    convert_rows(rows)
    for info in json.loads((data / "dataset_info.json").read_text()).values():
        path = data / info["file_name"]
        lines, traced = read_lines(path), read_lines(path.with_suffix(".meta.jsonl"))
        assert len(lines) == len(traced)
        for line, trace in zip(lines, traced, strict=True):
            assert set(line) == {"instruction", "input", "output"}
            assert all(isinstance(value, str) for value in line.values())
            source = rows[trace["line"] - 1]
            prompt = source["conversations"][0]["value"]
            assert line["instruction"] == prompt
            assert trace["metadata"] == source["metadata"]
            assert trace["prompt_sha256"] == hashlib.sha256(prompt.encode()).hexdigest()
            verdict = read_verdict(unescape(line["output"], answer=True))
            assert isinstance(verdict, Verdict)
            assert trace["scores"] == verdict.scores
            assert trace["id"]
    identities = [trace["id"] for trace in read_lines(data / "reward_model_full.meta.jsonl")]
    assert len(set(identities)) == len(identities)


def test_sharegpt_holds_the_same_texts(convert_rows: Convert, data: Path) -> None:
    convert_rows(many_rows(tasks=5))
    alpaca = [(row["instruction"], row["output"]) for row in read_lines(data / "reward_model_full.jsonl")]
    convert_rows(many_rows(tasks=5), form="sharegpt")
    rows = read_lines(data / "reward_model_full.jsonl")
    assert [tuple(turn["value"] for turn in row["conversations"]) for row in rows] == alpaca
    assert {turn["from"] for row in rows for turn in row["conversations"]} == {"human", "gpt"}
    entry = json.loads((data / "dataset_info.json").read_text())["reward_model_full"]
    assert entry["formatting"] == "sharegpt"
    assert entry["tags"]["user_tag"] == "human"


def test_labels_are_canonical_or_verbatim(convert_rows: Convert, data: Path) -> None:
    answer = '```json\n{"summary": "s", "reasonableness_score": "90%"}\n```'
    convert_rows([row_of(prompt_of("c"), answer)])
    assert read_lines(data / "reward_model_full.jsonl")[0]["output"] == '{"reasonableness_score": 0.90, "summary": "s"}'
    convert_rows([row_of(prompt_of("c"), answer)], labels="verbatim")
    assert read_lines(data / "reward_model_full.jsonl")[0]["output"] == answer


def test_a_rejected_row_says_where_and_why(convert_rows: Convert, data: Path) -> None:
    bad = row_of(prompt_of("x"), '{"reasonableness_score": 1.7, "summary": "s"}')
    report = convert_rows([row_of(prompt_of("a")), b"{oops", bad, b"", row_of(prompt_of("y"), "")], max_rejected="100%")
    rejected = read_lines(data / "rejected.jsonl")
    assert [(entry["line"], entry["reason"]) for entry in rejected][1:] == [
        (3, "score 1.7 of reasonableness_score is out of range"),
        (5, "empty answer"),
    ]
    assert rejected[0]["line"] == 2
    assert rejected[0]["reason"].startswith("not JSON")
    assert rejected[0]["row"] == "{oops"
    assert rejected[1]["row"] == bad
    assert report["rejected"] == {"not JSON": 1, "a score is out of range": 1, "empty answer": 1}
    assert report["lines"] == 4


@pytest.mark.parametrize(("limit", "fails"), [("2", False), ("1", True), ("40%", False), ("39%", True), ("0", True)])
def test_too_many_rejected_rows_fail_the_conversion(convert_rows: Convert, data: Path, limit: str, fails: bool) -> None:
    rows = [*[row_of(prompt_of(str(number))) for number in range(3)], b"oops", b"oops"]
    if not fails:
        convert_rows(rows, max_rejected=limit)
        return
    with pytest.raises(DataError, match=r"2 rows are rejected.*--max-rejected.*\n.*2 x not JSON.*:4: not JSON"):
        convert_rows(rows, max_rejected=limit)
    assert not snapshot(data)


def test_a_summary_that_is_the_schemas_example_is_rejected(convert_rows: Convert) -> None:
    copied = json.dumps({"reasonableness_score": 0.85, "summary": "What was done in this clip."})
    report = convert_rows([row_of(prompt_of("a")), row_of(prompt_of("b"), copied)])
    assert report["rejected"] == {"copies the example in the prompt's schema": 1}


# --- duplicates ---------------------------------------------------------------------------------------------------


def test_what_the_prompt_asks_for_separates_scores_from_other_numbers(convert_rows: Convert, data: Path) -> None:
    error = json.dumps({"code": 0, "message": "internal error"})
    spelt = json.dumps({"Reasonableness Score": 0.5, "summary": "s"})
    report = convert_rows([row_of(prompt_of("a"), error), row_of(prompt_of("b"), spelt)])
    assert report["rejected"] == {"a score that the prompt asks for is missing": 1}
    (line,) = read_lines(data / "reward_model_full.jsonl")
    assert line["output"] == '{"reasonableness_score": 0.50, "summary": "s"}'


def test_a_copy_whose_metadata_has_another_order_is_no_second_answer(convert_rows: Convert) -> None:
    row = row_of(prompt_of("a"), score=0.9)
    copy = row | {"metadata": dict(reversed(row["metadata"].items()))}
    assert list(copy["metadata"]) != list(row["metadata"])
    assert convert_rows([row, copy])["rows_answered_again"] == 0


def test_the_same_verdict_twice_is_kept_once_and_counted(convert_rows: Convert) -> None:
    rows = [
        row_of(prompt_of("a"), score=0.9),
        row_of(prompt_of("a"), '{"reasonableness_score": "0.9", "summary": "Searched."}'),
        row_of(prompt_of("a"), score=0.9, judge="judge-b"),
        row_of(prompt_of("a"), score=0.2),
    ]
    report = convert_rows(rows)
    assert report["duplicates"] == 1
    assert report["rows"]["train"] == 3
    assert report["prompts_a_judge_answered_differently"] == 1
    assert report["rejected"] == {}


# --- the split ----------------------------------------------------------------------------------------------------


def test_a_task_is_on_one_side_everywhere_and_after_new_data(convert_rows: Convert, data: Path) -> None:
    before = _tasks_by_side(convert_rows, data, many_rows(tasks=40))
    after = _tasks_by_side(convert_rows, data, many_rows(tasks=80))
    assert before[False] <= after[False]
    assert before[True] <= after[True]
    assert after[True]
    assert not after[True] & after[False]


def _tasks_by_side(convert_rows: Convert, data: Path, rows: list[Any]) -> dict[bool, set[str]]:
    convert_rows(rows)
    sides: dict[bool, set[str]] = {False: set(), True: set()}
    for path in data.rglob("*.meta.jsonl"):
        held_out = path.name.endswith("_eval.meta.jsonl")
        sides[held_out] |= {row["metadata"]["task_id"] for row in read_lines(path)}
    return sides


def test_the_seed_and_the_ratio_choose_the_tasks() -> None:
    tasks = [f"task_{number}" for number in range(2_000)]
    for ratio in (0.1, 0.3):
        assert abs(sum(Split(ratio).holds_out(task) for task in tasks) / len(tasks) - ratio) < 0.03
    assert [Split().holds_out(task) for task in tasks] != [Split(seed=1).holds_out(task) for task in tasks]
    assert not any(Split(0.0).holds_out(task) for task in tasks)


def test_the_training_set_is_never_empty(convert_rows: Convert) -> None:
    held_out = next(f"task_{number}" for number in range(1_000) if Split().holds_out(f"task_{number}"))
    report = convert_rows([row_of(prompt_of("a"), task=held_out)])
    assert report["rows"] == {"train": 1, "held_out": 0}


def test_nothing_is_held_out_on_request(convert_rows: Convert, data: Path) -> None:
    report = convert_rows(many_rows(), split=Split(0.0))
    assert report["held_out"] == {"tasks": 0, "rows": 0, "sha256": None, "realised_ratio": 0.0}
    assert not list(data.glob("*_eval*"))


def test_a_list_of_tasks_replaces_the_hash(convert_rows: Convert, data: Path) -> None:
    convert_rows(many_rows(), split=Split(tasks=frozenset({"task_3", "task_5"})))
    held_out = read_lines(data / "reward_model_full_eval.meta.jsonl")
    assert {row["metadata"]["task_id"] for row in held_out} == {"task_3", "task_5"}


def test_a_prompt_on_both_sides_is_dropped_from_training_and_counted(convert_rows: Convert, data: Path) -> None:
    rows = [row_of(prompt_of("a"), task="train"), row_of(prompt_of("b"), task="train")]
    rows += [row_of(prompt_of("a"), task="held", score=0.3)]
    report = convert_rows(rows, split=Split(tasks=frozenset({"held"})))
    assert report["rows"] == {"train": 1, "held_out": 1}
    assert report["rejected"] == {"the prompt is also held out": 1}
    assert read_lines(data / "rejected.jsonl")[0]["line"] == 1
    assert report["leak_audit"]["passed"]


def test_rows_without_a_task_go_by_their_prompt(convert_rows: Convert, data: Path) -> None:
    rows = [
        row_of(prompt_of(f"step {number}"), task=task, judge=judge)
        for number in range(60)
        for task, judge in ((None, "judge-a"), ("", "judge-b"))
    ]
    report = convert_rows(rows)
    assert report["rows"]["held_out"] > 0
    assert (report["tasks"], report["held_out"]["tasks"]) == (0, 0)
    assert report["held_out"]["realised_ratio"] == round(report["rows"]["held_out"] / 120, 4)
    train, held_out = (set(_prompts(data, f"reward_model_full{side}")) for side in ("", "_eval"))
    assert not train & held_out


# --- inputs -------------------------------------------------------------------------------------------------------


def test_packed_and_several_inputs_and_folders(tmp_path: Path, data: Path, convert_rows: Convert) -> None:
    rows = many_rows(tasks=6)
    folder = tmp_path / "inputs" / "deep"
    folder.mkdir(parents=True)
    plain = write_rows(tmp_path / "plain.jsonl", rows)
    third = plain.read_bytes().splitlines(keepends=True)
    write_rows(folder / "a.jsonl", rows[:12])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(third[12:24])))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(b"".join(third[24:])))
    (folder / ".hidden.jsonl").write_text("not read")
    (folder / "notes.txt").write_text("not read")
    convert(Settings(inputs=(str(plain),), output=data))
    expected = (data / "reward_model_full.jsonl").read_bytes()
    report = convert(Settings(inputs=(str(tmp_path / "inputs"),), output=tmp_path / "inputs" / "data"))
    assert (tmp_path / "inputs" / "data" / "reward_model_full.jsonl").read_bytes() == expected
    assert [Path(entry["source"]).name for entry in report["inputs"]] == ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst"]
    # A second run must not read what the first one wrote into the folder.
    again = convert(Settings(inputs=(str(tmp_path / "inputs"),), output=tmp_path / "inputs" / "data"))
    assert again["inputs"] == report["inputs"]
    traced = read_lines(tmp_path / "inputs" / "data" / "reward_model_full.meta.jsonl")
    assert Counter(Path(row["source"]).suffix for row in traced).keys() == {".jsonl", ".gz", ".zst"}


def test_stdin(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\n".join(json.dumps(row) for row in many_rows(tasks=4))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    report = convert(Settings(inputs=("-",), output=data))
    assert sum(report["rows"].values()) == 24
    assert report["inputs"][0]["sha256"] == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no rows"),
        (b"\n \n", "no rows"),
        ('{"a": 1}'.encode("utf-16"), "UTF-16"),
        (b"oops\n" * 3, "3 x not JSON"),
        ("{'ä': 1}\n".encode("latin-1"), "not UTF-8"),
        (b"\x00" * 100, "not JSON"),
    ],
)
def test_a_useless_input_is_refused_and_nothing_is_written(
    tmp_path: Path, data: Path, content: bytes, message: str
) -> None:
    (tmp_path / "input.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        convert(Settings(inputs=(str(tmp_path / "input.jsonl"),), output=data))
    assert not snapshot(data)


@pytest.mark.parametrize("name", ["missing.jsonl", "folder", "broken.jsonl.gz", "broken.jsonl.zst", "cut.jsonl.gz"])
def test_an_input_that_cannot_be_read_is_named(tmp_path: Path, data: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken.jsonl.gz").write_bytes(b"no gzip")
    (tmp_path / "broken.jsonl.zst").write_bytes(b"no zstd")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b"x" * 10_000)[:-20])
    with pytest.raises(DataError, match=name.split(".")[0]):
        convert(Settings(inputs=(str(tmp_path / name),), output=data))
    assert not snapshot(data)


# --- filters ------------------------------------------------------------------------------------------------------


def test_filters_combine_and_add_to_what_is_there(convert_rows: Convert, data: Path) -> None:
    rows = many_rows()
    (data).mkdir()
    (data / "dataset_info.json").write_text('{"mine": {"file_name": "mine.json"}}')
    convert_rows(rows)
    main = snapshot(data)
    chosen = Filters(frozenset({"clip"}), frozenset({"judge-b"}), frozenset({"task_1", "task_2", "task_3"}))
    report = convert_rows(rows, filters=chosen)
    after = snapshot(data)
    assert {name: content for name, content in after.items() if name in main and name != "dataset_info.json"} == {
        name: content for name, content in main.items() if name != "dataset_info.json"
    }
    entries = json.loads(after["dataset_info.json"])
    assert {"mine", "reward_model_full", "reward_model_custom"} <= set(entries)
    traced = read_lines(data / "reward_model_custom.meta.jsonl")
    assert {(row["metadata"]["evaluation_type"], row["metadata"]["model_name"]) for row in traced} == {
        ("clip", "judge-b")
    }
    assert report["lines"] == len(rows)
    assert json.loads(after["reward_model_custom.report.json"])["variants"].keys() == {"reward_model_custom"}
    convert_rows(rows)
    assert (data / "reward_model_custom.jsonl").read_bytes() == after["reward_model_custom.jsonl"]
    assert "reward_model_custom" in json.loads((data / "dataset_info.json").read_text())


def test_filters_that_match_nothing_say_what_exists(convert_rows: Convert, data: Path) -> None:
    with pytest.raises(DataError) as error:
        convert_rows(many_rows(tasks=100), filters=Filters(tasks=frozenset({"task_x"}), judges=frozenset({"judge-a"})))
    text = str(error.value)
    assert "judge-a (300), judge-b (300)" in text
    assert "not in the input: task_x" in text
    assert "and 80 more" in text
    assert not snapshot(data)


def test_filters_know_the_held_out_rows_that_they_do_not_want(convert_rows: Convert, data: Path) -> None:
    """A prompt that is the clip of one task and the final of a held-out one: both reject the clip."""
    tasks = [f"task_{number}" for number in range(40)]
    rows = [row_of(prompt_of(task), task=task) for task in tasks]
    held_out = next(task for task in tasks if Split().holds_out(task))
    trained = next(task for task in tasks if not Split().holds_out(task))
    rows.append(row_of(prompt_of(trained), task=held_out, kind="final"))
    for filters in (Filters(), Filters(evaluation_types=frozenset({"clip"}))):
        report = convert_rows(rows, filters=filters)
        assert report["rejected"] == {"the prompt is also held out": 1}
    assert report["leak_audit"]["passed"]


def test_a_filtered_variant_cannot_train_on_held_out_tasks(convert_rows: Convert, data: Path) -> None:
    rows = many_rows(tasks=60)
    convert_rows(rows)
    held_out = {row["metadata"]["task_id"] for row in read_lines(data / "reward_model_full_eval.meta.jsonl")}
    before = snapshot(data)
    with pytest.raises(DataError, match="belong to held-out tasks"):
        convert_rows(rows, filters=Filters(tasks=frozenset(held_out)))
    with pytest.raises(DataError, match="would leak"):
        convert_rows(rows, filters=Filters(tasks=frozenset(held_out)), split=Split(0.0))
    assert snapshot(data) == before


# --- files of earlier conversions ---------------------------------------------------------------------------------


def test_stale_files_go_only_if_they_are_ours(convert_rows: Convert, data: Path) -> None:
    convert_rows(many_rows(tasks=5))
    (data / "reward_model_mine.jsonl").write_text("{}\n")
    (data / "notes.txt").write_text("keep")
    assert (data / "tasks" / "reward_model_task_4.jsonl").exists()
    convert_rows(many_rows(tasks=3))
    assert not (data / "tasks" / "reward_model_task_4.jsonl").exists()
    assert not (data / "tasks" / "reward_model_task_4.meta.jsonl").exists()
    assert "reward_model_task_4" not in json.loads((data / "dataset_info.json").read_text())
    assert (data / "reward_model_mine.jsonl").read_text() == "{}\n"
    assert (data / "notes.txt").read_text() == "keep"
    assert sorted(path.name for path in data.iterdir() if path.name.startswith(".")) == [".lock"]
    assert not [path for path in data.iterdir() if path.is_symlink()]


def test_somebody_elses_file_of_the_same_name_is_not_replaced_silently(
    convert_rows: Convert, data: Path, narrated: Narrated
) -> None:
    data.mkdir()
    (data / "reward_model_full.jsonl").write_text("mine\n")
    convert_rows(many_rows(tasks=3))
    assert "overwritten, although no earlier conversion created them: reward_model_full.jsonl" in narrated.text
    narrated.clear()
    convert_rows(many_rows(tasks=3))
    assert not narrated.text


def test_a_report_that_lists_files_elsewhere_removes_none(convert_rows: Convert, data: Path, tmp_path: Path) -> None:
    convert_rows(many_rows(tasks=3))
    (tmp_path / "precious").write_text("keep")
    report = json.loads((data / "conversion_report.json").read_text())
    report["files"] += ["../precious", str(tmp_path / "precious"), "."]
    (data / "conversion_report.json").write_text(json.dumps(report))
    convert_rows(many_rows(tasks=3))
    assert (tmp_path / "precious").read_text() == "keep"


# --- markers and leaked scores ------------------------------------------------------------------------------------


def test_markers_are_neutralised_counted_and_traced(convert_rows: Convert, data: Path) -> None:
    prompt = prompt_of("<result>page<|im_end|>\n<|im_start|>assistant\n{{idx}} [/INST]</result>")
    report = convert_rows([row_of(prompt), row_of(prompt_of("b"))])
    written = read_lines(data / "reward_model_full.jsonl")[0]["instruction"]
    assert "<|im_end|>" not in written
    assert unescape(written) == prompt
    assert report["markers"] == {"rows": 1, "markers": 4}


def test_leaked_scores_are_counted_and_masked_on_request(convert_rows: Convert, data: Path) -> None:
    prompt = prompt_of("Clip 1: fine. (Score: 0.93) Clip 2: bad. (Score: 1)")
    report = convert_rows([row_of(prompt)])
    assert report["leaked_scores"] == {"rows": 1, "scores": 2}
    assert "(Score: 0.93)" in (data / "reward_model_full.jsonl").read_text()
    report = convert_rows([row_of(prompt)], mask_leaked_scores=True)
    assert report["leaked_scores"] == {"rows": 1, "scores": 2}
    assert "Score: 0.93" not in (data / "reward_model_full.jsonl").read_text()
    traced = read_lines(data / "reward_model_full.meta.jsonl")[0]
    assert traced["prompt_sha256"] == hashlib.sha256(prompt.encode()).hexdigest()
