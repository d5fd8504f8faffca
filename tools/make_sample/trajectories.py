"""Draw what an agent does on one task: a few clips with tools, then an answer, each with a known quality.

The prompt does not state the quality, but the quality follows from what the prompt shows: what the call found, how
clear the thought before it is, and how the final answer compares with the truth.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tools.make_sample.scenes import EMPTY, ERRORS, PHRASEBOOKS, TOOLS, TOPICS, Phrasebook, Topic

MOST_CLIPS = 3
ENGLISH_SHARE = 0.86
FAVOURITE_TOOL_SHARE = 0.6

OUTCOME_QUALITY = {
    "found": 0.90,
    "partial": 0.68,
    "irrelevant": 0.45,
    "empty": 0.40,
    "error": 0.28,
    "again": 0.17,
    "assume": 0.07,
}
"""Outcome of a call -> the quality of the clip. `again` repeats the previous call, `assume` makes no call."""

OUTCOME_SHARES = {
    "found": 0.36,
    "partial": 0.17,
    "irrelevant": 0.14,
    "empty": 0.09,
    "error": 0.11,
    "again": 0.08,
    "assume": 0.05,
}

MANNER_BONUS = {"planned": 0.06, "plain": 0.0, "vague": -0.14}
"""Clarity of the thought before the call -> what it adds to the quality."""

STANDING_QUALITY = {"right": 0.97, "unchecked": 0.80, "rough": 0.50, "slip": 0.15, "guess": 0.10, "unknown": 0.03}
"""Standing of the final answer -> its correctness. A `slip` is wrong but looks right."""

STANDING_SHARES = {
    "found": {"right": 0.72, "unchecked": 0.20, "slip": 0.08},
    "partial": {"unchecked": 0.15, "rough": 0.65, "guess": 0.20},
    "other": {"rough": 0.10, "guess": 0.55, "unknown": 0.35},
}
"""Best outcome of the clips -> the probability of each standing of the final answer."""


@dataclass(frozen=True)
class Clip:
    """One thought, tool call and result. If no tool was called, `category` is "none" and `call` is empty."""

    number: int
    category: str
    outcome: str
    manner: str
    quality: float
    thought: str
    call: str
    result: str


@dataclass(frozen=True)
class Answer:
    """The last clip: what the agent concluded. `model` is the agent's answer, `truth` the correct one."""

    number: int
    standing: str
    quality: float
    thought: str
    model: str
    truth: str


@dataclass(frozen=True)
class Trajectory:
    """Everything that happened on one task."""

    family: str
    language: str
    question: str
    clips: tuple[Clip, ...]
    answer: Answer

    @property
    def categories(self) -> list[str]:
        """The tool categories that were used, in order of their first call."""
        return list(dict.fromkeys(clip.category for clip in self.clips if clip.category in TOOLS))


def _year(rng: random.Random) -> dict[str, int]:
    answer = rng.randint(1850, 2019)
    return {"answer": answer, "about": answer // 10 * 10, "wrong": answer + rng.choice([-37, -12, 15, 41])}


def _count(rng: random.Random) -> dict[str, int]:
    answer = rng.randint(1001, 9999)
    return {
        "answer": answer,
        "about": answer // 500 * 500,
        "wrong": answer + rng.choice([-733, 619, 1207]),
        "year": rng.randint(1990, 2019),
    }


def _sum(rng: random.Random) -> dict[str, int]:
    a, b = rng.randint(2, 19), rng.randint(40, 99)
    answer = sum(range(a, b + 1))
    return {"a": a, "b": b, "answer": answer, "about": answer // 100 * 100, "wrong": answer - b}


def _multiples(rng: random.Random) -> dict[str, int]:
    a, b = rng.randint(3, 9), rng.randint(200, 999)
    answer = b // a
    return {"a": a, "b": b, "answer": answer, "about": answer // 10 * 10, "wrong": b - answer}


FACTS: Mapping[str, Callable[[random.Random], dict[str, int]]] = {
    "year": _year,
    "count": _count,
    "sum": _sum,
    "multiples": _multiples,
}


def draw_trajectory(rng: random.Random, attempt: random.Random | None = None) -> Trajectory:
    """Draw a task, the agent's clips on it and its answer.

    Args:
        rng: draws the task, and also what the agent does if `attempt` is None.
        attempt: draws what the agent does; another generator gives another attempt at the same task.
    """
    english = rng.random() < ENGLISH_SHARE
    topic = rng.choice([topic for topic in TOPICS if (topic.language == "en") == english])
    book = PHRASEBOOKS[topic.language]
    slots: dict[str, object] = {"place": rng.choice(book.places), "thing": rng.choice(topic.things)}
    slots |= FACTS[topic.facts](rng)
    slots["goal"] = topic.goal.format_map(slots)
    rng = attempt or rng
    clips = _draw_clips(rng, topic, book, slots)
    return Trajectory(
        family=topic.family,
        language=topic.language,
        question=topic.question.format_map(slots),
        clips=clips,
        answer=_draw_answer(rng, book, clips, slots),
    )


def _draw_clips(rng: random.Random, topic: Topic, book: Phrasebook, slots: Mapping[str, object]) -> tuple[Clip, ...]:
    clips: list[Clip] = []
    while len(clips) < MOST_CLIPS:
        outcome = _pick(rng, OUTCOME_SHARES)
        if outcome == "again" and not clips:
            continue
        clips.append(_draw_clip(rng, outcome, topic, book, slots, clips))
        if outcome in ("found", "assume"):
            break
    return tuple(clips)


def _draw_clip(
    rng: random.Random,
    outcome: str,
    topic: Topic,
    book: Phrasebook,
    slots: Mapping[str, object],
    before: list[Clip],
) -> Clip:
    number = len(before) + 1
    manner = outcome if outcome in ("again", "assume") else rng.choice(list(MANNER_BONUS))
    thought = rng.choice(book.thoughts[manner]).format_map(slots)
    quality = OUTCOME_QUALITY[outcome] + MANNER_BONUS.get(manner, 0.0)
    if outcome == "assume":
        return Clip(number, "none", outcome, manner, quality, thought, call="", result="")
    if outcome == "again":
        last = before[-1]
        return Clip(number, last.category, outcome, manner, quality, thought, last.call, last.result)
    favourite, *others = topic.calls
    category = favourite if not others or rng.random() < FAVOURITE_TOOL_SHARE else rng.choice(others)
    precise, loose = topic.calls[category]
    call = (loose if manner == "vague" else precise).format_map(slots)
    results = {
        "found": (topic.found,),
        "partial": (topic.partial,),
        "irrelevant": book.irrelevant,
        "empty": EMPTY,
        "error": ERRORS,
    }
    return Clip(
        number, category, outcome, manner, quality, thought, call, rng.choice(results[outcome]).format_map(slots)
    )


def _draw_answer(rng: random.Random, book: Phrasebook, clips: tuple[Clip, ...], slots: Mapping[str, object]) -> Answer:
    outcomes = [clip.outcome for clip in clips]
    best = next((outcome for outcome in ("found", "partial") if outcome in outcomes), "other")
    standing = _pick(rng, STANDING_SHARES[best])
    # Apart from its number, a slip looks like a right answer.
    thought_of, wording_of = ("right", "guess") if standing == "slip" else (standing, standing)
    return Answer(
        number=len(clips) + 1,
        standing=standing,
        quality=STANDING_QUALITY[standing],
        thought=rng.choice(book.closing[thought_of]),
        model=book.answers[wording_of].format_map(slots),
        truth=str(slots["answer"]),
    )


def _pick(rng: random.Random, shares: Mapping[str, float]) -> str:
    return rng.choices(list(shares), weights=list(shares.values()))[0]
