"""A judge's requests and answers."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from prmkit.verdict import Shape

Mode = Literal["expected", "generate"]
"""`expected` reads the probability of every score; `generate` lets the model write its verdict and reads that."""

JudgementStatus = Literal["ok", "unsure", "unparsed", "too_long", "error", "failed"]
"""`ok` and `unsure` come with scores. `unsure`: the model would rather write something other than a score here.
`unparsed`: no verdict could be read from what it wrote. `error`: the row itself cannot be judged. `failed`: a server or
a lack of memory is to blame, so the next run retries the row."""

SCORED = ("ok", "unsure")
"""The statuses that come with scores."""

BAD_BELOW = (0.5, 0.8)
"""A step is bad if its score is below this: a stricter and a milder definition."""

SAME_SCORE = 1e-9
"""Scores this close count as equal: references are means of hundredths, and 0.8 may come as 0.7999999999999999."""

LOW_LABEL_MASS = 0.5
"""Below this, most of what the model would write in place of a score is not a score."""

LOW_REACH = 0.1
"""Below this, fewer than one in ten of the model's answers would have reached the place where the score is read."""


@dataclass(frozen=True)
class Request:
    """One prompt to judge."""

    prompt: str
    """As the user wrote it. Special tokens in it are escaped later, so a prompt from `data/` must be unescaped first
    (`prmkit.prompts.cleaning`)."""
    shape: Shape
    """The scores to give, in this order."""
    system: str | None = None
    """The row's system text; None for the judge's default."""

    @property
    def digest(self) -> bytes:
        """A hash of everything in the request: its prompt, its system text, and the scores that it asks for."""
        text = json.dumps([self.shape.nested, self.shape.keys, self.system, self.prompt])
        return hashlib.blake2b(text.encode(), digest_size=16).digest()


@dataclass(frozen=True)
class Asking:
    """How a judge is asked."""

    mode: Mode = "expected"
    batch_size: int = 8
    """The most prompts to judge at once."""
    trim: bool = True
    """Shorten prompts that are too long, as the conversion does; otherwise they are `too_long`."""
    max_new_tokens: int = 1024
    """The longest verdict to write, in generate mode."""
    min_label_mass: float = LOW_LABEL_MASS
    """Scores with less are `unsure`."""


DEFAULT_ASKING = Asking()


@dataclass(frozen=True)
class Distribution:
    """A judge's distribution for one score. All but `label_mass` and `reach` assume that it answers with a score."""

    mean: float
    """The score: the expectation over 0.00 … 1.00."""
    median: float
    mode: float
    """The likeliest score, in hundredths; the lower one in a tie."""
    std: float | None
    """None for a score that was read from generated text, which has no spread."""
    label_mass: float | None
    """The probability of all 101 scores together, 0 to 1. None for a score that was read from generated text."""
    below: Mapping[float, float] | None = None
    """The probability that the score is below each of `BAD_BELOW`; None for a score that was read from text."""
    reach: float | None = None
    """The probability of everything forced on the model before this score: the beginning of the verdict up to here,
    except the scores in it. None for a score that was read from generated text."""
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
    """Length of the prompt that was judged, after any trimming."""
    repaired: bool = False
    """Whether the generated text was not valid JSON and had to be repaired."""
    trimmed: bool = False
    """Whether the middle of the prompt was cut to fit the context."""
    std: float | None = None
    """The standard deviation of `score`, including the correlation between the keys; None without a spread."""

    @property
    def score(self) -> float | None:
        """The mean of the keys' scores; None without any."""
        return sum(each.mean for each in self.scores.values()) / len(self.scores) if self.scores else None

    @property
    def label_mass(self) -> float | None:
        """The lowest of the keys' label masses: a score is only as reliable as its worst part; None without any."""
        return min((each.label_mass for each in self.scores.values() if each.label_mass is not None), default=None)

    @property
    def reach(self) -> float | None:
        """The probability of everything forced on the model except the scores; None if nothing was."""
        return min((each.reach for each in self.scores.values() if each.reach is not None), default=None)


UNSCORED = ("error", "skip", "mean", "null")
"""What a reward endpoint answers for a step without a reliable score."""


def first_below(scores: Sequence[float], limit: float) -> int | None:
    """The position of the first score below `limit`, from 0; None if there is no such score."""
    return next((place for place, score in enumerate(scores) if score < limit - SAME_SCORE), None)


def rounded(value: float | None) -> float | None:
    """A score as it is written to files.

    The seventh decimal depends on the batch in which a prompt was computed; it must not decide ties.
    """
    return None if value is None else round(value, 6)
