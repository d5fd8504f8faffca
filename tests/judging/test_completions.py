"""Scores over HTTP: the same as those of the loaded model, whatever the server shows and however it fails."""

from collections.abc import Iterator
from dataclasses import replace

import httpx
import pytest
from families import FLAT, prompt, prompts

from prmkit.errors import DataError, UsageError
from prmkit.judging.completions import CompletionsJudge, Endpoint
from prmkit.judging.judge import Judge
from prmkit.judging.judgement import Judgement, Request
from prmkit.verdict import asked_shape

REQUESTS = [Request(text, asked_shape(text)) for text in prompts()[:4]]
FLAT_ONE, NESTED_ONE = REQUESTS[:2]


def remote(server: str, judge: Judge, *, family: str = "qwen", flavour: str = "vllm", **changes) -> CompletionsJudge:
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
            assert one.scores[key].coverage == pytest.approx(distribution.coverage, rel=2 * within, abs=0)


@pytest.fixture
def untroubled(server: str) -> Iterator[str]:
    yield server
    httpx.post(f"{server}/trouble", json={"times": 0})


def test_scores_are_those_of_the_loaded_model(server: str, judges: dict[str, Judge]) -> None:
    judge = judges["qwen"]
    assert_same(list(remote(server, judge).score(REQUESTS[:2])), list(judge.score(REQUESTS[:2])))


def test_few_logprobs_give_the_same_scores(server: str, judges: dict[str, Judge]) -> None:
    """What the server does not show is asked for by echoing it, down to any share."""
    judge = judges["qwen"]
    exact = remote(server, judge, top_logprobs=3, unknown_share=1e-7)
    assert_same(list(exact.score([FLAT_ONE])), list(judge.score([FLAT_ONE])), within=1e-6)


@pytest.mark.parametrize("family", ["qwen", "llama3", "mistral"])
def test_tokens_named_by_their_texts_give_the_same_scores(server: str, judges: dict[str, Judge], family: str) -> None:
    """Also where several tokens share one text, as `0` and ` 0` do in SentencePiece."""
    judge = judges[family]
    named = remote(server, judge, family=family, flavour="sglang")
    assert_same(list(named.score([FLAT_ONE])), list(judge.score([FLAT_ONE])))


def test_written_verdicts_are_those_of_the_loaded_model(server: str, judges: dict[str, Judge]) -> None:
    judge = judges["qwen"]
    asked = {"mode": "generate", "max_new_tokens": 32}
    assert list(remote(server, judge).score(REQUESTS[:2], **asked)) == list(judge.score(REQUESTS[:2], **asked))


QUICK = {"mode": "generate", "max_new_tokens": 2}


def test_passing_trouble_is_waited_out(untroubled: str, judges: dict[str, Judge]) -> None:
    for status in (503, 429):
        httpx.post(f"{untroubled}/trouble", json={"status": status, "times": 2})
        (judged,) = remote(untroubled, judges["qwen"]).score([FLAT_ONE], **QUICK)
        assert judged.status == "unparsed", "it was answered in the end, with two tokens"


@pytest.mark.parametrize("mode", ["generate", "expected"])
def test_lasting_trouble_fails_the_row_and_not_the_others(untroubled: str, judges: dict[str, Judge], mode: str) -> None:
    httpx.post(f"{untroubled}/trouble", json={"status": 500, "times": 3})
    judge = remote(untroubled, judges["qwen"], concurrency=1)
    judged = list(judge.score([FLAT_ONE, REQUESTS[2]], batch_size=1, mode=mode, max_new_tokens=2))
    assert [judgement.status for judgement in judged] == ["failed", "unparsed" if mode == "generate" else "ok"]
    assert judged[0].reason.startswith("the server failed 3 times, at last with: 500")


def test_a_prompt_that_the_server_refuses_fails_alone(server: str, judges: dict[str, Judge]) -> None:
    long = prompt("again and " * 200, FLAT)
    judged = list(remote(server, judges["qwen"]).score([Request(long, asked_shape(long)), FLAT_ONE], **QUICK))
    assert [judgement.status for judgement in judged] == ["failed", "unparsed"]
    assert "the server answers 400" in judged[0].reason
    assert "context" in judged[0].reason


def test_no_more_requests_at_once_than_allowed(server: str, judges: dict[str, Judge]) -> None:
    httpx.post(f"{server}/trouble", json={"most_at_once": 0})
    list(remote(server, judges["qwen"], concurrency=3).score([FLAT_ONE]))
    assert httpx.post(f"{server}/trouble", json={}).json()["most_at_once"] == 3


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"api_key": "wrong"}, DataError, "refuses the API key"),
        ({"model": "other"}, DataError, "no completions of a model 'other'"),
        ({"top_logprobs": 101}, UsageError, "--max-logprobs"),
        ({"base_url": "http://127.0.0.1:9/v1", "attempts": 1}, DataError, "no server answers"),
    ],
)
def test_what_would_fail_every_row_stops_at_once(server: str, judges, changes: dict, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        list(remote(server, judges["qwen"], **changes).score(REQUESTS))


def test_servers_without_logprobs_are_told_from_those_that_only_do_not_echo(server: str, judges) -> None:
    judge = judges["qwen"]
    wordless = remote(server, judge, flavour="wordless")
    with pytest.raises(UsageError, match="gives no logprobs"):
        list(wordless.score(REQUESTS))
    assert next(wordless.score([FLAT_ONE], **QUICK)).status == "unparsed"
    (judged,) = remote(server, judge, flavour="echoless", top_logprobs=1).score([FLAT_ONE])
    assert judged.status == "failed"
    assert "raise --top-logprobs" in judged.reason
