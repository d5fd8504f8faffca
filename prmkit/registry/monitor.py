"""Judges in production: which of two is better, and whether scores drift. Reads scoring outputs and request logs."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import fmean
from typing import Any

from prmkit import cli
from prmkit.drift import shift_of
from prmkit.errors import DataError, UsageError
from prmkit.files import numbered_jsonl
from prmkit.registered import VersionId
from prmkit.registry.describe import shown_estimate
from prmkit.rows import name_at
from prmkit.trajectory import log_id, outcome_number
from prmkit.verdict import AGGREGATES

_LEVEL = 0.95
_CAP = 0.5
_SHOWN = 5


@dataclass(frozen=True)
class LoggedStep:
    """One scored step, from either kind of file."""

    judge: str
    keys: tuple[str, ...]
    """The score keys, sorted; empty if the line does not name them."""
    prompt: str
    """Hash of the request."""
    trajectory: str
    task: str
    score: float | None
    label_mass: float | None
    status: str
    id: str
    text: str | None = None
    """The prompt, if it was logged."""
    characters: int | None = None
    is_logged: bool = False
    """Whether the line is from a request log, which names the judge; else `judge` is the file."""
    role: str = ""
    """`production`, `challenger` or `shadow`, in a request log."""
    time: str = ""
    """When it was logged, in UTC; empty for outputs of score_trajectories.py."""


def read_scored(paths: Sequence[Path], days: float | None = None) -> list[LoggedStep]:
    """The steps in outputs of score_trajectories.py (the file counts as the judge) and in request logs.

    Args:
        paths: the files.
        days: only steps logged in the last `days` days; None for all.

    Raises:
        DataError: a file is missing, a line is of neither kind, or nothing is left.
        UsageError: `days` is given for a file without times.
    """
    found = []
    since = None if days is None else datetime.now(UTC) - timedelta(days=days)
    for path in paths:
        for number, line in numbered_jsonl(path):
            if not isinstance(line, dict) or not {"score", "status", "request_hash"} <= line.keys():
                raise DataError(f"{path}:{number}: neither a scored step nor a line of a request log.")
            if since is None or _time_of(line, f"{path}:{number}") >= since:
                found.append(_logged_step(line, path, number))
    if not found:
        recent = "" if days is None else f" from the last {days:g} days"
        raise DataError(f"{', '.join(map(str, paths))}: no scored step{recent}.")
    return sorted(found, key=lambda step: step.time)  # the files of a rotated log may be given in any order


def _time_of(line: Mapping[str, Any], place: str) -> datetime:
    if line.get("time") is None:
        raise UsageError(f"--days: {place} has no time. Only request logs have times (serve_judge.py --log-requests).")
    try:
        time = datetime.fromisoformat(str(line["time"]))
    except ValueError as error:
        raise DataError(f"{place}: {line['time']!r:.40} is not a time.") from error
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _logged_step(line: Mapping[str, Any], path: Path, number: int) -> LoggedStep:
    metadata, place = line.get("metadata") or {}, f"{path}:{number}"
    task = name_at(place, line, "task") or name_at(place, metadata, "task_id") or ""
    return LoggedStep(
        judge=str(line.get("judge") or path),
        keys=tuple(sorted(line.get("keys") or line.get("scores") or ())),
        prompt=str(line["request_hash"]),
        trajectory=name_at(place, line, "trajectory") or name_at(place, metadata, "trajectory_id") or task,
        task=task,
        score=line["score"],
        label_mass=line.get("label_mass"),
        status=line["status"],
        id=str(line.get("id")),
        text=line.get("prompt"),
        characters=line.get("characters"),
        is_logged="judge" in line,
        role=str(line.get("role") or ""),
        time=str(line.get("time") or ""),
    )


def steps_of(judge: str, steps: Sequence[LoggedStep]) -> list[LoggedStep]:
    """The steps that a judge scored, and all steps of scoring outputs, which do not name their judge.

    Raises:
        DataError: the judge scored nothing.
    """
    found = [step for step in steps if not step.is_logged or step.judge == judge]
    if not found:
        others = ", ".join(sorted({step.judge for step in steps}))
        raise DataError(f"{judge}: has scored no logged step; the log has only {others}.")
    return found


# --- two judges -------------------------------------------------------------------------------------------------------


def compare_judges(steps: Iterable[LoggedStep], outcomes: Mapping[str, float] | None) -> dict[str, Any]:
    """How two judges differ on the steps that both scored, and which one predicts success better.

    Args:
        steps: of two judges.
        outcomes: trajectory -> outcome, 0 to 1; None if unknown.

    Raises:
        UsageError: there are not exactly two judges, or they share no step.
    """
    by_judge: dict[str, dict[str, LoggedStep]] = defaultdict(dict)
    for step in steps:
        by_judge[step.judge].setdefault(step.prompt, step)
    if len(by_judge) != 2:
        raise UsageError(f"an A/B comparison needs two judges, but there are {len(by_judge)} ({', '.join(by_judge)}).")
    # The production judge is a, whichever was logged first.
    (first, ones), (second, others) = sorted(
        by_judge.items(), key=lambda judge: next(iter(judge[1].values())).role != "production"
    )
    both = [prompt for prompt in ones if prompt in others and _is_sure(ones[prompt]) and _is_sure(others[prompt])]
    found: dict[str, Any] = {"a": first, "b": second, "steps": len(both)}
    if both:
        found |= _differences([(ones[prompt], others[prompt]) for prompt in both])
    if outcomes is not None:
        found["outcomes"] = _on_outcomes(ones.values(), others.values(), outcomes)
    elif not both:
        raise UsageError(f"{first} and {second} share no step on which both are sure. Score the same runs with both.")
    return found


def _is_sure(step: LoggedStep) -> bool:
    return step.status == "ok" and step.score is not None


def _differences(pairs: Sequence[tuple[LoggedStep, LoggedStep]]) -> dict[str, Any]:
    apart = [(b.score or 0.0) - (a.score or 0.0) for a, b in pairs]
    by_task: dict[str, list[float]] = defaultdict(list)
    for (a, _), difference in zip(pairs, apart, strict=True):
        by_task[a.task or a.trajectory or a.prompt].append(difference)
    widest = sorted(zip(apart, pairs, strict=True), key=lambda each: -abs(each[0]))[:_SHOWN]
    return {
        "tasks": len(by_task),
        "mean_difference": confidence_sequence([fmean(values) for values in by_task.values()]),
        "mean_absolute_difference": fmean(map(abs, apart)),
        "equal_within_0.1": sum(abs(each) <= 0.1 for each in apart) / len(apart),
        "widest": [{"id": a.id, "a": a.score, "b": b.score, "prompt": a.text} for _, (a, b) in widest],
    }


def _on_outcomes(
    ones: Iterable[LoggedStep], others: Iterable[LoggedStep], outcomes: Mapping[str, float]
) -> dict[str, Any]:
    """The difference of the squared errors of two judges' lowest step scores, one number for each task.

    Runs of a task are not independent, so they count as one. Only runs that both scored completely are compared.
    """
    lowest = [_lowest(steps) for steps in (ones, others)]
    losses: dict[str, list[float]] = defaultdict(list)
    for trajectory in lowest[0].keys() & lowest[1].keys() & outcomes.keys():
        (a, task), (b, _) = lowest[0][trajectory], lowest[1][trajectory]
        losses[task].append((a - outcomes[trajectory]) ** 2 - (b - outcomes[trajectory]) ** 2)
    gains = [fmean(values) for values in losses.values()]
    found = {"tasks": len(gains), "runs": sum(map(len, losses.values()))}
    if not gains:
        return {
            **found,
            "gain_of_b": None,
            "decision": "no run with an outcome was scored by both (--shadow lets both score)",
        }
    gain = confidence_sequence(gains)
    return {**found, "gain_of_b": gain, "decision": _decision(gain, len(gains))}


def _lowest(steps: Iterable[LoggedStep]) -> dict[str, tuple[float, str]]:
    runs: dict[str, list[LoggedStep]] = defaultdict(list)
    for step in steps:
        if step.trajectory:
            runs[step.trajectory].append(step)
    whole = {name: run for name, run in runs.items() if all(map(_is_sure, run))}
    return {
        name: (AGGREGATES["min"]([step.score or 0.0 for step in run]), run[0].task or name)
        for name, run in whole.items()
    }


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


def confidence_sequence(values: Sequence[float], level: float = _LEVEL) -> dict[str, float]:
    """A confidence sequence of the mean: an interval that is valid even if it is checked after every value.

    Predictable plug-in empirical Bernstein: theorem 2 of Waudby-Smith and Ramdas, Estimating means of bounded random
    variables by betting (2024), for values from -1 to 1 in the order in which they arrived.

    Returns:
        `value`, the plain mean, `low` and `high`.
    """
    log = math.log(2 / (1 - level))
    weights = weighted = spread = 0.0
    total, squares, mean = 0.5, 0.25, 0.5
    low, high = 0.0, 1.0
    for count, value in enumerate(values, start=1):
        x = (value + 1) / 2
        rate = min(math.sqrt(2 * log / (squares * math.log(1 + count))), _CAP)
        weights += rate
        weighted += rate * x
        spread += 4 * (x - mean) ** 2 * (-math.log(1 - rate) - rate) / 4
        total += x
        mean = total / (count + 1)
        squares += (x - mean) ** 2
        margin = (log + spread) / weights
        low, high = max(low, weighted / weights - margin), min(high, weighted / weights + margin)
    return {"value": fmean(values), "low": 2 * low - 1, "high": 2 * high - 1}


# --- drift ------------------------------------------------------------------------------------------------------------


def drift_of(steps: Sequence[LoggedStep], held_out: Sequence[Mapping[str, Any]], limit: float) -> dict[str, Any]:
    """Whether scores, label masses and lengths are distributed as on the judge's held-out rows.

    Steps are compared with held-out rows of the same score keys: verdicts on a step and on a whole run are distributed
    differently, and a log may have a larger share of one kind than the held-out rows.

    Args:
        steps: the steps scored in production.
        held_out: lines of the judge's `predictions.jsonl`.
        limit: a population stability index, or a rise in the share of unsure steps, above this counts as drift.

    Returns:
        `groups` (score keys -> quantity -> the `Shift` and a `verdict`), `unsure` (shares `then` and `now`),
        `statuses`, `findings` (sentences), `undecided` (groups of a tenth of the steps or more with too few values).
    """
    references: dict[tuple[str, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for line in held_out:
        if line.get("scores"):
            references[tuple(sorted(line["scores"]))].append(line)
    by_keys: dict[tuple[str, ...], list[LoggedStep]] = defaultdict(list)
    for step in steps:
        if step.keys:
            by_keys[step.keys].append(step)
    groups, findings, undecided = {}, [], []
    for keys, now in by_keys.items():
        name = ", ".join(keys)
        if keys not in references:
            findings.append(f"{name}: {len(now):,} steps with score keys on which the judge was never measured")
            continue
        groups[name] = group = _compared(references[keys], now, limit)
        findings += [f"{name}: {what} (PSI {each['psi']:.2f}, KS {each['ks']:.2f})"
                     for what, each in group.items() if each["verdict"] == "drift"]  # fmt: skip
        if group["score"]["verdict"] == "too few" and len(now) >= len(steps) / 10:
            undecided.append(name)
    unsure = {
        "then": sum(line["status"] != "ok" for line in held_out) / max(len(held_out), 1),
        "now": sum(step.status != "ok" for step in steps) / len(steps),
    }
    if unsure["now"] - unsure["then"] > limit:
        findings.append(f"unsure or unscored: {unsure['now']:.0%}, {unsure['then']:.0%} on the held-out rows")
    if not groups and not findings:
        undecided.append("all steps")
    return {"groups": groups, "unsure": unsure, "statuses": dict(Counter(step.status for step in steps)),
            "findings": findings, "undecided": undecided}  # fmt: skip


def _compared(then: Sequence[Mapping[str, Any]], now: Sequence[LoggedStep], limit: float) -> dict[str, dict[str, Any]]:
    """The quantities to compare in one group of score keys; only those that both sides have."""
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
            verdict = "too few" if shift.psi is None else "drift" if shift.exceeds(limit) else "stable"
            found[what] = shift.as_json() | {"verdict": verdict}
    return found


def read_outcomes(path: Path) -> dict[str, float]:
    """Trajectory -> outcome, from lines with `trajectory_id` and `outcome` (a number, true or false, or an object).

    Raises:
        DataError: a line has no outcome from 0 to 1.
    """
    found: dict[str, float] = {}
    for number, line in numbered_jsonl(path):
        about = line if isinstance(line, dict) else {}
        outcome, name = outcome_number(about.get("outcome")), name_at(f"{path}:{number}", about, "trajectory_id")
        if outcome is None or name is None:
            raise DataError(f"{path}:{number}: needs trajectory_id, and an outcome from 0 to 1.")
        found[name] = found[str(log_id(name))] = outcome  # a log has only the hash of an id that may be text
    return found


# --- the terminal ----------------------------------------------------------------------------------------------------


def show_ab(found: Mapping[str, Any]) -> None:
    """The sentences and tables of an A/B comparison."""
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
"""How many characters to show from the end of a logged prompt, where the step is."""


def show_drift(version: VersionId, found: Mapping[str, Any]) -> None:
    """Tables of current scores next to those of the held-out rows."""
    rows = [
        [f"{keys}: {what}" if len(found["groups"]) > 1 else what, f"{each['n_reference']:,}", f"{each['n']:,}",
         *(_number(each[key]) for key in ("mean_reference", "mean", "psi", "ks")), each["verdict"]]
        for keys, group in found["groups"].items()
        for what, each in group.items()
    ]  # fmt: skip
    columns = ("", "n then", "n now", "mean then", "mean now", "PSI", "KS", "verdict")
    cli.emit_table(str(version), columns, rows, numeric=columns[1:7], optional=("n then", "KS"))
    unsure = found["unsure"]
    cli.emit(f"unsure or unscored: {unsure['then']:.1%} then, {unsure['now']:.1%} now")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.2f}"
