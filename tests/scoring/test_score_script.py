"""score_trajectories.py as it is typed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from families import FLAT, NESTED, prompt

from prmkit.judge.types import Request
from prmkit.verdict import asked_shape

pytestmark = pytest.mark.slow

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
    assert done.returncode == 1, "the tiny judge is unsure: it was hardly trained"
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result["id"] for result in results] == [0, 1, 2]
    assert results[0]["scores"] == results[2]["scores"]
    fields = ["id", "scores", "score", "std", "label_mass", "reach", "status", "reason", "request_hash", "metadata"]
    assert list(results[0]) == fields
    assert "3 rows: 3 unsure" in done.stderr and all(result["score"] for result in results)


def test_a_file_is_continued_and_bad_rows_end_in_exit_1(steps, model_folders, tmp_path: Path) -> None:
    (tmp_path / "steps.jsonl").write_text(steps + "{broken\n")
    command = ("steps.jsonl", "--output", "scores.jsonl", "--model", model_folders["qwen"], "--template", "qwen")
    first = type_in(*command, cwd=tmp_path)
    assert (first.returncode, first.stdout) == (1, ""), first.stderr
    whole = (tmp_path / "scores.jsonl").read_text()
    assert [json.loads(line)["status"] for line in whole.splitlines()] == ["unsure"] * 3 + ["error"]
    again = type_in(*command, cwd=tmp_path)
    assert again.returncode == 1
    assert "4 rows are already scored" in again.stderr
    assert (tmp_path / "scores.jsonl").read_text() == whole


def test_scores_are_not_continued_by_a_server_with_other_weights(
    steps: str, server: str, model_folders, tmp_path: Path
) -> None:
    source = tmp_path / "steps.jsonl"
    source.write_text(steps)

    def score(model: str) -> subprocess.CompletedProcess[str]:
        url = ("--base-url", f"{server}/{model}/exact/v1", "--model", "tiny")
        template = ("--tokenizer", model_folders["qwen"], "--template", "qwen")
        return type_in(source, *url, *template, "--output", "scores.jsonl", "--min-label-mass", "0", cwd=tmp_path)

    assert "3 rows:" in score("qwen").stderr
    source.write_text(steps + json.dumps({"id": 3, "prompt": prompt("It asked.", FLAT)}) + "\n")
    refused = score("other")
    assert refused.returncode == 1 and "so it now serves other weights" in refused.stderr, refused.stderr
    assert len((tmp_path / "scores.jsonl").read_text().splitlines()) == 3
    assert "4 rows:" in score("qwen").stderr


def test_a_server_gives_the_same_scores(steps: str, server: str, model_folders, judges, tmp_path: Path) -> None:
    backend = ("--backend", "openai", "--base-url", f"{server}/qwen/vllm/v1", "--model", "tiny")
    template = ("--tokenizer", model_folders["qwen"], "--template", "qwen")
    done = type_in("-", *backend, *template, stdin=steps, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "HTTP Request" not in done.stderr, "httpx writes a line for every request"
    prompts = [json.loads(line)["prompt"] for line in steps.splitlines()]
    here = judges["qwen"].score([Request(text, asked_shape(text)) for text in prompts])
    for line, judgement in zip(done.stdout.splitlines(), here, strict=True):
        means = {key: distribution.mean for key, distribution in judgement.scores.items()}
        assert json.loads(line)["scores"] == pytest.approx(means, abs=1e-4)


UNREADABLE = "{broken\n" * 20
"""Lines that get a line each without any judge: what is written where can be tested without loading one."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With an input, a file of the user's, and an empty folder for a model, which nothing can be loaded from."""
    (tmp_path / "steps.jsonl").write_text(UNREADABLE)
    (tmp_path / "mine.jsonl").write_text("mine\n")
    (tmp_path / "link.jsonl").symlink_to("steps.jsonl")
    (tmp_path / "here").mkdir()
    (tmp_path / "x").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("output", "code", "words"),
    [
        ("steps.jsonl", 2, "error: steps.jsonl is also the input."),
        ("link.jsonl", 2, "error: link.jsonl is also the input."),
        ("mine.jsonl", 2, "error: mine.jsonl exists and is not a scoring output"),
        ("here", 1, "error: here is a folder."),
        ("steps.jsonl/scores.jsonl", 1, "steps.jsonl is not a folder"),
        ("steps.jsonl/a/scores.jsonl", 1, "steps.jsonl is not a folder"),
        ("scores.jsonl.gz", 2, "error: scores.jsonl.gz: the output is never compressed. Write to scores.jsonl"),
        ("/dev/null", 2, "error: /dev/null is not a regular file."),
        ("/dev/stdout", 2, "error: /dev/stdout is not a regular file."),
    ],
)
def test_an_output_costs_the_user_no_file(folder: Path, output: str, code: int, words: str) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    done = type_in("steps.jsonl", "--model", "x", "--output", output, "--aggregate", "trajectory", cwd=folder)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    left = {path: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.suffix != ".lock"}
    assert left == before
    assert not list(Path("/dev").glob("*.fingerprint.json")) and not list(Path("/dev").glob("*.lock"))


@pytest.mark.new_processes
def test_the_input_is_not_written_over_when_it_is_piped_in(folder: Path) -> None:
    command = [sys.executable, str(ROOT / "score_trajectories.py"), "-", "--model", "x", "--output", "steps.jsonl"]
    with (folder / "steps.jsonl").open() as stdin:
        done = subprocess.run(command, stdin=stdin, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 2 and "is also the input" in done.stderr
    assert (folder / "steps.jsonl").read_text() == UNREADABLE


def test_sums_are_not_written_over_a_file_of_the_users(folder: Path) -> None:
    (folder / "scores.trajectories.jsonl").write_text("mine\n")
    command = ("steps.jsonl", "--model", "x", "--output", "scores.jsonl", "--aggregate", "trajectory")
    done = type_in(*command, cwd=folder)
    assert done.returncode == 2 and "exists but does not belong to a scoring output" in done.stderr
    assert (folder / "scores.trajectories.jsonl").read_text() == "mine\n"


def test_outputs_that_differ_in_their_suffix_have_files_of_their_own(folder: Path) -> None:
    for name in ("c.lora", "c.base", "c.jsonl"):
        done = type_in("steps.jsonl", "--model", "x", "--output", name, "--aggregate", "trajectory", cwd=folder)
        assert done.returncode == 1 and "20 rows: 20 error" in done.stderr
    made = {path.name for path in folder.glob("c.*")}
    assert made == {
        *("c.lora", "c.lora.fingerprint.json", "c.lora.trajectories.jsonl"),
        *("c.base", "c.base.fingerprint.json", "c.base.trajectories.jsonl"),
        *("c.jsonl", "c.fingerprint.json", "c.trajectories.jsonl"),
    }


def test_scores_of_other_known_keys_are_moved_away(folder: Path) -> None:
    command = ("steps.jsonl", "--model", "x", "--output", "scores.jsonl", "--data", "here")
    type_in(*command, cwd=folder)
    (folder / "here" / "conversion_report.json").write_text('{"score_keys": {"clip": ["a_score"]}}')
    done = type_in(*command, cwd=folder)
    assert "moved to scores.old1.jsonl" in done.stderr
    assert "are already scored" in type_in(*command, cwd=folder).stderr


@pytest.mark.new_processes
@pytest.mark.parametrize(
    ("shell", "code", "words"),
    [
        ("ulimit -f 1; {} steps.jsonl --model x --output scores.jsonl", 1, "error: scores.jsonl: File too large."),
        ("{} steps.jsonl --model x > /dev/full", 1, "error: stdout: No space left on device."),
        ("{} - --model x <&-", 1, "error: stdin is closed."),
    ],
)
def test_the_file_that_is_to_blame_is_named(folder: Path, shell: str, code: int, words: str) -> None:
    program = f"{sys.executable} {ROOT / 'score_trajectories.py'}"
    done = subprocess.run(["bash", "-c", shell.format(program)], capture_output=True, text=True, cwd=folder)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert done.stderr.count("error: ") == 1 and "steps.jsonl" not in done.stderr
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


@pytest.mark.new_processes
def test_a_reader_that_has_gone_is_no_error(folder: Path) -> None:
    (folder / "steps.jsonl").write_text(UNREADABLE * 200)
    program = f"{sys.executable} {ROOT / 'score_trajectories.py'} steps.jsonl --model x"
    shell = f"set -o pipefail; {program} | head -1"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, cwd=folder)
    assert (done.returncode, done.stdout.count("\n"), done.stderr.strip()) == (0, 1, "")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["-"], 1, "no run.json"),
        (["-", "--adapter", "x"], 2, "--adapter needs --model"),
        (["-", "--run", "x", "--model", "y"], 2, "--run and --model are mutually exclusive"),
        (["-", "--backend", "openai"], 2, "--base-url"),
        (["-", "--run", "x", "--base-url", "http://localhost:80/v1"], 2, "needs --model"),
        (["-", "--run", "x", "--timeout", "9"], 2, "only for a judge on a server"),
        (
            ["-", "--backend", "openai", "--model", ".", "--base-url", "localhost:80/v1"],
            2,
            "not the URL of a server",
        ),
        (["-", "--keys", "a_score,b_score, a_score"], 2, "lists a key twice"),
        (["-", "--batch-size", "0"], 2, "'0' is not a whole number above 0"),
        (["nowhere.jsonl", "--model", "."], 1, "nowhere.jsonl"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], code: int, words: str, tmp_path: Path) -> None:
    done = type_in(*arguments, stdin="", cwd=tmp_path)
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr
