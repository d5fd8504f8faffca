"""The server as a process: what a client, a balancer, a scraper and an operator meet."""

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from prmkit.files import write_json
from prmkit.paths import EXPORT_NOTE
from prmkit.prompts.step import load_rubric

ROOT = Path(__file__).resolve().parents[2]
KEY = "s3cret"
MESSAGES = [
    {"role": "user", "content": "Cancel order 17."},
    {"role": "assistant", "content": "I look it up."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "It has shipped."},
]

pytestmark = pytest.mark.slow


@dataclass
class Server:
    """A running server."""

    process: subprocess.Popen[str]
    url: str

    def post(self, path: str, **given: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {KEY}", **given.pop("headers", {})}
        return httpx.post(self.url + path, headers=headers, timeout=60, **given)

    def get(self, path: str, *, key: str = KEY) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.get(self.url + path, headers=headers, timeout=60)

    def stop(self) -> tuple[int, str]:
        """End it as a supervisor does; its exit code and what it wrote."""
        self.process.send_signal(signal.SIGTERM)
        _, written = self.process.communicate(timeout=60)
        return self.process.returncode, written


def started(model: Path | str, *arguments: object) -> Server:
    command = [sys.executable, ROOT / "serve_judge.py", "--model", model, "--port", "0", "--key-env", "SERVER_KEY"]
    process = subprocess.Popen(
        [*command, *map(str, arguments)], stderr=subprocess.PIPE, text=True, env=os.environ | {"SERVER_KEY": KEY}
    )
    assert process.stderr
    for line in process.stderr:
        if found := re.search(r"http://\S+?:\d+", line):
            return Server(process, found[0])
    raise AssertionError(f"the server ended with {process.wait()}")


@pytest.fixture(scope="module")
def export(model_folders: dict[str, Path]) -> Path:
    """An exported judge that was, so its record says, trained with the default rubric."""
    folder = model_folders["qwen"]
    settings = {"template": "qwen", "cutoff_len": 4096, "dtype": "float32", "rubrics": [load_rubric().sha256]}
    write_json(folder / EXPORT_NOTE, settings)
    return folder


@pytest.fixture(scope="module")
def request_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "requests.jsonl"


@pytest.fixture(scope="module")
def server(export: Path, request_log: Path) -> Iterator[Server]:
    server = started(export, "--max-body", "1", "--log-requests", request_log)
    yield server
    server.process.kill()
    server.process.communicate()


def test_scores_over_http_are_those_of_the_script(server: Server, export: Path, tmp_path: Path) -> None:
    run = server.post("/v1/score_trajectory", json={"messages": MESSAGES}).json()["runs"][0]
    (tmp_path / "run.json").write_text(json.dumps({"messages": MESSAGES}))
    command = [sys.executable, ROOT / "score_trajectories.py", tmp_path / "run.json", "--model", export]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    for step, line in zip(run["steps"], lines, strict=True):
        for name in ("score", "std", "label_mass", "reach"):
            assert step[name] == pytest.approx(line[name], abs=2e-6)
        assert (step["status"], step["reason"]) == (line["status"], line["reason"])
    single = {"task": "Cancel order 17.", "history": MESSAGES[1:3], "step": MESSAGES[3]}
    (last,) = server.post("/v1/score", json={"steps": [single]}).json()["results"]
    assert last["score"] == pytest.approx(lines[1]["score"], abs=2e-6)


def logged(server: Server, file: Path, path: str, body: Any, request: str, count: int = 1) -> list[dict[str, Any]]:
    """The lines that a request adds to the log, by the beginning of their ids: those of others may come late."""
    answer = server.post(path, json=body, headers={"X-Request-Id": request})
    assert answer.status_code in (200, 503), answer.text
    deadline, found = time.monotonic() + 10, list[dict[str, Any]]()
    while len(found) < count:  # lines are written after the answer
        assert time.monotonic() < deadline
        time.sleep(0.01)
        lines = map(json.loads, file.read_text().rpartition("\n")[0].splitlines())
        found = [line for line in lines if line["id"].startswith(request)]
    return found


def test_every_step_is_logged_by_ids_and_hashes_and_never_with_text(server: Server, request_log: Path) -> None:
    (named,) = logged(
        server,
        request_log,
        "/v1/score",
        {"steps": [{"id": "s-1", "task_id": "t-1", "trajectory_id": "r-1", "task": "Cancel order 17.",
                    "step": {"role": "assistant", "content": "It has shipped."}}]},
        "s-1",
    )  # fmt: skip
    assert (named["id"], named["task"], named["trajectory"], named["role"]) == ("s-1", "t-1", "r-1", "production")
    run = logged(server, request_log, "/v1/score_trajectory", {"messages": MESSAGES}, "q7", count=2)
    assert [line["trajectory"] for line in run] == ["q7.1"] * 2 and [line["id"] for line in run] == ["q7.1#1", "q7.1#2"]
    (reward,) = logged(
        server, request_log, "/reward", {"prompt": "Say it in one word.", "response": "Four, of course."}, "q8"
    )
    assert reward["status"] == "unsure" and reward["task"].startswith("task-") and reward["keys"] == ["step_score"]
    assert reward["request_hash"] and reward["characters"] > 100
    text = request_log.read_text()
    for quoted in ("Cancel", "shipped", "one word", "Four", KEY):
        assert quoted not in text


def test_a_full_disk_costs_lines_and_no_answers(server: Server, request_log: Path) -> None:
    """The server may not make its files longer: a disk that is full."""
    process = server.process.pid
    before = resource.prlimit(process, resource.RLIMIT_FSIZE)
    resource.prlimit(process, resource.RLIMIT_FSIZE, (request_log.stat().st_size + 10, before[1]))
    try:
        for number in range(3):
            assert server.post("/v1/score", json={"steps": [f'{number}: {{"step_score": 1}}']}).status_code == 200
        deadline = time.monotonic() + 10
        while 'prmkit_request_log_lines_total{outcome="lost"} 3.0' not in server.get("/metrics").text:
            assert time.monotonic() < deadline
    finally:
        resource.prlimit(process, resource.RLIMIT_FSIZE, before)
    again = {"id": "again", "prompt": 'Judge again: {"step_score": 1}'}
    assert logged(server, request_log, "/v1/score", {"steps": [again]}, "again")


def test_a_random_model_gives_no_rewards(server: Server) -> None:
    """Its label mass is low, and an unsure score must not train a policy."""
    found = server.post("/reward", json={"prompt": "What is 2 + 2?", "response": "4"})
    assert found.status_code == 503 and found.headers["retry-after"] == "1"
    assert "no reliable score" in found.json()["error"]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/score", b"{", 422),
        ("/v1/score", b"[]", 422),
        ("/v1/score", b'{"steps": 7}', 422),
        ("/v1/score_trajectory", b'{"messages": []}', 422),
        ("/v1/score_trajectory?gamma=x", b"{}", 422),
        ("/get_reward", b'{"query": ["a"]}', 422),
        ("/nothing", b"{}", 404),
        ("/v1/score", b"\xff\xfe\x00", 422),
        ("/v1/score", b'{"steps": ["' + b"x" * (1 << 20) + b'"]}', 413),
        ("/v1/score", b"[" * 100_000, 422),
        ("/v1/score", b'{"steps": [{"id": 1e999, "prompt": "x"}]}', 422),
        ("/v1/score_trajectory", b'{"messages": [{"role": "\\ud800"}]}', 422),
        ("/v1/score_trajectory", b'{"messages": [{"role": "user", "content": "%s"}]}' % (b"9" * 999), 422),
        ("/v1/systemone", b'{"state": {"task": "t", "output": "o"}, "questions": {"q": {"type": [1]}}}', 422),
    ],
)
def test_bad_requests_are_refused(server: Server, path: str, body: bytes, status: int) -> None:
    found = server.post(path, content=body, headers={"Content-Type": "application/json"})
    assert found.status_code == status, found.text
    assert list(found.json()) == ["error"] and "Traceback" not in found.text


def test_a_body_without_a_length_is_limited_as_well(server: Server) -> None:
    found = server.post("/v1/score", content=(b"x" * 65536 for _ in range(100)))
    assert found.status_code == 413


def test_keys_ids_and_what_needs_none(server: Server) -> None:
    assert server.get("/v1/models", key="wrong").status_code == 401
    assert server.get("/metrics", key="").status_code == 401
    for path in ("/", "/health", "/openapi.json", "/ready"):
        assert server.get(path, key="").status_code in (200, 503), path
    assert server.get("/v1/models").json()["data"][0]["owned_by"] == "prmkit"
    assert (
        server.post("/v1/score", json={"steps": []}, headers={"X-Request-Id": "abc.1"}).headers["x-request-id"]
        == "abc.1"
    )
    made = server.post("/v1/score", json={"steps": []}, headers={"X-Request-Id": "a\tb"}).headers["x-request-id"]
    assert re.fullmatch(r"[0-9a-f]{32}", made)


def test_an_answer_to_a_small_request_is_not_held_back(server: Server) -> None:
    """Header and body are two packets; with Nagle's algorithm the second one waits 40 ms for the client's system."""
    with httpx.Client(headers={"Authorization": f"Bearer {KEY}"}) as client:
        waits = []
        for _ in range(30):
            started = time.perf_counter()
            client.get(f"{server.url}/v1/models")
            waits.append(time.perf_counter() - started)
    assert sorted(waits)[5] < 0.03


def test_clients_that_hang_up_or_send_half_a_body_cost_nothing(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    for text in (
        b"POST /v1/score HTTP/1.1\r\n",
        b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{",
        b"\0",
    ):
        for _ in range(20):
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(text)
    with ThreadPoolExecutor(16) as pool:
        found = list(
            pool.map(lambda n: server.post("/v1/score", json={"steps": [f"{n}: {{'step_score': 1}}"]}), range(64))
        )
    assert [each.status_code for each in found] == [200] * 64
    assert server.get("/health").json() == {"status": "ok"}


def test_metrics_count_what_happened(server: Server) -> None:
    text = server.get("/metrics").text
    assert 'prmkit_requests_total{path="/health",status="200"}' in text
    assert 'prmkit_requests_total{path="other",status="404"}' in text
    for name in ("prmkit_queue_depth", "prmkit_batch_size_bucket", "prmkit_label_mass_sum", "prmkit_drift_psi NaN"):
        assert name in text


def test_sigterm_answers_what_was_taken(export: Path) -> None:
    server = started(export, "--window", "2500")  # longer than it takes to send the signal
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(server.post, "/v1/score_trajectory", json={"messages": MESSAGES})
        while not re.search(
            r"prmkit_queue_depth [23]", server.get("/metrics").text
        ):  # the first prompt may be the third
            assert not waiting.done(), waiting.result().text
        code, written = server.stop()
        assert len(waiting.result().json()["runs"][0]["steps"]) == 2
    assert code == 143 and "Traceback" not in written


def test_sigterm_refuses_what_a_dead_backend_never_answers_and_ends_in_time(export: Path) -> None:
    """The judge's thread hangs at a server that takes requests and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        backend = ("--backend", "openai", "--base-url", url, "--tokenizer", export, "--template", "qwen")
        server = started("m", *backend, "--drain", "1")
        with ThreadPoolExecutor(2) as pool:
            waiting = pool.submit(server.post, "/v1/score", json={"steps": ['x: {"step_score": 1}']})
            slow = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))
            slow.sendall(f"POST /v1/score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n".encode())
            slow.sendall(b"Content-Length: 99\r\n\r\n{")  # and the rest never comes
            while not re.search(r"prmkit_queue_depth [12]", server.get("/metrics").text):
                assert not waiting.done(), waiting.result().text
            began = time.monotonic()
            code, written = server.stop()
            assert code == 143 and time.monotonic() - began < 10 and "Traceback" not in written, written
            found = waiting.result()
        assert found.status_code == 503 and found.headers["retry-after"] == "1"
        assert b"503" in slow.recv(1000) and "did not finish in time and got 503" in written
        slow.close()


def test_a_challenger_answers_its_share_and_the_log_says_so(
    export: Path, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """Two loaded judges in one process; the second one is asked in its own template."""
    challenger, log = tmp_path / "candidate", tmp_path / "log.jsonl"
    shutil.copytree(model_folders["llama3"], challenger)
    settings = {"template": "llama3", "cutoff_len": 4096, "dtype": "float32", "rubrics": [load_rubric().sha256]}
    write_json(challenger / EXPORT_NOTE, settings)
    server = started(export, "--challenger", challenger, "--share", "0.5", "--log-requests", log)
    steps = [{"task": f"Cancel order {number}.", "step": MESSAGES[3]} for number in range(24)]
    results = server.post("/v1/score", json={"steps": steps}).json()["results"]
    again = server.post("/v1/score", json={"steps": steps[::-1]}).json()["results"][::-1]
    while "challenger" not in (ready := server.get("/ready").json()):
        time.sleep(0.05)
    code, _ = server.stop()
    assert code == 143
    assert ready["judge"] == export.name and ready["challenger"]["judge"] == challenger.name
    names = [line["judge"] for line in results]
    assert names == [line["judge"] for line in again] and set(names) == {export.name, challenger.name}
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    roles = {export.name: "production", challenger.name: "challenger"}
    assert len(lines) == 48 and all(line["role"] == roles[line["judge"]] for line in lines)
    assert [line["score"] for line in results] == pytest.approx([line["score"] for line in again], abs=2e-6)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--port", "99999"), 1, "--port"),
        (("--host", ""), 2, "--host is empty"),
        (("--key-env", "NO_SUCH_VARIABLE"), 2, "NO_SUCH_VARIABLE"),
        (("--key-env", "TWO_LINES"), 2, "--key-env TWO_LINES: contains an invalid character"),
        (("--model", "nowhere"), 1, "nowhere"),
        (("--rubric", "nowhere.yaml"), 2, "nowhere.yaml"),
        (("--challenger", "nowhere"), 2, "nowhere"),
        (("--challenger", "./nowhere"), 1, "nowhere"),
        (("--share", "0.5"), 2, "--challenger"),
        (("--log-prompts",), 2, "--log-requests"),
        (("--log-requests", "notes.md"), 2, "not a request log"),
    ],
)
def test_what_cannot_be_served_is_one_sentence(
    export: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, says: str
) -> None:
    (tmp_path / "notes.md").write_text("# Notes\n")
    command = [sys.executable, str(ROOT / "serve_judge.py"), "--model", str(export), *arguments]
    environment = {**os.environ, "TWO_LINES": "one\ntwo"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment)
    assert done.returncode == code and says in done.stderr.splitlines()[-1], done.stderr
    assert "Traceback" not in done.stderr
