"""Score with a remote model: any OpenAI-compatible completions endpoint with logprobs gives the same scores.

vLLM and SGLang return the probability of any given token, over the complete vocabulary. So one request per key is
enough, with all nodes of the candidates' trie as a list of prompts.

Other servers return only top logprobs. For those, the trie is searched: one request per relevant node returns the top
logprobs after it. The probability of any other token is at most that of the least likely token returned. If this bound
is too loose, the exact probability of a token is requested by echoing the token as part of the prompt. The prompt is
sent as token ids, the same as in training, and servers cache its computation between requests.

The two kinds of request are never sent at the same time, because in current versions of vLLM an exact request corrupts
the top logprobs of requests that are computed in the same batch.
"""

import asyncio
import math
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from prmkit.errors import DataError, UsageError
from prmkit.http_client import Connection, Endpoint, ExactBy, RowFailure, ServerState, together
from prmkit.judge.batching import EncodedPrompt, judgements_in_order, make_preparer, parse_generated
from prmkit.judge.completions import MOST_EXACT, Completions, Vocabulary
from prmkit.judge.score_trie import Reading, ScoreTrie, TrieOf, TrieQuery, VerdictReader, tries_of
from prmkit.judge.types import DEFAULT_OPTIONS, LOW_REACH, Judgement, Request, ScoringOptions
from prmkit.prompts.encoding import ChatEncoding

_LOW_LOG_REACH = math.log(LOW_REACH)
"""Stop measuring a forced prefix below this probability, because its scores are unsure anyway."""


@dataclass(frozen=True)
class CompletionsJudge:
    """A judge whose model runs on a server."""

    endpoint: Endpoint
    encoding: ChatEncoding
    cutoff_len: int
    _state: ServerState = field(default_factory=ServerState, repr=False, compare=False)

    def score(self, requests: Iterable[Request], options: ScoringOptions = DEFAULT_OPTIONS) -> Iterator[Judgement]:
        """Judge like `LocalJudge.score`, with `batch_size` prompts at once, within the endpoint's concurrency.

        Raises:
            DataError: the server cannot be reached, refuses the key, does not have the model, or none of its first
                responses can be used.
            UsageError: none of its first responses can be used, but another option would help.

        Once a response could be used, a later unusable response fails only its own row.
        """
        return judgements_in_order(
            requests,
            make_preparer(self.encoding, self.cutoff_len, trim=options.trim),
            lambda ready: asyncio.run(self._judge_all(ready, options)),
            window=4 * options.batch_size,
        )

    async def _judge_all(self, ready: Sequence[EncodedPrompt], options: ScoringOptions) -> list[Judgement]:
        gate = asyncio.Semaphore(options.batch_size)
        async with Connection(self.endpoint, self._state) as connection:
            completions = Completions(connection, self._vocabulary)
            found = await together(self._judge(completions, gate, prepared, options) for prepared in ready)
        self._stop_if_useless(found)
        return [Judgement("failed", reason=str(one)) if isinstance(one, RowFailure) else one for one in found]

    async def _judge(
        self, completions: Completions, gate: asyncio.Semaphore, prepared: EncodedPrompt, options: ScoringOptions
    ) -> Judgement | RowFailure:
        try:
            async with gate:
                if options.mode == "expected":
                    return await self._expected(completions, prepared, options.min_label_mass)
                text = await completions.written(prepared.ids, options.max_new_tokens, self.encoding.stop_ids)
        except RowFailure as failure:
            return failure
        return parse_generated(text, prepared.shape)

    def _stop_if_useless(self, found: Sequence[Judgement | RowFailure]) -> None:
        """Stop if no response could be used so far: the other rows would fail one by one for the same reason."""
        failure = next((each for each in found if isinstance(each, RowFailure)), None)
        if failure is None or self._state.is_usable:
            return
        error = UsageError if failure.is_usage else DataError
        raise error(f"{self.endpoint.name}: no usable response for the first {len(found)} prompts: {failure}.")

    async def _expected(self, completions: Completions, prepared: EncodedPrompt, min_label_mass: float) -> Judgement:
        reader = VerdictReader(prepared.shape, self._trie_of, min_label_mass)
        while questions := reader.questions():
            reader.read(await _readings(completions, prepared.ids, questions))
        return reader.judgement()

    @cached_property
    def _trie_of(self) -> TrieOf:
        return tries_of(self.encoding)

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary(len(self.encoding.tokenizer), lambda: self._ids_by_text)

    @cached_property
    def _ids_by_text(self) -> Mapping[str, int | None]:
        tokenizer = self.encoding.tokenizer
        ids: dict[str, int | None] = {}
        for token, text in enumerate(tokenizer.batch_decode([[token] for token in range(len(tokenizer))])):
            ids[text] = None if text in ids else token
        return ids


async def _readings(
    completions: Completions, prompt_ids: Sequence[int], questions: Sequence[TrieQuery]
) -> list[Reading]:
    """Answer all currently open questions about one prompt."""
    if completions.endpoint.logprobs == "exact" and (exact := await _read_exact(completions, prompt_ids, questions)):
        return exact
    return await together(_read_top(completions, prompt_ids, question) for question in questions)


async def _read_top(completions: Completions, prompt_ids: Sequence[int], question: TrieQuery) -> Reading:
    context = [*prompt_ids, *question.trie.context]
    forced_from = len(prompt_ids) + question.forced_from
    log_reach, log_probabilities = await asyncio.gather(
        _log_reach(completions, context[:forced_from], context[forced_from:]),
        _TrieSearch(question.trie, context, completions).log_probabilities(),
    )
    return _checked(Reading(log_reach, log_probabilities))


def _checked(reading: Reading) -> Reading:
    if max(reading.log_probabilities) == -math.inf:
        raise RowFailure("the model returned NaN, or zero probability for every score")
    return reading


async def _read_exact(
    completions: Completions, prompt_ids: Sequence[int], questions: Sequence[TrieQuery]
) -> list[Reading] | None:
    """Answer all questions with one request; None if the server does not support that, which is checked once."""
    contexts = [[*prompt_ids, *question.trie.context] for question in questions]
    wanted: set[int] = set()
    for question in questions:
        wanted |= {*question.trie.context[question.forced_from :], *(token for _, token in question.trie.edges)}
    tokens = sorted(wanted)
    state = completions.connection.state
    async with completions.probing:
        if state.exact_by is None and len(tokens) <= MOST_EXACT:
            state.exact_by = await _exact_way(completions, contexts[0], tokens)
    if state.exact_by in (None, "nothing") or len(tokens) > MOST_EXACT:
        return None
    prompts: list[list[int]] = []
    for question, context in zip(questions, contexts, strict=True):
        prompts += [context[:end] for end in range(len(prompt_ids) + question.forced_from, len(context))]
        prompts += _ids_of_nodes(question.trie, context)
    ask = completions.scored if state.exact_by == "score" else completions.exact
    logprobs = await ask(prompts, tokens)
    if logprobs is None:
        raise RowFailure("the server stopped returning the requested tokens")
    remaining = iter(logprobs)
    return [_checked(_exact_reading(question, remaining)) for question in questions]


def _exact_reading(question: TrieQuery, logprobs: Iterator[Mapping[int, float]]) -> Reading:
    """Pop one question's positions from the logprobs: its forced tokens, then the nodes of its trie."""
    trie = question.trie
    log_reach = math.fsum(next(logprobs)[token] for token in trie.context[question.forced_from :])
    nodes = [next(logprobs) for _ in range(len(trie.tokens) + 1)]
    steps = [nodes[node][token] for node, token in trie.edges]
    return Reading(log_reach, [sum(steps[edge] for edge in path) for path in trie.paths])


async def _exact_way(completions: Completions, context: list[int], tokens: list[int]) -> ExactBy:
    """Find out with one prompt, because servers refuse a parameter that they do not know, or silently ignore it."""
    try:
        if await completions.exact([context], tokens) is not None:
            return "logprob_token_ids"
    except RowFailure as failure:
        if not failure.is_refusal:
            raise
    try:
        is_there = await completions.scored([context], tokens) is not None
    except (RowFailure, DataError):  # the path does not exist, or does something else
        is_there = False
    return "score" if is_there and await completions.scores_agree(context) else "nothing"


def _ids_of_nodes(trie: ScoreTrie, context: list[int]) -> list[list[int]]:
    """Return the token ids up to each node of a trie, the root first; a parent comes before its children."""
    ids = [context]
    for token, parent in zip(trie.tokens, trie.parents, strict=True):
        ids.append([*ids[parent], token])
    return ids


async def _log_reach(completions: Completions, ids: list[int], forced: list[int]) -> float:
    """Return the log-probability of forced tokens after `ids`; if that is low, an upper bound.

    A trained judge generates these tokens greedily, so one free generation usually suffices.
    """
    log_reach, done = 0.0, 0
    while done < len(forced) and log_reach > _LOW_LOG_REACH:
        for place in await completions.top_logprobs([*ids, *forced[:done]], [[token] for token in forced[done:]]):
            token = forced[done]
            done += 1
            if token in place.known:
                log_reach += place.known[token]
            elif place.bounds[token] < _LOW_LOG_REACH:
                log_reach += place.bounds[token]
            else:
                log_reach += await completions.echoed([*ids, *forced[:done]])
            if place.known.get(token) != place.highest:
                break  # from here on, the model wrote something else
    return log_reach


_EdgeRequest = Callable[[], Coroutine[Any, Any, None]]


class _TrieSearch:
    """Searches for the probabilities of one key's candidates after one prefix; every request narrows them down."""

    _MOST_REQUESTS = 300
    """A trained judge needs a few dozen requests. A model that puts little probability on scores needs thousands."""

    def __init__(self, trie: ScoreTrie, context: list[int], completions: Completions) -> None:
        self._unknown_share = completions.endpoint.unknown_share
        self._trie = trie
        self._context = context
        self._below_root = _ids_of_nodes(trie, [])
        self._completions = completions
        self._requests = 0
        self._known: dict[int, float] = {}
        """Log-probability by edge."""
        self._bound: dict[int, float] = {}
        """Unknown edge -> upper bound of its log-probability."""
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
        """Return log-probabilities of `SCORES`; minus infinity for scores too unlikely to be worth a request."""
        while questions := self._questions():
            self._requests += len(questions)
            if self._requests > self._MOST_REQUESTS:
                raise RowFailure(
                    f"needed more than {self._MOST_REQUESTS} requests for one score, because the model puts little "
                    "probability on scores. Check that it was trained and that the template is right, or serve it "
                    "with vLLM, which needs one request"
                )
            await together(question() for question in questions)
        return self._totals()

    def _totals(self) -> list[float]:
        return [sum(self._known.get(edge, -math.inf) for edge in path) for path in self._trie.paths]

    def _questions(self) -> list["_EdgeRequest"]:
        """Return the next requests: for all nodes and edges whose possible probability is too large to stay unknown."""
        open_ends: list[tuple[float, _EdgeRequest]] = []
        for node, reached in self._reached().items():
            if not self._is_asked(node):
                open_ends.append((reached, partial(self._ask_after, node)))
            for edge in self._edges_of[node]:
                if edge in self._bound and edge not in self._known:
                    open_ends.append((reached + self._bound[edge], partial(self._ask_for, edge)))
        # The smallest may stay unknown, as long as their sum does not exceed what is allowed.
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
        """Return the log-probability of each node whose path from the root is known."""
        reached = {0: 0.0}
        for node in self._inner:
            parent, edge = self._trie.parents[node - 1], self._edge_to[node]
            if parent in reached and edge in self._known:
                reached[node] = reached[parent] + self._known[edge]
        return reached

    def _ids(self, node: int) -> list[int]:
        return [*self._context, *self._below_root[node]]

    async def _ask_after(self, node: int) -> None:
        tokens = [self._trie.edges[edge][1] for edge in self._edges_of[node]]
        (place,) = await self._completions.top_logprobs(self._ids(node), [tokens])
        for edge, token in zip(self._edges_of[node], tokens, strict=True):
            if token in place.known:
                self._known[edge] = place.known[token]
            else:
                self._bound[edge] = place.bounds[token]

    async def _ask_for(self, edge: int) -> None:
        node, token = self._trie.edges[edge]
        self._known[edge] = await self._completions.echoed([*self._ids(node), token])
