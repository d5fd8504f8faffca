"""What makes a score doubtful: an answer that gives two, and mending that may have made one.

A score that is not certainly what the judge meant is refused, never guessed.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from prmkit.verdict.repair import CUT_OFF, Found, Refusal, objects_in
from prmkit.verdict.scores import bare, named_scores, number_of, score_items, shortened

_ANY_QUOTE = "[\"'“”`*]{0,3}+"
NESTED = re.compile(r'"scores"\s*+:\s*+(\{[^{}]*\})')
"""A `scores` object, as judges write it and as prompts show it."""
_NESTED_ANY = re.compile(rf"(?<!\w){_ANY_QUOTE}scores{_ANY_QUOTE}\s*+:\s*+(\{{[^{{}}]*\}})")
_OTHER_SCORE = re.compile(r"""\{\s*+["'“”]?+(\w*score)["'“”]?+\s*+:\s*+["'“”]?+[.\d]""")
"""The first score of an object that may be too broken to be parsed."""
_ENDS = ("}", "]", "\n", "//", "/*", "#", ",")
"""What stands behind a number that is whole."""


def _written_numbers(key: str, text: str, quote: str = _ANY_QUOTE) -> list[tuple[str, str]]:
    """What stands behind a score's key wherever it occurs: the number as it is written, and what ends it.

    A text that only begins with a number (`0.95 because …`) ends with nothing.
    """
    pattern = (
        rf"(?<!\w){quote}{re.escape(key)}{quote}\s*+:\s*+[\"'“”]?+\s*+([-+]?\.?\d[\d.]*+(?:[eE][-+]?\d+)?[ \t]*+%?+)"
        rf"[\"'“”]?+[ \t\r]*+(,\s*+\d|[,}}\]\n]|//|/\*|#|)"
    )
    return re.findall(pattern, text)


def _whole_numbers(key: str, text: str, quote: str) -> set[float | None]:
    return {number_of(number) for number, end in _written_numbers(key, text, quote) if end in _ENDS}


def refuse_contradictions(items: Mapping[str, Any], nested: bool, found: Found, asked: Collection[str]) -> None:
    """Refuse two different scores for one key.

    JSON parsers keep the last of two equal keys in silence, and behind an answer there may be another one. In the
    texts of a nested verdict the keys may stand once more, with what was thought of each.

    Args:
        items: the entries that are meant as scores.
        nested: they stand in a `scores` object.
        found: the reading that they are from.
        asked: the keys that were asked for; empty where they are not known.

    Raises:
        Refusal: there are two.
    """
    quote, objects = (_ANY_QUOTE, _NESTED_ANY) if "syntax" in found.repairs else ('"', NESTED)
    whole = found.text
    if nested and (numbers := objects.findall(whole)):
        if len(numbers) > 1 and len({_all_numbers(items, one, quote) for one in numbers}) > 1:
            raise Refusal("two objects of scores")
        whole = numbers[0]
    for key in items:
        if whole.count(key) > 1 and len(_whole_numbers(key, whole, quote)) > 1:
            raise Refusal(f"two different scores for {shortened(key)}", "two different scores for one key")
    if found.rest:
        _refuse_other_verdicts(items, nested, found.rest, asked)


def _all_numbers(keys: Iterable[str], text: str, quote: str) -> tuple[frozenset[float | None], ...]:
    return tuple(frozenset(_whole_numbers(key, text, quote)) for key in keys)


def _refuse_other_verdicts(items: Mapping[str, Any], nested: bool, rest: str, asked: Collection[str]) -> None:
    for key, value in items.items():
        if key in rest and _whole_numbers(key, f"{rest}\n", _ANY_QUOTE) - {number_of(value)}:
            raise Refusal(f"two different scores for {shortened(key)}", "two different scores for one key")
    others = {bare(name) for name in _OTHER_SCORE.findall(rest)}
    if others - {bare(key) for key in items} or (not nested and "scores" in rest and _NESTED_ANY.search(rest)):
        raise Refusal("two verdicts that differ")
    for other, _ in objects_in(rest):
        named = named_scores(other) or named_scores(_inner(other)) or (score_items(other, asked) if asked else {})
        if named and _numbers(named) != _numbers(items):
            raise Refusal("two verdicts that differ")


def _inner(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    values = list(answer.values())
    return values[0] if len(values) == 1 and isinstance(values[0], dict) else {}


def _numbers(items: Mapping[str, Any]) -> dict[str, float | None]:
    return {key: number_of(value) for key, value in items.items()}


def refuse_unclear_scores(items: Mapping[str, Any], nested: bool, found: Found) -> None:
    """Refuse a score that mending may have made; the arguments are those of `refuse_contradictions`.

    Of `0.8` at the end of a text `0.85` may have been meant; `0,85` is two numbers to a parser; and behind the last
    score that is there another one may have been to come.

    Raises:
        Refusal: there is one.
    """
    if nested and CUT_OFF in found.repairs and not NESTED.search(found.text):
        raise Refusal("cut off inside the scores")
    for key, value in items.items():
        ends = [end for number, end in _written_numbers(key, found.text) if number_of(number) == number_of(value)]
        if not any(end in _ENDS for end in ends):
            if CUT_OFF in found.repairs:
                raise Refusal("cut off inside the scores")
            raise Refusal(f"score {shortened(value)} of {shortened(key)} is unclear", "a score is unclear")
