"""OpenTelemetry spans: the GenAI conventions in all their versions, and OpenInference (Phoenix).

Files are OTLP JSON (`resourceSpans`) or one span per line with `attributes` as an object. Messages are in
`gen_ai.input.messages` and `gen_ai.output.messages`, or in older versions in numbered `gen_ai.prompt.0.…` attributes or
in events of the span; OpenInference also numbers them, as `llm.input_messages.0.message.…`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from prmkit.trajectories.content import as_text, mapping, parsed
from prmkit.trajectories.run import Keys, NumberedValues, Reader, Run
from prmkit.trajectories.run_fields import tools_of
from prmkit.trajectories.spans import (
    ModelCall,
    Span,
    at,
    attributes_of,
    conversation,
    longest_conversations,
    nested,
    offered,
    undotted,
)

_EVENT_ROLES = {"gen_ai.system.message": "system", "gen_ai.user.message": "user", "gen_ai.tool.message": "tool",
                "gen_ai.assistant.message": "assistant", "gen_ai.choice": "assistant"}  # fmt: skip


def recognises(value: Any) -> bool:
    """OTLP JSON, or a span with attributes of GenAI or OpenInference."""
    if not isinstance(value, dict):
        return False
    if isinstance(value.get("resourceSpans") or value.get("resource_spans"), list):
        return True
    value = nested(value)
    if "attributes" not in value or not (
        {"name", "context", "trace_id", "traceId", "span_id", "spanId"} & value.keys()
    ):
        return False
    attributes = attributes_of(value)
    return "gen_ai" in attributes or "openinference" in attributes


def read(values: NumberedValues, _keys: Keys) -> Iterator[Run]:
    """A run for each trace."""
    for call, run in longest_conversations(values, _calls):
        run.tools = tools_of(call.tools)
        yield run


def _calls(value: Any) -> Iterator[ModelCall]:
    for span in _spans(value):
        attributes = attributes_of(span)
        messages = _genai(attributes, span) or _openinference(attributes)
        if messages:
            context = mapping(span.get("context"))
            trace = span.get("traceId") or span.get("trace_id") or context.get("trace_id")
            time = span.get("startTimeUnixNano") or span.get("start_time") or span.get("startTime")
            tools = at(attributes, "gen_ai", "tool", "definitions") or offered(attributes)
            yield ModelCall(as_text(trace), as_text(time), messages, tools)


def _spans(value: Any) -> Iterator[Span]:
    resources = (value.get("resourceSpans") or value.get("resource_spans")) if isinstance(value, dict) else None
    if not isinstance(resources, list):
        if isinstance(value, dict) and "attributes" in (span := nested(value)):
            yield span
        return
    for resource in resources:
        for scope in resource.get("scopeSpans") or resource.get("scope_spans") or ():
            yield from (span for span in scope.get("spans") or () if isinstance(span, dict))


def _genai(attributes: Mapping[str, Any], span: Span) -> list[Any]:
    """The messages of a `chat` span; agents' and tools' spans repeat parts of them."""
    if at(attributes, "gen_ai", "operation", "name") in ("invoke_agent", "execute_tool", "create_agent", "embeddings"):
        return []
    given, answer = at(attributes, "gen_ai", "input", "messages"), at(attributes, "gen_ai", "output", "messages")
    if given is None:
        given, answer = at(attributes, "gen_ai", "prompt"), at(attributes, "gen_ai", "completion")
    system = at(attributes, "gen_ai", "system_instructions")
    opening = [{"role": "system", "content": parsed(system)}] if system else []
    if given is not None:
        return opening + conversation(given, answer)
    return opening + list(_events(span))


def _events(span: Span) -> Iterator[dict[str, Any]]:
    """The older version: one event of the span for each message."""
    for event in span.get("events") or ():
        if isinstance(event, dict) and (role := _EVENT_ROLES.get(str(event.get("name")))):
            body = attributes_of(event) | mapping(event.get("body"))
            message = parsed(body.get("message", body))
            message = message if isinstance(message, dict) else {"content": message}
            calls = parsed(message.get("tool_calls"))
            if role == "tool" and "id" in body:
                message = {"tool_call_id": body["id"]} | message
            yield {"role": role} | message | ({"role": role, "tool_calls": calls} if calls else {"role": role})


def _openinference(attributes: Mapping[str, Any]) -> list[Any]:
    if at(attributes, "openinference", "span", "kind") != "LLM":
        return []
    found = []
    for name in ("input_messages", "output_messages"):
        for entry in parsed(at(attributes, "llm", name)) or ():
            message = undotted(entry).get("message") if isinstance(entry, dict) else None
            if isinstance(message, dict):
                found.append(_openinference_message(message))
    return found


def _openinference_message(message: Mapping[str, Any]) -> dict[str, Any]:
    calls, parts = (
        [undotted(each).get(inner, each) for each in message.get(name) or () if isinstance(each, dict)]
        for name, inner in (("tool_calls", "tool_call"), ("contents", "message_content"))
    )
    content = message.get("content") if message.get("content") is not None else parts
    return {**message, "content": content, "tool_calls": calls}


READER = Reader("otel", recognises, every=read)
