"""The requests to a judge, and its answers."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from prmkit.verdict import Shape

Mode = Literal["expected", "generate"]
"""`expected` reads the probability of every score; `generate` lets the model write its verdict and reads that."""

JudgementStatus = Literal["ok", "unsure", "unparsed", "too_long", "error", "failed"]
"""`ok` and `unsure` come with scores. `unsure`: the model puts most probability on something other than a score.
`unparsed`: no verdict could be read from what it wrote. `error`: the row itself cannot be judged. `failed`: caused by a
server or a lack of memory, so the next command retries the row."""

SCORED = ("ok", "unsure")
"""The statuses that come with scores."""

BAD_BELOW = (0.5, 0.8)
"""Thresholds below which a step counts as bad: strict and lenient."""

SAME_SCORE = 1e-9
"""Scores this close count as equal, because references are means of hundredths: 0.8 may be 0.7999999999999999."""

LOW_LABEL_MASS = 0.5
"""Minimum label mass: below it, the model puts most probability on something other than a score."""

LOW_REACH = 0.1
"""Minimum reach, which is the probability of the forced prefix: below it, fewer than one in ten of the model's own
answers would get to the position of the score."""


@dataclass(frozen=True)
class Request:
    """One prompt to judge."""

    prompt: str
    """The prompt as the user wrote it. Special tokens in it are escaped later, so a prompt from `data/` must first be
    unescaped (`prmkit.prompts.cleaning`)."""
    shape: Shape
    """The scores to give, in this order."""
    system: str | None = None
    """The row's system prompt; None for the judge's default."""

    @property
    def digest(self) -> bytes:
        """A hash of everything in the request: its prompt, its system prompt, and the requested scores."""
        text = json.dumps([self.shape.nested, self.shape.keys, self.system, self.prompt])
        return hashlib.blake2b(text.encode(), digest_size=16).digest()


@dataclass(frozen=True)
class ScoringOptions:
    """Inference settings."""

    mode: Mode = "expected"
    batch_size: int = 8
    """The maximum number of prompts to judge at once."""
    trim: bool = True
    """Whether to shorten prompts that are too long, as the conversion does; otherwise they are `too_long`."""
    max_new_tokens: int = 1024
    """The maximum number of tokens of a generated verdict."""
    min_label_mass: float = LOW_LABEL_MASS
    """Scores with less label mass are `unsure`."""


DEFAULT_OPTIONS = ScoringOptions()


@dataclass(frozen=True)
class Distribution:
    """A judge's distribution for one score; all fields except `label_mass` and `reach` assume that it gives a score."""

    mean: float
    """The score: the expectation over 0.00 … 1.00."""
    median: float
    mode: float
    """The most likely score, in hundredths; the lower one in a tie."""
    std: float | None
    """The standard deviation; None for a score that was read from generated text."""
    label_mass: float | None
    """The probability of all 101 scores together, 0 to 1. None for a score that was read from generated text."""
    below: Mapping[float, float] | None = None
    """The probability that the score is below each of `BAD_BELOW`; None for a score that was read from text."""
    reach: float | None = None
    """The probability of the forced prefix up to this score, excluding earlier scores. None for a score that was read
    from generated text."""
    shares: Sequence[float] | None = None
    """The probabilities of 0.00, 0.01, … 1.00 given that the judge writes a score; they add up to 1. None for a score
    that was read from text."""


@dataclass(frozen=True)
class Judgement:
    """A judge's answer to one request."""

    status: JudgementStatus
    scores: Mapping[str, Distribution] = field(default_factory=dict)
    """Key -> distribution, in the order of the request; empty unless `status` is one of `SCORED`."""
    reason: str | None = None
    """Why there are no scores, or why they are unreliable; None for status ok."""
    text: str | None = None
    """What the model wrote, in generate mode."""
    prompt_tokens: int = 0
    """The number of tokens of the judged prompt, after any trimming."""
    repaired: bool = False
    """Whether the generated text was not valid JSON and had to be repaired."""
    trimmed: bool = False
    """Whether the middle of the prompt was cut to fit the context."""
    std: float | None = None
    """The standard deviation of `score`, including the correlation between the keys; None if there is no spread."""

    @property
    def score(self) -> float | None:
        """The mean of the keys' scores; None if there are no scores."""
        return sum(each.mean for each in self.scores.values()) / len(self.scores) if self.scores else None

    @property
    def label_mass(self) -> float | None:
        """The lowest of the keys' label masses: a score is only as reliable as its worst part; None if unscored."""
        return min((each.label_mass for each in self.scores.values() if each.label_mass is not None), default=None)

    @property
    def reach(self) -> float | None:
        """The lowest reach of all keys; None if there is no reach."""
        return min((each.reach for each in self.scores.values() if each.reach is not None), default=None)


UNSCORED = ("error", "skip", "mean", "null")
"""What a reward endpoint returns for a step without a reliable score."""


def first_below(scores: Sequence[float], limit: float) -> int | None:
    """Return the index of the first score below `limit`; None if there is no such score."""
    return next((index for index, score in enumerate(scores) if score < limit - SAME_SCORE), None)


def rounded(value: float | None) -> float | None:
    """Round a score for files.

    The seventh decimal depends on the batch in which a prompt was computed, and must not decide ties.
    """
    return None if value is None else round(value, 6)
