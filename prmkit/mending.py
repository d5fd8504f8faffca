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
    parser stops; else what `json-repair` makes of it.

    Raises:
        Refusal: there is nothing to read, or nothing that can be.
    """
    text = text.strip().lstrip("\ufeff").lstrip()
    if not text:
        raise Refusal("empty answer")
    if len(text) > LONGEST_ANSWER:
        raise Refusal(f"longer than {LONGEST_ANSWER:,} characters")
    try:
        answer = orjson.loads(text)
    except orjson.JSONDecodeError:
        yield from _readings(*_unwrap(text))
        return
    if isinstance(answer, list) and len(answer) == 1 and isinstance(answer[0], dict):
        yield Found(answer[0], text, "", ("list around the object",))
    elif isinstance(answer, dict):
        yield Found(answer, text, "", ())


def _readings(text: str, unwrapped: tuple[str, ...]) -> Iterator[Found]:
    value = _as_json(text)
    if isinstance(value, dict):
        yield Found(value, text, "", unwrapped)
        return
    mended = _mend_where_the_parser_stops(text)
    if mended:
        value, rest, repairs = mended
        around = ("prose around the answer",) if rest.strip(" \t\r\n`]") else ()
        if isinstance(value, dict):
            yield Found(value, text, rest, tuple(dict.fromkeys((*unwrapped, *around, *repairs))))
            for other, end in objects_in(rest):
                yield Found(other, rest[:end], rest[end:], tuple(dict.fromkeys((*unwrapped, *around))))
    repaired = _repair(text)
    if isinstance(repaired, list):
        repaired = next((item for item in repaired if isinstance(item, dict)), None)
    if isinstance(repaired, dict):
        yield Found(repaired, text, "", (*unwrapped, CUT_OFF if _looks_cut_off(text) else "syntax"))


# --- what stands around the object --------------------------------------------------------------------------------

_FENCE = re.compile(r"```[a-zA-Z0-9]*[ \t]*\r?\n?(?=\s*[\[{])")
# A brace that begins an object rather than a thought in braces.
_OBJECT = re.compile(r"\{\s*(?:[\"'“}/#]|\w+\s*:)")
_THOUGHT, _THOUGHT_END = "<think>", "</think>"


def _unwrap(text: str) -> tuple[str, tuple[str, ...]]:
    """The text from the object's brace on, without thought and fence; and what was taken off."""
    repairs = []
    if not text.startswith(("{", "[", "```")) and _THOUGHT_END in text:
        text = text[text.index(_THOUGHT_END) + len(_THOUGHT_END) :]
        repairs.append("thought before the answer")
    elif text.startswith(_THOUGHT):
        raise Refusal("cut off before the first score")
    if fence := _FENCE.search(text):
        text = text[fence.end() :]
        text = text[:end] if (end := text.rfind("```")) >= 0 else text
        repairs.append("fenced")
    start = _OBJECT.search(text)
    if not start:
        raise Refusal("cut off before the first score" if text.strip() == "{" else "no JSON object")
    if text[: start.start()].strip(" \t\r\n["):
        repairs.append("prose around the answer")
    return text[start.start() :].rstrip(), tuple(repairs)


def objects_in(text: str) -> Iterator[tuple[dict[str, Any], int]]:
    """All JSON objects that a text contains, one behind the other, and where each ends."""
    position = text.find("{")
    while position >= 0:
        try:
            value, end = _LENIENT.raw_decode(text, position)
        except (ValueError, RecursionError):
            end = position + 1
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
            if not done and (end == len(text) or _as_json(text[:end]) is None):
                done.append("control characters in a string")
            return value, text[end:], done
    return None


def _as_json(text: str) -> Any:
    """The value of a text that is strict JSON; None for another one."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return None


_CLOSED_BEFORE = re.compile(r'"[\s,]*\Z')
_CLOSES_HERE = re.compile(r'"\s*[,}\]]')
_KEY_HERE = re.compile(r'"[^"\n]{1,80}"\s*:')
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/|#[^\n]*", re.DOTALL)


def _mend_at(text: str, error: json.JSONDecodeError) -> tuple[str, str] | None:
    """Mend one fault; the text and what was done, or None where the fault is none of the ordinary ones."""
    before, behind = text[: error.pos], text[error.pos :]
    if error.msg.startswith("Invalid \\"):
        slash = text.rfind("\\", 0, error.pos + 2)
        return text[:slash] + "\\" + text[slash:], "stray backslash"
    if error.msg.startswith("Unterminated string"):
        return text + ("\\" if text.endswith("\\") and not text.endswith("\\\\") else "") + '"', CUT_OFF
    if not behind.strip():
        # The parser ran out of text where a member ends: the object is to be closed.
        return None if before.rstrip().endswith((":", "{")) else (before.rstrip().rstrip(",") + "}", CUT_OFF)
    if comment := _COMMENT.match(behind):
        return before + behind[comment.end() :], "comment"
    if behind[0] in "}]" and before.rstrip().endswith(","):
        return before.rstrip()[:-1] + behind, "trailing comma"
    if not error.msg.startswith(("Expecting ',' delimiter", "Expecting property name")):
        return None
    if _KEY_HERE.match(behind):
        return before.rstrip() + "," + behind, "missing comma"
    closed = _CLOSED_BEFORE.search(before)
    if closed and (behind[0] != '"' or _CLOSES_HERE.match(behind)):
        # What follows is no JSON, so the quote before did not end its string: it belongs to it.
        return text[: closed.start()] + "\\" + text[closed.start() :], "quotes in a string"
    return None


# --- everything else ----------------------------------------------------------------------------------------------


def _repair(text: str) -> Any:
    import json_repair

    if len(text) > _LONGEST_REPAIRED:
        raise Refusal(f"not JSON, and longer than {_LONGEST_REPAIRED:,} characters")
    try:
        return json_repair.loads(text, skip_json_loads=True)
    except (RecursionError, ValueError) as error:
        raise Refusal("nested too deeply") from error


_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)


def _looks_cut_off(text: str) -> bool:
    """Whether the text stops in the middle: a brace is still open, or behind the last one there is more than prose."""
    behind = text[text.rfind("}") + 1 :]
    outside = _STRING.sub("", text)
    return "}" not in text or '"' in behind or outside.count("{") > outside.count("}")
