"""ATIF (Harbor, Terminal-Bench and others), versions 1.0 to 1.8, read leniently: unknown fields are ignored.

Steps that a continued run copied from the previous run (`is_copied_context`) are context, not new steps of the agent.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from prmkit.trajectories.content import Parts, as_text, mapping, read_call
from prmkit.trajectories.run import FieldNames, Reader, Run, Turn
from prmkit.trajectories.run_fields import describe, id_of, tools_of
from prmkit.trajectory import Call, Result


def recognises(value: Any) -> bool:
    """Return whether a value has `schema_version: ATIF-v…` and steps."""
    return (
        isinstance(value, dict)
        and str(value.get("schema_version", "")).upper().startswith("ATIF")
        and isinstance(value.get("steps"), list)
    )


_READ = ("schema_version", "session_id", "agent", "steps", "final_metrics", "subagent_trajectories",
         "continued_trajectory_ref")  # fmt: skip


def read(value: Any, _keys: FieldNames) -> Iterator[Run]:
    """Yield the run of one value, and one run for each agent that it called."""
    lost: Counter[str] = Counter()
    turns: list[Turn] = []
    for index, step in enumerate(value["steps"]):
        if not isinstance(step, dict):
            lost["entries that are not steps"] += 1
        elif step.get("is_copied_context"):
            lost["steps copied from another run"] += 1
        else:
            turns += _turns(step, index, lost)
    tools = tools_of(mapping(value.get("agent")).get("tool_definitions"))
    continues = bool(value.get("continued_trajectory_ref"))
    identity = id_of(value, "trajectory_id", "session_id")
    run = Run(turns, lost, trajectory_id=identity, tools=tools, continues=continues)
    describe(run, value, FieldNames(), read=_READ)
    yield run
    for called in value.get("subagent_trajectories") or ():
        if isinstance(called, dict) and isinstance(called.get("steps"), list):
            yield from read(called, _keys)
        else:
            lost["runs of called agents"] += 1


def _turns(step: Mapping[str, Any], index: int, lost: Counter[str]) -> list[Turn]:
    parts = Parts(lost)
    parts.add(step.get("message"))
    source, results = step.get("source"), tuple(_results(step.get("observation"), lost))
    if source == "agent":
        calls = tuple(call for each in step.get("tool_calls") or () if (call := _call(each, lost)))
        thought = as_text(step.get("reasoning_content"))
        return [Turn("agent", parts.text(), thought, (*parts.calls, *calls), results, index=index)]
    if source not in ("user", "system"):
        lost[f"steps of source {str(source)[:40]}"] += 1
        return []
    turns = [Turn("system" if source == "system" else "user", parts.text(), index=index)] if parts.text() else []
    return turns + ([Turn("tool", results=results, index=index)] if results else [])


def _call(value: Any, lost: Counter[str]) -> Call | None:
    if isinstance(value, dict):
        value = {"id": value.get("tool_call_id"), "name": value.get("function_name")} | dict(value)
    return read_call(value, lost)


def _results(observation: Any, lost: Counter[str]) -> Iterator[Result]:
    for each in mapping(observation).get("results") or ():
        if not isinstance(each, dict):
            lost["entries that are not results"] += 1
            continue
        parts = Parts(lost, "result")
        parts.add(each.get("content"))
        lost["references to runs of called agents"] += bool(each.get("subagent_trajectory_ref"))
        yield Result(parts.text(), as_text(each.get("source_call_id")) or None)


READER = Reader("atif", recognises, one=read)
