"""Render scored runs: a table on the terminal, and an HTML page without scripts."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prmkit import cli
from prmkit.files import render_page, write_text
from prmkit.trajectories.content import as_text
from prmkit.trajectory import Step, Trajectory

_TEMPLATE = Path(__file__).with_name("run_page.html.j2")
MOST_RUNS_ON_A_PAGE = 50
_MOST_RUNS_IN_A_TABLE = 20
_LONGEST_TEXT = 4_000
"""The maximum number of characters of a string on the page; a tool may have returned megabytes."""


@dataclass(frozen=True)
class ScoredStep:
    """A step with the judge's score."""

    step: Step
    score: float | None
    """The judge's score; None if there is no score."""
    label_mass: float | None = None
    reason: str | None = None
    """The reason why there is no score."""
    is_unsure: bool = False
    """Whether the score is unreliable (`status` unsure)."""


@dataclass(frozen=True)
class ScoredRun:
    """A run whose steps were scored."""

    run: Trajectory
    steps: Sequence[ScoredStep]
    bad_below: float

    @property
    def known(self) -> list[float]:
        """The scores of all scored steps."""
        return [step.score for step in self.steps if step.score is not None]

    @property
    def worst(self) -> ScoredStep | None:
        """The step with the lowest score, the first one in a tie; None if no step has a score."""
        scored = [step for step in self.steps if step.score is not None]
        return min(scored, key=lambda each: each.score if each.score is not None else 1.0, default=None)

    @property
    def first_bad(self) -> int | None:
        """The number of the first step with a score below `bad_below`; None if there is no such step."""
        return next(
            (each.step.n for each in self.steps if each.score is not None and each.score < self.bad_below), None
        )

    def mark(self, each: ScoredStep) -> str:
        """Return a note on a step: "first bad step" ("known" if an earlier one has no reliable score), "unsure"."""
        marks = []
        if each.step.n == self.first_bad:
            before = self.steps[: each.step.n - 1]
            is_known = all(step.score is not None and not step.is_unsure for step in before)
            marks.append("first bad step" if is_known else "first known bad step")
        return ", ".join([*marks, *(["unsure"] if each.is_unsure else [])])


def scored_run(run: Trajectory, results: Iterable[Mapping[str, Any]], bad_below: float) -> ScoredRun:
    """Match the lines of `score_trajectories.py` to their steps, by `metadata.clip_number`."""
    by_step = {result["metadata"]["clip_number"]: result for result in results}
    steps = []
    for step in run.steps:
        line = by_step.get(step.n, {})
        steps.append(
            ScoredStep(
                step, line.get("score"), line.get("label_mass"), line.get("reason"), line.get("status") == "unsure"
            )
        )
    return ScoredRun(run, steps, bad_below)


# --- the terminal ---------------------------------------------------------------------------------------------------


def emit_scored(runs: Sequence[ScoredRun]) -> None:
    """Show a table of the steps of one run, or a table of several runs, those with the worst steps first."""
    if len(runs) == 1:
        _emit_steps(runs[0])
        return
    ordered = sorted(runs, key=lambda each: min(each.known, default=2.0))
    rows = [
        (
            each.run.trajectory_id,
            str(len(each.steps)),
            _number(min(each.known, default=None)),
            _number(sum(each.known) / len(each.known) if each.known else None),
            "" if each.first_bad is None else str(each.first_bad),
            _line(each.run.task, 40),
        )
        for each in ordered[:_MOST_RUNS_IN_A_TABLE]
    ]
    columns = ("run", "steps", "worst", "mean", "first bad", "task")
    cli.emit_table("", columns, rows, numeric=columns[1:5], optional=("task", "mean"))
    if len(ordered) > _MOST_RUNS_IN_A_TABLE:
        cli.emit(f"and {len(ordered) - _MOST_RUNS_IN_A_TABLE} more runs, whose worst steps are better")


def _emit_steps(scored: ScoredRun) -> None:
    rows = []
    for each in scored.steps:
        what = _line(said(each.step), 40)
        rows.append(
            (str(each.step.n), _number(each.score), _bar(each.score), _number(each.label_mass), scored.mark(each), what)
        )
    columns = ("step", "score", "", "label mass", " ", "what the agent did")
    cli.emit_table(_line(scored.run.task, 76), columns, rows, numeric=("step", "score", "label mass"), optional=("",))
    for each in scored.steps:
        if each.reason:
            cli.emit(f"step {each.step.n} has no score: {each.reason}")


def said(step: Step) -> str:
    """Summarise a step in one line: its calls or, without calls, its text."""
    if step.calls:
        return ", ".join(f"{call.name} {as_text(call.arguments)}" for call in step.calls)
    return step.text or step.thought


def _line(text: str, longest: int) -> str:
    plain = " ".join(text.split())
    return plain if len(plain) <= longest else plain[: longest - 3] + "..."


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _bar(score: float | None) -> str:
    return "" if score is None else "#" * round(score * 10)


# --- the page -------------------------------------------------------------------------------------------------------


def write_run_page(path: Path, runs: Sequence[ScoredRun], judge: str, left_out: int = 0) -> None:
    """Write a page with each run's scores as bars and its steps, of which the worst is expanded.

    Args:
        path: the path of the HTML file.
        runs: the runs; at most `MOST_RUNS_ON_A_PAGE` are shown, and the page says how many are not.
        judge: the name of the judge, for the heading.
        left_out: the number of scored runs that are not in `runs`.
    """
    # All text on the page is from an agent or from web pages that it read, so it must be escaped.
    filters = {"said": said, "number": _number, "line": _line, "cut": _cut, "json": _json}
    shown = runs[:MOST_RUNS_ON_A_PAGE]
    unseen = left_out + len(runs) - len(shown)
    write_text(path, render_page(_TEMPLATE, filters, runs=shown, left_out=unseen, judge=judge))


def _cut(text: str) -> str:
    if len(text) <= _LONGEST_TEXT:
        return text
    half = _LONGEST_TEXT // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters left out ...]\n{text[-half:]}"


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=1, default=str)
