"""The flags of manage_judges.py. Imports no other package, so --help always works."""

import argparse
from pathlib import Path
from typing import Any

from prmkit import cli

SHIFT_LIMIT = 0.25
"""The population stability index above which scores have shifted, in new rows or in production."""
REPLAY = {"base": 1.0, "adapter": 0.3}
"""What a retraining starts from -> the fraction of the old training tasks that it trains on again."""

_EPILOG = """\
VERSION is a tag (production), a number, NAME@TAG or NAME@NUMBER. The judges
are in judges/; the environment variable PRMKIT_JUDGES sets another folder.
evaluate_judge.py, score_trajectories.py, serve_judge.py and train.py
--export-only also take --judge VERSION.
"""


class _Parser(argparse.ArgumentParser):
    def parse_intermixed_args(self, args: Any = None, namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        """Parse without intermixing, because argparse cannot mix options and positionals if there are subcommands."""
        parsed: argparse.Namespace = self.parse_args(args, namespace)
        return parsed


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Make the parser of manage_judges.py."""
    parser = _Parser(description=description, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_versions(commands)
    _add_retraining(commands)
    _add_monitoring(commands)
    return parser


def _add_monitoring(commands: "argparse._SubParsersAction[_Parser]") -> None:
    logs = "request logs of serve_judge.py, or outputs of score_trajectories.py"
    ab = commands.add_parser("ab", help="compare two judges, and show which one predicts success better")
    drift = commands.add_parser("drift", help="check whether scores differ from held-out scores; exit code 4 if so")
    drift.add_argument("judge", metavar="VERSION", help="the version whose held-out scores are the reference")
    page = commands.add_parser("page", help="write one HTML page about all versions")
    page.add_argument("--logs", type=Path, nargs="+", default=(), metavar="LOG", help=f"for A/B and drift: {logs}")
    page.add_argument(
        "--output", type=Path, default=Path("judges.html"), metavar="FILE", help="page to write (default: %(default)s)"
    )
    ab.add_argument("--outcomes", type=Path, metavar="FILE", help="JSON lines with trajectory_id and outcome (0 to 1)")
    for command in (ab, drift):
        command.add_argument("logs", type=Path, nargs="+", metavar="LOG", help=logs)
        command.add_argument("--days", type=cli.seconds, metavar="N", help="only steps logged in the last N days")
        command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    for command in (drift, page):
        limit = "a larger population stability index (PSI) counts as drift (default: %(default)s)"
        command.add_argument("--limit", type=cli.share, default=SHIFT_LIMIT, metavar="X", help=limit)


def _add_retraining(commands: "argparse._SubParsersAction[_Parser]") -> None:
    retrain = commands.add_parser(
        "retrain",
        help="train a new version from an old one and new rows, and compare the two",
        epilog="Exit code 0: the gate is met, or there are no new rows; 4: it is not met, or cannot be decided. If a "
        "retraining was killed, run the same command again to continue.",
    )
    add = retrain.add_argument
    add("version", metavar="VERSION", help="the version to start from, such as production")
    add("--new", type=Path, nargs="+", required=True, metavar="FILE", help="new rows")
    add(
        "--from",
        dest="start",
        choices=list(REPLAY),
        default="base",
        help="what training starts from (default: %(default)s)",
    )
    shares = ", ".join(f"{share:g} from {start}" for start, share in REPLAY.items())
    replay = f"fraction of the old training tasks to train on again (default: {shares})"
    add("--replay", type=cli.share, metavar="X", help=replay)
    add(
        "--margin",
        type=cli.share,
        default=0.05,
        metavar="X",
        help="non-inferiority margin per evaluation type (default: %(default)s)",
    )
    add("--set", nargs="+", default=[], metavar="key=value", help="a key of LLaMA Factory, such as learning_rate=1e-5")
    add("--promote-if-better", action="store_true", help="tag the new version if the gate is met")
    add("--accept-contradiction", action="store_true", help="train even if the labels contradict the judge")
    add("--why", metavar="TEXT", help="the reason, for the history")
    add("--mlflow", action="store_true", help="also log the new version to MLflow")
    add("--json", action="store_true", help="print the result as JSON")


def _add_versions(commands: "argparse._SubParsersAction[_Parser]") -> None:
    which = "a tag, a number, NAME@TAG or NAME@NUMBER"
    add = commands.add_parser("add", help="copy a finished training run into the registry, with its data and its rows")
    add.add_argument("run", metavar="RUN", type=Path, help="folder of a finished training run")
    add.add_argument("--name", default="judge", help="the judge's name (default: %(default)s)")
    add.add_argument("--parent", metavar="VERSION", help="the version that this one was trained from")
    add.add_argument("--rows", type=Path, nargs="+", default=(), metavar="FILE", help="the rows that were converted")
    add.add_argument("--data-dir", type=Path, metavar="FOLDER", help="the converted data (default: the training run's)")
    listing = commands.add_parser("list", help="list all versions, with their agreement with the judges")
    show = commands.add_parser("show", help="show one version, and whether its files are unchanged")
    show.add_argument("version", metavar="VERSION", help=which)
    diff = commands.add_parser("diff", help="show how two versions differ in settings, data and agreement")
    diff.add_argument("version", metavar="VERSION", help=which)
    diff.add_argument("other", metavar="OTHER", help="the version to compare it with")
    tag = commands.add_parser("tag", help="point a tag, such as production, at a version")
    tag.add_argument("version", metavar="VERSION", help=which)
    tag.add_argument("tag", metavar="TAG", help="any word, such as production")
    back = commands.add_parser("rollback", help="move a tag back to the version that had it before")
    back.add_argument("version", metavar="TAG", help="the tag to move, such as production")
    remove = commands.add_parser("remove", help="delete an untagged version")
    remove.add_argument("version", metavar="VERSION", help=which)
    export = commands.add_parser("export", help="write a folder with weights and model card, ready for a hub")
    export.add_argument("version", metavar="VERSION", help=which)
    export.add_argument("--push-ready", type=Path, required=True, metavar="FOLDER", help="the folder to create")
    history = commands.add_parser("history", help="show who did what, when and why")
    for command in (listing, show, diff, history):
        command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    mlflow = commands.add_parser("mlflow", help="log a version to the MLflow server in MLFLOW_TRACKING_URI")
    mlflow.add_argument("version", metavar="VERSION", help=which)
    add.add_argument("--mlflow", action="store_true", help="also log it to MLflow, if mlflow is installed")
    for command in (add, tag, back, remove):
        command.add_argument("--why", metavar="TEXT", help="the reason, for the history")
