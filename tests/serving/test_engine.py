"""The queue in front of the judge: batches, equal prompts, a full queue, failures, and the end."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from serving_stub import StubScorer

from prmkit.judge.types import Judgement, Request
from prmkit.serving.engine import BATCH, Busy, Engine, Stopping
from prmkit.verdict import Shape

SHAPE = Shape(("step_score",), nested=False)


def asked(text: str) -> Request:
    return Request(text, SHAPE)


def running(work: Callable[[Engine, StubScorer], Awaitable[Any]], **settings: Any) -> Any:
    """What `work` gives beside an engine that runs."""

    async def both() -> Any:
        scorer = StubScorer(settings.pop("seconds", 0.0))
        engine = Engine(scorer, **settings)  # type: ignore[arg-type]
        worker = asyncio.create_task(engine.run())
        try:
            return await asyncio.wait_for(work(engine, scorer), 20)
        finally:
            worker.cancel()

    return asyncio.run(both())


def test_single_prompts_of_many_clients_become_batches_and_keep_their_order() -> None:
    async def work(engine: Engine, scorer: StubScorer) -> Any:
        texts = [f"{'good' if number % 3 else 'poor'} {number}" for number in range(200)]
        answers = await asyncio.gather(*(engine.judge([asked(text)]) for text in texts))
        return texts, answers, scorer.batches

    texts, answers, batches = running(work)
    assert [answer.score > 0.5 for (answer,) in answers] == ["good" in text for text in texts]
    assert max(batches) == BATCH and len(batches) < 10


def test_equal_prompts_are_judged_once_also_later() -> None:
    async def work(engine: Engine, scorer: StubScorer) -> Any:
        first = await asyncio.gather(*(engine.judge([asked("good"), asked("poor")]) for _ in range(9)))
        again = await engine.judge([asked("poor"), asked("poor"), asked("good")])
        return first, again, scorer.batches

    first, again, batches = running(work)
    assert batches == [2]
    assert again == [first[0][1], first[0][1], first[0][0]] and all(each == first[0] for each in first)


def test_a_full_queue_makes_clients_wait_and_then_says_so() -> None:
    async def work(engine: Engine, _scorer: StubScorer) -> Any:
        many = asyncio.create_task(engine.judge([asked(f"good {number}") for number in range(3 * BATCH)]))
        await asyncio.sleep(0.05)
        with pytest.raises(Busy):
            await engine.judge([asked("one more")])
        return await many

    assert len(running(work, seconds=0.5, limit=8, patience=0.1)) == 3 * BATCH


def test_a_place_that_becomes_free_is_taken() -> None:
    async def work(engine: Engine, _scorer: StubScorer) -> Any:
        return await asyncio.gather(*(engine.judge([asked(f"good {number}")]) for number in range(300)))

    assert len(running(work, seconds=0.01, limit=16, patience=15)) == 300


def test_a_failure_is_an_answer_and_is_not_remembered() -> None:
    async def work(engine: Engine, scorer: StubScorer) -> Any:
        failed = await engine.judge([asked("BREAK")])
        return failed + await engine.judge([asked("BREAK")]) + await engine.judge([asked("good")])

    *failed, fine = running(work)
    assert failed == [Judgement("failed", reason="the server is gone")] * 2 and fine.status == "ok"


def test_one_prompt_that_breaks_the_model_costs_the_others_of_its_batch_nothing() -> None:
    async def work(engine: Engine, _scorer: StubScorer) -> Any:
        texts = [f"good {number}" for number in range(20)] + ["POISON"] + [f"poor {number}" for number in range(20)]
        return await asyncio.gather(*(engine.judge([asked(text)]) for text in texts))

    answers = [answer for (answer,) in running(work)]
    assert [answer.status for answer in answers] == ["ok"] * 20 + ["failed"] + ["ok"] * 20
    assert answers[20].reason == "an odd prompt"


def test_a_client_that_hangs_up_does_not_cancel_what_another_one_waits_for() -> None:
    async def work(engine: Engine, _scorer: StubScorer) -> Any:
        first = asyncio.create_task(engine.judge([asked("good")]))
        second = asyncio.create_task(engine.judge([asked("good")]))
        await asyncio.sleep(0.05)
        first.cancel()
        return await second

    assert running(work, seconds=0.2)[0].status == "ok"


def test_what_was_taken_is_finished_and_nothing_more_is_taken() -> None:
    async def work(engine: Engine, _scorer: StubScorer) -> Any:
        taken = asyncio.create_task(engine.judge([asked("good")]))
        await asyncio.sleep(0.05)
        stopping = asyncio.create_task(engine.stop(5))
        await asyncio.sleep(0)
        with pytest.raises(Stopping):
            await engine.judge([asked("late")])
        return await stopping, await taken

    refused, (taken,) = running(work, seconds=0.2)
    assert refused == 0 and taken.status == "ok"


def test_what_is_not_finished_in_time_is_refused() -> None:
    async def work(engine: Engine, _scorer: StubScorer) -> Any:
        asking = [asyncio.create_task(engine.judge([asked(f"good {number}")])) for number in range(100)]
        await asyncio.sleep(0.05)
        refused = await engine.stop(0.1)
        return refused, await asyncio.gather(*asking, return_exceptions=True)

    refused, answers = running(work, seconds=0.5)
    assert refused == 100 and all(isinstance(answer, Stopping) for answer in answers)


def test_what_waits_for_a_place_when_the_server_ends_is_refused_as_well() -> None:
    async def work(engine: Engine, _scorer: StubScorer) -> Any:
        asking = [asyncio.create_task(engine.judge([asked(f"good {number}")])) for number in range(6)]
        await asyncio.sleep(0.1)
        await engine.stop(0.1)
        return await asyncio.wait_for(asyncio.gather(*asking, return_exceptions=True), 1)

    answers = running(work, seconds=2, limit=1, window=0)
    assert [type(answer) for answer in answers] == [Stopping] * 6
