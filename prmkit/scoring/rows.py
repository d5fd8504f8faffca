"""Read the rows to score: one row per prompt, or one row per step of raw runs."""

import argparse
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from prmkit import cli
from prmkit.errors import DataError, UsageError
from prmkit.files import read_json
from prmkit.judge.scorer import DEFAULT_RUN, ShapeOf
from prmkit.judge.sources import JudgeSource
from prmkit.judge.types import Request
from prmkit.layouts import STDIN, Line, Rejected, parse_line, read_values
from prmkit.paths import REPORT
from prmkit.prompts.step import Rubric, StepPrompt, load_rubric, step_prompts
from prmkit.rows import STEP_TYPES, InputRow, given_id, is_judged_row, read_row
from prmkit.trajectories.drawing import MOST_RUNS_ON_A_PAGE, emit_scored, scored_run, write_run_page
from prmkit.trajectories.importing import FileReport, Options, read_runs, totals, warn_of_losses
from prmkit.trajectories.readers import reader_for
from prmkit.trajectories.rows import step_metadata
from prmkit.trajectory import Trajectory
from prmkit.verdict import asked_shape


@dataclass(frozen=True)
class RowToScore:
    """One row of the input."""

    number: int
    """The line number, from 1."""
    id: str | int | None = None
    """The row's `id` or, if it has none, the beginning of the prompt's hash; None for a line that cannot be read."""
    request: Request | None = None
    reason: str | None = None
    """Why the row cannot be judged; then it has no request."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    task: str | None = None
    trajectory: str | None = None
    """`trajectory_id` or, if it is missing, the task."""
    clip_number: int | None = None
    is_step: bool = False
    """Whether the row is one step of a trajectory, not a complete trajectory or a tool category. True for a line that
    cannot be read, because it may be a step."""

    @property
    def request_hash(self) -> str | None:
        """The hash of the prompt, the system prompt and the score keys."""
        return self.request.digest.hex() if self.request else None


def known_keys(data_folder: Path) -> Mapping[str, Sequence[str]]:
    """Return evaluation type -> the score keys that the conversion found; empty if nothing was converted."""
    report = data_folder / REPORT
    return dict(read_json(report).get("score_keys", {})) if report.is_file() else {}


def shapes_for(source: JudgeSource, data: Path | None, keys: tuple[str, ...] = ()) -> ShapeOf:
    """Return the function that decides which scores to request from a judge.

    Args:
        source: the judge; the shapes of its training labels decide, if they are recorded.
        data: converted data that the user passed, whose keys override those shapes.
        keys: the keys that the user passed, which override both.
    """
    asks_data = data is not None or source.shapes is None
    return ShapeOf(keys, known_keys(data or Path("data")) if asks_data else {}, source.shapes)


def read_rows(lines: Iterable[Line], shape_of: ShapeOf) -> Iterator[RowToScore]:
    """Read rows as in `finetune.jsonl`, with or without the judge's turn, or as `{"id", "prompt"}`."""
    for line in lines:
        try:
            value = parse_line(line)
        except Rejected as rejected:
            yield _unreadable(line, None, rejected)
            continue
        try:
            yield prompt_row(read_row(value, line), line.number, shape_of)
        except Rejected as rejected:
            yield _unreadable(line, given_id(value), rejected)


def _unreadable(line: Line, identity: str | int | None, rejected: Rejected) -> RowToScore:
    return RowToScore(line.number, identity, reason=f"{line.unit} {line.number}: {rejected.reason}", is_step=True)


def prompt_row(row: InputRow, number: int, shape_of: ShapeOf) -> RowToScore:
    """Return a prompt as a row to score; if it is unknown which scores it asks for, `reason` says so."""
    shape = shape_of(row.prompt, row.evaluation_type, row.system)
    return RowToScore(
        number,
        row.sha256[:16] if row.id is None else row.id,
        None if isinstance(shape, str) else Request(row.prompt, shape, row.system),
        shape if isinstance(shape, str) else None,
        row.metadata,
        row.task,
        row.trajectory,
        row.clip_number,
        is_step=row.evaluation_type in (None, *STEP_TYPES),
    )


log = logging.getLogger("prmkit")

_SAMPLE = 20
"""The number of values of a file that are read to determine what it contains."""


def holds_runs(name: str) -> bool:
    """Return whether an input contains runs in any format, not per-step prompts. A folder always does.

    Raises:
        UsageError: several formats of runs match.
    """
    path = Path(name)
    if name == STDIN or not path.exists():
        return False
    if not path.is_file():
        return path.is_dir()  # a pipe cannot be read twice
    try:
        first = [value for _, value in islice(read_values(path), _SAMPLE) if not isinstance(value, Rejected)]
        return not any(map(_is_prompt, first)) and reader_for(read_values(path), name) is not None
    except DataError:
        return False  # the row reader will report what is wrong


def _is_prompt(value: Any) -> bool:
    """Return whether a value is a prompt: it asks for a verdict, or contains only a prompt."""
    try:
        row = read_row(value)
    except Rejected:
        return is_judged_row(value)
    return row.answer is None or is_judged_row(value) or asked_shape(row.prompt) is not None


def check_rubric(rubric: Rubric, trained: Sequence[str] | None, judge: str) -> None:
    """Check that a judge was trained with the rubric that is about to be used.

    Args:
        rubric: the rubric to use.
        trained: hashes of the rubrics in the judge's training data; None if its training is unknown.
        judge: the judge's name.

    Raises:
        UsageError: the judge was trained on other prompts.
    """
    if trained is None:
        log.warning("%s: its training rubric is unknown, so it may not have been trained on such prompts", judge)
    elif not trained:
        raise UsageError(
            f"{judge} was trained on ready-made prompts, which contain summaries by strong judges, so it cannot score "
            "raw runs. Score prompts as in finetune.jsonl, or train a judge on labelled runs "
            "(import_trajectories.py --labels)."
        )
    elif rubric.sha256 not in trained:
        raise UsageError(
            f"{judge} was trained with another rubric ({', '.join(each[:12] for each in trained)}; this one is "
            f"{rubric.sha256[:12]}). Pass the judge's rubric file with --rubric."
        )


def step_row(run: Trajectory, prompt: StepPrompt, rubric: Rubric, number: int) -> RowToScore:
    """Turn one step of a run into a row to score."""
    shape = asked_shape(prompt.text)
    step = prompt.step.n
    return RowToScore(
        number,
        f"{run.trajectory_id}#{step}",
        Request(prompt.text, shape) if shape else None,
        None if shape else "the rubric asks for no score",
        {"step": step} | step_metadata(run, step, rubric),
        run.task_id,
        run.trajectory_id,
        step,
        is_step=True,
    )


@dataclass
class RunsToScore:
    """The steps of runs as rows, with the results of the first runs for the table and the page."""

    name: str
    """The file or folder with the runs."""
    rubric: Rubric
    bad_below: float
    """The score below which a step is bad."""
    judge: str
    """The judge's name, for the page."""
    page: Path | None = None
    """The file to write the page to; None for no page."""
    format: str | None = None
    """The format of the runs; None to detect it."""
    unread: int = 0
    """How many runs, or lines of a file with runs, could not be read; known when all rows have been read."""
    _first: dict[str, Trajectory] = field(default_factory=dict)
    _results: dict[str, list[Any]] = field(default_factory=dict)
    _runs: int = 0

    def rows(self) -> Iterator[RowToScore]:
        """Yield every step of every run."""
        reports: list[FileReport] = []
        number = 0
        for run in read_runs([self.name], Options(self.format), reports):
            self._runs += 1
            if len(self._first) < MOST_RUNS_ON_A_PAGE:
                self._first[run.trajectory_id] = run
            for prompt in step_prompts(run, self.rubric):
                number += 1
                yield step_row(run, prompt, self.rubric, number)
        # A file that contains no runs is fine, but a truncated one is an error.
        cut_off = sum(each.passed_over is not None and each.format is not None for each in reports)
        self.unread = sum(each.unreadable.total() for each in reports) + cut_off
        warn_of_losses(reports)
        for line in totals(reports):
            log.info(line)
        if not number:
            raise DataError(f"{self.name}: no run found. See the warnings above, or choose the format with --format.")

    def add(self, row: RowToScore, result: Any) -> None:
        """Keep the result of a row, if its run is one of the first."""
        if row.trajectory in self._first:
            self._results.setdefault(row.trajectory, []).append(result)

    def draw(self, *, table: bool) -> None:
        """Write the table of the first runs to stdout, and the page to its file."""
        scored = [scored_run(run, self._results.get(name, ()), self.bad_below) for name, run in self._first.items()]
        if table:
            emit_scored(scored)
            if self._runs > len(scored):
                cli.emit(f"of the first {len(scored)} of {self._runs} runs")
        if self.page is not None:
            write_run_page(self.page, scored, self.judge, self._runs - len(scored))
            log.info("%s: %d runs", self.page, len(scored))


def runs_to_score(arguments: argparse.Namespace, trained: Sequence[str] | None) -> RunsToScore | None:
    """Return the input as runs; None if it contains prompts, as it always does with --keys.

    Args:
        arguments: the arguments of score_trajectories.py.
        trained: see `check_rubric`.

    Raises:
        UsageError: the judge was trained on other prompts, or flags for runs were passed with an input of prompts.
    """
    if arguments.keys or not (arguments.format or holds_runs(arguments.input)):
        given = [flag for flag in ("rubric", "html", "format") if getattr(arguments, flag)]
        if given:
            raise UsageError(f"--{given[0]} is for raw runs, but {arguments.input} contains prompts. Remove the flag.")
        return None
    judge = str(arguments.run or arguments.model or DEFAULT_RUN)
    rubric = load_rubric(arguments.rubric)
    check_rubric(rubric, trained, judge)
    return RunsToScore(arguments.input, rubric, arguments.bad_below, judge, arguments.html, arguments.format)
