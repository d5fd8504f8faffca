"""What the endpoints answer, beside a judge whose scores are known."""

import asyncio
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving_stub import StubScorer, running_server

from prmkit.errors import DataError, UsageError
from prmkit.judge.scorer import ShapeOf
from prmkit.judge.types import UNSCORED, Distribution, Judgement
from prmkit.prompts.step import load_rubric
from prmkit.serving.engine import Engine
from prmkit.serving.judges import ServedJudge
from prmkit.serving.metrics import ServerMetrics
from prmkit.serving.service import NoReward, Service
from prmkit.serving.systemone import key_of, run_of_state

GOOD, POOR = 0.9, 0.2
CLOSE = 0.03


def answer(ask: Callable[[Service], Any], **settings: Any) -> Any:
    """What a service answers."""

    async def both() -> Any:
        engine = Engine(StubScorer())  # type: ignore[arg-type]
        worker = asyncio.create_task(engine.run())
        metrics = ServerMetrics(lambda: engine.depth, ())
        given = {"rubric": load_rubric(), **settings}
        try:
            return await ask(Service(ServedJudge("stub", engine), metrics, ShapeOf(), **given))
        finally:
            worker.cancel()

    return asyncio.run(both())


def sample(*said: str, prompt: str = "What is it?") -> dict[str, Any]:
    chatml = f"<|im_start|>user\n{prompt}<|im_end|>\n"
    answers = "<|im_start|>user\nand?<|im_end|>\n".join(f"<|im_start|>assistant\n{text}<|im_end|>\n" for text in said)
    return {"query": [chatml + answers], "prompts": [chatml + "<|im_start|>assistant\n"], "labels": [""]}


def test_steps_and_prompts_get_lines_and_bad_ones_a_reason() -> None:
    steps = [
        {"id": "a", "task": "t", "step": {"role": "assistant", "content": "good"}, "metadata": {"k": 1}},
        {"prompt": 'poor. Answer: {"step_score": 0.5}'},
        {"prompt": "no schema"},
        {"task": "t"},
        'a string is a prompt: {"step_score": 0.5}',
    ]
    found = answer(lambda service: service.score({"steps": steps}))["results"]
    assert [line["status"] for line in found] == ["ok", "ok", "error", "error", "ok"]
    assert found[0]["id"] == "a" and found[0]["metadata"] == {"k": 1}
    assert found[0]["score"] == pytest.approx(GOOD, abs=CLOSE) and found[1]["score"] == pytest.approx(POOR, abs=CLOSE)
    assert "no score keys" in found[2]["reason"]
    for body in ({}, {"steps": 7}, {"steps": [7]}, {"steps": [], "keys": "x"}):
        with pytest.raises(DataError):
            answer(lambda service, body=body: service.score(body))


@pytest.mark.parametrize(("given", "kept"), [(0, 0), (1, 1), ("", ""), ("0", "0"), (True, None), (None, None)])
def test_an_id_is_kept_even_if_it_is_nought(given: Any, kept: Any) -> None:
    step = {"task": "t", "step": {"role": "assistant", "content": "good"}}
    asked = [step, {"prompt": 'good. Answer: {"step_score": 0.5}'}, {"prompt": "no schema"}, {"task": "t"}]
    body = {"steps": [{**each, "id": given} for each in asked]}
    found = [line["id"] for line in answer(lambda service: service.score(body))["results"]]
    unnamed = [line["id"] for line in answer(lambda service: service.score({"steps": asked}))["results"]]
    assert found == (unnamed if kept is None else [kept] * 4)
    assert unnamed[0] == "request#1"


def test_what_is_dropped_from_a_step_is_counted_in_its_line() -> None:
    agent, tool = {"role": "assistant", "content": "good"}, {"role": "tool", "content": "x"}
    user = {"role": "user", "content": "And?"}
    steps = [
        {"task": "t", "step": agent},
        {"task": "t", "history": [tool], "step": agent},
        {"task": "t", "step": [tool, agent]},
        {"task": "t", "step": [agent, user]},
        {"task": "t", "step": agent, "history": [{"role": "user", "content": [{"type": "image", "image": "x"}]}]},
        {"prompt": 'good. Answer: {"step_score": 0.5}'},
    ]
    found = answer(lambda service: service.score({"steps": steps}))["results"]
    assert [line["lost"] for line in found] == [
        {}, {"results before the first step": 1}, {"results before the first step": 1},
        {"messages after the last step": 1}, {"content of type image": 1}, {},
    ]  # fmt: skip


def test_a_step_is_one_message_of_the_agent() -> None:
    said = [{"role": "assistant", "content": text} for text in ("poor", "good")]
    (line,) = answer(lambda service: service.score({"steps": [{"task": "t", "step": said}]}))["results"]
    assert line["status"] == "error" and "step has 2 assistant messages" in line["reason"]
    asked = {"state": {"task": "t", "output": said}, "questions": {"q": {"type": "noul"}}}
    assert answer(lambda service: service.systemone(asked))["answers"]["q"]["noul"] > 0.99  # about the end of a run


def test_what_is_dropped_from_a_policys_text_is_counted() -> None:
    whole, cut = sample("good"), sample("good")
    cut["query"][0] += "and more"
    kind = "text outside of messages"
    assert answer(lambda service: service.rewards(whole))["extra_logs"]["lost"] == [0.0]
    assert answer(lambda service: service.rewards(cut))["extra_logs"]["lost"] == [1.0]
    body = {"prompt": cut["prompts"][0], "response": "good<|im_end|>\nand more"}
    assert answer(lambda service: service.reward(body))["lost"] == {kind: 1}


def test_a_run_has_scores_aggregates_returns_and_its_first_bad_step() -> None:
    said = ("good", "bad one", "good again")
    messages = [{"role": "user", "content": "Do it."}, *({"role": "assistant", "content": text} for text in said)]
    (run,) = answer(lambda service: service.score_trajectory(messages, None, 0.5, None))["runs"]
    good, poor = run["steps"][0]["score"], run["steps"][1]["score"]
    assert [step["bad"] for step in run["steps"]] == [False, True, False] and run["first_bad"] == 2
    assert run["steps"][0]["return"] == pytest.approx(good + 0.5 * (poor + 0.5 * good), abs=1e-5)
    assert run["aggregates"]["min"] == pytest.approx(poor, abs=1e-6)
    assert run["aggregates"]["product"] == pytest.approx(good * poor * good, abs=1e-5)
    messages[2]["content"] = "mumble"
    (run,) = answer(lambda service: service.score_trajectory(messages, None, 1.0, None))["runs"]
    assert run["aggregates"]["min"] is None and run["aggregates"]["unsure"] == 1
    assert [step["return"] is None for step in run["steps"]] == [True, True, False]


def test_rewards_are_finite_numbers_of_the_policys_own_steps() -> None:
    found = answer(lambda service: service.rewards(sample("good", "bad")))
    assert found["rewards"] == found["scores"] == [pytest.approx(POOR, abs=CLOSE)]
    assert found["extra_logs"]["steps"] == [2.0]
    mean = answer(lambda service: service.rewards(sample("good", "bad")), aggregate="mean")["rewards"]
    assert mean == [pytest.approx((GOOD + POOR) / 2, abs=CLOSE)]
    flat = [value for values in [found["rewards"], *found["extra_logs"].values()] for value in values]
    assert all(type(value) is float and math.isfinite(value) for value in flat)


@pytest.mark.parametrize("unsure", ["mumble", "toolong"])
def test_a_step_without_a_score_is_never_silently_a_number(unsure: str) -> None:
    body = sample("good", unsure)
    for policy in ("error", "mean", "null"):  # a mean of no earlier rewards is none
        with pytest.raises(NoReward, match=r"mumbled|long"):
            answer(lambda service: service.rewards(body), unscored=policy)
    skipped = answer(lambda service: service.rewards(body), unscored="skip")
    assert skipped["rewards"] == [pytest.approx(GOOD, abs=CLOSE)] and skipped["extra_logs"]["unscored"] == [1.0]
    with pytest.raises(NoReward):
        answer(lambda service: service.rewards(sample(unsure)), unscored="skip")
    one = {"prompt": "What?", "response": unsure}
    found = answer(lambda service: service.reward(one), unscored="null")
    assert found["score"] is None and re.search("mumbled|long", found["reason"])

    async def after_a_good_one(service: Service) -> Any:
        await service.rewards(sample("good"))
        return await service.rewards(sample(unsure))

    assert answer(after_a_good_one, unscored="mean")["rewards"] == [pytest.approx(GOOD, abs=CLOSE)]


@pytest.mark.parametrize("policy", UNSCORED)
def test_a_judge_that_cannot_work_is_an_error_whatever_is_set_for_steps_without_a_score(policy: str) -> None:
    async def after_a_good_one(service: Service, response: str) -> None:
        await service.rewards(sample("good"))
        with pytest.raises(NoReward, match="the server is gone"):
            await service.rewards(sample("good", response))
        await service.reward({"prompt": "What?", "response": response})

    with pytest.raises(NoReward, match="the server is gone"):
        answer(lambda service: after_a_good_one(service, "BREAK"), unscored=policy)
    body = {"prompt": "What?", "response": "NAN"}
    with pytest.raises(DataError, match="not numbers"):
        answer(lambda service: service.reward(body), unscored=policy)


def test_a_query_in_which_nothing_is_written_gets_the_mean() -> None:
    nothing = sample("")["prompts"]

    async def both(service: Service) -> tuple[Any, Any]:
        first = await service.rewards(sample("good"))
        return first, await service.rewards({"query": nothing, "prompts": nothing})

    first, second = answer(both, unscored="mean")
    assert second["rewards"] == first["rewards"] and second["judge"] == [None]
    with pytest.raises(NoReward, match=r"the policy wrote nothing that can be judged \(serve_judge\.py --unscored"):
        answer(lambda service: service.rewards({"query": nothing, "prompts": nothing}))
    assert second["extra_logs"]["unscored"] == [1.0]


@pytest.mark.parametrize("beyond", [math.nan, math.inf, -0.1, 1.1])
def test_numbers_out_of_range_are_refused(beyond: float) -> None:
    messages = [{"role": "user", "content": "Do it."}, {"role": "assistant", "content": "good"}]
    with pytest.raises(DataError, match="gamma must be a number from 0 to 1"):
        answer(lambda service: service.score_trajectory(messages, None, beyond, None))
    with pytest.raises(DataError, match="bad_below must be a number from 0 to 1"):
        answer(lambda service: service.score_trajectory(messages, None, 1.0, beyond))


def test_what_trainers_send_wrongly_is_refused() -> None:
    for body in ({}, {"query": ["a"], "prompts": []}, {"query": [7], "prompts": ["a"]}, {"query": "a", "prompts": "a"}):
        with pytest.raises(DataError):
            answer(lambda service, body=body: service.rewards(body))
    for body in ({}, {"prompt": 7, "response": "x"}, {"prompt": "x"}):
        with pytest.raises(DataError):
            answer(lambda service, body=body: service.reward(body))


@pytest.mark.parametrize("keys", ["a", {}, "", 0, [""], [" "], ["a", "a"], [1]])
def test_keys_that_are_no_list_of_names_are_refused(keys: Any) -> None:
    with pytest.raises(DataError, match=r"^keys "):
        answer(lambda service: service.score({"steps": ["good"], "keys": keys}))


def test_a_judge_of_ready_prompts_scores_no_runs() -> None:
    without = {"rubric": None, "why_no_rubric": "stub: needs ready prompts"}
    asks: list[Callable[[Service], Any]] = [
        lambda service: service.score_trajectory([], None, 1.0, None),
        lambda service: service.rewards(sample("good")),
        lambda service: service.systemone({"questions": {}}),
    ]
    for ask in asks:
        with pytest.raises(UsageError, match="ready prompts"):
            answer(ask, **without)
    ready = {
        "steps": [{"prompt": 'good {"step_score": 0.5}'}, {"task": "t", "step": {"role": "assistant", "content": "x"}}]
    }
    found = answer(lambda service: service.score(ready), **without)["results"]
    assert [line["status"] for line in found] == ["ok", "error"] and "ready prompts" in found[1]["reason"]


STATE = {"task": "What is it?", "output": "good", "reference_submission": "x"}


def test_typed_questions_are_answered_with_probabilities() -> None:
    questions = {
        "step_score": {"type": "score", "instructions": "How good?", "criteria": ["bad", "so-so", "good"]},
        "is_it_good": {"type": "noul", "instructions": "Is it good?"},
        "stars": {"type": "choice", "criteria": {"1": "worst", "2": None, "3": None, "4": None, "5": "best"}},
        "hundredths": {"type": "choice", "criteria": {str(value): None for value in range(101)}},
    }
    found = answer(lambda service: service.systemone({"model": "m", "state": STATE, "questions": questions}))
    answers = found["answers"]
    assert found["unused_state"] == ["reference_submission"] and found["usage"]["output_tokens"] == 0
    assert answers["step_score"]["score"] == pytest.approx(2, abs=0.1)
    assert answers["step_score"]["legend"] == {"0": "bad", "1": "so-so", "2": "good"}
    assert answers["is_it_good"]["noul"] > 0.99 and answers["stars"]["choice"] == "5"
    assert answers["hundredths"]["choice"] == "90"
    for name in ("step_score", "stars", "hundredths"):
        chances = answers[name]["probabilities"]
        assert math.fsum(chances.values()) == pytest.approx(1, abs=1e-9)
        assert answers[name]["confidence"] == max(chances.values())


CHAT = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "good"}]


@pytest.mark.parametrize(
    ("state", "unused"),
    [
        ({"inputs": {"question": "What is it?"}, "outputs": {"response": "good"}}, []),
        ({"inputs": {"messages": CHAT[:1]}, "outputs": {"choices": [{"message": CHAT[1]}]}}, []),
        ({"inputs": CHAT[:1], "outputs": {"messages": CHAT}, "expectations": {"x": 1}}, ["expectations"]),
        ({"conversation": CHAT, "expectations": {"x": 1}}, ["expectations"]),
        ({"input": "What is it?", "submission": "good", "guidelines": "g"}, ["guidelines"]),
        (CHAT, []),
    ],
)
def test_a_state_is_what_applications_call_input_and_output(state: Any, unused: list[str]) -> None:
    run, found = run_of_state(state)
    assert (run.task, [step.text for step in run.steps], found) == ("What is it?", ["good"], unused)


@pytest.mark.parametrize("said", [0, False, 0.0, "0"])
def test_an_answer_may_be_nought(said: Any) -> None:
    run, _ = run_of_state({"question": "How many?", "step": "", "output": said})
    assert [step.text for step in run.steps] == [json.dumps(said).strip('"')]


@pytest.mark.parametrize(
    "state", [{"input": CHAT, "output": {"messages": CHAT}}, {"input": CHAT[:1], "output": "x", "history": 7}, 7, []]
)
def test_a_state_without_an_answer_of_the_agent_is_refused(state: Any) -> None:
    with pytest.raises(DataError):
        run_of_state(state)


def test_a_question_is_about_the_key_of_its_name_or_of_its_instructions() -> None:
    keys = ("progress", "safety")
    assert key_of("safety", {}, keys) == "safety" and key_of("q", {"instructions": "Its safety?"}, keys) == "safety"
    assert key_of("q", {}, ("step_score",)) == "step_score"
    for instructions in (None, "How good?", "progress and safety"):
        with pytest.raises(DataError, match="progress, safety"):
            key_of("q", {"instructions": instructions}, keys)


def test_keys_are_of_ready_prompts_and_refused_for_steps() -> None:
    step = {"task": "t", "step": {"role": "assistant", "content": "good"}}
    with pytest.raises(DataError, match="keys is only allowed with ready-made prompts"):
        answer(lambda service: service.score({"steps": [step], "keys": ["other"]}))


def test_questions_about_a_step_that_the_judge_is_not_sure_of_are_not_asked_again() -> None:
    """422 and not 503: clients would try ten times."""
    ask = {"state": {"task": "t", "output": "mumble"}, "questions": {"q": {"type": "noul"}}}
    with pytest.raises(DataError, match="mumbled"):
        answer(lambda service: service.systemone(ask))
    with pytest.raises(NoReward, match="gone"):
        answer(lambda service: service.systemone(ask | {"state": {"task": "t", "output": "BREAK"}}))


@pytest.mark.parametrize(
    ("state", "question"),
    [
        (STATE, {"type": "box"}),
        (STATE, {"type": "score", "criteria": ["only one"]}),
        (STATE, {"type": "choice", "criteria": {"angry": None, "calm": None}}),
        (STATE, {"type": "choice", "criteria": {"-1e308": None, "1e308": None}}),
        (STATE, {"type": "choice", "criteria": {str(value): None for value in range(102)}}),
        (STATE, "good?"),
        ("a string", {"type": "noul"}),
        ({"task": "alone"}, {"type": "noul"}),
    ],
)
def test_questions_that_do_not_fit_a_judge_of_steps_are_refused(state: Any, question: Any) -> None:
    with pytest.raises(DataError):
        answer(lambda service: service.systemone({"state": state, "questions": {"q": question}}))


def test_attempts_at_one_task_in_several_requests_are_several_runs() -> None:
    """Best of N: an A/B comparison would otherwise take the lowest score of all of them for that of one run."""
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "good"}]
    with running_server() as url:

        def named(**more: Any) -> str:
            found = httpx.post(f"{url}/v1/score_trajectory", json={"messages": messages, "task_id": "t", **more}).json()
            return str(found["runs"][0]["trajectory_id"])

        assert len({named() for _ in range(3)}) == 3
        assert {named(trajectory_id="t.1") for _ in range(3)} == {"t.1"}


def test_drift_is_near_zero_for_the_same_scores_and_large_for_others() -> None:
    def drift(scores: list[float], recent: list[float]) -> float:
        metrics = ServerMetrics(lambda: 0, scores)
        for score in recent:
            known = Distribution(score, score, score, None, None)
            metrics.count(Judgement("ok", {"step_score": known}), "production")
        line = next(line for line in metrics.text().decode().splitlines() if line.startswith("prmkit_drift_psi"))
        return float(line.split()[1])

    scores = [place / 1000 for place in range(1000)]
    assert drift(scores, scores[::-1]) == pytest.approx(0, abs=1e-3)
    assert drift(scores, [score / 2 for score in scores]) > 0.25
    assert math.isnan(drift(scores, scores[:49])) and math.isnan(drift([], scores))
    assert drift([0.5] * 300, [0.5] * 300) == pytest.approx(0, abs=1e-9)


class Starting(StubScorer):
    """Fails at first, as a server does that has not loaded its model yet."""

    def judgements(self, requests: Any, mode: Any = "expected") -> Any:
        if len(self.batches) < 3:
            self.batches.append(0)
            raise DataError("connection refused")
        yield from super().judgements(requests)


def test_a_server_is_ready_when_what_it_asks_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prmkit.serving.app._WARMUP_PAUSE", 0.2)
    with running_server(scorer=Starting()) as url:
        statuses: list[int] = []
        while 200 not in statuses:
            statuses.append(httpx.get(f"{url}/ready").status_code)
            assert len(statuses) < 2000
    assert statuses[0] == 503


def test_every_endpoint_is_in_help_and_in_the_documentation(root: Path) -> None:
    with running_server() as url:
        described = httpx.get(f"{url}/openapi.json").json()["paths"]
        pages = {path for path in ("/", "/docs") if httpx.get(url + path).status_code == 200}
    routes = {method: {path for path, known in described.items() if method in known} for method in ("post", "get")}
    shown = subprocess.run([sys.executable, root / "serve_judge.py", "--help"], capture_output=True, text=True).stdout
    listed = re.search(r"POST (/.*?); GET (/.*?)\. ", " ".join(shown.split()))
    assert listed
    post, get = (set(re.findall(r"(?<!\S)/[\w/]*", text)) for text in listed.groups())
    assert (post, get) == (routes["post"], routes["get"] | pages)
    page = (root / "docs" / "serving.md").read_text(encoding="utf-8")
    assert not [path for path in post | get if not re.search(rf"`(POST )?{path}`", page)]
