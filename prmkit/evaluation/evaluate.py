"""Evaluate a judge: score the held-out prompts, resumably, and write predictions, metrics and report."""

import argparse
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prmkit import cli
from prmkit.errors import DataError, UsageError
from prmkit.evaluation.heldout import HeldOut, HeldOutPrompt, Medians, sampled
from prmkit.evaluation.metrics import metrics_of
from prmkit.evaluation.predictions import Row, prediction_row, resume, table_of_scores
from prmkit.evaluation.report import write_report
from prmkit.files import only_one, write_json
from prmkit.judge.sources import JudgeSource, described, fingerprint_of
from prmkit.judge.types import Mode, Request
from prmkit.resumable import append_rows

log = logging.getLogger("prmkit")

PREDICTIONS = "predictions.jsonl"
BASE_PREDICTIONS = "predictions_base.jsonl"
METRICS = "metrics.json"
REPORT = "report.html"


@dataclass(frozen=True)
class Settings:
    """How to score."""

    mode: Mode = "expected"
    batch_size: int = 8
    limit: int | None = None
    """The most prompts to score; None for all."""
    with_base: bool = False
    """Also ask the base model, without its adapter."""
    trim: bool = True
    """Shorten prompts that do not fit; else they get no score."""
    max_new_tokens: int = 1024
    """The longest verdict to write, in generate mode."""


def settings_of(arguments: argparse.Namespace) -> Settings:
    """The settings that the command line of `evaluate_judge.py` names."""
    return Settings(
        mode=arguments.mode,
        batch_size=arguments.batch_size,
        limit=arguments.limit,
        with_base=arguments.baseline,
        trim=arguments.too_long == "trim",
        max_new_tokens=arguments.max_new_tokens,
    )


def evaluate(
    source: JudgeSource, held_out: HeldOut, medians: Medians, folder: Path, settings: Settings
) -> dict[str, Any]:
    """Score what is not scored yet; write `predictions.jsonl`, `metrics.json` and `report.html` into `folder`.

    Returns:
        The content of `metrics.json`.

    Raises:
        DataError: not one prompt could be scored; the most common reason is named.
        UsageError: the base model was asked for, and the judge has no adapter to leave out; or `folder` is a file.
    """
    if settings.with_base and source.adapter is None:
        raise UsageError("--baseline asks the base model of an adapter, and this judge has no adapter.")
    _make(folder)
    with only_one(folder, "evaluating"):
        prompts = list(sampled(held_out.prompts, settings.limit))
        rows = predict(source, held_out, prompts, folder / PREDICTIONS, settings)
        base_rows = None
        if settings.with_base:
            base = replace(source, adapter=None)
            base_rows = predict(base, held_out, prompts, folder / BASE_PREDICTIONS, settings)
        about: dict[str, Any] = {"judge": described(source), "mode": settings.mode}
        metrics = about | metrics_of(rows, base_rows, held_out, medians)
        write_json(folder / METRICS, metrics)
        write_report(folder / REPORT, metrics, table_of_scores(rows, held_out.judges, medians))
    return metrics


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(f"{folder}: a file stands there, and the results need a folder. Name another one.") from error
    except OSError as error:
        raise DataError(f"{folder}: cannot be made ({error.strerror}). Name another one with --output.") from error


# --- scoring ----------------------------------------------------------------------------------------------------------


def predict(
    source: JudgeSource, held_out: HeldOut, prompts: Sequence[HeldOutPrompt], file: Path, settings: Settings
) -> list[Row]:
    """The predictions for `prompts`, in their order; what `file` already holds is not scored again.

    The judge is loaded only if something is missing, and each prediction is written before the next one is made, so a
    killed evaluation goes on behind it.

    Raises:
        DataError: not one prompt could be scored.
    """
    fingerprint = {
        "judge": fingerprint_of(source),
        "asked": {"mode": settings.mode, "trim": settings.trim, "max_new_tokens": settings.max_new_tokens},
        "dataset": {"sha256": held_out.sha256, "file_sha256": held_out.file_sha256},
    }
    done: dict[str, Row] = {row["prompt_sha256"]: row for row in resume(file, fingerprint)}
    missing = [prompt for prompt in prompts if prompt.prompt_sha256 not in done]
    if len(missing) < len(prompts):
        log.info("%s: %d of %d prompts are scored already", file, len(prompts) - len(missing), len(prompts))
    if missing:
        with cli.progress_bar() as progress:
            bar = progress.add_task(f"scoring with {(source.adapter or source.model).name}", total=len(missing))
            for row in append_rows(file, _judged(source, missing, settings)):
                done[row["prompt_sha256"]] = row
                progress.advance(bar)
    rows = [done[prompt.prompt_sha256] for prompt in prompts]
    if all(row["status"] != "ok" for row in rows):
        ((reason, count),) = Counter(row["reason"] for row in rows).most_common(1)
        raise DataError(f"{file}: none of {len(rows)} prompts got a score; {count} times: {reason}.")
    return rows


def _judged(source: JudgeSource, prompts: Sequence[HeldOutPrompt], settings: Settings) -> Iterator[Row]:
    from prmkit.judge.transformers_judge import load_model

    requests = (Request(prompt.prompt, prompt.shape) for prompt in prompts)
    judgements = load_model(source).score(
        requests,
        batch_size=settings.batch_size,
        mode=settings.mode,
        trim=settings.trim,
        max_new_tokens=settings.max_new_tokens,
    )
    for prompt, judgement in zip(prompts, judgements, strict=True):
        yield prediction_row(prompt, judgement)
