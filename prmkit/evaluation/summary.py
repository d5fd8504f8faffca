"""What the figures mean, in plain sentences and one table: the same on the terminal and in the report."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from prmkit.evaluation.bootstrap import SAME_PREDICTION
from prmkit.judge.types import LOW_LABEL_MASS

ALL = "all"
"""Stands for every evaluation type, or for every key, in `metrics.json`."""

Group = Mapping[str, Any]
"""One entry of `groups` in `metrics.json`."""

ORDER = "spearman_within_keys"
"""The correlation that is shown and judged by. Pooled over keys, even one that says each key's usual score has some."""
NONE = "–"
_COPIES_FROM = 0.5  # a share of scores equal to the prompt's, above which the judge copies rather than agrees
_HUGS_WITHIN = 0.5  # a distance to the prompt's score, as a part of the judges' own, below which it does so too


def groups_of_kind(metrics: Mapping[str, Any]) -> list[Group]:
    """For each evaluation type the group with all of its scores, in the order of `metrics.json`."""
    kinds: dict[str, Group] = {}
    for group in metrics["groups"]:
        if group["evaluation_type"] != ALL:
            kinds.setdefault(group["evaluation_type"], group)
    return list(kinds.values())


def shown(figure: Mapping[str, Any] | None, decimals: int = 2, *, interval: bool = True) -> str:
    """A figure as people read it: `0.78 [0.70, 0.84]`; a dash where there is none."""
    if figure is None or figure["value"] is None:
        return NONE
    text = f"{figure['value']:.{decimals}f}"
    if interval and figure["low"] is not None:
        text += f" [{figure['low']:.{decimals}f}, {figure['high']:.{decimals}f}]"
    return text


def percent(figure: Mapping[str, Any], decimals: int = 0) -> str:
    """A share as people read it."""
    return NONE if figure["value"] is None else f"{figure['value']:.{decimals}%}"


# --- the table --------------------------------------------------------------------------------------------------------

COLUMNS = (
    *("scores of", "n", "tasks", "MAE", "median", "skill", "Spearman", "judges"),
    *("pairs", "tied", "AUROC", "kappa"),
)
NUMERIC = COLUMNS[1:]
LEGEND = (
    "MAE: mean absolute error against the mean judge; median: that of always answering the training median; skill: the "
    "part of it that the judge avoids. Spearman: with the mean judge, key by key; judges: of two judges, on "
    "average. pairs: pairs of scores of one task in the right order or rightly tied; tied: what calling everything a "
    "tie reaches. "
    "AUROC: telling steps below 0.5 from the others, 0.5 is chance. kappa: on the five bands, quadratic weights."
)


def main_table(metrics: Mapping[str, Any], *, intervals: bool = False) -> list[list[str]]:
    """One row a group, the cells in the order of `COLUMNS`.

    Args:
        metrics: the content of `metrics.json`.
        intervals: with every figure; else only with Spearman's.
    """
    return [_table_row(group, intervals) for group in metrics["groups"]]


def _table_row(group: Group, intervals: bool) -> list[str]:
    judge = group["judge"]
    median = group["baselines"].get("training_median")
    tied = judge["pairwise_always_tied"]
    return [
        _table_name(group),
        str(group["scores"]),
        str(group["tasks"]),
        shown(judge["mae"], interval=intervals),
        shown(median["mae"] if median else None, interval=False),
        shown(judge["skill"], interval=intervals),
        shown(judge[ORDER]),
        shown(judges_agreement(group), interval=False),
        shown(judge["pairwise_accuracy"], interval=intervals),
        NONE if tied is None else f"{tied:.2f}",
        shown(judge["bad_step"]["0.5"]["auroc"], interval=intervals),
        shown(judge["kappa"], interval=intervals),
    ]


def _table_name(group: Group) -> str:
    # Keys stand indented below their evaluation type; a type with one key has one row.
    kind, key = group["evaluation_type"], group["key"]
    return f"  {key}" if ALL not in (kind, key) and not group["only_key"] else group_name(group)


def group_name(group: Group) -> str:
    """`clip`, `final · answer_correctness`, or `everything`."""
    kind, key = group["evaluation_type"], group["key"]
    if kind == ALL:
        return "everything"
    return kind if key == ALL else f"{kind} · {key}"


def judges_agreement(group: Group, name: str = ORDER) -> Mapping[str, Any] | None:
    """How well two judges agree: a pair's figure, or the mean over all pairs, without interval; None without any."""
    pairs: list[Mapping[str, Any]] = [pair[name] for pair in group["ceiling"]["pairs"]]
    known = [figure for figure in pairs if figure["value"] is not None]
    if len(known) < 2:
        return next(iter([*known, *pairs]), None)
    n, tasks = (max(figure[which] for figure in known) for which in ("n", "tasks"))
    mean = fmean(figure["value"] for figure in known)
    return {"value": mean, "low": None, "high": None, "n": n, "tasks": tasks, "pairs": len(known)}


# --- the verdict ------------------------------------------------------------------------------------------------------


Standing = Literal["good", "weak", "useless", "unknown"]
_SHORT: Mapping[Standing, str] = {
    "good": "useful on",
    "weak": "weak on",
    "useless": "not to be used on",
    "unknown": "not enough data on",
}


@dataclass(frozen=True)
class Conclusion:
    """What one evaluation type's figures say to the person who must decide."""

    kind: str
    standing: Standing
    headline: str
    sentences: tuple[str, ...]


def conclusions(metrics: Mapping[str, Any]) -> list[Conclusion]:
    """One conclusion for each evaluation type."""
    found = []
    for group in groups_of_kind(metrics):
        label_mass = metrics["validity"][group["evaluation_type"]].get("label_mass")
        standing, headline = _headline(group, label_mass)
        found.append(Conclusion(group["evaluation_type"], standing, headline, tuple(_sentences(group))))
    return found


def verdict_lines(metrics: Mapping[str, Any]) -> list[str]:
    """The verdict as a terminal shows it."""
    lines = [f"{each.kind}: {each.headline}" for each in conclusions(metrics)]
    return [*lines, validity_sentence(metrics)]


def in_short(found: Sequence[Conclusion]) -> str:
    """`Useful on clip; weak on category and final.`"""
    by_standing: dict[str, list[str]] = {}
    for each in found:
        by_standing.setdefault(each.standing, []).append(each.kind)
    parts = [f"{_SHORT[standing]} {_listed(by_standing[standing])}" for standing in _SHORT if standing in by_standing]
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}."


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def _headline(group: Group, label_mass: Mapping[str, Any] | None) -> tuple[Standing, str]:
    """The first of these that holds. The order matters: what makes a judge useless comes before what makes it weak.

    Args:
        group: of one evaluation type.
        label_mass: the mean label_mass of its scores; None where they were read from text.
    """
    judge, copying, gap = group["judge"], group["baselines"].get("copy"), group["ceiling"]["gap"]
    spearman, skill = judge[ORDER], judge["skill"]
    if spearman.get("reason") == SAME_PREDICTION:
        return "useless", "It gives everything the same score: it judges nothing."
    if spearman["value"] is None or spearman["low"] is None:
        return "unknown", f"Too little held-out data to say ({spearman.get('reason')})."
    if label_mass and label_mass["value"] is not None and label_mass["value"] < LOW_LABEL_MASS:
        wanted = f"{percent(label_mass)} of its probability is on one"
        return "useless", f"It does not want to answer with a score: {wanted}."
    if spearman["low"] <= 0:
        return "useless", "Nothing shows that its order is better than chance."
    if copying and _copies(copying):
        return "useless", "It repeats the scores that stand in the prompt."
    if skill["low"] is not None and skill["low"] <= 0:
        return "weak", "Its order means something; that its numbers beat a constant is not shown."
    if copying and copying["skill"]["low"] is not None and copying["skill"]["low"] <= 0:
        return "weak", "It judges, but copying the scores that stand in the prompt would do as well."
    if gap["low"] is None:
        return "good", "It judges. How well judges agree with each other is not known here."
    if gap["high"] < 0:
        return "good", f"It judges, but agrees with a judge less than another judge does{_by(gap)}."
    return "good", f"It agrees with a judge as well as another judge does, as far as can be told{_by(gap)}."


def _by(gap: Mapping[str, Any]) -> str:
    return f" (difference in Spearman {gap['value']:+.2f} [{gap['low']:+.2f}, {gap['high']:+.2f}])"


def _copies(copying: Mapping[str, Any]) -> bool:
    equal, of_reference = copying["judge_equals_copy"]["value"], copying["reference_equals_copy"]["value"]
    near, near_of_reference = copying["distance_of_judge"]["value"], copying["distance_of_reference"]["value"]
    if None in (equal, of_reference, near, near_of_reference):
        return False
    return bool(equal > max(_COPIES_FROM, of_reference) or near < _HUGS_WITHIN * near_of_reference)


def _sentences(group: Group) -> Iterator[str]:
    judge = group["judge"]
    order = f"its Spearman correlation with the mean judge is {shown(judge[ORDER])}"
    if judge[ORDER]["value"] is None:
        order = f"it has no Spearman correlation with the mean judge ({judge[ORDER]['reason']})"
    yield f"On {group['scores']} held-out scores of {group['tasks']} tasks {order}{_ceiling_clause(group)}."
    yield f"It errs by {shown(judge['mae'])} on average" + _median_clause(group) + "."
    if copying := group["baselines"].get("copy"):
        yield _copy_sentence(copying)
    if base := group["baselines"].get("base_model"):
        yield (
            f"The base model, without training, errs by {shown(base['base']['mae'])} with a Spearman of "
            f"{shown(base['base'][ORDER])}."
        )
    auroc, bad = judge["bad_step"]["0.5"]["auroc"], judge["bad_step"]["0.5"]["bad_share"]
    if auroc["value"] is not None:
        yield (
            f"Of a bad and a good step (border 0.5; {percent(bad)} are bad) it gives the bad one the lower score in "
            f"{percent(auroc)} of cases; 50% would be chance."
        )


def _ceiling_clause(group: Group) -> str:
    other = judges_agreement(group)
    if other is None or other["value"] is None:
        return ""
    bound = group["ceiling"]["bounds"][ORDER]["mean_judge"]
    limit = f", and noise in their scores keeps anyone below about {bound['value']:.2f}" if bound["value"] else ""
    pairs = f" on average over {other['pairs']} pairs" if "pairs" in other else ""
    return f"; two judges agree with each other at {shown(other)}{pairs}{limit}"


def _median_clause(group: Group) -> str:
    median = group["baselines"].get("training_median")
    if not median:
        return ""
    skill = group["judge"]["skill"]
    gained = f" (skill {shown(skill)})" if skill["value"] is not None else ""
    return f"; always answering the training median errs by {shown(median['mae'], interval=False)}{gained}"


def _copy_sentence(copying: Mapping[str, Any]) -> str:
    what = "their mean" if copying["copied"] == "mean" else "the last of them"

    def errs(who: str) -> str:
        error, order = copying[who]["mae"], copying[who][ORDER]
        return f"errs by {shown(error, interval=False)} with a Spearman of {shown(order, interval=False)}"

    return (
        f"For {copying['judge']['mae']['n']} of them the prompt shows earlier scores in clear: copying {what} "
        f"{errs('copy')}, the judge {errs('judge')}; {percent(copying['judge_equals_copy'])} of the judge's scores "
        f"equal the copied one, {percent(copying['reference_equals_copy'])} of the mean judge's do."
    )


def validity_sentence(metrics: Mapping[str, Any]) -> str:
    """How many prompts have scores, why the others have none, and how much the model wanted to answer with a score."""
    every = metrics["validity"][ALL]
    scored, prompts = every["statuses"].get("ok", 0), every["prompts"]
    text = f"All {prompts} prompts got scores" if scored == prompts else f"{scored} of {prompts} prompts got scores"
    if every["reasons"]:
        text += "; the others did not: " + ", ".join(f"{n} {reason}" for reason, n in every["reasons"].items())
    if every["trimmed"]:
        text += f"; {every['trimmed']} were shortened to fit"
    if every["repaired"]:
        text += f"; {every['repaired']} answers were no valid JSON as written and were repaired"
    if "label_mass" in every:
        text += f"; the 101 scores hold {percent(every['label_mass'], 1)} of the model's probability on average"
        low = every["label_mass_low_share"]["value"]
        text += f", less than half of it for {low:.1%} of the scores" if low else ""
    return text + "."


def reasons(metrics: Mapping[str, Any]) -> Sequence[str]:
    """Why figures in the table are missing, each reason once."""
    found: dict[str, None] = {}
    for group in metrics["groups"]:
        judge = group["judge"]
        for figure in (judge[ORDER], judge["kappa"], judge["skill"], judge["bad_step"]["0.5"]["auroc"]):
            if figure["value"] is None:
                found[f"{group_name(group)}: {figure['reason']}"] = None
    return list(found)
