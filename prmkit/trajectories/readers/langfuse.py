"""Exports of Langfuse: one observation per line, or a trace with its `observations`; `GENERATION` is a model call."""

from collections.abc import Iterator
from typing import Any

from prmkit.trajectories.content import as_text, mapping, parsed
from prmkit.trajectories.readers.traces import ModelCall, conversation, longest_conversations, other_samples
from prmkit.trajectories.run import FieldNames, NumberedValues, Reader, Run
from prmkit.trajectories.run_fields import tools_of


def recognises(value: Any) -> bool:
    """Return whether a value is an observation with `traceId` and `type`, or a trace with `observations`."""
    if not isinstance(value, dict):
        return False
    if isinstance(value.get("observations"), list):
        return all(isinstance(each, dict) and "type" in each for each in value["observations"])
    return {"traceId", "type"} <= value.keys() and isinstance(value["type"], str)


_NOTHING = (
    "no observation of type GENERATION with input or output. Export the traces' observations, not only the traces"
)


def read(values: NumberedValues, _keys: FieldNames) -> Iterator[Run]:
    """Yield one run per trace."""
    for call, run in longest_conversations(values, _calls, _NOTHING):
        run.tools = tools_of(call.tools)
        yield run


def _calls(value: Any) -> Iterator[ModelCall]:
    if not recognises(value):
        return
    for each in value.get("observations", [value]):
        if str(each["type"]).upper() == "GENERATION":
            trace = as_text(each.get("traceId") or value.get("id"))
            tools = mapping(parsed(each.get("input"))).get("tools")
            messages = conversation(each.get("input"), each.get("output"))
            yield ModelCall(trace, as_text(each.get("startTime")), *messages, tools, other_samples(each.get("output")))


READER = Reader("langfuse", recognises, every=read)
