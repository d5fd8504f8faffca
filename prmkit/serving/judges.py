"""Route rows to the production judge, or to a challenger that may replace it."""

import asyncio
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from prmkit.intervals import Abstention
from prmkit.judge.types import Judgement
from prmkit.rows import STEP_TYPE
from prmkit.scoring.rows import RowToScore
from prmkit.scoring.score import result_line
from prmkit.serving.engine import Busy, Engine, Stopping
from prmkit.serving.request_log import JudgeRole


class ScoredRow(NamedTuple):
    """A judge's result for one row."""

    line: dict[str, Any]
    """The line that clients get."""
    judgement: Judgement


@dataclass(frozen=True)
class ServedJudge:
    """One judge with its queue."""

    name: str
    """The judge's name for clients and the log."""
    engine: Engine
    abstention: Abstention | None = None

    async def score(self, rows: Sequence[RowToScore]) -> list[ScoredRow]:
        """Score rows, together with those of all other clients.

        Raises:
            Busy, Stopping: see `Engine.judge`.
        """
        judged = iter(await self.engine.judge([row.request for row in rows if row.request]))
        return [self._scored(row, next(judged) if row.request else None) for row in rows]

    async def try_to_score(self, rows: Sequence[RowToScore]) -> list[ScoredRow]:
        """Score like `score`, but return the status `failed` if the queue is full."""
        try:
            return await self.score(rows)
        except Busy:
            return [self._scored(row, Judgement("failed", reason="the queue is full")) for row in rows]

    def _scored(self, row: RowToScore, judgement: Judgement | None) -> ScoredRow:
        judgement = judgement or Judgement("error", reason=row.reason)
        line = dict(result_line(row, judgement))
        evaluation_type = row.metadata.get("evaluation_type", STEP_TYPE if row.is_step else None)
        if self.abstention:
            line = dict(self.abstention.add_interval(line, evaluation_type))
        return ScoredRow(line | {"judge": self.name}, judgement)


Count = Callable[[RowToScore, ScoredRow, JudgeRole], None]


@dataclass
class Challenger:
    """A second judge alongside the production judge, and the tasks that it gets."""

    judge: ServedJudge
    share: float
    """The fraction of tasks that the challenger scores, 0 to 1."""
    is_shadow: bool
    """Whether both judges score these tasks and clients get the production judge's scores, not the challenger's."""
    _shadows: set["asyncio.Task[None]"] = field(default_factory=set)

    def takes(self, row: RowToScore) -> bool:
        """Return whether the challenger scores this row: the same for all rows of a task, in every process and always.

        A task that is selected with a small fraction is also selected with every larger fraction.
        """
        key = row.task or (row.request.prompt if row.request else "")
        number = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return row.request is not None and int.from_bytes(number) < self.share * 2**64

    async def answer(self, production: ServedJudge, rows: Sequence[RowToScore], count: Count) -> list[ScoredRow]:
        """Score each row with the judge that is responsible for it.

        Args:
            production: the judge for all rows that the challenger does not answer.
            rows: the rows to score.
            count: called with each judge's answers, even those that clients do not get.

        Returns:
            One answer per row, in order.

        Raises:
            Busy, Stopping: raised by the production judge.
        """
        if self.is_shadow:
            self._start_shadow([row for row in rows if self.takes(row)], count)
        taken = [not self.is_shadow and self.takes(row) for row in rows]
        mine = [row for row, is_taken in zip(rows, taken, strict=True) if is_taken]
        others = [row for row, is_taken in zip(rows, taken, strict=True) if not is_taken]
        challenged, answered = await asyncio.gather(self.judge.try_to_score(mine), production.score(others))
        # Rows on which the challenger failed are answered as if there were no challenger.
        failed = [row for row, scored in zip(mine, challenged, strict=True) if scored.judgement.status == "failed"]
        of_challenger, of_production, instead = map(iter, (challenged, answered, await production.score(failed)))
        answers = []
        for row, is_taken in zip(rows, taken, strict=True):
            scored = next(of_challenger if is_taken else of_production)
            count(row, scored, "challenger" if is_taken else "production")
            if is_taken and scored.judgement.status == "failed":
                scored = next(instead)
                count(row, scored, "production")
            answers.append(scored)
        return answers

    def _start_shadow(self, rows: Sequence[RowToScore], count: Count) -> None:
        """Let the challenger score rows in the background; no client waits for it."""
        if rows:
            task = asyncio.create_task(self._shadow(rows, count))
            self._shadows.add(task)  # the event loop keeps only a weak reference to a running task
            task.add_done_callback(self._shadows.discard)

    async def finish(self, seconds: float) -> None:
        """Wait up to `seconds` for the challenger to finish what it has begun, and count its answers."""
        deadline = time.monotonic() + seconds
        await self.judge.engine.stop(seconds)
        if self._shadows:
            await asyncio.wait(self._shadows, timeout=max(0.1, deadline - time.monotonic()))
        for task in list(self._shadows):
            task.cancel()

    async def _shadow(self, rows: Sequence[RowToScore], count: Count) -> None:
        try:
            for row, scored in zip(rows, await self.judge.try_to_score(rows), strict=True):
                count(row, scored, "shadow")
        except Stopping:
            return
