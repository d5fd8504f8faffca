"""Pairwise accuracy against its definition, pair by pair."""

from itertools import combinations

import numpy as np
import pytest

from prmkit.evaluation.bootstrap import Sample, make_sample
from prmkit.evaluation.pairwise import pairwise_accuracy


def tied_scores(seed: int) -> Sample:
    """Seventy scores of twelve tasks, many of them equal."""
    generator = np.random.default_rng(seed)
    reference = generator.choice([0.0, 0.2, 0.4, 0.55, 0.6, 0.8, 0.95, 1.0], 70)
    task = np.concatenate([np.arange(12), generator.integers(0, 12, 58)])
    return make_sample(reference, reference, task)


def accuracy_with_ties(sample: Sample, group: np.ndarray, epsilon: float) -> float:
    """acc_eq by its definition, pair by pair, averaged over groups."""
    accuracies = []
    for name in np.unique(group):
        right = total = 0
        for i, j in combinations(np.flatnonzero(group == name), 2):
            apart = sample.predicted[i] - sample.predicted[j]
            judged = 0 if abs(apart) <= epsilon else np.sign(apart)
            right += judged == np.sign(sample.reference[i] - sample.reference[j])
            total += 1
        if total:
            accuracies.append(right / total)
    return float(np.mean(accuracies))


@pytest.mark.parametrize("noise", [0.05, 0.2, 2.0])
def test_pairwise_accuracy_is_the_best_that_any_tie_width_gives(noise):
    generator = np.random.default_rng(3)
    scores = tied_scores(seed=3)
    predicted = np.clip(scores.reference + generator.normal(0, noise, 70), 0, 1)
    sample = Sample(predicted, scores.reference, scores.task)
    found = pairwise_accuracy(sample, sample.task)
    value = found.statistic(np.ones((1, sample.tasks)))[0]
    widths = [0.0, *(abs(a - b) for a, b in combinations(predicted, 2))]
    assert value == pytest.approx(accuracy_with_ties(sample, sample.task, found.epsilon))
    assert value == pytest.approx(max(accuracy_with_ties(sample, sample.task, width) for width in widths))
    assert value >= found.always_tied == pytest.approx(accuracy_with_ties(sample, sample.task, 2.0))


def test_a_constant_judge_reaches_exactly_the_share_of_ties():
    sample = tied_scores(seed=4)
    constant = Sample(np.full(70, 0.7), sample.reference, sample.task)
    found = pairwise_accuracy(constant, constant.task)
    assert found.statistic(np.ones((1, 12)))[0] == pytest.approx(found.always_tied)


def test_pairs_of_different_tasks_are_never_compared():
    # Within each task the order is right; across tasks it is all wrong.
    sample = make_sample([0.1, 0.2, 0.8, 0.9], [0.8, 0.9, 0.1, 0.2], [0, 0, 1, 1])
    found = pairwise_accuracy(sample, sample.task)
    assert found.statistic(np.ones((1, 2)))[0] == 1.0
    assert found.pairs == 2


def test_every_task_weighs_the_same_however_many_pairs_it_has():
    # Ten pairs in the right order in one task, one in the wrong order in the other.
    predicted = [0.1, 0.3, 0.5, 0.7, 0.9, 0.2, 0.8]
    sample = make_sample(predicted, [*predicted[:5], 0.8, 0.2], [0] * 5 + [1] * 2)
    assert pairwise_accuracy(sample, sample.task).statistic(np.ones((1, 2)))[0] == pytest.approx(0.5)
