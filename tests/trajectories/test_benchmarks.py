"""Results of benchmarks and their agents: tau-bench, tau2, SWE-agent, mini-swe-agent, Inspect."""

from typing import Any

import pytest

from tests.trajectories.conftest import Read, outline

SYSTEM = {"role": "system", "content": "Policy."}


TAU_BENCH: dict[str, Any] = {
    "task_id": 3, "trial": 1, "reward": 1.0,
    "info": {"task": {"actions": [{"name": "cancel", "kwargs": {}}], "instruction": "You are hidden."}},
    "traj": [
        SYSTEM,
        {"role": "user", "content": "Cancel it."},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "cancel", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "c", "name": "cancel", "content": "ok"},
        {"role": "assistant", "content": "Cancelled."},
    ],
}  # fmt: skip

SIMULATION: dict[str, Any] = {
    "id": "s-1", "task_id": "t-1", "trial": 0, "reward_info": {"reward": 1.0},
    "messages": [
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "My phone is broken."},
        {"role": "user", "content": None, "tool_calls": [
            {"id": "u", "name": "reboot", "arguments": {}, "requestor": "user"}]},
        {"role": "tool", "id": "u", "content": "rebooted", "requestor": "user"},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "c", "name": "lookup", "arguments": {"n": 1}, "requestor": "assistant"}]},
        {"role": "tool", "id": "c", "content": "no", "requestor": "assistant", "error": True},
        {"role": "assistant", "content": "Sorry."},
    ],
}  # fmt: skip
_TASKS = [{"id": "t-1", "evaluation_criteria": {"actions": []}, "user_scenario": {"instructions": "hidden"}}]
TAU2 = {"timestamp": "now", "tasks": _TASKS, "simulations": [SIMULATION]}

SWE_AGENT: dict[str, Any] = {
    "environment": "swe",
    "trajectory": [
        {
            "action": "ls",
            "observation": "a.py",
            "response": "I look.\n```\nls\n```",
            "thought": "I look.",
            "state": "{}",
        },
        {
            "action": "submit",
            "observation": "",
            "response": "Done.\n```\nsubmit\n```",
            "thought": "Done.",
            "state": "{}",
        },
    ],
    "history": [
        {"role": "system", "content": "You fix code.", "agent": "main"},
        {"role": "user", "content": "A demonstration.", "is_demo": True},
        {"role": "user", "content": [{"type": "text", "text": "Fix the bug."}]},
        {"role": "assistant", "content": "I look."},
    ],
    "info": {"exit_status": "submitted", "submission": "diff"},
}

_SAMPLE: dict[str, Any] = {
    "id": "q1", "epoch": 1, "input": "attachment://abc", "target": "the-answer",
    "messages": [
        {"role": "system", "content": "Policy."},
        {"role": "user", "content": "attachment://abc", "source": "input"},
        {"role": "assistant",
         "content": [{"type": "reasoning", "reasoning": "Hm."}, {"type": "text", "text": "ok"}],
         "tool_calls": [{"id": "c", "function": "bash", "arguments": {"cmd": "ls"}, "type": "function"}]},
        {"role": "tool", "tool_call_id": "c", "function": "bash", "content": "attachment://missing"},
        {"role": "assistant", "content": "It is four."},
    ],
    "scores": {"match": {"value": "C", "answer": "4"}}, "attachments": {"abc": "How many?"},
}  # fmt: skip
INSPECT: dict[str, Any] = {
    "version": 2,
    "status": "success",
    "eval": {"task": "sums"},
    "samples": [_SAMPLE, _SAMPLE | {"epoch": 2}],
}


def _mini(*messages: dict[str, Any]) -> dict[str, Any]:
    opening = [SYSTEM, {"role": "user", "content": "Please solve this issue: it crashes."}]
    closing = {"role": "exit", "content": "diff", "extra": {"exit_status": "Submitted", "submission": "diff"}}
    info = {"exit_status": "Submitted", "submission": "diff", "mini_version": "2.0.0"}
    return {
        "info": info, "messages": [*opening, *messages, closing], "instance_id": "repo-1",
        "trajectory_format": "mini-swe-agent-1.1",
    }  # fmt: skip


MINI = _mini(
    {"role": "assistant", "content": "```bash\nls\n```", "extra": {"actions": [{"command": "ls"}]}},
    {"role": "user", "content": "a.py", "extra": {"returncode": 0}},
)
EXAMPLES: dict[str, list[Any]] = {
    "tau-bench": [TAU_BENCH], "tau2": [TAU2], "swe-agent": [SWE_AGENT], "mini-swe-agent": [MINI], "inspect": [INSPECT],
}  # fmt: skip


def test_tau_bench(read: Read) -> None:
    first, second = read([TAU_BENCH, TAU_BENCH | {"trial": 2, "reward": 0.0}])
    assert outline(first) == [("", "", [("cancel", {})], ["ok"]), ("", "Cancelled.", [], [])]
    assert (first.task, first.task_id, first.system) == ("Cancel it.", "3", "Policy.")
    assert first.reference == '[{"name": "cancel", "kwargs": {}}]'
    assert (first.outcome, second.outcome) == ({"success": None, "score": 1.0}, {"success": None, "score": 0.0})
    assert (first.trajectory_id, second.trajectory_id) == ("3.1", "3.2")
    assert "You are hidden" not in repr(first)


def test_tau2(read: Read) -> None:
    (run,) = read(TAU2)
    assert outline(run) == [
        ("", "Hello!", [], []),
        ("", "", [("lookup", {"n": 1})], ["no"]),
        ("", "Sorry.", [], []),
    ]
    assert run.steps[1].results[0].error
    assert (run.task, run.trajectory_id, run.reference) == ("My phone is broken.", "s-1", '{"actions": []}')
    assert run.lost["user tool calls and results"] == 2
    assert "hidden" not in repr(run)


def test_the_policy_of_tau2_is_the_system_text(read: Read) -> None:
    (run,) = read(TAU2 | {"info": {"environment_info": {"domain_name": "phones", "policy": "Ask first."}}})
    assert run.system == "Ask first." and run.steps[0].text == "Hello!"


def test_swe_agent(read: Read) -> None:
    (run,) = read(SWE_AGENT, name="one.traj")
    assert outline(run) == [("I look.", "", [("action", "ls")], ["a.py"]), ("Done.", "", [("action", "submit")], [""])]
    assert (run.task, run.system) == ("Fix the bug.", "You fix code.")
    assert run.lost == {"demonstrations": 1, "submissions": 1}


def test_mini_swe_agent_with_text(read: Read) -> None:
    """Observations are messages of the user, and are results."""
    (run,) = read(
        _mini(
            {
                "role": "assistant",
                "content": "THOUGHT: look\n```bash\nls\n```",
                "extra": {"actions": [{"command": "ls"}]},
            },
            {"role": "user", "content": "a.py", "extra": {"returncode": 0, "raw_output": "a.py"}},
            {"role": "assistant", "content": "```bash\ncat b\n```", "extra": {"actions": [{"command": "cat b"}]}},
            {"role": "user", "content": "no such file", "extra": {"returncode": 1}},
            {"role": "assistant", "content": "I give up.", "extra": {}},
            {"role": "user", "content": "Please write one action.", "extra": {"interrupt_type": "FormatError"}},
        )
    )
    assert outline(run)[:2] == [
        ("", "THOUGHT: look\n```bash\nls\n```", [("bash", {"command": "ls"})], ["a.py"]),
        ("", "```bash\ncat b\n```", [("bash", {"command": "cat b"})], ["no such file"]),
    ]
    assert [result.error for step in run.steps[:2] for result in step.results] == [False, True]
    assert [result.text for result in run.steps[2].results] == ["Please write one action."]
    assert (run.task_id, run.task) == ("repo-1", "Please solve this issue: it crashes.")
    assert all(not step.incoming for step in run.steps)


def test_mini_swe_agent_with_tool_calls(read: Read) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "bash", "arguments": '{"command": "ls"}'}}
    (run,) = read(
        _mini(
            {"role": "assistant", "content": None, "tool_calls": [call],
             "extra": {"actions": [{"command": "ls", "tool_call_id": "c"}]}},
            {"role": "tool", "tool_call_id": "c", "content": "a.py", "extra": {"returncode": 0}},
        )
    )  # fmt: skip
    assert outline(run) == [("", "", [("bash", {"command": "ls"})], ["a.py"])]
    assert run.lost == {"harness messages": 1}


@pytest.mark.parametrize(
    ("scores", "outcome"),
    [
        ({"a": {"value": "C"}, "b": {"value": 1}}, {"success": None, "score": 1.0}),
        ({"format": {"value": "C"}, "solved": {"value": "I"}}, None),
        ({"solved": {"value": {"x": 1, "y": 0}}}, None),
        ({}, None),
    ],
)
def test_scorers_of_inspect_that_disagree_give_no_outcome(
    read: Read, scores: dict[str, Any], outcome: dict[str, Any] | None
) -> None:
    (run,) = read(_SAMPLE | {"scores": scores})
    assert run.outcome == outcome
    assert run.lost.get("scores without one meaning", 0) == (0 if outcome else len(scores))


def test_inspect(read: Read) -> None:
    first, second = read(INSPECT)
    assert outline(first) == [
        ("Hm.", "ok", [("bash", {"cmd": "ls"})], ["attachment://missing"]),
        ("", "It is four.", [], []),
    ]
    assert (first.task, first.task_id, first.reference) == ("How many?", "sums/q1", "the-answer")
    assert first.outcome == {"success": None, "score": 1.0}
    assert first.lost == {"attachments that are missing": 1}
    assert (first.trajectory_id, second.trajectory_id) == ("sums/q1.1", "sums/q1.2")
    assert all(not step.incoming for step in first.steps)


@pytest.mark.parametrize("value", [SWE_AGENT, MINI, _SAMPLE], ids=["swe-agent", "mini-swe-agent", "inspect"])
def test_a_whole_number_is_one_task_however_it_is_written(read: Read, value: dict[str, Any]) -> None:
    runs = read(*(value | {"id": given, "instance_id": given} for given in (7, 7.0, "7")))
    assert [run.task_id for run in runs] == ["7"] * 3
