"""Scores in the real clients of Langfuse and OpenTelemetry."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
GOOD, POOR, CLOSE = 0.9, 0.2, 0.03
pytestmark = [pytest.mark.network, pytest.mark.huge]

EXPORT = """
import http.server, json, sys, threading
from langfuse import Langfuse
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prmkit.client import Judge
from prmkit.rewards.steps import evaluation_events, send_to_langfuse

posted = []
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/public/scores":
            posted.extend(json.loads(body))
        self.send_response(200)
        answer = b'{"id": "x"}'
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)
    def log_message(self, *_):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
said = [{"role": "assistant", "content": text} for text in ("good", "mumble", "bad")]
(run,) = Judge(sys.argv[1]).score_run({"messages": [{"role": "user", "content": "Do it."}, *said]})

langfuse = Langfuse(public_key="pk", secret_key="sk", base_url=f"http://127.0.0.1:{server.server_port}")
written = send_to_langfuse(langfuse, run, "0" * 31 + "1", ["a" * 16, "b" * 16, "c" * 16])
langfuse.flush()
scores = sorted([each["observationId"], each["value"], each["dataType"]] for each in posted)

kept = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(kept))
with provider.get_tracer("agent").start_as_current_span("run") as span:
    for attributes in evaluation_events(run):
        span.add_event("gen_ai.evaluation.result", attributes)
(span,) = kept.get_finished_spans()
events = [dict(event.attributes) for event in span.events]
print(json.dumps({"written": written, "scores": scores, "events": events}))
"""


def test_scored_steps_arrive_and_a_step_without_a_score_writes_nothing(
    judge_url: str, installed_alone: Callable[..., Path], output_of: Callable[..., Any]
) -> None:
    found = output_of(installed_alone("langfuse==5.0.4", "opentelemetry-sdk"), ROOT, EXPORT, judge_url)
    good, poor = pytest.approx(GOOD, abs=CLOSE), pytest.approx(POOR, abs=CLOSE)
    assert found["written"] == 2
    assert found["scores"] == [["a" * 16, good, "NUMERIC"], ["c" * 16, poor, "NUMERIC"]]
    values = [event["gen_ai.evaluation.score.value"] for event in found["events"]]
    assert values == [good, poor] and found["events"][1]["gen_ai.evaluation.score.label"] == "bad"
