"""From a judge's text to the JSON objects in it.

About four in ten answers of judges are not valid JSON: fences, prose, thoughts, unescaped quotes, answers that were cut
off. `find_json` finds what is JSON, `repair_objects` makes JSON of the rest, and both name what they did. They know
nothing about scores: `prmkit.verdict.read` decides which object is the verdict, and proves its scores.
"""

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

LONGEST_ANSWER = 200_000
"""Characters. Longer answers are rejected unread: no judge writes them."""
_LONGEST_REPAIRED = 20_000
"""Characters of an answer that is not JSON. json-repair copies its string for every character it adds to it."""
_MOST_READS = 400_000
"""Characters that json-repair may look at for one answer, about a third of a second. It looks ahead at every quote, so
some answers of a few thousand characters would take minutes. Unlike a clock, a count decides alike on every machine."""
_MOST_OBJECTS = 60
"""Braces of one answer at which an object is tried."""

CUT_OFF, SYNTAX = "cut off", "syntax"
_ANSWER_NAMES = (
    r"(?:begin_of_|start_)?(?:final[_ ]?)?(?:answer|output|json|result|verdict|evaluation|response|final|solution|box"
    r"|assistant|message|assessment|judg\w+|scores?|start|im_start|start_header_id|s|bos)"
)
"""Tags that hold an answer rather than a thought."""


class Found(NamedTuple):
    """One object in an answer."""

    value: Any
    text: str
    """The characters that the value was read from."""
    before: str
    after: str
    """What the judge wrote around it, without thoughts and fences."""
    repairs: tuple[str, ...]
    """What was done to make JSON of it; empty for an answer that already was."""

    @property
    def exact(self) -> bool:
        """The object is JSON as it is written, so it is certain which number belongs to which key."""
        return CUT_OFF not in self.repairs and SYNTAX not in self.repairs


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


class Broken(NamedTuple):
    """What is not JSON in an answer."""

    text: str
    starts: list[int]
    """The braces that begin no JSON."""
    repairs: tuple[str, ...]


def find_json(text: str) -> tuple[list[Found], Broken]:
    """The objects of an answer that are JSON as they are written, and what is left to be repaired.

    Raises:
        Refusal: there is nothing to read, or nothing that can be read.
    """
    text = text.strip().lstrip("\ufeff").lstrip()
    if not text:
        raise Refusal("empty answer")
    if len(text) > LONGEST_ANSWER:
        raise Refusal(f"longer than {LONGEST_ANSWER:,} characters")
    repairs: tuple[str, ...] = ()
    if ("\\f" in text or "\\b" in text) and _NOT_AN_ESCAPE.search(text):
        text, repairs = _NOT_AN_ESCAPE.sub(r"\1\\\\\2", text), ("stray backslash",)
    try:
        return [Found(_STRICT.decode(text), text, "", "", repairs)], Broken("", [], ())
    except ValueError:
        text, thoughts = _without_thoughts(text)
        return _objects_in(text, repairs + thoughts)
    except RecursionError as error:
        raise Refusal("nested too deeply") from error


# Judges who write \\frac or \\beta do not mean a form feed or a backspace.
_NOT_AN_ESCAPE = re.compile(r"(?<!\\)((?:\\\\)*)\\([fb])(?=[A-Za-z])")


# --- objects that are JSON, anywhere in the text ------------------------------------------------------------------


def _objects_in(text: str, repairs: tuple[str, ...]) -> tuple[list[Found], Broken]:
    position, found, broken = 0, list[Found](), list[int]()
    for _ in range(_MOST_OBJECTS):
        if not (brace := _OBJECT.search(text, position)):
            break
        start = brace.start()
        # A member of an object that is not JSON is not an answer by itself.
        inside = bool(broken and _MEMBER.search(text[max(broken[0], start - 40) : start]))
        try:
            value, position = _LENIENT.raw_decode(text, start)
        except (ValueError, RecursionError):
            value, position = None, start + 1
        if inside:
            continue
        if value is None or _CONTINUES.match(text, position):
            broken.append(start)
        else:
            found.append(_found(text, start, position, value, repairs))
    return found, Broken(text, broken[:_MOST_REPAIRED], repairs)


_MEMBER = re.compile(r"""(?:["'”」»＂]\s*+[:：]|[,，\[])\s*+\Z""")
_OBJECT = re.compile(r"""[{｛]\s*+(?:["'“”„‟«「『＂/#]|\w++\s*+:|\Z)|\[\s*+\{""")
# A brace that closes too early: the members of the object continue after it.
_CONTINUES = re.compile(r'\s*+,\s*+"[^"\n]{1,80}"\s*+:')
_MOST_REPAIRED = 3


def _found(text: str, start: int, end: int, value: Any, repairs: tuple[str, ...]) -> Found:
    before, after = _TAG.sub("", text[:start]), _TAG.sub("", text[end:])
    if fence := _FENCE.search(before):
        before, (_, _, after) = before[: fence.start()], after.partition("```")
        repairs = (*repairs, "fenced")
    if re.search(r"\w", before + after):
        repairs = (*repairs, "prose around the answer")
    return Found(value, text[start:end], before, after, _with_controls(text[start:end], repairs))


_FENCE = re.compile(r"```[\w-]*+\s*+\Z")
# Tags around an answer, and the special tokens that end one.
_TAG = re.compile(rf"</?(?:{_ANSWER_NAMES})>|<\|\w{{1,30}}\|>", re.IGNORECASE)


def _with_controls(text: str, repairs: tuple[str, ...]) -> tuple[str, ...]:
    if SYNTAX in repairs or CUT_OFF in repairs:
        return repairs
    try:
        _STRICT.decode(text)
    except ValueError:
        return (*repairs, "control characters in a string")
    return repairs


def _reject_constant(name: str) -> NoReturn:
    raise Refusal(f"{name} is not a JSON number")


def _without_duplicates(members: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; parsers keep the last of two equal keys silently, so two different values are rejected here."""
    value = dict(members)
    if len(value) < len(members):
        for key, item in members:
            if item != value[key]:
                shown = key if len(key) <= 40 else f"{key[:37]}..."
                raise Refusal(f"two different values for {shown}", "two different values for one key")
    return value


_STRICT = json.JSONDecoder(parse_constant=_reject_constant, object_pairs_hook=_without_duplicates)
# strict=False admits raw newlines and tabs inside strings, the commonest fault of judges, and changes nothing else.
_LENIENT = json.JSONDecoder(strict=False, parse_constant=_reject_constant, object_pairs_hook=_without_duplicates)


# --- thoughts -----------------------------------------------------------------------------------------------------

# Any marker that may open a thought: <think>, <seed:think>, <|channel|>, <|channel>, [THINK], ◁think▷, 【思考】. Model
# families keep adding names, so every name opens a thought unless it is known to hold an answer.
_OPENING = re.compile(
    r"<\|?(?!/|end|END)(?P<tag>[^\W\d][\w:▁ -]{1,40}?)(?:\s[^<>{}]{0,80})?\|?>"
    r"|\[(?P<bracket>[A-Z][A-Z_ ]{2,30}|(?i:think\w*|reason\w*|thought\w*))\]"
    r"|[◁【＜](?P<wide>[^\W\d][\w ]{1,20})[▷】＞]"
)
_HOLDS_AN_ANSWER = re.compile(_ANSWER_NAMES, re.IGNORECASE)
_CHANNELS = re.compile(r"<\|channel\|>final\b[^{}]{0,60}?<\|message\|>|<channel\|>")
# A closing marker without an opening one: chat templates put the opening one into the prompt.
_CLOSING = r"(?:<\|?|\[|[◁【＜])(?:/|end_?(?:of_)?)({name})(?:\|?>|\]|[▷】＞])"
_ANY_CLOSING = re.compile(_CLOSING.format(name=r"[\w:]*?(?:think|thought|reason|analysis|思考)\w*"), re.IGNORECASE)
_AT_THE_END = re.compile(r"\s*+(?:[\[{<]|```)|[ \t]*+(?:\r?\n|\Z)")
_MOST_THOUGHTS = 20


def _without_thoughts(text: str) -> tuple[str, tuple[str, ...]]:
    """The text without the thoughts before its first object, and what was removed.

    Raises:
        Refusal: a thought is never closed, so the answer was cut off inside it, or what a marker opens is unclear.
    """
    repairs: tuple[str, ...] = ()
    for _ in range(_MOST_THOUGHTS):
        brace = _OBJECT.search(text)
        prose_end = brace.start() if brace else len(text)
        opening = next(filter(_opens_a_thought, _OPENING.finditer(text, 0, prose_end)), None)
        end = _end_of_thought(text, opening) if opening else _end_of_open_thought(text, prose_end)
        if end is None:
            return text, repairs
        text = f"{text[: opening.start()]}\n{text[end:]}".strip() if opening else text[end:].strip()
        repairs = ("thought before the answer",)
    raise Refusal("more thoughts than answers")


def has_thought(prose: str) -> bool:
    """Whether a marker in the prose opens a thought, or may open one."""
    return any(map(_opens_a_thought, _OPENING.finditer(prose)))


def _opens_a_thought(marker: re.Match[str]) -> bool:
    name = next(filter(None, marker.groups())).strip()
    return not _HOLDS_AN_ANSWER.fullmatch(name)


def _end_of_thought(text: str, opening: re.Match[str]) -> int:
    name = next(filter(None, opening.groups())).strip()
    if name.startswith("channel"):
        ends = [channel.end() for channel in _CHANNELS.finditer(text)][-1:]
    elif name.startswith("unused"):
        ends = [marker.end() for marker in re.finditer(r"<unused\d+>", text[:LONGEST_ANSWER])][1:2]
    else:
        core = re.sub(r"^(?:begin|start)[_ ▁]?(?:of[_ ▁])?", "", name, flags=re.IGNORECASE)
        closing = re.compile(_CLOSING.format(name=re.escape(core)), re.IGNORECASE)
        ends = [marker.end() for marker in closing.finditer(text, opening.end())]
    if not ends:
        raise Refusal("cut off before the first score")
    # A thought may quote its closing marker in a sentence; the one that ends it is followed by the answer or a newline.
    return next((end for end in ends if _AT_THE_END.match(text, end)), ends[0])


def _end_of_open_thought(text: str, prose_end: int) -> int | None:
    """Where a thought without an opening marker ends; None where it is missing."""
    if prose_end == 0 or text.startswith("```"):
        return None
    if channels := [channel.end() for channel in _CHANNELS.finditer(text)]:
        return channels[-1]
    return next((end for end in (m.end() for m in _ANY_CLOSING.finditer(text)) if _AT_THE_END.match(text, end)), None)


# --- objects that are not JSON ------------------------------------------------------------------------------------


def repair_objects(broken: Broken) -> Iterator[Found]:
    """What can be repaired of an answer, from each brace that begins no JSON.

    Raises:
        Refusal: there is too much to repair, or a repair would lose text.
    """
    meter = _Meter()
    for start in broken.starts:
        end = _end_of_object(broken.text, start)
        body = broken.text[start:end]
        if len(body) > _LONGEST_REPAIRED:
            raise Refusal(f"not JSON, and longer than {_LONGEST_REPAIRED:,} characters")
        cut_off = body[-1] not in "}]｝］" or body.count("{") > body.count("}")
        value = _repair(body, meter)
        objects = [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, dict)]
        lost = _letters(_NOT_TEXT.sub("", body)) - sum(map(_letters, map(_flat, objects)))
        if objects and lost > (_LONGEST_MEMBER if cut_off else 0):
            raise Refusal("repairing it would lose text")
        for item in objects:
            yield _found(broken.text, start, end, item, (*broken.repairs, CUT_OFF if cut_off else SYNTAX))


_LONGEST_MEMBER = 80
"""Letters that json-repair may drop where an answer was cut off inside a key."""


def _end_of_object(text: str, start: int) -> int:
    """Where an object that is not JSON ends: at its fence, or at the last brace where nothing but prose follows."""
    if _FENCE.search(text[:start]) and (fence := text.rfind("```", start)) > 0:
        return len(text[:fence].rstrip())
    last = max(text.rfind("}"), text.rfind("｝"))
    body = text[start : last + 1]
    whole = last > start and body.count("{") <= body.count("}") and '"' not in text[last:]
    return last + 1 if whole else len(text.rstrip())


# A URL in a string is taken for a comment, too: then less is checked, and nothing is rejected that should be read.
_NOT_TEXT = re.compile(r"(?://|#)[^\n]*|/\*.{0,500}?\*/|\\(?:u[0-9a-fA-F]{4}|.)", re.DOTALL)


def _letters(text: str) -> int:
    return sum(map(str.isalpha, text))


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key} {_flat(item)}" for key, item in value.items())
    return " ".join(map(_flat, value)) if isinstance(value, list) else str(value)


# --- json-repair, within bounds -----------------------------------------------------------------------------------


class _Meter:
    """How many characters json-repair has looked at."""

    def __init__(self) -> None:
        self.reads = 0


class _Metered(str):
    """A string whose reads are counted: json-repair looks at its input one character at a time."""

    meter: _Meter

    def __getitem__(self, place: Any) -> str:
        read = str.__getitem__(self, place)
        self.meter.reads += len(read)
        if self.meter.reads > _MOST_READS:
            raise Refusal("too broken to be repaired")
        return read


def _repair(text: str, meter: _Meter) -> Any:
    """The value that is left when the ordinary faults of judges are repaired, or else what json-repair makes of it.

    Raises:
        Refusal: it is nested too deeply, or there is too much to repair.
    """
    from json_repair.json_parser import JSONParser

    class MeteredParser(JSONParser):  # type: ignore[misc]
        @property
        def json_str(self) -> str:
            return self._metered

        @json_str.setter
        def json_str(self, changed: str) -> None:  # json-repair rewrites its input in places
            self._metered = _Metered(changed)
            self._metered.meter = meter

    text = _requoted(text)
    try:
        return _LENIENT.decode(text)
    except ValueError:
        pass
    except RecursionError as error:
        raise Refusal("nested too deeply") from error
    try:
        return MeteredParser(text, None, False).parse()
    except (RecursionError, ValueError) as error:
        raise Refusal("nested too deeply") from error
    except (AssertionError, LookupError, TypeError, AttributeError) as error:
        raise Refusal("not to be repaired") from error


_QUOTES = {'"': '"', "“": '“”„"', "”": "”“", "„": "“”„", "‟": "”", "«": "»", "「": "」", "『": "』", "＂": "＂"}
"""By the quote that opens a string, those that may close it."""
_ANY_QUOTE = '["“”„‟«»「」『』＂]'
_WIDE = str.maketrans("：，｛｝［］　\u00a0", ":,{}[]  ")
_OUTSIDE = re.compile(r"//[^\n]*|#[^\n]*|/\*.{0,500}?\*/|[\"“”„‟«「『＂:：,，{}｛｝\[\]［］]|[　\u00a0]", re.DOTALL)
_INSIDE = re.compile(r"\\.|[\"“”„‟»」』＂{}\[\]]", re.DOTALL)
_SINGLE_QUOTED = re.compile(r"[{\[\s]*+'")
_KEY_ENDS = re.compile(r"\s*+[:：]")
_NEXT_KEY = rf"{_ANY_QUOTE}[^\"\n]{{1,80}}?{_ANY_QUOTE}\s*+[:：]"
_VALUE_ENDS = re.compile(
    rf"\s*+(?:[}}｝]\s*+(?:[,，}}｝\]］`]|\Z|\n)|[,，]\s*+(?:{_NEXT_KEY}|[}}｝]|//|/\*|#)|{_NEXT_KEY}|\Z)"
)
_ITEM_ENDS = re.compile(rf"\s*+(?:[\]］]|[,，]\s*+(?:{_ANY_QUOTE}|[\d{{\[tfn\]-])|\Z)")


def _requoted(text: str) -> str:
    """The text with its structure in ASCII, and with the quotes inside its strings escaped.

    A quote closes its string only where a key, a comma or a bracket follows that fits the place, and never inside of
    brackets that the string itself has opened: `"It called {"query": "x", "page": 1}."` is one string. json-repair does
    not look at these brackets and would make members of them.
    """
    if _SINGLE_QUOTED.match(text):  # as Python writes a dictionary: json-repair reads it
        return text
    out: list[str] = []
    done = position = depth = 0
    containers, key, closing, last = "", False, "", ""
    while sign := (_INSIDE if closing else _OUTSIDE).search(text, position):
        mark, position = sign.group(), sign.end()
        plain = mark.translate(_WIDE)
        if closing and mark in closing and not depth and _closes(text, position, key, containers):
            closing, plain = "", '"'
        elif closing:
            depth = max(0, depth + (mark in "{[") - (mark in "}]"))
            plain = '\\"' if mark == '"' else mark
        elif mark in _QUOTES:
            closing, depth, plain = _QUOTES[mark], 0, '"'
            if (text[done : sign.start()].rstrip()[-1:] or last) not in "{[,:":  # the comma before it is missing
                plain, key = ',"', containers[-1:] != "["
        elif plain in ("{", "["):
            containers, key = containers + plain, plain == "{"
        elif plain in ("}", "]"):
            containers, key = containers[:-1], False
        elif plain in (",", ":"):
            key = plain == "," and containers[-1:] != "["
        out += (text[done : sign.start()], plain)
        done, last = position, plain if mark[0] not in "/#" else last
    changed = "".join([*out, text[done:]])
    return text if closing and depth else changed


def _closes(text: str, position: int, key: bool, containers: str) -> bool:
    ends = _KEY_ENDS if key else _ITEM_ENDS if containers[-1:] == "[" else _VALUE_ENDS
    return bool(ends.match(text, position))
