"""Inspect AI: `scorer=judge_scorer(url)` in a Task."""

from typing import Any

from prmkit.client import Judge, client_of


def judge_scorer(judge: str | Judge, *, aggregate: str = "min") -> Any:
    """Make a scorer that judges the messages of a sample; the score's metadata has the score of each step.

    A sample in which the model wrote nothing, or with a step that has no score, is `Score.unscored`: Inspect excludes
    it from its metrics, and counts it.

    Args:
        judge: the URL of `serve_judge.py`, or a client.
        aggregate: min, mean, product or last.

    Raises:
        JudgeUnavailable, RequestRefused: raised when a sample is scored.
    """
    import asyncio

    from inspect_ai.scorer import Score, mean, scorer, stderr

    client = client_of(judge)

    @scorer(metrics=[mean(), stderr()], name="prmkit_judge")  # type: ignore[untyped-decorator]
    def scores_of_judge() -> Any:
        async def score(state: Any, _target: Any) -> Any:
            messages = [message.model_dump(exclude_none=True) for message in state.messages]
            answers = (message for message in messages if message["role"] == "assistant")
            if not any(message.get("content") or message.get("tool_calls") for message in answers):
                return Score.unscored(explanation="the model wrote nothing")
            (run,) = await asyncio.to_thread(client.score_run, {"messages": messages})
            steps = [step["score"] if step["status"] == "ok" else None for step in run["steps"]]
            value = run["aggregates"][aggregate]
            if value is None:
                return Score.unscored(explanation="a step has no reliable score")
            return Score(value=value, metadata={"steps": steps, "first_bad": run["first_bad"]})

        return score

    return scores_of_judge()
