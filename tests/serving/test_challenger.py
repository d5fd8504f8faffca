"""A challenger beside the production judge: unseen by clients, or for a stable share of the tasks."""

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from serving_stub import StubScorer, judgement_of

from prmkit.judge.scorer import ShapeOf
from prmkit.judge.types import Judgement, Request
from prmkit.prompts.step import load_rubric
from prmkit.scoring.rows import RowToScore
from prmkit.serving.engine import Engine
from prmkit.serving.judges import Challenger, ServedJudge
from prmkit.serving.metrics import ServerMetrics
from prmkit.serving.request_log import RequestLog
from prmkit.serving.service import Service
from prmkit.verdict import Shape

STEP = {"role": "assistant", "content": "good"}


class Contrary(StubScorer):
    """Finds good what the other one finds poor."""

    def judgements(self, requests: Any, mode: Any = "expected") -> Any:
        for judgement, request in zip(super().judgements(list(requests)), requests, strict=True):
            flipped = request.prompt.replace("good", "bad") if judgement.score > 0.5 else "good"
            yield judgement_of(Request(flipped, request.shape))


class Broken(StubScorer):
    """Fails at everything."""

    def judgements(self, requests: Any, mode: Any = "expected") -> Any:
        raise RuntimeError("out of memory")


def answer(ask: Callable[[Service], Any], log: Path, challenger: StubScorer, **settings: Any) -> tuple[Any, list[Any]]:
    """What a service with a challenger answers, and the lines that it logs."""
    limit = settings.pop("limit", 1024)

    async def ask_and_wait() -> Any:
        judges = [
            ServedJudge("old", Engine(StubScorer())),  # type: ignore[arg-type]
            ServedJudge("new", Engine(challenger, limit=limit, patience=0.01)),  # type: ignore[arg-type]
        ]
        workers = [asyncio.create_task(judge.engine.run()) for judge in judges]
        second = Challenger(judges[1], **{"share": 1.0, "is_shadow": False, **settings})
        metrics = ServerMetrics(lambda: 0, ())
        service = Service(judges[0], metrics, ShapeOf(), load_rubric(), challenger=second, request_log=request_log)
        try:
            found = await ask(service)
            await second.finish(10)
            return found
        finally:
            for worker in workers:
                worker.cancel()

    request_log = RequestLog(log)
    with request_log.writing():
        found = asyncio.run(ask_and_wait())
    return found, [json.loads(line) for line in log.read_text().splitlines()]


def steps_of(*tasks: str) -> dict[str, Any]:
    return {"steps": [{"task": task, "task_id": task, "step": STEP} for task in tasks]}


TASKS = [f"task-{number}" for number in range(200)]


def test_in_shadow_both_score_and_the_production_judge_answers(tmp_path: Path) -> None:
    found, lines = answer(
        lambda service: service.score(steps_of("a", "b")), tmp_path / "log", Contrary(), is_shadow=True
    )
    assert found["judge"] == "old" and {line["judge"] for line in found["results"]} == {"old"}
    assert all(line["score"] > 0.8 for line in found["results"])
    assert sorted((line["judge"], line["role"], line["task"]) for line in lines) == [
        ("new", "shadow", "a"), ("new", "shadow", "b"), ("old", "production", "a"), ("old", "production", "b"),
    ]  # fmt: skip
    by_role: dict[str, dict[str, Any]] = {"production": {}, "shadow": {}}
    for line in lines:
        by_role[line["role"]][line["request_hash"]] = line
    assert by_role["production"].keys() == by_role["shadow"].keys()
    assert all(line["score"] < 0.3 for line in by_role["shadow"].values())


@pytest.mark.parametrize("settings", [{"challenger": Broken()}, {"challenger": StubScorer(1.0), "limit": 1}])
def test_a_challenger_in_shadow_that_fails_or_is_slow_harms_no_answer(tmp_path: Path, settings: Any) -> None:
    async def ask(service: Service) -> Any:
        started = time.monotonic()
        found = [(await service.score(steps_of(task)))["results"][0] for task in TASKS[:20]]
        return found, time.monotonic() - started

    (found, seconds), lines = answer(ask, tmp_path / "log", is_shadow=True, **settings)
    assert [line["status"] for line in found] == ["ok"] * 20 and seconds < 8
    roles = [line["role"] for line in lines]
    assert roles.count("production") == roles.count("shadow") == 20
    failed = [line for line in lines if line["status"] == "failed"]
    assert {line["role"] for line in failed} == {"shadow"} and all(line["score"] is None for line in failed)


def test_a_share_of_the_tasks_goes_to_the_challenger_whole(tmp_path: Path) -> None:
    found, lines = answer(lambda service: service.score(steps_of(*TASKS * 2)), tmp_path / "log", Contrary(), share=0.3)
    judges = [line["judge"] for line in found["results"]]
    assert judges[:200] == judges[200:] and 40 <= judges[:200].count("new") <= 80 and found["judge"] is None
    assert all((line["score"] < 0.3) == (line["judge"] == "new") for line in found["results"])
    roles = {"old": "production", "new": "challenger"}
    assert len(lines) == 400 and all(line["role"] == roles[line["judge"]] for line in lines)


def test_what_the_challenger_fails_at_is_answered_by_the_production_judge(tmp_path: Path) -> None:
    found, lines = answer(lambda service: service.score(steps_of("a", "b")), tmp_path / "log", Broken())
    assert [(line["judge"], line["status"]) for line in found["results"]] == [("old", "ok")] * 2
    assert (
        sorted((line["role"], line["status"]) for line in lines)
        == [("challenger", "failed")] * 2 + [("production", "ok")] * 2
    )


@pytest.mark.parametrize(("share", "judge"), [(0.0, "old"), (1.0, "new")])
def test_every_endpoint_says_who_answered(tmp_path: Path, share: float, judge: str) -> None:
    messages = [{"role": "user", "content": "Do it."}, STEP]
    sample = {"prompt": "Do it.", "response": "good"}
    chatml = "<|im_start|>user\nDo it.<|im_end|>\n<|im_start|>assistant\n"

    async def ask(service: Service) -> list[Any]:
        run = await service.score_trajectory(messages, None, 1.0, None)
        questions = {"step_score": {"type": "noul"}}
        return [
            run["judge"],
            run["runs"][0]["judge"],
            run["runs"][0]["steps"][0]["judge"],
            (await service.reward(sample))["judge"],
            *(await service.rewards({"prompts": [chatml], "query": [chatml + "good"]}))["judge"],
            (await service.systemone({"state": {"task": "t", "output": "good"}, "questions": questions}))["model"],
        ]

    found, _ = answer(ask, tmp_path / "log", StubScorer(), share=share)
    assert found == [judge] * 6


def row(task: str | None, prompt: str = "p") -> RowToScore:
    return RowToScore(1, request=Request(prompt, Shape(("step_score",), nested=False)), task=task)


def test_the_share_is_stable_and_grows_by_whole_tasks() -> None:
    judge = ServedJudge("new", Engine(StubScorer()))  # type: ignore[arg-type]
    small, large = (Challenger(judge, share, is_shadow=False) for share in (0.1, 0.4))
    assert [small.takes(row(task)) for task in TASKS[:12]] == [
        Challenger(judge, 0.1, is_shadow=True).takes(row(task, f"another prompt {task}")) for task in TASKS[:12]
    ]
    assert all(large.takes(row(task)) for task in TASKS if small.takes(row(task)))
    assert {large.takes(row(None, prompt)) for prompt in TASKS} == {True, False}  # without a task, its prompt decides
    assert not Challenger(judge, 1.0, is_shadow=False).takes(RowToScore(1, reason="not asked"))


def test_the_hash_of_a_task_is_the_same_in_every_version_of_this_program() -> None:
    judge = ServedJudge("new", Engine(StubScorer()))  # type: ignore[arg-type]
    assert [n for n in range(40) if Challenger(judge, 0.1, is_shadow=False).takes(row(f"task-{n}"))] == [13, 27, 29]


def test_drift_is_that_of_the_production_judge() -> None:
    metrics = ServerMetrics(lambda: 0, [place / 300 for place in range(300)])
    good = judgement_of(Request("good", Shape(("step_score",), nested=False)))
    for _ in range(300):
        metrics.count(good, "shadow")
    text = metrics.text().decode()
    assert "prmkit_drift_psi NaN" in text and 'prmkit_steps_total{role="shadow",status="ok"} 300.0' in text
    metrics.count(Judgement("failed"), "challenger")
    assert 'prmkit_steps_total{role="challenger",status="failed"} 1.0' in metrics.text().decode()
