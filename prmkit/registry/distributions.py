"""How far two sets of numbers are apart: the population stability index and the Kolmogorov-Smirnov distance."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

BINS = 10
MIN_VALUES = 50
"""With fewer values on one side nothing is said: chance alone moves the index above any useful limit."""
SURE = 0.01
"""A shift is reported where chance makes one as large less often than this."""


@dataclass(frozen=True)
class Shift:
    """How far new values are from reference ones."""

    n_reference: int
    n: int
    psi: float | None
    """The population stability index; None where there are too few values."""
    ks: float | None
    p_value: float | None
    """Of the Kolmogorov-Smirnov distance."""
    means: tuple[float | None, float | None]

    def exceeds(self, limit: float) -> bool:
        """Whether the index is above a limit, and chance does not explain it."""
        return self.psi is not None and self.p_value is not None and self.psi > limit and self.p_value < SURE

    def as_json(self) -> dict[str, Any]:
        """For a result that a machine reads."""
        return {"n_reference": self.n_reference, "n": self.n, "psi": self.psi, "ks": self.ks, "p": self.p_value,
                "mean_reference": self.means[0], "mean": self.means[1]}  # fmt: skip


def shift_of(reference: Sequence[float], values: Sequence[float]) -> Shift:
    """Compare values with reference values.

    PSI is the sum over bins of (q - p) ln(q / p), with the shares p of the reference and q of the values in bins that
    hold equal shares of the reference (Siddiqi, Credit Risk Scorecards, 2006: above 0.25 is a large change). Half a
    value is added to every bin, so that an empty one does not make it infinite. Where nothing has changed, it is about
    (bins - 1) (1/n + 1/m), which is subtracted: small samples would otherwise look shifted.
    """
    from scipy import stats

    one, other = (np.asarray(each, dtype=float) for each in (reference, values))
    means = tuple(round(float(each.mean()), 6) if len(each) else None for each in (one, other))
    if min(len(one), len(other)) < MIN_VALUES:
        return Shift(len(one), len(other), None, None, None, (means[0], means[1]))
    edges = np.unique(np.quantile(one, np.linspace(0, 1, BINS + 1)[1:-1]))
    # Scores have ties: a value that equals an edge has a cell of its own, else a constant reference has a single bin.
    cells = [
        np.searchsorted(edges, each, side="left") + np.searchsorted(edges, each, side="right") for each in (one, other)
    ]
    counts = [np.bincount(each, minlength=2 * len(edges) + 1) for each in cells]
    used = (counts[0] + counts[1]) > 0
    p, q = ((count[used] + 0.5) / (count.sum() + 0.5 * used.sum()) for count in counts)
    by_chance = (used.sum() - 1) * (1 / len(one) + 1 / len(other))
    psi = max(0.0, float(np.sum((q - p) * np.log(q / p)) - by_chance))
    found = stats.ks_2samp(one, other)
    return Shift(
        len(one), len(other), round(psi, 6), round(float(found.statistic), 6), float(found.pvalue), (means[0], means[1])
    )
