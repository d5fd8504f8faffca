"""The steps that a user wants scored: one line of JSON each, and which scores it asks for."""

import codecs
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from prmkit.files import read_json
from prmkit.judge.types import Request
from prmkit.paths import REPORT
from prmkit.verdict import Shape, asked_shape


@dataclass(frozen=True)
class Row:
    """One line of the input."""

    id: str | int | None
    """The row's own; else the beginning of the prompt's SHA-256. None for a line that cannot be read."""
    request: Request | None
    reason: str | None
    """Why the row cannot be judged."""
    metadata: Mapping[str, Any]
    known: Mapping[str, Any] | None = None
    """The result that an earlier run found for it; there is no request then."""


@dataclass(frozen=True)
class ShapeOf:
    """Decides which scores are asked for."""

    keys: tuple[str, ...] = ()
    """What the user named; empty to look at the prompt's schema, then at the evaluation type."""
    known: Mapping[str, Sequence[str]] | None = None
    """By evaluation type, the keys that the training data had."""

    def __call__(self, prompt: str, evaluation_type: object) -> Shape | str:
        """The shape, or why none can be told."""
        asked = asked_shape(prompt)
        if self.keys:
            return Shape(self.keys, asked.nested if asked and asked.keys == self.keys else _is_nested(self.keys))
        if asked:
            return asked
        known = tuple((self.known or {}).get(str(evaluation_type), ()))
        if not known:
            return "the prompt shows no score keys, and none are known of its evaluation type; name them with --keys"
        if len(known) > 1 and not _is_nested(known):
            return f"the prompt shows no score keys, and {' or '.join(known)} would fit; name one with --keys"
        return Shape(known, _is_nested(known))


def _is_nested(keys: Sequence[str]) -> bool:
    """Judges write a single score by itself (`reasonableness_score`) and several in a `scores` object."""
    return not all(key.endswith("score") for key in keys)


def known_keys(data_folder: Path) -> Mapping[str, Sequence[str]]:
    """The score keys by evaluation type that the converter has met; empty without a conversion."""
    report = data_folder / REPORT
    return dict(read_json(report).get("score_keys", {})) if report.is_file() else {}


def read_rows(lines: Iterable[bytes], shape_of: ShapeOf) -> Iterator[Row]:
    """Read rows as in `finetune.jsonl`, with or without the judge's turn, or `{"id", "prompt"}`; skip blank lines."""
    for number, line in enumerate(lines, start=1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)  # as Windows writes it
        if line.strip():
            yield _row(line, number, shape_of)


def _row(line: bytes, number: int, shape_of: ShapeOf) -> Row:
    try:
        content = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return Row(None, None, f"line {number} is not JSON ({error})", {})
    if not isinstance(content, dict):
        return Row(None, None, f"line {number} is not a JSON object", {})
    metadata = _metadata(content)
    if not _can_be_written(metadata):
        return Row(_id(content, None), None, f"line {number}: its metadata is nested too deeply", {})
    prompt = _prompt(content)
    if prompt is None:
        reason = f"line {number} has neither a prompt nor a human turn in conversations"
        return Row(_id(content, None), None, reason, metadata)
    shape = shape_of(prompt, metadata.get("evaluation_type"))
    if isinstance(shape, str):
        return Row(_id(content, prompt), None, shape, metadata)
    return Row(_id(content, prompt), Request(prompt, shape), None, metadata)


def _prompt(content: Mapping[str, Any]) -> str | None:
    if isinstance(content.get("prompt"), str):
        return str(content["prompt"])
    turns = content.get("conversations")
    for turn in turns if isinstance(turns, list) else ():
        if isinstance(turn, dict) and turn.get("from") in ("human", "user") and isinstance(turn.get("value"), str):
            return str(turn["value"])
    return None


def _id(content: Mapping[str, Any], prompt: str | None) -> str | int | None:
    if isinstance(content.get("id"), str | int):
        return content["id"]  # type: ignore[no-any-return]
    return hashlib.sha256(prompt.encode()).hexdigest()[:16] if prompt is not None else None


def _can_be_written(metadata: Mapping[str, Any]) -> bool:
    """Whether it can stand in a result: orjson reads what is nested 1,024 deep, and writes 254."""
    try:
        orjson.dumps({"metadata": metadata})
    except orjson.JSONEncodeError:
        return False
    return True


def _metadata(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the row tells beside its prompt."""
    if isinstance(content.get("metadata"), dict):
        return dict(content["metadata"])
    return {key: value for key, value in content.items() if key not in ("id", "prompt", "conversations")}


def whole_number(value: Any) -> int | None:
    """The number of a clip, which judges' pipelines write as 1, 1.0 or "1"; None where it is none."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return int(number) if number.is_integer() else None
