"""Parse one row, for conversion and scoring: its prompt, the judge's answer, its metadata.

A row has the form of `finetune.jsonl`, chat messages, Alpaca's columns or a bare prompt. Conversion and scoring both
read rows here, so a prompt has the same system prompt and the same hash in both. `layouts` finds the rows in a file.
"""

import hashlib
import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import orjson

from prmkit.errors import DataError
from prmkit.layouts import Line, Rejected

EXPECTED = (
    '{"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}], '
    '"metadata": {"task_id": "…", "model_name": "…", "evaluation_type": "clip"}}'
)
SELECTED_BY = "selected_by"
WEIGHT = "selection_weight"
"""Metadata of a row whose prompt `ask_judges.py --first` selected: why (`unsure` or `AUDIT`), and the inverse of the
selection probability, which every metric of an evaluation uses as the row's weight."""
AUDIT = "audit"
"""The value of `SELECTED_BY` for a prompt that was selected at random, and so represents others like it."""


class EvaluationType(NamedTuple):
    """The subject of a verdict."""

    meaning: str
    is_step: bool = False
    """Whether it is one step: only step scores are ordered, aggregated and monitored. At most one type is, because
    scoring and metrics match the steps of a run by their clip number alone."""


STEP_TYPE = "clip"
"""The evaluation type of rows made from the steps of runs."""
EVALUATION_TYPES = {
    STEP_TYPE: EvaluationType("one step of a run", is_step=True),
    "category": EvaluationType("all steps of one tool category in a run"),
    "final": EvaluationType("a whole run"),
}
"""The known types, in the order of tables. Rows may have other types, which are not steps."""
OUTCOME = "answer_correctness"
"""The score key of `final` rows with the outcome of a run; evaluations compare the scores of its steps with it."""
STEP_TYPES = tuple(name for name, each in EVALUATION_TYPES.items() if each.is_step)


@dataclass(frozen=True)
class InputRow:
    """One prompt, with the judge's answer if there is one."""

    system: str | None
    prompt: str
    answer: str | None
    judge: str | None
    task: str | None
    trajectory: str | None
    """`trajectory_id`; the task if the row does not have one."""
    evaluation_type: str | None
    clip_number: int | None
    metadata: Mapping[str, Any]
    """The input's metadata, plus those of the fields above that the row has at its top level."""
    id: str | int | None = None

    @property
    def sha256(self) -> str:
        """The hash of the prompt with its system prompt."""
        return prompt_hash(self.prompt, self.system)


def read_row(value: Any, line: Line | None = None) -> InputRow:
    """Turn the JSON value of a row into its fields.

    Args:
        value: `parse_line(line)`.
        line: the text of the row, to look for keys that occur twice: parsers silently keep the last one.

    Raises:
        Rejected: the row has an unknown format, or content that a judge's prompt cannot have.
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


_JUDGED = {"evaluation_type", "clip_number"}


def is_judged_row(value: Any) -> bool:
    """Whether a value is a judged row (as in `finetune.jsonl`), which convert_dataset.py reads."""
    metadata = value.get("metadata") if isinstance(value, dict) else None
    return isinstance(value, dict) and bool(
        _JUDGED & value.keys() or (isinstance(metadata, dict) and _JUDGED & metadata.keys())
    )


def given_id(value: Any) -> str | int | None:
    """Return a row's `id`, which may be 0 or empty; None if it is missing or neither a string nor an integer."""
    identity = value.get("id") if isinstance(value, Mapping) else None
    return identity if isinstance(identity, str | int) and not isinstance(identity, bool) else None


def prompt_hash(prompt: str, system: str | None = None) -> str:
    """Return the SHA-256 that identifies a prompt; with a different system prompt, it is a different prompt.

    Copies that differ only in line breaks (CRLF) or in Unicode normalisation (NFD) are one prompt.
    """
    content = f"{system}\0{prompt}" if system else prompt
    if "\r" in content:
        content = content.replace("\r\n", "\n")
    if not content.isascii():
        content = unicodedata.normalize("NFC", content)
    return hashlib.sha256(content.encode(errors="surrogatepass")).hexdigest()


def name_in(metadata: Mapping[str, Any], key: str) -> str | None:
    """Return an id or a name in the metadata, which pipelines write as "7", 7, 7.0 or " 7"; None if missing or empty.

    Raises:
        Rejected: it is a list, an object, a boolean or a number with a fraction.
    """
    value = metadata.get(key)
    if value is None:
        return None
    if isinstance(value, str):
        return as_name(value) or None
    if type(value) is int or (type(value) is float and value.is_integer()):
        if abs(value) > _LARGEST_EXACT and type(value) is float:
            raise Rejected(f"metadata.{key} is a number that parsers round; write it as a string")
        return str(int(value))
    raise Rejected(f"metadata.{key} is not a string")


_LARGEST_EXACT = 2**53
"""Above this, different integers are one floating point number, and two tasks would become one."""


def as_name(text: str) -> str:
    """Strip and normalise (NFC) a name, because "Café" has two spellings in Unicode."""
    text = text.strip().strip("\u200b\ufeff")
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def task_of(metadata: Mapping[str, Any]) -> str | None:
    """Return the task of a row with this metadata; None if it has no task_id.

    Raises:
        Rejected: as `name_in`.
    """
    return name_in(metadata, "task_id")


def trajectory_of(metadata: Mapping[str, Any]) -> str | None:
    """Return the trajectory of a row; the task if the row has no trajectory_id.

    Raises:
        Rejected: as `name_in`.
    """
    return name_in(metadata, "trajectory_id") or task_of(metadata)


def name_at(location: str, metadata: Mapping[str, Any], key: str) -> str | None:
    """Return `name_in` for metadata that is not from an input row.

    Raises:
        DataError: it is not a name; the message begins with `location`.
    """
    try:
        return name_in(metadata, key)
    except Rejected as rejected:
        raise DataError(f"{location}: {key} is neither a string nor an integer.") from rejected


def weight_of(metadata: Mapping[str, Any]) -> float:
    """Return how many prompts a row represents: its `WEIGHT`; without a weight, one.

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
    """Return the metadata without `SELECTED_BY` and `WEIGHT`."""
    return {name: value for name, value in metadata.items() if name not in (SELECTED_BY, WEIGHT)}


def whole_number(value: Any) -> int | None:
    """Return an integer (a clip number), which pipelines write as 1, 1.0 or "1"; None for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return int(number) if number.is_integer() else None


_CONTENT = {
    "id", "metadata", "conversations", "messages", "prompt", "completion", "response", "instruction", "input",
    "output", "system", "tools",
}  # fmt: skip
"""The columns that are not metadata. Also list every column here that `_texts` reads."""
PROMPT_COLUMNS = ("conversations", "messages", "prompt", "instruction")
"""The columns of which a row has one, with its prompt."""
_IDENTITY = ("task_id", "trajectory_id", "model_name", "evaluation_type", "clip_number")


def _metadata(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the metadata or, if it is missing, the row's other top-level keys; `_IDENTITY` may be in both."""
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
            elif row.get(key) is not None and row[key] != metadata[key] and name_in(row, key) != name_in(metadata, key):
                raise Rejected(f"{key} differs between the row and its metadata")
    return metadata


_ANSWERS = ("output", "response", "completion")
_ROLES = {
    "human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system", "developer": "system",
}  # fmt: skip


def _texts(row: Mapping[str, Any]) -> tuple[str | None, str, str | None]:
    """Return system prompt, prompt and answer. A new column that is read here also belongs in `_CONTENT`."""
    if {"trajectory_id", "steps"} <= row.keys() and not row.keys() & {*PROMPT_COLUMNS}:
        raise Rejected("a run among rows; runs are read from a file of their own, not from stdin", "a run among rows")
    for column in ("tools", "images", "videos", "audios", "history"):
        if row.get(column) not in (None, "", "[]", []):
            raise Rejected(f"has `{column}`, which is not supported; put its content into the prompt text")
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise Rejected("system is not a string")
    turns = _one_of(row, ("conversations", "messages"), "turns")
    if turns is None and isinstance(row.get("prompt"), list):
        completion = row.get("completion") or []
        turns = [*row["prompt"], *(completion if isinstance(completion, list) else [_turn("gpt", completion)])]
    if turns is not None:
        texts = _from_turns(turns, system)
        for column, text in (("prompt", texts[1]), ("instruction", texts[1]), *((name, texts[2]) for name in _ANSWERS)):
            if isinstance(row.get(column), str) and row[column].strip() and row[column] != text:
                raise Rejected(f"{column} differs from the turns; leave one of them out", "two texts that differ")
        return texts
    if isinstance(row.get("instruction"), str):
        prompt = "\n".join(filter(None, (row["instruction"], _string(row.get("input"), "input"))))
    elif isinstance(row.get("prompt"), str):
        prompt = row["prompt"]
    else:
        raise Rejected(_unknown_format(row), "neither conversations nor a prompt")
    answer = _one_of(row, _ANSWERS, "answers")
    return system, prompt, None if answer is None else _string(answer, "the answer")


def _one_of(row: Mapping[str, Any], columns: Sequence[str], what: str) -> Any:
    """Return the only one of some columns that is not null; None if all are."""
    values = [row[column] for column in columns if row.get(column) is not None]
    if len(values) > 1:
        raise Rejected(f"several {what}: {' or '.join(column for column in columns if row.get(column) is not None)}")
    return values[0] if values else None


def _turn(role: str, text: Any) -> dict[str, Any]:
    return {"from": role, "value": text}


def _unknown_format(row: Mapping[str, Any]) -> str:
    for key, value in row.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return f"rows are nested in an object; extract them: jq -c '.[{json.dumps(key[:40])}][]' FILE > rows.jsonl"
    return f"neither conversations nor a prompt; expected {EXPECTED}"


def _string(value: Any, what: str) -> str:
    if value is not None and not isinstance(value, str):
        raise Rejected(f"{what} is not a string")
    return value or ""


def _from_turns(turns: Any, system: str | None) -> tuple[str | None, str, str | None]:
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise Rejected("conversations is not a list of turns")
    texts = [(_role(turn), _text(turn)) for turn in turns]
    if texts[0][0] == "system":
        own = texts.pop(0)[1]
        if system and own and system != own:
            raise Rejected("two system prompts: a column and a turn")
        system = own or system
    roles = [role for role, _ in texts]
    if roles not in (["human"], ["human", "gpt"]):
        found = ", ".join(roles[:6]) or "nothing"
        raise Rejected(f"expected one human and at most one gpt turn; found {found}",
                       "the turns are not one question and one answer")  # fmt: skip
    return system, texts[0][1], texts[1][1] if len(texts) > 1 else None


def _role(turn: Mapping[str, Any]) -> str:
    role = turn.get("from", turn.get("role"))
    if turn.get("tool_calls") or turn.get("function_call"):
        raise Rejected("a turn has tool calls, which are not supported; put them into the prompt text")
    if not isinstance(role, str) or role not in _ROLES:
        raise Rejected(f"a turn is from {str(role)[:40]!r}; expected human, gpt or system", "a turn of unknown role")
    return _ROLES[role]


def _text(turn: Mapping[str, Any]) -> str:
    text = turn.get("value", turn.get("content"))
    if isinstance(text, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in text):
        text = "".join(_string(part.get("text"), "a part of a turn") for part in text)
    if not isinstance(text, str):
        raise Rejected(f"the turn of {_ROLES[turn.get('from', turn.get('role'))]} is not a string")
    return text


# --- keys that occur twice ----------------------------------------------------------------------------------------


def _check_unique_keys(text: bytes, quotes: int) -> None:
    # If the text has as many quotes as the value needs, no key was lost. Otherwise the slow check decides.
    if quotes == text.count(b'"') and b"\\u0022" not in text:
        return
    try:
        json.loads(text, object_pairs_hook=_unique)
    except ValueError as error:
        # orjson accepted it, so this is a case in which parsers differ (an integer of 5,000 digits).
        raise Rejected(f"not JSON ({error})", "not JSON") from error


_DEEPEST = 250
"""Nesting levels. orjson reads 1,024 and writes 254; rejected.jsonl has each row one level deeper."""


def _quotes_of(value: Any, depth: int) -> int:
    """Count the quotation marks of a list or object as JSON: two for each key and string, and those inside them."""
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
