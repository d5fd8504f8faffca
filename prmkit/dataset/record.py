"""One line of the input as a record, or the reason why it is none."""

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import orjson

LONGEST_LINE = 4 << 20
"""Bytes. A longer line is set aside unread: no model reads a prompt of a million tokens, and memory stays bounded."""

# Arrow reads a column in which every string is a bare date as timestamps, and LLaMA Factory then drops every row.
_BARE_DATE = re.compile(r"\s*\d{4}-\d{2}-\d{2}(?:[ T]\d{2}(?::?\d{2}){0,2}(?:\.\d+)?(?:Z|[+-]\d{2}:?\d{2})?)?\s*")


class Record(NamedTuple):
    """One judged prompt."""

    prompt: str
    answer: str
    judge: str | None
    task: str | None
    evaluation_type: str | None
    metadata: Mapping[str, Any]
    """As it stands in the input."""


class Rejected(Exception):
    """A row that is set aside.

    Args:
        reason: what is wrong with this row.
        kind: what is wrong with rows of this kind; rows are counted by it. The reason itself when left out.
        tokens: of prompt and label, where they were measured.
    """

    def __init__(self, reason: str, kind: str | None = None, tokens: int = 0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.kind = kind or reason
        self.tokens = tokens


def parse_line(line: bytes) -> Any:
    """The JSON value of a line.

    Raises:
        Rejected: it is not JSON, or not UTF-8, or nested too deeply for any parser.
    """
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        try:
            line.decode()
        except UnicodeDecodeError as wrong:
            raise Rejected(f"not UTF-8 (byte {wrong.start + 1} of the line)", "not UTF-8") from error
        raise Rejected(f"not JSON ({error})", "not JSON") from error


def read_record(line: bytes, row: Any) -> Record:
    """The record that a parsed line holds.

    Args:
        line: the line itself; parsers keep the last of two equal keys in silence, so they are looked for here.
        row: `parse_line(line)`.

    Raises:
        Rejected: the row is not of the known form.
    """
    if not isinstance(row, dict):
        raise Rejected("not a JSON object")
    turns = row.get("conversations")
    if not isinstance(turns, list) or len(turns) != 2 or not all(isinstance(turn, dict) for turn in turns):
        raise Rejected("conversations is not a list of two turns")
    metadata = row.get("metadata")
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict):
        raise Rejected("metadata is not an object")
    if line.count(b'"') != _quotes_of(row) or b"\\u0022" in line:
        # A key stands twice, and one of its values is lost; or quotes are written otherwise. The slow check tells.
        _refuse_equal_keys(line)
    prompt, answer = _text(turns[0], "human"), _text(turns[1], "gpt")
    if not prompt or prompt.isspace():
        raise Rejected("empty prompt")
    if _BARE_DATE.fullmatch(prompt):
        raise Rejected("the prompt is nothing but a date")
    return Record(
        prompt,
        answer,
        _name(metadata, "model_name"),
        _name(metadata, "task_id"),
        _name(metadata, "evaluation_type"),
        metadata,
    )


def _text(turn: dict[str, Any], role: str) -> str:
    if turn.get("from") != role:
        raise Rejected(f"the turns are not from human and gpt, in this order ({turn.get('from')!s:.40})",
                       "the turns are not from human and gpt, in this order")  # fmt: skip
    text = turn.get("value")
    if not isinstance(text, str):
        raise Rejected(f"the value of {role} is not a text")
    return text


def _name(metadata: Mapping[str, Any], key: str) -> str | None:
    value = metadata.get(key)
    if value is None or value == "":
        return None
    if isinstance(value, str):
        return value
    if type(value) is int:
        return str(value)
    raise Rejected(f"metadata.{key} is not a text")


def _quotes_of(value: Any) -> int:
    """How many quotation marks a list or object takes as JSON: two for each key and text, and those inside them."""
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
            quotes += _quotes_of(item)
    return quotes


def _refuse_equal_keys(line: bytes) -> None:
    try:
        json.loads(line, object_pairs_hook=_unique)
    except RecursionError as error:
        raise Rejected("nested too deeply") from error
    except ValueError as error:
        # orjson has read it, so this is a matter of taste between parsers (an integer of 5,000 digits).
        raise Rejected(f"not JSON ({error})", "not JSON") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        _refuse_key(next(key for key in keys if keys.count(key) > 1))
    return made


def _refuse_key(key: str) -> NoReturn:
    raise Rejected(f"the key {key[:40]!r} stands twice in one object", "a key stands twice in one object")
