"""The same scores from a model that runs elsewhere: any OpenAI-compatible completions endpoint with logprobs.

Such servers show only the likeliest tokens. So the trie of the candidates is walked: one request for each node that can
matter gives the likeliest tokens behind it. What is not among them is bounded by the least likely one that is; where
the bound leaves room for a difference, the server is asked for that very token, by echoing it as a part of the prompt.
The prompt is sent as token ids, the same as in training, and servers keep its computation between the requests.
"""

import asyncio
import logging
import math
import random
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from prmkit.encoding import ChatEncoding
from prmkit.errors import DataError, UsageError
from prmkit.judging.candidates import ScoreTrie, TrieOf, distribution_of, tries_of
from prmkit.judging.judgement import Distribution, Judgement, Mode, Request
from prmkit.judging.order import Prepared, judgements_in_order, preparing, read_written

log = logging.getLogger("prmkit")

_LONGEST_PAUSE = 30.0
"""Seconds between two attempts."""
_PASSING_TROUBLE = {408, 409, 425, 429, 500, 502, 503, 504}


@dataclass(frozen=True)
class Endpoint:
    """A server, and how to treat it."""

    base_url: str
    """As OpenAI's clients take it: `http://localhost:8000/v1`."""
    model: str
    """The name that the server gives the model."""
    api_key: str | None = None
    concurrency: int = 16
    """The most requests at once."""
    top_logprobs: int = 20
    """How many of the likeliest tokens to ask for. vLLM gives up to 20 unless it is started with --max-logprobs."""
    attempts: int = 6
    timeout: float = 300.0
    """Seconds that one request may take."""
    unknown_share: float = 1e-4
    """The most of the candidates' probability that may stay unknown, and so the most that a score can be off. Less asks
    more often; a server's own rounding in half precision is a hundred times this."""


class _RowFailure(Exception):
    """The server cannot answer for this row; the others go on."""


@dataclass(frozen=True)
class CompletionsJudge:
    """A judge behind an endpoint."""

    endpoint: Endpoint
    encoding: ChatEncoding
    cutoff_len: int

    def score(
        self,
        requests: Iterable[Request],
        *,
        batch_size: int = 8,
        mode: Mode = "expected",
        trim: bool = True,
        max_new_tokens: int = 1024,
    ) -> Iterator[Judgement]:
        """As `Judge.score`; `batch_size` prompts are judged at once, within the endpoint's concurrency.

        Raises:
            DataError: the server cannot be reached, refuses the key, or knows no such model.
            UsageError: the server gives no logprobs, or not as many as are asked for.
        """

        async def judge(connection: "_Connection", prepared: Prepared) -> Judgement:
            try:
                if mode == "expected":
                    return await self._expected(connection, prepared)
                text = await connection.written(prepared.ids, max_new_tokens, self.encoding.stop_ids)
            except _RowFailure as failure:
                return Judgement("failed", reason=str(failure))
            return read_written(text, prepared.shape)

        async def judge_all(ready: Sequence[Prepared]) -> list[Judgement]:
            async with _Connection(self.endpoint, self._ids_by_text) as connection:
                return await _gathered(batch_size, [judge(connection, prepared) for prepared in ready])

        return judgements_in_order(
            requests,
            preparing(self.encoding, self.cutoff_len, trim=trim),
            lambda ready: asyncio.run(judge_all(ready)),
            window=4 * batch_size,
        )

    async def _expected(self, connection: "_Connection", prepared: Prepared) -> Judgement:
        scores: dict[str, Distribution] = {}
        for key in prepared.shape.keys:
            trie = self._trie(prepared.shape, scores)
            walk = _Walk(trie, [*prepared.ids, *trie.context], connection)
            scores[key] = distribution_of(await walk.log_probabilities())
        return Judgement("ok", scores)

    @cached_property
    def _trie(self) -> TrieOf:
        return tries_of(self.encoding)

    def _ids_by_text(self) -> Mapping[str, int | None]:
        return self._vocabulary

    @cached_property
    def _vocabulary(self) -> Mapping[str, int | None]:
        """Token id by text; None for a text that several tokens share."""
        tokenizer = self.encoding.tokenizer
        ids: dict[str, int | None] = {}
        for token, text in enumerate(tokenizer.batch_decode([[token] for token in range(len(tokenizer))])):
            ids[text] = None if text in ids else token
        return ids


async def _gathered(at_once: int, work: Sequence[Coroutine[Any, Any, Judgement]]) -> list[Judgement]:
    gate = asyncio.Semaphore(at_once)

    async def gated(each: Coroutine[Any, Any, Judgement]) -> Judgement:
        async with gate:
            return await each

    return list(await asyncio.gather(*map(gated, work)))


_Question = Callable[[], Coroutine[Any, Any, None]]


class _Walk:
    """The candidates of one key behind one prompt, known better with every request."""

    def __init__(self, trie: ScoreTrie, context: list[int], connection: "_Connection") -> None:
        self._unknown_share = connection.endpoint.unknown_share
        self._trie = trie
        self._context = context
        self._connection = connection
        self._known: dict[int, float] = {}
        """Log-probability by edge."""
        self._bound: dict[int, float] = {}
        """By edge that is not known: the most its log-probability can be."""
        self._edges_of: dict[int, list[int]] = {node: [] for node in range(len(trie.tokens) + 1)}
        for edge, (node, _) in enumerate(trie.edges):
            self._edges_of[node].append(edge)
        self._edge_to = {
            node: trie.edges.index((trie.parents[node - 1], trie.tokens[node - 1])) for node in self._inner
        }

    @property
    def _inner(self) -> range:
        return range(1, len(self._trie.tokens) + 1)

    async def log_probabilities(self) -> list[float]:
        """Of `SCORES`; minus infinity for those that have no share worth a request."""
        while questions := self._questions():
            await asyncio.gather(*(question() for question in questions))
        return self._totals()

    def _totals(self) -> list[float]:
        return [sum(self._known.get(edge, -math.inf) for edge in path) for path in self._trie.paths]

    def _questions(self) -> list["_Question"]:
        """What to ask next: everything whose possible share is too great to stay unknown."""
        open_ends: list[tuple[float, _Question]] = []
        for node, reached in self._reached().items():
            if not self._is_asked(node):
                open_ends.append((reached, partial(self._ask_behind, node)))
            for edge in self._edges_of[node]:
                if edge in self._bound and edge not in self._known:
                    open_ends.append((reached + self._bound[edge], partial(self._ask_for, edge)))
        # The least of them may stay open, as long as they do not add up to more than is allowed.
        open_ends.sort(key=lambda end: end[0])
        known = math.fsum(map(math.exp, self._totals()))
        greatest = max((share for share, _ in open_ends), default=-math.inf)
        allowed = self._unknown_share * max(known, math.exp(greatest))
        questions = []
        for share, question in open_ends:
            allowed -= math.exp(share)
            if allowed < 0:
                questions.append(question)
        return questions

    def _is_asked(self, node: int) -> bool:
        return any(edge in self._known or edge in self._bound for edge in self._edges_of[node])

    def _reached(self) -> dict[int, float]:
        """Log-probability of reaching each node that is known to be reached."""
        reached = {0: 0.0}
        for node in self._inner:
            parent, edge = self._trie.parents[node - 1], self._edge_to[node]
            if parent in reached and edge in self._known:
                reached[node] = reached[parent] + self._known[edge]
        return reached

    def _ids(self, node: int) -> list[int]:
        path: list[int] = []
        while node:
            path.append(self._trie.tokens[node - 1])
            node = self._trie.parents[node - 1]
        return [*self._context, *reversed(path)]

    async def _ask_behind(self, node: int) -> None:
        tokens = [self._trie.edges[edge][1] for edge in self._edges_of[node]]
        known, bounds = await self._connection.likeliest(self._ids(node), tokens)
        for edge, token in zip(self._edges_of[node], tokens, strict=True):
            if token in known:
                self._known[edge] = known[token]
            else:
                self._bound[edge] = bounds[token]

    async def _ask_for(self, edge: int) -> None:
        node, token = self._trie.edges[edge]
        self._known[edge] = await self._connection.echoed([*self._ids(node), token])


class _Connection:
    """Requests to one endpoint: no more than allowed at once, tried again when the trouble may pass."""

    def __init__(self, endpoint: Endpoint, ids_by_text: Callable[[], Mapping[str, int | None]]) -> None:
        import httpx

        self.endpoint = endpoint
        self._ids_by_text = ids_by_text
        self._gate = asyncio.Semaphore(endpoint.concurrency)
        headers = {"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
        self._client = httpx.AsyncClient(timeout=endpoint.timeout, headers=headers)

    async def __aenter__(self) -> "_Connection":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def written(self, ids: Sequence[int], max_tokens: int, stop_ids: Sequence[int]) -> str:
        """What the model writes behind `ids`, greedily."""
        choice = await self._ask(ids, max_tokens=max_tokens, stop_token_ids=list(stop_ids))
        return str(choice["text"])

    async def likeliest(self, ids: Sequence[int], tokens: Sequence[int]) -> tuple[dict[int, float], dict[int, float]]:
        """Log-probabilities behind `ids`, as far as the server shows them.

        Returns:
            By token of `tokens`: the log-probability of those that are shown, and a bound for those that are not.
        """
        choice = await self._ask(
            ids, max_tokens=1, logprobs=self.endpoint.top_logprobs, return_tokens_as_token_ids=True
        )
        shown = _logprobs_of(choice, self.endpoint)["top_logprobs"][0]
        if all(text.startswith("token_id:") for text in shown):
            by_token: dict[int | None, float] = {int(text.partition(":")[2]): value for text, value in shown.items()}
            hidden = set(tokens)
        else:
            by_text = self._ids_by_text()
            by_token = {by_text.get(text): value for text, value in shown.items()}
            # A token whose text others share may be among those that are shown.
            hidden = set(tokens) & set(by_text.values()) if all(text in by_text for text in shown) else set()
        least = min(shown.values())
        return (
            {token: by_token[token] for token in tokens if token in by_token},
            {token: least if token in hidden else 0.0 for token in tokens},
        )

    async def echoed(self, ids: Sequence[int]) -> float:
        """The log-probability of the last one of `ids`."""
        # SGLang looks at the prompt only when logprobs is above zero.
        choice = await self._ask(ids, max_tokens=1, logprobs=1, echo=True)
        values = _logprobs_of(choice, self.endpoint)["token_logprobs"]
        if len(values) < len(ids) or values[len(ids) - 1] is None:
            raise _RowFailure(
                f"a score is not among the {self.endpoint.top_logprobs} likeliest tokens, and the server gives no "
                "logprobs of echoed prompts; raise --top-logprobs (vLLM: --max-logprobs)"
            )
        return float(values[len(ids) - 1])

    async def _ask(self, ids: Sequence[int], **parameters: Any) -> dict[str, Any]:
        """The first choice of one completion.

        Raises:
            _RowFailure: the server refuses this prompt, or keeps failing on it.
            DataError, UsageError: it would refuse every prompt.
        """
        import httpx

        body = {"model": self.endpoint.model, "prompt": list(ids), "temperature": 0, **parameters}
        trouble, unreachable = "", False
        for attempt in range(self.endpoint.attempts):
            if attempt:
                log.info("%s: trying again (%s)", self.endpoint.base_url, trouble)
                # Half of the pause is left to chance, so that many clients do not come back at the same moment.
                await asyncio.sleep(min(0.5 * 2**attempt, _LONGEST_PAUSE) * random.uniform(0.5, 1.0))  # noqa: S311
            async with self._gate:
                try:
                    response = await self._client.post(f"{self.endpoint.base_url.rstrip('/')}/completions", json=body)
                except httpx.ConnectError as error:
                    trouble, unreachable = str(error), True
                    continue
                except httpx.TransportError as error:
                    trouble, unreachable = f"{type(error).__name__} {error}".strip(), False
                    continue
            if response.status_code not in _PASSING_TROUBLE:
                return _choice(response, self.endpoint)
            trouble, unreachable = f"{response.status_code} {response.text[:200]}", False
        if unreachable:
            raise DataError(f"{self.endpoint.base_url}: no server answers ({trouble}). Start it, or mend --base-url.")
        raise _RowFailure(f"the server failed {self.endpoint.attempts} times, at last with: {trouble}")


def _choice(response: Any, endpoint: Endpoint) -> dict[str, Any]:
    status, text = response.status_code, response.text[:300]
    if status in (401, 403):
        raise DataError(f"{endpoint.base_url}: the server refuses the API key ({status}). Name another --api-key-env.")
    if status == 404:
        raise DataError(
            f"{endpoint.base_url}: no completions of a model '{endpoint.model}' there ({text}). "
            "The URL usually ends in /v1, and /v1/models lists the names."
        )
    if status >= 400 and "logprobs" in text:
        raise UsageError(
            f"{endpoint.base_url}: the server refuses {endpoint.top_logprobs} logprobs ({text}). "
            "Lower --top-logprobs, or start vLLM with a higher --max-logprobs."
        )
    if status >= 400:
        raise _RowFailure(f"the server answers {status}: {text}")
    try:
        return dict(response.json()["choices"][0])
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise DataError(f"{endpoint.base_url}: not the answer of a completions endpoint ({text}).") from error


def _logprobs_of(choice: Mapping[str, Any], endpoint: Endpoint) -> Mapping[str, Any]:
    logprobs = choice.get("logprobs")
    if not logprobs or not logprobs.get("top_logprobs") or not logprobs.get("token_logprobs"):
        raise UsageError(
            f"{endpoint.base_url}: the server gives no logprobs, which expected scores are read from. "
            "Use a server that does (vLLM, SGLang), or --mode generate."
        )
    return dict(logprobs)
