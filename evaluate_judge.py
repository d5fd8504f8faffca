"""Measure a judge on held-out rows: predictions.jsonl, metrics.json and report.html; table and verdict on stdout."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prmkit import cli
from prmkit.errors import ExitCode
from prmkit.judging.arguments import DEFAULT_RUN, add_judge_arguments, judge_source, positive


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add_judge_arguments(parser)
    what = parser.add_argument_group("what is measured")
    what.add_argument("--dataset", metavar="NAME", help="held-out dataset (default: the run's own)")
    what.add_argument("--data-dir", type=Path, metavar="FOLDER", help="where it lies (default: the run's, or data)")
    what.add_argument("--limit", type=positive, metavar="N", help="score at most N prompts, task by task")
    what.add_argument("--baseline", action="store_true", help="also ask the base model, without the adapter")
    result = parser.add_argument_group("the result")
    result.add_argument("--output", type=Path, metavar="FOLDER", help="where it goes (default: evaluation/ in the run)")
    result.add_argument("--json", action="store_true", help="print metrics.json instead of the table")
    result.add_argument("--compare", type=Path, metavar="RUN", help="exit 4 if worse than this evaluated run")
    result.add_argument("--min-spearman", type=float, metavar="X", help="exit 4 if the correlation is lower")
    parity = parser.add_argument_group("instead: the same judge twice")
    parity.add_argument("--parity", type=positive, nargs="?", const=8, metavar="N", help="run and export, on N prompts")
    parity.add_argument("--exported", type=Path, default="exported_model", metavar="FOLDER", help="what --parity asks")
    parity.add_argument("--tolerance", type=float, default=0.02, metavar="X", help="largest difference of two scores")
    return parser


def _command(arguments: argparse.Namespace) -> ExitCode:
    from prmkit.files import write_json
    from prmkit.judging import compare, heldout, sources
    from prmkit.judging.evaluate import REPORT, evaluate, settings_of

    source = judge_source(arguments)
    run = None if arguments.model else arguments.run or DEFAULT_RUN
    config = sources.config_of_run(run) if run else {}
    data_folder, name = heldout.place_of_held_out(config, arguments.data_dir, arguments.dataset)
    held_out = heldout.read_held_out(data_folder, name)
    folder = arguments.output or (run / "evaluation" if run else Path("saves", f"evaluation_{source.model.name}"))
    medians = heldout.training_medians(data_folder, name)
    metrics = evaluate(source, held_out, medians, folder, settings_of(arguments))
    comparison = compare.compare(folder, arguments.compare) if arguments.compare else None
    if comparison:
        write_json(folder / compare.COMPARISON, comparison)
    _show(metrics, comparison, folder / REPORT, as_json=arguments.json)
    if comparison:
        compare.refuse_worse(comparison)
    if arguments.min_spearman is not None:
        compare.refuse_low_spearman(metrics, arguments.min_spearman)
    return ExitCode.DONE


def _show(metrics: Mapping[str, Any], comparison: Mapping[str, Any] | None, report: Path, *, as_json: bool) -> None:
    from prmkit.judging import compare, summary

    if as_json:
        cli.emit_json({**metrics, "comparison": comparison} if comparison else metrics)
        return
    cli.emit_table("", summary.COLUMNS, summary.main_table(metrics), numeric=summary.NUMERIC)
    for line in summary.verdict_lines(metrics):
        cli.emit(line)
    if comparison:
        table = compare.comparison_table(comparison)
        cli.emit_table(f"Compared with {comparison['other']}", compare.COLUMNS, table, numeric=compare.NUMERIC)
    cli.emit(f"report: {report}")


def main() -> int:
    """Run the command line and return its exit code."""
    return cli.run(_command, _parser())


if __name__ == "__main__":
    sys.exit(main())
