"""Evaluate a judge: score the held-out prompts, resumably, and write predictions, metrics and report."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from prmkit import cli
from prmkit.errors import DataError, UsageError
from prmkit.evaluation import estimates
from prmkit.evaluation.baselines import (
    against_each,
    baselines,
    breakdown,
    ceiling,
    grouping_keys,
    halves,
    self_agreement,
)
from prmkit.evaluation.estimates import Estimate, as_json
from prmkit.evaluation.grade import summarize
from prmkit.evaluation.heldout import Constants, HeldOut, HeldOutPrompt, sampled
from prmkit.evaluation.metrics import (
    ALL,
    MIN_SCORES,
    Metrics,
    agreement,
    evaluation_types,
    groups,
    recommended_threshold,
    trajectory_metrics,
    validity,
)
from prmkit.evaluation.predictions import ROW_FORMAT, Row, Scores, prediction_row, resume, table_of_scores
from prmkit.evaluation.robustness import (
    CHANGED_PREDICTIONS_FILE,
    MOST_PROMPTS,
    change_prompts,
    headline_with_attacks,
    robustness_of,
)
from prmkit.files import exclusive_lock, write_json
from prmkit.intervals import MIN_STD, calibrated_judge, fit_calibration, write_calibration
from prmkit.judge.sources import JudgeSource, described, fingerprint_of
from prmkit.judge.types import BAD_BELOW, DEFAULT_OPTIONS, SCORED, Request, ScoringOptions
from prmkit.leniency import describe_leniency
from prmkit.paths import METRICS_FILE, PREDICTIONS_FILE
from prmkit.resumable import append_rows
from prmkit.rows import AUDIT, SELECTED_BY, weight_of

log = logging.getLogger("prmkit")

BASE_PREDICTIONS_FILE = "predictions_base.jsonl"
REPORT_FILE = "report.html"


@dataclass(frozen=True)
class EvaluationSettings:
    """How to score."""

    options: ScoringOptions = DEFAULT_OPTIONS
    limit: int | None = None
    """The maximum number of prompts to score; None for all."""
    with_base: bool = False
    """Also ask the base model, without its adapter."""
    by: tuple[str, ...] = ()
    """Metadata keys to break the metrics down by, besides those that divide the rows into a small number of groups."""
    robustness: bool = False
    """Also score changed prompts: see `prmkit.evaluation.robustness`."""
    unchecked: str | None = None
    """Why it is unknown whether the judge was trained on the held-out tasks; shown as a warning with the results."""


def evaluate(
    source: JudgeSource,
    held_out: HeldOut,
    constants: Constants,
    folder: Path,
    settings: EvaluationSettings,
    weights: Path | None,
) -> dict[str, Any]:
    """Score what has not been scored yet; write `predictions.jsonl`, `metrics.json` and `report.html` into `folder`.

    Args:
        source: the judge.
        held_out: the rows to score.
        constants: the mean and median of the training labels.
        folder: the folder for the results.
        settings: the settings of the evaluation.
        weights: the folder of the judge's weights, where its calibration is stored; None to store none.

    Returns:
        The content of `metrics.json`.

    Raises:
        DataError: no prompt could be scored; the message gives the most common reason.
        UsageError: the base model was requested, but the judge has no adapter; or `folder` is a file.
    """
    from prmkit.evaluation.report import write_report

    if settings.with_base and source.adapter is None:
        raise UsageError("--baseline needs a judge with an adapter. Use --run, or remove --baseline.")
    _make(folder)
    with exclusive_lock(folder, "evaluating"):
        prompts = list(sampled(held_out.prompts, settings.limit))
        rows = predict(source, held_out, prompts, folder / PREDICTIONS_FILE, settings)
        base_rows = None
        if settings.with_base:
            base = replace(source, adapter=None)
            base_rows = predict(base, held_out, prompts, folder / BASE_PREDICTIONS_FILE, settings)
        about: dict[str, Any] = {"judge": described(source), "mode": settings.options.mode}
        metrics = about | metrics_of(rows, base_rows, held_out, constants, settings.by)
        metrics["summary"]["warnings"] += [settings.unchecked] if settings.unchecked else []
        if settings.robustness:
            _add_robustness(metrics, source, held_out, prompts, rows, folder, settings)
        write_json(folder / METRICS_FILE, metrics)
        write_report(folder / REPORT_FILE, metrics, rows, held_out, constants)
        if weights and settings.options.mode == "expected" and settings.limit is None:
            calibrate(rows, weights, calibrated_judge(fingerprint_of(source)))
    return metrics


def _add_robustness(
    metrics: dict[str, Any],
    source: JudgeSource,
    held_out: HeldOut,
    prompts: Sequence[HeldOutPrompt],
    rows: Sequence[Row],
    folder: Path,
    settings: EvaluationSettings,
) -> None:
    chosen = {prompt.prompt_sha256 for prompt in sampled(prompts, MOST_PROMPTS)}
    changes = change_prompts([prompt for prompt in prompts if prompt.prompt_sha256 in chosen])
    changed = [change.changed for change in changes]
    changed_rows = predict(source, held_out, changed, folder / CHANGED_PREDICTIONS_FILE, settings) if changed else []
    chosen_rows = [row for row in rows if row["prompt_sha256"] in chosen]
    metrics["robustness"] = as_json(robustness_of(changes, chosen_rows, changed_rows, len(rows)))
    metrics["summary"]["headline"] = headline_with_attacks(metrics["summary"]["headline"], metrics["robustness"])


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(f"{folder} is a file, but the results need a folder. Choose another --output.") from error
    except OSError as error:
        raise DataError(f"{folder}: cannot be created ({error.strerror}). Choose another one with --output.") from error


def calibrate(rows: Sequence[Row], folder: Path, judge: Mapping[str, Any]) -> None:
    """Fit the intervals of `prmkit.intervals` on all predictions with a spread, and store them next to the weights."""
    ratios: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["status"] in SCORED and row["std"] is not None and row["reference"]:
            keys = row["scores"].keys() & row["reference"].keys()
            if keys == row["scores"].keys():
                reference = float(np.mean([row["reference"][key] for key in keys]))
                ratio = abs(row["score"] - reference) / max(row["std"], MIN_STD)
                ratios.setdefault(row["evaluation_type"], []).append((ratio, weight_of(row["metadata"])))
    if ratios:
        write_calibration(folder, fit_calibration(ratios, judge))


# --- scoring ----------------------------------------------------------------------------------------------------------


def predict(
    source: JudgeSource, held_out: HeldOut, prompts: Sequence[HeldOutPrompt], file: Path, settings: EvaluationSettings
) -> list[Row]:
    """Return the predictions for `prompts`, in order; prompts that are already in `file` are not scored again.

    The judge is loaded only if something is missing, and each prediction is written before the next one is made, so
    the next call continues where a killed evaluation stopped.

    Raises:
        DataError: no prompt could be scored.
    """
    options = settings.options
    asked: dict[str, Any] = {"mode": options.mode, "trim": options.trim, "max_new_tokens": options.max_new_tokens}
    # The default is left out, because predictions of earlier versions lack it.
    if options.min_label_mass != DEFAULT_OPTIONS.min_label_mass:
        asked["min_label_mass"] = options.min_label_mass
    fingerprint = {
        "format": ROW_FORMAT,
        "judge": fingerprint_of(source),
        "asked": asked,
        "dataset": {"sha256": held_out.sha256, "file_sha256": held_out.file_sha256},
    }
    done: dict[str, Row] = {row["prompt_sha256"]: row for row in resume(file, fingerprint)}
    missing = [prompt for prompt in prompts if prompt.prompt_sha256 not in done]
    if len(missing) < len(prompts):
        log.info("%s: %d of %d prompts are already scored", file, len(prompts) - len(missing), len(prompts))
    if missing:
        with cli.progress_bar() as progress:
            bar = progress.add_task(f"scoring with {(source.adapter or source.model).name}", total=len(missing))
            for row in append_rows(file, _judged(source, missing, options)):
                done[row["prompt_sha256"]] = row
                progress.advance(bar)
    rows = [done[prompt.prompt_sha256] for prompt in prompts]
    if all(row["status"] not in SCORED for row in rows):
        ((reason, count),) = Counter(row["reason"] for row in rows).most_common(1)
        raise DataError(f"{file}: none of {len(rows)} prompts got a score. Main reason ({count} times): {reason}.")
    return rows


def _judged(source: JudgeSource, prompts: Sequence[HeldOutPrompt], options: ScoringOptions) -> Iterator[Row]:
    from prmkit.judge.transformers_judge import load_model

    requests = (Request(prompt.prompt, prompt.shape, prompt.system) for prompt in prompts)
    for prompt, judgement in zip(prompts, load_model(source).score(requests, options), strict=True):
        yield prediction_row(prompt, judgement)


# --- metrics.json -----------------------------------------------------------------------------------------------------


def metrics_of(
    rows: Sequence[Row],
    base_rows: Sequence[Row] | None,
    held_out: HeldOut,
    constants: Constants,
    by: Sequence[str] = (),
) -> dict[str, Any]:
    """Return all metrics as in `metrics.json`: a value with its interval, n and tasks, or null with the reason.

    Args:
        rows: the judge's predictions.
        base_rows: the base model's predictions, or None.
        held_out: the rows that were judged.
        constants: the mean and median of the training labels, for the baseline.
        by: metadata keys to break the metrics down by, besides those that divide the rows into a small number of
            groups.

    Raises:
        DataError: nothing can be measured.
    """
    judges = held_out.judges
    scores = table_of_scores(rows, judges, constants)
    base = None if base_rows is None else table_of_scores(base_rows, judges, constants)
    if not len(scores):
        raise DataError(f"{held_out.file}: no prompt has a predicted and a reference score for the same key.")
    metrics: dict[str, Any] = as_json(
        {
            "held_out": _described(held_out, rows, scores),
            "method": _method(),
            "leniency": {
                "offsets": held_out.leniency.offsets,
                "shared_scores": held_out.leniency.shared_scores,
                "sentences": describe_leniency(held_out.leniency),
            },
            "validity": {
                name: validity([row for row in rows if name in (ALL, row["evaluation_type"])])
                for name in (ALL, *evaluation_types(rows))
            },
            "groups": list(_groups(scores, base, judges, held_out.self_agreement)),
            "breakdowns": {key: breakdown(scores, rows, key) for key in dict.fromkeys((*by, *grouping_keys(rows)))},
            "asked_breakdowns": list(by),
            "trajectory": trajectory_metrics(rows, _incomplete_tasks(rows, held_out)),
        }
    )
    return metrics | {"summary": summarize(metrics)}


def _groups(
    scores: Scores, base: Scores | None, judges: Sequence[str], itself: Sequence[Mapping[str, Any]]
) -> Iterator[Metrics]:
    """Return the metrics of each group. Groups with the same scores (a single type with a single key) share them, and
    they are computed once."""
    made: dict[tuple[bytes, Estimate], Metrics] = {}
    for evaluation_type, key, only, chosen in groups(scores):
        of_judges = self_agreement(itself, evaluation_type, key)
        same = (chosen.tobytes(), of_judges)
        if same not in made:
            made[same] = _group(scores.where(chosen), base, judges, of_judges)
        yield {"evaluation_type": evaluation_type, "key": key, "only_key": only} | made[same]


def _group(scores: Scores, base: Scores | None, judges: Sequence[str], itself: Estimate) -> Metrics:
    return {
        "scores": len(scores),
        "prompts": len(set(scores.prompt)),
        "tasks": len(np.unique(scores.task)),
        "trajectories": len(np.unique(scores.trajectory)),
        "trajectories_with_pairs": _with_pairs(scores),
        "judge": agreement(scores),
        "halves": halves(scores),
        "threshold": recommended_threshold(scores),
        "against": against_each(scores, judges),
        "baselines": baselines(scores, base),
        "ceiling": ceiling(scores, judges, itself),
    }


def _with_pairs(scores: Scores) -> int:
    """Return how many trajectories have two scores of the same key."""
    entries, counts = np.unique(np.stack([scores.trajectory, scores.kind]), axis=1, return_counts=True)
    return len(np.unique(entries[0][counts > 1]))


def _incomplete_tasks(rows: Sequence[Row], held_out: HeldOut) -> set[str]:
    asked = {row["prompt_sha256"] for row in rows}
    return {prompt.task for prompt in held_out.prompts if prompt.prompt_sha256 not in asked}


def _described(held_out: HeldOut, rows: Sequence[Row], scores: Scores) -> Metrics:
    counts = np.bincount(scores.task, weights=scores.weight)
    largest = int(np.argmax(counts))
    return {
        "dataset": held_out.name,
        "sha256": held_out.sha256,
        "file_sha256": held_out.file_sha256,
        "rows": held_out.rows,
        "prompts": len(held_out.prompts),
        "prompts_evaluated": len(rows),
        "selection": _selection(rows),
        "tasks_evaluated": len({row["task_id"] for row in rows}),
        "trajectories_evaluated": len({(row["task_id"], row["trajectory_id"]) for row in rows}),
        "judges": held_out.judges,
        "largest_task": {
            "task": rows[int(scores.row[np.argmax(scores.task == largest)])]["task_id"],
            "share": float(counts[largest] / counts.sum()),
        },
    }


def _selection(rows: Sequence[Row]) -> Metrics | None:
    """Describe how well the prompts selected by `ask_judges.py --first` represent all; None if none were selected."""
    chosen = [row for row in rows if SELECTED_BY in row["metadata"]]
    if not chosen:
        return None
    scored = [row for row in rows if row["status"] in SCORED]
    weights = np.array([weight_of(row["metadata"]) for row in scored])
    return {
        "prompts": len(chosen),
        "audited_tasks": len({row["task_id"] for row in scored if row["metadata"].get(SELECTED_BY) == AUDIT}),
        "effective_prompts": float(weights.sum() ** 2 / (weights**2).sum()),
    }


def _method() -> Metrics:
    return {
        "reference": "the mean of the judges of a prompt, corrected for their leniency where they share prompts",
        "score": "the mean of the judge's distribution over 0.00 … 1.00; in generate mode the number that it wrote",
        "interval": f"{estimates.LEVEL:.0%} bootstrap over tasks, expanded percentiles",
        "resamples": estimates.RESAMPLES,
        "fewer_resamples_above": estimates.MANY,
        "seed": estimates.SEED,
        "min_scores": MIN_SCORES,
        "min_tasks": estimates.MIN_TASKS,
        "bad_below": list(BAD_BELOW),
    }
