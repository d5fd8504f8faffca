"""The command `import_trajectories.py`: runs in, trajectory records or labelled rows out, and a report."""

import argparse
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from prmkit import cli
from prmkit.errors import DataError, ExitCode, UsageError
from prmkit.files import atomic_write
from prmkit.prompts.step import load_rubric
from prmkit.resumable import check_plain_name
from prmkit.trajectories.importing import FileReport, Options, read_runs, totals, warn_of_losses
from prmkit.trajectories.labels import SETS, set_named
from prmkit.trajectories.rows import rows_of, runs_beside
from prmkit.trajectories.run import FieldNames
from prmkit.trajectory import Trajectory, dump

_OTHER_LABELS = ("steps", "column")


def import_runs(arguments: argparse.Namespace) -> ExitCode:
    """Read runs and write them as trajectory records, or their labelled steps as rows.

    Raises:
        DataError: an input cannot be read, or contains no run or no labelled step.
        UsageError: a format is ambiguous, or the arguments contradict each other.
    """
    options = _options(arguments)
    reports: list[FileReport] = []
    _check_output(arguments.output, arguments.inputs)
    written = 0
    with ExitStack() as files:
        stream = files.enter_context(atomic_write(arguments.output))
        runs = files.enter_context(atomic_write(runs_beside(arguments.output))) if arguments.labels else None
        for line in _lines(arguments, read_runs(arguments.inputs, options, reports), runs):
            stream.write(line)
            written += 1
        _check_written(written, reports, arguments)
    if arguments.json:
        cli.emit_json(_as_json(reports, arguments.output, written))
    else:
        _summarise(reports, arguments.output, written, "rows" if arguments.labels else "runs")
    return ExitCode.DONE


def _options(arguments: argparse.Namespace) -> Options:
    name, public = arguments.labels, None
    if name is not None and name not in _OTHER_LABELS:
        public = set_named(name)
        if public is None:
            raise UsageError(f"--labels {name}: unknown. Known: {', '.join((*_OTHER_LABELS, *SETS))}.")
    if (name == "column") != (arguments.label_key is not None):
        raise UsageError("--labels column requires --label-key NAME, and --label-key requires --labels column.")
    if arguments.label_scale != FieldNames.label_scale and name != "column":
        raise UsageError("--label-scale is only for --labels column: the scale of all other labels is known.")
    if arguments.rubric and not name:
        raise UsageError("--rubric is only used with --labels, which writes prompts. Remove --rubric, or add --labels.")
    keys = FieldNames(
        arguments.task_key, arguments.outcome_key, arguments.list_key, arguments.label_key, arguments.label_scale
    )
    return Options(arguments.format, keys, arguments.keep_secrets, public)


def _check_output(output: Path, inputs: list[str]) -> None:
    check_plain_name(output)
    for given in map(Path, inputs):
        inside = given.is_dir() and output.resolve().is_relative_to(given.resolve())
        if inside or given.resolve() in (output.resolve(), runs_beside(output).resolve()):
            raise UsageError(f"--output {output} is one of the inputs or inside one. Choose a path outside of them.")


def _lines(arguments: argparse.Namespace, runs: Iterator[Trajectory], runs_file: BinaryIO | None) -> Iterator[bytes]:
    """Yield trajectory records; or rows of labelled steps, with the complete runs in a separate file."""
    if runs_file is None:
        yield from map(dump, runs)
        return
    rubric = load_rubric(arguments.rubric)
    for run in runs:
        if any(step.label is not None for step in run.steps):
            runs_file.write(dump(run))
        for row in rows_of(run, rubric):
            yield orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)


def _check_written(written: int, reports: list[FileReport], arguments: argparse.Namespace) -> None:
    if written:
        return
    warn_of_losses(reports)
    if any(report.runs for report in reports):
        raise DataError("no step of these runs has a label. Remove --labels to import only the runs.")
    raise DataError(f"{', '.join(arguments.inputs)}: no run could be read; see the warnings above.")


# --- the report -----------------------------------------------------------------------------------------------------


def _summarise(reports: list[FileReport], output: Path, written: int, what: str) -> None:
    warn_of_losses(reports)
    formats: dict[str, Counter[str]] = {}
    for report in reports:
        if report.format and not report.passed_over:
            counts = {"files": 1, "runs": report.runs, "steps": report.steps, "labels": report.labels}
            formats.setdefault(report.format, Counter()).update(counts)
    columns = ("format", "files", "runs", "steps", "labels")
    table = [(name, *(f"{counts[column]:,}" for column in columns[1:])) for name, counts in formats.items()]
    cli.emit_table("", columns, table, numeric=columns[1:])
    for line in totals(reports):
        cli.emit(line)
    skipped = sum(report.passed_over is not None for report in reports)
    if skipped:
        cli.emit(f"skipped files: {skipped}")
    cli.emit(f"{output}: {written:,} {what}")
    if what == "rows":
        cli.emit(f"{runs_beside(output)}: the complete runs, which evaluate_judge.py --exam {output} reads")


def _as_json(reports: list[FileReport], output: Path, written: int) -> dict[str, Any]:
    names = ("file", "format", "runs", "steps", "labels", "lost", "unreadable", "secrets", "passed_over")
    files = [{name: getattr(report, name) for name in names} for report in reports]
    return {"output": str(output), "written": written, "files": files}
