"""trajectory-judge: runs with at most one injected fault. `failure_step` is the faulty step's index, from 0."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from prmkit.trajectories.content import as_text
from prmkit.trajectories.run import FieldNames, Reader, Run, Turn
from prmkit.trajectories.run_fields import first_error, outcome_of
from prmkit.trajectory import Call, Result


def recognises(value: Any) -> bool:
    """Return whether a value has `goal`, steps with `thought`, `call` and `observation`, and a label with `faulty`."""
    return (
        isinstance(value, dict)
        and {"goal", "instance_id", "steps", "label"} <= value.keys()
        and isinstance(value["label"], dict)
        and "faulty" in value["label"]
    )


def read(value: Any, _keys: FieldNames) -> Iterator[Run]:
    """Yield the run of one line."""
    label = value["label"]
    turns = [_turn(step) for step in value["steps"]]
    errors = {int(label["failure_step"]): as_text(label.get("failure_type")) or None} if label["faulty"] else {}
    yield Run(
        turns,
        Counter(),
        task=as_text(value["goal"]),
        task_id=as_text(value["instance_id"]),
        trajectory_id=as_text(value.get("trajectory_id")) or None,
        outcome=outcome_of({"success": label.get("outcome_correct")}),
        labels=first_error(turns, errors, "first_error"),
    )


def _turn(step: Mapping[str, Any]) -> Turn:
    call, observation = step.get("call"), step.get("observation")
    calls = (Call(as_text(call.get("tool")), call.get("args")),) if isinstance(call, dict) else ()
    failed = isinstance(observation, dict) and observation.get("ok") is False
    results = (Result(as_text(observation), error=failed),) if observation is not None else ()
    return Turn("agent", "", as_text(step.get("thought")), calls, results, index=step.get("index"))


READER = Reader("trajectory-judge", recognises, one=read)
