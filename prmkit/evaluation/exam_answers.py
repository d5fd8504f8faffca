"""Read judges' answers to an exam from a file: scores of steps, or verdicts on runs.

Each line is one of these, with the judge's name in `judge`, `judge_id`, `model` or `model_name`:

- `{"id": run, "step": 3, "score": 0.4}`; `step` counts from 1, `source_index` instead counts messages from 0;
- a line of score_trajectories.py, or a judged row as in finetune.jsonl;
- a verdict on a run: `{"trajectory_id": run, "faulty": true, "failure_step": 2}` (messages from 0), or `step_labels`,
  an object from message position to -1, 0 or 1.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prmkit.errors import DataError
from prmkit.evaluation.exam import NO_ERROR, ExamRun, judged_row
from prmkit.files import numbered_jsonl, uncompressed_name
from prmkit.layouts import bare_name
from prmkit.rows import PROMPT_COLUMNS, SELECTED_BY, name_at, weight_of, whole_number
from prmkit.trajectories.run_fields import BAD, GOOD, NEUTRAL

log = logging.getLogger("prmkit")

StepId = tuple[str, int]
"""The run's id and the step's number."""
NOWHERE = -1
"""Used instead of a step number if the judge says that the run has an error, but not where."""

_ELSEWHERE = -2
"""Used instead of a step number if the error is at an unlabelled step: all labelled steps then count as judged good."""

_TERNARY = {-1: BAD, 0: NEUTRAL, 1: GOOD}
_JUDGES = ("judge", "judge_id", "model", "model_name")


_Given = tuple[float, bool]
"""A number in a file, and whether it is known to be a verdict of -1, 0 or 1 instead of a score."""


@dataclass
class JudgeScores:
    """One judge's answers."""

    name: str
    scores: dict[StepId, float] = field(default_factory=dict)
    """0 (bad) to 1."""
    firsts: dict[str, int] | None = None
    """For a judge that gave verdicts instead of scores: run -> first error, `NO_ERROR` or `NOWHERE`."""
    unplaced: Counter[str] = field(default_factory=Counter)
    """Reason -> number of lines that are not about a step of this exam."""
    weights: dict[StepId, float] = field(default_factory=dict)
    """`prmkit.rows.WEIGHT` of each step that `ask_judges.py --first` selected; 0 if it was asked about anyway."""

    @property
    def selected_runs(self) -> set[str]:
        """The runs in which judges were asked only about selected steps."""
        return {run for (run, _), weight in self.weights.items() if weight}


def read_exam_answers(file: Path, runs: Sequence[ExamRun], source: Path) -> list[JudgeScores]:
    """Read the answers of all judges in a file.

    Args:
        file: the file with one answer per line.
        runs: the runs that the answers are about.
        source: the file of the runs, for messages.

    Raises:
        DataError: a line cannot be read, has an unknown scale or contradicts another; or none is about these runs.
    """
    known = _by_name(runs)
    judges: dict[str, JudgeScores] = {}
    given: dict[str, dict[StepId, _Given]] = {}
    for number, value in numbered_jsonl(file):
        place = f"{file}:{number}"
        if not isinstance(value, dict):
            raise DataError(f"{place}: not an object with id, step and score.")
        name = _judge_of(value) or bare_name(file)
        judge = judges.setdefault(name, JudgeScores(name))
        run = known.get(run_of(value, place))
        if run is None:
            judge.unplaced["about other runs"] += 1
        elif is_repeated(value):
            judge.unplaced["with second answers (--repeat), which are not used"] += 1
        elif "faulty" in value or "failure_step" in value:
            _add_verdict(judge, run, value, place)
        else:
            _add_steps(judge, given, run, value, place)
    _add_scores(judges, given, file)
    if not any(judge.scores or judge.firsts for judge in judges.values()):
        unplaced = sum((judge.unplaced for judge in judges.values()), Counter[str]())
        why = "".join(f"; {count} lines {reason}" for reason, count in unplaced.items())
        raise DataError(
            f"{file}: no line scores a step of {source}, whose first run has the id {runs[0].trajectory_id}{why}."
        )
    return list(judges.values())


def _by_name(runs: Sequence[ExamRun]) -> dict[str, ExamRun]:
    """Return the runs by id, and by task id and file name if these identify a single run."""
    named: dict[str, list[ExamRun]] = defaultdict(list)
    for run in runs:
        file = str(run.record.source.get("file")) if run.record else ""
        for name in {
            run.task_id,
            file,
            file.removesuffix(".json"),
            uncompressed_name(Path(file)),
            bare_name(Path(file)),
        }:
            named[name].append(run)
    single = {name: found[0] for name, found in named.items() if len(found) == 1 and name}
    return single | {run.trajectory_id: run for run in runs}


def _add_steps(
    judge: JudgeScores, given: dict[str, dict[StepId, _Given]], run: ExamRun, value: Mapping[str, Any], place: str
) -> None:
    for step, score in _scores_in(value, run.numbers, place):
        if step is None and run.is_whole and not _counts_messages(value):
            raise DataError(
                f"{place}: the run {run.trajectory_id} has no such step; it has steps 1 to {len(run.steps)}. "
                "If you count messages (from 0), use the field source_index instead."
            )
        if score is None or step is None:
            judge.unplaced["without a score" if step is not None else "about other steps"] += 1
        elif given.setdefault(judge.name, {}).setdefault((run.trajectory_id, step), score) != score:
            raise DataError(f"{place}: {judge.name} has already given this step a different score. Keep one line.")
        else:
            _weigh(judge, (run.trajectory_id, step), value)


def _weigh(judge: JudgeScores, step: StepId, value: Mapping[str, Any]) -> None:
    """Keep the lowest weight if several lines are about a step."""
    metadata = value.get("metadata")
    weight = weight_of(metadata) if isinstance(metadata, dict) and SELECTED_BY in metadata else 0.0
    judge.weights[step] = min(weight, judge.weights.get(step, weight))


def is_repeated(value: Mapping[str, Any]) -> bool:
    """Return whether a row is a repeated answer, which ask_judges.py collects to measure a judge's self-agreement."""
    metadata = value.get("metadata")
    return isinstance(metadata, dict) and metadata.get("repeat") is True


def _counts_messages(value: Mapping[str, Any]) -> bool:
    """Return whether steps are identified by message positions, some of which may not be the agent's."""
    return "source_index" in value or any(key.endswith("step_labels") for key in value)


def _is_row(value: Mapping[str, Any]) -> bool:
    """Return whether a line is a row of a strong judge, as in the input of the conversion, and not a score."""
    return "conversations" in value or ("score" not in value and not value.keys().isdisjoint(PROMPT_COLUMNS))


def _judge_of(value: Mapping[str, Any]) -> str | None:
    metadata = value.get("metadata") if _is_row(value) else None
    places = (value, metadata if isinstance(metadata, dict) else {})
    return next((str(place[key]) for place in places for key in _JUDGES if place.get(key)), None)


def run_of(value: Mapping[str, Any], place: str) -> str:
    """Return the id of the run that a line is about.

    Raises:
        DataError: it is not a name; the message begins with `place`.
    """
    for about in (value.get("metadata"), value):
        if isinstance(about, dict) and (name := name_at(place, about, "trajectory_id")):
            return name
    if "query_index" in value:
        # The format of the run ids from the reader of AgentProcessBench.
        query, sample = (name_at(place, value, key) for key in ("query_index", "sample_index"))
        task = "_".join(str(part) for part in (value.get("data_source") or value.get("dataset"), query) if part)
        return task if sample is None else f"{task}.{sample}"
    name = str(name_at(place, value, "id"))
    return name.rpartition("#")[0] if _has_step_in_id(value) else name


def _has_step_in_id(value: Mapping[str, Any]) -> bool:
    return not {"step", "source_index"} & value.keys() and str(value.get("id")).rpartition("#")[2].isdigit()


def _scores_in(
    value: Mapping[str, Any], numbers: Mapping[int, int], place: str
) -> Iterator[tuple[int | None, _Given | None]]:
    """Yield the step's number (None if the run has no such step) and its score; None for a step without a score."""
    labels = next((value[key] for key in value if key.endswith("step_labels") and isinstance(value[key], dict)), None)
    if labels is not None:
        for index, label in labels.items():
            if type(label) not in (int, float) or label not in _TERNARY:
                raise DataError(f"{place}: label {label!r:.30} is not -1, 0 or 1.")
            yield numbers.get(int(index)) if str(index).isdigit() else None, (float(label), True)
        return
    if _is_row(value):
        row, verdict = judged_row(value, place, "a judged step")
        step = row.clip_number if row.clip_number in numbers.values() else None
        yield step, (verdict.mean, False) if verdict else None
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
        raise DataError(f"{place}: no score. Each line needs id, step and score.")
    score = value["score"]
    if score is None:
        yield step, None
    elif type(score) not in (int, float) or not -1 <= score <= 1:
        raise DataError(f"{place}: score {score!r:.30} must be from 0 to 1, or one of -1, 0 and 1.")
    else:
        yield step, (float(score), False)


def _whole(value: Any, place: str) -> int:
    number = whole_number(value)
    if number is None:
        raise DataError(f"{place}: step {value!r:.30} is not a whole number. Steps are numbered from 1.")
    return number


def _add_verdict(judge: JudgeScores, run: ExamRun, value: Mapping[str, Any], place: str) -> None:
    """Add a verdict on a run, which gives the first error as the position of its message."""
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
        raise DataError(f"{place}: a second, different verdict by {judge.name} on this run. Keep one line.")
    if first != NOWHERE:
        judge.scores |= {(run.trajectory_id, step.n): BAD if step.n == first else GOOD for step in run.steps}


def _add_scores(judges: Mapping[str, JudgeScores], given: Mapping[str, Mapping[StepId, _Given]], file: Path) -> None:
    """Add scores unchanged, and verdicts of -1, 0 and 1 as the three labels, with the first -1 as the first error."""
    is_ternary = any(number < 0 for found in given.values() for number, is_verdict in found.values() if not is_verdict)
    only_0_and_1 = {(0.0, False), (1.0, False)}
    if given and not is_ternary and all(set(found.values()) == only_0_and_1 for found in given.values()):
        log.warning("%s: all scores are 0 or 1 and none is -1; interpreting 0 as bad and 1 as good", file)
    for name, found in given.items():
        numbers = {step: number for step, (number, _) in found.items()}
        if not is_ternary and not any(is_verdict for _, is_verdict in found.values()):
            judges[name].scores |= numbers
            continue
        if not set(numbers.values()) <= _TERNARY.keys():
            raise DataError(
                f"{file}: next to step_labels or scores below 0, every score must be -1, 0 or 1, but {name} has "
                "others. Rescale to 0 to 1."
            )
        judges[name].scores |= {step: _TERNARY[int(number)] for step, number in numbers.items()}
        firsts = {run: NO_ERROR for run, _ in numbers}
        for (run, step), number in sorted(numbers.items()):
            if number < 0 and firsts[run] == NO_ERROR:
                firsts[run] = step
        judges[name].firsts = (judges[name].firsts or {}) | firsts
