"""A real server with a judge whose scores are known: 0.9 for what says "good", 0.2 for the rest, unsure of "mumble"."""

import asyncio
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvicorn
from serving_stub import StubScorer

from prmkit.judge.scorer import ShapeOf
from prmkit.prompts.step import load_rubric
from prmkit.serving.app import Limits, make_app
from prmkit.serving.engine import Engine
from prmkit.serving.judges import ServedJudge
from prmkit.serving.metrics import Metrics
from prmkit.serving.service import Service

KEY = "s3cret"
GOOD, POOR, CLOSE = 0.9, 0.2, 0.03


@pytest.fixture(scope="session")
def judge_url() -> Iterator[str]:
    """The address of the server."""
    listening = socket.create_server(("127.0.0.1", 0))
    servers: list[uvicorn.Server] = []

    async def serve() -> None:
        engine = Engine(StubScorer())  # type: ignore[arg-type]
        judge = ServedJudge("stub", engine)
        service = Service(judge, Metrics(lambda: engine.depth, ()), ShapeOf(), load_rubric())
        config = uvicorn.Config(make_app(service, Limits(drain=1)), log_level="warning")
        servers.append(uvicorn.Server(config))
        await servers[0].serve(sockets=[listening])

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    servers[0].should_exit = True
    thread.join(10)


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Install packages without what they need, over the tested environment; gives the folder for PYTHONPATH."""

    def install(*packages: str) -> Path:
        folder = tmp_path_factory.mktemp("overlay")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *packages]
        subprocess.run(command, check=True, capture_output=True, timeout=600)
        return folder

    return install
