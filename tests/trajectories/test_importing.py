"""Files and folders: forms told apart, ids, bad input, and memory that does not grow with the file."""

import gzip
import json
import random
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from prmkit.errors import DataError, UsageError
from prmkit.prompts.step import load_rubric, step_prompts
from prmkit.trajectories.importing import FileReport, Options, read_runs
from prmkit.trajectories.readers import READERS, formats_of, record
from prmkit.trajectories.run import FieldNames
from prmkit.trajectory import Trajectory, dump, load
from tests.trajectories import (
    test_atif_and_tagged,
    test_benchmarks,
    test_labels,
    test_messages,
    test_sessions,
    test_spans,
)
from tests.trajectories.conftest import Read


def messages(task: str = "Go.", answer: str = "Done.") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": task}, {"role": "assistant", "content": answer}]}


EXAMPLES: dict[str, list[Any]] = {
    **{name: [value] for name, value in test_messages.DIALECTS.items()},
    **test_spans.FILES,
    **test_sessions.EXAMPLES,
    **test_benchmarks.EXAMPLES,
    **test_atif_and_tagged.EXAMPLES,
    **test_labels.EXAMPLES,
}
"""Files of every form, by a name of the form."""


def test_every_form_has_an_example() -> None:
    found = {form for values in EXAMPLES.values() for value in values for form in formats_of(value)}
    assert found == READERS.keys() - {record.READER.name}  # the project's own form


ATIF = {"schema_version": "ATIF-v1.7", "agent": {}, "session_id": "s",
        "steps": [{"source": "user", "message": "Go."}, {"source": "agent", "message": "Done."}]}  # fmt: skip


def test_a_folder_of_several_forms_with_every_other_file_named(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.jsonl").write_text(json.dumps(messages()) + "\n")
    (tmp_path / "deep" / "b.json").write_text(json.dumps(ATIF, indent=1))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(json.dumps(messages("Other.")).encode()))
    (tmp_path / "notes.md").write_text("# Notes")
    (tmp_path / "picture.json").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "log.eval").write_bytes(b"PK\x03\x04...")
    (tmp_path / "settings.json").write_text('{"model": "x"}')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / ".hidden.jsonl").write_text(json.dumps(messages()))
    reports: list[FileReport] = []
    runs = list(read_runs([tmp_path], reports=reports))
    assert [run.source["file"] for run in runs] == ["a.jsonl", "c.jsonl.gz", "b.json"]
    passed_over = {Path(report.file).name: report.passed_over for report in reports if report.passed_over}
    named = {"notes.md", "picture.json", "log.eval", "settings.json", "empty.jsonl", ".hidden.jsonl"}
    assert set(passed_over) == named
    assert "binary" in str(passed_over["picture.json"]) and "zip" in str(passed_over["log.eval"])


def test_a_named_file_is_read_or_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text('{"model": "x"}')
    with pytest.raises(DataError, match="unknown format of runs"):
        list(read_runs([path]))
    with pytest.raises(DataError, match="no such file"):
        list(read_runs([tmp_path / "none.json"]))


def test_rows_of_judges_are_sent_to_the_conversion() -> None:
    with pytest.raises(DataError, match="convert_dataset"):
        list(read_runs(["finetune.jsonl"]))


def test_two_forms_in_one_file_are_ambiguous(read: Read) -> None:
    observation = {"id": "o", "traceId": "t", "type": "GENERATION", "input": "x", "output": "y"}
    with pytest.raises(UsageError, match=r"matches atif \(line 1\) and langfuse \(line 2\).*--format"):
        read(ATIF, observation)
    (run,) = read(ATIF, observation, format="atif")
    assert run.steps[0].text == "Done."
    with pytest.raises(UsageError, match="Known: trajectories"):
        read(ATIF, format="nonsense")


def test_a_line_of_another_form_after_the_first_ones_is_counted(read: Read, reports: list[FileReport]) -> None:
    runs = read(*[messages()] * 30, {"no": "run"}, [1], messages())
    assert len(runs) == 31
    assert reports[0].unreadable == {"does not match the format messages": 2}
    assert reports[0].examples["does not match the format messages"] == [31, 32]


@pytest.mark.parametrize("damage", ['{"messages": [{"role"', "\x01", "nonsense", '{"messages": 3}', "[]", "null", "7"])
def test_a_damaged_line_costs_that_line(read: Read, reports: list[FileReport], damage: str) -> None:
    assert len(read(messages(), damage, messages())) == 2
    assert reports[0].unreadable.total() == 1 and next(iter(reports[0].examples.values())) == [2]


def test_a_first_line_that_is_damaged_costs_that_line(read: Read, reports: list[FileReport]) -> None:
    assert len(read('{"messages": [{"role', messages(), messages())) == 2
    assert reports[0].unreadable.total() == 1


def test_one_document_that_breaks_off_is_an_error(tmp_path: Path) -> None:
    whole = json.dumps([messages(), messages()], indent=2)
    (tmp_path / "cut.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="ends early"):
        list(read_runs([tmp_path / "cut.json"]))


ONE_RUN = {
    "tau-bench": {"task_id": 3, "reward": 1.0, "info": {"task": {}}, "traj": messages()["messages"]},
    "swe-agent": {"trajectory": [{"action": "ls", "observation": "x"}]},
    "atif": ATIF,
    "messages": messages(),
}


@pytest.mark.parametrize("form", ONE_RUN)
def test_named_fields_are_read_next_to_a_run_of_any_form(read: Read, form: str) -> None:
    beside = {"case": "c-9", "won": False, "marks": [0.5]}
    (run,) = read(
        ONE_RUN[form] | beside, keys=FieldNames(task="case", outcome="won", labels=None if "swe" in form else "marks")
    )
    assert run.source["format"] == form
    assert (run.task_id, run.outcome) == ("c-9", {"success": False, "score": None})
    if "swe" not in form:  # its steps have places of their own
        assert run.steps[0].label and run.steps[0].label.value == 0.5


@pytest.mark.parametrize("form", ONE_RUN)
def test_a_named_field_that_is_missing_costs_the_run(read: Read, reports: list[FileReport], form: str) -> None:
    for keys in (FieldNames(task="nosuch"), FieldNames(outcome="nosuch"), FieldNames(labels="nosuch")):
        assert read(ONE_RUN[form], keys=keys) == []
        assert reports[-1].unreadable.total() == 1


@pytest.mark.parametrize(
    ("name", "flag", "keys"),
    [
        *(
            (form, "--task-key", FieldNames(task="x"))
            for form in ("otel", "langsmith", "langfuse", "claude-code", "codex")
        ),
        ("swe-agent", "--list-key", FieldNames(messages="history")),
        ("tau-bench", "--list-key", FieldNames(messages="messages")),
        ("otel", "--list-key and --outcome-key", FieldNames(messages="x", outcome="y")),
    ],
)
def test_field_names_that_a_form_cannot_use_are_refused(read: Read, name: str, flag: str, keys: FieldNames) -> None:
    values = next(values for values in EXAMPLES.values() if formats_of(values[0]) == [name])
    with pytest.raises(DataError, match=rf"{flag} cannot be used with runs of the format {name}"):
        read(*values, keys=keys)


def test_field_names_for_several_runs_in_one_value_are_refused(read: Read, reports: list[FileReport]) -> None:
    simulations = [{"task_id": number, "messages": messages()["messages"]} for number in (1, 2)]
    assert read({"simulations": simulations, "case": "c"}, keys=FieldNames(task="case")) == []
    assert "several runs" in next(iter(reports[0].unreadable))


def test_fields_of_atif_have_their_place_or_are_counted(read: Read) -> None:
    (run,) = read(ATIF | {"reward": 0.0, "notes": "cold", "extra": {"x": 1}, "continued_trajectory_ref": "next.json"})
    assert run.outcome == {"success": None, "score": 0.0}
    assert run.lost == {"field notes": 1, "field extra": 1}
    assert not run.steps[-1].last  # the next file has it


def test_files_of_a_folder_without_a_run_are_named(tmp_path: Path) -> None:
    span = {"name": "chat", "trace_id": "t", "attributes": {"gen_ai.operation.name": "chat"}}
    (tmp_path / "a.json").write_text(json.dumps(span))
    (tmp_path / "b.json").write_text(json.dumps({"simulations": []}))
    (tmp_path / "c.json").write_text(json.dumps(messages()))
    reports: list[FileReport] = []
    assert len(list(read_runs([tmp_path], reports=reports))) == 1
    found = {Path(report.file).name: report.passed_over for report in reports}
    assert "message content" in str(found["a.json"]) and "contains no run" in str(found["b.json"])
    assert found["c.json"] is None


@pytest.mark.parametrize("keep_secrets", [True, False])
def test_arguments_that_are_nested_too_deeply_cost_their_run(
    read: Read, reports: list[FileReport], keep_secrets: bool
) -> None:
    def calling(depth: int) -> str:
        call = f'{{"id": "a", "function": {{"name": "f", "arguments": {"[" * depth}{"]" * depth}}}}}'
        return (
            f'{{"messages": [{{"role": "user", "content": "Go."}}, {{"role": "assistant", "tool_calls": [{call}]}}]}}'
        )

    assert len(read(calling(40), calling(700), calling(40), keep_secrets=keep_secrets)) == 2
    assert reports[0].unreadable == {"arguments that are nested too deeply to be written": 1}
    assert list(reports[0].examples.values()) == [[2]]


def test_a_run_without_steps_is_counted(read: Read, reports: list[FileReport]) -> None:
    read(messages(), {"messages": [{"role": "user", "content": "Hello?"}, {"role": "user", "content": "Anybody?"}]})
    assert reports[0].unreadable == {"run without a step of the agent": 1}


def test_ids_follow_the_source_and_are_unique(read: Read) -> None:
    runs = read(
        messages("Find   X."), messages("find x."), messages() | {"task_id": "t"}, messages() | {"task_id": "t"},
        messages() | {"id": "r"}, messages() | {"id": "r"},
    )  # fmt: skip
    names = [run.trajectory_id for run in runs]
    assert runs[0].task_id == runs[1].task_id and runs[0].task_id.startswith("task-")
    assert names[:4] == [f"{runs[0].task_id}.1", f"{runs[0].task_id}.2", "t.1", "t.2"]
    assert names[4:] == ["r", "r~2"]


def test_strange_characters_and_missing_numbers_are_read(read: Read) -> None:
    (cut,) = read(
        '{"messages": [{"role": "user", "content": "\\ud83d"}, {"role": "assistant", "content": "x"}], "score": NaN}'
    )
    assert cut.task == "?"
    assert json.loads(dump(cut))["outcome"] is None


def test_a_result_of_200_000_words_is_read_whole(read: Read) -> None:
    call = {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}"}}]}
    result = {"role": "tool", "tool_call_id": "c", "content": "word " * 200_000}
    (run,) = read({"messages": [{"role": "user", "content": "Go."}, call, result]})
    assert len(run.steps[0].results[0].text) == 1_000_000


def test_records_are_read_back_as_they_were(read: Read, tmp_path: Path) -> None:
    first = read(messages() | {"reward": 1, "answer": "x"}, messages("Other."))
    path = tmp_path / "trajectories.jsonl"
    path.write_bytes(b"".join(map(dump, first)))
    assert list(read_runs([path])) == first
    assert [load(json.loads(line), "") for line in path.read_bytes().splitlines()] == first


def test_a_damaged_record_is_counted(tmp_path: Path, read: Read) -> None:
    (run,) = read(messages())
    value = json.loads(dump(run))
    path = tmp_path / "t.jsonl"
    broken = [value | {"task": 3}, value | {"steps": [value["steps"][0] | {"label": {"value": 7}}]}]
    path.write_text("\n".join(map(json.dumps, [value, *broken])))
    reports: list[FileReport] = []
    assert len(list(read_runs([path], reports=reports))) == 1
    assert reports[0].unreadable.total() == 2


ATOMS: list[Any] = [None, True, 3, -1.5, "", "x", "7", [], {}, [None], [[]], {"role": 5}, {"type": "tool_use"}, "{]"]


def mutated(value: Any, draw: random.Random) -> Any:
    """The value with something else in one random place."""
    if isinstance(value, dict | list) and value and draw.random() < 0.85:
        key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
        copy = dict(value) if isinstance(value, dict) else list(value)
        copy[key] = mutated(value[key], draw)  # type: ignore[call-overload,index]
        return copy
    return draw.choice(ATOMS)


@pytest.mark.parametrize("form", EXAMPLES)
def test_damage_inside_gives_a_run_or_a_count_and_never_a_traceback(read: Read, form: str) -> None:
    draw, rubric = random.Random(form), load_rubric()
    values = EXAMPLES[form]
    (undamaged, *_) = read(*values)
    for _ in range(60):
        damaged = [mutated(value, draw) if draw.random() < 0.5 else value for value in values]
        for options in ({"format": undamaged.source["format"]}, {}):
            with suppress(DataError, UsageError):
                for run in read(*damaged, **options):
                    dump(run)
                    list(step_prompts(run, rubric))


def test_damaged_records_are_a_run_or_a_count(read: Read) -> None:
    draw, rubric = random.Random(7), load_rubric()
    records = [json.loads(dump(run)) for run in read(*test_messages.DIALECTS.values())]
    for _ in range(100):
        with suppress(DataError):
            for run in read(*(mutated(mutated(record, draw), draw) for record in records), format="trajectories"):
                dump(run)
                list(step_prompts(run, rubric))


def test_memory_does_not_grow_with_the_number_of_lines(tmp_path: Path) -> None:
    peaks = []
    for count in (100, 1_000):
        path = tmp_path / f"{count}.jsonl"
        line = json.dumps(messages("word " * 50, "word " * 50)) + "\n"
        path.write_text(line * count)
        tracemalloc.start()
        assert sum(1 for _ in read_runs([path])) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 900 * 400  # ids; a run takes 3,000 bytes


def test_options_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        next(read_runs([tmp_path / "none"], Options(format="nonsense")))


def test_links_and_what_is_hidden_are_named_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.jsonl").write_text(json.dumps(messages()))
    inside = tmp_path / "runs"
    inside.mkdir()
    (inside / "a.jsonl").write_text(json.dumps(messages()))
    (inside / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    (inside / "more").symlink_to(tmp_path)
    (inside / ".git").mkdir()
    for name in ("x.json", "y.json"):
        (inside / ".git" / name).write_text("{}")
    reports: list[FileReport] = []
    runs: list[Trajectory] = list(read_runs([inside], reports=reports))
    assert [run.source["file"] for run in runs] == ["a.jsonl"]
    passed_over = [Path(report.file).name for report in reports if report.passed_over]
    assert passed_over == [".git", "link.jsonl", "more"]
