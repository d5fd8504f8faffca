"""Send concurrent requests to servers with OpenAI's endpoints, and retry them after transient failures.

A server's response is untrusted data: its duration, size and headers are checked, and no message repeats the API key.
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
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from prmkit.errors import DataError, UsageError

if TYPE_CHECKING:
    import ssl

log = logging.getLogger("prmkit")

T = TypeVar("T")
Logprobs = Literal["exact", "top"]
ExactBy = Literal["logprob_token_ids", "score", "nothing"]
"""vLLM's parameter of completions, SGLang's `/v1/score`, or neither."""

KEY_VARIABLE = "OPENAI_API_KEY"
"""The environment variable with the API key, unless --api-key-env sets another one."""
_COOL_DOWN = 5.0
"""Seconds for which a server that failed gets no requests while another server responds."""
_LONGEST_PAUSE = 30.0
"""The maximum number of seconds between two attempts if the server does not ask for a pause."""
_LONGEST_PAUSE_ASKED = 120.0
"""The maximum number of seconds between two attempts if the server asks for a pause."""
_PASSING_STATUSES = {408, 409, 425, 429, *range(500, 600)} - {501, 505}
"""Retryable statuses, including those of some providers and proxies, for example 529 (overloaded) and 524 (timeout)."""
_LARGEST_RESPONSE = 16 << 20
"""Bytes, uncompressed. The logprobs of a prompt of 100,000 tokens fit."""


async def together(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run all concurrently and return the results in order; if one fails, wait for the others before raising its error.

    With `asyncio.gather`, the others would keep sending until the event loop closes.
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
    """The address as OpenAI's clients take it: `http://localhost:8000/v1`."""
    model: str
    """The name that the server gives the model."""
    api_key: str | None = None
    concurrency: int = 16
    """The maximum number of concurrent requests."""
    top_logprobs: int = 20
    """The number of top logprobs to request. vLLM returns up to 20 unless it is started with --max-logprobs."""
    attempts: int = 6
    timeout: float = 300.0
    """Seconds until a response must be complete."""
    others: tuple[str, ...] = ()
    """Further servers with the same model: each request goes to the server with the fewest requests in flight."""
    logprobs: Logprobs = "exact"
    """`exact` requests the probabilities of specific tokens if the server supports it (vLLM's `logprob_token_ids`);
    `top` always reads top logprobs."""
    unknown_share: float = 1e-4
    """The fraction of the candidates' probability that may stay unknown; it bounds the score's error. A smaller value
    takes more requests; a server's own rounding in half precision is a hundred times this."""

    @property
    def name(self) -> str:
        """The address for messages, without user name and password."""
        return re.sub(r"//[^/@]*@", "//", self.base_url)

    def without_secrets(self, text: str) -> str:
        """Mask the key and the password in a message of a server or a library."""
        userinfo = re.search(r"//([^/@]*)@", self.base_url)
        secrets = {self.api_key, *(re.split(":", userinfo[1], maxsplit=1) if userinfo else ())}
        for secret in filter(None, secrets):
            text = text.replace(secret, "***")
        return text


def check_url(url: str, called: str = "--base-url", example: str = "http://localhost:8000/v1") -> None:
    """Check the address of a server before a model is loaded.

    Args:
        url: the address.
        called: the option or argument with the address.
        example: a valid address.

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
        raise UsageError(f"{called} {Endpoint(url, '').name}: not the URL of a server. Example: {example}")


@cache
def trusted_certificates(*, trust_env: bool) -> "ssl.SSLContext":
    """Load the certificates that httpx trusts; once for all clients, because it takes longer than most requests."""
    import httpx

    return httpx.create_ssl_context(trust_env=trust_env)


def key_from(variable: str | None) -> str | None:
    """Read the API key from an environment variable, by default `KEY_VARIABLE`; None if it is empty.

    Raises:
        UsageError: as `checked_key`.
    """
    name = KEY_VARIABLE if variable is None else variable
    return checked_key(os.environ.get(name, ""), f"${name}")


def checked_key(key: str, called: str) -> str | None:
    """Remove the line break that `$(cat file)` or an .env file may leave after a key; return None for an empty key.

    Args:
        key: as it was read.
        called: where it comes from.

    Raises:
        UsageError: the key cannot be sent in a header. The message does not repeat it, because most of it may be right.
    """
    key = key.strip()
    if not (key.isascii() and key.isprintable()):
        raise UsageError(f"{called} contains an invalid character, for example a line break. Set it again.")
    return key or None


class RowFailure(Exception):
    """The server cannot respond for this row; the other rows continue."""

    def __init__(self, reason: str, *, is_usage: bool = False, is_refusal: bool = False) -> None:
        """Store the reason, whether another option would help if all rows fail this way, and whether it was a 4xx."""
        super().__init__(reason)
        self.is_usage = is_usage
        self.is_refusal = is_refusal


class PassingTrouble(Exception):
    """A transient failure, after which the request is retried."""

    def __init__(self, reason: str, *, pause: float = 0.0, is_unreachable: bool = False) -> None:
        super().__init__(reason)
        self.pause = pause
        self.is_unreachable = is_unreachable


@dataclass
class ServerState:
    """State that all connections to one server share."""

    is_usable: bool = False
    """Whether the server has returned a readable response; until then, a failure probably concerns every row."""
    exact_by: ExactBy | None = None
    """How the server returns the probabilities of specific tokens; None until it has been tried."""
    left_out_until: dict[str, float] = field(default_factory=dict)
    """Address of a server that failed -> time of its next attempt, on the clock of `time.monotonic`."""


@dataclass(frozen=True)
class ChatAnswer:
    """An answer from a chat endpoint."""

    text: str
    finish_reason: str | None
    """`stop`, `length` for an answer that was cut off, or another value from the server."""
    tokens_in: int | None
    tokens_out: int | None


class Connection:
    """An open connection to one endpoint."""

    def __init__(self, endpoint: Endpoint, state: ServerState) -> None:
        """Open the connection; `state` is updated as responses arrive."""
        import httpx

        self.endpoint = endpoint
        self.state = state
        self._gate = asyncio.Semaphore(endpoint.concurrency)
        self._in_flight = dict.fromkeys((endpoint.base_url, *endpoint.others), 0)
        # A compressed response could decompress to any size.
        headers = {"Accept-Encoding": "identity"}
        if endpoint.api_key:
            headers["Authorization"] = f"Bearer {endpoint.api_key}"
        self._client = httpx.AsyncClient(
            timeout=endpoint.timeout, headers=headers, verify=trusted_certificates(trust_env=True)
        )

    async def __aenter__(self) -> "Connection":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    # --- sending ------------------------------------------------------------------------------------------------------

    async def chat(self, body: Mapping[str, Any]) -> ChatAnswer:
        """Request one answer from a chat endpoint.

        Args:
            body: `messages` and parameters, sent unchanged.

        Raises:
            RowFailure: the server refuses the request, keeps failing, or returns something unexpected.
            DataError: the server cannot be reached, or would refuse everything.
        """
        return await self.post("chat/completions", body, self._chat_answer)

    async def ask_json(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the JSON object with which another endpoint of the server responds.

        Raises:
            RowFailure: the server refuses the request, keeps failing, or returns something else.
            DataError: the server cannot be reached, or would refuse everything.
        """
        return await self.post(path, body, self._object)

    async def post(self, path: str, body: Mapping[str, Any], read: Callable[[bytes], T]) -> T:
        """Send a request, retry it while that may help, and return the result of `read` for the response.

        Args:
            path: the path below the base URL.
            body: JSON; the model's name is added.
            read: may raise `PassingTrouble` for a response that may be usable after a retry, and `RowFailure`.

        Raises:
            RowFailure: the server refuses the request, keeps failing, or returns something unexpected.
            DataError: the server cannot be reached, or would refuse everything.
        """
        body = {"model": self.endpoint.model, **body}
        trouble = PassingTrouble("no request was sent")
        for attempt in range(self.endpoint.attempts):
            if attempt:
                log.info("%s: retrying (%s)", self.endpoint.name, trouble)
                # Half of the pause is random, so that many clients do not retry at the same time.
                own = min(0.5 * 2**attempt, _LONGEST_PAUSE) * random.uniform(0.5, 1.0)  # noqa: S311
                await asyncio.sleep(max(own, trouble.pause) if self._all_cooling_down() else 0)
            try:
                value = read(await self._post_once(path, body))
            except PassingTrouble as error:
                trouble = error
            else:
                self.state.is_usable = self.state.is_usable or value is not None
                return value
        if trouble.is_unreachable:
            advice = f"Start it, or correct --base-url.{self._proxy_advice()}"
            raise DataError(f"{self.endpoint.name}: no server responds ({trouble}). {advice}")
        raise RowFailure(f"the request failed after {self.endpoint.attempts} attempts; last error: {trouble}")

    async def _post_once(self, path: str, body: Mapping[str, Any]) -> bytes:
        """Return the content of a successful response, from the working server with the fewest requests in flight.

        Raises:
            PassingTrouble: there was no response, or an incomplete one.
            RowFailure: the server refuses the request.
            DataError: the server would refuse every request.
        """
        cooling_down = self.state.left_out_until
        server = min(self._in_flight, key=lambda url: (self._is_cooling_down(url), self._in_flight[url]))
        self._in_flight[server] += 1
        try:
            content = await self._post_to(f"{server.rstrip('/')}/{path}", body)
        except PassingTrouble:
            cooling_down[server] = time.monotonic() + _COOL_DOWN
            raise
        finally:
            self._in_flight[server] -= 1
        cooling_down.pop(server, None)
        return content

    def _is_cooling_down(self, url: str) -> bool:
        return self.state.left_out_until.get(url, 0.0) > time.monotonic()

    def _all_cooling_down(self) -> bool:
        return all(map(self._is_cooling_down, self._in_flight))

    async def _post_to(self, url: str, body: Mapping[str, Any]) -> bytes:
        import httpx

        try:
            # httpx's own timeout limits the time between two bytes, so a server that sends one now and then would never
            # time out.
            async with (
                self._gate,
                asyncio.timeout(self.endpoint.timeout),
                self._client.stream("POST", url, json=body) as response,
            ):
                content = bytearray()
                async for part in response.aiter_bytes():
                    content += part
                    if len(content) > _LARGEST_RESPONSE:
                        raise PassingTrouble(f"a response of more than {_LARGEST_RESPONSE >> 20} MiB")
        except (httpx.LocalProtocolError, httpx.UnsupportedProtocol) as error:
            # The error's text may contain the headers, and so the key.
            what = type(error).__name__
            raise DataError(f"{self.endpoint.name}: the request could not be sent ({what}).") from None
        except httpx.ConnectError as error:
            raise PassingTrouble(self.endpoint.without_secrets(str(error)), is_unreachable=True) from None
        except TimeoutError:
            raise PassingTrouble(f"no complete response within {self.endpoint.timeout:g} s") from None
        except (httpx.RequestError, httpx.InvalidURL) as error:  # the latter comes from a redirect
            what = self.endpoint.without_secrets(f"{type(error).__name__} {error}".strip())
            raise PassingTrouble(what) from None
        self._check_status(response.status_code, response.headers.get("Retry-After"), bytes(content))
        return bytes(content)

    def _check_status(self, status: int, retry_after: str | None, content: bytes) -> None:
        url, text = self.endpoint.name, self._excerpt(content)
        if status in _PASSING_STATUSES:
            raise PassingTrouble(f"{status} {text}", pause=pause_asked_for(retry_after))
        if status in (401, 403):
            advice = f"Check --api-key-env.{self._proxy_advice()}"
            raise DataError(f"{url}: the server refuses the API key ({status}). {advice}")
        if status == 404:
            raise DataError(
                f"{url}: the server has no model '{self.endpoint.model}' ({text}). "
                "The URL usually ends in /v1, and /v1/models lists the names."
            )
        if 300 <= status < 400:
            raise RowFailure(f"{url} redirects ({status}), and redirects are not followed. Use the final URL.")
        if status >= 400:
            advice = self._advice_on_logprobs(text)
            raise RowFailure(f"{url} returns {status}: {text}{advice}", is_usage=bool(advice), is_refusal=True)

    def _proxy_advice(self) -> str:
        """Return advice if a proxy in the environment may be what responds, or fails to; otherwise an empty string."""
        from urllib.request import getproxies, proxy_bypass

        scheme, _, rest = self.endpoint.base_url.partition("://")
        host = re.split(r"[/?#]", rest, maxsplit=1)[0].rpartition("@")[2]
        if not {scheme.lower(), "all"} & getproxies().keys() or proxy_bypass(host):
            return ""
        return " Requests go through the proxy in the environment, unless NO_PROXY names the host."

    def _advice_on_logprobs(self, refusal: str) -> str:
        """Return advice if the server's message names a limit that was exceeded; otherwise an empty string."""
        limits = [int(number) for number in re.findall(r"\b\d{1,4}\b", refusal)]
        requested = self.endpoint.top_logprobs
        if "logprobs" not in refusal or not any(limit < requested for limit in limits):
            return ""
        return f". {requested} were requested; lower --top-logprobs, or start vLLM with a higher --max-logprobs"

    def _excerpt(self, content: bytes) -> str:
        return self.endpoint.without_secrets(content[:300].decode(errors="replace"))

    # --- reading ------------------------------------------------------------------------------------------------------

    def choices(self, content: bytes, count: int) -> list[Mapping[str, Any]]:
        """Return the choices of a response, one for each of `count` prompts, in order.

        Raises:
            RowFailure: the response has another structure.
        """
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            raise self.misfit(self._excerpt(content)) from None
        choices: Any = answer.get("choices") if isinstance(answer, dict) else None
        is_list = isinstance(choices, list) and all(isinstance(choice, dict) for choice in choices)
        if not is_list or len(choices) < count:
            raise self.misfit(self._excerpt(content))
        if count > 1:  # in vLLM, `index` is the prompt's index
            choices = {choice["index"]: choice for choice in choices if type(choice.get("index")) is int}
            if not all(index in choices for index in range(count)):
                raise self.misfit(self._excerpt(content))
        return [choices[index] for index in range(count)]

    def _object(self, content: bytes) -> dict[str, Any]:
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise RowFailure(f"{self.endpoint.name}: the response is not a JSON object ({self._excerpt(content)})")
        return answer

    def _chat_answer(self, content: bytes) -> ChatAnswer:
        (choice,) = self.choices(content, 1)
        message, usage = choice.get("message"), json.loads(content).get("usage")
        text = message.get("content") if isinstance(message, dict) else None
        if isinstance(text, list):  # a list of parts, some of which may be thoughts
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

    def misfit(self, problem: object) -> RowFailure:
        """Return the failure for a response with an unexpected structure."""
        shown = self.endpoint.without_secrets(str(problem)[:300])
        return RowFailure(f"{self.endpoint.name}: not the response of a completions endpoint ({shown})")


def pause_asked_for(header: str | None) -> float:
    """Return the seconds of a `Retry-After` header, a number or a date; 0 if it is missing or cannot be read."""
    try:
        seconds = float(header or 0)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(str(header)).timestamp() - time.time()
        except (ValueError, OverflowError):
            seconds = 0.0
    return min(max(seconds, 0.0), _LONGEST_PAUSE_ASKED) if math.isfinite(seconds) else 0.0
