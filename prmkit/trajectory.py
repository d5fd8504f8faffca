"""The trajectory record of an agent run: every importer writes it; labelling, training and scoring read it.

A step is one message of the agent with its tool calls and their results: the unit that people label and a judge
scores. One line of JSON holds one run; field names follow ATIF where ATIF has them.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import orjson

from prmkit.errors import DataError
from prmkit.layouts import read_values
from prmkit.verdict import is_share

LabelKind = Literal["score", "ternary", "first_error", "failure"]


@dataclass(frozen=True)
class Message:
    """A message to the agent between two of its steps."""

    role: str
    """`user`, `system`, or the name of another speaker."""
    text: str


@dataclass(frozen=True)
class Call:
    """A tool call."""

    name: str
    arguments: Any = None
    """The JSON value; a string if the agent wrote something that is not JSON."""
    id: str | None = None


@dataclass(frozen=True)
class Result:
    """The result of a tool call."""

    text: str
    call_id: str | None = None
    error: bool = False


@dataclass(frozen=True)
class Label:
    """A person's or a judge's label of a step."""

    value: float
    """A score from 0 to 1."""
    by: str
    """The person or the judge; `human` if the source does not say."""
    kind: LabelKind = "score"
    type: str | None = None
    """The type of the error, as the source calls it."""


@dataclass(frozen=True)
class Step:
    """One message of the agent with its tool calls and their results."""

    n: int
    """The number of the step, from 1."""
    text: str = ""
    thought: str = ""
    calls: tuple[Call, ...] = ()
    results: tuple[Result, ...] = ()
    incoming: tuple[Message, ...] = ()
    """The messages since the previous step, except the task."""
    agent: str | None = None
    source_index: int | None = None
    """The index of the message in the source, from 0; public labels refer to it."""
    last: bool = False
    label: Label | None = None


@dataclass(frozen=True)
class Trajectory:
    """One attempt at a task."""

    trajectory_id: str
    """The unit of aggregation; unique in a file."""
    task_id: str
    """The unit of the split; the same for all runs of a task."""
    task: str
    steps: tuple[Step, ...]
    system: str = ""
    tools: tuple[Mapping[str, str], ...] = ()
    """`name` and `description` of the tools the agent could call, if the source lists them."""
    outcome: Mapping[str, Any] | None = None
    """The `success` and the `score` of the run; never part of a step's prompt."""
    reference: str | None = None
    """The reference solution; never part of a step's prompt."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """The `format`, `file` and `line` of the run."""
    lost: Mapping[str, int] = field(default_factory=dict)
    """Dropped or irregular content: kind -> count."""


def results_by_call(step: Step) -> tuple[list[list[Result]], list[Result]]:
    """The results of each call of a step, in the order of the calls, and the results that belong to no call.

    Some servers give parallel calls the same id: then their results are paired in order. A call that returned several
    times has all its results.
    """
    found: list[list[Result]] = [[] for _ in step.calls]
    others: list[Result] = []
    for result in step.results:
        places = [place for place, call in enumerate(step.calls) if call.id == result.call_id]
        if places:
            found[next((place for place in places if not found[place]), places[-1])].append(result)
        else:
            others.append(result)
    return found, others


def task_id_of(task: str) -> str:
    """Return an id for a task without one: a hash of its text that ignores spacing, case and Unicode normalisation."""
    plain = re.sub(r"\s+", " ", unicodedata.normalize("NFKC", task)).strip().casefold()
    return "task-" + hashlib.sha256(plain.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def outcome_number(outcome: Any) -> float | None:
    """Return an outcome as a number from 0 to 1.

    An outcome is a number, a boolean, or an object with `success` or `score`; if both are given, `success` counts. None
    if the outcome is unknown or on another scale.
    """
    if isinstance(outcome, Mapping):
        success = outcome.get("success")
        outcome = outcome.get("score") if success is None else success
    return float(outcome) if isinstance(outcome, bool) or is_share(outcome) else None


def with_labels(trajectory: Trajectory, labels: Mapping[int, Label]) -> Trajectory:
    """Add labels to the steps of a run; labels on messages that are not steps are dropped and counted.

    Args:
        trajectory: the run.
        labels: index of the message in the source -> label.
    """
    if not labels:
        return trajectory
    steps = tuple(
        replace(step, label=labels.get(step.source_index, step.label)) if step.source_index is not None else step
        for step in trajectory.steps
    )
    dropped = len(labels.keys() - {step.source_index for step in steps})
    lost = dict(trajectory.lost) | ({"labels on messages that are not steps": dropped} if dropped else {})
    return replace(trajectory, steps=steps, lost=lost)


def dump(trajectory: Trajectory) -> bytes:
    """Write a run as one line of JSON. Lone surrogates, which are not valid in UTF-8, become question marks."""
    try:
        return orjson.dumps(trajectory, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:
        text = json.dumps(asdict(trajectory), ensure_ascii=False, allow_nan=False, default=str)
        return text.encode("utf-8", "replace") + b"\n"


def is_record(value: Any) -> bool:
    """Whether a value is a trajectory record, as `dump` writes it."""
    return (
        isinstance(value, dict)
        and {"trajectory_id", "task_id", "task", "steps", "source"} <= value.keys()
        and isinstance(value["steps"], list)
        and all(isinstance(step, dict) and "n" in step and "calls" in step for step in value["steps"])
    )


def holds_records(path: Path) -> bool:
    """Whether a file has runs in this form, judging by its first value."""
    try:
        return is_record(next((value for _, value in read_values(path)), None))
    except DataError:
        return False  # the reader of the file will report what is wrong


def load(value: Mapping[str, Any], location: str) -> Trajectory:
    """Read a run back: the inverse of `dump`. Unknown fields are ignored.

    Args:
        value: the record.
        location: its file and line, for the error.

    Raises:
        DataError: a field is missing or of another type.
    """
    try:
        steps = tuple(_load_step(step) for step in value["steps"])
        run = _known(Trajectory, value) | {"steps": steps, "tools": tuple(value.get("tools") or ())}
        loaded = Trajectory(**run)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{location}: a damaged trajectory record ({error!r:.80}). Import the run again.") from error
    if wrong := next(_wrong_types(loaded), None):
        raise DataError(f"{location}: a damaged trajectory record ({wrong}). Import the run again.")
    return loaded


def _wrong_types(run: Trajectory) -> Iterator[str]:
    """Describe the fields of a record that have the wrong type."""
    texts: list[tuple[str, Any]] = [
        (name, getattr(run, name)) for name in ("trajectory_id", "task_id", "task", "system")
    ]
    for number, step in enumerate(run.steps, start=1):
        if step.n != number:
            yield f"step {number} has the number {step.n!r:.20}"
        texts += [("text", step.text), ("thought", step.thought), ("agent", "" if step.agent is None else step.agent)]
        texts += [("the name of a call", call.name) for call in step.calls]
        texts += [("the text of a result", result.text) for result in step.results]
        texts += [("a message", part) for message in step.incoming for part in (message.role, message.text)]
        ids = [call.id for call in step.calls] + [result.call_id for result in step.results]
        texts += [("the id of a call", "" if identity is None else identity) for identity in ids]
    yield from (f"{name} is not a string" for name, value in texts if not isinstance(value, str))
    if not isinstance(run.lost, dict) or not all(type(count) is int for count in run.lost.values()):
        yield "lost is not a mapping of counts"
    if not isinstance(run.source, dict):
        yield "source is not an object"
    if not all(isinstance(tool, dict) for tool in run.tools):
        yield "tools is not a list of objects"


def _load_step(value: Mapping[str, Any]) -> Step:
    parts = {
        "calls": tuple(Call(**_known(Call, call)) for call in value.get("calls") or ()),
        "results": tuple(Result(**_known(Result, result)) for result in value.get("results") or ()),
        "incoming": tuple(Message(**_known(Message, message)) for message in value.get("incoming") or ()),
        "label": _load_label(value["label"]) if value.get("label") is not None else None,
    }
    return Step(**_known(Step, value) | parts)


def _load_label(value: Mapping[str, Any]) -> Label:
    label = Label(**_known(Label, {"by": "human"} | dict(value)))
    if not is_share(label.value):
        raise ValueError(f"label value {label.value!r} is not a number from 0 to 1")
    return label


def _known(kind: type, value: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value[name] for name in kind.__dataclass_fields__ if name in value}  # type: ignore[attr-defined]


_SAFE_ID = re.compile(r"[A-Za-z0-9_.:/#@+=~-]{1,128}")


def log_id(value: str | int | None) -> str | None:
    """Return an id for the log. One that may be text (spaces, length) becomes a hash, to keep user text out of the log.

    Returns:
        The id itself, or `sha256-` and 16 hexadecimal digits; None for None.
    """
    if value is None or _SAFE_ID.fullmatch(str(value)):
        return None if value is None else str(value)
    return "sha256-" + hashlib.sha256(str(value).encode("utf-8", "surrogatepass")).hexdigest()[:16]
