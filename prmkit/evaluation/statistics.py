"""The statistics of agreement, written for weighted tasks (see `prmkit.evaluation.estimates`).

Every function takes a sample and returns its `Statistic`. With weight 1 for every task, the values equal those of
scipy and scikit-learn; with whole-number weights of tasks or pairs (`Sample.weight`) they equal those of the rows
repeated that often. The tests check both. An undefined value (nothing varies, nothing to count) is NaN here, and `null`
with its reason in `metrics.json`.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from prmkit.evaluation.estimates import Floats, Integers, Sample, Statistic, mean_of, on_part, ratio, running_sums
from prmkit.judge.types import SAME_SCORE

BANDS = (0.2, 0.4, 0.6, 0.8)
"""The borders between the five bands of the rubric; a score on a border belongs to the upper band."""
CALIBRATION_BINS = 10
MIN_GROUP = 5
"""A key with fewer scores than this has no rank correlation."""
_NO_VARIANCE = 1e-15


# --- error ----------------------------------------------------------------------------------------------------------


def mean_absolute_error(sample: Sample) -> Statistic:
    """MAE: the mean of |predicted - reference|."""
    return mean_of(sample, np.abs(sample.predicted - sample.reference))


def root_mean_square_error(sample: Sample) -> Statistic:
    """RMSE: the square root of the mean of (predicted - reference)²."""
    squares = mean_of(sample, (sample.predicted - sample.reference) ** 2)
    return lambda weights: np.sqrt(squares(weights))


def bias(sample: Sample) -> Statistic:
    """The mean of predicted - reference: above zero, the judge is more lenient than the reference."""
    return mean_of(sample, sample.predicted - sample.reference)


def skill_by_rmse(sample: Sample) -> Statistic:
    """1 - RMSE / RMSE of the baseline on the same pairs: 0 is no better than the baseline, 1 is perfect.

    The mean of a distribution minimises the squared error, so it is compared with a constant mean.
    """
    return _skill(root_mean_square_error, sample)


def skill_by_mae(sample: Sample) -> Statistic:
    """1 - MAE / MAE of the baseline; the median minimises the absolute error, so it is compared with a median."""
    return _skill(mean_absolute_error, sample)


def _skill(error_of: Callable[[Sample], Statistic], sample: Sample) -> Statistic:
    errors, baseline_errors = error_of(sample), error_of(_baseline_of(sample))

    def statistic(weights: Floats) -> Floats:
        of_baseline = baseline_errors(weights)  # rounding gives even a perfect baseline an error slightly above 0
        return 1 - ratio(errors(weights), np.where(of_baseline < SAME_SCORE, 0.0, of_baseline))

    return statistic


def _baseline_of(sample: Sample) -> Sample:
    return replace(sample, predicted=sample.baseline)


def share_predicted(sample: Sample) -> Statistic:
    """The mean of `predicted`, for fractions: 1.0 for what is counted, 0.0 for the rest."""
    return mean_of(sample, sample.predicted)


def share_of_reference(sample: Sample) -> Statistic:
    """The mean of `reference`: the base rate."""
    return mean_of(sample, sample.reference)


# --- order ----------------------------------------------------------------------------------------------------------


def pearson(sample: Sample) -> Statistic:
    """Pearson's product-moment correlation."""
    if not len(sample.task):
        return lambda weights: np.full(len(weights), np.nan)
    # Centred first; otherwise the differences of large sums below would lose precision.
    predicted, reference = (
        values - weighted_mean(values, sample.weight) for values in (sample.predicted, sample.reference)
    )
    products = (np.ones(len(predicted)), predicted, reference, predicted**2, reference**2, predicted * reference)
    sums = np.stack([sample.sums(product) for product in products], axis=1)

    def statistic(weights: Floats) -> Floats:
        n, x, y, xx, yy, xy = (weights @ sums).T
        drawn = np.where(n > 0, n, 1.0)  # a resample may contain none of these pairs
        return _correlation(xx - x * x / drawn, yy - y * y / drawn, xy - x * y / drawn, n)

    return statistic


def spearman(sample: Sample) -> Statistic:
    """Spearman's rho: Pearson's correlation of the midranks, ranked again in every resample.

    A rank is the number of pairs below, with ties counted as one half. The mean of n such ranks is n / 2, and the sum
    of squares around it is n³ minus the cubes of the ties, divided by 12, so only the sum of products needs all pairs.
    """
    predicted, reference = _Values(sample, sample.predicted), _Values(sample, sample.reference)
    sizes_of, other_sizes_of = predicted.counted(sample.weight), reference.counted(sample.weight)
    weighted = bool(np.any(sample.weight != 1))

    def statistic(task_weights: Floats) -> Floats:
        sizes, other_sizes = sizes_of(task_weights), other_sizes_of(task_weights)
        ranks, other_ranks = _below(sizes), _below(other_sizes)
        n = sizes.sum(axis=0)
        drawn = np.ascontiguousarray(task_weights.T)[sample.task]
        if weighted:
            drawn *= sample.weight[:, None]
        products = np.einsum("nr,nr,nr->r", drawn, ranks[predicted.place], other_ranks[reference.place])
        cubes, other_cubes = (np.einsum("vr,vr,vr->r", tied, tied, tied) for tied in (sizes, other_sizes))
        cube = n * n * n  # rounded in the same way, so that a constant has no variance
        return _correlation((cube - cubes) / 12, (cube - other_cubes) / 12, products - cube / 4, n)

    return statistic


def spearman_within(sample: Sample) -> Statistic:
    """The mean over groups of Spearman's rho within each, weighted by the pairs in it.

    If several score keys are pooled, a judge that predicts the mean of each key has some pooled correlation,
    because one key is scored lower than another. Within groups, it does not. A group in which the judge does not vary
    counts as 0; a group with fewer than `MIN_GROUP` pairs, or in which the reference does not vary, is left out. NaN if
    the judge varies in no group.
    """
    parts, varied = [], False
    for number in np.unique(sample.group):
        chosen = sample.group == number
        predicted, reference = sample.predicted[chosen], sample.reference[chosen]
        if len(predicted) >= MIN_GROUP and np.ptp(reference) > 0:
            sizes = sample.sums(chosen.astype(np.float64))
            parts.append((on_part(sample, chosen, spearman), sizes))
            varied = varied or bool(np.ptp(predicted) > 0)

    def statistic(weights: Floats) -> Floats:
        if not varied:
            return np.full(len(weights), np.nan)
        sizes = np.stack([weights @ counts for _, counts in parts])
        orders = np.stack([np.nan_to_num(order(weights)) for order, _ in parts])
        return ratio((orders * sizes).sum(axis=0), sizes.sum(axis=0))

    return statistic


def kendall(sample: Sample) -> float:
    """Kendall's tau-b by Knight's method, in n log n; without an interval, because no conclusion is drawn from it."""
    from scipy import stats

    return float(stats.kendalltau(sample.predicted, sample.reference).statistic)


# --- decision -------------------------------------------------------------------------------------------------------


def roc_area(sample: Sample) -> Statistic:
    """AUROC: the probability that a bad step is suspected more than a good one, with ties as one half (Mann-Whitney).

    Args:
        sample: `predicted` is the suspicion, `reference` 1.0 for a bad step and 0.0 for a good one.
    """
    scores = _Values(sample, sample.predicted)
    sizes_of, bad_sizes_of = scores.counted(sample.weight), scores.counted(sample.reference * sample.weight)

    def statistic(task_weights: Floats) -> Floats:
        sizes, bad_sizes = sizes_of(task_weights), bad_sizes_of(task_weights)
        bad, total = bad_sizes.sum(axis=0), sizes.sum(axis=0)
        below = np.einsum("vr,vr->r", bad_sizes, _below(sizes))
        return ratio(below - bad**2 / 2, bad * (total - bad))

    return statistic


def average_precision(sample: Sample) -> Statistic:
    """Average precision: the sum over thresholds of (recall gained) · precision, without interpolation.

    Args:
        sample: as for `roc_area`.
    """
    scores = _Values(sample, -sample.predicted)
    found_of, taken_of = scores.counted(sample.reference * sample.weight), scores.counted(sample.weight)

    def statistic(task_weights: Floats) -> Floats:
        found, taken = found_of(task_weights), taken_of(task_weights)
        # A resample may lack the highest scores; precision is then 0 / 0, and counts as 0.
        precision = ratio(running_sums(found), running_sums(taken))
        gained = np.where(found > 0, found * precision, 0.0).sum(axis=0)
        return ratio(gained, found.sum(axis=0))

    return statistic


def brier(sample: Sample) -> Statistic:
    """Brier score: the mean of (probability - outcome)². A judge that always says the base rate b reaches b(1 - b).

    Args:
        sample: `predicted` is the probability of a bad step, `reference` 1.0 if it is one.
    """
    return mean_of(sample, (sample.predicted - sample.reference) ** 2)


def calibration_error(sample: Sample) -> Statistic:
    """ECE over ten bins of equal width (Guo et al. 2017): the mean distance of probability and share, by bin size.

    Args:
        sample: as for `brier`.
    """
    gaps = _binned(sample, (sample.predicted - sample.reference) * sample.weight)
    sizes = sample.sums(np.ones(len(sample.task)))
    return lambda weights: ratio(np.abs(weights @ gaps).sum(axis=1), weights @ sizes)


def calibration_error_by_chance(sample: Sample) -> Statistic:
    """The ECE that a perfectly calibrated judge with these probabilities would show on average.

    In a bin, the distance of probability and share is the mean of independent errors, each with variance p (1 - p)
    and its weight. Their sum is nearly normal, and the mean of |normal| is sqrt(2 / pi) standard deviations.
    """
    variances = _binned(sample, sample.predicted * (1 - sample.predicted) * sample.weight**2)
    sizes = sample.sums(np.ones(len(sample.task)))
    return lambda weights: ratio(np.sqrt(2 / np.pi * (weights @ variances)).sum(axis=1), weights @ sizes)


def _binned(sample: Sample, values: Floats) -> Floats:
    """Sums of `values` by task and bin of the predicted probability, shape (tasks, bins)."""
    bins = np.clip((sample.predicted * CALIBRATION_BINS).astype(np.int64), 0, CALIBRATION_BINS - 1)
    sums = np.zeros((sample.tasks, CALIBRATION_BINS))
    np.add.at(sums, (sample.task, bins), values)
    return sums


def kappa(sample: Sample) -> Statistic:
    """Cohen's kappa with quadratic weights (Cohen 1968) on the five bands of the rubric."""
    bands = len(BANDS) + 1
    cells = np.zeros((sample.tasks, bands, bands))
    np.add.at(cells, (sample.task, band(sample.predicted), band(sample.reference)), sample.weight)
    penalty = np.subtract.outer(np.arange(bands), np.arange(bands)) ** 2.0

    def statistic(weights: Floats) -> Floats:
        observed = np.einsum("rt,tij->rij", weights, cells)
        total = observed.sum(axis=(1, 2))
        expected = np.einsum("ri,rj->rij", observed.sum(axis=2), observed.sum(axis=1))
        by_chance = ratio((expected * penalty).sum(axis=(1, 2)), total)
        return 1 - ratio((observed * penalty).sum(axis=(1, 2)), by_chance)

    return statistic


def band(scores: Floats) -> Integers:
    """The band of each score, 0 (worst) to 4."""
    return np.digitize(scores + SAME_SCORE, BANDS).astype(np.int64)


# --- trajectories ---------------------------------------------------------------------------------------------------


def first_error_f1(sample: Sample) -> Statistic:
    """ProcessBench F1 (Zheng et al. 2024, arXiv 2412.06559).

    The harmonic mean of two accuracies: among trajectories with a bad step, how often exactly the first one is found;
    among those without, how often no step is flagged.

    Args:
        sample: the index of the first bad step of each trajectory; -1 if it has none.
    """
    wrong = sample.reference >= 0
    hit = (sample.predicted == sample.reference).astype(np.float64)
    wrong_hits, wrong_sizes = sample.sums(hit * wrong), sample.sums(wrong.astype(np.float64))
    right_hits, right_sizes = sample.sums(hit * ~wrong), sample.sums((~wrong).astype(np.float64))

    def statistic(weights: Floats) -> Floats:
        found = ratio(weights @ wrong_hits, weights @ wrong_sizes)
        cleared = ratio(weights @ right_hits, weights @ right_sizes)
        both = found + cleared
        return np.where(both == 0, 0.0, ratio(2 * found * cleared, both))

    return statistic


# --- pairs ------------------------------------------------------------------------------------------------------------


def pairwise_accuracy(pairs: Sample) -> Statistic:
    """acc_eq with tie calibration (Deutsch, Foster and Freitag 2023, "Ties Matter", arXiv 2305.14324).

    acc_eq = (C + T_hm) / (C + D + T_h + T_m + T_hm): pairs in the right order, or tied in both, among all pairs (h the
    reference, m the judge). It is computed in each group and averaged over the groups (the paper's group-by-item).
    Two scores of the judge tie if they are at most epsilon apart; epsilon is the single value that maximises the
    average. Epsilon is chosen on the same pairs and is not chosen again in the resamples, which favours the judge:
    compare with `always_tied`, the value of a constant judge.

    Args:
        pairs: see `prmkit.evaluation.estimates.make_pairs`.
    """
    distance, tied = np.abs(pairs.predicted), _tied(pairs)
    if tied.all():
        return lambda weights: np.full(len(weights), np.nan)  # all pairs are tied, so no order can be right
    right_order = ~tied & (np.sign(pairs.predicted) == np.sign(pairs.reference))
    epsilon = _best_epsilon(distance, tied * pairs.weight, right_order * pairs.weight)
    return mean_of(pairs, np.where(distance <= epsilon, tied, right_order).astype(np.float64))


def always_tied(pairs: Sample) -> Statistic:
    """The `pairwise_accuracy` of a judge that calls every pair a tie: the share of tied pairs in the reference."""
    return mean_of(pairs, _tied(pairs).astype(np.float64))


def _tied(pairs: Sample) -> NDArray[np.bool_]:
    tied: NDArray[np.bool_] = np.abs(pairs.reference) < SAME_SCORE
    return tied


def _best_epsilon(distance: Floats, tied: Floats, right_order: Floats) -> float:
    """The observed distance (or zero) that gets the most pairs right when used as epsilon."""
    widths, place = np.unique(np.concatenate([[0.0], distance]), return_inverse=True)
    # Calling a pair a tie adds a hit if the reference ties it, and removes one if it was in the right order.
    gained = np.bincount(place[1:], weights=tied - right_order, minlength=len(widths))
    return float(widths[np.argmax(np.round(np.cumsum(gained), 12))])


# --- abstention -------------------------------------------------------------------------------------------------------


def area_under_risk_coverage(sample: Sample) -> Statistic:
    """AURC (Geifman, Uziel and El-Yaniv 2019): the mean error of the most certain scores, averaged over coverage.

    Args:
        sample: `predicted` is the confidence, `reference` the error.
    """
    by_confidence = np.argsort(-sample.predicted, kind="stable")
    task, error, weight = sample.task[by_confidence], sample.reference[by_confidence], sample.weight[by_confidence]

    def statistic(weights: Floats) -> Floats:
        drawn = np.ascontiguousarray(weights.T)[task] * weight[:, None]
        kept, risk = running_sums(drawn), running_sums(drawn * error[:, None])
        np.divide(risk, kept, out=risk, where=kept > 0)  # a resample may lack the most certain scores
        return ratio(np.einsum("nr,nr->r", risk, drawn), kept[-1])

    return statistic


def share_of_abstention_closed(sample: Sample) -> Statistic:
    """How far AURC gets from random abstention (0) to abstention by the true error (1)."""
    aurc, mean = area_under_risk_coverage(sample), share_of_reference(sample)
    oracle = area_under_risk_coverage(replace(sample, predicted=-sample.reference))
    return lambda weights: ratio(mean(weights) - aurc(weights), mean(weights) - oracle(weights))


# --- arithmetic -----------------------------------------------------------------------------------------------------


def _correlation(squares: Floats, other_squares: Floats, products: Floats, total: Floats) -> Floats:
    # The rounding errors of a constant are not variance.
    varies = (squares > _NO_VARIANCE * total) & (other_squares > _NO_VARIANCE * total)
    scale = np.sqrt(np.where(varies, squares * other_squares, 0.0))
    correlation: Floats = np.clip(ratio(products, scale), -1.0, 1.0)
    return correlation


def weighted_mean(values: Floats, weight: Floats) -> float:
    """The mean of values, each counted `weight` times."""
    return float(np.average(values, weights=weight))


def weighted_median(values: Floats, weight: Floats) -> float:
    """The median of values, each counted `weight` times."""
    rising = np.argsort(values, kind="stable")
    up_to = np.cumsum(weight[rising])
    half = up_to[-1] / 2
    ends = [np.searchsorted(up_to, half * (1 - 1e-12)), np.searchsorted(up_to, half * (1 + 1e-12), side="right")]
    return float(values[rising[ends]].mean())


class _Values:
    """The distinct values of a sample in ascending order, and how often each occurs in a resample."""

    def __init__(self, sample: Sample, values: Floats) -> None:
        distinct, self.place = np.unique(values, return_inverse=True)
        self._order = np.argsort(self.place, kind="stable")
        self._task, self._from = sample.task[self._order], np.cumsum([0, *np.bincount(self.place)])
        self._shape = (len(distinct), sample.tasks)

    def counted(self, counts: Floats) -> Statistic:
        """Return a function: the sum of `counts` at each value in each resample, shape (values, resamples)."""
        from scipy.sparse import csr_array

        by_task = csr_array((counts[self._order], self._task, self._from), shape=self._shape)
        return lambda task_weights: by_task @ np.ascontiguousarray(task_weights.T)


def _below(sizes: Floats) -> Floats:
    """Return how many are smaller than each value (equal ones count as one half), if it occurs `sizes` times."""
    below = running_sums(sizes)
    below -= sizes / 2
    return below
