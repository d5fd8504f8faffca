"""Requests that nobody should send: damaged bodies and broken HTTP. None of them is a fault of the server."""

import asyncio
import json
import random
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
from serving_stub import StubScorer, running_server

from benchmarks.serve import RIGHT, damaged, load_badly


def test_damaged_bodies_are_answered_and_never_with_a_fault_of_the_server() -> None:
    statuses: Counter[int] = Counter()
    with running_server() as url, httpx.Client(base_url=url) as client:
        for number in range(600):
            luck = random.Random(number)
            path, body = luck.choice(list(RIGHT.items()))
            for _ in range(luck.choice([1, 1, 2, 3])):
                body = damaged(body, luck)
            headers = {"Content-Type": "application/json"}
            answer = client.post(path, content=json.dumps(body), headers=headers)
            statuses[answer.status_code] += 1
            assert answer.status_code in (200, 422) or "no score" in answer.json()["error"], (path, body, answer.text)
        assert statuses[200] > 60 and statuses[422] > 200


def nested(levels: int) -> str:
    return "[" * levels + "]" * levels


def test_deep_nesting_is_refused_and_what_a_policy_nests_ends_no_training() -> None:
    call = '{"role": "assistant", "tool_calls": [{"function": {"name": "x", "arguments": NESTED}}]}'
    written = "<tool_call>" + json.dumps({"name": "x", "arguments": "NESTED"}).replace('"NESTED"', nested(990))
    chat = "<|im_start|>assistant\n" + written + "</tool_call><|im_end|>"
    deep = chat.replace(nested(990), nested(100_000))
    headers = {"Content-Type": "application/json"}
    with running_server() as url, httpx.Client(base_url=url) as client:
        for path, body in (
            ("/v1/score_trajectory", f'{{"messages": [{{"role": "user", "content": "a"}}, {call}]}}'),
            ("/v1/score_trajectory", "NESTED"),
            ("/v1/systemone", '{"state": {"a": NESTED}, "questions": {"step_score": {"type": "noul"}}}'),
        ):
            answer = client.post(path, content=body.replace("NESTED", nested(900)), headers=headers)
            assert (answer.status_code, "nested too deeply" in answer.text) == (422, True), answer.text
        for response in (written, chat, deep):
            asked = {"prompt": "<|im_start|>user\na<|im_end|>\n", "response": response, "unscored": "null"}
            assert client.post("/reward", json=asked).status_code == 200


def test_a_body_that_is_not_said_to_be_json_is_refused_with_the_header_to_send() -> None:
    with running_server() as url, httpx.Client(base_url=url) as client:
        form = client.post("/reward", content="{}", headers={"Content-Type": "application/x-www-form-urlencoded"})
        assert form.status_code == 422 and "Content-Type: application/json" in form.json()["error"]
        assert "Content-Type" not in client.post("/reward", json=[]).json()["error"]


def test_a_body_that_comes_too_slowly_is_refused_and_holds_nobody_up() -> None:
    with running_server(body_patience=0.2) as url, httpx.Client(base_url=url) as client:
        host, port = url.removeprefix("http://").split(":")
        slow = [socket.create_connection((host, int(port))) for _ in range(50)]
        for connection in slow:
            connection.sendall(b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{")
        assert client.post("/v1/score", json={"steps": ['good: {"step_score": 1}']}).json()["results"][0]["score"] > 0.8
        for connection in slow:
            with connection.makefile("rb") as stream:  # to its end: the server closes the connection
                answer = stream.read()
            connection.close()
            assert answer.startswith(b"HTTP/1.1 408") and b"did not arrive in time" in answer


def test_a_body_that_comes_byte_by_byte_is_refused_as_well() -> None:
    with running_server(body_patience=0.5) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as slow:
            slow.sendall(b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\n")
            slow.settimeout(0.1)
            answer, began = b"", time.monotonic()
            while not answer:
                assert time.monotonic() - began < 10
                slow.sendall(b"{")
                with suppress(TimeoutError):
                    answer = slow.recv(100)
    assert answer.startswith(b"HTTP/1.1 408")


def test_a_full_queue_is_503_with_retry_after() -> None:
    with running_server(scorer=StubScorer(1.0), limit=1, patience=0.05) as url, ThreadPoolExecutor(8) as pool:

        def ask(number: int) -> httpx.Response:
            return httpx.post(f"{url}/v1/score", json={"steps": [f'good {number}: {{"step_score": 1}}']}, timeout=60)

        first = pool.submit(ask, 0)
        time.sleep(0.3)  # it is being judged
        found = [each.result() for each in [pool.submit(ask, number) for number in range(1, 6)]]
        assert first.result().status_code == 200
    refused = [answer for answer in found if answer.status_code == 503]
    assert len(refused) >= 3 and {answer.headers["retry-after"] for answer in refused} == {"1"}
    assert refused[0].json() == {"error": "the queue is full"}
    assert {answer.status_code for answer in found} <= {200, 503}


def test_broken_http_and_clients_that_hang_up_change_no_good_answer() -> None:
    with running_server() as url:
        found = asyncio.run(load_badly(url, range(400), 16))
    assert set(found["answers"]) <= {"200", "400", "404", "405", "413", "422", "431", "503", "hung up", "closed"}
    assert found["good_answers"].keys() == {"same"}
