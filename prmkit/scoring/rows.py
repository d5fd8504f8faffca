"""The steps that a user wants scored: one row each, and which scores it asks for."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prmkit.files import read_json
from prmkit.judge.batching import digest
from prmkit.judge.scorer import ShapeOf
from prmkit.judge.types import Request
from prmkit.paths import REPORT
from prmkit.rows import InputRow, Line, Rejected, parse_line, read_row


@dataclass(frozen=True)
class Row:
    """One row of the input."""

    number: int
    """Of its line, from 1."""
    id: str | int | None = None
    """The row's `id`; else the beginning of the prompt's hash. None for a line that cannot be read."""
    request: Request | None = None
    reason: str | None = None
    """Why the row cannot be judged; there is no request then."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    task: str | None = None
    trajectory: str | None = None
    """`trajectory_id`; else the task."""
    clip_number: int | None = None
    is_step: bool = False
    """One step of a trajectory, not a whole one or a category of tools."""

    @property
    def request_hash(self) -> str | None:
        """Of the prompt, the system text and the score keys."""
        return digest(self.request).hex() if self.request else None


def known_keys(data_folder: Path) -> Mapping[str, Sequence[str]]:
    """The score keys by evaluation type that the conversion met; empty without a conversion."""
    report = data_folder / REPORT
    return dict(read_json(report).get("score_keys", {})) if report.is_file() else {}


def read_rows(lines: Iterable[Line], shape_of: ShapeOf) -> Iterator[Row]:
    """Read rows as in `finetune.jsonl`, with or without the judge's turn, or `{"id", "prompt"}`."""
    for line in lines:
        try:
            value = parse_line(line)
        except Rejected as rejected:
            yield Row(line.number, reason=f"line {line.number}: {rejected.reason}")
            continue
        try:
            yield _row(read_row(value, line), line.number, shape_of)
        except Rejected as rejected:
            identity = value.get("id") if isinstance(value, dict) else None
            known = identity if isinstance(identity, str | int) else None
            yield Row(line.number, known, reason=f"line {line.number}: {rejected.reason}")


def _row(row: InputRow, number: int, shape_of: ShapeOf) -> Row:
    shape = shape_of(row.prompt, row.evaluation_type)
    return Row(
        number,
        row.sha256[:16] if row.id is None else row.id,
        None if isinstance(shape, str) else Request(row.prompt, shape, row.system),
        shape if isinstance(shape, str) else None,
        row.metadata,
        row.task,
        row.trajectory,
        row.clip_number,
        is_step=row.evaluation_type in (None, "clip"),
    )
