"""What the scores of its steps say about a whole trajectory."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prmkit.judging.judgement import rounded


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

    def add(self, result: Mapping[str, Any]) -> None:
        """Take a result in if it is one of a step that belongs to a task."""
        metadata = result["metadata"]
        task, number = metadata.get("task_id"), metadata.get("clip_number")
        is_step = metadata.get("evaluation_type", "clip") == "clip"
        if self._bad_below is None or not is_step or not isinstance(task, str | int):
            return
        steps = self._steps.setdefault(task, [])
        number = number if isinstance(number, int) else None
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
        """All null where a step has no score, because without it every one of them would be another number."""
        scores = [step.score for step in steps if step.score is not None]
        names = ("min", "product", "mean", "last", "first_bad_step", "first_bad_clip")
        unscored = len(steps) - len(scores)
        if unscored or self._bad_below is None:
            return {"unscored": unscored, **dict.fromkeys(names)}
        bad = next((index for index, score in enumerate(scores) if score < self._bad_below), None)
        values = (min(scores), math.prod(scores), sum(scores) / len(scores), scores[-1])
        found = (bad, None if bad is None else steps[bad].number)
        return {"unscored": 0, **dict(zip(names, (*map(rounded, values), *found), strict=True))}
