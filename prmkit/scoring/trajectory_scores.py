"""What the scores of its steps say about a whole trajectory."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prmkit.judge.types import AGGREGATES, first_below, rounded
from prmkit.scoring.rows import whole_number


@dataclass(frozen=True)
class _Step:
    """One clip of a trajectory."""

    number: int | None
    """`clip_number`; None where the row has none."""
    scores: list[float | None]
    """One a row: several judges' rows of one clip are one step."""

    @property
    def score(self) -> float | None:
        known = [score for score in self.scores if score is not None]
        return sum(known) / len(known) if known else None


class Trajectories:
    """The scores of the steps by task, as they come in."""

    def __init__(self, bad_below: float | None) -> None:
        self._bad_below = bad_below
        self._steps: dict[str | int, list[_Step]] = {}
        self.unattributed = 0
        """Steps without a task, and lines that could not be read: each may be a step that a trajectory misses."""

    def add(self, result: Mapping[str, Any]) -> None:
        """Take a result in if it is one of a step that belongs to a task."""
        metadata = result["metadata"]
        task, number = metadata.get("task_id"), whole_number(metadata.get("clip_number"))
        if self._bad_below is None or metadata.get("evaluation_type", "clip") != "clip":
            return
        if not isinstance(task, str | int):
            self.unattributed += 1
            return
        steps = self._steps.setdefault(task, [])
        same = next((step for step in steps if step.number == number is not None), None)
        if same:
            same.scores.append(result["score"])
        else:
            steps.append(_Step(number, [result["score"]]))

    def summaries(self) -> Iterator[dict[str, Any]]:
        """One a task, its steps by number; those without one behind the others, in the order of the input."""
        for task, steps in self._steps.items():
            steps.sort(key=lambda step: math.inf if step.number is None else step.number)
            yield {"task_id": task, "steps": len(steps)} | self._aggregates(steps)

    def _aggregates(self, steps: Sequence[_Step]) -> dict[str, Any]:
        """All null where a step has no score or is missing: with it, every one of them might be another number."""
        scores = [step.score for step in steps if step.score is not None]
        faults = {"missing": _missing(steps), "unscored": len(steps) - len(scores)}
        if any(faults.values()) or self._bad_below is None:
            return {**faults, **dict.fromkeys([*AGGREGATES, "first_bad_step", "first_bad_clip"])}
        bad = first_below(scores, self._bad_below)
        return {
            **faults,
            **{name: rounded(aggregate(scores)) for name, aggregate in AGGREGATES.items()},
            "first_bad_step": bad,
            "first_bad_clip": None if bad is None else steps[bad].number,
        }


def _missing(steps: Sequence[_Step]) -> int:
    """How many clip numbers are not there between the smallest and the greatest one that are."""
    numbers = [step.number for step in steps if step.number is not None]
    return max(numbers) - min(numbers) + 1 - len(numbers) if numbers else 0
