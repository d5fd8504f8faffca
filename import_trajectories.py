"""Agent runs in any common form -> trajectories.jsonl: one run per line, for scoring, labelling and training."""

import argparse
import sys
from pathlib import Path

from prmkit import cli
from prmkit.errors import ExitCode
from prmkit.trajectories.labels import SETS

_EPILOG = """\
The form of each file is recognised by its structure. Known forms: messages of OpenAI, Anthropic, Bedrock, Gemini and
Google's ADK, ShareGPT, LangChain, Vercel's AI SDK, verifiers and ART, results of tau-bench and tau2, SWE-agent,
mini-swe-agent, Inspect (as JSON), ATIF, sessions of Claude Code and Codex, tagged text, and spans of OpenTelemetry
(GenAI, OpenInference), LangSmith and Langfuse.
What has no place in the record is counted in the field `lost` of each run, and in the summary.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    inputs = "files (.json, .jsonl, .ndjson, .traj; packed: .gz, .bz2, .zst) or folders of them"
    add("inputs", nargs="+", metavar="PATH", help=inputs)
    add("--output", type=Path, required=True, metavar="FILE", help="JSONL to write")
    add("--format", metavar="NAME", help="form of the runs (default: recognised; a wrong name lists the valid ones)")
    add("--keep-secrets", action="store_true", help="do not mask keys and passwords")
    add("--json", action="store_true", help="print the report on every file as JSON instead of the summary")

    fields = parser.add_argument_group("field names, if yours are unusual").add_argument
    fields("--list-key", metavar="NAME", help="of the list of messages")
    fields(
        "--task-key", metavar="NAME", help="of the task's id (default: task_id and similar, else a hash of the task)"
    )
    fields("--outcome-key", metavar="NAME", help="of the reward or the success of a run")

    labels = parser.add_argument_group(
        "labels that people gave: write rows for convert_dataset.py instead"
    ).add_argument
    sets = f"steps (of imported runs), column, or a public set: {', '.join(SETS)}"
    labels("--labels", metavar="NAME", help=sets)
    labels("--label-key", metavar="NAME", help="the column: one label per step, or {position of the message: label}")
    scale = "unit: 0 to 1 (default); ternary: -1 wrong, 0 neutral, 1 right"
    labels("--label-scale", choices=["unit", "ternary"], default="unit", help=scale)
    labels(
        "--rubric", type=Path, metavar="FILE", help="the rubric for prompts (default: prmkit/prompts/step_score.yaml)"
    )
    return parser


def _command(arguments: argparse.Namespace) -> ExitCode:
    from prmkit.trajectories.command import import_runs

    return import_runs(arguments)


if __name__ == "__main__":
    sys.exit(cli.run(_command, _parser()))
