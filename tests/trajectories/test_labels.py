"""Labels that people gave: public sets, columns, steps of records; and the rows that are made of them."""

import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from prmkit.errors import DataError, UsageError
from prmkit.evaluation.exam_report import PUBLISHED
from prmkit.prompts.step import load_rubric, step_prompts
from prmkit.trajectories.importing import FileReport, Options, read_runs
from prmkit.trajectories.labels import SETS
from prmkit.trajectories.readers import READERS
from prmkit.trajectories.rows import labelled_rows, rows_of
from prmkit.trajectories.run import FieldNames
from prmkit.trajectory import Trajectory, dump, holds_records
from prmkit.verdict import Verdict, asked_shape, read_verdict
from tests.trajectories.conftest import Read

ROOT = Path(__file__).resolve().parents[2]
GOOD, NEUTRAL, BAD = 1.0, 0.6, 0.2

EXAMPLES: dict[str, list[Any]] = {
    "who-and-when": [{
        "question": "How many?", "question_ID": "q-1", "ground_truth": "8", "is_correct": False,
        "mistake_agent": "Solver", "mistake_step": "1", "mistake_reason": "miscounted",
        "history": [
            {"name": "Planner", "role": "assistant", "content": "Count them."},
            {"name": "Solver", "role": "user", "content": "Nine."},
            {"name": "Planner", "role": "assistant", "content": "Nine it is."},
        ]}],
    "who-and-when by hand": [{
        "question": "How many?", "ground_truth": "8", "mistake_agent": "WebSurfer", "mistake_step": "2",
        "history": [
            {"role": "human", "content": "How many?"},
            {"role": "Orchestrator (thought)", "content": "Look it up."},
            {"role": "WebSurfer", "content": "I clicked."},
            {"role": "WebSurfer", "content": "Again."},
        ]}],
    "trajectory-judge": [
        {"trajectory_id": "i-1-x", "instance_id": "i-1", "goal": "Refund.", "final_answer": "Done.",
         "steps": [
             {"index": number, "thought": f"thought {number}", "call": {"tool": "look", "args": {"n": number}},
              "observation": {"ok": number != 1, "data": {}, "error": None}} for number in range(3)],
         "label": {"faulty": True, "failure_step": 1, "failure_type": "wrong_tool", "outcome_correct": True}},
        {"trajectory_id": "i-1-clean", "instance_id": "i-1", "goal": "Refund.", "final_answer": "Done.",
         "steps": [{"index": 0, "thought": "Done.", "call": None, "observation": None}],
         "label": {"faulty": False, "failure_step": None, "failure_type": None, "outcome_correct": True}},
    ],
    "agentprocessbench": [{
        "question": "Where?", "query_index": 4, "sample_index": 2, "data_source": "places",
        "ground_truth": {"target": ["SOLUTION"]}, "final_label": -1,
        "tools": [{"name": "search", "description": "Find."}],
        "messages": [
            {"role": "system", "content": "Search."}, {"role": "user", "content": "Where?"},
            {"role": "assistant", "content": "Let me see.", "tool_calls": [
                {"id": "c", "function": {"name": "search", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "c", "content": "there"},
            {"role": "assistant", "content": "Hm."}, {"role": "assistant", "content": "There."}],
        "step_labels": {"2": 1, "4": 0, "5": -1}}],
    "prmbench": [{
        "idx": "circular_1", "question": "1+1?", "modified_question": "1+1 = ?", "classification": "circular",
        "original_process": ["1. Two."], "modified_process": ["1. Assume 2.", "2. So 2.", "3. Indeed.", "4. 2."],
        "modified_steps": [2, 3], "error_steps": [2, 4], "reason": "circular"}],
    "agentrx": [{
        "trajectory_id": "r-1", "instruction": "Fix it.",
        "steps": [
            {"index": 1, "substeps": [{"sub_index": 1, "role": "user", "content": "Fix it."}]},
            {"index": 2, "substeps": [{"sub_index": 1, "role": "Surfer", "content": "I click."}]},
            {"index": 3, "substeps": [{"sub_index": 1, "role": "assistant", "content": "I call."},
                                      {"sub_index": 2, "role": "tool", "content": "404"}]},
            {"index": 4, "substeps": [{"sub_index": 1, "role": "Surfer", "content": "Done."}]}]}],
}  # fmt: skip


def labels(run: Trajectory) -> list[float | None]:
    return [step.label.value if step.label else None for step in run.steps]


def test_every_set_is_named_everywhere() -> None:
    """In `SETS`, which help and messages show; by its reader; in the README. Published judges are of these sets."""
    modules = [path.stem for path in (ROOT / "prmkit" / "trajectories" / "labels").glob("[!_]*.py")]
    readers = [import_module(f"prmkit.trajectories.labels.{name}").READER for name in modules]
    assert sorted(reader.name for reader in readers) == sorted(SETS)
    assert all(READERS.get(reader.name) is reader for reader in readers)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (listed,) = re.findall(r"`--labels` accepts\s([^.]*), or `column`", readme)
    assert re.findall(r"`([\w-]+)`", listed) == list(SETS)
    assert yaml.safe_load(PUBLISHED.read_text(encoding="utf-8")).keys() <= {*SETS}


def test_rows_of_labels_keep_the_order_of_their_metadata(read: Read) -> None:
    """The same labels give the same bytes, whatever version of prmkit wrote them."""
    row = next(rows_of(read(*EXAMPLES["who-and-when"])[0], load_rubric()))
    assert list(row["metadata"])[:8] == [
        "model_name", "provider", "evaluation_type", "category", "timestamp", "task_id", "trajectory_id", "clip_number",
    ]  # fmt: skip


def test_who_and_when(read: Read) -> None:
    """Before the mistake is right, the mistake is wrong, and nothing is known of what follows."""
    (run,) = read(*EXAMPLES["who-and-when"])
    assert labels(run) == [GOOD, BAD, None]
    assert [step.agent for step in run.steps] == ["Planner", "Solver", "Planner"]
    assert (run.task, run.task_id, run.reference) == ("How many?", "q-1", "8")
    (run,) = read(*EXAMPLES["who-and-when by hand"])
    assert labels(run) == [GOOD, BAD, None]
    assert [step.source_index for step in run.steps] == [1, 2, 3]


def test_a_mistake_outside_the_run_is_counted(read: Read, reports: list[FileReport]) -> None:
    assert read(EXAMPLES["who-and-when"][0] | {"mistake_step": "9"}) == []
    assert "mistake_step" in next(iter(reports[0].unreadable))


def test_trajectory_judge(read: Read) -> None:
    faulty, clean = read(*EXAMPLES["trajectory-judge"])
    assert (labels(faulty), labels(clean)) == ([GOOD, BAD, None], [GOOD])
    assert faulty.steps[1].label and faulty.steps[1].label.type == "wrong_tool"
    assert faulty.task_id == clean.task_id == "i-1" and faulty.trajectory_id == "i-1-x"
    assert [step.results[0].error for step in faulty.steps] == [False, True, False]


def test_agent_process_bench(read: Read) -> None:
    (run,) = read(*EXAMPLES["agentprocessbench"])
    assert labels(run) == [GOOD, NEUTRAL, BAD]
    assert (run.task_id, run.trajectory_id, run.reference) == ("places_4", "places_4.2", '["SOLUTION"]')
    assert run.outcome == {"success": False, "score": None}


def test_prmbench(read: Read) -> None:
    """Two errors: both are labelled, and what stands between them is not."""
    (run,) = read(*EXAMPLES["prmbench"])
    assert labels(run) == [GOOD, BAD, None, BAD]
    assert run.task == "1+1 = ?" and run.steps[1].label and run.steps[1].label.type == "circular"


def test_agentrx_joins_failures_that_stand_in_another_file(tmp_path: Path) -> None:
    """Failures count messages from 1, and one may be on a message that is not a step."""
    failures = [{"failure_id": "1", "step_number": number, "failure_category": kind, "failed_agent": "Surfer"}
                for number, kind in ((1, "System Failure"), (3, "Invalid Invocation"))]  # fmt: skip
    (tmp_path / "marks.jsonl").write_text(json.dumps({"trajectory_id": "r-1", "failures": failures[1:]}))
    (tmp_path / "runs.jsonl").write_text(json.dumps(EXAMPLES["agentrx"][0]))
    (run,) = read_runs([tmp_path], Options(labels="agentrx"))
    assert labels(run) == [GOOD, BAD, None]
    assert run.steps[1].label and run.steps[1].label.type == "invalid call"
    assert [result.text for result in run.steps[1].results] == ["404"]
    (tmp_path / "marks.jsonl").write_text(json.dumps({"trajectory_id": "r-1", "failures": failures}))
    (run,) = read_runs([tmp_path], Options(labels="agentrx"))
    assert labels(run) == [None, BAD, None]
    assert run.lost["labels on messages that are not steps"] == 1
    with pytest.raises(DataError, match="labels of agentrx"):
        list(read_runs([tmp_path / "runs.jsonl"], Options(labels="agentrx")))


def test_agentrx_with_runs_of_tau_bench(tmp_path: Path) -> None:
    traj = [{"role": "user", "content": "Hi.", "index": 1}, {"role": "assistant", "content": "Yes?", "index": 2}]
    value = {"task_id": 104, "info": {}, "reward": 0, "traj": traj}
    (tmp_path / "104.json").write_text(json.dumps(value))
    marks = [{"trajectory_id": "104", "failures": [{"step_number": 2, "failure_category": "System Failure"}]}]
    (tmp_path / "truth.json").write_text(json.dumps(marks, indent=1))
    (run,) = read_runs([tmp_path], Options(labels="agentrx"))
    assert labels(run) == [BAD]


COLUMN = {"messages": [{"role": "user", "content": "Go."}, {"role": "assistant", "content": "One."},
                       {"role": "user", "content": "On."}, {"role": "assistant", "content": "Two."}]}  # fmt: skip


@pytest.mark.parametrize(
    ("given", "scale", "expected"),
    [
        ([1, 0.25], "unit", [1.0, 0.25]),
        ([True, False], "unit", [1.0, 0.0]),
        ([None, 0], "unit", [None, 0.0]),
        ([1, -1], "ternary", [GOOD, BAD]),
        ({"3": 0}, "ternary", [None, NEUTRAL]),
    ],
)
def test_a_column_of_labels(read: Read, given: Any, scale: str, expected: list[float | None]) -> None:
    (run,) = read(COLUMN | {"marks": given}, keys=FieldNames(labels="marks", label_scale=scale))
    assert labels(run) == expected


def test_a_zero_beside_minus_one_is_not_read_as_wrong(tmp_path: Path) -> None:
    """Reading only the runs without -1 would make rows of neutral steps that are called wrong."""
    runs = [COLUMN | {"marks": marks} for marks in ([1, 0], [1, -1])]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
    with pytest.raises(UsageError, match="--label-scale ternary"):
        list(read_runs([tmp_path / "runs.jsonl"], Options(keys=FieldNames(labels="marks"))))


@pytest.mark.parametrize(
    ("marks", "scale", "message"),
    [
        ([3, 5], "unit", r"a label is 3, .*\(label - 1\) / 4"),
        ({"3": 85}, "unit", "a label is 85, "),
        ([-0.5, 1], "unit", "a label is -0.5, "),
        ([1, 0.5], "ternary", "a label is 0.5, .*ternary"),
        ([1, 2, 3], "unit", "a label is 2, "),
    ],
)
def test_a_label_off_the_scale_stops_the_import(tmp_path: Path, marks: Any, scale: str, message: str) -> None:
    """Reading only the other runs would make the best label of the worst one: a 1 on a scale from 1 to 5."""
    runs = [COLUMN | {"marks": given} for given in ([1, 1], marks)]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
    with pytest.raises(UsageError, match=message):
        list(read_runs([tmp_path / "runs.jsonl"], Options(keys=FieldNames(labels="marks", label_scale=scale))))


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        ({"score": 2}, None),
        ({"score": 100}, None),
        ({"score": -1}, None),
        ({"score": 1}, True),
        ({"score": 0.5}, False),
        ({"success": True}, True),
        ({}, None),
    ],
)
def test_an_outcome_on_another_scale_is_unknown_in_rows_too(
    read: Read, outcome: dict[str, Any], expected: bool | None
) -> None:
    (run,) = read(COLUMN | {"marks": [1, 1]} | outcome, keys=FieldNames(labels="marks"))
    rows = list(rows_of(run, load_rubric()))
    assert [row["metadata"]["succeeded"] for row in rows] == [expected] * 2


def test_an_outcome_is_read_under_its_own_name_or_counted(read: Read) -> None:
    assert read(COLUMN | {"outcome": 1})[0].outcome == {"success": None, "score": 1.0}
    (run,) = read(COLUMN | {"outcome": "it went well"})
    assert run.outcome is None and run.lost["field outcome"] == 1


@pytest.mark.parametrize("given", [[1], [1, 1, 1], None, ["1", "5"], ["good", "bad"], 3])
def test_a_column_that_does_not_fit_is_counted(read: Read, reports: list[FileReport], given: Any) -> None:
    assert read(COLUMN | {"marks": given}, keys=FieldNames(labels="marks")) == []
    assert reports[0].unreadable.total() == 1


def test_labelled_steps_become_rows_with_the_prompts_that_scoring_makes(read: Read) -> None:
    rubric = load_rubric()
    (run,) = read(*EXAMPLES["agentprocessbench"])
    rows = list(rows_of(run, rubric))
    assert [row["conversations"][0]["value"] for row in rows] == [prompt.text for prompt in step_prompts(run, rubric)]
    for row, value in zip(rows, [GOOD, NEUTRAL, BAD], strict=True):
        prompt, answer = (turn["value"] for turn in row["conversations"])
        verdict = read_verdict(answer, asked_shape(prompt))
        assert isinstance(verdict, Verdict) and verdict.scores == {"step_score": value}
        assert "SOLUTION" not in prompt
    assert [row["metadata"]["clip_number"] for row in rows] == [1, 2, 3]
    assert [row["metadata"]["source_index"] for row in rows] == [2, 4, 5]
    shared = {"model_name": "human", "provider": "agentprocessbench", "task_id": "places_4",
              "trajectory_id": "places_4.2", "evaluation_type": "clip", "rubric": rubric.sha256}  # fmt: skip
    assert all(shared.items() <= row["metadata"].items() for row in rows)


def test_steps_without_a_label_give_no_row_and_types_are_not_invented(read: Read) -> None:
    (run,) = read(*EXAMPLES["who-and-when"])
    answers = [json.loads(row["conversations"][1]["value"]) for row in rows_of(run, load_rubric())]
    assert answers == [{"step_score": 1.0, "error_type": "none"}, {"step_score": 0.2}]


def test_a_rubric_of_several_keys_cannot_be_filled_from_one_label(read: Read, tmp_path: Path) -> None:
    import yaml

    from prmkit.prompts.step import DEFAULT_RUBRIC

    content = yaml.safe_load(DEFAULT_RUBRIC.read_text()) | {"keys": ["progress", "safety"]}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(content))
    (run,) = read(*EXAMPLES["prmbench"])
    with pytest.raises(UsageError, match="progress, safety"):
        list(rows_of(run, load_rubric(tmp_path / "two.yaml")))


def test_labelled_records_are_rows_and_unlabelled_ones_an_error(read: Read, tmp_path: Path) -> None:
    rubric = load_rubric()
    runs = [run for form in ("prmbench", "trajectory-judge") for run in read(*EXAMPLES[form])]
    path = tmp_path / "trajectories.jsonl"
    path.write_bytes(b"".join(map(dump, runs)))
    assert holds_records(path)
    assert list(labelled_rows(path, rubric)) == [row for run in runs for row in rows_of(run, rubric)]
    assert not holds_records(tmp_path / "runs.json")


def test_records_without_a_label_are_an_error(read: Read, tmp_path: Path) -> None:
    (run,) = read({"messages": [{"role": "user", "content": "Go."}, {"role": "assistant", "content": "Done."}]})
    path = tmp_path / "trajectories.jsonl"
    path.write_bytes(dump(run))
    with pytest.raises(DataError, match="no step of these runs has a label"):
        list(labelled_rows(path, load_rubric()))


@pytest.mark.parametrize(
    ("given", "expected", "lost"),
    [
        ({"success": False, "score": 0.9}, {"success": False, "score": 0.9}, {}),
        ({"reward": 1.0, "score": 0.9}, {"success": None, "score": 1.0}, {"field score": 1}),
        ({"metadata": '{"reward": 1}'}, {"success": None, "score": 1.0}, {}),
        ({"reward": 10**400}, None, {"field reward": 1}),
    ],
)
def test_no_outcome_is_dropped_without_a_count(read: Read, given: Any, expected: Any, lost: dict[str, int]) -> None:
    (run,) = read(COLUMN | {"marks": [1, 1]} | given, keys=FieldNames(labels="marks"))
    assert run.outcome == expected and run.lost == lost


@pytest.mark.parametrize("given", ["yes", [1], {"score": 1}])
def test_an_outcome_key_with_something_else_is_counted(read: Read, given: Any) -> None:
    (run,) = read(COLUMN | {"marks": [1, 1], "won": given}, keys=FieldNames(labels="marks", outcome="won"))
    assert run.outcome is None and run.lost == {"field won": 1}


def test_a_label_of_400_digits_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "runs.jsonl").write_text(json.dumps(COLUMN | {"marks": [1, 10**400]}) + "\n")
    reports: list[FileReport] = []
    assert not list(read_runs([tmp_path / "runs.jsonl"], Options(keys=FieldNames(labels="marks")), reports))
    assert reports[0].unreadable.total() == 1


def test_the_errors_of_a_runs_own_id_come_before_those_of_another(read: Read) -> None:
    """Ids may have a prefix, so "airline_7" has the errors of "7"; but not a run that has its own."""
    steps = [{"index": index, "substeps": [{"role": "agent", "content": f"Step {index}."}]} for index in (1, 2)]
    own = [f"{name}_7" for name in "abcdefgh"]
    runs = [{"trajectory_id": name, "instruction": name, "steps": steps} for name in ("7", "airline_7", *own)]
    failures = [{"trajectory_id": name, "failures": [{"step_number": 2 if name in own else 1}]} for name in ("7", *own)]
    first = [run.steps[0].label for run in read(*runs, *failures, labels="agentrx")]
    assert [label and label.value for label in first] == [BAD, BAD, *[GOOD] * len(own)]
