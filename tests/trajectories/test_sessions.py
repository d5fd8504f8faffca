"""Sessions of coding agents: Claude Code and Codex."""

from typing import Any

from prmkit.trajectories.importing import FileReport
from tests.trajectories.conftest import Read, outline


def event(kind: str, uuid: str, parent: str | None, content: Any, **more: Any) -> dict[str, Any]:
    """One line of a session of Claude Code."""
    identity = {"id": more.pop("message", f"m-{uuid}")} if kind == "assistant" else {}
    return {
        "type": kind, "uuid": uuid, "parentUuid": parent, "sessionId": "s", "isSidechain": False,
        "message": {"role": kind, "content": content} | identity,
    } | more  # fmt: skip


def use(name: str) -> dict[str, Any]:
    return {"type": "tool_use", "id": name, "name": "Bash", "input": {"command": name}}


def result(name: str) -> list[dict[str, Any]]:
    return [{"type": "tool_result", "tool_use_id": name, "content": f"out of {name}"}]


def test_an_answer_over_several_lines_is_one_step_with_all_its_results(read: Read) -> None:
    """The results of parallel calls are not on the path from the last line to the first."""
    (run,) = read(
        {"type": "summary", "summary": "Tests", "leafUuid": "x"},
        event("user", "u1", None, "Run the tests."),
        event("assistant", "a1", "u1", [{"type": "thinking", "thinking": "Two at once."}], message="m"),
        event("assistant", "a2", "a1", [{"type": "text", "text": "Running."}], message="m"),
        event("assistant", "a3", "a2", [use("t1")], message="m"),
        event("assistant", "a4", "a3", [use("t2")], message="m"),
        event("user", "r1", "a3", result("t1")),
        event("user", "r2", "a4", result("t2")),
        event("assistant", "a5", "r2", [{"type": "text", "text": "All pass."}]),
    )
    calls = [("Bash", {"command": "t1"}), ("Bash", {"command": "t2"})]
    assert outline(run) == [
        ("Two at once.", "Running.", calls, ["out of t1", "out of t2"]),
        ("", "All pass.", [], []),
    ]
    assert (run.task, run.trajectory_id, run.lost) == ("Run the tests.", "s", {})
    assert all(step.agent is None for step in run.steps)


def test_a_rewound_session_keeps_the_branch_that_it_ended_on(read: Read) -> None:
    (run,) = read(
        event("user", "u1", None, "Write it in Perl."),
        event("assistant", "a1", "u1", [{"type": "text", "text": "In Perl."}]),
        event("user", "u2", None, "Write it in Python."),
        {"type": "attachment", "uuid": "x", "parentUuid": "u2", "sessionId": "s"},
        event("assistant", "a2", "x", [{"type": "text", "text": "In Python."}]),
    )
    assert [step.text for step in run.steps] == ["In Python."]
    assert run.task == "Write it in Python."
    assert run.lost == {"messages on abandoned branches": 2, "entries of type attachment": 1}


def test_what_the_user_typed_while_the_agent_worked(read: Read) -> None:
    """It is queued; then it becomes an attachment or a message of the user, or is nowhere else."""
    texts = ("In Perl.", "And test it.", "Never sent.", "<task-notification>done</task-notification>")
    queued = [{"type": "queue-operation", "operation": "enqueue", "content": text, "sessionId": "s"} for text in texts]
    attached = {"type": "attachment", "uuid": "x", "parentUuid": "a1", "sessionId": "s",
                "attachment": {"type": "queued_command", "prompt": "In Perl.", "commandMode": "prompt"}}  # fmt: skip
    (run,) = read(
        event("user", "u1", None, "Write it."),
        event("assistant", "a1", "u1", [{"type": "text", "text": "One."}]),
        *queued,
        {"type": "queue-operation", "operation": "dequeue", "sessionId": "s"},
        attached,
        event("assistant", "a2", "x", [{"type": "text", "text": "Two."}]),
        event("user", "u2", "a2", "And test it."),
        event("assistant", "a3", "u2", [{"type": "text", "text": "Three."}]),
    )
    assert [[each.text for each in step.incoming] for step in run.steps] == [[], ["In Perl."], ["And test it."]]
    assert run.lost == {"messages that the user typed while the agent worked": 1}


def test_a_session_continues_over_its_compaction(read: Read) -> None:
    boundary = {"type": "system", "subtype": "compact_boundary", "uuid": "b", "parentUuid": None, "sessionId": "s",
                "logicalParentUuid": "a1"}  # fmt: skip
    (run,) = read(
        event("user", "u1", None, "Fix it."),
        event("assistant", "a1", "u1", [{"type": "text", "text": "One."}]),
        boundary,
        event("user", "u2", "b", "This session continues: …", isCompactSummary=True),
        event("assistant", "a2", "u2", [{"type": "text", "text": "Two."}]),
    )
    assert [step.text for step in run.steps] == ["One.", "Two."]
    assert run.lost == {"redundant summaries": 1}


def test_what_the_program_wrote_is_not_the_users(read: Read) -> None:
    (run,) = read(
        event("user", "u0", None, "Caveat: the messages below", isMeta=True),
        event("user", "u1", "u0", "<command-name>/clear</command-name>"),
        event("user", "u2", "u1", "Fix it."),
        event("assistant", "a1", "u2", [{"type": "text", "text": "Done."}]),
        event("assistant", "side", "a1", [{"type": "text", "text": "Another agent."}], isSidechain=True),
        event("assistant", "a2", "a1", [{"type": "text", "text": "API Error"}], isApiErrorMessage=True),
    )
    assert run.task == "Fix it." and [step.text for step in run.steps] == ["Done."]
    assert run.lost == {"harness messages": 3, "messages of called agents": 1}


def test_a_file_of_a_called_agent_is_a_run(read: Read) -> None:
    aside = {"isSidechain": True, "agentId": "a7"}
    (run,) = read(
        event("user", "u1", None, "Search.", **aside),
        event("assistant", "a1", "u1", [{"type": "text", "text": "Found."}], **aside),
    )
    assert (run.trajectory_id, [step.text for step in run.steps]) == ("s/a7", ["Found."])


def test_a_chain_that_breaks_is_continued_with_the_line_above(read: Read) -> None:
    (run,) = read(
        event("user", "u1", None, "Fix it."),
        event("assistant", "a1", "u1", [{"type": "text", "text": "One."}]),
        event("assistant", "a2", "elsewhere", [{"type": "text", "text": "Two."}]),
    )
    assert [step.text for step in run.steps] == ["One.", "Two."]
    assert run.lost == {"messages whose parent is not in the file": 1}


def test_half_a_line_costs_that_line(read: Read, reports: list[FileReport]) -> None:
    (run,) = read(
        event("user", "u1", None, "Fix it."),
        event("assistant", "a1", "u1", [{"type": "text", "text": "One."}]),
        '{"type": "assistant", "uuid": "a2", "mess',
    )
    assert [step.text for step in run.steps] == ["One."]
    assert reports[0].examples == {next(iter(reports[0].unreadable)): [3]}


def item(**payload: Any) -> dict[str, Any]:
    """One line of a rollout of Codex."""
    return {"timestamp": "2026-01-01T00:00:00Z", "type": "response_item", "payload": payload}


def message(role: str, text: str) -> dict[str, Any]:
    kind = "output_text" if role == "assistant" else "input_text"
    return {"type": "message", "role": role, "content": [{"type": kind, "text": text}]}


PAYLOADS: list[dict[str, Any]] = [
    message("developer", "Rules."),
    message("user", "<environment_context>\n<cwd>/</cwd>"),
    message("user", "Run the tests."),
    {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Look first."}], "encrypted_content": "x"},
    {"type": "function_call", "name": "shell", "arguments": '{"command": ["ls"]}', "call_id": "c1"},
    {"type": "custom_tool_call", "name": "apply_patch", "input": "*** Begin Patch", "call_id": "c2"},
    {"type": "function_call_output", "call_id": "c1", "output": "a.py"},
    {"type": "custom_tool_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "Done"}]},
    {"type": "reasoning", "summary": [], "encrypted_content": "x"},
    message("assistant", "All pass."),
    message("assistant", "Anything else?"),
]


EXAMPLES: dict[str, list[Any]] = {
    "claude-code": [
        event("user", "u1", None, "Run it."),
        event("assistant", "a1", "u1", [{"type": "thinking", "thinking": "Hm."}], message="m"),
        event("assistant", "a2", "a1", [use("t1")], message="m"),
        event("user", "u2", "a2", result("t1")),
        event("assistant", "a3", "u2", [{"type": "text", "text": "Done."}]),
    ],
    "codex": [item(**payload) for payload in PAYLOADS],
    "codex before envelopes": PAYLOADS,
}


def test_codex(read: Read) -> None:
    opening = {"timestamp": "…", "type": "session_meta", "payload": {"id": "s-9", "cwd": "/"}}
    shown = {"timestamp": "…", "type": "event_msg", "payload": {"type": "agent_message", "message": "All pass."}}
    (run,) = read(opening, *(item(**payload) for payload in PAYLOADS), shown)
    calls = [("shell", {"command": ["ls"]}), ("apply_patch", {"input": "*** Begin Patch"})]
    assert outline(run) == [
        ("Look first.", "", calls, ["a.py", "Done"]),
        ("", "All pass.", [], []),
        ("", "Anything else?", [], []),
    ]
    assert (run.task, run.system, run.trajectory_id) == ("Run the tests.", "Rules.", "s-9")
    assert run.lost == {"harness messages": 1, "thoughts that are hidden or encrypted": 1}


def test_turns_of_codex_that_were_undone_are_left_out(read: Read) -> None:
    undone = {"timestamp": "…", "type": "event_msg", "payload": {"type": "thread_rolled_back", "num_turns": 2}}
    said = [("user", "One."), ("assistant", "1"), ("user", "Two."), ("assistant", "2"), ("user", "Three."),
            ("assistant", "3")]  # fmt: skip
    lines = [item(**message(role, text)) for role, text in said]
    (run,) = read(*lines, undone, item(**message("user", "Four.")), item(**message("assistant", "4")))
    assert [(step.text, [each.text for each in step.incoming]) for step in run.steps] == [("1", []), ("4", ["Four."])]
    assert run.lost == {"messages of turns that were undone": 4}
    (run,) = read(*lines, undone, undone, item(**message("user", "Four.")), item(**message("assistant", "4")))
    assert (run.task, [step.text for step in run.steps]) == ("Four.", ["4"])


def test_codex_before_it_had_envelopes(read: Read) -> None:
    (run,) = read({"id": "s-1", "timestamp": "…", "instructions": None}, *PAYLOADS)
    assert [step.text for step in run.steps] == ["", "All pass.", "Anything else?"]


def test_items_of_the_responses_api_need_no_type_for_messages(read: Read) -> None:
    items = [{"role": "system", "content": "Rules."}, {"role": "user", "content": "Run it."}, *PAYLOADS[3:]]
    (run,) = read(items)
    assert (run.task, run.system) == ("Run it.", "Rules.")
    assert [step.text for step in run.steps] == ["", "All pass.", "Anything else?"]


def test_unknown_lines_of_codex_are_counted(read: Read) -> None:
    (run,) = read(*EXAMPLES["codex"], {"timestamp": "…", "type": "new_kind", "payload": {}})
    assert run.lost["entries of type new_kind"] == 1


def test_codex_lines_that_are_not_objects_are_counted(read: Read) -> None:
    """They hold nothing that could be placed, but they are not dropped silently."""
    items = [
        {"type": "response_item", "payload": {"type": "message", "role": role, "content": "text"}}
        for role in ("user", "assistant")
    ]
    (run,) = read({"type": "session_meta", "payload": {"id": "s"}}, 7, None, *items)
    assert len(run.steps) == 1 and run.lost["lines that are not objects"] == 2


def test_repeated_lines_of_claude_code_count_once(read: Read) -> None:
    """A resumed session may copy the lines that it continues."""
    lines = [
        event("user", "u1", None, "Go."),
        event("assistant", "a1", "u1", "Gone."),
        event("user", "u2", "a1", "On."),
    ]
    (once,), (twice,) = read(*lines), read(*lines, *lines)
    assert twice.steps == once.steps
    assert twice.lost["repeated lines"] == 3


def test_runs_of_another_format_in_a_session_are_counted(read: Read, reports: list[FileReport]) -> None:
    other = {"messages": [{"role": "user", "content": "Go."}, {"role": "assistant", "content": "Gone."}]}
    (run,) = read(other, *EXAMPLES["codex"])
    assert run.source["format"] == "codex"
    assert reports[0].unreadable == {"does not match the format codex": 1}
