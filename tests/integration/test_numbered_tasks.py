"""A task has one name, however pipelines write its number: 7.0, 7 and "7" are one task, and 0 is a task."""

import importlib
import json
import random
from pathlib import Path
from typing import Any

import exam_fixtures as public
import pytest
from registry_fixtures import make_run

from prmkit import registered
from prmkit.dataset.conversion import convert
from prmkit.dataset.leaks import audit, audit_folder
from prmkit.dataset.settings import Settings, Split
from prmkit.dataset_info import read_entries
from prmkit.errors import DataError, ExitCode, UsageError
from prmkit.evaluation.command import execute
from prmkit.evaluation.exam import check_not_trained_on, read_exam
from prmkit.evaluation.exam_answers import read_exam_answers
from prmkit.evaluation.heldout import read_held_out
from prmkit.registry.batch import (
    HELD_OUT,
    TRAINING,
    Job,
    Retraining,
    check_sides,
    convert_all,
    describe_batch,
    tasks_in,
)
from prmkit.registry.monitor import read_outcomes, read_scored
from prmkit.registry.versions import Addition, add_version
from prmkit.training.checks import Status
from prmkit.training.data_checks import check_held_out
from prmkit.trajectories.importing import FileReport, read_runs
from tests.dataset.conftest import prompt_of, read_lines, row_of

evaluate_parser = importlib.import_module("evaluate_judge")._parser

WRITTEN: tuple[Any, ...] = (0, 7.0, 7, "7", 8, 9.0)
"""What stands in the rows for the tasks 0, 7, 8 and 9."""
NAMES = {"0", "7", "8", "9"}


def rows(word: str = "look", clips: int = 3, written: tuple[Any, ...] = WRITTEN) -> list[dict[str, Any]]:
    """Rows of several steps a task; those of 7.0, 7 and "7" are different steps of one."""
    found = []
    for place, task in enumerate(written):
        for clip in range(clips):
            score = random.Random(f"{place}:{clip}").choice([0.1, 0.5, 0.9])
            row = row_of(prompt_of(f"{word} {place} {clip}"), score=score)
            row["metadata"] |= {"task_id": task, "trajectory_id": f"{word} {place}", "clip_number": clip}
            found.append(row)
    return found


def converted(folder: Path, values: list[dict[str, Any]], held_out: list[str], name: str = "data") -> Path:
    source = public.write_lines(folder / f"{name}.jsonl", values)
    convert(Settings((str(source),), folder / name, split=Split(tasks=tuple(held_out))))
    return folder / name


@pytest.mark.parametrize("task", ["7", "0"])
def test_conversion_evaluation_and_checks_see_one_task(tmp_path: Path, task: str) -> None:
    data = converted(tmp_path, rows(), [task])
    assert tasks_in(data, HELD_OUT) == {task} and tasks_in(data, TRAINING) == NAMES - {task}
    prompts = read_held_out(data, HELD_OUT).prompts
    assert {prompt.task for prompt in prompts} == {task}
    assert audit_folder(data)["held_out_tasks"] == 1
    found = check_held_out({"dataset": TRAINING, "eval_dataset": HELD_OUT, "dataset_dir": str(data)}, {})
    assert found.status is Status.OK and "from 1 task; no overlap with training" in found.found


@pytest.mark.parametrize(("held_out", "trained"), [(7.0, 7), ("7", 7.0), (0, "0"), (0.0, 0)])
def test_a_task_on_both_sides_is_found_however_it_is_written(tmp_path: Path, held_out: Any, trained: Any) -> None:
    data = tmp_path / "data"
    data.mkdir()
    entries = {}
    for name, task in ((TRAINING, trained), (HELD_OUT, held_out)):
        public.write_lines(data / f"{name}.jsonl", [{"instruction": name, "output": "x"}])
        traced = {"prompt_sha256": f"{len(name):064d}", "scores": {}, "metadata": {"task_id": task}}
        public.write_lines(data / f"{name}.meta.jsonl", [traced])
        entries[name] = {"file_name": f"{name}.jsonl"}
    (data / "dataset_info.json").write_text(json.dumps(entries))
    assert audit(list(read_entries(data).values()))["tasks_on_both_sides"] == 1
    found = check_held_out({"dataset": TRAINING, "eval_dataset": HELD_OUT, "dataset_dir": str(data)}, {})
    assert found.status is Status.ERROR and "1 task and 0 prompts" in found.found


# --- exams and best of N ----------------------------------------------------------------------------------------------


def labelled(task: Any, run: Any = None) -> dict[str, Any]:
    row = row_of(prompt_of(f"exam {task} {run}"), score=0.9)
    row["metadata"] |= {"task_id": task, "clip_number": 1, "provider": "exam"}
    row["metadata"] |= {} if run is None else {"trajectory_id": run}
    return row


def test_an_exam_and_its_answers_name_the_same_runs(tmp_path: Path) -> None:
    exam = read_exam(public.write_lines(tmp_path / "exam.jsonl", [labelled(0), labelled(7.0), labelled(8, 3.0)]))
    assert [(run.task_id, run.trajectory_id) for run in exam.runs] == [("0", "0"), ("7", "7"), ("8", "3")]
    answers = [{"trajectory_id": run, "step": 1, "score": 0.5} for run in (0, 7.0, 3)]
    (judge,) = read_exam_answers(public.write_lines(tmp_path / "a.jsonl", answers), exam.runs, exam.file)
    assert judge.scores.keys() == {("0", 1), ("7", 1), ("3", 1)}


@pytest.mark.parametrize(("trained", "examined"), [(7.0, "7"), (7, 7.0), (0, "0"), ("0", 0)])
def test_a_task_of_the_exam_that_was_trained_on_is_refused(tmp_path: Path, trained: Any, examined: Any) -> None:
    data = converted(tmp_path, rows(written=(trained, 8, 9)), ["9"])
    exam = read_exam(public.write_lines(tmp_path / "exam.jsonl", [labelled(examined)]))
    with pytest.raises(UsageError, match="trained on 1 of these 1 tasks"):
        check_not_trained_on(exam, {"dataset": TRAINING}, data)
    free = read_exam(public.write_lines(tmp_path / "exam.jsonl", [labelled(10.0), labelled("None")]))
    check_not_trained_on(free, {"dataset": TRAINING}, data)


def test_the_best_of_runs_of_numbered_tasks(tmp_path: Path) -> None:
    outcomes = [{"task_id": task, "trajectory_id": trial + 2 * place, "outcome": trial}
                for place, task in enumerate((0, 7.0)) for trial in range(2)]  # fmt: skip
    scores = [{"trajectory_id": float(run), "step": 1, "score": run % 2} for run in range(4)]
    typed = ["--best-of-n", public.write_lines(tmp_path / "outcomes.jsonl", outcomes), "--output", tmp_path / "out",
             "--predictions", public.write_lines(tmp_path / "scores.jsonl", scores)]  # fmt: skip
    assert execute(evaluate_parser().parse_args(list(map(str, typed)))) == ExitCode.DONE
    found = json.loads((tmp_path / "out" / "best_of_n.json").read_text())
    assert found["tasks"] == 2 and found["picks"]["judge: last"]["2"]["value"] == 1


def test_imported_runs_name_their_tasks_as_rows_do(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Go."}, {"role": "assistant", "content": "Done."}]
    tau = {"task_id": 7.0, "reward": 1.0, "info": {}, "traj": messages}
    values = [{"task_id": task, "messages": messages} for task in WRITTEN]
    runs = list(read_runs([public.write_lines(tmp_path / "runs.jsonl", values)]))
    assert [run.task_id for run in runs] == ["0", "7", "7", "7", "8", "9"]
    assert [run.task_id for run in read_runs([public.write_lines(tmp_path / "tau.jsonl", [tau])])] == ["7"]


def test_imported_runs_are_numbered_from_0(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Go."}, {"role": "assistant", "content": "Done."}]
    atif = {"schema_version": "ATIF-v1.4", "session_id": "s", "agent": {"name": "x"},
            "steps": [{"step_id": 1, "source": "agent", "message": "Done."}]}  # fmt: skip
    for place, values in enumerate((
        [{"trajectory_id": number, "messages": messages} for number in (0, 1.0, "2")],
        [{"task_id": 7, "id": number, "reward_info": {}, "messages": messages} for number in (0, 1.0, "2")],
        [atif | {"trajectory_id": number} for number in (0, 1.0, "2")],
    )):  # fmt: skip
        runs = read_runs([public.write_lines(tmp_path / f"{place}.jsonl", values)])
        assert [run.trajectory_id for run in runs] == ["0", "1", "2"], values[0]


@pytest.mark.parametrize("name", [True, 7.5, ["7"], {"$oid": "7"}])
def test_a_run_is_not_named_by_what_is_neither_text_nor_a_whole_number(name: Any, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Go."}, {"role": "assistant", "content": "Done."}]
    values = [{"task_id": task, "messages": messages} for task in (name, "good")]
    reports: list[FileReport] = []
    runs = list(read_runs([public.write_lines(tmp_path / "runs.jsonl", values)], None, reports))
    assert [run.task_id for run in runs] == ["good"]
    assert dict(reports[0].unreadable) == {"task_id is neither text nor a whole number": 1}


def test_answers_about_runs_by_number(tmp_path: Path) -> None:
    exam = read_exam(public.write_lines(tmp_path / "exam.jsonl", [labelled(0), labelled(7.0)]))
    for written in ({"id": 7.0}, {"id": "7"}, {"trajectory_id": 7}, {"query_index": 7.0}):
        answers = [written | {"step": 1, "score": 0.25}, {"trajectory_id": 0, "step": 1, "score": 0.5}]
        file = public.write_lines(tmp_path / "answers.jsonl", answers)
        (judge,) = read_exam_answers(file, exam.runs, exam.file)
        assert sorted(judge.scores.values()) == [0.25, 0.5], written


# --- retraining and monitoring ----------------------------------------------------------------------------------------


def test_a_retraining_keeps_every_task_on_its_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New rows of held-out tasks, which are written in other ways than before."""
    old, new = public.write_lines(tmp_path / "old.jsonl", rows()), tmp_path / "new.jsonl"
    registry, work = tmp_path / "judges", tmp_path / "work"
    monkeypatch.setenv(registered.REGISTRY_VARIABLE, str(registry))
    parent = add_version(registry, Addition(make_run(tmp_path, old), "judge"))
    kept, trained = (tasks_in(registry / "judge" / "1" / "data", side) for side in (HELD_OUT, TRAINING))
    assert kept | trained == NAMES
    public.write_lines(new, rows("new", written=(0.0, 7, 8.0, "9")))
    work.mkdir()
    asked = Retraining("judge@1", (new,), "base", 0.5, 0.05, (), False, False)
    convert_all(Job(asked, registry, parent, work, "key"))
    assert set((work / "held_out_tasks.txt").read_text().split()) == kept
    for name in ("all", "data", "new"):
        assert tasks_in(work / name, HELD_OUT) == kept and tasks_in(work / name, TRAINING) <= trained
    assert check_sides(work / "all", "judge", registry) == 1
    described = read_lines(work / "first" / f"{TRAINING}.meta.jsonl")
    assert describe_batch([], described, {"rejected": {}})["tasks"] == len(tasks_in(work / "first", TRAINING))


@pytest.mark.parametrize(("old", "new"), [(7.0, 7), ("0", 0)])
def test_a_numbered_task_that_changes_its_side_is_a_leak(
    tmp_path: Path, old: Any, new: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = tmp_path / "judges"
    monkeypatch.setenv(registered.REGISTRY_VARIABLE, str(registry))
    run = public.write_lines(tmp_path / "old.jsonl", rows(written=(old, *range(20, 30))))
    add_version(registry, Addition(make_run(tmp_path, run), "judge"))
    version = registry / "judge" / "1" / "data"
    side = HELD_OUT if str(new) in tasks_in(version, TRAINING) else TRAINING
    (tmp_path / "other").mkdir()
    traced = {"prompt_sha256": "0" * 64, "scores": {}, "metadata": {"task_id": new}}
    public.write_lines(tmp_path / "other" / f"{side}.meta.jsonl", [traced])
    with pytest.raises(DataError, match=f"'task {new}'"):
        check_sides(tmp_path / "other", "judge", registry)


def test_scored_steps_and_outcomes_of_numbered_tasks(tmp_path: Path) -> None:
    common = {"score": 0.5, "scores": {"k": 0.5}, "status": "ok", "label_mass": 1.0}
    lines = [common | {"request_hash": str(place), "metadata": {"task_id": task, "trajectory_id": place / 1}}
             for place, task in enumerate(WRITTEN)]  # fmt: skip
    lines += [common | {"request_hash": "log", "task": "0", "metadata": {}}]
    steps = read_scored([public.write_lines(tmp_path / "scores.jsonl", lines)])
    assert [step.task for step in steps] == ["0", "7", "7", "7", "8", "9", "0"]
    assert [step.trajectory for step in steps] == ["0", "1", "2", "3", "4", "5", "0"]
    outcomes = [{"trajectory_id": run, "outcome": 1} for run in (0, 1.0, "2")]
    assert read_outcomes(public.write_lines(tmp_path / "o.jsonl", outcomes)) == {"0": 1.0, "1": 1.0, "2": 1.0}
    with pytest.raises(DataError, match=r"bad\.jsonl:1: task_id is neither text nor a whole number"):
        read_scored([public.write_lines(tmp_path / "bad.jsonl", [lines[0] | {"metadata": {"task_id": [7]}}])])
