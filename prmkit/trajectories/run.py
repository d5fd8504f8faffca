"""Turn the messages of a run into steps: every reader's output becomes a trajectory record here."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from prmkit.rows import as_name
from prmkit.trajectory import Call, Label, Message, Result, Step, Trajectory, results_by_call, task_id_of, with_labels

Role = Literal["system", "user", "agent", "tool"]


@dataclass(frozen=True)
class Turn:
    """One message of a run, independent of its source's format."""

    role: Role
    text: str = ""
    thought: str = ""
    calls: tuple[Call, ...] = ()
    results: tuple[Result, ...] = ()
    speaker: str | None = None
    """The name of an agent or another speaker."""
    index: int | None = None
    """The index of the message in the source, from 0."""


def joined(first: Turn, more: Turn) -> Turn:
    """Join an answer that its source splits over several entries into one message."""
    return replace(
        first,
        text="\n\n".join(filter(None, (first.text, more.text))),
        thought="\n\n".join(filter(None, (first.thought, more.thought))),
        calls=(*first.calls, *more.calls),
        results=(*first.results, *more.results),
    )


@dataclass
class Run:
    """The output of a reader: the messages of a run, and the run's other fields."""

    turns: list[Turn]
    lost: Counter[str] = field(default_factory=Counter)
    task: str | None = None
    """The task; None if it is the user's first message."""
    task_id: str | None = None
    trajectory_id: str | None = None
    outcome: Mapping[str, Any] | None = None
    reference: str | None = None
    tools: tuple[Mapping[str, str], ...] = ()
    labels: Mapping[int, Label] = field(default_factory=dict)
    """Index of the message in the source -> label."""
    line: int | None = None
    continues: bool = False
    """Whether the run had further steps, which are missing here."""


@dataclass(frozen=True)
class FieldNames:
    """Field names of custom files; None for the usual names."""

    task: str | None = None
    """The key of the task id."""
    outcome: str | None = None
    messages: str | None = None
    """The key of the message list."""
    labels: str | None = None
    """The key of the steps' labels: a list with one label per step, or an object from message index to label."""
    label_scale: str = "unit"


class UnreadableValue(Exception):
    """A value in a reader's format that it cannot read; the message says why."""


NumberedValues = Iterable[tuple[int, Any]]
"""The values of a file with their line numbers. They can be iterated repeatedly."""


@dataclass(frozen=True)
class Reader:
    """The reader of one format of runs. Exactly one of `one` and `every` is set."""

    name: str
    recognises: Callable[[Any], bool]
    """Whether a value of a file has this format, by its structure alone."""
    one: Callable[[Any, FieldNames], Iterator[Run | Trajectory]] | None = None
    """Reads one value at a time, so files of any size can be streamed."""
    every: Callable[[NumberedValues, FieldNames], Iterator[Run | Trajectory]] | None = None
    """Reads all values of a file together, if one run consists of several."""
    own_keys: bool = False
    """Whether the reader uses `FieldNames` itself; otherwise they are read from the value around its only run."""
    marks: Callable[[Any], tuple[str, dict[int, str | None]] | None] | None = None
    """For sets with labels in separate files: returns a run's id, and message index -> type of error."""


def assemble(run: Run, source: Mapping[str, Any]) -> Trajectory | None:
    """Return the trajectory record of a run, with provisional ids; None if the run has no step of the agent."""
    lost = run.lost
    system: list[str] = []
    steps: list[Step] = []
    incoming: list[Message] = []
    first_message: str | None = None
    for turn in run.turns:
        if turn.role == "system":
            lost["further system messages"] += bool(system)
            if steps or incoming:
                incoming.append(Message("system", turn.text))
            else:
                system.append(turn.text)
        elif turn.role == "user":
            if first_message is None and run.task is None and turn.text:
                first_message = turn.text
                if not steps:
                    continue  # it is the task, which every prompt shows
            if turn.text and not (not steps and turn.text == run.task):
                incoming.append(Message(turn.speaker or "user", turn.text))
        elif turn.role == "agent":
            if not (turn.text or turn.thought or turn.calls):
                lost["messages of the agent without text or call"] += 1
                continue
            steps.append(_step(turn, len(steps) + 1, incoming))
            incoming = []
        for result in turn.results:
            _attach(result, steps, lost)
    lost["messages after the last step"] += len(incoming)
    if not steps:
        return None
    lost["calls without a result"] += sum(len(step.calls) - _answered(step) for step in steps)
    steps[-1] = replace(steps[-1], last=not run.continues)
    task = run.task if run.task is not None else first_message or ""
    lost["runs without a task"] += not task
    return with_labels(_record(run, source, task, "\n\n".join(system), steps), run.labels)


def _record(run: Run, source: Mapping[str, Any], task: str, system: str, steps: Sequence[Step]) -> Trajectory:
    return Trajectory(
        trajectory_id=run.trajectory_id or "",
        task_id=run.task_id or task_id_of(task),
        task=task,
        steps=tuple(steps),
        system=system,
        tools=run.tools,
        outcome=run.outcome,
        reference=run.reference,
        source=source,
        lost={kind: count for kind, count in run.lost.items() if count},
    )


def _step(turn: Turn, number: int, incoming: Sequence[Message]) -> Step:
    return Step(
        n=number,
        text=turn.text,
        thought=turn.thought,
        calls=tuple(
            call if call.id else replace(call, id=f"{number}-{index}") for index, call in enumerate(turn.calls, start=1)
        ),
        incoming=tuple(incoming),
        agent=turn.speaker,
        source_index=turn.index,
    )


def _answered(step: Step) -> int:
    return sum(map(bool, results_by_call(step)[0]))


def _attach(result: Result, steps: list[Step], lost: Counter[str]) -> None:
    """Attach a result to its call: by id; without an id, to the first call of the last step without a result."""
    for index in range(len(steps) - 1, -1, -1):
        if result.call_id is not None and any(call.id == result.call_id for call in steps[index].calls):
            steps[index] = replace(steps[index], results=(*steps[index].results, result))
            return
    if not steps:
        lost["results before the first step"] += 1
        return
    last = steps[-1]
    waiting = [call.id for call, given in zip(last.calls, results_by_call(last)[0], strict=True) if not given]
    if result.call_id is None and waiting:
        result = replace(result, call_id=waiting[0])
    else:
        lost["results without a call"] += 1  # kept with the previous step
    steps[-1] = replace(last, results=(*last.results, result))


class Ids:
    """Assigns a unique id to every run of an import. Takes about 100 bytes per run."""

    def __init__(self, unnamed: str | None = None) -> None:
        """Start; runs without an id are named `unnamed`, by default their task's id, with a number."""
        self._unnamed = unnamed
        self._runs_of: Counter[int] = Counter()
        self._taken: set[int] = set()

    def named(self, run: Trajectory) -> Trajectory:
        """Return the run with the source's id, otherwise the task's id with a number; a repeated id gets a number."""
        name = as_name(run.trajectory_id)  # the same conversion as for names in rows
        if not name:
            named = self._unnamed or run.task_id
            self._runs_of[hash(named)] += 1
            name = f"{named}.{self._runs_of[hash(named)]}"
        unique, number = name, 1
        while hash(unique) in self._taken:
            number += 1
            unique = f"{name}~{number}"
        self._taken.add(hash(unique))
        return replace(run, trajectory_id=unique)
