"""PRMBench: chains of mathematical steps. `error_steps` has numbers of `modified_process` steps, from 1."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from prmkit.trajectories.content import as_text
from prmkit.trajectories.run import FieldNames, Reader, Run, Turn
from prmkit.trajectories.run_fields import first_error


def recognises(value: Any) -> bool:
    """Return whether a value has `modified_process` and `error_steps`."""
    return isinstance(value, dict) and {"modified_process", "error_steps", "idx"} <= value.keys()


def read(value: Any, _keys: FieldNames) -> Iterator[Run]:
    """Yield the chain of one line."""
    turns = [Turn("agent", as_text(step), index=index) for index, step in enumerate(value["modified_process"])]
    kind = as_text(value.get("classification")) or None
    errors = {int(step) - 1: kind for step in value["error_steps"]}
    yield Run(
        turns,
        Counter(),
        task=as_text(value.get("modified_question") or value.get("question")),
        trajectory_id=as_text(value["idx"]),
        labels=first_error(turns, errors, "failure"),
    )


READER = Reader("prmbench", recognises, one=read)
