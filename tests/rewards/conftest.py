"""A real server with a judge whose scores are known: 0.9 for what says "good", 0.2 for the rest, unsure of "mumble"."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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


@pytest.fixture(scope="session")
def output_of() -> Callable[..., Any]:
    """Run a program with an interpreter and a search path; gives the JSON of its last line."""

    def run(python: Path, path: str | Path, program: str, *arguments: object, timeout: float = 300) -> Any:
        done = subprocess.run(
            [str(python), "-c", program, *map(str, arguments)],
            capture_output=True, text=True, timeout=timeout, env=os.environ | {"PYTHONPATH": str(path)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run
