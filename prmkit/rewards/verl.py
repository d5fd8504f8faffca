"""verl: `reward.custom_reward_function.path=reward.py name=compute_score`.

# reward.py
from prmkit.rewards.verl import make_compute_score
compute_score = make_compute_score("http://127.0.0.1:8000")
"""

from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any

from prmkit.client import Judge, client_of

_PROMPTS = ("messages", "prompt", "raw_prompt", "question")
"""Names under which a dataset or an agent loop may keep the policy's prompt, which verl itself does not pass on."""


def make_compute_score(
    judge: str | Judge, *, aggregate: str = "min", unscored_reward: float | None = None
) -> Callable[..., Awaitable[dict[str, float]]]:
    """Make an async `compute_score` for verl's naive, dapo and similar reward managers.

    verl needs the same keys from every sample and a number in each, so a sample without a score has `unscored: 1.0` and
    `unscored_reward`. Without `unscored_reward` it is an error: verl does not retry, and the training stops.

    Args:
        judge: the URL of `serve_judge.py`, or a client.
        aggregate: min, mean, product or last.
        unscored_reward: for samples without a score.

    Raises:
        ValueError: raised by the returned function if `extra_info` does not have the prompt under one of these names.
        JudgeUnavailable, RequestRefused: raised by the returned function.
    """
    client = client_of(judge, aggregate)

    async def compute_score(
        data_source: Any = None,
        solution_str: str = "",
        ground_truth: Any = None,
        extra_info: Mapping[str, Any] | None = None,
        **_more: Any,
    ) -> dict[str, float]:
        prompts = [extra_info.get(name) for name in _PROMPTS] if extra_info else []
        # A prompt may be a NumPy array, whose truth value raises an error, or NaN if it is missing.
        prompt = next((each for each in prompts if isinstance(each, Collection) and len(each)), None)
        if prompt is None:
            raise ValueError(f"extra_info does not have the policy's prompt. Add it as one of {', '.join(_PROMPTS)}.")
        prompt = prompt if isinstance(prompt, str) else [dict(message) for message in prompt]
        (reward,) = await client.arewards([(prompt, solution_str)], aggregate=aggregate)
        return {
            "score": reward.number(unscored_reward),
            "unscored": float(reward.value is None),
            "label_mass": -1.0 if reward.label_mass is None else reward.label_mass,
            "steps": float(len(reward.steps)),
        }

    return compute_score
