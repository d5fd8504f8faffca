"""Label steps of your own runs in the browser: an exam for your judge in about twenty minutes."""

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
    add("input", help="runs in any format that import_trajectories.py reads (file or folder)")
    add("--n", type=cli.positive, default=50, metavar="N", help="steps to label (default: %(default)s)")
    add("--output", type=Path, default=Path("labels.jsonl"), metavar="FILE", help="output rows (default: %(default)s)")
    add("--name", default="human", help="your name, written into every row (default: %(default)s)")
    add("--scores", type=Path, metavar="FILE", help="output of score_trajectories.py: draw evenly from score bands")
    add("--seed", type=int, default=0, metavar="N", help="another seed draws different steps (default: %(default)s)")
    add("--rubric", type=Path, metavar="FILE", help="the judge's training rubric, if not prmkit's own")
    add("--format", metavar="NAME", help="input format (default: detected; a wrong name lists all formats)")
    add("--port", type=int, default=0, metavar="N", help="port on 127.0.0.1 (default: any free port)")
    return parser


def _command(arguments: argparse.Namespace) -> ExitCode:
    from prmkit.evaluation.label_page import label_steps

    return label_steps(arguments)


if __name__ == "__main__":
    sys.exit(cli.run(_command, _parser()))
