"""What is asked of a judge, and what it answers."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from statistics import fmean
from typing import Literal

from prmkit.verdict import Shape

Mode = Literal["expected", "generate"]
"""`expected` reads the probability of every score; `generate` lets the model write its verdict and reads that."""

Status = Literal["ok", "unparsed", "too_long", "error", "failed"]
"""`error` is the row's own, and stays; `failed` is the world's (a server, the memory), and the row is asked again."""

BAD_BELOW = (0.5, 0.8)
"""A step is bad when its score is below this: the stricter and the milder meaning of the word."""

SAME_SCORE = 1e-9
"""Scores this near are equal: references are means of hundredths, and 0.8 may come as 0.7999999999999999."""

LOW_LABEL_MASS = 0.5
"""Below this, most of what the model would have written is no score."""


@dataclass(frozen=True)
class Request:
    """One prompt to judge."""

    prompt: str
    """As the user wrote it. Markers are neutralised inside, so a prompt out of `data/` goes through
    `prmkit.prompts.special_tokens.restore` first."""
    shape: Shape
    """The scores to give, in this order."""


@dataclass(frozen=True)
class Distribution:
    """What a judge thinks about one score. Everything but `label_mass` is given that it answers with a score at all."""

    mean: float
    """The score: the expectation over 0.00 … 1.00."""
    median: float
    mode: float
    """The likeliest score, in hundredths; the lower one of two that are equally likely."""
    std: float | None
    """None for a score that was read from generated text, which carries no spread."""
    label_mass: float | None
    """The probability of all 101 scores together, 0 to 1. Low: the model would rather write something else here.
    None for a score that was read from generated text."""
    below: Mapping[float, float] | None = None
    """The probability that the score is below each of `BAD_BELOW`; None for a score that was read from text."""


@dataclass(frozen=True)
class Judgement:
    """A judge's answer to one request."""

    status: Status
    scores: Mapping[str, Distribution] = field(default_factory=dict)
    """By key, in the order of the request; empty unless `status` is `ok`."""
    reason: str | None = None
    """Why there are no scores; None when there are."""
    text: str | None = None
    """What the model wrote, in generate mode."""
    prompt_tokens: int = 0
    """Length of the prompt that was judged, after any trimming."""
    repaired: bool = False
    """The generated text was not valid JSON as it stood."""
    trimmed: bool = False
    """The middle of the prompt was cut to fit the context."""

    @property
    def score(self) -> float | None:
        """The mean of the keys' scores; None when there are none."""
        return sum(each.mean for each in self.scores.values()) / len(self.scores) if self.scores else None

    @property
    def std(self) -> float | None:
        """The mean of the keys' standard deviations; None when there are none."""
        return _mean_of_known([each.std for each in self.scores.values()])

    @property
    def label_mass(self) -> float | None:
        """The lowest of the keys' label masses, for a score is as trustworthy as its worst part; None without any."""
        return min((each.label_mass for each in self.scores.values() if each.label_mass is not None), default=None)


AGGREGATES: Mapping[str, Callable[[Sequence[float]], float]] = {
    "min": min,
    "product": math.prod,
    "mean": fmean,
    "last": lambda scores: scores[-1],
}
"""How the scores of the steps become one score of the trajectory."""


def first_below(scores: Sequence[float], limit: float) -> int | None:
    """The position of the first score below `limit`, counted from 0; None where there is none."""
    return next((place for place, score in enumerate(scores) if score < limit - SAME_SCORE), None)


def _mean_of_known(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def rounded(value: float | None) -> float | None:
    """A score as it is written to files.

    What differs in the seventh decimal differs by the batch it was computed in; it must not make an order of ties.
    """
    return None if value is None else round(value, 6)


Score = Callable[[Iterable[Request], Mode], Iterator[Judgement]]
"""Judges a stream of requests in their order."""


def lazily(load: Callable[[], Score]) -> Score:
    """Load a judge when it gets its first request, and not when there is none."""
    loaded: list[Score] = []

    def score(requests: Iterable[Request], mode: Mode) -> Iterator[Judgement]:
        requests = iter(requests)
        for first in requests:
            if not loaded:
                loaded.append(load())
            yield from loaded[0](chain([first], requests), mode)

    return score
