"""train.py without the checks before the run, which take as long as a run of these tests."""

import argparse
import sys

import train as script
from prmkit import cli
from prmkit.errors import ExitCode
from prmkit.training import flow


def _train(arguments: argparse.Namespace) -> ExitCode:
    flow.run_preflight = lambda *_, **__: []  # type: ignore[assignment]
    return script._command(arguments)


if __name__ == "__main__":
    sys.exit(cli.run(_train, script._parser()))
