"""Per-step rewards, for frameworks that support them: SkyRL, ROLL and NeMo-RL environments, AReaL, verifiers.

rewards = step_rewards(judge, {"messages": messages})       # one per message of the agent
client.set_reward(completion_id, rewards[-1])               # AReaL
return {"reward": rewards[-1], …}                           # Env.step of SkyRL
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prmkit.client import Judge, JudgeUnavailable, RequestRefused, Reward, client_of


def step_rewards(judge: str | Judge, run: Any, *, unscored_reward: float | None = None) -> list[float]:
    """Return the score of every step of a run.

    Args:
        judge: the URL of `serve_judge.py`, or a client.
        run: one run, in any format that `import_trajectories.py` reads.
        unscored_reward: for steps without a score; with None, such a step is an error.

    Raises:
        JudgeUnavailable: a step has no score, and there is no `unscored_reward`.
        RequestRefused: `run` is not exactly one run.
    """
    client = client_of(judge)
    runs = client.score_run(run)
    if len(runs) != 1:
        raise RequestRefused(f"{len(runs)} runs instead of one. Call step_rewards once per run.")
    (found,) = runs
    return [reward_of(step).number(unscored_reward) for step in found["steps"]]


def reward_of(line: Mapping[str, Any]) -> Reward:
    """Return the reward of one scored step from `Judge.score` or `Judge.score_run`; an unsure score counts as none.

    Raises:
        JudgeUnavailable: a server failed or memory ran out.
        RequestRefused: the step can never be scored.
    """
    if line["status"] == "failed":
        raise JudgeUnavailable(f"the judge could not score a step: {line.get('reason')}")
    if line["status"] == "error":
        raise RequestRefused(f"this step can never be scored: {line.get('reason')}")
    value = line["score"] if line["status"] == "ok" else None
    return Reward(value, (value,), line["label_mass"], line.get("reason"))


def reward_of_step(judge: Judge, step: Mapping[str, Any] | Sequence[Mapping[str, Any]], **asked: Any) -> Reward:
    """Return the reward of one step (a message of the agent, with its results); it has no value for an empty message.

    Args:
        judge: the client.
        step: the message, or a list with it and its results.
        asked: `task`, `history` and `last`, as for `Judge.score`.

    Raises:
        JudgeUnavailable, RequestRefused: see `reward_of`.
    """
    messages = list(step) if isinstance(step, list | tuple) else [step]
    said = [each for each in messages if isinstance(each, Mapping) and each.get("role") == "assistant"]
    parts = [message[name] for message in said for name in message if name not in ("role", "name")]
    if said and not any(part.strip() if isinstance(part, str) else part for part in parts):
        return Reward(None, (), None, "the policy wrote nothing")
    (line,) = judge.score([{**asked, "step": messages}])
    return reward_of(line)


def discounted_returns(rewards: Sequence[float], gamma: float) -> list[float]:
    """Return the sum of the rewards from each step on, discounted by `gamma` per step."""
    returns: list[float] = []
    for reward in reversed(rewards):
        returns.append(reward + gamma * (returns[-1] if returns else 0.0))
    return returns[::-1]


def evaluation_events(run: Mapping[str, Any], name: str = "step_score") -> Iterator[dict[str, Any]]:
    """Yield the attributes of an OpenTelemetry `gen_ai.evaluation.result` event for each scored step of a run.

    Args:
        run: an object from `Judge.score_run`.
        name: the metric's name.
    """
    for step in run["steps"]:
        if step["status"] == "ok":
            yield {
                "gen_ai.evaluation.name": name,
                "gen_ai.evaluation.score.value": step["score"],
                "gen_ai.evaluation.score.label": "bad" if step["bad"] else "good",
            }


def send_to_langfuse(
    langfuse: Any, run: Mapping[str, Any], trace_id: str, observation_ids: Sequence[str], name: str = "step_score"
) -> int:
    """Write the score of every scored step to its observation in Langfuse.

    A score that is sent again replaces the previous one. The client sends in the background: flush it before exiting.

    Args:
        langfuse: a `langfuse.Langfuse` client.
        run: an object from `Judge.score_run`.
        trace_id: the run's trace id.
        observation_ids: the steps' observation ids, in order.
        name: the score's name.

    Returns:
        The number of scores that were passed to the client.

    Raises:
        ValueError: the numbers of observations and steps differ.
    """
    if len(observation_ids) != len(run["steps"]):
        raise ValueError(f"{len(observation_ids)} observations for {len(run['steps'])} steps")
    scored = [pair for pair in zip(run["steps"], observation_ids, strict=True) if pair[0]["status"] == "ok"]
    for step, observation in scored:
        langfuse.create_score(
            name=name, value=step["score"], trace_id=trace_id, observation_id=observation, data_type="NUMERIC",
            score_id=f"{trace_id}-{observation}-{name}",
        )  # fmt: skip
    return len(scored)
