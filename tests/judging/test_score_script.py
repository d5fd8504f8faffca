"""score_trajectories.py as it is typed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from families import FLAT, NESTED, prompt

from prmkit.judging.judgement import Request
from prmkit.verdict import asked_shape

ROOT = Path(__file__).resolve().parents[2]


def type_in(*arguments: object, stdin: str | None = None, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "score_trajectories.py"), *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, cwd=cwd)


@pytest.fixture
def steps() -> str:
    some = [prompt("It searched.", FLAT), prompt("It guessed.", NESTED), prompt("It searched.", FLAT)]
    return "".join(json.dumps({"id": number, "prompt": text}) + "\n" for number, text in enumerate(some))


def test_stdin_to_stdout(steps: str, model_folders: dict[str, Path], tmp_path: Path) -> None:
    done = type_in("-", "--model", model_folders["qwen"], "--template", "qwen", stdin=steps, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result["id"] for result in results] == [0, 1, 2]
    assert results[0]["scores"] == results[2]["scores"]
    fields = ["id", "scores", "score", "std", "coverage", "status", "reason", "request_hash", "metadata"]
    assert list(results[0]) == fields
    assert "3 rows: 3 ok" in done.stderr


def test_a_file_is_gone_on_with_and_bad_rows_end_in_exit_1(steps, model_folders, tmp_path: Path) -> None:
    (tmp_path / "steps.jsonl").write_text(steps + "{broken\n")
    command = ("steps.jsonl", "--output", "scores.jsonl", "--model", model_folders["qwen"], "--template", "qwen")
    first = type_in(*command, cwd=tmp_path)
    assert (first.returncode, first.stdout) == (1, ""), first.stderr
    whole = (tmp_path / "scores.jsonl").read_text()
    assert [json.loads(line)["status"] for line in whole.splitlines()] == ["ok", "ok", "ok", "error"]
    again = type_in(*command, cwd=tmp_path)
    assert again.returncode == 1
    assert "4 rows are scored already" in again.stderr
    assert (tmp_path / "scores.jsonl").read_text() == whole


def test_a_server_gives_the_same_scores(steps: str, server: str, model_folders, judges, tmp_path: Path) -> None:
    backend = ("--backend", "openai", "--base-url", f"{server}/qwen/vllm/v1", "--model", "tiny")
    template = ("--tokenizer", model_folders["qwen"], "--template", "qwen")
    done = type_in("-", *backend, *template, stdin=steps, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    prompts = [json.loads(line)["prompt"] for line in steps.splitlines()]
    here = judges["qwen"].score([Request(text, asked_shape(text)) for text in prompts])
    for line, judgement in zip(done.stdout.splitlines(), here, strict=True):
        means = {key: distribution.mean for key, distribution in judgement.scores.items()}
        assert json.loads(line)["scores"] == pytest.approx(means, abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["-"], 1, "no run.json"),
        (["-", "--adapter", "x"], 2, "--adapter needs --model"),
        (["-", "--run", "x", "--model", "y"], 2, "two judges"),
        (["-", "--backend", "openai"], 2, "--base-url"),
        (["-", "--batch-size", "0"], 2, "invalid positive value"),
        (["nowhere.jsonl", "--model", "y"], 1, "nowhere.jsonl"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments: list[str], code: int, words: str, tmp_path: Path) -> None:
    done = type_in(*arguments, stdin="", cwd=tmp_path)
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr
