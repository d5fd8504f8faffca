"""OpenRLHF. Either `--reward.remote_url http://HOST:8000/get_reward` and no code at all, or a file:

# reward.py, for --reward.remote_url reward.py
from prmkit.rewards.openrlhf import make_reward_func
reward_func = make_reward_func("http://127.0.0.1:8000")
"""

from collections.abc import Callable, Sequence
from typing import Any

from prmkit.client import Judge, client_of
from prmkit.rewards.steps import reward_of


def make_reward_func(
    judge: str | Judge, *, aggregate: str = "min", unscored_reward: float | None = None
) -> Callable[..., dict[str, Any]]:
    """A `reward_func` of a reward file.

    OpenRLHF puts what comes back into tensors, where None and NaN end or poison the training. A sample without a score
    gets the reward that was named here, and `unscored` 1.0 in the logs; without one it is an error.

    Args:
        judge: the URL of `serve_judge.py`, or a client.
        aggregate: min, mean, product or last.
        unscored_reward: for samples without a score.

    Raises:
        JudgeUnavailable, RequestRefused: in the function that is returned.
    """
    client = client_of(judge)

    def reward_func(queries: Sequence[str], prompts: Sequence[str], labels: Any = None, **_more: Any) -> dict[str, Any]:
        import torch

        samples = [(prompt, _response(query, prompt)) for query, prompt in zip(queries, prompts, strict=True)]
        rewards = client.rewards(samples, aggregate=aggregate)
        values = torch.tensor([reward.number(unscored_reward) for reward in rewards])
        unscored = torch.tensor([float(reward.value is None) for reward in rewards])
        return {"rewards": values, "scores": values, "extra_logs": {"unscored": unscored}}

    return reward_func


def score_step(
    judge: str | Judge, task: str, history: Sequence[Any], step: Any, unscored_reward: float | None = None
) -> float:
    """The score of one turn, for `AgentInstanceBase.step`; OpenRLHF sums the turns' rewards.

    Raises:
        JudgeUnavailable: the step has no score that can be relied on, and no reward was named for that.
        RequestRefused: it is not a step.
    """
    client = client_of(judge)
    (line,) = client.score([{"task": task, "history": list(history), "step": step}])
    return reward_of(line).number(unscored_reward)


def _response(query: str, prompt: str) -> str:
    if not query.startswith(prompt):
        raise ValueError("a query does not begin with its prompt, so it is not known what the policy wrote")
    return query[len(prompt) :]
