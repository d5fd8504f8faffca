"""Measure a judge on held-out rows: predictions.jsonl, metrics.json and report.html; table and verdict on stdout."""

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
    what = parser.add_argument_group("what is measured")
    what.add_argument("--dataset", metavar="NAME", help="held-out dataset (default: the run's own)")
    what.add_argument("--data-dir", type=Path, metavar="FOLDER", help="its folder (default: the run's, or data)")
    what.add_argument("--limit", type=cli.positive, metavar="N", help="score at most N prompts, task by task")
    what.add_argument("--baseline", action="store_true", help="also ask the base model, without the adapter")
    what.add_argument(
        "--by", metavar="KEY", action="append", help="also break metrics down by a metadata key (repeatable)"
    )
    robust = "also score changed prompts: harmless changes, damaged steps, attacks"
    what.add_argument("--robustness", action="store_true", help=robust)
    result = parser.add_argument_group("the result")
    result.add_argument("--output", type=Path, metavar="FOLDER", help="results (default: evaluation/ in the run)")
    result.add_argument("--json", action="store_true", help="print metrics.json instead of the table")
    gates = parser.add_argument_group("gates (exit code 4 unless met on every evaluation type)")
    gates.add_argument("--compare", type=Path, metavar="RUN", help="fail if shown to be worse than this evaluated run")
    gates.add_argument(
        "--margin", type=cli.number, metavar="X", help="with --compare: fail unless shown to be less than X worse"
    )
    gates.add_argument(
        "--min-spearman", type=cli.number, metavar="X", help="fail if the lower end of Spearman's interval is below X"
    )
    auroc = f"fail if the lower end of AUROC's interval (steps below {BAD_BELOW[0]}) is below X"
    gates.add_argument("--min-auroc", type=cli.number, metavar="X", help=auroc)
    exam = parser.add_argument_group("instead: runs that people labelled, or several runs of each task")
    exam.add_argument("--exam", type=Path, metavar="FILE", help="runs with people's labels, also for --min-auroc")
    picks = "several runs of each task with outcomes: how often the judge's pick succeeds"
    exam.add_argument("--best-of-n", type=Path, metavar="FILE", help=picks)
    exam.add_argument(
        "--predictions", type=Path, metavar="FILE", help="read answers (id, step, score) from a file; ask no judge"
    )
    exam.add_argument("--predict-with", metavar="URL", help="ask a server: chat completions, or /v1/systemone")
    exam.add_argument("--server-model", metavar="NAME", help="the model's name on that server")
    key = f"environment variable with the server's key (default: {KEY_VARIABLE})"
    exam.add_argument("--api-key-env", metavar="NAME", help=key)
    rubric = "the rubric that the judge was trained with (default: prmkit's own)"
    exam.add_argument("--rubric", type=Path, metavar="FILE", help=rubric)
    parity = parser.add_argument_group("instead: compare a run with its export")
    prompts = f"score N prompts with both (without a number: {PARITY_PROMPTS})"
    parity.add_argument("--parity", type=cli.positive, nargs="?", const=PARITY_PROMPTS, metavar="N", help=prompts)
    parity.add_argument(
        "--exported", type=Path, metavar="FOLDER", help="the exported model (default: the run's export_dir)"
    )
    largest = f"largest allowed difference of two scores (default: {DEFAULT_TOLERANCE})"
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
