"""An exam: human-labelled runs of tasks on which the examined judges were not trained.

It is read from the rows and complete runs that `import_trajectories.py --labels` writes, from trajectory records with
labels, or from the labels of `label_steps.py`. A step without a label is unknown, never good, because marking an error
says nothing about the steps after it.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from prmkit.dataset_info import has_rows, read_entries, read_sidecar, rows_sha256, split_names
from prmkit.errors import DataError, UsageError
from prmkit.evaluation.heldout import HeldOut
from prmkit.files import numbered_jsonl, sha256_of, stored_form
from prmkit.judge.sources import JudgeSource, data_of_run, read_object
from prmkit.judge.types import BAD_BELOW, SAME_SCORE
from prmkit.layouts import Rejected
from prmkit.paths import EXPORT_NOTE, HELD_OUT_SUFFIX, INFO, record_of
from prmkit.rows import WEIGHT, InputRow, is_weight, read_row, task_of, whole_number
from prmkit.trajectories.importing import Options, read_runs
from prmkit.trajectories.readers import record
from prmkit.trajectories.rows import runs_beside, succeeded
from prmkit.trajectory import Trajectory, holds_records, task_id_of
from prmkit.verdict import Unreadable, Verdict, asked_shape, read_verdict

NO_ERROR = 0
"""Used instead of a step number if the run has no bad step."""
KINDS_OF_ERRORS = ("first_error", "failure")
"""The kinds of labels in sets whose annotators marked errors instead of labelling every step."""


@dataclass(frozen=True)
class ExamStep:
    """One step, with or without a label."""

    n: int
    """The number of the step, from 1."""
    index: int | None = None
    """The position of the step's message in the source, from 0."""
    agent: str | None = None
    label: float | None = None
    """From 0 to 1; None if nobody labelled the step."""
    kind: str | None = None
    """The kind of label; see `prmkit.trajectory.Label`."""
    weight: float = 1.0
    """The number of steps that this step represents, if the labelled steps were sampled unevenly."""
    prompt: str | None = None
    """The prompt; None if it is built from the complete run."""
    system: str | None = None

    @property
    def is_bad(self) -> bool:
        """Whether the label is below 0.5."""
        return self.label is not None and self.label < BAD_BELOW[0] - SAME_SCORE

    @property
    def place(self) -> int:
        """The step's index in published results: the message's position or, if it is unknown, the step's number."""
        return self.n if self.index is None else self.index


@dataclass(frozen=True)
class ExamRun:
    """One run."""

    trajectory_id: str
    task_id: str
    task_hash: str | None
    source: str
    """The format of the run's file, for example the name of a public set."""
    steps: tuple[ExamStep, ...]
    is_whole: bool
    """Whether all steps of the run are known; only then can its first error be found."""
    succeeded: bool | None = None
    rubric: str | None = None
    """The hash of the rubric, if the prompts are ready-made."""
    record: Trajectory | None = None

    @property
    def identity(self) -> "Task":
        """The run's task."""
        return Task(self.source, self.task_id, self.task_hash)

    @cached_property
    def numbers(self) -> Mapping[int, int]:
        """Index that published results use -> step number."""
        return {step.place: step.n for step in self.steps}

    @cached_property
    def first_error(self) -> int | None:
        """The number of the first bad step; `NO_ERROR` if no step is bad, None if the labels do not say."""
        if not self.is_whole:
            return None
        for step in self.steps:
            if step.label is None:
                return None
            if step.is_bad:
                return step.n
        return NO_ERROR


@dataclass(frozen=True)
class Exam:
    """All runs of an exam."""

    file: Path
    sha256: str
    runs: tuple[ExamRun, ...]

    @property
    def labelled(self) -> Iterator[tuple[ExamRun, ExamStep]]:
        """Every labelled step with its run."""
        return ((run, step) for run in self.runs for step in run.steps if step.label is not None)

    @property
    def sources(self) -> list[str]:
        """The sets from which the runs come."""
        return sorted({run.source for run in self.runs})


def read_exam(file: Path) -> Exam:
    """Read an exam.

    Raises:
        DataError: the file is missing or damaged, has no labelled step, or does not match the complete runs next to it.
    """
    if not file.is_file():
        raise DataError(f"{file}: no such file. Create an exam with import_trajectories.py --labels or label_steps.py.")
    if holds_records(file):
        runs = [_run_of_record(run) for run in read_runs([file], Options(format=record.READER.name))]
    else:
        runs = _runs_of_rows(file)
        if whole := stored_form(runs_beside(file)):
            runs = _completed(runs, whole)
    runs = [run for run in runs if any(step.label is not None for step in run.steps)]
    if not runs:
        raise DataError(f"{file}: no step has a label. Create an exam with import_trajectories.py --labels.")
    return Exam(file, sha256_of(file), tuple(runs))


def bare_run(run: Trajectory) -> ExamRun:
    """Return an exam run without labels, which maps step numbers and message positions of the run."""
    steps = tuple(ExamStep(step.n, step.source_index, step.agent) for step in run.steps)
    return ExamRun(run.trajectory_id, run.task_id, None, str(run.source.get("format")), steps, is_whole=True)


def _run_of_record(run: Trajectory) -> ExamRun:
    steps = tuple(
        ExamStep(step.n, step.source_index, step.agent)
        if step.label is None
        else ExamStep(step.n, step.source_index, step.agent, step.label.value, step.label.kind)
        for step in run.steps
    )
    return ExamRun(
        run.trajectory_id,
        run.task_id,
        task_id_of(run.task) if run.task else None,
        str(run.source.get("format")),
        steps,
        is_whole=True,
        succeeded=succeeded(run),
        record=run,
    )


def _runs_of_rows(file: Path) -> list[ExamRun]:
    grouped: dict[str, dict[int, list[tuple[ExamStep, Mapping[str, Any]]]]] = defaultdict(lambda: defaultdict(list))
    seen: dict[tuple[str, int | None], str | None] = {}
    for number, value in numbered_jsonl(file):
        name, step, metadata = _labelled_step(value, f"{file}:{number}")
        for part, content in ((None, task_of(metadata)), (step.n, step.prompt)):
            if seen.setdefault((name, part), content) != content:
                advice = "has another task or prompt than an earlier line. Give every run its own trajectory_id."
                raise DataError(f"{file}:{number}: step {step.n} of run {name} {advice}")
        grouped[name][step.n].append((step, metadata))
    return [_run_of_steps(name, [of_step[n] for n in sorted(of_step)]) for name, of_step in grouped.items()]


def judged_row(value: Any, place: str, kind: str) -> tuple[InputRow, Verdict | None]:
    """Return a row and its verdict; the verdict is None if it is missing or cannot be read.

    Args:
        value: the row as JSON.
        place: the file and line, for messages.
        kind: what the row should be, for messages.

    Raises:
        DataError: not a row; the message begins with `place`.
    """
    try:
        row = read_row(value)
    except Rejected as rejected:
        raise DataError(f"{place}: not {kind} ({rejected.reason}).") from rejected
    verdict = None if row.answer is None else read_verdict(row.answer, asked_shape(row.prompt))
    return row, None if isinstance(verdict, Unreadable) else verdict


def _labelled_step(value: Any, place: str) -> tuple[str, ExamStep, Mapping[str, Any]]:
    row, verdict = judged_row(value, place, "a labelled step")
    metadata = row.metadata
    n, run = row.clip_number, row.trajectory
    if n is None or run is None or verdict is None:
        raise DataError(
            f"{place}: not a labelled step. An exam has rows from import_trajectories.py --labels or label_steps.py, "
            "with trajectory_id, clip_number and a verdict."
        )
    weight = metadata.get("weight", metadata.get(WEIGHT, 1.0))
    if not is_weight(weight):
        raise DataError(f"{place}: weight {weight!r:.30} is not a number above 0.")
    index, agent = whole_number(metadata.get("source_index")), metadata.get("agent")
    label, kind = verdict.mean, str(metadata.get("label_kind") or "score")
    step = ExamStep(n, index, agent and str(agent), label, kind, float(weight), row.prompt, row.system)
    return run, step, metadata


def _run_of_steps(name: str, steps: Sequence[Sequence[tuple[ExamStep, Mapping[str, Any]]]]) -> ExamRun:
    """Return a run of labelled steps only. If several people labelled a step, its label is their mean."""
    merged = []
    for of_step in steps:
        labels = [step.label for step, _ in of_step if step.label is not None]
        kind = of_step[0][0].kind if len(set(labels)) == 1 else "score"
        merged.append(replace(of_step[0][0], label=fmean(labels), kind=kind))
    first = steps[0][0][1]
    given = first.get("succeeded")
    return ExamRun(
        name,
        task_of(first) or name,
        first.get("task_hash"),
        str(first.get("provider")),
        tuple(merged),
        is_whole=whole_number(first.get("steps")) == len(merged),
        succeeded=given if isinstance(given, bool) else None,
        rubric=first.get("rubric"),
    )


def _completed(runs: Sequence[ExamRun], file: Path) -> list[ExamRun]:
    """Return the labelled runs with their other steps; labels come from the rows, which the user may have edited."""
    whole = {run.trajectory_id: _run_of_record(run) for run in read_runs([file], Options(format=record.READER.name))}
    completed = []
    for run in runs:
        found = whole.get(run.trajectory_id)
        if found is None or not {step.n for step in run.steps} <= {step.n for step in found.steps}:
            raise DataError(
                f"{file}: run {run.trajectory_id} has rows but is not in this file. "
                "Import rows and runs again, or remove this file."
            )
        labels = {step.n: step for step in run.steps}
        steps = tuple(
            replace(step, label=mine.label, kind=mine.kind, weight=mine.weight)
            if (mine := labels.get(step.n))
            else replace(step, label=None, kind=None)
            for step in found.steps
        )
        completed.append(replace(found, steps=steps))
    return completed


# --- what a judge was trained on --------------------------------------------------------------------------------------


class Task(NamedTuple):
    """What identifies a task on which a judge is measured."""

    source: str
    """The set from which the task comes."""
    task_id: str
    task_hash: str | None
    """The hash of the task's text."""
    prompt_sha256: str | None = None
    """The hash of the prompt, if single prompts are measured."""


def task_of_run(run: Trajectory) -> Task:
    """Return the task of a whole run."""
    return Task(str(run.source.get("format")), run.task_id, task_id_of(run.task) if run.task else None)


def training_of(judge: Path) -> Mapping[str, Any]:
    """Return the record of a run or an export; empty for any other model."""
    file = record_of(judge) or judge / EXPORT_NOTE
    return read_object(file) if file.is_file() else {}


def data_of_judge(judge: Path) -> Path | None:
    """Return the current folder of a run's data; None if it was not found, or for a model, which does not record it."""
    return data_of_run(judge) if record_of(judge) else None


def check_not_trained_on(file: Path, tasks: Sequence[Task], record: Mapping[str, Any], data_folder: Path) -> None:
    """Reject a judge that was trained on one of the tasks on which it will be measured.

    Tasks with the same text are the same, whatever their ids. Ids are compared if a text is unknown, and within a set,
    where a simulated user may phrase a task in several ways.

    Args:
        file: the file with the tasks, for messages.
        tasks: the tasks.
        record: the judge's record; see `training_of`.
        data_folder: the folder with its training data.

    Raises:
        UsageError: it was trained on at least one of the tasks.
        DataError: the training data is missing or has changed, so it cannot be checked.
    """
    hashes: set[str] = set()
    prompts: set[str] = set()
    ids: set[tuple[str, str | None]] = set()
    unhashed: set[str | None] = set()
    for row in _training_rows(record, data_folder):
        metadata = row["metadata"]
        identity = task_of(metadata)
        prompts.add(row["prompt_sha256"])
        ids.add((str(metadata.get("provider")), identity))
        if metadata.get("task_hash"):
            hashes.add(str(metadata["task_hash"]))
        else:
            unhashed.add(identity)
    everywhere = {identity for _, identity in ids}
    shared = [
        task
        for task in tasks
        if task.task_hash in hashes
        or task.prompt_sha256 in prompts
        or (task.source, task.task_id) in ids
        or task.task_id in (unhashed if task.task_hash else everywhere)
    ]
    if shared:
        count = len({task.task_id for task in shared})
        raise UsageError(
            f"{file}: the judge was trained on {count} of these {len({task.task_id for task in tasks})} tasks, "
            f"for example {shared[0].task_id}. Measure it on other tasks, or train without these tasks."
        )


def _training_rows(record: Mapping[str, Any], data_folder: Path) -> Iterator[Mapping[str, Any]]:
    described = _described(record, "dataset")
    names = list(filter(None, split_names(described.get("name"))))
    if not names:
        raise DataError("the training data of this judge is unknown. Pass a training run with --run.")
    entries = read_entries(data_folder) if (data_folder / INFO).is_file() else {}
    sidecars = [entries[name].sidecar if name in entries else None for name in names]
    if None in sidecars:
        raise DataError(
            f"{data_folder}: the training data {', '.join(names)} or its sidecar is missing, so prmkit cannot check "
            "whether the judge was trained on these tasks. Pass its folder with --data-dir."
        )
    if described.get("sha256") and not has_rows(data_folder, described):
        raise DataError(
            f"{data_folder}: {', '.join(names)} is not what the judge was trained on; it was converted again. Convert "
            "the original rows again with the same options, or pass the folder of the original data with --data-dir."
        )
    for sidecar in filter(None, sidecars):
        yield from read_sidecar(sidecar)


def _described(record: Mapping[str, Any], side: str) -> Mapping[str, Any]:
    """Return a dataset's name and hash in a record; older records have only its name, in their configuration."""
    found = record.get(side)
    return found if isinstance(found, dict) else {"name": (record.get("config") or {}).get(side)}


def check_new_tasks(held_out: HeldOut, folder: Path, source: JudgeSource) -> str | None:
    """Reject held-out rows of tasks on which a judge was trained.

    One conversion never puts a task in both splits, so rows from the judge's own conversion need no comparison, unless
    it was trained on a held-out split; a different conversion may hold out different tasks.

    Args:
        held_out: the rows.
        folder: their data folder.
        source: the judge.

    Returns:
        Why it is unknown whether the judge was trained on them; None if it was not, or is not a judge of this project.

    Raises:
        UsageError: it was trained on at least one of the tasks.
        DataError: its training data was converted again.
    """
    judge = source.adapter or source.model
    record = training_of(judge)
    trained, own = _described(record, "dataset"), _described(record, "eval_dataset")
    is_here, names = has_rows(folder, trained), split_names(trained.get("name"))
    is_held_out = is_here or own.get("sha256") == held_out.file_sha256
    if not record or (is_held_out and not any(name.endswith(HELD_OUT_SUFFIX) for name in names)):
        return None
    data_folder = folder if is_here else data_of_judge(judge)
    unknown = f"It is unknown whether the judge was trained on tasks of {held_out.file}: "
    if not trained.get("sha256"):
        return f"{unknown}{judge} does not record its training data."
    if data_folder is None or rows_sha256(data_folder, names) is None:
        return f"{unknown}its training data was not found."
    tasks = [
        Task(str(each.metadata.get("provider")), each.task, each.metadata.get("task_hash"), each.prompt_sha256)
        for each in held_out.prompts
    ]
    check_not_trained_on(held_out.file, tasks, record, data_folder)
    return None
