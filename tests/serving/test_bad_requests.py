"""Requests that nobody should send: damaged bodies and broken HTTP. None of them is a fault of the server."""

import asyncio
import json
import random
from collections import Counter

import httpx
from serving_stub import running_server

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


def test_broken_http_and_clients_that_hang_up_change_no_good_answer() -> None:
    with running_server() as url:
        found = asyncio.run(load_badly(url, range(400), 16))
    assert set(found["answers"]) <= {"200", "400", "404", "405", "413", "422", "431", "503", "hung up", "closed"}
    assert found["good_answers"].keys() == {"same"}
