"""Who&When: failed runs with several agents, and the first decisive mistake.

`mistake_step` is an index into `history`, from 0. Every message is a step of the agent in `name`, or in `role`
if there is no name; a message of role `human` is the task.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from prmkit.trajectories.content import as_text
from prmkit.trajectories.run import FieldNames, Reader, Run, Turn, UnreadableValue
from prmkit.trajectories.run_fields import first_error, outcome_of


def recognises(value: Any) -> bool:
    """Return whether a value has `history`, `mistake_step` and `mistake_agent`."""
    return isinstance(value, dict) and {"history", "mistake_step", "mistake_agent", "question"} <= value.keys()


def read(value: Any, _keys: FieldNames) -> Iterator[Run]:
    """Yield the run of one file."""
    turns = [_turn(message, index) for index, message in enumerate(value["history"]) if isinstance(message, dict)]
    mistake = as_text(value["mistake_step"]).strip()
    if not mistake.isdigit() or int(mistake) >= len(value["history"]):
        raise UnreadableValue(f"mistake_step {mistake!r} is not a message of the run")
    yield Run(
        turns,
        Counter({"non-message entries": len(value["history"]) - len(turns)}),
        task=as_text(value["question"]),
        task_id=as_text(value.get("question_ID") or value.get("question_id")) or None,
        outcome=outcome_of({"success": value.get("is_correct", value.get("is_corrected"))}),
        reference=as_text(value.get("ground_truth")) or None,
        labels=first_error(turns, {int(mistake): None}, "first_error"),
    )


def _turn(message: dict[str, Any], index: int) -> Turn:
    text = as_text(message.get("content"))
    if message.get("role") == "human":
        return Turn("user", text, index=index)
    return Turn("agent", text, speaker=as_text(message.get("name") or message.get("role")) or None, index=index)


READER = Reader("who-and-when", recognises, one=read)
