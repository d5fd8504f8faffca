"""The prompt that asks a judge for one step of a run: one builder for labelling, training and scoring.

A rubric is a small YAML file that says what to ask a judge of single steps: score keys, rules, anchors, and how much
context it gets. It has everything that shapes a prompt besides the run, so one hash shows whether two sets of rows, or
a row and a judge, use the same questions.

A prompt has nothing that is missing when a raw run is scored: no summaries, no earlier scores, no outcome, no solution.
The prompts of a run share their prefix, so that a prefix cache reads the run once instead of once per step:

    rubric (constant) · system, tools, task · earlier steps · this step · question

An earlier step has the same form in all later prompts: it is shortened once, when it stops being the current one. The
oldest steps are dropped in blocks of half the history: dropping one at a time would change every following prompt.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from prmkit.errors import UsageError
from prmkit.files import read_plain_yaml
from prmkit.trajectory import Step, Trajectory
from prmkit.verdict.types import is_score_key

DEFAULT_RUBRIC = Path(__file__).with_name("step_score.yaml")
BUILDER_VERSION = 1
"""Incremented when the form of the prompts changes, so that a judge never gets prompts of another form."""
_KEY = re.compile(r"[a-z][a-z0-9_]{0,40}")
_LARGEST_SHARE = 0.2
"""The largest share of the context for the rubric itself: the rest is for the run."""


@dataclass(frozen=True)
class Rubric:
    """One way to judge steps."""

    keys: tuple[str, ...]
    """Score keys, in order."""
    instructions: str
    """What to judge, and by which rules. Every prompt begins with it."""
    anchors: tuple[str, ...]
    """What the scores mean, one line each."""
    error_types: tuple[str, ...]
    """The names that `error_type` may have; empty to leave it out of the verdict."""
    context_tokens: int
    """The longest prompt, in tokens of three bytes of UTF-8: no tokenizer is known when labels are made."""

    @cached_property
    def sha256(self) -> str:
        """Identifies the rubric together with the form of the prompts."""
        content = json.dumps([BUILDER_VERSION, asdict(self)], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def text(self) -> str:
        """The beginning of every prompt."""
        scale = "\n".join(f"- {anchor}" for anchor in self.anchors)
        kinds = f"\n\nError types: {', '.join(self.error_types)}." if self.error_types else ""
        return f"{self.instructions}\n\nScores, with any value in between:\n{scale}{kinds}\n\n"

    @property
    def schema(self) -> str:
        """The form of the requested verdict: scores first, and no numbers that a judge could copy."""
        scores = ", ".join(f'"{key}": <score>' for key in self.keys)
        is_alone = len(self.keys) == 1 and is_score_key(self.keys[0])  # its name says that it is a score
        first = scores if is_alone else f'"scores": {{{scores}}}'
        middle = ', "error_type": "<type>"' if self.error_types else ""
        return f'{{{first}{middle}, "reasoning": "<one or two sentences>"}}'


def tokens(text: str) -> int:
    """The length of a text in the unit of `Rubric.context_tokens`: too high for English, about right for code."""
    return -(-len(text.encode("utf-8", "surrogatepass")) // 3)


def load_rubric(path: Path | None = None) -> Rubric:
    """Read a rubric; the default one without a path.

    Raises:
        UsageError: the file is missing, or something in it is missing, misspelt or of the wrong type.
    """
    path = path or DEFAULT_RUBRIC
    return _checked(read_plain_yaml(path), path)


def _checked(content: Any, path: Path) -> Rubric:
    kinds = {"keys": list, "instructions": str, "anchors": dict, "error_types": list, "context_tokens": int}
    if not isinstance(content, dict) or content.keys() - kinds or kinds.keys() - {"error_types"} - content.keys():
        raise UsageError(f"{path}: a rubric has {', '.join(kinds)} and nothing else (error_types may be missing).")
    for name, value in content.items():
        if type(value) is not kinds[name]:
            raise UsageError(f"{path}: {name} is {value!r:.40}, but must be {_WORDS[kinds[name]]}.")
    keys = content["keys"]
    if (
        not keys
        or len(set(map(str, keys))) < len(keys)
        or not all(isinstance(key, str) and _KEY.fullmatch(key) for key in keys)
    ):
        raise UsageError(f"{path}: keys must be different names in lower case, such as step_score.")
    anchors = tuple(f"{_anchor(score, path)}: {meaning}" for score, meaning in content["anchors"].items())
    types = tuple(map(str, content.get("error_types") or ()))
    rubric = Rubric(tuple(keys), content["instructions"].strip(), anchors, types, content["context_tokens"])
    needed = int(tokens(rubric.text) / _LARGEST_SHARE)
    if rubric.context_tokens < needed:
        raise UsageError(
            f"{path}: context_tokens is {rubric.context_tokens}, of which the rubric's text leaves too little "
            f"for the run. Set at least {needed}, or shorten the text."
        )
    return rubric


_WORDS = {list: "a list", str: "text", dict: "a mapping from score to meaning", int: "a whole number"}


def _anchor(score: Any, path: Path) -> str:
    if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
        raise UsageError(f"{path}: the anchor {score!r} is not a number from 0 to 1.")
    return f"{score:.2f}"


# Shares of the context. A smaller part leaves its room to the current step, which always has at least the rest.
_SYSTEM, _TASK, _TOOLS, _HISTORY, _EARLIER_STEP = 0.12, 0.12, 0.06, 0.3, 0.06
_LONGEST_DESCRIPTION = 200
"""The most characters of a tool's description."""
_OUR_TAGS = re.compile(r"<(?=/?(?:task|system|tools|step|message|omitted)\b)", re.IGNORECASE)


@dataclass(frozen=True)
class StepPrompt:
    """One prompt."""

    step: Step
    text: str


def step_prompts(run: Trajectory, rubric: Rubric) -> Iterator[StepPrompt]:
    """The prompts of all steps of a run, in order. Takes time linear in the length of the prompts."""
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


_RUN_TOKENS = 100_000
"""Context tokens for a prompt with a whole run: what fits into the contexts of strong judges."""


def run_prompt(run: Trajectory, rubric: Rubric) -> str:
    """One prompt for all steps of a run, for strong judges with a long context, which makes labels cheaper.

    Every step has the same room, at least that of an earlier step in a step's prompt. The judge's answer still becomes
    the label of each step's own prompt.
    """
    room = max(int(rubric.context_tokens * _EARLIER_STEP), _RUN_TOKENS // len(run.steps))
    steps = "".join(_block(step, room) for step in run.steps)
    question = (
        f"\nJudge each of the {len(run.steps)} steps by what was known when it was taken. Answer with one JSON object, "
        f'scores from 0.00 to 1.00, one entry for each step in its order:\n{{"steps": [{{"step": 1, '
        f"{rubric.schema[1:]}, ...]}}\n"
    )
    return f"{_opening(run, rubric)}{steps}{question}"


def _opening(run: Trajectory, rubric: Rubric) -> str:
    """The common beginning of all prompts of the run."""
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
    arrived = shortened(arrived, max(inside // 3, inside - tokens(step_text(step))))
    return f"{arrived}{begin}{shortened(step_text(step), inside - tokens(arrived))}{end}"


def step_text(step: Step) -> str:
    """What the agent thought, wrote and called in a step, and the results."""
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
    """Text of the run with our own tags broken up, so that it cannot end its part of the prompt and begin another."""
    return _OUR_TAGS.sub(r"<\\", text)


def _attribute(text: str) -> str:
    return re.sub(r'["<>\s]+', " ", text)[:60]


def shortened(text: str, room: int) -> str:
    """The head and tail of a text that is longer than `room` tokens, with a mark for what is left out between them."""
    if tokens(text) <= room:
        return text
    data = text.encode("utf-8", "surrogatepass")
    kept = max(room * 3 - len(" [... 000,000,000 characters left out ...] "), 0)
    head = data[: kept * 2 // 3].decode("utf-8", "ignore")
    tail = data[len(data) - kept // 3 :].decode("utf-8", "ignore")
    return f"{head} [... {len(text) - len(head) - len(tail):,} characters left out ...] {tail}"
