"""The one grammar of verdicts: what a judge answered, which of it are scores, and the form in which it is trained.

Conversion, evaluation and serving all read and write verdicts here, so they cannot drift apart. A text is either read
as a `Verdict` or refused as `Unreadable` with the reason; a score is never guessed and never defaults to a number.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import orjson

from prmkit.verdict.ambiguity import NESTED, refuse_contradictions, refuse_unclear_scores
from prmkit.verdict.repair import CUT_OFF, Found, Refusal, each_once, find_objects
from prmkit.verdict.scores import NO_VERDICT, bare, named_scores, plain_key, score_items, score_of, shortened, value_of


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
class Answer:
    """A judge's answer that was read, before it is known what its values mean."""

    values: Mapping[str, float | bool | str]
    """What the judge gave each key, as written: a number (`90%` is 0.9), a truth value, or a word such as `pass`."""
    nested: bool
    """The values are in a `scores` object."""
    texts: Mapping[str, Any]
    """Everything else the judge wrote (`summary`, `reasoning`, …), in the judge's order."""
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
    """The reason without what differs from answer to answer; refused answers are counted by it."""


def read_verdict(text: str, asked: Shape | None = None, scale: Scale | None = None) -> Verdict | Unreadable:
    """Read a judge's answer and turn its values into scores: `read_answer`, then `score_answer`."""
    answer = read_answer(text, asked)
    return answer if isinstance(answer, Unreadable) else score_answer(answer, scale)


def read_answer(text: str, asked: Shape | None = None) -> Answer | Unreadable:
    """Read a judge's answer without deciding what its numbers mean.

    Takes JSON as it is; else the JSON in a Markdown fence or between prose; else what can be repaired of it. Every
    step away from the judge's own text is named in `Answer.repairs`.

    Args:
        text: the answer.
        asked: what the judge was asked for, where that is known (`asked_shape`): which values are scores, and how
            their keys are spelt.
    """
    try:
        keys = asked.keys if asked else ()
        return _answer(_first_with_scores(text, keys), keys)
    except Refusal as refusal:
        return Unreadable(refusal.reason, refusal.kind)


def score_answer(answer: Answer, scale: Scale | None = None) -> Verdict | Unreadable:
    """Map an answer's values to scores from 0 to 1, in hundredths.

    Args:
        answer: what the judge answered.
        scale: the judge's range and words; None for a judge who gives numbers from 0 to 1.
    """
    try:
        scores = {key: score_of(key, value, scale) for key, value in answer.values.items()}
    except Refusal as refusal:
        return Unreadable(refusal.reason, refusal.kind)
    return Verdict(scores, answer.nested, answer.texts, answer.repairs)


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
    nested = list(NESTED.finditer(prompt, begin)) if prompt.find('"scores"', begin) >= 0 else []
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


def _first_with_scores(text: str, asked: tuple[str, ...]) -> Found:
    """The surest reading of an answer that has scores; one that names them is surer than one that has numbers.

    Raises:
        Refusal: none has.
    """
    reason, with_numbers = "no JSON object", None
    for found in find_objects(text):
        unwrapped = _without_wrapper(found, asked)
        if named_scores(unwrapped.value):
            return unwrapped
        if with_numbers is None and score_items(unwrapped.value, asked):
            with_numbers = unwrapped
        reason = "cut off before the first score" if CUT_OFF in found.repairs else "no score"
    if with_numbers is None:
        raise Refusal(reason)
    if with_numbers.repairs and _SCORE_WRITTEN.search(text):
        raise Refusal("the scores stand in no object")
    return with_numbers


_SCORE_WRITTEN = re.compile(r"""score["'”]?+\s*+:""")


def _without_wrapper(found: Found, asked: tuple[str, ...]) -> Found:
    """Some judges put the object that they were asked for into another one."""
    answer = found.value
    if named_scores(answer):
        return found
    inner = [value for key, value in answer.items() if _may_be_wrapped(key, value, len(answer) == 1, asked)]
    if len(inner) > 1:
        raise Refusal("several objects with scores")
    repairs = each_once(*found.repairs, "object around the object")
    return found._replace(value=inner[0], repairs=repairs) if inner else found


def _may_be_wrapped(key: str, value: Any, alone: bool, asked: tuple[str, ...]) -> bool:
    if not isinstance(value, dict) or key.lower() in NO_VERDICT:
        return False
    # A lone `score` beside other members is the score of its key, not a verdict.
    return bool(score_items(value, asked) if alone else named_scores(value).keys() - {"score"})


def _answer(found: Found, asked: tuple[str, ...]) -> Answer:
    answer, items = found.value, score_items(found.value, asked)
    nested = isinstance(answer.get("scores"), dict)
    others = {"scores"} if nested else set(items)
    texts = {key: value for key, value in answer.items() if key not in others}
    if any("score" in key.lower() and type(value) in (int, float) for key, value in texts.items()):
        raise Refusal("scores both inside and outside of `scores`")
    if len(items) > _MOST_SCORES:
        raise Refusal(f"more than {_MOST_SCORES} scores")
    refuse_contradictions(items, nested, found, asked)
    if CUT_OFF in found.repairs or "syntax" in found.repairs:
        refuse_unclear_scores(items, nested, found)
    values = {key: value_of(key, value) for key, value in items.items()}
    if asked != tuple(values):
        values = _spelt_as_asked(values, asked)
        _refuse_other_scores(values, texts, asked, found)
    return Answer(values, nested, _plain(values, texts) if found.repairs else _not_too_deep(texts), found.repairs)


def _spelt_as_asked(scores: Mapping[str, Any], asked: tuple[str, ...]) -> dict[str, Any]:
    spelt = {bare(key): key for key in asked}
    named = {spelt.get(bare(key)) or plain_key(key): score for key, score in scores.items()}
    if len(named) < len(scores):
        raise Refusal("two scores of one name")
    return named


_MOST_SCORES = 100
"""Each one is looked for in the whole answer."""


def _refuse_other_scores(
    scores: Mapping[str, Any], texts: Mapping[str, Any], asked: tuple[str, ...], found: Found
) -> None:
    """Refuse what is no answer to the question that was asked.

    A judge may name scores otherwise than it was asked to. But a `score` in an object beside prose is more often a
    search result that is quoted.
    """
    missing = [key for key in asked if key not in scores]
    if asked and scores.keys() == {"score"} and missing == [*asked] and "prose around the answer" in found.repairs:
        raise Refusal("other scores than were asked for")
    if 0 < len(missing) < len(asked) and CUT_OFF in found.repairs:
        raise Refusal("cut off inside the scores")
    if stray := [key for key in missing if key in texts]:
        raise Refusal(f"{shortened(stray[0])} stands among the texts", "a score stands among the texts")


def _plain(scores: Mapping[str, Any], texts: dict[str, Any]) -> dict[str, Any]:
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
