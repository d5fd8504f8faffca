"""Whole trajectories: what the scores of the steps say about the answer, and where the first bad step is."""

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from prmkit.evaluation import measures
from prmkit.evaluation.agreement import FEWEST_SCORES, Figures
from prmkit.evaluation.bootstrap import Figure, Floats, make_sample, measure
from prmkit.evaluation.predictions import Row, has_score
from prmkit.judge.types import AGGREGATES, BAD_BELOW, SAME_SCORE, first_below
from prmkit.scoring.rows import whole_number

OUTCOME = "answer_correctness"
"""The key of a `final` verdict that says whether the trajectory reached its answer."""
WRONG_ANSWER_BELOW = 0.5
NO_BAD_STEP = -1


@dataclass(frozen=True)
class Trajectory:
    """The clips of one task in order, and what the judges thought of its answer."""

    task: str
    predicted: Floats
    reference: Floats
    outcome: float | None
    """The reference for `OUTCOME`; None where no judge gave one."""


def first_bad_step(steps: Floats, limit: float) -> int:
    """The position of the first score below `limit`, counted from 0; -1 where there is none."""
    found = first_below(steps.tolist(), limit)
    return NO_BAD_STEP if found is None else found


def trajectories_of(rows: Sequence[Row], cut: Collection[str] = ()) -> tuple[list[Trajectory], dict[str, int]]:
    """Put clips together by task.

    Args:
        rows: predictions.
        cut: tasks of which not every prompt was asked.

    Returns:
        The whole trajectories, and how many were left out for which reason: a step without a score would change every
        aggregate, as one that is not there does, and two prompts for one clip number mean that the task was run more
        than once.
    """
    clips: dict[str, dict[int, list[Row]]] = defaultdict(lambda: defaultdict(list))
    outcomes: dict[str, float] = {}
    for row in rows:
        number = whole_number(row["clip_number"])
        if row["evaluation_type"] == "clip" and number is not None:
            clips[row["task_id"]][number].append(row)
        if row["evaluation_type"] == "final" and OUTCOME in row["reference"]:
            outcomes[row["task_id"]] = row["reference"][OUTCOME]
    whole, left_out = [], Counter[str]()
    for task, by_number in clips.items():
        steps = [by_number[number] for number in sorted(by_number)]
        if any(len(same) > 1 for same in steps):
            left_out["two prompts for one clip number"] += 1
        elif task in cut or max(by_number) - min(by_number) >= len(by_number):
            left_out["a clip is missing"] += 1
        elif not all(has_score(row, key) for (row,) in steps for key in row["reference"]):
            left_out["a step without a score"] += 1
        else:
            predicted = [_mean([row["scores"][key]["mean"] for key in row["reference"]]) for (row,) in steps]
            reference = [_mean(list(row["reference"].values())) for (row,) in steps]
            whole.append(Trajectory(task, np.array(predicted), np.array(reference), outcomes.get(task)))
    return whole, dict(left_out)


def _mean(values: list[float]) -> float:
    return float(np.mean(values))


def trajectory_figures(rows: Sequence[Row], cut: Collection[str] = ()) -> Figures:
    """What the step scores say about the answer, and ProcessBench F1; the judges' own steps beside the judge's.

    Against the outcome: Spearman, Pearson, and AUROC for a wrong answer (outcome below 0.5). One trajectory a task.
    The arguments are those of `trajectories_of`.
    """
    trajectories, left_out = trajectories_of(rows, cut)
    ended = [each for each in trajectories if each.outcome is not None]
    return {
        "trajectories": len(trajectories),
        "with_outcome": len(ended),
        "outcome": OUTCOME,
        "left_out": left_out,
        "aggregates": {
            name: {
                "judge": _against_outcome([aggregate(each.predicted.tolist()) for each in ended], ended),
                "reference": _against_outcome([aggregate(each.reference.tolist()) for each in ended], ended),
            }
            for name, aggregate in AGGREGATES.items()
        },
        "first_bad_step": {str(limit): _first_errors(trajectories, limit) for limit in BAD_BELOW},
    }


def _against_outcome(scores: Sequence[float], trajectories: Sequence[Trajectory]) -> Figures:
    tasks = [each.task for each in trajectories]
    outcomes = np.array([each.outcome for each in trajectories], np.float64)
    sample = make_sample(scores, outcomes, tasks)
    suspicion = make_sample([-score for score in scores], outcomes < WRONG_ANSWER_BELOW - SAME_SCORE, tasks)
    return {
        "pearson": measure(sample, measures.pearson(sample), fewest=FEWEST_SCORES),
        "spearman": measure(sample, measures.spearman(sample), fewest=FEWEST_SCORES),
        "auroc": measure(suspicion, measures.roc_area(suspicion), fewest=FEWEST_SCORES),
    }


def _first_errors(trajectories: Sequence[Trajectory], limit: float) -> Figures:
    predicted = np.array([first_bad_step(each.predicted, limit) for each in trajectories], np.int64)
    reference = np.array([first_bad_step(each.reference, limit) for each in trajectories], np.int64)
    sample = make_sample(predicted, reference, [each.task for each in trajectories])
    hits, bad = predicted == reference, reference != NO_BAD_STEP
    f1 = measure(sample, measures.first_error_f1(sample), fewest=FEWEST_SCORES)
    if f1.value is None and f1.n >= FEWEST_SCORES:
        one_kind = "every trajectory has a bad step" if bad.all() else "no trajectory has a bad step"
        f1 = Figure(None, None, None, f1.n, f1.tasks, one_kind)
    return {
        "f1": f1,
        "with_bad_step": int(bad.sum()),
        "found": int(hits[bad].sum()),
        "without_bad_step": int((~bad).sum()),
        "cleared": int(hits[~bad].sum()),
    }
