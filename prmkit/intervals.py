"""Calibrated intervals around a judge's scores, abstention where they are wide, intervals of means, and their format.

Split-conformal prediction (Papadopoulos et al. 2002; Lei et al. 2018, section 5.2): on held-out rows, the error of a
score is divided by the judge's own standard deviation. A new score is then within `std * (quantile of those ratios)` of
the judges' mean with the probability `level`, for any distribution of the errors, as long as the new rows are like the
held-out ones.
"""

import argparse
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

from prmkit import cli
from prmkit.errors import DataError
from prmkit.files import read_json, write_json

CALIBRATION_FILE = "calibration.json"
"""The file with the calibration, next to a training run's weights and next to a verified export."""
DEFAULT_LEVEL = 0.9
MIN_STD = 0.01
"""Floor for std: even a confident judge's score is rounded to hundredths, and a std of 0 gives an infinite ratio."""
MIN_RATIOS = 30
"""An evaluation type with fewer held-out scores than this uses the errors of all types together."""
ALL_TYPES = "all"
_MOST_RATIOS = 2000  # per evaluation type: their quantiles are within 1/2000 of those of all ratios


@dataclass(frozen=True)
class Calibration:
    """The held-out errors of one judge in units of its own standard deviation."""

    ratios: Mapping[str, Sequence[float]]
    """Evaluation type (and `ALL_TYPES`) -> |score - reference| / std, in ascending order."""
    counts: Mapping[str, int]
    """Evaluation type -> number of held-out scores; for weighted scores, the effective sample size."""
    judge: Mapping[str, Any]
    """The fingerprint of the judge that made the errors."""

    def interval(
        self, score: float, std: float | None, evaluation_type: str | None, level: float
    ) -> tuple[float, float] | None:
        """Return the interval, within 0 and 1, that contains the reference with probability `level`.

        Args:
            score: the judge's score.
            std: its standard deviation; None for a score that was read from text.
            evaluation_type: the type of the row; a type with too few held-out scores uses the errors of all types.
            level: between 0 and 1.

        Returns:
            The lower and the upper bound; None if there is no std to scale by.
        """
        if std is None:
            return None
        width = self._quantile(evaluation_type, level) * max(std, MIN_STD)
        return max(0.0, score - width), min(1.0, score + width)

    def _quantile(self, evaluation_type: str | None, level: float) -> float:
        known = evaluation_type if self.counts.get(evaluation_type or "", 0) >= MIN_RATIOS else ALL_TYPES
        ratios, count = self.ratios[str(known)], self.counts[str(known)]
        rank = math.ceil((count + 1) * level)  # the finite-sample rank, counted from 1
        if rank > count:
            return math.inf  # there are too few errors for this level
        return ratios[-(-rank * len(ratios) // count) - 1]


@dataclass(frozen=True)
class Abstention:
    """The settings for intervals of scores, and the width above which a score is unsure."""

    calibration: Calibration
    level: float
    max_width: float | None = None
    """Scores with a wider interval get the status `unsure`; None for no limit."""

    def add_interval(self, line: Mapping[str, Any], evaluation_type: str | None) -> dict[str, Any]:
        """Add `low` and `high` to the line of a scored row.

        Args:
            line: has `score`, `std`, `status` and `reason`; without a score, `low` and `high` are null.
            evaluation_type: the type of the row.
        """
        ends = None
        if line["score"] is not None:
            ends = self.calibration.interval(line["score"], line["std"], evaluation_type, self.level)
        low, high = (None, None) if ends is None else (round(ends[0], 6), round(ends[1], 6))
        added = {**line, "low": low, "high": high}
        if line["status"] != "ok" or self.max_width is None:
            return added
        if low is None or high is None or high - low > self.max_width:
            width = "is unknown" if low is None or high is None else f"has a width of {high - low:.2f}"
            reason = f"its {self.level:.0%} interval {width} (at most {self.max_width:g})"
            return added | {"status": "unsure", "reason": reason}
        return added


def load_abstention(
    folder: Path, fingerprint: Mapping[str, Any], level: float | None, max_width: float | None
) -> Abstention | None:
    """Turn the flags --interval and --abstain-above into settings; None if neither was passed.

    Args:
        folder: the folder of the judge's weights.
        fingerprint: the judge's fingerprint.
        level: the level of the intervals; with `max_width` alone it is `DEFAULT_LEVEL`.
        max_width: see `Abstention`.

    Raises:
        DataError: the judge has no calibration.
    """
    if level is None and max_width is None:
        return None
    calibration = read_calibration(folder, calibrated_judge(fingerprint))
    return Abstention(calibration, DEFAULT_LEVEL if level is None else level, max_width)


def add_interval_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags --interval and --abstain-above, which `load_abstention` takes."""
    group = parser.add_argument_group("calibrated intervals (for an evaluated judge)")
    ends = "add low and high: bounds that contain the strong judges' mean with this probability, such as 0.9"
    group.add_argument("--interval", type=cli.level, metavar="LEVEL", help=ends)
    width = f"mark scores with a wider interval as unsure (without --interval: at level {DEFAULT_LEVEL})"
    group.add_argument("--abstain-above", type=cli.level, metavar="WIDTH", help=width)


def calibrated_judge(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a fingerprint that identifies a calibrated judge: device and dtype only change rounding."""
    return {key: value for key, value in fingerprint.items() if key not in ("device", "dtype")}


def fit_calibration(ratios: Mapping[str, Sequence[tuple[float, float]]], judge: Mapping[str, Any]) -> Calibration:
    """Create a calibration from the errors of held-out scores.

    Args:
        ratios: evaluation type -> |score - reference| / max(std, `MIN_STD`) and its weight, in any order.
        judge: identifies the judge; scores of another judge must not get these intervals.
    """
    by_type = {name: sorted(values) for name, values in ratios.items() if values}
    by_type[ALL_TYPES] = sorted(pair for pairs in by_type.values() for pair in pairs)
    counts = {name: _effective_size(pairs) for name, pairs in by_type.items()}
    return Calibration({name: _quantiles(pairs, counts[name]) for name, pairs in by_type.items()}, counts, judge)


def _effective_size(pairs: Sequence[tuple[float, float]]) -> int:
    """Return the effective sample size (Kish 1965): the number of values if all weights are equal."""
    total, squares = math.fsum(weight for _, weight in pairs), math.fsum(weight**2 for _, weight in pairs)
    return max(1, math.floor(total**2 / squares + 1e-9))


def _quantiles(pairs: Sequence[tuple[float, float]], size: int) -> list[float]:
    """Return the upper bounds of bins of equal weight: a quantile is at most one bin too high, never too low."""
    bins = min(size, _MOST_RATIOS)
    up_to = list(accumulate(weight for _, weight in pairs))
    indices = (bisect_left(up_to, up_to[-1] * ((number + 1) / bins - 1e-12)) for number in range(bins))
    return [round(pairs[index][0], 6) for index in indices]


def write_calibration(folder: Path, calibration: Calibration) -> None:
    """Store a calibration next to the judge's weights."""
    content = {"judge": dict(calibration.judge), "counts": dict(calibration.counts), "ratios": dict(calibration.ratios)}
    write_json(folder / CALIBRATION_FILE, content)


def read_calibration(folder: Path, judge: Mapping[str, Any]) -> Calibration:
    """Read the calibration of a judge.

    Args:
        folder: the training run or the export.
        judge: its fingerprint, as in `Calibration.judge`.

    Raises:
        DataError: the calibration is missing or damaged, or belongs to other weights.
    """
    file = folder / CALIBRATION_FILE
    if not file.is_file():
        raise DataError(f"{file}: not found; no intervals yet. Evaluate the run first: python evaluate_judge.py")
    content = read_json(file)
    try:
        ratios = {str(name): [float(value) for value in values] for name, values in content["ratios"].items()}
        counts = {str(name): int(count) for name, count in content["counts"].items()}
        calibration = Calibration(ratios, counts, dict(content["judge"]))
        sound = ALL_TYPES in ratios and all(
            len(values) and values == sorted(values) and counts[name] >= len(values) for name, values in ratios.items()
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{file}: damaged ({error!r}). Evaluate the judge again.") from error
    if not sound:
        raise DataError(f"{file}: damaged. Evaluate the judge again.")
    if dict(judge) != calibration.judge:
        raise DataError(f"{file}: made with other weights or settings. Evaluate the judge again.")
    return calibration


# --- estimates --------------------------------------------------------------------------------------------------------

NONE = "–"
"""The placeholder for a missing number."""


def format_estimate(
    estimate: Mapping[str, Any] | None, form: str = ".2f", *, interval: bool = True, none: str = NONE
) -> str:
    """Format an estimate with its interval: `0.78 [0.70, 0.84]`.

    Args:
        estimate: `value`, `low` and `high`, as in `metrics.json`; None if nothing was measured.
        form: the format of the numbers, as in a format string: `.2f`, `+.2f` or `.0%`.
        interval: whether to show the interval, if there is one.
        none: the placeholder for a missing value.
    """
    if not estimate or estimate.get("value") is None:
        return none
    text = f"{estimate['value']:{form}}"
    if interval and estimate.get("low") is not None:
        text += f" [{estimate['low']:{form}}, {estimate['high']:{form}}]"
    return text


def percent(estimate: Mapping[str, Any] | None, form: str = ".0%") -> str:
    """Format a fraction as a percentage, without its interval."""
    return format_estimate(estimate, form, interval=False)


# --- means that are checked again and again ---------------------------------------------------------------------------

_HIGHEST_RATE = 0.5


def confidence_sequence(values: Sequence[float], level: float = 0.95) -> dict[str, float]:
    """A confidence sequence of the mean: an interval that is valid even if it is checked after every value.

    Predictable plug-in empirical Bernstein: theorem 2 of Waudby-Smith and Ramdas, Estimating means of bounded random
    variables by betting (2024), for values from -1 to 1 in the order in which they arrived.

    Returns:
        `value`, the plain mean, `low` and `high`.
    """
    log = math.log(2 / (1 - level))
    weights = weighted = spread = 0.0
    total, squares, mean = 0.5, 0.25, 0.5
    low, high = 0.0, 1.0
    for count, value in enumerate(values, start=1):
        x = (value + 1) / 2
        rate = min(math.sqrt(2 * log / (squares * math.log(1 + count))), _HIGHEST_RATE)
        weights += rate
        weighted += rate * x
        spread += 4 * (x - mean) ** 2 * (-math.log(1 - rate) - rate) / 4
        total += x
        mean = total / (count + 1)
        squares += (x - mean) ** 2
        margin = (log + spread) / weights
        low, high = max(low, weighted / weights - margin), min(high, weighted / weights + margin)
    return {"value": fmean(values), "low": 2 * low - 1, "high": 2 * high - 1}
