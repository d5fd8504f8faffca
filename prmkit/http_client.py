"""Requests to servers with OpenAI's endpoints: as many at once as allowed, retried after failures that may pass.

A server's answer is untrusted data: its duration, size and headers are checked, and no message repeats the API key.
"""

import asyncio
import json
import logging
import math
import os
import random
import re
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, Literal, TypeVar

from prmkit.errors import DataError, UsageError

log = logging.getLogger("prmkit")

T = TypeVar("T")
Logprobs = Literal["exact", "top"]
ExactBy = Literal["logprob_token_ids", "score", "nothing"]
"""vLLM's parameter of completions, SGLang's `/v1/score`, or neither."""

KEY_VARIABLE = "OPENAI_API_KEY"
"""The environment variable with the API key, unless --api-key-env names another one."""
_LEFT_OUT = 5.0
"""Seconds for which a server that failed gets no requests while another server answers."""
_LONGEST_PAUSE = 30.0
"""The most seconds between two attempts when the server asks for no pause."""
_LONGEST_PAUSE_ASKED = 120.0
"""The most seconds between two attempts when the server asks for a pause."""
_PASSING_STATUSES = {408, 409, 425, 429, *range(500, 600)} - {501, 505}
"""Includes those that only some providers and proxies use, such as 529 (overloaded) and 524 (a timeout)."""
_LARGEST_ANSWER = 16 << 20
"""Bytes, uncompressed. The logprobs of a prompt of 100,000 tokens fit."""


async def together(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Do all at once; the results in order. If one fails, the others have ended before its error is raised.

    With `asyncio.gather` they would keep sending until the event loop is closed under them.
    """
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each) for each in work]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


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
    """How many of the likeliest tokens to ask for. vLLM returns up to 20 unless it is started with --max-logprobs."""
    attempts: int = 6
    timeout: float = 300.0
    """Seconds until an answer must be complete."""
    others: tuple[str, ...] = ()
    """Further servers with the same model: each request goes to the server with the fewest requests in flight."""
    logprobs: Logprobs = "exact"
    """`exact` asks for the probabilities of named tokens if the server supports it (vLLM's `logprob_token_ids`); `top`
    always reads the likeliest tokens."""
    unknown_share: float = 1e-4
    """The most of the candidates' probability that may stay unknown, and so the largest error of a score from it. A
    smaller value takes more requests; a server's own rounding in half precision is a hundred times this."""

    @property
    def name(self) -> str:
        """The address as messages show it: without user name and password."""
        return re.sub(r"//[^/@]*@", "//", self.base_url)

    def without_secrets(self, text: str) -> str:
        """A message of a server or a library, with the key and the password masked."""
        userinfo = re.search(r"//([^/@]*)@", self.base_url)
        secrets = {self.api_key, *(re.split(":", userinfo[1], maxsplit=1) if userinfo else ())}
        for secret in filter(None, secrets):
            text = text.replace(secret, "***")
        return text


def check_url(url: str, called: str = "--base-url", example: str = "http://localhost:8000/v1") -> None:
    """Check the address of a server before a model is loaded.

    Args:
        url: the address.
        called: the option or argument that it was given as.
        example: an address of the right form.

    Raises:
        UsageError: it is not a URL, or is one of another protocol.
    """
    import httpx

    try:
        parsed = httpx.URL(url)
        fits = parsed.scheme in ("http", "https") and parsed.host and 0 < (parsed.port or 80) < 65536
    except httpx.InvalidURL:
        fits = False
    if not fits or any(map(str.isspace, url)):
        raise UsageError(f"{called} {Endpoint(url, '').name}: not the address of a server. Write it as {example}.")


def key_from(variable: str | None) -> str | None:
    """The API key in an environment variable, by default `KEY_VARIABLE`; None if it is empty.

    Raises:
        UsageError: as `checked_key`.
    """
    name = KEY_VARIABLE if variable is None else variable
    return checked_key(os.environ.get(name, ""), f"${name}")


def checked_key(key: str, called: str) -> str | None:
    """A key without the line break that `$(cat file)` or an .env file may have left after it; None if it is empty.

    Args:
        key: as it was read.
        called: where it comes from.

    Raises:
        UsageError: it could not be sent in a header. The message does not repeat it, because it may be most of a key.
    """
    key = key.strip()
    if not (key.isascii() and key.isprintable()):
        raise UsageError(f"{called}: has a character that no API key has, such as a line break. Set it again.")
    return key or None


class RowFailure(Exception):
    """The server cannot answer for this row; the other rows continue."""

    def __init__(self, reason: str, *, is_usage: bool = False, is_refusal: bool = False) -> None:
        """Keep the reason, whether another option would help if all rows fail so, and whether the status was 4xx."""
        super().__init__(reason)
        self.is_usage = is_usage
        self.is_refusal = is_refusal


class PassingTrouble(Exception):
    """A failure that may not happen again: the request is retried."""

    def __init__(self, reason: str, *, pause: float = 0.0, is_unreachable: bool = False) -> None:
        super().__init__(reason)
        self.pause = pause
        self.is_unreachable = is_unreachable


@dataclass
class ServerState:
    """What is known of a server over all connections to it."""

    is_usable: bool = False
    """It has given a readable answer. Until then, a failure probably concerns every row."""
    exact_by: ExactBy | None = None
    """How it returns the probabilities of named tokens; None until it has been tried."""
    left_out_until: dict[str, float] = field(default_factory=dict)
    """Address of a server that failed -> when it is tried again, on the clock of `time.monotonic`."""


@dataclass(frozen=True)
class ChatAnswer:
    """What a chat endpoint answered."""

    text: str
    finish_reason: str | None
    """`stop`, `length` for an answer that was cut off, or another value from the server."""
    tokens_in: int | None
    tokens_out: int | None


class Connection:
    """An open connection to one endpoint."""

    def __init__(self, endpoint: Endpoint, state: ServerState) -> None:
        """Open the connection; `state` is filled in as answers arrive."""
        import httpx

        self.endpoint = endpoint
        self.state = state
        self._gate = asyncio.Semaphore(endpoint.concurrency)
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

    # --- asking -------------------------------------------------------------------------------------------------------

    async def chat(self, body: Mapping[str, Any]) -> ChatAnswer:
        """One answer of a chat endpoint.

        Args:
            body: `messages` and parameters, sent as they are.

        Raises:
            RowFailure: the server refuses the request, keeps failing, or does not answer as it should.
            DataError: the server cannot be reached, or would refuse everything.
        """
        return await self.post("chat/completions", body, self._chat_answer)

    async def ask_json(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON object that another endpoint of the server answers.

        Raises:
            RowFailure: the server refuses the request, keeps failing, or answers something else.
            DataError: the server cannot be reached, or would refuse everything.
        """
        return await self.post(path, body, self._object)

    async def post(self, path: str, body: Mapping[str, Any], read: Callable[[bytes], T]) -> T:
        """What `read` makes of the answer to a request; the request is retried while that may help.

        Args:
            path: below the base URL.
            body: JSON; the model's name is added.
            read: may raise `PassingTrouble` for an answer that may be good after a retry, and `RowFailure`.

        Raises:
            RowFailure: the server refuses the request, keeps failing, or does not answer as it should.
            DataError: the server cannot be reached, or would refuse everything.
        """
        body = {"model": self.endpoint.model, **body}
        trouble = PassingTrouble("it was not asked")
        for attempt in range(self.endpoint.attempts):
            if attempt:
                log.info("%s: trying again (%s)", self.endpoint.name, trouble)
                # Half of the pause is random, so that many clients do not come back at the same moment.
                own = min(0.5 * 2**attempt, _LONGEST_PAUSE) * random.uniform(0.5, 1.0)  # noqa: S311
                await asyncio.sleep(max(own, trouble.pause) if self._all_left_out() else 0)
            try:
                value = read(await self._post_once(path, body))
            except PassingTrouble as error:
                trouble = error
            else:
                self.state.is_usable = self.state.is_usable or value is not None
                return value
        if trouble.is_unreachable:
            raise DataError(f"{self.endpoint.name}: no server answers ({trouble}). Start it, or correct --base-url.")
        raise RowFailure(f"the server failed {self.endpoint.attempts} times, the last time with: {trouble}")

    async def _post_once(self, path: str, body: Mapping[str, Any]) -> bytes:
        """The content of a good answer, from the working server with the fewest requests in flight.

        Raises:
            PassingTrouble: no answer came, or not all of it.
            RowFailure: the server refuses the request.
            DataError: the server would refuse every request.
        """
        left_out = self.state.left_out_until
        server = min(self._under_way, key=lambda url: (self._is_left_out(url), self._under_way[url]))
        self._under_way[server] += 1
        try:
            content = await self._post_to(f"{server.rstrip('/')}/{path}", body)
        except PassingTrouble:
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
            # httpx's own timeout is for the time between two bytes: a server that sends one now and then would never
            # time out.
            async with (
                self._gate,
                asyncio.timeout(self.endpoint.timeout),
                self._client.stream("POST", url, json=body) as response,
            ):
                content = bytearray()
                async for part in response.aiter_bytes():
                    content += part
                    if len(content) > _LARGEST_ANSWER:
                        raise PassingTrouble(f"an answer of more than {_LARGEST_ANSWER >> 20} MiB")
        except (httpx.LocalProtocolError, httpx.UnsupportedProtocol) as error:
            # The error's text may hold the headers, and so the key.
            what = type(error).__name__
            raise DataError(f"{self.endpoint.name}: a request cannot even be sent ({what}).") from None
        except httpx.ConnectError as error:
            raise PassingTrouble(self.endpoint.without_secrets(str(error)), is_unreachable=True) from None
        except TimeoutError:
            raise PassingTrouble(f"no complete answer within {self.endpoint.timeout:g} s") from None
        except (httpx.RequestError, httpx.InvalidURL) as error:  # the latter: of a redirection
            what = self.endpoint.without_secrets(f"{type(error).__name__} {error}".strip())
            raise PassingTrouble(what) from None
        self._check_status(response.status_code, response.headers.get("Retry-After"), bytes(content))
        return bytes(content)

    def _check_status(self, status: int, retry_after: str | None, content: bytes) -> None:
        url, text = self.endpoint.name, self._excerpt(content)
        if status in _PASSING_STATUSES:
            raise PassingTrouble(f"{status} {text}", pause=pause_asked_for(retry_after))
        if status in (401, 403):
            raise DataError(f"{url}: the server refuses the API key ({status}). Name another --api-key-env.")
        if status == 404:
            raise DataError(
                f"{url}: the server has no model '{self.endpoint.model}' there ({text}). "
                "The URL usually ends in /v1, and /v1/models lists the names."
            )
        if 300 <= status < 400:
            raise RowFailure(f"{url} answers {status}, a redirection, which is not followed. Name the final address.")
        if status >= 400:
            advice = self._advice_on_logprobs(text)
            raise RowFailure(f"{url} answers {status}: {text}{advice}", is_usage=bool(advice), is_refusal=True)

    def _advice_on_logprobs(self, refusal: str) -> str:
        """Advice, if the server names a limit that was exceeded; otherwise empty."""
        limits = [int(number) for number in re.findall(r"\b\d{1,4}\b", refusal)]
        asked = self.endpoint.top_logprobs
        if "logprobs" not in refusal or not any(limit < asked for limit in limits):
            return ""
        return f". {asked} were asked for: lower --top-logprobs, or start vLLM with a higher --max-logprobs"

    def _excerpt(self, content: bytes) -> str:
        return self.endpoint.without_secrets(content[:300].decode(errors="replace"))

    # --- reading ------------------------------------------------------------------------------------------------------

    def choices(self, content: bytes, count: int) -> list[Mapping[str, Any]]:
        """The choices of an answer, one for each of `count` prompts, in order.

        Raises:
            RowFailure: the answer is of another form.
        """
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            raise self.misfit(self._excerpt(content)) from None
        choices: Any = answer.get("choices") if isinstance(answer, dict) else None
        is_list = isinstance(choices, list) and all(isinstance(choice, dict) for choice in choices)
        if not is_list or len(choices) < count:
            raise self.misfit(self._excerpt(content))
        if count > 1:  # vLLM says in `index` which prompt a choice is for
            choices = {choice.get("index"): choice for choice in choices}
            if not all(place in choices for place in range(count)):
                raise self.misfit(self._excerpt(content))
        return [choices[place] for place in range(count)]

    def _object(self, content: bytes) -> dict[str, Any]:
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise RowFailure(f"{self.endpoint.name}: the answer is not a JSON object ({self._excerpt(content)})")
        return answer

    def _chat_answer(self, content: bytes) -> ChatAnswer:
        (choice,) = self.choices(content, 1)
        message, usage = choice.get("message"), json.loads(content).get("usage")
        text = message.get("content") if isinstance(message, dict) else None
        if isinstance(text, list):  # of parts, of which some may be thoughts
            parts = [part for part in text if isinstance(part, dict) and part.get("type") == "text"]
            text = "".join(str(part.get("text") or "") for part in parts)
        if text is not None and not isinstance(text, str):
            raise self.misfit(f"its content is {text!r}")
        counts = [
            usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")
        ]
        known = [count if type(count) is int and 0 <= count < 2**53 else None for count in counts]
        reason = choice.get("finish_reason")
        return ChatAnswer(text or "", reason if isinstance(reason, str) else None, *known)

    def misfit(self, what: object) -> RowFailure:
        """The failure for an answer that does not have the expected form."""
        shown = self.endpoint.without_secrets(str(what)[:300])
        return RowFailure(f"{self.endpoint.name}: not the answer of a completions endpoint ({shown})")


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
