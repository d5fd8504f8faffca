"""`evaluate_judge.py --best-of-n`: how often the run that a judge picks out of N succeeds.

For every task with several runs and every N, the result is the exact mean over all subsets of N runs. Among runs with
equal scores the pick is random. The judge is compared with a random pick, the best possible pick, and picks that use
only superficial features of a run, such as its length.
"""

import argparse
import json
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import comb
from pathlib import Path
from typing import Any

from prmkit import cli
from prmkit.errors import DataError, ExitCode, UsageError
from prmkit.evaluation.estimates import Estimate, mean
from prmkit.evaluation.exam import ExamRun, ExamStep, task_of_run
from prmkit.evaluation.exam_answers import is_repeated, read_exam_answers, run_of
from prmkit.evaluation.exam_asking import prompts_of_run, score_steps
from prmkit.evaluation.exam_command import check_training, folder_of
from prmkit.evaluation.exam_report import interval_cell, value_cell
from prmkit.files import numbered_jsonl, read_jsonl, write_json
from prmkit.judge.scorer import judge_source
from prmkit.judge.sources import check_folders
from prmkit.layouts import LINE_SUFFIXES, is_named
from prmkit.prompts.step import load_rubric
from prmkit.rows import name_at, whole_number
from prmkit.scoring.rows import check_rubric
from prmkit.trajectories.importing import FileReport, read_runs, warn_of_losses
from prmkit.trajectories.run_fields import OUTCOME_FIELDS
from prmkit.trajectory import Result, Trajectory, outcome_number
from prmkit.verdict import AGGREGATES, is_share

log = logging.getLogger("prmkit")

JSON_FILE = "best_of_n.json"


@dataclass(frozen=True)
class Attempt:
    """One run of a task."""

    trajectory_id: str
    task_id: str
    outcome: float
    """From 0 to 1."""
    steps: int
    errors: int | None = None
    """The number of tool results that are errors."""
    scores: tuple[float, ...] | None = None
    """The scores of the run's steps, in order."""


def expected_pick(scores: Sequence[float], outcomes: Sequence[float], n: int) -> float:
    """Return the mean outcome of the run with the highest score, over all subsets of `n` runs; ties are averaged.

    The highest score of a subset is s if all its runs score at most s, but not all below s:
    C(at most s, n) - C(below s, n) of all C(m, n) subsets. Tied runs are picked equally often.

    Args:
        scores: one score per run.
        outcomes: one outcome per run.
        n: the size of the subsets, from 1 to the number of runs.
    """
    by_score: dict[float, list[float]] = defaultdict(list)
    for score, outcome in zip(scores, outcomes, strict=True):
        by_score[score].append(outcome)
    below, total = 0, 0.0
    for score in sorted(by_score):
        group = by_score[score]
        subsets = comb(below + len(group), n) - comb(below, n)
        total += subsets * math.fsum(group) / len(group)
        below += len(group)
    return total / comb(len(scores), n)


Pick = Callable[[Attempt], float]


def picks(attempts: Sequence[Attempt]) -> dict[str, Pick]:
    """Return every way to pick that the runs allow: first the judge's aggregates, then those that a judge must beat."""
    found: dict[str, Pick] = {}
    if all(each.scores for each in attempts):
        found |= {f"judge: {name}": _by(aggregate) for name, aggregate in AGGREGATES.items()}
    found |= {
        "random": lambda each: 0.0,
        "longest": lambda each: float(each.steps),
        "shortest": lambda each: -float(each.steps),
    }
    if all(each.errors is not None for each in attempts):
        found["fewest errors"] = lambda each: -float(each.errors or 0)
    return found | {"oracle": lambda each: each.outcome}


def _by(aggregate: Callable[[Sequence[float]], float]) -> Pick:
    """Pick by an aggregate, rounded to twelve digits: a product's last digit depends on the order of its factors."""
    return lambda each: float(f"{aggregate(each.scores or ()):.12g}")


def measure_picks(attempts: Sequence[Attempt]) -> dict[str, list[Estimate]]:
    """Return the success rate for each N up to the most runs of any task, over the tasks with at least N runs."""
    by_task: dict[str, list[Attempt]] = defaultdict(list)
    for each in attempts:
        by_task[each.task_id].append(each)
    most = max(map(len, by_task.values()))
    return {name: [_success(by_task, pick, n) for n in range(1, most + 1)] for name, pick in picks(attempts).items()}


def _success(by_task: Mapping[str, Sequence[Attempt]], pick: Pick, n: int) -> Estimate:
    values = {
        task: expected_pick(list(map(pick, runs)), [run.outcome for run in runs], n)
        for task, runs in by_task.items()
        if len(runs) >= n
    }
    return mean(list(values.values()), list(values))


# --- reading ----------------------------------------------------------------------------------------------------------


def pick_best_of_n(arguments: argparse.Namespace, of_judge: Sequence[str] = ()) -> ExitCode:
    """Read runs with outcomes, score them, and show how often each way to pick succeeds.

    Args:
        arguments: the arguments of evaluate_judge.py.
        of_judge: the flags on the command line that only a judge uses.

    Raises:
        DataError: there are no outcomes, no task has two runs, or nothing was scored.
        UsageError: the arguments contradict each other, or the judge was trained with a different rubric or on a task.
    """
    file = arguments.best_of_n
    ready = _outcome_lines(file)
    if ready and of_judge:
        raise UsageError(f"{file} has outcomes but no runs, so no judge is used. Remove {', '.join(of_judge)}.")
    runs = [] if ready else runs_with_outcome(file)
    attempts = ready or [attempt_of(run) for run in runs]
    folder = arguments.output or folder_of(arguments, "best_of_n", file)
    if arguments.predictions:
        attempts = _with_predictions(attempts, arguments.predictions, file)
    elif runs:
        attempts = _with_judge(attempts, runs, folder, arguments)
    attempts, left_out = _comparable(attempts)
    results = measure_picks(attempts)
    report = _as_json(file, attempts, left_out, results)
    write_json(folder / JSON_FILE, report)
    if arguments.json:
        cli.emit_json(report)
    else:
        _show(attempts, left_out, results)
    return ExitCode.DONE


_OUTCOMES = tuple(name for name in OUTCOME_FIELDS if name != "score")
"""Fields with an outcome. `score` is not one, because here it is the judge's score of a step."""


def _outcome_lines(file: Path) -> list[Attempt]:
    """Read lines that have an outcome but contain no run; empty for a file of runs.

    A line is a run with its `scores`, a step with its `score` (from score_trajectories.py, with the outcome added), or
    a run whose scores are in the file of `--predictions`.
    """
    if not file.is_file() or not is_named(file, LINE_SUFFIXES):
        return []
    if not _is_outcome_line(next(iter(read_jsonl(file)), None)):
        return []
    runs: dict[str, Attempt] = {}
    steps: dict[str, dict[int, float | None]] = defaultdict(dict)
    for number, value in numbered_jsonl(file):
        place = f"{file}:{number}"
        if not _is_outcome_line(value):
            raise DataError(f"{place}: unlike the first line, this one has no task_id and outcome.")
        attempt, step, score = _outcome_line(value, place)
        name = attempt.trajectory_id
        if name in runs and runs[name].task_id != attempt.task_id:
            raise DataError(
                f"{place}: trajectory_id {name} is in task {attempt.task_id} and in task {runs[name].task_id}. "
                f"Make the ids unique in the whole file, for example {attempt.task_id}.{name}."
            )
        if name in runs and (step is None or step in steps[name] or runs[name].outcome != attempt.outcome):
            raise DataError(
                f"{place}: a second line for {name}. Give each run its own trajectory_id and each step a number."
            )
        runs[name] = attempt
        if step is not None:
            steps[name][step] = score
    return [_of_steps(run, steps[name]) if name in steps else run for name, run in runs.items()]


def _is_outcome_line(value: Any) -> bool:
    """Return whether a value has an outcome but is not a run in any format of import_trajectories.py."""
    if not isinstance(value, dict):
        return False
    nested = {key for key, item in value.items() if isinstance(item, list | dict)}
    about = _about(value)
    return nested <= {"scores", "metadata", "outcome"} and "task_id" in about and any(key in about for key in _OUTCOMES)


def _about(value: Mapping[str, Any]) -> dict[str, Any]:
    metadata = value.get("metadata")
    return {**(metadata if isinstance(metadata, dict) else {}), **value}


def _outcome_line(value: Mapping[str, Any], place: str) -> tuple[Attempt, int | None, float | None]:
    """Return the run of a line; for a line about one step, also the step's number and score."""
    about = _about(value)
    given = {key: outcome_number(about[key]) for key in _OUTCOMES if key in about}
    if {0.0, 1.0} <= set(given.values()):
        named = ", ".join(f"{key} {value:g}" for key, value in given.items() if value is not None)
        raise DataError(f"{place}: its outcomes contradict each other ({named}). Keep only the right one.")
    outcome = next(iter(given.values()), None)
    task, name = (name_at(place, about, key) for key in ("task_id", "trajectory_id"))
    if outcome is None or task is None:
        raise DataError(f"{place}: task_id, or an outcome from 0 to 1 ({', '.join(_OUTCOMES)}), is missing.")
    attempt = Attempt(name or f"{task}.{about.get('trial', place)}", task, outcome, 0)
    scores = value.get("scores")
    if isinstance(scores, list) or ("scores" in value and "score" not in value):
        if not isinstance(scores, list) or not scores or not all(map(is_share, scores)):
            raise DataError(f"{place}: scores is not a list of numbers from 0 to 1, one per step.")
        return replace(attempt, steps=len(scores), scores=tuple(map(float, scores))), None, None
    if "score" not in value:
        return attempt, None, None
    step, score = whole_number(about.get("step", about.get("clip_number"))), value["score"]
    if step is None or not (score is None or is_share(score)):
        raise DataError(f"{place}: a step needs a number (step) and a score from 0 to 1.")
    return attempt, step, score


def _of_steps(run: Attempt, steps: Mapping[int, float | None]) -> Attempt:
    """Return the run of some lines about steps; it has no scores if a step is missing or unscored."""
    found = [steps[number] for number in sorted(steps)]
    known = tuple(score for score in found if score is not None)
    is_whole = len(known) == len(found) and sorted(steps) == list(range(1, len(steps) + 1))
    return replace(run, steps=len(found), scores=known if is_whole else None)


def runs_with_outcome(file: Path) -> list[Trajectory]:
    """Return the runs in a file that have a known outcome.

    Raises:
        DataError: no run has an outcome, or one is not from 0 to 1: dropping it would bias the outcomes.
    """
    reports: list[FileReport] = []
    runs = list(read_runs([file], None, reports))
    warn_of_losses(reports)
    for run in runs:
        given = run.outcome and run.outcome.get("score")
        if given is not None and outcome_number(run.outcome) is None:
            raise DataError(
                f"{file}: the outcome of {run.trajectory_id} is {given:g}, not from 0 to 1. Rescale all outcomes."
            )
    known = [run for run in runs if outcome_number(run.outcome) is not None]
    if not known:
        raise DataError(
            f"{file}: no run has an outcome from 0 to 1. Pass the field's name when importing: import_trajectories.py "
            "--outcome-key NAME."
        )
    if len(known) < len(runs):
        log.warning("%s: %d of %d runs have no outcome and are skipped", file, len(runs) - len(known), len(runs))
    return known


def attempt_of(run: Trajectory) -> Attempt:
    """Return a run with its outcome, but without scores."""
    return Attempt(
        run.trajectory_id,
        run.task_id,
        outcome_number(run.outcome) or 0.0,
        len(run.steps),
        errors=sum(_is_error(result) for step in run.steps for result in step.results),
    )


def _is_error(result: Result) -> bool:
    """Return whether a result is marked as an error or, as some tools write it, begins with that word."""
    return result.error or result.text.lstrip().lower().startswith("error")


def _with_judge(
    attempts: Sequence[Attempt], runs: Sequence[Trajectory], folder: Path, arguments: argparse.Namespace
) -> list[Attempt]:
    source = judge_source(arguments)
    check_folders(source)
    tasks = list(map(task_of_run, runs))
    if unchecked := check_training(arguments.best_of_n, tasks, source, arguments.data_dir):
        log.warning("%s", unchecked)
    rubric = load_rubric(arguments.rubric)
    check_rubric(rubric, source.rubrics, str((source.adapter or source.model).name))
    asked = (step for run in runs for step in prompts_of_run(run, rubric))
    scores = score_steps(source, asked, folder / "best_of_n_answers.jsonl", arguments)
    return [_scored(each, scores) for each in attempts]


def _with_predictions(attempts: Sequence[Attempt], file: Path, outcomes: Path) -> list[Attempt]:
    if not all(each.steps for each in attempts):  # lines with only outcomes: the number of scores is the run's length
        lines = (value for value in read_jsonl(file) if isinstance(value, dict) and not is_repeated(value))
        distinct = {(run_of(value, str(file)), json.dumps(value, sort_keys=True)) for value in lines}
        counts = Counter(run for run, _ in distinct)
        attempts = [replace(each, steps=each.steps or counts[each.trajectory_id] or 1) for each in attempts]
    runs = tuple(
        ExamRun(each.trajectory_id, each.task_id, None, "", tuple(map(ExamStep, range(1, each.steps + 1))), True)
        for each in attempts
    )
    judges = read_exam_answers(file, runs, outcomes)
    if len(judges) > 1:
        raise DataError(
            f"{file} has scores of {len(judges)} judges ({', '.join(each.name for each in judges)}). Keep those of one."
        )
    for reason, count in judges[0].unplaced.items():
        log.warning("%s: %d lines %s", file, count, reason)
    return [_scored(each, judges[0].scores) for each in attempts]


def _scored(attempt: Attempt, scores: Mapping[tuple[str, int], float]) -> Attempt:
    """Return the run with its scores; with no scores if one is missing, because that would change every aggregate."""
    found = [scores.get((attempt.trajectory_id, n)) for n in range(1, attempt.steps + 1)]
    known = tuple(score for score in found if score is not None)
    return replace(attempt, scores=known if len(known) == len(found) else None)


def _comparable(attempts: Sequence[Attempt]) -> tuple[list[Attempt], dict[str, int]]:
    """Return the runs of tasks on which every way to pick can be measured, and the counts of other tasks."""
    sizes = Counter(each.task_id for each in attempts)
    without = {each.task_id for each in attempts if each.scores is None}
    if len(without) == len(sizes):
        raise DataError(
            "no task has scores for every step of all its runs. Score the runs with --run, or pass the scores with "
            "--predictions. If a judge was asked, best_of_n_answers.jsonl in the output folder says why it gave none."
        )
    kept = [each for each in attempts if sizes[each.task_id] > 1 and each.task_id not in without]
    single = sum(count == 1 for count in sizes.values())
    if not kept:
        raise DataError("no task has two runs whose steps all have scores, so there is nothing to pick from.")
    return kept, {"tasks with one run": single, "tasks with a step without a score": len(without)}


# --- the result -------------------------------------------------------------------------------------------------------


def _as_json(
    file: Path, attempts: Sequence[Attempt], left_out: Mapping[str, int], results: Mapping[str, Sequence[Estimate]]
) -> dict[str, Any]:
    return {
        "file": file.name,
        "runs": len(attempts),
        "tasks": len({each.task_id for each in attempts}),
        "left_out": dict(left_out),
        "picks": {
            name: {str(n): estimate.as_json() for n, estimate in enumerate(estimates, start=1)}
            for name, estimates in results.items()
        },
    }


def _show(attempts: Sequence[Attempt], left_out: Mapping[str, int], results: Mapping[str, Sequence[Estimate]]) -> None:
    most = max(map(len, results.values()))
    shown = range(most) if most <= 5 else sorted({n - 1 for n in (1, 2, 4, 8, 16, 32, 64, most) if n <= most})
    names = [f"N={n + 1}" for n in shown]
    last = f"95 % at N={most}"
    rows = [
        (name, *(value_cell(estimates[n]) for n in shown), interval_cell(estimates[-1]))
        for name, estimates in results.items()
    ]
    cli.emit_table("", ("pick", *names, last), rows, numeric=(*names, last))
    tasks = len({each.task_id for each in attempts})
    cli.emit(f"{len(attempts):,} runs of {tasks:,} tasks; means over all subsets of N runs.")
    fewer = [f"N={n}: {each.n}" for n, each in enumerate(results["random"], start=1) if each.n < tasks]
    if fewer:
        cli.emit(f"Tasks with fewer runs are missing from later columns (remaining tasks: {', '.join(fewer)}).")
    for what, count in left_out.items():
        if count:
            cli.emit(f"left out: {count:,} {what}")
