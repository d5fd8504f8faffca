"""Score steps in bulk: JSONL in, one line of JSON out for every line in, whatever it was."""

import logging
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import islice, tee
from pathlib import Path
from typing import IO, Any

import orjson

from prmkit import cli
from prmkit.errors import UsageError
from prmkit.files import only_one, open_input, open_stdin, write_text
from prmkit.judge.batching import digest
from prmkit.judge.types import Judgement, Mode, Request, Score, rounded
from prmkit.resumable import append_rows, beside, fingerprint_file, refuse_output, reopen, replace_rows
from prmkit.scoring.rows import Row, ShapeOf, read_rows
from prmkit.scoring.trajectory_scores import Trajectories

log = logging.getLogger("prmkit")

STDIN = "-"

Result = Mapping[str, Any]
"""One line of the output."""


def judged(rows: Iterable[Row], score: Score, mode: Mode, *, summaries: bool) -> Iterator[Result]:
    """One result a row, in their order; those that are known already are passed on.

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
            yield _without_asking(row)
        yield _result(row, judgement) | ({"text": text} if text is not None else {})
    yield from map(_without_asking, waiting)


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


def _without_asking(row: Row) -> Result:
    return row.known or _result(row, Judgement("error", reason=row.reason))


def _result(row: Row, judgement: Judgement) -> dict[str, Any]:
    return {
        "id": row.id,
        "scores": {key: round(distribution.mean, 6) for key, distribution in judgement.scores.items()},
        "score": rounded(judgement.score),
        "std": rounded(judgement.std),
        "label_mass": rounded(judgement.label_mass),
        "reach": rounded(judgement.reach),
        "status": judgement.status,
        "reason": judgement.reason,
        "request_hash": digest(row.request).hex() if row.request else None,
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
        UsageError: the output holds scores of another input, is the input itself, or no file that may be written.
        DataError: the input cannot be read, or another process is writing the same output.
    """
    _refuse_outputs(job)
    counts: Counter[str] = Counter()
    trajectories = Trajectories(job.bad_below)
    with _opened(job.input) as lines, cli.progress_bar() as progress:
        bar = progress.add_task("scoring", total=None)
        for result in _results(job, read_rows(lines, job.shape_of), score, fingerprint):
            counts[result["status"]] += 1
            trajectories.add(result)
            progress.advance(bar)
    if job.bad_below is not None:
        _write_sums(trajectories, job.output)
    log.info("%d rows: %s", counts.total(), ", ".join(f"{n} {status}" for status, n in counts.items()) or "none")
    if counts["unsure"]:
        log.warning(
            "%d of them are unsure: there the judge would rather write something else than a score. An untrained model "
            "and a wrong template look like this.",
            counts["unsure"],
        )
    return counts.total() == counts["ok"]


def _refuse_outputs(job: Job) -> None:
    if job.output is None:
        return
    source = None if job.input == STDIN else Path(job.input)
    refuse_output(job.output, source)
    if job.bad_below is not None:
        sums = trajectories_file(job.output)
        refuse_output(sums, source)
        if sums.exists() and not fingerprint_file(job.output).is_file():
            raise UsageError(f"{sums}: exists and belongs to no scoring output. Choose another --output, or move it.")


def _opened(source: str) -> AbstractContextManager[IO[bytes]]:
    return open_stdin() if source == STDIN else open_input(Path(source))


def _results(job: Job, rows: Iterator[Row], score: Score, fingerprint: Mapping[str, Any]) -> Iterator[Result]:
    if job.output is None:
        for result in judged(rows, score, job.mode, summaries=job.summaries):
            cli.emit(orjson.dumps(result).decode())
            yield result
        return
    with only_one(job.output.parent, f"writing {job.output.name}", lock=f".{job.output.name}.lock"):
        done = reopen(job.output, dict(fingerprint) | {"mode": job.mode, "summaries": job.summaries})
        results = judged(_with_known(done, rows, job.output), score, job.mode, summaries=job.summaries)
        yield from _renewed(done, results, job.output)
        yield from append_rows(job.output, results)


def _with_known(done: Sequence[Result], rows: Iterator[Row], output: Path) -> Iterator[Row]:
    """The rows, the first ones with what an earlier run found for them.

    Raises:
        UsageError: the output holds results of other rows.
    """
    failed = sum(result["status"] == "failed" for result in done)
    if done:
        log.info("%s: %d rows are scored already", output, len(done) - failed)
    if failed:
        log.info("%s: %d rows that failed are asked again", output, failed)
    for number, result in enumerate(done, start=1):
        yield _known(next(rows, None), result, f"{output}:{number}")
    yield from rows


def _known(row: Row | None, result: Result, place: str) -> Row:
    if row and result.get("request_hash") is None:
        return row  # it could not be read, which costs nothing to try again: the line may have been mended
    if row is None or row.id != result["id"]:
        there = "no such row" if row is None else row.id
        wrong = f"holds the scores of {result['id']}, and the input has {there} there"
    elif row.request is None or digest(row.request).hex() != result["request_hash"]:
        wrong = f"holds the scores of {result['id']} for another prompt or other score keys than the input has there"
    elif result["status"] == "failed":
        return row
    else:
        return replace(row, request=None, known={**result, "metadata": row.metadata})
    raise UsageError(f"{place}: {wrong}. Choose another --output for another input.")


def _renewed(done: Sequence[Result], results: Iterator[Result], output: Path) -> Iterator[Result]:
    """The results for the lines that the output has; what is new among them is written back, whatever happens."""
    lines, changed = list(done), False
    try:
        for position, result in enumerate(islice(results, len(lines))):
            changed = changed or result != lines[position]
            lines[position] = result
            yield result
    finally:
        if changed:
            replace_rows(output, lines)


def trajectories_file(output: Path) -> Path:
    """Where the sums of an output's trajectories stand."""
    return beside(output, "trajectories.jsonl")


def _write_sums(trajectories: Trajectories, output: Path | None) -> None:
    if trajectories.unattributed:
        log.warning(
            "lines that belong to no trajectory: %d (not to be read, or without a task_id). Each may be a step that is "
            "missing in one, and a last step is never known to be.",
            trajectories.unattributed,
        )
    lines = [orjson.dumps(summary).decode() for summary in trajectories.summaries()]
    if output is None:
        for line in lines:
            cli.emit(line)
        return
    write_text(trajectories_file(output), "".join(f"{line}\n" for line in lines))
    log.info("%s: %d trajectories", trajectories_file(output), len(lines))
