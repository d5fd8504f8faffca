"""The one grammar of verdicts: what a judge answered, which of it are scores, and the form in which it is trained.

Conversion, evaluation and serving all read and write verdicts here, so they cannot drift apart. A text is either read
as a `Verdict` or refused as `Unreadable` with the reason; a score is never guessed and never defaults to a number.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import orjson

from prmkit.mending import CUT_OFF, Found, Refusal, each_once, find_objects, objects_in


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


def read_verdict(text: str, asked: Shape | None = None) -> Verdict | Unreadable:
    """Read any judge's text.

    Takes JSON as it stands; else the JSON in a Markdown fence or between prose; else what can be mended of it. Every
    step away from the judge's own text is named in `Verdict.repairs`.

    Args:
        text: the answer.
        asked: what the judge was asked for, where that is known (`asked_shape`): which numbers are scores, and how
            they are spelt.
    """
    try:
        return _verdict(_first_with_scores(text, asked), asked)
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


_NESTED = re.compile(r'"scores"\s*+:\s*+(\{[^{}]*\})')
_FLAT = re.compile(r'\{\s*+"\w*score"\s*+:')
_SCHEMA_WITHIN = 2_000
"""Characters from the end of a prompt, in which the schema mostly stands: searched first, which takes a third."""


def asked_shape(prompt: str) -> Shape | None:
    """The shape of the verdict that a prompt asks for, read from its output schema; None when it shows none.

    The schema's example numbers are never read. A trajectory may itself contain JSON with scores; the schema stands
    behind the trajectory, so the last one counts.
    """
    end = max(len(prompt) - _SCHEMA_WITHIN, 0)
    return _last_shape(prompt, end) or (_last_shape(prompt, 0) if end else None)


def _last_shape(prompt: str, begin: int) -> Shape | None:
    nested = list(_NESTED.finditer(prompt, begin)) if prompt.find('"scores"', begin) >= 0 else []
    flat = list(_FLAT.finditer(prompt, begin))
    if nested and (not flat or nested[-1].start() > flat[-1].start()):
        keys = re.findall(r'"([^"\n]+)"\s*+:', nested[-1].group(1))
        return Shape(tuple(dict.fromkeys(keys)), nested=True) if keys else None
    if not flat:
        return None
    schema, _, _ = prompt[flat[-1].start() :].partition("}")
    return Shape(tuple(dict.fromkeys(re.findall(r'"(\w*score)"\s*+:', schema))), nested=False)


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


def _first_with_scores(text: str, asked: Shape | None) -> Found:
    """The surest reading of an answer that has scores; one that names them is surer than one that has numbers.

    Raises:
        Refusal: none has.
    """
    reason, with_numbers = "no JSON object", None
    for found in find_objects(text):
        unwrapped = _without_wrapper(found, asked)
        if _named_scores(unwrapped.value):
            return unwrapped
        if with_numbers is None and _score_items(unwrapped.value, asked):
            with_numbers = unwrapped
        reason = "cut off before the first score" if CUT_OFF in found.repairs else "no score"
    if with_numbers is None:
        raise Refusal(reason)
    if with_numbers.repairs and _SCORE_WRITTEN.search(text):
        raise Refusal("the scores stand in no object")
    return with_numbers


_SCORE_WRITTEN = re.compile(r"""score["'”]?+\s*+:""")


def _without_wrapper(found: Found, asked: Shape | None) -> Found:
    """Some judges put the object that they were asked for into another one."""
    answer = found.value
    if _named_scores(answer):
        return found
    inner = [value for key, value in answer.items() if _may_be_wrapped(key, value, len(answer) == 1, asked)]
    if len(inner) > 1:
        raise Refusal("several objects with scores")
    repairs = each_once(*found.repairs, "object around the object")
    return found._replace(value=inner[0], repairs=repairs) if inner else found


def _may_be_wrapped(key: str, value: Any, alone: bool, asked: Shape | None) -> bool:
    if not isinstance(value, dict) or key.lower() in _NO_VERDICT:
        return False
    # A lone `score` beside other members is the score of its key, not a verdict.
    return bool(_score_items(value, asked) if alone else _named_scores(value).keys() - {"score"})


def _named_scores(answer: Mapping[str, Any]) -> dict[str, Any]:
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


def _score_items(answer: Mapping[str, Any], asked: Shape | None) -> dict[str, Any]:
    """The entries that are meant as scores, for judges who name them otherwise too.

    Those that are named so; else those that were asked for; else, where that is not known, every key with a number.
    """
    if named := _named_scores(answer):
        return named
    if any(
        key.lower() in _NO_VERDICT or (isinstance(value, dict) and _named_scores(value))
        for key, value in answer.items()
    ):
        return {}
    if asked:
        wanted = {_bare(key) for key in asked.keys}
        return {key: value for key, value in answer.items() if _bare(key) in wanted}
    return {key: value for key, value in answer.items() if type(value) in (int, float)}


@lru_cache(maxsize=1024)
def _bare(key: str) -> str:
    """A key without what judges change in it: case, blanks, dashes, underscores."""
    return re.sub(r"[\W_]+", "", key).casefold()


_NO_VERDICT = ("scores", "error", "errors")
"""Keys of objects whose other numbers are no scores: the scores are unreadable, or an API has failed."""
_AROUND_KEYS = " \t\r\n:\u200b\ufeff"


def _verdict(found: Found, asked: Shape | None) -> Verdict:
    answer, items = found.value, _score_items(found.value, asked)
    nested = isinstance(answer.get("scores"), dict)
    others = {"scores"} if nested else set(items)
    texts = {key: value for key, value in answer.items() if key not in others}
    if any("score" in key.lower() and type(value) in (int, float) for key, value in texts.items()):
        raise Refusal("scores both inside and outside of `scores`")
    if len(items) > _MOST_SCORES:
        raise Refusal(f"more than {_MOST_SCORES} scores")
    _refuse_contradictions(items, nested, found, asked)
    if CUT_OFF in found.repairs or "syntax" in found.repairs:
        _refuse_unclear_scores(items, nested, found)
    scores = {key: _score(key, value) for key, value in items.items()}
    if asked is None or asked.keys != tuple(scores):
        scores = _spelt_as_asked(scores, asked)
        _refuse_other_scores(scores, texts, asked, found)
    return Verdict(scores, nested, _plain(scores, texts) if found.repairs else _not_too_deep(texts), found.repairs)


def _spelt_as_asked(scores: Mapping[str, float], asked: Shape | None) -> dict[str, float]:
    spelt = {_bare(key): key for key in asked.keys} if asked else {}
    named = {spelt.get(_bare(key)) or _plain_key(key): score for key, score in scores.items()}
    if len(named) < len(scores):
        raise Refusal("two scores of one name")
    return named


_MOST_SCORES = 100
"""Each one is looked for in the whole answer."""


def _refuse_other_scores(
    scores: Mapping[str, float], texts: Mapping[str, Any], asked: Shape | None, found: Found
) -> None:
    """Refuse what is no answer to the question that was asked.

    A judge may name scores otherwise than it was asked to. But a `score` in an object beside prose is more often a
    search result that is quoted.
    """
    if asked is None:
        return
    missing = [key for key in asked.keys if key not in scores]
    if scores.keys() == {"score"} and missing == list(asked.keys) and "prose around the answer" in found.repairs:
        raise Refusal("other scores than were asked for")
    if 0 < len(missing) < len(asked.keys) and CUT_OFF in found.repairs:
        raise Refusal("cut off inside the scores")
    if stray := [key for key in missing if key in texts]:
        raise Refusal(f"{_shortened(stray[0])} stands among the texts", "a score stands among the texts")


def _plain_key(key: str) -> str:
    plain = key.strip(_AROUND_KEYS)
    if not plain or plain.strip("'") != plain or any(sign in plain for sign in '"{}\n'):
        raise Refusal(f"a score is named {_shortened(key)}", "the name of a score is unclear")
    return plain


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


_STRICT_NUMBER = re.compile(r"[-+]?((0|[1-9]\d*)(\.\d+)?|\.\d+)([eE][-+]?\d{1,3})?", re.ASCII)


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
    if not value.strip().endswith("%"):
        return float(digits)
    # Of `0.95%` nobody knows whether 0.95 or 95 % is meant; of `0%` everybody.
    return None if 0 < float(digits) <= 1 else float(digits) / 100


# --- what an answer says twice ------------------------------------------------------------------------------------

_ANY_QUOTE = "[\"'“”`*]{0,3}+"
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
    return {_number(number) for number, end in _written_numbers(key, text, quote) if end in _ENDS}


def _refuse_contradictions(items: Mapping[str, Any], nested: bool, found: Found, asked: Shape | None) -> None:
    """Two different scores for one key are no verdict.

    JSON parsers keep the last of two equal keys in silence, and behind an answer there may be another one. In the
    texts of a nested verdict the keys may stand once more, with what was thought of each.
    """
    quote, objects = (_ANY_QUOTE, _NESTED_ANY) if "syntax" in found.repairs else ('"', _NESTED)
    whole = found.text
    if nested and (numbers := objects.findall(whole)):
        if len(numbers) > 1 and len({_all_numbers(items, one, quote) for one in numbers}) > 1:
            raise Refusal("two objects of scores")
        whole = numbers[0]
    for key in items:
        if whole.count(key) > 1 and len(_whole_numbers(key, whole, quote)) > 1:
            raise Refusal(f"two different scores for {_shortened(key)}", "two different scores for one key")
    if found.rest:
        _refuse_other_verdicts(items, nested, found.rest, asked)


def _all_numbers(keys: Iterable[str], text: str, quote: str) -> tuple[frozenset[float | None], ...]:
    return tuple(frozenset(_whole_numbers(key, text, quote)) for key in keys)


def _refuse_other_verdicts(items: Mapping[str, Any], nested: bool, rest: str, asked: Shape | None) -> None:
    for key, value in items.items():
        if key in rest and _whole_numbers(key, f"{rest}\n", _ANY_QUOTE) - {_number(value)}:
            raise Refusal(f"two different scores for {_shortened(key)}", "two different scores for one key")
    others = {_bare(name) for name in _OTHER_SCORE.findall(rest)}
    if others - {_bare(key) for key in items} or (not nested and "scores" in rest and _NESTED_ANY.search(rest)):
        raise Refusal("two verdicts that differ")
    for other, _ in objects_in(rest):
        named = _named_scores(other) or _named_scores(_inner(other)) or (_score_items(other, asked) if asked else {})
        if named and _numbers(named) != _numbers(items):
            raise Refusal("two verdicts that differ")


def _inner(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    values = list(answer.values())
    return values[0] if len(values) == 1 and isinstance(values[0], dict) else {}


def _numbers(items: Mapping[str, Any]) -> dict[str, float | None]:
    return {key: _number(value) for key, value in items.items()}


def _refuse_unclear_scores(items: Mapping[str, Any], nested: bool, found: Found) -> None:
    """Refuse a score that mending may have made.

    Of `0.8` at the end of a text `0.85` may have been meant; `0,85` is two numbers to a parser; and behind the last
    score that is there another one may have been to come.
    """
    if nested and CUT_OFF in found.repairs and not _NESTED.search(found.text):
        raise Refusal("cut off inside the scores")
    for key, value in items.items():
        ends = [end for number, end in _written_numbers(key, found.text) if _number(number) == _number(value)]
        if not any(end in _ENDS for end in ends):
            if CUT_OFF in found.repairs:
                raise Refusal("cut off inside the scores")
            raise Refusal(f"score {_shortened(value)} of {_shortened(key)} is unclear", "a score is unclear")


def _shortened(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."
