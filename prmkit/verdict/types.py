"""What a verdict is, and the one form in which it is trained."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any


@dataclass(frozen=True)
class Shape:
    """Which scores a verdict carries, in order, and whether they are in a `scores` object or by themselves."""

    keys: tuple[str, ...]
    nested: bool


@dataclass(frozen=True)
class Verdict:
    """A judge's answer with its scores."""

    scores: Mapping[str, float]
    """Score by key; 0 to 1, in hundredths."""
    nested: bool
    """The scores are in a `scores` object."""
    texts: Mapping[str, Any]
    """Everything else the judge wrote (`summary`, `reasoning`, …), in the judge's order."""
    repairs: tuple[str, ...] = field(default=(), compare=False)
    """What had to be repaired before the answer was JSON; empty for an answer that already was."""

    @property
    def shape(self) -> Shape:
        """The keys and the place of the scores."""
        return Shape(tuple(self.scores), self.nested)


@dataclass(frozen=True)
class Answer:
    """A judge's answer that was read, before it is known what its values mean."""

    values: Mapping[str, float | bool | str]
    """What the judge gave each key, as written: a number (`90%` is 0.9), a truth value, or a word such as `pass`."""
    nested: bool
    """The values are in a `scores` object, or the prompt asks for one."""
    texts: Mapping[str, Any]
    """Everything else the judge wrote, in the judge's order."""
    repairs: tuple[str, ...] = field(default=(), compare=False)
    """What had to be repaired before the answer was JSON; empty for an answer that already was."""


@dataclass(frozen=True)
class Scale:
    """How a judge's values become scores."""

    low: float = 0.0
    """The worst number that the judge gives; it becomes 0."""
    high: float = 1.0
    """The best number that the judge gives; it becomes 1."""
    words: Mapping[str, float] = field(default_factory=dict)
    """Scores from 0 to 1 for words in lower case; `true` and `false` are the words of truth values."""


@dataclass(frozen=True)
class Unreadable:
    """A judge's answer that gives no verdict."""

    reason: str
    kind: str = ""
    """The reason without what differs from answer to answer; rejected answers are counted by it."""


def render_verdict(verdict: Verdict) -> str:
    """The canonical training label: one line of JSON, scores first, as two decimals.

    Scores come first because the judge is asked for them first: `answer_prefix` must be a prefix of every label.
    """
    opened, close = answer_prefix(verdict.shape, verdict.scores), "}" if verdict.nested else ""
    return opened + close + "".join([f", {_key(key)}: {_dumps(value)}" for key, value in verdict.texts.items()]) + "}"


def answer_prefix(shape: Shape, chosen: Mapping[str, float]) -> str:
    """The canonical label up to the first score that is not in `chosen`; with all of them chosen, up to the last digit.

    >>> answer_prefix(Shape(("relevance", "progress"), nested=True), {"relevance": 0.5})
    '{"scores": {"relevance": 0.50, "progress": '
    """
    prefix = '{"scores": {' if shape.nested else "{"
    for position, key in enumerate(shape.keys):
        prefix += f"{', ' if position else ''}{_key(key)}: "
        if key not in chosen:
            break
        prefix += f"{chosen[key]:.2f}"
    return prefix


@lru_cache(maxsize=128)
def _key(key: str) -> str:
    import orjson

    return orjson.dumps(key).decode()


def _dumps(value: Any) -> str:
    import orjson

    # orjson writes no spaces after its separators; the label has them, as json.dumps writes it and as models know it.
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(key)}: {_dumps(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_dumps, value)) + "]"
    return orjson.dumps(value).decode()
