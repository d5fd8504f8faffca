"""The one grammar of verdicts: what a judge answered, which of it are scores, and the form in which it is trained.

Conversion, evaluation and serving all read and write verdicts here, so they cannot drift apart. A text is either read
as a `Verdict` or refused as `Unreadable` with the reason; a score is never guessed and never defaults to a number.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import orjson

LONGEST_VERDICT = 200_000
"""Characters. Longer answers are refused unread: repairing them costs minutes, and no judge writes them."""


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


class _Refusal(Exception):
    """Carries the reason from where it is found to `read_verdict`."""

    def __init__(self, reason: str, kind: str = "") -> None:
        super().__init__(reason)
        self.unreadable = Unreadable(reason, kind or reason)


def read_verdict(text: str) -> Verdict | Unreadable:
    """Read any judge's text.

    Takes JSON as it stands; else the JSON in a Markdown fence or between prose; else what `json-repair` makes of it.
    Every step away from the judge's own text is named in `Verdict.repairs`.
    """
    try:
        answer, body, repairs = _parse(text)
        return _verdict(answer, body, repairs)
    except _Refusal as refusal:
        return refusal.unreadable


def render_verdict(verdict: Verdict) -> str:
    """The canonical training label: one line of JSON, scores first, as two decimals.

    Scores come first because the judge is asked for them first: `answer_prefix` must be a prefix of every label.
    """
    opened, close = answer_prefix(verdict.shape, verdict.scores), "}" if verdict.nested else ""
    return opened + close + "".join(f", {_dumps(key)}: {_dumps(value)}" for key, value in verdict.texts.items()) + "}"


def answer_prefix(shape: Shape, chosen: Mapping[str, float]) -> str:
    """The canonical label up to the first score that is not in `chosen`; with all of them chosen, up to the last digit.

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


def _dumps(value: Any) -> str:
    # orjson writes no blanks behind its separators; the label has them, as json.dumps writes it and as models know it.
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_dumps(key)}: {_dumps(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_dumps, value)) + "]"
    return orjson.dumps(value).decode()


# --- from text to an object ---------------------------------------------------------------------------------------


def _parse(text: str) -> tuple[dict[str, Any], str, tuple[str, ...]]:
    """The judge's object, the text that it was read from, and what was repaired.

    Raises:
        _Refusal: there is no object, or none that can be told.
    """
    text = text.strip().lstrip("\ufeff")
    if not text:
        raise _Refusal("empty answer")
    if len(text) > LONGEST_VERDICT:
        raise _Refusal(f"longer than {LONGEST_VERDICT:,} characters")
    try:
        answer = orjson.loads(text)
        repairs: tuple[str, ...] = ()
    except orjson.JSONDecodeError:
        text, repairs = _unwrap(text)
        answer, repairs = _mend(text, repairs)
    if isinstance(answer, list) and len(answer) == 1:
        answer, repairs = answer[0], (*repairs, "list around the object")
    if not isinstance(answer, dict):
        raise _Refusal("no JSON object")
    return answer, text, repairs


_THOUGHT = re.compile(r"^\s*<think>.*?</think>", re.DOTALL)
_FENCE = re.compile(r"```[a-zA-Z]*[ \t]*\r?\n?(?=\s*[\[{])")


def _unwrap(text: str) -> tuple[str, tuple[str, ...]]:
    """The text from the first brace to the end of the JSON, without thought, fence and prose."""
    repairs = []
    if thought := _THOUGHT.match(text):
        text, repairs = text[thought.end() :], ["thought before the answer"]
    if fence := _FENCE.search(text):
        text = text[fence.end() :]
        text = text[:end] if (end := text.rfind("```")) >= 0 else text
        repairs.append("fenced")
    start = text.find("{")
    if start < 0:
        raise _Refusal("no JSON object")
    if text[:start].strip(" \t\r\n["):
        repairs.append("prose around the answer")
    return text[start:].rstrip(), tuple(repairs)


def _mend(text: str, repairs: tuple[str, ...]) -> tuple[Any, tuple[str, ...]]:
    """Parse text that starts with a brace, with as little mending as it needs."""
    try:
        answer, end = _LENIENT.raw_decode(text)
    except (json.JSONDecodeError, RecursionError):
        return _repair(text, repairs)
    rest = text[end:].strip(" \t\r\n`]")
    if rest:
        _refuse_second_verdict(answer, rest)
        if "prose around the answer" not in repairs:
            repairs = (*repairs, "prose around the answer")
    try:
        orjson.loads(text[:end])
    except orjson.JSONDecodeError:
        repairs = (*repairs, "control characters in a string")
    return answer, repairs


def _refuse_constant(name: str) -> NoReturn:
    raise _Refusal(f"{name} is not a JSON number")


# strict=False admits raw newlines and tabs inside strings, the commonest fault of judges, and changes nothing else.
_LENIENT = json.JSONDecoder(strict=False, parse_constant=_refuse_constant)


def _refuse_second_verdict(first: Any, rest: str) -> None:
    for other in _objects_in(rest):
        if set(_score_items(other)) and dict(_score_items(other)) != dict(_score_items(first)):
            raise _Refusal("two verdicts that differ")


def _objects_in(text: str) -> Iterator[dict[str, Any]]:
    position = text.find("{")
    while position >= 0:
        try:
            value, end = _LENIENT.raw_decode(text, position)
        except (json.JSONDecodeError, RecursionError):
            end = position + 1
        else:
            yield value
        position = text.find("{", end)


def _repair(text: str, repairs: tuple[str, ...]) -> tuple[Any, tuple[str, ...]]:
    import json_repair

    cut_off = _is_cut_off(text)
    if cut_off:
        _refuse_cut_scores(text)
    try:
        answer = json_repair.loads(text, skip_json_loads=True)
    except RecursionError as error:
        raise _Refusal("nested too deeply") from error
    if isinstance(answer, list):
        answer = next((item for item in answer if isinstance(item, dict) and _score_items(item)), answer)
    return answer, (*repairs, "cut off" if cut_off else "syntax")


def _is_cut_off(text: str) -> bool:
    """Whether the text stops in the middle: behind its last brace there is more than prose."""
    behind = text[text.rfind("}") + 1 :]
    return '"' in behind or "}" not in text or bool(re.search(r'"scores"\s*:\s*\{[^{}]*\}\s*,?\s*$', text))


_NUMBER = r'"?\s*[-+]?\d[\d.eE+-]*\s*%?\s*"?'


def _refuse_cut_scores(text: str) -> None:
    """Refuse a text that stops before its scores are whole: `0.` may have become `0.9`, or another key was to come."""
    nested = re.search(r'"scores"\s*:\s*\{', text)
    if nested and "}" in text[nested.end() :]:
        return
    inside = text[nested.end() :] if nested else text
    if nested is None and re.search(rf'score"\s*:\s*{_NUMBER}\s*[,}}\n]', inside):
        return
    some = re.search(rf'"\s*:\s*{_NUMBER}', inside) if nested else re.search(r'score"\s*:\s*"?[-+]?\d', inside)
    raise _Refusal("cut off inside the scores" if some else "cut off before the first score")


# --- from an object to a verdict ----------------------------------------------------------------------------------


def _score_items(answer: Any) -> dict[str, Any]:
    """The entries that are meant as scores, whatever their values are.

    All of `scores` where it is an object; else the keys that are named `score` or `…_score`; else every key with a
    number, for judges who name their scores otherwise.
    """
    if not isinstance(answer, dict):
        return {}
    if isinstance(answer.get("scores"), dict):
        return dict(answer["scores"])
    named = {key: value for key, value in answer.items() if key.lower().endswith("score")}
    return named or {key: value for key, value in answer.items() if type(value) in (int, float)}


def _verdict(answer: dict[str, Any], text: str, repairs: tuple[str, ...]) -> Verdict:
    nested = isinstance(answer.get("scores"), dict)
    items = _score_items(answer)
    if not items:
        raise _Refusal("no score")
    _refuse_contradictions(items, text)
    scores = {key: _score(key, value) for key, value in items.items()}
    others = {"scores"} if nested else set(items)
    texts = {key: value for key, value in answer.items() if key not in others}
    if any("score" in key.lower() and type(value) in (int, float) for key, value in texts.items()):
        raise _Refusal("scores both inside and outside of `scores`")
    try:
        orjson.dumps(texts)
        "".join(scores).encode()
    except (orjson.JSONEncodeError, UnicodeEncodeError, RecursionError) as error:
        raise _Refusal(f"not to be written as JSON ({error})") from error
    return Verdict(scores, nested, texts, repairs)


def _score(key: str, value: Any) -> float:
    number: float | None = None
    if isinstance(value, str):
        stripped = value.strip()
        divisor = 100 if stripped.endswith("%") else 1
        if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d{1,3})?", stripped.removesuffix("%").strip()):
            number = float(stripped.removesuffix("%")) / divisor
    elif type(value) in (int, float):
        number = float(value) if abs(value) < 1e300 else math.inf
    if number is None:
        raise _Refusal(f"score {_shortened(value)} of {_shortened(key)} is not a number")
    if not 0.0 <= number <= 1.0:
        raise _Refusal(f"score {_shortened(value)} of {_shortened(key)} out of range")
    return round(number, 2) + 0.0


def _refuse_contradictions(items: Mapping[str, Any], text: str) -> None:
    """JSON parsers keep the last of two equal keys in silence; two different scores for one key are no verdict."""
    for key in items:
        name = f'"{key}"'
        if text.count(name) > 1:
            numbers = re.findall(rf'{re.escape(name)}\s*:\s*"?\s*([-+]?\d[\d.eE+-]*)', text)
            if len(set(numbers)) > 1:
                raise _Refusal(f"two different scores for {_shortened(key)}")


def _shortened(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."
