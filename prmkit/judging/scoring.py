"""Score steps in bulk: JSONL in, one line of JSON out for every line in, whatever it was."""

import logging
import math
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain, tee
from pathlib import Path
from typing import IO, Any

import orjson

from prmkit import cli
from prmkit.errors import UsageError
from prmkit.files import only_one, open_input, write_text
from prmkit.judging.judgement import LOW_COVERAGE, Judgement, Mode, Request, rounded
from prmkit.judging.rows import Row, ShapeOf, read_rows

log = logging.getLogger("prmkit")

STDIN = "-"

Score = Callable[[Iterable[Request], Mode], Iterator[Judgement]]
"""Judges a stream of requests in their order."""


def judged(rows: Iterable[Row], score: Score, mode: Mode, *, summaries: bool) -> Iterator[dict[str, Any]]:
    """One result a row, in their order.

    Args:
        rows: read a few batches ahead.
        score: the judge.
        mode: how to score.
        summaries: also let the model write its verdict, and add the text.
    """
    waiting: deque[Row] = deque()

    def requests() -> Iterator[Request]:
        for row in rows:
            waiting.append(row)
            if row.request:
                yield row.request

    for judgement, text in _with_text(requests(), score, mode, summaries=summaries):
        while not (row := waiting.popleft()).request:
            yield _result(row, _unreadable(row))
        yield _result(row, judgement) | ({"text": text} if text is not None else {})
    yield from (_result(row, _unreadable(row)) for row in waiting)


def _with_text(
    requests: Iterator[Request], score: Score, mode: Mode, *, summaries: bool
) -> Iterator[tuple[Judgement, str | None]]:
    """Judgements, each with the written verdict: where it was asked for, or where it could not be read."""
    if mode == "expected" and summaries:
        again, requests = tee(requests)
        for judgement, written in zip(score(requests, "expected"), score(again, "generate"), strict=True):
            yield judgement, written.text
    else:
        for judgement in score(requests, mode):
            yield judgement, judgement.text if summaries or judgement.status == "unparsed" else None


def _unreadable(row: Row) -> Judgement:
    return Judgement("error", reason=row.reason)


def _result(row: Row, judgement: Judgement) -> dict[str, Any]:
    return {
        "id": row.id,
        "scores": {key: round(distribution.mean, 6) for key, distribution in judgement.scores.items()},
        "score": rounded(judgement.score),
        "std": rounded(judgement.std),
        "coverage": rounded(judgement.coverage),
        "status": judgement.status,
        "reason": judgement.reason,
        "metadata": row.metadata,
    }


# --- the whole flow ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What `score_trajectories.py` was asked to do."""

    input: str
    """A file, packed or not, or `-`."""
    output: Path | None
    """None for stdout."""
    shape_of: ShapeOf
    mode: Mode
    summaries: bool
    bad_below: float | None
    """Also sum up every trajectory, with this as the limit of a bad step; None to leave that out."""


def run(job: Job, score: Score, fingerprint: Mapping[str, Any]) -> bool:
    """Score the input and write the output; with an output file, go on where an earlier run has stopped.

    Args:
        job: what to do.
        score: the judge. It is called only if there is something to score.
        fingerprint: what makes scores comparable, kept beside the output; those of another judge are moved aside.

    Returns:
        Whether every row got its scores.

    Raises:
        UsageError: the output holds scores of another input.
        DataError: the input cannot be read, or another process is writing the same output.
    """
    counts: Counter[str] = Counter()
    unwilling = 0
    trajectories = _Trajectories(job.bad_below)
    with _opened(job.input) as lines, cli.progress_bar() as progress:
        bar = progress.add_task("scoring", total=None)
        for result in _results(job, read_rows(lines, job.shape_of), score, fingerprint):
            counts[result["status"]] += 1
            unwilling += result["coverage"] is not None and result["coverage"] < LOW_COVERAGE
            trajectories.add(result)
            progress.advance(bar)
    if job.bad_below is not None:
        _write_summaries(trajectories, job.output)
    log.info("%d rows: %s", counts.total(), ", ".join(f"{n} {status}" for status, n in counts.items()) or "none")
    if unwilling:
        log.warning(
            "%d of them have a coverage below %g: there the judge would rather write something else than a score. "
            "An untrained model and a wrong template look like this.",
            unwilling,
            LOW_COVERAGE,
        )
    return counts.total() == counts["ok"]


def _opened(source: str) -> AbstractContextManager[IO[bytes]]:
    return nullcontext(sys.stdin.buffer) if source == STDIN else open_input(Path(source))


def _results(
    job: Job, rows: Iterator[Row], score: Score, fingerprint: Mapping[str, Any]
) -> Iterator[Mapping[str, Any]]:
    if job.output is None:
        for result in judged(rows, score, job.mode, summaries=job.summaries):
            cli.emit(orjson.dumps(result).decode())
            yield result
        return
    from prmkit.judging.predictions import append_rows, resume

    with only_one(job.output.parent, f"writing {job.output.name}", lock=f".{job.output.name}.lock"):
        done = resume(job.output, dict(fingerprint) | {"mode": job.mode, "summaries": job.summaries})
        if done:
            log.info("%s: %d rows are scored already", job.output, len(done))
        yield from _already_scored(done, rows, job.output)
        yield from append_rows(job.output, judged(rows, score, job.mode, summaries=job.summaries))


def _already_scored(
    done: Sequence[Mapping[str, Any]], rows: Iterator[Row], output: Path
) -> Iterator[Mapping[str, Any]]:
    for number, result in enumerate(done, start=1):
        row = next(rows, None)
        if row is None or row.id != result["id"]:
            raise UsageError(
                f"{output}:{number}: holds the scores of {result['id']}, and the input has "
                f"{'no such row' if row is None else row.id} there. Choose another --output for another input."
            )
        yield result


def lazily(load: Callable[[], Score]) -> Score:
    """Load a judge when it gets its first request, and not when there is none."""
    loaded: list[Score] = []

    def score(requests: Iterable[Request], mode: Mode) -> Iterator[Judgement]:
        requests = iter(requests)
        for first in requests:
            if not loaded:
                loaded.append(load())
            yield from loaded[0](chain([first], requests), mode)

    return score


# --- trajectories --------------------------------------------------------------------------------------------------


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


class _Trajectories:
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


def trajectories_file(output: Path) -> Path:
    """Where the summaries of an output's trajectories stand."""
    return output.with_suffix(".trajectories.jsonl")


def _write_summaries(trajectories: _Trajectories, output: Path | None) -> None:
    lines = [orjson.dumps(summary).decode() for summary in trajectories.summaries()]
    if output is None:
        for line in lines:
            cli.emit(line)
        return
    write_text(trajectories_file(output), "".join(f"{line}\n" for line in lines))
    log.info("%s: %d trajectories", trajectories_file(output), len(lines))
