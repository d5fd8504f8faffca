"""The distribution shift between two samples: population stability index and Kolmogorov-Smirnov distance."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

BINS = 10
MIN_VALUES = 50
"""With fewer values in either sample nothing is reported: by chance alone, the index would exceed any useful limit."""
SURE = 0.01
"""A shift is reported only if its p-value is below this."""


@dataclass(frozen=True)
class Shift:
    """The shift between reference values and new values."""

    n_reference: int
    n: int
    mean_reference: float | None
    mean: float | None
    psi: float | None = None
    """The population stability index; None with too few values."""
    ks: float | None = None
    """The Kolmogorov-Smirnov distance, 0 to 1."""
    p: float | None = None
    """The p-value of the Kolmogorov-Smirnov distance."""

    def exceeds(self, limit: float) -> bool:
        """Whether PSI is above a limit and the shift is significant."""
        return self.psi is not None and self.p is not None and self.psi > limit and self.p < SURE

    def as_json(self) -> dict[str, Any]:
        """Return the shift for a machine-readable result."""
        return asdict(self)


def shift_of(reference: Sequence[float], values: Sequence[float]) -> Shift:
    """Compare values with reference values.

    PSI is the sum over bins of (q - p) ln(q / p), with the fractions p of the reference and q of the values in bins
    that hold equal fractions of the reference (Siddiqi, Credit Risk Scorecards, 2006: above 0.25 is a large change).
    Half a value is added to every bin, so that an empty bin does not make PSI infinite. If nothing has changed, PSI is
    about (bins - 1) (1/n + 1/m). This is subtracted, because small samples would otherwise look shifted.
    """
    from scipy import stats

    one, other = (np.asarray(each, dtype=float) for each in (reference, values))
    size: dict[str, Any] = {
        "n_reference": len(one),
        "n": len(other),
        "mean_reference": _mean(one),
        "mean": _mean(other),
    }
    if min(len(one), len(other)) < MIN_VALUES:
        return Shift(**size)
    edges = np.unique(np.quantile(one, np.linspace(0, 1, BINS + 1)[1:-1]))
    # Scores have ties. A value equal to an edge gets its own bin; otherwise a constant reference would have only one.
    bins = [
        np.searchsorted(edges, each, side="left") + np.searchsorted(edges, each, side="right") for each in (one, other)
    ]
    counts = [np.bincount(each, minlength=2 * len(edges) + 1) for each in bins]
    used = (counts[0] + counts[1]) > 0
    p, q = ((count[used] + 0.5) / (count.sum() + 0.5 * used.sum()) for count in counts)
    by_chance = (used.sum() - 1) * (1 / len(one) + 1 / len(other))
    psi = max(0.0, float(np.sum((q - p) * np.log(q / p)) - by_chance))
    test = stats.ks_2samp(one, other)
    return Shift(**size, psi=round(psi, 6), ks=round(float(test.statistic), 6), p=float(test.pvalue))


def _mean(values: "np.ndarray[Any, Any]") -> float | None:
    return round(float(values.mean()), 6) if len(values) else None
