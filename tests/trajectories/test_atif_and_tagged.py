"""ATIF, and runs as one tagged text."""

import pytest

from prmkit.trajectories.importing import FileReport
from tests.trajectories.conftest import Read, outline

ATIF = {
    "schema_version": "ATIF-v1.7", "session_id": "s", "agent": {"tool_definitions": [{"name": "ls"}]},
    "steps": [
        {"step_id": 1, "source": "user", "message": "List files."},
        {"step_id": 2, "source": "agent", "message": "", "tool_calls": [
            {"tool_call_id": "c", "function_name": "ls", "arguments": {}}],
         "observation": {"results": [{"source_call_id": "c", "content": "a.txt"}]}}],
}  # fmt: skip


@pytest.mark.parametrize("version", ["ATIF-v1.0", "ATIF-v1.4", "ATIF-v1.8", "ATIF-v1.9"])
def test_atif(read: Read, version: str) -> None:
    value = {
        "schema_version": version, "session_id": "s", "agent": {"name": "a", "version": "1", "later_field": {}},
        "steps": [
            {"step_id": 1, "source": "system", "message": "Be brief."},
            {"step_id": 2, "source": "user", "message": [{"type": "text", "text": "List files."}]},
            {"step_id": 3, "source": "agent", "message": "", "reasoning_content": "Look.",
             "tool_calls": [{"tool_call_id": "c", "function_name": "ls", "arguments": {}}],
             "observation": {"results": [{"source_call_id": "c", "content": "a.txt"}]}, "metrics": {}},
            {"step_id": 4, "source": "agent", "message": "a.txt", "is_copied_context": True},
            {"step_id": 5, "source": "agent", "message": "There is a.txt.", "extra": {"x": 1}},
        ],
        "subagent_trajectories": [
            {"schema_version": version, "trajectory_id": "sub", "agent": {},
             "steps": [{"step_id": 1, "source": "user", "message": "Help."},
                       {"step_id": 2, "source": "agent", "message": "I did."}]}],
    }  # fmt: skip
    run, called = read(value)
    assert outline(run) == [("Look.", "", [("ls", {})], ["a.txt"]), ("", "There is a.txt.", [], [])]
    assert (run.task, run.system, run.trajectory_id) == ("List files.", "Be brief.", "s")
    assert [step.source_index for step in run.steps] == [2, 4]
    assert run.lost == {"steps copied from another run": 1}
    assert (called.trajectory_id, called.task, called.steps[0].text) == ("sub", "Help.", "I did.")


TAGGED = """<think>I search.</think>
<tool_call>{"name": "search", "arguments": {"q": "x"}}</tool_call>
<result>nothing</result>
<tool_call>{"name": "search", "arguments": {"q": "y"}}</tool_call>
<result>found y</result>
<think>Enough.</think>
<answer>y</answer>"""


EXAMPLES = {"atif": [ATIF], "tagged": [{"sft_data": {"instruction": "Find it.", "output": TAGGED}}]}


def test_tagged_text(read: Read) -> None:
    (run,) = read({"task_id": "q1", "sft_data": {"instruction": "Find it.", "output": TAGGED, "final_result": "y"},
                   "answer": "y", "tool_call_statistics": {}, "conversations": []})  # fmt: skip
    assert outline(run) == [
        ("I search.", "", [("search", {"q": "x"})], ["nothing"]),
        ("", "", [("search", {"q": "y"})], ["found y"]),
        ("Enough.", "y", [], []),
    ]
    assert (run.task, run.task_id, run.reference, run.lost) == ("Find it.", "q1", "y", {})


def test_tagged_text_of_the_older_form_and_what_it_breaks(read: Read, reports: list[FileReport]) -> None:
    text = (
        "<think>Hm.</think><tool_call>search x</tool_call><result>a <think> b</result> So it is. <answer>never closed"
    )
    (run,) = read({"task_description": "Find it.", "raw_response": text, "final_result": "?"})
    assert outline(run) == [
        ("Hm.", "", [("tool_call", "search x")], ["a <think> b"]),
        ("", "So it is. <answer>never closed", [], []),
    ]
    assert run.lost == {"calls that are not JSON": 1, "broken tags": 2}
