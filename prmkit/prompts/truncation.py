"""Shorten prompts that are too long for the context by removing their middle.

LLaMA Factory silently cuts a long prompt from the right, so the output schema and the assistant's header go first.
`trim_prompt` removes the middle of the step's content instead. It keeps the task, the schema, the guidelines, and the
beginning and the end of the content. Training and scoring use this same function, so a judge gets shortened prompts in
the format that it was trained on.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from prmkit.prompts.encoding import EncodesPrompts
from prmkit.verdict.types import SCORE_ENDING

_KEPT_AT_EACH_END = (200, 40)
"""The minimum number of characters kept at each end of a part; the second value only if the first does not fit."""
_LONGEST_QUESTION = 4_000
"""The maximum distance, in characters, from the beginning of the question to the schema; before it is content."""

_CLIP = re.compile(r"^(?:Current|Final) Clip\b[^\n]*\n(?:[^\n]*\n){0,4}?Content:[ \t]*\n", re.MULTILINE)
_TASK = re.compile(r"Task Description:.*?\n[ \t]*\n(?=[A-Z][^\n:]{2,80}:)", re.DOTALL)
_STEP = re.compile(r'^<step n="\d+"[^>\n]*>\n', re.MULTILINE)
_SCHEMA = re.compile(rf'\{{\s*"(?:scores"\s*:\s*\{{|\w*(?i:{SCORE_ENDING})"\s*:)')
_BLANK_LINE = re.compile(r"\n[ \t]*\n")
# First words of paragraphs that belong to the question and not to the trajectory.
_ASKING = re.compile(
    r"\s*(?:Please|Rate|Evaluate|Judge|Assess|Score|Provide|Answer|Respond|Return|Output|Use|Give"
    r"|Ground Truth|Model (?:Output|Final))\b"
)


@dataclass(frozen=True)
class TrimmedPrompt:
    """A prompt that fits."""

    text: str
    tokens: int
    """The number of token ids of the prompt, including the template's."""
    characters_left_out: int
    """The number of removed characters; 0 if the prompt fitted unchanged."""


def trim_prompt(prompt: str, encoding: EncodesPrompts, room: int, system: str | None = None) -> TrimmedPrompt | None:
    """Remove as little of the prompt's middle as possible to make it fit.

    Args:
        prompt: the prompt as in a training file, with its special tokens escaped.
        encoding: counts the tokens.
        room: the maximum number of token ids of the prompt, including its system prompt.
        system: the row's system prompt, which is never shortened.

    Returns:
        The prompt with a mark where characters were removed, or None if the untrimmable part does not fit.
    """
    tokens = len(encoding.prompt_ids(prompt, system))
    if tokens <= room:
        return TrimmedPrompt(prompt, tokens, 0)
    parts = _trimmable_spans(prompt)
    for kept in _KEPT_AT_EACH_END:
        inner = [part[kept:-kept] for part in parts]
        cut = partial(_without, prompt, inner, encoding, system)
        shortest = cut(sum(map(len, inner)))
        if shortest.tokens <= room:
            return _longest_that_fits(cut, tokens, shortest, room)
    return None


def _longest_that_fits(
    cut: Callable[[int], TrimmedPrompt], tokens: int, shortest: TrimmedPrompt, room: int
) -> TrimmedPrompt:
    """Search between the unchanged prompt, which takes `tokens`, and `shortest`, which fits."""
    # The number of tokens falls almost linearly with the removed characters: interpolate, and halve every other time.
    too_few, over, best = 0, tokens - room, shortest
    halve = False
    while best.tokens < room and best.characters_left_out - too_few > 1:
        fraction = 0.5 if halve else over / (over + room - best.tokens)
        between = too_few + round((best.characters_left_out - too_few) * fraction)
        tried = cut(min(max(between, too_few + 1), best.characters_left_out - 1))
        if tried.tokens <= room:
            best = tried
        else:
            too_few, over = tried.characters_left_out, tried.tokens - room
        halve = not halve
    return best


def _trimmable_spans(prompt: str) -> list[range]:
    """Return the trimmable spans, in trimming order; they do not overlap."""
    end = start_of_question(prompt)
    # Prompts of `prmkit.prompts.step`: the step that is judged first, then the steps between the task and it.
    if steps := list(_STEP.finditer(prompt, 0, end)):
        last, task_end = steps[-1], prompt.find("</task>\n", 0, steps[-1].start())
        earlier = range(task_end + len("</task>\n") if task_end >= 0 else steps[0].start(), last.start())
        return [range(last.end(), end), earlier]
    task = _TASK.search(prompt, 0, end)
    if task:
        start = task.end()
    else:
        first = _BLANK_LINE.search(prompt, len(prompt) - len(prompt.lstrip()), min(end, _LONGEST_QUESTION))
        start = first.end() if first else 0
    if clip := _CLIP.search(prompt, max(start - 1, 0), end):
        return [range(clip.end(), end), range(start, clip.start())]
    return [range(start, end)]


def judged_part(prompt: str) -> range | None:
    """Return the span of the step that a prompt asks about; None if there is no step or the format is unknown."""
    end = start_of_question(prompt)
    if steps := list(_STEP.finditer(prompt, 0, end)):
        closing = prompt.rfind("\n</step>", steps[-1].end() - 1, end)
        return range(steps[-1].end(), max(closing, steps[-1].end()) if closing >= 0 else end)
    clip = _CLIP.search(prompt, 0, end)
    return range(clip.end(), clip.end() + len(prompt[clip.end() : end].rstrip())) if clip else None


def start_of_question(prompt: str) -> int:
    """Find the start of the paragraphs that ask for the verdict: before the last schema or at the end of the prompt."""
    schemas = list(_SCHEMA.finditer(prompt))
    end = schemas[-1].start() if schemas else len(prompt)
    breaks = [match.end() for match in _BLANK_LINE.finditer(prompt, 0, end)]
    start = breaks.pop() if breaks and end - breaks[-1] <= _LONGEST_QUESTION else end
    while breaks and end - breaks[-1] <= _LONGEST_QUESTION and _ASKING.match(prompt, breaks[-1]):
        start = breaks.pop()
    return start


def _without(
    prompt: str, parts: list[range], encoding: EncodesPrompts, system: str | None, left_out: int
) -> TrimmedPrompt:
    """Remove `left_out` characters from the middle of the parts, as many as possible from the first one."""
    text, remaining = prompt, left_out
    for part in parts:
        here = min(remaining, len(part))
        if here:
            start = part.start + (len(part) - here) // 2
            mark = f" [... {here:,} characters left out here ...] "
            # Parts are shortened from last to first, so the offsets of earlier parts stay valid.
            text = text[:start] + mark + text[start + here :]
        remaining -= here
    return TrimmedPrompt(text, len(encoding.prompt_ids(text, system)), left_out)
