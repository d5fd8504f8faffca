"""Requests to a completions endpoint: as many at once as allowed, tried again when trouble may pass, answers checked.

What a server answers is another program's data: it is read here, in one place, into numbers and texts, or refused.
"""

import asyncio
import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from prmkit.errors import DataError, UsageError

log = logging.getLogger("prmkit")

T = TypeVar("T")

_LONGEST_PAUSE = 30.0
"""Seconds between two attempts, of our own choice."""
_LONGEST_PAUSE_ASKED = 120.0
"""And at a server's wish."""
_PASSING_TROUBLE = {408, 409, 425, 429, 500, 502, 503, 504}
_ROUNDING = 0.01
"""So much above zero may a log-probability be that was computed in half precision."""


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
    """Seconds to wait for an answer."""
    unknown_share: float = 1e-4
    """The most of the candidates' probability that may stay unknown, and so the most that a score can be off. Less asks
    more often; a server's own rounding in half precision is a hundred times this."""


def refuse_url(url: str) -> None:
    """Stop before a model loads where `--base-url` can be no server's.

    Raises:
        UsageError: no address, or of another protocol.
    """
    import httpx

    try:
        parsed = httpx.URL(url)
        fits = parsed.scheme in ("http", "https") and parsed.host and 0 < (parsed.port or 80) < 65536
    except httpx.InvalidURL:
        fits = False
    if not fits or any(map(str.isspace, url)):
        raise UsageError(f"--base-url {url}: no address of a server. Write it as http://localhost:8000/v1.")


class RowFailure(Exception):
    """The server cannot answer for this row; the others go on."""


class Connection:
    """An open connection to one endpoint."""

    def __init__(
        self, endpoint: Endpoint, ids_by_text: Callable[[], Mapping[str, int | None]], numbers: Iterator[int]
    ) -> None:
        """Open one.

        Args:
            endpoint: the server.
            ids_by_text: token id by text, None for a text of several; asked for only where the server names no ids.
            numbers: counts the requests over all connections; what is wrong with number 0 is wrong with every one.
        """
        import httpx

        self.endpoint = endpoint
        self._ids_by_text = ids_by_text
        self._numbers = numbers
        self._gate = asyncio.Semaphore(endpoint.concurrency)
        headers = {"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
        self._client = httpx.AsyncClient(timeout=endpoint.timeout, headers=headers)

    async def __aenter__(self) -> "Connection":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def written(self, ids: Sequence[int], max_tokens: int, stop_ids: Sequence[int]) -> str:
        """What the model writes behind `ids`, greedily."""
        return await self._ask(ids, self._text, max_tokens=max_tokens, stop_token_ids=list(stop_ids))

    async def likeliest(self, ids: Sequence[int], tokens: Sequence[int]) -> tuple[dict[int, float], dict[int, float]]:
        """Log-probabilities behind `ids`, as far as the server shows them.

        Returns:
            By token of `tokens`: the log-probability of those that are shown, and a bound for those that are not.
        """
        shown, by_id = await self._ask(
            ids, self._shown, max_tokens=1, logprobs=self.endpoint.top_logprobs, return_tokens_as_token_ids=True
        )
        if by_id is not None:
            by_token: Mapping[int | None, float] = by_id
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

        def last(choice: Mapping[str, Any]) -> float:
            values = self._logprobs(choice, "token_logprobs")
            if len(values) < len(ids) or values[len(ids) - 1] is None:
                raise RowFailure(
                    f"a score is not among the {self.endpoint.top_logprobs} likeliest tokens, and the server gives no "
                    "logprobs of echoed prompts; raise --top-logprobs (vLLM: --max-logprobs)"
                )
            return self._number(values[len(ids) - 1])

        # SGLang looks at the prompt only when logprobs is above zero.
        return await self._ask(ids, last, max_tokens=1, logprobs=1, echo=True)

    # --- asking -------------------------------------------------------------------------------------------------------

    async def _ask(self, ids: Sequence[int], read: Callable[[Mapping[str, Any]], T], **parameters: Any) -> T:
        """What `read` finds in the first choice of one completion.

        Raises:
            RowFailure: the server refuses this prompt, keeps failing on it, or does not answer as it should.
            DataError, UsageError: it would refuse every prompt, or it is the first answer that is not as it should be.
        """
        number = next(self._numbers)
        response = await self._response(
            {"model": self.endpoint.model, "prompt": list(ids), "temperature": 0, **parameters}
        )
        self._stop_if_hopeless(response)
        try:
            return read(self._choice(response))
        except (DataError, UsageError) as error:
            if number == 0:
                raise
            raise RowFailure(str(error)) from error

    async def _response(self, body: Mapping[str, Any]) -> Any:
        """An answer, whatever it is, that is no passing trouble."""
        import httpx

        trouble, unreachable, pause = "", False, 0.0
        for attempt in range(self.endpoint.attempts):
            if attempt:
                log.info("%s: trying again (%s)", self.endpoint.base_url, trouble)
                # Half of the pause is left to chance, so that many clients do not come back at the same moment.
                own = min(0.5 * 2**attempt, _LONGEST_PAUSE) * random.uniform(0.5, 1.0)  # noqa: S311
                await asyncio.sleep(max(own, pause))
            async with self._gate:
                try:
                    response = await self._client.post(f"{self.endpoint.base_url.rstrip('/')}/completions", json=body)
                except (httpx.LocalProtocolError, httpx.UnsupportedProtocol) as error:
                    # Its text may hold the headers, and so the key.
                    what = type(error).__name__
                    raise DataError(f"{self.endpoint.base_url}: a request cannot even be sent ({what}).") from None
                except httpx.ConnectError as error:
                    trouble, unreachable, pause = str(error), True, 0.0
                    continue
                except httpx.RequestError as error:
                    trouble, unreachable, pause = f"{type(error).__name__} {error}".strip(), False, 0.0
                    continue
            if response.status_code not in _PASSING_TROUBLE:
                return response
            trouble, unreachable = f"{response.status_code} {response.text[:200]}", False
            pause = pause_asked_for(response.headers.get("Retry-After"))
        if unreachable:
            raise DataError(f"{self.endpoint.base_url}: no server answers ({trouble}). Start it, or mend --base-url.")
        raise RowFailure(f"the server failed {self.endpoint.attempts} times, at last with: {trouble}")

    def _stop_if_hopeless(self, response: Any) -> None:
        status, url = response.status_code, self.endpoint.base_url
        if status in (401, 403):
            raise DataError(f"{url}: the server refuses the API key ({status}). Name another --api-key-env.")
        if status == 404:
            raise DataError(
                f"{url}: no completions of a model '{self.endpoint.model}' there ({response.text[:300]}). "
                "The URL usually ends in /v1, and /v1/models lists the names."
            )

    # --- reading ------------------------------------------------------------------------------------------------------

    def _choice(self, response: Any) -> Mapping[str, Any]:
        text = response.text[:300]
        if response.status_code >= 400 and "logprobs" in text:
            raise UsageError(
                f"{self.endpoint.base_url}: the server refuses {self.endpoint.top_logprobs} logprobs ({text}). "
                "Lower --top-logprobs, or start vLLM with a higher --max-logprobs."
            )
        if response.status_code >= 400:
            raise RowFailure(f"the server answers {response.status_code}: {text}")
        try:
            content = response.json()
        except (ValueError, RecursionError) as error:
            raise self._no_completion(text) from error
        choices = content.get("choices") if isinstance(content, dict) else None
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise self._no_completion(text)
        return choices[0]

    def _no_completion(self, what: object) -> DataError:
        return DataError(f"{self.endpoint.base_url}: not the answer of a completions endpoint ({str(what)[:300]}).")

    def _text(self, choice: Mapping[str, Any]) -> str:
        text = choice.get("text")
        if not isinstance(text, str):
            raise self._no_completion(f"its text is {text!r}")
        return text

    def _logprobs(self, choice: Mapping[str, Any], name: str) -> list[Any]:
        logprobs = choice.get("logprobs")
        if logprobs is not None and not isinstance(logprobs, dict):
            raise self._no_completion(f"logprobs are {logprobs!r}")
        if not logprobs or not logprobs.get(name):
            raise UsageError(
                f"{self.endpoint.base_url}: the server gives no logprobs, which expected scores are read from. "
                "Use a server that does (vLLM, SGLang), or --mode generate."
            )
        values = logprobs[name]
        if not isinstance(values, list):
            raise self._no_completion(f"{name} is {values!r}")
        return values

    def _shown(self, choice: Mapping[str, Any]) -> tuple[Mapping[str, float], Mapping[int | None, float] | None]:
        """The likeliest tokens as the server names them, and by their ids where it does so by ids."""
        shown = self._logprobs(choice, "top_logprobs")[0]
        if not isinstance(shown, dict) or not shown:
            raise self._no_completion(f"top_logprobs begin with {shown!r}")
        values = {str(name): self._number(value) for name, value in shown.items()}
        if not all(name.startswith("token_id:") for name in values):
            return values, None
        try:
            return values, {int(name.removeprefix("token_id:")): value for name, value in values.items()}
        except ValueError as error:
            raise self._no_completion(f"a token is {error}") from error

    def _number(self, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._no_completion(f"a logprob is {value!r}")
        if math.isnan(value) or value > _ROUNDING:
            raise RowFailure(f"the model's probabilities are not numbers; the server gives the logprob {value}")
        return float(value)


def pause_asked_for(header: str | None) -> float:
    """The seconds of a `Retry-After` header, a number or a date; zero where there is none, or none that can be read."""
    try:
        seconds = float(header or 0)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(str(header)).timestamp() - time.time()
        except ValueError:
            seconds = 0.0
    return min(max(seconds, 0.0), _LONGEST_PAUSE_ASKED) if math.isfinite(seconds) else 0.0
