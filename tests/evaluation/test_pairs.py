"""Pairwise accuracy against its definition, pair by pair."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from prmkit.evaluation.estimates import MAX_PAIRED, Sample, make_pairs, make_sample
from prmkit.evaluation.statistics import always_tied, pairwise_accuracy


def of_tasks(predicted, reference, task) -> Sample:
    """A sample whose groups are its tasks."""
    sample = make_sample(predicted, reference, task)
    return make_sample(predicted, reference, task, group=sample.task)


def accuracy(sample: Sample) -> float:
    pairs = make_pairs(sample)
    return float(pairwise_accuracy(pairs)(np.ones((1, pairs.tasks)))[0])


def tied_share(sample: Sample) -> float:
    pairs = make_pairs(sample)
    return float(always_tied(pairs)(np.ones((1, pairs.tasks)))[0])


def tied_scores(seed: int) -> Sample:
    """Seventy scores of twelve tasks, many of them equal."""
    generator = np.random.default_rng(seed)
    reference = generator.choice([0.0, 0.2, 0.4, 0.55, 0.6, 0.8, 0.95, 1.0], 70)
    task = np.concatenate([np.arange(12), generator.integers(0, 12, 58)])
    return of_tasks(reference, reference, task)


def accuracy_with_ties(sample: Sample, group: np.ndarray, epsilon: float) -> float:
    """acc_eq by its definition, from all pairs of a group, averaged over groups."""
    accuracies = []
    for name in np.unique(group):
        predicted, reference = sample.predicted[group == name], sample.reference[group == name]
        one, other = np.triu_indices(len(predicted), k=1)
        apart = predicted[one] - predicted[other]
        judged = np.where(abs(apart) <= epsilon, 0, np.sign(apart))
        if len(judged):
            accuracies.append(np.mean(judged == np.sign(reference[one] - reference[other])))
    return float(np.mean(accuracies))


def test_a_pair_weighs_as_the_product_of_its_scores_and_every_group_the_same():
    scores = tied_scores(seed=5)
    sample = replace(scores, weight=np.random.default_rng(5).uniform(1, 5, 70))
    shares = []
    for task in range(12):
        members = combinations(np.flatnonzero(sample.task == task), 2)
        weighted = [
            (sample.weight[i] * sample.weight[j], sample.reference[i] == sample.reference[j]) for i, j in members
        ]
        if weighted:
            shares.append(np.average([tied for _, tied in weighted], weights=[weight for weight, _ in weighted]))
    assert tied_share(sample) == pytest.approx(np.mean(shares))
    assert tied_share(sample) != pytest.approx(tied_share(scores), abs=1e-4)


@pytest.mark.parametrize("noise", [0.05, 0.2, 2.0])
def test_pairwise_accuracy_is_the_best_that_any_tie_width_gives(noise):
    generator = np.random.default_rng(3)
    scores = tied_scores(seed=3)
    predicted = np.clip(scores.reference + generator.normal(0, noise, 70), 0, 1)
    sample = of_tasks(predicted, scores.reference, scores.task)
    value = accuracy(sample)
    widths = [0.0, *(abs(a - b) for a, b in combinations(predicted, 2))]
    assert value == pytest.approx(max(accuracy_with_ties(sample, sample.task, width) for width in widths))
    assert value >= tied_share(sample) == pytest.approx(accuracy_with_ties(sample, sample.task, 2.0))


def test_a_constant_judge_reaches_exactly_the_share_of_ties():
    sample = tied_scores(seed=4)
    constant = of_tasks(np.full(70, 0.7), sample.reference, sample.task)
    assert accuracy(constant) == pytest.approx(tied_share(constant))


def test_pairs_of_different_tasks_are_never_compared():
    # Within each task the order is right; across tasks it is all wrong.
    sample = of_tasks([0.1, 0.2, 0.8, 0.9], [0.8, 0.9, 0.1, 0.2], [0, 0, 1, 1])
    assert accuracy(sample) == 1.0
    assert len(make_pairs(sample).reference) == 2


def test_every_task_weighs_the_same_however_many_pairs_it_has():
    # Ten pairs in the right order in one task, one in the wrong order in the other.
    predicted = [0.1, 0.3, 0.5, 0.7, 0.9, 0.2, 0.8]
    sample = of_tasks(predicted, [*predicted[:5], 0.8, 0.2], [0] * 5 + [1] * 2)
    assert accuracy(sample) == pytest.approx(0.5)


def test_pairs_do_not_grow_with_the_square_of_a_long_run():
    generator = np.random.default_rng(5)
    reference = generator.uniform(size=5000)
    sample = of_tasks(reference + generator.normal(0, 0.2, 5000), reference, np.zeros(5000))
    pairs = make_pairs(sample)
    assert len(pairs.reference) == MAX_PAIRED * (MAX_PAIRED - 1) // 2
    assert (pairs.reference != 0).all()
    few = accuracy(sample)
    all_of_some = accuracy(of_tasks(sample.predicted[:40], reference[:40], np.zeros(40)))
    assert few == pytest.approx(all_of_some, abs=0.08)


def test_ties_everywhere_in_the_reference_leave_no_order_to_be_right():
    assert np.isnan(accuracy(of_tasks([0.1, 0.2, 0.3], [0.5, 0.5, 0.5], [0, 0, 0])))
