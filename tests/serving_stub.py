"""A judge for tests of what is around a judge: its score is a function of the prompt."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn

from prmkit.errors import DataError
from prmkit.judge.score_trie import distribution_of
from prmkit.judge.scorer import ShapeOf
from prmkit.judge.types import Judgement, Mode, Request
from prmkit.prompts.step import load_rubric
from prmkit.serving.app import Limits, make_app
from prmkit.serving.engine import Engine
from prmkit.serving.judges import ServedJudge
from prmkit.serving.metrics import ServerMetrics
from prmkit.serving.service import Service


@dataclass
class StubScorer:
    """Judges a prompt by the words in it."""

    seconds: float = 0.0
    batches: list[int] = field(default_factory=list)

    def judgements(self, requests: Iterable[Request], mode: Mode = "expected") -> Iterator[Judgement]:
        asked = list(requests)
        self.batches.append(len(asked))
        time.sleep(self.seconds)
        if any("BREAK" in request.prompt for request in asked):
            raise DataError("the server is gone")
        if any("POISON" in request.prompt for request in asked):
            raise TypeError("an odd prompt")
        yield from map(judgement_of, asked)


def judgement_of(request: Request) -> Judgement:
    """0.9 for steps that say "good", 0.2 for others; unsure of those that say "mumble"."""
    this = request.prompt.rpartition("<step n=")[2] or request.prompt
    if "NAN" in this:
        return Judgement("error", reason="the probabilities are not numbers")
    if "toolong" in this:
        return Judgement("too_long", reason="too long")
    peak = 90 if "good" in this else 20
    shares = [-abs(place - peak) / 2 - 1.5 for place in range(101)]
    scores = {key: distribution_of(shares, 0.9) for key in request.shape.keys}
    is_unsure = "mumble" in this
    return Judgement("unsure" if is_unsure else "ok", scores, reason="mumbled" if is_unsure else None, prompt_tokens=7)


@contextmanager
def running_server(
    key: str | None = None, *, scorer: StubScorer | None = None, body_patience: float = 30.0, **queue: Any
) -> Iterator[str]:
    """The address of a real HTTP server with this judge, in a thread."""
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # see prmkit.serving.command
    listening.bind(("127.0.0.1", 0))
    listening.listen(128)
    servers: list[uvicorn.Server] = []

    async def serve() -> None:
        engine = Engine(scorer or StubScorer(), **queue)  # type: ignore[arg-type]
        service = Service(
            ServedJudge("stub", engine), ServerMetrics(lambda: engine.depth, ()), ShapeOf(), load_rubric()
        )
        limits = Limits(key=key, drain=1, body_patience=body_patience)
        config = uvicorn.Config(make_app(service, limits), log_level="warning", timeout_graceful_shutdown=1)
        servers.append(uvicorn.Server(config))
        await servers[0].serve(sockets=[listening])

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    servers[0].should_exit = True
    thread.join(3)
