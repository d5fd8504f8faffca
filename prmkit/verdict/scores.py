"""Which entries of a judge's object are scores, and which number each of them is."""

import math
import re
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from prmkit.verdict.repair import Refusal

if TYPE_CHECKING:
    from prmkit.verdict.read import Scale

NO_VERDICT = ("scores", "error", "errors")
"""Keys of objects whose other numbers are no scores: the scores are unreadable, or an API has failed."""
_AROUND_KEYS = " \t\r\n:\u200b\ufeff"


def named_scores(answer: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that are named as scores, whatever their values are.

    All of `scores` where it is an object; else the keys that are named `score` or `…_score`.
    """
    scores = answer.get("scores")
    if isinstance(scores, dict):
        return scores
    return {key: value for key, value in answer.items() if _is_named_score(key)}


def _is_named_score(key: str) -> bool:
    lowered = key.lower()
    return "score" in lowered and lowered.rstrip(_AROUND_KEYS).endswith("score")


def score_items(answer: Mapping[str, Any], asked: Collection[str]) -> dict[str, Any]:
    """The entries that are meant as scores, for judges who name them otherwise too.

    Those that are named so; else those that were asked for; else, where that is not known, every key with a number.
    """
    if named := named_scores(answer):
        return named
    if any(
        key.lower() in NO_VERDICT or (isinstance(value, dict) and named_scores(value)) for key, value in answer.items()
    ):
        return {}
    if asked:
        wanted = {bare(key) for key in asked}
        return {key: value for key, value in answer.items() if bare(key) in wanted}
    return {key: value for key, value in answer.items() if type(value) in (int, float)}


@lru_cache(maxsize=1024)
def bare(key: str) -> str:
    """A key without what judges change in it: case, blanks, dashes, underscores."""
    return re.sub(r"[\W_]+", "", key).casefold()


def plain_key(key: str) -> str:
    """A score's key without what stands around it.

    Raises:
        Refusal: it is no name.
    """
    plain = key.strip(_AROUND_KEYS)
    if not plain or plain.strip("'") != plain or any(sign in plain for sign in '"{}\n'):
        raise Refusal(f"a score is named {shortened(key)}", "the name of a score is unclear")
    return plain


_STRICT_NUMBER = re.compile(r"[-+]?((0|[1-9]\d*)(\.\d+)?|\.\d+)([eE][-+]?\d{1,3})?", re.ASCII)


def value_of(key: str, value: Any) -> float | bool | str:
    """What a judge gave a key: a number, a truth value, or one word.

    Raises:
        Refusal: it is none of these.
    """
    if isinstance(value, bool):
        return value
    number = number_of(value)
    if number is not None and math.isinf(number):
        raise Refusal(f"score {shortened(value)} of {shortened(key)} out of range", "a score is out of range")
    if number is not None:
        return number
    if isinstance(value, str) and _WORD.fullmatch(value.strip()):
        return value.strip()
    raise _not_a_number(key, value)


_WORD = re.compile(r"[^\W\d_]+([ _-][^\W\d_]+){0,2}")


def score_of(key: str, value: float | bool | str, scale: "Scale | None") -> float:
    """The score that a value is on a scale: 0 to 1, in hundredths.

    Raises:
        Refusal: it is not a number and no word of the scale, or out of range.
    """
    if isinstance(value, bool | str):
        word = str(value).lower()
        if scale is None or word not in scale.words:
            raise _not_a_number(key, value)
        return round(scale.words[word], 2)
    low, high = (scale.low, scale.high) if scale else (0.0, 1.0)
    if not low <= value <= high:
        raise Refusal(f"score {shortened(value)} of {shortened(key)} out of range", "a score is out of range")
    return round((value - low) / (high - low), 2) + 0.0


def _not_a_number(key: str, value: Any) -> Refusal:
    return Refusal(f"score {shortened(value)} of {shortened(key)} is not a number", "a score is not a number")


def number_of(value: Any) -> float | None:
    """The number that a value is, or that a string writes plainly or in percent; None for everything else."""
    if type(value) is float:
        return value
    if type(value) is int:
        return value if abs(value) < 1e300 else math.inf
    if not isinstance(value, str):
        return None
    digits = value.strip().removesuffix("%").strip()
    if not _STRICT_NUMBER.fullmatch(digits):
        return None
    if not value.strip().endswith("%"):
        return float(digits)
    # Of `0.95%` nobody knows whether 0.95 or 95 % is meant; of `0%` everybody.
    return None if 0 < float(digits) <= 1 else float(digits) / 100


def shortened(value: Any) -> str:
    """A value as it is shown in a reason."""
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."
