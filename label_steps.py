"""Label steps of your own runs on a page in the browser: an exam for your judge in about twenty minutes."""

import argparse
import sys
from pathlib import Path

from prmkit import cli
from prmkit.errors import ExitCode


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Every label is on disk before the next step is shown; run the same command again to continue. Then: "
        "evaluate_judge.py --run saves/RUN --exam labels.jsonl",
    )
    add = parser.add_argument
    add("input", metavar="RUNS", help="runs in any form that import_trajectories.py reads (file or folder)")
    add("--n", type=cli.positive, default=50, metavar="N", help="steps to label (default: %(default)s)")
    add(
        "--output",
        type=Path,
        default=Path("labels.jsonl"),
        metavar="FILE",
        help="rows to write or to continue (default: %(default)s)",
    )
    add("--name", default="human", metavar="NAME", help="your name, written into every row (default: %(default)s)")
    add(
        "--scores",
        type=Path,
        metavar="FILE",
        help="output of score_trajectories.py, to draw evenly from all score bands",
    )
    add("--seed", type=int, default=0, metavar="N", help="another seed draws different steps (default: %(default)s)")
    rubric = "the rubric that the judge was trained with (default: prmkit's own)"
    add("--rubric", type=Path, metavar="FILE", help=rubric)
    add("--format", metavar="NAME", help="form of the runs (default: recognised; a wrong name lists the valid ones)")
    add("--port", type=int, default=0, metavar="N", help="port of the page, on 127.0.0.1 (default: a free one)")
    return parser


def _command(arguments: argparse.Namespace) -> ExitCode:
    from prmkit.evaluation.label_page import label_steps

    return label_steps(arguments)


if __name__ == "__main__":
    sys.exit(cli.run(_command, _parser()))
