"""An exam: human-labelled runs whose tasks no trained judge in the table was trained on.

It is read from the rows and complete runs that `import_trajectories.py --labels` writes, from run records with labels,
or from the labels of `label_steps.py`. A step without a label is unknown, never good, because a person who marks an
error says nothing about the steps after it.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from prmkit.dataset_info import read_entries, read_sidecar, split_names
from prmkit.errors import DataError, UsageError
from prmkit.files import numbered_jsonl, sha256_of, stored_form
from prmkit.judge.types import BAD_BELOW, SAME_SCORE
from prmkit.layouts import Rejected
from prmkit.rows import WEIGHT, InputRow, is_weight, read_row, task_of, whole_number
from prmkit.trajectories.importing import Options, read_runs
from prmkit.trajectories.readers import record
from prmkit.trajectories.rows import runs_beside, succeeded
from prmkit.trajectory import Trajectory, holds_records, task_id_of
from prmkit.verdict import Unreadable, Verdict, asked_shape, read_verdict

NO_ERROR = 0
"""Value in place of a step number: the run has no bad step."""
KINDS_OF_ERRORS = ("first_error", "failure")
"""Kinds of labels from sets in which people marked errors instead of labelling every step."""


@dataclass(frozen=True)
class ExamStep:
    """One step, with or without a label."""

    n: int
    """Number of the step, from 1."""
    index: int | None = None
    """The position of the step's message in the source, from 0."""
    agent: str | None = None
    label: float | None = None
    """0 to 1; None if nobody labelled it."""
    kind: str | None = None
    """Kind of the label; see `prmkit.trajectory.Label`."""
    weight: float = 1.0
    """How many steps it represents, if labelled steps were sampled unevenly."""
    prompt: str | None = None
    """None if the prompt is built from the complete run."""
    system: str | None = None

    @property
    def is_bad(self) -> bool:
        """Whether its label is below 0.5."""
        return self.label is not None and self.label < BAD_BELOW[0] - SAME_SCORE

    @property
    def place(self) -> int:
        """The index that published results use: the message's position; if unknown, the step's number."""
        return self.n if self.index is None else self.index


@dataclass(frozen=True)
class ExamRun:
    """One run."""

    trajectory_id: str
    task_id: str
    task_hash: str | None
    source: str
    """The format that it was read from, for example the name of a public set."""
    steps: tuple[ExamStep, ...]
    is_whole: bool
    """Whether every step of the run is here; only then is there a first error to find."""
    succeeded: bool | None = None
    rubric: str | None = None
    """The hash of the rubric, for ready-made prompts."""
    record: Trajectory | None = None

    @cached_property
    def numbers(self) -> Mapping[int, int]:
        """Index that published results use -> step number."""
        return {step.place: step.n for step in self.steps}

    @cached_property
    def first_error(self) -> int | None:
        """The number of the first bad step, `NO_ERROR` without one, None if the labels do not say."""
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
        """The sets that the runs come from."""
        return sorted({run.source for run in self.runs})


def read_exam(file: Path) -> Exam:
    """Read an exam.

    Raises:
        DataError: the file is missing or damaged, has no labelled step, or does not match the complete runs next to it.
    """
    if not file.is_file():
        raise DataError(f"{file}: no such file. Make an exam with import_trajectories.py --labels, or label_steps.py.")
    if holds_records(file):
        runs = [_run_of_record(run) for run in read_runs([file], Options(format=record.READER.name))]
    else:
        runs = _runs_of_rows(file)
        if whole := stored_form(runs_beside(file)):
            runs = _completed(runs, whole)
    runs = [run for run in runs if any(step.label is not None for step in run.steps)]
    if not runs:
        raise DataError(f"{file}: no step has a label. Make an exam with import_trajectories.py --labels.")
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
    for number, value in numbered_jsonl(file):
        name, step, metadata = _labelled_step(value, f"{file}:{number}")
        grouped[name][step.n].append((step, metadata))
    return [_run_of_steps(name, [of_step[n] for n in sorted(of_step)]) for name, of_step in grouped.items()]


def judged_row(value: Any, place: str, kind: str) -> tuple[InputRow, Verdict | None]:
    """Return a row and its verdict; None in place of a verdict that is missing or cannot be read.

    Args:
        value: the row.
        place: for messages.
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
                f"{file}: the run {run.trajectory_id} is missing, but has rows. Import both again, or remove this file."
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


def check_not_trained_on(
    exam: Exam, config: Mapping[str, Any], data_folder: Path, trained_on: Mapping[str, str] | None = None
) -> None:
    """Reject a judge that was trained on a task of the exam.

    Tasks are the same if their texts are, whatever their ids. Ids are compared if a text is unknown, and within a set:
    a simulated user may word a task in several ways.

    Args:
        exam: the exam.
        config: of the judge's run.
        data_folder: holds its training data.
        trained_on: dataset -> SHA-256 of its training file, if the run's record has it.

    Raises:
        UsageError: at least one task is in both.
        DataError: the training data is missing or has changed, so it cannot be checked.
    """
    hashes: set[str] = set()
    ids: set[tuple[str, str | None]] = set()
    unhashed: set[str | None] = set()
    for metadata in _training_metadata(config, data_folder, trained_on or {}):
        identity = task_of(metadata)
        ids.add((str(metadata.get("provider")), identity))
        if metadata.get("task_hash"):
            hashes.add(str(metadata["task_hash"]))
        else:
            unhashed.add(identity)
    everywhere = {identity for _, identity in ids}
    shared = [
        run
        for run in exam.runs
        if run.task_hash in hashes
        or (run.source, run.task_id) in ids
        or run.task_id in (unhashed if run.task_hash else everywhere)
    ]
    if shared:
        tasks = len({run.task_id for run in shared})
        raise UsageError(
            f"{exam.file}: the judge was trained on {tasks} of these {len({run.task_id for run in exam.runs})} tasks, "
            f"for example {shared[0].task_id}. Use an exam with other tasks, or train without them."
        )


def _training_metadata(
    config: Mapping[str, Any], data_folder: Path, trained_on: Mapping[str, str]
) -> Iterator[Mapping[str, Any]]:
    names = split_names(config.get("dataset") or [])
    entries = read_entries(data_folder) if data_folder.is_dir() else {}
    for name in names:
        entry = entries.get(name)
        sidecar = entry.sidecar if entry else None
        if sidecar is None:
            raise DataError(
                f"{data_folder}: the training data {name} or its sidecar is missing, so prmkit cannot check whether "
                "the judge was trained on the exam's tasks. Pass its folder with --data-dir."
            )
        if name in trained_on and (not entry or not entry.file or sha256_of(entry.file) != trained_on[name]):
            raise DataError(
                f"{data_folder}: {name} has been converted again since the judge was trained on it. Pass the folder "
                "with the original training data with --data-dir."
            )
        yield from (row["metadata"] for row in read_sidecar(sidecar))
    if not names:
        raise DataError(
            "the training data of this judge is unknown. Pass a training run with its resolved config (--run)."
        )
