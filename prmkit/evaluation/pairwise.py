"""Which of two steps of a task is better? Pairwise accuracy that counts ties right."""

from dataclasses import dataclass

import numpy as np

from prmkit.evaluation.bootstrap import Floats, Integers, Sample, Statistic
from prmkit.evaluation.measures import ratio
from prmkit.judge.types import SAME_SCORE


@dataclass(frozen=True)
class PairwiseAccuracy:
    """Pairwise accuracy within groups, ties counted; see `pairwise_accuracy`."""

    statistic: Statistic
    pairs: int
    epsilon: float
    """Scores at most this far apart count as a tie."""
    always_tied: float
    """What a judge that calls every pair a tie reaches: the share of tied pairs in the reference."""


def pairwise_accuracy(sample: Sample, group: Integers) -> PairwiseAccuracy:
    """acc_eq with tie calibration (Deutsch, Foster and Freitag 2023, "Ties Matter", arXiv 2305.14324).

    acc_eq = (C + T_hm) / (C + D + T_h + T_m + T_hm): pairs in the right order, or tied in both, among all pairs (h the
    reference, m the judge). It is computed in each group and averaged over the groups (the paper's group-by-item).
    Two scores of the judge tie when they are at most epsilon apart; epsilon is the one value that makes the average
    greatest. It is chosen on these very pairs and held in the resamples, so compare with `always_tied`, which a
    constant judge reaches.

    Args:
        sample: scores; pairs are formed within a group only.
        group: the group of each score. A group lies within one task.
    """
    first, second = _pairs_within(group)
    distance = np.abs(sample.predicted[first] - sample.predicted[second])
    order = np.sign(sample.predicted[first] - sample.predicted[second])
    reference = sample.reference[first] - sample.reference[second]
    tied = np.abs(reference) < SAME_SCORE
    right_order = ~tied & (order == np.sign(reference))
    _, pair_group, sizes = np.unique(group[first], return_inverse=True, return_counts=True)
    share = 1 / sizes[pair_group]
    epsilon = _best_epsilon(distance, tied * share, right_order * share)
    correct = np.where(distance <= epsilon, tied, right_order) * share
    task, tasks = sample.task[first], sample.tasks
    sums = np.bincount(task, weights=correct, minlength=tasks)
    groups = np.bincount(task, weights=share, minlength=tasks)
    always_tied = float(np.sum(tied * share) / len(sizes)) if len(sizes) else float("nan")
    return PairwiseAccuracy(
        lambda weights: ratio(weights @ sums, weights @ groups), len(first), float(epsilon), always_tied
    )


def _pairs_within(group: Integers) -> tuple[Integers, Integers]:
    by_group = np.argsort(group, kind="stable")
    firsts, seconds = [by_group[:0]], [by_group[:0]]
    for members in np.split(by_group, np.flatnonzero(np.diff(group[by_group])) + 1):
        one, other = np.triu_indices(len(members), 1)
        firsts.append(members[one])
        seconds.append(members[other])
    return np.concatenate(firsts), np.concatenate(seconds)


def _best_epsilon(distance: Floats, tied: Floats, right_order: Floats) -> float:
    """The observed distance (or zero) that, as the widest tie, gets the most pairs right."""
    widths, place = np.unique(np.concatenate([[0.0], distance]), return_inverse=True)
    gained = np.zeros(len(widths))
    np.add.at(gained, place[1:], tied - right_order)  # calling this pair a tie: right if it is one, else its order lost
    return float(widths[np.argmax(np.round(np.cumsum(gained), 12))])
