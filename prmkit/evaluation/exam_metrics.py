"""The metrics of an exam, as the public sets define them, for judges and constants.

With s the score of a step and t a threshold, the first error is the first step with s < t, if any. AUROC and average
precision need no threshold and come first. If a threshold is needed, it is chosen on other tasks (five folds); a
judge that gave verdicts does not need a threshold. Intervals are over tasks.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prmkit.evaluation import statistics
from prmkit.evaluation.estimates import Estimate, Floats, make_sample, mean, measure, measure_binary, ratio, undefined
from prmkit.evaluation.exam import KINDS_OF_ERRORS, NO_ERROR, Exam, ExamRun, ExamStep
from prmkit.evaluation.exam_answers import NOWHERE, JudgeScores, StepId
from prmkit.judge.types import SAME_SCORE
from prmkit.trajectories.run_fields import BAD, GOOD, NEUTRAL

Array = NDArray[Any]

FOLDS = 5
_GRID = np.arange(1, 102) / 100
"""The thresholds, from the lowest one that makes 0.00 bad to one that makes every score bad."""

METRICS_OF_EXAMS: Mapping[str, tuple[str, str]] = {
    "auroc": ("AUROC", "probability that a bad step gets a lower score than one that is not bad; guessing gives 0.5"),
    "average_precision": ("AP", "average precision for bad steps; guessing gives their fraction"),
    "first_error": (
        "first error",
        "runs whose first bad step is found exactly, or that are correctly called free of bad steps (FirstErrAcc)",
    ),
    "processbench_f1": ("PB-F1", "harmonic mean of that accuracy on runs with a bad step and on runs without"),
    "step_accuracy": ("StepAcc", "steps judged wrong, neutral or right as in the human labels (StepAcc)"),
    "located": ("step ±0", "runs with an error in which exactly that step is found"),
    "located_1": ("step ±1", "the same, but the message before or after it is also accepted"),
    "agent": ("agent", "runs with an error in which that step's agent is found"),
    "silent_recall": ("silent", "flagged fraction of the runs with an error but a good outcome"),
    "loud_recall": ("loud", "flagged fraction of the runs with an error and a bad outcome"),
    "false_alarms": ("alarms", "flagged fraction of the runs without an error; lower is better"),
    "f1_bad": ("F1 bad", "F1 of bad steps"),
    "f1_good": ("F1 good", "F1 of the others"),
}
"""Metric -> its column's header and its meaning, in the order of the table."""


@dataclass(frozen=True)
class Entrant:
    """One line of the table."""

    name: str
    kind: str
    """`judge`, `base`, `constant`, `published` or `people`."""
    metrics: Mapping[str, Estimate]
    answered: int = 0
    """The number of labelled steps with a score."""
    asked: int = 0
    source: str | None = None
    """The source of published numbers."""
    selected: int = 0
    """The number of answered steps that `ask_judges.py --first` selected, which are weighted."""


def examine(exam: Exam, answers: JudgeScores, kind: str = "judge") -> Entrant:
    """Return every metric that the exam's labels allow.

    Args:
        exam: the exam.
        answers: the answers of a judge or a constant.
        kind: the kind of entrant.
    """
    folds = _folds(exam)
    metrics = _of_steps(exam, answers, folds) | _of_runs(exam, answers, folds)
    labelled = [(run.trajectory_id, step.n) for run, step in exam.labelled]
    scored = [step for step in labelled if step in answers.scores]
    return Entrant(
        answers.name,
        kind,
        {name: metrics[name] for name in METRICS_OF_EXAMS if name in metrics},
        len(scored),
        len(labelled),
        selected=sum(answers.weights.get(step, 0) > 0 for step in scored),
    )


def _folds(exam: Exam) -> dict[str, int]:
    """Assign each task to a fold by the hash of its name, so that folds are the same for every judge."""
    tasks = sorted(
        {run.task_id for run in exam.runs}, key=lambda task: hashlib.sha256(task.encode(errors="replace")).digest()
    )
    return {task: place % FOLDS for place, task in enumerate(tasks)}


# --- steps ------------------------------------------------------------------------------------------------------------


def _of_steps(exam: Exam, answers: JudgeScores, folds: Mapping[str, int]) -> dict[str, Estimate]:
    found = [
        (run, step, answers.scores[run.trajectory_id, step.n])
        for run, step in exam.labelled
        if (run.trajectory_id, step.n) in answers.scores
    ]
    names = ["auroc", "average_precision", "f1_bad", "f1_good"]
    is_ternary = all(step.kind == "ternary" for _, step in exam.labelled)
    if not found:
        return {name: undefined("no labelled step has a score") for name in names}
    tasks = [run.task_id for run, _, _ in found]
    weight = np.array([step.weight * (answers.weights.get((run.trajectory_id, step.n)) or 1) for run, step, _ in found])
    bad = np.array([step.is_bad for _, step, _ in found], np.float64)
    scores = np.array([score for _, _, score in found])
    sample = make_sample(-scores, bad, tasks, weight=weight)
    metrics: dict[str, Estimate] = {}
    for name, statistic in (("auroc", statistics.roc_area), ("average_precision", statistics.average_precision)):
        metrics[name] = measure_binary(sample, statistic(sample))
    fold = np.array([folds[task] for task in tasks])
    flagged = _flagged(answers, scores, bad, weight, fold)
    for name, is_bad in (("f1_bad", True), ("f1_good", False)):
        metrics[name] = _f1(tasks, flagged, bad, weight, is_bad=is_bad)
    if is_ternary:
        labels = np.array([step.label for _, step, _ in found])
        metrics["step_accuracy"] = _step_accuracy(answers, scores, labels, weight, tasks, fold)
    return metrics


def _flagged(answers: JudgeScores, scores: Floats, bad: Floats, weight: Floats, fold: Array) -> Array | None:
    """Return which steps are judged bad; None if there is no other task on which to choose a threshold."""
    if answers.firsts is not None:
        return scores < NEUTRAL - SAME_SCORE
    below = scores[:, None] < _GRID - SAME_SCORE

    def f1(inside: Array) -> Floats:
        hits = (below & (bad[:, None] > 0) & inside[:, None]).T @ weight
        return ratio(2 * hits, (below & inside[:, None]).T @ weight + (bad * inside) @ weight)

    return _by_fold(fold, f1, lambda place, outside: below[outside, place])


def _by_fold(fold: Array, worth: Callable[[Array], Array], apply: Callable[[int, Array], Array]) -> Array | None:
    """Apply to each fold the threshold that is best on the other folds, and return the results."""
    if len(np.unique(fold)) < 2:
        return None
    result = None
    for held_out in np.unique(fold):
        outside = fold == held_out
        values = np.nan_to_num(worth(~outside), nan=-1.0)
        # Take the middle of equally good thresholds, because the extreme ones generalise worse to other tasks.
        best = np.flatnonzero(values >= values.max() - 1e-12)
        said = apply(int(best[len(best) // 2]), outside)
        result = np.zeros(len(fold), np.asarray(said).dtype) if result is None else result
        result[outside] = said
    return result


_ONE_TASK = "no other task on which to choose a threshold"


def _f1(tasks: Sequence[str], flagged: Array | None, bad: Floats, weight: Floats, *, is_bad: bool) -> Estimate:
    if flagged is None:
        return undefined(_ONE_TASK, len(bad), 1)
    said, true = (flagged > 0) == is_bad, (bad > 0) == is_bad
    sample = make_sample(said, true, tasks, weight=weight)
    hits, all_said, all_true = (sample.sums(part) for part in (said & true, said, true))

    def statistic(weights: Floats) -> Floats:
        return ratio(2 * weights @ hits, weights @ all_said + weights @ all_true)

    return measure(sample, statistic)


def _step_accuracy(
    answers: JudgeScores, scores: Floats, labels: Floats, weight: Floats, tasks: Sequence[str], fold: Array
) -> Estimate:
    """StepAcc: two thresholds, chosen together, turn scores into wrong, neutral or right."""
    called: Array | None
    if answers.firsts is not None:
        called = np.isclose(scores, labels)
    else:
        grid = np.unique(np.quantile(scores, np.linspace(0, 1, 21)))
        pairs = [(low, high) for low in (*grid, 2.0) for high in (*grid, 2.0) if low <= high]
        lows, highs = np.array(pairs).T
        said = np.where(scores[:, None] < lows, BAD, np.where(scores[:, None] < highs, NEUTRAL, GOOD))
        equal = np.isclose(said, labels[:, None])
        called = _by_fold(
            fold, lambda inside: (equal & inside[:, None]).T @ weight, lambda place, outside: equal[outside, place]
        )
    if called is None:
        return undefined(_ONE_TASK, len(scores), 1)
    return mean(called, tasks, weight)


# --- runs -------------------------------------------------------------------------------------------------------------


def _of_runs(exam: Exam, answers: JudgeScores, folds: Mapping[str, int]) -> dict[str, Estimate]:
    known = [run for run in exam.runs if run.first_error is not None]
    with_error = [run for run in known if run.first_error != NO_ERROR]
    clean = len(known) - len(with_error)
    if not known:
        return {}
    selected = answers.selected_runs
    answered = [run for run in known if run.trajectory_id not in selected and _is_answered(run, answers)]
    firsts = _first_errors(answered, answers, folds)
    metrics: dict[str, Estimate] = {}
    if with_error:
        metrics["first_error"] = _hit_rate(answered, firsts, lambda run, first: first == run.first_error)
    if with_error and clean:
        metrics["processbench_f1"] = _processbench(answered, firsts)
    if any(step.kind in KINDS_OF_ERRORS for _, step in exam.labelled) and with_error:
        metrics |= _located(exam, [run for run in answered if run.first_error != NO_ERROR], answers)
    return metrics | _recalls(answered, firsts)


def _is_answered(run: ExamRun, answers: JudgeScores) -> bool:
    first = NO_ERROR if answers.firsts is None else answers.firsts.get(run.trajectory_id)
    return first == NOWHERE or (
        first is not None and all((run.trajectory_id, step.n) in answers.scores for step in run.steps)
    )


def _first_errors(runs: Sequence[ExamRun], answers: JudgeScores, folds: Mapping[str, int]) -> list[int] | None:
    """Return the first error that the judge sees in each run; None if no other task could give a threshold."""
    if answers.firsts is not None:
        return [answers.firsts[run.trajectory_id] for run in runs]
    if not runs:
        return []
    firsts = np.stack([_first_below(run, answers) for run in runs])
    true = np.array([run.first_error for run in runs])
    hit, wrong = firsts == true[:, None], true != NO_ERROR
    fold = np.array([folds[run.task_id] for run in runs])

    def worth(inside: Array) -> Floats:
        sides = [hit[inside & side].mean(axis=0) for side in (wrong, ~wrong) if (inside & side).any()]
        return sides[0] if len(sides) == 1 else ratio(2 * sides[0] * sides[1], sides[0] + sides[1])

    chosen = _by_fold(fold, worth, lambda place, outside: firsts[outside, place])
    return None if chosen is None else chosen.astype(int).tolist()


def _first_below(run: ExamRun, answers: JudgeScores) -> Array:
    """Return the first step below each threshold of the grid; `NO_ERROR` if no step is below it."""
    scores = np.array([answers.scores[run.trajectory_id, step.n] for step in run.steps])
    place = (np.minimum.accumulate(scores)[:, None] >= _GRID - SAME_SCORE).sum(axis=0)
    return np.where(place < len(scores), place + 1, NO_ERROR)


def _hit_rate(
    runs: Sequence[ExamRun], firsts: Sequence[int] | None, is_hit: Callable[[ExamRun, int], bool]
) -> Estimate:
    if firsts is None:
        return undefined(_ONE_TASK, len(runs), 1)
    hits = [float(is_hit(run, first)) for run, first in zip(runs, firsts, strict=True)]
    return _share(hits, runs)


def _share(values: Sequence[float], runs: Sequence[ExamRun]) -> Estimate:
    return mean(values, [run.task_id for run in runs])


def _processbench(runs: Sequence[ExamRun], firsts: Sequence[int] | None) -> Estimate:
    if firsts is None:
        return undefined(_ONE_TASK, len(runs), 1)

    # That statistic uses -1 for no error; NOWHERE must not be mistaken for it.
    def renamed(first: int) -> int:
        return {NO_ERROR: -1, NOWHERE: -2}.get(first, first)

    true = [renamed(run.first_error or NO_ERROR) for run in runs]
    sample = make_sample([renamed(first) for first in firsts], true, [run.task_id for run in runs])
    return measure(sample, statistics.first_error_f1(sample))


def _located(exam: Exam, runs: Sequence[ExamRun], answers: JudgeScores) -> dict[str, Estimate]:
    """Return the location metrics. The judge's answer is the step with the lowest score, the first one in a tie."""
    said = [_lowest(run, answers) for run in runs]
    true = [run.steps[(run.first_error or 1) - 1] for run in runs]
    pairs = list(zip(said, true, strict=True))
    metrics = {
        name: _share([float(step is not None and abs(step.place - right.place) <= far) for step, right in pairs], runs)
        for name, far in (("located", 0), ("located_1", 1))
    }
    if len({step.agent for run in exam.runs for step in run.steps}) > 1:
        metrics["agent"] = _share(
            [float(step is not None and step.agent == right.agent) for step, right in pairs], runs
        )
    return metrics


def _lowest(run: ExamRun, answers: JudgeScores) -> ExamStep | None:
    if answers.firsts is not None:
        first = answers.firsts[run.trajectory_id]
        return run.steps[first - 1] if first > 0 else None
    return min(run.steps, key=lambda step: answers.scores[run.trajectory_id, step.n])


def _recalls(runs: Sequence[ExamRun], firsts: Sequence[int] | None) -> dict[str, Estimate]:
    """Return the fractions of flagged runs, among runs whose outcome is known."""
    groups: dict[str, Callable[[ExamRun], bool]] = {
        "silent_recall": lambda run: run.first_error != NO_ERROR and run.succeeded is True,
        "loud_recall": lambda run: run.first_error != NO_ERROR and run.succeeded is False,
        "false_alarms": lambda run: run.first_error == NO_ERROR,
    }
    if firsts is None or not any(run.succeeded is not None for run in runs):
        return {}
    metrics = {}
    for name, belongs in groups.items():
        chosen = [(run, first) for run, first in zip(runs, firsts, strict=True) if belongs(run)]
        if chosen:
            metrics[name] = _share([float(first != NO_ERROR) for _, first in chosen], [run for run, _ in chosen])
    return metrics


# --- constants --------------------------------------------------------------------------------------------------------


def constants(exam: Exam) -> list[Entrant]:
    """Return baselines that do not read the runs; those that use labels use only labels of other tasks."""
    steps = [(run.trajectory_id, step.n) for run in exam.runs for step in run.steps]
    every_run = [run.trajectory_id for run in exam.runs]
    all_good = JudgeScores("every step good", dict.fromkeys(steps, GOOD), dict.fromkeys(every_run, NO_ERROR))
    firsts = {run.trajectory_id: run.steps[0].n for run in exam.runs}
    all_bad = JudgeScores("every step bad (first)", dict.fromkeys(steps, BAD), firsts)
    entrants = [examine(exam, answers, "constant") for answers in (all_good, all_bad, _by_position(exam))]
    if any(run.first_error for run in exam.runs):
        entrants.append(examine(exam, _commonest_place(exam), "constant"))
    if "agent" in entrants[0].metrics:
        entrants.append(_commonest_agent(exam))
    return entrants


def _by_position(exam: Exam) -> JudgeScores:
    """Score a step by the fraction of good steps at its position in the other half of the tasks.

    Excluding only a step's own task would give an AUROC below 0.5 where positions mean nothing, because a good step
    would lower the fraction that scores it. For the same reason each half's fractions are relative to its own mean. A
    run's last step is a position of its own.
    """
    half_of = {task: place % 2 for place, task in enumerate(sorted({run.task_id for run in exam.runs}))}
    counts: dict[Any, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for run, step in exam.labelled:
        half = half_of[run.task_id]
        for key in ((half, _position(run, step)), half, None):
            counts[key][0] += step.weight * (not step.is_bad)
            counts[key][1] += step.weight
    mean = {key: good / size for key, (good, size) in counts.items()}
    scores = {}
    for run in exam.runs:
        other = 1 - half_of[run.task_id]
        usual = mean.get(other, mean[None])
        for step in run.steps:
            good, size = counts.get((other, _position(run, step)), (0.0, 0.0))
            fraction = (good + usual) / (size + 1)  # a pseudo-count of one step
            scores[run.trajectory_id, step.n] = min(max(fraction - usual + mean[None], 0.0), 1.0)
    return JudgeScores("position alone", scores)


def _position(run: ExamRun, step: ExamStep) -> tuple[int, bool]:
    return min(step.n, 30), run.is_whole and step.n == len(run.steps)


def _commonest_place(exam: Exam) -> JudgeScores:
    """Predict the message at which runs of other tasks go wrong most often."""
    places = Counter[int]()
    of_task: dict[str, Counter[int]] = defaultdict(Counter)
    for run in exam.runs:
        if run.first_error:
            place = run.steps[run.first_error - 1].place
            places[place] += 1
            of_task[run.task_id][place] += 1
    firsts: dict[str, int] = {}
    scores: dict[StepId, float] = {}
    for run in exam.runs:
        others = places - of_task[run.task_id]
        best = min(others, key=lambda place: (-others[place], place), default=None)
        first = next((step.n for step in run.steps if step.place == best), NO_ERROR)
        firsts[run.trajectory_id] = first
        scores |= {(run.trajectory_id, step.n): BAD if step.n == first else GOOD for step in run.steps}
    return JudgeScores("commonest step elsewhere", scores, firsts)


def _commonest_agent(exam: Exam) -> Entrant:
    """Predict the agent that goes wrong most often in other tasks."""
    runs = [run for run in exam.runs if run.first_error]
    agents = {run.trajectory_id: run.steps[(run.first_error or 1) - 1].agent for run in runs}
    hits = []
    for run in runs:
        others = Counter(agents[other.trajectory_id] for other in runs if other.task_id != run.task_id)
        best = min(others, key=lambda agent: (-others[agent], str(agent)), default=None)
        hits.append(float(best == agents[run.trajectory_id]))
    return Entrant("commonest agent elsewhere", "constant", {"agent": _share(hits, runs)})
