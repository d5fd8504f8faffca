"""Plain messages in all their dialects."""

import json
from typing import Any

import pytest

from prmkit.errors import DataError
from prmkit.prompts.step import load_rubric, step_prompts
from prmkit.trajectories.importing import FileReport
from prmkit.trajectories.run import FieldNames
from prmkit.trajectory import dump
from tests.trajectories.conftest import Read, outline

CALL = {"city": "Oslo"}
STEPS = [
    ("", "", [("get_weather", CALL)], ["4 degrees"]),
    ("", "It is 4 degrees in Oslo.", [], []),
]
"""What every dialect below says."""

DIALECTS: dict[str, dict[str, Any]] = {
    "openai": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "How warm is it in Oslo?"},
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": json.dumps(CALL)}}]},
            {"role": "tool", "tool_call_id": "c1", "content": "4 degrees"},
            {"role": "assistant", "content": "It is 4 degrees in Oslo."},
        ],
    },
    "openai's older function_call": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "How warm is it in Oslo?"}]},
            {"role": "assistant", "content": "",
             "function_call": {"name": "get_weather", "arguments": json.dumps(CALL)}},
            {"role": "function", "name": "get_weather", "content": "4 degrees"},
            {"role": "assistant", "content": "It is 4 degrees in Oslo."},
        ],
    },
    "sharegpt": {
        "system": "Be brief.",
        "conversations": [
            {"from": "human", "value": "How warm is it in Oslo?"},
            {"from": "function_call", "value": json.dumps({"name": "get_weather", "arguments": CALL})},
            {"from": "observation", "value": "4 degrees"},
            {"from": "gpt", "value": "It is 4 degrees in Oslo."},
        ],
    },
    "anthropic": {
        "system": [{"type": "text", "text": "Be brief."}],
        "messages": [
            {"role": "user", "content": "How warm is it in Oslo?"},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "u1", "name": "get_weather", "input": CALL}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "u1", "content": [{"type": "text", "text": "4 degrees"}]}]},
            {"role": "assistant", "content": [{"type": "text", "text": "It is 4 degrees in Oslo."}]},
        ],
    },
    "langchain, which lists the calls of anthropic's models twice": {
        "messages": [
            {"type": "system", "content": "Be brief."},
            {"type": "human", "content": "How warm is it in Oslo?"},
            {"type": "ai", "content": [{"type": "tool_use", "id": "c1", "name": "get_weather", "input": CALL}],
             "tool_calls": [{"type": "tool_call", "id": "c1", "name": "get_weather", "args": CALL}]},
            {"type": "tool", "tool_call_id": "c1", "content": "4 degrees"},
            {"type": "ai", "content": "It is 4 degrees in Oslo."},
        ],
    },
    "openai's responses": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "How warm is it in Oslo?"},
            {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": json.dumps(CALL)},
            {"type": "function_call_output", "call_id": "c1", "output": "4 degrees"},
            {"type": "message", "role": "assistant",
             "content": [{"type": "output_text", "text": "It is 4 degrees in Oslo."}]},
        ],
    },
    "langchain": {
        "messages": [
            {"type": "system", "content": "Be brief."},
            {"type": "human", "content": "How warm is it in Oslo?"},
            {"type": "ai", "content": "", "tool_calls": [{"name": "get_weather", "args": CALL, "id": "l1"}]},
            {"type": "tool", "content": "4 degrees", "tool_call_id": "l1", "id": "m7"},
            {"type": "ai", "content": "It is 4 degrees in Oslo."},
        ],
    },
    "langchain, serialised": {
        "messages": [
            {"lc": 1, "type": "constructor", "id": ["langchain", "schema", "messages", name], "kwargs": body}
            for name, body in (
                ("SystemMessage", {"content": "Be brief."}),
                ("HumanMessage", {"content": "How warm is it in Oslo?"}),
                ("AIMessage", {"content": "", "tool_calls": [{"name": "get_weather", "args": CALL, "id": "l1"}]}),
                ("ToolMessage", {"content": "4 degrees", "tool_call_id": "l1"}),
                ("AIMessageChunk", {"content": "It is 4 degrees in Oslo."}),
            )
        ],
    },
    "verifiers": {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How warm is it in Oslo?"}],
        "completion": [
            {"role": "assistant", "tool_calls": [
                {"id": "c1", "function": {"name": "get_weather", "arguments": json.dumps(CALL)}}]},
            {"role": "tool", "tool_call_id": "c1", "content": "4 degrees"},
            {"role": "assistant", "content": "It is 4 degrees in Oslo."},
        ],
    },
    "art": {
        "messages_and_choices": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "How warm is it in Oslo?"},
            {"finish_reason": "tool_calls", "index": 0, "message": {"role": "assistant", "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": json.dumps(CALL)}}]}},
            {"role": "tool", "tool_call_id": "c1", "content": "4 degrees"},
            {"finish_reason": "stop", "index": 0,
             "message": {"role": "assistant", "content": "It is 4 degrees in Oslo."}},
        ],
    },
    "bedrock": {
        "system": [{"text": "Be brief."}],
        "messages": [
            {"role": "user", "content": [{"text": "How warm is it in Oslo?"}]},
            {"role": "assistant", "content": [{"toolUse": {"toolUseId": "b1", "name": "get_weather", "input": CALL}}]},
            {"role": "user", "content": [
                {"toolResult": {"toolUseId": "b1", "content": [{"text": "4 degrees"}], "status": "success"}}]},
            {"role": "assistant", "content": [
                {"text": "It is 4 degrees in Oslo."}, {"cachePoint": {"type": "default"}}]},
        ],
    },
    "gemini": {
        "system": "Be brief.",
        "contents": [
            {"role": "user", "parts": [{"text": "How warm is it in Oslo?"}]},
            {"role": "model", "parts": [{"functionCall": {"name": "get_weather", "args": CALL}}]},
            {"role": "user", "parts": [{"functionResponse": {"name": "get_weather", "response": "4 degrees"}}]},
            {"role": "model", "parts": [{"text": "It is 4 degrees in Oslo.", "thoughtSignature": "x"}]},
        ],
    },
    "google's adk": {
        "system": "Be brief.",
        "events": [
            {"author": "user", "content": {"role": "user", "parts": [{"text": "How warm is it in Oslo?"}]}},
            {"content": {"role": "model", "parts": [
                {"text": None, "function_call": {"id": "g1", "name": "get_weather", "args": CALL}}]}},
            {"content": {"role": "user", "parts": [
                {"function_response": {"id": "g1", "name": "get_weather", "response": "4 degrees"}}]}},
            {"content": {"role": "model", "parts": [{"text": "It is 4 degrees in Oslo."}]}},
        ],
    },
    "the ai sdk's messages for the model": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "How warm is it in Oslo?"},
            {"role": "assistant", "content": [
                {"type": "tool-call", "toolCallId": "v1", "toolName": "get_weather", "input": CALL}]},
            {"role": "tool", "content": [{"type": "tool-result", "toolCallId": "v1", "toolName": "get_weather",
                                          "output": {"type": "text", "value": "4 degrees"}}]},
            {"role": "assistant", "content": [{"type": "text", "text": "It is 4 degrees in Oslo."}]},
        ],
    },
}  # fmt: skip


@pytest.mark.parametrize("dialect", DIALECTS)
def test_dialects_say_the_same(read: Read, dialect: str) -> None:
    (run,) = read(DIALECTS[dialect])
    assert outline(run) == STEPS
    assert (run.task, run.system) == ("How warm is it in Oslo?", "Be brief.")
    assert [step.last for step in run.steps] == [False, True]
    assert run.lost == {}


def test_one_task_has_one_id_and_every_run_its_own(read: Read) -> None:
    runs = read(*DIALECTS.values())
    assert len({run.task_id for run in runs}) == 1
    assert len({run.trajectory_id for run in runs}) == len(runs)


def test_a_list_of_messages_and_one_message_a_line_are_runs(read: Read) -> None:
    messages = DIALECTS["openai"]["messages"]
    (array,) = read(messages)
    (lines,) = read(*messages)
    two = read(messages, messages)
    assert [outline(run) for run in (array, lines, *two)] == [STEPS] * 4


def test_what_stands_beside_the_messages(read: Read) -> None:
    beside = {"task_id": 7, "id": "r-1", "reward": 0.5, "answer": "4", "colour": "red",
              "tools": [{"type": "function", "function": {"name": "get_weather", "description": "Now."}}]}  # fmt: skip
    (run,) = read(DIALECTS["openai"] | beside)
    assert (run.task_id, run.trajectory_id, run.reference) == ("7", "r-1", "4")
    assert run.outcome == {"success": None, "score": 0.5}
    assert run.tools == ({"name": "get_weather", "description": "Now."},)
    assert run.lost == {"field colour": 1}


def test_keys_of_home_made_files(read: Read) -> None:
    value = {"dialogue": DIALECTS["openai"]["messages"], "case": "c-9", "won": True}
    (run,) = read(value, format="messages", keys=FieldNames(task="case", outcome="won", messages="dialogue"))
    assert (run.task_id, run.outcome, run.lost) == ("c-9", {"success": True, "score": None}, {})


def test_a_list_of_messages_as_json_in_a_string(read: Read) -> None:
    messages = json.dumps(DIALECTS["openai"]["messages"])
    for name in ("messages", "dialogue"):
        (run,) = read(
            {"instance_id": "i", name: messages}, keys=FieldNames(messages=None if name == "messages" else name)
        )
        assert (outline(run), run.task_id, run.lost) == (STEPS, "i", {})


def test_a_list_of_items_that_ends_with_a_result(read: Read) -> None:
    (run,) = read({"messages": DIALECTS["openai's responses"]["messages"][:-1]})
    assert (outline(run), run.lost) == (STEPS[:1], {})


def test_a_list_without_roles_says_what_is_missing(read: Read, reports: list[FileReport]) -> None:
    value = {"dialogue": [{"speaker": "a", "words": "b"}]}
    with pytest.raises(DataError, match=r"has dialogue.*role \(or from\) and content"):
        read(value)
    assert read(value, keys=FieldNames(messages="dialogue")) == []
    assert "each entry needs a role" in next(iter(reports[-1].unreadable))


def test_two_lists_of_messages_are_not_chosen_between(read: Read, reports: list[FileReport]) -> None:
    both = DIALECTS["openai"] | {"conversations": DIALECTS["sharegpt"]["conversations"]}
    assert read(both) == []
    assert "messages and conversations" in next(iter(reports[0].unreadable))
    (run,) = read(both, keys=FieldNames(messages="messages"))
    assert outline(run) == STEPS


def test_calls_as_strings_and_failed_results(read: Read) -> None:
    call = json.dumps({"id": "c", "function": {"name": "f", "arguments": "{}"}})
    result = {"role": "tool", "tool_call_id": "c", "content": "", "error": {"type": "timeout", "message": "too slow"}}
    (run,) = read(
        {
            "prompt": [{"role": "user", "content": "Go."}],
            "completion": [{"role": "assistant", "tool_calls": [call]}, result],
        }
    )
    assert outline(run) == [("", "", [("f", {})], ["too slow"])] and run.steps[0].results[0].error


def test_thoughts_are_separated_from_text(read: Read) -> None:
    messages = [
        {"role": "user", "content": "Go."},
        {"role": "assistant", "content": "<think>I wonder.</think>\n\nDone."},
        {"role": "assistant", "content": "Done.", "reasoning_content": "I wonder."},
        {
            "role": "assistant",
            "content": [{"type": "thinking", "thinking": "I wonder."}, {"type": "text", "text": "Done."}],
        },
    ]
    (run,) = read({"messages": messages})
    assert outline(run) == [("I wonder.", "Done.", [], [])] * 3


def test_refusals_and_thoughts_of_openrouter_and_media_next_to_the_text(read: Read) -> None:
    details = [{"type": "reasoning.text", "text": "I wonder.", "signature": None},
               {"type": "reasoning.encrypted", "data": "x"}]  # fmt: skip
    messages = [
        {"role": "user", "content": "Go.", "images": ["AAAA", "BBBB"]},
        {"role": "assistant", "content": None, "refusal": "I cannot."},
        {"role": "assistant", "content": "Done.", "reasoning_details": details},
        {"role": "assistant", "content": "Done.", "reasoning": "I wonder.", "reasoning_details": details},
    ]
    (run,) = read({"messages": messages})
    assert outline(run) == [("", "I cannot.", [], []), ("I wonder.", "Done.", [], []), ("I wonder.", "Done.", [], [])]
    assert run.lost == {"content of type images": 2, "thoughts that are hidden or encrypted": 1}


def test_parallel_calls_get_the_results_that_name_them(read: Read) -> None:
    calls = [{"id": name, "function": {"name": name, "arguments": "{}"}} for name in ("a", "b")]
    results = [{"role": "tool", "tool_call_id": name, "content": f"of {name}"} for name in ("b", "a")]
    (run,) = read(
        {"messages": [{"role": "user", "content": "Go."}, {"role": "assistant", "tool_calls": calls}, *results]}
    )
    assert [(result.call_id, result.text) for result in run.steps[0].results] == [("b", "of b"), ("a", "of a")]


def _parallel(count: int, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Calls of `f`, `g`, … that all have the id `call_0`, as DeepSeek, GLM and Xinference write them."""
    calls = [{"id": "call_0", "function": {"name": name, "arguments": f'"{name}"'}} for name in "fgh"[:count]]
    return {"messages": [{"role": "user", "content": "Go."}, {"role": "assistant", "tool_calls": calls}, *results]}


@pytest.mark.parametrize("named", [True, False])
def test_parallel_calls_with_one_id_keep_their_results(read: Read, named: bool) -> None:
    said = [{"role": "tool", "content": f"of {name}"} | ({"tool_call_id": "call_0"} if named else {}) for name in "fg"]
    (run,) = read(_parallel(2, said))
    assert outline(run) == [("", "", [("f", "f"), ("g", "g")], ["of f", "of g"])]
    (prompt,) = step_prompts(run, load_rubric())
    assert "Call: f f\nResult: of f\nCall: g g\nResult: of g\n" in prompt.text
    assert run.lost == {}
    (short,) = read(_parallel(3, said))
    assert short.lost == {"calls without a result": 1}


def test_a_call_that_returned_twice_shows_both_results(read: Read) -> None:
    said = [{"role": "tool", "tool_call_id": "call_0", "content": text} for text in ("timeout", "ok")]
    (run,) = read(_parallel(1, said))
    (prompt,) = step_prompts(run, load_rubric())
    assert "Call: f f\nResult: timeout\nResult: ok\n" in prompt.text


def test_calls_listed_in_content_and_beside_it_are_one(read: Read) -> None:
    """LangChain does so with Anthropic's models; of streamed blocks only one place has the arguments."""
    blocks = [{"type": "tool_use", "id": "c", "name": name, "input": {}} for name in "fg"]
    beside = [{"type": "tool_call", "id": "c", "name": name, "args": {"of": name}} for name in "fg"]
    (run,) = read({"messages": [{"type": "human", "content": "Go."}, {"type": "ai", "content": blocks,
                                                                     "tool_calls": beside}]})  # fmt: skip
    assert outline(run)[0][2] == [("f", {"of": "f"}), ("g", {"of": "g"})]
    streamed = blocks[0] | {"partial_json": '{"of": "f"}'}
    (run,) = read({"messages": [{"type": "human", "content": "Go."}, {"type": "ai", "content": [streamed]}]})
    assert outline(run)[0][2] == [("f", {"of": "f"})]


@pytest.mark.parametrize("several", [True, False])
@pytest.mark.parametrize("as_json", [True, False])
def test_calls_as_one_string_or_as_one_object(read: Read, several: bool, as_json: bool) -> None:
    call = {"id": "c", "function": {"name": "f", "arguments": "{}"}}
    calls: Any = [call] if several else call
    said = {"role": "assistant", "content": "x", "tool_calls": json.dumps(calls) if as_json else calls}
    (run,) = read({"messages": [{"role": "user", "content": "Go."}, said,
                                {"role": "tool", "tool_call_id": "c", "content": "r"}]})  # fmt: skip
    assert (outline(run), run.lost) == ([("", "x", [("f", {})], ["r"])], {})


_INVOCATION = {"state": "result", "toolCallId": "v1", "toolName": "get_weather", "args": CALL, "result": "4 degrees"}


@pytest.mark.parametrize(
    "answer",
    [
        {"content": "Cold.", "parts": [{"type": "step-start"}, {"type": "text", "text": "Cold."},
                                       {"type": "tool-invocation", "toolInvocation": _INVOCATION}]},
        {"content": "Cold.", "toolInvocations": [_INVOCATION]},
        {"parts": [{"type": "tool-get_weather", "toolCallId": "v1", "state": "output-available", "input": CALL,
                    "output": "4 degrees"}, {"type": "text", "text": "Cold.", "state": "done"}]},
        {"parts": [{"type": "dynamic-tool", "toolName": "get_weather", "toolCallId": "v1", "state": "output-available",
                    "input": CALL, "output": "4 degrees"}, {"type": "text", "text": "Cold."}]},
        {"content": [{"type": "tool_use", "tool_type": "web_search", "id": "w", "name": "get_weather",
                      "arguments": json.dumps(CALL), "result": "4 degrees"}, {"type": "text", "text": "Cold."}]},
    ],
    ids=["parts of AI SDK 4", "AI SDK 3", "AI SDK 5", "AI SDK 5, dynamic", "Inspect"],
)  # fmt: skip
def test_a_part_that_is_both_a_call_and_its_result(read: Read, answer: dict[str, Any]) -> None:
    (run,) = read({"messages": [{"role": "user", "content": "Warm?"}, {"role": "assistant"} | answer]})
    assert outline(run) == [("", "Cold.", [("get_weather", CALL)], ["4 degrees"])]
    assert run.lost == {}


def test_answers_that_the_ai_sdk_joins_are_counted(read: Read) -> None:
    start = {"type": "step-start"}
    parts = [
        start,
        {"type": "tool-invocation", "toolInvocation": _INVOCATION},
        start,
        {"type": "text", "text": "Cold."},
    ]
    (run,) = read({"messages": [{"role": "user", "content": "Warm?"}, {"role": "assistant", "parts": parts}]})
    assert outline(run) == [("", "Cold.", [("get_weather", CALL)], ["4 degrees"])]
    assert run.lost == {"answers of the agent joined in one step": 1}


_HOTELS = [{"type": "hotel", "name": "Ritz"}, {"type": "profile", "url": "x", "name": "Ibis"}]


@pytest.mark.parametrize(
    ("returned", "text"),
    [
        ({"text": "title", "price": 12}, '{"text": "title", "price": 12}'),
        ({"text": "title", "id": 7}, '{"text": "title", "id": 7}'),
        ({"document": {"source": "a.pdf"}, "rank": 1}, '{"document": {"source": "a.pdf"}, "rank": 1}'),
        ({"image": {"url": "a.png"}}, '{"image": {"url": "a.png"}}'),
        ({"functionCall": {"name": "f"}}, '{"functionCall": {"name": "f"}}'),
        ({"type": "text", "text": "title", "price": 12}, '{"type": "text", "text": "title", "price": 12}'),
        ({"type": "text", "value": "title", "score": 3}, '{"type": "text", "value": "title", "score": 3}'),
        ({"type": "reasoning", "text": "x"}, '{"type": "reasoning", "text": "x"}'),
        ({"type": "tool_call", "name": "f"}, '{"type": "tool_call", "name": "f"}'),
        ({"type": "document", "title": "x"}, '{"type": "document", "title": "x"}'),
        (_HOTELS, "\n".join(map(json.dumps, _HOTELS))),
        ([{"type": "text", "text": "a"}, {"text": "b"}, {"json": {"c": 1}}], 'a\nb\n{"c": 1}'),
    ],
)  # fmt: skip
def test_objects_that_a_tool_returned_are_kept_whole(read: Read, returned: Any, text: str) -> None:
    """Only parts of text, and media, are more than data: no other object disappears because of its `type`."""
    call = {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}"}}]}
    for result in (
        {"role": "tool", "tool_call_id": "c", "content": returned},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": returned}]},
    ):
        (run,) = read({"messages": [{"role": "user", "content": "Go."}, call, result]})
        assert outline(run) == [("", "", [("f", {})], [text])]
        assert run.lost == {}


@pytest.mark.parametrize(
    ("output", "text", "failed"),
    [
        ({"type": "json", "value": {"text": "a", "n": 1}}, '{"text": "a", "n": 1}', False),
        ({"type": "content", "value": [{"type": "text", "text": "a"}]}, "a", False),
        ({"type": "error-text", "value": "too slow"}, "too slow", True),
        ({"type": "error-json", "value": {"code": 500}}, '{"code": 500}', True),
        ({"type": "execution-denied", "reason": "no"}, "no", True),
        ({"type": "hotel", "value": "Ritz"}, '{"type": "hotel", "value": "Ritz"}', False),
    ],
)
def test_outputs_of_the_ai_sdk(read: Read, output: dict[str, Any], text: str, failed: bool) -> None:
    messages = [
        {"role": "user", "content": "Go."},
        {"role": "assistant", "content": [{"type": "tool-call", "toolCallId": "v", "toolName": "f", "input": {}}]},
        {"role": "tool", "content": [{"type": "tool-result", "toolCallId": "v", "toolName": "f", "output": output}]},
    ]
    (run,) = read({"messages": messages})
    assert [(result.text, result.error) for result in run.steps[0].results] == [(text, failed)]
    assert run.lost == {}


def test_results_of_anthropics_search_are_kept_without_what_is_encrypted(read: Read) -> None:
    found = [{"type": "web_search_result", "title": "Oslo", "url": "u", "encrypted_content": "x" * 5000}]
    content = [{"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
               {"type": "web_search_tool_result", "tool_use_id": "s", "content": found}]  # fmt: skip
    (run,) = read({"messages": [{"role": "user", "content": "Go."}, {"role": "assistant", "content": content}]})
    shown = json.dumps({"type": "web_search_result", "title": "Oslo", "url": "u"})
    assert outline(run) == [("", "", [("web_search", {})], [shown])]
    assert run.lost == {"encrypted contents": 1}


def test_failed_results_of_bedrock_and_thoughts_of_bedrock_and_gemini(read: Read) -> None:
    failed = {"toolResult": {"toolUseId": "b", "content": [{"json": {"t": 1}}], "status": "error"}}
    thought = {"reasoningContent": {"reasoningText": {"text": "I wonder.", "signature": "x"}}}
    messages = [
        {"role": "user", "content": [{"text": "Go."}]},
        {"role": "assistant", "content": [thought, {"toolUse": {"toolUseId": "b", "name": "f", "input": {}}}]},
        {"role": "user", "content": [failed]},
        {"role": "model", "parts": [{"text": "I wonder.", "thought": True}, {"text": "Done."}]},
    ]
    (run,) = read({"messages": messages})
    assert outline(run) == [("I wonder.", "", [("f", {})], ['{"t": 1}']), ("I wonder.", "Done.", [], [])]
    assert run.steps[0].results[0].error and run.lost == {}


def test_what_a_user_says_later_stands_before_the_next_step(read: Read) -> None:
    said = [("user", "Hi."), ("assistant", "Yes?"), ("user", "Book it."), ("assistant", "Done."), ("user", "Bye.")]
    (run,) = read({"messages": [{"role": role, "content": text} for role, text in said]})
    assert run.task == "Hi."
    assert [[message.text for message in step.incoming] for step in run.steps] == [[], ["Book it."]]
    assert run.lost == {"messages after the last step": 1}


@pytest.mark.parametrize(
    ("messages", "lost"),
    [
        ([{"role": "assistant", "content": ""}], "messages of the agent without text or call"),
        ([{"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}"}}]}],
         "calls without a result"),
        ([{"role": "tool", "tool_call_id": "x", "content": "?"}], "results without a call"),
        ([{"role": "system", "content": "And brief."}], "further system messages"),
        ([{"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{'a"}}]},
          {"role": "tool", "tool_call_id": "c", "content": "bad"}], "arguments that are not JSON"),
        ([{"role": "assistant", "content": [{"type": "hologram", "data": 1}]}], "content of type hologram"),
        ([{"role": "assistant", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}],
         "content of type image_url"),
        ([{"role": "assistant", "content": "hm", "tool_calls": [{"id": "c"}]}], "calls without a name"),
        ([{"role": "user", "content": [{"type": "tool_use", "id": "c", "name": "f", "input": {}}]}],
         "user tool calls and results"),
        ([{"role": "user", "content": [{"image": {"format": "png", "source": {"bytes": "AA"}}}]}],
         "content of type image"),
        ([{"role": "user", "parts": [{"inlineData": {"mimeType": "image/png", "data": "AA"}}]}],
         "content of type inline_data"),
        (["not a message"], "non-message entries"),
        ([{"role": "Narrator", "content": "Meanwhile."}], "unknown roles treated as agents: narrator"),
    ],
)  # fmt: skip
def test_what_has_no_place_is_counted(read: Read, messages: list[Any], lost: str) -> None:
    opening = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Go."}]
    closing = [{"role": "assistant", "content": "Done."}]
    (run,) = read({"messages": [*opening, {"role": "assistant", "content": "First."}, *messages, *closing]})
    assert run.lost[lost] == 1


def test_a_system_message_in_the_middle_is_kept(read: Read) -> None:
    said = [
        ("system", "A."),
        ("system", "B."),
        ("user", "Go."),
        ("assistant", "1"),
        ("system", "C."),
        ("assistant", "2"),
    ]
    (run,) = read({"messages": [{"role": role, "content": text} for role, text in said]})
    assert run.system == "A.\n\nB."
    assert [(message.role, message.text) for message in run.steps[1].incoming] == [("system", "C.")]


def test_a_group_of_runs(read: Read) -> None:
    """ART's groups hold several attempts at one task."""
    attempts = [DIALECTS["openai"] | {"reward": reward} for reward in (1.0, 0.0)]
    runs = read({"trajectories": attempts, "exceptions": []})
    assert [run.outcome for run in runs] == [{"success": None, "score": 1.0}, {"success": None, "score": 0.0}]
    assert len({run.trajectory_id for run in runs}) == 2 and len({run.task_id for run in runs}) == 1


def test_what_a_group_says_of_its_runs(read: Read) -> None:
    attempts = [DIALECTS["openai"], DIALECTS["openai"] | {"task_id": "own"}]
    runs = read(
        {"trajectories": attempts, "task_id": "g", "answer": "4", "reward": 1, "marks": [1, 1], "exceptions": []}
    )
    assert [(run.task_id, run.reference, run.outcome) for run in runs] == [("g", "4", None), ("own", "4", None)]
    assert [run.lost for run in runs] == [{"field reward of a group": 1, "field marks of a group": 1}, {}]


WEI = 1_000_000_000_000_000_000_001
"""An integer of more than 64 bits, which most parsers round."""


@pytest.mark.parametrize("given", [{"wei": WEI}, json.dumps({"wei": WEI})], ids=["object", "text"])
def test_long_integers_in_arguments_are_exact(read: Read, given: Any) -> None:
    call = {"id": "c1", "function": {"name": "pay", "arguments": given}}
    (run,) = read([{"role": "user", "content": "Pay."}, {"role": "assistant", "tool_calls": [call]}])
    assert run.steps[0].calls[0].arguments == {"wei": WEI}
    assert next(step_prompts(run, load_rubric())).text.count(str(WEI)) == 1


def test_long_integers_as_ids_are_two_tasks(read: Read) -> None:
    runs = read(*({"task_id": WEI + number} | DIALECTS["openai"] for number in range(2)))
    assert [run.task_id for run in runs] == [str(WEI), str(WEI + 1)]


@pytest.mark.parametrize("number", ["1" + "0" * 400, "1e999", "-1e999"])
def test_numbers_beyond_floating_point_are_no_traceback(read: Read, number: str) -> None:
    call = f'{{"name": "f", "arguments": {{"a": {number}, "b": 1e999, "c": {WEI}}}}}'
    (run,) = read(
        f'{{"messages": [{{"role": "user", "content": "Go."}}, {{"role": "assistant", "tool_calls": [{call}]}}], '
        f'"reward": {number}}}'
    )
    assert run.outcome is None and json.loads(dump(run))["steps"][0]["calls"][0]["arguments"]["b"] is None


@pytest.mark.parametrize("empty", ["", [], None])
def test_an_empty_content_does_not_hide_a_text_beside_it(read: Read, empty: Any) -> None:
    (run,) = read([{"role": "user", "content": "Go."}, {"role": "assistant", "content": empty, "text": "Gone."}])
    assert run.steps[0].text == "Gone."


def test_content_that_is_zero_is_content(read: Read) -> None:
    call = {"id": "c1", "function": {"name": "count", "arguments": "{}"}}
    (run,) = read([
        {"role": "user", "content": "Go."}, {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": 0},
    ])  # fmt: skip
    assert run.steps[0].results[0].text == "0"


@pytest.mark.parametrize(
    ("content", "error", "text"),
    [
        ("3 lines", {"type": "timeout", "message": "Stopped after 5 s."}, "3 lines\nStopped after 5 s."),
        ("", "Stopped.", "Stopped."),
        ("It was Stopped.", "Stopped.", "It was Stopped."),
        ("3 lines", True, "3 lines"),
    ],
)
def test_the_error_of_a_tool_is_kept_with_what_it_returned(read: Read, content: Any, error: Any, text: str) -> None:
    call = {"id": "c1", "function": {"name": "run", "arguments": "{}"}}
    in_list = [{"type": "tool_result", "tool_use_id": "c1", "content": content, "error": error}]
    for result in ({"role": "tool", "tool_call_id": "c1", "content": content, "error": error},
                   {"role": "user", "content": in_list}):  # fmt: skip
        (run,) = read([{"role": "user", "content": "Go."}, {"role": "assistant", "tool_calls": [call]}, result])
        assert [(each.text, each.error) for each in run.steps[0].results] == [(text, True)]


def test_a_dumped_list_of_langchain_is_a_run(read: Read) -> None:
    """As `json.dump(messages_to_dict(…))` writes it."""
    (run,) = read([
        {"type": "human", "data": {"content": "Go.", "type": "human"}},
        {"type": "ai", "data": {"content": "Gone.", "type": "ai"}},
    ])  # fmt: skip
    assert run.source["format"] == "message-lines" and outline(run) == [("", "Gone.", [], [])]
