"""Requests to a completions endpoint: as many at once as allowed, retried when trouble may pass, answers checked.

What a server answers is another program's data. It is read here, in one place, into numbers and strings, or rejected.
No time, size or header of an answer is trusted, and no message repeats the API key.
"""

import asyncio
import json
import logging
import math
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, Literal, TypeVar

from prmkit.errors import DataError, UsageError

log = logging.getLogger("prmkit")

T = TypeVar("T")
Logprobs = Literal["exact", "top"]
ExactBy = Literal["logprob_token_ids", "score", "nothing"]
"""vLLM's parameter of completions, SGLang's `/v1/score`, or neither."""

MOST_EXACT = 128
"""Tokens that vLLM takes in one `logprob_token_ids`."""
_LEFT_OUT = 5.0
"""Seconds for which a server that failed gets no requests while another one answers."""
_LONGEST_PAUSE = 30.0
"""Seconds between two attempts, of our own choice."""
_LONGEST_PAUSE_ASKED = 120.0
"""And where a server asks for it."""
_PASSING_STATUSES = {408, 409, 425, 429, 500, 502, 503, 504}
_LARGEST_ANSWER = 16 << 20
"""Bytes, unpacked. The logprobs of a prompt of 100,000 tokens fit."""
_ROUNDING = 0.01
"""A log-probability that was computed in half precision may be this far above zero."""
_NOT_COMPUTED = -9000.0
"""vLLM writes -9999.0 for tokens whose probability it did not compute. No float has a logarithm like that."""
_SAME = 0.05
"""Two log-probabilities of one token may differ so much, because of half precision and other batches."""
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
"""Sent with every request: a server takes what a request leaves open from the model's generation_config.json, where
many base models have a repetition penalty that changes digits. The last one is llama-server's name for it."""


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
    """Seconds until an answer must be complete."""
    others: tuple[str, ...] = ()
    """Further servers with the same model: each request goes to the one with the fewest under way."""
    logprobs: Logprobs = "exact"
    """`exact` asks for the very tokens that are wanted where the server can (vLLM's `logprob_token_ids`); `top` always
    reads the likeliest ones."""
    unknown_share: float = 1e-4
    """The most of the candidates' probability that may stay unknown, and so the most that a score can be off. Less asks
    more often; a server's own rounding in half precision is a hundred times this."""

    @property
    def name(self) -> str:
        """The address as messages show it: without a user and a password."""
        return re.sub(r"//[^/@]*@", "//", self.base_url)

    def without_secrets(self, text: str) -> str:
        """What a server or a library says, with the key and the password out of it."""
        userinfo = re.search(r"//([^/@]*)@", self.base_url)
        secrets = {self.api_key, *(re.split(":", userinfo[1], maxsplit=1) if userinfo else ())}
        for secret in filter(None, secrets):
            text = text.replace(secret, "***")
        return text


def check_url(url: str) -> None:
    """Stop before a model loads where `--base-url` cannot be a server's.

    Raises:
        UsageError: not an address, or one of another protocol.
    """
    import httpx

    try:
        parsed = httpx.URL(url)
        fits = parsed.scheme in ("http", "https") and parsed.host and 0 < (parsed.port or 80) < 65536
    except httpx.InvalidURL:
        fits = False
    if not fits or any(map(str.isspace, url)):
        shown = Endpoint(url, "").name
        raise UsageError(f"--base-url {shown}: not the address of a server. Write it as http://localhost:8000/v1.")


class RowFailure(Exception):
    """The server cannot answer for this row; the others continue."""

    def __init__(self, reason: str, *, is_usage: bool = False, is_refusal: bool = False) -> None:
        """Keep the reason, whether another option would help if it holds for all rows, and whether it is a 4xx."""
        super().__init__(reason)
        self.is_usage = is_usage
        self.is_refusal = is_refusal


class _PassingTrouble(Exception):
    """It may work the next time."""

    def __init__(self, reason: str, *, pause: float = 0.0, is_unreachable: bool = False) -> None:
        super().__init__(reason)
        self.pause = pause
        self.is_unreachable = is_unreachable


@dataclass
class ServerState:
    """What is known of a server over all connections to it."""

    is_usable: bool = False
    """It has given an answer that could be read. Until then, what is wrong is probably wrong for every row."""
    exact_by: ExactBy | None = None
    """How it gives the probabilities of tokens that are named; None until it was asked."""
    left_out_until: dict[str, float] = field(default_factory=dict)
    """By address, when a server that failed is tried again, on the clock of `time.monotonic`."""


@dataclass(frozen=True)
class Vocabulary:
    """What must be known of the model's tokenizer to read a server's answers."""

    size: int
    ids_by_text: Callable[[], Mapping[str, int | None]]
    """Token id by text, None for a text that several tokens share; called only if the server does not say ids."""


@dataclass(frozen=True)
class Place:
    """What a server shows of the tokens that may be written at one place."""

    known: Mapping[int, float]
    """Log-probabilities of those that were of interest, by token id."""
    bounds: Mapping[int, float]
    """The most that the log-probability can be of those that are not shown."""
    highest: float
    """Of the likeliest token, which is the one that the model writes."""


@dataclass(frozen=True)
class ChatAnswer:
    """What a chat endpoint answered."""

    text: str
    finish_reason: str | None
    """`stop`, `length` for an answer that was cut off, or another word of the server."""
    tokens_in: int | None
    tokens_out: int | None


Likeliest = Mapping[int | str, float]
"""Log-probabilities of the likeliest tokens at one place: by token id, or by text if the server does not say ids."""


class Connection:
    """An open connection to one endpoint."""

    def __init__(self, endpoint: Endpoint, vocabulary: Vocabulary, state: ServerState) -> None:
        """Open one; `state` is filled in as answers come."""
        import httpx

        self.endpoint = endpoint
        self._vocabulary = vocabulary
        self.state = state
        self._gate = asyncio.Semaphore(endpoint.concurrency)
        self.probing = asyncio.Lock()
        """Held while it is found out whether the server reads exactly: it must never get both kinds at once."""
        self._under_way = dict.fromkeys((endpoint.base_url, *endpoint.others), 0)
        # A compressed answer could unpack to any size.
        headers = {"Accept-Encoding": "identity"}
        if endpoint.api_key:
            headers["Authorization"] = f"Bearer {endpoint.api_key}"
        self._client = httpx.AsyncClient(timeout=endpoint.timeout, headers=headers)

    async def __aenter__(self) -> "Connection":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    # --- questions ----------------------------------------------------------------------------------------------------

    async def written(self, ids: Sequence[int], max_tokens: int, stop_ids: Sequence[int]) -> str:
        """What the model writes after `ids`, greedily."""
        return await self._ask(ids, self._text, max_tokens=max_tokens, stop_token_ids=list(stop_ids))

    async def likeliest(self, ids: Sequence[int], tokens: Sequence[Sequence[int]]) -> list[Place]:
        """What the server shows of some tokens after `ids`, and further on while the model writes greedily.

        Args:
            ids: the prompt.
            tokens: those of interest, at each of the next places.

        Returns:
            At least one place, at most as many as were asked for.
        """

        def read(choice: Mapping[str, Any]) -> list[Place]:
            shown = self._likeliest_of(choice)
            return [self._place(each, wanted) for each, wanted in zip(shown, tokens, strict=False)]

        return await self._ask(
            ids, read, max_tokens=len(tokens), logprobs=self.endpoint.top_logprobs, return_tokens_as_token_ids=True
        )

    async def exact(self, prompts: Sequence[Sequence[int]], tokens: Sequence[int]) -> list[dict[int, float]] | None:
        """The log-probabilities of tokens after each of several prompts, over the whole vocabulary, in one request.

        Args:
            prompts: token ids.
            tokens: at most `MOST_EXACT`.

        Returns:
            By token, one mapping for each prompt; None where the server does not know `logprob_token_ids`.
        """

        def read(choices: Sequence[Mapping[str, Any]]) -> list[dict[int, float]] | None:
            shown = [self._likeliest_of(choice)[0] for choice in choices]
            if not all(token in each for each in shown for token in tokens):
                return None
            found = [{token: each[token] for token in tokens} for each in shown]
            if any(value < _NOT_COMPUTED for each in found for value in each.values()):
                raise _PassingTrouble("it did not compute the tokens that were asked for")
            return found

        return await self._ask_all(
            prompts, read, max_tokens=1, logprobs=1, logprob_token_ids=list(tokens), return_tokens_as_token_ids=True
        )

    async def scored(self, prompts: Sequence[Sequence[int]], tokens: Sequence[int]) -> list[dict[int, float]] | None:
        """As `exact`, from SGLang's `/v1/score`; None where the server answers something else.

        What all prompts begin with is sent once. An item must not be empty, so it is one token less.
        """
        shared = min(map(len, prompts)) - 1
        while any(prompt[:shared] != prompts[0][:shared] for prompt in prompts):
            shared -= 1
        body = {
            "query": list(prompts[0][:shared]),
            "items": [list(prompt[shared:]) for prompt in prompts],
            "label_token_ids": [list(tokens)] * len(prompts),
            "apply_softmax": False,  # it would be over these tokens alone
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
            if any(value < _NOT_COMPUTED for each in found for value in each.values()):
                raise _PassingTrouble("it did not compute the tokens that were asked for")
            return found

        return await self._retried("score", {"model": self.endpoint.model, **body}, read)

    async def scores_agree(self, ids: Sequence[int]) -> bool:
        """Whether the likeliest tokens after `ids` have the probabilities in `scored` that a completion gives them.

        A path named `/v1/score` may do anything. SGLang itself puts another token before what is scored, where it was
        started with `--multi-item-scoring-delimiter`, and so answers for another prompt.
        """
        (place,) = await self.likeliest(ids, [range(self._vocabulary.size)])
        shown = dict(place.known)
        scored = await self.scored([ids], list(shown)) if shown else None
        return scored is not None and all(abs(scored[0][token] - value) < _SAME for token, value in shown.items())

    async def echoed(self, ids: Sequence[int]) -> float:
        """The log-probability of the last one of `ids`."""

        def last(choice: Mapping[str, Any]) -> float | None:
            values = self._logprobs(choice).get("token_logprobs")
            if not isinstance(values, list) or len(values) < len(ids) or values[len(ids) - 1] is None:
                return None
            return self._number(values[len(ids) - 1])

        try:
            # SGLang looks at the prompt only when logprobs is above zero.
            value = await self._ask(ids, last, max_tokens=1, logprobs=1, echo=True)
        except RowFailure as failure:
            raise self._needs_more_logprobs(f" ({failure})") from failure
        if value is None:
            raise self._needs_more_logprobs("")
        return value

    def _needs_more_logprobs(self, why: str) -> RowFailure:
        return RowFailure(
            f"a score is not among the {self.endpoint.top_logprobs} likeliest tokens, and the server gives no logprobs "
            f"of echoed prompts{why}; raise --top-logprobs (vLLM: --max-logprobs)"
        )

    # --- asking -------------------------------------------------------------------------------------------------------

    async def _ask(self, ids: Sequence[int], read: Callable[[Mapping[str, Any]], T], **parameters: Any) -> T:
        """What `read` finds in the one completion of one prompt; see `_ask_all`."""
        return await self._ask_all([ids], lambda choices: read(choices[0]), **parameters)

    async def _ask_all(
        self, prompts: Sequence[Sequence[int]], read: Callable[[Sequence[Mapping[str, Any]]], T], **parameters: Any
    ) -> T:
        """What `read` finds in the completions of some prompts, in their order.

        Raises:
            RowFailure: the server refuses a prompt, keeps failing on one, or does not answer as it should.
            DataError: it cannot be reached, or would refuse every prompt.
        """
        asked = list(prompts[0]) if len(prompts) == 1 else list(map(list, prompts))
        body = {"model": self.endpoint.model, "prompt": asked, **_NEUTRAL, **parameters}
        return await self._retried("completions", body, lambda answer: read(self._choices(answer, len(prompts))))

    async def chat(self, body: Mapping[str, Any]) -> ChatAnswer:
        """One answer of a chat endpoint.

        Args:
            body: `messages` and parameters, sent as they are.

        Raises:
            RowFailure: the server refuses it, keeps failing, or does not answer as it should.
            DataError: it cannot be reached, or would refuse everything.
        """
        return await self._retried("chat/completions", {"model": self.endpoint.model, **body}, self._chat_answer)

    async def ask_json(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON object that another endpoint of the server answers.

        Raises:
            RowFailure: the server refuses it, keeps failing, or answers something else.
            DataError: it cannot be reached, or would refuse everything.
        """
        return await self._retried(path, {"model": self.endpoint.model, **body}, self._object)

    async def _retried(self, path: str, body: Mapping[str, Any], read: Callable[[bytes], T]) -> T:
        trouble = _PassingTrouble("it was not asked")
        for attempt in range(self.endpoint.attempts):
            if attempt:
                log.info("%s: trying again (%s)", self.endpoint.name, trouble)
                # Half of the pause is random, so that many clients do not come back at the same moment.
                own = min(0.5 * 2**attempt, _LONGEST_PAUSE) * random.uniform(0.5, 1.0)  # noqa: S311
                await asyncio.sleep(max(own, trouble.pause) if self._all_left_out() else 0)
            try:
                value = read(await self._post(path, body))
            except _PassingTrouble as error:
                trouble = error
            else:
                self.state.is_usable = self.state.is_usable or value is not None
                return value
        if trouble.is_unreachable:
            raise DataError(f"{self.endpoint.name}: no server answers ({trouble}). Start it, or correct --base-url.")
        raise RowFailure(f"the server failed {self.endpoint.attempts} times, the last time with: {trouble}")

    async def _post(self, path: str, body: Mapping[str, Any]) -> bytes:
        """The content of a good answer, of the server with the fewest requests under way that does not fail.

        Raises:
            _PassingTrouble: it did not come, or not whole.
            RowFailure: the server refuses the request.
            DataError: it would refuse every request.
        """
        left_out = self.state.left_out_until
        server = min(self._under_way, key=lambda url: (self._is_left_out(url), self._under_way[url]))
        self._under_way[server] += 1
        try:
            content = await self._post_to(f"{server.rstrip('/')}/{path}", body)
        except _PassingTrouble:
            left_out[server] = time.monotonic() + _LEFT_OUT
            raise
        finally:
            self._under_way[server] -= 1
        left_out.pop(server, None)
        return content

    def _is_left_out(self, url: str) -> bool:
        return self.state.left_out_until.get(url, 0.0) > time.monotonic()

    def _all_left_out(self) -> bool:
        return all(map(self._is_left_out, self._under_way))

    async def _post_to(self, url: str, body: Mapping[str, Any]) -> bytes:
        import httpx

        try:
            # httpx's own timeout is for the time between two bytes: a server that sends one now and then never ends.
            async with (
                self._gate,
                asyncio.timeout(self.endpoint.timeout),
                self._client.stream("POST", url, json=body) as response,
            ):
                content = bytearray()
                async for part in response.aiter_bytes():
                    content += part
                    if len(content) > _LARGEST_ANSWER:
                        raise _PassingTrouble(f"an answer of more than {_LARGEST_ANSWER >> 20} MiB")
        except (httpx.LocalProtocolError, httpx.UnsupportedProtocol) as error:
            # Its text may hold the headers, and so the key.
            what = type(error).__name__
            raise DataError(f"{self.endpoint.name}: a request cannot even be sent ({what}).") from None
        except httpx.ConnectError as error:
            raise _PassingTrouble(self.endpoint.without_secrets(str(error)), is_unreachable=True) from None
        except TimeoutError:
            raise _PassingTrouble(f"no complete answer within {self.endpoint.timeout:g} s") from None
        except (httpx.RequestError, httpx.InvalidURL) as error:  # the latter: of a redirection
            what = self.endpoint.without_secrets(f"{type(error).__name__} {error}".strip())
            raise _PassingTrouble(what) from None
        self._check_status(response.status_code, response.headers.get("Retry-After"), bytes(content))
        return bytes(content)

    def _check_status(self, status: int, retry_after: str | None, content: bytes) -> None:
        url, text = self.endpoint.name, self._excerpt(content)
        if status in _PASSING_STATUSES:
            raise _PassingTrouble(f"{status} {text}", pause=pause_asked_for(retry_after))
        if status in (401, 403):
            raise DataError(f"{url}: the server refuses the API key ({status}). Name another --api-key-env.")
        if status == 404:
            raise DataError(
                f"{url}: the server has no model '{self.endpoint.model}' there ({text}). "
                "The URL usually ends in /v1, and /v1/models lists the names."
            )
        if status >= 400:
            advice = self._advice_on_logprobs(text)
            raise RowFailure(f"{url} answers {status}: {text}{advice}", is_usage=bool(advice), is_refusal=True)

    def _advice_on_logprobs(self, refusal: str) -> str:
        """What to do, only where the server names a limit that was exceeded."""
        limits = [int(number) for number in re.findall(r"\b\d{1,4}\b", refusal)]
        asked = self.endpoint.top_logprobs
        if "logprobs" not in refusal or not any(limit < asked for limit in limits):
            return ""
        return f". {asked} were asked for: lower --top-logprobs, or start vLLM with a higher --max-logprobs"

    def _excerpt(self, content: bytes) -> str:
        return self.endpoint.without_secrets(content[:300].decode(errors="replace"))

    # --- reading ------------------------------------------------------------------------------------------------------

    def _choices(self, content: bytes, count: int) -> list[Mapping[str, Any]]:
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            raise self._misfit(self._excerpt(content)) from None
        choices: Any = answer.get("choices") if isinstance(answer, dict) else None
        is_list = isinstance(choices, list) and all(isinstance(choice, dict) for choice in choices)
        if not is_list or len(choices) < count:
            raise self._misfit(self._excerpt(content))
        if count > 1:  # vLLM says in `index` which prompt a choice is for
            choices = {choice.get("index"): choice for choice in choices}
            if not all(place in choices for place in range(count)):
                raise self._misfit(self._excerpt(content))
        return [choices[place] for place in range(count)]

    def _object(self, content: bytes) -> dict[str, Any]:
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise RowFailure(f"{self.endpoint.name}: answers no JSON object ({self._excerpt(content)})")
        return answer

    def _chat_answer(self, content: bytes) -> ChatAnswer:
        (choice,) = self._choices(content, 1)
        message, usage = choice.get("message"), json.loads(content).get("usage")
        text = message.get("content") if isinstance(message, dict) else None
        if text is not None and not isinstance(text, str):
            raise self._misfit(f"its content is {text!r}")
        counts = [
            usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")
        ]
        known = [count if type(count) is int and count >= 0 else None for count in counts]
        reason = choice.get("finish_reason")
        return ChatAnswer(text or "", reason if isinstance(reason, str) else None, *known)

    def _misfit(self, what: object) -> RowFailure:
        shown = self.endpoint.without_secrets(str(what)[:300])
        return RowFailure(f"{self.endpoint.name}: not the answer of a completions endpoint ({shown})")

    def _text(self, choice: Mapping[str, Any]) -> str:
        text = choice.get("text")
        if not isinstance(text, str):
            raise self._misfit(f"its text is {text!r}")
        return text

    def _logprobs(self, choice: Mapping[str, Any]) -> Mapping[str, Any]:
        logprobs = choice.get("logprobs")
        if logprobs is not None and not isinstance(logprobs, dict):
            raise self._misfit(f"logprobs are {logprobs!r}")
        if not logprobs:
            raise RowFailure(
                f"{self.endpoint.name}: the server gives no logprobs, which expected scores are read from. "
                "Use a server that does (vLLM, SGLang, llama-server), or --mode generate",
                is_usage=True,
            )
        return logprobs

    def _likeliest_of(self, choice: Mapping[str, Any]) -> list[Likeliest]:
        """At every place that was written, in either of the two forms that servers use.

        vLLM, SGLang: `{"top_logprobs": [{"token_id:5" or "text": -0.1, …}, …]}`, an object a place.
        llama-server: `{"content": [{"top_logprobs": [{"id": 5, "token": "text", "logprob": -0.1}, …]}, …]}`.
        """
        logprobs = self._logprobs(choice)
        shown: Any = logprobs.get("top_logprobs")
        read = self._from_object
        if isinstance(places := logprobs.get("content"), list):
            shown = [place.get("top_logprobs") if isinstance(place, dict) else None for place in places]
            read = self._from_list
        if not isinstance(shown, list) or not shown or not all(shown):
            raise self._misfit(f"top_logprobs are {shown!r}")
        return [read(each) for each in shown]

    def _from_object(self, shown: object) -> Likeliest:
        if not isinstance(shown, dict):
            raise self._misfit(f"top_logprobs begin with {shown!r}")
        values: dict[Any, float] = {str(name): self._number(value) for name, value in shown.items()}
        if not all(name.startswith("token_id:") for name in values):
            return values
        try:
            return {int(name.removeprefix("token_id:")): value for name, value in values.items()}
        except ValueError as error:
            raise self._misfit(f"a token is {error}") from None

    def _from_list(self, shown: object) -> Likeliest:
        if not isinstance(shown, list) or not all(isinstance(each, dict) for each in shown):
            raise self._misfit(f"top_logprobs begin with {shown!r}")
        names: list[Any] = [each.get("id") for each in shown]
        if not all(isinstance(name, int) and not isinstance(name, bool) for name in names):
            names = [str(each.get("token")) for each in shown]
        return dict(zip(names, (self._number(each.get("logprob")) for each in shown), strict=True))

    def _place(self, shown: Likeliest, wanted: Sequence[int]) -> Place:
        least, highest = min(shown.values()), max(shown.values())
        if all(isinstance(name, int) for name in shown):
            self._check_count(shown, may_be_fewer=False)
            return Place(
                {token: shown[token] for token in wanted if token in shown},
                {token: least for token in wanted if token not in shown},
                highest,
            )
        by_text = self._vocabulary.ids_by_text()
        # Tokens with one text are one entry.
        self._check_count(shown, may_be_fewer=any(by_text.get(str(text)) is None for text in shown))
        by_id = {by_text.get(str(text)): value for text, value in shown.items()}
        # A token that shares its text with others may be one that is shown; so may any, where a text is unknown here.
        hidden = set(wanted) & set(by_text.values()) if all(str(text) in by_text for text in shown) else set()
        return Place(
            {token: by_id[token] for token in wanted if token in by_id},
            {token: least if token in hidden else 0.0 for token in wanted if token not in by_id},
            highest,
        )

    def _check_count(self, shown: Likeliest, *, may_be_fewer: bool) -> None:
        """Reject an answer that does not hold all the tokens that were asked for.

        While another client uses `logprob_token_ids`, vLLM answers ordinary requests with one or two tokens, one of
        them at -9999. The least of two would be taken for a bound of all other tokens, and scores would be wrong.
        """
        asked = min(self.endpoint.top_logprobs, self._vocabulary.size)
        if min(shown.values()) < _NOT_COMPUTED or (len(shown) < asked and not may_be_fewer):
            raise _PassingTrouble(
                f"{len(shown)} of the {asked} likeliest tokens that were asked for, as vLLM answers while another "
                "client uses logprob_token_ids. If it is the server's limit, lower --top-logprobs"
            )

    def _number(self, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._misfit(f"a logprob is {value!r}")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isnan(number) or number > _ROUNDING:
            raise RowFailure(f"the model's probabilities are not numbers; the server gives the logprob {number}")
        return number


def pause_asked_for(header: str | None) -> float:
    """The seconds of a `Retry-After` header, a number or a date; zero without one, or if it cannot be read."""
    try:
        seconds = float(header or 0)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(str(header)).timestamp() - time.time()
        except (ValueError, OverflowError):
            seconds = 0.0
    return min(max(seconds, 0.0), _LONGEST_PAUSE_ASKED) if math.isfinite(seconds) else 0.0
