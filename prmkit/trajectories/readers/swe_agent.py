"""SWE-agent's `.traj`: `trajectory` has the steps, `history` the messages that the model received.

Demonstrations in `history` are not part of the run; the task is its first user message that is not a demonstration.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from prmkit.trajectories.content import Parts, as_text, mapping
from prmkit.trajectories.run import FieldNames, Reader, Run, Turn
from prmkit.trajectories.run_fields import id_of
from prmkit.trajectory import Call, Result


def recognises(value: Any) -> bool:
    """Return whether a value has a list of steps with `action` and `observation` as `trajectory`."""
    steps = value.get("trajectory") if isinstance(value, dict) else None
    return isinstance(steps, list) and bool(steps) and _is_step(steps[0]) and _is_step(steps[-1])


def _is_step(value: Any) -> bool:
    return isinstance(value, dict) and {"action", "observation"} <= value.keys()


def read(value: Any, _keys: FieldNames) -> Iterator[Run]:
    """Yield the run of one file."""
    lost: Counter[str] = Counter()
    turns = [*_opening(value.get("history"), lost)]
    for index, step in enumerate(value["trajectory"]):
        if _is_step(step):
            turns.append(_turn(step, index))
        else:
            lost["entries that are not steps"] += 1
    lost["submissions"] += bool(mapping(value.get("info")).get("submission"))  # the patch, which the steps contain
    yield Run(turns, lost, task_id=id_of(value, "instance_id"))


def _opening(history: Any, lost: Counter[str]) -> Iterator[Turn]:
    """Yield the system message and the task: the messages before the first answer that is not a demonstration."""
    for message in history if isinstance(history, list) else ():
        if not isinstance(message, dict) or message.get("is_demo"):
            lost["demonstrations"] += 1
            continue
        if message.get("role") not in ("system", "user"):
            return
        parts = Parts(lost)
        parts.add(message.get("content"))
        yield Turn("system" if message["role"] == "system" else "user", parts.text())


def _turn(step: Mapping[str, Any], index: int) -> Turn:
    action, thought, response = (as_text(step.get(key)).strip() for key in ("action", "thought", "response"))
    # The response usually consists of the thought and the action; otherwise it is the text of the step.
    text = "" if not response or (thought in response and (action or thought)) else response
    calls = (Call("action", action),) if action else ()
    results = (Result(as_text(step["observation"])),) if calls or step["observation"] else ()
    return Turn("agent", text, thought, calls, results, index=index)


READER = Reader("swe-agent", recognises, one=read)
