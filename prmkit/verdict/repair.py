"""From a judge's text to the JSON object in it.

About four in ten judges' answers are not valid JSON. `find_objects` offers what the text may mean, the surest reading
first, and says what had to be mended. It knows nothing of scores; `prmkit.verdict` decides what to make of an object.
"""

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

import orjson

LONGEST_ANSWER = 200_000
"""Characters. Longer answers are refused unread: no judge writes them."""
_LONGEST_REPAIRED = 30_000
"""Characters. json-repair takes seconds for longer ones, and minutes for some that are made to hurt it."""
_MOST_MENDED = 60
"""Places in one answer. With more faults than that it is left to json-repair."""

CUT_OFF = "cut off"


class Found(NamedTuple):
    """One reading of an answer."""

    value: dict[str, Any]
    text: str
    """What the value was read from: from its first brace on, as the judge wrote it."""
    rest: str
    """What stands behind the value."""
    repairs: tuple[str, ...]
    """What was done to make JSON of it; empty for an answer that was JSON as it stood."""


class Refusal(Exception):
    """An answer that cannot be read.

    Args:
        reason: why this one.
        kind: why answers like this one; they are counted by it. The reason itself when left out.
    """

    def __init__(self, reason: str, kind: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.kind = kind or reason


def find_objects(text: str) -> Iterator[Found]:
    """The readings of an answer, the surest one first.

    Takes JSON as it stands; else the JSON in a Markdown fence or between prose, its ordinary faults mended where the
    parser stops; else what `json-repair` makes of it. No reading at all: there is no object in it.

    Raises:
        Refusal: there is nothing to read, or nothing that can be.
    """
    text = text.strip().lstrip("\ufeff").lstrip()
    if not text:
        raise Refusal("empty answer")
    if len(text) > LONGEST_ANSWER:
        raise Refusal(f"longer than {LONGEST_ANSWER:,} characters")
    repairs: tuple[str, ...] = ()
    if ("\\f" in text or "\\b" in text) and _NO_ESCAPE.search(text):
        text, repairs = _NO_ESCAPE.sub(r"\1\\\\\2", text), ("stray backslash",)
    try:
        answer = orjson.loads(text)
    except orjson.JSONDecodeError:
        yield from _taken_apart(text, repairs)
        return
    if isinstance(answer, list) and len(answer) == 1 and isinstance(answer[0], dict):
        yield Found(answer[0], text, "", (*repairs, "list around the object"))
    elif isinstance(answer, dict):
        yield Found(answer, text, "", repairs)


# Judges who write \\frac or \\beta mean no form feed and no backspace.
_NO_ESCAPE = re.compile(r"(?<!\\)((?:\\\\)*)\\([fb])(?=[A-Za-z])")


def _taken_apart(text: str, repairs: tuple[str, ...]) -> Iterator[Found]:
    """The readings of an answer that is not JSON as a whole: of what is in the fence first, then of what is outside."""
    text, thought = _without_thought(text)
    repairs += thought
    if text == "{":
        raise Refusal(_TOO_EARLY)
    if text.startswith(("{", "[")) or not (fence := _FENCE.search(text)):
        yield from _readings(text, repairs)
        return
    end = text.rfind("```", fence.end())
    inside, behind = (text[fence.end() : end], text[end + 3 :]) if end >= 0 else (text[fence.end() :], "")
    outside = f"{text[: fence.start()]}\n{behind}"
    for found in _readings(inside, (*repairs, "fenced")):
        yield found._replace(rest=f"{found.rest}\n{outside}")
    yield from _readings(outside, repairs)


def _readings(text: str, repairs: tuple[str, ...]) -> Iterator[Found]:
    """The readings of a text from its first object on."""
    start = _OBJECT.search(text)
    if not start:
        return
    before, text = text[: start.start()], text[start.start() :].rstrip()
    if _SCORES_BEFORE.search(before):
        raise Refusal("the scores stand in no object")
    if before.strip(" \t\r\n["):
        repairs = (*repairs, "prose around the answer")
    value = _as_json(text)
    if isinstance(value, dict):
        yield Found(value, text, "", repairs)
        return
    mended = _mend_where_the_parser_stops(text)
    if mended:
        value, rest, done = mended
        around = ("prose around the answer",) if rest.strip(" \t\r\n`]") else ()
        if isinstance(value, dict):
            yield Found(value, text, rest, each_once(*repairs, *around, *done))
            for other, end in objects_in(rest):
                yield Found(other, rest[:end], rest[end:], each_once(*repairs, *around))
    yield from _repaired(text, repairs)


def _repaired(text: str, repairs: tuple[str, ...]) -> Iterator[Found]:
    """What json-repair makes of a text; of several objects each one, with the others as its rest."""
    value = _repair(text)
    objects = [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, dict)]
    for number, item in enumerate(objects):
        others = objects[:number] + objects[number + 1 :]
        rest = "\n".join(json.dumps(other, ensure_ascii=False) for other in others)
        if not _looks_cut_off(text):
            yield Found(item, text, rest, (*repairs, "syntax"))
        else:
            half = text[-1] not in "\"'}]"
            yield Found(_whole_sentences(item) or {} if half else item, text, rest, (*repairs, CUT_OFF))


def each_once(*repairs: str) -> tuple[str, ...]:
    """The repairs in their order, each one named once."""
    return tuple(dict.fromkeys(repairs))


# --- what stands around the object --------------------------------------------------------------------------------

# Possessive, or a fence and 40,000 blanks would take a quarter of a minute.
_FENCE = re.compile(r"```[a-zA-Z0-9]*+[ \t]*+\r?\n?(?=\s*+[\[{])")
# A brace that begins an object rather than a thought in braces.
_OBJECT = re.compile(r"\{\s*+(?:[\"'“}/#]|\w+\s*+:)")
_SCORES_BEFORE = re.compile(r"""scores["'”]\W{0,9}:\s*\Z""", re.IGNORECASE)
"""Right before an object: it is the scores alone, and what holds it was not taken for an object."""
_THOUGHT = re.compile(r"<(think|thinking|thought|reasoning)>")
# Where a thought ends; a summary that quotes the tag goes on behind it.
_THOUGHT_END = re.compile(r"</(?:think|thinking|thought|reasoning)>(?=\s*+(?:[\[{]|```)|[ \t]*+(?:\r?\n|\Z))")
_TOO_EARLY = "cut off before the first score"


def _without_thought(text: str) -> tuple[str, tuple[str, ...]]:
    """The text behind the judge's thought, if it begins with one, and what was taken off.

    Templates put the first tag of a thought into the prompt, so an answer may hold the last one alone.
    """
    opened = _THOUGHT.match(text)
    if not opened and text.startswith(("{", "[", "```")):
        return text, ()
    end = _THOUGHT_END.search(text)
    if end:
        return text[end.end() :].strip(), ("thought before the answer",)
    if not opened:
        return text, ()
    _, closed, behind = text.partition(f"</{opened.group(1)}>")
    if not closed:
        raise Refusal(_TOO_EARLY)
    return behind.strip(), ("thought before the answer",)


def objects_in(text: str) -> Iterator[tuple[dict[str, Any], int]]:
    """The JSON objects that a text contains, one behind the other, and where each ends."""
    position, failures = text.find("{"), 0
    while position >= 0 and failures < _MOST_MENDED:
        try:
            value, end = _LENIENT.raw_decode(text, position)
        except (ValueError, RecursionError):
            end = position + 1
            failures += 1
        else:
            yield value, end
        position = text.find("{", end)


# --- ordinary faults ----------------------------------------------------------------------------------------------


def _refuse_constant(name: str) -> NoReturn:
    raise Refusal(f"{name} is not a JSON number")


# strict=False admits raw newlines and tabs inside strings, the commonest fault of judges, and changes nothing else.
_LENIENT = json.JSONDecoder(strict=False, parse_constant=_refuse_constant)


def _mend_where_the_parser_stops(text: str) -> tuple[Any, str, list[str]] | None:
    """Mend the ordinary faults of judges, each at the place where a strict parser stops.

    json-repair mends these too, but takes 6 ms an answer, which would be most of a conversion's time; this takes 0.05.

    Returns:
        The value, what stands behind it, and what was done; None when this is not enough.
    """
    done: list[str] = []
    for _ in range(_MOST_MENDED):
        try:
            value, end = _LENIENT.raw_decode(text)
        except json.JSONDecodeError as error:
            mended = _mend_at(text, error)
            if mended is None:
                return None
            text, what = mended
            done.append(what)
        except (RecursionError, ValueError):  # nested too deeply; a number of more than 4,300 digits
            return None
        else:
            if _GOES_ON.match(text, end):
                text = text[: end - 1] + text[end:]
                done.append("brace that closes too early")
                continue
            if "quotes in a string" in done and _is_inside(text[end:]):
                raise Refusal("unclear where the answer ends")
            if not done and (end == len(text) or _as_json(text[:end]) is None):
                done.append("control characters in a string")
            return value, text[end:], done
    return None


_GOES_ON = re.compile(r'\s*+,\s*+"[^"\n]{1,80}"\s*+:')


def _is_inside(rest: str) -> bool:
    """Whether a text stands inside of an object: then the brace before it was a quoted one."""
    return '"' in rest and rest.count("}") > rest.count("{")


def _as_json(text: str) -> Any:
    """The value of a text that is strict JSON; None for another one."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return None


_CLOSED_BEFORE = re.compile(r'"[\s,]*\Z')
_CLOSES_HERE = re.compile(r'"\s*[,}\]]')
_KEY_HERE = re.compile(r'"[^"\n]{1,80}"\s*:')
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/|#(?!\d)[^\n]*", re.DOTALL)
_BEHIND_COMMENT = re.compile(r'\s*+(?:[,}\]]|"[^"\n]{1,80}"\s*+:)')
_ENDS_A_STRING = re.compile(r'"\s*,?\s*\Z')
_SENTENCE = re.compile(r"""\w[)"'”’\]]*(?:[.!?]["')\]”’]*(?=\s|\Z)|[。！？]["')\]”’]*)""")
_LONGEST_QUOTED = 2_000
"""Characters of JSON that a judge quotes in a text."""


def _mend_at(text: str, error: json.JSONDecodeError) -> tuple[str, str] | None:
    """Mend one fault; the text and what was done, or None where the fault is none of the ordinary ones."""
    before, behind = text[: error.pos], text[error.pos :]
    if error.msg.startswith("Invalid \\"):
        slash = text.rfind("\\", 0, error.pos + 2)
        rest = text[slash + 1 :]
        return text[:slash] + (rest if rest.startswith("'") else "\\\\" + rest), "stray backslash"
    if error.msg.startswith("Unterminated string"):
        return _without_half_sentence(text, error.pos + 1), CUT_OFF
    if not behind.strip():
        # The parser ran out of text where a member ends: the object is to be closed.
        return None if before.rstrip().endswith((":", "{")) else (before.rstrip().rstrip(",") + "}", CUT_OFF)
    if (comment := _COMMENT.match(behind)) and _is_comment(comment.group(), behind[comment.end() :], error):
        return before + behind[comment.end() :], "comment"
    if behind[0] in "}]" and before.rstrip().endswith(","):
        return before.rstrip()[:-1] + behind, "trailing comma"
    if not error.msg.startswith(("Expecting ',' delimiter", "Expecting property name")):
        return None
    if _KEY_HERE.match(behind) and not before[-1:].isalnum():
        return before.rstrip() + "," + behind, "missing comma"
    closed = _CLOSED_BEFORE.search(before)
    if closed and (behind[0] != '"' or _CLOSES_HERE.match(behind)):
        # What follows is no JSON, so the quote before did not end its string: it belongs to it.
        return _with_quotes_escaped(text, closed.start()), "quotes in a string"
    return None


def _is_comment(comment: str, behind: str, error: json.JSONDecodeError) -> bool:
    """Whether what looks like a comment is one: `He ranked "X" // "Y" in the list.",` is a text with quotes."""
    if error.msg.startswith("Expecting value"):
        return True
    return bool(_BEHIND_COMMENT.match(behind)) and not _ENDS_A_STRING.search(comment)


def _with_quotes_escaped(text: str, quote: int) -> str:
    """Escape a quote; where it stands behind a brace the text quotes JSON, and all quotes up to its end are escaped."""
    start = len(text[:quote].rstrip()) - 1
    end = _closing(text, start) if text[start] in _CLOSING else quote
    quoted = re.sub(r'(?<!\\)"', r'\\"', text[quote : end + 1])
    return text[:quote] + quoted + text[end + 1 :]


_CLOSING = {"{": "}", "[": "]"}


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` is closed; right behind it when it is not."""
    opening, closing, depth = text[start], _CLOSING[text[start]], 0
    for place, character in enumerate(text[start : start + _LONGEST_QUOTED], start):
        depth += (character == opening) - (character == closing)
        if depth == 0:
            return place
    return start + 1


def _without_half_sentence(text: str, start: int) -> str:
    """Cut off behind its last whole sentence the string that begins at `start` and never ends; the member without one.

    A judge that is trained on half sentences learns to stop in the middle.
    """
    ends = [sentence.end() for sentence in _SENTENCE.finditer(text, start)]
    if ends:
        return text[: ends[-1]] + '"'
    kept = _LAST_MEMBER.sub("", text[: start - 1])
    while kept.endswith("{") and kept != "{":
        kept = _LAST_MEMBER.sub("", kept[:-1])
    return kept


_LAST_MEMBER = re.compile(r',?\s*+(?:"[^"\n]{1,80}"\s*+:\s*+)?\Z')


# --- everything else ----------------------------------------------------------------------------------------------


def _repair(text: str) -> Any:
    import json_repair

    if len(text) > _LONGEST_REPAIRED:
        raise Refusal(f"not JSON, and longer than {_LONGEST_REPAIRED:,} characters")
    try:
        return json_repair.loads(text, skip_json_loads=True)
    except (RecursionError, ValueError) as error:
        raise Refusal("nested too deeply") from error
    except (AssertionError, LookupError, TypeError, AttributeError) as error:
        raise Refusal("not to be repaired") from error


def _whole_sentences(value: Any) -> Any:
    """A value whose last text was cut off, with whole sentences alone; None where nothing is left of it."""
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


_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)


def _looks_cut_off(text: str) -> bool:
    """Whether the text stops in the middle: a brace is still open, or behind the last one there is more than prose."""
    behind = text[text.rfind("}") + 1 :]
    outside = _STRING.sub("", text)
    return "}" not in text or '"' in behind or outside.count("{") > outside.count("}")
