"""The fields of a run besides its messages: ids, task, tools, outcome, solution, human labels."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import orjson

from prmkit.errors import UsageError
from prmkit.layouts import Rejected
from prmkit.rows import name_in
from prmkit.trajectories.content import as_text, mapping, parsed
from prmkit.trajectories.run import FieldNames, Run, Turn, UnreadableValue
from prmkit.trajectory import Label

TASK_IDS = ("task_id", "instance_id", "question_id", "problem_id", "example_id")
_RUN_IDS = ("trajectory_id", "run_id", "session_id", "conversation_id", "id", "uid", "uuid")
SOLUTIONS = ("reference", "ground_truth", "answer", "target", "solution", "expected_answer", "expected", "gold")
OUTCOME_FIELDS = ("outcome", "reward", "score", "success", "succeeded", "resolved", "is_correct", "passed")
"""Names of the field with a run's outcome; the first with a boolean and the first with a number are used."""

GOOD, NEUTRAL, BAD = 1.0, 0.6, 0.2
"""Scores for steps that are labelled right, neutral and wrong: the corresponding anchors of the default rubric."""


def describe(run: Run, value: Mapping[str, Any], keys: FieldNames, *, read: Collection[str] = ()) -> None:
    """Fill in the fields besides the messages: ids, task, tools, outcome, solution, labels; count the other fields.

    Solutions go only to `reference`, because a judge does not get a solution when it scores.

    Args:
        run: the run to fill in; fields that its reader has set are kept.
        value: the object around the messages, including its `metadata`.
        keys: the field names that the user passed.
        read: the fields that the reader has already read.
    """
    flat = {**mapping(parsed(value.get("metadata"))), **value}
    run.task_id = run.task_id or id_of(flat, *TASK_IDS)
    run.trajectory_id = run.trajectory_id or id_of(flat, *_RUN_IDS)
    run.reference = run.reference or first_of(flat, SOLUTIONS)
    run.outcome = run.outcome or outcome_of(flat)
    run.tools = run.tools or tools_of(value.get("tools") or value.get("functions"))
    read_named(run, value, keys)
    kept = (None, *(run.outcome or {}).values())
    outcomes = {name for name in OUTCOME_FIELDS if flat.get(name) in kept}
    known = {*read, *TASK_IDS, *_RUN_IDS, *SOLUTIONS, *outcomes, "tools", "functions", "metadata", "name"}
    for name in value.keys() - known - {keys.task, keys.outcome, keys.labels}:
        run.lost[f"field {name[:40]}"] += 1


def read_named(run: Run, value: Mapping[str, Any], keys: FieldNames) -> None:
    """Fill in the fields whose names the user passed, from the object around a run or its `metadata`.

    Raises:
        UnreadableValue: a field is missing.
        UsageError: a label is not on the scale.
    """
    flat = {**mapping(parsed(value.get("metadata"))), **value}
    if keys.task:
        _check_has(flat, keys.task)
        run.task_id = id_of(flat, keys.task)
    if keys.outcome:
        _check_has(flat, keys.outcome)
        run.outcome = outcome_of(flat, keys.outcome)
        run.lost[f"field {keys.outcome[:40]}"] += run.outcome is None
    if keys.labels:
        run.labels = labels_by_index(flat.get(keys.labels), run, keys.label_scale)


def _check_has(value: Mapping[str, Any], key: str) -> None:
    if value.get(key) in (None, ""):
        raise UnreadableValue(f"no field {key}")


def id_of(value: Mapping[str, Any], *names: str) -> str | None:
    """Return the first of some fields that is not empty, as an id: 7, 7.0 and "7" are one id, as in rows.

    Raises:
        UnreadableValue: it is neither a string nor an integer.
    """
    name = _first(value, names)
    try:
        return name and name_in(value, name)
    except Rejected as rejected:
        raise UnreadableValue(f"{name} is neither a string nor an integer") from rejected


def first_of(value: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """Return the first of some fields that is not empty, as text."""
    name = _first(value, names)
    return name and as_text(value[name])


def _first(value: Mapping[str, Any], names: Sequence[str]) -> str | None:
    return next((name for name in names if value.get(name) not in (None, "", [], {})), None)


def outcome_of(value: Mapping[str, Any], key: str | None = None) -> dict[str, Any] | None:
    """Return the outcome of a run: the first boolean is `success`, the first number is `score`."""
    given = [value[name] for name in ((key,) if key else OUTCOME_FIELDS) if name in value]
    success = next((each for each in given if isinstance(each, bool)), None)
    score = next((float(each) for each in given if type(each) in (int, float) and abs(each) < _LARGEST), None)
    return None if success is None and score is None else {"success": success, "score": score}


_LARGEST = 1e300
"""Larger integers cannot be converted to floating point numbers."""


def tools_of(value: Any) -> tuple[dict[str, str], ...]:
    """Return names and descriptions of the tools, from OpenAI's or Anthropic's list, or from such a list as text."""
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError:
            return ()
    tools = []
    for each in value if isinstance(value, list) else ():
        body = each.get("function", each) if isinstance(each, dict) else {"name": each}
        if isinstance(body, dict) and isinstance(body.get("name"), str):
            tools.append({"name": body["name"], "description": as_text(body.get("description"))})
    return tuple(tools)


def labels_by_index(labels: Any, run: Run, scale: str) -> dict[int, Label]:
    """Read the labels of a column: a list with one entry per step, or an object from message index to label.

    An entry of null leaves its step unlabelled.

    Raises:
        UnreadableValue: the column is missing, its length is not the number of steps, or a label is out of range.
        UsageError: a number is not on the scale, so labels such as 0 or 1 may also have another meaning.
    """
    _check_scale(labels, scale)
    if isinstance(labels, dict):
        pairs = [(int(index) if str(index).isdigit() else -1, label) for index, label in labels.items()]
    elif isinstance(labels, list):
        steps = [turn.index for turn in run.turns if turn.role == "agent" and (turn.text or turn.thought or turn.calls)]
        if len(steps) != len(labels):
            raise UnreadableValue(f"{len(labels)} labels for {len(steps)} steps")
        pairs = [(index, label) for index, label in zip(steps, labels, strict=True) if index is not None]
    else:
        raise UnreadableValue("no column of labels")
    return {place: label_of(value, scale) for place, value in pairs if value is not None}


def _check_scale(labels: Any, scale: str) -> None:
    """Stop if a number is not on the scale, because the column's other labels may then have another meaning, too."""
    values = labels.values() if isinstance(labels, dict) else labels if isinstance(labels, list) else ()
    for value in values:
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        if scale == "unit" and value == -1:
            raise UsageError(
                "a label is -1, but labels must be from 0 to 1. For labels of -1, 0 and 1 use --label-scale ternary."
            )
        if scale == "unit" and not 0 <= value <= 1:
            raise UsageError(
                f"a label is {value:g}, but labels must be from 0 to 1, so a 1 in this column may not mean the best. "
                "Convert all labels first, for example labels from 1 to 5 with (label - 1) / 4."
            )
        if scale == "ternary" and value not in (-1, 0, 1):
            raise UsageError(
                f"a label is {value:g}, but --label-scale ternary takes only -1, 0 and 1. Convert the labels first."
            )


def label_of(value: Any, scale: str) -> Label:
    """Read one human label.

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
    """Create labels from known errors: wrong at each error, and right before the first one.

    The other steps after the first error build on it, so they stay unlabelled.

    Args:
        turns: the turns of the run.
        errors: message index -> type of the error; empty for a run without errors.
        kind: the kind of the labels.
    """
    first = min(errors, default=None)
    labels = {
        turn.index: Label(GOOD, "human", kind)
        for turn in turns
        if turn.role == "agent" and turn.index is not None and (first is None or turn.index < first)
    }
    return labels | {index: Label(BAD, "human", kind, type) for index, type in errors.items()}
