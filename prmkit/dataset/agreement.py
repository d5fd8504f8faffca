"""How well two judges agree on the prompts that both answered: the ceiling that the trained judge is measured against.

Scores come in hundredths and are summed exactly; nothing but the sums is kept.
"""

import math
from collections.abc import Mapping
from typing import Any


class Agreement:
    """Sums over pairs of scores, by evaluation type and pair of judges."""

    def __init__(self) -> None:
        # prompts, n, sums of x, y, x², y², xy, |x - y|
        self._sums: dict[tuple[str | None, str, str], list[float]] = {}

    def add(
        self,
        evaluation_type: str | None,
        judge: str,
        other: str,
        scores: Mapping[str, float],
        others: Mapping[str, float],
    ) -> None:
        """Add one prompt that both judges answered; the score keys that both gave are compared.

        Args:
            evaluation_type: of the prompt.
            judge: the one who sorts first.
            other: the one who sorts second.
            scores: of `judge`, in hundredths.
            others: of `other`, in hundredths.
        """
        shared = [(scores[key], others[key]) for key in scores if key in others]
        if not shared:
            return
        sums = self._sums.setdefault((evaluation_type, judge, other), [0.0] * 8)
        sums[0] += 1
        for x, y in shared:
            for place, value in enumerate((1, x, y, x * x, y * y, x * y, abs(x - y)), start=1):
                sums[place] += value

    def as_json(self) -> list[dict[str, Any]]:
        """One entry per evaluation type and pair of judges.

        `n` counts pairs of scores, several a prompt where a verdict carries several; `pearson` is null where a judge
        always gave the same score; `mean_absolute_difference` is 0 to 1.
        """
        return [
            {
                "evaluation_type": evaluation_type,
                "judges": [judge, other],
                "prompts": int(sums[0]),
                "n": int(sums[1]),
                "pearson": _pearson(sums),
                "mean_absolute_difference": round(sums[7] / sums[1] / 100, 4),
            }
            for (evaluation_type, judge, other), sums in sorted(
                self._sums.items(), key=lambda item: (str(item[0][0]), item[0][1:])
            )
        ]


def _pearson(sums: list[float]) -> float | None:
    _, n, x, y, xx, yy, xy, _ = sums
    spread = (n * xx - x * x) * (n * yy - y * y)
    return round((n * xy - x * y) / math.sqrt(spread), 4) if n > 1 and spread > 1e-6 else None
