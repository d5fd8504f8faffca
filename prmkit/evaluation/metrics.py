"""All metrics, in one table, and the parts of `metrics.json` that are computed from it.

An entry of `METRICS` is computed for the judge, written to `metrics.json`, and, if it has a header, shown everywhere.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prmkit.evaluation import statistics
from prmkit.evaluation.estimates import (
    SAME_PREDICTION,
    Estimate,
    Floats,
    Sample,
    Statistic,
    make_sample,
    mean,
    measure,
    measure_binary,
    ratio,
    undefined,
)
from prmkit.evaluation.predictions import (
    Row,
    Scores,
    bad_of_flagged,
    bad_steps,
    by_mean,
    by_median,
    confidence,
    flagged_of_bad,
    has_score,
    pairs,
    praised_of_bad,
    probability_of_bad,
    suspicion,
    within_own_range,
)
from prmkit.judge.types import BAD_BELOW, LOW_LABEL_MASS, SAME_SCORE, SCORED, first_below
from prmkit.rows import EVALUATION_TYPES, OUTCOME, SELECTED_BY, STEP_TYPES, weight_of, whole_number
from prmkit.verdict import AGGREGATES

Metrics = dict[str, Any]
"""Name -> `Estimate`, a nested dictionary of this kind, or a plain number or string."""

ALL = "all"
"""The name for all evaluation types, or all keys, in `metrics.json`."""
ORDER = "spearman_within_keys"
"""The correlation that is shown and graded. Pooled over keys, even a judge that predicts the mean of each key has some
correlation; within keys, it does not."""
MIN_SCORES = 10
"""No correlation, kappa or ranking is reported for fewer scores: three points are easily in order by chance."""
MIN_PAIRS = 30
STRICT = str(BAD_BELOW[0])
"""The threshold in `metrics["bad_step"]` that conclusions and gates use."""


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metric:
    """A metric of a judge."""

    name: str
    """The key in `metrics.json`."""
    statistic: Callable[[Sample], Statistic]
    min_n: int
    """With fewer entries in the sample than this, there is no value."""
    sample: Callable[..., Sample]
    """Makes the sample from the scores; for a metric `at_thresholds` from the scores and a threshold."""
    header: str = ""
    """The header of the metric's column on the terminal and in the report; empty if it is only in `metrics.json`."""
    meaning: str = ""
    """The explanation of that column in the legend."""
    importance: int = 0
    """The importance of that column: on narrow terminals, the least important columns are dropped first."""
    brief: bool = False
    """Whether the metric is also computed for baselines, against single judges, and in breakdowns."""
    at_thresholds: bool = False
    """Whether the metric is computed once per threshold of `BAD_BELOW`, under `bad_step`."""
    binary: bool = False
    """Whether the metric needs both classes: bad steps and others."""

    def estimate(self, sample: Sample) -> Estimate:
        """Return the metric of a sample, with its interval."""
        measured = measure_binary if self.binary else measure
        return measured(sample, self.statistic(sample), min_n=self.min_n)


METRICS = (
    Metric(ORDER, statistics.spearman_within, MIN_SCORES, by_mean, "Spearman", "rank correlation with the judges' "
           "mean, key by key", importance=11, brief=True),
    Metric("spearman", statistics.spearman, MIN_SCORES, by_mean),
    Metric("pearson", statistics.pearson, MIN_SCORES, by_mean, brief=True),
    Metric("rmse", statistics.root_mean_square_error, 1, by_mean, "RMSE", "root mean square error of the score (the "
           "mean of the judge's distribution)", importance=6, brief=True),
    Metric("skill", statistics.skill_by_rmse, 1, by_mean, "skill", "1 - RMSE / RMSE of a constant (the training mean); "
           "0 is no better than the constant", importance=8),
    Metric("mae", statistics.mean_absolute_error, 1, by_median, "MAE", "mean absolute error of the median of the "
           "judge's distribution", importance=3, brief=True),
    Metric("skill_mae", statistics.skill_by_mae, 1, by_median),
    Metric("bias", statistics.bias, 1, by_mean, brief=True),
    Metric("pairwise_accuracy", statistics.pairwise_accuracy, MIN_PAIRS, pairs, "pairs", "pairs of scores of one run "
           "in the right order or correctly tied", importance=7),
    Metric("pairwise_always_tied", statistics.always_tied, MIN_PAIRS, pairs),
    Metric("kappa", statistics.kappa, MIN_SCORES, by_mean, "kappa", "on the five bands, quadratic "
           "weights", importance=1),
    Metric("praised_share", statistics.share_predicted, 1, praised_of_bad),
    Metric("own_range_share", statistics.share_predicted, MIN_SCORES, within_own_range),
    Metric("bad_share", statistics.share_of_reference, 1, suspicion, at_thresholds=True),
    Metric("auroc", statistics.roc_area, MIN_SCORES, suspicion, "AUROC", f"separating steps below {STRICT} from "
           "the rest; 0.5 is chance", importance=10, brief=True, at_thresholds=True, binary=True),
    Metric("average_precision", statistics.average_precision, MIN_SCORES, suspicion, at_thresholds=True,
           binary=True),
    Metric("recall", statistics.share_predicted, 1, flagged_of_bad, at_thresholds=True),
    Metric("precision", statistics.share_predicted, 1, bad_of_flagged, at_thresholds=True),
    Metric("brier", statistics.brier, MIN_SCORES, probability_of_bad, at_thresholds=True),
    Metric("ece", statistics.calibration_error, MIN_SCORES, probability_of_bad, at_thresholds=True),
    Metric("ece_by_chance", statistics.calibration_error_by_chance, MIN_SCORES, probability_of_bad, at_thresholds=True),
    Metric("aurc", statistics.area_under_risk_coverage, MIN_SCORES, confidence),
    Metric("aurc_random", statistics.share_of_reference, MIN_SCORES, confidence),
    Metric("abstention_closed", statistics.share_of_abstention_closed, MIN_SCORES, confidence),
)  # fmt: skip


def agreement(scores: Scores, *, brief: bool = False) -> Metrics:
    """Measure how well the predicted scores agree with the reference.

    The judge, every baseline and every other judge are measured by this function, so their metrics are comparable.

    Args:
        scores: the scores of one evaluation type and key, or of several together.
        brief: compute only the metrics on which baselines are compared.
    """
    metrics: Metrics = {"bad_step": {str(threshold): {} for threshold in (BAD_BELOW[:1] if brief else BAD_BELOW)}}
    for metric in METRICS:
        if metric.brief or not brief:
            if metric.at_thresholds:
                for threshold, of_threshold in metrics["bad_step"].items():
                    of_threshold[metric.name] = metric.estimate(metric.sample(scores, float(threshold)))
            else:
                metrics[metric.name] = metric.estimate(metric.sample(scores))
    order = metrics[ORDER]
    if order.value is None and order.n >= MIN_SCORES and _is_constant_by_key(scores):
        metrics[ORDER] = replace(order, reason=SAME_PREDICTION)
    if not brief:
        metrics["kendall"] = _kendall(scores)
        metrics["surest"] = {str(share): _error_of_surest(scores, share) for share in (0.9, 0.75, 0.5)}
    return metrics


def _is_constant_by_key(scores: Scores) -> bool:
    return all(np.ptp(scores.predicted[scores.kind == kind]) == 0 for kind in np.unique(scores.kind))


def _kendall(scores: Scores) -> Estimate:
    sample = by_mean(scores)
    if np.any(scores.weight != 1):
        return undefined("not computed for weighted prompts", len(scores), sample.tasks)
    value = statistics.kendall(sample) if len(scores) >= MIN_SCORES else float("nan")
    if not np.isfinite(value):
        return undefined("not defined for these scores", len(scores), sample.tasks)
    return Estimate(value, None, None, len(scores), sample.tasks, "no interval is computed for it")


def _error_of_surest(scores: Scores, share: float) -> Estimate:
    """Return the mean absolute error of that fraction of the scores of which the judge is most certain."""
    known = scores.where(np.isfinite(scores.std))
    by_confidence = known.where(np.argsort(known.std, kind="stable"))
    kept = np.cumsum(by_confidence.weight) <= share * by_confidence.weight.sum() + 1e-9
    sample = confidence(by_confidence.where(kept))
    return measure(sample, statistics.share_of_reference(sample), min_n=MIN_SCORES)


def recommended_threshold(scores: Scores, folds: int = 5) -> Metrics | None:
    """Choose the score below which a step is called bad: the threshold with the greatest F1 for bad below `STRICT`.

    Precision and recall are measured on tasks that were not used to choose the threshold.

    Returns:
        The threshold with its precision and recall; None with fewer than `MIN_SCORES` bad or good steps, or too few
        tasks.
    """
    bad, weight = bad_steps(scores, BAD_BELOW[0]) > 0, scores.weight
    fold = np.random.default_rng(0).permutation(int(scores.task.max(initial=-1)) + 1)[scores.task] % folds
    if min(bad.sum(), (~bad).sum()) < MIN_SCORES or len(np.unique(fold)) < folds:
        return None
    flagged = np.zeros(len(scores), bool)
    for held_out in range(folds):
        inside = fold != held_out
        flagged[~inside] = scores.predicted[~inside] < _best_threshold(scores.where(inside), bad[inside])
    hits = float(weight @ (flagged & bad))
    return {
        "below": _best_threshold(scores, bad),
        "precision": hits / float(weight @ flagged) if flagged.any() else None,
        "recall": hits / float(weight @ bad),
        "flagged_share": float(weight @ flagged / weight.sum()),
    }


def _best_threshold(scores: Scores, bad: NDArray[np.bool_]) -> float:
    thresholds = np.arange(1, 101) / 100
    flagged = _weight_below(thresholds, scores.predicted, scores.weight)
    hits = _weight_below(thresholds, scores.predicted[bad], scores.weight[bad])
    f1 = ratio(2 * hits, flagged + scores.weight @ bad)
    return float(thresholds[np.nanargmax(np.round(f1, 12))])


def _weight_below(thresholds: Floats, values: Floats, weight: Floats) -> Floats:
    """Return the total weight of the values below each threshold."""
    rising = np.argsort(values, kind="stable")
    up_to = np.concatenate([[0.0], np.cumsum(weight[rising])])
    return up_to[np.searchsorted(values[rising], thresholds)]


# --- groups of scores -------------------------------------------------------------------------------------------------


def evaluation_types(rows: Sequence[Row]) -> list[str]:
    """Return the evaluation types in the order of all tables."""
    return sorted({row["evaluation_type"] for row in rows}, key=_type_order)


def _type_order(evaluation_type: str) -> tuple[int, str]:
    known = list(EVALUATION_TYPES)
    return (known.index(evaluation_type) if evaluation_type in known else len(known)), evaluation_type


def groups(scores: Scores) -> Iterator[tuple[str, str, bool, NDArray[Any]]]:
    """Yield all scores, then those of each evaluation type with more than one key, then those of each key.

    Yields:
        Evaluation type, key, whether the type has no other key, and the mask of the scores.
    """
    yield ALL, ALL, False, np.full(len(scores), True)
    for evaluation_type in sorted(set(scores.evaluation_type), key=_type_order):
        of_type = scores.evaluation_type == evaluation_type
        keys = list(dict.fromkeys(scores.key[of_type]))
        if len(keys) > 1:
            yield evaluation_type, ALL, False, of_type
        for key in keys:
            yield evaluation_type, key, len(keys) == 1, of_type & (scores.key == key)


# --- validity ---------------------------------------------------------------------------------------------------------


def validity(rows: Sequence[Row]) -> Metrics:
    """Count the prompts with scores and the reasons why others have none, and measure the probability on scores.

    Prompts without a score are in no other metric, so this is shown together with the metrics.
    """
    scored = [row for row in rows if row["status"] in SCORED]
    reasons = Counter(row["reason"] or row["status"] for row in rows if row["status"] not in SCORED)
    label_mass = [(row, each["label_mass"]) for row in scored for each in row["scores"].values()]
    known = [(row, mass) for row, mass in label_mass if mass is not None and np.isfinite(mass)]
    metrics: Metrics = {
        "prompts": len(rows),
        "statuses": dict(Counter(row["status"] for row in rows)),
        "reasons": dict(reasons.most_common(10)),
        "trimmed": sum(row["trimmed"] for row in rows),
        "repaired": sum(row["repaired"] for row in scored),
        "keys_without_reference": sum(key not in row["reference"] for row in scored for key in row["scores"]),
        "scores_asked": sum(len(row["reference"]) for row in rows),
        "scores_made": sum(has_score(row, key) for row in scored for key in row["reference"]),
        "scored_share": _share(rows, [float(row["status"] in SCORED) for row in rows]),
        "strictly_valid_share": _share(rows, [float(row["status"] in SCORED and not row["repaired"]) for row in rows]),
    }
    if known:
        masses = np.array([mass for _, mass in known])
        with_mass = [row for row, _ in known]
        metrics["label_mass"] = _share(with_mass, masses)
        metrics["label_mass_lowest"] = float(masses.min())
        metrics["label_mass_low_share"] = _share(with_mass, masses < LOW_LABEL_MASS)
    return metrics


def _share(rows: Sequence[Row], values: Any) -> Estimate:
    weight = [weight_of(row["metadata"]) for row in rows]
    return mean(values, [row["task_id"] for row in rows], weight)


# --- complete trajectories --------------------------------------------------------------------------------------------

NO_BAD_STEP = -1


@dataclass(frozen=True)
class JudgedRun:
    """The clips of one trajectory in order, and the judges' score for its answer."""

    task: str
    predicted: list[float]
    reference: list[float]
    outcome: float | None
    """The reference for `OUTCOME`; None if no judge gave one."""


def trajectories_of(rows: Sequence[Row], incomplete: Collection[str] = ()) -> tuple[list[JudgedRun], dict[str, int]]:
    """Group clips by trajectory.

    Args:
        rows: the predictions.
        incomplete: the tasks of which, because of `--limit`, not every prompt was scored.

    Returns:
        The complete trajectories, and the number of excluded ones by reason. A missing or unscored step, or one without
        a clip number, would change every aggregate; two prompts with one clip number belong to different runs.
    """
    clips: dict[tuple[str, str], dict[float, list[Row]]] = defaultdict(lambda: defaultdict(list))
    outcomes: dict[tuple[str, str], float] = {}
    chosen = {(row["task_id"], row["trajectory_id"]) for row in rows if SELECTED_BY in row["metadata"]}
    for row in rows:
        number, name = whole_number(row["clip_number"]), (row["task_id"], row["trajectory_id"])
        if row["evaluation_type"] in STEP_TYPES:
            clips[name][np.inf if number is None else number].append(row)
        if row["evaluation_type"] == "final" and OUTCOME in row["reference"]:
            outcomes[name] = row["reference"][OUTCOME]
    whole, left_out = [], Counter[str]()
    for name, by_number in clips.items():
        steps = [by_number[number] for number in sorted(by_number)]
        if name in chosen:
            left_out["steps that ask_judges.py --first selected"] += 1
        elif np.inf in by_number:
            left_out["a step without a clip number"] += 1
        elif any(len(same) > 1 for same in steps):
            left_out["two prompts for one clip number (give each run a trajectory_id)"] += 1
        elif name[0] in incomplete or max(by_number) - min(by_number) >= len(by_number):
            left_out["a missing clip"] += 1
        elif not all(has_score(row, key) for (row,) in steps for key in row["reference"]):
            left_out["a step without a score"] += 1
        else:
            predicted = [_mean(row["scores"][key]["mean"] for key in row["reference"]) for (row,) in steps]
            reference = [_mean(row["reference"].values()) for (row,) in steps]
            whole.append(JudgedRun(name[0], predicted, reference, outcomes.get(name)))
    return whole, dict(left_out)


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))


def trajectory_metrics(rows: Sequence[Row], incomplete: Collection[str] = ()) -> Metrics:
    """Measure how well step scores (this judge's, and the judges' means) predict the answer's score.

    Against the outcome: Spearman, Pearson, and AUROC for a wrong answer (outcome below 0.5). Also ProcessBench F1.
    Intervals are over tasks, each of which may have several trajectories. For the arguments see `trajectories_of`.
    """
    trajectories, left_out = trajectories_of(rows, incomplete)
    ended = [each for each in trajectories if each.outcome is not None]
    return {
        "trajectories": len(trajectories),
        "with_outcome": len(ended),
        "outcome": OUTCOME,
        "left_out": left_out,
        "aggregates": {
            name: {
                "judge": _against_outcome([aggregate(each.predicted) for each in ended], ended),
                "reference": _against_outcome([aggregate(each.reference) for each in ended], ended),
            }
            for name, aggregate in AGGREGATES.items()
        },
        "first_bad_step": {str(threshold): _first_errors(trajectories, threshold) for threshold in BAD_BELOW},
    }


def _against_outcome(scores: Sequence[float], trajectories: Sequence[JudgedRun]) -> Metrics:
    tasks = [each.task for each in trajectories]
    outcomes = np.array([each.outcome for each in trajectories], np.float64)
    sample = make_sample(scores, outcomes, tasks)
    wrong = make_sample([-score for score in scores], outcomes < BAD_BELOW[0] - SAME_SCORE, tasks)
    return {
        "pearson": measure(sample, statistics.pearson(sample), min_n=MIN_SCORES),
        "spearman": measure(sample, statistics.spearman(sample), min_n=MIN_SCORES),
        "auroc": measure(wrong, statistics.roc_area(wrong), min_n=MIN_SCORES),
    }


def _first_errors(trajectories: Sequence[JudgedRun], threshold: float) -> Metrics:
    def first(steps: list[float]) -> int:
        return NO_BAD_STEP if (found := first_below(steps, threshold)) is None else found

    predicted = np.array([first(each.predicted) for each in trajectories], np.int64)
    reference = np.array([first(each.reference) for each in trajectories], np.int64)
    sample = make_sample(predicted, reference, [each.task for each in trajectories])
    hits, bad = predicted == reference, reference != NO_BAD_STEP
    f1 = measure(sample, statistics.first_error_f1(sample), min_n=MIN_SCORES)
    if f1.value is None and f1.n >= MIN_SCORES:
        f1 = replace(f1, reason="every trajectory has a bad step" if bad.all() else "no trajectory has a bad step")
    return {
        "f1": f1,
        "with_bad_step": int(bad.sum()),
        "found": int(hits[bad].sum()),
        "without_bad_step": int((~bad).sum()),
        "cleared": int(hits[~bad].sum()),
    }
