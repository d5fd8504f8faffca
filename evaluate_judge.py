"""Measure a judge on held-out rows: print a table and conclusions; write predictions, metrics and a report."""

import argparse
import sys
from pathlib import Path

from prmkit import cli
from prmkit.errors import ExitCode
from prmkit.evaluation.export_check import DEFAULT_TOLERANCE, PARITY_PROMPTS
from prmkit.http_client import KEY_VARIABLE
from prmkit.judge.scorer import add_judge_arguments
from prmkit.judge.types import BAD_BELOW


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add_judge_arguments(parser)
    what = parser.add_argument_group("evaluation data")
    what.add_argument("--dataset", metavar="NAME", help="held-out dataset (default: the training run's)")
    what.add_argument(
        "--data-dir", type=Path, metavar="FOLDER", help="the dataset's folder (default: the run's, or data)"
    )
    limit = "score at most N prompts (whole tasks first); results go to evaluation_limit_N"
    what.add_argument("--limit", type=cli.positive, metavar="N", help=limit)
    what.add_argument("--baseline", action="store_true", help="also evaluate the base model, without the adapter")
    what.add_argument(
        "--by", metavar="KEY", action="append", help="also break metrics down by a metadata key (repeatable)"
    )
    robust = "also score changed prompts: harmless changes, damaged steps, attacks"
    what.add_argument("--robustness", action="store_true", help=robust)
    result = parser.add_argument_group("output")
    result.add_argument("--output", type=Path, metavar="FOLDER", help="result folder (default: evaluation/ in the run)")
    result.add_argument("--json", action="store_true", help="print metrics.json instead of the table")
    gates = parser.add_argument_group("gates (exit code 4 unless met on every evaluation type)")
    gates.add_argument("--compare", type=Path, metavar="RUN", help="fail if the judge is shown to be worse than RUN")
    gates.add_argument(
        "--margin", type=cli.number, metavar="X", help="with --compare: fail unless it is shown to be less than X worse"
    )
    gates.add_argument(
        "--min-spearman", type=cli.number, metavar="X", help="fail if the lower bound of Spearman is below X"
    )
    auroc = f"fail if the lower bound of AUROC (steps below {BAD_BELOW[0]}) is below X"
    gates.add_argument("--min-auroc", type=cli.number, metavar="X", help=auroc)
    exam = parser.add_argument_group("instead: a human-labelled exam, or best of N")
    exam.add_argument("--exam", type=Path, metavar="FILE", help="runs with human labels; --min-auroc can be added")
    exam.add_argument("--best-of-n", type=Path, metavar="FILE", help="runs with outcomes: how well the judge picks")
    exam.add_argument(
        "--predictions", type=Path, metavar="FILE", help="read answers (id, step, score) from a file; run no judge"
    )
    exam.add_argument("--predict-with", metavar="URL", help="query a server: chat completions, or /v1/systemone")
    exam.add_argument("--server-model", metavar="NAME", help="the model's name on that server")
    key = f"environment variable with the server's key (default: {KEY_VARIABLE})"
    exam.add_argument("--api-key-env", metavar="NAME", help=key)
    exam.add_argument("--rubric", type=Path, metavar="FILE", help="the judge's training rubric, if not prmkit's own")
    parity = parser.add_argument_group("instead: compare a training run with its export")
    prompts = f"number of prompts to score with both (without N: {PARITY_PROMPTS})"
    parity.add_argument("--parity", type=cli.positive, nargs="?", const=PARITY_PROMPTS, metavar="N", help=prompts)
    parity.add_argument(
        "--exported", type=Path, metavar="FOLDER", help="the exported model (default: the training run's export_dir)"
    )
    largest = f"largest allowed difference between two scores (default: {DEFAULT_TOLERANCE})"
    parity.add_argument("--tolerance", type=cli.number, metavar="X", help=largest)
    return parser


def _command(arguments: argparse.Namespace) -> ExitCode:
    from prmkit.evaluation.command import execute

    return execute(arguments)


def main() -> int:
    """Run the command line and return its exit code."""
    return cli.run(_command, _parser())


if __name__ == "__main__":
    sys.exit(main())
