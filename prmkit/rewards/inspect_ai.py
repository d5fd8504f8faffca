"""Inspect AI: `scorer=judge_scorer(url)` in a Task."""

from typing import Any

from prmkit.client import Judge, client_of
from prmkit.rewards.steps import reward_of
from prmkit.verdict import AGGREGATES


def judge_scorer(judge: str | Judge, *, aggregate: str = "min") -> Any:
    """Return a scorer that judges what the model wrote; the score's metadata has the score of each step.

    The messages of the sample's input, including the agent's in examples, are context and are not scored. A sample in
    which the model wrote nothing, or with a step that has no score, is `Score.unscored`: Inspect leaves it out of its
    metrics and counts it.

    Args:
        judge: the URL of `serve_judge.py`, or a client.
        aggregate: min, mean, product or last.

    Raises:
        JudgeUnavailable, RequestRefused: raised when a sample is scored.
    """
    import asyncio

    from inspect_ai.scorer import Score, mean, scorer, stderr

    client = client_of(judge, aggregate)

    @scorer(metrics=[mean(), stderr()], name="prmkit_judge")  # type: ignore[untyped-decorator]
    def scores_of_judge() -> Any:
        async def score(state: Any, _target: Any) -> Any:
            messages = [message.model_dump(exclude_none=True) for message in state.messages]
            given = [place for place, message in enumerate(messages) if message.get("source") == "input"]
            first = max(given, default=-1) + 1
            said = (message for message in messages[first:] if message["role"] == "assistant")
            if not any(message.get("content") or message.get("tool_calls") for message in said):
                return Score.unscored(explanation="the model wrote nothing")
            (run,) = await asyncio.to_thread(client.score_run, {"messages": messages})
            steps = [step for step in run["steps"] if step["source_index"] >= first]
            scores = [value for step in steps if (value := reward_of(step).value) is not None]
            if not scores or len(scores) < len(steps):
                return Score.unscored(explanation="a step has no reliable score")
            first_bad = next((step["step"] for step in steps if step["bad"]), None)
            return Score(value=AGGREGATES[aggregate](scores), metadata={"steps": scores, "first_bad": first_bad})

        return score

    return scores_of_judge()
