"""Score many steps: rows in, one JSON line per row out, even for rows that cannot be scored."""

import logging
import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from prmkit import cli
from prmkit.errors import DataError, UsageError
from prmkit.files import exclusive_lock, write_text
from prmkit.intervals import Abstention, load_abstention
from prmkit.judge.scorer import Scorer, ShapeOf
from prmkit.judge.sources import fingerprint_of
from prmkit.judge.types import Judgement, Request, first_below, rounded
from prmkit.layouts import STDIN, open_lines
from prmkit.resumable import appending, check_outputs, companion_file, fingerprint_file, reopen, replace_rows
from prmkit.rows import whole_number
from prmkit.scoring.rows import RowToScore, RunsToScore, read_rows
from prmkit.verdict import AGGREGATES, is_share

log = logging.getLogger("prmkit")

WINDOW = 64
"""The number of rows that are read before they are scored together, so that prompts can share a common prefix."""

_CHECKED = 4
"""The number of rows that a server must score again before an output is continued."""
_SAME_SCORE = 0.03
"""The largest difference, from half precision and batching, of two scores of a prompt by one model on a server."""

ResultLine = Mapping[str, Any]
"""One line of the output."""


@dataclass(frozen=True)
class ScoringJob:
    """The settings of one call of `score_trajectories.py`."""

    input: str
    """A file, compressed or not, or `-`."""
    output: Path | None
    """The output file; None for stdout."""
    shape_of: ShapeOf
    summaries: bool
    """Whether to also generate the verdict and add its text to the output."""
    bad_below: float | None
    """The score below which a step is bad in aggregates of trajectories; None for no aggregates."""
    runs: RunsToScore | None = None
    """The input if it contains raw runs; None if it contains prompts."""
    abstention: Abstention | None = None
    """Adds intervals, and marks scores with a wide interval as unsure."""


def abstention_of(scorer: Scorer, level: float | None, max_width: float | None) -> Abstention | None:
    """Return the requested intervals, or None.

    Raises:
        UsageError: the judge is on a server or generates its verdicts, so the calibration does not apply to it.
        DataError: the judge has no calibration.
    """
    if level is None and max_width is None:
        return None
    if not scorer.is_local or scorer.options.mode != "expected":
        raise UsageError("--interval and --abstain-above require a local judge in --mode expected.")
    weights = scorer.source.adapter or scorer.source.model
    return load_abstention(weights, fingerprint_of(scorer.source), level, max_width)


def run_job(job: ScoringJob, scorer: Scorer, fingerprint: Mapping[str, Any]) -> bool:
    """Score the input and write the output, resuming an output file of an interrupted command.

    Args:
        job: what to do.
        scorer: the judge, loaded only if there is something to score.
        fingerprint: identifies comparable scores and is written next to the output; an output with another judge's
            scores is renamed.

    Returns:
        Whether everything was read, and every row got scores that the judge is sure of.

    Raises:
        UsageError: the output has scores of a different input, is the input itself, or is not a writable file.
        DataError: the input cannot be read, another process is writing the same output, or a trajectory has two
            different prompts for one clip.
    """
    _check_outputs(job)
    counts: Counter[str] = Counter()
    trajectories = Trajectories(job.bad_below or 0.0)
    with _open_input(job) as rows, cli.progress_bar() as progress:
        bar = progress.add_task("scoring", total=None)
        for row, result in _results(job, rows, scorer, fingerprint):
            counts[result["status"]] += 1
            if job.runs:
                job.runs.add(row, result)
            if job.bad_below is not None:
                trajectories.add(row, result["score"], result["status"])
            progress.advance(bar)
    if job.bad_below is not None:
        _write_summaries(trajectories, job.output)
    if job.runs:
        job.runs.draw(table=job.output is not None)
    log.info("%d rows: %s", counts.total(), ", ".join(f"{n} {status}" for status, n in counts.items()) or "none")
    if counts["unsure"]:
        log.warning(
            "%d of them are unsure; see the field reason. Low label mass or reach usually means an untrained model or "
            "the wrong template.",
            counts["unsure"],
        )
    return counts.total() == counts["ok"] and not (job.runs and job.runs.unread)


@contextmanager
def _open_input(job: ScoringJob) -> Iterator[Iterator[RowToScore]]:
    if job.runs:
        yield job.runs.rows()
        return
    with open_lines(job.input) as lines:
        yield read_rows(lines, job.shape_of)


def _results(
    job: ScoringJob, rows: Iterator[RowToScore], scorer: Scorer, fingerprint: Mapping[str, Any]
) -> Iterator[tuple[RowToScore, ResultLine]]:
    """Yield every row with its line, once the line is written."""
    if job.output is None:
        for row, result in score_rows(((row, None) for row in rows), scorer, job):
            cli.emit_json_line(_json(result))
            yield row, result
        return
    with exclusive_lock(job.output.parent, f"writing {job.output.name}", lock=f".{job.output.name}.lock"):
        settings: dict[str, Any] = {"mode": scorer.options.mode, "summaries": job.summaries}
        if job.abstention:
            settings["interval"] = [job.abstention.level, job.abstention.max_width]
        done = reopen(job.output, dict(fingerprint) | settings)
        _check_lines(done, job.output)
        _report_done(done, job.output)
        scored = score_rows(_with_results(rows, done, job.output), scorer, job)
        yield from _update_lines(done, scored, job)
        with appending(job.output) as append:
            for number, (row, result) in enumerate(scored):
                if not number:
                    _remove_stale_summaries(job)
                append(result)
                yield row, result


def score_rows(
    rows: Iterable[tuple[RowToScore, ResultLine | None]], scorer: Scorer, job: ScoringJob
) -> Iterator[tuple[RowToScore, ResultLine]]:
    """Score rows, one window at a time; identical rows are scored once.

    Args:
        rows: the rows, each with its result from an earlier command or None.
        scorer: the judge.
        job: the settings.

    Yields:
        The rows in order, each with its output line.
    """
    known: dict[str, tuple[Judgement, str | None]] = {}
    recent: deque[tuple[Request, float]] = deque(maxlen=_CHECKED)
    rows = iter(rows)
    while window := list(islice(rows, WINDOW)):
        recent += [
            (row.request, line["score"]) for row, line in window if row.request and line and line["score"] is not None
        ]
        new = {
            row.request_hash: row.request
            for row, earlier in window
            if row.request and row.request_hash and earlier is None and row.request_hash not in known
        }
        if new and recent:
            _check_same_judge(recent, scorer)
            recent.clear()
        judgements = list(scorer.judgements(new.values()))
        texts = [each.text for each in judgements]
        if job.summaries and scorer.options.mode == "expected":
            texts = [each.text for each in scorer.judgements(new.values(), "generate")]
        known |= dict(zip(new, zip(judgements, texts, strict=True), strict=True))
        for row, earlier in window:
            if earlier is not None:
                yield row, {**earlier, "metadata": row.metadata}
            elif row.request_hash:
                line = result_line(row, *known[row.request_hash], with_text=job.summaries)
                evaluation_type = row.metadata.get("evaluation_type")
                yield row, job.abstention.add_interval(line, evaluation_type) if job.abstention else line
            else:
                line = result_line(row, Judgement("error", reason=row.reason))
                yield row, job.abstention.add_interval(line, None) if job.abstention else line


def _check_same_judge(scored: Iterable[tuple[Request, float]], scorer: Scorer) -> None:
    """Check, before an output is continued, that the server still has the model that gave its last scores.

    A local judge is recognised by its files. A generated verdict may change with the batch, so it proves nothing.

    Raises:
        DataError: the server now scores one of the prompts differently.
    """
    if scorer.is_local or scorer.options.mode != "expected":
        return
    server = scorer.endpoint.name if scorer.endpoint else "the server"
    requests, scores = zip(*scored, strict=True)
    for judgement, score in zip(scorer.judgements(requests), scores, strict=True):
        if judgement.score is not None and abs(judgement.score - score) > _SAME_SCORE:
            raise DataError(
                f"{server} gives {judgement.score:.3f} to a prompt for which the output has {score:.3f}, "
                "so it now serves other weights. Serve the earlier model again, or choose another --output."
            )


def result_line(
    row: RowToScore, judgement: Judgement, text: str | None = None, *, with_text: bool = False
) -> ResultLine:
    """Build one row's line of the output."""
    line = {
        "id": row.id,
        "scores": {key: rounded(distribution.mean) for key, distribution in judgement.scores.items()},
        "score": rounded(judgement.score),
        "std": rounded(judgement.std),
        "label_mass": rounded(judgement.label_mass),
        "reach": rounded(judgement.reach),
        "status": judgement.status,
        "reason": judgement.reason,
        "request_hash": row.request_hash,
        "metadata": row.metadata,
    }
    is_shown = text is not None and (with_text or judgement.status == "unparsed")
    return line | {"text": text} if is_shown else line


# --- files ------------------------------------------------------------------------------------------------------------


def trajectories_file(output: Path) -> Path:
    """Return the file for the summaries of an output's trajectories."""
    return companion_file(output, "trajectories.jsonl")


def _check_outputs(job: ScoringJob) -> None:
    page = job.runs.page if job.runs else None
    summaries = trajectories_file(job.output) if job.output and job.bad_below is not None else None
    own = (job.output, job.output and fingerprint_file(job.output), summaries, page)
    check_outputs(list(filter(None, own)), [None if job.input == STDIN else Path(job.input)])
    if job.output and summaries and summaries.exists() and not fingerprint_file(job.output).is_file():
        raise UsageError(
            f"{summaries} exists but does not belong to a scoring output. Choose another --output, or move it."
        )
    if page and page.is_file() and not page.read_bytes()[:20].lower().startswith((b"<!doctype html", b"<html")):
        raise UsageError(f"--html {page} exists and is not an HTML page, so it would be lost. Choose another file.")


def _check_lines(done: Sequence[ResultLine], output: Path) -> None:
    """Check that earlier lines are results.

    Raises:
        DataError: a line is not a result, because somebody has changed it.
    """
    for number, line in enumerate(done, start=1):
        score = line.get("score")
        is_score = score is None or is_share(score)
        if not is_score or not {"id", "score", "status", "request_hash", "metadata"} <= line.keys():
            raise DataError(
                f"{output}:{number}: not a line of scores. Delete this line and all after it, or start again with "
                "another --output."
            )


def _remove_stale_summaries(job: ScoringJob) -> None:
    """Remove aggregates of an earlier command before the scores change: they may be another judge's, or lack rows."""
    if job.output is None or not (file := trajectories_file(job.output)).is_file():
        return
    file.unlink()
    if job.bad_below is None:
        log.warning("%s: removed, because it was about earlier scores. --aggregate trajectory writes it again.", file)


def _report_done(done: Sequence[ResultLine], output: Path) -> None:
    failed = sum(result["status"] == "failed" for result in done)
    if done:
        log.info("%s: %d rows are already scored", output, len(done) - failed)
    if failed:
        log.info("%s: %d rows that failed are retried", output, failed)


def _with_results(
    rows: Iterator[RowToScore], done: Sequence[ResultLine], output: Path
) -> Iterator[tuple[RowToScore, ResultLine | None]]:
    """Yield the rows with their results from an earlier command; later rows have None.

    Raises:
        UsageError: the output has results of other rows.
    """
    for number, result in enumerate(done, start=1):
        row = next(rows, None)
        about = f"{output}: line {number} is about {result['id']}, but"
        if row is None:
            raise _other_input(f"{about} the input has no row {number}")
        if result["request_hash"] is None:
            yield row, None  # an unreadable row may have been corrected, and a retry costs nothing
            continue
        if row.id != result["id"]:
            raise _other_input(f"{about} row {number} of the input is {row.id}")
        if row.request_hash != result["request_hash"]:
            raise _other_input(f"{about} row {number} of the input has a different prompt or different score keys")
        yield row, None if result["status"] == "failed" else result
    yield from ((row, None) for row in rows)


def _other_input(difference: str) -> UsageError:
    return UsageError(f"{difference}. Choose another --output for a different input.")


def _update_lines(
    done: Sequence[ResultLine], scored: Iterator[tuple[RowToScore, ResultLine]], job: ScoringJob
) -> Iterator[tuple[RowToScore, ResultLine]]:
    """Yield the results for the output's lines; new ones are written even if the command is stopped."""
    lines, changed = list(done), False
    try:
        for position, (row, result) in enumerate(islice(scored, len(lines))):
            changed = changed or result != lines[position]
            lines[position] = result
            yield row, result
    finally:
        if changed and job.output:
            _remove_stale_summaries(job)
            replace_rows(job.output, lines)


def _json(line: ResultLine) -> str:
    import orjson

    return orjson.dumps(line).decode()


# --- trajectories ----------------------------------------------------------------------------------------------------


@dataclass
class _Step:
    """One clip of a trajectory."""

    number: int | None
    """`clip_number`; None if the row has no number."""
    request_hash: str | None
    """The prompt's hash, because rows of several judges with the same prompt are one step."""
    score: float | None = None
    is_unsure: bool = False


@dataclass
class _Trajectory:
    task: str | None
    steps: list[_Step] = field(default_factory=list)
    length: int = 0
    """The number of steps according to the metadata; 0 if it is unknown."""

    @property
    def missing(self) -> int:
        """How many steps are missing: between the lowest and the highest number, or according to the metadata."""
        numbers = [step.number for step in self.steps if step.number is not None]
        gaps = max(numbers) - min(numbers) + 1 - len(numbers) if numbers else 0
        return max(gaps, self.length - len(self.steps))

    def step_of(self, number: int | None, request_hash: str | None) -> _Step | None:
        """Find the step with the row's clip number or, if the row or the step has no number, with the row's prompt."""
        for step in self.steps:
            if step.number == number is not None:
                return step
        for step in self.steps:
            if step.request_hash == request_hash is not None and None in (step.number, number):
                return step
        return None


class Trajectories:
    """Collects the step scores of each trajectory as they arrive."""

    def __init__(self, bad_below: float) -> None:
        """Start empty; a step is bad if its score is below `bad_below`."""
        self._bad_below = bad_below
        self._trajectories: dict[str, _Trajectory] = {}
        self.unattributed = 0
        """Steps without a trajectory, and unreadable lines: each may be a step that a trajectory lacks."""
        self.no_steps: Counter[str] = Counter()
        """Evaluation type -> the number of rows that are not about one step."""

    def add(self, row: RowToScore, score: float | None, status: str) -> None:
        """Add the score of a row, if it is a step that belongs to a trajectory.

        Raises:
            DataError: the trajectory already has a different prompt with this clip number.
        """
        if not row.is_step:
            self.no_steps[str(row.metadata.get("evaluation_type"))] += 1
            return
        if row.trajectory is None:
            self.unattributed += 1
            return
        trajectory = self._trajectories.setdefault(row.trajectory, _Trajectory(row.task))
        trajectory.length = max(trajectory.length, whole_number(row.metadata.get("steps")) or 0)
        request_hash = row.request_hash
        same = trajectory.step_of(row.clip_number, request_hash)
        if same and same.request_hash != request_hash:
            raise DataError(
                f"line {row.number}: clip {row.clip_number} of {row.trajectory} already occurred with a different "
                "prompt. If these are several runs of one task, give each run its own trajectory_id in the metadata."
            )
        if same:
            same.number = row.clip_number if same.number is None else same.number
        else:
            is_unsure = status == "unsure"
            trajectory.steps.append(_Step(row.clip_number, request_hash, None if is_unsure else score, is_unsure))

    def summaries(self) -> Iterator[dict[str, Any]]:
        """Yield one aggregate per trajectory, with steps by number; steps without a number are last, in input order."""
        for name, trajectory in self._trajectories.items():
            steps = sorted(trajectory.steps, key=lambda step: math.inf if step.number is None else step.number)
            about = {"trajectory_id": name, "task_id": trajectory.task, "steps": len(steps)}
            yield about | self._aggregates(steps, trajectory.missing)

    def _aggregates(self, steps: Sequence[_Step], missing: int) -> dict[str, Any]:
        """Return the aggregates; all are null if a step is missing, unsure or unscored: it could change any of them.

        Those that need the order of the steps are also null if it is unknown, because only some steps have a number.
        """
        unnumbered = sum(step.number is None for step in steps)
        unordered = unnumbered if unnumbered < len(steps) else 0
        scores = [step.score for step in steps if step.score is not None]
        unsure = sum(step.is_unsure for step in steps)
        faults = {"missing": missing, "unscored": len(steps) - len(scores) - unsure, "unsure": unsure}
        counted = {**faults, "unnumbered": unordered}
        if any(faults.values()):
            return {**counted, **dict.fromkeys([*AGGREGATES, "first_bad_step", "first_bad_clip"])}
        bad = first_below(scores, self._bad_below)
        found = {
            **{name: rounded(aggregate(scores)) for name, aggregate in AGGREGATES.items()},
            "first_bad_step": bad,
            "first_bad_clip": None if bad is None else steps[bad].number,
        }
        return counted | found | (dict.fromkeys(("last", "first_bad_step", "first_bad_clip")) if unordered else {})


def _write_summaries(trajectories: Trajectories, output: Path | None) -> None:
    if trajectories.unattributed:
        log.warning(
            "lines without a trajectory, as they are unreadable or have no task_id: %d. Trajectories may lack these "
            "steps; a missing last step cannot be detected.",
            trajectories.unattributed,
        )
    if trajectories.no_steps:
        types = ", ".join(f"{count} {name}" for name, count in trajectories.no_steps.items())
        log.info("--aggregate leaves out rows that are not about one step (by evaluation type): %s", types)
    summaries = list(trajectories.summaries())
    if output is None:
        for summary in summaries:
            cli.emit_json_line(_json(summary))
        return
    write_text(trajectories_file(output), "".join(f"{_json(summary)}\n" for summary in summaries))
    log.info("%s: %d trajectories", trajectories_file(output), len(summaries))
