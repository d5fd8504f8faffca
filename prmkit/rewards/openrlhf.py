"""OpenRLHF: either `--reward.remote_url http://HOST:8000/get_reward` without any code, or a file:

# reward.py, for --reward.remote_url reward.py
from prmkit.rewards.openrlhf import make_reward_func
reward_func = make_reward_func("http://127.0.0.1:8000")
"""

from collections.abc import Callable, Sequence
from typing import Any

from prmkit.client import Judge, client_of
from prmkit.rewards.steps import reward_of_step


def make_reward_func(
    judge: str | Judge, *, aggregate: str = "min", unscored_reward: float | None = None
) -> Callable[..., dict[str, Any]]:
    """Make a `reward_func` for a reward file.

    OpenRLHF puts the returned values into tensors, where None and NaN stop or corrupt the training. A sample without a
    score gets `unscored_reward`, and `unscored` 1.0 in the logs; without `unscored_reward` it is an error.

    Args:
        judge: the URL of `serve_judge.py`, or a client.
        aggregate: min, mean, product or last.
        unscored_reward: for samples without a score.

    Raises:
        JudgeUnavailable, RequestRefused: raised by the returned function.
    """
    client = client_of(judge, aggregate)

    def reward_func(queries: Sequence[str], prompts: Sequence[str], labels: Any = None, **_more: Any) -> dict[str, Any]:
        import torch

        samples = [(prompt, _response(query, prompt)) for query, prompt in zip(queries, prompts, strict=True)]
        rewards = client.rewards(samples, aggregate=aggregate)
        values = torch.tensor([reward.number(unscored_reward) for reward in rewards])
        unscored = torch.tensor([float(reward.value is None) for reward in rewards])
        return {"rewards": values, "scores": values, "extra_logs": {"unscored": unscored}}

    return reward_func


def score_step(
    judge: str | Judge,
    task: str | Sequence[Any],
    history: Sequence[Any],
    step: Any,
    unscored_reward: float | None = None,
) -> float:
    """Return the score of one turn, for `AgentInstanceBase.step`; OpenRLHF sums the turns' rewards.

    Raises:
        JudgeUnavailable: the step has no reliable score, and there is no `unscored_reward`.
        RequestRefused: the arguments are not a step.
    """
    return reward_of_step(client_of(judge), step, task=task, history=list(history)).number(unscored_reward)


def _response(query: str, prompt: str) -> str:
    if not query.startswith(prompt):
        raise ValueError("a query does not begin with its prompt, so what the policy wrote is unknown")
    return query[len(prompt) :]
