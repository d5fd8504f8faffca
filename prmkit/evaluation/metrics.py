"""Every figure of an evaluation, put together: the content of `metrics.json`."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from prmkit.errors import DataError
from prmkit.evaluation import bootstrap
from prmkit.evaluation.agreement import FEWEST_SCORES, Figures, agreement, plain, validity
from prmkit.evaluation.baselines import against_each, baselines, ceiling
from prmkit.evaluation.heldout import HeldOut, Medians
from prmkit.evaluation.predictions import Row, Scores, table_of_scores
from prmkit.evaluation.summary import ALL
from prmkit.evaluation.trajectories import trajectory_figures
from prmkit.judge.types import BAD_BELOW

_FIRST_TYPES = ("clip", "category", "final")


def metrics_of(
    rows: Sequence[Row], base_rows: Sequence[Row] | None, held_out: HeldOut, medians: Medians
) -> dict[str, Any]:
    """Every figure, as `metrics.json` has it: a value with its interval, n and tasks, or null with the reason.

    Args:
        rows: the judge's predictions.
        base_rows: the base model's, or None.
        held_out: what was judged.
        medians: the training medians, for the constant baseline.
    """
    judges = held_out.judges
    scores = table_of_scores(rows, judges, medians)
    base = None if base_rows is None else table_of_scores(base_rows, judges, medians)
    if not len(scores):
        raise DataError(f"{held_out.file}: none of the scores that the prompts ask for has a number and a reference.")
    metrics: dict[str, Any] = plain(
        {
            "held_out": _described(held_out, rows),
            "method": _method(),
            "validity": {
                kind: validity([row for row in rows if kind in (ALL, row["evaluation_type"])])
                for kind in (ALL, *_evaluation_types(rows))
            },
            "groups": [
                {"evaluation_type": kind, "key": key, "only_key": only} | _group(scores.where(chosen), base, judges)
                for kind, key, only, chosen in _groups(scores)
            ],
            "trajectory": trajectory_figures(rows, _cut_tasks(rows, held_out)),
        }
    )
    return metrics


def _cut_tasks(rows: Sequence[Row], held_out: HeldOut) -> set[str]:
    asked = {row["prompt_sha256"] for row in rows}
    return {prompt.task for prompt in held_out.prompts if prompt.prompt_sha256 not in asked}


def _described(held_out: HeldOut, rows: Sequence[Row]) -> Figures:
    return {
        "dataset": held_out.name,
        "sha256": held_out.sha256,
        "file_sha256": held_out.file_sha256,
        "rows": held_out.rows,
        "prompts": len(held_out.prompts),
        "prompts_evaluated": len(rows),
        "tasks_evaluated": len({row["task_id"] for row in rows}),
        "judges": held_out.judges,
    }


def _method() -> Figures:
    return {
        "reference": "the mean of the judges of a prompt",
        "score": "the mean of the judge's distribution over 0.00 … 1.00; in generate mode the number that it wrote",
        "interval": f"{bootstrap.LEVEL:.0%} percentile bootstrap over tasks",
        "resamples": bootstrap.RESAMPLES,
        "seed": bootstrap.SEED,
        "fewest_scores": FEWEST_SCORES,
        "fewest_tasks": bootstrap.FEWEST_TASKS,
        "bad_below": list(BAD_BELOW),
    }


def _evaluation_types(rows: Sequence[Row]) -> list[str]:
    return sorted({row["evaluation_type"] for row in rows}, key=_type_order)


def _type_order(evaluation_type: str) -> tuple[int, str]:
    known = evaluation_type in _FIRST_TYPES
    return (_FIRST_TYPES.index(evaluation_type) if known else len(_FIRST_TYPES)), evaluation_type


def _groups(scores: Scores) -> Iterator[tuple[str, str, bool, Any]]:
    """All scores, then all of each evaluation type with more than one key, then each key.

    Yields:
        Evaluation type, key, whether the type has no other key, and the mask of the scores.
    """
    yield ALL, ALL, False, np.full(len(scores), True)
    for kind in sorted(set(scores.evaluation_type), key=_type_order):
        of_kind = scores.evaluation_type == kind
        keys = list(dict.fromkeys(scores.key[of_kind]))
        if len(keys) > 1:
            yield kind, ALL, False, of_kind
        for key in keys:
            yield kind, key, len(keys) == 1, of_kind & (scores.key == key)


def _group(scores: Scores, base: Scores | None, judges: Sequence[str]) -> Figures:
    return {
        "scores": len(scores),
        "prompts": len(set(scores.prompt)),
        "tasks": len(set(scores.task)),
        "judge": agreement(scores),
        "against": against_each(scores, judges),
        "baselines": baselines(scores, base),
        "ceiling": ceiling(scores, judges),
    }
