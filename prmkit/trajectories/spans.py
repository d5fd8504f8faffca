"""Traces: finds the model call in a trace that has the whole conversation, as a list of messages.

A model call has every message so far, so the longest call of a trace is the run; the others repeat its beginning. Calls
that begin differently (a title, a guardrail, another agent) are counted.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from prmkit.trajectories.content import as_text, is_message_list, parsed, role_name, turns_of
from prmkit.trajectories.run import NumberedValues, Run

Span = Mapping[str, Any]


@dataclass(frozen=True)
class ModelCall:
    """What a reader finds in the span of a model call."""

    trace: str
    time: str
    """Sorts in the order of the calls."""
    messages: list[Any]
    """The input messages, then the output."""
    tools: Any = None


@dataclass
class _Trace:
    place: tuple[int, int]
    longest: tuple[int, str] = (-1, "")
    openings: Counter[int] = field(default_factory=Counter)
    opening: int = 0


def longest_conversations(
    values: NumberedValues, calls_of: Callable[[Any], Iterator[ModelCall]]
) -> Iterator[tuple[ModelCall, Run]]:
    """The longest conversation of every trace, as a run that its reader completes.

    Reads the file twice, so that only one conversation is in memory at a time.
    """
    traces: dict[str, _Trace] = {}
    for number, (_, value) in enumerate(values):
        for inner, call in enumerate(calls_of(value)):
            trace = traces.setdefault(call.trace, _Trace((number, inner)))
            opening = _opening(call.messages)
            trace.openings[opening] += 1
            if (size := (len(call.messages), call.time)) > trace.longest:
                trace.longest, trace.place, trace.opening = size, (number, inner), opening
    wanted = {trace.place[0]: set[int]() for trace in traces.values()}
    for trace in traces.values():
        wanted[trace.place[0]].add(trace.place[1])
    for number, (line, value) in enumerate(values):
        for inner, call in enumerate(calls_of(value)) if number in wanted else ():
            if inner in wanted[number]:
                trace = traces[call.trace]
                lost: Counter[str] = Counter()
                lost["model calls of other conversations"] = trace.openings.total() - trace.openings[trace.opening]
                yield call, Run(turns_of(call.messages, lost), lost, trajectory_id=call.trace, line=line)


def _opening(messages: list[Any]) -> int:
    """The text of the first message that is not a system message: the same in all calls of a conversation."""
    first = next((each for each in messages if role_name(each) not in ("system", "developer")), None)
    return hash(as_text(first))


def conversation(given: Any, answer: Any) -> list[Any]:
    """The input messages and the output of a model call, in any of the forms that tracers write.

    Args:
        given: messages, an object with `messages`, a list of lists (LangChain), any of these as JSON, or a prompt.
        answer: a message, an object with `choices`, `generations` or `messages`, any of these as JSON, or text.
    """
    return [*_messages(given, "user"), *_messages(_answer(parsed(answer)), "assistant")]


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


# --- attributes: exporters write them as pairs, as dotted names or nested ------------------------------------------


def attributes_of(span: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes as one tree, whether the file has pairs, dotted names or a tree."""
    given = span.get("attributes")
    if isinstance(given, list):  # OTLP: [{"key": …, "value": {"stringValue": …}}]
        given = {pair["key"]: _plain(pair.get("value")) for pair in given if isinstance(pair, dict) and "key" in pair}
    return undotted(given) if isinstance(given, dict) else {}


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
    """`{"a.0.b": 1}` as `{"a": [{"b": 1}]}`."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *path, leaf = str(key).split(".")
        place = tree
        for name in path:
            inner = place.setdefault(name, {})
            if not isinstance(inner, dict):
                break  # a name that is both a value and a prefix: the value is kept
            place = inner
        else:
            place.setdefault(leaf, undotted(value) if isinstance(value, dict) else value)
    return {key: _listed(value) for key, value in tree.items()}


def _listed(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    inner = {key: _listed(each) for key, each in value.items()}
    if inner and all(key.isdigit() for key in inner):
        return [inner[key] for key in sorted(inner, key=int)]
    return inner


def at(tree: Any, *path: str) -> Any:
    """The value at a path of a tree; None if the path ends early."""
    for name in path:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def nested(span: Mapping[str, Any]) -> Mapping[str, Any]:
    """A span whose own fields also have dotted names (`attributes.llm.…`), as in Phoenix's data frames."""
    return undotted(span) if any(str(key).startswith("attributes.") for key in span) else span


def offered(attributes: Mapping[str, Any]) -> list[Any]:
    """The tools that OpenInference lists, each as the JSON schema that the model got."""
    listed = at(attributes, "llm", "tools")
    found = [undotted(each) for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
    return [parsed(at(each, "tool", "json_schema")) for each in found]
