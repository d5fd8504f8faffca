"""Monitor judges in production: compare two judges, and detect drift, from scoring outputs and request logs."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from operator import attrgetter
from pathlib import Path
from statistics import fmean
from typing import Any

from prmkit import cli
from prmkit.drift import shift_of
from prmkit.errors import DataError, UsageError
from prmkit.files import numbered_jsonl
from prmkit.intervals import confidence_sequence
from prmkit.registered import VersionId
from prmkit.registry.describe import shown_estimate
from prmkit.rows import STEP_TYPES, name_at
from prmkit.trajectory import log_id, outcome_number
from prmkit.verdict import AGGREGATES, is_share

_SHOWN = 5
_ALL_DAYS = 36_500.0
"""The maximum of --days: longer than any log, and short enough for a date."""


@dataclass(frozen=True)
class LoggedStep:
    """One scored step, from a scoring output or a request log."""

    judge: str
    keys: tuple[str, ...]
    """The score keys, sorted; empty if the line does not have them."""
    prompt: str
    """The hash of the request."""
    trajectory: str
    task: str
    score: float | None
    label_mass: float | None
    status: str
    id: str
    text: str | None = None
    """The prompt, if it was logged."""
    characters: int | None = None
    is_step: bool = True
    """Whether the verdict is on one step, not on a category of tools or on the whole run."""
    is_logged: bool = False
    """Whether the line is from a request log, which contains the judge's name; otherwise `judge` is the file name."""
    role: str = ""
    """`production`, `challenger` or `shadow` in a request log; otherwise empty."""
    time: str = ""
    """The UTC time of the log line; empty for outputs of score_trajectories.py."""


def read_scored(paths: Sequence[Path], days: float | None = None) -> list[LoggedStep]:
    """Read the steps in outputs of score_trajectories.py (each file counts as a judge) and in request logs.

    Args:
        paths: the files.
        days: only steps logged in the last `days` days; None for all.

    Raises:
        DataError: a file is missing, a line is of neither kind or has an invalid value, or no steps are left.
        UsageError: `days` is given for a file without times.
    """
    found = []
    since = None if days is None else datetime.now(UTC) - timedelta(days=min(days, _ALL_DAYS))
    for path in paths:
        for number, line in numbered_jsonl(path):
            if not isinstance(line, dict) or not {"score", "status", "request_hash"} <= line.keys():
                raise DataError(f"{path}:{number}: neither a scored step nor a line of a request log.")
            if since is None or _time_of(line, f"{path}:{number}") >= since:
                found.append(_logged_step(line, path, number))
    if not found:
        recent = "" if days is None else f" from the last {days:g} days"
        raise DataError(f"{', '.join(map(str, paths))}: there are no scored steps{recent}.")
    return sorted(found, key=lambda step: step.time)  # the files of a rotated log may be passed in any order


def _time_of(line: Mapping[str, Any], location: str) -> datetime:
    if line.get("time") is None:
        raise UsageError(
            f"--days: {location} has no time. Only request logs have times (serve_judge.py --log-requests)."
        )
    try:
        time = datetime.fromisoformat(str(line["time"]))
    except ValueError as error:
        raise DataError(f"{location}: {line['time']!r:.40} is not a time.") from error
    return time if time.tzinfo else time.replace(tzinfo=UTC)


_FIELDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "score": (is_share, "a number from 0 to 1"),
    "label_mass": (is_share, "a number from 0 to 1"),
    "characters": (lambda value: type(value) is int and value >= 0, "a count"),
    "keys": (lambda value: isinstance(value, list) and all(isinstance(key, str) for key in value), "a list of names"),
    "scores": (lambda value: isinstance(value, dict), "an object"),
    "metadata": (lambda value: isinstance(value, dict), "an object"),
    "is_step": (lambda value: isinstance(value, bool), "true or false"),
    **{name: (lambda value: isinstance(value, str), "text") for name in ("status", "judge", "role", "prompt", "time")},
}
"""Field of a line -> a check of its value (unless it is missing or null), and what the value must be."""


def _logged_step(line: Mapping[str, Any], path: Path, number: int) -> LoggedStep:
    metadata, place = line.get("metadata") or {}, f"{path}:{number}"
    for name, (is_right, what) in _FIELDS.items():
        if line.get(name) is not None and not is_right(line[name]):
            raise DataError(f"{place}: {name} is {line[name]!r:.40}, not {what}. Remove or correct the line.")
    task = name_at(place, line, "task") or name_at(place, metadata, "task_id") or ""
    return LoggedStep(
        judge=str(line.get("judge") or path),
        keys=tuple(sorted(line.get("keys") or line.get("scores") or ())),
        prompt=str(line["request_hash"] or place),  # a row that could not be read has no hash
        trajectory=name_at(place, line, "trajectory") or name_at(place, metadata, "trajectory_id") or task,
        task=task,
        score=line["score"],
        label_mass=line.get("label_mass"),
        status=str(line["status"]),
        id=str(line.get("id")),
        text=line.get("prompt"),
        characters=line.get("characters"),
        is_step=line.get("is_step", metadata.get("evaluation_type") in (None, *STEP_TYPES)),
        is_logged="judge" in line,
        role=str(line.get("role") or ""),
        time=str(line.get("time") or ""),
    )


def steps_of(judge: str, steps: Sequence[LoggedStep]) -> list[LoggedStep]:
    """Return the steps that a judge scored, and all steps of scoring outputs, which do not contain the judge's name.

    Raises:
        DataError: the judge scored nothing.
    """
    found = [step for step in steps if not step.is_logged or step.judge == judge]
    if not found:
        others = ", ".join(sorted({step.judge for step in steps}))
        raise DataError(f"no logged step is from {judge}; the log has only steps from {others}.")
    return found


# --- two judges -------------------------------------------------------------------------------------------------------


def compare_judges(steps: Iterable[LoggedStep], outcomes: Mapping[str, float] | None) -> dict[str, Any]:
    """Compare two judges on the steps that both scored, and determine which one predicts success better.

    Args:
        steps: the steps of two judges.
        outcomes: trajectory -> outcome, 0 to 1; None if unknown.

    Raises:
        UsageError: there are not exactly two judges, or they have no step in common.
    """
    by_judge: dict[str, list[LoggedStep]] = defaultdict(list)
    for step in steps:
        by_judge[step.judge].append(step)
    if len(by_judge) != 2:
        raise UsageError(
            f"an A/B comparison needs two judges, but there are {len(by_judge)} ({', '.join(by_judge)}). Pass the logs "
            "of exactly two, or select recent steps with --days."
        )
    # The production judge is always A, even if the other judge was logged first.
    (first, all_ones), (second, all_others) = sorted(by_judge.items(), key=lambda each: each[1][0].role != "production")
    ones, others = _by_prompt(all_ones), _by_prompt(all_others)
    both = [prompt for prompt in ones if prompt in others and _is_sure(ones[prompt]) and _is_sure(others[prompt])]
    found: dict[str, Any] = {"a": first, "b": second, "steps": len(both)}
    if both:
        found |= _differences([(ones[prompt], others[prompt]) for prompt in both])
    if outcomes is not None:
        found["outcomes"] = _on_outcomes(all_ones, all_others, outcomes)
    elif not both:
        raise UsageError(f"no step was scored reliably by both {first} and {second}. Score the same runs with both.")
    return found


def _by_prompt(steps: Iterable[LoggedStep]) -> dict[str, LoggedStep]:
    found: dict[str, LoggedStep] = {}
    for step in steps:
        found.setdefault(step.prompt, step)
    return found


def _is_sure(step: LoggedStep) -> bool:
    return step.status == "ok" and step.score is not None


def _differences(pairs: Sequence[tuple[LoggedStep, LoggedStep]]) -> dict[str, Any]:
    differences = [(b.score or 0.0) - (a.score or 0.0) for a, b in pairs]
    by_task: dict[str, list[float]] = defaultdict(list)
    for (a, _), difference in zip(pairs, differences, strict=True):
        by_task[a.task or a.trajectory or a.prompt].append(difference)
    widest = sorted(zip(differences, pairs, strict=True), key=lambda each: -abs(each[0]))[:_SHOWN]
    return {
        "tasks": len(by_task),
        "mean_difference": confidence_sequence([fmean(values) for values in by_task.values()]),
        "mean_absolute_difference": fmean(map(abs, differences)),
        "equal_within_0.1": sum(abs(each) <= 0.1 for each in differences) / len(differences),
        "widest": [{"id": a.id, "a": a.score, "b": b.score, "prompt": a.text} for _, (a, b) in widest],
    }


def _on_outcomes(
    ones: Iterable[LoggedStep], others: Iterable[LoggedStep], outcomes: Mapping[str, float]
) -> dict[str, Any]:
    """Compare the squared errors of two judges' lowest step scores, with one number per task.

    Runs of a task are not independent, so they count as one. Only runs that both judges scored completely are compared.
    """
    runs, others_runs = _runs(ones), _runs(others)
    losses: dict[str, list[float]] = defaultdict(list)
    for name, run in runs.items():  # in the order of the logs, on which a confidence sequence depends
        if name in outcomes and _are_complete(run, others_runs.get(name, [])):
            a, b = (AGGREGATES["min"]([step.score or 0.0 for step in each]) for each in (run, others_runs[name]))
            losses[run[0].task or name].append((a - outcomes[name]) ** 2 - (b - outcomes[name]) ** 2)
    gains = [fmean(values) for values in losses.values()]
    found = {"tasks": len(gains), "runs": sum(map(len, losses.values()))}
    if not gains:
        return {
            **found,
            "gain_of_b": None,
            "decision": "no run with an outcome was completely scored by both judges (--shadow lets both score)",
        }
    gain = confidence_sequence(gains)
    return {**found, "gain_of_b": gain, "decision": _decision(gain, len(gains))}


def _runs(steps: Iterable[LoggedStep]) -> dict[str, list[LoggedStep]]:
    """Return a dict of trajectory -> steps. A prompt that is repeated in a run is one step; runs may share prompts."""
    found: dict[str, list[LoggedStep]] = defaultdict(list)
    for step in steps:
        if step.trajectory and step.is_step:
            found[step.trajectory].append(step)
    return {name: list(_by_prompt(run).values()) for name, run in found.items()}


def _are_complete(run: Sequence[LoggedStep], other: Sequence[LoggedStep]) -> bool:
    """Return whether two judges scored the same steps of a run, by their prompts or, if these differ, by their ids."""
    same = any(Counter(map(what, run)) == Counter(map(what, other)) for what in map(attrgetter, ("prompt", "id")))
    return same and all(map(_is_sure, [*run, *other]))


def _decision(gain: Mapping[str, float], n: int) -> str:
    if gain["low"] > 0:
        return "stop: B predicts success better"
    if gain["high"] < 0:
        return "stop: A predicts success better"
    width, mean = (gain["high"] - gain["low"]) / 2, abs(gain["value"])
    if mean < 1e-6:
        return "continue: no difference so far"
    # An interval shrinks with the square root of the number of tasks, a confidence sequence a little more slowly.
    more = max(math.ceil(n * ((width / mean) ** 2 - 1)), 1)
    return f"continue: about {more:,} more tasks are needed if the difference stays the same"


# --- drift ------------------------------------------------------------------------------------------------------------


def drift_of(steps: Sequence[LoggedStep], held_out: Sequence[Mapping[str, Any]], limit: float) -> dict[str, Any]:
    """Compare the distributions of scores, label masses and lengths with those of the judge's held-out rows.

    Steps are compared with held-out rows of the same score keys, because verdicts on a step and on a complete run are
    distributed differently, and a log may have a larger fraction of one kind than the held-out rows.

    Args:
        steps: the steps scored in production.
        held_out: lines of the judge's `predictions.jsonl`.
        limit: a population stability index, or a rise in the fraction of unsure steps, above this counts as drift.

    Returns:
        `groups` (score keys -> quantity -> the `Shift` and a `verdict`), `unsure` (shares `then` and `now`),
        `statuses`, `findings` (sentences), `undecided` (the groups with too few values, if together
        they have a tenth of the steps or more, or if no group has enough).
    """
    references: dict[tuple[str, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for line in held_out:
        if line.get("scores"):
            references[tuple(sorted(line["scores"]))].append(line)
    by_keys: dict[tuple[str, ...], list[LoggedStep]] = defaultdict(list)
    for step in steps:
        if step.keys or _is_sure(step):
            by_keys[step.keys].append(step)
    groups, findings, undecided = {}, [], {}
    for keys, now in by_keys.items():
        name = ", ".join(keys) or "steps without score keys"
        if not keys:
            undecided[name] = len(now)
            continue
        if keys not in references:
            findings.append(f"{name}: {len(now):,} steps with score keys on which the judge was never evaluated")
            continue
        groups[name] = group = _compared(references[keys], now, limit)
        findings += [f"{name}: {what} (PSI {each['psi']:.2f}, KS {each['ks']:.2f})"
                     for what, each in group.items() if each["verdict"] == "drift"]  # fmt: skip
        if group["score"]["verdict"] == "too few":
            undecided[name] = len(now)
    unsure = {
        "then": sum(line["status"] != "ok" for line in held_out) / max(len(held_out), 1),
        "now": sum(step.status != "ok" for step in steps) / len(steps),
    }
    if unsure["now"] - unsure["then"] > limit:
        findings.append(f"unsure or unscored: {unsure['now']:.0%} now, {unsure['then']:.0%} on the held-out rows")
    # Rare score keys may stay undecided, but not all keys, nor those of a tenth of the steps or more.
    is_decided = len(undecided.keys() & groups.keys()) < len(groups) and sum(undecided.values()) < len(steps) / 10
    undecided_names = [] if is_decided else list(undecided) or ([] if findings else ["all steps"])
    return {"groups": groups, "unsure": unsure, "statuses": dict(Counter(step.status for step in steps)),
            "findings": findings, "undecided": undecided_names}  # fmt: skip


def _compared(then: Sequence[Mapping[str, Any]], now: Sequence[LoggedStep], limit: float) -> dict[str, dict[str, Any]]:
    """Compare one group of score keys: every quantity that both the held-out rows and the log have."""
    masses = [[each["label_mass"] for each in line["scores"].values()] for line in then]
    pairs: dict[str, tuple[Sequence[float | None], Sequence[float | None]]] = {
        "score": ([line["score"] for line in then], [step.score for step in now]),
        "label mass": (
            [min(each) for each in masses if None not in each],
            [step.label_mass for step in now],
        ),
        "characters": ([float(line["prompt_characters"]) for line in then], [step.characters for step in now]),
    }
    found = {}
    for what, (old, new) in pairs.items():
        reference, values = ([float(value) for value in each if value is not None] for each in (old, new))
        if what == "score" or (reference and values):
            shift = shift_of(reference, values)
            conclusion = "too few" if shift.psi is None else "drift" if shift.exceeds(limit) else "stable"
            found[what] = shift.as_json() | {"verdict": conclusion}
    return found


def read_outcomes(path: Path) -> dict[str, float]:
    """Read trajectory -> outcome from lines with `trajectory_id` and `outcome` (a number, true or false, or an object).

    Raises:
        DataError: a line has no outcome from 0 to 1, or two lines have different outcomes for the same run.
    """
    found: dict[str, float] = {}
    for number, line in numbered_jsonl(path):
        about = line if isinstance(line, dict) else {}
        outcome, name = outcome_number(about.get("outcome")), name_at(f"{path}:{number}", about, "trajectory_id")
        if outcome is None or name is None:
            raise DataError(f"{path}:{number}: needs trajectory_id, and an outcome from 0 to 1.")
        if found.get(name, outcome) != outcome:
            raise DataError(f"{path}:{number}: {name} has a different outcome on an earlier line. Keep the right one.")
        found[name] = found[str(log_id(name))] = outcome  # a log has only the hash of an id that looks like text
    return found


# --- the terminal ----------------------------------------------------------------------------------------------------


def show_ab(found: Mapping[str, Any]) -> None:
    """Print the results of an A/B comparison."""
    cli.emit(f"A is {found['a']}, B is {found['b']}: {found['steps']:,} steps on which both are sure")
    if found["steps"]:
        cli.emit(
            f"B minus A: {shown_estimate(found['mean_difference'])} over {found['tasks']:,} tasks; "
            f"{found['equal_within_0.1']:.0%} differ by at most 0.1"
        )
        widest = [[each["id"], f"{each['a']:.2f}", f"{each['b']:.2f}"] for each in found["widest"]]
        cli.emit_table("Largest differences", ("step", "A", "B"), widest, numeric=("A", "B"))
        for each in found["widest"]:
            if each["prompt"]:
                cli.emit(f"{each['id']}:\n{each['prompt'][-_LOGGED:]}\n")
    if "outcomes" in found:
        on = found["outcomes"]
        cli.emit(
            f"squared error of success, A minus B: {shown_estimate(on['gain_of_b'])} over {on['tasks']:,} tasks: "
            f"{on['decision']}"
        )


_LOGGED = 600
"""The number of characters to show from the end of a logged prompt, where the step is."""


def show_drift(version: VersionId, found: Mapping[str, Any]) -> None:
    """Show a table that compares logged scores with those of the held-out rows."""
    rows = [
        [f"{keys}: {what}" if len(found["groups"]) > 1 else what, f"{each['n_reference']:,}", f"{each['n']:,}",
         *(_number(each[key]) for key in ("mean_reference", "mean", "psi", "ks")), each["verdict"]]
        for keys, group in found["groups"].items()
        for what, each in group.items()
    ]  # fmt: skip
    columns = ("", "n ref.", "n now", "mean ref.", "mean now", "PSI", "KS", "result")
    cli.emit_table(str(version), columns, rows, numeric=columns[1:7], optional=("n ref.", "KS"))
    unsure = found["unsure"]
    cli.emit(f"ref.: the held-out rows\nunsure or unscored: {unsure['then']:.1%} of these, {unsure['now']:.1%} now")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.2f}"
