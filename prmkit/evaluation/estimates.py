"""Numbers with their uncertainty: a value, a 95 % interval, and how much data it is based on.

The steps of one task resemble each other, so rows are not independent and a row-wise interval would be too narrow. The
interval is the bootstrap over whole tasks (Field and Welsh 2007, "Bootstrapping clustered data"): tasks are drawn with
replacement, each with all of its rows. Its ends are expanded percentiles (Hesterberg 2015, "What teachers should know
about the bootstrap", section 4.3), because plain percentiles are too narrow for few tasks: of the 95 % intervals of a
mean absolute error over 10 tasks, only 88 % contained the true value.

A resample is just a whole-number weight for each task, so a statistic is written once, for weights, and computed for a
block of resamples at a time.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Statistic = Callable[[Floats], Floats]
"""Weights of the tasks, one resample per row, shape (resamples, tasks) -> the statistic of each resample; NaN where it
is not defined."""

SEED = 0
LEVEL = 0.95
RESAMPLES = 1000
MANY = 10_000
"""Above this many pairs fewer resamples are drawn, down to a tenth at ten times as many: the time stays the same, and
the intervals are then so narrow that the error of their ends does not show in two decimals."""
MAX_PAIRED = 40
"""A larger group of scores uses only as many pairs, chosen at random, as a group of this size has, because the number
of pairs grows quadratically."""
MIN_TASKS = 10
"""With fewer tasks than this, there is no interval: resampling few clusters gives intervals that are too narrow."""
SAME_PREDICTION = "the prediction is always the same"
SAME_REFERENCE = "the reference is the same everywhere"

_MIN_DEFINED_SHARE = 0.9
_KEPT = 31 << 20
"""glibc returns arrays of a few megabytes to the kernel, and getting them again takes two thirds of a statistic's time.
Once an array of this size was allocated and freed (32 MiB is too much), it keeps the memory of smaller arrays."""
_BLOCK = 200_000  # weights per block: a block fits the CPU cache, which is four times as fast as one large block


@dataclass(frozen=True)
class Sample:
    """Pairs of numbers, and the task of each pair; all arrays have the same length."""

    predicted: Floats
    reference: Floats
    task: Integers
    """Numbers from 0 to `tasks - 1`, each of which occurs."""
    group: Integers
    """The group of each pair, for statistics within groups; otherwise 0."""
    baseline: Floats
    """The baseline's prediction, for statistics that compare with a baseline; otherwise NaN."""
    weight: Floats
    """The number of pairs that each pair represents; 1 if all were equally likely to be in the sample."""

    @property
    def tasks(self) -> int:
        """The number of tasks."""
        return int(self.task.max(initial=-1)) + 1

    def sums(self, values: Floats) -> Floats:
        """Return the weighted sum of `values` in each task, shape (tasks,)."""
        sums: Floats = np.bincount(self.task, weights=values * self.weight, minlength=self.tasks).astype(np.float64)
        return sums


def make_sample(
    predicted: Any,
    reference: Any,
    task: Any,
    *,
    group: Integers | None = None,
    baseline: Floats | None = None,
    weight: Any = None,
) -> Sample:
    """Make a sample from sequences of equal length; `task` may contain anything that `numpy.unique` can sort."""
    _, numbers = np.unique(np.asarray(task), return_inverse=True)
    tasks = numbers.astype(np.int64).reshape(-1)
    return Sample(
        np.asarray(predicted, np.float64),
        np.asarray(reference, np.float64),
        tasks,
        np.zeros(len(tasks), np.int64) if group is None else group,
        np.full(len(tasks), np.nan) if baseline is None else baseline,
        np.ones(len(tasks)) if weight is None else np.asarray(weight, np.float64),
    )


def on_part(sample: Sample, chosen: NDArray[Any], make: Callable[[Sample], Statistic]) -> Statistic:
    """Make a statistic of some of the pairs that accepts weights for all tasks of the sample.

    This way several statistics, each on its own rows, can be resampled together.
    """
    tasks, task = np.unique(sample.task[chosen], return_inverse=True)
    part = replace(
        sample,
        predicted=sample.predicted[chosen],
        reference=sample.reference[chosen],
        task=task.astype(np.int64),
        group=sample.group[chosen],
        baseline=sample.baseline[chosen],
        weight=sample.weight[chosen],
    )
    statistic = make(part)
    return lambda weights: statistic(weights[:, tasks])


def make_pairs(sample: Sample) -> Sample:
    """Return all pairs of scores within each group, as a sample of differences.

    Args:
        sample: scores; a group is within one task.

    Returns:
        `predicted` and `reference` are differences. The weight of a pair is the product of those of its scores, and
        the weights of a group add up to one.
    """
    first, second, group = _pairs_within(sample.group)
    weight = sample.weight[first] * sample.weight[second]
    of_group = np.bincount(group, weights=weight) if len(group) else np.zeros(0)
    return make_sample(
        sample.predicted[first] - sample.predicted[second],
        sample.reference[first] - sample.reference[second],
        sample.task[first],
        weight=weight / of_group[group],
    )


def _pairs_within(group: Integers) -> tuple[Integers, Integers, Integers]:
    """Return the two scores of each pair, and a number for its group."""
    generator = np.random.default_rng(SEED)
    by_group = np.argsort(group, kind="stable")
    firsts, seconds, numbers = [by_group[:0]], [by_group[:0]], [by_group[:0]]
    for number, members in enumerate(np.split(by_group, np.flatnonzero(np.diff(group[by_group])) + 1)):
        if len(members) <= MAX_PAIRED:
            one, other = np.triu_indices(len(members), 1)
        else:
            one = generator.integers(len(members), size=MAX_PAIRED * (MAX_PAIRED - 1) // 2)
            other = (one + generator.integers(1, len(members), size=len(one))) % len(members)
        firsts.append(members[one])
        seconds.append(members[other])
        numbers.append(np.full(len(one), number))
    return np.concatenate(firsts), np.concatenate(seconds), np.concatenate(numbers)


# --- estimates --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A number, its 95 % interval, and what it is based on; `value` is None if undefined, never NaN."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    tasks: int
    reason: str | None = None
    """Why there is no value, or no interval."""

    def as_json(self) -> dict[str, Any]:
        """Return the estimate as it is in `metrics.json`."""
        shown = {"value": self.value, "low": self.low, "high": self.high, "n": self.n, "tasks": self.tasks}
        return shown | ({"reason": self.reason} if self.reason else {})


def undefined(reason: str, n: int = 0, tasks: int = 0) -> Estimate:
    """Return an estimate without a value."""
    return Estimate(None, None, None, n, tasks, reason)


def as_json(value: Any) -> Any:
    """Convert estimates, and whatever contains them, to what JSON can represent."""
    if isinstance(value, Estimate):
        return value.as_json()
    if isinstance(value, Mapping):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return value


@lru_cache(maxsize=8)
def draw_weights(tasks: int, resamples: int = RESAMPLES) -> Floats:
    """Draw how often each task is in each resample, shape (resamples, tasks), with a fixed seed."""
    generator = np.random.default_rng(SEED)
    drawn = generator.integers(tasks, size=(resamples, tasks)) + tasks * np.arange(resamples)[:, None]
    weights = np.bincount(drawn.ravel(), minlength=resamples * tasks).astype(np.float64)
    weights.setflags(write=False)
    return weights.reshape(resamples, tasks)


def measure(sample: Sample, statistic: Statistic, *, min_n: int = 1) -> Estimate:
    """Compute a statistic and its interval.

    Args:
        sample: the sample from which the statistic was made.
        statistic: one of `prmkit.evaluation.statistics`, applied to `sample`.
        min_n: with fewer pairs than this, there is no value.
    """
    count, tasks = len(sample.reference), sample.tasks
    if count < max(min_n, 1):
        few = f"at least {min_n} values are needed (here: {count})" if count else "nothing to measure"
        return undefined(few, count, tasks)
    value = float(statistic(np.ones((1, tasks)))[0])
    if not np.isfinite(value):
        return undefined(_why_undefined(sample), count, tasks)
    if tasks < MIN_TASKS:
        return Estimate(
            value, None, None, count, tasks, f"no interval: at least {MIN_TASKS} tasks are needed (here: {tasks})"
        )
    low, high = expanded_percentiles(resampled(sample, statistic), tasks)
    reason = None if low is not None else "no interval: undefined in too many resamples"
    return Estimate(value, low, high, count, tasks, reason)


def measure_binary(sample: Sample, statistic: Statistic, *, min_n: int = 1) -> Estimate:
    """Do the same as `measure`, for a statistic that needs both classes: `reference` is 1.0 for bad steps, else 0.0."""
    count = len(sample.reference)
    one_kind = {0.0: "no step is bad", 1.0: "every step is bad"}
    if count >= max(min_n, 1) and (reason := one_kind.get(float(sample.reference.mean()))):
        return undefined(reason, count, sample.tasks)
    return measure(sample, statistic, min_n=min_n)


def mean(values: Any, task: Any, weight: Any = None) -> Estimate:
    """Return the mean of values and its interval.

    Args:
        values: numbers; for a fraction, 1.0 for what is counted and 0.0 for the rest.
        task: the task of each value.
        weight: how many values each value represents; None if all were equally likely to be in the sample.
    """
    sample = make_sample(values, np.zeros(len(values)), task, weight=weight)
    return measure(sample, mean_of(sample, sample.predicted))


def mean_of(sample: Sample, values: Floats) -> Statistic:
    """Return the mean of one value per pair."""
    sums, sizes = sample.sums(values), sample.sums(np.ones(len(values)))
    return lambda weights: ratio(weights @ sums, weights @ sizes)


def ratio(numerator: Floats, denominator: Floats) -> Floats:
    """Return numerator / denominator; NaN if the denominator is zero."""
    shape = np.broadcast(numerator, denominator).shape
    nowhere = np.full(shape, np.nan)
    quotient: Floats = np.divide(numerator, denominator, out=nowhere, where=np.asarray(denominator) != 0)
    return quotient


def running_sums(values: Floats) -> Floats:
    """Return the cumulative sums of the rows, in half the time of numpy's cumsum, which adds number by number.

    Rows are added within blocks of neighbours, all blocks together; then each block gets the sum before it.
    """
    sums, stretch = values.copy(), max(1, math.isqrt(len(values)))
    for place in range(1, stretch):
        rows = sums[place::stretch]
        rows += sums[place - 1 :: stretch][: len(rows)]
    for start in range(stretch, len(sums), stretch):
        sums[start : start + stretch] += sums[start - 1]
    return sums


def resampled(sample: Sample, statistic: Statistic) -> Floats:
    """Return the statistic in every resample, shape (resamples,)."""
    np.empty(_KEPT, np.uint8)
    resamples = round(RESAMPLES * min(1.0, max(0.1, MANY / max(len(sample.reference), 1))))
    weights = draw_weights(sample.tasks, resamples)
    blocks = np.array_split(weights, max(1, len(weights) * len(sample.reference) // _BLOCK))
    return np.concatenate([statistic(block) for block in blocks])


def expanded_percentiles(values: Floats, tasks: int) -> tuple[float, float] | tuple[None, None]:
    """Return the expanded percentile interval of resampled values; (None, None) if more than a tenth are undefined."""
    defined = np.sort(values[np.isfinite(values)])
    if len(defined) < _MIN_DEFINED_SHARE * len(values):
        return None, None
    outside = _share_outside(tasks)
    places = np.array([outside, 1 - outside]) * (len(defined) - 1)
    low, high = np.interp(places, np.arange(len(defined)), defined)  # numpy's quantile takes ten times as long
    return float(low), float(high)


@lru_cache
def _share_outside(tasks: int) -> float:
    """Return the fraction of resamples cut off at each end: norm.cdf(-t_{n-1} * sqrt(n / (n - 1))), Hesterberg 2015."""
    from scipy import stats

    quantile = stats.t.ppf((1 + LEVEL) / 2, tasks - 1) * np.sqrt(tasks / (tasks - 1))
    return float(stats.norm.cdf(-quantile))


def _why_undefined(sample: Sample) -> str:
    if np.ptp(sample.reference) == 0:
        return SAME_REFERENCE
    if np.ptp(sample.predicted) == 0:
        return SAME_PREDICTION
    return "not defined for these scores"
