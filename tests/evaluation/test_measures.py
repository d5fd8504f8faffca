"""The statistics against scipy, scikit-learn and brute force, whole and with tasks drawn more than once."""

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from prmkit.evaluation import measures
from prmkit.evaluation.bootstrap import (
    FEWEST_TASKS,
    RESAMPLES,
    Figure,
    Sample,
    draw_weights,
    interval,
    make_sample,
    measure,
    resampled,
)

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


def kendall_of(predicted: np.ndarray, reference: np.ndarray) -> float:
    return float(stats.kendalltau(predicted, reference).statistic)


OF_SCORES = {
    "mean_absolute_error": sk.mean_absolute_error,
    "root_mean_square_error": sk.root_mean_squared_error,
    "bias": lambda predicted, reference: np.mean(predicted - reference),
    "pearson": lambda predicted, reference: stats.pearsonr(predicted, reference).statistic,
    "spearman": lambda predicted, reference: stats.spearmanr(predicted, reference).statistic,
    "kendall": kendall_of,
    "kappa": lambda predicted, reference: sk.cohen_kappa_score(
        np.searchsorted(measures.BANDS, predicted, side="right"),
        np.searchsorted(measures.BANDS, reference, side="right"),
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
    found = getattr(measures, name)(sample)(weights)
    expected = [OF_SCORES[name](*repeated(sample, row)) for row in weights]
    np.testing.assert_allclose(found, expected, atol=1e-12)


OF_DECISIONS = {
    "roc_area": lambda suspicion, bad: sk.roc_auc_score(bad, suspicion),
    "average_precision": lambda suspicion, bad: sk.average_precision_score(bad, suspicion),
    "brier": lambda suspicion, bad: sk.brier_score_loss(bad, suspicion),
}


@pytest.mark.parametrize("name", OF_DECISIONS)
@pytest.mark.parametrize("threshold", [0.5, 0.8])
@pytest.mark.parametrize(("size", "tasks"), SIZES)
def test_a_decision_statistic_is_scikit_learns(name, threshold, size, tasks):
    scores = noisy(size, tasks, 0.3, seed=size)
    bad = (scores.reference < threshold).astype(float)
    sample = Sample(1 - scores.predicted, bad, scores.task)
    weights = draws(tasks)
    found = getattr(measures, name)(sample)(weights)
    expected = [OF_DECISIONS[name](*repeated(sample, row)) for row in weights]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_calibration_error_bin_by_bin():
    sample = make_sample([0.05, 0.05, 0.55, 1.0], [0.0, 1.0, 1.0, 1.0], [0, 1, 2, 3])
    found = measures.calibration_error(sample)(np.ones((1, 4)))
    assert found[0] == pytest.approx(0.5 * abs(0.05 - 0.5) + 0.25 * abs(0.55 - 1.0) + 0.25 * 0.0)


def test_skill_is_zero_for_the_baseline_itself_and_one_for_the_truth():
    sample = noisy(60, 9, 0.3, seed=1)
    as_baseline = Sample(np.full(60, 0.6), sample.reference, sample.task)
    perfect = Sample(sample.reference, sample.reference, sample.task)
    once = np.ones((1, sample.tasks))
    assert measures.skill(as_baseline, np.full(60, 0.6))(once)[0] == pytest.approx(0.0)
    assert measures.skill(perfect, np.full(60, 0.6))(once)[0] == pytest.approx(1.0)


def test_the_first_bad_step_counts_only_when_exactly_that_one_is_named():
    # Of three bad trajectories one is found, of two good ones one is cleared: 2 · 1/3 · 1/2 / (1/3 + 1/2) = 0.4.
    sample = make_sample([0, 1, -1, -1, 2], [0, 2, 1, -1, -1], range(5))
    statistic = measures.first_error_f1(sample)
    assert statistic(np.ones((1, 5)))[0] == pytest.approx(0.4)
    assert np.isnan(statistic(np.array([[1.0, 1, 1, 0, 0]]))[0])


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    # Correlated rows: eight a task share the task's own error. A row-wise interval would cover about half as often.
    covered = 0
    for seed in range(60):
        generator = np.random.default_rng(seed)
        task = np.repeat(np.arange(40), 8)
        errors = generator.normal(0, 0.2, 40)[task] + generator.normal(0, 0.05, 320)
        figure = measure(sample := make_sample(errors, np.zeros(320), task), measures.bias(sample))
        covered += figure.low <= 0.0 <= figure.high
    assert 50 <= covered <= 60


def test_a_figure_says_why_it_has_no_value():
    few = make_sample([0.1, 0.2, 0.3], [0.1, 0.2, 0.3], [0, 1, 2])
    assert measure(few, measures.spearman(few), fewest=10).reason == "3 of at least 10 needed"
    constant = make_sample(np.full(20, 0.7), np.linspace(0, 1, 20), range(20))
    assert measure(constant, measures.spearman(constant)) == Figure(
        None, None, None, 20, 20, "the prediction is always the same"
    )
    assert (
        "reference"
        in measure(
            make_sample([0, 1.0], [1, 1.0], [0, 1]), measures.pearson(make_sample([0, 1.0], [1, 1.0], [0, 1]))
        ).reason
    )
    nothing = make_sample([], [], [])
    assert measure(nothing, measures.mean_absolute_error(nothing)).reason == "nothing to measure"


def test_few_tasks_give_a_value_without_an_interval():
    sample = noisy(60, FEWEST_TASKS - 1, 0.2, seed=5)
    figure = measure(sample, measures.spearman(sample))
    assert figure.value == pytest.approx(stats.spearmanr(sample.predicted, sample.reference).statistic)
    assert figure.low is None and "tasks" in figure.reason


def test_resampling_is_the_same_every_time_and_leaves_out_what_is_undefined():
    sample = noisy(60, 9, 0.3, seed=6)
    once, again = (resampled(sample, measures.spearman(sample)) for _ in range(2))
    assert len(once) == RESAMPLES and np.array_equal(once, again)
    assert interval(np.array([np.nan] * 2 + [0.5] * 8)) == (None, None)
    assert interval(np.array([np.nan] * 1 + [0.5] * 99)) == (0.5, 0.5)
