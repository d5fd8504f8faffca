"""The raw runs that ship: the generator's bytes, and readable by the importer."""

import json
from pathlib import Path

import pytest

from prmkit.trajectories.importing import Options, read_runs
from prmkit.trajectories.run import FieldNames
from tools.make_sample.runs import ATTEMPTS, EXAMPLE_TASKS, LABELLED_TASKS, message_runs, write_examples
from tools.make_sample.runs import main as runs_command
from tools.make_sample.sample import write_rows

EXAMPLES = ("runs.jsonl", "session.jsonl", "trace.json")


def test_the_runs_that_ship_are_what_the_generator_makes(root: Path, tmp_path: Path) -> None:
    write_examples(tmp_path)
    for name in (*EXAMPLES, "labelled_runs.jsonl"):
        assert (tmp_path / name).read_bytes() == (root / "examples" / name).read_bytes()


def test_without_a_number_of_tasks_the_labelled_runs_are_those_that_ship(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["runs", "--labelled", str(tmp_path / "runs.jsonl")])
    assert runs_command() == 0
    assert (tmp_path / "runs.jsonl").read_bytes() == (root / "examples" / "labelled_runs.jsonl").read_bytes()


def test_the_runs_that_ship_are_read_without_loss(root: Path) -> None:
    runs = list(read_runs([root / "examples" / name for name in EXAMPLES]))
    assert [run.source["format"] for run in runs] == ["messages"] * EXAMPLE_TASKS * ATTEMPTS + ["claude-code", "otel"]
    assert all(run.steps[-1].text and not run.lost for run in runs)
    assert all(run.outcome and run.reference for run in runs[:-2])


def test_attempts_at_a_task_share_the_task_alone(root: Path) -> None:
    first, second = list(message_runs(0, 1))
    assert first["messages"][:2] == second["messages"][:2] and first["messages"] != second["messages"]


def test_labelled_runs_have_a_label_for_every_step(tmp_path: Path) -> None:
    path = tmp_path / "labelled.jsonl"
    write_rows(path, message_runs(0, 20, labelled=True))
    runs = list(read_runs([path], Options(keys=FieldNames(labels="labels"))))
    assert len(runs) == 20 * ATTEMPTS
    assert all(step.label is not None for run in runs for step in run.steps)
    given = [label for line in path.read_text().splitlines() for label in json.loads(line)["labels"]]
    assert given == [step.label.value for run in runs for step in run.steps if step.label]


def test_the_demo_draws_a_run_that_it_was_not_trained_on(root: Path) -> None:
    labelled = list(read_runs([root / "examples" / "labelled_runs.jsonl"], Options(keys=FieldNames(labels="labels"))))
    drawn = list(read_runs([root / "examples" / name for name in EXAMPLES]))
    assert len(labelled) == LABELLED_TASKS * ATTEMPTS
    assert {run.task_id for run in drawn}.isdisjoint(run.task_id for run in labelled)
    assert {run.task for run in drawn}.isdisjoint(run.task for run in labelled)
