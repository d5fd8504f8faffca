"""A client of `serve_judge.py` for trainers and agents. Needs httpx, but neither torch nor a model.

judge = prmkit.client.Judge("http://127.0.0.1:8000")
judge.score([{"task": "…", "history": [], "step": {"role": "assistant", "content": "…"}}])
judge.score_run({"messages": […]})
judge.reward("What is 2 + 2?", "4")
"""

import asyncio
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prmkit.errors import DataError, UsageError
from prmkit.http_client import T, check_url, checked_key, trusted_certificates
from prmkit.verdict import AGGREGATES, is_number, is_share

if TYPE_CHECKING:
    import httpx

Messages = Sequence[Mapping[str, Any]]

_PASSING = {408, 425, 429, 500, 502, 503, 504}
_LONGEST_PAUSE = 30.0
"""Seconds between two attempts."""
_LONGEST_TIMEOUT = 86_400.0
_LINE = {"score", "status", "label_mass"}
_PARTS = {"results": _LINE, "steps": _LINE, "runs": {"steps", "aggregates", "first_bad"}}
"""List in a response -> the keys that each of its lines has."""


class JudgeUnavailable(DataError):
    """The server did not respond to any attempt, or its response had no score."""


class RequestRefused(UsageError):
    """The server refused this request, and a retry would not help; the message says why."""


@dataclass(frozen=True)
class Reward:
    """The judge's scores of a policy's response."""

    value: float | None
    """The aggregate of the step scores, from 0 to 1; None if a step has no reliable score."""
    steps: tuple[float | None, ...]
    """The score of every step that the policy wrote."""
    label_mass: float | None
    """The lowest label mass of the steps."""
    reason: str | None = field(default=None, compare=False)
    """Why there is no value."""

    def number(self, unscored_reward: float | None) -> float:
        """Return the value, or the reward that the caller chose for samples without a value.

        Raises:
            JudgeUnavailable: there is no value, and the caller chose no reward for this case.
            UsageError: the chosen reward is not a number.
        """
        value = unscored_reward if self.value is None else self.value
        if value is not None and not is_number(value):  # NaN would silently ruin the policy
            raise UsageError(f"unscored_reward: {value!r:.40}, but it must be a number.")
        if value is None:
            why = f" ({self.reason})" if self.reason else ""
            raise JudgeUnavailable(
                f"a step has no reliable score{why}. Set unscored_reward to give such samples a reward."
            )
        return value


@dataclass
class Judge:
    """A judge at a URL. Safe to use from several threads."""

    url: str
    key: str | None = field(default=None, repr=False)
    """The server's bearer token."""
    timeout: float = 120.0
    """Seconds until a response must be complete."""
    attempts: int = 6
    concurrency: int = 32
    """The maximum number of concurrent requests; the server judges them together."""
    _local: threading.local = field(default_factory=threading.local, repr=False)

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            UsageError: the URL is not that of a server, the key cannot be sent in a header, or a number is below 1.
        """
        for name in ("attempts", "concurrency"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise UsageError(f"{name}: {getattr(self, name)}, but it must be an integer of at least 1.")
        if not (is_number(self.timeout) and 0 < self.timeout <= _LONGEST_TIMEOUT):
            raise UsageError(f"timeout: {self.timeout}, but it must be more than 0 seconds, and at most a day.")
        check_url(self.url, "the judge's URL", "http://127.0.0.1:8000")
        self.key = checked_key(self.key or "", "the judge's key")  # httpx's error message would show the key

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to pickle for another process: the settings and the key, but no connections."""
        return {name: value for name, value in vars(self).items() if name != "_local"}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Restore a pickled client; it opens its own connections."""
        vars(self).update(state, _local=threading.local())

    def score(self, steps: Sequence[Any], keys: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """Score steps or ready-made prompts; return one line each, in order, as `POST /v1/score` does.

        A line with the status `failed` is requested again, and is returned if it fails in every attempt.

        Raises:
            JudgeUnavailable, RequestRefused: see there.
            UsageError: `steps` or `keys` is not a list.
        """
        if isinstance(steps, str | Mapping):
            raise UsageError("steps: expected a list of steps or prompts, not a single one.")
        if isinstance(keys, str):
            raise UsageError("keys: expected a list of score keys, not a single one.")
        more = {"keys": list(keys)} if keys else {}
        parts = [list(steps[first : first + 64]) for first in range(0, len(steps), 64)]
        answers = self._each([("/v1/score", {"steps": part, **more}) for part in parts])
        lines = [line for answer in answers for line in _lines(answer, "results", self.url)]
        if len(lines) != len(steps):
            raise JudgeUnavailable(
                f"{self.url} returned {len(lines)} lines for {len(steps)} steps. Check that this is serve_judge.py."
            )
        return lines

    def score_run(self, run: Any, *, gamma: float = 1.0) -> list[dict[str, Any]]:
        """Score every step of a run in any format that `import_trajectories.py` reads; return one object per run.

        Raises:
            JudgeUnavailable, RequestRefused: the server does not respond, or refuses the request.
        """
        (answer,) = self._each([(f"/v1/score_trajectory?gamma={float(gamma)}", run)])
        runs = _lines(answer, "runs", self.url)
        for found in runs:
            _lines(found, "steps", self.url)
            for name in ("min", "product", "mean", "last"):
                _check_share(_part(found["aggregates"], name, self.url), self.url)
        return runs

    def reward(self, prompt: str | Messages, response: str | Messages, *, aggregate: str = "min") -> Reward:
        """Return the reward of one sample.

        Raises:
            JudgeUnavailable, RequestRefused: the server does not respond, or refuses the request.
        """
        return self.rewards([(prompt, response)], aggregate=aggregate)[0]

    def rewards(
        self, samples: Sequence[tuple[str | Messages, str | Messages]], *, aggregate: str = "min"
    ) -> list[Reward]:
        """Return the rewards of many samples, in order, requested concurrently.

        Args:
            samples: prompt and response, each as a string (with or without the tokens of a chat template) or as
                messages.
            aggregate: how the steps' scores become one number: min, mean, product or last.

        Raises:
            JudgeUnavailable, RequestRefused: the server does not respond, or refuses the request.
        """
        asked = [_sample(*sample, aggregate) for sample in samples]
        return [_reward(answer, self.url) for answer in self._each(asked)]

    async def arewards(
        self, samples: Sequence[tuple[str | Messages, str | Messages]], *, aggregate: str = "min"
    ) -> list[Reward]:
        """Do the same as `rewards`, for callers that run an event loop."""
        import httpx

        limit = asyncio.Semaphore(self.concurrency)
        async with httpx.AsyncClient(**self._settings()) as client:

            async def ask(path: str, body: Any) -> Any:
                content = _json_of(body)
                async with limit:
                    for attempt in range(self.attempts):
                        outcome = await _acaught(client.post(path, content=content), self.timeout)
                        if (pause := _pause(outcome, attempt, self.attempts)) is None:
                            break
                        await asyncio.sleep(pause)
                    return _content(outcome, self.url)

            asked = [_sample(*sample, aggregate) for sample in samples]
            answers = await asyncio.gather(*(ask(path, body) for path, body in asked))
            return [_reward(answer, self.url) for answer in answers]

    def _each(self, requests: Sequence[tuple[str, Any]]) -> list[Any]:
        if len(requests) == 1:
            return [self._ask(*requests[0])]
        with ThreadPoolExecutor(max(1, min(self.concurrency, len(requests)))) as pool:
            return list(pool.map(lambda request: self._ask(*request), requests))

    def _ask(self, path: str, body: Any) -> Any:
        content = _json_of(body)
        with self._client() as client:
            for attempt in range(self.attempts):
                outcome = _caught(lambda: _post(client, path, content, self.timeout))
                if (pause := _pause(outcome, attempt, self.attempts)) is None:
                    break
                time.sleep(pause)
            return _content(outcome, self.url)

    @contextmanager
    def _client(self) -> "Iterator[httpx.Client]":
        """This thread's client, which keeps its connection open.

        A forked process inherits the connection but must not use it: it could read a response to its parent's request,
        and so another sample's reward.
        """
        import httpx

        if getattr(self._local, "process", None) != os.getpid():
            self._local.client, self._local.process = httpx.Client(**self._settings()), os.getpid()
        yield self._local.client

    def _settings(self) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        # Ignore proxies from the environment, to which the address of an internal judge would leak.
        return {
            "base_url": self.url.rstrip("/"),
            "headers": headers,
            "timeout": self.timeout,
            "trust_env": False,
            "verify": trusted_certificates(trust_env=False),
        }


def client_of(judge: str | Judge, aggregate: str = "min") -> Judge:
    """Return a `Judge` for a URL; return a `Judge` unchanged.

    Args:
        judge: the URL, or the client.
        aggregate: how the caller combines the steps' scores into one number.

    Raises:
        UsageError: there is no such aggregate.
    """
    if aggregate not in AGGREGATES:
        raise UsageError(f"aggregate: {aggregate!r:.40} is unknown. Use one of {', '.join(AGGREGATES)}.")
    return Judge(judge) if isinstance(judge, str) else judge


def _sample(prompt: str | Messages, response: str | Messages, aggregate: str) -> tuple[str, dict[str, Any]]:
    # null, so that the client decides: each trainer handles a step without a score differently.
    return "/reward", {"prompt": prompt, "response": response, "aggregate": aggregate, "unscored": "null"}


def _reward(answer: Any, url: str) -> Reward:
    try:
        value, steps, mass = answer["score"], tuple(answer["scores"]), answer["label_mass"]
    except (TypeError, KeyError):
        raise JudgeUnavailable(f"{url}: {answer!r:.200} is not a response of serve_judge.py. Check the URL.") from None
    for number in (value, *steps, mass):
        _check_share(number, url)
    return Reward(value, steps, mass, answer.get("reason"))


def _lines(answer: Any, name: str, url: str) -> list[dict[str, Any]]:
    """Return the lines of a response, after checking that every score is a number from 0 to 1 or null."""
    lines = answer.get(name) if isinstance(answer, dict) else None
    needed = _PARTS[name]
    if not isinstance(lines, list) or not all(isinstance(line, dict) and needed <= line.keys() for line in lines):
        raise JudgeUnavailable(f"{url}: {answer!r:.200} is not a response of serve_judge.py. Check the URL.")
    for line in lines:
        _check_share(line.get("score"), url)
    return lines


def _part(answer: Any, name: str, url: str) -> Any:
    if not isinstance(answer, dict) or name not in answer:
        raise JudgeUnavailable(f"{url}: {answer!r:.200} is not a response of serve_judge.py. Check the URL.")
    return answer[name]


def _check_share(number: Any, url: str) -> None:
    """Reject a reward that is NaN or out of range, because it would silently train the policy on nonsense."""
    if number is not None and not is_share(number):
        raise JudgeUnavailable(f"{url}: {number!r:.40} is not a score from 0 to 1.")


# --- responses --------------------------------------------------------------------------------------------------------


def _caught(ask: Callable[[], T]) -> T | Exception:
    import httpx

    try:
        return ask()
    except httpx.RequestError as error:
        return error


async def _acaught(ask: Any, timeout: float) -> Any:
    import httpx

    try:
        return await asyncio.wait_for(ask, timeout)
    except (httpx.RequestError, TimeoutError) as error:
        return error


def _json_of(body: Any) -> bytes:
    """Return a request's body. As in an import, half of a truncated emoji (a lone surrogate) becomes a question mark.

    Raises:
        RequestRefused: it contains something that JSON cannot express, for example NaN.
    """
    try:
        text = json.dumps(body, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestRefused(f"the messages cannot be sent as JSON ({error}). Use only JSON types.") from error
    return text.encode("utf-8", "replace")


def _post(client: "httpx.Client", path: str, body: bytes, timeout: float) -> "httpx.Response":
    """Return a response that is complete within `timeout` seconds; httpx only limits the wait for each byte."""
    import httpx

    deadline, content = time.monotonic() + timeout, bytearray()
    with client.stream("POST", path, content=body) as response:
        for part in response.iter_bytes():
            content += part
            if time.monotonic() > deadline:
                raise httpx.ReadTimeout(f"no complete response within {timeout:g} s")
    headers = {"retry-after": response.headers.get("retry-after", "")}
    return httpx.Response(response.status_code, headers=headers, content=bytes(content), request=response.request)


def _pause(outcome: Any, attempt: int, attempts: int) -> float | None:
    """Return the seconds until the next attempt; None if there is an answer or no attempts are left."""
    is_passing = getattr(outcome, "status_code", 503) in _PASSING or _has_failed_line(outcome)
    if attempt + 1 >= attempts or not is_passing:
        return None
    asked = getattr(outcome, "headers", {}).get("retry-after", "")
    own = min(2.0**attempt, _LONGEST_PAUSE) * random.uniform(0.5, 1.0)  # noqa: S311 - not a secret
    return min(float(asked), _LONGEST_PAUSE) if asked.isdecimal() else own


def _has_failed_line(response: "httpx.Response") -> bool:
    """Return whether the judge failed to score a step because a server failed or memory ran out."""
    if b'"failed"' not in response.content:
        return False
    try:
        answer = response.json()
        lines = [*answer.get("results", ()), *(line for run in answer.get("runs", ()) for line in run["steps"])]
        return any(line["status"] == "failed" for line in lines)
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError):  # not from serve_judge.py
        return False


def _content(outcome: Any, url: str) -> Any:
    status = getattr(outcome, "status_code", None)
    if status is None or status in _PASSING:
        raise JudgeUnavailable(f"{url}: {_message(outcome)}")
    if status != 200:
        raise RequestRefused(f"{url}: {status}: {_message(outcome)}")
    return _json(outcome)


def _message(outcome: Any) -> str:
    if isinstance(outcome, Exception):
        return f"no response ({type(outcome).__name__}: {outcome})"
    try:
        return str(outcome.json()["error"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"status {outcome.status_code}"


def _json(response: Any) -> Any:
    try:
        return response.json()
    except (ValueError, RecursionError) as error:
        raise JudgeUnavailable(f"{response.url}: the response is not JSON, so this is not serve_judge.py.") from error
