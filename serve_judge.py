"""Serve a trained judge over HTTP: steps and runs in, scores out; rewards for RL trainers; metrics for Prometheus."""

import argparse
import sys
from pathlib import Path

from prmkit import cli
from prmkit.errors import ExitCode
from prmkit.intervals import add_interval_arguments
from prmkit.judge.scorer import add_backend_arguments, add_judge_arguments
from prmkit.judge.types import BAD_BELOW, UNSCORED
from prmkit.serving.engine import Engine
from prmkit.verdict import AGGREGATES


def main() -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="POST /v1/score, /v1/score_trajectory, /v1/systemone, /get_reward (OpenRLHF), /reward (slime); GET /, "
        "/health, /ready, /metrics, /v1/models, /docs. On SIGTERM, it finishes open requests, then exits with 143.",
    )
    add = parser.add_argument
    address = "address to listen on (default: %(default)s, only this machine)"
    add("--host", default="127.0.0.1", metavar="ADDRESS", help=address)
    add("--port", type=int, default=8000, metavar="N", help="port; 0 is any free port (default: %(default)s)")
    key = "environment variable with the bearer key that clients must send (default: no key)"
    add("--key-env", metavar="NAME", help=key)
    add("--max-body", type=cli.positive, default=32, metavar="MB", help="largest request (default: %(default)s)")
    window = "batching window: how long an idle judge waits for more prompts (default: %(default)g)"
    add("--window", type=cli.seconds, default=1000 * Engine.window, metavar="MS", help=window)
    waiting = "queue size in prompts; further requests get 503 (default: %(default)s)"
    add("--queue", type=cli.positive, default=Engine.limit, metavar="N", help=waiting)
    longest = "longest wait for a place in the queue (default: %(default)g)"
    add("--queue-timeout", type=cli.seconds, default=Engine.patience, metavar="SECONDS", help=longest)
    finish = "time to finish requests when stopped (default: %(default)g)"
    add("--drain", type=cli.seconds, default=30.0, metavar="SECONDS", help=finish)
    rubric = "the rubric that the judge was trained with (default: prmkit's own)"
    add("--rubric", type=Path, metavar="FILE", help=rubric)
    data = "converted data with the score keys for prompts without a schema (default: as in training, or data)"
    add("--data-dir", "--data", type=Path, metavar="FOLDER", help=data)
    rewards = parser.add_argument_group("rewards").add_argument
    how = "how the scores of several steps become one reward (default: %(default)s)"
    rewards("--aggregate", choices=list(AGGREGATES), default="min", help=how)
    unscored = "response to an unscored or unsure step: 503, the other steps only, the mean of past rewards, or null "
    unscored += "(default: %(default)s)"
    rewards("--unscored", choices=UNSCORED, default="error", help=unscored)
    bad = "scores below this are bad (default: %(default)s)"
    rewards("--bad-below", type=cli.share, default=BAD_BELOW[0], metavar="X", help=bad)
    _add_trial_and_log(parser)
    add_interval_arguments(parser)
    add_judge_arguments(parser)
    add_backend_arguments(parser)
    return cli.run(_command, parser)


def _add_trial_and_log(parser: argparse.ArgumentParser) -> None:
    trial = parser.add_argument_group("challenger judge").add_argument
    trial("--challenger", metavar="JUDGE", help="a second judge: a folder, or a registered version (like --judge)")
    how_many = (
        "fraction of tasks that the challenger scores alone (default: 0.1) or, with --shadow, as well (default: 1)"
    )
    trial("--share", type=cli.share, metavar="X", help=how_many)
    trial("--shadow", action="store_true", help="the production judge answers; the challenger's scores are only logged")
    logs = parser.add_argument_group("request log").add_argument
    logs("--log-requests", type=Path, metavar="FILE", help="append a JSON line for every scored step")
    logs("--log-prompts", action="store_true", help="log the prompts; otherwise only their hashes and lengths")
    full = "size at which FILE becomes FILE.1 (default: %(default)s)"
    logs("--log-size", type=cli.positive, default=100, metavar="MB", help=full)
    logs("--log-files", type=cli.positive, default=10, metavar="N", help="full files to keep (default: %(default)s)")


def _command(arguments: argparse.Namespace) -> ExitCode:
    from prmkit.serving.command import serve

    return serve(arguments)


if __name__ == "__main__":
    sys.exit(main())
