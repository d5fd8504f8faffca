"""Baselines that a judge has to beat, the upper bound set by the judges' agreement, and metrics of subgroups."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prmkit.evaluation import statistics
from prmkit.evaluation.estimates import Estimate, Floats, Statistic, mean, measure, on_part, undefined
from prmkit.evaluation.metrics import ALL, METRICS, MIN_SCORES, ORDER, Metrics, agreement
from prmkit.evaluation.predictions import Row, Scores, by_mean, by_median
from prmkit.evaluation.statistics import weighted_mean
from prmkit.rows import SELECTED_BY, WEIGHT

COPY_WITHIN = 0.005
"""A score this close to one in the prompt counts as equal to it: prompts show two decimals."""

# --- baselines --------------------------------------------------------------------------------------------------------


def baselines(scores: Scores, base: Scores | None) -> Metrics:
    """Measure, on the same scores, what is possible without training.

    `constant`: always the mean (for RMSE) or the median (for MAE) of the training labels. `length` and `position`:
    ranking by the prompt's length or the clip's number alone. `copy`: repeating the scores of earlier clips that the
    prompt shows (their mean or the last, whichever has the smaller error), next to the judge on the same rows, because
    a judge that copies looks good exactly there. `base_model`: the model without its adapter, if it was asked, next to
    the judge on the rows that both scored.
    """
    constant = scores.predicting(scores.constant_mean)
    found: Metrics = {"constant": agreement(replace(constant, median=scores.constant_median), brief=True)}
    for name, values in (("length", scores.prompt_characters), ("position", scores.clip_number)):
        known = np.isfinite(values)
        if known.any() and np.ptp(values[known]) > 0:
            found[name] = _ranking(scores.where(known), values[known])
    shows_scores = np.isfinite(scores.leaked_mean)
    if shows_scores.any():
        found["copy"] = _copying(scores.where(shows_scores))
    if base is not None:
        mine, theirs = shared(scores, base)
        if len(mine):
            found["base_model"] = {
                "base": agreement(theirs, brief=True),
                "judge": agreement(mine, brief=True),
                "skill": _skill_over(mine, theirs.median),
            }
    return found


def _ranking(scores: Scores, values: Floats) -> Metrics:
    """Measure a ranking by one number, in the better direction per key, and what the judge adds to it."""
    directed = np.zeros(len(values))
    for kind in np.unique(scores.kind):
        chosen = scores.kind == kind
        reference, weight = scores.reference[chosen], scores.weight[chosen]
        with np.errstate(invalid="ignore"):
            along, up = (each - weighted_mean(each, weight) for each in (values[chosen], reference))
            direction = weighted_mean(along * up, weight)
        directed[chosen] = values[chosen] * (np.sign(direction) or 1.0)
    judge, ranking = by_mean(scores), by_mean(scores.predicting(directed))
    ours, theirs = (_or_zero(statistics.spearman_within(sample)) for sample in (judge, ranking))
    return {
        ORDER: measure(ranking, statistics.spearman_within(ranking), min_n=MIN_SCORES),
        "gain": measure(judge, lambda weights: ours(weights) - theirs(weights), min_n=MIN_SCORES),
    }


def _or_zero(statistic: Statistic) -> Statistic:
    """Count the undefined correlation of a constant ranking as 0."""
    return lambda weights: np.nan_to_num(statistic(weights))


def _copying(scores: Scores) -> Metrics:
    copies = {"mean": scores.leaked_mean, "last": scores.leaked_last}
    errors = {name: weighted_mean(np.abs(copy - scores.reference), scores.weight) for name, copy in copies.items()}
    better = min(errors, key=errors.__getitem__)
    copied = copies[better]
    return {
        "copied": better,
        "copy": agreement(scores.predicting(copied), brief=True),
        "judge": agreement(scores, brief=True),
        "skill": _skill_over(scores, copied),
        "judge_equals_copy": _equal_share(scores, copied, scores.predicted),
        "reference_equals_copy": _equal_share(scores, copied, scores.reference),
        "distance_of_judge": _distance(scores, copied, scores.predicted),
        "distance_of_reference": _distance(scores, copied, scores.reference),
    }


def _skill_over(scores: Scores, baseline: Floats) -> Estimate:
    sample = replace(by_median(scores), baseline=baseline)
    estimate = measure(sample, statistics.skill_by_mae(sample))
    return estimate if estimate.value is not None else replace(estimate, reason="the baseline makes no error")


def _equal_share(scores: Scores, copied: Floats, scored: Floats) -> Estimate:
    return mean(np.abs(scored - copied) <= COPY_WITHIN, scores.task, scores.weight)


def _distance(scores: Scores, copied: Floats, scored: Floats) -> Estimate:
    sample = replace(by_mean(scores), predicted=scored, reference=copied)
    return measure(sample, statistics.mean_absolute_error(sample))


def shared(mine: Scores, theirs: Scores) -> tuple[Scores, Scores]:
    """Return the scores of the same prompts and keys, in the same order."""
    places = {entry: place for place, entry in enumerate(zip(theirs.prompt, theirs.key, strict=True))}
    pairs = [
        (place, places[entry]) for place, entry in enumerate(zip(mine.prompt, mine.key, strict=True)) if entry in places
    ]
    chosen = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return mine.where(chosen[:, 0]), theirs.where(chosen[:, 1])


# --- how well the judges agree ----------------------------------------------------------------------------------------


def self_agreement(entries: Sequence[Mapping[str, Any]], evaluation_type: str, key: str) -> Estimate:
    """Measure how well judges agree with themselves on prompts that they have answered more than once.

    Args:
        entries: `self_agreement` of the conversion's report: judge, evaluation_type, key, pairs, pearson.
        evaluation_type: use only entries of this type; `ALL` for every type.
        key: use only entries of this key; `ALL` for every key.
    """
    known = [
        (entry["pairs"], entry["pearson"])
        for entry in entries
        if evaluation_type in (ALL, entry["evaluation_type"])
        and key in (ALL, entry["key"])
        and entry["pearson"] is not None
    ]
    n = sum(pairs for pairs, _ in known)
    if n < MIN_SCORES:
        return undefined(f"at least {MIN_SCORES} scores that a judge gave twice are needed (here: {n})", n)
    return Estimate(sum(pairs * pearson for pairs, pearson in known) / n, None, None, n, 0)


def against_each(scores: Scores, judges: Sequence[str]) -> Metrics:
    """Compare this judge with each reference judge separately, instead of with their mean."""
    found = {}
    for column, judge in enumerate(judges):
        alone = scores.where(np.isfinite(scores.references[:, column]))
        if len(alone):
            reference, weight = alone.references[:, column], alone.judge_weights[:, column]
            found[judge] = agreement(replace(alone, reference=reference, weight=weight), brief=True)
    return found


def ceiling(scores: Scores, judges: Sequence[str], itself: Estimate) -> Metrics:
    """Measure how well the judges agree on the same prompts, and the upper bound that follows for any prediction.

    If two judges differ only by independent noise of the same size, their Pearson correlation r is the reliability of
    one of them, and by the correction for attenuation (Spearman 1904, "The proof and measurement of association between
    two things") not even the noiseless opinion correlates with one judge's scores by more than sqrt(r). The mean of k
    judges has the reliability R = k r / (1 + (k - 1) r) (Spearman 1910, Brown 1910), so the bound against the mean is
    sqrt(R).

    Judges also differ because each has its own consistent view, which a model trained on all of them can learn. A judge
    that answered the same prompt twice shows how much is noise: if it agrees with itself by w, the bound is
    sqrt(1 - (1 - w) / (1 + (k - 1) r)), which equals the first bound for w = r, and 1 for w = 1. For Spearman's rho,
    with the judges' rho as r, all bounds are approximate.

    Args:
        scores: the scores of one evaluation type and key, or of several together.
        judges: the columns of `Scores.references`.
        itself: see `self_agreement`.
    """
    found: list[Metrics] = []
    for one, other in combinations(range(len(judges)), 2):
        both = scores.where(np.flatnonzero(np.isfinite(scores.references[:, [one, other]]).all(axis=1)))
        if len(both):
            sample = replace(
                by_mean(both),
                predicted=both.references[:, one],
                reference=both.references[:, other],
                weight=both.judge_weights[:, [one, other]].max(axis=1),
            )
            # The ranking of bad steps is left out, because it would treat one of the two judges as right.
            metrics = {each.name: each.estimate(sample) for each in METRICS if each.brief and not each.at_thresholds}
            found.append({"judges": [judges[one], judges[other]]} | metrics)
    count = np.isfinite(scores.references).sum(axis=1)
    against = _why_no_bound(scores, count)
    return {
        "pairs": found,
        "gap": _gap(scores),
        "no_bound_because": against,
        "bounds": {
            name: _bounds([pair[name] for pair in found], float(count.mean()), itself, against)
            for name in ("pearson", ORDER)
        },
    }


def _why_no_bound(scores: Scores, count: NDArray[np.int64]) -> str | None:
    """Return why the bound may not apply to all scores: too few have several judges, or those are different."""
    several = count > 1
    if not several.any():
        return "no prompt was scored by several judges"
    if several.mean() < 0.5:
        return f"only {several.mean():.0%} of the scores were given by several judges"
    if (~several).sum() < MIN_SCORES:
        return None
    single, double = (scores.references[mask][np.isfinite(scores.references[mask])] for mask in (~several, several))
    spread = max(float(np.std(single)), 1e-9)
    if abs(single.mean() - double.mean()) > 0.3 * spread or not 0.75 < np.std(double) / spread < 1.33:
        return "the scores given by several judges differ from the others"
    return None


def _gap(scores: Scores) -> Estimate:
    """Spearman of this judge with a single judge, minus Spearman of two judges with each other.

    Computed for each pair of judges on the scores that both gave; the mean over pairs is weighted by their number. Both
    sides use single judges, because the mean of several is easier to agree with. Within keys, as `ORDER`.
    """
    every, parts, used = by_mean(scores), [], np.zeros(len(scores), bool)
    for columns in combinations(range(scores.references.shape[1]), 2):
        one, other = scores.references[:, columns].T
        sample = replace(every, weight=scores.judge_weights[:, columns].max(axis=1))
        both = np.isfinite(one) & np.isfinite(other)
        if both.sum() >= MIN_SCORES:
            orders = [
                on_part(replace(sample, predicted=left, reference=right), both, statistics.spearman_within)
                for left, right in ((sample.predicted, one), (sample.predicted, other), (one, other))
            ]
            parts.append((float(sample.weight[both].sum()), orders))
            used |= both
    if not parts:
        return undefined(f"no two judges share {MIN_SCORES} scores")

    def statistic(weights: Floats) -> Floats:
        total = np.zeros(len(weights))
        for size, (with_one, with_other, with_each_other) in parts:
            total += size * ((with_one(weights) + with_other(weights)) / 2 - with_each_other(weights))
        gap: Floats = total / sum(size for size, _ in parts)
        return gap

    estimate = measure(every, statistic, min_n=MIN_SCORES)
    return replace(estimate, n=int(used.sum()), tasks=len(np.unique(every.task[used])))


def _bounds(correlations: Sequence[Estimate], judges: float, itself: Estimate, against: str | None) -> Metrics:
    """Return the bounds of `ceiling`, from the mean correlation of all pairs of judges."""
    known = [estimate for estimate in correlations if estimate.value is not None]
    if not known or against:
        reason = against or (correlations[0].reason if correlations else None) or "no prompt has two judges"
        unknown = dict.fromkeys(("reliability", "one_judge", "mean_judge", "mean_judge_by_self"), undefined(reason))
        return unknown | {"self_agreement": itself}
    n, tasks = max(estimate.n for estimate in known), max(estimate.tasks for estimate in known)
    # Both bounds grow with r, so a single pair's interval can be mapped through them; that of a mean of pairs cannot.
    ends = (known[0].low, known[0].high) if len(known) == 1 else (None, None)
    r = [float(np.mean([estimate.value for estimate in known])), *ends]

    def bound(of_how_many: float) -> Estimate:
        values = [None if x is None else _bound(x, of_how_many) for x in r]
        reason = "the judges do not agree at all" if values[0] is None else None
        return Estimate(values[0], values[1], values[2], n, tasks, reason)

    by_self = itself
    if itself.value is not None and r[0] is not None:
        by_self = Estimate(_bound_by_self(itself.value, r[0], judges), None, None, itself.n, itself.tasks)
    return {
        "reliability": Estimate(r[0], r[1], r[2], n, tasks),
        "one_judge": bound(1.0),
        "mean_judge": bound(judges),
        "self_agreement": itself,
        "mean_judge_by_self": by_self,
    }


def _bound(r: float, judges: float) -> float | None:
    return float(np.sqrt(judges * r / (1 + (judges - 1) * r))) if r > 0 else None


def _bound_by_self(itself: float, r: float, judges: float) -> float:
    return float(np.sqrt(max(0.0, 1 - (1 - itself) / (1 + (judges - 1) * max(r, 0.0)))))


# --- subgroups --------------------------------------------------------------------------------------------------------

TASK_GROUP = "task_group"
"""A grouping that every dataset allows: the task's name without its number."""
_NOT_GROUPS = {"task_id", "trajectory_id", "evaluation_type", "clip_number", "timestamp", "model_name", "provider",
               SELECTED_BY, WEIGHT}  # fmt: skip
MAX_GROUPS = 30


def group_values(rows: Sequence[Row], key: str) -> list[str | None]:
    """Return the value of a metadata key for each prediction; None if the prediction does not have the key."""
    if key == TASK_GROUP:
        return [re.sub(r"[\W_]*\d+$", "", str(row["task_id"])) or None for row in rows]
    values = (row["metadata"].get(key) for row in rows)
    return [str(value) if isinstance(value, str | int | float | bool) and value != "" else None for value in values]


def grouping_keys(rows: Sequence[Row]) -> list[str]:
    """Return the metadata keys that divide the rows into a small number of groups."""
    keys = dict.fromkeys(key for row in rows for key in row["metadata"] if key not in _NOT_GROUPS)
    return [key for key in (TASK_GROUP, *keys) if 2 <= len(set(group_values(rows, key)) - {None}) <= MAX_GROUPS]


def breakdown(scores: Scores, rows: Sequence[Row], key: str) -> list[Metrics]:
    """Measure the judge on the scores of each value of a metadata key, the largest group first."""
    values = np.array(group_values(rows, key), dtype=object)[scores.row]
    found: list[Metrics] = []
    names, counts = np.unique([value for value in values if value is not None], return_counts=True)
    for name in names[np.argsort(-counts, kind="stable")][:MAX_GROUPS]:
        some = scores.where(values == name)
        tasks = by_mean(some).tasks
        by_type = {
            evaluation_type: _order_of(some.where(some.evaluation_type == evaluation_type))
            for evaluation_type in dict.fromkeys(some.evaluation_type)
        }
        about: Metrics = {"value": str(name), "scores": len(some), "tasks": tasks, "order_by_type": by_type}
        found.append(about | agreement(some, brief=True))
    return found


def halves(scores: Scores) -> list[Estimate]:
    """Return the rank correlation on two random halves of the tasks; if only one half has it, it is spurious."""
    tasks = np.unique(scores.task)
    first = np.random.default_rng(0).permutation(tasks)[: len(tasks) // 2]
    in_first = np.isin(scores.task, first)
    return [_order_of(scores.where(mask)) for mask in (in_first, ~in_first)]


def _order_of(scores: Scores) -> Estimate:
    sample = by_mean(scores)
    return measure(sample, statistics.spearman_within(sample), min_n=MIN_SCORES)
