"""What the scores of its steps say about a whole trajectory."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from prmkit.errors import DataError
from prmkit.judge.types import AGGREGATES, first_below, rounded
from prmkit.scoring.rows import Row


@dataclass
class _Step:
    """One clip of a trajectory."""

    number: int | None
    """`clip_number`; None where the row has none."""
    request_hash: str | None
    """Rows of several judges repeat one prompt, and are one step."""
    score: float | None = None
    is_unsure: bool = False


@dataclass
class _Trajectory:
    task: str | None
    steps: list[_Step] = field(default_factory=list)


class Trajectories:
    """The scores of the steps by trajectory, as they come in."""

    def __init__(self, bad_below: float) -> None:
        """Begin without any; a step is bad if its score is below `bad_below`."""
        self._bad_below = bad_below
        self._trajectories: dict[str, _Trajectory] = {}
        self.unattributed = 0
        """Steps without a trajectory, and lines that could not be read: each may be a step that a trajectory misses."""

    def add(self, row: Row, score: float | None, status: str) -> None:
        """Add the score of a row, if it is one of a step that belongs to a trajectory.

        Raises:
            DataError: the trajectory has another prompt with the same clip number.
        """
        if row.id is not None and not row.is_step:
            return
        if row.trajectory is None:
            self.unattributed += 1
            return
        steps = self._trajectories.setdefault(row.trajectory, _Trajectory(row.task)).steps
        same = next((step for step in steps if step.number == row.clip_number is not None), None)
        if same and same.request_hash != row.request_hash:
            raise DataError(
                f"line {row.number}: clip {row.clip_number} of {row.trajectory} had another prompt before. If these "
                "are several runs of one task, give each run its own trajectory_id in the metadata."
            )
        if not same:
            is_unsure = status == "unsure"
            steps.append(_Step(row.clip_number, row.request_hash, None if is_unsure else score, is_unsure))

    def summaries(self) -> Iterator[dict[str, Any]]:
        """One for each trajectory, its steps by number; those without one at the end, in the order of the input."""
        for name, trajectory in self._trajectories.items():
            steps = sorted(trajectory.steps, key=lambda step: math.inf if step.number is None else step.number)
            yield {"trajectory_id": name, "task_id": trajectory.task, "steps": len(steps)} | self._aggregates(steps)

    def _aggregates(self, steps: Sequence[_Step]) -> dict[str, Any]:
        """All null where a step is missing, unsure or without a score: it could change every one of them."""
        scores = [step.score for step in steps if step.score is not None]
        unsure = sum(step.is_unsure for step in steps)
        faults = {"missing": _missing(steps), "unscored": len(steps) - len(scores) - unsure, "unsure": unsure}
        if any(faults.values()):
            return {**faults, **dict.fromkeys([*AGGREGATES, "first_bad_step", "first_bad_clip"])}
        bad = first_below(scores, self._bad_below)
        return {
            **faults,
            **{name: rounded(aggregate(scores)) for name, aggregate in AGGREGATES.items()},
            "first_bad_step": bad,
            "first_bad_clip": None if bad is None else steps[bad].number,
        }


def _missing(steps: Sequence[_Step]) -> int:
    """How many clip numbers between the smallest and the greatest one do not occur."""
    numbers = [step.number for step in steps if step.number is not None]
    return max(numbers) - min(numbers) + 1 - len(numbers) if numbers else 0
