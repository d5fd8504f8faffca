"""Two evaluations of the same held-out prompts: which judge is better, and is that more than chance?"""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from prmkit.errors import DataError, GateError
from prmkit.evaluation import measures
from prmkit.evaluation.agreement import FEWEST_SCORES, Figures, groups_of, plain
from prmkit.evaluation.baselines import shared
from prmkit.evaluation.bootstrap import Figure, Floats, Sample, Statistic, make_sample, measure
from prmkit.evaluation.evaluate import METRICS, PREDICTIONS
from prmkit.evaluation.predictions import Scores, table_of_scores
from prmkit.evaluation.summary import ALL, ORDER, shown
from prmkit.files import read_jsonl
from prmkit.judge.sources import check_keys, read_object

COMPARISON = "comparison.json"
COLUMNS = ("scores of", "n", "tasks", "Spearman", "other", "difference", "MAE", "other", "difference", "verdict")
NUMERIC = COLUMNS[1:-1]

LEAST_SHARE = 0.95
"""Of the scores that are asked for; a gate that fewer pass is passed by the prompts that happen to suit the judge."""

_FIGURES = (ORDER, "mae")


def compare(this: Path, other: Path, prompts: Collection[str] | None = None) -> dict[str, Any]:
    """Compare two judges on the scores that both gave.

    Differences are this judge's figure minus the other's, with a 95 % interval in which both are resampled together,
    task by task: the prompts that are hard for both do not blur the difference.

    Args:
        this: a folder with `metrics.json` and `predictions.jsonl`.
        other: another one, or the folder of a run that has been evaluated.
        prompts: the SHA-256 of those to compare on; None for all that both have.

    Raises:
        DataError: one has not been evaluated, or they were measured on different held-out rows, or share no score.
    """
    other = other if (other / METRICS).is_file() or not (other / "evaluation").is_dir() else other / "evaluation"
    described, others = _described(this), _described(other)
    if described["held_out"]["sha256"] != others["held_out"]["sha256"]:
        raise DataError(
            f"{this} and {other} were measured on different held-out rows ({described['held_out']['dataset']}, "
            f"{others['held_out']['dataset']}). Evaluate one of them again, on the other's --data-dir and --dataset."
        )
    mine, theirs = _scores(this, prompts), _scores(other, prompts)
    both, both_of_other = shared(mine, theirs)
    if not len(both):
        raise DataError(f"{this} and {other} share no score. Evaluate both without --limit.")
    kinds = [ALL, *dict.fromkeys(both.evaluation_type)]
    masks = {kind: np.full(len(both), True) if kind == ALL else both.evaluation_type == kind for kind in kinds}
    comparison: dict[str, Any] = plain(
        {
            "this": str(this),
            "other": str(other),
            "held_out_sha256": described["held_out"]["sha256"],
            "scores_of_this_alone": len(mine) - len(both),
            "scores_of_other_alone": len(theirs) - len(both),
            "groups": [
                {"evaluation_type": kind} | _differences(both.where(mask), both_of_other.where(mask))
                for kind, mask in masks.items()
            ],
        }
    )
    return comparison


def _described(folder: Path) -> Mapping[str, Any]:
    if not (folder / METRICS).is_file():
        raise DataError(f"{folder}: no {METRICS}. Evaluate it first: python evaluate_judge.py --run FOLDER")
    metrics = read_object(folder / METRICS, held_out=dict)
    check_keys(folder / METRICS, metrics["held_out"], sha256=str, dataset=str)
    return metrics


def _scores(folder: Path, prompts: Collection[str] | None) -> Scores:
    file = folder / PREDICTIONS
    try:
        rows = [row for row in read_jsonl(file) if prompts is None or row["prompt_sha256"] in prompts]
        return table_of_scores(rows, judges=(), medians={})
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file}: damaged: a line is no prediction ({error!r}). Evaluate the judge again.") from error


def _differences(mine: Scores, theirs: Scores) -> Figures:
    samples = [make_sample(scores.predicted, scores.reference, scores.task) for scores in (mine, theirs)]
    figures: Figures = {"scores": len(mine), "tasks": samples[0].tasks}
    keys = groups_of(mine.evaluation_type, mine.key)
    statistics: Mapping[str, tuple[Callable[[Sample], Statistic], int]] = {
        ORDER: (lambda sample: measures.spearman_within(sample, keys), FEWEST_SCORES),
        "mae": (measures.mean_absolute_error, 1),
    }
    for name, (statistic_of, fewest) in statistics.items():
        one, other = (statistic_of(sample) for sample in samples)
        figures[name] = {
            "this": measure(samples[0], one, fewest=fewest),
            "other": measure(samples[1], other, fewest=fewest),
            "difference": measure(samples[0], _difference(one, other), fewest=fewest),
        }
    return figures | {"verdict": _verdict(figures[ORDER], figures["mae"])}


def _difference(one: Statistic, other: Statistic) -> Statistic:
    def statistic(weights: Floats) -> Floats:
        return one(weights) - other(weights)

    return statistic


def _verdict(spearman: Mapping[str, Figure], mae: Mapping[str, Figure]) -> str:
    """`worse` or `better` where one figure's interval lies beyond zero and the other's does not contradict.

    A judge that says the same everywhere has no Spearman correlation, and none that differs; it is worse all the same
    than one that puts things in the right order.
    """
    order, error = spearman["difference"], mae["difference"]
    worse = _beyond(order, below=True) or _beyond(error, below=False) or _lost(spearman["this"], spearman["other"])
    better = _beyond(order, below=False) or _beyond(error, below=True) or _lost(spearman["other"], spearman["this"])
    if worse and better:
        return "mixed"
    return "worse" if worse else "better" if better else "no difference shown"


def _lost(one: Figure, other: Figure) -> bool:
    # Tasks and references are the same on both sides, so only predictions that do not vary can leave one undefined.
    return one.value is None and other.value is not None and other.value > 0


def _beyond(figure: Figure, *, below: bool) -> bool:
    if figure.low is None or figure.high is None:
        return False
    return figure.high < 0 if below else figure.low > 0


def comparison_table(comparison: Mapping[str, Any]) -> list[list[str]]:
    """One row an evaluation type, the cells in the order of `COLUMNS`."""
    return [
        [
            "everything" if group["evaluation_type"] == ALL else group["evaluation_type"],
            str(group["scores"]),
            str(group["tasks"]),
            *(
                shown(group[name][which], 3, interval=which == "difference")
                for name in _FIGURES
                for which in ("this", "other", "difference")
            ),
            group["verdict"],
        ]
        for group in comparison["groups"]
    ]


def refuse_worse(comparison: Mapping[str, Any]) -> None:
    """Fail where this judge is worse over everything, by more than chance explains.

    Raises:
        GateError: the interval of Spearman's difference lies below zero, or that of the mean absolute error's above.
    """
    everything = comparison["groups"][0]
    if everything["verdict"] in ("worse", "mixed"):
        spearman = f"Spearman differs by {shown(everything[ORDER]['difference'], 3)}"
        if everything[ORDER]["difference"]["value"] is None:
            spearman = (
                f"its Spearman is {_or_why(everything[ORDER]['this'])}, {_or_why(everything[ORDER]['other'])} there"
            )
        raise GateError(
            f"{comparison['this']} is worse than {comparison['other']}: {spearman}, MAE differs by "
            f"{shown(everything['mae']['difference'], 3)}."
        )


def _or_why(figure: Mapping[str, Any]) -> str:
    return f"undefined ({figure['reason']})" if figure["value"] is None else shown(figure, 3)


def left_out(comparison: Mapping[str, Any]) -> str | None:
    """What the comparison is not made of; None where both judges have every score."""
    mine, theirs = comparison["scores_of_this_alone"], comparison["scores_of_other_alone"]
    if not mine and not theirs:
        return None
    both = comparison["groups"][0]["scores"]
    return f"Compared on the {both} scores that both made; left out are {mine} of this judge and {theirs} of the other."


def refuse_few_scores(metrics: Mapping[str, Any], gates: str) -> None:
    """Fail where the judge made too few of the scores that it was asked for: the rest may be any.

    Args:
        metrics: the content of `metrics.json`.
        gates: the flags that ask for it.

    Raises:
        GateError: it made less than `LEAST_SHARE` of them.
    """
    every = metrics["validity"][ALL]
    made, asked = every["scores_made"], every["scores_asked"]
    if made < LEAST_SHARE * asked:
        raise GateError(
            f"{gates}: {made} of {asked} scores were made ({made / asked:.1%}), at least {LEAST_SHARE:.0%} are needed. "
            f"Why the others were not stands in {PREDICTIONS}."
        )


def refuse_low_spearman(metrics: Mapping[str, Any], least: float) -> None:
    """Fail where the judge's Spearman correlation over everything is below a threshold, or not defined.

    Raises:
        GateError: it is.
    """
    spearman = metrics["groups"][0]["judge"][ORDER]
    if spearman["value"] is None:
        raise GateError(f"--min-spearman {least}: there is no Spearman correlation ({spearman['reason']}).")
    if spearman["value"] < least:
        raise GateError(f"--min-spearman {least}: the Spearman correlation is {shown(spearman, 3)}.")
