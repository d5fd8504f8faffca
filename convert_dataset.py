"""finetune.jsonl -> data/: judged trajectories in, training and held-out datasets for LLaMA Factory out."""

import argparse
import sys

from prmkit import cli
from prmkit.dataset.arguments import make_parser
from prmkit.errors import ExitCode


def _command(arguments: argparse.Namespace) -> ExitCode:
    from prmkit.dataset.command import execute

    return execute(arguments)


if __name__ == "__main__":
    sys.exit(cli.run(_command, make_parser(__doc__)))
