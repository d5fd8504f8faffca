"""What a judge has to beat, and what it cannot beat: the baselines below it, the ceiling above it."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from prmkit.evaluation import measures
from prmkit.evaluation.agreement import (
    FEWEST_SCORES,
    Figures,
    agreement,
    groups_of,
    order,
    skill_over,
)
from prmkit.evaluation.bootstrap import Figure, Floats, Statistic, make_sample, measure
from prmkit.evaluation.predictions import Scores

COPY_WITHIN = 0.005
"""A score this near to one that stands in the prompt equals it: prompts show two decimals."""


# --- baselines --------------------------------------------------------------------------------------------------------


def baselines(scores: Scores, base: Scores | None) -> Figures:
    """What can be had without training, on the same scores.

    `training_median`: always the same number. `copy`: repeating the scores of earlier clips that stand in the prompt,
    their mean or the last of them, whichever errs less, and the judge on these very rows beside it, for a judge that
    copies looks good exactly there. `base_model`: the model without
    its adapter, where it was asked, and the judge on the rows that both scored.
    """
    figures: Figures = {}
    known = np.isfinite(scores.training_median)
    if known.any():
        constant = scores.where(known).predicting(scores.training_median[known])
        figures["training_median"] = agreement(constant, whole=False)
    leaked = np.isfinite(scores.leaked_mean)
    if leaked.any():
        figures["copy"] = _copying(scores.where(leaked))
    if base is not None:
        mine, theirs = shared(scores, base)
        if len(mine):
            figures["base_model"] = {
                "base": agreement(theirs, whole=False),
                "judge": agreement(mine, whole=False),
                "skill": skill_over(mine, theirs.predicted),
            }
    return figures


def _copying(scores: Scores) -> Figures:
    copies = {"mean": scores.leaked_mean, "last": scores.leaked_last}
    errors = {name: float(np.mean(np.abs(copy - scores.reference))) for name, copy in copies.items()}
    better = min(errors, key=errors.__getitem__)
    copied = copies[better]
    return {
        "copied": better,
        "copy": agreement(scores.predicting(copied), whole=False),
        "judge": agreement(scores, whole=False),
        "skill": skill_over(scores, copied),
        "judge_equals_copy": _equal_share(scores, copied, scores.predicted),
        "reference_equals_copy": _equal_share(scores, copied, scores.reference),
        "distance_of_judge": _distance(scores, copied, scores.predicted),
        "distance_of_reference": _distance(scores, copied, scores.reference),
    }


def _equal_share(scores: Scores, copied: Floats, scored: Floats) -> Figure:
    sample = make_sample(scored, copied, scores.task)
    return measure(sample, measures.mean_of(sample, (np.abs(scored - copied) <= COPY_WITHIN).astype(np.float64)))


def _distance(scores: Scores, copied: Floats, scored: Floats) -> Figure:
    sample = make_sample(scored, copied, scores.task)
    return measure(sample, measures.mean_absolute_error(sample))


def shared(mine: Scores, theirs: Scores) -> tuple[Scores, Scores]:
    """The scores of the same prompts and keys, in the same order."""
    places = {entry: place for place, entry in enumerate(zip(theirs.prompt, theirs.key, strict=True))}
    pairs = [
        (place, places[entry]) for place, entry in enumerate(zip(mine.prompt, mine.key, strict=True)) if entry in places
    ]
    chosen = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return mine.where(chosen[:, 0]), theirs.where(chosen[:, 1])


# --- the ceiling ------------------------------------------------------------------------------------------------------


def against_each(scores: Scores, judges: Sequence[str]) -> Figures:
    """The judge against each single judge, instead of their mean."""
    figures = {}
    for column, judge in enumerate(judges):
        alone = scores.where(np.isfinite(scores.references[:, column]))
        if len(alone):
            figures[judge] = _brief(alone, alone.predicted, alone.references[:, column])
    return figures


def ceiling(scores: Scores, judges: Sequence[str]) -> Figures:
    """How far the judges agree with each other on the same prompts, and what follows for anyone who predicts them.

    A judge's score is its opinion plus noise. If two judges hold the same opinion with independent noise of the same
    size, their Pearson correlation r is the reliability of one of them, and the correction for attenuation
    (Spearman 1904, "The proof and measurement of association between two things") says that not even the noiseless
    opinion itself correlates with one judge's scores by more than sqrt(r). The mean of k judges has the reliability
    R = k r / (1 + (k - 1) r) (Spearman 1910, Brown 1910), so against the mean the bound is sqrt(R). Where judges hold
    different opinions or err alike, the bounds are only approximate; for Spearman's rho, where r is the judges' rho,
    they are so anyway.
    """
    pairs: list[Figures] = []
    for one, other in combinations(range(len(judges)), 2):
        both = scores.where(np.isfinite(scores.references[:, one]) & np.isfinite(scores.references[:, other]))
        if len(both):
            figures = _brief(both, both.references[:, one], both.references[:, other])
            pairs.append({"judges": [judges[one], judges[other]]} | figures)
    judges_a_score = float(np.isfinite(scores.references).sum(axis=1).mean())
    bounds = {
        name: _bounds([pair[name] for pair in pairs], judges_a_score) for name in ("pearson", "spearman_within_keys")
    }
    return {"pairs": pairs, "gap": _gap(scores, len(judges)), "bounds": bounds}


def _gap(scores: Scores, judges: int) -> Figure:
    """Spearman of the judge with one judge, minus that of two judges with each other; means over judges and pairs.

    Within keys, as `spearman_within_keys`. Compared with single judges on both sides, for the mean of several is easier
    to agree with than one is.
    """
    every = scores.where(np.flatnonzero(np.isfinite(scores.references).all(axis=1)))
    if judges < 2 or not len(every):
        return Figure(None, None, None, 0, 0, "no prompt has all judges")

    keys = groups_of(every.evaluation_type, every.key)

    def within(one: Floats, other: Floats) -> Statistic:
        return measures.spearman_within(make_sample(one, other, every.task), keys)

    columns = every.references.T
    ours = [within(every.predicted, column) for column in columns]
    theirs = [within(one, other) for one, other in combinations(columns, 2)]
    sample = make_sample(every.predicted, every.reference, every.task)

    def statistic(weights: Floats) -> Floats:
        agreed, ceiling_of_it = (np.mean([one(weights) for one in each], axis=0) for each in (ours, theirs))
        gap: Floats = agreed - ceiling_of_it
        return gap

    return measure(sample, statistic, fewest=FEWEST_SCORES)


def _brief(scores: Scores, one: Floats, other: Floats) -> Figures:
    sample = make_sample(one, other, scores.task)

    def figure(statistic: Statistic, fewest: int) -> Figure:
        return measure(sample, statistic, fewest=fewest)

    return {
        "mae": figure(measures.mean_absolute_error(sample), 1),
        "bias": figure(measures.bias(sample), 1),
        "pearson": figure(measures.pearson(sample), FEWEST_SCORES),
        **order(scores, sample),
    }


def _bounds(correlations: Sequence[Figure], judges_a_score: float) -> Figures:
    """The two bounds of `ceiling`, from the mean correlation of all pairs of judges."""
    known = [figure for figure in correlations if figure.value is not None]
    if not known:
        reason = correlations[0].reason if correlations else "no prompt has two judges"
        return dict.fromkeys(("reliability", "one_judge", "mean_judge"), Figure(None, None, None, 0, 0, reason))
    n, tasks = max(figure.n for figure in known), max(figure.tasks for figure in known)
    # Both bounds grow with r, so a single pair's interval goes through them; that of several pairs' mean does not.
    ends = (known[0].low, known[0].high) if len(known) == 1 else (None, None)
    r = [float(np.mean([figure.value for figure in known])), *ends]

    def bound(of_how_many: float) -> Figure:
        values = [None if x is None else _bound(x, of_how_many) for x in r]
        reason = "the judges do not agree at all" if values[0] is None else None
        return Figure(values[0], values[1], values[2], n, tasks, reason)

    return {
        "reliability": Figure(r[0], r[1], r[2], n, tasks),
        "one_judge": bound(1.0),
        "mean_judge": bound(judges_a_score),
    }


def _bound(r: float, judges: float) -> float | None:
    return float(np.sqrt(judges * r / (1 + (judges - 1) * r))) if r > 0 else None
