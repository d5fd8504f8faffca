"""The one reader of verdicts: what a judge answered, and which of it are scores.

Conversion, evaluation and scoring all read verdicts here, so they cannot drift apart. An answer is either read as a
`Verdict` or rejected as `Unreadable` with the reason. A score is never guessed and never a default: where the answer is
not JSON as a whole, each score must be written in it once, after its key and before a delimiter.
"""

import math
import re
import unicodedata
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from prmkit.verdict.repair import CUT_OFF, Found, Refusal, find_json, has_thought, repair_objects
from prmkit.verdict.types import Answer, Scale, Shape, Unreadable, Verdict


def read_verdict(text: str, asked: Shape | None = None, scale: Scale | None = None) -> Verdict | Unreadable:
    """Read a judge's answer and turn its values into scores: `read_answer`, then `score_answer`."""
    answer = read_answer(text, asked)
    return answer if isinstance(answer, Unreadable) else score_answer(answer, scale)


def read_answer(text: str, asked: Shape | None = None) -> Answer | Unreadable:
    """Read a judge's answer without deciding what its numbers mean.

    Takes JSON as it is; else the JSON in a Markdown fence, after a thought or between prose; else what can be repaired.
    Every step away from the judge's own text is named in `Answer.repairs`. Takes at most a second.

    Args:
        text: the answer.
        asked: what the judge was asked for, where that is known (`asked_shape`). All its keys must be there; without
            it, the keys are those in a `scores` object, those that end in `score`, or all that have numbers.
    """
    try:
        return _answer(text, asked or Shape((), nested=False))
    except Refusal as refusal:
        return Unreadable(refusal.reason, refusal.kind)


def score_answer(answer: Answer, scale: Scale | None = None) -> Verdict | Unreadable:
    """Map an answer's values to scores from 0 to 1, in hundredths.

    Args:
        answer: what the judge answered.
        scale: the judge's range and words; None for a judge who gives numbers from 0 to 1.
    """
    try:
        scores = {key: _score(key, value, scale or Scale()) for key, value in answer.values.items()}
    except Refusal as refusal:
        return Unreadable(refusal.reason, refusal.kind)
    return Verdict(scores, answer.nested, answer.texts, answer.repairs)


def _answer(text: str, asked: Shape) -> Answer:
    found, reading = _choose(text, asked.keys)
    if asked.keys and not found.exact:
        reading = _without_other_scores(reading, asked.keys)
    if len(reading.values) > _MOST_SCORES:
        raise Refusal(f"more than {_MOST_SCORES} scores")
    values = {key: _value(key, value) for key, value in reading.values.items()}
    _check_surroundings(found, reading, values)
    if not found.exact:
        _check_evidence(found, reading, values, known=bool(asked.keys))
    texts = dict(reading.texts)
    if CUT_OFF in found.repairs:
        texts = _whole_sentences(texts) or {}
    nested = asked.nested if asked.keys else reading.nested
    return Answer(values, nested, _as_json(values, texts), (*found.repairs, *reading.repairs))


def _without_other_scores(reading: "_Reading", asked: tuple[str, ...]) -> "_Reading":
    """Scores beyond those that were asked for are texts where a brace may be missing that would part them."""
    others = {key: value for key, value in reading.values.items() if key not in asked}
    values = {key: value for key, value in reading.values.items() if key in asked}
    return reading._replace(values=values, texts={**others, **reading.texts})


_MOST_SCORES = 100
"""Each one is looked for in the whole answer."""


def _choose(text: str, asked: tuple[str, ...]) -> tuple[Found, "_Reading"]:
    """The verdict among the objects of an answer.

    Raises:
        Refusal: it is missing, or there are several that differ.
    """
    reasons = [Refusal("no JSON object")]
    objects, broken = find_json(text)
    chosen = [reading for found in objects for reading in _verdicts(found, asked, reasons)]
    for found in () if chosen else repair_objects(broken):
        chosen += _verdicts(found, asked, reasons)
    named = [one for one in chosen if one[1].named] or chosen[:1]
    if not named:
        raise reasons[-1]
    found, reading = named[0]
    if not reading.named and found.repairs and re.search(r"""scores?["'”*]{0,4}+\s*+:""", text):
        raise Refusal("the scores are in no object")
    for _, other in named[1:]:
        if other.values != reading.values:
            raise _two_scores(next((key for key in reading.values if key in other.values), None))
    return found, reading


def _verdicts(found: Found, asked: tuple[str, ...], reasons: list[Refusal]) -> Iterator[tuple[Found, "_Reading"]]:
    """What an object, or each object of a list, gives; where it gives no verdict, why not is added to `reasons`."""
    alone = not isinstance(found.value, list) or _members(found.value) is not None
    for value in [found.value] if alone else found.value:
        reading = _read_object(value, asked)
        if reading is None:
            reasons += [_why_not(found, asked)] if isinstance(value, dict | list) else []
        elif _is_quoted(found):
            reasons.append(Refusal("the scores are only quoted in a sentence"))
        else:
            around = () if alone else ("list around the object",)
            yield found, reading._replace(repairs=(*reading.repairs, *around))


def _why_not(found: Found, asked: tuple[str, ...]) -> Refusal:
    """Why an object is not the verdict."""
    others = _read_object(found.value, ())
    others = others if others and others.named else None
    if CUT_OFF in found.repairs:
        return Refusal("cut off inside the scores" if others else "cut off before the first score")
    missing = [key for key in asked if others and key not in _as_asked(others.values, asked)]
    if not missing:
        return Refusal("no score")
    return Refusal(f"{_shortened(missing[0])} is missing", "a score that the prompt asks for is missing")


def _two_scores(key: str | None) -> Refusal:
    if key is None:
        return Refusal("two verdicts that differ")
    return Refusal(f"two different scores for {_shortened(key)}", "two different scores for one key")


# --- which members of an object are scores ------------------------------------------------------------------------


class _Place(NamedTuple):
    """Where scores may be."""

    members: Mapping[str, Any]
    nested: bool
    """The members are those of a `scores` object, or of a list of criteria."""
    beside: Mapping[str, Any]
    """What the judge wrote beside these members."""


class _Reading(NamedTuple):
    """What an object gives, if it is the verdict."""

    values: Mapping[str, Any]
    """By key, as the prompt spells it."""
    spelt: Mapping[str, str]
    """By the same keys, as the judge spells them."""
    nested: bool
    texts: Mapping[str, Any]
    repairs: tuple[str, ...]
    named: bool
    """The keys were asked for or are named as scores; else they are whatever has a number."""


_DEEPEST = 2
"""Some judges put the object that they were asked for into another one, or into two."""
_NO_VERDICT = ("scores", "error", "errors")
"""Keys of objects whose numbers are not scores: the scores are unreadable, or an API has failed."""
_SCORE_NAMES, _KEY_NAMES = ("score", "rating", "value"), ("name", "criterion", "metric", "dimension", "key")
"""What judges call the score and the key in an object for each criterion."""
_OTHER_NAME = "score under another name"


def _read_object(value: Any, asked: tuple[str, ...]) -> _Reading | None:
    """What an object gives in any of the shapes that judges use; None where it has no scores, or not all of them."""
    members = _members(value)
    places = [] if members is None else [_Place(members, isinstance(value, list), {})]
    unnamed: _Reading | None = None
    for depth in range(_DEEPEST + 1):
        readings = [reading for place in places if (reading := _read_place(place, asked))]
        named = [reading for reading in readings if reading.named]
        if len(named) > 1:
            raise Refusal("several objects with scores")
        around = ("object around the object",) if depth else ()
        if named:
            return named[0]._replace(repairs=(*named[0].repairs, *around))
        if unnamed is None and len(readings) == 1 and not (depth and places[0].beside):
            unnamed = readings[0]._replace(repairs=around)
        places = [inner for place in places for inner in _places_inside(place)]
    return unnamed


def _members(value: Any) -> Mapping[str, Any] | None:
    """The members of an object, or of a list of objects that each have a name and a score; None for anything else."""
    if not isinstance(value, list):
        return value if isinstance(value, dict) else None
    members: dict[str, Any] = {}
    for item in value:
        name = next((key for key in _KEY_NAMES if isinstance(item, dict) and isinstance(item.get(key), str)), None)
        if name is None or _score_name(item) is None:
            return None
        if item[name] in members:
            raise _two_scores(item[name])
        members[item[name]] = {key: given for key, given in item.items() if key != name}
    return members or None


def _score_name(value: Any) -> str | None:
    return next((name for name in _SCORE_NAMES if name in value), None) if isinstance(value, dict) else None


def _places_inside(place: _Place) -> Iterator[_Place]:
    for name, value in place.members.items():
        inner = _members(value)
        if inner is not None and name.lower() not in _NO_VERDICT:
            others = {key: other for key, other in place.members.items() if key != name}
            yield _Place(inner, isinstance(value, list), {**place.beside, **others})


def _read_place(place: _Place, asked: tuple[str, ...]) -> _Reading | None:
    members, nested, beside = place
    scores = _members(members.get("scores"))
    if scores is not None:
        beside = {**beside, **{key: value for key, value in members.items() if key != "scores"}}
        members, nested = scores, True
    keys = _as_asked(members, asked)
    if len(keys) < len(asked):
        return None
    keys |= {
        name: _plain_key(name)
        for name, value in members.items()
        if name not in keys and _is_score(name, value, nested, known=bool(asked))
    }
    named = bool(keys)
    if not named and not any(name.lower() in _NO_VERDICT for name in members):
        keys = {name: _plain_key(name) for name, value in members.items() if _is_plain_score(value)}
    if len(set(keys.values())) < len(keys):
        raise Refusal("two scores of one name")
    if not keys:
        return None
    spelt = {key: name for name, key in sorted(keys.items(), key=lambda item: _place_of(item[1], asked))}
    values = {key: _without_reason(members[name])[0] for key, name in spelt.items()}
    other_name = tuple(keys) == ("score",) and asked not in ((), ("score",))
    texts = {key: value for key, value in members.items() if key not in keys} | dict(beside)
    reasons = {key: reason for key, name in spelt.items() if (reason := _without_reason(members[name])[1])}
    repairs = (_OTHER_NAME,) if other_name else ()
    return _Reading(values, spelt, nested, _with_reasons(texts, reasons), repairs, named)


def _place_of(key: str, asked: tuple[str, ...]) -> int:
    return asked.index(key) if key in asked else len(asked)


def _is_score(name: str, value: Any, nested: bool, *, known: bool) -> bool:
    """Whether a member that the prompt does not name is a score; a keyed summary in a `scores` object is not one."""
    given, criterion = _without_reason(value)[0], _score_name(value)
    if isinstance(given, dict | list) or not (nested or _is_named_score(name) or (criterion and not known)):
        return False
    return not known or number_of(given) is not None


def _is_named_score(key: str) -> bool:
    return key.lower().rstrip(_AROUND_KEYS).endswith("score")


def _is_plain_score(value: Any) -> bool:
    return type(value) in (int, float, bool) or (isinstance(value, str) and value.strip().lower() in _WORDS)


_WORDS = ("pass", "fail", "passed", "failed", "true", "false", "yes", "no", "correct", "incorrect")


def _without_reason(value: Any) -> tuple[Any, Any]:
    """The score of a member, and what an object for a criterion says beside it."""
    name = _score_name(value)
    if name is None:
        return value, None
    others = {key: other for key, other in value.items() if key != name}
    return value[name], next(iter(others.values())) if len(others) == 1 else others


def _with_reasons(texts: dict[str, Any], reasons: Mapping[str, Any]) -> dict[str, Any]:
    free = next(name for name in ("reasoning", "reasons", "criteria", "details of the scores") if name not in texts)
    return texts | {free: reasons} if reasons else texts


def _as_asked(members: Mapping[str, Any], asked: tuple[str, ...]) -> dict[str, str]:
    """By the keys of an object, those that the prompt asks for.

    Judges change case, spaces and the ending `_score`; another difference is a key that was not asked for.
    """
    wanted = {bare(key): key for key in asked}
    found = {name: wanted[bare(name)] for name in members if bare(name) in wanted}
    wanted |= {short.removesuffix("score"): key for short, key in wanted.items() if key not in found.values()}
    found |= {name: wanted[bare(name)] for name in members if name not in found and bare(name) in wanted}
    if len(asked) == 1 and not found and "score" in members:
        found = {"score": asked[0]}
    return {name: key for name, key in found.items() if not isinstance(_without_reason(members[name])[0], dict | list)}


@lru_cache(maxsize=1024)
def bare(key: str) -> str:
    """A key without what judges change in it: case, spaces, dashes, underscores."""
    return re.sub(r"[\W_]+", "", key).casefold()


_AROUND_KEYS = " \t\r\n:\u200b\ufeff"


def _plain_key(key: str) -> str:
    """A score's key without what is around it.

    Raises:
        Refusal: it is not a name.
    """
    plain = key.strip(_AROUND_KEYS)
    if not plain or plain.strip("'") != plain or re.search(r'["“”\\\\:*{}\[\]\x00-\x1f]', plain):
        raise Refusal(f"a score is named {_shortened(key)}", "the name of a score is unclear")
    return plain


# --- which number a value is --------------------------------------------------------------------------------------


def _value(key: str, value: Any) -> float | bool | str:
    """What a judge gave a key: a number, a truth value, or a word.

    Raises:
        Refusal: it is not one of these.
    """
    if isinstance(value, bool):
        return value
    number = number_of(value)
    if number is not None and math.isinf(number):
        raise _out_of_range(key, value)
    if number is not None:
        return number
    if isinstance(value, str) and _WORD.fullmatch(value.strip()):
        return value.strip()
    raise _not_a_number(key, value)


_WORD = re.compile(r"[^\W\d_]+([ _-][^\W\d_]+){0,2}")
_STRICT_NUMBER = re.compile(r"(?:[-+]?(0|[1-9]\d*)(\.\d+)?|\.\d+)([eE][-+]?\d{1,3})?", re.ASCII)


def number_of(value: Any) -> float | None:
    """The number that a value is, or that a string writes plainly or in percent; None for everything else."""
    if type(value) in (int, float):
        return value if abs(value) < 1e300 else math.inf
    if not isinstance(value, str):
        return None
    digits = unicodedata.normalize("NFKC", value).strip(" ")
    percent, digits = digits.endswith("%"), digits.removesuffix("%").strip(" ")
    if _DECIMAL_COMMA.fullmatch(digits):
        digits = digits.replace(",", ".")
    if not _STRICT_NUMBER.fullmatch(digits):
        return None
    # Of `0.95%` nobody knows whether 0.95 or 95 % is meant; of `0%` everybody.
    if percent:
        return None if 0 < float(digits) <= 1 else float(digits) / 100
    return float(digits)


# Not `12,000`: a comma before three digits may group them, except after a zero.
_DECIMAL_COMMA = re.compile(r"-?\d{1,3},\d{1,2}|-?0,\d+")


def _score(key: str, value: float | bool | str, scale: Scale) -> float:
    """The score that a value is on a scale: 0 to 1, in hundredths.

    Raises:
        Refusal: it is not a number and no word of the scale, or out of range.
    """
    if isinstance(value, bool | str):
        if str(value).lower() not in scale.words:
            raise _not_a_number(key, value)
        return round(scale.words[str(value).lower()], 2) + 0.0
    if not scale.low <= value <= scale.high:
        raise _out_of_range(key, value)
    return round((value - scale.low) / (scale.high - scale.low), 2) + 0.0


def _not_a_number(key: str, value: Any) -> Refusal:
    return Refusal(f"score {_shortened(value)} of {_shortened(key)} is not a number", "a score is not a number")


def _out_of_range(key: str, value: Any) -> Refusal:
    return Refusal(f"score {_shortened(value)} of {_shortened(key)} out of range", "a score is out of range")


def _shortened(value: Any) -> str:
    """A value as it is shown in a reason."""
    shown = str(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."


# --- the guard: nothing that is doubtful is a score ---------------------------------------------------------------

_QUOTE = "[\"'“”„‟«»「」『』＂`*]{0,3}+"
_NUMBER = r"[-+]?\d[\d.]*+(?:,\d++(?=\s*+%?+[\"'”“]))?+(?:[eE][-+]?\d++)?+(?: ?%)?+"
_CRITERION = rf"[^{{}}｛｝]{{0,1000}}?{_QUOTE}(?:{'|'.join(_SCORE_NAMES)}){_QUOTE}\s*+[:：]\s*+"
_OPENS, _CLOSES = "[\"'“”„‟«「『＂]", "[\"'“”„»」』＂]"
_DELIMITER = re.compile(
    r"(?:\s++(?://[^\n]*+|#[^\n]*+|/\*.{0,200}?\*/))?+\s*+"
    rf"(?:[,，]\s*+(?=[^\s\d])|[}}｝](?!\s*[\w.])|{_OPENS}[^\W\d][^\"'\n,:：]{{0,80}}{_CLOSES}\s*+[:：])"
)
"""What follows a number that is whole. `0.8}5` and `0,85` are none."""


@lru_cache(maxsize=1024)
def _mention(key: str) -> re.Pattern[str]:
    """Where a key is given a value: by itself, in an object for its criterion, or in a list of criteria."""
    return re.compile(
        rf"(?<![^\W_]){_QUOTE}{re.escape(key)}{_QUOTE}\s*+(?:[:：]\s*+(?:[{{｛]{_CRITERION})?+|,{_CRITERION})"
        rf"(?P<quote>{_OPENS})?+\s*+(?P<given>{_NUMBER}|[^\W\d]++(?:[ _-][^\W\d]++){{0,2}})(?(quote){_CLOSES}|)"
    )


def _check_evidence(found: Found, reading: _Reading, values: Mapping[str, Any], *, known: bool) -> None:
    """Check that each score of an answer that is not JSON is written in it, once, after its key, before a delimiter.

    A repair may make `0.8` of `0.85`, or give one key the number of another: what the text says decides.

    Raises:
        Refusal: a score is not written, or two are, or another score may have been to come.
    """
    cut_off = CUT_OFF in found.repairs
    for key, value in values.items():
        proven = False
        for mention in _mention(reading.spelt[key]).finditer(found.text):
            if not _DELIMITER.match(found.text, mention.end()):
                continue
            number = number_of(mention["given"])
            if number == value or mention["given"].lower() == str(value).lower():
                proven = True
            elif number is not None:
                raise _two_scores(key)
        if not proven and cut_off:
            raise Refusal("cut off inside the scores")
        if not proven:
            raise Refusal(f"score {_shortened(value)} of {_shortened(key)} is unclear", "a score is unclear")
    # Where the keys are not known, only a text after the scores shows that they were complete.
    if cut_off and not known and not (reading.texts and list(reading.texts.values())[-1]):
        raise Refusal("cut off inside the scores")


_MOST_AROUND = 40_000
"""Characters around an answer; each key is looked for in them."""
_DRAFT = re.compile(r"\b(?:guess|draft|perhaps|maybe|tentative|initial|preliminary|example|first)", re.IGNORECASE)
_TAKEN_BACK = re.compile(
    r"\b(?:wait|actually|corrected|correction|second thought|reconsider|revis|scratch that|mistake|instead|draft"
    r"|too (?:low|high|harsh|lenient|generous|strict|kind|severe)|should (?:be|have been)"
    r"|i(?:'d|’d| would| will|'ll|’ll)\b|let me\b)|等等|更正|修正|改为|不对",
    re.IGNORECASE,
)
_DECIMAL = re.compile(r"(?<![\w.,])(?:0?\.\d+|1\.0+)(?![\d%])")
_OTHER_SCORE = re.compile(r"""\{\s*+["'“”]?+(\w*score)["'“”]?+\s*+:\s*+["'“”]?+[.\d]""")
"""The first score of an object that may be too broken to be parsed."""


def _check_surroundings(found: Found, reading: _Reading, values: Mapping[str, Any]) -> None:
    """Check that what the judge wrote around its answer does not change it.

    Raises:
        Refusal: it may: a thought that is never closed, another score, a word that takes the answer back.
    """
    before, after = found.before.strip(), found.after.strip()
    if not before and not after:
        return
    if len(before) + len(after) > _MOST_AROUND:
        raise Refusal("too much text around the answer")
    if has_thought(before):
        raise Refusal("cut off before the first score")
    for key, value in values.items():
        for mention in _mention(reading.spelt[key]).finditer(f"{before}\n{after}"):
            number = number_of(mention["given"].rstrip(". "))
            if number is not None and number != value:
                raise _two_scores(key)
    if {bare(name) for name in _OTHER_SCORE.findall(before + after)} - {bare(name) for name in reading.spelt.values()}:
        raise Refusal("two verdicts that differ")
    if _OTHER_NAME in reading.repairs and "prose around the answer" in found.repairs:
        raise Refusal("other scores than were asked for")
    if _DRAFT.search(before.rpartition("\n")[2]):
        raise Refusal("the sentence before the answer calls it a draft")
    others = [float(number) for number in _DECIMAL.findall(after)]
    if has_thought(after) or _TAKEN_BACK.search(after) or any(number not in values.values() for number in others):
        raise Refusal("the text after the answer may change it")
    if after and after[-1].isalnum():
        raise Refusal("cut off after the answer, which may have been a draft")


def _is_quoted(found: Found) -> bool:
    """Whether an object is quoted inside a sentence rather than being the answer."""
    if "fenced" in found.repairs:
        return False
    line, follows = found.before.rpartition("\n")[2], found.after.partition("\n")[0]
    introduced = not re.search(r"\w", line) or line.rstrip(" \t*_`").endswith((":", "："))
    in_backticks = found.before.endswith("`") and "prose around the answer" in found.repairs
    return bool(re.search(r"\w", follows)) or not introduced or in_backticks


# --- the texts ----------------------------------------------------------------------------------------------------


def _as_json(values: Mapping[str, Any], texts: dict[str, Any]) -> dict[str, Any]:
    """The texts as they are read back from JSON: Python's parser admits numbers and characters that JSON does not."""
    import orjson

    try:
        orjson.dumps(list(values))
        plain: dict[str, Any] = orjson.loads(orjson.dumps(texts))
    except (orjson.JSONEncodeError, orjson.JSONDecodeError) as error:
        deep = "ecursion" in str(error)
        reason = "nested too deeply" if deep else f"not to be written as JSON ({error})"
        raise Refusal(reason, "nested too deeply" if deep else "not to be written as JSON") from error
    return plain


_SENTENCE = re.compile(r"""\w[)"'”’\]]*(?:[.!?]["')\]”’]*(?=\s|\Z)|[。！？]["')\]”’]*)""")


def _whole_sentences(value: Any) -> Any:
    """A value whose last string was cut off, up to its last whole sentence; None where nothing is left of it.

    A judge that is trained on half sentences learns to stop in the middle.
    """
    if isinstance(value, str):
        ends = [sentence.end() for sentence in _SENTENCE.finditer(value)]
        return value[: ends[-1]] if ends else None
    if isinstance(value, dict) and value:
        *members, (key, last) = value.items()
        kept = _whole_sentences(last)
        return dict(members if kept is None else [*members, (key, kept)]) or None
    if isinstance(value, list) and value:
        kept = _whole_sentences(value[-1])
        return value[:-1] + ([] if kept is None else [kept]) or None
    return value
