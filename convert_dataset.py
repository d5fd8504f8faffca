"""Convert judged trajectories into training and held-out datasets for LLaMA Factory."""

import sys

from prmkit import cli
from prmkit.dataset.command import execute, make_parser

if __name__ == "__main__":
    sys.exit(cli.run(execute, make_parser(__doc__)))
