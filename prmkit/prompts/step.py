"""Build the prompt about one step of a run: the only builder, for labelling, training and scoring.

A rubric is a small YAML file with what to ask a judge of single steps: score keys, rules, anchors, and the size of the
context. It has everything that shapes a prompt besides the run, so one hash shows whether two sets of rows, or a row
and a judge, use the same rubric.

A prompt contains nothing that is missing when a raw run is scored: no summaries, no earlier scores, no outcome, no
solution. The prompts of a run share their prefix, so that a prefix cache reads the run once instead of once per step:

    rubric (constant) · system, tools, task · earlier steps · this step · question

An earlier step is the same text in all later prompts: it is shortened once, when it stops being the current one. The
oldest steps are dropped in blocks of half the history, because dropping one at a time would change every later prompt.
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
from prmkit.trajectory import Step, Trajectory, results_by_call
from prmkit.verdict.types import is_score_key, is_share

DEFAULT_RUBRIC = Path(__file__).with_name("step_score.yaml")
BUILDER_VERSION = 1
"""The version of the prompts' format, incremented with every change: a judge gets only prompts of its own version."""
_KEY = re.compile(r"[a-z][a-z0-9_]{0,40}")
_LARGEST_SHARE = 0.2
"""The maximum fraction of the context for the rubric; the rest is for the run."""


@dataclass(frozen=True)
class Rubric:
    """One way to judge steps."""

    keys: tuple[str, ...]
    """Score keys, in order."""
    instructions: str
    """The beginning of every prompt: what to judge, and by which rules."""
    anchors: tuple[str, ...]
    """The meanings of some scores, one line each."""
    error_types: tuple[str, ...]
    """The values that `error_type` may have; empty for verdicts without it."""
    context_tokens: int
    """The maximum length of a prompt, in pseudo-tokens (3 UTF-8 bytes each): labelling does not know the tokenizer."""

    @cached_property
    def sha256(self) -> str:
        """The hash of the rubric and of the version of the prompts' format."""
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
        """The schema of the requested verdict: scores first, and no numbers that a judge could copy."""
        scores = ", ".join(f'"{key}": <score>' for key in self.keys)
        is_alone = len(self.keys) == 1 and is_score_key(self.keys[0])  # its name says that it is a score
        first = scores if is_alone else f'"scores": {{{scores}}}'
        middle = ', "error_type": "<type>"' if self.error_types else ""
        return f'{{{first}{middle}, "reasoning": "<one or two sentences>"}}'


def tokens(text: str) -> int:
    """Return the length of a text in pseudo-tokens of 3 bytes: too many for English, about right for code."""
    return -(-len(text.encode("utf-8", "surrogatepass")) // 3)


def load_rubric(path: Path | None = None) -> Rubric:
    """Read a rubric; the default one without a path.

    Raises:
        UsageError: the file or one of its keys is missing, or a key is misspelt or has a value of the wrong type.
    """
    path = path or DEFAULT_RUBRIC
    return _checked(read_plain_yaml(path), path)


def _checked(content: Any, path: Path) -> Rubric:
    kinds = {"keys": list, "instructions": str, "anchors": dict, "error_types": list, "context_tokens": int}
    if not isinstance(content, dict) or content.keys() - kinds or kinds.keys() - {"error_types"} - content.keys():
        raise UsageError(f"{path}: a rubric has the keys {', '.join(kinds)} and no others (error_types is optional).")
    for name, value in content.items():
        if type(value) is not kinds[name]:
            raise UsageError(f"{path}: {name} is {value!r:.40}, but must be {_WORDS[kinds[name]]}.")
    keys = content["keys"]
    if (
        not keys
        or len(set(map(str, keys))) < len(keys)
        or not all(isinstance(key, str) and _KEY.fullmatch(key) for key in keys)
    ):
        raise UsageError(f"{path}: keys must be different names in lower case, for example step_score.")
    anchors = tuple(f"{_anchor(score, path)}: {meaning}" for score, meaning in content["anchors"].items())
    types = tuple(map(str, content.get("error_types") or ()))
    rubric = Rubric(tuple(keys), content["instructions"].strip(), anchors, types, content["context_tokens"])
    needed = int(tokens(rubric.text) / _LARGEST_SHARE)
    if rubric.context_tokens < needed:
        raise UsageError(
            f"{path}: context_tokens is {rubric.context_tokens}, and the rubric's text leaves too little of it "
            f"for the run. Set at least {needed}, or shorten the text."
        )
    return rubric


_WORDS = {list: "a list", str: "a string", dict: "a mapping from score to meaning", int: "an integer"}


def _anchor(score: Any, path: Path) -> str:
    if not is_share(score):
        raise UsageError(f"{path}: the anchor {score!r} is not a number from 0 to 1.")
    return f"{score:.2f}"


# Maximum fractions of the context. Unused budget goes to the current step, which always has at least the rest.
_SYSTEM, _TASK, _TOOLS, _HISTORY, _EARLIER_STEP = 0.12, 0.12, 0.06, 0.3, 0.06
_LONGEST_DESCRIPTION = 200
"""The maximum number of characters of a tool's description."""
_OUR_TAGS = re.compile(r"<(?=/?(?:task|system|tools|step|message|omitted)\b)", re.IGNORECASE)


@dataclass(frozen=True)
class StepPrompt:
    """The prompt about one step."""

    step: Step
    text: str


def step_prompts(run: Trajectory, rubric: Rubric) -> Iterator[StepPrompt]:
    """Yield the prompts of all steps of a run, in order. Takes time linear in the length of the prompts."""
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
"""Context tokens for a prompt with a complete run, which fit into the contexts of strong judges."""


def run_prompt(run: Trajectory, rubric: Rubric) -> str:
    """Build one prompt about all steps of a run, for strong judges with a long context; this makes labels cheaper.

    All steps get the same budget, at least that of an earlier step in a step's prompt. The judge's answer still becomes
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
    """Return the common beginning of all prompts of the run."""
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


def _block(step: Step, budget: int) -> str:
    """Return a step with the messages before it, in at most `budget` tokens."""
    incoming = "".join(
        f'<message from="{_attribute(message.role)}">\n{_data(message.text)}\n</message>\n' for message in step.incoming
    )
    agent = f' agent="{_attribute(step.agent)}"' if step.agent else ""
    begin, end = f'<step n="{step.n}"{agent}>\n', "\n</step>\n"
    inside = budget - tokens(begin + end)
    incoming = shortened(incoming, max(inside // 3, inside - tokens(step_text(step))))
    return f"{incoming}{begin}{shortened(step_text(step), inside - tokens(incoming))}{end}"


def step_text(step: Step) -> str:
    """Return what the agent thought, wrote and called in a step, and the results."""
    parts = [f"Thought: {_data(step.thought)}"] if step.thought else []
    if step.text:
        parts.append(f"Text: {_data(step.text)}")
    by_call, others = results_by_call(step)
    for call, results in zip(step.calls, by_call, strict=True):
        parts.append(f"Call: {_data(call.name)} {_data(_json(call.arguments))}")
        parts += map(_result, results) if results else ["Result: (not recorded)"]
    parts += map(_result, others)
    return "\n".join(parts)


def _result(result: Any) -> str:
    return f"{'Error' if result.error else 'Result'}: {_data(result.text)}"


def _question(step: Step, rubric: Rubric) -> str:
    position = "the last step of the run" if step.last else "more steps follow"
    end = f"Answer with one line of JSON, scores from 0.00 to 1.00:\n{rubric.schema}\n"
    return f"\nJudge step {step.n} ({position}). {end}"


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _tagged(tag: str, text: str) -> str:
    return f"<{tag}>\n{text}\n</{tag}>\n"


def _data(text: str) -> str:
    """Escape prmkit's own tags in text of the run, so that it cannot end its part of the prompt and begin another."""
    return _OUR_TAGS.sub(r"<\\", text)


def _attribute(text: str) -> str:
    return re.sub(r'["<>\s]+', " ", text)[:60]


def shortened(text: str, budget: int) -> str:
    """Shorten a text to `budget` tokens: its head and its tail, with a mark in place of the middle."""
    if tokens(text) <= budget:
        return text
    data = text.encode("utf-8", "surrogatepass")
    kept = max(budget * 3 - len(" [... 000,000,000 characters left out ...] "), 0)
    head = data[: kept * 2 // 3].decode("utf-8", "ignore")
    tail = data[len(data) - kept // 3 :].decode("utf-8", "ignore")
    return f"{head} [... {len(text) - len(head) - len(tail):,} characters left out ...] {tail}"
