"""OpenTelemetry spans: the GenAI conventions in all versions, and OpenInference (Phoenix).

Files are OTLP JSON (`resourceSpans`) or one span per line with `attributes` as an object. Messages are in
`gen_ai.input.messages` and `gen_ai.output.messages`, or in older versions in numbered `gen_ai.prompt.0.…` attributes or
in events of the span; OpenInference also numbers them, as `llm.input_messages.0.message.…`.
Vercel's AI SDK has its own attributes, `ai.prompt.messages` and `ai.response.…`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from prmkit.trajectories.content import as_text, mapping, parsed, role_name
from prmkit.trajectories.readers.traces import ModelCall, conversation, longest_conversations
from prmkit.trajectories.run import FieldNames, NumberedValues, Reader, Run
from prmkit.trajectories.run_fields import tools_of

Span = Mapping[str, Any]

_EVENT_ROLES = {"gen_ai.system.message": "system", "gen_ai.user.message": "user", "gen_ai.tool.message": "tool",
                "gen_ai.assistant.message": "assistant", "gen_ai.choice": "assistant"}  # fmt: skip


def recognises(value: Any) -> bool:
    """Return whether a value is OTLP JSON, or a span with attributes of GenAI or OpenInference."""
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


_NOTHING = (
    "no span has the messages of a model call. Enable the capture of message content and record the runs again: "
    "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT=SPAN_ONLY (true in older versions), "
    "recordInputs and recordOutputs in the AI SDK. Messages in log records are not read"
)


def read(values: NumberedValues, _keys: FieldNames) -> Iterator[Run]:
    """Yield one run per trace."""
    for call, run in longest_conversations(values, _calls, _NOTHING):
        run.tools = tools_of(call.tools)
        yield run


def _calls(value: Any) -> Iterator[ModelCall]:
    for span in _spans(value):
        attributes = attributes_of(span)
        genai = _genai(attributes, span)
        given, answer = genai or _ai_sdk(attributes) or _openinference(attributes)
        if given or answer:
            context = mapping(span.get("context"))
            trace = span.get("traceId") or span.get("trace_id") or context.get("trace_id")
            time = span.get("startTimeUnixNano") or span.get("start_time") or span.get("startTime")
            tools = at(attributes, "gen_ai", "tool", "definitions") or offered(attributes)
            tools = tools or list(map(parsed, at(attributes, "ai", "prompt", "tools") or ()))
            first = answer[:1] if genai and _are_samples(answer) else answer
            yield ModelCall(as_text(trace), as_text(time), given, first, tools, len(answer) - len(first))


def _are_samples(answer: list[Any]) -> bool:
    """Return whether output messages are samples of one answer (as GenAI defines), not a conversation."""
    return all(role_name(message) == "assistant" for message in answer)


def _spans(value: Any) -> Iterator[Span]:
    resources = (value.get("resourceSpans") or value.get("resource_spans")) if isinstance(value, dict) else None
    if not isinstance(resources, list):
        if isinstance(value, dict) and "attributes" in (span := nested(value)):
            yield span
        return
    for resource in resources:
        for scope in resource.get("scopeSpans") or resource.get("scope_spans") or ():
            yield from (span for span in scope.get("spans") or () if isinstance(span, dict))


def _genai(attributes: Mapping[str, Any], span: Span) -> tuple[list[Any], list[Any]] | None:
    """Return the messages of a `chat` span; agents' and tools' spans repeat parts of them."""
    if at(attributes, "gen_ai", "operation", "name") in ("invoke_agent", "execute_tool", "create_agent", "embeddings"):
        return None
    attributes = next((found for found in (attributes, *_details(span)) if at(found, "gen_ai", "input", "messages")),
                      attributes)  # fmt: skip
    given, answer = at(attributes, "gen_ai", "input", "messages"), at(attributes, "gen_ai", "output", "messages")
    if given is None:
        given, answer = at(attributes, "gen_ai", "prompt"), at(attributes, "gen_ai", "completion")
    system = at(attributes, "gen_ai", "system_instructions")
    opening = [{"role": "system", "content": parsed(system)}] if system else []
    if given is not None:
        messages, output = conversation(given, answer)
        return opening + messages, output
    events = list(_events(span))
    messages, output = ([message for message, is_answer in events if is_answer is wanted] for wanted in (False, True))
    return (opening + messages, output) if events else None


def _events(span: Span) -> Iterator[tuple[dict[str, Any], bool]]:
    """Yield each message of the older version (one span event per message), and whether it is an output."""
    for event in span.get("events") or ():
        if isinstance(event, dict) and (role := _EVENT_ROLES.get(str(event.get("name")))):
            body = attributes_of(event) | mapping(event.get("body"))
            message = parsed(body.get("message", body))
            message = message if isinstance(message, dict) else {"content": message}
            calls = parsed(message.get("tool_calls"))
            if role == "tool" and "id" in body:
                message = {"tool_call_id": body["id"]} | message
            message = {"role": role} | message | ({"role": role, "tool_calls": calls} if calls else {"role": role})
            yield message, event["name"] == "gen_ai.choice"


def _details(span: Span) -> Iterator[dict[str, Any]]:
    """Yield the attributes of events with messages, for spans whose own attributes have none."""
    for event in span.get("events") or ():
        if isinstance(event, dict) and event.get("name") == "gen_ai.client.inference.operation.details":
            yield attributes_of(event)


def _ai_sdk(attributes: Mapping[str, Any]) -> tuple[list[Any], list[Any]] | None:
    """Return the messages of a model call of Vercel's AI SDK (`ai.generateText.doGenerate` and similar)."""
    given = at(attributes, "ai", "prompt", "messages")
    if given is None:
        return None
    answer = at(attributes, "ai", "response")
    calls = parsed(at(answer, "toolCalls"))
    text, thought = at(answer, "text"), at(answer, "reasoning")
    return conversation(given, {"role": "assistant", "content": text, "reasoning": thought, "tool_calls": calls})


def _openinference(attributes: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
    found: tuple[list[Any], list[Any]] = ([], [])
    if at(attributes, "openinference", "span", "kind") != "LLM":
        return found
    for name, messages in zip(("input_messages", "output_messages"), found, strict=True):
        for entry in parsed(at(attributes, "llm", name)) or ():
            message = undotted(entry).get("message") if isinstance(entry, dict) else None
            if isinstance(message, dict):
                messages.append(_openinference_message(message))
    return found


def _openinference_message(message: Mapping[str, Any]) -> dict[str, Any]:
    calls, parts = (
        [undotted(each).get(inner, each) for each in message.get(name) or () if isinstance(each, dict)]
        for name, inner in (("tool_calls", "tool_call"), ("contents", "message_content"))
    )
    content = message.get("content") if message.get("content") is not None else parts
    return {**message, "content": content, "tool_calls": calls}


READER = Reader("otel", recognises, every=read)


# --- attributes: exporters write them as pairs, as dotted names or nested ---------------------------------------------


def attributes_of(span: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes as one tree, whether the file has pairs, dotted names or a tree."""
    flat = span.get("attributes")
    if isinstance(flat, list):  # OTLP: [{"key": …, "value": {"stringValue": …}}]
        flat = {pair["key"]: _plain(pair.get("value")) for pair in flat if isinstance(pair, dict) and "key" in pair}
    return undotted(flat) if isinstance(flat, dict) else {}


def _plain(value: Any) -> Any:
    if not isinstance(value, dict) or len(value) != 1:
        return value
    ((kind, inner),) = value.items()
    if kind == "arrayValue":
        return [_plain(each) for each in (inner or {}).get("values") or ()]
    if kind == "kvlistValue":
        return {pair["key"]: _plain(pair.get("value")) for pair in (inner or {}).get("values") or ()}
    return inner


def undotted(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Unflatten dotted names: `{"a.0.b": 1}` becomes `{"a": [{"b": 1}]}`."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *path, leaf = str(key).split(".")
        branch = tree
        for name in path:
            inner = branch.setdefault(name, {})
            if not isinstance(inner, dict):
                break  # a name that is both a value and a prefix: the value is kept
            branch = inner
        else:
            branch.setdefault(leaf, undotted(value) if isinstance(value, dict) else value)
    return {key: _listed(value) for key, value in tree.items()}


def _listed(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    inner = {key: _listed(each) for key, each in value.items()}
    if inner and all(key.isdigit() for key in inner):
        return [inner[key] for key in sorted(inner, key=int)]
    return inner


def at(tree: Any, *path: str) -> Any:
    """Return the value at a path of a tree; None if the path ends early."""
    for name in path:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def nested(span: Mapping[str, Any]) -> Mapping[str, Any]:
    """Unflatten a span whose fields have dotted names (`attributes.llm.…`), as in Phoenix's data frames."""
    return undotted(span) if any(str(key).startswith("attributes.") for key in span) else span


def offered(attributes: Mapping[str, Any]) -> list[Any]:
    """Return the tools that OpenInference lists, each as the JSON schema that the model got."""
    listed = at(attributes, "llm", "tools")
    tools = [undotted(each) for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
    return [parsed(at(each, "tool", "json_schema")) for each in tools]
