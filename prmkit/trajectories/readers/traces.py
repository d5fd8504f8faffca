"""Shared code of the trace readers: find the model call of a trace that has the complete conversation.

A model call has every message so far, so the longest call of a trace is the run; the others repeat its beginning. Calls
with another beginning (a title, a guardrail, another agent) are counted.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from prmkit.trajectories.content import as_text, is_message_list, parsed, role_name, turns_of
from prmkit.trajectories.run import NumberedValues, Run


@dataclass(frozen=True)
class ModelCall:
    """A model call in a trace."""

    trace: str
    time: str
    """The time as text, which sorts in the order of the calls."""
    messages: list[Any]
    """The input messages, then the output."""
    tools: Any = None


@dataclass
class _Trace:
    location: tuple[int, int]
    longest: tuple[int, str] = (-1, "")
    openings: Counter[int] = field(default_factory=Counter)
    opening: int = 0


def longest_conversations(
    values: NumberedValues, calls_of: Callable[[Any], Iterator[ModelCall]]
) -> Iterator[tuple[ModelCall, Run]]:
    """Yield the longest conversation of every trace, as a run that its reader completes.

    Reads the file twice, so that only one conversation is in memory at a time.
    """
    traces: dict[str, _Trace] = {}
    for number, (_, value) in enumerate(values):
        for inner, call in enumerate(calls_of(value)):
            trace = traces.setdefault(call.trace, _Trace((number, inner)))
            opening = _opening(call.messages)
            trace.openings[opening] += 1
            if (size := (len(call.messages), call.time)) > trace.longest:
                trace.longest, trace.location, trace.opening = size, (number, inner), opening
    wanted = {trace.location[0]: set[int]() for trace in traces.values()}
    for trace in traces.values():
        wanted[trace.location[0]].add(trace.location[1])
    for number, (line, value) in enumerate(values):
        for inner, call in enumerate(calls_of(value)) if number in wanted else ():
            if inner in wanted[number]:
                trace = traces[call.trace]
                lost: Counter[str] = Counter()
                lost["unrelated model calls"] = trace.openings.total() - trace.openings[trace.opening]
                yield call, Run(turns_of(call.messages, lost), lost, trajectory_id=call.trace, line=line)


def _opening(messages: list[Any]) -> int:
    """Return a hash of the first message that is not a system message: the same in all calls of a conversation."""
    first = next((each for each in messages if role_name(each) not in ("system", "developer")), None)
    return hash(as_text(first))


def conversation(prompt: Any, answer: Any) -> list[Any]:
    """Return the input messages and the output of a model call, from any of the formats that tracers write.

    Args:
        prompt: messages, an object with `messages`, a list of lists (LangChain), any of these as JSON, or a prompt.
        answer: a message, an object with `choices`, `generations` or `messages`, any of these as JSON, or text.
    """
    return [*_messages(prompt, "user"), *_messages(_answer(parsed(answer)), "assistant")]


def _messages(value: Any, role: str) -> list[Any]:
    value = parsed(value)
    if isinstance(value, dict) and "messages" in value:
        value = parsed(value["messages"])
    if isinstance(value, list) and value and isinstance(value[0], list):
        value = value[0]
    if is_message_list(value):
        return list(value)
    if role_name(value):
        return [value]
    return [{"role": role, "content": value}] if value not in (None, "", [], {}) else []


def _answer(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if isinstance(value.get("choices"), list) and value["choices"]:
        return (value["choices"][0] or {}).get("message")
    if isinstance(value.get("generations"), list) and value["generations"]:
        first = value["generations"][0]
        first = first[0] if isinstance(first, list) and first else first
        return first.get("message", first.get("text")) if isinstance(first, dict) else first
    if set(value) <= {"output", "content"} and len(value) == 1:
        return _answer(parsed(next(iter(value.values()))))
    return value
