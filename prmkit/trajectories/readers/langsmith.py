"""Exports of LangSmith: one run (LangSmith's term for a span) per line, with `run_type: llm` for model calls."""

from collections.abc import Iterator
from typing import Any

from prmkit.trajectories.content import as_text
from prmkit.trajectories.readers.traces import ModelCall, conversation, longest_conversations, other_samples
from prmkit.trajectories.run import FieldNames, NumberedValues, Reader, Run
from prmkit.trajectories.run_fields import tools_of


def recognises(value: Any) -> bool:
    """Return whether a value is a span with `run_type`, `inputs`, and `trace_id` or `id`."""
    return isinstance(value, dict) and {"run_type", "inputs"} <= value.keys() and ("trace_id" in value or "id" in value)


_NOTHING = "no span of run_type llm, only their parents. Export the child runs, too (list_runs by trace_id)"


def read(values: NumberedValues, _keys: FieldNames) -> Iterator[Run]:
    """Yield one run per trace."""
    for call, run in longest_conversations(values, _calls, _NOTHING):
        run.tools = tools_of(call.tools)
        yield run


def _calls(value: Any) -> Iterator[ModelCall]:
    if not recognises(value):
        return
    if value["run_type"] == "llm":
        extra = value.get("extra")
        parameters = extra.get("invocation_params") if isinstance(extra, dict) else None
        tools = parameters.get("tools") if isinstance(parameters, dict) else None
        time = as_text(value.get("dotted_order") or value.get("start_time"))
        trace = as_text(value.get("trace_id") or value.get("id"))
        outputs = value.get("outputs")
        yield ModelCall(trace, time, *conversation(value["inputs"], outputs), tools, other_samples(outputs))
    for child in value.get("child_runs") or ():
        if isinstance(child, dict):
            yield from _calls({"trace_id": value.get("trace_id") or value.get("id")} | child)


READER = Reader("langsmith", recognises, every=read)
