"""Sessions of Claude Code: one event per line, `message` in Anthropic's format, linked by `parentUuid`.

The format is undocumented, and three of its properties break a reader that reads the lines in order: one answer of the
model is split over several lines with one `message.id`; a rewound session keeps every branch; and the results of
parallel calls are not on the path that leads back from the last line.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from prmkit.trajectories.content import read_message
from prmkit.trajectories.run import FieldNames, NumberedValues, Reader, Run, Turn, joined

_INJECTED = re.compile(
    r"\s*<(?:command-(?:name|message|args)|local-command-\w+|bash-std\w+|task-notification)>|\s*Caveat: "
)
_BOOKKEEPING = {"progress", "system", "summary"}
"""Types of lines that the model never received."""

Event = Mapping[str, Any]


def recognises(value: Any) -> bool:
    """Return whether a value is an event with `sessionId` and a message of `type` user or assistant."""
    return (
        isinstance(value, dict)
        and value.get("type") in ("user", "assistant")
        and "sessionId" in value
        and "uuid" in value
        and isinstance(value.get("message"), dict)
    )


def read(values: NumberedValues, _keys: FieldNames) -> Iterator[Run]:
    """Yield one run per session of a file, in the order of their first lines."""
    sessions: dict[str, list[tuple[int, Event]]] = {}
    seen: Counter[tuple[str, str]] = Counter()  # a resumed session may repeat lines of the session that it continues
    queued: dict[str, list[str]] = {}
    for line, value in values:
        if text := _queued(value):
            queued.setdefault(str(value.get("sessionId")), []).append(text)
        if isinstance(value, dict) and isinstance(value.get("uuid"), str):
            session = str(value.get("sessionId"))
            seen[session, value["uuid"]] += 1
            if seen[session, value["uuid"]] == 1:
                sessions.setdefault(session, []).append((line, value))
    for name, events in sessions.items():
        if any(recognises(event) for _, event in events):
            run = _session(name, events)
            said = [turn.text for turn in run.turns if turn.role == "user"]
            lost = sum(not any(text in each for each in said) for text in queued.get(name, ()))
            run.lost["messages that the user typed while the agent worked"] += lost
            run.lost["repeated lines"] += sum(count - 1 for (session, _), count in seen.items() if session == name)
            yield run


def _queued(event: Any) -> str | None:
    """Return what the user typed while the agent worked; most of it also appears later as a user message."""
    if not isinstance(event, dict) or event.get("operation") != "enqueue":
        return None
    text = event.get("content")
    return text.strip() or None if isinstance(text, str) and not _INJECTED.match(text) else None


def _session(name: str, events: Sequence[tuple[int, Event]]) -> Run:
    lost: Counter[str] = Counter()
    side_chain = {event["uuid"] for _, event in events if event.get("isSidechain")}
    if len(side_chain) == len(events):  # a file of a called agent: its side chain is the run
        name, side_chain = f"{name}/{events[0][1].get('agentId') or 'agent'}", set()
    main = [event for _, event in events if event["uuid"] not in side_chain]
    lost["messages of called agents"] += sum(recognises(event) for _, event in events if event["uuid"] in side_chain)
    kept = _active(main, lost)
    run = Run([], lost, trajectory_id=name, line=events[0][0])
    answers: dict[str, int] = {}
    for index, event in enumerate(main):
        if event["uuid"] in kept:
            _add(run.turns, event, index, answers, lost)
        elif recognises(event):
            lost["messages on abandoned branches"] += 1
    return run


def _active(events: Sequence[Event], lost: Counter[str]) -> set[str]:
    """Return the events on the branch on which the session ended."""
    parents: dict[str, str | None] = {}
    before: dict[str, str | None] = {}
    previous: str | None = None
    for event in events:
        parents[event["uuid"]] = event.get("parentUuid") or event.get("logicalParentUuid")
        before[event["uuid"]], previous = previous, event["uuid"]
    path: set[str] = set()
    event_id = next((event["uuid"] for event in reversed(events) if recognises(event)), None)
    while event_id is not None and event_id not in path:
        path.add(event_id)
        parent = parents[event_id]
        if parent is not None and parent not in parents:  # the parent is in another file: use the previous line instead
            lost["messages whose parent is not in the file"] += 1
            parent = before[event_id]
        event_id = parent
    answers = {event["message"].get("id") for event in events if event["uuid"] in path and event["type"] == "assistant"}
    answers.discard(None)
    path |= {event["uuid"] for event in events if recognises(event) and event["message"].get("id") in answers}
    calls = {call for event in events if event["uuid"] in path for call in _ids(event, "tool_use", "id")}
    return path | {event["uuid"] for event in events if calls & {*_ids(event, "tool_result", "tool_use_id")}}


def _ids(event: Event, kind: str, key: str) -> Iterator[str]:
    content = event["message"].get("content") if recognises(event) else None
    for part in content if isinstance(content, list) else ():
        if isinstance(part, dict) and part.get("type") == kind and isinstance(part.get(key), str):
            yield part[key]


def _add(turns: list[Turn], event: Event, index: int, answers: dict[str, int], lost: Counter[str]) -> None:
    """Append the turns of an event, or extend an answer that has begun (`answers`: message id -> its position)."""
    attachment = event.get("attachment")
    if isinstance(attachment, dict) and attachment.get("type") == "queued_command":
        if attachment.get("commandMode", "prompt") == "prompt":  # what the user typed while the agent worked
            message = {"role": "user", "content": attachment.get("prompt")}
            turns += [replace(turn, index=index) for turn in read_message(message, lost)]
        return
    if not recognises(event):
        lost[f"entries of type {str(event.get('type'))[:40]}"] += event.get("type") not in _BOOKKEEPING
        return
    message = event["message"]
    injected = isinstance(message.get("content"), str) and _INJECTED.match(message["content"])
    if event.get("isMeta") or event.get("isApiErrorMessage") or injected:
        lost["harness messages"] += 1
        return
    if event.get("isCompactSummary") and any(turn.role == "agent" for turn in turns):
        lost["redundant summaries"] += 1
        return
    added = [replace(turn, index=index) for turn in read_message({"role": event["type"]} | message, lost)]
    if event["type"] == "assistant" and (begun := answers.get(message.get("id"))) is not None:
        for part in added:
            turns[begun] = joined(turns[begun], part)
        return
    if event["type"] == "assistant" and message.get("id"):
        answers[message["id"]] = len(turns)
    turns += added


READER = Reader("claude-code", recognises, every=read)
