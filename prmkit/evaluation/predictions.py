"""The predictions of an evaluation: one line per prompt, written immediately, and read back as scores and samples."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prmkit.errors import DataError
from prmkit.evaluation.estimates import Floats, Integers, Sample, make_pairs, make_sample
from prmkit.evaluation.heldout import Constants, HeldOutPrompt
from prmkit.evaluation.statistics import weighted_mean, weighted_median
from prmkit.judge.types import BAD_BELOW, SAME_SCORE, Distribution, Judgement, rounded
from prmkit.prompts.cleaning import leaked_scores
from prmkit.resumable import reopen
from prmkit.rows import weight_of
from prmkit.verdict import is_share

Row = Mapping[str, Any]
"""One line of `predictions.jsonl`."""

PRAISED_FROM = BAD_BELOW[-1]
"""A judge praises a bad step if it gives the step at least this score; RL would reinforce such steps."""
ROW_FORMAT = 2
"""Part of the fingerprint of `predictions.jsonl`: a file in another format is renamed, not continued."""


def prediction_row(prompt: HeldOutPrompt, judgement: Judgement) -> dict[str, Any]:
    """Return the record of one judged prompt: what the metrics need, and what identifies it in the input."""
    leaked = leaked_scores(prompt.prompt)
    return {
        "id": prompt.id,
        "prompt_sha256": prompt.prompt_sha256,
        "task_id": prompt.task,
        "trajectory_id": prompt.trajectory,
        "evaluation_type": prompt.evaluation_type,
        "clip_number": prompt.clip_number,
        "metadata": prompt.metadata,
        "prompt_tokens": judgement.prompt_tokens,
        "prompt_characters": len(prompt.prompt),
        "status": judgement.status,
        "reason": judgement.reason,
        "repaired": judgement.repaired,
        "trimmed": judgement.trimmed,
        "scores": {key: _distribution_row(each) for key, each in judgement.scores.items()},
        "score": rounded(judgement.score),
        "std": rounded(judgement.std),
        "reference": prompt.reference,
        "references": prompt.references,
        **({"weights": prompt.weights} if prompt.weights else {}),
        "leaked_score": round(fmean(leaked), 6) if leaked else None,
        "leaked_last": leaked[-1] if leaked else None,
        "text": judgement.text,
    }


def _distribution_row(distribution: Distribution) -> dict[str, Any]:
    row: dict[str, Any] = {
        name: rounded(getattr(distribution, name)) for name in ("mean", "median", "mode", "std", "label_mass")
    }
    below = distribution.below
    return row | {"below": {str(border): rounded(share) for border, share in below.items()} if below else None}


def resume(file: Path, fingerprint: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Load the predictions in `file` from an earlier, possibly interrupted, evaluation with the same fingerprint.

    Prompts that failed (out of memory, server errors) are removed from the file, so that they are retried. For
    everything else see `prmkit.resumable.reopen`.

    Raises:
        DataError: a line is not a prediction.
    """
    rows = reopen(file, fingerprint, retry=("failed",))
    check_predictions(file, rows)
    return rows


def check_predictions(file: Path, rows: Iterable[Any]) -> None:
    """Reject lines that no evaluation has written, or that were edited since.

    Raises:
        DataError: a line is not a prediction.
    """
    for number, row in enumerate(rows, start=1):
        if not _is_prediction(row):
            raise DataError(
                f"{file}:{number}: edited, damaged, or from an earlier version. Delete this file, and evaluate the "
                "judge again."
            )


def _is_prediction(row: Any) -> bool:
    if not isinstance(row, dict) or not {*_COPIED, *_ALSO_READ} <= row.keys():
        return False
    parts = [row.get(name) for name in ("scores", "reference", "references", "metadata")]
    return all(isinstance(part, dict) for part in parts) and all(map(_is_distribution, row["scores"].values()))


def _is_distribution(score: Any) -> bool:
    if not isinstance(score, dict) or not {"mean", "median", "std", "label_mass", "below"} <= score.keys():
        return False
    return all(score[name] is None or is_share(score[name]) for name in ("mean", "median")) and all(
        isinstance(score[name], int | float | None) for name in ("std", "label_mass")
    )


# --- the table --------------------------------------------------------------------------------------------------------

Strings = NDArray[np.object_]


@dataclass(frozen=True)
class Scores:
    """One entry for every score of every judged prompt that has a reference; all arrays have the same length."""

    row: Integers
    """The index of the prediction in the rows from which the table was made."""
    prompt: Strings
    """SHA-256 of the prompt."""
    evaluation_type: Strings
    key: Strings
    task: Integers
    """Integer codes of the tasks, of the trajectories (`trajectory`), and of evaluation type and key (`kind`)."""
    trajectory: Integers
    kind: Integers
    clip_number: Floats
    prompt_characters: Floats
    predicted: Floats
    """The judge's score: the mean of the judge's distribution."""
    median: Floats
    """The median of the judge's distribution."""
    std: Floats
    below: Floats
    """Probability that the score is below each of `BAD_BELOW`, shape (scores, 2); NaN in generate mode."""
    reference: Floats
    """The mean of the reference judges' scores."""
    references: Floats
    """The scores of each reference judge, shape (scores, judges); NaN where a judge gave no score."""
    constant_mean: Floats
    """The mean and median of the training labels; if these are unknown, of the held-out references."""
    constant_median: Floats
    leaked_mean: Floats
    """The mean of the scores that the prompt shows; NaN if it does not show any."""
    leaked_last: Floats
    weight: Floats
    """The number of prompts that the prompt represents: see `prmkit.rows.WEIGHT`."""
    judge_weights: Floats
    """The same weight among the prompts of each judge, shape (scores, judges)."""

    def __len__(self) -> int:
        return len(self.predicted)

    def where(self, chosen: NDArray[Any]) -> "Scores":
        """Return the entries selected by a mask or a list of positions."""
        return Scores(*(getattr(self, field.name)[chosen] for field in fields(self)))

    def predicting(self, predicted: Floats) -> "Scores":
        """Return the same entries with another judge's scores, without probabilities."""
        unknown = np.full_like(predicted, np.nan)
        return replace(self, predicted=predicted, median=predicted, std=unknown, below=np.full_like(self.below, np.nan))


def has_score(row: Row, key: str) -> bool:
    """Return whether a prediction has a number for a key."""
    mean = row["scores"].get(key, {}).get("mean")
    return mean is not None and math.isfinite(mean)


def table_of_scores(rows: Sequence[Row], judges: Sequence[str], constants: Constants) -> Scores:
    """Return every score that both the judge and at least one reference judge gave.

    Args:
        rows: predictions; those without scores are skipped.
        judges: the columns of `Scores.references`.
        constants: see `prmkit.evaluation.heldout.training_constants`.
    """
    entries = [
        (number, row, key, score)
        for number, row in enumerate(rows)
        for key, score in row["scores"].items()
        if key in row["reference"] and has_score(row, key)
    ]

    def matrix(values: Iterable[Sequence[float | None]], columns: int) -> Floats:
        return np.array(list(values), dtype=np.float64).reshape(len(entries), columns)

    of_rows = {name: [row[name] for _, row, _, _ in entries] for name in _COPIED}
    keys, reference = [key for _, _, key, _ in entries], _numbers(row["reference"][key] for _, row, key, _ in entries)
    kind = _numbered(zip(of_rows["evaluation_type"], keys, strict=True))
    weight = _numbers(weight_of(row["metadata"]) for _, row, _, _ in entries)
    given = [constants.get(row["evaluation_type"], {}).get(key) or (None, None) for _, row, key, _ in entries]
    return Scores(
        row=np.array([number for number, *_ in entries], dtype=np.int64),
        prompt=np.array(of_rows["prompt_sha256"], dtype=object),
        evaluation_type=np.array(of_rows["evaluation_type"], dtype=object),
        key=np.array(keys, dtype=object),
        task=_numbered(of_rows["task_id"]),
        trajectory=_numbered(zip(of_rows["task_id"], of_rows["trajectory_id"], strict=True)),
        kind=kind,
        clip_number=_numbers(of_rows["clip_number"]),
        prompt_characters=_numbers(of_rows["prompt_characters"]),
        predicted=_numbers(score["mean"] for *_, score in entries),
        median=_numbers(score["mean"] if score["median"] is None else score["median"] for *_, score in entries),
        std=_numbers(score["std"] for *_, score in entries),
        below=matrix(
            ([(score["below"] or {}).get(str(border)) for border in BAD_BELOW] for *_, score in entries), len(BAD_BELOW)
        ),
        reference=reference,
        references=matrix(
            ([row["references"].get(judge, {}).get(key) for judge in judges] for _, row, key, _ in entries), len(judges)
        ),
        constant_mean=_filled(_numbers(mean for mean, _ in given), reference, kind, weight, weighted_mean),
        constant_median=_filled(_numbers(median for _, median in given), reference, kind, weight, weighted_median),
        leaked_mean=_numbers(of_rows["leaked_score"]),
        leaked_last=_numbers(of_rows["leaked_last"]),
        weight=weight,
        judge_weights=matrix((_weights_of(row, judges) for _, row, _, _ in entries), len(judges)),
    )


_COPIED = (
    *("prompt_sha256", "task_id", "trajectory_id", "evaluation_type", "clip_number"),
    *("prompt_characters", "leaked_score", "leaked_last"),
)


_ALSO_READ = ("id", "status", "reason", "score", "std", "text", "prompt_tokens", "repaired", "trimmed")


def _weights_of(row: Row, judges: Sequence[str]) -> list[float]:
    """Return the weight of each judge: the prompt's, unless the row has another."""
    of_prompt = weight_of(row["metadata"])
    return [row.get("weights", {}).get(judge, of_prompt) for judge in judges]


def _numbers(values: Iterable[float | None]) -> Floats:
    return np.array(list(values), dtype=np.float64)  # None becomes NaN


def _numbered(values: Iterable[Any]) -> Integers:
    """Number the distinct values in order of appearance."""
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values], dtype=np.int64)


def _filled(
    constants: Floats,
    reference: Floats,
    kind: Integers,
    weight: Floats,
    middle: Callable[[Floats, Floats], float],
) -> Floats:
    # Without training labels, the baseline is the best constant in hindsight, which is harder to beat.
    for number in np.unique(kind[np.isnan(constants)]):
        chosen = (kind == number) & np.isnan(constants)
        constants[chosen] = middle(reference[kind == number], weight[kind == number])
    return constants


# --- samples: what a metric is computed from --------------------------------------------------------------------------


def by_mean(scores: Scores) -> Sample:
    """Return the means of the judge's distributions against the reference, with the constant mean as baseline."""
    return _sample(scores, scores.predicted, scores.reference, baseline=scores.constant_mean)


def by_median(scores: Scores) -> Sample:
    """Return the medians of the judge's distributions against the reference, with the constant median as baseline."""
    return _sample(scores, scores.median, scores.reference, baseline=scores.constant_median)


def pairs(scores: Scores) -> Sample:
    """Return the differences between two scores of the same trajectory, evaluation type and key."""
    group = scores.trajectory * (int(scores.kind.max(initial=0)) + 1) + scores.kind
    return make_pairs(replace(by_mean(scores), group=group))


def suspicion(scores: Scores, threshold: float) -> Sample:
    """Return the negative score of each step (bad steps rank high), against 1.0 for a bad step and 0.0 for others."""
    return _sample(scores, -scores.predicted, bad_steps(scores, threshold))


def flagged_of_bad(scores: Scores, threshold: float) -> Sample:
    """Return, for each truly bad step, 1.0 if the judge's score is also below the threshold, otherwise 0.0."""
    bad = scores.where(bad_steps(scores, threshold) > 0)
    return _sample(bad, bad.predicted < threshold - SAME_SCORE, bad.reference)


def bad_of_flagged(scores: Scores, threshold: float) -> Sample:
    """Return, for each step that the judge scores below the threshold, 1.0 if it is truly bad, otherwise 0.0."""
    flagged = scores.where(scores.predicted < threshold - SAME_SCORE)
    return _sample(flagged, bad_steps(flagged, threshold), flagged.reference)


def praised_of_bad(scores: Scores) -> Sample:
    """Return, for each truly bad step, 1.0 if the judge praises it, otherwise 0.0."""
    bad = scores.where(bad_steps(scores, BAD_BELOW[0]) > 0)
    return _sample(bad, bad.predicted >= PRAISED_FROM - SAME_SCORE, bad.reference)


def probability_of_bad(scores: Scores, threshold: float) -> Sample:
    """Return the judge's probability that a score is below the threshold, against 1.0 for a bad step."""
    probability = scores.below[:, BAD_BELOW.index(threshold)]
    known = scores.where(np.isfinite(probability))
    return _sample(known, probability[np.isfinite(probability)], bad_steps(known, threshold))


def confidence(scores: Scores) -> Sample:
    """Return the negative standard deviation of each score, against its error."""
    known = scores.where(np.isfinite(scores.std))
    return _sample(known, -known.std, np.abs(known.predicted - known.reference))


def within_own_range(scores: Scores) -> Sample:
    """Return 1.0 for each score whose reference is in the 90 % range that the judge's mean and std imply, else 0.0."""
    known = scores.where(np.isfinite(scores.std))
    inside = np.abs(known.predicted - known.reference) <= 1.645 * np.maximum(known.std, 0.01)
    return _sample(known, inside, known.reference)


def bad_steps(scores: Scores, threshold: float) -> Floats:
    """Return 1.0 for each truly bad step (the reference is below the threshold), otherwise 0.0."""
    return (scores.reference < threshold - SAME_SCORE).astype(np.float64)


def _sample(scores: Scores, predicted: Any, reference: Floats, baseline: Floats | None = None) -> Sample:
    return make_sample(predicted, reference, scores.task, group=scores.kind, baseline=baseline, weight=scores.weight)
