"""How much more leniently one judge scores than another, and the mean of several judges corrected for it.

If every judge scored every prompt, a lenient judge shifts all means equally, and the ranking does not change. If the
judges scored different prompts, the mean depends as much on which judges scored the step as on the step.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from statistics import fmean

import numpy as np

MIN_SHARED_SCORES = 10
"""Minimum number of shared scores (same prompt and key) to compare two judges; with fewer, the correction is noise."""


@dataclass(frozen=True)
class Leniency:
    """The offsets of the judges, and which judges can be compared at all."""

    offsets: Mapping[str, float] = field(default_factory=dict)
    """Judge -> how much higher it scores than comparable judges would. Averaged over all scores of a group of
    comparable judges this is 0, so a correction does not move their mean. It is 0 for a judge that cannot be compared.
    """
    shared_scores: int = 0
    """Number of items (a prompt and a key) that two or more judges scored."""
    groups: tuple[tuple[str, ...], ...] = ()
    """Judges that are linked by shared scores, directly or through others. With more than one group, the groups
    cannot be compared: a difference in leniency between them looks like a difference in quality."""

    @property
    def is_known(self) -> bool:
        """Whether all judges can be compared with each other."""
        return len(self.groups) <= 1


def estimate_leniency(items: Iterable[Mapping[str, float]]) -> Leniency:
    """Fit score = quality of the item + offset of the judge by least squares.

    The quality of an item is eliminated by centring it, which leaves one small linear system in the offsets.

    Args:
        items: one mapping per prompt and key: judge -> score. Read once, so a generator is enough; memory grows with
            the number of judges, not of items.
    """
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])  # judge -> number of scores, sum of deviations
    together: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])  # pair -> shared items, weight
    shared = 0
    for scores in items:
        mean = fmean(scores.values()) if scores else 0.0
        shared += len(scores) > 1
        for judge, score in scores.items():
            totals[judge][0] += 1
            totals[judge][1] += score - mean
        for one, other in combinations(sorted(scores), 2):
            pair = together[one, other]
            pair[0] += 1
            pair[1] += 1 / len(scores)
    judges = sorted(totals)
    links = {pair: weight for pair, (count, weight) in together.items() if count >= MIN_SHARED_SCORES}
    groups = _linked(judges, links)
    offsets = _solve(judges, groups, {pair: weight for pair, (_, weight) in together.items()}, totals)
    return Leniency(offsets, shared, groups)


def _linked(judges: list[str], links: Iterable[tuple[str, str]]) -> tuple[tuple[str, ...], ...]:
    group_of = {judge: {judge} for judge in judges}
    for one, other in links:
        merged = group_of[one] | group_of[other]
        for judge in merged:
            group_of[judge] = merged
    return tuple(sorted({tuple(sorted(group)) for group in group_of.values()}))


def _solve(
    judges: list[str],
    groups: tuple[tuple[str, ...], ...],
    weights: Mapping[tuple[str, str], float],
    totals: Mapping[str, list[float]],
) -> dict[str, float]:
    index = {judge: number for number, judge in enumerate(judges)}
    normal = np.zeros((len(judges), len(judges)))  # a graph Laplacian: judges are nodes, shared items are edges
    for (one, other), weight in weights.items():
        i, j = index[one], index[other]
        normal[[i, j], [i, j]] += weight
        normal[[i, j], [j, i]] -= weight
    deviations = np.array([totals[judge][1] for judge in judges])
    counts = np.array([totals[judge][0] for judge in judges])
    offsets = np.zeros(len(judges))
    for group in groups:
        if len(group) > 1:
            chosen = [index[judge] for judge in group]
            # Offsets are known only up to a constant, so take the smallest solution and centre it over the scores.
            solution, *_ = np.linalg.lstsq(normal[np.ix_(chosen, chosen)], deviations[chosen], rcond=None)
            offsets[chosen] = solution - np.average(solution, weights=counts[chosen])
    return {judge: round(float(offset), 6) for judge, offset in zip(judges, offsets, strict=True)}


def corrected_mean(scores: Mapping[str, float], leniency: Leniency) -> float:
    """Return the mean of the judges' scores of one prompt and key, each minus its judge's offset, within 0 and 1.

    Args:
        scores: judge -> score; at least one.
        leniency: `Leniency()` gives the plain mean.
    """
    mean = fmean(score - leniency.offsets.get(judge, 0.0) for judge, score in scores.items())
    # Rounded, so that the mean of 0.75 and 0.85 is 0.8 and not slightly less, which would be in another band.
    return round(min(1.0, max(0.0, mean)), 6)


def describe_leniency(leniency: Leniency) -> list[str]:
    """Return sentences for a person: each judge's offset, and a warning where judges cannot be compared."""
    compared = [judge for group in leniency.groups if len(group) > 1 for judge in group]
    lines = []
    if compared:
        offsets = ", ".join(f"{judge} {leniency.offsets[judge]:+.2f}" for judge in compared)
        lines.append(f"leniency of the judges, from {leniency.shared_scores} shared scores: {offsets}")
    if not leniency.is_known:
        names = " | ".join(", ".join(group) for group in leniency.groups[:6]) + " | …" * (len(leniency.groups) > 6)
        lines.append(
            f"warning: these judges share fewer than {MIN_SHARED_SCORES} scores: {names}. If one of them is more "
            "lenient, that looks like a difference in quality and cannot be corrected. Let both score some prompts."
        )
    return lines
