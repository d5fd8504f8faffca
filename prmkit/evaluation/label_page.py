"""The page of label_steps.py: a small server on 127.0.0.1 that shows one step at a time and writes labels.

Other pages in the same browser can also send requests to 127.0.0.1. So the address contains a random token, the
Host header must match, and labels are accepted only from our own origin. The page gets no score, band, outcome,
solution or earlier label, because the person must not know a judge's opinion.
"""

import argparse
import logging
import secrets
import threading
from collections.abc import Mapping
from dataclasses import asdict
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import orjson

from prmkit import cli
from prmkit.errors import DataError, ExitCode, Interrupted
from prmkit.evaluation.label_sample import Drawn, Labels, open_labels
from prmkit.files import exclusive_lock
from prmkit.prompts.step import load_rubric
from prmkit.trajectory import Step

log = logging.getLogger("prmkit")

PAGE = Path(__file__).with_name("label_page.html")
_MOST_BYTES = 10_000
"""The maximum number of bytes of a request."""
_LONGEST_TYPE = 80


def label_steps(arguments: argparse.Namespace) -> ExitCode:
    """Serve the page until every step is labelled and the person has finished, or the command is stopped.

    Raises:
        DataError: there are no runs, the port is taken, or another process is writing to the same file.
        UsageError: the output has labels for a different sample.
    """
    rubric = load_rubric(arguments.rubric)
    file = arguments.output
    with exclusive_lock(file.parent, f"writing {file.name}", lock=f".{file.name}.lock"):
        labels = open_labels(
            arguments.input,
            file,
            arguments.n,
            arguments.name,
            arguments.scores,
            arguments.seed,
            rubric,
            arguments.format,
        )
        server = make_server(labels, arguments.port)
        cli.emit(f"{server.address}\nOpen this address in a browser on this machine. Ctrl-C stops; labels are kept.")
        try:
            server.serve_forever(poll_interval=0.1)
        except (KeyboardInterrupt, Interrupted):
            log.info("Stopped. Run the same command to continue.")
        finally:
            server.server_close()
    cli.emit(f"{file}: {len(labels.done)} of {len(labels.sample)} steps are labelled, {len(labels.skipped)} skipped")
    if labels.done:
        cli.emit(f"next: python evaluate_judge.py --run saves/RUN --exam {file}")
    return ExitCode.DONE


class Server(ThreadingHTTPServer):
    """The server; one label at a time."""

    daemon_threads = True

    def __init__(self, labels: Labels, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.labels = labels
        self.token = secrets.token_urlsafe(24)
        self.lock = threading.Lock()
        self.nonce = secrets.token_urlsafe(16)

    @property
    def hosts(self) -> set[str]:
        """The allowed values of the Host header; another value means that the request is from another site's page."""
        return {f"127.0.0.1:{self.server_port}", f"localhost:{self.server_port}"}

    @property
    def address(self) -> str:
        """The URL of the page, with its token."""
        return f"http://127.0.0.1:{self.server_port}/{self.token}/"


def make_server(labels: Labels, port: int) -> Server:
    """Bind the server.

    Raises:
        DataError: the port is taken or invalid.
    """
    try:
        return Server(labels, port)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"127.0.0.1:{port}: {reason.rstrip('.')}. Choose another --port.") from error


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = 60

    def do_GET(self) -> None:
        match self._path():
            case "":
                page = PAGE.read_text(encoding="utf-8").replace("NONCE", self.server.nonce)
                self._send(HTTPStatus.OK, page.encode(), "text/html; charset=utf-8")
            case "step":
                with self.server.lock:
                    self._send_json(page_state(self.server.labels))
            case None:
                self._refuse(HTTPStatus.FORBIDDEN, "Open the address that the command printed, including its token.")
            case _:
                self._refuse(HTTPStatus.NOT_FOUND, "Not found.")

    def do_POST(self) -> None:
        path = self._path()
        if path is None or self.headers.get("Origin") not in {f"http://{host}" for host in self.server.hosts}:
            self._refuse(HTTPStatus.FORBIDDEN, "Labels are accepted only from this command's own page.")
            return
        value = self._body()
        if value is None:
            return
        with self.server.lock:
            refused = _act(self.server.labels, path, value)
            if refused:
                self._refuse(HTTPStatus.CONFLICT, refused)
            else:
                self._send_json(page_state(self.server.labels))
        if path == "finish" and not refused:
            # In a thread, because shutdown waits for this request to end.
            threading.Thread(target=self.server.shutdown).start()

    def _path(self) -> str | None:
        """Return the requested path; None unless host and token are correct."""
        token, _, rest = self.path.partition("?")[0].removeprefix("/").partition("/")
        right = secrets.compare_digest(token.encode("utf-8", "replace"), self.server.token.encode())
        return rest if right and self.headers.get("Host") in self.server.hosts else None

    def _body(self) -> dict[str, Any] | None:
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > _MOST_BYTES:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "The request is too long for a label.")
            return None
        try:
            value = orjson.loads(self.rfile.read(int(length)))
        except orjson.JSONDecodeError:
            value = None
        if not isinstance(value, dict):
            self._refuse(HTTPStatus.BAD_REQUEST, "The request is not a JSON object.")
            return None
        return value

    def _send_json(self, value: Any) -> None:
        self._send(HTTPStatus.OK, orjson.dumps(value, default=str), "application/json")

    def _refuse(self, status: HTTPStatus, why: str) -> None:
        self.close_connection = True  # the unread rest of the body must not be parsed as the next request
        self._send(status, orjson.dumps({"error": why}), "application/json")

    def _send(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        policy = f"default-src 'none'; script-src 'nonce-{self.server.nonce}'; style-src 'unsafe-inline'; "
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Content-Security-Policy": policy + "connect-src 'self'; base-uri 'none'; frame-ancestors 'none'",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: request paths contain the token."""


def _act(labels: Labels, path: str, value: Mapping[str, Any]) -> str | None:
    """Carry out a request; return the reason if that is impossible."""
    if path == "finish":
        return None
    if path == "undo":
        return None if labels.undo() else "Nothing is labelled yet."
    drawn = labels.next
    if path not in ("label", "skip") or drawn is None:
        return "There is no step to label."
    if value.get("id") != labels.sample.index(drawn):
        return "Another window has labelled this step. Reload the page."
    if path == "skip":
        labels.skip(drawn)
        return None
    given, kind = value.get("value"), value.get("type")
    if type(given) is not int or given not in (-1, 0, 1):
        return "The label must be 1, 0 or -1."
    if kind is not None and not (isinstance(kind, str) and len(kind) <= _LONGEST_TYPE):
        return f"The error type must be text of at most {_LONGEST_TYPE} characters."
    labels.add(drawn, given, kind or None)
    return None


def page_state(labels: Labels) -> dict[str, Any]:
    """Return what the page shows: the step with its history, and how many are left; nothing from a judge."""
    drawn = labels.next
    counts = {"labelled": len(labels.done), "skipped": len(labels.skipped), "all": len(labels.sample)}
    return counts | {"step": None if drawn is None else _shown(labels, drawn), "types": list(labels.rubric.error_types)}


def _shown(labels: Labels, drawn: Drawn) -> dict[str, Any]:
    run = labels.runs[drawn.trajectory_id]
    return {
        "id": labels.sample.index(drawn),  # not the run's id, which may reveal the outcome
        "task": run.task,
        "system": run.system,
        "history": [_step(step) for step in run.steps[: drawn.n - 1]],
        "step": _step(run.steps[drawn.n - 1]),
        "last": run.steps[drawn.n - 1].last,
    }


def _step(step: Step) -> dict[str, Any]:
    shown = asdict(step)
    for name in ("label", "source_index", "last"):
        del shown[name]
    return shown
