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
import logging
import math
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from prmkit.errors import DataError, UsageError
from prmkit.http_client import Connection, Endpoint, ExactBy, RowFailure, ServerState, together
from prmkit.judge.batching import EncodedPrompt, judgements_in_order, make_preparer, parse_generated
from prmkit.judge.completions import MOST_EXACT, Completions, Vocabulary
from prmkit.judge.score_trie import Reading, ScoreTrie, TrieOf, TrieQuery, VerdictReader, tries_of
from prmkit.judge.types import DEFAULT_OPTIONS, LOW_REACH, Judgement, Mode, Request, ScoringOptions
from prmkit.prompts.encoding import ChatEncoding

log = logging.getLogger("prmkit")

_LOW_LOG_REACH = math.log(LOW_REACH)
"""Stop measuring a forced prefix below this probability, because its scores are unsure anyway."""
_SAME_MODEL = 0.1
"""Total variation distance of two score distributions up to which two servers have the same model: half precision and
batching move it by a few hundredths."""
_CHECK_PAUSE = 60.0
"""Seconds until a server that did not answer its first prompt is tried again."""
_CHECK_PATIENCE = 30.0
"""Seconds to wait for that answer while another server responds."""


@dataclass
class _Pool:
    """What is known about several servers: they must all score one prompt alike before they score others."""

    canary: EncodedPrompt | None = None
    reference: tuple[str, Judgement] | None = None
    """The first server that answered the canary, and its answer."""
    checked: set[str] = field(default_factory=set)
    next_try: dict[str, float] = field(default_factory=dict)
    """Server that did not answer -> time of its next attempt, on the clock of `time.monotonic`."""


@dataclass(frozen=True)
class CompletionsJudge:
    """A judge whose model runs on a server, or on several with the same weights."""

    endpoint: Endpoint
    encoding: ChatEncoding
    cutoff_len: int
    _state: ServerState = field(default_factory=ServerState, repr=False, compare=False)
    _pool: _Pool = field(default_factory=_Pool, init=False, repr=False, compare=False)

    def score(self, requests: Iterable[Request], options: ScoringOptions = DEFAULT_OPTIONS) -> Iterator[Judgement]:
        """Judge like `LocalJudge.score`, with `batch_size` prompts at once, within the endpoint's concurrency.

        Raises:
            DataError: the server cannot be reached, refuses the key, does not have the model, or none of its first
                responses can be used; or several servers have different weights.
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
        if not ready:
            return []
        gate = asyncio.Semaphore(options.batch_size)
        endpoint = await self._checked_servers(ready, options.mode) if self.endpoint.others else self.endpoint
        async with Connection(endpoint, self._state) as connection:
            completions = Completions(connection, self._vocabulary)
            found = await together(self._judge(completions, gate, prepared, options) for prepared in ready)
        self._stop_if_useless(found)
        return [Judgement("failed", reason=str(one)) if isinstance(one, RowFailure) else one for one in found]

    async def _checked_servers(self, ready: Sequence[EncodedPrompt], mode: Mode) -> Endpoint:
        """Return the servers that score the canary, which is the shortest of the first prompts, like the first of them.

        A server that failed may have been restarted with other weights, so it is checked again.

        Raises:
            DataError: one gives other scores, or none can be used.
            UsageError: none can be used, but another option would help.
        """
        pool, urls = self._pool, dict.fromkeys((self.endpoint.base_url, *self.endpoint.others))
        pool.canary = pool.canary or min(ready, key=lambda prompt: len(prompt.ids))
        pool.checked.difference_update(self._state.left_out_until)
        quick = replace(self.endpoint, attempts=1, timeout=min(self.endpoint.timeout, _CHECK_PATIENCE))
        for way in (quick, self.endpoint):
            new = [url for url in urls if url not in pool.checked and pool.next_try.get(url, 0.0) <= time.monotonic()]
            answers = await together(
                self._canary_answer(replace(way, base_url=url, others=()), pool.canary) for url in new
            )
            for url, answer in zip(new, answers, strict=True):
                self._check_server(url, answer, mode)
            if pool.checked:
                first, *others = (url for url in urls if url in pool.checked)
                return replace(self.endpoint, base_url=first, others=tuple(others))
            pool.next_try.clear()
        failure = next(each for each in answers if isinstance(each, Exception))
        raise failure if isinstance(failure, DataError) else self._useless(failure, 1)

    async def _canary_answer(self, endpoint: Endpoint, canary: EncodedPrompt) -> Judgement | RowFailure | DataError:
        """Return one server's scores of the canary, or why there are none."""
        try:
            async with Connection(endpoint, ServerState()) as connection:
                return await self._expected(Completions(connection, self._vocabulary), canary, 0.0)
        except (RowFailure, DataError) as failure:
            return failure

    def _check_server(self, url: str, answer: Judgement | RowFailure | DataError, mode: Mode) -> None:
        pool, name = self._pool, Endpoint(url, "").name
        if mode == "generate" and isinstance(answer, RowFailure) and answer.is_usage:
            log.warning("%s: whether it serves the same model as the others is not checked (%s)", name, answer)
        elif not isinstance(answer, Judgement):
            pool.next_try[url] = time.monotonic() + _CHECK_PAUSE
            log.warning("%s is left out for now: %s", name, answer)
            return
        else:
            pool.reference = pool.reference or (url, answer)
            self._check_same_model(name, answer, *pool.reference)
        pool.checked.add(url)
        self._state.left_out_until.pop(url, None)

    def _check_same_model(self, name: str, answer: Judgement, first: str, expected: Judgement) -> None:
        key, difference = _largest_difference(answer, expected)
        if difference > _SAME_MODEL:
            raise DataError(
                f"{name} gives {key} {answer.scores[key].mean:.3f} to a prompt to which {Endpoint(first, '').name} "
                f"gives {expected.scores[key].mean:.3f} (their distributions differ by {difference:.0%}), so it "
                f"serves other weights as {self.endpoint.model}. Serve the same model on all of them, or remove one."
            )

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
        raise self._useless(failure, len(found))

    def _useless(self, failure: RowFailure, count: int) -> UsageError | DataError:
        error = UsageError if failure.is_usage else DataError
        return error(f"{self.endpoint.name}: no usable response for the first {count} prompts: {failure}.")

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


def _largest_difference(one: Judgement, other: Judgement) -> tuple[str, float]:
    """Return the key whose distributions differ most, and their total variation distance, 0 to 1."""

    def distance(key: str) -> float:
        pairs = zip(one.scores[key].shares or (), other.scores[key].shares or (), strict=True)
        return sum(abs(mine - theirs) for mine, theirs in pairs) / 2

    return max(((key, distance(key)) for key in other.scores), key=lambda each: each[1])


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
