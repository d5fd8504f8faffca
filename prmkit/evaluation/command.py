"""What the arguments of evaluate_judge.py mean, and the same for a run that has just been trained."""

import argparse
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from prmkit import cli
from prmkit.errors import DataError, ExitCode, UsageError
from prmkit.evaluation import heldout
from prmkit.evaluation.evaluate import REPORT, Settings, evaluate, settings_of
from prmkit.evaluation.export_check import DEFAULT_TOLERANCE, check_parity
from prmkit.files import write_json
from prmkit.judge.arguments import DEFAULT_RUN, judge_source
from prmkit.judge.sources import (
    JudgeSource,
    check_folders,
    config_of_run,
    judge_source_of_export,
    judge_source_of_run,
)
from prmkit.judge.types import Request

log = logging.getLogger("prmkit")

PARITY_PROMPTS = 8
"""A wrong template or dtype shows on every prompt; a few are enough."""


def execute(arguments: argparse.Namespace) -> ExitCode:
    """Measure a judge, and hold it against another one and against thresholds.

    Raises:
        DataError: there is no judge, or nothing to measure it on.
        UsageError: the arguments contradict each other.
        GateError: it is worse than it was to be.
    """
    from prmkit.evaluation import compare

    _refuse_mixed(arguments)
    source = judge_source(arguments)
    check_folders(source)
    run = None if arguments.model else arguments.run or DEFAULT_RUN
    config = config_of_run(run) if run else {}
    if arguments.parity:
        return _parity(source, config, arguments)
    data_folder, name = heldout.place_of_held_out(config, arguments.data_dir, arguments.dataset)
    held_out = heldout.read_held_out(data_folder, name)
    folder = arguments.output or (evaluation_of(run) if run else Path("saves", f"evaluation_{source.model.name}"))
    medians = heldout.training_medians(data_folder, name)
    metrics = evaluate(source, held_out, medians, folder, settings_of(arguments))
    comparison = None
    if arguments.compare:
        prompts = {prompt.prompt_sha256 for prompt in heldout.sampled(held_out.prompts, arguments.limit)}
        comparison = compare.compare(folder, arguments.compare, prompts)
        write_json(folder / compare.COMPARISON, comparison)
    if arguments.json:
        cli.emit_json({**metrics, "comparison": comparison} if comparison else metrics)
    else:
        _show(metrics, comparison, folder / REPORT)
    _refuse(metrics, comparison, arguments.min_spearman)
    return ExitCode.DONE


def _refuse_mixed(arguments: argparse.Namespace) -> None:
    """Refuse what only one of the two, measuring and --parity, looks at, where the other one is asked for."""
    measuring = {
        "--min-spearman": arguments.min_spearman is not None,
        "--compare": arguments.compare is not None,
        "--limit": arguments.limit is not None,
        "--output": arguments.output is not None,
        "--baseline": arguments.baseline,
        "--json": arguments.json,
        "--mode generate": arguments.mode == "generate",
    }
    parity = {"--exported": arguments.exported is not None, "--tolerance": arguments.tolerance is not None}
    given = [flag for flag, typed in (measuring if arguments.parity else parity).items() if typed]
    if given and arguments.parity:
        raise UsageError(
            f"--parity holds the export against the run and measures nothing else: leave out {', '.join(given)}."
        )
    if given:
        raise UsageError(f"{', '.join(given)}: only --parity looks at it. Add --parity, or leave it out.")


def _refuse(metrics: Mapping[str, Any], comparison: Mapping[str, Any] | None, least: float | None) -> None:
    from prmkit.evaluation import compare

    gates = ["--compare"] * (comparison is not None) + ["--min-spearman"] * (least is not None)
    if gates:
        compare.refuse_few_scores(metrics, " and ".join(gates))
    if comparison:
        compare.refuse_worse(comparison)
    if least is not None:
        compare.refuse_low_spearman(metrics, least)


def evaluate_run(run: Path) -> None:
    """Measure the judge of a run on the rows that were held out from it, and show the table.

    Raises:
        DataError: nothing was held out, or not one prompt could be scored.
    """
    data_folder, name = heldout.place_of_held_out(config_of_run(run), None, None)
    held_out, medians = heldout.read_held_out(data_folder, name), heldout.training_medians(data_folder, name)
    metrics = evaluate(judge_source_of_run(run), held_out, medians, evaluation_of(run), Settings())
    _show(metrics, None, evaluation_of(run) / REPORT)


def _parity(source: JudgeSource, config: Mapping[str, Any], arguments: argparse.Namespace) -> ExitCode:
    exported = arguments.exported or Path(config.get("export_dir") or "exported_model")
    held_out = heldout.read_held_out(*heldout.place_of_held_out(config, arguments.data_dir, arguments.dataset))
    requests = _requests(held_out, arguments.parity)
    other = replace(judge_source_of_export(exported), trust_remote_code=source.trust_remote_code)
    tolerance = DEFAULT_TOLERANCE if arguments.tolerance is None else arguments.tolerance
    parity = check_parity(source, other, requests, tolerance=tolerance, batch_size=arguments.batch_size)
    cli.emit(f"{exported}: judges as {source.adapter or source.model} does ({parity}).")
    return ExitCode.DONE


def prove_export(run: Path, exported: Path) -> None:
    """Show that an exported model scores as the run that it was made from, on a few held-out prompts.

    Raises:
        GateError: it does not; the likely causes are named.
    """
    try:
        held_out = heldout.read_held_out(*heldout.place_of_held_out(config_of_run(run), None, None))
        trained = judge_source_of_run(run)
    except (DataError, UsageError) as error:
        log.warning("Whether %s scores as %s was not checked: %s", exported, run, error)
        return
    other = replace(judge_source_of_export(exported), trust_remote_code=trained.trust_remote_code)
    parity = check_parity(trained, other, _requests(held_out, PARITY_PROMPTS))
    cli.emit(f"{exported}: judges as {run} does ({parity}).")


def _requests(held_out: heldout.HeldOut, prompts: int) -> list[Request]:
    return [Request(prompt.prompt, prompt.shape) for prompt in heldout.by_task(held_out.prompts)[:prompts]]


def evaluation_of(run: Path) -> Path:
    """The folder in a run that holds what was measured of it."""
    return run / "evaluation"


def _show(metrics: Mapping[str, Any], comparison: Mapping[str, Any] | None, report: Path) -> None:
    from prmkit.evaluation import compare, summary

    cli.emit_table("", summary.COLUMNS, summary.main_table(metrics), numeric=summary.NUMERIC)
    for line in summary.verdict_lines(metrics):
        cli.emit(line)
    if comparison:
        table = compare.comparison_table(comparison)
        cli.emit_table(f"Compared with {comparison['other']}", compare.COLUMNS, table, numeric=compare.NUMERIC)
        if left_out := compare.left_out(comparison):
            cli.emit(left_out)
    cli.emit(f"report: {report}")
