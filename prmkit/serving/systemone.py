"""Answer typed questions about a state with probabilities: the `/v1/systemone` API of decision-model servers.

The state is the end of a run: the agent's task, and its output.

A question is about one score key of the judge's rubric. Its type sets the type of the answer: `score` over ordered
levels, `choice` among levels, or `noul` (yes or no). The levels are ranges of the judge's 101 scores.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from prmkit.errors import DataError
from prmkit.judge.types import Distribution
from prmkit.serving.payloads import run_of_policy, run_of_step, runs_in
from prmkit.trajectories.content import is_message_list
from prmkit.trajectory import Trajectory

MOST_LEVELS = 101
"""The number of scores on the judge's scale."""


# --- the state --------------------------------------------------------------------------------------------------------

_TASK = ("task", "input", "inputs", "query", "question", "prompt")
_STEP = ("step", "submission", "output", "outputs", "response", "answer")
_NEVER_SHOWN = {"expectations", "guidelines", "reference", "reference_submission", "solution"}


def run_of_state(state: Any) -> tuple[Trajectory, list[str]]:
    """Return the run in a state, and the names of parts that the judge does not get, for example a solution.

    Raises:
        DataError: there is no run in the state.
    """
    if isinstance(state, dict):
        task, step = _first_present(state, _TASK), _first_present(state, _STEP)
        if task and step:
            history = state.get("history") or []
            unused = sorted(state.keys() - {task, step, "thinking", "history"})
            return _run_of_parts(state[task], history, state[step], state.get("thinking")), unused
    if isinstance(state, dict | list):
        runs, _ = runs_in(state, None)
        if len(runs) == 1:
            return runs[0], sorted(_NEVER_SHOWN & set(state)) if isinstance(state, dict) else []
    raise DataError(
        "state must be a run in any format of import_trajectories.py, or an object with a task "
        f"({', '.join(_TASK)}) and an output ({', '.join(_STEP)})."
    )


def _first_present(state: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """Return the name of the first part that is not empty; 0 and false are not empty."""
    return next((name for name in names if state.get(name) not in (None, "", [], {})), None)


def _run_of_parts(task: Any, history: Any, output: Any, thinking: Any) -> Trajectory:
    inputs = _messages_in(task)
    answer = _messages_in(output) or [{"role": "assistant", "content": _text(output)}]
    if inputs and answer[: len(inputs)] == inputs:  # an agent's output may begin with its input
        answer = answer[len(inputs) :]
    if not answer or not isinstance(history, list):
        raise DataError("state: history must be a list of messages, and the agent's output must not be empty.")
    if thinking:
        answer = [*answer[:-1], {"reasoning_content": _text(thinking), **answer[-1]}]
    if inputs is None:
        return run_of_step({"task": _text(task), "history": history, "step": answer}, is_end=True)
    return run_of_policy([*inputs, *history], answer, includes_prompt=False)[0]


def _messages_in(value: Any) -> list[Any] | None:
    """Return the messages in an application's input or output; None if it is something else."""
    match value:
        case {"messages": list(messages)} if is_message_list(messages):
            return messages
        case {"choices": [{"message": dict(message)}, *_]}:
            return [message]
        case list() if is_message_list(value):
            return value
    return None


def _text(value: Any) -> str:
    """Return a value as text; an object with a single string, for example {"question": "…"}, as that string."""
    if isinstance(value, dict) and len(value) == 1:
        value = next(iter(value.values()))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# --- questions and answers --------------------------------------------------------------------------------------------


def key_of(name: str, question: Mapping[str, Any], keys: Sequence[str]) -> str:
    """Return the score key of a question.

    It is the key with the question's name, or the only key, or the only key mentioned in the instructions, because some
    clients give every question the same name.

    Raises:
        DataError: the rubric has several keys, and the question does not identify one of them.
    """
    if name in keys:
        return name
    mentioned = [key for key in keys if key in str(question.get("instructions"))] if len(keys) > 1 else keys
    if len(mentioned) == 1:
        return mentioned[0]
    raise DataError(
        f"questions.{name}: this judge scores {', '.join(keys)}. Use one of them as the question's name, or mention "
        "one in its instructions."
    )


def check_question(name: str, question: Any) -> None:
    """Check that a judge of steps can answer a question.

    Raises:
        DataError: the question has another type, or its levels cannot be ranges of scores.
    """
    if not isinstance(question, Mapping) or question.get("type") not in list(_ANSWERS):
        raise DataError(f"questions.{name}.type must be one of {', '.join(_ANSWERS)}.")
    criteria, kind = question.get("criteria"), question["type"]
    if kind == "score" and not (isinstance(criteria, list) and 2 <= len(criteria) <= MOST_LEVELS):
        raise DataError(
            f"questions.{name}.criteria must be a list of 2 to {MOST_LEVELS} level descriptions, lowest first."
        )
    if kind == "choice":
        _check_labels(name, criteria)


def _check_labels(name: str, criteria: Any) -> None:
    if not isinstance(criteria, Mapping) or not 2 <= len(criteria) <= MOST_LEVELS:
        raise DataError(f"questions.{name}.criteria must be an object with 2 to {MOST_LEVELS} choices.")
    if _numbers(criteria) is None:
        raise DataError(
            f"questions.{name}.criteria: this judge gives scores, so the names of choices must be numbers, for example "
            '"1" to "5" (the lowest is 0.00, the highest is 1.00). For other questions, use a judge trained for them.'
        )


def _numbers(labels: Mapping[str, Any]) -> list[float] | None:
    """Convert the names of choices to numbers; None unless they are different numbers."""
    try:
        numbers = [float(label) for label in labels]
    except ValueError:
        return None
    is_range = len(set(numbers)) == len(numbers) and all(map(math.isfinite, [*numbers, max(numbers) - min(numbers)]))
    return numbers if is_range else None


def answer_to(question: Mapping[str, Any], distribution: Distribution, threshold: float) -> dict[str, Any]:
    """Answer a question that passed `check_question`.

    Args:
        question: as the client sent it.
        distribution: the judge's distribution for the question's key, with `shares`.
        threshold: a step with at least this score is good.
    """
    shares = distribution.shares or ()
    mass = distribution.label_mass
    known = {"label_mass": mass, "value": round(distribution.mean, 6)}
    return {"type": question["type"], **_ANSWERS[question["type"]](question, shares, threshold), **known}


def _noul(_question: Mapping[str, Any], shares: Sequence[float], threshold: float) -> dict[str, Any]:
    good = math.fsum(share for hundredth, share in enumerate(shares) if hundredth / 100 >= threshold - 1e-9)
    return {"noul": min(good, 1.0)}


def _score(question: Mapping[str, Any], shares: Sequence[float], _threshold: float) -> dict[str, Any]:
    levels = question["criteria"]
    count = len(levels)
    chances = _by_level(shares, [level / (count - 1) for level in range(count)])
    expected = math.fsum(level * chance for level, chance in enumerate(chances))
    return {
        "score": expected,
        "confidence": max(chances),
        "probabilities": {str(level): chance for level, chance in enumerate(chances)},
        "legend": {str(level): meaning for level, meaning in enumerate(levels)},
    }


def _choice(question: Mapping[str, Any], shares: Sequence[float], _threshold: float) -> dict[str, Any]:
    labels = question["criteria"]
    numbers = _numbers(labels) or []
    low, high = min(numbers), max(numbers)
    chances = _by_level(shares, [(number - low) / (high - low) for number in numbers])
    best = max(range(len(chances)), key=chances.__getitem__)
    return {
        "choice": list(labels)[best],
        "confidence": chances[best],
        "probabilities": dict(zip(labels, chances, strict=True)),
    }


_ANSWERS = {"score": _score, "choice": _choice, "noul": _noul}


def _by_level(shares: Sequence[float], scores: Sequence[float]) -> list[float]:
    """Return the probability of each level; each score belongs to the nearest level, in a tie to the lower one."""
    order = sorted(range(len(scores)), key=scores.__getitem__)
    chances = [0.0] * len(scores)
    for hundredth, share in enumerate(shares):
        nearest = min(order, key=lambda level: (round(abs(scores[level] - hundredth / 100), 9), scores[level]))
        chances[nearest] += share
    total = math.fsum(chances)
    return [chance / total for chance in chances]
