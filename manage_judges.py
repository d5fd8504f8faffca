"""Keep versions of judges: compare, tag, roll back, retrain, and watch them."""

import argparse
import sys

from prmkit import cli
from prmkit.errors import ExitCode
from prmkit.registry.arguments import make_parser


def _command(arguments: argparse.Namespace) -> ExitCode:
    from prmkit.registry.command import execute

    return execute(arguments)


if __name__ == "__main__":
    sys.exit(cli.run(_command, make_parser(__doc__)))
