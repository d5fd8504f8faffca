"""The HTTP layer of the server: routes, limits, keys, and the status of every error."""

import asyncio
import hmac
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from prmkit.errors import PrmkitError
from prmkit.judge.types import SCORED
from prmkit.serving.engine import Busy, Stopping
from prmkit.serving.judges import ServedJudge
from prmkit.serving.payloads import request_id
from prmkit.serving.service import NoReward, Service

if TYPE_CHECKING:
    from fastapi import FastAPI

log = logging.getLogger("prmkit")

_PAGE = Path(__file__).with_name("page.html")
_SHUTTING_DOWN = "the server is shutting down"
_WARMUP_PAUSE = 5.0
"""Seconds until a failed warm-up prompt is retried."""
_BODY_POLL = 0.5
"""Seconds between two checks of a request whose body has not arrived."""
_SLOWEST = 10_000
"""Bytes per second. A client that sends its body more slowly is only keeping the connection open."""
_OPEN = {"/", "/health", "/ready", "/openapi.json", "/docs"}
"""Paths that need no key, because they reveal nothing about the judge or its requests."""
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)

AsgiMessage = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[AsgiMessage]]
Send = Callable[[AsgiMessage], Awaitable[None]]


@dataclass(frozen=True)
class Limits:
    """Limits for one request."""

    body: int = 32 << 20
    """The maximum number of bytes in a body."""
    key: str | None = None
    """The bearer token that clients must send; None if no token is needed."""
    drain: float = 30.0
    """Seconds to finish accepted requests when the server is stopped."""
    body_patience: float = 30.0
    """Seconds for a body to arrive; a large body gets more."""


def make_app(service: Service, limits: Limits) -> Any:
    """Build the application for uvicorn."""
    from fastapi import FastAPI
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException

    routes = _Routes(service)
    app = FastAPI(
        title="prmkit",
        summary=f"Scores of agent steps by {service.judge.name}.",
        lifespan=_lifespan(service, routes, limits),
        openapi_tags=[{"name": "scores"}, {"name": "rewards"}, {"name": "server"}],
    )
    app.router.route_class = _strict_route()
    _add_routes(app, routes)
    for error in (PrmkitError, NoReward, Busy, Stopping, RecursionError, RequestValidationError, HTTPException):
        app.add_exception_handler(error, _handle)
    app.add_exception_handler(Exception, _handle_bug)
    return Guard(app, service, limits)


def _lifespan(service: Service, routes: "_Routes", limits: Limits) -> Callable[[Any], Any]:
    @asynccontextmanager
    async def lifespan(_app: Any) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(judge.engine.run()) for judge in service.judges]
        tasks.append(asyncio.create_task(routes.score_warmup()))
        yield
        await service.stop(limits.drain)
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError, Stopping):
                await task

    return lifespan


def _strict_route() -> Any:
    """Return a route class that reads JSON strictly: no NaN, no lone surrogates, no unlimited nesting.

    Python's own parser accepts these, but they cannot be written later (to a response, a file, a log).
    """
    from fastapi import Request
    from fastapi.routing import APIRoute

    class StrictRequest(Request):
        async def json(self) -> Any:
            return orjson.loads(await self.body())

    class StrictRoute(APIRoute):
        def get_route_handler(self) -> Any:
            handle = super().get_route_handler()

            async def handle_strictly(request: Request) -> Any:
                return await handle(StrictRequest(request.scope, request.receive))

            return handle_strictly

    return StrictRoute


class _Routes:
    """The handlers. FastAPI reads their parameters from the request."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._warmup: dict[str, Any] | None = None

    async def score(self, body: dict[str, Any]) -> Any:
        """Score ready-made prompts, or steps with task, history and step. A line without a score has the reason."""
        return await self._service.score(body)

    async def score_trajectory(
        self,
        body: dict[str, Any] | list[Any],
        format: str | None = None,
        gamma: float = 1.0,
        bad_below: float | None = None,
    ) -> Any:
        """Score every step of a run in any format that `import_trajectories.py` reads, for example OpenAI messages."""
        return await self._service.score_trajectory(body, format, gamma, bad_below)

    async def get_reward(self, body: dict[str, Any]) -> Any:
        """Return rewards in OpenRLHF's format: finite numbers, or 503."""
        return await self._service.rewards(body)

    async def reward(self, body: dict[str, Any]) -> Any:
        """Return the reward of one sample in slime's format (`--reward-key score`)."""
        return await self._service.reward(body)

    async def systemone(self, body: dict[str, Any]) -> Any:
        """Answer typed questions about a state with probabilities."""
        return await self._service.systemone(body)

    async def health(self) -> dict[str, str]:
        """Report that the process is alive."""
        return {"status": "ok"}

    async def ready(self) -> Any:
        """Report whether the judge is loaded and has scored a warm-up prompt."""
        from fastapi.responses import JSONResponse

        return JSONResponse(self._warmup or {"status": "loading"}, 200 if self._is_ready() else 503)

    def _is_ready(self) -> bool:
        return self._warmup is not None and self._warmup["status"] in SCORED

    async def score_warmup(self) -> None:
        """Score one small prompt, which loads the judge and shows that it works before a client needs it."""
        service = self._service
        while True:
            self._warmup = await self._first_line(service.judge)
            if self._warmup["status"] != "failed":
                break
            await asyncio.sleep(_WARMUP_PAUSE)  # the judge's server may still be starting
        if service.challenger:  # if the challenger fails, the production judge answers instead
            self._warmup["challenger"] = await self._first_line(service.challenger.judge)

    async def _first_line(self, judge: ServedJudge) -> dict[str, Any]:
        while True:
            with suppress(Busy):  # clients were faster, so the warm-up prompt waits for its turn
                line = await self._service.first_line(judge)
                break
        level = logging.INFO if line["status"] in SCORED else logging.WARNING
        log.log(level, "%s: warm-up prompt: %s", judge.name, line["reason"] or line["status"])
        return {key: line[key] for key in ("judge", "status", "score", "reason")}

    async def models(self) -> dict[str, Any]:
        """List the only model, in the format of OpenAI's list of models."""
        return {"object": "list", "data": [{"id": self._service.judge.name, "object": "model", "owned_by": "prmkit"}]}

    async def metrics(self) -> Any:
        """Return Prometheus metrics."""
        from fastapi.responses import Response

        return Response(self._service.metrics.text(), media_type="text/plain; version=0.0.4")

    async def page(self) -> Any:
        """Return a page for pasting a run."""
        from fastapi.responses import HTMLResponse

        return HTMLResponse(_PAGE.read_text(encoding="utf-8"))


_MESSAGES = [
    {"role": "user", "content": "Cancel order 17."},
    {"role": "assistant", "tool_calls": [{"function": {"name": "get_order", "arguments": '{"id": 17}'}, "id": "c1"}]},
    {"role": "tool", "tool_call_id": "c1", "content": "status: shipped"},
    {"role": "assistant", "content": "It has shipped, so it cannot be cancelled."},
]
_EXAMPLES: Mapping[str, Any] = {
    "score": {"steps": [{"task": "Cancel order 17.", "history": _MESSAGES[1:3], "step": _MESSAGES[3]}]},
    "score_trajectory": {"messages": _MESSAGES},
    "get_reward": {
        "query": ["<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>"],
        "prompts": ["<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n"],
        "labels": [""],
    },
    "reward": {"prompt": "What is 2 + 2?", "response": "4", "label": ""},
    "systemone": {
        "state": {"task": "What is 2 + 2?", "output": "4"},
        "questions": {"step_score": {"type": "score", "criteria": ["bad", "neutral", "good"]}},
    },
}


def _add_routes(app: "FastAPI", routes: _Routes) -> None:
    for name, path, tag in (
        ("score", "/v1/score", "scores"),
        ("score_trajectory", "/v1/score_trajectory", "scores"),
        ("systemone", "/v1/systemone", "scores"),
        ("get_reward", "/get_reward", "rewards"),
        ("reward", "/reward", "rewards"),
    ):
        example = {"requestBody": {"content": {"application/json": {"example": _EXAMPLES[name]}}}}
        app.add_api_route(path, getattr(routes, name), methods=["POST"], tags=[tag], openapi_extra=example)
    for name, path in (("health", "/health"), ("ready", "/ready"), ("models", "/v1/models"), ("metrics", "/metrics")):
        app.add_api_route(path, getattr(routes, name), methods=["GET"], tags=["server"])
    app.add_api_route("/", routes.page, methods=["GET"], include_in_schema=False)


async def _handle(request: Any, error: Exception) -> Any:
    """Give all errors the same format, with 503 instead of 429, because some trainers do not retry 4xx."""
    from fastapi.responses import JSONResponse

    status, message = getattr(error, "status_code", 503), str(error)
    match error:
        case PrmkitError():
            status = 422
        case RecursionError():
            status, message = 422, "the request is nested too deeply"
        case Busy():
            message = "the queue is full"
        case Stopping():
            message = _SHUTTING_DOWN
        case _ if hasattr(error, "errors"):  # FastAPI's list of what is wrong with which part
            status = 422
            message = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()[:5])
            if "json" not in request.headers.get("content-type", ""):  # without this header, `curl -d` declares a form
                message = f"send JSON with the header Content-Type: application/json ({message})"
        case _:
            message = str(getattr(error, "detail", message))
    headers = {"Retry-After": "1"} if status == 503 else getattr(error, "headers", None)
    return JSONResponse({"error": message}, status, headers)


async def _handle_bug(_request: Any, _error: Exception) -> Any:
    """Hide the traceback from clients, but write it to the server's stderr."""
    from fastapi.responses import JSONResponse

    return JSONResponse({"error": "internal server error; the server's log has the details"}, 500)


class Guard:
    """Middleware that checks the key and the body's size, adds request ids, and counts requests."""

    def __init__(self, app: Any, service: Service, limits: Limits) -> None:
        """Wrap an ASGI application."""
        self._app, self._service, self._limits = app, service, limits
        self._paths = {route.path for route in app.routes if hasattr(route, "path")}

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        sent_id = headers.get(b"x-request-id", b"").decode("latin-1")
        identity = sent_id if _REQUEST_ID.fullmatch(sent_id) else uuid.uuid4().hex
        started, status = time.perf_counter(), 500
        request_id.set(identity)

        async def respond(message: AsgiMessage) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", identity.encode())]
            await send(message)

        try:
            if refusal := self._refusal(scope, headers):
                await _refuse(respond, *refusal)
            else:
                await self._app(scope, self._limited(receive), respond)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._service.metrics.requests.labels(path, str(status)).inc()
            self._service.metrics.seconds.labels(path).observe(time.perf_counter() - started)

    def _refusal(self, scope: Mapping[str, Any], headers: Mapping[bytes, bytes]) -> tuple[int, str] | None:
        if self._limits.key and scope["path"] not in _OPEN:
            sent = headers.get(b"authorization", b"")
            if not hmac.compare_digest(sent, b"Bearer " + self._limits.key.encode()):
                return 401, "missing or wrong key; send Authorization: Bearer KEY"
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._limits.body:
            return 413, f"the body is larger than {self._limits.body:,} bytes"
        return None

    def _limited(self, receive: Receive) -> Receive:
        """Limit a body's size, whether declared in the headers or not, and the time that it may take to arrive."""
        from starlette.exceptions import HTTPException

        began, received, is_complete = time.monotonic(), 0, False

        async def limited() -> AsgiMessage:
            nonlocal received, is_complete
            while not is_complete:
                message = None
                with suppress(TimeoutError):
                    message = await asyncio.wait_for(receive(), _BODY_POLL)
                if message:
                    received += len(message.get("body", b""))
                    is_complete = not message.get("more_body", False)
                if received > self._limits.body:
                    raise HTTPException(413, f"the body is larger than {self._limits.body:,} bytes")
                # HTTPException, because FastAPI passes on no other exception while it reads a body.
                if not is_complete and self._service.judge.engine.is_stopping:
                    raise HTTPException(503, _SHUTTING_DOWN)
                allowed = self._limits.body_patience + received / _SLOWEST
                if not is_complete and time.monotonic() - began > allowed:
                    raise HTTPException(408, "the body did not arrive in time", {"Connection": "close"})
                if message:
                    return message
            return await receive()  # the client disconnected

        return limited


async def _refuse(send: Send, status: int, message: str) -> None:
    body = orjson.dumps({"error": message})
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
