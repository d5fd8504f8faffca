"""Runs with labelled steps, as rows of judged steps, which convert_dataset.py reads."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prmkit.errors import DataError, UsageError
from prmkit.prompts.step import Rubric, step_prompts
from prmkit.resumable import companion_file
from prmkit.rows import STEP_TYPE
from prmkit.trajectories.importing import Options, read_runs
from prmkit.trajectories.readers import record
from prmkit.trajectory import Label, Step, Trajectory, outcome_number, task_id_of
from prmkit.verdict import Verdict, render_verdict


def rows_of(run: Trajectory, rubric: Rubric) -> Iterator[dict[str, Any]]:
    """Yield a row for each labelled step of a run.

    The prompt is the one that `score_trajectories.py` builds for the same step.

    Raises:
        UsageError: the rubric has several score keys, but a label is one number.
    """
    if len(rubric.keys) > 1:
        raise UsageError(
            f"a step's label is one number, but the rubric asks for {', '.join(rubric.keys)}. Use a different rubric."
        )
    for prompt in step_prompts(run, rubric):
        if (label := prompt.step.label) is not None:
            yield {
                "conversations": [
                    {"from": "human", "value": prompt.text},
                    {"from": "gpt", "value": _answer(label, rubric)},
                ],
                "metadata": judged_metadata(run, prompt.step.n, rubric, label.by, run.source.get("format"))
                | _exam_metadata(run, prompt.step, label),
            }


def runs_beside(rows: Path) -> Path:
    """Return the file with the complete runs for labelled rows: `exam.runs.jsonl` for `exam.jsonl`.

    To find a run's first error, the later steps are also needed; they have no label and therefore no row.
    """
    return companion_file(rows, "runs.jsonl")


def _exam_metadata(run: Trajectory, step: Step, label: Label) -> dict[str, Any]:
    """Return the metadata that an exam needs besides prompt and label. None of it is in the prompt."""
    return {
        "agent": step.agent,
        "steps": len(run.steps),
        "label_kind": label.kind,
        "error_type": label.type,
        "task_hash": task_id_of(run.task) if run.task else None,
        "succeeded": succeeded(run),
    }


def succeeded(run: Trajectory) -> bool | None:
    """Return whether a run reached its goal (a score of 1); None if unknown or on a different scale."""
    reached = outcome_number(run.outcome)
    return None if reached is None else reached == 1


def labelled_rows(path: Path, rubric: Rubric) -> Iterator[dict[str, Any]]:
    """Yield the rows of all labelled steps in a file of trajectory records.

    Raises:
        DataError: no step has a label, or the file cannot be read.
        UsageError: the rubric has several score keys.
    """
    found = False
    for run in read_runs([path], Options(format=record.READER.name)):
        for row in rows_of(run, rubric):
            found = True
            yield row
    if not found:
        raise DataError(
            f"{path}: no step of these runs has a label. Label steps first (import_trajectories.py --labels)."
        )


def step_metadata(run: Trajectory, number: int, rubric: Rubric) -> dict[str, Any]:
    """Return the metadata that identifies a step in rows and scores. Clips are always numbered from 1."""
    step = run.steps[number - 1]
    return {
        "evaluation_type": STEP_TYPE,
        "task_id": run.task_id,
        "trajectory_id": run.trajectory_id,
        "clip_number": step.n,
        "source_index": step.source_index,
        "rubric": rubric.sha256,
        "per": "step",
        "reference_shown": False,
    }


def judged_metadata(
    run: Trajectory, number: int, rubric: Rubric, judge: str, provider: str | None, timestamp: str | None = None
) -> dict[str, Any]:
    """Return the metadata of a row of a judged step, with the keys of all rows of judges."""
    # The order of the keys is that of existing rows: the same answers give the same bytes.
    who = {"model_name": judge, "provider": provider, "evaluation_type": STEP_TYPE, "category": None,
           "timestamp": timestamp}  # fmt: skip
    return who | step_metadata(run, number, rubric)


def _answer(label: Label, rubric: Rubric) -> str:
    """Return a label's verdict. An error whose type is not in the rubric gets no `error_type`."""
    named = label.type or ("none" if label.value >= _NO_ERROR else None)
    texts = {"error_type": named} if named in rubric.error_types else {}
    return render_verdict(Verdict({rubric.keys[0]: round(label.value, 2)}, nested=False, texts=texts))


_NO_ERROR = 0.5
"""A step whose label has no error type and is at least this high has no error."""
