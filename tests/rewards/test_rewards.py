"""Each adapter with what its framework passes, and with a step that has no score."""

import asyncio
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from serving_stub import StubScorer, running_server

from prmkit.client import Judge, JudgeUnavailable, RequestRefused, Reward
from prmkit.errors import DataError, UsageError
from prmkit.rewards import openrlhf
from prmkit.rewards.openrlhf import score_step
from prmkit.rewards.skyrl import make_env
from prmkit.rewards.slime import make_custom_rm
from prmkit.rewards.steps import discounted_returns, evaluation_events, send_to_langfuse, step_rewards
from prmkit.rewards.trl import make_reward_func, reward_values
from prmkit.rewards.verl import make_compute_score
from prmkit.verdict import AGGREGATES

GOOD, POOR, CLOSE = 0.9, 0.2, 0.03
RUN = {
    "messages": [
        {"role": "user", "content": "Do it."},
        {"role": "assistant", "content": "good"},
        {"role": "assistant", "content": "bad"},
    ]
}


def near(*values: float | None) -> Any:
    return [value if value is None else pytest.approx(value, abs=CLOSE) for value in values]


def test_trl_none_where_trl_leaves_it_out_and_the_mean_of_the_group_where_it_would_be_zero(judge_url: str) -> None:
    prompts = ["a"] * 3 + ["b"] * 2
    completions = ["good", "mumble", "bad", "mumble", "mumble 2"]
    columns = {"completion_ids": [[1]] * 5, "trainer_state": None, "answer": ["x"] * 5}
    for chosen, expected in (("none", (GOOD, None, POOR, None, None)), ("group_mean", (GOOD, 0.55, POOR, None, None))):
        reward = make_reward_func(judge_url, when_unscored=chosen)  # type: ignore[arg-type]
        assert reward(prompts=prompts, completions=completions, **columns) == near(*expected)
    conversational = make_reward_func(judge_url)(
        prompts=[[{"role": "user", "content": "Do it."}]], completions=[[{"role": "assistant", "content": "good"}]]
    )
    assert conversational == near(GOOD)


@pytest.mark.parametrize("nothing", ["", "  \n", "<|im_end|>", [], [{"role": "assistant", "content": ""}]])
def test_a_policy_that_writes_nothing_gets_no_score_and_does_not_end_the_training(judge_url: str, nothing: Any) -> None:
    for prompt in ("What?", "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n", RUN["messages"][:1]):
        judge = make_reward_func(judge_url, when_unscored="group_mean")
        assert judge(prompts=[prompt] * 2, completions=["good", nothing]) == near(GOOD, GOOD)
        assert Judge(judge_url).reward(prompt, nothing) == Reward(None, (), None)


def test_an_empty_step_never_gets_the_score_of_another(judge_url: str) -> None:
    judge, empty = Judge(judge_url), {"role": "assistant", "content": ""}
    (line,) = judge.score([{"task": "Do it.", "history": RUN["messages"][1:2], "step": empty}])
    assert line["score"] is None and "must contain an assistant message with text or a tool call" in line["reason"]
    # And one in the prompt does not count as a step, so that the policy's first step would be taken for the prompt's.
    earlier = [*RUN["messages"][:1], empty, *RUN["messages"][:1]]
    assert judge.reward(earlier, "bad").steps == tuple(near(POOR))
    chat = "<|im_start|>assistant\n<|im_end|>\n<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    assert judge.reward(chat, "bad<|im_end|>").steps == tuple(near(POOR))


def test_the_mean_of_a_group_stays_in_its_group() -> None:
    rewards = [Reward(value, (), None) for value in (0.2, None, None, 0.8, 0.6)]
    assert reward_values(["a", "a", "b", "b", "b"], rewards, fill=True) == pytest.approx([0.2, 0.2, 0.7, 0.8, 0.6])


def test_verl_gets_the_same_keys_from_every_sample(judge_url: str) -> None:
    compute = make_compute_score(judge_url, unscored_reward=0.5)

    def score(solution: str, **extra: Any) -> dict[str, float]:
        given = {"data_source": "x", "ground_truth": None, "reward_router_address": None}
        return asyncio.run(compute(solution_str=solution, extra_info=extra, **given))  # type: ignore[arg-type]

    good, unsure = score("good", prompt=RUN["messages"][:1]), score("mumble", question="What?")
    assert good.keys() == unsure.keys() and all(type(value) is float for value in [*good.values(), *unsure.values()])
    assert good["score"] == pytest.approx(GOOD, abs=CLOSE) and (unsure["score"], unsure["unscored"]) == (0.5, 1.0)
    with pytest.raises(ValueError, match="extra_info does not have the policy's prompt"):
        score("good", num_turns=2)
    with pytest.raises(JudgeUnavailable):
        asyncio.run(make_compute_score(judge_url)(solution_str="mumble", extra_info={"prompt": "What?"}))


def test_what_a_policy_or_a_data_set_leaves_in_messages_does_not_end_the_training(judge_url: str) -> None:
    """An emoji that was cut, a column without a value; NaN as a reward would reach every weight."""
    judge = Judge(judge_url)
    assert make_reward_func(judge)(["What?"], ["good \ud83d"]) == near(GOOD)
    extra = {"messages": float("nan"), "question": "What?"}
    found = asyncio.run(make_compute_score(judge)(solution_str="good \udca9", extra_info=extra))
    assert found["score"] == pytest.approx(GOOD, abs=CLOSE)
    with pytest.raises(RequestRefused, match="cannot be sent as JSON"):
        judge.reward([{"role": "user", "content": "What?", "weight": float("nan")}], "good")
    for odd in (float("nan"), "0"):
        with pytest.raises(UsageError, match="but it must be a number"):
            asyncio.run(make_compute_score(judge, unscored_reward=odd)(solution_str="", extra_info=extra))


def test_slime_gets_an_object(judge_url: str) -> None:
    def reward(response: str, **settings: Any) -> dict[str, Any]:
        sample = SimpleNamespace(prompt="What?", response=response, label=None, metadata={})
        return asyncio.run(make_custom_rm(judge_url, **settings)(SimpleNamespace(), sample))

    assert reward("good")["score"] == pytest.approx(GOOD, abs=CLOSE)
    assert reward("mumble", unscored_reward=0.4) == {"score": 0.4, "unscored": True, "steps": [None]}
    with pytest.raises(JudgeUnavailable):
        reward("mumble")


def test_rewards_of_single_steps(judge_url: str) -> None:
    rewards = step_rewards(judge_url, RUN)
    assert rewards == near(GOOD, POOR)
    assert discounted_returns(rewards, 0.5) == pytest.approx([rewards[0] + 0.5 * rewards[1], rewards[1]])
    unsure = {"messages": [*RUN["messages"], {"role": "assistant", "content": "mumble"}]}
    assert step_rewards(judge_url, unsure, unscored_reward=0.0)[2] == 0.0
    with pytest.raises(JudgeUnavailable):
        step_rewards(judge_url, unsure)
    with pytest.raises(RequestRefused):
        step_rewards(judge_url, {"messages": RUN["messages"][:1]})


def test_scores_for_traces(judge_url: str) -> None:
    messages = [*RUN["messages"], {"role": "assistant", "content": "mumble"}]
    (run,) = Judge(judge_url).score_run({"messages": messages})
    labels = [event["gen_ai.evaluation.score.label"] for event in evaluation_events(run)]
    assert labels == ["good", "bad"]  # and none for the unsure one
    written: list[dict[str, Any]] = []
    langfuse = SimpleNamespace(create_score=lambda **given: written.append(given))
    assert send_to_langfuse(langfuse, run, "trace", ["o1", "o2", "o3"]) == 2
    assert [each["observation_id"] for each in written] == ["o1", "o2"]
    with pytest.raises(ValueError, match="2 observations for 3 steps"):
        send_to_langfuse(langfuse, run, "trace", ["o1", "o2"])


class Dead(StubScorer):
    """A judge whose backend was killed."""

    def judgements(self, requests: Any, mode: Any = "expected") -> Any:
        self.batches.append(0)
        raise DataError("connection refused")


class Restarting(Dead):
    """A judge whose backend is killed after the first prompt and comes back."""

    def judgements(self, requests: Any, mode: Any = "expected") -> Any:
        if len(self.batches) == 1:
            yield from super().judgements(requests)
        yield from StubScorer.judgements(self, requests)


STEP: dict[str, Any] = {"role": "assistant", "content": "good"}


def scores_of_every_adapter(judge: Judge) -> list[Callable[[], Any]]:
    """Each of them gives 0.5 to what has no score."""
    verl = make_compute_score(judge, unscored_reward=0.5)
    slime = make_custom_rm(judge, unscored_reward=0.5)
    return [
        lambda: judge.reward("What?", "good").value,
        lambda: make_reward_func(judge, when_unscored="none")(prompts=["What?"], completions=["good"])[0],
        lambda: asyncio.run(verl(solution_str="good", extra_info={"prompt": "What?"}))["score"],
        lambda: asyncio.run(slime(None, SimpleNamespace(prompt="What?", response="good")))["score"],
        lambda: score_step(judge, "What?", [], STEP, 0.5),
        lambda: step_rewards(judge, RUN, unscored_reward=0.5)[0],
        lambda: played(judge, RUN["messages"][:1], "good", unscored_reward=0.5),
    ]


def played(judge: Judge, prompt: list[dict[str, Any]], action: str, **settings: Any) -> float:
    """The reward of one turn in an environment that gives none itself."""

    class Env:
        def init(self, prompt: Any) -> Any:
            return prompt, {}

        def step(self, action: str) -> Any:
            return {"observations": [], "reward": 0.0, "done": True, "metadata": {}}

    env = make_env(Env, judge, **settings)()
    env.init(prompt)
    return float(env.step(action)["reward"])


def test_a_judge_without_its_backend_is_an_exception_in_every_adapter_and_never_a_number() -> None:
    with running_server(scorer=Dead()) as url:
        for score in scores_of_every_adapter(Judge(url, attempts=1)):
            with pytest.raises(JudgeUnavailable, match="connection refused"):
                score()


@pytest.mark.parametrize("place", range(7))
def test_a_backend_that_comes_back_loses_no_reward(place: int) -> None:
    with running_server(scorer=Restarting()) as url:
        while httpx.get(f"{url}/ready").status_code != 200:
            time.sleep(0.02)
        assert scores_of_every_adapter(Judge(url, attempts=3))[place]() == pytest.approx(GOOD, abs=CLOSE)


def test_a_failed_step_is_asked_again_and_its_line_is_returned() -> None:
    scorer = Dead()
    with running_server(scorer=scorer) as url:
        (line,) = Judge(url, attempts=2).score([{"task": "What?", "step": STEP}])
        assert (line["score"], line["status"]) == (None, "failed") and len(scorer.batches) >= 2
        assert [step["score"] for run in Judge(url, attempts=1).score_run(RUN) for step in run["steps"]] == [None, None]


PARTS = [{"type": "text", "text": "Do"}, {"type": "text", "text": "it."}]


def test_what_can_never_be_scored_is_an_exception_with_the_reason_and_never_a_number(judge_url: str) -> None:
    judge = Judge(judge_url)
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    for task in (image, [*PARTS, *image], ["Do it."], 7, ""):
        for unscored in (0.5, None):
            with pytest.raises(RequestRefused, match="task must be a string or a list of text parts"):
                score_step(judge, task, [], STEP, unscored)  # type: ignore[arg-type]
            with pytest.raises(RequestRefused, match="task must be a string or a list of text parts"):
                played(judge, [{"role": "user", "content": task}], "good", unscored_reward=unscored)
    with pytest.raises(RequestRefused, match="step must be a list of messages"):
        score_step(judge, "Do it.", [], "good", 0.5)
    with pytest.raises(RequestRefused, match="the probabilities are not numbers"):
        step_rewards(judge, {"messages": [RUN["messages"][0], {**STEP, "content": "NAN"}]}, unscored_reward=0.5)
    with pytest.raises(JudgeUnavailable, match="mumbled"):
        score_step(judge, "Do it.", [], {**STEP, "content": "mumble"})


def test_a_task_of_text_parts_is_their_text(judge_url: str) -> None:
    asked = [{"task": task, "step": STEP} for task in (PARTS, "Do\nit.", "Do it.")]
    parts, joined, other = [line["request_hash"] for line in Judge(judge_url).score(asked)]
    assert parts == joined != other
    assert score_step(judge_url, PARTS, [], STEP) == pytest.approx(GOOD, abs=CLOSE)
    assert played(Judge(judge_url), [{"role": "user", "content": PARTS}], "good") == pytest.approx(GOOD, abs=CLOSE)


def test_a_turn_in_which_the_policy_wrote_nothing_has_no_score(judge_url: str) -> None:
    judge = Judge(judge_url)
    assert played(judge, RUN["messages"][:1], " \n", unscored_reward=0.5) == 0.5
    assert score_step(judge, "Do it.", [], {"role": "assistant", "content": None}, 0.5) == 0.5
    with pytest.raises(JudgeUnavailable, match="wrote nothing"):
        played(judge, RUN["messages"][:1], "")


ADAPTERS: list[Callable[..., Any]] = [make_reward_func, make_compute_score, make_custom_rm, openrlhf.make_reward_func]


@pytest.mark.parametrize("make", ADAPTERS)
def test_settings_that_do_not_exist_are_refused_before_anything_is_judged(make: Callable[..., Any]) -> None:
    for name in AGGREGATES:
        make("http://127.0.0.1:9", aggregate=name)
    with pytest.raises(UsageError, match=r"aggregate: 'sum' is unknown\. Use one of min, product, mean, last"):
        make("http://127.0.0.1:9", aggregate="sum")
    with pytest.raises(UsageError, match=r"when_unscored: 'zero' is unknown\. Use none or group_mean"):
        make_reward_func("http://127.0.0.1:9", when_unscored="zero")  # type: ignore[arg-type]


def test_a_skyrl_prompt_without_a_task_is_refused_before_the_first_turn(judge_url: str) -> None:
    with pytest.raises(RequestRefused, match="no message of role user"):
        played(Judge(judge_url), [{"role": "system", "content": "Do it."}], "good", unscored_reward=0.5)
