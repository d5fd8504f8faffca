"""The one grammar of verdicts: what a judge answered, which of it are scores, and the form in which it is trained.

Conversion, evaluation and serving all read and write verdicts here, so they cannot drift apart. A text is either read
as a `Verdict` or refused as `Unreadable` with the reason; a score is never guessed and never defaults to a number.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import orjson

from prmkit.mending import CUT_OFF, Found, Refusal, find_objects, objects_in


@dataclass(frozen=True)
class Shape:
    """Which scores a verdict carries, in order, and whether they stand in a `scores` object or by themselves."""

    keys: tuple[str, ...]
    nested: bool


@dataclass(frozen=True)
class Verdict:
    """A judge's answer that was read."""

    scores: Mapping[str, float]
    """Score by key, in the judge's order; 0 to 1, in hundredths."""
    nested: bool
    """The scores stand in a `scores` object."""
    texts: Mapping[str, Any]
    """Everything else the judge wrote (`summary`, `reasoning`, …), in the judge's order."""
    repairs: tuple[str, ...] = field(default=(), compare=False)
    """What had to be mended before the answer was JSON; empty for an answer that was JSON as it stood."""

    @property
    def shape(self) -> Shape:
        """The keys and the place of the scores."""
        return Shape(tuple(self.scores), self.nested)


@dataclass(frozen=True)
class Unreadable:
    """A judge's answer that gives no verdict."""

    reason: str
    kind: str = ""
    """The reason without what differs from answer to answer; refused answers are counted by it."""


def read_verdict(text: str) -> Verdict | Unreadable:
    """Read any judge's text.

    Takes JSON as it stands; else the JSON in a Markdown fence or between prose; else what can be mended of it. Every
    step away from the judge's own text is named in `Verdict.repairs`.
    """
    try:
        found = _first_with_scores(text)
        return _verdict(found)
    except Refusal as refusal:
        return Unreadable(refusal.reason, refusal.kind)


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


_ASKED_NESTED = re.compile(r'"scores"\s*:\s*(\{[^{}]*\})')
_ASKED_FLAT = re.compile(r'\{\s*"(\w*score)"\s*:')


def asked_shape(prompt: str) -> Shape | None:
    """The shape of the verdict that a prompt asks for, read from its output schema; None when it shows none.

    The schema's example numbers are never read. A trajectory may itself contain JSON with scores; the schema stands
    behind the trajectory, so the last one counts.
    """
    nested = list(_ASKED_NESTED.finditer(prompt))
    flat = list(_ASKED_FLAT.finditer(prompt))
    if nested and (not flat or nested[-1].start() > flat[-1].start()):
        keys = re.findall(r'"([^"\n]+)"\s*:', nested[-1].group(1))
        return Shape(tuple(dict.fromkeys(keys)), nested=True) if keys else None
    return Shape((flat[-1].group(1),), nested=False) if flat else None


@lru_cache(maxsize=128)
def _key(key: str) -> str:
    return orjson.dumps(key).decode()


def _dumps(value: Any) -> str:
    # orjson writes no blanks behind its separators; the label has them, as json.dumps writes it and as models know it.
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(key)}: {_dumps(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_dumps, value)) + "]"
    return orjson.dumps(value).decode()


# --- from an object to a verdict ----------------------------------------------------------------------------------


def _first_with_scores(text: str) -> Found:
    """The surest reading of an answer that has scores.

    Raises:
        Refusal: none has.
    """
    reason = "no JSON object"
    for found in find_objects(text):
        unwrapped = _without_wrapper(found)
        if _score_items(unwrapped.value):
            return unwrapped
        reason = "cut off before the first score" if CUT_OFF in found.repairs else "no score"
    raise Refusal(reason)


def _without_wrapper(found: Found) -> Found:
    """Some judges put the object that they were asked for into another one, as its only member."""
    if len(found.value) == 1:
        ((key, inner),) = found.value.items()
        if key != "scores" and isinstance(inner, dict) and _score_items(inner):
            return Found(inner, found.text, found.rest, (*found.repairs, "object around the object"))
    return found


def _score_items(answer: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that are meant as scores, whatever their values are.

    All of `scores` where it is an object; else the keys that are named `score` or `…_score`; else every key with a
    number, for judges who name their scores otherwise.
    """
    if isinstance(answer.get("scores"), dict):
        return dict(answer["scores"])
    named = {key: value for key, value in answer.items() if key.lower().endswith("score")}
    return named or {key: value for key, value in answer.items() if type(value) in (int, float)}


def _verdict(found: Found) -> Verdict:
    answer, items = found.value, _score_items(found.value)
    nested = isinstance(answer.get("scores"), dict)
    others = {"scores"} if nested else set(items)
    texts = {key: value for key, value in answer.items() if key not in others}
    if any("score" in key.lower() and type(value) in (int, float) for key, value in texts.items()):
        raise Refusal("scores both inside and outside of `scores`")
    _refuse_contradictions(items, found.text)
    for other, _ in objects_in(found.rest) if found.rest else ():
        if (differing := _score_items(other)) and differing != items:
            raise Refusal("two verdicts that differ")
    if CUT_OFF in found.repairs or "syntax" in found.repairs:
        _refuse_unclear_scores(items, nested, found)
    scores = {key: _score(key, value) for key, value in items.items()}
    return Verdict(scores, nested, _plain(scores, texts) if found.repairs else _not_too_deep(texts), found.repairs)


def _plain(scores: Mapping[str, float], texts: dict[str, Any]) -> dict[str, Any]:
    """The texts as they are read back from JSON: Python's parser admits numbers and characters that JSON has not."""
    try:
        orjson.dumps(list(scores))
        plain: dict[str, Any] = orjson.loads(orjson.dumps(texts))
    except (orjson.JSONEncodeError, orjson.JSONDecodeError) as error:
        raise Refusal(f"not to be written as JSON ({error})", "not to be written as JSON") from error
    return plain


def _not_too_deep(texts: dict[str, Any]) -> dict[str, Any]:
    if any(isinstance(value, dict | list) for value in texts.values()):
        try:
            orjson.dumps(texts)
        except orjson.JSONEncodeError as error:
            raise Refusal("nested too deeply") from error
    return texts


_STRICT_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d{1,3})?")


def _score(key: str, value: Any) -> float:
    number = _number(value)
    if number is None:
        raise Refusal(f"score {_shortened(value)} of {_shortened(key)} is not a number", "a score is not a number")
    if not 0.0 <= number <= 1.0:
        raise Refusal(f"score {_shortened(value)} of {_shortened(key)} out of range", "a score is out of range")
    return round(number, 2) + 0.0


def _number(value: Any) -> float | None:
    if type(value) is float:
        return value
    if type(value) is int:
        return float(value) if abs(value) < 1e300 else math.inf
    if not isinstance(value, str):
        return None
    digits = value.strip().removesuffix("%").strip()
    if not _STRICT_NUMBER.fullmatch(digits):
        return None
    return float(digits) / (100 if value.strip().endswith("%") else 1)


_QUOTE = "[\"'“”]?"


def _written_numbers(key: str, text: str) -> list[tuple[str, str]]:
    """What stands behind a score's key wherever it occurs: the number as it is written, and what ends it."""
    pattern = (
        rf"{re.escape(key)}{_QUOTE}\s*:\s*{_QUOTE}\s*([-+.\deE]+\s*%?)\s*{_QUOTE}\s*?(,\s*\d|[,}}\]\n]|//|/\*|#|.?)"
    )
    return re.findall(pattern, text)


def _refuse_contradictions(items: Mapping[str, Any], text: str) -> None:
    """JSON parsers keep the last of two equal keys in silence; two different scores for one key are no verdict."""
    if text.count('"scores"') > 1 and len(re.findall(r'"scores"\s*:\s*\{', text)) > 1:
        raise Refusal("two objects of scores")
    for key in items:
        if text.count(f'"{key}"') > 1 and len({number for number, _ in _written_numbers(f'"{key}', text)}) > 1:
            raise Refusal(f"two different scores for {_shortened(key)}", "two different scores for one key")


def _refuse_unclear_scores(items: Mapping[str, Any], nested: bool, found: Found) -> None:
    """Refuse a score that mending may have made.

    Of `0.8` at the end of a text `0.85` may have been meant; `0,85` is two numbers to a parser; and behind the last
    score that is there another one may have been to come.
    """
    if nested and CUT_OFF in found.repairs and not re.search(r'"scores"\s*:\s*\{[^{}]*\}', found.text):
        raise Refusal("cut off inside the scores")
    for key, value in items.items():
        ends = [end for number, end in _written_numbers(key, found.text) if _number(number) == _number(value)]
        if not any(end in ("}", "]", "\n", "//", "/*", "#", ",") for end in ends):
            if CUT_OFF in found.repairs:
                raise Refusal("cut off inside the scores")
            raise Refusal(f"score {_shortened(value)} of {_shortened(key)} is unclear", "a score is unclear")


def _shortened(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."
