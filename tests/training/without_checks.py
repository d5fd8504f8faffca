"""train.py without the checks before the run, which take as long as a run of these tests."""

import argparse
import sys

import train as script
from prmkit import cli
from prmkit.errors import ExitCode
from prmkit.training import train


def _train(arguments: argparse.Namespace) -> ExitCode:
    train._check = lambda *_: []
    return script._command(arguments)


if __name__ == "__main__":
    sys.exit(cli.run(_train, script._parser()))
