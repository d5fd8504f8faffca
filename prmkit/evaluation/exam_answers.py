"""Judges' answers in an exam: scores of steps, or raw verdicts from a file.

A line of a file of answers is one of these, with the judge's name in `judge`, `judge_id`, `model` or `model_name`:

- `{"id": run, "step": 3, "score": 0.4}`; `step` counts from 1, `source_index` instead counts messages from 0;
- a line of score_trajectories.py, or a judged row as in finetune.jsonl;
- a verdict on a run: `{"trajectory_id": run, "faulty": true, "failure_step": 2}` (messages from 0), or `step_labels`,
  an object from message position to -1, 0 or 1.
"""

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from prmkit.errors import DataError
from prmkit.evaluation.exam import NO_ERROR, Exam, ExamRun
from prmkit.files import read_jsonl
from prmkit.rows import SELECTED_BY, Rejected, read_row, weight_of, whole_number
from prmkit.trajectories.beside import BAD, GOOD, NEUTRAL
from prmkit.verdict import Unreadable, asked_shape, read_verdict

log = logging.getLogger("prmkit")

StepId = tuple[str, int]
"""The run's id and the step's number."""
NOWHERE = -1
"""Used instead of a step number: the run has an error, and the judge did not say where."""

_ELSEWHERE = -2
"""Likewise: the error is at a step that has no label in this exam. All labelled steps are called good."""

_TERNARY = {-1: BAD, 0: NEUTRAL, 1: GOOD}
_JUDGES = ("judge", "judge_id", "model", "model_name")


@dataclass
class Answers:
    """One judge's answers."""

    name: str
    scores: dict[StepId, float] = field(default_factory=dict)
    """0 (bad) to 1."""
    firsts: dict[str, int] | None = None
    """For a judge that gave verdicts instead of scores: run -> first error, `NO_ERROR` or `NOWHERE`."""
    is_constant: bool = False
    """A baseline that has not read the runs."""
    unplaced: Counter[str] = field(default_factory=Counter)
    """Reason -> number of lines that are not about a step of this exam."""
    weights: dict[StepId, float] = field(default_factory=dict)
    """`prmkit.rows.WEIGHT` of each step that `ask_judges.py --first` selected; 0 for one that was asked anyway."""

    @property
    def selected_runs(self) -> set[str]:
        """Runs of which only selected steps were asked about."""
        return {run for (run, _), weight in self.weights.items() if weight}


def read_answers(file: Path, exam: Exam) -> list[Answers]:
    """Read the answers of all judges in a file.

    Raises:
        DataError: a line cannot be read, has an unknown scale or contradicts another, or no line is of this exam.
    """
    indexes = {run.trajectory_id: {step.place: step.n for step in run.steps} for run in exam.runs}
    judges: dict[str, Answers] = {}
    given: dict[str, dict[StepId, float]] = {}
    for number, value in enumerate(read_jsonl(file), start=1):
        place = f"{file}:{number}"
        if not isinstance(value, dict):
            raise DataError(f"{place}: not an object with id, step and score.")
        name = _judge_of(value) or file.name.removesuffix(".gz").removesuffix(".jsonl")
        judge = judges.setdefault(name, Answers(name))
        run = exam.by_id.get(run_of(value))
        if run is None:
            judge.unplaced["about runs not in the exam"] += 1
        elif is_repeated(value):
            judge.unplaced["with second answers (--repeat), which are not part of the exam"] += 1
        elif "faulty" in value or "failure_step" in value:
            _add_verdict(judge, run, value, place)
        else:
            for step, score in _scores_in(value, indexes[run.trajectory_id], place):
                if step is None and run.is_whole and not _counts_messages(value):
                    raise DataError(
                        f"{place}: the run {run.trajectory_id} has no such step; it has steps 1 to {len(run.steps)}. "
                        "If you count messages (from 0), call the field source_index."
                    )
                if score is None or step is None:
                    judge.unplaced["without a score" if step is not None else "about steps not in the exam"] += 1
                elif given.setdefault(name, {}).setdefault((run.trajectory_id, step), score) != score:
                    raise DataError(f"{place}: {name} scores this step a second time, differently. Keep one line.")
                else:
                    _weigh(judge, (run.trajectory_id, step), value)
    _add_scores(judges, given, file)
    if not any(judge.scores or judge.firsts for judge in judges.values()):
        first = exam.runs[0].trajectory_id
        unplaced = sum((judge.unplaced for judge in judges.values()), Counter[str]())
        why = "".join(f"; {count} lines {reason}" for reason, count in unplaced.items())
        raise DataError(f"{file}: has no score of a step of {exam.file}, whose first run has the id {first}{why}.")
    return list(judges.values())


def _weigh(judge: Answers, step: StepId, value: Mapping[str, Any]) -> None:
    """Keep the lowest weight of a step that several lines are about."""
    metadata = value.get("metadata")
    weight = weight_of(metadata) if isinstance(metadata, dict) and SELECTED_BY in metadata else 0.0
    judge.weights[step] = min(weight, judge.weights.get(step, weight))


def is_repeated(value: Mapping[str, Any]) -> bool:
    """Whether a row has the second answer of a judge that ask_judges.py asked again to measure its self-agreement."""
    metadata = value.get("metadata")
    return isinstance(metadata, dict) and metadata.get("repeat") is True


def _counts_messages(value: Mapping[str, Any]) -> bool:
    """Whether steps are identified by message positions, some of which may not be the agent's."""
    return "source_index" in value or any(key.endswith("step_labels") for key in value)


def _judge_of(value: Mapping[str, Any]) -> str | None:
    metadata = value.get("metadata") if "conversations" in value else None
    places = (value, metadata if isinstance(metadata, dict) else {})
    return next((str(place[key]) for place in places for key in _JUDGES if place.get(key)), None)


def run_of(value: Mapping[str, Any]) -> str:
    """The id of the run that a line is about."""
    metadata = value.get("metadata")
    if isinstance(metadata, dict) and metadata.get("trajectory_id"):
        return str(metadata["trajectory_id"])
    if value.get("trajectory_id") is not None:
        return str(value["trajectory_id"])
    if "query_index" in value:
        # The form in which the reader of AgentProcessBench names its runs.
        parts = (value.get("data_source") or value.get("dataset"), value["query_index"])
        task = "_".join(str(part) for part in parts if part is not None)
        return f"{task}.{value['sample_index']}" if value.get("sample_index") is not None else task
    name = str(value.get("id"))
    return name.rpartition("#")[0] if _has_step_in_id(value) else name


def _has_step_in_id(value: Mapping[str, Any]) -> bool:
    return not {"step", "source_index"} & value.keys() and str(value.get("id")).rpartition("#")[2].isdigit()


def _scores_in(
    value: Mapping[str, Any], numbers: Mapping[int, int], place: str
) -> Iterator[tuple[int | None, float | None]]:
    """The step's number (None if the run has no such step) and its score; None for a step without a score."""
    labels = next((value[key] for key in value if key.endswith("step_labels") and isinstance(value[key], dict)), None)
    if labels is not None:
        for index, label in labels.items():
            if isinstance(label, bool) or not isinstance(label, int | float) or label not in _TERNARY:
                raise DataError(f"{place}: label {label!r:.30} is not -1, 0 or 1.")
            yield numbers.get(int(index)) if str(index).isdigit() else None, _RAW + label
        return
    if "conversations" in value:
        yield _judged_step(value, numbers, place)
        return
    given_metadata = value.get("metadata")
    metadata = given_metadata if isinstance(given_metadata, dict) else {}
    if "step" not in value and value.get("source_index") is not None:
        step = numbers.get(_whole(value["source_index"], place))
    else:
        given = value.get("step", metadata.get("clip_number"))
        step = _whole(str(value.get("id")).rpartition("#")[2] if given is None else given, place)
        step = step if step in numbers.values() else None
    if "score" not in value:
        raise DataError(f"{place}: no score. A line has id, step and score.")
    score = value["score"]
    if score is None:
        yield step, None
    elif isinstance(score, bool) or not isinstance(score, int | float) or not -1 <= score <= 1 or math.isnan(score):
        raise DataError(f"{place}: score {score!r:.30} is not from 0 to 1, and not -1, 0 or 1.")
    else:
        yield step, float(score)


_RAW = 10
"""Added to raw verdicts of -1, 0 and 1 until all lines are read, so that they are not mistaken for scores."""


def _judged_step(value: Mapping[str, Any], numbers: Mapping[int, int], place: str) -> tuple[int | None, float | None]:
    try:
        row = read_row(value)
    except Rejected as rejected:
        raise DataError(f"{place}: {rejected.reason}.") from rejected
    verdict = None if row.answer is None else read_verdict(row.answer, asked_shape(row.prompt))
    known = verdict is not None and not isinstance(verdict, Unreadable)
    step = row.clip_number if row.clip_number in numbers.values() else None
    return step, fmean(verdict.scores.values()) if known else None  # type: ignore[union-attr]


def _whole(value: Any, place: str) -> int:
    number = whole_number(value)
    if number is None:
        raise DataError(f"{place}: step {value!r:.30} is not a whole number. Steps count from 1.")
    return number


def _add_verdict(judge: Answers, run: ExamRun, value: Mapping[str, Any], place: str) -> None:
    """A verdict that names the first error of a run, by the position of its message."""
    faulty, index = value.get("faulty"), value.get("failure_step")
    if value.get("error") or (faulty is None and index is None):
        judge.unplaced["without a verdict"] += 1
        return
    first = NO_ERROR if faulty is False else NOWHERE
    if faulty is not False and index is not None:
        at = _whole(index, place)
        first = next((step.n for step in run.steps if step.place == at), NOWHERE if run.is_whole else _ELSEWHERE)
    judge.firsts = judge.firsts or {}
    if judge.firsts.setdefault(run.trajectory_id, first) != first:
        raise DataError(f"{place}: a second, different verdict of {judge.name} on this run. Keep one line.")
    if first != NOWHERE:
        judge.scores |= {(run.trajectory_id, step.n): BAD if step.n == first else GOOD for step in run.steps}


def _add_scores(judges: Mapping[str, Answers], given: Mapping[str, Mapping[StepId, float]], file: Path) -> None:
    """Scores unchanged; raw verdicts of -1, 0 and 1 as the three labels, with the first -1 as the first error."""
    is_ternary = any(score < 0 for scores in given.values() for score in scores.values())
    if not is_ternary and all(set(scores.values()) == {0.0, 1.0} for scores in given.values()) and given:
        log.warning("%s: all scores are 0 or 1 and none is -1; 0 is read as bad, 1 as good", file)
    for name, scores in given.items():
        raw = {step: score - _RAW if score > 1 else score for step, score in scores.items()}
        if not is_ternary and raw == scores:
            judges[name].scores |= scores
            continue
        if not set(raw.values()) <= _TERNARY.keys():
            raise DataError(f"{file}: {name} has scores below 0, and not only -1, 0 and 1. Rescale to 0 to 1.")
        judges[name].scores |= {step: _TERNARY[int(score)] for step, score in raw.items()}
        firsts = {run: NO_ERROR for run, _ in raw}
        for (run, step), score in sorted(raw.items()):
            if score < 0 and firsts[run] == NO_ERROR:
                firsts[run] = step
        judges[name].firsts = (judges[name].firsts or {}) | firsts
