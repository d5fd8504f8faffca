"""Query a completions endpoint for continuations of token ids and their logprobs.

A server's response is untrusted data: it is converted here to numbers and strings, or rejected.
"""

import asyncio
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prmkit.http_client import Connection, PassingTrouble, RowFailure, T

MOST_EXACT = 128
"""The maximum number of tokens that vLLM accepts in one `logprob_token_ids`."""
_ROUNDING = 0.01
"""A log-probability may be this far above zero, because of half precision."""
_NOT_COMPUTED = -9000.0
"""vLLM writes -9999.0 for tokens whose probability it did not compute. The logarithm of a float is never that low."""
_SAME = 0.05
"""Two log-probabilities of the same token may differ by this much, because of half precision and batching."""
_MOST_TOGETHER = 1.1
"""The probabilities of different tokens at one position may add up to this much, because of half precision."""
_NEUTRAL = {
    "temperature": 0,
    "top_p": 1,
    "top_k": -1,
    "min_p": 0,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "repetition_penalty": 1,
    "repeat_penalty": 1,
}
"""Sent with every request. For a parameter that is not sent, a server uses the model's generation_config.json, which in
many base models sets a repetition penalty that changes digits. The last one is llama-server's name for that penalty."""


@dataclass(frozen=True)
class Vocabulary:
    """The parts of the model's tokenizer that are needed to read a server's responses."""

    size: int
    ids_by_text: Callable[[], Mapping[str, int | None]]
    """Text -> token id, or None if several tokens share the text; called only if the server returns no ids."""


@dataclass(frozen=True)
class TokenLogprobs:
    """The log-probabilities that a server returned for the tokens at one position."""

    known: Mapping[int, float]
    """Token of interest -> log-probability."""
    bounds: Mapping[int, float]
    """Token of interest that was not returned -> upper bound of its log-probability."""
    highest: float
    """The log-probability of the most likely token, which is the one that the model writes."""


TopLogprobs = Mapping[int | str, float]
"""Top logprobs at one position: by token id, or by text if the server returns no ids."""


class Completions:
    """The completions of one server, over a connection."""

    def __init__(self, connection: Connection, vocabulary: Vocabulary) -> None:
        """Use `connection`, with the `vocabulary` of the server's model."""
        self.connection = connection
        self.endpoint = connection.endpoint
        self._vocabulary = vocabulary
        self.probing = asyncio.Lock()
        """Lock while probing for exact logprobs, because the server must never get both kinds of request at once."""

    # --- requests -----------------------------------------------------------------------------------------------------

    async def written(self, ids: Sequence[int], max_tokens: int, stop_ids: Sequence[int]) -> str:
        """Return what the model writes after `ids`, greedily."""
        return await self._ask(ids, self._text, max_tokens=max_tokens, stop_token_ids=list(stop_ids))

    async def top_logprobs(self, ids: Sequence[int], tokens: Sequence[Sequence[int]]) -> list[TokenLogprobs]:
        """Return top logprobs of some tokens after `ids`, and at later positions while the model writes greedily.

        Args:
            ids: the prompt.
            tokens: the tokens of interest at each of the next positions.

        Returns:
            At least one position, at most as many as requested.
        """

        def read(choice: Mapping[str, Any]) -> list[TokenLogprobs]:
            shown = self._top_logprobs_of(choice)
            return [self._token_logprobs(each, wanted) for each, wanted in zip(shown, tokens, strict=False)]

        return await self._ask(
            ids, read, max_tokens=len(tokens), logprobs=self.endpoint.top_logprobs, return_tokens_as_token_ids=True
        )

    async def exact(self, prompts: Sequence[Sequence[int]], tokens: Sequence[int]) -> list[dict[int, float]] | None:
        """Return log-probabilities of tokens after several prompts, over the complete vocabulary, in one request.

        Args:
            prompts: token ids.
            tokens: at most `MOST_EXACT`.

        Returns:
            One mapping by token per prompt; None if the server does not support `logprob_token_ids`.
        """

        def read(choices: Sequence[Mapping[str, Any]]) -> list[dict[int, float]] | None:
            shown = [self._top_logprobs_of(choice)[0] for choice in choices]
            if not all(token in each for each in shown for token in tokens):
                return None
            found = [{token: each[token] for token in tokens} for each in shown]
            return [self._distribution(each) for each in found]

        return await self._ask_all(
            prompts, read, max_tokens=1, logprobs=1, logprob_token_ids=list(tokens), return_tokens_as_token_ids=True
        )

    def _distribution(self, found: dict[int, float]) -> dict[int, float]:
        """Return log-probabilities of requested tokens at one position, after checking that they can be."""
        if any(value < _NOT_COMPUTED for value in found.values()):
            raise PassingTrouble("the server returned no logprob for a requested token")
        self._check_sum(found.values())
        return found

    def _check_sum(self, values: Collection[float]) -> None:
        """Reject logits and made-up numbers, which would give a score that looks certain."""
        if (total := math.fsum(map(math.exp, values))) > _MOST_TOGETHER:
            raise RowFailure(
                f"the probabilities of {len(values)} tokens add up to {total:.3g}, so the server does not return "
                "log-probabilities (vLLM: start it without --logprobs-mode)"
            )

    async def scored(self, prompts: Sequence[Sequence[int]], tokens: Sequence[int]) -> list[dict[int, float]] | None:
        """Do the same as `exact` with SGLang's `/v1/score`; None if the server returns something else.

        The common prefix of all prompts is sent once, minus one token, because an item must not be empty.
        """
        shared = min(map(len, prompts)) - 1
        while any(prompt[:shared] != prompts[0][:shared] for prompt in prompts):
            shared -= 1
        body = {
            "query": list(prompts[0][:shared]),
            "items": [list(prompt[shared:]) for prompt in prompts],
            "label_token_ids": [list(tokens)] * len(prompts),
            "apply_softmax": False,  # it would be only over these tokens
            "return_token_logprobs": True,
        }

        def read(content: bytes) -> list[dict[int, float]] | None:
            try:
                rows = json.loads(content)["token_logprobs"]
                fits = [len(row) for row in rows] == [len(tokens)] * len(prompts)
            except (ValueError, TypeError, KeyError, RecursionError):
                return None
            if not fits:
                return None
            found = [dict(zip(tokens, map(self._number, row), strict=True)) for row in rows]
            return [self._distribution(each) for each in found]

        return await self.connection.post("score", body, read)

    async def scores_agree(self, ids: Sequence[int]) -> bool:
        """Whether a completion gives the most likely tokens after `ids` the same probabilities as `scored`.

        Another server's `/v1/score` may mean something else. SGLang itself, if started with
        `--multi-item-scoring-delimiter`, puts another token before the scored ones, and so scores another prompt.
        """
        (place,) = await self.top_logprobs(ids, [range(self._vocabulary.size)])
        shown = dict(place.known)
        scored = await self.scored([ids], list(shown)) if shown else None
        return scored is not None and all(abs(scored[0][token] - value) < _SAME for token, value in shown.items())

    async def echoed(self, ids: Sequence[int]) -> float:
        """Return the log-probability of the last token of `ids`, which the server echoes."""

        def last(choice: Mapping[str, Any]) -> float | None:
            values = self._logprobs(choice).get("token_logprobs")
            if not isinstance(values, list) or len(values) < len(ids) or values[len(ids) - 1] is None:
                return None
            return self._number(values[len(ids) - 1])

        try:
            # SGLang returns logprobs of the prompt only if logprobs is above zero.
            value = await self._ask(ids, last, max_tokens=1, logprobs=1, echo=True)
        except RowFailure as failure:
            raise self._needs_more_logprobs(f" ({failure})") from failure
        if value is None:
            raise self._needs_more_logprobs("")
        return value

    def _needs_more_logprobs(self, why: str) -> RowFailure:
        return RowFailure(
            f"a score token is not among the top {self.endpoint.top_logprobs} logprobs, and the server does not "
            f"support echo with logprobs{why}; raise --top-logprobs (vLLM: --max-logprobs)"
        )

    async def _ask(self, ids: Sequence[int], read: Callable[[Mapping[str, Any]], T], **parameters: Any) -> T:
        """Return the result of `read` for the only completion of one prompt; see `_ask_all`."""
        return await self._ask_all([ids], lambda choices: read(choices[0]), **parameters)

    async def _ask_all(
        self, prompts: Sequence[Sequence[int]], read: Callable[[Sequence[Mapping[str, Any]]], T], **parameters: Any
    ) -> T:
        """Return the result of `read` for the completions of some prompts, in order.

        Raises:
            RowFailure: the server refuses a prompt, keeps failing on it, or returns something unexpected.
            DataError: the server cannot be reached, or would refuse every prompt.
        """
        prompt = list(prompts[0]) if len(prompts) == 1 else list(map(list, prompts))
        body = {"prompt": prompt, **_NEUTRAL, **parameters}
        return await self.connection.post(
            "completions", body, lambda content: read(self.connection.choices(content, len(prompts)))
        )

    # --- reading ----------------------------------------------------------------------------------------------------

    def _text(self, choice: Mapping[str, Any]) -> str:
        text = choice.get("text")
        if not isinstance(text, str):
            raise self.connection.misfit(f"its text is {text!r}")
        return text

    def _logprobs(self, choice: Mapping[str, Any]) -> Mapping[str, Any]:
        logprobs = choice.get("logprobs")
        if logprobs is not None and not isinstance(logprobs, dict):
            raise self.connection.misfit(f"logprobs are {logprobs!r}")
        if not logprobs:
            raise RowFailure(
                f"{self.endpoint.name}: the server returns no logprobs, which expected scores need. "
                "Use one that does (vLLM, SGLang, llama-server), or --mode generate",
                is_usage=True,
            )
        return logprobs

    def _top_logprobs_of(self, choice: Mapping[str, Any]) -> list[TopLogprobs]:
        """Read the log-probabilities at every generated position, in either of the two formats that servers use.

        vLLM, SGLang: `{"top_logprobs": [{"token_id:5" or "text": -0.1, …}, …]}`, an object per position.
        llama-server: `{"content": [{"top_logprobs": [{"id": 5, "token": "text", "logprob": -0.1}, …]}, …]}`.
        """
        logprobs = self._logprobs(choice)
        shown: Any = logprobs.get("top_logprobs")
        read = self._from_object
        if isinstance(positions := logprobs.get("content"), list):
            shown = [each.get("top_logprobs") if isinstance(each, dict) else None for each in positions]
            read = self._from_list
        if not isinstance(shown, list) or not shown or not all(shown):
            raise self.connection.misfit(f"top_logprobs are {shown!r}")
        return [read(each) for each in shown]

    def _from_object(self, shown: object) -> TopLogprobs:
        if not isinstance(shown, dict):
            raise self.connection.misfit(f"top_logprobs begin with {shown!r}")
        values: dict[Any, float] = {str(name): self._number(value) for name, value in shown.items()}
        if not all(name.startswith("token_id:") for name in values):
            return values
        try:
            return {int(name.removeprefix("token_id:")): value for name, value in values.items()}
        except ValueError as error:
            raise self.connection.misfit(f"a token is {error}") from None

    def _from_list(self, shown: object) -> TopLogprobs:
        if not isinstance(shown, list) or not all(isinstance(each, dict) for each in shown):
            raise self.connection.misfit(f"top_logprobs begin with {shown!r}")
        names: list[Any] = [each.get("id") for each in shown]
        if not all(isinstance(name, int) and not isinstance(name, bool) for name in names):
            names = [str(each.get("token")) for each in shown]
        return dict(zip(names, (self._number(each.get("logprob")) for each in shown), strict=True))

    def _token_logprobs(self, shown: TopLogprobs, wanted: Sequence[int]) -> TokenLogprobs:
        least, highest = min(shown.values()), max(shown.values())
        self._check_sum(shown.values())
        if all(isinstance(name, int) for name in shown):
            self._check_count(shown, may_be_fewer=False)
            return TokenLogprobs(
                {token: shown[token] for token in wanted if token in shown},
                {token: least for token in wanted if token not in shown},
                highest,
            )
        by_text = self._vocabulary.ids_by_text()
        # Tokens with the same text share an entry.
        self._check_count(shown, may_be_fewer=any(by_text.get(str(text)) is None for text in shown))
        by_id = {by_text.get(str(text)): value for text, value in shown.items()}
        # A token that shares its text with others may be the returned one; if a text is unknown, any token may be.
        hidden = set(wanted) & set(by_text.values()) if all(str(text) in by_text for text in shown) else set()
        return TokenLogprobs(
            {token: by_id[token] for token in wanted if token in by_id},
            {token: least if token in hidden else 0.0 for token in wanted if token not in by_id},
            highest,
        )

    def _check_count(self, shown: TopLogprobs, *, may_be_fewer: bool) -> None:
        """Reject a response with fewer tokens than requested.

        While another client uses `logprob_token_ids`, vLLM returns only one or two tokens for ordinary requests, one of
        them at -9999. The lower of the two would be taken as the bound for all other tokens, and scores would be wrong.
        """
        requested = min(self.endpoint.top_logprobs, self._vocabulary.size)
        if min(shown.values()) < _NOT_COMPUTED or (len(shown) < requested and not may_be_fewer):
            raise PassingTrouble(
                f"only {len(shown)} of {requested} requested top logprobs were returned. vLLM does this while another "
                "client uses logprob_token_ids; otherwise lower --top-logprobs"
            )

    def _number(self, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.connection.misfit(f"a logprob is {value!r}")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isnan(number) or number > _ROUNDING:
            raise RowFailure(f"the server returned the logprob {number}, which is not the logarithm of a probability")
        return number
