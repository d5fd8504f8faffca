"""Calibrated intervals around a judge's scores, abstention where they are wide, and the text of measured intervals.

Split-conformal prediction (Papadopoulos et al. 2002; Lei et al. 2018, section 5.2): on held-out rows, the error of a
score is divided by the judge's own standard deviation. A new score is then within `std * (quantile of those ratios)` of
what the judges would have said, as often as the level promises, whatever the distribution of the errors, as long as the
new rows are like the held-out ones.
"""

import argparse
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from prmkit import cli
from prmkit.errors import DataError
from prmkit.files import read_json, write_json

CALIBRATION_FILE = "calibration.json"
"""Written next to a run's weights, and next to an export that was shown to score as the run does."""
DEFAULT_LEVEL = 0.9
MIN_STD = 0.01
"""A floor: even a certain judge's score is rounded to hundredths, and dividing by a std of 0 would be infinite."""
MIN_RATIOS = 30
"""An evaluation type with fewer held-out scores than this uses the errors of all types together."""
ALL_TYPES = "all"
_MOST_RATIOS = 2000  # kept a type: their quantiles are those of all of them to a two-thousandth


@dataclass(frozen=True)
class Calibration:
    """The held-out errors of one judge in units of its own standard deviation."""

    ratios: Mapping[str, Sequence[float]]
    """Evaluation type (and `ALL_TYPES`) -> |score - reference| / std, in rising order."""
    counts: Mapping[str, int]
    """How many held-out scores each was made from; for weighted scores, the effective sample size."""
    judge: Mapping[str, Any]
    """The fingerprint of the judge that made the errors."""

    def interval(
        self, score: float, std: float | None, evaluation_type: str | None, level: float
    ) -> tuple[float, float] | None:
        """The ends between which the reference is with probability `level`, within 0 and 1.

        Args:
            score: the judge's.
            std: of the same score; None for a score that was read from text.
            evaluation_type: of the row; a type that was not measured uses the errors of all types.
            level: between 0 and 1.

        Returns:
            None if there is no std to scale by.
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
            return math.inf  # with so few errors, no finite width is certain enough
        return ratios[-(-rank * len(ratios) // count) - 1]


@dataclass(frozen=True)
class Abstention:
    """How lines of scores get their intervals, and above which width a score is unsure."""

    calibration: Calibration
    level: float
    max_width: float | None = None
    """Scores with a wider interval get the status `unsure`; None for no limit."""

    def add_interval(self, line: Mapping[str, Any], evaluation_type: str | None) -> dict[str, Any]:
        """The line of a scored row with `low` and `high`.

        Args:
            line: with `score`, `std`, `status` and `reason`; a row without a score gets null.
            evaluation_type: of the row.
        """
        ends = None
        if line["score"] is not None:
            ends = self.calibration.interval(line["score"], line["std"], evaluation_type, self.level)
        low, high = (None, None) if ends is None else (round(ends[0], 6), round(ends[1], 6))
        added = {**line, "low": low, "high": high}
        if line["status"] != "ok" or self.max_width is None:
            return added
        if low is None or high is None or high - low > self.max_width:
            width = "is not known" if low is None or high is None else f"has a width of {high - low:.2f}"
            reason = f"its {self.level:.0%} interval {width} (at most {self.max_width:g})"
            return added | {"status": "unsure", "reason": reason}
        return added


def load_abstention(
    folder: Path, fingerprint: Mapping[str, Any], level: float | None, max_width: float | None
) -> Abstention | None:
    """What the flags --interval and --abstain-above ask for; None without either.

    Args:
        folder: of the judge's weights.
        fingerprint: of the judge.
        level: of the intervals; with `max_width` alone it is `DEFAULT_LEVEL`.
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
    group = parser.add_argument_group("calibrated intervals (of a judge that was evaluated)")
    ends = "add low and high, which include the strong judges' score with this probability, such as 0.9"
    group.add_argument("--interval", type=cli.level, metavar="LEVEL", help=ends)
    wide = f"mark scores whose interval is wider as unsure (without --interval: at level {DEFAULT_LEVEL})"
    group.add_argument("--abstain-above", type=cli.level, metavar="WIDTH", help=wide)


def calibrated_judge(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """What identifies a judge for its intervals: device and dtype change a score by rounding alone."""
    return {key: value for key, value in fingerprint.items() if key not in ("device", "dtype")}


def fit_calibration(ratios: Mapping[str, Sequence[tuple[float, float]]], judge: Mapping[str, Any]) -> Calibration:
    """Make a calibration from the errors of held-out scores.

    Args:
        ratios: evaluation type -> |score - reference| / max(std, `MIN_STD`) and its weight, in any order.
        judge: what identifies the judge; scores of another judge must not be given these intervals.
    """
    by_type = {name: sorted(values) for name, values in ratios.items() if values}
    by_type[ALL_TYPES] = sorted(pair for pairs in by_type.values() for pair in pairs)
    counts = {name: _effective_size(pairs) for name, pairs in by_type.items()}
    return Calibration({name: _quantiles(pairs, counts[name]) for name, pairs in by_type.items()}, counts, judge)


def _effective_size(pairs: Sequence[tuple[float, float]]) -> int:
    """The effective sample size (Kish 1965): the number of values if all weights are equal."""
    total, squares = math.fsum(weight for _, weight in pairs), math.fsum(weight**2 for _, weight in pairs)
    return max(1, math.floor(total**2 / squares + 1e-9))


def _quantiles(pairs: Sequence[tuple[float, float]], size: int) -> list[float]:
    """The upper ends of equal shares of the weight: a quantile is at most one share too high, never too low."""
    shares = min(size, _MOST_RATIOS)
    up_to = list(accumulate(weight for _, weight in pairs))
    places = (bisect_left(up_to, up_to[-1] * ((place + 1) / shares - 1e-12)) for place in range(shares))
    return [round(pairs[place][0], 6) for place in places]


def write_calibration(folder: Path, calibration: Calibration) -> None:
    """Store a calibration next to the judge's weights."""
    content = {"judge": dict(calibration.judge), "counts": dict(calibration.counts), "ratios": dict(calibration.ratios)}
    write_json(folder / CALIBRATION_FILE, content)


def read_calibration(folder: Path, judge: Mapping[str, Any]) -> Calibration:
    """The calibration that belongs to a judge.

    Args:
        folder: the run or the export.
        judge: its fingerprint, as in `Calibration.judge`.

    Raises:
        DataError: the calibration is missing or damaged, or belongs to other weights.
    """
    file = folder / CALIBRATION_FILE
    if not file.is_file():
        raise DataError(f"{file}: not found; no intervals yet. Measure the run first: python evaluate_judge.py")
    content = read_json(file)
    try:
        ratios = {str(name): [float(value) for value in values] for name, values in content["ratios"].items()}
        counts = {str(name): int(count) for name, count in content["counts"].items()}
        found = Calibration(ratios, counts, dict(content["judge"]))
        sound = ALL_TYPES in ratios and all(
            len(values) and values == sorted(values) and counts[name] >= len(values) for name, values in ratios.items()
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{file}: damaged ({error!r}). Measure the judge again.") from error
    if not sound:
        raise DataError(f"{file}: damaged. Measure the judge again.")
    if dict(judge) != found.judge:
        raise DataError(f"{file}: made with other weights or settings. Measure the judge again.")
    return found


# --- measured numbers -------------------------------------------------------------------------------------------------

NONE = "–"
"""Shown where there is no number."""


def shown(estimate: Mapping[str, Any] | None, form: str = ".2f", *, interval: bool = True, none: str = NONE) -> str:
    """A measured number and its interval as people read them: `0.78 [0.70, 0.84]`.

    Args:
        estimate: `value`, `low` and `high`, as in `metrics.json`; None if nothing was measured.
        form: of the numbers, as in a format string: `.2f`, `+.2f` or `.0%`.
        interval: show the interval, if there is one.
        none: what to show where there is no value.
    """
    if not estimate or estimate.get("value") is None:
        return none
    text = f"{estimate['value']:{form}}"
    if interval and estimate.get("low") is not None:
        text += f" [{estimate['low']:{form}}, {estimate['high']:{form}}]"
    return text


def percent(estimate: Mapping[str, Any] | None, form: str = ".0%") -> str:
    """A share as people read it, without its interval."""
    return shown(estimate, form, interval=False)
