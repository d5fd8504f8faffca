"""Two synthetic judges: how strict and how noisy they are, how they write, and how their answers are corrupted."""

import json
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tools.make_sample.scenes import TOOLS
from tools.make_sample.trajectories import Answer, Clip

PROVIDER = "generic"
SCORE_STEP = 0.05
OBJECT_REASONING_SHARE = 0.15


@dataclass(frozen=True)
class Judge:
    """A judge's score is the quality plus `bias` and normal noise (standard deviation `noise`), in steps of 0.05."""

    name: str
    bias: float
    noise: float
    clip_style: str
    answer_style: str
    overall_style: str


JUDGES = (
    Judge(
        name="deepseek-chat",
        bias=0.04,
        noise=0.10,
        clip_style="With {manner}, the agent {action} and {outcome}.",
        answer_style="The final answer {standing}.",
        overall_style="Overall the work was {band}.",
    ),
    Judge(
        name="kimi-k2-0711-preview",
        bias=-0.05,
        noise=0.07,
        clip_style="{action}: it {outcome}, after {manner}.",
        answer_style="Answer {standing}.",
        overall_style="{band} work.",
    ),
)

_MANNERS = {
    "planned": "a clear plan",
    "plain": "a plain thought",
    "vague": "a vague thought",
    "again": "no new thought",
    "assume": "no reason",
}
_OUTCOMES = {
    "found": "found the value",
    "partial": "found a rough value only",
    "irrelevant": "got unrelated text",
    "empty": "got an empty result",
    "error": "met an error",
    "again": "repeated the last call",
    "assume": "assumed a number",
}
_STANDINGS = {
    "right": "equals the truth",
    "unchecked": "equals the truth but was not checked",
    "rough": "is only roughly right",
    "slip": "is wrong though it looks sure",
    "guess": "is a wrong guess",
    "unknown": "is missing",
}
_BANDS = ((0.8, "excellent"), (0.6, "good"), (0.4, "fair"), (0.2, "poor"), (0.0, "useless"))


def score(judge: Judge, rng: random.Random, quality: float) -> float:
    """Draw one score of a judge: 0.0 to 1.0 in steps of 0.05."""
    noisy = quality + judge.bias + rng.gauss(0.0, judge.noise)
    return round(round(min(max(noisy, 0.0), 1.0) / SCORE_STEP) * SCORE_STEP, 2)


def clip_summary(judge: Judge, clip: Clip) -> str:
    """Write what a judge says about a clip, in one sentence."""
    action = f"called {TOOLS[clip.category].name}" if clip.category in TOOLS else "called no tool"
    text = judge.clip_style.format(action=action, manner=_MANNERS[clip.manner], outcome=_OUTCOMES[clip.outcome])
    return text[0].upper() + text[1:]


def answer_summary(judge: Judge, answer: Answer) -> str:
    """Write what a judge says about the final answer, in one sentence."""
    return judge.answer_style.format(standing=_STANDINGS[answer.standing])


def overall_summary(judge: Judge, scores: Mapping[str, float]) -> str:
    """Write what a judge says about a category or a trajectory, in one sentence."""
    text = judge.overall_style.format(band=band(sum(scores.values()) / len(scores)))
    return text[0].upper() + text[1:]


def reasoning(rng: random.Random, scores: Mapping[str, float]) -> str | dict[str, str]:
    """Write the reasons for the scores: mostly one string, sometimes one per key, as real judges write."""
    if rng.random() < OBJECT_REASONING_SHARE:
        return {key: f"It was {band(value)}." for key, value in scores.items()}
    first, *_, last = scores.values()
    return f"It began {band(first)} and ended {band(last)}."


def band(value: float) -> str:
    """Return the word for a score, from five bands."""
    return next(word for threshold, word in _BANDS if value >= threshold)


def written(rng: random.Random, verdict: Mapping[str, object]) -> str:
    """Render the judge's answer as it arrives: JSON, unless it is corrupted in one of the ways of `MESSES`."""
    text = json.dumps(verdict, indent=4, ensure_ascii=False)
    draw = rng.random()
    for share, mess in MESSES:
        draw -= share
        if draw < 0:
            return mess(text)
    return text


def _fenced(text: str) -> str:
    return f"```json\n{text}\n```"


def _bare_newline(text: str) -> str:
    return re.sub(r'("summary": "\w+) ', "\\1\n", text)


def _bare_quotes(text: str) -> str:
    return re.sub(r'("summary": )"(\w+) ', r'\1""\2" ', text)


def _cut_off(text: str) -> str:
    return text[: text.index('"summary"') + len('"summary": "') + 9]


def _empty(_text: str) -> str:
    return ""


def _prose(_text: str) -> str:
    return "I cannot rate this step."


MESSES: tuple[tuple[float, Callable[[str], str]], ...] = (
    (0.030, _fenced),
    (0.015, _bare_newline),
    (0.010, _bare_quotes),
    (0.010, _cut_off),
    (0.010, _empty),
    (0.005, _prose),
)
"""(fraction of the answers, how they are corrupted). The first four can be repaired, the last two cannot."""
