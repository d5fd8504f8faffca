"""A real server with a judge whose scores are known: 0.9 for what says "good", 0.2 for the rest, unsure of "mumble"."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from serving_stub import running_server

KEY = "s3cret"
GOOD, POOR, CLOSE = 0.9, 0.2, 0.03


@pytest.fixture(scope="session")
def judge_url() -> Iterator[str]:
    """The address of the server."""
    with running_server() as url:
        yield url


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Install packages without what they need, over the tested environment; gives the folder for PYTHONPATH."""

    def install(*packages: str) -> Path:
        folder = tmp_path_factory.mktemp("overlay")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *packages]
        subprocess.run(command, check=True, capture_output=True, timeout=600)
        return folder

    return install


@pytest.fixture(scope="session")
def installed_alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Install packages with what they need into an environment apart from ours; gives its Python."""

    def install(*packages: str) -> Path:
        folder = tmp_path_factory.mktemp("environment")
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        python = folder / "bin" / "python"
        command = [str(python), "-m", "pip", "install", "--quiet", "orjson", "httpx", *packages]
        subprocess.run(command, check=True, capture_output=True, timeout=1200)
        return python

    return install
