"""verifiers 0.4 (and prime-rl): a reward of a Task, set in the class or in its config.

class MyTask(vf.Task):
    judged = make_reward("http://127.0.0.1:8000")
"""

from collections.abc import Awaitable, Callable
from typing import Any

from prmkit.client import Judge, client_of


def make_reward(judge: str | Judge, *, aggregate: str = "min", weight: float = 1.0) -> Callable[..., Awaitable[float]]:
    """Make a reward named `judge_reward`; the step scores are in `trace.info["judge_steps"]`.

    Only what the model wrote in the last branch of the trace is judged; the agent's messages in the prompt are context.
    A step without a score is an error of the task, which verifiers distinguishes from a reward of 0.

    Args:
        judge: the URL of `serve_judge.py`, or a client.
        aggregate: min, mean, product or last.
        weight: the weight of this reward among the task's rewards.

    Raises:
        JudgeUnavailable, RequestRefused: raised by the returned function.
    """
    import verifiers.v1 as vf

    client = client_of(judge, aggregate)

    @vf.reward(weight=weight)  # type: ignore[untyped-decorator]
    async def judge_reward(*_task: Any, trace: Any) -> float:
        nodes = trace.branches[-1].nodes if trace.branches else []
        first = next((index for index, node in enumerate(nodes) if node.sampled), len(nodes))
        messages = [node.message.model_dump(exclude_none=True) for node in nodes]
        (reward,) = await client.arewards([(messages[:first], messages[first:])], aggregate=aggregate)
        trace.info["judge_steps"] = list(reward.steps)
        return reward.number(None)

    return judge_reward  # type: ignore[no-any-return]
