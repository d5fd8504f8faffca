"""Traces: OpenTelemetry in its generations, OpenInference, LangSmith, Langfuse."""

import json
from typing import Any

import pytest

from prmkit.errors import DataError
from tests.trajectories.conftest import Read, outline

CALL = {"city": "Oslo"}
STEPS = [("", "", [("get_weather", CALL)], ["4 degrees"]), ("", "It is 4 degrees.", [], [])]
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How warm?"},
    {"role": "assistant", "content": "", "tool_calls": [
        {"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": json.dumps(CALL)}}]},
    {"role": "tool", "tool_call_id": "c", "content": "4 degrees"},
]  # fmt: skip
ANSWER = {"role": "assistant", "content": "It is 4 degrees."}

PARTS = [
    {"role": "user", "parts": [{"type": "text", "content": "How warm?"}]},
    {"role": "assistant", "parts": [{"type": "tool_call", "id": "c", "name": "get_weather", "arguments": CALL}]},
    {"role": "tool", "parts": [{"type": "tool_call_response", "id": "c", "response": "4 degrees"}]},
]
OUT = [{"role": "assistant", "parts": [{"type": "text", "content": "It is 4 degrees."}], "finish_reason": "stop"}]
GENAI = {
    "gen_ai.operation.name": "chat",
    "gen_ai.system_instructions": json.dumps([{"type": "text", "content": "Be brief."}]),
    "gen_ai.input.messages": json.dumps(PARTS),
    "gen_ai.output.messages": json.dumps(OUT),
}
TITLE = {
    "gen_ai.operation.name": "chat",
    "gen_ai.input.messages": json.dumps([{"role": "user", "parts": [{"type": "text", "content": "Title this."}]}]),
    "gen_ai.output.messages": json.dumps(OUT),
}
AGENT = {"gen_ai.operation.name": "invoke_agent", "gen_ai.input.messages": json.dumps(PARTS[:1])}


def span(attributes: dict[str, Any], time: int = 1, **more: Any) -> dict[str, Any]:
    return {"name": "x", "trace_id": "t", "span_id": str(time), "start_time": time, "attributes": attributes} | more


def _numbered(prefix: str, messages: list[dict[str, Any]]) -> dict[str, Any]:
    flat = {}
    for place, message in enumerate(messages):
        flat |= {f"{prefix}.{place}.{key}": value for key, value in message.items()}
    return flat


OLDER = {
    **_numbered("gen_ai.prompt", [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "How warm?"},
        {"role": "assistant", "tool_calls.0.id": "c", "tool_calls.0.name": "get_weather",
         "tool_calls.0.arguments": json.dumps(CALL)},
        {"role": "tool", "content": "4 degrees", "tool_call_id": "c"}]),
    **_numbered("gen_ai.completion", [ANSWER]),
}  # fmt: skip
EVENTS = [
    {"name": "gen_ai.system.message", "attributes": {"content": "Be brief."}},
    {"name": "gen_ai.user.message", "attributes": {"content": "How warm?"}},
    {"name": "gen_ai.assistant.message", "attributes": {"tool_calls": json.dumps(MESSAGES[2]["tool_calls"])}},
    {"name": "gen_ai.tool.message", "attributes": {"content": "4 degrees", "id": "c"}},
    {"name": "gen_ai.choice", "attributes": {"index": 0, "message": json.dumps(ANSWER)}},
]
OPENINFERENCE = {
    "openinference.span.kind": "LLM",
    **_numbered("llm.input_messages", [
        {"message.role": "system", "message.content": "Be brief."},
        {"message.role": "user", "message.contents.0.message_content.type": "text",
         "message.contents.0.message_content.text": "How warm?"},
        {"message.role": "assistant", "message.tool_calls.0.tool_call.id": "c",
         "message.tool_calls.0.tool_call.function.name": "get_weather",
         "message.tool_calls.0.tool_call.function.arguments": json.dumps(CALL)},
        {"message.role": "tool", "message.content": "4 degrees", "message.tool_call_id": "c"}]),
    **_numbered("llm.output_messages", [{"message.role": "assistant", "message.content": "It is 4 degrees."}]),
}  # fmt: skip


def _otlp(*spans: dict[str, Any]) -> dict[str, Any]:
    written = [
        {"traceId": each["trace_id"], "spanId": each["span_id"], "startTimeUnixNano": str(each["start_time"]),
         "attributes": [{"key": key, "value": {"stringValue": value}} for key, value in each["attributes"].items()]}
        for each in spans
    ]  # fmt: skip
    return {"resourceSpans": [{"resource": {}, "scopeSpans": [{"scope": {}, "spans": written}]}]}


DETAILS = {"name": "gen_ai.client.inference.operation.details", "attributes": {
    key: value for key, value in GENAI.items() if key != "gen_ai.operation.name"}}  # fmt: skip
AI_SDK = {
    "gen_ai.system": "openai",
    "ai.prompt.format": "messages",
    "ai.prompt.messages": json.dumps([
        *MESSAGES[:2],
        {"role": "assistant", "content": [
            {"type": "tool-call", "toolCallId": "c", "toolName": "get_weather", "input": CALL}]},
        {"role": "tool", "content": [{"type": "tool-result", "toolCallId": "c", "toolName": "get_weather",
                                      "output": {"type": "text", "value": "4 degrees"}}]}]),
    "ai.response.text": "It is 4 degrees.",
}  # fmt: skip

FILES: dict[str, list[dict[str, Any]]] = {
    "otel": [span(AGENT, 0), span(GENAI)],
    "otlp": [_otlp(span(AGENT, 0), span(GENAI))],
    "otel, numbered": [span(OLDER)],
    "otel, events": [span({"gen_ai.system": "openai"}, events=EVENTS)],
    "otel, one event for all messages": [span({"gen_ai.operation.name": "chat"}, events=[DETAILS])],
    "vercel's ai sdk": [span({"gen_ai.system": "openai"}, 0), span(AI_SDK)],
    "openinference": [span({"openinference.span.kind": "AGENT"}, 0), span(OPENINFERENCE)],
    "openinference as phoenix's data frames have it": [
        {"name": "x", "context.trace_id": "t", "context.span_id": "1", "start_time": 1,
         "attributes.openinference.span.kind": "LLM",
         "attributes.llm.input_messages": [
            {"message.role": "system", "message.content": "Be brief."},
            {"message.role": "user", "message.content": "How warm?"},
            {"message.role": "assistant", "message.tool_calls": [
                {"tool_call.id": "c", "tool_call.function.name": "get_weather",
                 "tool_call.function.arguments": json.dumps(CALL)}]},
            {"message.role": "tool", "message.content": "4 degrees", "message.tool_call_id": "c"}],
         "attributes.llm.output_messages": [{"message.role": "assistant", "message.content": "It is 4 degrees."}]},
    ],
    "langsmith": [
        {"id": "r", "trace_id": "t", "run_type": "chain", "inputs": {}, "outputs": {}, "dotted_order": "1"},
        {"id": "l", "trace_id": "t", "run_type": "llm", "inputs": {"messages": MESSAGES},
         "outputs": {"choices": [{"message": ANSWER}]}, "dotted_order": "1.2"},
    ],
    "langsmith with langchain": [
        {"id": "l", "trace_id": "t", "run_type": "llm", "dotted_order": "1.2", "inputs": {"messages": [[
            {"lc": 1, "id": ["langchain", name], "kwargs": body} for name, body in (
                ("SystemMessage", {"content": "Be brief."}), ("HumanMessage", {"content": "How warm?"}),
                ("AIMessage", {"content": "", "tool_calls": [{"id": "c", "name": "get_weather", "args": CALL}]}),
                ("ToolMessage", {"content": "4 degrees", "tool_call_id": "c"}))]]},
         "outputs": {"generations": [[{"text": "It is 4 degrees.", "message": {
             "lc": 1, "id": ["langchain", "AIMessage"], "kwargs": {"content": "It is 4 degrees."}}}]]}},
    ],
    "langfuse": [
        {"id": "o0", "traceId": "t", "type": "SPAN", "input": {"q": 1}, "output": None, "startTime": "0"},
        {"id": "o1", "traceId": "t", "type": "GENERATION", "input": MESSAGES, "output": ANSWER, "startTime": "1"},
    ],
    "langfuse, text": [
        {"id": "t", "observations": [{"id": "o1", "type": "GENERATION", "startTime": "1",
         "input": json.dumps({"messages": MESSAGES}), "output": "It is 4 degrees."}]},
    ],
}  # fmt: skip


@pytest.mark.parametrize("form", FILES)
def test_the_conversation_of_a_trace(read: Read, form: str) -> None:
    (run,) = read(*FILES[form])
    assert outline(run) == STEPS
    assert (run.task, run.system, run.trajectory_id, run.lost) == ("How warm?", "Be brief.", "t", {})


def test_the_longest_call_of_a_trace_is_the_run(read: Read) -> None:
    """Later calls repeat the earlier ones; those of other conversations are counted."""
    beginning = GENAI | {
        "gen_ai.input.messages": json.dumps(PARTS[:1]),
        "gen_ai.output.messages": json.dumps(PARTS[1:2]),
    }
    (run,) = read(span(beginning, 1), span(GENAI, 2), span(TITLE, 3))
    assert outline(run) == STEPS
    assert run.lost == {"model calls of other conversations": 1}


def _call(time: int, given: list[dict[str, Any]], answer: str) -> dict[str, Any]:
    output = {"role": "assistant", "content": answer, "finish_reason": "stop"}
    return {"traceId": "t", "type": "GENERATION", "startTime": str(time), "input": given, "output": output}


NOT_CONTAINED = "model calls that the longest one does not contain"


def test_agents_with_the_same_question_are_other_conversations(read: Read) -> None:
    agents = [[{"role": "system", "content": name}, MESSAGES[1]] for name in ("planner", "critic", "writer")]
    (run,) = read(*(_call(time, given, f"answer {time}") for time, given in enumerate(agents)))
    assert (run.system, run.lost) == ("writer", {"model calls of other conversations": 2})


def test_another_sample_of_an_answer_is_counted(read: Read) -> None:
    (run,) = read(_call(1, MESSAGES, "It is 4."), _call(2, MESSAGES, "It is 5."))
    assert [step.text for step in run.steps] == ["", "It is 5."]
    assert run.lost == {NOT_CONTAINED: 1} and run.steps[-1].last


def test_a_run_that_continued_from_a_shortened_history_has_no_last_step(read: Read) -> None:
    summary = [*MESSAGES[:2], {"role": "user", "content": "It was 4 degrees."}]
    (run,) = read(_call(1, MESSAGES, "Third."), _call(2, summary, "Last."))
    assert [step.last for step in run.steps] == [False, False]
    assert run.lost == {NOT_CONTAINED: 1}


def test_a_changing_system_text_does_not_make_another_conversation(read: Read) -> None:
    dated = [{"role": "system", "content": "Be brief. It is Monday."}, *MESSAGES[1:2]]
    first = _call(1, dated, "") | {"output": MESSAGES[2]}
    (run,) = read(first, _call(2, MESSAGES, "It is 4."))
    assert (outline(run)[0], run.lost) == (STEPS[0], {})


def test_spans_without_a_trace_are_joined_by_their_opening(read: Read) -> None:
    other = GENAI | {
        "gen_ai.input.messages": json.dumps([{"role": "user", "parts": [{"type": "text", "content": "?"}]}])
    }
    lines = [span(each, trace_id=None) for each in (GENAI, TITLE, other)]
    runs = read(*lines)
    assert len({run.trajectory_id for run in runs}) == 3 and [run.lost for run in runs] == [{}] * 3


RESPONSES = [
    *MESSAGES[:2],
    {"type": "function_call", "call_id": "c", "name": "get_weather", "arguments": json.dumps(CALL)},
    {"type": "function_call_output", "call_id": "c", "output": "4 degrees"},
]
RESPONSE = [
    {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Cold."}]},
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "It is 4 degrees."}]},
]


@pytest.mark.parametrize("given", [RESPONSES, {"input": RESPONSES, "model": "x"}], ids=["list", "object"])
@pytest.mark.parametrize("answer", [RESPONSE, {"object": "response", "output": RESPONSE}], ids=["list", "object"])
def test_items_of_the_responses_api_in_a_trace(read: Read, given: Any, answer: Any) -> None:
    (run,) = read({"traceId": "t", "type": "GENERATION", "startTime": "1", "input": given, "output": answer})
    assert outline(run) == [STEPS[0], ("Cold.", *STEPS[1][1:])]
    assert (run.task, run.lost) == ("How warm?", {})


def test_tools_next_to_the_messages_of_langfuse(read: Read) -> None:
    given = {"messages": MESSAGES, "tools": [{"type": "function", "function": {"name": "get_weather"}}]}
    (run,) = read({"traceId": "t", "type": "GENERATION", "startTime": "1", "input": given, "output": ANSWER})
    assert run.tools == ({"name": "get_weather", "description": ""},)


def test_calls_and_tools_of_the_ai_sdk(read: Read) -> None:
    calls = json.dumps([{"toolCallType": "function", "toolCallId": "c", "toolName": "get_weather", "args": CALL}])
    tools = [json.dumps({"type": "function", "name": "get_weather", "description": "of a city"})]
    first = AI_SDK | {"ai.prompt.messages": json.dumps(MESSAGES[:2]), "ai.response.toolCalls": calls,
                      "ai.response.text": "", "ai.prompt.tools": tools}  # fmt: skip
    (run,) = read(span(first))
    assert outline(run) == [("", "", [("get_weather", CALL)], [])]
    assert run.tools == ({"name": "get_weather", "description": "of a city"},)


WITHOUT_MESSAGES = {
    "CAPTURE_MESSAGE_CONTENT": span({"gen_ai.operation.name": "chat", "gen_ai.request.model": "x"}),
    "run_type llm": {"id": "r", "trace_id": "t", "run_type": "chain", "inputs": {"messages": MESSAGES}},
    "GENERATION": {"id": "o", "traceId": "t", "type": "SPAN", "input": "x", "output": "y", "startTime": "1"},
}


@pytest.mark.parametrize("words", WITHOUT_MESSAGES)
def test_traces_without_messages_say_what_to_switch_on(read: Read, words: str) -> None:
    with pytest.raises(DataError, match=rf"runs\.json: no .*{words}"):
        read(WITHOUT_MESSAGES[words])


def test_every_trace_is_a_run(read: Read) -> None:
    runs = read(*(span(GENAI, number, trace_id=f"t{number}") for number in range(3)))
    assert [run.trajectory_id for run in runs] == ["t0", "t1", "t2"]
    assert [run.source["line"] for run in runs] == [1, 2, 3]


def test_tools_that_openinference_lists(read: Read) -> None:
    schema = json.dumps({"type": "function", "function": {"name": "get_weather", "description": "of a city"}})
    (run,) = read(span(OPENINFERENCE | {"llm.tools.0.tool.json_schema": schema}))
    assert run.tools == ({"name": "get_weather", "description": "of a city"},)


ASKED = [{"role": "user", "content": "How warm?"}]
CHOICES = {"choices": [{"message": ANSWER}, {"message": {"role": "assistant", "content": "It is warm."}}]}
TWO_SAMPLES: dict[str, dict[str, Any]] = {
    "langfuse": {"traceId": "t", "type": "GENERATION", "startTime": "1", "input": ASKED, "output": CHOICES},
    "langsmith": {"id": "r", "trace_id": "t", "run_type": "llm", "inputs": {"messages": ASKED}, "outputs": {
        "generations": [[{"text": "It is 4 degrees."}, {"text": "It is warm."}]]}},
    "otel": span(GENAI | {"gen_ai.input.messages": json.dumps(ASKED), "gen_ai.output.messages": json.dumps(
        [ANSWER, {"role": "assistant", "content": "It is warm."}])}),
    "otel, events": span({"gen_ai.system": "x"}, events=[
        {"name": "gen_ai.user.message", "attributes": {"content": "How warm?"}},
        {"name": "gen_ai.choice", "attributes": {"index": 0, "message": json.dumps(ANSWER)}},
        {"name": "gen_ai.choice", "attributes": {"index": 1, "message": '{"content": "It is warm."}'}}]),
}  # fmt: skip


@pytest.mark.parametrize("form", TWO_SAMPLES)
def test_other_samples_of_an_answer_are_no_steps_and_are_counted(read: Read, form: str) -> None:
    (run,) = read(TWO_SAMPLES[form])
    assert outline(run) == [("", "It is 4 degrees.", [], [])]
    assert run.lost == {"other samples of an answer": 1}
