"""The client against the real server, and against servers that are down, slow, or something else."""

import asyncio
import copy
import http.server
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from prmkit.client import Judge, JudgeUnavailable, RequestRefused, Reward
from prmkit.errors import UsageError
from prmkit.judge.scorer import Scorer
from prmkit.judge.sources import JudgeSource
from prmkit.rewards.steps import step_rewards

GOOD, POOR, CLOSE = 0.9, 0.2, 0.03
ROOT = Path(__file__).resolve().parents[2]
MESSAGES = [{"role": "user", "content": "Do it."}, {"role": "assistant", "content": "good"}]


def test_steps_runs_and_rewards(judge_url: str) -> None:
    judge = Judge(judge_url)
    steps = [{"task": "t", "step": {"role": "assistant", "content": f"good {number}"}} for number in range(150)]
    lines = judge.score(steps)
    assert len(lines) == 150 and all(line["score"] == pytest.approx(GOOD, abs=CLOSE) for line in lines)
    (run,) = judge.score_run({"messages": MESSAGES}, gamma=0.5)
    assert run["steps"][0]["return"] == pytest.approx(GOOD, abs=CLOSE)
    samples = [("What?", "good"), (MESSAGES[:1], "bad"), (MESSAGES[:1], [{"role": "assistant", "content": "mumble"}])]
    good, poor, unsure = judge.rewards(samples)
    assert good.value == pytest.approx(GOOD, abs=CLOSE) and poor.value == pytest.approx(POOR, abs=CLOSE)
    assert unsure.value is None and unsure.steps == (None,)
    assert unsure.number(0.5) == 0.5 and good.number(None) == good.value
    with pytest.raises(JudgeUnavailable):
        unsure.number(None)


def test_many_requests_at_once_keep_their_order(judge_url: str) -> None:
    samples = [("What?", f"{'good' if number % 3 else 'bad'} {number}") for number in range(300)]
    expected = [GOOD if number % 3 else POOR for number in range(300)]
    assert [each.value for each in Judge(judge_url).rewards(samples)] == pytest.approx(expected, abs=CLOSE)
    found = asyncio.run(Judge(judge_url).arewards(samples))
    assert [each.value for each in found] == pytest.approx(expected, abs=CLOSE)


_FORKING = """
import os, sys
from prmkit.client import Judge

judge, wrong = Judge(sys.argv[1]), 0
for turn in range(20):
    judge.reward("What?", f"good {turn}")
    children = []
    for said, expected in (("good", 0.9), ("bad", 0.2)):
        if not (child := os.fork()):
            values = [judge.reward("What?", f"{said} {turn} {number}").value for number in range(3)]
            os._exit(any(abs(value - expected) > 0.1 for value in values))
        children.append(child)
    wrong += sum(os.waitpid(child, 0)[1] != 0 for child in children)
sys.exit(bool(wrong))
"""


def test_forked_processes_never_read_each_others_rewards(judge_url: str) -> None:
    """A trainer's workers inherit the connection of the process that forked them."""
    done = subprocess.run([sys.executable, "-c", _FORKING, judge_url], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_can_never_be_answered_is_said_at_once(judge_url: str) -> None:
    judge = Judge(judge_url)
    with pytest.raises(RequestRefused, match="unknown format of runs"):
        judge.score_run({"messages": []})
    with pytest.raises(RequestRefused, match="aggregate"):
        judge.reward("What?", "good", aggregate="median")
    with pytest.raises(RequestRefused, match="404"):
        Judge(judge_url + "/elsewhere").reward("What?", "good")


@contextmanager
def answering(*answers: tuple[int, bytes]) -> Iterator[tuple[str, list[str]]]:
    """A server that gives these answers in turn, the last one again and again."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            status, body = answers[min(len(asked), len(answers) - 1)]
            asked.append(self.path)
            self.send_response(status)
            self.send_header("Retry-After", "0")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=lambda: server.serve_forever(0.01), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


ANSWER = b'{"score": 0.7, "scores": [0.7], "label_mass": 0.9}'


def test_trouble_that_passes_is_waited_for() -> None:
    with answering((503, b'{"error": "the queue is full"}'), (502, b"<html>"), (200, ANSWER)) as (url, asked):
        assert Judge(url).reward("a", "b") == Reward(0.7, (0.7,), 0.9)
    assert len(asked) == 3


def test_trouble_that_stays_is_an_error_and_never_a_number() -> None:
    with answering((503, b'{"error": "the queue is full"}')) as (url, asked):
        with pytest.raises(JudgeUnavailable, match="the queue is full"):
            Judge(url, attempts=3).reward("a", "b")
        assert len(asked) == 3
    with answering((200, b"<html>hello</html>")) as (url, _), pytest.raises(JudgeUnavailable, match="not JSON"):
        Judge(url).reward("a", "b")
    with pytest.raises(JudgeUnavailable, match="no response"):
        Judge("http://127.0.0.1:9", attempts=1).reward("a", "b")


@pytest.mark.parametrize(
    "body",
    [
        b"null",
        b"[]",
        b"{}",
        b'"0.7"',
        b'{"score": NaN, "scores": [NaN], "label_mass": 0.9}',
        b'{"score": 1e999, "scores": [0.5], "label_mass": 0.9}',
        b'{"score": 7, "scores": [7], "label_mass": 0.9}',
        b'{"score": -0.1, "scores": [0.5], "label_mass": 0.9}',
        b'{"score": true, "scores": [true], "label_mass": 0.9}',
        b'{"score": "0.7", "scores": [0.7], "label_mass": 0.9}',
        b'{"score": 0.7, "scores": null, "label_mass": 0.9}',
        b'{"score": 0.7, "scores": [0.7, NaN], "label_mass": 0.9}',
        b"<html>" * 1000,
    ],
)
def test_an_answer_that_is_no_score_is_an_error(body: bytes) -> None:
    with answering((200, body)) as (url, _), pytest.raises(JudgeUnavailable) as caught:
        Judge(url).reward("a", "b")
    assert len(str(caught.value)) < 400
    with answering((200, body)) as (url, _), pytest.raises(JudgeUnavailable):
        asyncio.run(Judge(url).arewards([("a", "b")]))


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b'{"results": []}',
        b'{"results": [7]}',
        b'{"results": [{"score": NaN, "status": "ok", "label_mass": 1}]}',
    ],
)
def test_lines_are_as_many_as_steps_and_their_scores_are_scores(body: bytes) -> None:
    with answering((200, body)) as (url, _), pytest.raises(JudgeUnavailable):
        Judge(url).score([{"prompt": "a"}])


@pytest.mark.parametrize(
    "body", [b"{}", b'{"runs": [{}]}', b'{"runs": [{"steps": [{"score": 1.5, "status": "ok", "label_mass": 1}]}]}']
)
def test_a_run_has_steps_with_scores_that_are_scores(body: bytes) -> None:
    with answering((200, body)) as (url, _), pytest.raises(JudgeUnavailable):
        Judge(url).score_run({"messages": MESSAGES})


def test_a_server_that_never_answers_ends_in_an_error_after_the_time_that_was_given() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        with pytest.raises(JudgeUnavailable, match="no response"):
            Judge(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=0.2, attempts=2).reward("a", "b")
        assert time.monotonic() - started < 5


def test_a_server_that_is_restarted_in_the_middle_loses_no_reward() -> None:
    """It is killed while 32 connections wait; another one takes its port two seconds later."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    program = [sys.executable, str(Path(__file__).with_name("slow_server.py")), str(port)]
    first = subprocess.Popen(program, stdout=subprocess.PIPE)
    assert first.stdout and first.stdout.readline()
    samples = [("What?", str(number)) for number in range(200)]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(Judge(f"http://127.0.0.1:{port}").rewards, samples)
        time.sleep(0.5)
        assert not waiting.done()
        first.kill()
        first.communicate()
        time.sleep(1)
        with subprocess.Popen(program, stdout=subprocess.DEVNULL) as second:
            found = waiting.result(60)
            second.kill()
    assert [reward.value for reward in found] == [number / 1000 for number in range(200)]


def test_the_key_is_in_no_message_and_no_repr() -> None:
    judge = Judge("http://127.0.0.1:9", key="s3cret", attempts=1)
    with pytest.raises(JudgeUnavailable) as caught:
        judge.reward("a", "b")
    assert "s3cret" not in str(caught.value) + repr(judge)


@pytest.mark.parametrize("key", ["s3cret\nx", "s3cr\u20act", "s3cret\x00"])
def test_a_key_that_cannot_be_sent_is_refused_without_showing_it(key: str) -> None:
    with pytest.raises(UsageError, match="contains an invalid character, for example a line break") as caught:
        Judge("http://127.0.0.1:9", key=key)
    assert "s3cr" not in str(caught.value)
    assert Judge("http://127.0.0.1:9", key="s3cret\n").key == "s3cret"


@pytest.mark.parametrize(
    "setting",
    [
        {"attempts": 0},
        {"attempts": -1},
        {"concurrency": 0},
        {"timeout": 0},
        {"timeout": float("nan")},
        {"timeout": None},
        {"attempts": 1.5},
    ],
)
def test_settings_with_which_nothing_could_be_asked_are_refused(setting: dict[str, Any]) -> None:
    (name,) = setting
    with pytest.raises(UsageError, match=f"{name}: "):
        Judge("http://127.0.0.1:9", **setting)


def test_a_copy_in_another_process_asks_as_well(judge_url: str) -> None:
    judge = Judge(judge_url, key="s3cret", attempts=2)
    assert judge.reward("What?", "good").value == pytest.approx(GOOD, abs=CLOSE)  # it holds a connection now
    for other in (pickle.loads(pickle.dumps(judge)), copy.deepcopy(judge)):
        assert (other.url, other.key, other.attempts) == (judge.url, "s3cret", 2)
        assert other.reward("What?", "bad").value == pytest.approx(POOR, abs=CLOSE)


def test_a_single_prompt_is_not_a_list_of_characters() -> None:
    for one in ("good", {"prompt": "good"}):
        with pytest.raises(UsageError, match="steps: expected a list"):
            Judge("http://127.0.0.1:9").score(one)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="prompts: expected a list"):
            Scorer(JudgeSource(Path("nowhere"))).score(one)  # type: ignore[arg-type]


def test_what_is_no_address_is_said_at_once() -> None:
    for url in ("localhost:8000", "http://[::1", "http://127.0.0.1:80000", "ftp://127.0.0.1", "http://", "http://a b"):
        with pytest.raises(UsageError, match=r"the judge's URL .*: not the URL of a server. Example: http:"):
            Judge(url)


def test_an_answer_that_comes_byte_by_byte_ends_with_the_time_that_was_given() -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            with suppress(OSError):
                for _ in range(50):
                    self.wfile.write(b" ")
                    time.sleep(0.1)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    judge = Judge(f"http://127.0.0.1:{server.server_port}", timeout=0.3, attempts=1)
    began = time.monotonic()
    for ask in (lambda: judge.reward("a", "b"), lambda: asyncio.run(judge.arewards([("a", "b")]))):
        with pytest.raises(JudgeUnavailable):
            ask()
    server.shutdown()
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("aggregates", ["", ', "aggregates": {"min": NaN, "product": 0, "mean": 0, "last": 0}'])
def test_aggregates_that_are_no_scores_are_an_error(aggregates: str) -> None:
    steps = '{"runs": [{"first_bad": null, "steps": [{"score": 0.5, "status": "ok", "label_mass": 1}]%s}]}'
    with answering((200, (steps % aggregates).encode())) as (url, _), pytest.raises(JudgeUnavailable):
        Judge(url, attempts=1).score_run({"messages": MESSAGES})


def test_rewards_of_two_runs_at_once_are_refused(judge_url: str) -> None:
    with pytest.raises(RequestRefused, match="2 runs"):
        step_rewards(judge_url, [{"messages": MESSAGES}, {"messages": MESSAGES}])


LIGHT = """
import sys
for name in ("torch", "transformers", "llamafactory", "numpy", "fastapi", "trl", "ray"):
    sys.modules[name] = None
import importlib, pkgutil
import prmkit.client, prmkit.rewards, prmkit.rewards.steps
for adapter in pkgutil.iter_modules(prmkit.rewards.__path__):
    importlib.import_module(f"prmkit.rewards.{adapter.name}")
judge = prmkit.client.Judge(sys.argv[1])
messages = [{"role": "user", "content": "t"}, {"role": "assistant", "content": "good"}]
print(prmkit.rewards.steps.step_rewards(judge, {"messages": messages}))
"""


def test_a_trainers_environment_needs_no_torch(judge_url: str) -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT, judge_url], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[0.8996")
