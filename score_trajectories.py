"""Score agent steps with a trained judge: agent runs or prompts in, one JSON line per step out."""

import argparse
import sys
from pathlib import Path

from prmkit import cli
from prmkit.errors import ExitCode
from prmkit.intervals import add_interval_arguments
from prmkit.judge.scorer import add_backend_arguments, add_judge_arguments, scorer_of
from prmkit.judge.types import BAD_BELOW


def main() -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Exit code 1 if a run cannot be read, or if a row has no scores or unsure ones; its line says why. Run "
        "the same command again to continue where it stopped; rows with the status failed (server or memory errors) "
        "are retried.",
    )
    inputs = (
        "runs in any format that import_trajectories.py reads (file or folder), or prompts (rows as in finetune.jsonl"
    )
    parser.add_argument("input", metavar="INPUT", help=f'{inputs} or {{"id", "prompt"}}); .gz, .bz2, .zst; - for stdin')
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSONL to write or to continue (default: stdout)")
    parser.add_argument(
        "--keys", type=_keys, default=(), metavar="A,B", help="score keys (default: as in the prompt's schema)"
    )
    data = "converted data with the score keys for prompts without a schema (default: as in training, or data)"
    parser.add_argument("--data-dir", "--data", type=Path, metavar="FOLDER", help=data)
    parser.add_argument("--summaries", action="store_true", help="also generate the verdict, and add it as text")
    parser.add_argument(
        "--aggregate", choices=["trajectory"], help="also combine the step scores of each run (min, product, …)"
    )
    bad = "scores below this are bad (default: %(default)s)"
    parser.add_argument("--bad-below", type=cli.share, default=BAD_BELOW[0], metavar="X", help=bad)
    runs = parser.add_argument_group("raw runs")
    runs.add_argument(
        "--rubric", type=Path, metavar="FILE", help="the rubric that the judge was trained with (default: prmkit's own)"
    )
    form = "input format (default: detected; a wrong name lists all formats)"
    runs.add_argument("--format", metavar="NAME", help=form)
    runs.add_argument("--html", type=Path, metavar="FILE", help="also write a page with every step's score")
    add_interval_arguments(parser)
    add_judge_arguments(parser)
    add_backend_arguments(parser)
    return cli.run(_command, parser)


def _keys(text: str) -> tuple[str, ...]:
    keys = tuple(filter(None, map(str.strip, text.split(","))))
    if len(set(keys)) < len(keys):
        raise argparse.ArgumentTypeError(f"{text} lists a key twice")
    return keys


def _command(arguments: argparse.Namespace) -> ExitCode:
    from prmkit.scoring.rows import runs_to_score, shapes_for
    from prmkit.scoring.score import ScoringJob, abstention_of, run_job

    scorer = scorer_of(arguments)
    shape_of = shapes_for(scorer.source, arguments.data_dir, arguments.keys)
    runs = runs_to_score(arguments, scorer.source.rubrics)
    job = ScoringJob(
        input=arguments.input,
        output=arguments.output,
        shape_of=shape_of,
        summaries=arguments.summaries,
        bad_below=arguments.bad_below if arguments.aggregate else None,
        runs=runs,
        abstention=abstention_of(scorer, arguments.interval, arguments.abstain_above),
    )
    fingerprint = {"judge": scorer.fingerprint(), "keys": list(arguments.keys), "known_keys": dict(shape_of.known)}
    fingerprint |= {"rubric": runs.rubric.sha256} if runs else {}
    return ExitCode.DONE if run_job(job, scorer, fingerprint) else ExitCode.DATA


if __name__ == "__main__":
    sys.exit(main())
