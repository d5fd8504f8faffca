"""What one row says, for conversion and scoring: its prompt, the judge's answer, its metadata.

A row has the form of `finetune.jsonl`, chat messages, Alpaca's columns or a bare prompt. Conversion and scoring both
read rows here, so a prompt has the same system text and the same hash in both. `row_lines` finds the rows in a file.
"""

import hashlib
import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import orjson

from prmkit.errors import DataError
from prmkit.row_lines import LONGEST_LINE, Line

EXPECTED = (
    '{"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}], '
    '"metadata": {"task_id": "…", "model_name": "…", "evaluation_type": "clip"}}'
)
SELECTED_BY = "selected_by"
WEIGHT = "selection_weight"
"""In the metadata of a row whose prompt `ask_judges.py --first` selected: why (`unsure` or `AUDIT`), and the inverse
of the selection probability. Every metric of an evaluation uses it as the row's weight."""
AUDIT = "audit"
"""`SELECTED_BY` of a prompt that was selected at random, and so represents others like it."""


class EvaluationType(NamedTuple):
    """What a verdict is about."""

    meaning: str
    is_step: bool = False
    """One step: the scores of a run then have an order, and can be combined and watched. At most one type is, because
    scoring and metrics match the steps of a run by their clip number alone."""


STEP_TYPE = "clip"
"""The evaluation type of rows that are made from the steps of runs."""
EVALUATION_TYPES = {
    STEP_TYPE: EvaluationType("one step of a run", is_step=True),
    "category": EvaluationType("all steps of one tool category in a run"),
    "final": EvaluationType("a whole run"),
}
"""In the order of tables. Rows may have other types, which are not steps."""
OUTCOME = "answer_correctness"
"""The score key of `final` rows that says how a run ended: evaluations compare the scores of its steps with it."""
STEP_TYPES = tuple(name for name, each in EVALUATION_TYPES.items() if each.is_step)


class Rejected(Exception):
    """A row that cannot be used.

    Args:
        reason: what is wrong with this row.
        kind: the name under which such rows are counted; by default the reason.
    """

    def __init__(self, reason: str, kind: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.kind = kind or reason


@dataclass(frozen=True)
class InputRow:
    """One prompt, with the judge's answer if there is one."""

    system: str | None
    prompt: str
    answer: str | None
    judge: str | None
    task: str | None
    trajectory: str | None
    """`trajectory_id`; the task if a row names none."""
    evaluation_type: str | None
    clip_number: int | None
    metadata: Mapping[str, Any]
    """As in the input, plus those of the fields above that the row has at its top level."""
    id: str | int | None = None

    @property
    def sha256(self) -> str:
        """The hash of what the judge is asked."""
        return prompt_hash(self.prompt, self.system)


def parse_line(line: Line) -> Any:
    """The JSON value of a row. `NaN`, which pandas writes for a missing value, is read as null.

    Raises:
        Rejected: the row is too long, not JSON, not UTF-8, or nested too deeply for any parser.
    """
    if line.size > len(line.text):
        raise Rejected(f"row of {line.size:,} bytes; the limit is {LONGEST_LINE:,}", "row too long")
    try:
        return orjson.loads(line.text)
    except orjson.JSONDecodeError as error:
        try:
            line.text.decode()
        except UnicodeDecodeError as wrong:
            raise Rejected(f"not UTF-8 (byte {wrong.start + 1} of the line)", "not UTF-8") from error
        if b"NaN" in line.text or b"Infinity" in line.text:
            return _parse_with_nan(line.text, error)
        raise Rejected(f"not JSON ({error})", "not JSON") from error


def _parse_with_nan(text: bytes, error: Exception) -> Any:
    try:
        value = json.loads(text, parse_constant=lambda _: None)
        orjson.dumps(value)  # Python's parser accepts characters that cannot be written
    except (ValueError, RecursionError, orjson.JSONEncodeError):
        raise Rejected(f"not JSON ({error})", "not JSON") from error
    return value


def read_row(value: Any, line: Line | None = None) -> InputRow:
    """What a row says.

    Args:
        value: `parse_line(line)`.
        line: where the row was read from, to look for keys that occur twice: parsers silently keep the last one.

    Raises:
        Rejected: the row has an unknown form, or has something that a judge's prompt cannot hold.
    """
    if not isinstance(value, dict):
        raise Rejected("not a JSON object")
    quotes = _quotes_of(value, 0)
    if line is not None:
        _check_unique_keys(line.text, quotes)
    metadata = _metadata(value)
    system, prompt, answer = _texts(value)
    if not prompt.strip():
        raise Rejected("empty prompt")
    return InputRow(
        system or None,
        prompt,
        answer,
        name_in(metadata, "model_name"),
        task_of(metadata),
        trajectory_of(metadata),
        name_in(metadata, "evaluation_type"),
        whole_number(metadata.get("clip_number")),
        metadata,
        given_id(value),
    )


def given_id(value: Any) -> str | int | None:
    """A row's `id`, which may be 0 or empty; None if it has none, or something else than text or a whole number."""
    identity = value.get("id") if isinstance(value, Mapping) else None
    return identity if isinstance(identity, str | int) and not isinstance(identity, bool) else None


def prompt_hash(prompt: str, system: str | None = None) -> str:
    """The SHA-256 that identifies a prompt; the same prompt with another system text is another prompt.

    Copies that differ only in line breaks (CRLF) or in how Unicode composes a character (NFD) are one prompt.
    """
    whole = f"{system}\0{prompt}" if system else prompt
    if "\r" in whole:
        whole = whole.replace("\r\n", "\n")
    if not whole.isascii():
        whole = unicodedata.normalize("NFC", whole)
    return hashlib.sha256(whole.encode(errors="surrogatepass")).hexdigest()


def name_in(metadata: Mapping[str, Any], key: str) -> str | None:
    """A name in the metadata, which pipelines write as "7", 7, 7.0 or " 7"; None if it is missing or empty.

    Raises:
        Rejected: it is a list, an object, a boolean or a fraction.
    """
    value = metadata.get(key)
    if value is None:
        return None
    if isinstance(value, str):
        return as_name(value) or None
    if type(value) is int or (type(value) is float and value.is_integer()):
        return str(int(value))
    raise Rejected(f"metadata.{key} is not a string")


def as_name(text: str) -> str:
    """A name without spaces around it, and with its characters composed in one way: "Café" has two spellings."""
    text = text.strip().strip("\u200b\ufeff")
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def task_of(metadata: Mapping[str, Any]) -> str | None:
    """The task of a row with this metadata; None if it names none.

    Raises:
        Rejected: as `name_in`.
    """
    return name_in(metadata, "task_id")


def trajectory_of(metadata: Mapping[str, Any]) -> str | None:
    """The attempt at the task; the task if the row names no attempt.

    Raises:
        Rejected: as `name_in`.
    """
    return name_in(metadata, "trajectory_id") or task_of(metadata)


def name_at(place: str, metadata: Mapping[str, Any], key: str) -> str | None:
    """`name_in` for what is not an input row.

    Raises:
        DataError: it is not a name; the message begins with `place`.
    """
    try:
        return name_in(metadata, key)
    except Rejected as rejected:
        raise DataError(f"{place}: {key} is neither text nor a whole number.") from rejected


def weight_of(metadata: Mapping[str, Any]) -> float:
    """How many prompts a row represents: `WEIGHT`, or one if it has none.

    Raises:
        DataError: the weight is not a positive number.
    """
    weight = metadata.get(WEIGHT, 1.0)
    if not is_weight(weight):
        task = metadata.get("task_id")
        raise DataError(f"metadata.{WEIGHT} of a row of task {task} is {weight!r}; it must be a number above 0.")
    return float(weight)


def is_weight(value: Any) -> bool:
    """Whether a value of `WEIGHT` is a finite number above zero."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e300


def without_selection(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata without `SELECTED_BY` and `WEIGHT`."""
    return {name: value for name, value in metadata.items() if name not in (SELECTED_BY, WEIGHT)}


def whole_number(value: Any) -> int | None:
    """A whole number (of a clip), which pipelines write as 1, 1.0 or "1"; None for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return int(number) if number.is_integer() else None


_CONTENT = {
    "id", "metadata", "conversations", "messages", "prompt", "completion", "response", "instruction", "input",
    "output", "system", "tools",
}  # fmt: skip
"""The columns that are not metadata. Also list a new column here that `_texts` reads."""
_IDENTITY = ("task_id", "trajectory_id", "model_name", "evaluation_type", "clip_number")


def _metadata(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The metadata, or the row's other top-level keys if it has none; what identifies a row may be in either place."""
    metadata = row.get("metadata")
    if isinstance(metadata, str):  # tables keep objects as strings
        try:
            metadata = orjson.loads(metadata or "null")
            _quotes_of([metadata], 0)
        except orjson.JSONDecodeError:
            raise Rejected("metadata is not an object") from None
    if metadata is None:
        metadata = {key: value for key, value in row.items() if key not in _CONTENT}
    elif not isinstance(metadata, dict):
        raise Rejected("metadata is not an object")
    else:
        for key in _IDENTITY:
            if row.get(key) is not None and metadata.get(key) in (None, ""):
                metadata = {**metadata, key: row[key]}
            elif row.get(key) is not None and row[key] != metadata[key]:
                raise Rejected(f"{key} differs between the row and its metadata")
    return metadata


_ANSWERS = ("output", "response", "completion")
_ROLES = {
    "human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system", "developer": "system",
}  # fmt: skip


def _texts(row: Mapping[str, Any]) -> tuple[str | None, str, str | None]:
    """System text, prompt and answer. A new column that is read here also belongs in `_CONTENT`."""
    for column in ("tools", "images", "videos", "audios", "history"):
        if row.get(column) not in (None, "", "[]", []):
            raise Rejected(f"carries {column}, which a judge's prompt cannot hold; write them into the prompt")
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise Rejected("system is not a string")
    turns = _one_of(row, ("conversations", "messages"), "turns")
    if turns is None and isinstance(row.get("prompt"), list):
        completion = row.get("completion") or []
        turns = [*row["prompt"], *(completion if isinstance(completion, list) else [_turn("gpt", completion)])]
    if turns is not None:
        said = _from_turns(turns, system)
        for column, text in (("prompt", said[1]), ("instruction", said[1]), *((name, said[2]) for name in _ANSWERS)):
            if isinstance(row.get(column), str) and row[column].strip() and row[column] != text:
                raise Rejected(f"{column} is not what the turns say; leave one of them out", "two texts that differ")
        return said
    if isinstance(row.get("instruction"), str):
        prompt = "\n".join(filter(None, (row["instruction"], _string(row.get("input"), "input"))))
    elif isinstance(row.get("prompt"), str):
        prompt = row["prompt"]
    else:
        raise Rejected(_unknown_form(row), "neither conversations nor a prompt")
    answer = _one_of(row, _ANSWERS, "answers")
    return system, prompt, None if answer is None else _string(answer, "the answer")


def _one_of(row: Mapping[str, Any], columns: Sequence[str], what: str) -> Any:
    """The only one of some columns that is not null; None if all are."""
    given = [row[column] for column in columns if row.get(column) is not None]
    if len(given) > 1:
        raise Rejected(f"several {what}: {' or '.join(column for column in columns if row.get(column) is not None)}")
    return given[0] if given else None


def _turn(role: str, text: Any) -> dict[str, Any]:
    return {"from": role, "value": text}


def _unknown_form(row: Mapping[str, Any]) -> str:
    for key, value in row.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return f"an object around rows; write them as lines: jq -c '.[{json.dumps(key[:40])}][]' FILE > rows.jsonl"
    return f"neither conversations nor a prompt; expected {EXPECTED}"


def _string(value: Any, what: str) -> str:
    if value is not None and not isinstance(value, str):
        raise Rejected(f"{what} is not a string")
    return value or ""


def _from_turns(turns: Any, system: str | None) -> tuple[str | None, str, str | None]:
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise Rejected("conversations is not a list of turns")
    said = [(_role(turn), _said(turn)) for turn in turns]
    if said[0][0] == "system":
        own = said.pop(0)[1]
        if system and own and system != own:
            raise Rejected("two system prompts: a column and a turn")
        system = own or system
    roles = [role for role, _ in said]
    if roles not in (["human"], ["human", "gpt"]):
        found = ", ".join(roles[:6]) or "nothing"
        raise Rejected(f"the turns are not one question and one answer ({found}); expected human, gpt",
                       "the turns are not one question and one answer")  # fmt: skip
    return system, said[0][1], said[1][1] if len(said) > 1 else None


def _role(turn: Mapping[str, Any]) -> str:
    role = turn.get("from", turn.get("role"))
    if turn.get("tool_calls") or turn.get("function_call"):
        raise Rejected("a turn carries tool calls, which a judge's prompt cannot hold; write them into the prompt")
    if not isinstance(role, str) or role not in _ROLES:
        raise Rejected(f"a turn is from {str(role)[:40]!r}; expected human, gpt or system", "a turn of unknown role")
    return _ROLES[role]


def _said(turn: Mapping[str, Any]) -> str:
    text = turn.get("value", turn.get("content"))
    if isinstance(text, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in text):
        text = "".join(_string(part.get("text"), "a part of a turn") for part in text)
    if not isinstance(text, str):
        raise Rejected(f"the turn of {_ROLES[turn.get('from', turn.get('role'))]} is not a string")
    return text


# --- keys that occur twice ----------------------------------------------------------------------------------------


def _check_unique_keys(text: bytes, quotes: int) -> None:
    # If there are as many quotes as the value needs, no key was lost. Otherwise the slow check decides.
    if quotes == text.count(b'"') and b"\\u0022" not in text:
        return
    try:
        json.loads(text, object_pairs_hook=_unique)
    except ValueError as error:
        # orjson has read it, so this is where parsers differ (an integer of 5,000 digits).
        raise Rejected(f"not JSON ({error})", "not JSON") from error


_DEEPEST = 250
"""Levels. orjson reads 1,024 and writes 254; the file of rejected rows has each row one level deeper."""


def _quotes_of(value: Any, depth: int) -> int:
    """How many quotation marks a list or object takes as JSON: two for each key and string, and those inside them."""
    if depth > _DEEPEST:
        raise Rejected("nested too deeply")
    items, quotes = value, 0
    if type(value) is dict:
        items = value.values()
        for key in value:
            quotes += 2 + key.count('"')
    for item in items:
        kind = type(item)
        if kind is str:
            quotes += 2 + item.count('"')
        elif kind is dict or kind is list:
            quotes += _quotes_of(item, depth + 1)
    return quotes


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        _reject_key(next(key for key in keys if keys.count(key) > 1))
    return made


def _reject_key(key: str) -> NoReturn:
    raise Rejected(f"the key {key[:40]!r} occurs twice in one object", "a key occurs twice in one object")
