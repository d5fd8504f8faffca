"""Grade a judge for each evaluation type: the five conditions for "Useful", the grade and its reason.

The thresholds are the constants below; `summary.py` has those that other tables also need (MIN_SCORED, MIN_BAD).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from prmkit.evaluation.estimates import MIN_TASKS, SAME_PREDICTION, SAME_REFERENCE
from prmkit.evaluation.metrics import ALL, MIN_PAIRS, ORDER, STRICT
from prmkit.evaluation.predictions import PRAISED_FROM
from prmkit.evaluation.summary import (
    MIN_BAD,
    MIN_SCORED,
    Group,
    bias_sentence,
    ceiling_sentence,
    copy_sentence,
    floor_sentence,
    groups_of_types,
    overconfidence_sentence,
)
from prmkit.intervals import format_estimate, percent
from prmkit.judge.types import LOW_LABEL_MASS

MIN_ORDER = 0.3
"""The lower bound of Spearman's correlation that a ranking needs to be useful."""
MIN_RECALL = 0.5
"""The fraction of bad steps that the judge must score below the threshold; below it, most are missed."""
MAX_PRAISED = 0.1
SAME_AS_A_JUDGE = -0.05
"""A gap to another judge is negligible if its lower bound is above this."""
_COPIES_FROM = 0.5  # a judge copies if a larger fraction of its scores equals the prompt's,
_NEAR_COPY = 0.5  # or if its distance to the prompt's score is below this fraction of the judges' distance
_MUCH_OF_ALL = 0.3  # the largest fraction of the scores that one task should have

# --- the five conditions ----------------------------------------------------------------------------------------------

ConditionState = Literal["met", "failed", "unknown", "not applicable"]


@dataclass(frozen=True)
class Condition:
    """A condition that a useful judge must meet, and whether this judge meets it."""

    name: str
    state: ConditionState
    sentence: str


def conditions(group: Group, validity: Mapping[str, Any]) -> list[Condition]:
    """Check the five conditions for "Useful".

    Args:
        group: the metrics of one evaluation type.
        validity: the validity of the same type.
    """
    return [_order(group), _order_within(group), _bad_steps(group), _scored(validity), _skill(group)]


def _order(group: Group) -> Condition:
    order = group["judge"][ORDER]
    if order["low"] is None:
        return Condition("order", "unknown", f"Ranking: unknown ({order.get('reason')}).")
    text = f"Spearman with the judges' mean is {format_estimate(order)}; the lower bound must be above {MIN_ORDER}."
    return Condition("order", "met" if order["low"] > MIN_ORDER else "failed", f"Ranking: {text}")


def _order_within(group: Group) -> Condition:
    name, pairs, tied = "order within runs", group["judge"]["pairwise_accuracy"], group["judge"]["pairwise_always_tied"]
    if group["trajectories_with_pairs"] < 0.5 * group["trajectories"]:
        text = f"most runs have only one score of this kind ({pairs['n']} pairs), so this does not apply."
        return Condition(name, "not applicable", f"Ranking within runs: {text}")
    if pairs["n"] < MIN_PAIRS:
        text = f"unknown: {pairs['n']} pairs of scores in the same run, but at least {MIN_PAIRS} are needed."
        return Condition(name, "unknown", f"Ranking within runs: {text}")
    if pairs["low"] is None:
        return Condition(name, "unknown", f"Ranking within runs: unknown ({pairs.get('reason')}).")
    least = max(0.5, tied["value"])
    text = f"{format_estimate(pairs)} of {pairs['n']} pairs are right; the lower bound must be above {least:.2f}, "
    text += f"the result of {'calling every pair a tie' if least > 0.5 else 'guessing'}."
    return Condition(name, "met" if pairs["low"] > least else "failed", f"Ranking within runs: {text}")


def _bad_steps(group: Group) -> Condition:
    of_threshold, praised = group["judge"]["bad_step"][STRICT], group["judge"]["praised_share"]
    auroc, recall, share = of_threshold["auroc"], of_threshold["recall"], of_threshold["bad_share"]
    bad, good = recall["n"], share["n"] - recall["n"]
    if min(bad, good) < MIN_BAD:
        text = f"unknown: {bad} bad and {good} good scores, but at least {MIN_BAD} of each are needed."
        return Condition("bad steps", "unknown", f"Bad steps: {text}")
    if auroc["low"] is None:
        return Condition("bad steps", "unknown", f"Bad steps: unknown ({auroc.get('reason')}).")
    failed = []
    if auroc["low"] <= 0.5:
        failed.append("AUROC's lower bound is not above 0.5")
    if recall["value"] < MIN_RECALL:
        failed.append(f"at least {MIN_RECALL:.0%} of them must be below {STRICT}")
    if praised["value"] > MAX_PRAISED:
        failed.append(f"at most {MAX_PRAISED:.0%} may be praised")
    text = (
        f"AUROC is {format_estimate(auroc)}; of the {bad} scores with a judges' mean below {STRICT}, this judge "
        f"also puts {percent(recall)} below {STRICT} and praises {percent(praised)} (a score of {PRAISED_FROM} or more)"
    )
    text += f" ({'; '.join(failed)})." if failed else "."
    return Condition("bad steps", "failed" if failed else "met", f"Bad steps: {text}")


def _scored(validity: Mapping[str, Any]) -> Condition:
    made, asked = validity["scores_made"], validity["scores_asked"]
    text = (
        f"Scored: {made} of {asked} scores were given ({made / max(asked, 1):.1%}); at least {MIN_SCORED:.0%} must be."
    )
    return Condition("scored", "met" if made >= MIN_SCORED * asked else "failed", text)


def _skill(group: Group) -> Condition:
    skill, rmse = group["judge"]["skill"], group["judge"]["rmse"]
    if skill["low"] is None:
        return Condition("skill", "unknown", f"Skill: unknown ({skill.get('reason')}).")
    constant = group["baselines"]["constant"]["rmse"]
    text = (
        f"Skill: its root mean square error is {format_estimate(rmse, interval=False)}, a constant's is "
        f"{format_estimate(constant, interval=False)}, so its skill is {format_estimate(skill)}; "
        "the lower bound must be above 0."
    )
    return Condition("skill", "met" if skill["low"] > 0 else "failed", text)


# --- the conclusion ---------------------------------------------------------------------------------------------------

Grade = Literal["useful", "weak", "not_useful", "unknown"]
_IN_WORDS: Mapping[Grade, str] = {
    "useful": "useful on",
    "weak": "weak on",
    "not_useful": "not useful on",
    "unknown": "not enough data on",
}


@dataclass(frozen=True)
class Conclusion:
    """The grade of one evaluation type, and the reasons for it."""

    evaluation_type: str
    grade: Grade
    headline: str
    conditions: tuple[Condition, ...]
    notes: tuple[str, ...]


def conclusions(metrics: Mapping[str, Any]) -> list[Conclusion]:
    """Return one conclusion per evaluation type."""
    found = []
    for group in groups_of_types(metrics):
        evaluation_type = group["evaluation_type"]
        of_type = [each for each in metrics["groups"] if each["evaluation_type"] == evaluation_type]
        validity = metrics["validity"][evaluation_type]
        five = conditions(group, validity)
        grade, headline = _grade(group, of_type, five, validity.get("label_mass"), list(weak_subgroups(metrics, group)))
        notes = tuple(_notes(group, of_type))
        found.append(Conclusion(evaluation_type, grade, headline, tuple(five), notes))
    return found


def summarize(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the conclusions as `metrics.json` stores them for `train.py --runs`, the model card and other programs."""
    found, groups = conclusions(metrics), groups_of_types(metrics)
    return {
        "headline": in_short(found),
        "spearman": metrics["groups"][0]["judge"][ORDER],
        "types": {
            each.evaluation_type: {
                "grade": each.grade,
                "headline": each.headline,
                "conditions": [asdict(condition) for condition in each.conditions],
                "spearman": group["judge"][ORDER],
                "auroc": group["judge"]["bad_step"][STRICT]["auroc"],
                "rmse": group["judge"]["rmse"],
                "mae": group["judge"]["mae"],
            }
            for each, group in zip(found, groups, strict=True)
        },
        "warnings": list(warnings(metrics)),
    }


def in_short(found: Sequence[Conclusion]) -> str:
    """Summarize the grades in one line: `Useful on clip; weak on category and final.`"""
    by_grade: dict[str, list[str]] = {}
    for each in found:
        by_grade.setdefault(each.grade, []).append(each.evaluation_type)
    parts = [f"{_IN_WORDS[grade]} {_listed(by_grade[grade])}" for grade in _IN_WORDS if grade in by_grade]
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}."


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def _grade(
    group: Group,
    of_type: Sequence[Group],
    five: Sequence[Condition],
    label_mass: Mapping[str, Any] | None,
    weak_subgroups: Sequence[str],
) -> tuple[Grade, str]:
    """Return the first grade that applies, and its reason. Reasons for "not useful" come before those for "weak"."""
    order = group["judge"][ORDER]
    if order.get("reason") == SAME_REFERENCE:
        return "unknown", "The judges gave everything the same score, so there is no ranking to learn or check."
    if order.get("reason") == SAME_PREDICTION:
        return "not_useful", "It is constant: it gives everything the same score."
    if label_mass and label_mass["value"] is not None and label_mass["value"] < LOW_LABEL_MASS:
        return "not_useful", f"It puts only {percent(label_mass)} of its probability on scores."
    if order["low"] is None:
        return "unknown", f"Too little held-out data to say ({order.get('reason')})."
    if order["high"] < 0:
        return "not_useful", f"It is inverted: it ranks good steps below bad ones (Spearman {format_estimate(order)})."
    if order["low"] <= 0:
        return "not_useful", f"Its ranking is not shown to be better than chance (Spearman {format_estimate(order)})."
    if (copying := group["baselines"].get("copy")) and _copies(copying):
        return "not_useful", "It repeats the scores that the prompt shows."
    if weaknesses := [*_weaknesses(group, of_type, five), *weak_subgroups]:
        return "weak", f"{weaknesses[0]}{_but_within_runs(five)}"
    if missing := [condition.sentence for condition in five if condition.state == "unknown"]:
        return "unknown", f"The conditions that could be measured are met, but some could not be measured. {missing[0]}"
    return "useful", _useful_headline(group, five)


def _but_within_runs(five: Sequence[Condition]) -> str:
    states = {condition.name: condition.state for condition in five}
    if states["order within runs"] == "met" and "failed" in (states["order"], states["skill"]):
        return " Its ranking within runs is good: use it to rank the steps within a run, but not to compare runs."
    return ""


def weak_subgroups(metrics: Mapping[str, Any], group: Group) -> Iterator[str]:
    """Yield a sentence for every subgroup with a significantly poor ranking, if the ranking is good overall."""
    if (group["judge"][ORDER]["low"] or 0) <= 0:
        return
    for key, values in metrics["breakdowns"].items():
        for value in values:
            order = value["order_by_type"].get(group["evaluation_type"])
            if order and order["high"] is not None and order["high"] < MIN_ORDER:
                yield f"Where {key} is {value['value']}, its ranking is not useful (Spearman {format_estimate(order)})."


def _weaknesses(group: Group, of_type: Sequence[Group], five: Sequence[Condition]) -> Iterator[str]:
    yield from (condition.sentence for condition in five if condition.state == "failed")
    copying = group["baselines"].get("copy")
    if copying and copying["skill"]["low"] is not None and copying["skill"]["low"] <= 0:
        yield "Copying the scores that the prompt shows would do as well."
    for name, words in (("length", "the prompt's length"), ("position", "the step's number")):
        ranking = group["baselines"].get(name)
        if ranking and (ranking[ORDER]["low"] or 0) > 0 and (ranking["gain"]["low"] or 0) <= 0:
            yield f"Ranking by {words} alone does as well (Spearman {format_estimate(ranking[ORDER])})."
    if any(half["value"] is not None and half["value"] <= 0 for half in group["halves"]):
        yield "Its ranking holds on one half of the tasks but not on the other."
    yield from (sentence for sentence in map(_bad_key, of_type) if sentence)


def _bad_key(group: Group) -> str | None:
    """Describe a key whose ranking is significantly worse than its evaluation type requires; None if it is not."""
    order = group["judge"][ORDER]
    if group["key"] == ALL or group["only_key"]:
        return None
    if order.get("reason") == SAME_PREDICTION:
        return f"It always gives {group['key']} the same score."
    if order["high"] is None or order["high"] >= MIN_ORDER:
        return None
    inverted = "is reversed" if order["high"] < 0 else "is not useful"
    return f"On {group['key']} its ranking {inverted} (Spearman {format_estimate(order)})."


def _useful_headline(group: Group, five: Sequence[Condition]) -> str:
    only = " Whether it ranks the steps within a run correctly is unknown." * any(
        condition.state == "not applicable" for condition in five
    )
    return f"All conditions are met. {_against_judges(group['ceiling']['gap'])}{only}"


def _against_judges(gap: Mapping[str, Any]) -> str:
    if gap["low"] is None:
        return "How well the judges agree with each other is unknown."
    difference = f"difference in Spearman {format_estimate(gap, '+.2f')}"
    if gap["high"] < 0:
        return f"It agrees with a single judge less than the judges agree with each other ({difference})."
    if gap["low"] > SAME_AS_A_JUDGE:
        return f"It agrees with a single judge as well as the judges agree with each other ({difference})."
    return (
        "There is no evidence that it agrees with a single judge less than the judges agree with "
        "each other, but the gap may be "
        f"up to {-gap['low']:.2f} ({difference})."
    )


def _copies(copying: Mapping[str, Any]) -> bool:
    equal, of_reference = copying["judge_equals_copy"]["value"], copying["reference_equals_copy"]["value"]
    near, near_of_reference = copying["distance_of_judge"]["value"], copying["distance_of_reference"]["value"]
    if None in (equal, of_reference, near, near_of_reference):
        return False
    return bool(equal > max(_COPIES_FROM, of_reference) or near < _NEAR_COPY * near_of_reference)


def _notes(group: Group, of_type: Sequence[Group]) -> Iterator[str]:
    if sentence := bias_sentence(group):
        yield sentence
    if sentence := overconfidence_sentence(group):
        yield sentence
    yield from (sentence for sentence in map(_bad_key, of_type) if sentence)
    if agreement := ceiling_sentence(group):
        yield agreement
    if copying := group["baselines"].get("copy"):
        yield copy_sentence(copying)
    if base := group["baselines"].get("base_model"):
        yield (
            f"The base model, without training, has an RMSE of {format_estimate(base['base']['rmse'])} and a Spearman "
            f"of {format_estimate(base['base'][ORDER])}."
        )
    yield floor_sentence(group)


def _selection_sentence(selection: Mapping[str, Any], prompts: int) -> str:
    chosen = f"{selection['prompts']:,} of {prompts:,} prompts were selected by ask_judges.py --first"
    if selection["audited_tasks"] < MIN_TASKS:
        return (
            f"{chosen}, and only {selection['audited_tasks']} tasks have randomly selected prompts, so the metrics "
            "describe steps that a judge was unsure of, not all steps."
        )
    return (
        f"{chosen} and are weighted by the inverse of their selection probability: they are as informative as "
        f"{selection['effective_prompts']:,.0f} prompts without selection."
    )


def warnings(metrics: Mapping[str, Any]) -> Iterator[str]:
    """Yield the warnings that matter for every grade: unscored rows, one dominant task, leniency, subgroups."""
    every = metrics["validity"][ALL]
    if every["scores_made"] < MIN_SCORED * every["scores_asked"]:
        made = f"{every['scores_made']} of {every['scores_asked']}"
        yield f"Only {made} scores are available; everything below is based on these."
    if selection := metrics["held_out"].get("selection"):
        yield _selection_sentence(selection, metrics["held_out"]["prompts_evaluated"])
    largest = metrics["held_out"]["largest_task"]
    if largest["share"] > _MUCH_OF_ALL and metrics["held_out"]["tasks_evaluated"] >= MIN_TASKS:
        yield f"One task ({largest['task']}) has {largest['share']:.0%} of the scores, so it dominates the results."
    for group in groups_of_types(metrics):
        if (group["judge"][ORDER]["low"] or 0) > 0:
            sentences = [bias_sentence(group), overconfidence_sentence(group), *weak_subgroups(metrics, group)]
            yield from (f"{group['evaluation_type']}: {sentence}" for sentence in sentences if sentence)
    yield from (line for line in metrics["leniency"]["sentences"] if line.startswith("warning"))
