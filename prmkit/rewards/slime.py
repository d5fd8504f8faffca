"""slime: either `--rm-type remote_rm --rm-url http://HOST:8000/reward --reward-key score`, or a function:

# my_rm.py, for --custom-rm-path my_rm.judge_rm --reward-key score
from prmkit.rewards.slime import make_custom_rm
judge_rm = make_custom_rm("http://127.0.0.1:8000")
"""

from collections.abc import Awaitable, Callable
from typing import Any

from prmkit.client import Judge, client_of


def make_custom_rm(
    judge: str | Judge, *, aggregate: str = "min", unscored_reward: float | None = None
) -> Callable[..., Awaitable[dict[str, Any]]]:
    """Make an async `custom_rm(args, sample)`. It returns an object; `--reward-key score` selects the number.

    slime accepts any JSON as a reward. A sample without a score gets `unscored_reward` and `unscored` true; without
    `unscored_reward` it is an error, which stops the rollout.

    Raises:
        JudgeUnavailable, RequestRefused: raised by the returned function.
    """
    client = client_of(judge, aggregate)

    async def custom_rm(_args: Any, sample: Any, **_more: Any) -> dict[str, Any]:
        (reward,) = await client.arewards([(sample.prompt, sample.response)], aggregate=aggregate)
        value = reward.number(unscored_reward)
        return {"score": value, "unscored": reward.value is None, "steps": list(reward.steps)}

    return custom_rm
