"""The statistics against scipy, scikit-learn and brute force, whole and with tasks drawn more than once."""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from scipy import stats

from prmkit.evaluation import statistics
from prmkit.evaluation.estimates import (
    MIN_TASKS,
    RESAMPLES,
    Estimate,
    Sample,
    draw_weights,
    expanded_percentiles,
    make_sample,
    measure,
    resampled,
)
from prmkit.evaluation.metrics import METRICS
from prmkit.evaluation.predictions import pairs

NOISES = (0.05, 0.3)
SIZES = ((12, 4), (60, 9), (400, 40))


def noisy(size: int, tasks: int, noise: float, seed: int) -> Sample:
    """Scores in hundredths with many ties, predicted with noise."""
    generator = np.random.default_rng(seed)
    reference = np.round(generator.choice([0.0, 0.2, 0.4, 0.55, 0.6, 0.8, 0.95, 1.0], size), 2)
    predicted = np.round(np.clip(reference + generator.normal(0, noise, size), 0, 1), 1)
    task = np.concatenate([np.arange(tasks), generator.integers(0, tasks, size - tasks)])
    return make_sample(predicted, reference, task)


def repeated(sample: Sample, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows, each as often as its task was drawn."""
    times = weights[sample.task].astype(int)
    return np.repeat(sample.predicted, times), np.repeat(sample.reference, times)


def draws(tasks: int) -> np.ndarray:
    """Every task once, and a few resamples."""
    return np.vstack([np.ones((1, tasks)), draw_weights(tasks, 4)])


@cache
def sk() -> Any:
    """scikit-learn's metrics, whose import takes a second in each worker."""
    from sklearn import metrics

    return metrics


def kendall_of(predicted: np.ndarray, reference: np.ndarray) -> float:
    return float(stats.kendalltau(predicted, reference).statistic)


OF_SCORES = {
    "mean_absolute_error": lambda predicted, reference: sk().mean_absolute_error(reference, predicted),
    "root_mean_square_error": lambda predicted, reference: sk().root_mean_squared_error(reference, predicted),
    "bias": lambda predicted, reference: np.mean(predicted - reference),
    "pearson": lambda predicted, reference: stats.pearsonr(predicted, reference).statistic,
    "spearman": lambda predicted, reference: stats.spearmanr(predicted, reference).statistic,
    "kappa": lambda predicted, reference: sk().cohen_kappa_score(
        np.searchsorted(statistics.BANDS, predicted, side="right"),
        np.searchsorted(statistics.BANDS, reference, side="right"),
        labels=range(5),
        weights="quadratic",
    ),
}


@pytest.mark.parametrize("name", OF_SCORES)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize(("size", "tasks"), SIZES)
def test_a_statistic_is_the_libraries_value_also_when_tasks_are_drawn_again(name, noise, size, tasks):
    sample = noisy(size, tasks, noise, seed=size)
    weights = draws(tasks)
    found = getattr(statistics, name)(sample)(weights)
    expected = [OF_SCORES[name](*repeated(sample, row)) for row in weights]
    np.testing.assert_allclose(found, expected, atol=1e-12)


OF_DECISIONS = {
    "roc_area": lambda suspicion, bad: sk().roc_auc_score(bad, suspicion),
    "average_precision": lambda suspicion, bad: sk().average_precision_score(bad, suspicion),
    "brier": lambda suspicion, bad: sk().brier_score_loss(bad, suspicion),
}


@pytest.mark.parametrize("name", OF_DECISIONS)
@pytest.mark.parametrize("threshold", [0.5, 0.8])
@pytest.mark.parametrize(("size", "tasks"), SIZES)
def test_a_decision_statistic_is_scikit_learns(name, threshold, size, tasks):
    scores = noisy(size, tasks, 0.3, seed=size)
    bad = (scores.reference < threshold).astype(float)
    sample = make_sample(1 - scores.predicted, bad, scores.task)
    weights = draws(tasks)
    found = getattr(statistics, name)(sample)(weights)
    expected = [OF_DECISIONS[name](*repeated(sample, row)) for row in weights]
    np.testing.assert_allclose(found, expected, atol=1e-12)


OF_WEIGHTED = {**OF_SCORES, **OF_DECISIONS}


@pytest.mark.parametrize("name", [*OF_WEIGHTED, "calibration_error"])
def test_a_weighted_pair_counts_as_that_many_also_when_tasks_are_drawn_again(name):
    scores = noisy(120, 12, 0.3, seed=5)
    weight = np.random.default_rng(5).integers(1, 6, 120)
    sample = scores
    if name not in OF_SCORES:
        sample = make_sample(1 - scores.predicted, scores.reference < 0.5, scores.task)
    often = make_sample(*(np.repeat(each, weight) for each in (sample.predicted, sample.reference, sample.task)))
    weights = draws(12)
    statistic = getattr(statistics, name)
    for scale in (1.0, 0.37):  # only the ratio of weights matters
        found = statistic(replace(sample, weight=scale * weight))(weights)
        np.testing.assert_allclose(found, statistic(often)(weights), atol=1e-12)
    assert not np.allclose(found, statistic(sample)(weights), atol=1e-3)


@pytest.mark.parametrize("metric", [each for each in METRICS if each.sample is not pairs], ids=lambda each: each.name)
def test_weighting_each_pair_of_a_task_is_weighting_the_task(metric):
    scores = noisy(200, 12, 0.2, seed=4)
    reference = (scores.reference < 0.5).astype(float) if metric.at_thresholds else scores.reference
    baseline = np.full(200, 0.6)
    of_task = np.random.default_rng(1).integers(1, 5, 12).astype(float)
    whole = make_sample(scores.predicted, reference, scores.task, baseline=baseline)
    each = replace(whole, weight=of_task[scores.task])
    found, expected = metric.statistic(each)(np.ones((1, 12))), metric.statistic(whole)(of_task[None])
    if metric.name == "ece_by_chance":  # repeated outcomes are of independent steps, a weighted one is one step
        assert found[0] > expected[0]
    else:
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_a_weighted_median_is_that_of_repeated_values():
    generator = np.random.default_rng(2)
    for size in (1, 2, 5, 40):
        values, weight = generator.integers(0, 9, size) / 8, generator.integers(1, 5, size)
        expected = np.median(np.repeat(values, weight))
        assert statistics.weighted_median(values, weight / 3) == pytest.approx(expected)


def test_calibration_error_bin_by_bin():
    sample = make_sample([0.05, 0.05, 0.55, 1.0], [0.0, 1.0, 1.0, 1.0], [0, 1, 2, 3])
    found = statistics.calibration_error(sample)(np.ones((1, 4)))
    assert found[0] == pytest.approx(0.5 * abs(0.05 - 0.5) + 0.25 * abs(0.55 - 1.0) + 0.25 * 0.0)


def test_skill_is_zero_for_the_baseline_itself_and_one_for_the_truth():
    sample = noisy(60, 9, 0.3, seed=1)
    constant = np.full(60, 0.6)
    once = np.ones((1, sample.tasks))
    for skill in (statistics.skill_by_rmse, statistics.skill_by_mae):
        as_baseline = make_sample(constant, sample.reference, sample.task, baseline=constant)
        perfect = make_sample(sample.reference, sample.reference, sample.task, baseline=constant)
        assert skill(as_baseline)(once)[0] == pytest.approx(0.0)
        assert skill(perfect)(once)[0] == pytest.approx(1.0)


def test_skill_is_undefined_where_the_constant_is_right_but_for_rounding():
    sample = make_sample([0.5, 0.6], [0.7, 0.7], [0, 1], baseline=np.full(2, np.nextafter(0.7, 1)))
    for skill in (statistics.skill_by_rmse, statistics.skill_by_mae):
        assert np.isnan(skill(sample)(np.ones((1, 2)))[0])


def test_the_first_bad_step_counts_only_when_exactly_that_one_is_named():
    # Of three bad trajectories one is found, of two good ones one is cleared: 2 · 1/3 · 1/2 / (1/3 + 1/2) = 0.4.
    sample = make_sample([0, 1, -1, -1, 2], [0, 2, 1, -1, -1], range(5))
    statistic = statistics.first_error_f1(sample)
    assert statistic(np.ones((1, 5)))[0] == pytest.approx(0.4)
    assert np.isnan(statistic(np.array([[1.0, 1, 1, 0, 0]]))[0])


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    # Correlated rows: eight a task share the task's own error. A row-wise interval would cover about half as often.
    covered = 0
    for seed in range(60):
        generator = np.random.default_rng(seed)
        task = np.repeat(np.arange(40), 8)
        errors = generator.normal(0, 0.2, 40)[task] + generator.normal(0, 0.05, 320)
        found = measure(sample := make_sample(errors, np.zeros(320), task), statistics.bias(sample))
        covered += found.low <= 0.0 <= found.high
    assert 50 <= covered <= 60


def test_an_estimate_says_why_it_has_no_value():
    few = make_sample([0.1, 0.2, 0.3], [0.1, 0.2, 0.3], [0, 1, 2])
    assert measure(few, statistics.spearman(few), min_n=10).reason == "at least 10 values are needed (here: 3)"
    constant = make_sample(np.full(20, 0.7), np.linspace(0, 1, 20), range(20))
    assert measure(constant, statistics.spearman(constant)) == Estimate(
        None, None, None, 20, 20, "the prediction is always the same"
    )
    assert (
        "reference"
        in measure(
            make_sample([0, 1.0], [1, 1.0], [0, 1]), statistics.pearson(make_sample([0, 1.0], [1, 1.0], [0, 1]))
        ).reason
    )
    nothing = make_sample([], [], [])
    assert measure(nothing, statistics.mean_absolute_error(nothing)).reason == "nothing to measure"


def test_few_tasks_give_a_value_without_an_interval():
    sample = noisy(60, MIN_TASKS - 1, 0.2, seed=5)
    found = measure(sample, statistics.spearman(sample))
    assert found.value == pytest.approx(stats.spearmanr(sample.predicted, sample.reference).statistic)
    assert found.low is None and "tasks" in found.reason


def test_resampling_is_the_same_every_time_and_leaves_out_what_is_undefined():
    sample = noisy(60, 9, 0.3, seed=6)
    once, again = (resampled(sample, statistics.spearman(sample)) for _ in range(2))
    assert len(once) == RESAMPLES and np.array_equal(once, again)
    assert expanded_percentiles(np.array([np.nan] * 2 + [0.5] * 8), tasks=10) == (None, None)
    assert expanded_percentiles(np.array([np.nan] * 1 + [0.5] * 99), tasks=10) == (0.5, 0.5)


def test_the_ends_of_an_interval_are_further_out_for_few_tasks():
    # Hesterberg 2015: norm.cdf(-t(0.975, n - 1) * sqrt(n / (n - 1))); for 10 tasks about 0.9 % instead of 2.5 %.
    values = np.random.default_rng(0).normal(size=100_000)
    for tasks in (10, 60):
        outside = stats.norm.cdf(-stats.t.ppf(0.975, tasks - 1) * np.sqrt(tasks / (tasks - 1)))
        assert expanded_percentiles(values, tasks) == pytest.approx(np.quantile(values, [outside, 1 - outside]))
    assert expanded_percentiles(values, 10)[0] < expanded_percentiles(values, 60)[0] < np.quantile(values, 0.025)


def test_kendall_is_scipys():
    sample = noisy(60, 9, 0.3, seed=2)
    assert statistics.kendall(sample) == pytest.approx(kendall_of(sample.predicted, sample.reference))


def test_spearman_within_groups_is_their_mean():
    sample = noisy(120, 12, 0.3, seed=3)
    group = np.arange(120) % 3
    grouped = make_sample(sample.predicted, sample.reference, sample.task, group=group)
    parts = [stats.spearmanr(sample.predicted[group == g], sample.reference[group == g]).statistic for g in range(3)]
    assert statistics.spearman_within(grouped)(np.ones((1, 12)))[0] == pytest.approx(np.mean(parts))


def test_the_calibration_error_by_chance_is_what_a_calibrated_judge_shows():
    generator = np.random.default_rng(1)
    probability = generator.uniform(0, 1, 300)
    found = []
    for _ in range(200):
        bad = (generator.uniform(size=300) < probability).astype(float)
        sample = make_sample(probability, bad, np.arange(300))
        found.append(statistics.calibration_error(sample)(np.ones((1, 300)))[0])
    by_chance = statistics.calibration_error_by_chance(sample)(np.ones((1, 300)))[0]
    assert by_chance == pytest.approx(np.mean(found), rel=0.05)


def test_abstention_by_the_true_error_closes_everything_and_by_nothing_nothing():
    error = np.random.default_rng(2).uniform(size=400)
    once = np.ones((1, 400))
    oracle = make_sample(-error, error, np.arange(400))
    assert statistics.share_of_abstention_closed(oracle)(once)[0] == pytest.approx(1.0)
    at_random = make_sample(np.random.default_rng(3).uniform(size=400), error, np.arange(400))
    assert abs(statistics.share_of_abstention_closed(at_random)(once)[0]) < 0.15
    by_hand = np.mean(np.cumsum(np.sort(error)) / np.arange(1, 401))
    assert statistics.area_under_risk_coverage(oracle)(once)[0] == pytest.approx(by_hand)


def test_weights_of_the_abstention_curve_are_repeated_rows():
    sample = noisy(40, 8, 0.3, seed=4)
    confidence = make_sample(np.arange(40.0), sample.reference, sample.task)
    for weights in draws(8)[1:]:
        times = weights[sample.task].astype(int)
        errors = np.repeat(sample.reference, times)[::-1]
        by_hand = np.mean(np.cumsum(errors) / np.arange(1, len(errors) + 1))
        # Rows of one task that are drawn twice have the same confidence; their order among each other is open.
        assert statistics.area_under_risk_coverage(confidence)(weights[None])[0] == pytest.approx(by_hand, abs=0.02)
