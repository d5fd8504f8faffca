"""The command `evaluate_judge.py`, and the evaluation of a run that has just been trained."""

import argparse
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prmkit import cli
from prmkit.errors import DataError, ExitCode, GateError, UsageError
from prmkit.evaluation import compare, heldout
from prmkit.evaluation.baselines import group_values
from prmkit.evaluation.best_of_n import pick_best_of_n
from prmkit.evaluation.evaluate import REPORT_FILE, EvaluationSettings, evaluate
from prmkit.evaluation.exam import check_new_tasks
from prmkit.evaluation.exam_command import asks_judge, take_exam
from prmkit.evaluation.export_check import DEFAULT_TOLERANCE, PARITY_PROMPTS, check_parity
from prmkit.files import read_json, write_json
from prmkit.intervals import CALIBRATION_FILE, calibrated_judge, read_calibration, write_calibration
from prmkit.judge.scorer import DEFAULT_RUN, add_judge_arguments, judge_source, scoring_options_of
from prmkit.judge.sources import (
    JudgeSource,
    check_folders,
    config_of_run,
    data_of_run,
    fingerprint_of,
    judge_source_of_export,
    judge_source_of_run,
)
from prmkit.judge.types import Request
from prmkit.model_card import write_model_card
from prmkit.paths import EVALUATION, EXPORT_NOTE, METRICS_FILE, RUN_RECORD, export_folder
from prmkit.registered import is_registered, results_folder

log = logging.getLogger("prmkit")


def execute(arguments: argparse.Namespace) -> ExitCode:
    """Measure a judge, and compare it with another judge and with thresholds.

    Raises:
        DataError: there is no judge, or nothing to measure it on.
        UsageError: the arguments contradict each other, or the judge was trained on the data that would measure it.
        GateError: a gate is not met, or cannot be decided.
    """
    _check_arguments(arguments)
    if arguments.exam:
        return take_exam(arguments)
    if arguments.best_of_n:
        of_judge = (name for name in (*_OF_JUDGES, "rubric", "data_dir") if _is_given(name, arguments))
        return pick_best_of_n(arguments, list(map(_flag, of_judge)))
    source = judge_source(arguments)
    check_folders(source)
    run = None if arguments.model else arguments.run or DEFAULT_RUN
    config = config_of_run(run) if run else {}
    data = arguments.data_dir or (data_of_run(run) if run else None)
    if arguments.parity:
        return _parity(source, config, data, arguments)
    data_folder, name = heldout.place_of_held_out(config, data, arguments.dataset)
    held_out = heldout.read_held_out(data_folder, name)
    settings = replace(_settings_of(arguments), unchecked=check_new_tasks(held_out, data_folder, source))
    _check_breakdown_keys(arguments.by or (), held_out)
    constants = heldout.training_constants(data_folder, name)
    own = evaluation_of(run) if run else Path("saves", f"evaluation_{source.model.name}")
    folder = _results_folder(arguments, own)
    metrics = evaluate(
        source, held_out, constants, folder, settings, _weights_folder(source) if folder is own else None
    )
    if run and folder is own:
        _write_card(run, metrics)
    comparison = None
    if arguments.compare:
        prompts = {prompt.prompt_sha256 for prompt in heldout.sampled(held_out.prompts, arguments.limit)}
        comparison = compare.compare(folder, arguments.compare, prompts)
        write_json(folder / compare.COMPARISON_FILE, comparison)
    if arguments.json:
        cli.emit_json({**metrics, "comparison": comparison} if comparison else metrics)
    else:
        _show(metrics, comparison, folder / REPORT_FILE)
    _check_gates(metrics, comparison, arguments, settings.unchecked)
    return ExitCode.DONE


def _results_folder(arguments: argparse.Namespace, own: Path) -> Path:
    """Return the judge's own folder, unless --output or --limit was given or the judge is registered."""
    if arguments.output:
        return Path(arguments.output)
    if arguments.run and is_registered(arguments.run):
        own = results_folder(arguments.run)  # a registered version never changes
    return own if arguments.limit is None else own.with_name(f"{own.name}_limit_{arguments.limit}")


def _settings_of(arguments: argparse.Namespace) -> EvaluationSettings:
    return EvaluationSettings(
        scoring_options_of(arguments),
        limit=arguments.limit,
        with_base=arguments.baseline,
        by=tuple(arguments.by or ()),
        robustness=arguments.robustness,
    )


_KINDS = ("exam", "best_of_n", "parity")
"""Flags that ask for something other than measuring a judge on held-out rows; the first one given decides."""
_HELD_OUT = "held-out rows"
_USED_BY: Mapping[str, tuple[str, ...]] = {
    "exam": ("exam",),
    "best_of_n": ("best_of_n",),
    "parity": ("parity",),
    "min_spearman": (_HELD_OUT,),
    "min_auroc": (_HELD_OUT, "exam"),
    "compare": (_HELD_OUT,),
    "margin": (_HELD_OUT,),
    "by": (_HELD_OUT,),
    "limit": (_HELD_OUT,),
    "output": (_HELD_OUT, "exam", "best_of_n"),
    "baseline": (_HELD_OUT, "exam"),
    "robustness": (_HELD_OUT,),
    "json": (_HELD_OUT, "exam", "best_of_n"),
    "mode": (_HELD_OUT, "exam", "best_of_n"),
    "max_new_tokens": (_HELD_OUT, "exam", "best_of_n"),
    "min_label_mass": (_HELD_OUT, "exam", "best_of_n"),
    "too_long": (_HELD_OUT, "exam", "best_of_n"),
    "dataset": (_HELD_OUT, "parity"),
    "data_dir": (_HELD_OUT, "exam", "best_of_n", "parity"),
    "exported": ("parity",),
    "tolerance": ("parity",),
    "predictions": ("exam", "best_of_n"),
    "predict_with": ("exam",),
    "server_model": ("exam",),
    "api_key_env": ("exam",),
    "rubric": ("exam", "best_of_n"),
}
"""Flag -> the kinds of evaluation that use it; flags that are not listed are used by all kinds that load a judge."""
_PARTNERS = {
    "max_new_tokens": "--mode generate",
    "min_label_mass": "--mode expected",
}
"""Flag -> the setting that it requires."""


def _check_arguments(arguments: argparse.Namespace) -> None:
    """Reject arguments that the requested kind of evaluation does not use."""
    kind = next((kind for kind in _KINDS if getattr(arguments, kind)), _HELD_OUT)
    of_server = [_flag(name) for name in ("server_model", "api_key_env") if _is_given(name, arguments)]
    if of_server and kind in (_HELD_OUT, "exam") and not arguments.predict_with:
        raise UsageError(
            f"{', '.join(of_server)}: only used with --predict-with. Add --predict-with, or remove the unused flags."
        )
    given = [name for name in dict.fromkeys(_unused_by(kind, arguments)) if _is_given(name, arguments)]
    if given and kind == _HELD_OUT:
        users = _USED_BY[given[0]]
        same = ", ".join(_flag(name) for name in given if _USED_BY.get(name) == users)
        needed = " or ".join(map(_flag, users))
        raise UsageError(f"{same}: only used with {needed}. Add {needed}, or remove the unused flags.")
    if given:
        sources = [name for name in ("predictions", "predict_with") if getattr(arguments, name) and name not in given]
        what = " with ".join(map(_flag, [kind, *sources]))
        raise UsageError(f"{what}: remove {', '.join(map(_flag, given))}, which it does not use.")
    for name, partner in _PARTNERS.items():
        if _is_given(name, arguments) and partner != f"--mode {arguments.mode}":
            raise UsageError(f"{_flag(name)}: only used with {partner}. Add {partner}, or remove {_flag(name)}.")
    if arguments.margin is not None and arguments.compare is None:
        raise UsageError("--margin limits how much worse than --compare RUN the judge may be. Add --compare RUN.")
    if arguments.margin is not None and arguments.margin <= 0:
        raise UsageError(f"--margin {arguments.margin:g}: must be above 0, for example 0.05.")


def _unused_by(kind: str, arguments: argparse.Namespace) -> Iterator[str]:
    yield from (name for name, kinds in _USED_BY.items() if kind not in kinds)
    reads_picks = kind == "best_of_n" and arguments.predictions
    if reads_picks or (kind == "exam" and not asks_judge(arguments)):  # no judge is loaded
        yield from (*_OF_JUDGES, "baseline", "data_dir")
        yield from () if arguments.predict_with else ("rubric",)


def _defaults_of_judges() -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    add_judge_arguments(parser)
    return vars(parser.parse_args([]))


_OF_JUDGES = _defaults_of_judges()
"""Flag about a loaded judge -> its default; the defaults of all other flags are None or False."""


def _is_given(name: str, arguments: argparse.Namespace) -> bool:
    value, default = getattr(arguments, name), _OF_JUDGES.get(name, False)
    return value is not None and (type(value), value) != (type(default), default)  # 0 equals False


def _flag(name: str) -> str:
    return "--mode generate" if name == "mode" else f"--{name.replace('_', '-')}"


def _check_breakdown_keys(keys: Sequence[str], held_out: heldout.HeldOut) -> None:
    rows = [{"metadata": prompt.metadata, "task_id": prompt.task} for prompt in held_out.prompts]
    known = {key for key in {key for row in rows for key in row["metadata"]} if any(group_values(rows, key))}
    if unknown := [key for key in keys if key not in known]:
        raise UsageError(
            f"--by {' '.join(unknown)}: no row of {held_out.name} has a name or a number under this metadata key. "
            f"Keys that can be used: {', '.join(sorted(known)) or 'none'}."
        )


def _check_gates(
    metrics: Mapping[str, Any],
    comparison: Mapping[str, Any] | None,
    arguments: argparse.Namespace,
    unchecked: str | None,
) -> None:
    """Check all requested gates, so that all failures are reported at once."""
    gates: dict[str, Callable[[], str | None]] = {}
    if comparison:
        gates["--compare"] = lambda: compare.check_not_worse(comparison, arguments.margin)
    if arguments.min_spearman is not None:
        gates["--min-spearman"] = lambda: compare.check_min_spearman(metrics, arguments.min_spearman)
    if arguments.min_auroc is not None:
        gates["--min-auroc"] = lambda: compare.check_min_auroc(metrics, arguments.min_auroc)
    if not gates:
        return
    failed = [f"{' and '.join(gates)}: {unchecked}"] if unchecked else []
    for check in (lambda: compare.check_enough_scores(metrics, " and ".join(gates)), *gates.values()):
        try:
            if shown := check():
                log.info("--compare: %s", shown)
        except GateError as error:
            failed.append(str(error))
    if failed:
        raise GateError("\n".join(failed))


def evaluate_run(run: Path, *, trust_remote_code: bool = False, show: bool = True) -> None:
    """Measure a run's judge on its held-out rows, and show the table.

    Args:
        run: the training run's folder.
        trust_remote_code: run Python code that comes with the model.
        show: False to write only the files, because the output is JSON.

    Raises:
        DataError: nothing was held out, no prompt could be scored, or the data was converted again since the training.
        UsageError: the run was trained on tasks that are now held out.
    """
    data_folder, name = heldout.place_of_held_out(config_of_run(run), data_of_run(run), None)
    held_out, constants = heldout.read_held_out(data_folder, name), heldout.training_constants(data_folder, name)
    source = replace(judge_source_of_run(run), trust_remote_code=trust_remote_code)
    settings = EvaluationSettings(unchecked=check_new_tasks(held_out, data_folder, source))
    metrics = evaluate(source, held_out, constants, evaluation_of(run), settings, run)
    _write_card(run, metrics)
    if show:
        _show(metrics, None, evaluation_of(run) / REPORT_FILE)


def _weights_folder(source: JudgeSource) -> Path | None:
    """Return the folder for a calibration: that of an adapter or an export of this project, never a base model's."""
    return source.adapter or (source.model if (source.model / EXPORT_NOTE).is_file() else None)


def _write_card(run: Path, metrics: Mapping[str, Any]) -> None:
    if (run / RUN_RECORD).is_file():
        write_model_card(run, read_json(run / RUN_RECORD), metrics)


def evaluation_of(run: Path) -> Path:
    """Return the folder for a run's evaluation results."""
    return run / EVALUATION


# --- run and export ---------------------------------------------------------------------------------------------------


def _parity(
    source: JudgeSource, config: Mapping[str, Any], data: Path | None, arguments: argparse.Namespace
) -> ExitCode:
    exported = arguments.exported or export_folder(config)
    held_out = heldout.read_held_out(*heldout.place_of_held_out(config, data, arguments.dataset))
    requests = _requests(held_out, arguments.parity)
    other = replace(judge_source_of_export(exported), trust_remote_code=source.trust_remote_code)
    tolerance = DEFAULT_TOLERANCE if arguments.tolerance is None else arguments.tolerance
    parity = check_parity(source, other, requests, tolerance=tolerance, batch_size=arguments.batch_size)
    cli.emit(f"{exported} gives the same scores as {source.adapter or source.model} ({parity}).")
    return ExitCode.DONE


def prove_export(run: Path, exported: Path, *, trust_remote_code: bool = False, show: bool = True) -> None:
    """Check on a few held-out prompts that an exported model gives the same scores as the run that was exported.

    Args:
        run: the training run's folder.
        exported: the folder of the exported model.
        trust_remote_code: run Python code that comes with the models.
        show: False to print nothing if the scores are the same, because the output is JSON.

    Raises:
        GateError: the scores differ; the message lists the likely causes.
    """
    try:
        held_out = heldout.read_held_out(*heldout.place_of_held_out(config_of_run(run), data_of_run(run), None))
        trained = replace(judge_source_of_run(run), trust_remote_code=trust_remote_code)
    except (DataError, UsageError) as error:
        log.warning("Could not check whether %s gives the same scores as %s: %s", exported, run, error)
        return
    other = replace(judge_source_of_export(exported), trust_remote_code=trust_remote_code)
    parity = check_parity(trained, other, _requests(held_out, PARITY_PROMPTS))
    _copy_measurements(run, trained, exported, other)
    if show:
        cli.emit(f"{exported} gives the same scores as {run} ({parity}).")


def _copy_measurements(run: Path, trained: JudgeSource, exported: Path, other: JudgeSource) -> None:
    """Copy the run's calibration to an export that was shown to give the same scores."""
    metrics_file = evaluation_of(run) / METRICS_FILE
    metrics = read_json(metrics_file) if metrics_file.is_file() else None
    write_model_card(exported, read_json(run / RUN_RECORD), metrics if metrics and "summary" in metrics else None)
    if (run / CALIBRATION_FILE).is_file():
        try:
            calibration = read_calibration(run, calibrated_judge(fingerprint_of(trained)))
        except DataError as error:
            log.warning("%s gets no intervals: %s", exported, error)
        else:
            write_calibration(exported, replace(calibration, judge=calibrated_judge(fingerprint_of(other))))


def _requests(held_out: heldout.HeldOut, prompts: int) -> list[Request]:
    chosen = heldout.by_task(held_out.prompts)[:prompts]
    return [Request(prompt.prompt, prompt.shape, prompt.system) for prompt in chosen]


# --- the terminal -----------------------------------------------------------------------------------------------------


def _show(metrics: Mapping[str, Any], comparison: Mapping[str, Any] | None, report: Path) -> None:
    from prmkit.evaluation import robustness, summary

    table = summary.main_table(metrics)
    cli.emit_table("", summary.COLUMNS, table, numeric=summary.NUMERIC, optional=summary.OPTIONAL)
    for line in summary.conclusion_lines(metrics):
        cli.emit(line)
    for key in metrics["asked_breakdowns"]:
        rows = summary.breakdown_table(metrics["breakdowns"].get(key, []))
        cli.emit_table(f"By {key}", summary.BREAKDOWN_COLUMNS, rows, numeric=summary.BREAKDOWN_COLUMNS[1:])
        if left_out := summary.left_out_of_breakdown(metrics, key):
            cli.emit(left_out)
    if probed := metrics.get("robustness"):
        rows, optional = robustness.robustness_table(probed), robustness.OPTIONAL
        cli.emit_table("Changed prompts", robustness.COLUMNS, rows, numeric=robustness.NUMERIC, optional=optional)
        for note in robustness.robustness_notes(probed):
            cli.emit(note)
    if comparison:
        cli.emit_table(
            f"Compared with {comparison['other']}",
            compare.COLUMNS,
            compare.comparison_table(comparison),
            numeric=compare.NUMERIC,
            optional=compare.OPTIONAL,
        )
        if left_out := compare.left_out(comparison):
            cli.emit(left_out)
    cli.emit(f"report: {report}")
