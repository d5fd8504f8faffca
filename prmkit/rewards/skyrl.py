"""SkyRL: an environment whose reward for every turn includes the judge's score.

from skyrl_gym.envs import register
JudgedSearch = make_env(SearchEnv, "http://127.0.0.1:8000")
register(id="judged-search", entry_point="my_module:JudgedSearch")
"""

from typing import Any

from prmkit.client import Judge, RequestRefused, client_of
from prmkit.rewards.steps import reward_of_step


def make_env(
    environment: type, judge: str | Judge, *, weight: float = 1.0, unscored_reward: float | None = None
) -> type:
    """Make a subclass of a `BaseTextEnv` that adds `weight` times the judge's score to the reward of each turn.

    SkyRL puts the reward of a turn on its last token, so the step scores reach the policy unchanged. The judge gets the
    turn, the messages before it, and the observations with role `tool` that it caused. It gets an observation with role
    `user` with the next turn.

    Args:
        environment: the class to extend.
        judge: the URL of `serve_judge.py`, or a client.
        weight: the weight of the judge's score.
        unscored_reward: the score to use for a turn without a score; with None, such a turn is an error.

    Raises:
        JudgeUnavailable, RequestRefused: in `step`, and in `init` if the prompt has no message of the user.
    """
    client = client_of(judge)

    class JudgedEnv(environment):  # type: ignore[misc]
        """The environment with a served judge's rewards."""

        def init(self, prompt: list[dict[str, Any]]) -> Any:
            messages, info = super().init(prompt)
            self._judged = list(messages)
            if not any(message["role"] == "user" for message in messages):
                raise RequestRefused("the prompt has no message of role user, so the judge would not know the task.")
            return messages, info

        def step(self, action: str) -> Any:
            output = super().step(action)
            turn = {"role": "assistant", "content": output.get("postprocessed_action") or action}
            observations = list(output["observations"] or ())
            score = self._score(turn, observations, is_last=output["done"])
            self._judged += [turn, *observations]
            output["reward"] = float(output["reward"]) + weight * score
            return output

        def _score(self, turn: dict[str, Any], answers: list[dict[str, Any]], *, is_last: bool) -> float:
            task = next(place for place, message in enumerate(self._judged) if message["role"] == "user")
            results = [message for message in answers if message["role"] == "tool"]
            asked = {"task": self._judged[task]["content"], "history": self._judged[:task] + self._judged[task + 1 :]}
            reward = reward_of_step(client, [turn, *results], **asked, last=bool(is_last))
            return reward.number(unscored_reward)

    return JudgedEnv
