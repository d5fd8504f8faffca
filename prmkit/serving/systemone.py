"""Typed questions about a state, answered with probabilities: the wire format of the open decision-model servers.

A question is about one score key of the judge's rubric. Its type says in which form the answer comes: `score` over
ordered levels, `choice` among levels, or `noul`, yes or no. The levels are ranges of the judge's 101 scores.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from prmkit.errors import DataError
from prmkit.judge.types import Distribution

MOST_LEVELS = 101
"""The judge has this many scores."""


def key_of(name: str, keys: Sequence[str]) -> str:
    """The score key that a question is about: the one of its name; else the only one that there is.

    Raises:
        DataError: the rubric has several keys, and none of this name.
    """
    if name in keys:
        return name
    if len(keys) == 1:
        return keys[0]
    raise DataError(f"questions.{name}: this judge scores {', '.join(keys)}. Name the question after one of them.")


def check_question(name: str, question: Any) -> None:
    """Check that a judge of steps can answer a question.

    Raises:
        DataError: it is of another type, or its levels cannot be ranges of scores.
    """
    if not isinstance(question, Mapping) or question.get("type") not in _ANSWERS:
        raise DataError(f"questions.{name}.type: this judge answers {', '.join(_ANSWERS)}.")
    criteria, kind = question.get("criteria"), question["type"]
    if kind == "score" and not (isinstance(criteria, list) and 2 <= len(criteria) <= MOST_LEVELS):
        raise DataError(f"questions.{name}.criteria: 2 to {MOST_LEVELS} descriptions of levels, the lowest first.")
    if kind == "choice":
        _check_labels(name, criteria)


def _check_labels(name: str, criteria: Any) -> None:
    if not isinstance(criteria, Mapping) or not 2 <= len(criteria) <= MOST_LEVELS:
        raise DataError(f"questions.{name}.criteria: 2 to {MOST_LEVELS} choices by name.")
    if _numbers(criteria) is None:
        raise DataError(
            f"questions.{name}.criteria: this judge gives scores, so the names of choices must be numbers, such as "
            '"1" to "5" (the least is 0.00, the greatest is 1.00). Ask other questions of a judge trained for them.'
        )


def _numbers(labels: Mapping[str, Any]) -> list[float] | None:
    """What the names of choices mean; None unless they are different numbers."""
    try:
        numbers = [float(label) for label in labels]
    except ValueError:
        return None
    is_range = len(set(numbers)) == len(numbers) and all(map(math.isfinite, numbers))
    return numbers if is_range else None


def answer_to(question: Mapping[str, Any], distribution: Distribution, threshold: float) -> dict[str, Any]:
    """The answer to a question that `check_question` let pass.

    Args:
        question: as it came.
        distribution: the judge's opinion on the question's key, with `shares`.
        threshold: a step with at least this score is good.
    """
    shares = distribution.shares or ()
    mass = distribution.label_mass
    known = {"label_mass": mass, "value": round(distribution.mean, 6)}
    return {"type": question["type"], **_ANSWERS[question["type"]](question, shares, threshold), **known}


def _noul(_question: Mapping[str, Any], shares: Sequence[float], threshold: float) -> dict[str, Any]:
    good = math.fsum(share for place, share in enumerate(shares) if place / 100 >= threshold - 1e-9)
    return {"noul": min(good, 1.0)}


def _score(question: Mapping[str, Any], shares: Sequence[float], _threshold: float) -> dict[str, Any]:
    levels = question["criteria"]
    count = len(levels)
    chances = _by_level(shares, [level / (count - 1) for level in range(count)])
    expected = math.fsum(level * chance for level, chance in enumerate(chances))
    return {
        "score": expected,
        "confidence": max(chances),
        "probabilities": {str(level): chance for level, chance in enumerate(chances)},
        "legend": {str(level): meaning for level, meaning in enumerate(levels)},
    }


def _choice(question: Mapping[str, Any], shares: Sequence[float], _threshold: float) -> dict[str, Any]:
    labels = question["criteria"]
    numbers = _numbers(labels) or []
    low, high = min(numbers), max(numbers)
    chances = _by_level(shares, [(number - low) / (high - low) for number in numbers])
    best = max(range(len(chances)), key=chances.__getitem__)
    return {
        "choice": list(labels)[best],
        "confidence": chances[best],
        "probabilities": dict(zip(labels, chances, strict=True)),
    }


_ANSWERS = {"score": _score, "choice": _choice, "noul": _noul}


def _by_level(shares: Sequence[float], places: Sequence[float]) -> list[float]:
    """The probability of each level: every score counts for the level that is nearest to it, the lower one of two."""
    order = sorted(range(len(places)), key=places.__getitem__)
    chances = [0.0] * len(places)
    for hundredth, share in enumerate(shares):
        nearest = min(order, key=lambda level: (round(abs(places[level] - hundredth / 100), 9), places[level]))
        chances[nearest] += share
    total = math.fsum(chances)
    return [chance / total for chance in chances]
