"""The same scores from a model that runs elsewhere: any OpenAI-compatible completions endpoint with logprobs.

Such servers show only the likeliest tokens. So the trie of the candidates is walked: one request for each node that can
matter gives the likeliest tokens behind it. What is not among them is bounded by the least likely one that is; where
the bound leaves room for a difference, the server is asked for that very token, by echoing it as a part of the prompt.
The prompt is sent as token ids, the same as in training, and servers keep its computation between the requests.
"""

import asyncio
import math
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import count
from typing import Any

from prmkit.http_client import Connection, Endpoint, RowFailure
from prmkit.judge.batching import Prepared, judgements_in_order, preparing, read_written
from prmkit.judge.score_trie import ScoreTrie, TrieOf, distribution_of, mean_std, tries_of
from prmkit.judge.types import Distribution, Judgement, Mode, Request
from prmkit.prompts.encoding import ChatEncoding


@dataclass(frozen=True)
class CompletionsJudge:
    """A judge behind an endpoint."""

    endpoint: Endpoint
    encoding: ChatEncoding
    cutoff_len: int
    _numbers: Iterator[int] = field(default_factory=count, repr=False, compare=False)
    """Of the requests: the first one tells whether the server can be asked at all."""

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

        A server that answers the first request, and a later one not as it should, fails that row alone.
        """

        async def judge(connection: Connection, prepared: Prepared) -> Judgement:
            try:
                if mode == "expected":
                    return await self._expected(connection, prepared)
                text = await connection.written(prepared.ids, max_new_tokens, self.encoding.stop_ids)
            except RowFailure as failure:
                return Judgement("failed", reason=str(failure))
            return read_written(text, prepared.shape)

        async def judge_all(ready: Sequence[Prepared]) -> list[Judgement]:
            async with Connection(self.endpoint, self._ids_by_text, self._numbers) as connection:
                return await _gathered(batch_size, [judge(connection, prepared) for prepared in ready])

        return judgements_in_order(
            requests,
            preparing(self.encoding, self.cutoff_len, trim=trim),
            lambda ready: asyncio.run(judge_all(ready)),
            window=4 * batch_size,
        )

    async def _expected(self, connection: Connection, prepared: Prepared) -> Judgement:
        scores: dict[str, Distribution] = {}
        for key in prepared.shape.keys:
            trie = self._trie(prepared.shape, scores)
            walk = _Walk(trie, [*prepared.ids, *trie.context], connection)
            log_probabilities = await walk.log_probabilities()
            if max(log_probabilities) == -math.inf:
                raise RowFailure("the model's probabilities are not numbers; the server gives no score any at all")
            scores[key] = distribution_of(log_probabilities)
        return Judgement("ok", scores, std=mean_std(scores))

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

    def __init__(self, trie: ScoreTrie, context: list[int], connection: Connection) -> None:
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
