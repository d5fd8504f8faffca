"""The prompt that asks a judge for one step of a run: one builder for labelling, training and scoring.

It holds nothing that is missing when a raw run is scored: no summaries, no earlier scores, no outcome, no solution.

The prompts of a run share their prefix, so that a prefix cache reads the run once and not once a step:

    rubric (constant) · system, tools, task · earlier steps · this step · question

An earlier step appears in one form in all later prompts: shortened once, when it stops being the current one. The
oldest steps leave in blocks of half the history: leaving one at a time would change every prompt from there on.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from prmkit.prompts.rubric import Rubric, tokens
from prmkit.trajectory import Step, Trajectory

# Shares of the context. A part that is smaller leaves its room to the current step, which always has at least the rest.
_SYSTEM, _TASK, _TOOLS, _HISTORY, _EARLIER_STEP = 0.12, 0.12, 0.06, 0.3, 0.06
_LONGEST_DESCRIPTION = 200
"""Characters of a tool's description."""
_OUR_TAGS = re.compile(r"<(?=/?(?:task|system|tools|step|message|omitted)\b)", re.IGNORECASE)


@dataclass(frozen=True)
class StepPrompt:
    """One prompt."""

    step: Step
    text: str


def step_prompts(run: Trajectory, rubric: Rubric) -> Iterator[StepPrompt]:
    """The prompts of all steps of a run, in their order. Takes time linear in the length of the prompts."""
    opening = _opening(run, rubric)
    room = rubric.context_tokens
    earlier: list[str] = []
    sizes: list[int] = []
    begin = 0
    for step in run.steps:
        history = "".join(earlier[begin:])
        if begin:
            history = f'<omitted steps="1 to {begin}"/>\n' + history
        question = _question(step, rubric)
        left = room - tokens(opening) - tokens(history) - tokens(question)
        yield StepPrompt(step, f"{opening}{history}{_block(step, max(left, 0))}{question}")
        earlier.append(_block(step, int(room * _EARLIER_STEP)))
        sizes.append(tokens(earlier[-1]))
        if sum(sizes[begin:]) > room * _HISTORY:
            while sum(sizes[begin:]) > room * _HISTORY / 2:
                begin += 1


def _opening(run: Trajectory, rubric: Rubric) -> str:
    """What all prompts of the run begin with."""
    room = rubric.context_tokens
    parts = [rubric.text]
    if run.system:
        parts.append(_tagged("system", shortened(_data(run.system), int(room * _SYSTEM))))
    if run.tools:
        parts.append(_tagged("tools", shortened(_data(_tools(run)), int(room * _TOOLS))))
    parts.append(_tagged("task", shortened(_data(run.task), int(room * _TASK))))
    return "".join(parts)


def _tools(run: Trajectory) -> str:
    lines = []
    for tool in run.tools:
        name, description = str(tool.get("name", "")), " ".join(str(tool.get("description") or "").split())
        if len(description) > _LONGEST_DESCRIPTION:
            description = description[: _LONGEST_DESCRIPTION - 4] + " ..."
        lines.append(f"{name}: {description}" if description else name)
    return "\n".join(lines)


def _block(step: Step, room: int) -> str:
    """A step with what arrived before it, in at most `room` tokens."""
    arrived = "".join(
        f'<message from="{_attribute(message.role)}">\n{_data(message.text)}\n</message>\n' for message in step.incoming
    )
    agent = f' agent="{_attribute(step.agent)}"' if step.agent else ""
    begin, end = f'<step n="{step.n}"{agent}>\n', "\n</step>\n"
    inside = room - tokens(begin + end)
    arrived = shortened(arrived, max(inside // 3, inside - tokens(_content(step))))
    return f"{arrived}{begin}{shortened(_content(step), inside - tokens(arrived))}{end}"


def _content(step: Step) -> str:
    parts = [f"Thought: {_data(step.thought)}"] if step.thought else []
    if step.text:
        parts.append(f"Text: {_data(step.text)}")
    results = {result.call_id: result for result in step.results}
    placed = set()
    for call in step.calls:
        parts.append(f"Call: {_data(call.name)} {_data(_json(call.arguments))}")
        if call.id in results and call.id not in placed:
            parts.append(_result(results[call.id]))
            placed.add(call.id)
        else:
            parts.append("Result: (not recorded)")
    parts += [_result(result) for result in step.results if result.call_id not in placed]
    return "\n".join(parts)


def _result(result: Any) -> str:
    return f"{'Error' if result.error else 'Result'}: {_data(result.text)}"


def _question(step: Step, rubric: Rubric) -> str:
    place = "the last step of the run" if step.last else "more steps follow"
    return (
        f"\nJudge step {step.n} ({place}). Answer with one line of JSON, scores from 0.00 to 1.00:\n{rubric.schema}\n"
    )


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _tagged(tag: str, text: str) -> str:
    return f"<{tag}>\n{text}\n</{tag}>\n"


def _data(text: str) -> str:
    """Text of the run, in which our own tags are broken: it cannot end its part of the prompt and begin another."""
    return _OUR_TAGS.sub(r"<\\", text)


def _attribute(text: str) -> str:
    return re.sub(r'["<>\s]+', " ", text)[:60]


def shortened(text: str, room: int) -> str:
    """The head and the tail of a text that is longer than `room` tokens, with a mark of what is left out between."""
    if tokens(text) <= room:
        return text
    data = text.encode("utf-8", "surrogatepass")
    kept = max(room * 3 - len(" [... 000,000,000 characters left out ...] "), 0)
    head = data[: kept * 2 // 3].decode("utf-8", "ignore")
    tail = data[len(data) - kept // 3 :].decode("utf-8", "ignore")
    return f"{head} [... {len(text) - len(head) - len(tail):,} characters left out ...] {tail}"
