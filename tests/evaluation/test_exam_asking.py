"""evaluate_judge.py --predict-with: servers of typed questions and of chat completions, right and wrong."""

import asyncio
import importlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import exam_fixtures as public
import pytest

from prmkit.errors import DataError, ExitCode, UsageError
from prmkit.evaluation.command import execute
from prmkit.evaluation.exam import read_exam
from prmkit.evaluation.exam_answers import read_exam_answers
from prmkit.http_client import together
from prmkit.trajectories.command import import_runs

evaluate = importlib.import_module("evaluate_judge")._parser
imports = importlib.import_module("import_trajectories")._parser


@contextmanager
def serving(answer: Any) -> Iterator[tuple[str, list[Any]]]:
    """A server on 127.0.0.1; `answer(path, body)` gives status and JSON. Yields its address and what it was asked."""
    asked: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body)
            status, value = answer(self.path, body)
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def exam(tmp_path: Path) -> Path:
    public.write_lines(tmp_path / "runs.jsonl", public.every_step_labelled(6, 1))
    typed = ["--labels", "agentprocessbench", str(tmp_path / "runs.jsonl"), "--output", str(tmp_path / "exam.jsonl")]
    assert import_runs(imports().parse_args(typed)) == ExitCode.DONE
    return tmp_path / "exam.jsonl"


def take(exam: Path, url: str, *more: str) -> dict[str, Any]:
    folder = exam.parent / "out"
    typed = ["--exam", str(exam), "--output", str(folder), "--predict-with", url, "--server-model", "M", *more]
    assert execute(evaluate().parse_args(typed)) == ExitCode.DONE
    found = json.loads((folder / "exam.json").read_text())
    return next(each for each in found["entrants"] if each["name"] == "M")


def level_of(body: Any, labels: dict[str, float]) -> int:
    """The right level of the default rubric's six: 0.2 is the second one."""
    return round(labels[body["state"]["output"]] * 5)


def test_typed_questions_are_asked_step_by_step_and_kept(exam: Path) -> None:
    labels = {
        f"Text: {run.record.steps[step.n - 1].text}": step.label
        for run, step in read_exam(exam).labelled
        if run.record and step.label is not None
    }

    def answer(path: str, body: Any) -> tuple[int, Any]:
        assert path == "/v1/systemone" and body["model"] == "M"
        ((name, question),) = body["questions"].items()
        assert question["type"] == "score" and len(question["criteria"]) == 6
        chances = {str(level): float(level == level_of(body, labels)) for level in range(6)}
        return 200, {"answers": {name: {"type": "score", "score": level_of(body, labels), "probabilities": chances}}}

    with serving(answer) as (url, asked):
        found = take(exam, f"{url}/systemone")
        assert found["metrics"]["auroc"]["value"] == 1 and found["answered"] == found["asked"] == len(asked)
        assert max(len(body["state"]["history"]) for body in asked) >= 1
        assert "reference" not in json.dumps(asked)
        take(exam, f"{url}/systemone")
        assert len(asked) == len(labels)  # nothing is asked twice


def test_a_chat_server_is_asked_as_a_judge_is(exam: Path) -> None:
    def answer(path: str, body: Any) -> tuple[int, Any]:
        assert path == "/v1/chat/completions" and "Judge step" in body["messages"][0]["content"]
        number = len(body["messages"][0]["content"]) % 2
        text = '```json\n{"step_score": 0.25, "reasoning": "x"}\n```' if number else "I cannot say."
        return 200, {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}

    with serving(answer) as (url, asked):
        found = take(exam, url)
    assert 0 < found["answered"] < found["asked"] == len(asked)
    lines = [json.loads(line) for line in (exam.parent / "out" / "exam_answers_server.jsonl").read_text().splitlines()]
    assert {line["status"]: line["score"] for line in lines} == {"ok": 0.25, "unparsed": None}


def test_other_numbers_in_a_verdict_are_no_scores(exam: Path) -> None:
    """A mean with the judge's confidence would be a wrong score; its confidence alone is none."""
    said = ['{"step_score": 0.25, "confidence_score": 0.95}', '{"confidence": 0.9, "correct": 1}']
    numbers = iter(range(1000))

    def answer(_path: str, _body: Any) -> tuple[int, Any]:
        return 200, {"choices": [{"message": {"content": said[next(numbers) % 2]}}]}

    with serving(answer) as (url, _):
        take(exam, url)
    lines = [json.loads(line) for line in (exam.parent / "out" / "exam_answers_server.jsonl").read_text().splitlines()]
    assert {line["score"] for line in lines} == {0.25, None}
    rows = [json.loads(line) for line in exam.read_text().splitlines()]
    for row in rows:
        row["conversations"][1]["value"] = said[0]
        row["metadata"]["model_name"] = "M"
    judged = public.write_lines(exam.parent / "judged.jsonl", rows)
    found = read_exam_answers(judged, read_exam(exam).runs, exam)
    assert set(found[0].scores.values()) == {0.25}
    (exam.parent / "exam.runs.jsonl").unlink()
    assert {step.label for _, step in read_exam(judged).labelled} == {0.25}


def test_second_answers_of_strong_judges_are_counted_and_not_read(exam: Path) -> None:
    rows = [json.loads(line) for line in exam.read_text().splitlines()]
    again = json.loads(json.dumps(rows[0]))
    again["metadata"]["repeat"] = True
    again["conversations"][1]["value"] = '{"step_score": 0.07}'
    judged = public.write_lines(exam.parent / "judged.jsonl", [*rows, again])
    (found,) = read_exam_answers(judged, read_exam(exam).runs, exam)
    assert len(found.scores) == len(rows) and 0.07 not in found.scores.values()
    assert found.unplaced.total() == 1


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"answers": {"step_score": {"score": 9}}}, "is not a level from 0 to 5"),
        ({"answers": {"step_score": {"score": True}}}, "is not a level from 0 to 5"),
        ({"answers": {}}, "no answer"),
        ([1], "not a JSON object"),
    ],
)
def test_an_answer_that_means_no_score_gives_none(exam: Path, given: Any, reason: str) -> None:
    with serving(lambda _path, _body: (200, given)) as (url, _), pytest.raises(DataError, match=reason):
        take(exam, f"{url}/systemone")


def test_a_refused_key_and_a_server_that_is_not_there_stop_at_once(exam: Path) -> None:
    with serving(lambda _path, _body: (401, {})) as (url, _), pytest.raises(DataError, match="API key"):
        take(exam, url)
    with pytest.raises(UsageError, match="not the URL of a server"):
        take(exam, "localhost 8000")


def test_when_one_request_fails_the_others_end_first() -> None:
    ended = list[str]()

    async def fail() -> None:
        await asyncio.sleep(0.01)
        raise DataError("refused")

    async def wait() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)  # as a connection that is closed
            ended.append("closed")

    async def all_of_them() -> None:
        with pytest.raises(DataError, match="refused"):
            await together([fail(), wait(), fail(), wait()])
        assert ended == ["closed", "closed"]

    asyncio.run(all_of_them())
