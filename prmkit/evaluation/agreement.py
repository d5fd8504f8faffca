"""The figures of one set of scores against their reference: error, order, decision; and how many could be scored.

The judge, every baseline and every other judge go through the same `agreement`, so their figures can be compared.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prmkit.evaluation import measures
from prmkit.evaluation.bootstrap import SAME_PREDICTION, Figure, Floats, Integers, Sample, make_sample, measure
from prmkit.evaluation.pairwise import pairwise_accuracy
from prmkit.evaluation.predictions import Row, Scores, has_score
from prmkit.judge.types import BAD_BELOW, LOW_LABEL_MASS, SAME_SCORE

Figures = dict[str, Any]
"""Names to `Figure`s, or to more such dictionaries, or to plain numbers and texts."""

FEWEST_SCORES = 10
"""A correlation, a kappa or a ranking of fewer scores than this is not reported: three points are always in order."""


def agreement(scores: Scores, *, whole: bool = True) -> Figures:
    """How well the predicted scores agree with the reference.

    Args:
        scores: of one evaluation type and key, or all of them together.
        whole: every figure; else only those that a baseline is compared by.
    """
    sample = make_sample(scores.predicted, scores.reference, scores.task)
    figures: Figures = {
        "mae": measure(sample, measures.mean_absolute_error(sample)),
        "bias": measure(sample, measures.bias(sample)),
        "skill": skill_over(scores, scores.training_median),
        "pearson": measure(sample, measures.pearson(sample), fewest=FEWEST_SCORES),
        **order(scores, sample),
    }
    if whole:
        figures["rmse"] = measure(sample, measures.root_mean_square_error(sample))
        figures["kendall"] = measure(sample, measures.kendall(sample), fewest=FEWEST_SCORES)
        figures["kappa"] = measure(sample, measures.kappa(sample), fewest=FEWEST_SCORES)
        figures |= _pairwise(scores)
    figures["bad_step"] = {
        str(limit): decision(scores, limit, scores.below[:, column], whole=whole)
        for column, limit in enumerate(BAD_BELOW)
    }
    return figures


def order(scores: Scores, sample: Sample) -> Figures:
    """Spearman's rho, pooled and as the mean over evaluation types and keys; with one key both are the same.

    Args:
        scores: what says which key each pair belongs to.
        sample: the pairs, in the order of `scores`.
    """
    pooled = measure(sample, measures.spearman(sample), fewest=FEWEST_SCORES)
    keys = groups_of(scores.evaluation_type, scores.key)
    if not keys.any():
        return {"spearman": pooled, "spearman_within_keys": pooled}
    within = measure(sample, measures.spearman_within(sample, keys), fewest=FEWEST_SCORES)
    constant = all(np.ptp(sample.predicted[keys == key]) == 0 for key in np.unique(keys))
    if within.value is None and within.n >= FEWEST_SCORES and constant:
        within = replace(within, reason=SAME_PREDICTION)
    return {"spearman": pooled, "spearman_within_keys": within}


def skill_over(scores: Scores, baseline: Floats) -> Figure:
    """The share of the baseline's mean absolute error that the judge avoids, where the baseline has a value."""
    known = scores.where(np.isfinite(baseline))
    if not len(known):
        return Figure(None, None, None, 0, 0, "the baseline has no value")
    sample = make_sample(known.predicted, known.reference, known.task)
    figure = measure(sample, measures.skill(sample, baseline[np.isfinite(baseline)]))
    if figure.value is None:
        return Figure(None, None, None, figure.n, figure.tasks, "the baseline makes no error")
    return figure


def _pairwise(scores: Scores) -> Figures:
    groups = groups_of(scores.task, scores.evaluation_type, scores.key)
    not_alone = np.bincount(groups, minlength=1)[groups] > 1
    scores, groups = scores.where(not_alone), groups[not_alone]
    if not len(scores):
        nothing = Figure(None, None, None, 0, 0, "no task has two scores of one kind")
        return {"pairwise_accuracy": nothing, "pairwise_tie_width": None, "pairwise_always_tied": None}
    sample = make_sample(scores.predicted, scores.reference, scores.task)
    found = pairwise_accuracy(sample, groups)
    return {
        "pairwise_accuracy": measure(sample, found.statistic, n=found.pairs),
        "pairwise_tie_width": found.epsilon,
        "pairwise_always_tied": found.always_tied,
    }


def decision(scores: Scores, limit: float, probability: Floats, *, whole: bool = True) -> Figures:
    """How well bad steps are told from good ones; a step is bad when its reference is below `limit`.

    AUROC and average precision rank by the score itself, lowest first: that is what a user would cut on. Brier score
    and ECE need a probability: the judge's own, that the score is below `limit`.

    Args:
        scores: see `agreement`.
        limit: one of `BAD_BELOW`.
        probability: of each score being below `limit`; NaN where the judge gives none.
        whole: with average precision, and with what needs a probability.
    """
    bad = (scores.reference < limit - SAME_SCORE).astype(np.float64)
    suspicion = make_sample(-scores.predicted, bad, scores.task)
    share = measure(suspicion, measures.mean_of(suspicion, bad))
    figures: Figures = {"bad_share": share}
    one_kind = {0.0: "no step is bad", 1.0: "every step is bad"}.get(share.value if share.value is not None else -1.0)
    rankings = {"auroc": measures.roc_area} | ({"average_precision": measures.average_precision} if whole else {})
    for name, statistic in rankings.items():
        if one_kind and share.n >= FEWEST_SCORES:
            figures[name] = Figure(None, None, None, share.n, share.tasks, one_kind)
        else:
            figures[name] = measure(suspicion, statistic(suspicion), fewest=FEWEST_SCORES)
    if whole:
        figures |= _calibration(scores, bad, probability)
    return figures


def _calibration(scores: Scores, bad: Floats, probability: Floats) -> Figures:
    if not np.isfinite(probability).all():
        none = Figure(None, None, None, len(scores), 0, "scores read from text carry no probability")
        return {"brier": none, "ece": none}
    sample = make_sample(probability, bad, scores.task)
    return {
        "brier": measure(sample, measures.brier(sample), fewest=FEWEST_SCORES),
        "ece": measure(sample, measures.calibration_error(sample), fewest=FEWEST_SCORES),
    }


def groups_of(*columns: NDArray[Any]) -> Integers:
    """A number for every distinct combination of values."""
    numbers = np.stack([np.unique(column, return_inverse=True)[1] for column in columns], axis=1)
    _, groups = np.unique(numbers, axis=0, return_inverse=True)
    return groups.astype(np.int64).reshape(-1)


# --- validity ---------------------------------------------------------------------------------------------------------


def validity(rows: Sequence[Row]) -> Figures:
    """How many prompts got scores, why the others got none, and how willing the judge was to answer with a score.

    Nothing that could not be scored enters any other figure, so this stands beside them.
    """
    ok = [row for row in rows if row["status"] == "ok"]
    reasons = Counter(row["reason"] or row["status"] for row in rows if row["status"] != "ok")
    figures: Figures = {
        "prompts": len(rows),
        "statuses": dict(Counter(row["status"] for row in rows)),
        "reasons": dict(reasons.most_common(10)),
        "trimmed": sum(row["trimmed"] for row in rows),
        "repaired": sum(row["repaired"] for row in ok),
        "keys_without_reference": sum(key not in row["reference"] for row in ok for key in row["scores"]),
        "scores_asked": sum(len(row["reference"]) for row in rows),
        "scores_made": sum(has_score(row, key) for row in ok for key in row["reference"]),
        "references_without_score": sum(key not in row["scores"] for row in ok for key in row["reference"]),
        "scored_share": _share(rows, [float(row["status"] == "ok") for row in rows]),
        "strictly_valid_share": _share(rows, [float(row["status"] == "ok" and not row["repaired"]) for row in rows]),
    }
    given = [(row, each["label_mass"]) for row in ok for each in row["scores"].values()]
    covered = [(row, label_mass) for row, label_mass in given if label_mass is not None and np.isfinite(label_mass)]
    if covered:
        label_mass = np.array([value for _, value in covered])
        figures["label_mass"] = _share([row for row, _ in covered], label_mass)
        figures["label_mass_lowest"] = float(label_mass.min())
        figures["label_mass_low_share"] = _share([row for row, _ in covered], label_mass < LOW_LABEL_MASS)
    return figures


def _share(rows: Sequence[Row], values: Any) -> Figure:
    numbers = np.asarray(values, np.float64)
    sample = make_sample(numbers, np.zeros(len(numbers)), [row["task_id"] for row in rows])
    return measure(sample, measures.mean_of(sample, numbers))


def plain(value: Any) -> Any:
    """Figures as JSON has them."""
    if isinstance(value, Figure):
        return value.as_json()
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
