"""The command of `serve_judge.py`: load a judge and serve it on a port."""

import argparse
import asyncio
import logging
import os
import socket
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from prmkit.errors import DataError, ExitCode, Interrupted, UsageError
from prmkit.http_client import checked_key
from prmkit.judge.scorer import DEFAULT_RUN, Scorer, judge_source_in, scorer_of, scoring_options_of
from prmkit.prompts.step import Rubric, load_rubric
from prmkit.registered import is_registered, registered_run
from prmkit.scoring.rows import check_rubric, shapes_for
from prmkit.scoring.score import abstention_of
from prmkit.serving.app import Limits, make_app
from prmkit.serving.engine import Engine
from prmkit.serving.judges import Challenger, ServedJudge
from prmkit.serving.metrics import ServerMetrics, held_out_scores
from prmkit.serving.request_log import RequestLog
from prmkit.serving.service import Service

log = logging.getLogger("prmkit")

_KEEP_ALIVE = 75
"""Seconds that a connection may be idle, or may take to send a request's headers."""
_SHADOW_PATIENCE = 0.01
"""Seconds that the challenger's prompts wait for the queue; no client needs them, and they must not pile up."""
_CHALLENGER_SHARE, _SHADOW_SHARE = 0.1, 1.0
"""The default fraction of tasks that a challenger scores, without and with --shadow."""


def serve(arguments: argparse.Namespace) -> ExitCode:
    """Serve until a signal arrives; requests that were already accepted still get a response.

    Raises:
        DataError: there is no such judge, or the port is in use.
        UsageError: the arguments contradict each other, or the key's variable is empty.
        Interrupted: SIGTERM or SIGINT arrived, which is how serving normally ends.
    """
    scorer = scorer_of(arguments)
    service = _service(arguments, scorer)
    limits = Limits(arguments.max_body << 20, _key(arguments.key_env), arguments.drain)
    try:
        with service.request_log.writing() if service.request_log else nullcontext():
            return _serve(service, limits, arguments)
    except Interrupted as stopped:
        if refused := sum(judge.engine.refused for judge in service.judges):
            # The judge's thread may hang on these prompts for minutes, and Python would wait for it to end.
            log.error("Stopped; %d prompts did not finish in time and got 503.", refused)
            os._exit(stopped.exit_code)
        raise


def _serve(service: Service, limits: Limits, arguments: argparse.Namespace) -> ExitCode:
    with _bind(arguments.host, arguments.port) as listening:
        for judge in service.judges:
            judge.engine.load()  # fail now if the judge cannot be loaded, not when the first client connects
        _listen(listening, arguments.host)
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        log.info("%s on http://%s:%d (stop with Ctrl-C)", service.judge.name, shown, port)
        if challenger := service.challenger:
            verb = "shadows" if challenger.is_shadow else "serves"
            log.info("%s %s %g %% of the tasks", challenger.judge.name, verb, 100 * challenger.share)
        return _run(service, limits, listening)


def _service(arguments: argparse.Namespace, scorer: Scorer) -> Service:
    name = str(arguments.run or arguments.model or DEFAULT_RUN)
    rubric, why_not = _rubric(arguments.rubric, scorer, name)
    judge = _served(arguments, scorer, _name_of(name))
    run = (arguments.run or DEFAULT_RUN) if scorer.is_local and not arguments.model else None
    metrics = ServerMetrics(lambda: judge.engine.depth, held_out_scores(run))
    judge.engine.on_batch = metrics.count_batch
    judge.engine.on_cache_hit = metrics.cache_hits.inc
    return Service(
        judge=judge,
        metrics=metrics,
        shape_of=shapes_for(scorer.source, arguments.data_dir),
        rubric=rubric,
        why_no_rubric=why_not,
        challenger=_challenger(arguments, has_rubric=rubric is not None),
        bad_below=arguments.bad_below,
        aggregate=arguments.aggregate,
        unscored=arguments.unscored,
        request_log=_request_log(arguments, metrics),
    )


def _served(arguments: argparse.Namespace, scorer: Scorer, name: str) -> ServedJudge:
    engine = Engine(
        scorer,
        window=arguments.window / 1000,
        limit=arguments.queue,
        patience=arguments.queue_timeout,
    )
    return ServedJudge(name, engine, abstention_of(scorer, arguments.interval, arguments.abstain_above))


def _challenger(arguments: argparse.Namespace, *, has_rubric: bool) -> Challenger | None:
    if arguments.challenger is None:
        if arguments.share is not None or arguments.shadow:
            raise UsageError("--share and --shadow require --challenger (a second judge).")
        return None
    scorer = _second_scorer(arguments, arguments.challenger)
    judge = _served(arguments, scorer, _name_of(str(scorer.source.adapter or scorer.source.model)))
    rubric, _ = _rubric(arguments.rubric, scorer, judge.name)
    if (rubric is not None) != has_rubric:
        raise UsageError(
            f"{judge.name} scores {'only ready-made prompts' if rubric is None else 'steps of runs'}, unlike the "
            "production judge. Choose a challenger trained on the same kind of prompts."
        )
    if arguments.shadow:
        judge.engine.patience = _SHADOW_PATIENCE
    default = _SHADOW_SHARE if arguments.shadow else _CHALLENGER_SHARE
    return Challenger(judge, default if arguments.share is None else arguments.share, arguments.shadow)


def _second_scorer(arguments: argparse.Namespace, name: str) -> Scorer:
    """Return a second judge, loaded here and used with the same settings.

    Args:
        arguments: the inference settings; arguments that choose a judge are ignored.
        name: a folder (a training run, an exported or a base model), or a registered version.

    Raises:
        DataError, UsageError: there is no such judge.
    """
    folder = Path(name)
    if not folder.is_dir() and os.sep not in name:
        try:
            folder = registered_run(name)
        except UsageError as error:
            raise UsageError(f"{name}: neither a folder nor a registered version ({error})") from error
    source = judge_source_in(folder)
    given = {each: getattr(arguments, each) for each in ("device", "dtype", "trust_remote_code")}
    source = replace(source, **{each: value for each, value in given.items() if value is not None})
    return Scorer(source, None, scoring_options_of(arguments))


def _name_of(judge: str) -> str:
    """Return a judge's name for clients and logs: NAME@NUMBER if it is registered, otherwise the end of its path."""
    run = Path(judge)
    return f"{run.parent.parent.name}@{run.parent.name}" if is_registered(run) else run.name or judge


def _request_log(arguments: argparse.Namespace, metrics: ServerMetrics) -> RequestLog | None:
    if arguments.log_requests is None:
        if arguments.log_prompts:
            raise UsageError("--log-prompts requires --log-requests FILE.")
        return None
    return RequestLog(
        arguments.log_requests,
        arguments.log_prompts,
        arguments.log_size << 20,
        arguments.log_files,
        metrics.count_logged,
    )


def _rubric(path: Path | None, scorer: Scorer, judge: str) -> tuple[Rubric | None, str]:
    """Return the rubric for steps, or None and the reason if the judge can only score ready-made prompts."""
    rubric = load_rubric(path)
    try:
        check_rubric(rubric, scorer.source.rubrics, judge)
    except UsageError as error:
        if path is not None or scorer.source.rubrics:
            raise  # the rubric differs from the training rubric
        log.warning("%s Until then, only ready-made prompts can be scored (/v1/score).", error)
        return None, str(error)
    return rubric, ""


def _key(name: str | None) -> str | None:
    if name is None:
        return None
    key = checked_key(os.environ.get(name, ""), f"--key-env {name}:")
    if key is None:
        raise UsageError(
            f"--key-env {name}: this environment variable is empty. Set it to the key that clients must send."
        )
    return key


def _bind(host: str, port: int) -> socket.socket:
    if not host:  # with an empty host, the system would listen on all addresses
        raise UsageError(
            "--host is empty. Omit it to listen only on this machine, or use 0.0.0.0 to listen on all networks."
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With protocol 0, asyncio does not recognise TCP and keeps Nagle's algorithm, which costs 40 ms per response.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except (OSError, OverflowError) as error:
        listening.close()
        raise _cannot_listen(host, port, error) from error
    return listening


def _listen(listening: socket.socket, host: str) -> None:
    try:
        listening.listen(2048)  # not earlier, so that clients and load balancers are refused until the judge is loaded
    except OSError as error:  # another process bound the same port at the same time
        raise _cannot_listen(host, listening.getsockname()[1], error) from error


def _cannot_listen(host: str, port: int, error: Exception) -> DataError:
    reason = getattr(error, "strerror", None) or str(error)
    return DataError(f"{host}:{port}: {reason.rstrip('.')}. Choose another --port or --host.")


def _run(service: Service, limits: Limits, listening: socket.socket) -> ExitCode:
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            # uvicorn ends the application after its last request. Requests wait for the judge, so it must stop, too.
            stopping = asyncio.create_task(service.stop(limits.drain))
            await super().shutdown(sockets)
            await stopping

    config = uvicorn.Config(
        make_app(service, limits),
        http=_patient_protocol(),
        log_level="warning",
        lifespan="on",
        timeout_graceful_shutdown=int(limits.drain) + 2,
        timeout_keep_alive=_KEEP_ALIVE,
        server_header=False,
    )
    try:
        Server(config).run(sockets=[listening])
    except Interrupted as error:  # uvicorn raises the signal again after the last response
        raise Interrupted("Stopped; every accepted request got a response.", error.exit_code) from None
    return ExitCode.DONE


def _patient_protocol() -> Any:
    """Return uvicorn's protocol with a time limit for headers, because uvicorn's own timer stops at the first byte."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Protocol(H11Protocol):
        _head_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._expect_head()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._expect_head()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            if self._head_timer:
                self._head_timer.cancel()

        def _expect_head(self) -> None:
            if self._head_timer:
                self._head_timer.cancel()
            self._head_timer = self.loop.call_later(_KEEP_ALIVE, self._close_without_head, self.cycle)

        def _close_without_head(self, earlier: object) -> None:
            if self.cycle is earlier:
                self.transport.close()

    return Protocol
