"""Make raw agent runs like those of the sample, in three formats, the same bytes for the same seed.

    python -m tools.make_sample.runs --examples examples                        every file that ships
    python -m tools.make_sample.runs --labelled more_runs.jsonl --tasks 240     only labelled runs, of more tasks

`runs.jsonl` has OpenAI messages, two attempts at each task; `session.jsonl` is a session of Claude Code, `trace.json`
an OTLP trace with GenAI attributes. Labelled runs have the quality of every step, which the generator knows, in the
column `labels`. The demo's judge of raw runs is trained on `labelled_runs.jsonl`.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prmkit import cli
from prmkit.errors import ExitCode
from prmkit.files import write_text
from tools.make_sample.sample import NEW_SEED, write_rows
from tools.make_sample.scenes import TOOLS
from tools.make_sample.trajectories import Trajectory, draw_trajectory

EXAMPLE_TASKS = 3
ATTEMPTS = 2
LABELLED_SEED = 0
LABELLED_TASKS = 120
"""Number of tasks in `labelled_runs.jsonl`, on which the demo's second judge is trained; more make the demo slower."""
SYSTEM = "You answer questions with the tools that you have. Say so when you do not know."

Message = dict[str, Any]


def draw_run(seed: int, task: int, attempt: int) -> Trajectory:
    """Draw an attempt at a task; attempts at one task differ in what the agent does."""
    return draw_trajectory(random.Random(f"{seed}:run:{task}"), random.Random(f"{seed}:run:{task}:{attempt}"))


def message_runs(seed: int, tasks: int, *, labelled: bool = False) -> Iterator[dict[str, Any]]:
    """Yield runs as OpenAI messages, several attempts at each task."""
    for task in range(tasks):
        for attempt in range(ATTEMPTS):
            run = draw_run(seed, task, attempt)
            row = {
                "task_id": f"{run.family}_{'labelled' if labelled else 'run'}_{task}",
                "messages": messages_of(run),
                "tools": [{"type": "function", "function": {"name": TOOLS[name].name}} for name in run.categories],
                "reward": float(run.answer.standing in ("right", "unchecked")),
                "ground_truth": run.answer.truth,
            }
            labels = [round(quality, 2) for quality in (*(clip.quality for clip in run.clips), run.answer.quality)]
            yield row | ({"labels": labels} if labelled else {})


def messages_of(run: Trajectory) -> list[Message]:
    """Convert a run to OpenAI messages: the clips are calls with results, the answer is the last message."""
    messages: list[Message] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": run.question}]
    for clip in run.clips:
        message: Message = {"role": "assistant", "content": None, "reasoning_content": clip.thought}
        if tool := TOOLS.get(clip.category):
            arguments = json.dumps({tool.parameter: clip.call}, ensure_ascii=False)
            function = {"name": tool.name, "arguments": arguments}
            message["tool_calls"] = [{"id": f"call_{clip.number}", "type": "function", "function": function}]
            messages += [message, {"role": "tool", "tool_call_id": f"call_{clip.number}", "content": clip.result}]
        else:
            messages.append(message)
    return [*messages, {"role": "assistant", "content": run.answer.model, "reasoning_content": run.answer.thought}]


def session_lines(run: Trajectory) -> Iterator[dict[str, Any]]:
    """Yield the lines of a run as a Claude Code session: thought and call of one response are on separate lines."""
    parent = None
    count = 0

    def event(kind: str, content: Any, answer: int | None = None) -> dict[str, Any]:
        nonlocal parent, count
        count += 1
        identity = {} if answer is None else {"id": f"msg_{answer}", "type": "message"}
        line = {"type": kind, "uuid": f"event-{count}", "parentUuid": parent, "sessionId": "example-session",
                "isSidechain": False, "message": {"role": kind, **identity, "content": content}}  # fmt: skip
        parent = line["uuid"]
        return line

    yield event("user", run.question)
    for clip in run.clips:
        yield event("assistant", [{"type": "thinking", "thinking": clip.thought}], clip.number)
        if tool := TOOLS.get(clip.category):
            call = {"type": "tool_use", "id": f"tool_{clip.number}", "name": tool.name}
            yield event("assistant", [call | {"input": {tool.parameter: clip.call}}], clip.number)
            yield event("user", [{"type": "tool_result", "tool_use_id": f"tool_{clip.number}", "content": clip.result}])
    yield event("assistant", [{"type": "thinking", "thinking": run.answer.thought}], run.answer.number)
    yield event("assistant", [{"type": "text", "text": run.answer.model}], run.answer.number)


def trace(run: Trajectory) -> dict[str, Any]:
    """Convert a run to an OTLP trace: one `chat` span per response of the model, with all messages before it."""
    opening, *others = messages_of(run)[1:]
    messages = [{"role": "user", "parts": [{"type": "text", "content": opening["content"]}]}, *map(_in_parts, others)]
    spans: list[dict[str, Any]] = []
    for position, message in enumerate(messages):
        if message["role"] == "assistant":
            attributes = {
                "gen_ai.operation.name": "chat",
                "gen_ai.system_instructions": json.dumps([{"type": "text", "content": SYSTEM}]),
                "gen_ai.input.messages": json.dumps(messages[:position], ensure_ascii=False),
                "gen_ai.output.messages": json.dumps([message], ensure_ascii=False),
            }
            pairs = [{"key": key, "value": {"stringValue": value}} for key, value in attributes.items()]
            span = {"traceId": "5" * 32, "spanId": f"{len(spans):016x}", "name": "chat",
                    "startTimeUnixNano": str(1_767_225_600_000_000_000 + len(spans))}  # fmt: skip
            spans.append(span | {"attributes": pairs})
    return {"resourceSpans": [{"scopeSpans": [{"spans": spans}]}]}


def _in_parts(message: Message) -> dict[str, Any]:
    if message["role"] == "tool":
        part = {"type": "tool_call_response", "id": message["tool_call_id"], "response": message["content"]}
        return {"role": "tool", "parts": [part]}
    parts: list[dict[str, Any]] = [{"type": "reasoning", "content": message["reasoning_content"]}]
    if message["content"]:
        parts.append({"type": "text", "content": message["content"]})
    for call in message.get("tool_calls", ()):
        function = call["function"]
        arguments = json.loads(function["arguments"])
        parts.append({"type": "tool_call", "id": call["id"], "name": function["name"], "arguments": arguments})
    return {"role": "assistant", "parts": parts}


def write_examples(folder: Path) -> None:
    """Write the three files of raw runs, and the labelled ones."""
    write_rows(folder / "runs.jsonl", message_runs(NEW_SEED, EXAMPLE_TASKS))
    write_rows(folder / "session.jsonl", session_lines(draw_run(NEW_SEED, EXAMPLE_TASKS, 0)))
    text = json.dumps(trace(draw_run(NEW_SEED, EXAMPLE_TASKS + 1, 0)), indent=1, ensure_ascii=False)
    write_text(folder / "trace.json", text + "\n")
    write_rows(folder / "labelled_runs.jsonl", message_runs(LABELLED_SEED, LABELLED_TASKS, labelled=True))


def _command(arguments: argparse.Namespace) -> ExitCode:
    if arguments.examples:
        write_examples(arguments.examples)
        cli.emit(f"{arguments.examples}: runs.jsonl, session.jsonl, trace.json, labelled_runs.jsonl")
    if arguments.labelled:
        rows = message_runs(arguments.seed, arguments.tasks, labelled=True)
        cli.emit(f"{arguments.labelled}: {write_rows(arguments.labelled, rows)} runs")
    return ExitCode.DONE


def main() -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--examples", type=Path, metavar="FOLDER", help="write the examples to this folder")
    parser.add_argument("--labelled", type=Path, metavar="FILE", help="write labelled runs as messages to this file")
    parser.add_argument(
        "--seed", type=int, default=LABELLED_SEED, help="another seed gives other tasks (default: %(default)s)"
    )
    parser.add_argument(
        "--tasks", type=int, default=LABELLED_TASKS, help="number of tasks for --labelled (default: %(default)s)"
    )
    return cli.run(_command, parser)


if __name__ == "__main__":
    sys.exit(main())
