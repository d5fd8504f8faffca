"""The predictions of an evaluation: one line a prompt, written as they come, and read back as a table of scores."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prmkit.evaluation.bootstrap import Floats
from prmkit.evaluation.heldout import HeldOutPrompt, Medians
from prmkit.judge.types import BAD_BELOW, Distribution, Judgement, rounded
from prmkit.prompts.leaked_scores import leaked_scores
from prmkit.resumable import reopen, replace_rows

Row = Mapping[str, Any]
"""One line of `predictions.jsonl`."""


def prediction_row(prompt: HeldOutPrompt, judgement: Judgement) -> dict[str, Any]:
    """What is kept of one judged prompt: everything that a figure is made of, and what traces it back."""
    leaked = leaked_scores(prompt.prompt)
    return {
        "id": prompt.id,
        "prompt_sha256": prompt.prompt_sha256,
        "task_id": prompt.task,
        "evaluation_type": prompt.evaluation_type,
        "clip_number": prompt.clip_number,
        "category": prompt.category,
        "prompt_tokens": judgement.prompt_tokens,
        "prompt_characters": len(prompt.prompt),
        "status": judgement.status,
        "reason": judgement.reason,
        "repaired": judgement.repaired,
        "trimmed": judgement.trimmed,
        "scores": {key: _distribution_row(each) for key, each in judgement.scores.items()},
        "reference": prompt.reference,
        "references": prompt.references,
        "leaked_score": round(fmean(leaked), 6) if leaked else None,
        "leaked_last": leaked[-1] if leaked else None,
        "text": judgement.text,
    }


def _distribution_row(distribution: Distribution) -> dict[str, Any]:
    row: dict[str, Any] = {
        name: rounded(getattr(distribution, name)) for name in ("mean", "median", "mode", "std", "label_mass")
    }
    below = distribution.below
    return row | {"below": {str(limit): rounded(share) for limit, share in below.items()} if below else None}


# --- going on ---------------------------------------------------------------------------------------------------------


def resume(file: Path, fingerprint: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The predictions that an earlier, possibly killed, evaluation left in `file`, if they are of the same kind.

    Prompts that the judge could not answer then (memory, a server) are taken out of the file: they are to be asked
    again. For the rest see `prmkit.resumable.reopen`.
    """
    found = reopen(file, fingerprint)
    lasting = [row for row in found if row.get("status") != "failed"]
    if len(lasting) < len(found):
        replace_rows(file, lasting)
    return lasting


# --- the table --------------------------------------------------------------------------------------------------------

Texts = NDArray[np.object_]


@dataclass(frozen=True)
class Scores:
    """One entry for every score of every judged prompt that has a reference; all arrays have one length."""

    prompt: Texts
    """SHA-256 of the prompt."""
    task: Texts
    evaluation_type: Texts
    key: Texts
    clip_number: Floats
    prompt_tokens: Floats
    predicted: Floats
    """The judge's score: the mean of its distribution."""
    std: Floats
    label_mass: Floats
    below: Floats
    """Probability that the score is below each of `BAD_BELOW`, shape (scores, 2); NaN in generate mode."""
    reference: Floats
    """The mean of the judges."""
    references: Floats
    """Each judge alone, shape (scores, judges); NaN where a judge gave none."""
    training_median: Floats
    leaked_mean: Floats
    """The mean of the scores that stand in the prompt; NaN where none does."""
    leaked_last: Floats

    def __len__(self) -> int:
        return len(self.predicted)

    def where(self, chosen: NDArray[Any]) -> "Scores":
        """The entries that a mask or a list of positions chooses."""
        return Scores(*(getattr(self, field.name)[chosen] for field in fields(self)))

    def predicting(self, predicted: Floats) -> "Scores":
        """The same entries as another judge would have scored them: one that knows no probabilities."""
        return replace(self, predicted=predicted, below=np.full_like(self.below, np.nan))


def has_score(row: Row, key: str) -> bool:
    """Whether a prediction has a number for a key."""
    mean = row["scores"].get(key, {}).get("mean")
    return mean is not None and math.isfinite(mean)


def table_of_scores(rows: Sequence[Row], judges: Sequence[str], medians: Medians) -> Scores:
    """Every score that both the judge and at least one reference gave.

    Args:
        rows: predictions; those without scores add nothing.
        judges: the columns of `Scores.references`.
        medians: see `prmkit.evaluation.heldout.training_medians`.
    """
    entries = [
        (row, key, score)
        for row in rows
        for key, score in row["scores"].items()
        if key in row["reference"] and has_score(row, key)
    ]

    def texts(values: Iterable[str]) -> Texts:
        return np.array(list(values), dtype=object)

    def numbers(values: Iterable[float | None]) -> Floats:
        return np.array(list(values), dtype=np.float64)  # None becomes NaN

    def matrix(values: Iterable[Sequence[float | None]], columns: int) -> Floats:
        return np.array(list(values), dtype=np.float64).reshape(len(entries), columns)

    return Scores(
        prompt=texts(row["prompt_sha256"] for row, _, _ in entries),
        task=texts(row["task_id"] for row, _, _ in entries),
        evaluation_type=texts(row["evaluation_type"] for row, _, _ in entries),
        key=texts(key for _, key, _ in entries),
        clip_number=numbers(row["clip_number"] for row, _, _ in entries),
        prompt_tokens=numbers(row["prompt_tokens"] for row, _, _ in entries),
        predicted=numbers(score["mean"] for _, _, score in entries),
        std=numbers(score["std"] for _, _, score in entries),
        label_mass=numbers(score["label_mass"] for _, _, score in entries),
        below=matrix(
            ([(score["below"] or {}).get(str(limit)) for limit in BAD_BELOW] for _, _, score in entries), len(BAD_BELOW)
        ),
        reference=numbers(row["reference"][key] for row, key, _ in entries),
        references=matrix(
            ([row["references"].get(judge, {}).get(key) for judge in judges] for row, key, _ in entries), len(judges)
        ),
        training_median=numbers(medians.get(row["evaluation_type"], {}).get(key) for row, key, _ in entries),
        leaked_mean=numbers(row["leaked_score"] for row, _, _ in entries),
        leaked_last=numbers(row["leaked_last"] for row, _, _ in entries),
    )
