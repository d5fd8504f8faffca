"""Find the JSON objects in a judge's text.

About four in ten answers of judges are not valid JSON: they have fences, prose, thoughts or unescaped quotes, or were
cut off. `find_objects` parses what is JSON, passes the rest to json-repair, and lists the repairs. It does not handle
scores: `prmkit.verdict.read` decides which object is the verdict, and verifies its scores.
"""

import json
import re
from typing import Any, NamedTuple, NoReturn

_LONGEST_ANSWER = 200_000
"""Characters. Longer answers are rejected unread: no judge writes that much."""
_MOST_WORK = 400_000
"""Limit on characters * (50 + brackets) for json-repair: 8,000 characters, or 4,000 with 50 brackets.

json-repair may reread the complete text at each bracket, and takes minutes for `]{` repeated. Within this limit it
takes less than a second. Unlike a time limit, this limit has the same result on every machine.
"""
_STOPS = re.compile(r"[{}\[\](“]|/\*")  # where json-repair looks ahead
_MOST_OBJECTS = 60


class Found(NamedTuple):
    """One object in an answer."""

    value: Any
    text: str  # the text from which the value was read
    before: str  # the text before it, without thoughts, fences and tags
    after: str  # the text after it
    repairs: tuple[str, ...]  # the repairs applied; empty for an answer that was JSON already
    exact: bool = True  # whether it is JSON, so that it is certain which number belongs to which key
    cut_off: bool = False
    texts_lost: bool = False  # whether the repair dropped or split a string: then only a verified score may be used


class Refusal(Exception):
    """An answer that cannot be read: the reason with its details, and the kind, by which rejections are counted."""

    def __init__(self, reason: str, kind: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.kind = kind or reason


def find_objects(text: str) -> list[Found]:
    """Return the objects of an answer, in order. The first that is not JSON is repaired, and reading stops after it.

    Raises:
        Refusal: the answer is empty, too long or unreadable.
    """
    text = text.strip().lstrip("\ufeff").lstrip()
    if not text:
        raise Refusal("empty answer")
    if len(text) > _LONGEST_ANSWER:
        raise Refusal(f"longer than {_LONGEST_ANSWER:,} characters")
    try:
        decoded = _decode(text, 0)
        if decoded and decoded[1] == len(text):
            return [Found(decoded[0], text, "", "", decoded[2])]
        return _objects_in(*_without_thoughts(text))
    except RecursionError as error:
        raise Refusal("nested too deeply") from error


def _decode(text: str, start: int) -> tuple[Any, int, tuple[str, ...]] | None:
    """Return the JSON value at a position, its end, and the repairs made to read it; None if it is not JSON."""
    for decoder, repairs in _DECODERS:
        try:
            return (*decoder.raw_decode(text, start), repairs)
        except ValueError:
            continue
    return None


def _reject_constant(name: str) -> NoReturn:
    raise Refusal(f"{name} is not a JSON number")


def unique_members(members: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object. Parsers silently keep the last of two equal keys, so different values are rejected here."""
    value = dict(members)
    for key, item in members if len(value) < len(members) else ():
        if item != value[key]:
            raise Refusal(f"two different values for {shorten(key)}", "two different values for one key")
    return value


# strict=False allows raw newlines and tabs in strings, the most common error of judges, and changes nothing else.
_DECODERS = [
    (json.JSONDecoder(strict=strict, parse_constant=_reject_constant, object_pairs_hook=unique_members), repairs)
    for strict, repairs in ((True, ()), (False, ("control characters in a string",)))
]


def shorten(value: Any) -> str:
    """Shorten a value for a reason."""
    shown = str(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."


# --- thoughts -----------------------------------------------------------------------------------------------------

# Model families keep adding tags, so every tag opens a thought unless it is known to contain an answer:
# <think>, <seed:think>, <think budget="low">, <|channel|>, <|channel>, [THINK], ◁think▷, 【思考】.
_OPENING = re.compile(
    r"(?:<\|?|[◁【＜]|\[(?=[A-Z_ ]{3,30}\]|(?i:think|reason|thought)))(?P<name>[^\W\d][\w:▁ -]{0,40}?)"
    r"(?:\s[^<>{}]{0,80})?\|?[>\]▷】＞]"
)
# </think>, <|end_of_thought|>, <|END_THINKING|>, [/THINK], ◁/think▷, and those of gpt-oss, Gemma and MedGemma; only
# before a newline or the answer, because a tag within a sentence is quoted.
_CLOSING = re.compile(
    r"(?:[<\[◁【＜]\|?(?:/|end_(?:of_)?)(?P<name>[^\W\d][\w:]{0,40})\|?[>\]▷】＞]"
    r"|<\|channel\|>final\b[^{}]{0,60}?<\|message\|>|<channel\|>|<unused95>)"
    r"(?=\s*+(?:[\[{<]|```)|[ \t]*+(?:\n|\r|\Z))",
    re.IGNORECASE,
)
# <answer>, <final_answer>, <|begin_of_box|>, <|im_start|>, <|start_header_id|>, [OUTPUT]
_HOLDS_AN_ANSWER = re.compile(
    r"(?:begin_of_|start_)?(?:final[_ ]?)?(?:answer|output|json|result|verdict|evaluation|response|final|solution|box"
    r"|assistant|message|assessment|judg\w+|scores?|start|end|im_start|im_end|header_id|s)",
    re.IGNORECASE,
)
_ANSWER_TAG = re.compile(rf"</?(?:{_HOLDS_AN_ANSWER.pattern})>|<\|\w{{1,30}}\|>", re.IGNORECASE)


def _without_thoughts(text: str) -> tuple[str, tuple[str, ...]]:
    """Return the text after its last thought, and the repairs.

    Raises:
        Refusal: a thought is never closed before the first object, so the answer was cut off inside it.
    """
    ends = [end.end() for end in _CLOSING.finditer(text) if not _HOLDS_AN_ANSWER.fullmatch(end["name"] or "thought")]
    answer = text[ends[-1] :].strip() if ends else text
    if not answer:
        raise Refusal("no answer after the thought")
    brace = _OBJECT.search(answer)
    if has_thought(answer[: brace.start()] if brace else answer):
        raise Refusal("cut off before the first score")
    return answer, ("thought before the answer",) if ends else ()


def has_thought(prose: str) -> bool:
    """Whether a tag in the prose opens, or may open, a thought."""
    return not all(_HOLDS_AN_ANSWER.fullmatch(marker["name"].strip()) for marker in _OPENING.finditer(prose))


# --- objects within prose -----------------------------------------------------------------------------------------

# A brace before a key, or a list before a brace: {"a": 1}, {“a”: 1}, {'a': 1}, {a: 1}, {// note, [{"a": 1}]; or a brace
# after which the answer was cut off. Not the braces of \frac{1}{2}.
_OBJECT = re.compile(r"""[{｛]\s*+(?:["'“”„「『«/#]|\w++\s*+:|\Z)|\[\s*+\{""")
_FENCE = re.compile(r"```[\w-]*+\s*+\Z")  # ```json before an object


# What follows a brace that closes too early: {"scores": {"a": 0.8}}, "summary": "…"}
_CONTINUES = re.compile(r'\s*+,\s*+"[^"\n]{1,80}"\s*+:')


def _objects_in(text: str, repairs: tuple[str, ...]) -> list[Found]:
    found, position = list[Found](), 0
    while brace := _OBJECT.search(text, position):
        start = brace.start()
        if len(found) == _MOST_OBJECTS:
            raise Refusal(f"more than {_MOST_OBJECTS} objects")
        decoded = _decode(text, start)
        if not decoded or _CONTINUES.match(text, decoded[1]):
            return [*found, _repaired(_found(None, text, start, _end_of_object(text, start), repairs))]
        value, position, controls = decoded
        found.append(_found(value, text, start, position, (*repairs, *controls)))
    return found


def _found(value: Any, text: str, start: int, end: int, repairs: tuple[str, ...]) -> Found:
    before, after = _ANSWER_TAG.sub("", text[:start]), _ANSWER_TAG.sub("", text[end:])
    if fence := _FENCE.search(before):
        before, after = before[: fence.start()], after.replace("```", "", 1)
        repairs = ("fenced", *repairs)
    if re.search(r"\w", before + after):
        repairs = (*repairs, "prose around the answer")
    return Found(value, text[start:end], before, after, repairs)


def _end_of_object(text: str, start: int) -> int:
    """Find the end of an object that is not JSON: its fence, or the last brace if only prose follows."""
    if _FENCE.search(text[:start]) and (fence := text.rfind("```", start)) > 0:
        return len(text[:fence].rstrip())
    end = max(text.rfind("}"), text.rfind("｝")) + 1
    is_complete = end > start and text.count("{", start) <= text.count("}", start) and '"' not in text[end:]
    return end if is_complete else len(text)


# --- objects that are not JSON ------------------------------------------------------------------------------------


def _repaired(found: Found) -> Found:
    """Let json-repair parse an object that is not JSON."""
    import json_repair

    text = _with_plain_punctuation(found.text)
    if len(text) * (50 + len(_STOPS.findall(text))) > _MOST_WORK:
        raise Refusal("not JSON, and too long to be repaired")
    cut_off = text[-1] not in "}]" or text.count("{") > text.count("}")
    try:
        value = json_repair.loads(text, skip_json_loads=True)
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:  # for some random texts
        raise Refusal("cannot be repaired") from error
    # Dropped text, or a string that was split: {"s": "It sent {"x": 1, "y": 2}."} would lose the inner closing brace.
    lost = _content_size(_COMMENT.sub("", text)) - _content_size(json.dumps(value, ensure_ascii=False))
    if cut_off and lost > _LONGEST_KEY:
        raise Refusal("repairing it would lose text")
    repairs = (*found.repairs, "cut off" if cut_off else "syntax")
    texts_lost = lost > 0 and not cut_off
    return Found(value, text, found.before, found.after, repairs, exact=False, cut_off=cut_off, texts_lost=texts_lost)


_LONGEST_KEY = 80
"""The maximum number of letters that json-repair may drop if an answer was cut off inside a key."""
# `// note`, `# note`, `/* note */`. A URL in a string also counts as a comment: then less is checked, but no valid
# answer is rejected.
_COMMENT = re.compile(r"(?://|#)[^\n]*|/\*.{0,500}?\*/", re.DOTALL)
_COUNTED = re.compile(r"[^\W\d_]+|[{}\[\]]+")
_ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{4}|.)", re.DOTALL)


def _content_size(text: str) -> int:
    """Count the letters and brackets of a text."""
    return sum(map(len, _COUNTED.findall(_ESCAPE.sub("", text))))


_QUOTES = str.maketrans(dict.fromkeys("“”„‟«»「」『』＂", '"'))
_BRACKETS = str.maketrans("｛｝［］\u3000\u00a0", "{}[]  ")
_COLON = re.compile(r'(?<=")\s*+：')
_COMMA = re.compile(r'(?<=["\d}\]])\s*+，(?=\s*+["“])')


def _with_plain_punctuation(text: str) -> str:
    """Return the text with its punctuation in ASCII: `｛“a_score”：0.85，“summary”：“好”｝`."""
    plain = text.translate(_BRACKETS)
    plain = plain if '"' in plain else plain.translate(_QUOTES)
    return _COMMA.sub(",", _COLON.sub(":", plain))
