"""Import agent runs from any common format into trajectories.jsonl, one run per line."""

import argparse
import sys
from pathlib import Path

from prmkit import cli
from prmkit.errors import ExitCode
from prmkit.trajectories.labels import SETS

_EPILOG = """\
The format of each file is detected from its structure. Known formats: OpenAI,
Anthropic, Bedrock, Gemini and Google's ADK, ShareGPT, LangChain, Vercel's AI
SDK, verifiers and ART messages; tau-bench and tau2 results; SWE-agent;
mini-swe-agent; Inspect (as JSON); ATIF; Claude Code and Codex sessions; tagged
text; OpenTelemetry (GenAI, OpenInference), LangSmith and Langfuse spans.
Content for which the record has no field is dropped, and counted in each run's
field `lost` and in the summary.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    inputs = "files (.json, .jsonl, .ndjson, .traj; also compressed: .gz, .bz2, .zst) or folders of them"
    add("inputs", nargs="+", metavar="PATH", help=inputs)
    add("--output", type=Path, required=True, metavar="FILE", help="JSONL to write")
    add("--format", metavar="NAME", help="input format (default: detected; a wrong name lists all formats)")
    add("--keep-secrets", action="store_true", help="do not mask keys and passwords")
    add("--json", action="store_true", help="print the report on every file as JSON instead of the summary")

    fields = parser.add_argument_group("field names, if yours are unusual").add_argument
    fields("--list-key", metavar="NAME", help="key of the list of messages")
    fields("--task-key", metavar="NAME", help="key of the task's id (default: task_id and similar, otherwise a hash)")
    fields("--outcome-key", metavar="NAME", help="key of a run's reward or success")

    labels = parser.add_argument_group("human labels: write rows for convert_dataset.py instead of runs").add_argument
    sets = f"where labels are: steps (in imported runs), column (a field), or a public set: {', '.join(SETS)}"
    labels("--labels", metavar="NAME", help=sets)
    labels("--label-key", metavar="NAME", help="the field: one label per step, or {message position: label}")
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
