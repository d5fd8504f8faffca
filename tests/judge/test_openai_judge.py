"""Scores over HTTP: the same as those of the loaded model, whatever the server shows and however it fails."""

import gzip
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import httpx
import pytest
from families import FLAT, prompt, prompts

from prmkit import http_client
from prmkit.errors import DataError, UsageError
from prmkit.http_client import Endpoint, pause_asked_for
from prmkit.judge.openai_judge import CompletionsJudge
from prmkit.judge.transformers_judge import LocalJudge
from prmkit.judge.types import LOW_REACH, Judgement, Request, ScoringOptions
from prmkit.verdict import asked_shape

pytestmark = pytest.mark.slow

REQUESTS = [Request(text, asked_shape(text)) for text in prompts()[:4]]
FLAT_ONE, NESTED_ONE = REQUESTS[:2]


def remote(
    server: str, judge: LocalJudge, *, family: str = "qwen", flavour: str = "vllm", **changes
) -> CompletionsJudge:
    endpoint = replace(Endpoint(f"{server}/{family}/{flavour}/v1", "tiny", attempts=3), **changes)
    return CompletionsJudge(endpoint, judge.encoding, judge.source.cutoff_len)


def assert_same(got: list[Judgement], expected: list[Judgement], *, within: float = 1e-4) -> None:
    for one, other in zip(got, expected, strict=True):
        assert one.status == other.status
        assert one.prompt_tokens == other.prompt_tokens
        assert list(one.scores) == list(other.scores)
        for key, distribution in other.scores.items():
            assert one.scores[key].mean == pytest.approx(distribution.mean, abs=within)
            assert one.scores[key].std == pytest.approx(distribution.std, abs=2 * within)
            assert one.scores[key].mode == distribution.mode
            assert one.scores[key].label_mass == pytest.approx(distribution.label_mass, rel=2 * within, abs=0)
            if distribution.reach > LOW_REACH:
                assert one.scores[key].reach == pytest.approx(distribution.reach, rel=2 * within)
            else:
                assert one.scores[key].reach < LOW_REACH


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "_LONGEST_PAUSE", 0.05)


@pytest.fixture
def untroubled(server: str) -> Iterator[str]:
    yield server
    httpx.post(f"{server}/trouble", json={"times": 0})


def test_scores_are_those_of_the_loaded_model(server: str, judges: dict[str, LocalJudge]) -> None:
    judge = judges["qwen"]
    assert_same(list(remote(server, judge).score(REQUESTS[:2])), list(judge.score(REQUESTS[:2])))


def answers_given(server: str) -> int:
    return httpx.post(f"{server}/trouble", json={}).json()["answers"]


@pytest.mark.parametrize("family", ["qwen", "llama3", "mistral"])
def test_a_server_that_takes_token_ids_is_read_exactly_in_one_request_a_key(
    server: str, judges: dict[str, LocalJudge], family: str
) -> None:
    judge = judges[family]
    before = answers_given(server)
    (judged,) = remote(server, judge, family=family, flavour="exact").score([FLAT_ONE])
    assert answers_given(server) - before == 2  # one to find out, one for the key
    assert_same([judged], list(judge.score([FLAT_ONE])), within=2e-6)


@pytest.mark.parametrize("family", ["qwen", "mistral"])
def test_sglangs_scoring_is_read_exactly_in_one_request_a_key(
    server: str, judges: dict[str, LocalJudge], family: str
) -> None:
    judge = judges[family]
    before = answers_given(server)
    remote_judge = remote(server, judge, family=family, flavour="scoring")
    (judged,) = remote_judge.score([FLAT_ONE])
    assert answers_given(server) - before == 5  # four to find out, one for the key
    assert remote_judge._state.exact_by == "score"
    assert_same([judged], list(judge.score([FLAT_ONE])), within=1e-5)
    assert_same(list(remote_judge.score(REQUESTS)), list(judge.score(REQUESTS)), within=1e-5)


def test_a_scoring_endpoint_that_answers_for_another_prompt_is_not_used(
    server: str, judges: dict[str, LocalJudge]
) -> None:
    """As SGLang's with --multi-item-scoring-delimiter: its answer has the right form and wrong numbers."""
    judge = remote(server, judges["qwen"], flavour="delimited")
    assert_same(list(judge.score([FLAT_ONE])), list(judges["qwen"].score([FLAT_ONE])))
    assert judge._state.exact_by == "nothing"


@pytest.mark.parametrize(
    "answer",
    [
        {"scores": [[0.5]]},
        {"token_logprobs": None},
        {"token_logprobs": [[-1.0]]},
        {"token_logprobs": [["a"] * 99]},
        {"token_logprobs": 7},
        {"error": "no"},
        [1, 2],
        "hello",
    ],
)
def test_another_kind_of_score_endpoint_is_no_reason_to_fail(
    server: str, judges: dict[str, LocalJudge], monkeypatch: Any, answer: Any
) -> None:
    post = http_client.Connection._post_once

    async def other(self: Any, path: str, body: Any) -> bytes:
        return json.dumps(answer).encode() if path == "score" else await post(self, path, body)

    monkeypatch.setattr(http_client.Connection, "_post_once", other)
    judge = remote(server, judges["qwen"])
    (judged,) = judge.score([FLAT_ONE])
    assert judged.scores and judge._state.exact_by == "nothing"


def test_two_kinds_of_logprobs_are_never_asked_for(
    server: str, judges: dict[str, LocalJudge], monkeypatch: Any
) -> None:
    """An exact request damages the likeliest tokens of those beside it, also our own."""
    sent: list[bool] = []
    post = http_client.Connection._post_once

    async def watched(self: Any, path: str, body: Any) -> bytes:
        sent.append("logprob_token_ids" in body)
        return await post(self, path, body)

    monkeypatch.setattr(http_client.Connection, "_post_once", watched)
    for flavour, logprobs, expected in (("exact", "exact", {True}), ("vllm", "top", {False})):
        sent.clear()
        list(remote(server, judges["qwen"], flavour=flavour, logprobs=logprobs).score(REQUESTS[:2]))
        assert set(sent) == expected
    sent.clear()
    list(remote(server, judges["qwen"], flavour="vllm").score([FLAT_ONE]))
    assert sent[0] and not any(sent[1:])  # asked once whether it can


def test_a_server_that_dies_is_left_out_and_the_other_one_answers(server: str, judges: dict[str, LocalJudge]) -> None:
    dead = "http://127.0.0.1:9/v1"
    alive = f"{server}/qwen/exact/v1"
    judge = CompletionsJudge(
        Endpoint(dead, "tiny", others=(alive,), attempts=2), judges["qwen"].encoding, judges["qwen"].source.cutoff_len
    )
    assert_same(list(judge.score(REQUESTS)), list(judges["qwen"].score(REQUESTS)), within=1e-5)
    assert judge._pool.checked == {alive} and list(judge._pool.next_try) == [dead]
    neither = replace(judge, endpoint=Endpoint(dead, "tiny", others=("http://127.0.0.1:10/v1",), attempts=2))
    with pytest.raises(DataError, match="no server responds"):
        list(neither.score([FLAT_ONE]))


def test_a_server_with_other_weights_is_refused_before_it_scores_anything(
    server: str, judges: dict[str, LocalJudge]
) -> None:
    """Under the same model name, at the beginning, and when it comes back after a failure."""
    judge = judges["qwen"]
    right, dead = f"{server}/qwen/exact/v1", "http://127.0.0.1:9/v1"
    for flavour, mode in (("exact", "expected"), ("vllm", "expected"), ("vllm", "generate")):
        wrong = f"{server}/other/{flavour}/v1"
        both = remote(server, judge, flavour=flavour, others=(wrong,))
        with pytest.raises(DataError, match=f"{wrong} gives .* to which {both.endpoint.name} gives .* other weights"):
            list(both.score(REQUESTS, ScoringOptions(mode=mode)))
    later = CompletionsJudge(Endpoint(right, "tiny", others=(dead,), attempts=1), judge.encoding, 2048)
    list(later.score([FLAT_ONE]))
    assert later._pool.checked == {right}
    object.__setattr__(later, "endpoint", replace(later.endpoint, others=(wrong,)))  # the same place, another server
    with pytest.raises(DataError, match="other weights"):
        list(later.score([FLAT_ONE]))


def test_servers_without_logprobs_share_generated_verdicts_unchecked(
    server: str, judges: dict[str, LocalJudge], narrated: Any
) -> None:
    wordless = remote(server, judges["qwen"], flavour="wordless")
    again = wordless.endpoint.base_url.replace("127.0.0.1", "localhost")
    both = replace(wordless, endpoint=replace(wordless.endpoint, others=(again,)))
    assert len(list(both.score(REQUESTS, ScoringOptions(mode="generate", max_new_tokens=5)))) == len(REQUESTS)
    assert "is not checked" in narrated.text
    with pytest.raises(UsageError, match="no logprobs"):
        list(replace(both).score(REQUESTS))


def test_a_proxy_in_the_environment_is_named_where_nothing_responds(
    judges: dict[str, LocalJudge], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    nowhere = remote("http://127.0.0.1:9", judges["qwen"], attempts=1)
    with pytest.raises(DataError, match=r"no server responds .* through the proxy in the environment"):
        list(nowhere.score([FLAT_ONE]))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(DataError, match=r"or correct --base-url\.$"):
        list(nowhere.score([FLAT_ONE]))


def test_requests_go_to_the_server_with_the_fewest_under_way(
    server: str, judges: dict[str, LocalJudge], monkeypatch: Any
) -> None:
    asked: list[str] = []
    post = http_client.Connection._post_to

    async def watched(self: Any, url: str, body: Any) -> bytes:
        asked.append(url)
        return await post(self, url, body)

    monkeypatch.setattr(http_client.Connection, "_post_to", watched)
    one, other = f"{server}/qwen/exact/v1", f"{server.replace('127.0.0.1', 'localhost')}/qwen/exact/v1"
    endpoint = Endpoint(one, "tiny", others=(other,))
    judge = CompletionsJudge(endpoint, judges["qwen"].encoding, judges["qwen"].source.cutoff_len)
    list(judge.score(REQUESTS))
    assert sum(url.startswith(one) for url in asked) >= 2 and sum(url.startswith(other) for url in asked) >= 2


def test_a_model_that_would_write_anything_else_does_not_cost_thousands_of_requests(
    server: str, judges: dict[str, LocalJudge]
) -> None:
    before = answers_given(server)
    careful = remote(server, judges["qwen"], top_logprobs=1, unknown_share=1e-12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prmkit.judge.openai_judge._TrieSearch._MOST_REQUESTS", 20)
        (judged,) = careful.score([FLAT_ONE])
    assert judged.status == "failed" and "more than 20 requests for one score" in str(judged.reason)
    assert answers_given(server) - before < 60


def test_few_logprobs_give_the_same_scores(server: str, judges: dict[str, LocalJudge]) -> None:
    """What the server does not show is asked for by echoing it, down to any share."""
    judge = judges["qwen"]
    exact = remote(server, judge, top_logprobs=3, unknown_share=1e-7)
    assert_same(list(exact.score([FLAT_ONE])), list(judge.score([FLAT_ONE])), within=1e-6)


def test_answers_in_the_form_of_llama_server_give_the_same_scores(server: str, judges: dict[str, LocalJudge]) -> None:
    judge = judges["qwen"]
    llama = remote(server, judge, flavour="llama", top_logprobs=300)
    assert_same(list(llama.score([FLAT_ONE])), list(judge.score([FLAT_ONE])))
    (judged,) = remote(server, judge, flavour="llama", top_logprobs=1).score([FLAT_ONE])
    assert judged.status == "failed"
    assert "(" in judged.reason and "Only no echo is supported" in judged.reason and "raise --top-" in judged.reason


def test_a_vllm_that_another_client_disturbs_is_asked_again(server: str, judges: dict[str, LocalJudge]) -> None:
    judge = judges["qwen"]
    busy = remote(server, judge, flavour="busy", attempts=20)
    assert_same(list(busy.score([FLAT_ONE])), list(judge.score([FLAT_ONE])))
    (judged,) = fails(server, judge, flavour="busy", attempts=1)
    assert "of 20 requested top logprobs were returned. vLLM does this" in judged.reason


def fails(server: str, judge: LocalJudge, **changes: Any) -> list[Judgement]:
    """One row at a server that has given a good answer before."""
    used = remote(server, judge, **changes)
    used._state.is_usable = True
    return list(used.score([FLAT_ONE]))


@pytest.mark.parametrize("family", ["qwen", "llama3", "mistral"])
def test_tokens_named_by_their_texts_give_the_same_scores(
    server: str, judges: dict[str, LocalJudge], family: str
) -> None:
    """Also where several tokens share one text, as `0` and ` 0` do in SentencePiece."""
    judge = judges[family]
    named = remote(server, judge, family=family, flavour="sglang")
    assert_same(list(named.score([FLAT_ONE])), list(judge.score([FLAT_ONE])))


def test_written_verdicts_are_those_of_the_loaded_model(server: str, judges: dict[str, LocalJudge]) -> None:
    judge = judges["qwen"]
    asked = ScoringOptions("generate", max_new_tokens=32)
    assert list(remote(server, judge).score(REQUESTS[:2], asked)) == list(judge.score(REQUESTS[:2], asked))


QUICK = ScoringOptions("generate", max_new_tokens=2)


def test_passing_trouble_is_waited_out(untroubled: str, judges: dict[str, LocalJudge]) -> None:
    for status in (503, 429):
        httpx.post(f"{untroubled}/trouble", json={"status": status, "times": 2})
        (judged,) = remote(untroubled, judges["qwen"]).score([FLAT_ONE], QUICK)
        assert judged.status == "unparsed", "it was answered in the end, with two tokens"


@pytest.mark.parametrize("mode", ["generate", "expected"])
def test_lasting_trouble_fails_the_row_and_not_the_others(
    untroubled: str, judges: dict[str, LocalJudge], mode: str
) -> None:
    httpx.post(f"{untroubled}/trouble", json={"status": 500, "times": 3})
    judge = remote(untroubled, judges["qwen"], concurrency=1)
    judged = list(judge.score([FLAT_ONE, REQUESTS[2]], ScoringOptions(batch_size=1, mode=mode, max_new_tokens=2)))
    assert judged[0].status == "failed"
    assert judged[1].status == "unparsed" if mode == "generate" else judged[1].scores
    assert judged[0].reason.startswith("the request failed after 3 attempts; last error: 500")


def test_a_prompt_that_the_server_refuses_fails_alone(server: str, judges: dict[str, LocalJudge]) -> None:
    long = prompt("again and " * 200, FLAT)
    judged = list(remote(server, judges["qwen"]).score([Request(long, asked_shape(long)), FLAT_ONE], QUICK))
    assert [judgement.status for judgement in judged] == ["failed", "unparsed"]
    assert "returns 400" in judged[0].reason
    assert "context" in judged[0].reason


def test_no_more_requests_at_once_than_allowed(server: str, judges: dict[str, LocalJudge]) -> None:
    httpx.post(f"{server}/trouble", json={"most_at_once": 0})
    list(remote(server, judges["qwen"], concurrency=3).score([FLAT_ONE]))
    assert httpx.post(f"{server}/trouble", json={}).json()["most_at_once"] == 3


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"api_key": "wrong"}, DataError, "refuses the API key"),
        ({"model": "other"}, DataError, "no model 'other'"),
        ({"top_logprobs": 101}, UsageError, "at most 20 logprobs are given.*lower --top-logprobs"),
        (
            {"flavour": "boolean"},
            DataError,
            "first 4 prompts: .* returns 422: .*valid boolean, unable to interpret input",
        ),
        (
            {"flavour": "textual"},
            DataError,
            "first 4 prompts: .* returns 422: .*prompt: Input should be a valid string",
        ),
        ({"base_url": "http://127.0.0.1:9/v1", "attempts": 1}, DataError, "no server responds"),
    ],
)
def test_what_would_fail_every_row_stops_at_once(server: str, judges, changes: dict, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        list(remote(server, judges["qwen"], **changes).score(REQUESTS))


@pytest.mark.parametrize("flavour", ["boolean", "textual"])
def test_no_advice_is_given_that_does_not_follow(server: str, judges, flavour: str) -> None:
    with pytest.raises(DataError) as caught:
        list(remote(server, judges["qwen"], flavour=flavour).score(REQUESTS))
    assert "--" not in str(caught.value)


def test_the_first_window_without_a_usable_answer_stops_the_job(server: str, judges) -> None:
    asked = []

    def counted() -> Iterator[Request]:
        for number in range(100):
            asked.append(number)
            yield replace(FLAT_ONE, prompt=f"{number} {FLAT_ONE.prompt}")

    with pytest.raises(DataError, match="no usable response for the first 8 prompts"):
        list(remote(server, judges["qwen"], flavour="textual").score(counted(), ScoringOptions(batch_size=2)))
    assert len(asked) == 8


def test_servers_without_logprobs_differ_from_those_that_only_do_not_echo(server: str, judges) -> None:
    judge = judges["qwen"]
    wordless = remote(server, judge, flavour="wordless")
    with pytest.raises(UsageError, match="returns no logprobs"):
        list(wordless.score(REQUESTS))
    assert next(wordless.score([FLAT_ONE], QUICK)).status == "unparsed"
    (judged,) = remote(server, judge, flavour="echoless", top_logprobs=1).score([FLAT_ONE])
    assert judged.status == "failed"
    assert "raise --top-logprobs" in judged.reason


# --- answers that are not as they should be ---------------------------------------------------------------------------

Answer = tuple[int, bytes, dict[str, str]]


@contextmanager
def answering(answer: Callable[[int, dict[str, Any]], Answer]) -> Iterator[str]:
    """The address of a server that answers request number n, from 0, in this way."""
    asked: list[None] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(None)
            status, content, headers = answer(len(asked) - 1, body)
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(content))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            with suppress(BrokenPipeError):  # the judge may not have waited
                self.wfile.write(content)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        server.shutdown()


def good(body: dict[str, Any]) -> dict[str, Any]:
    """Every token is as likely as the next one."""
    shown = {f"token_id:{token}": -6.0 for token in range(body.get("logprobs") or 0)}
    values = [None, *[-6.0] * len(body["prompt"])] if body.get("echo") else [-6.0]
    return {"text": '{"reasonableness_score": 0.50}', "logprobs": {"top_logprobs": [shown], "token_logprobs": values}}


def answered(choice: object, *, status: int = 200, **headers: str) -> Answer:
    return status, json.dumps({"choices": [choice]}).encode(), headers


def asked_at(
    url: str, judge: LocalJudge, requests: list[Request], mode: str = "expected", *, usable: bool = False, **changes
) -> list[Judgement]:
    """The judgements of a server; `usable`: it has given a good answer before."""
    endpoint = replace(Endpoint(url, "tiny", attempts=2, concurrency=1), **changes)
    on_server = CompletionsJudge(endpoint, judge.encoding, judge.source.cutoff_len)
    on_server._state.is_usable = usable
    return list(on_server.score(requests, ScoringOptions(mode=mode, batch_size=1)))


TOP = "top_logprobs"
UNFIT = {
    "top_logprobs are null": lambda body: {"logprobs": {TOP: [None]}},
    "top_logprobs are empty": lambda body: {"logprobs": {TOP: [{}]}},
    "top_logprobs are an object": lambda body: {"logprobs": {TOP: {"a": 1}}},
    "logprobs are a list": lambda body: {"logprobs": [1]},
    "logprobs are a chat's without the others": lambda body: {
        "logprobs": {"content": [{"token": "a", "logprob": -1.0}]}
    },
    "a place is a string": lambda body: {"logprobs": {"content": ["a"]}},
    "a place holds strings": lambda body: {"logprobs": {"content": [{"top_logprobs": ["a"]}]}},
    "a logprob is missing": lambda body: {"logprobs": {"content": [{"top_logprobs": [{"id": 5}]}]}},
    "a logprob is a text": lambda body: {"logprobs": {TOP: [{"token_id:5": "-1.0"}]}},
    "a logprob is null": lambda body: {"logprobs": {TOP: [{"token_id:5": None}]}},
    "a token has no id": lambda body: {"logprobs": {TOP: [{"token_id:abc": -1.0}]}},
    "the choice is a text": lambda body: "0.5",
    "the choice is null": lambda body: None,
}


@pytest.mark.parametrize("unfit", UNFIT.values(), ids=UNFIT)
def test_an_unfit_answer_stops_the_job_at_first_and_fails_its_row_later(judges, unfit: Callable) -> None:
    with answering(lambda _, body: answered(unfit(body))) as url:
        with pytest.raises((DataError, UsageError), match=url):
            asked_at(url, judges["qwen"], [FLAT_ONE])
        (judged,) = asked_at(url, judges["qwen"], [FLAT_ONE], usable=True)
    assert judged.status == "failed" and url in judged.reason


@pytest.mark.parametrize("choice", [{}, {"text": None}, {"text": 5}])
def test_a_text_that_is_none_is_not_read(judges, choice: dict) -> None:
    with answering(lambda _, body: answered(choice)) as url, pytest.raises(DataError, match="its text is"):
        asked_at(url, judges["qwen"], [FLAT_ONE], mode="generate")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1000.0, float("-inf"), -9999.0])
def test_probabilities_that_are_no_numbers_are_no_score(judges, value: float) -> None:
    def answer(_: int, body: dict[str, Any]) -> Answer:
        choice = good(body)
        choice["logprobs"] = {
            TOP: [dict.fromkeys(choice["logprobs"][TOP][0], value)],
            "token_logprobs": [value] * (len(body["prompt"]) + 1),
        }
        return answered(choice)

    with answering(answer) as url:
        (judged,) = asked_at(url, judges["qwen"], [FLAT_ONE], usable=True)
    assert (judged.status, judged.score) == ("failed", None)
    no_score = f"the server returned the logprob {value}, which is not the logarithm of a probability"
    assert ("requested top logprobs" if value < -9000 else no_score) in judged.reason


@pytest.mark.parametrize("way", ["exact", "top"])
@pytest.mark.parametrize("value", [0.0, -1.0])
def test_probabilities_that_add_up_to_more_than_one_are_no_score(judges, way: str, value: float) -> None:
    """Zeros of a proxy, or the logits of vLLM's --logprobs-mode, would be a score with a label mass of 1."""

    def answer(_: int, body: dict[str, Any]) -> Answer:
        tokens = body.get("logprob_token_ids") or range(body["logprobs"])
        shown = {"logprobs": {TOP: [{f"token_id:{token}": value for token in tokens}]}}
        count = len(body["prompt"]) if isinstance(body["prompt"][0], list) else 1
        return 200, json.dumps({"choices": [{"index": place, **shown} for place in range(count)]}).encode(), {}

    with answering(answer) as url, pytest.raises(DataError, match="does not return log-probabilities"):
        asked_at(url, judges["qwen"], [FLAT_ONE], logprobs=way)


def test_an_index_that_is_no_number_fails_its_row(judges) -> None:
    def answer(_: int, body: dict[str, Any]) -> Answer:
        shown = {"logprobs": {TOP: [{f"token_id:{token}": -9.0 for token in body["logprob_token_ids"]}]}}
        count = len(body["prompt"]) if isinstance(body["prompt"][0], list) else 1
        return 200, json.dumps({"choices": [{"index": [place], **shown} for place in range(count)]}).encode(), {}

    with answering(answer) as url:
        (judged,) = asked_at(url, judges["qwen"], [FLAT_ONE], usable=True)
    assert judged.status == "failed" and "not the response of a completions endpoint" in judged.reason


@pytest.mark.parametrize(
    "answer",
    [
        (200, b"no gzip", {"Content-Encoding": "gzip"}),
        (
            200,
            gzip.compress(b"{}", mtime=0)[:-9],
            {"Content-Encoding": "gzip", "Content-Length": "500", "Connection": "close"},
        ),
    ],
)
def test_an_answer_that_cannot_be_unpacked_fails_its_row(judges, answer: Answer) -> None:
    with answering(lambda *_: answer) as url:
        (judged,) = asked_at(url, judges["qwen"], [FLAT_ONE], usable=True, timeout=2.0)
    assert judged.status == "failed" and judged.reason.startswith("the request failed after 2 attempts")


def test_a_refusal_that_only_mentions_logprobs_fails_its_row(judges) -> None:
    refusal = (400, b'{"error": "prompt too long; you asked for logprobs"}', {})
    with answering(lambda number, body: refusal if number == 1 else answered(good(body))) as url:
        first, second = asked_at(url, judges["qwen"], [FLAT_ONE, REQUESTS[2]], mode="generate")
    assert (first.status, second.status) == ("ok", "failed")
    assert second.reason.endswith('returns 400: {"error": "prompt too long; you asked for logprobs"}')


@pytest.mark.parametrize("part", [b" ", b"HTTP/1.1 103 Early Hints\r\n\r\n"], ids=["bytes", "hints"])
def test_a_server_that_never_ends_is_not_waited_for_longer_than_asked(judges, part: bytes) -> None:
    before = time.monotonic()
    with dripping(part) as url:
        (judged,) = asked_at(url, judges["qwen"], [FLAT_ONE], usable=True, timeout=0.3)
        assert time.monotonic() - before < 4
    assert judged.reason.endswith("no complete response within 0.3 s")


@contextmanager
def dripping(part: bytes) -> Iterator[str]:
    """The address of a server that sends a little now and then, without end."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_POST(self) -> None:
            if part.isspace():
                self.send_response(200)
                self.end_headers()
            with suppress(OSError):
                while True:
                    self.wfile.write(part)
                    time.sleep(0.05)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        server.shutdown()


@pytest.mark.parametrize("headers", [{}, {"Content-Encoding": "gzip"}], ids=["plain", "packed"])
def test_a_huge_answer_is_not_read_to_its_end(judges, headers: dict[str, str]) -> None:
    huge = b" " * (40 << 20)
    body = gzip.compress(huge, 1) if headers else huge
    with answering(lambda *_: (200, body, headers)) as url:
        (judged,) = asked_at(url, judges["qwen"], [FLAT_ONE], usable=True, attempts=1)
    assert judged.reason.endswith("a response of more than 16 MiB")


@pytest.mark.parametrize("status", [200, 400, 500])
@pytest.mark.parametrize("charset", ["undefined", "idna", "rot13", "hex", "utf-16", "punycode"])
def test_an_odd_charset_fails_its_row(judges, charset: str, status: int) -> None:
    headers = {"Content-Type": f"application/json; charset={charset}"}
    with answering(lambda *_: (status, b"{\xff}", headers)) as url:
        (judged,) = asked_at(url, judges["qwen"], [FLAT_ONE], usable=True, attempts=1)
    assert judged.status == "failed"


@pytest.mark.parametrize(
    "answer",
    [
        (429, b"", {"Retry-After": "Mon, 01 Jan 99999999999999999999 00:00:00 GMT"}),
        (302, b"", {"Location": "javascript:1"}),
        (302, b"", {"Location": "http://[::1"}),
        (200, b'{"choices": [{"logprobs": {"top_logprobs": [{"token_id:5": 1' + b"0" * 400 + b"}]}}]}", {}),
        (200, b"[" * 100_000, {}),
    ],
    ids=["far future", "no address", "half an address", "huge number", "deep"],
)
def test_odd_headers_and_contents_fail_their_row(judges, answer: Answer) -> None:
    with answering(lambda *_: answer) as url:
        (judged,) = asked_at(url, judges["qwen"], [FLAT_ONE], usable=True, attempts=1)
    assert judged.status == "failed"


def test_a_server_that_asks_for_a_pause_gets_it(judges) -> None:
    times: list[float] = []

    def answer(number: int, body: dict[str, Any]) -> Answer:
        times.append(time.monotonic())
        return answered(good(body)) if number else (429, b"slow down", {"Retry-After": "2"})

    with answering(answer) as url:
        (judged,) = asked_at(url, judges["qwen"], [FLAT_ONE], mode="generate")
    assert judged.status == "ok"
    assert times[1] - times[0] >= 1.9


def test_pauses_are_read_as_numbers_and_as_dates_and_have_an_end() -> None:
    assert pause_asked_for("7") == 7.0
    assert pause_asked_for("99999") == pause_asked_for(formatdate(time.time() + 9999, usegmt=True)) == 120.0
    assert 25 < pause_asked_for(formatdate(time.time() + 30, usegmt=True)) <= 30
    assert {pause_asked_for(header) for header in (None, "", "-5", "soon", "nan", "inf")} == {0.0}


def test_a_key_is_never_repeated(judges) -> None:
    """httpx repeats a header that it cannot send, and servers repeat what they were sent."""
    with answering(lambda _, body: answered(good(body))) as url, pytest.raises(DataError) as caught:
        asked_at(url, judges["qwen"], [FLAT_ONE], api_key="secret\n")
    assert "secret" not in str(caught.value) and "LocalProtocolError" in str(caught.value)
    for status in (200, 400, 500):
        with answering(lambda *_, status=status: (status, b'{"you sent": "Bearer s3cr3t pass"}', {})) as url:
            address = url.replace("//", "//user:pass@")
            (judged,) = asked_at(address, judges["qwen"], [FLAT_ONE], usable=True, api_key="s3cr3t", attempts=1)
            assert "Bearer *** ***" in judged.reason and "user" not in judged.reason


def test_nothing_of_the_models_own_sampling_settings_applies(judges) -> None:
    bodies = []
    with answering(lambda _, body: bodies.append(body) or answered(good(body))) as url:
        asked_at(url, judges["qwen"], [FLAT_ONE], mode="generate")
    neutral = {"temperature": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1, "presence_penalty": 0}
    assert neutral.items() <= bodies[0].items()
