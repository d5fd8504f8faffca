"""Compare two evaluations of the same held-out prompts: is one judge better, by more than chance? Also all gates.

Gates fail closed: a gate that cannot be decided is not met.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prmkit.errors import DataError, GateError
from prmkit.evaluation import estimates, statistics
from prmkit.evaluation.baselines import shared
from prmkit.evaluation.estimates import LEVEL, MIN_TASKS, Floats, Sample, Statistic, as_json, measure, resampled
from prmkit.evaluation.metrics import ALL, MIN_SCORES, ORDER, STRICT, Metrics
from prmkit.evaluation.predictions import Scores, by_mean, by_median, check_predictions, suspicion, table_of_scores
from prmkit.evaluation.summary import MIN_SCORED, groups_of_types
from prmkit.files import read_jsonl
from prmkit.intervals import format_estimate
from prmkit.judge.sources import check_keys, read_object
from prmkit.paths import EVALUATION, METRICS_FILE, PREDICTIONS_FILE

COMPARISON_FILE = "comparison.json"

COLUMNS = (
    "scores of",
    "n",
    "tasks",
    "Spearman",
    "Δ Spearman",
    "MAE",
    "Δ MAE",
    "AUROC",
    "Δ AUROC",
    "verdict",
)
"""Δ is this judge's metric minus the other's."""
NUMERIC = COLUMNS[1:-1]
OPTIONAL = ("AUROC", "MAE", "Δ AUROC", "tasks", "n", "Spearman", "Δ MAE")

POWER = 0.8
"""With the recommended number of tasks, an equally good judge passes with this probability."""

# A larger value is better for Spearman and AUROC, a smaller one for the error.
_BETTER = {ORDER: 1, "mae": -1, "auroc": 1}
_NAMES = {ORDER: "Spearman", "mae": "MAE", "auroc": "AUROC"}
_WITH_MARGIN = (ORDER, "mae")


def compare(this: Path, other: Path, prompts: Collection[str] | None = None) -> dict[str, Any]:
    """Compare two judges on the scores that both gave, by evaluation type.

    Differences are this judge's metric minus the other's. For the intervals, both judges are resampled together, task
    by task, so prompts that are hard for both do not blur the difference.

    Args:
        this: a folder with `metrics.json` and `predictions.jsonl`.
        other: another such folder, or the folder of an evaluated run.
        prompts: the SHA-256 of the prompts to compare on; None for all that both have.

    Raises:
        DataError: one was not evaluated, or the two have different held-out rows or no scores in common.
    """
    other = other if (other / METRICS_FILE).is_file() or not (other / EVALUATION).is_dir() else other / EVALUATION
    one, another = _described(this), _described(other)
    if one["held_out"]["sha256"] != another["held_out"]["sha256"]:
        raise DataError(
            f"{this} and {other} were measured on different held-out rows ({one['held_out']['dataset']}, "
            f"{another['held_out']['dataset']}). Evaluate one of them again, with the other's --data-dir and --dataset."
        )
    mine, theirs = (_scores(folder, described, prompts) for folder, described in ((this, one), (other, another)))
    both, both_of_other = shared(mine, theirs)
    if not len(both):
        raise DataError(f"{this} and {other} have no scores in common. Evaluate both without --limit.")
    types = [ALL, *dict.fromkeys([*mine.evaluation_type, *theirs.evaluation_type])]
    masks = {name: np.full(len(both), True) if name == ALL else both.evaluation_type == name for name in types}
    groups = [
        {"evaluation_type": name}
        | (_differences(both.where(mask), both_of_other.where(mask)) if mask.any() else _NOTHING_SHARED)
        for name, mask in masks.items()
    ]
    _decide(groups)
    comparison: dict[str, Any] = as_json(
        {
            "this": str(this),
            "other": str(other),
            "held_out_sha256": one["held_out"]["sha256"],
            "scores_of_this_alone": len(mine) - len(both),
            "scores_of_other_alone": len(theirs) - len(both),
            "groups": groups,
        }
    )
    return comparison


def _described(folder: Path) -> Mapping[str, Any]:
    if not (folder / METRICS_FILE).is_file():
        raise DataError(f"{folder}: no {METRICS_FILE}. Evaluate it first: python evaluate_judge.py --run FOLDER")
    metrics = read_object(folder / METRICS_FILE, held_out=dict)
    check_keys(folder / METRICS_FILE, metrics["held_out"], sha256=str, dataset=str)
    return metrics


def _scores(folder: Path, described: Mapping[str, Any], prompts: Collection[str] | None) -> Scores:
    file = folder / PREDICTIONS_FILE
    rows = list(read_jsonl(file))
    check_predictions(file, rows)
    measured = described["held_out"].get("prompts_evaluated")
    if measured is not None and len({row["prompt_sha256"] for row in rows}) < measured:
        raise DataError(
            f"{file}: {len(rows)} of {measured} predictions; an evaluation was interrupted. Evaluate the judge again."
        )
    return table_of_scores([row for row in rows if prompts is None or row["prompt_sha256"] in prompts], (), {})


# --- differences ------------------------------------------------------------------------------------------------------


def _differences(mine: Scores, theirs: Scores) -> Metrics:
    compared: Mapping[str, tuple[Callable[[Scores], Sample], Callable[[Sample], Statistic]]] = {
        ORDER: (by_mean, statistics.spearman_within),
        "mae": (by_median, statistics.mean_absolute_error),
        "auroc": (lambda scores: suspicion(scores, float(STRICT)), statistics.roc_area),
    }
    found: Metrics = {"scores": len(mine), "tasks": by_mean(mine).tasks}
    for name, (sample_of, statistic_of) in compared.items():
        samples = [sample_of(scores) for scores in (mine, theirs)]
        one, other = (_defined(statistic_of(sample), sample, name) for sample in samples)
        min_n = 1 if name == "mae" else MIN_SCORES
        difference = _minus(one, other)
        found[name] = {
            "this": measure(samples[0], one, min_n=min_n),
            "other": measure(samples[1], other, min_n=min_n),
            "difference": measure(samples[0], difference, min_n=min_n),
            **_test(samples[0], difference, _BETTER[name]),
        }
    return found


_NO_TEST: Metrics = {"standard_error": None, "p_worse": None, "p_better": None}
_NOTHING_SHARED: Metrics = {"scores": 0, "tasks": 0} | {
    name: dict.fromkeys(("this", "other", "difference"), estimates.undefined("no score that both gave")) | _NO_TEST
    for name in _BETTER
}


def _defined(statistic: Statistic, sample: Sample, name: str) -> Statistic:
    """Replace the undefined correlation of a constant judge by 0, because such a judge ranks nothing."""
    if (
        name == ORDER
        and np.ptp(sample.reference) > 0
        and all(np.ptp(sample.predicted[sample.group == group]) == 0 for group in np.unique(sample.group))
    ):
        return lambda weights: np.zeros(len(weights))
    return statistic


def _minus(one: Statistic, other: Statistic) -> Statistic:
    def statistic(weights: Floats) -> Floats:
        return one(weights) - other(weights)

    return statistic


def _test(sample: Sample, difference: Statistic, better: int) -> Metrics:
    """Return the standard error of a difference, and the one-sided p-values for this judge being worse and better.

    Uses Student's t with the bootstrap's standard error: percentiles of so few resamples are too coarse for Holm.
    """
    from scipy import stats

    if sample.tasks < MIN_TASKS or len(sample.reference) < MIN_SCORES:
        return _NO_TEST
    value = float(difference(np.ones((1, sample.tasks)))[0])
    drawn = resampled(sample, difference)
    known = drawn[np.isfinite(drawn)]
    if not np.isfinite(value) or len(known) < 0.9 * len(drawn):
        return _NO_TEST
    # With few tasks, the bootstrap's variance is too small by a factor of (n - 1) / n.
    error = float(np.std(known)) * math.sqrt(sample.tasks / (sample.tasks - 1))
    if error < 1e-12:
        sure = 0.0 if abs(value) > 1e-9 else 1.0
        worse, other = (sure, 1.0) if better * value < 0 else (1.0, sure)
    else:
        t = better * value / error
        worse, other = (float(stats.t.cdf(sign * t, sample.tasks - 1)) for sign in (1, -1))
    return {"standard_error": error, "p_worse": worse, "p_better": other}


def _decide(groups: Sequence[Metrics]) -> None:
    """Add a verdict to each group: worse or better by Holm (1979) over all types and metrics, 2.5 % on each side."""
    of_types = groups[1:]
    rejected = {
        side: _holm({(i, name): group[name][side] for i, group in enumerate(of_types) for name in _BETTER})
        for side in ("p_worse", "p_better")
    }
    for i, group in enumerate(of_types):
        if not _decidable(group):
            group["verdict"] = "cannot decide"
        else:
            worse, better = (any((i, name) in rejected[side] for name in _BETTER) for side in ("p_worse", "p_better"))
            group["verdict"] = {(True, True): "mixed", (True, False): "worse", (False, True): "better"}.get(
                (worse, better), "no difference shown"
            )
    verdicts = [group["verdict"] for group in of_types]
    groups[0]["verdict"] = next(
        (verdict for verdict in ("cannot decide", "worse", "mixed", "better") if verdict in verdicts),
        "no difference shown",
    )
    if {"better", "worse"} <= set(verdicts):
        groups[0]["verdict"] = "mixed"


def _decidable(group: Metrics) -> bool:
    return all(isinstance(group[name]["standard_error"], float) for name in (ORDER, "mae"))


def _holm(p_values: Mapping[Any, float | None], level: float = (1 - LEVEL) / 2) -> set[Any]:
    """Return the hypotheses that Holm's step-down procedure rejects at `level`; undefined p-values are ignored."""
    known = sorted((p, name) for name, p in p_values.items() if p is not None)
    rejected = set()
    for place, (p, name) in enumerate(known):
        if p > level / (len(known) - place):
            break
        rejected.add(name)
    return rejected


def comparison_table(comparison: Mapping[str, Any]) -> list[list[str]]:
    """One row per evaluation type, with cells in the order of `COLUMNS`."""
    return [
        [
            "everything" if group["evaluation_type"] == ALL else group["evaluation_type"],
            str(group["scores"]),
            str(group["tasks"]),
            *(
                cell
                for name in _BETTER
                for cell in (_both(group[name]), format_estimate(group[name]["difference"], ".3f"))
            ),
            group["verdict"],
        ]
        for group in comparison["groups"]
    ]


def _both(estimates: Mapping[str, Any]) -> str:
    one, other = (format_estimate(estimates[name], ".3f", interval=False) for name in ("this", "other"))
    return f"{one} : {other}"


def left_out(comparison: Mapping[str, Any]) -> str | None:
    """Describe the scores excluded from the comparison; None if both judges have every score."""
    mine, theirs = comparison["scores_of_this_alone"], comparison["scores_of_other_alone"]
    if not mine and not theirs:
        return None
    both = comparison["groups"][0]["scores"]
    ignored = f"{mine} more of this judge and {theirs} more of the other are ignored"
    return f"Compared on the {both} scores that both judges gave; {ignored}."


# --- gates ------------------------------------------------------------------------------------------------------------


def check_not_worse(comparison: Mapping[str, Any], margin: float | None = None) -> str:
    """Fail if this judge is worse on any evaluation type, or if that cannot be decided.

    Args:
        comparison: see `compare`.
        margin: None requires that no type is shown to be worse, by Holm over types and metrics. A number requires more:
            that on every type Spearman and MAE are shown to be worse by less than this (non-inferiority: the one-sided
            95 % interval of the difference excludes `-margin`).

    Returns:
        The result as a sentence.

    Raises:
        GateError: a type is worse, or it cannot be decided.
    """
    of_types = comparison["groups"][1:]
    if undecided := [group for group in of_types if group["verdict"] == "cannot decide"]:
        raise GateError(f"--compare: cannot decide on {', '.join(map(_why_undecided, undecided))}.")
    if margin is not None:
        return _check_margin(comparison, margin)
    for group in of_types:
        if group["verdict"] in ("worse", "mixed"):
            differences = ", ".join(
                f"{_NAMES[name]} differs by {format_estimate(group[name]['difference'], '.3f')}" for name in _BETTER
            )
            raise GateError(
                f"{comparison['this']} is worse than {comparison['other']} on {group['evaluation_type']}: "
                f"{differences}."
            )
    unseen = max(-_one_sided_end(group[ORDER], ORDER) for group in of_types)
    return (
        f"Not significantly worse on any type. A Spearman loss of up to {max(0.0, unseen):.3f} cannot be ruled out; "
        "to require a smaller loss, use --margin X."
    )


def _why_undecided(group: Mapping[str, Any]) -> str:
    order = group[ORDER]["difference"]
    reason = order.get("reason") or group["mae"]["difference"].get("reason") or "too little varies"
    return f"{group['evaluation_type']} ({reason})"


def _check_margin(comparison: Mapping[str, Any], margin: float) -> str:
    too_bad, unclear = [], []
    for group in comparison["groups"][1:]:
        for name in _WITH_MARGIN:
            at_worst = -_one_sided_end(group[name], name)
            if at_worst < margin:
                continue
            loss = -_BETTER[name] * group[name]["difference"]["value"]
            what = f"{_NAMES[name]} on {group['evaluation_type']}"
            if loss - (at_worst - loss) > margin:
                too_bad.append(f"{what} is worse by {loss:.3f}")
            else:
                tasks = tasks_needed(group[name]["standard_error"], group["tasks"], margin)
                unclear.append((max(tasks, group["tasks"] + 1), f"{what} may be worse by up to {at_worst:.3f}"))
    if too_bad:
        raise GateError(f"--margin {margin:g}: {'; '.join(too_bad)}.")
    if unclear:
        tasks, what = max(unclear)
        raise GateError(f"--margin {margin:g}: cannot be decided; about {tasks} tasks are needed ({what}).")
    return f"Non-inferior within {margin:g} in Spearman and MAE on every evaluation type (one-sided 95 %)."


def _one_sided_end(estimates: Mapping[str, Any], name: str) -> float:
    """Return the lower bound of the difference (with the sign so that larger is better), at 95 % confidence."""
    from scipy import stats

    difference = _BETTER[name] * estimates["difference"]["value"]
    quantile = float(stats.t.ppf(LEVEL, estimates["difference"]["tasks"] - 1))
    return float(difference - quantile * estimates["standard_error"])


def tasks_needed(standard_error: float, tasks: int, margin: float) -> int:
    """Return how many tasks are needed for an equally good judge to pass with this margin and probability `POWER`."""
    from scipy import stats

    quantiles = float(stats.norm.ppf(LEVEL) + stats.norm.ppf(POWER))
    return math.ceil(tasks * (quantiles * standard_error / margin) ** 2) if margin > 0 else 10**9


def check_enough_scores(metrics: Mapping[str, Any], gates: str) -> None:
    """Fail if the scores do not represent all steps: the judge gave too few, or `--first` selected too few at random.

    Args:
        metrics: the content of `metrics.json`.
        gates: the flags that need this check, for the message.

    Raises:
        GateError: for some evaluation type, the judge gave less than `MIN_SCORED` of the scores; or prompts were
            selected, and the randomly selected ones come from fewer tasks than an interval needs.
    """
    selection = metrics["held_out"].get("selection")
    if selection and selection["audited_tasks"] < MIN_TASKS:
        raise GateError(
            f"{gates}: cannot be decided: ask_judges.py --first selected {selection['prompts']:,} of the held-out "
            f"prompts, and only {selection['audited_tasks']} tasks have randomly selected prompts; {MIN_TASKS} are "
            "needed. Ask again with a larger --audit-share, or hold out tasks that were labelled without --first "
            "(convert_dataset.py --eval-tasks FILE)."
        )
    for name, validity in metrics["validity"].items():
        made, asked = validity["scores_made"], validity["scores_asked"]
        if made < MIN_SCORED * asked:
            where = "" if name == ALL else f" on {name}"
            raise GateError(
                f"{gates}: {made} of {asked} scores{where} were given ({made / asked:.1%}); at least {MIN_SCORED:.0%} "
                f"are needed. {PREDICTIONS_FILE} has the reason for each missing score."
            )


def check_min_spearman(metrics: Mapping[str, Any], least: float) -> None:
    """Fail if the lower bound of a type's Spearman correlation is below a threshold or unknown.

    Raises:
        GateError: that is so for at least one evaluation type.
    """
    _check_lower_end(metrics, f"--min-spearman {least:g}", least, lambda group: group["judge"][ORDER])


def check_min_auroc(metrics: Mapping[str, Any], least: float) -> None:
    """Fail if the lower bound of a type's AUROC (for steps below 0.5) is below a threshold or unknown.

    Raises:
        GateError: that is so for at least one evaluation type.
    """
    _check_lower_end(
        metrics, f"--min-auroc {least:g}", least, lambda group: group["judge"]["bad_step"][STRICT]["auroc"]
    )


def _check_lower_end(
    metrics: Mapping[str, Any], gate: str, least: float, estimate_of: Callable[[Mapping[str, Any]], Mapping[str, Any]]
) -> None:
    def failures() -> Iterator[str]:
        for group in groups_of_types(metrics):
            name, estimate = group["evaluation_type"], estimate_of(group)
            if estimate["low"] is None:
                yield f"{name}: cannot be decided ({estimate['reason']})"
            elif estimate["low"] < least:
                yield f"{name}: {format_estimate(estimate, '.3f')}, so the lower bound is below {least:g}"

    if found := list(failures()):
        raise GateError(f"{gate}: {'; '.join(found)}.")
