"""A real OpenAI-compatible chat endpoint that judges steps by a word in them, and misbehaves on demand.

Its score is 0.9 for a step that says "good", else 0.2. What else a step says makes it misbehave: "fenced" wraps its
answer, "prose" answers without JSON once, "stubborn" always, "cut" is cut off until there is more room, "html" answers
a page, "refused" is a 400. Models: "locked" is a 401, "gone" a 404, "busy" answers 429 with Retry-After at first, and
"overloaded" 529; "moved" redirects, "broke" says in a 200 that it has no credits, "parts" answers in parts.
"""

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Endpoint:
    """What was asked."""

    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    """Bodies that were answered with 200, in their order."""
    refused: int = 0
    seconds: float = 0.0
    """Time of each answer."""
    most_at_once: int = 0


@contextmanager
def chat_endpoint() -> Iterator[Endpoint]:
    """A server in a thread."""
    endpoint, lock, now = Endpoint(), threading.Lock(), [0]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                now[0] += 1
                endpoint.most_at_once = max(endpoint.most_at_once, now[0])
            time.sleep(endpoint.seconds)
            status, content = _answer(body, endpoint)
            with lock:
                now[0] -= 1
                if status == 200:
                    endpoint.asked.append(body | {"authorization": self.headers.get("Authorization")})
                else:
                    endpoint.refused += 1
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            if status == 429:
                self.send_header("Retry-After", "0.05")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    endpoint.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()


def _answer(body: dict[str, Any], endpoint: Endpoint) -> tuple[int, bytes]:
    model, messages = body["model"], body["messages"]
    if model in ("locked", "gone"):
        return (401 if model == "locked" else 404), b'{"error": "no"}'
    if model == "busy" and endpoint.refused < 3:
        return 429, b'{"error": "slow down"}'
    if model == "overloaded" and endpoint.refused < 1:
        return 529, b'{"error": "overloaded"}'
    if model == "moved":
        return 307, b""
    if model == "broke":
        return 200, b'{"error": {"message": "' + b"so sorry, " * 9 + b'no credits"}}'
    text = messages[0]["content"]
    this = text.rpartition("<step n=")[2]
    if "refused" in this:
        return 400, b'{"error": "too long"}'
    if "html" in this:
        return 200, b"<html>hello</html>"
    said, reason = _said(text, this, len(messages) > 1, body.get("max_tokens", 0))
    parts = [{"type": "thinking", "thinking": [{"text": "hm"}]}, {"type": "text", "text": said}]
    content = parts if model == "parts" else said
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": reason}
    usage = {"prompt_tokens": 100, "completion_tokens": 10}
    return 200, json.dumps({"choices": [choice], "usage": usage}).encode()


def _said(text: str, this: str, is_again: bool, room: int) -> tuple[str, str]:
    if '"steps"' in text:
        steps = text.split("<step n=")[1:]
        return json.dumps({"steps": [{"step": n, **_verdict(step)} for n, step in enumerate(steps, start=1)]}), "stop"
    if "stubborn" in this or ("prose" in this and not is_again):
        return "I think that this step was rather good.", "stop"
    verdict = json.dumps(_verdict(this))
    if "cut" in this and room < 2000:
        return verdict[:20], "length"
    return (f"Here it is:\n```json\n{verdict}\n```" if "fenced" in this else verdict), "stop"


def _verdict(step: str) -> dict[str, Any]:
    return {"reasoning": "because", "error_type": "none", "step_score": 0.9 if re.search("good", step) else 0.2}
