"""Measure a judge on held-out rows: predictions.jsonl, metrics.json and report.html; table and verdict on stdout."""

import argparse
import math
import sys
from pathlib import Path

from prmkit import cli
from prmkit.errors import ExitCode
from prmkit.judge.scorer import add_judge_arguments, positive


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add_judge_arguments(parser)
    what = parser.add_argument_group("what is measured")
    what.add_argument("--dataset", metavar="NAME", help="held-out dataset (default: the run's own)")
    what.add_argument("--data-dir", type=Path, metavar="FOLDER", help="where it is (default: the run's, or data)")
    what.add_argument("--limit", type=positive, metavar="N", help="score at most N prompts, task by task")
    what.add_argument("--baseline", action="store_true", help="also ask the base model, without the adapter")
    what.add_argument("--by", metavar="KEY", action="append", help="also by a metadata key, such as agent (repeatable)")
    robust = "also score prompts whose form, substance or flattery changed"
    what.add_argument("--robustness", action="store_true", help=robust)
    result = parser.add_argument_group("the result")
    result.add_argument("--output", type=Path, metavar="FOLDER", help="where it goes (default: evaluation/ in the run)")
    result.add_argument("--json", action="store_true", help="print metrics.json instead of the table")
    gates = parser.add_argument_group("gates (exit 4 unless met on every evaluation type)")
    gates.add_argument("--compare", type=Path, metavar="RUN", help="not shown to be worse than this evaluated run")
    gates.add_argument("--margin", type=finite_number, metavar="X", help="--compare: shown to be worse by less than X")
    gates.add_argument("--min-spearman", type=finite_number, metavar="X", help="lower end of the correlation")
    gates.add_argument("--min-auroc", type=finite_number, metavar="X", help="lower end of AUROC, steps below 0.5")
    exam = parser.add_argument_group("instead: runs that people labelled, or several runs of each task")
    exam.add_argument("--exam", type=Path, metavar="FILE", help="labels of people; --min-auroc is then about these")
    exam.add_argument("--best-of-n", type=Path, metavar="FILE", help="runs with outcomes: how good is its pick?")
    exam.add_argument("--predictions", type=Path, metavar="FILE", help="read answers (id, step, score), ask no judge")
    exam.add_argument("--predict-with", metavar="URL", help="ask a server: chat completions, or /v1/systemone")
    exam.add_argument("--server-model", metavar="NAME", help="its name there")
    exam.add_argument("--api-key-env", default="OPENAI_API_KEY", metavar="NAME", help="variable that holds the key")
    exam.add_argument("--rubric", type=Path, metavar="FILE", help="the one the judge was trained with, if not ours")
    parity = parser.add_argument_group("instead: the same judge twice")
    parity.add_argument("--parity", type=positive, nargs="?", const=8, metavar="N", help="run and export, on N prompts")
    parity.add_argument(
        "--exported", type=Path, metavar="FOLDER", help="what --parity asks (default: the run's export_dir)"
    )
    parity.add_argument(
        "--tolerance", type=finite_number, metavar="X", help="largest difference of two scores (default 0.02)"
    )
    return parser


def finite_number(text: str) -> float:
    """An argument that is a finite number. Every comparison with NaN is false, so no gate would ever close."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def _command(arguments: argparse.Namespace) -> ExitCode:
    from prmkit.evaluation.command import execute

    return execute(arguments)


def main() -> int:
    """Run the command line and return its exit code."""
    return cli.run(_command, _parser())


if __name__ == "__main__":
    sys.exit(main())
