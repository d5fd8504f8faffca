"""The fields next to the messages of a run: ids, task, tools, outcome, solution, people's labels."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import orjson

from prmkit.errors import UsageError
from prmkit.rows import Rejected, name_in
from prmkit.trajectories.content import as_text
from prmkit.trajectories.run import Keys, Run, Turn, UnreadableValue
from prmkit.trajectory import Label

_TASK_IDS = ("task_id", "instance_id", "question_id", "problem_id", "example_id")
_RUN_IDS = ("trajectory_id", "run_id", "session_id", "conversation_id", "id", "uid", "uuid")
_SOLUTIONS = ("reference", "ground_truth", "answer", "target", "solution", "expected_answer", "expected", "gold")
OUTCOME_FIELDS = ("outcome", "reward", "score", "success", "succeeded", "resolved", "is_correct", "passed")
"""Names of the field that says how a run ended; the first that a run has counts."""

GOOD, NEUTRAL, BAD = 1.0, 0.6, 0.2
"""Right, a reasonable try, wrong: the anchors of the default rubric that correspond to people's words for steps."""


def describe(run: Run, value: Mapping[str, Any], keys: Keys, *, read: Collection[str] = ()) -> None:
    """Fill in the fields next to the messages: ids, task, tools, outcome, solution, labels; count the other fields.

    Solutions go only to `reference`: a judge has none when it scores.

    Args:
        run: is filled in; fields that its reader has set are kept.
        value: the object around the messages, including its `metadata`.
        keys: the field names given by the user.
        read: the fields that the reader has already read.
    """
    metadata = value.get("metadata")
    flat = {**(metadata if isinstance(metadata, dict) else {}), **value}
    if keys.task:
        _check_has(flat, keys.task)
    run.task_id = id_of(flat, keys.task) if keys.task else run.task_id or id_of(flat, *_TASK_IDS)
    run.trajectory_id = run.trajectory_id or id_of(flat, *_RUN_IDS)
    run.reference = run.reference or first_of(flat, _SOLUTIONS)
    if keys.outcome:
        _check_has(flat, keys.outcome)
    run.outcome = run.outcome or outcome_of(flat, keys.outcome)
    run.tools = run.tools or tools_of(value.get("tools") or value.get("functions"))
    if keys.labels:
        run.labels = labels_by_index(flat.get(keys.labels), run, keys.label_scale)
    outcomes = {name for name in OUTCOME_FIELDS if isinstance(flat.get(name), int | float | None)}
    known = {*read, *_TASK_IDS, *_RUN_IDS, *_SOLUTIONS, *outcomes, "tools", "functions", "metadata", "name"}
    for name in value.keys() - known - {keys.task, keys.outcome, keys.labels}:
        run.lost[f"field {name[:40]}"] += 1


def _check_has(value: Mapping[str, Any], key: str) -> None:
    if value.get(key) in (None, ""):
        raise UnreadableValue(f"no field {key}")


def id_of(value: Mapping[str, Any], *names: str) -> str | None:
    """The first of some fields that is not empty, as an id: 7, 7.0 and "7" are one id, as in rows.

    Raises:
        UnreadableValue: it is something else than text or a whole number.
    """
    name = _first(value, names)
    try:
        return name and name_in(value, name)
    except Rejected as rejected:
        raise UnreadableValue(f"{name} is neither text nor a whole number") from rejected


def first_of(value: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first of some fields that is not empty, as text."""
    name = _first(value, names)
    return name and as_text(value[name])


def _first(value: Mapping[str, Any], names: Sequence[str]) -> str | None:
    return next((name for name in names if value.get(name) not in (None, "", [], {})), None)


def outcome_of(value: Mapping[str, Any], key: str | None = None) -> dict[str, Any] | None:
    """How the run ended: a boolean is `success`, a number is `score`."""
    for name in (key,) if key else OUTCOME_FIELDS:
        given = value.get(name) if name else None
        if isinstance(given, bool):
            return {"success": given, "score": None}
        if isinstance(given, int | float):
            return {"success": None, "score": float(given)}
    return None


def tools_of(value: Any) -> tuple[dict[str, str], ...]:
    """Names and descriptions of the available tools, from OpenAI's or Anthropic's list, or from such a list as text."""
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError:
            return ()
    found = []
    for each in value if isinstance(value, list) else ():
        body = each.get("function", each) if isinstance(each, dict) else {"name": each}
        if isinstance(body, dict) and isinstance(body.get("name"), str):
            found.append({"name": body["name"], "description": as_text(body.get("description"))})
    return tuple(found)


def labels_by_index(given: Any, run: Run, scale: str) -> dict[int, Label]:
    """The labels of a column: a list with one entry per step, or an object from message position to label.

    An entry of null leaves its step unlabelled.

    Raises:
        UnreadableValue: the column is missing, its length is not the number of steps, or a label is out of range.
        UsageError: a label is -1 on the unit scale. A 0 in other runs then means neutral, and would be read as wrong.
    """
    if isinstance(given, dict):
        pairs = [(int(place) if str(place).isdigit() else -1, label) for place, label in given.items()]
    elif isinstance(given, list):
        steps = [turn.index for turn in run.turns if turn.role == "agent" and (turn.text or turn.thought or turn.calls)]
        if len(steps) != len(given):
            raise UnreadableValue(f"{len(given)} labels for {len(steps)} steps")
        pairs = [(index, label) for index, label in zip(steps, given, strict=True) if index is not None]
    else:
        raise UnreadableValue("no column of labels")
    if scale == "unit" and any(value == -1 for _, value in pairs):
        raise UsageError("a label is -1, so 0 is not the worst label. For -1, 0 and 1 use --label-scale ternary.")
    return {place: label_of(value, scale) for place, value in pairs if value is not None}


def label_of(value: Any, scale: str) -> Label:
    """One label from a person.

    Args:
        value: a number or a boolean.
        scale: `unit` for 0 to 1, `ternary` for -1, 0 and 1.

    Raises:
        UnreadableValue: the value is not on the scale.
    """
    if isinstance(value, int | float):
        if scale == "ternary" and not isinstance(value, bool) and value in (-1, 0, 1):
            return Label({1: GOOD, 0: NEUTRAL, -1: BAD}[int(value)], "human", "ternary")
        if scale == "unit" and 0 <= value <= 1:
            return Label(float(value), "human")
    raise UnreadableValue(f"label {value!s:.40} is not on the scale {scale}")


def first_error(turns: Sequence[Turn], errors: Mapping[int, str | None], kind: Any) -> dict[int, Label]:
    """Labels from known errors: wrong at each error, right before the first, and none elsewhere.

    The other steps after the first error build on it, so they stay unlabelled.

    Args:
        turns: of the run.
        errors: message position -> type of its error; empty for a run without errors.
        kind: of the labels.
    """
    first = min(errors, default=None)
    labels = {
        turn.index: Label(GOOD, "human", kind)
        for turn in turns
        if turn.role == "agent" and turn.index is not None and (first is None or turn.index < first)
    }
    return labels | {place: Label(BAD, "human", kind, type) for place, type in errors.items()}
