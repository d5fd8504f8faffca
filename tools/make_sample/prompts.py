"""The prompts for the judges, built like the prompts of real judged trajectories, but in our own words.

The numbers in the output schemas are examples, the same in every prompt, and never the answer.
"""

import json
from collections.abc import Mapping, Sequence

from tools.make_sample.scenes import TOOLS
from tools.make_sample.trajectories import Answer, Clip

EXAMPLE_SCORES = (0.70, 0.85, 0.60, 0.75)

FINAL_METRICS = {
    "task_completion": "solved?",
    "tool_use_quality": "apt calls?",
    "reasoning_coherence": "sound thoughts?",
    "answer_correctness": "equal to the truth?",
}

_CLIP = """
Judge one clip of an AI agent: thought, tool call, result.

Task Description: "{question}"

Previous Clips Summary: {history}

Current Clip (Clip {number}):
Tool Category: {category}
Tools Used: {tool}
Content:
<think>{thought}</think>
{exchange}

Answer in this JSON format:
{{"reasonableness_score": {example:.2f}, "summary": "..."}}

Five bands from 1.0 down to 0.0: strong, good, fair, weak, wasted.
"""

_EXCHANGE = """<tool_call>
{call}
</tool_call>
<result>{result}</result>"""

_ANSWER = """
Judge the last clip of an AI agent: its answer.

Task Description: "{question}"

Previous Clips Summary: {history}

Final Clip:
Content:
<think>{thought}</think>
<answer>\\boxed{{{model}}}</answer>

Ground Truth Answer: {truth}
Model Output Answer: {model}

Answer in this JSON format:
{{"correctness_score": {example:.2f}, "summary": "..."}}

Five bands from 1.0 down to 0.0: equal, right with doubts, roughly right, mostly wrong, wrong.
"""

_CATEGORY = """
Judge how an AI agent used its {category} tools.

Task Description: "{question}"

Clips in this {category} category:
{clips}

Metrics, each from 0 to 1:
{metrics}

Answer in this JSON format:
{schema}
"""

_FINAL = """
Judge the whole trajectory of an AI agent.

Task Description: "{question}"

Complete trajectory with all clip summaries and evaluations:
{clips}

Ground Truth Answer: {truth}
Model Final Result: {model}

Metrics, each from 0 to 1:
{metrics}

Answer in this JSON format:
{schema}
"""


def clip_prompt(question: str, history: str, clip: Clip) -> str:
    """Render the prompt of an ordinary clip; its verdict has `reasonableness_score`."""
    tool = TOOLS.get(clip.category)
    exchange = "(no call)"
    if tool:
        call = json.dumps({"name": tool.name, "arguments": {tool.parameter: clip.call}}, ensure_ascii=False)
        exchange = _EXCHANGE.format(call=call, result=clip.result)
    return _CLIP.format(
        question=question,
        history=history,
        number=clip.number,
        category=clip.category,
        tool=tool.name if tool else "none",
        thought=clip.thought,
        exchange=exchange,
        example=EXAMPLE_SCORES[0],
    )


def answer_prompt(question: str, history: str, answer: Answer) -> str:
    """Render the prompt of the last clip; its verdict has `correctness_score`."""
    return _ANSWER.format(
        question=question,
        history=history,
        thought=answer.thought,
        model=answer.model,
        truth=answer.truth,
        example=EXAMPLE_SCORES[0],
    )


def category_prompt(question: str, category: str, judged_clips: Sequence[str]) -> str:
    """Render the prompt of one tool category; its verdict has the tool's metrics in `scores`."""
    metrics = TOOLS[category].metrics
    return _CATEGORY.format(
        category=category,
        question=question,
        clips="\n".join(judged_clips),
        metrics=_numbered(metrics),
        schema=_schema(metrics),
    )


def final_prompt(question: str, judged_clips: Sequence[str], answer: Answer) -> str:
    """Render the prompt of the whole trajectory; its verdict has `FINAL_METRICS` in `scores`."""
    return _FINAL.format(
        question=question,
        clips="\n".join(judged_clips),
        truth=answer.truth,
        model=answer.model,
        metrics=_numbered(FINAL_METRICS),
        schema=_schema(FINAL_METRICS),
    )


def _numbered(metrics: Mapping[str, str]) -> str:
    lines = (
        f"{number}. {key.replace('_', ' ').capitalize()}: {question}"
        for number, (key, question) in enumerate(metrics.items(), start=1)
    )
    return "\n".join(lines)


def _schema(metrics: Mapping[str, str]) -> str:
    scores = ", ".join(f'"{key}": {example:.2f}' for key, example in zip(metrics, EXAMPLE_SCORES, strict=False))
    return f'{{"scores": {{{scores}}}, "summary": "...", "reasoning": "..."}}'
