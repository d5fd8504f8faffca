"""Shared code of the trace readers: find the model call that has the complete conversation of a trace.

A model call contains all messages so far, so the longest call of a trace is the run; most others repeat its beginning.
The rest are counted: calls that begin differently (a title, a guardrail, another agent), and calls of the same
conversation that the longest one does not contain (another sample of an answer, or what follows after the history was
shortened).
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import orjson

from prmkit.trajectories.content import as_text, is_message_list, parsed, role_name
from prmkit.trajectories.readers import codex
from prmkit.trajectories.run import NumberedValues, Run, Turn, UnreadableValue


@dataclass(frozen=True)
class ModelCall:
    """A model call in a trace."""

    trace: str
    time: str
    """A string that sorts the calls of a trace in their order."""
    given: list[Any]
    """The input messages."""
    answer: list[Any]
    """The output messages."""
    tools: Any = None
    others: int = 0
    """The number of other samples of the answer, which are left out."""


@dataclass
class _Trace:
    place: tuple[int, int] = (0, 0)
    longest: tuple[int, str] = (-1, "")
    opening: int = 0
    prefixes: frozenset[int] = frozenset()
    """Hashes of all beginnings of the longest call."""
    samples: int = 0
    """Other samples of the answers."""
    calls: Counter[tuple[int, str, int, int]] = field(default_factory=Counter)
    """Counts by opening, time, hash of the input and hash of the whole call."""

    def add(self, call: ModelCall, said: "_Said", place: tuple[int, int]) -> None:
        opening, given, whole = (
            said.opening(call),
            said.beginnings(call.given),
            said.beginnings(call.given, call.answer),
        )
        self.samples += call.others
        self.calls[opening, call.time, given[-1], whole[-1]] += 1
        if (size := (len(call.given) + len(call.answer), call.time)) > self.longest:
            self.longest, self.place, self.opening, self.prefixes = size, place, opening, frozenset(whole)

    def others(self) -> Counter[str]:
        """Return the calls that the longest one does not contain, and other samples of an answer."""
        lost = Counter({"other samples of an answer": self.samples})
        for (opening, _, _, whole), count in self.calls.items():
            if whole not in self.prefixes:
                same = "model calls that the longest one does not contain"
                lost[same if opening == self.opening else "model calls of other conversations"] += count
        return lost

    def continues(self) -> bool:
        """Return whether later calls continue from a shortened history, so the longest call lacks the last steps."""
        return any(
            opening == self.opening and time > self.longest[1] and given not in self.prefixes
            for opening, time, given, _ in self.calls
        )


def longest_conversations(
    values: NumberedValues, calls_of: Callable[[Any], Iterator[ModelCall]], nothing: str
) -> Iterator[tuple[ModelCall, Run]]:
    """Yield the longest conversation of every trace, as a run that its reader completes.

    Reads the file twice, so that only one conversation is in memory at a time.

    Args:
        values: the values of the file.
        calls_of: the model calls in a value.
        nothing: why a file of this format may have no model call with messages, and what to do.

    Raises:
        UnreadableValue: no model call has messages.
    """
    traces: dict[str | int, _Trace] = {}
    said = _Said()
    for number, (_, value) in enumerate(values):
        for inner, call in enumerate(calls_of(value)):
            traces.setdefault(call.trace or said.opening(call), _Trace()).add(call, said, (number, inner))
    if not traces:
        raise UnreadableValue(nothing)
    wanted = {trace.place[0]: set[int]() for trace in traces.values()}
    for trace in traces.values():
        wanted[trace.place[0]].add(trace.place[1])
    for number, (line, value) in enumerate(values):
        for inner, call in enumerate(calls_of(value)) if number in wanted else ():
            if inner in wanted[number]:
                trace = traces[call.trace or said.opening(call)]
                lost = trace.others()
                turns = codex.turns_of_list([*call.given, *call.answer], lost)
                run = Run(turns, lost, trajectory_id=call.trace or None, line=line, continues=trace.continues())
                yield call, run


class _Said:
    """Hashes of the content of messages, without what may differ between the calls of one conversation.

    Calls repeat their messages, so each message is read once, and only its hash is kept.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[bool, int | None]] = {}

    def opening(self, call: ModelCall) -> int:
        """Return the system prompt and the first other message: the same in all calls of a conversation."""
        found = []
        for message in call.given:
            is_system, said = self._of(message)
            found.append(said)
            if said is not None and not is_system:
                break
        return hash(tuple(found))

    def beginnings(self, *lists: list[Any]) -> list[int]:
        """Return the hashes of all beginnings of a conversation; a changed system prompt alone does not change them."""
        found = [hash(())]
        for message in chain(*lists):
            is_system, said = self._of(message)
            if said is not None and not is_system:
                found.append(hash((found[-1], said)))
        return found

    def _of(self, message: Any) -> tuple[bool, int | None]:
        """Return whether a message is a system prompt, and the hash of its content; None if it is empty."""
        try:
            key = hash(orjson.dumps(message))
        except TypeError:  # nested deeply, or with a number of more than 64 bits
            key = hash(as_text(message))
        if key not in self._known:
            if len(self._known) >= _MOST_MESSAGES:
                self._known.clear()
            turns = codex.turns_of_list([message], Counter())
            texts = tuple(_words(turn) for turn in turns if turn.text or turn.calls or turn.results)
            self._known[key] = all(turn.role == "system" for turn in turns), hash(texts) if texts else None
        return self._known[key]


_MOST_MESSAGES = 100_000


def _words(turn: Turn) -> tuple[Any, ...]:
    calls = tuple((call.name, as_text(call.arguments)) for call in turn.calls)
    return (turn.role, turn.text.strip(), calls, tuple(result.text for result in turn.results))


def conversation(given: Any, answer: Any) -> tuple[list[Any], list[Any]]:
    """Return the input messages and the output of a model call, in any format that tracers write.

    Args:
        prompt: messages, an object with `messages`, a list of lists (LangChain), any of these as JSON, or a prompt.
        answer: a message, an object with `choices`, `generations` or `messages`, any of these as JSON, or text.
    """
    return _messages(given, "user"), _messages(_answer(parsed(answer)), "assistant")


def other_samples(answer: Any) -> int:
    """Return the number of samples in the output of a model call (`n`); `conversation` reads only the first."""
    answer = parsed(answer)
    listed = (answer.get("choices") or answer.get("generations")) if isinstance(answer, dict) else None
    size = sum(len(each) if isinstance(each, list) else 1 for each in listed) if isinstance(listed, list) else 0
    return max(size - 1, 0)


def _messages(value: Any, role: str) -> list[Any]:
    value = parsed(value)
    if isinstance(value, dict) and "messages" in value:
        value = parsed(value["messages"])
    if isinstance(value, dict) and (is_message_list(value.get("input")) or codex.is_item_list(value.get("input"))):
        value = value["input"]
    if isinstance(value, list) and value and isinstance(value[0], list):
        value = value[0]
    if is_message_list(value) or codex.is_item_list(value):
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
    if codex.is_item_list(value.get("output")) or is_message_list(value.get("output")):  # the Responses API
        return value["output"]
    if set(value) <= {"output", "content", "message"} and len(value) == 1:
        return _answer(parsed(next(iter(value.values()))))
    return value
