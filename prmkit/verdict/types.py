"""Verdicts: their types, the schema that a prompt requests, and the canonical JSON for training."""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from statistics import fmean
from typing import Any, TypeGuard

SCORE_ENDING = "score"

AGGREGATES: Mapping[str, Callable[[Sequence[float]], float]] = {
    "min": min,
    "product": math.prod,
    "mean": fmean,
    "last": lambda scores: scores[-1],
}
"""How the scores of the steps become one score of the trajectory."""


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether a value is a finite number; booleans are not numbers."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_share(value: Any) -> TypeGuard[float]:
    """Return whether a value is a number from 0 to 1."""
    return is_number(value) and 0 <= value <= 1


def is_score_key(key: str) -> bool:
    """Whether a key names a score: `step_score`, `Score`, `overallScore`."""
    return key.lower().endswith(SCORE_ENDING)


@dataclass(frozen=True)
class Shape:
    """The score keys of a verdict, in order, and whether they are in a `scores` object or at the top level."""

    keys: tuple[str, ...]
    nested: bool


@dataclass(frozen=True)
class Verdict:
    """A judge's answer with its scores."""

    scores: Mapping[str, float]
    """Key -> score from 0 to 1, in hundredths."""
    nested: bool
    """Whether the scores are in a `scores` object."""
    texts: Mapping[str, Any]
    """Everything else that the judge wrote (`summary`, `reasoning`, …), in the judge's order."""
    repairs: tuple[str, ...] = field(default=(), compare=False)
    """The repairs that made the answer valid JSON; empty for an answer that already was."""

    @property
    def shape(self) -> Shape:
        """The score keys, and whether they are nested."""
        return Shape(tuple(self.scores), self.nested)

    @property
    def mean(self) -> float:
        """The mean of the scores."""
        return fmean(self.scores.values())


@dataclass(frozen=True)
class Answer:
    """A judge's answer as read, before its values are turned into scores."""

    values: Mapping[str, float | bool | str]
    """Key -> the judge's value as written: a number (`90%` is 0.9), a boolean, or a word such as `pass`."""
    nested: bool
    """Whether the values are in a `scores` object, or the prompt asks for one."""
    texts: Mapping[str, Any]
    """Everything else that the judge wrote, in the judge's order."""
    repairs: tuple[str, ...] = field(default=(), compare=False)
    """The repairs that made the answer valid JSON; empty for an answer that already was."""


@dataclass(frozen=True)
class Scale:
    """The mapping from a judge's values to scores."""

    low: float = 0.0
    """The worst number that the judge gives; it becomes 0."""
    high: float = 1.0
    """The best number that the judge gives; it becomes 1."""
    words: Mapping[str, float] = field(default_factory=dict)
    """Word in lower case -> score from 0 to 1; `true` and `false` are also used for booleans."""


@dataclass(frozen=True)
class Unreadable:
    """A judge's answer without a usable verdict."""

    reason: str
    kind: str = ""
    """The reason without details, by which rejected answers are counted."""


def render_verdict(verdict: Verdict) -> str:
    """Return the canonical training label: one line of JSON, scores first, with two decimals.

    Scores come first because `answer_prefix` must be a prefix of every label.
    """
    opened, close = answer_prefix(verdict.shape, verdict.scores), "}" if verdict.nested else ""
    return opened + close + "".join([f", {_dumps(key)}: {_dumps(value)}" for key, value in verdict.texts.items()]) + "}"


def answer_prefix(shape: Shape, chosen: Mapping[str, float]) -> str:
    """Return the canonical label up to the first score that is not in `chosen`; if all are, up to the last digit.

    >>> answer_prefix(Shape(("relevance", "progress"), nested=True), {"relevance": 0.5})
    '{"scores": {"relevance": 0.50, "progress": '
    """
    prefix = '{"scores": {' if shape.nested else "{"
    for position, key in enumerate(shape.keys):
        prefix += f"{', ' if position else ''}{_dumps(key)}: "
        if key not in chosen:
            break
        prefix += f"{chosen[key]:.2f}"
    return prefix


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def asked_shape(prompt: str, system: str | None = None) -> Shape | None:
    """Return the shape of the verdict that a prompt or its system prompt asks for; None if neither has a schema.

    Reads the last object with scores in the prompt, because a trajectory may itself contain JSON with scores, and the
    schema comes after it. Only its keys are read, never its example numbers, so it may have comments, placeholders and
    ellipses. Its scores are in a `scores` object, in one object per criterion, under keys that end in `score`, or
    properties of a JSON schema.

    If the last such object is not announced as JSON or as a format, but an earlier one with other scores is, either may
    be the schema. Then neither is used, and the judge's answers decide.
    """
    last: Shape | None = None
    for start, end in _objects_from_the_end(prompt):
        schema = prompt[start:end]
        shape = _shape_of(schema) if SCORE_ENDING in schema.lower() else None
        if shape and ([key.lower() for key in shape.keys] != [SCORE_ENDING] or _is_schema(prompt, start)):
            if _ANNOUNCED.search(prompt, max(start - 80, 0), start):
                return shape if last in (None, shape) else None
            last = last or shape
    of_system = asked_shape(system) if system else None
    return last or of_system if of_system in (None, last) or last is None else None


def _is_schema(prompt: str, start: int) -> bool:
    """Whether an object with a single `score` is a schema; list items, for example search results, also have scores."""
    before = prompt[max(start - 300, 0) : start]
    return before.rstrip()[-1:] not in ("[", ",") and bool(_INTRODUCED.search(before + prompt[start : start + 80]))


# A schema is introduced by a word, or begins with its score.
_INTRODUCED = re.compile(
    r"json|format|schema|answer|respon|return|output|provide|格式|输出|[{｛]\s*+[\"“']score", re.IGNORECASE
)


# `Answer with JSON: {`, also with a fence in between
_ANNOUNCED = re.compile(r"(?:\b(?:json|format|schema)\b|格式)[^\n{}]{0,40}[:：]?\s*(?:```\w*\s*)?\Z", re.IGNORECASE)


# --- objects ------------------------------------------------------------------------------------------------------

_QUOTED = r'"(?>(?:[^"\\\n]|\\.){0,2000})"|“[^”\n]{0,2000}+”'
_BRACES = re.compile(rf"{_QUOTED}|[{{}}｛｝]")


def _objects_from_the_end(prompt: str) -> Iterator[tuple[int, int]]:
    """Yield the start and the end of each outermost object, the last one first.

    An unclosed brace in the trajectory does not open an object, so it cannot include the schema after it.
    """
    opened: list[int] = []
    pairs: list[tuple[int, int]] = []
    for sign in _BRACES.finditer(prompt):
        if sign.group() in "{｛":
            opened.append(sign.start())
        elif sign.group() in "}｝" and opened:
            start = opened.pop()
            while pairs and pairs[-1][0] > start:
                pairs.pop()
            pairs.append((start, sign.end()))
    yield from reversed(pairs)


# --- keys ---------------------------------------------------------------------------------------------------------

_TOKENS = re.compile(
    rf"""(?://|\#)[^\n]*+|/\*.{{0,500}}?\*/|(?P<string>{_QUOTED}|'[\w -]{{1,80}}')(?P<colon>\s*+[:：])?"""
    r"""|(?P<open>[{｛\[［])|(?P<close>[}｝\]］])""",
    re.DOTALL,
)


@lru_cache(maxsize=256)
def _shape_of(schema: str) -> Shape | None:
    return _shape_of_keys(_keys_of(schema))


def _shape_of_keys(keys: Mapping[str, Any]) -> Shape | None:
    keys = _properties(keys)
    if scores := _properties(keys.get("scores")):
        return Shape(tuple(scores), nested=True)
    named = tuple(key for key, inner in keys.items() if is_score_key(key) or "score" in _properties(inner))
    if named:
        return Shape(named, nested=False)
    inside = [shape for inner in keys.values() if (shape := isinstance(inner, dict) and _shape_of_keys(inner))]
    return inside[0] if len(inside) == 1 else None


def _properties(keys: Any) -> Mapping[str, Any]:
    """Return the keys of an object, those that a JSON schema describes, or the names in a list of criteria."""
    if isinstance(keys, list):
        names = [item.get("name") for item in keys if "score" in item]
        return dict.fromkeys(names) if len(names) > 1 and all(map(_is_name, names)) else {}
    if not isinstance(keys, dict):
        return {}
    return _properties(keys["properties"]) if isinstance(keys.get("properties"), dict) else keys


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and bool(re.fullmatch(r"\w[\w -]*", name))


def _keys_of(schema: str) -> dict[str, Any]:
    """Reduce an object to its keys: key -> an object, a list of objects, a string, or None for anything else."""
    top: dict[str, Any] = {}
    stack: list[Any] = [top]
    key: str | None = None
    for token in _TOKENS.finditer(schema):
        if token["open"]:
            inner: Any = {} if token["open"] in "{｛" else []
            parent = stack[-1]
            if isinstance(parent, list):
                parent.append(inner) if isinstance(inner, dict) else None
            elif key is not None:
                parent[key] = inner
            elif isinstance(inner, dict):
                inner = parent  # braces in braces, as templates escape them
            stack.append(inner)
            key = None
        elif token["close"] and len(stack) > 1:
            stack.pop()
            key = None
        elif token["colon"] and isinstance(stack[-1], dict):
            key = token["string"][1:-1]
            stack[-1].setdefault(key, None)
        elif token["string"] and key is not None and isinstance(stack[-1], dict):
            stack[-1][key] = token["string"][1:-1]
            key = None
    return top
