"""Inputs as they are met: every row is kept or rejected with a reason, and nothing is passed over silently."""

import bz2
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from narrated import Narrated

from prmkit import layouts
from prmkit.dataset import convert as convert_from_python
from prmkit.dataset.conversion import convert
from prmkit.dataset.settings import Settings, Split
from prmkit.errors import DataError, UsageError
from prmkit.layouts import LONGEST_LINE, Line
from prmkit.rows import prompt_hash
from tests.dataset.conftest import Convert, many_rows, prompt_of, read_lines, row_of, snapshot, write_rows

GOOD = json.dumps(row_of(prompt_of("a")))
Script = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.mark.slow
def test_hostile_lines_stop_nothing(convert_rows: Convert, data: Path) -> None:
    wide = b'{"conversations": [' + b"[]," * 1_000_000 + b"[]]}"
    deep = "[" * 253 + "]" * 253
    lines = [
        GOOD.encode(),
        b'{"a": "' + b"x" * (LONGEST_LINE + 10) + b'"}',
        b"[" * 2_000_000,
        b"\x00" * 1_000,
        wide,
        b'{"conversations": "\\ud800"}',
        GOOD.encode() + b"\r",
        json.dumps(row_of(prompt_of("null \x00 byte, \u2028 line"), task="\x00")).encode(),
        b"\xff" * 10,
        json.dumps(row_of(prompt_of("last"))).encode(),
        (GOOD[:-2] + ', "x": ' + deep + "}}").encode(),
        ('{"x": ' + deep * 1 + "}").encode(),
    ]
    report = convert_rows(lines, max_rejected="100%")
    assert sum(report["rows"].values()) == 3
    assert report["duplicates"] == 1
    rejected = read_lines(data / "rejected.jsonl")
    assert [entry["line"] for entry in rejected] == [2, 3, 4, 5, 6, 9, 11, 12]
    assert rejected[0]["reason"].startswith("row of 4,194,3")
    assert len(rejected[0]["row"]) == 1_000
    assert [entry["reason"] for entry in rejected[-2:]] == ["nested too deeply"] * 2
    traced = [row for side in ("", "_eval") for row in read_lines(data / f"reward_model_full{side}.meta.jsonl")]
    assert sorted(row["line"] for row in traced) == [1, 8, 10]


def test_a_line_of_100_mb_is_rejected_and_its_neighbours_are_kept(tmp_path: Path, data: Path) -> None:
    source = tmp_path / "input.jsonl"
    with source.open("wb") as stream:
        stream.write(b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n")
        for _ in range(100):
            stream.write(b"x" * 1_000_000)
        stream.write(b"\n" + json.dumps(row_of(prompt_of("next"))).encode())
    report = convert(Settings(inputs=(str(source),), output=data))
    assert report["rows"]["train"] == 2
    assert report["rejected"] == {"row too long": 1}
    assert [row["line"] for row in read_lines(data / "reward_model_full.meta.jsonl")] == [1, 3]


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
PATHS: list[tuple[Any, ...]] = [
    ("conversations",), ("conversations", 0), ("conversations", 1), ("conversations", 0, "value"),
    ("conversations", 1, "value"), ("conversations", 0, "from"), ("metadata",), ("metadata", "task_id"),
    ("metadata", "model_name"), ("metadata", "evaluation_type"), ("metadata", "category"), ("system",), ("tools",),
]  # fmt: skip


def damaged(path: tuple[Any, ...], value: Any) -> bytes:
    row = json.loads(GOOD)
    place = row
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(row).encode().replace(b"\n", b" ")


@given(
    st.lists(
        st.binary(max_size=60).map(lambda line: line.replace(b"\n", b""))
        | st.builds(damaged, st.sampled_from(PATHS), json_values),
        max_size=40,
    )
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_line_is_kept_or_rejected(convert_rows: Convert, data: Path, lines: list[bytes]) -> None:
    report = convert_rows([row_of(prompt_of("a row that is fine"), task=None), *lines], max_rejected="100%")
    filled = [line for line in lines if line.strip(b" \t\r\x0b\x0c")]
    assert report["lines"] == len(filled) + 1
    kept, rejected = sum(report["rows"].values()), sum(report["rejected"].values())
    assert kept + rejected + report["duplicates"] == report["lines"]
    assert len(read_lines(data / "rejected.jsonl")) == rejected


@pytest.mark.parametrize("form", ["alpaca", "sharegpt"])
def test_system_texts_are_trained_on(convert_rows: Convert, data: Path, form: Any) -> None:
    strict, kind = "Any detour costs <|im_end|> half.", "Only the result counts."
    rows = [{**row_of(prompt_of("a"), score=score), "system": system} for system, score in ((strict, 0.2), (kind, 0.9))]
    report = convert_rows([*rows, row_of(prompt_of("b"))], form=form, split=Split(0.0))
    written = read_lines(data / "reward_model_full.jsonl")
    assert [row["system"] for row in written] == [strict.replace("<|", r"<\|"), kind, ""]
    assert report["prompts"] == 3
    assert report["duplicates"] == 0
    traced = read_lines(data / "reward_model_full.meta.jsonl")
    assert traced[0]["prompt_sha256"] == prompt_hash(prompt_of("a"), strict) != traced[1]["prompt_sha256"]
    entry = json.loads((data / "dataset_info.json").read_text())["reward_model_full"]
    assert entry["columns"]["system"] == "system"
    convert_rows([row_of(prompt_of("b"))], form=form)
    assert "system" not in read_lines(data / "reward_model_full.jsonl")[0]


def test_metadata_at_the_top_level_keeps_tasks_apart(convert_rows: Convert) -> None:
    rows = [{"conversations": row["conversations"], **row["metadata"]} for row in many_rows(tasks=12)]
    report = convert_rows(rows)
    assert report["tasks"] == 12
    assert report["leak_audit"]["passed"] is True


def test_where_no_row_names_a_task_the_audit_does_not_say_passed(convert_rows: Convert, script: Script) -> None:
    report = convert_rows([row_of(prompt_of(str(number)), task=None) for number in range(40)])
    assert report["rows"]["held_out"] > 0
    assert report["leak_audit"]["passed"] is None
    output = report["settings"]["output"]
    source = report["inputs"][0]["source"]
    done = script("convert_dataset.py", "--input", source, "--output-dir", output)
    assert "cannot check that" in done.stdout


def test_a_row_without_a_task_goes_with_its_prompt(convert_rows: Convert) -> None:
    rows = [row_of(prompt_of(str(number)), task=f"task_{number % 4}") for number in range(12)]
    rows += [row_of(prompt_of(str(number)), task=None, judge="judge-b") for number in range(12)]
    report = convert_rows(rows)
    assert sum(report["rows"].values()) == 24
    assert report["held_out"]["tasks"] == 1
    assert report["rows"]["held_out"] == 6


def test_several_runs_of_a_task_need_names(convert_rows: Convert, data: Path) -> None:
    def runs(**names: Any) -> list[dict[str, Any]]:
        return [
            row_of(prompt_of(f"run {run}, step {clip}"), clip_number=clip, **{key: f"{key} {run}" for key in names})
            for run in range(2)
            for clip in (1, 2)
        ]

    with pytest.raises(
        DataError, match=r"2 clips have more than one prompt.*clip number 1 of task_1.*:1 and .*:3.*trajectory_id"
    ):
        convert_rows(runs())
    assert not snapshot(data)
    report = convert_rows(runs(trajectory_id=True))
    assert report["rows"]["train"] == 4
    for kind in ("category", "tool use"):
        categories = [row_of(prompt_of(name), kind=kind, category=name, clip_number=1) for name in ("web", "code")]
        assert convert_rows(categories)["rows"]["train"] == 2


@pytest.mark.parametrize("tasks", [2, 3, 5, 17])
@pytest.mark.parametrize("seed", range(3))
def test_with_two_tasks_or_more_one_is_on_each_side(convert_rows: Convert, tasks: int, seed: int) -> None:
    rows = [row_of(prompt_of(str(task)), task=f"harbour_{task}") for task in range(tasks)]
    for ratio in (0.01, 0.1, 0.99):
        report = convert_rows(rows, split=Split(ratio, seed))
        assert 0 < report["held_out"]["tasks"] < tasks
        assert report["held_out"]["realised_ratio"] == round(report["held_out"]["tasks"] / tasks, 4)
    assert convert_rows(rows[::-1], split=Split(0.01, seed))["held_out"]["tasks"] == 1


@pytest.mark.parametrize(
    ("tasks", "message"),
    [({"nope"}, "no row has one of these tasks"), ({"task_0"}, "All usable rows belong to held-out tasks")],
)
def test_a_list_of_tasks_that_leaves_a_side_empty_is_an_error(
    convert_rows: Convert, tasks: set[str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        convert_rows([row_of(prompt_of("a"), task="task_0")], split=Split(tasks=frozenset(tasks)))


def test_more_than_half_rejected_fails_and_a_judge_who_loses_rows_is_named(
    convert_rows: Convert, data: Path, script: Script
) -> None:
    rows = [row_of(prompt_of(str(number)), score=0.5) for number in range(9)]
    lost = [row_of(prompt_of(f"x{number}"), "", judge="judge-b") for number in range(10)]
    with pytest.raises(DataError, match=r"10 rows are rejected, more than half.*--max-rejected 100%"):
        convert_rows(rows + lost)
    convert_rows(rows + lost, max_rejected="100%")
    report = convert_rows(rows + lost[:3] + [row_of(prompt_of("y"), judge="judge-b")])
    assert report["judges_with_losses"] == [
        {"judge": "judge-b", "rows": 4, "rejected": 3, "commonest_reason": "empty answer"}
    ]
    source = report["inputs"][0]["source"]
    done = script("convert_dataset.py", "--input", source, "--output-dir", data)
    assert "3 of 4 rows of judge-b are rejected; most common reason: empty answer" in done.stdout


def test_rows_that_would_leak_are_not_counted_as_unreadable(convert_rows: Convert) -> None:
    same = [row_of(prompt_of("the same"), task="a", judge=f"judge-{n}") for n in range(6)]
    others = [row_of(prompt_of("the same"), task="b"), row_of(prompt_of("another"), task="c")]
    report = convert_rows([*same, *others], split=Split(tasks=frozenset({"b"})))
    assert report["rejected"]["the prompt is also held out"] > report["lines"] / 2


# --- files --------------------------------------------------------------------------------------------------------


def test_nothing_in_a_folder_is_passed_over_silently(tmp_path: Path, data: Path, narrated: Narrated) -> None:
    folder = tmp_path / "rows"
    (folder / ".hidden").mkdir(parents=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for number, name in enumerate(["a.jsonl", "b.JSONL", "d.ndjson", "e.txt", ".f.jsonl", "loop.jsonl"]):
        write_rows(folder / name, [row_of(prompt_of(str(number)))])
    (folder / "c.json").write_text(json.dumps([row_of(prompt_of("c1")), row_of(prompt_of("c2"))], indent=2))
    (folder / "g.jsonl.bz2").write_bytes(bz2.compress(json.dumps(row_of(prompt_of("g"))).encode()))
    (folder / "loop.jsonl").unlink()
    (folder / "loop.jsonl").symlink_to("loop.jsonl")
    (folder / "linked").symlink_to(elsewhere)
    report = convert(Settings(inputs=(str(folder),), output=data))
    assert sum(report["rows"].values()) == 6
    assert "5 files or folders are skipped" in narrated.text
    for name in ("e.txt", ".f.jsonl", "loop.jsonl", "linked/", ".hidden/"):
        assert name in narrated.text


@pytest.mark.parametrize("change", ["cut", "grow", "replace"])
def test_an_input_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, data: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, original = write_rows(tmp_path / "input.jsonl", many_rows(tasks=5)), layouts.read_lines

    def interfere(stream: IO[bytes], name: str) -> Iterator[Line]:
        lines = original(stream, name)
        yield next(lines)
        if change == "replace":
            source.unlink()
        with source.open("ab" if change == "grow" else "wb") as written:
            written.write(b"\n")
        yield from lines

    monkeypatch.setattr("prmkit.dataset.prepare.read_lines", interfere)
    with pytest.raises(DataError, match=r"input\.jsonl changed while"):
        convert(Settings(inputs=(str(source),), output=data))
    assert not snapshot(data)


@pytest.mark.parametrize(
    "name", ["rejected.jsonl", "reward_model_full.jsonl", "tasks/reward_model_x.jsonl", "old.jsonl"]
)
def test_an_input_with_the_name_of_an_output_is_refused(data: Path, name: str) -> None:
    (data / "tasks").mkdir(parents=True)
    (data / "conversion_report.json").write_text('{"files": ["old.jsonl"], "entries": []}')
    source = write_rows(data / name, many_rows(tasks=5))
    before = source.read_bytes()
    with pytest.raises(DataError, match="would be overwritten by this conversion"):
        convert(Settings(inputs=(str(source),), output=data))
    assert source.read_bytes() == before
    convert(Settings(inputs=(str(source.rename(data / "mine.jsonl")),), output=data))


@pytest.mark.parametrize("report", ['{"files": 3}', '{"entries": {"a": 1}}', '{"files": [["a"]]}', "[]"])
def test_a_damaged_report_is_one_message(convert_rows: Convert, data: Path, report: str) -> None:
    data.mkdir()
    (data / "conversion_report.json").write_text(report)
    with pytest.raises(DataError, match=r"conversion_report\.json"):
        convert_rows(many_rows(tasks=3))


def test_from_python(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", many_rows(tasks=5))
    report = convert_from_python(source, tmp_path / "data", evaluation_types=["clip"], eval_ratio=0.4)
    assert report["variants"].keys() == {"reward_model_custom"}
    assert (tmp_path / "data" / "reward_model_custom.jsonl").exists()
    with pytest.raises(UsageError, match="no option frobnicate"):
        convert_from_python(source, tmp_path / "data", frobnicate=1)
