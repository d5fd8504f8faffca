"""mini-swe-agent's `.traj.json`: messages, `info`, and `trajectory_format`.

With text models, an observation is a *user* message: no human speaks after the task, so every later user message is
the result of the agent's command. `role: exit` ends a run.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from prmkit.trajectories.content import is_message_list, mapping, turns_of
from prmkit.trajectories.run import FieldNames, Reader, Run, Turn
from prmkit.trajectories.run_fields import id_of
from prmkit.trajectory import Call, Result


def recognises(value: Any) -> bool:
    """Return whether a value has messages and `trajectory_format: mini-swe-agent-…` or (older) `info.mini_version`."""
    if not isinstance(value, dict) or not is_message_list(value.get("messages")):
        return False
    info = value.get("info")
    return str(value.get("trajectory_format", "")).startswith("mini-swe-agent") or (
        isinstance(info, dict) and "mini_version" in info
    )


def read(value: Any, _keys: FieldNames) -> Iterator[Run]:
    """Yield the run of one file."""
    lost: Counter[str] = Counter()
    messages = [message for message in value["messages"] if _role(message) != "exit"]
    lost["harness messages"] += len(value["messages"]) - len(messages)
    turns: list[Turn] = []
    begun = False
    for turn in turns_of(messages, lost):
        begun = begun or turn.role == "agent"
        if turn.role == "user" and begun:
            failed = mapping(messages[turn.index or 0].get("extra")).get("returncode") not in (0, None)
            turns.append(Turn("tool", results=(Result(turn.text, error=failed),), index=turn.index))
        else:
            turns.append(_with_actions(turn, messages))
    yield Run(turns, lost, task_id=id_of(value, "instance_id"))


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None


def _with_actions(turn: Turn, messages: list[Any]) -> Turn:
    """Add the commands that the harness ran to a message without tool calls; they are also in its text."""
    if turn.role != "agent" or turn.calls or turn.index is None:
        return turn
    actions = mapping(messages[turn.index].get("extra")).get("actions") or ()
    commands = [each["command"] for each in actions if isinstance(each, dict) and isinstance(each.get("command"), str)]
    return replace(turn, calls=tuple(Call("bash", {"command": command}) for command in commands))


READER = Reader("mini-swe-agent", recognises, one=read)
