"""Ask strong judges about every step of agent runs, and write their verdicts as rows for convert_dataset.py."""

import argparse
import sys
from pathlib import Path

from prmkit import cli
from prmkit.errors import ExitCode


def main() -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Every answer is written to OUTPUT.answers.jsonl immediately. To continue later, run the same command "
        "again: no answer is paid for twice. Exit code 1: more than 5 % of the verdicts are missing.",
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="RUNS", help="files or folders in any format that import_trajectories.py reads")
    add("--judges", type=Path, required=True, metavar="FILE", help="the judges to ask; see examples/judges.yaml")
    add("--output", type=Path, required=True, metavar="FILE", help="the rows, for convert_dataset.py")
    add("--answers", type=Path, metavar="FILE", help="all answers (default: OUTPUT.answers.jsonl)")
    add("--dry-run", action="store_true", help="show prompts, tokens, price and hosts; send nothing")
    add("--yes", action="store_true", help="do not ask for confirmation of the price")
    add("--max-cost", type=cli.amount, metavar="X", help="send no request that could raise the cost above X")
    add("--no-asking", action="store_true", help="only rebuild the rows from the answers, offline")
    add("--json", action="store_true", help="print the result as JSON")
    asking = parser.add_argument_group("requests").add_argument
    asking("--per", choices=["step", "run"], default="step", help="one call per step (default) or per run (cheaper)")
    asking("--teacher-sees", choices=["reference"], help="also show the judges a run's solution; rows never have it")
    twice = "ask twice about this fraction of the steps, to measure self-agreement (default: %(default)g)"
    asking("--repeat", type=cli.share, default=0.0, metavar="X", help=twice)
    asking("--rubric", type=Path, metavar="FILE", help="the rubric (default: prmkit's own)")
    asking("--format", metavar="NAME", help="input format (default: detected; a wrong name lists all formats)")
    first = parser.add_argument_group("ask only about steps that your own judge is unsure of").add_argument
    first("--first", type=Path, metavar="SCORES", help="output of score_trajectories.py for the same runs")
    wide = "unsure: the interval (without one, two standard deviations) is wider than this (default: %(default)s)"
    first("--unsure-above", type=cli.share, default=0.4, metavar="X", help=wide)
    audit = "also ask about this fraction of the other steps, drawn at random (default: %(default)s)"
    first("--audit-share", type=cli.share, default=0.1, metavar="X", help=audit)
    return cli.run(_command, parser)


def _command(arguments: argparse.Namespace) -> ExitCode:
    from prmkit.collection.command import ask_judges

    return ask_judges(arguments)


if __name__ == "__main__":
    sys.exit(main())
