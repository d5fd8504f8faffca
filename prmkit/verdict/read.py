"""The only parser of verdicts: it finds the scores in a judge's answer.

Conversion, evaluation and scoring all read verdicts here, so they always agree. An answer is either read as a `Verdict`
or rejected as `Unreadable` with the reason. A score is never guessed and never a default: if the answer is not JSON,
each score must occur in it once, after its key and before a delimiter.
"""

import math
import re
import unicodedata
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from prmkit.verdict.repair import Found, Refusal, find_objects, has_thought, shorten, unique_members
from prmkit.verdict.types import SCORE_ENDING, Answer, Scale, Shape, Unreadable, Verdict, is_score_key


def read_verdict(text: str, asked: Shape | None = None, scale: Scale | None = None) -> Verdict | Unreadable:
    """Read a judge's answer and turn its values into scores: `read_answer`, then `score_answer`."""
    answer = read_answer(text, asked)
    return answer if isinstance(answer, Unreadable) else score_answer(answer, scale)


def read_answer(text: str, asked: Shape | None = None) -> Answer | Unreadable:
    """Read a judge's answer without interpreting its numbers.

    Accepts plain JSON; otherwise JSON in a Markdown fence, after a thought or within prose; otherwise JSON that can be
    repaired. Every change to the judge's text is listed in `Answer.repairs`. Takes at most a second.

    Args:
        text: the answer.
        asked: the shape that the prompt requests, if known (`asked_shape`). All its keys must be there, and only they
            are scores; without it, the keys are those in a `scores` object, those that end in `score`, or all that
            have numbers.
    """
    try:
        return _answer(text, asked or Shape((), nested=False))
    except Refusal as refusal:
        return Unreadable(refusal.reason, refusal.kind)


def score_answer(answer: Answer, scale: Scale | None = None) -> Verdict | Unreadable:
    """Map an answer's values to scores from 0 to 1, in hundredths.

    Args:
        answer: the judge's answer.
        scale: the judge's range and words; None for a judge that gives numbers from 0 to 1.
    """
    try:
        scores = {key: _score(key, value, scale or Scale()) for key, value in answer.values.items()}
    except Refusal as refusal:
        return Unreadable(refusal.reason, refusal.kind)
    return Verdict(scores, answer.nested, answer.texts, answer.repairs)


_MOST_SCORES = 100
"""A limit, because the complete answer is searched for each score."""


def _answer(text: str, asked: Shape) -> Answer:
    found, reading = _choose(find_objects(text), asked.keys)
    if len(reading.values) > _MOST_SCORES:
        raise Refusal(f"more than {_MOST_SCORES} scores")
    values = {key: _value(key, value) for key, value in reading.values.items()}
    _check_surroundings(found, values)
    if not found.exact:
        _check_evidence(found, reading, values, known=bool(asked.keys))
    texts = _complete_sentences(reading.texts) or {} if found.cut_off else reading.texts
    repairs = (*found.repairs, *reading.repairs)
    if found.texts_lost:
        _check_scores_come_first(found, reading, known=bool(asked.keys))
        texts, repairs = {}, (*repairs, "texts left out")
    nested = asked.nested if asked.keys else reading.nested
    if not nested and (twice := values.keys() & texts.keys()):  # a label with such a key twice could not be read
        raise _two_scores(min(twice))
    return Answer(values, nested, _as_json(values, texts), repairs)


def _choose(objects: list[Found], asked: tuple[str, ...]) -> tuple[Found, "_ObjectContent"]:
    """Find the verdict among the objects of an answer."""
    chosen, reason = list[tuple[Found, _ObjectContent]](), Refusal("no JSON object")
    for found in objects:
        reading = _read_object(found.value, asked, is_only=len(objects) == 1)
        if reading is None:
            reason = _why_not(found, asked) if isinstance(found.value, dict | list) else reason
        elif _is_inside_a_line(found):
            reason = Refusal("the scores share a line with other text")
        elif _OTHER_NAME in reading.repairs and "prose around the answer" in found.repairs:
            reason = Refusal("other scores than were asked for")
        else:
            chosen.append((found, reading))
    if not chosen:
        raise reason
    if any(other.values != chosen[0][1].values for _, other in chosen):
        raise Refusal("two verdicts that differ")
    return chosen[0]


def _why_not(found: Found, asked: tuple[str, ...]) -> Refusal:
    """Return the reason why an object is not the verdict."""
    if isinstance(found.value, list):
        return Refusal("a list that is not one verdict")
    names = {bare(name) for name in re.findall(r"""["'“]([^"'“”\n:]{1,80})["'”]\s*:""", found.text)}
    missing = [key for key in asked if not names & {bare(key), _short(key)}]
    if found.cut_off:
        some = len(missing) < len(asked) if asked else any("score" in name for name in names)
        return Refusal(f"cut off {'inside the scores' if some else 'before the first score'}")
    if missing:
        return Refusal(f"{shorten(missing[0])} is missing", "a score that the prompt asks for is missing")
    return Refusal("the scores are not together in one object" if asked else "no score")


# --- which members of an object are scores ------------------------------------------------------------------------


class _ObjectContent(NamedTuple):
    """The content of an object that may be the verdict."""

    values: Mapping[str, Any]
    name_of_key: Mapping[str, str]  # the prompt's key -> the judge's name for it
    nested: bool  # whether the values are in a `scores` object, or in a list of criteria
    texts: dict[str, Any]
    repairs: tuple[str, ...]


_DEEPEST = 3
"""Judges nest the requested object in one or two others, and the scores in `scores`."""
_OTHER_NAME = "score under another name"
# Names that judges use for the score and for the key in one object per criterion: {"name": "quality", "rating": 0.9}.
_SCORE_NAMES, _KEY_NAMES = ("score", "rating", "value"), ("name", "criterion", "metric", "dimension", "key")
# Members, without case and dashes, that contain the answer itself: {"evaluation": {"score": 0.9}}.
_AROUND_ANSWERS = {
    "answer", "assessment", "clip", "evaluation", "feedback", "final", "grade", "judgement", "judgment", "output",
    "rating", "response", "result", "results", "review", "score", "scores", "step", "stepevaluation", "verdict",
}  # fmt: skip
# Numbers that are not scores: {"step": 3, "rating": 0.4, "confidence": 0.9}.
_NO_SCORES = {
    "clip", "clipnumber", "confidence", "count", "id", "index", "max", "maximum", "min", "minimum", "n", "number",
    "outof", "round", "seed", "step", "stepnumber", "threshold", "timestamp", "tokens", "tokensused", "total", "turn",
    "version", "weight",
}  # fmt: skip
# The path of enclosing objects, each with the name of the member that leads inwards.
_Path = tuple[tuple[dict[str, Any], str], ...]


def _read_object(value: Any, asked: tuple[str, ...], *, is_only: bool) -> _ObjectContent | None:
    """Read an object in any of the layouts that judges use; None if it lacks some or all of the scores.

    `{"a": 0.9}`, `{"scores": {"a": 0.9}}`, `{"a": {"score": 0.9, "reason": "…"}}`, `[{"name": "a", "score": 0.9}]`, and
    each of them inside other objects. If an answer has only one object, its scores may have any names.
    """
    contents = _contents(value, asked)
    reading = next(contents, None)
    if reading and next(contents, None):
        raise Refusal("several objects with scores")
    if reading or asked or not is_only or not isinstance(value, dict) or {"error", "scores"} & {*value}:
        return reading
    numbers = {name: name for name, number in value.items() if type(number) in (int, float, bool)}
    numbers = {name: name for name in numbers if bare(name) not in _NO_SCORES}
    return _content(value, numbers, (), nested=False) if numbers else None


def _contents(
    value: Any, asked: tuple[str, ...], path: _Path = (), *, nested: bool = False
) -> Iterator[_ObjectContent]:
    """Yield the contents of the outermost objects that have all the scores."""
    if isinstance(value, list) and len(value) == 1 and not _is_criterion(value[0]):
        value = value[0]
    members, nested = _members(value), nested or isinstance(value, list)
    in_scores = bool(_members(members.get("scores")))
    is_answer = all(bare(name) in _AROUND_ANSWERS for _, name in path)
    if in_scores:
        name_of_key = {}
    else:
        name_of_key = _as_asked(members, asked, is_answer=is_answer) if asked else _as_named(members, nested=nested)
    if name_of_key and len(name_of_key) >= len(asked):
        other_name = [*name_of_key.values()] == ["score"] and asked not in ((), ("score",))
        yield _content(members, name_of_key, path, nested=nested)._replace(repairs=(_OTHER_NAME,) if other_name else ())
    elif len(path) < _DEEPEST:
        for name in ["scores"] if in_scores else members:
            yield from _contents(members[name], asked, (*path, (members, name)), nested=name == "scores")


def _content(members: dict[str, Any], name_of_key: dict[str, str], path: _Path, *, nested: bool) -> _ObjectContent:
    """Take the scores of an object; its other members, and those of the enclosing objects, become texts."""
    split = {key: _split_criterion(members[name]) for key, name in name_of_key.items()}
    texts = [(name, text) for name, text in members.items() if name not in name_of_key.values()]
    for around, inner in path:
        texts += [(name, text) for name, text in around.items() if name != inner]
    texts = [(name, text) for name, text in texts if not _repeats_score(name, text, split)]
    if reasons := {key: reason for key, (_, reason) in split.items() if reason}:
        texts.append(("reasons" if "reasoning" in dict(texts) else "reasoning", reasons))
    scores = {key: score for key, (score, _) in split.items()}
    return _ObjectContent(scores, name_of_key, nested, unique_members(texts), ())


def _members(value: Any) -> dict[str, Any]:
    """Return the members of an object, or of a list of objects with a name and a score each; otherwise nothing."""
    if not isinstance(value, list):
        return value if isinstance(value, dict) else {}
    members: dict[str, Any] = {}
    for item in value:
        name = next((key for key in _KEY_NAMES if isinstance(item, dict) and isinstance(item.get(key), str)), None)
        if name is None or not _is_criterion(item):
            return {}
        if item[name] in members:
            raise _two_scores(item[name])
        members[item[name]] = {key: given for key, given in item.items() if key != name}
    return members


def _is_criterion(value: Any) -> bool:
    return isinstance(value, dict) and any(name in value for name in _SCORE_NAMES)


def _split_criterion(value: Any) -> tuple[Any, Any]:
    """Split a criterion's object into its score and its other content; any other value is the score itself."""
    if not _is_criterion(value):
        return value, None
    others = dict(value)
    named = next(name for name in _SCORE_NAMES if name in value)
    score = others.pop(named)
    for name in _SCORE_NAMES:
        if (number := number_of(others.get(name))) is not None and number != number_of(score):
            raise _two_scores(f"{named} and {name}")
    return score, next(iter(others.values())) if len(others) == 1 else others


def _repeats_score(name: str, text: Any, given: Mapping[str, tuple[Any, Any]]) -> bool:
    """Whether another member only repeats a score: `{"scores": {"quality": 0.7}, "quality": 0.7}`.

    Raises:
        Refusal: it has the name of a score, and another number.
    """
    key = next((key for key in given if bare(name) in (bare(key), bare(key) + SCORE_ENDING)), None)
    if key is None or not _is_plain(text):
        return False
    number, score = number_of(_split_criterion(text)[0]), number_of(given[key][0])
    if number is None and isinstance(text, str):
        return False
    if number is None or number != score:
        raise _two_scores(key)
    return True


def _is_plain(value: Any) -> bool:
    return not isinstance(_split_criterion(value)[0], dict | list)


def _as_asked(members: Mapping[str, Any], asked: tuple[str, ...], *, is_answer: bool) -> dict[str, str]:
    """Map each key of the prompt to the judge's name for it.

    Judges change case, spaces and the ending `_score`, and call a single score `score`. A key that differs in any other
    way was not requested. The `score` of an object that is not the answer itself belongs to something else, for example
    a quoted search result.
    """
    names: dict[str, list[str]] = {}
    for name, value in members.items():
        if _is_plain(value):
            names.setdefault(bare(name), []).append(name)
    matching = {key: found for key in asked if (found := names.get(bare(key)) or names.get(_short(key)))}
    if len(asked) == 1 and not matching and is_answer and "score" in names:
        matching = {asked[0]: names["score"]}
    for key, found in matching.items():
        if len(found) > 1 or [*matching.values()].count(found) > 1:
            raise _two_scores(key)
    return {key: found[0] for key, found in matching.items()}


@lru_cache(maxsize=1024)
def bare(key: str) -> str:
    """Return a key without the parts that judges vary: case, spaces, dashes, underscores."""
    return re.sub(r"[\W_]+", "", key).casefold()


def _short(key: str) -> str:
    return bare(key).removesuffix(SCORE_ENDING)


_NAME = re.compile(r"\w(?:[\w &-]*\w)?")  # tool-use quality; not `quality":` or `qua/lity`, results of broken quotes


def _as_named(members: Mapping[str, Any], *, nested: bool) -> dict[str, str]:
    """Find the members that are scores by their names or positions, if the requested keys are unknown."""
    plain = {name: value for name, value in members.items() if _is_plain(value)}
    names = [name for name, value in plain.items() if nested or is_score_key(name) or _is_criterion(value)]
    for name in names:
        if not _NAME.fullmatch(name):
            raise Refusal(f"a score is named {shorten(name)}", "the name of a score is unclear")
    return {name: name for name in names}


def _two_scores(key: str) -> Refusal:
    return Refusal(f"two different scores for {shorten(key)}", "two different scores for one key")


# --- from values to scores ----------------------------------------------------------------------------------------


def _value(key: str, value: Any) -> float | bool | str:
    """Return the judge's value of a key: a number, a boolean, or a word."""
    number = number_of(value)
    if number is not None and math.isinf(number):
        raise _unusable(key, value, "is out of range")
    if number is None and isinstance(value, str) and WORD.fullmatch(value.strip()):
        return value.strip()
    if number is None and not isinstance(value, bool):
        raise _unusable(key, value, "is not a number")
    return value if number is None else number


def _score(key: str, value: float | bool | str, scale: Scale) -> float:
    """Map a value to a score from 0 to 1, in hundredths."""
    if isinstance(value, bool | str):
        if str(value).lower() not in scale.words:
            raise _unusable(key, value, "is not a number")
        return round(scale.words[str(value).lower()], 2) + 0.0
    if isinstance(value, Percentage) and (scale.low, scale.high) != (0, 1):
        if scale.low != 0 or value > 1:  # of 1 to 5, 50% may be 2.5 or 3
            raise _unusable(key, f"{100 * value:g}%", f"is a percentage on a scale of {scale.low:g} to {scale.high:g}")
        return round(value, 2) + 0.0
    if not scale.low <= value <= scale.high:
        raise _unusable(key, value, "is out of range")
    return round((value - scale.low) / (scale.high - scale.low), 2) + 0.0


def _unusable(key: str, value: Any, why: str) -> Refusal:
    return Refusal(f"score {shorten(value)} of {shorten(key)} {why}", f"a score {why}")


WORD = re.compile(r"[^\W\d_]+([ _-][^\W\d_]+){0,2}")  # pass, partly met, not_met
# 0.85, .9, -0.1, 9e-1; not 01 and not 1_000
_STRICT_NUMBER = re.compile(r"(?:[-+]?(0|[1-9]\d*)(\.\d+)?|\.\d+)([eE][-+]?\d{1,3})?", re.ASCII)
# 0,85 and 7,5; not 12,000: a comma before three digits may group them, except after a zero.
_DECIMAL_COMMA = re.compile(r"-?\d{1,3},\d{1,2}|-?0,\d+")


class Percentage(float):
    """A number that the judge wrote as a percentage: on a scale of 0 to 100, `85%` is 85 and not 0.85."""


def number_of(value: Any) -> float | None:
    """Return a number, also from a string with only a number or a percentage; None for everything else."""
    if type(value) in (int, float):
        return value if abs(value) < 1e300 else math.inf
    if not isinstance(value, str):
        return None
    digits = unicodedata.normalize("NFKC", value).strip(" ")
    percent, digits = digits.endswith("%"), digits.removesuffix("%").strip(" ")
    if _DECIMAL_COMMA.fullmatch(digits):
        digits = digits.replace(",", ".")
    # `1%` and `0.95%` may mean 1 and 0.95, or hundredths; `8.5%` may be a faulty `85%`.
    if not _STRICT_NUMBER.fullmatch(digits) or (percent and (digits == "1" or not digits.isdecimal())):
        return None
    return Percentage(float(digits) / 100) if percent else float(digits)


# --- guard: reject ambiguous scores -------------------------------------------------------------------------------

# Whole groups are atomic, (?>(…)?), and not possessive, (…)?+: before Python 3.11.5 these lose matches (gh-106052), and
# Debian 12 has 3.11.2.
_QUOTE = "[\"'“”`*]{0,3}+"
# {"reason": "…", "score": after a criterion, or , "score": after the name of one in a list
_CRITERION = rf"[^{{}}]{{0,1000}}?{_QUOTE}(?:{'|'.join(_SCORE_NAMES)}){_QUOTE}\s*+:\s*+"
_NUMBER = r"[-+]?\d[\d.]*+(?>(?:,\d++(?=\s*+%?+[\"'”]))?)(?>(?:[eE][-+]?\d++)?)(?>(?: ?%)?)"
# What ends a number: `, "`, `}`, a comment, or the next key, whose comma is missing. Not as in `0.8}5`, `0,85`.
_DELIMITER = re.compile(
    r"(?>(?:\s++(?://[^\n]*+|#[^\n]*+|/\*.{0,200}?\*/))?)\s*+"
    r"(?:,\s*+(?=[^\s\d])|\}(?!\s*[\w.])|[\"'“][^\W\d][^\"'\n,:]{0,80}[\"'”]\s*+:)"
)


@lru_cache(maxsize=1024)
def _mention(key: str) -> re.Pattern[str]:
    """Match a key and its value: `"a": 0.9`, `'a': '90%'`, `"a": {"score": 0.9`, `"name": "a", "score": pass`."""
    return re.compile(
        rf"(?<![^\W_]){_QUOTE}{re.escape(key)}{_QUOTE}\s*+(?::\s*+(?>(?:\{{{_CRITERION})?)|,{_CRITERION})"
        rf"(?>(?P<quote>[\"'“])?)\s*+(?P<given>{_NUMBER}|[^\W\d]++(?:[ _-][^\W\d]++){{0,2}})(?(quote)[\"'”]|)"
    )


def _check_evidence(found: Found, reading: _ObjectContent, values: Mapping[str, Any], *, known: bool) -> None:
    """Check that each score of an answer that is not JSON occurs in it once, after its key and before a delimiter.

    A repair may turn `0.85` into `0.8`, or assign one key the number of another, so the text decides.
    """
    for key, value in values.items():
        mentions = _mention(reading.name_of_key[key]).finditer(found.text)
        given = [mention["given"] for mention in mentions if _DELIMITER.match(found.text, mention.end())]
        numbers = {number for one in given if (number := number_of(one)) is not None}
        if numbers - {value}:
            raise _two_scores(key)
        if not numbers and str(value).lower() not in [one.lower() for one in given]:
            unclear = Refusal(f"score {shorten(value)} of {shorten(key)} is unclear", "a score is unclear")
            raise Refusal("cut off inside the scores") if found.cut_off else unclear
    # If the keys are unknown, only text after the scores shows that they were complete.
    if found.cut_off and not known and not (reading.texts and list(reading.texts.values())[-1]):
        raise Refusal("cut off inside the scores")


def _check_scores_come_first(found: Found, reading: _ObjectContent, *, known: bool) -> None:
    """Check, after a repair lost the end of a string, that no string precedes a score: it may quote a score.

    `{"a_score": 0.8, "summary": "It sent {"x": 1}."}` keeps its score and loses its summary. If the keys are unknown, a
    score may have been lost with the string.
    """
    names = reading.name_of_key.values()
    last = max(mention.start() for name in names for mention in _mention(name).finditer(found.text))
    if not known or re.search(r":\s*+[\"'“]", found.text[:last]):
        raise Refusal("repairing it would lose text")


# 0.35, .5, 1.0, 35 % and the 3 of `quality: 3`, but not the 0.0 and the 1.0 of "from 0.0 to 1.0"
_NUMBER_AROUND = re.compile(
    r"(?<![\w.,])(?<!to )(?:0?\.\d++|1\.0++|\d{1,3} ?%)(?!\d|\s*+(?:to|-|–)\s*+1)|(?<=[:：=])[\"'“*` ]{0,4}\d[\d.]*+"
)
# Words with which a judge calls its answer a draft or an example, refuses to judge, or changes its mind without giving
# another number.
_DRAFT = re.compile(
    r"\b(?:wait|actually|correct(?:ion|ed)|reconsider|revis|mistake|instead|draft|guess|perhaps|maybe|tentative|initial"
    r"|let me|should (?:be|have)|too (?:low|high|harsh|lenient|generous|strict)|second thought|hypothetical|template"
    r"|placeholder|swapped|refuse to|(?:ignore|disregard) (?:the|my|this|that)|examples? (?:of|for|only|answer|output)"
    r"|I(?: am|['’]m) (?:unable|not able)|(?:I|we) (?:can ?not|can['’]t|could not|won['’]t|will not|do not|don['’]t)"
    r" (?:\w+ )?(?:judge|evaluate|assess|rate|score|grade|determine|know))"
    r"|等等|更正|修正|改为|不对|无法|不能评|示例|模板|Korrektur|correcci|无效",
    re.IGNORECASE,
)


def _check_surroundings(found: Found, values: Mapping[str, Any]) -> None:
    """Check that the judge's text around its answer does not contradict it."""
    around = f"{found.before}\n{found.after}"
    if has_thought(around) or _DRAFT.search(around):
        raise Refusal("the text around the answer may change it")
    if {number_of(number.strip("\"'“*` .")) for number in _NUMBER_AROUND.findall(around)} - {*values.values()}:
        raise Refusal("the text around the answer has another number")
    if found.after.rstrip()[-1:].isalnum():
        raise Refusal("cut off after the answer, which may have been a draft")


def _is_inside_a_line(found: Found) -> bool:
    """Whether an object is inside a line of text rather than being the answer: ``Perhaps `{"a_score": 0.3}`.``"""
    line, follows = found.before.rpartition("\n")[2], found.after.partition("\n")[0]
    introduced = "fenced" in found.repairs or not re.search(r"\w", line) or line.rstrip(" \t*_`").endswith((":", "："))
    in_backticks = found.before.endswith("`") and "prose around the answer" in found.repairs
    return bool(re.search(r"[\w,]", follows)) or not introduced or in_backticks


# --- the texts ----------------------------------------------------------------------------------------------------


def _as_json(values: Mapping[str, Any], texts: dict[str, Any]) -> dict[str, Any]:
    """Return the texts after a round trip through JSON: Python's parser accepts more numbers and characters."""
    import orjson

    try:
        plain: dict[str, Any] = orjson.loads(orjson.dumps([texts, list(values)]))[0]
    except (orjson.JSONEncodeError, orjson.JSONDecodeError) as error:
        raise Refusal(f"cannot be written as JSON ({error})", "cannot be written as JSON") from error
    return plain


# The end of a sentence: "word." "word)." "word!" before a space or the end, or a Chinese full stop.
_SENTENCE = re.compile(r"""\w[)"'”’\]]*(?:[.!?]["')\]”’]*(?=\s|\Z)|[。！？]["')\]”’]*)""")


def _complete_sentences(value: Any) -> Any:
    """Shorten a value whose last string was cut off to its last complete sentence; None if nothing is left.

    A judge trained on incomplete sentences would learn to stop in the middle of one.
    """
    if isinstance(value, str):
        return value[: max((sentence.end() for sentence in _SENTENCE.finditer(value)), default=0)] or None
    if not isinstance(value, dict | list) or not value:
        return value
    *members, (key, last) = value.items() if isinstance(value, dict) else enumerate(value)
    kept = _complete_sentences(last)
    members += [] if kept is None else [(key, kept)]
    return (dict(members) if isinstance(value, dict) else [item for _, item in members]) or None
