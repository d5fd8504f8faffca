"""Figures with their uncertainty: a value, a 95 % interval, and how much it rests on.

The steps of one task resemble each other, so rows are not independent and a row-wise interval would be too narrow. The
interval is the percentile bootstrap over whole tasks (Field and Welsh 2007, "Bootstrapping clustered data", the cluster
bootstrap; Efron and Tibshirani 1993, chapter 13, for the percentiles): tasks are drawn with replacement, each with all
of its rows. A resample is nothing but a whole-number weight for each task, so a statistic is written once, for weights,
and computed for a block of resamples at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Statistic = Callable[[Floats], Floats]
"""Weights of the tasks, one resample a row, shape (resamples, tasks) -> the statistic of each resample; NaN where it
is not defined."""

RESAMPLES = 1000
SEED = 0
LEVEL = 0.95
FEWEST_TASKS = 10
"""Fewer tasks than this give no interval: resampling few clusters makes intervals that are too narrow."""
SAME_PREDICTION = "the prediction is always the same"
_LEAST_DEFINED_SHARE = 0.9
_BLOCK = 200_000  # weights a block: small enough for a processor's cache, four times as fast as all at once


@dataclass(frozen=True)
class Sample:
    """Pairs of numbers, and the task that each belongs to."""

    predicted: Floats
    reference: Floats
    task: Integers
    """Numbers from 0 to `tasks - 1`, each of them met."""

    @property
    def tasks(self) -> int:
        """How many tasks there are."""
        return int(self.task.max(initial=-1)) + 1

    def sums(self, values: Floats) -> Floats:
        """The sum of `values` in each task, shape (tasks,)."""
        sums: Floats = np.bincount(self.task, weights=values, minlength=self.tasks).astype(np.float64)
        return sums


def make_sample(predicted: Any, reference: Any, task: Any) -> Sample:
    """Make a sample of three sequences of one length; `task` may hold anything that `numpy.unique` can sort."""
    _, numbers = np.unique(np.asarray(task), return_inverse=True)
    return Sample(np.asarray(predicted, np.float64), np.asarray(reference, np.float64), numbers.astype(np.int64))


@dataclass(frozen=True)
class Figure:
    """A number, its 95 % interval, and what it rests on; `value` is None where it is not defined, never NaN."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    tasks: int
    reason: str | None = None
    """Why there is no value, or no interval."""

    def as_json(self) -> dict[str, Any]:
        """The figure as it stands in `metrics.json`."""
        shown = {"value": self.value, "low": self.low, "high": self.high, "n": self.n, "tasks": self.tasks}
        return shown | ({"reason": self.reason} if self.reason else {})


@lru_cache(maxsize=64)
def draw_weights(tasks: int, resamples: int = RESAMPLES) -> Floats:
    """How often each task is in each resample, shape (resamples, tasks); the same for the same number of tasks."""
    generator = np.random.default_rng(SEED)
    drawn = generator.integers(tasks, size=(resamples, tasks)) + tasks * np.arange(resamples)[:, None]
    weights = np.bincount(drawn.ravel(), minlength=resamples * tasks).astype(np.float64)
    weights.setflags(write=False)
    return weights.reshape(resamples, tasks)


def measure(sample: Sample, statistic: Statistic, *, fewest: int = 1, n: int | None = None) -> Figure:
    """Compute a statistic and its interval.

    Args:
        sample: what the statistic was made from.
        statistic: see `prmkit.evaluation.measures`.
        fewest: with fewer pairs than this there is no value.
        n: what the statistic counts, where that is not the pairs of the sample.
    """
    count, tasks = len(sample.reference) if n is None else n, sample.tasks
    if count < fewest:
        few = f"{count} of at least {fewest} needed" if count else "nothing to measure"
        return Figure(None, None, None, count, tasks, few)
    value = float(statistic(np.ones((1, tasks)))[0])
    if not np.isfinite(value):
        return Figure(None, None, None, count, tasks, _why_undefined(sample))
    if tasks < FEWEST_TASKS:
        return Figure(value, None, None, count, tasks, f"no interval: {tasks} of at least {FEWEST_TASKS} tasks")
    low, high = interval(resampled(sample, statistic))
    reason = None if low is not None else "no interval: too many resamples leave it undefined"
    return Figure(value, low, high, count, tasks, reason)


def resampled(sample: Sample, statistic: Statistic) -> Floats:
    """The statistic in every resample, shape (resamples,)."""
    weights = draw_weights(sample.tasks)
    blocks = np.array_split(weights, max(1, len(weights) * len(sample.reference) // _BLOCK))
    return np.concatenate([statistic(block) for block in blocks])


def interval(values: Floats) -> tuple[float, float] | tuple[None, None]:
    """The percentile interval of resampled values; none where more than a tenth of them is not defined."""
    defined = values[np.isfinite(values)]
    if len(defined) < _LEAST_DEFINED_SHARE * len(values):
        return None, None
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _why_undefined(sample: Sample) -> str:
    if np.ptp(sample.reference) == 0:
        return "the reference is the same everywhere"
    if np.ptp(sample.predicted) == 0:
        return SAME_PREDICTION
    return "not defined for these scores"
