"""AgentRx: failed runs, and separate files with every failure of a run. Failures refer to messages by number, from 1.

The published data set has runs as `instruction` and steps of `substeps`; the repository has tau-bench's own files,
which the tau-bench reader reads. A failure at the message of another speaker labels no step.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from prmkit.trajectories.content import ROLES, as_text
from prmkit.trajectories.run import FieldNames, Reader, Role, Run, Turn, UnreadableValue
from prmkit.trajectory import Result

_TYPES = {
    "instruction/plan adherence failure": "instruction not followed",
    "invention of new information": "invented information",
    "invalid invocation": "invalid call",
    "misinterpretation of tool output": "misread result",
    "intent-plan misalignment": "wrong intent",
    "underspecified user intent": "underspecified request",
    "intent not supported": "unsupported request",
    "guardrails triggered": "guardrail",
    "system failure": "system failure",
}
"""AgentRx's error types -> those of the default rubric."""


def recognises(value: Any) -> bool:
    """Return whether a value is a run with `substeps`, or the failures of a run."""
    return _is_run(value) or _is_failures(value)


def _is_run(value: Any) -> bool:
    steps = value.get("steps") if isinstance(value, dict) and "trajectory_id" in value else None
    return isinstance(steps, list) and bool(steps) and isinstance(steps[0], dict) and "substeps" in steps[0]


def _is_failures(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("failures"), list):
        return False
    return "trajectory_id" in value and all(
        isinstance(each, dict) and "step_number" in each for each in value["failures"]
    )


def marks(value: Any) -> tuple[str, dict[int, str | None]] | None:
    """Return a run's id, and a dict of message index (from 0) -> type of failure; None for a value without failures."""
    if not _is_failures(value):
        return None
    failures = {int(each["step_number"]) - 1: _type(each.get("failure_category")) for each in value["failures"]}
    return as_text(value["trajectory_id"]), failures


def _type(name: Any) -> str | None:
    plain = " ".join(as_text(name).lower().split())
    return _TYPES.get(plain, plain or None)


def read(value: Any, _keys: FieldNames) -> Iterator[Run]:
    """Yield the run of one value; yield nothing if the value is a list of failures."""
    if _is_failures(value):
        return
    if not _is_run(value):
        raise UnreadableValue("neither a run nor the failures of a run")
    lost: Counter[str] = Counter()
    turns = [turn for step in value["steps"] for turn in _turns(step, lost)]
    identity = as_text(value["trajectory_id"])
    yield Run(turns, lost, task=as_text(value.get("instruction")), task_id=identity, trajectory_id=identity)


def _turns(step: Any, lost: Counter[str]) -> list[Turn]:
    """Return the turns of a step: a message of an agent, in parts, with tool results; or a message of a user."""
    index = int(step["index"]) - 1 if str(step.get("index", "")).isdigit() else None
    texts: dict[Role, list[str]] = {"system": [], "user": [], "agent": [], "tool": []}
    speaker = None
    for part in step.get("substeps") or ():
        name = as_text(part.get("role"))
        role = ROLES.get(name.lower(), "agent")
        texts[role].append(as_text(part.get("content")))
        if role == "agent" and name.lower() not in ROLES:
            speaker = speaker or name
    results = tuple(map(Result, texts["tool"]))
    turns = [
        Turn(role, "\n".join(texts[role]), index=index) for role in texts if role in ("system", "user") and texts[role]
    ]
    if texts["agent"]:
        return [*turns, Turn("agent", "\n".join(texts["agent"]), results=results, speaker=speaker, index=index)]
    lost["entries that are not steps"] += not (turns or results)
    return [*turns, Turn("tool", results=results, index=index)] if results else turns


READER = Reader("agentrx", recognises, one=read, marks=marks)
