"""The metrics as one table and plain sentences: the same on the terminal, in the report and on the model card."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from prmkit.evaluation.baselines import MAX_GROUPS
from prmkit.evaluation.metrics import ALL, METRICS, ORDER, STRICT, Metric
from prmkit.intervals import format_estimate, percent
from prmkit.judge.types import SCORED

Group = Mapping[str, Any]
"""One entry of `groups` in `metrics.json`."""

MIN_SCORED = 0.95
"""The fraction of requested scores that a judge must give, because the missing ones may be those that matter."""
MIN_BAD = 10
"""The number of bad (and of good) scores needed to grade how well the judge finds bad steps."""
_BIAS_HELPS = 0.05  # the bias is worth reporting if subtracting it lowers the RMSE by at least this fraction
_SMALLEST_BIAS = 0.01


def groups_of_types(metrics: Mapping[str, Any]) -> list[Group]:
    """Return the group with all scores of each evaluation type, in the order of `metrics.json`."""
    types: dict[str, Group] = {}
    for group in metrics["groups"]:
        if group["evaluation_type"] != ALL:
            types.setdefault(group["evaluation_type"], group)
    return list(types.values())


# --- the table --------------------------------------------------------------------------------------------------------

_SHOWN = tuple(metric for metric in METRICS if metric.header)
COLUMNS = ("scores of", "n", "tasks", *(metric.header for metric in _SHOWN), "constant", "judges")
NUMERIC = COLUMNS[1:]
_IMPORTANCE = {metric.header: metric.importance for metric in _SHOWN} | {
    "constant": 2, "judges": 4, "tasks": 5, "n": 9,
}  # fmt: skip
OPTIONAL = tuple(sorted(_IMPORTANCE, key=lambda header: _IMPORTANCE[header]))[:-1]
"""The columns that a narrow terminal drops, in that order: all except the most important one."""
LEGEND = (
    "; ".join(f"{metric.header}: {metric.meaning}" for metric in _SHOWN)
    + "; constant: the RMSE of always answering the training mean; judges: mean Spearman of two judges."
)


def main_table(metrics: Mapping[str, Any], *, intervals: bool = False) -> list[list[str]]:
    """Return one row per group, with cells in the order of `COLUMNS`.

    Args:
        metrics: the content of `metrics.json`.
        intervals: show every estimate's interval, not only Spearman's.
    """
    return [_table_row(group, intervals) for group in metrics["groups"]]


def _table_row(group: Group, intervals: bool) -> list[str]:
    cells = []
    for metric in _SHOWN:
        estimate = _estimate(group, metric)
        cell = format_estimate(estimate, interval=intervals or metric.name == ORDER)
        counted = metric.name == "pairwise_accuracy" and estimate["value"] is not None and intervals
        cells.append(f"{cell} n={estimate['n']}" if counted else cell)
    constant = group["baselines"]["constant"]["rmse"]
    others = judges_agreement(group)
    numbers = [str(group["scores"]), str(group["tasks"])]
    return [
        _table_name(group),
        *numbers,
        *cells,
        format_estimate(constant, interval=False),
        format_estimate(others, interval=False),
    ]


def _estimate(group: Group, metric: Metric) -> Mapping[str, Any]:
    judge: Mapping[str, Any] = group["judge"]
    estimate: Mapping[str, Any] = (judge["bad_step"][STRICT] if metric.at_thresholds else judge)[metric.name]
    return estimate


BREAKDOWN_COLUMNS = ("value", "n", "tasks", "Spearman", "RMSE", "bias", "AUROC")


def breakdown_table(values: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return one row per value of a metadata key, with cells in the order of `BREAKDOWN_COLUMNS`."""
    return [
        [
            value["value"],
            str(value["scores"]),
            str(value["tasks"]),
            *(format_estimate(value[name], interval=name == ORDER) for name in (ORDER, "rmse", "bias")),
            format_estimate(value["bad_step"][STRICT]["auroc"], interval=False),
        ]
        for value in values
    ]


def left_out_of_breakdown(metrics: Mapping[str, Any], key: str) -> str | None:
    """Return how many scores the table of a metadata key does not show; None if it shows all."""
    values, everything = metrics["breakdowns"].get(key, []), metrics["groups"][0]["scores"]
    if not (left_out := everything - sum(value["scores"] for value in values)):
        return None
    return (
        f"{left_out:,} of {everything:,} scores are not in this table: it has at most {MAX_GROUPS} values, and rows "
        f"without a value of {key} are left out."
    )


def _table_name(group: Group) -> str:
    # Keys are indented below their evaluation type; a type with one key has one row.
    evaluation_type, key = group["evaluation_type"], group["key"]
    return f"  {key}" if ALL not in (evaluation_type, key) and not group["only_key"] else group_name(group)


def group_name(group: Group) -> str:
    """Return the name of a group: `clip`, `final · answer_correctness`, or `everything`."""
    evaluation_type, key = group["evaluation_type"], group["key"]
    if evaluation_type == ALL:
        return "everything"
    return evaluation_type if key == ALL else f"{evaluation_type} · {key}"


def judges_agreement(group: Group, name: str = ORDER) -> Mapping[str, Any] | None:
    """Return the agreement of the only pair of judges, or the mean over all pairs (without an interval), or None."""
    pairs: list[Mapping[str, Any]] = [pair[name] for pair in group["ceiling"]["pairs"]]
    known = [estimate for estimate in pairs if estimate["value"] is not None]
    if len(known) < 2:
        return next(iter([*known, *pairs]), None)
    n, tasks = (max(estimate[which] for estimate in known) for which in ("n", "tasks"))
    mean = fmean(estimate["value"] for estimate in known)
    return {"value": mean, "low": None, "high": None, "n": n, "tasks": tasks, "pairs": len(known)}


# --- notes ------------------------------------------------------------------------------------------------------------


def bias_sentence(group: Group) -> str | None:
    """Describe the bias, if its interval excludes 0 and subtracting it would lower the RMSE."""
    bias, rmse = group["judge"]["bias"], group["judge"]["rmse"]
    if bias["low"] is None or bias["low"] <= 0 <= bias["high"] or not rmse["value"]:
        return None
    if abs(bias["value"]) < _SMALLEST_BIAS:
        return None
    without = max(0.0, rmse["value"] ** 2 - bias["value"] ** 2) ** 0.5
    if without > (1 - _BIAS_HELPS) * rmse["value"]:
        return None
    direction = "more lenient" if bias["value"] > 0 else "stricter"
    return (
        f"It is {direction} than the judges' mean: its bias is {format_estimate(bias)}. If this is subtracted from its "
        f"scores, the RMSE falls from {rmse['value']:.2f} to {without:.2f}."
    )


def overconfidence_sentence(group: Group) -> str | None:
    """Warn if the judge's own 90 % ranges contain far fewer references than they should."""
    inside = group["judge"]["own_range_share"]
    if inside["high"] is None or inside["high"] >= 0.8:
        return None
    return (
        f"It is overconfident: its own 90 % ranges contain only {percent(inside)} of the references. Use calibrated "
        "intervals (score_trajectories.py --interval 0.9)."
    )


def ceiling_sentence(group: Group) -> str | None:
    """Describe how well judges agree, and the resulting upper bound; None if their agreement is unknown."""
    other = judges_agreement(group)
    if other is None or other["value"] is None:
        return None
    pairs = f" on average over {other['pairs']} pairs" if "pairs" in other else ""
    text = f"The Spearman correlation of two judges is {format_estimate(other)}{pairs}."
    bounds = group["ceiling"]["bounds"][ORDER]
    bound, by_self = bounds["mean_judge"]["value"], bounds["mean_judge_by_self"]["value"]
    if bound is None:
        reason = group["ceiling"]["no_bound_because"]
        return f"{text} The resulting upper bound is unknown: {reason}." if reason else text
    if by_self is not None:
        text += (
            f" Their agreement with themselves on repeated prompts limits the correlation of any prediction with their "
            f"mean to about {by_self:.2f}."
        )
    return (
        f"{text} If the judges differed only by noise, no prediction would correlate with their mean by more than "
        f"about {bound:.2f}; if each has its own consistent view, a model may exceed that. The bound is about these "
        "judges, not about the truth."
    )


def copy_sentence(copying: Mapping[str, Any]) -> str:
    """Compare the judge with copying the scores that the prompt shows."""
    what = "their mean" if copying["copied"] == "mean" else "the last of them"
    errors = {who: format_estimate(copying[who]["mae"], interval=False) for who in ("copy", "judge")}
    orders = {who: format_estimate(copying[who][ORDER], interval=False) for who in ("copy", "judge")}
    return (
        f"For {copying['judge']['mae']['n']} scores, the prompt shows earlier scores. Copying {what} has an MAE of "
        f"{errors['copy']} and a Spearman of {orders['copy']}, this judge {errors['judge']} and {orders['judge']}. The "
        f"copied score is equal to {percent(copying['judge_equals_copy'])} of this judge's scores and to "
        f"{percent(copying['reference_equals_copy'])} of the reference scores (the judges' means)."
    )


def floor_sentence(group: Group) -> str:
    """Describe how well the simplest rankings do, and the smallest loss that these tasks can show."""
    parts = [
        f"ranking by {words} alone reaches a Spearman of "
        + format_estimate(group["baselines"][name][ORDER], interval=False)
        for name, words in (("length", "the prompt's length"), ("position", "the step's number"))
        if name in group["baselines"] and group["baselines"][name][ORDER]["value"] is not None
    ]
    if all(half["value"] is not None for half in group["halves"]):
        one, other = (format_estimate(half, interval=False) for half in group["halves"])
        parts.append(f"on two halves of the tasks the judge's Spearman is {one} and {other}")
    if (least := smallest_visible_difference(group["judge"][ORDER])) is not None:
        parts.append(
            f"the smallest loss in Spearman that a comparison on these tasks shows reliably is about {least:.2f}"
        )
    text = "; ".join(parts) or "too little data to measure the simplest rankings"
    return f"For comparison: {text}."


def smallest_visible_difference(order: Mapping[str, Any]) -> float | None:
    """Return the loss that a comparison of two judges on these tasks detects with 80 % power (one-sided, 5 %).

    If the errors of the two correlate by 0.5, the standard error of their difference is that of one of them.
    """
    if order["low"] is None:
        return None
    standard_error = (order["high"] - order["low"]) / (2 * 1.96)
    return float((1.645 + 0.842) * standard_error)


def conclusion_lines(metrics: Mapping[str, Any]) -> list[str]:
    """Return the conclusions as the terminal shows them."""
    summary = metrics["summary"]
    lines = [f"{name}: {each['headline']}" for name, each in summary["types"].items()]
    return [summary["headline"], *lines, *summary["warnings"], validity_sentence(metrics)]


def validity_sentence(metrics: Mapping[str, Any]) -> str:
    """Describe how many prompts have scores, why the others do not, and how much probability was on scores."""
    every = metrics["validity"][ALL]
    scored, prompts = sum(every["statuses"].get(status, 0) for status in SCORED), every["prompts"]
    text = f"All {prompts} prompts got scores" if scored == prompts else f"{scored} of {prompts} prompts got scores"
    if every["reasons"]:
        text += "; the others did not: " + ", ".join(f"{n} {reason}" for reason, n in every["reasons"].items())
    if unsure := every["statuses"].get("unsure"):
        text += f"; {unsure} of them are unsure (low label mass)"
    if every["trimmed"]:
        text += f"; {every['trimmed']} were shortened to fit"
    if every["repaired"]:
        text += f"; {every['repaired']} answers were not valid JSON and were repaired"
    if "label_mass" in every:
        text += (
            f"; label mass is {percent(every['label_mass'], '.1%')} on average (the probability of any score at all)"
        )
        low = every["label_mass_low_share"]["value"]
        text += f", below one half for {low:.1%} of the scores" if low else ""
    return text + "."


def missing_reasons(metrics: Mapping[str, Any]) -> list[str]:
    """Return why cells of the table are empty, each reason once."""
    found: dict[str, None] = {}
    for group in metrics["groups"]:
        for estimate in (_estimate(group, metric) for metric in _SHOWN):
            if estimate["value"] is None:
                found[f"{group_name(group)}: {estimate['reason']}"] = None
    return list(found)
