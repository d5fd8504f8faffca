"""ms-swift: `swift rlhf --rlhf_type grpo --external_plugins plugin.py --reward_funcs judge`.

# plugin.py
from swift.rewards import orms
from prmkit.rewards.ms_swift import make_orm
orms["judge"] = make_orm("http://127.0.0.1:8000")
"""

from typing import Any

from prmkit.client import Judge, client_of
from prmkit.rewards.trl import reward_values


def make_orm(judge: str | Judge, *, aggregate: str = "min") -> type:
    """Make a subclass of `swift.rewards.ORM`.

    ms-swift turns None into 0, so a completion without a score gets the mean of its group (the completions with the
    same `prompt_id`). In a group without any score, all rewards stay None.

    Args:
        judge: the URL of `serve_judge.py`, or a client.
        aggregate: min, mean, product or last.

    Raises:
        JudgeUnavailable, RequestRefused: raised by the returned class when it is called.
    """
    from swift.rewards import ORM

    client = client_of(judge, aggregate)

    class JudgeORM(ORM):  # type: ignore[misc]
        """The reward of a served judge."""

        def __call__(self, completions: list[str], **given: Any) -> list[float | None]:
            conversations = given["messages"]
            samples = [
                (before_answer(messages), text) for messages, text in zip(conversations, completions, strict=True)
            ]
            rewards = client.rewards(samples, aggregate=aggregate)
            return reward_values(given.get("prompt_id") or [prompt for prompt, _ in samples], rewards, fill=True)

    return JudgeORM


def before_answer(messages: Any) -> list[Any]:
    """Return the conversation without the answer that ms-swift has appended."""
    is_answered = bool(messages) and messages[-1].get("role") == "assistant"
    return list(messages[:-1] if is_answered else messages)
