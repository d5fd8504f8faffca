"""Rollouts of Codex: `{timestamp, type, payload}` per line, or only the payload in older files.

The thought, text and calls of one answer are separate lines; an answer ends at a result or another message. The
payloads are items of OpenAI's Responses API, which are also read without the lines around them. Text that Codex injects
as user messages (`<environment_context>` and similar) is not treated as user input.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from prmkit.trajectories.content import Parts, as_text, mapping, read_call, read_message, turns_of
from prmkit.trajectories.run import FieldNames, NumberedValues, Reader, Run, Turn, joined
from prmkit.trajectory import Call, Result

_INJECTED = re.compile(
    r"\s*(?:<(?:environment_context|user_instructions|permissions instructions|turn_aborted|skills_instructions)"
    r"|# AGENTS\.md instructions)"
)
_CALLS = {"function_call", "custom_tool_call", "local_shell_call", "tool_search_call", "web_search_call",
          "shell_call", "apply_patch_call"}  # fmt: skip
_REPEATED = {"event_msg", "turn_context", "None"}
"""Types of lines that only repeat the items for display; `None` is for lines without a type in older files."""
_OUTPUTS = {"function_call_output", "custom_tool_call_output", "tool_search_output", "mcp_tool_call_output",
            "local_shell_call_output", "shell_call_output", "apply_patch_call_output"}  # fmt: skip


def recognises(value: Any) -> bool:
    """Return whether a value is a `session_meta` or `response_item` with a payload or (older) a call or output."""
    if not isinstance(value, dict):
        return False
    if value.get("type") in ("session_meta", "response_item") and isinstance(value.get("payload"), dict):
        return True
    return str(value.get("type")) in _CALLS | _OUTPUTS and "call_id" in value


def read(values: NumberedValues, _keys: FieldNames) -> Iterator[Run]:
    """Yield the only run of a file."""
    lost: Counter[str] = Counter()
    run = Run([], lost)
    for index, (line, value) in enumerate(values):
        run.line = run.line or line
        if not isinstance(value, dict):
            lost["lines that are not objects"] += 1
            continue
        kind, payload = _kind(value), value.get("payload")
        if kind == "session_meta" and isinstance(payload, dict):
            run.trajectory_id = run.trajectory_id or as_text(payload.get("id")) or None
        elif kind == "response_item" and isinstance(payload, dict):
            _add(run, payload, index)
        elif payload is None and kind in {"message", "reasoning"} | _CALLS | _OUTPUTS:
            _add(run, value, index)
        elif kind == "event_msg" and mapping(payload).get("type") == "thread_rolled_back":
            _undo(run, mapping(payload).get("num_turns"))
        elif kind == "compacted":
            lost["redundant summaries"] += 1
        elif kind not in _REPEATED:
            lost[f"entries of type {kind[:40]}"] += 1
    yield run


def is_item_list(value: Any) -> bool:
    """Return whether a value is a list of Responses API items: messages, and at least one call, result or thought."""
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        return False
    return any(map(_is_item, value)) and all(item.get("role") or _is_item(item) for item in value)


def _is_item(item: Mapping[str, Any]) -> bool:
    return recognises(item) or (item.get("type") == "reasoning" and "summary" in item)


def turns_of_list(items: Sequence[Any], lost: Counter[str]) -> list[Turn]:
    """Return the turns of a list of messages, or of items of the Responses API."""
    if not any(isinstance(item, dict) and _is_item(item) for item in items):
        return turns_of(items, lost)
    run = Run([], lost)
    for index, item in enumerate(items):
        _add(run, mapping(item), index)
    return run.turns


def _kind(item: Mapping[str, Any]) -> str:
    """Return the type of an item; a message may have only a role."""
    return str(item.get("type") or ("message" if item.get("role") else None))


def _add(run: Run, item: Mapping[str, Any], index: int) -> None:
    kind, lost = _kind(item), run.lost
    if kind == "message" and (item.get("tool_calls") or item.get("role") == "tool"):  # a message of the older API
        run.turns += [replace(turn, index=index) for turn in read_message(item, lost)]
    elif kind == "message":
        parts = Parts(lost)
        parts.add(item.get("content"))
        if item.get("role") == "assistant":
            _continue(run, Turn("agent", parts.text(), index=index), new=bool(_open(run) and run.turns[-1].text))
        elif item.get("role") == "user" and not _INJECTED.match(parts.text()):
            run.turns.append(Turn("user", parts.text(), index=index))
        elif item.get("role") in ("developer", "system") and not any(turn.role == "system" for turn in run.turns):
            run.turns.append(Turn("system", parts.text(), index=index))
        else:
            lost["harness messages"] += 1
    elif kind == "reasoning":
        parts = Parts(lost)
        parts.add(item.get("summary") or item.get("content"))
        thought = "\n\n".join(filter(None, (*parts.thoughts, parts.text())))
        lost["thoughts that are hidden or encrypted"] += not thought
        if thought:
            _continue(run, Turn("agent", "", thought, index=index), new=_open(run) and bool(run.turns[-1].calls))
    elif kind in _CALLS:
        if call := _call(item, lost):
            _continue(run, Turn("agent", calls=(call,), index=index), new=False)
    elif kind in _OUTPUTS:
        output = item.get("output")
        parts = Parts(lost, "result")
        parts.add(output.get("content", output) if isinstance(output, dict) else output)
        failed = isinstance(output, dict) and output.get("success") is False
        result = Result(parts.text(), as_text(item.get("call_id")) or None, failed)
        run.turns.append(Turn("tool", results=(result,), index=index))
    else:
        lost[f"items of type {kind[:40]}"] += 1


def _undo(run: Run, turns: Any) -> None:
    """Drop the last user messages and everything after them: the session continued from the point before them."""
    places = [place for place, turn in enumerate(run.turns) if turn.role == "user"]
    if isinstance(turns, int) and turns > 0 and places:
        begin = places[max(len(places) - turns, 0)]
        run.lost["messages of turns that were undone"] += sum(turn.role != "tool" for turn in run.turns[begin:])
        del run.turns[begin:]


def _open(run: Run) -> bool:
    """Return whether the last turn is an answer that may continue."""
    return bool(run.turns) and run.turns[-1].role == "agent"


def _continue(run: Run, more: Turn, *, new: bool) -> None:
    if new or not _open(run):
        run.turns.append(more)
    else:
        run.turns[-1] = joined(run.turns[-1], more)


def _call(item: Mapping[str, Any], lost: Counter[str]) -> Call | None:
    if item["type"] in ("function_call", "custom_tool_call"):
        call = read_call({"arguments": item.get("arguments", {"input": item.get("input")})} | dict(item), lost)
        return replace(call, id=as_text(item.get("call_id")) or call.id) if call else None
    name, arguments = item["type"].removesuffix("_call"), item.get("action") or item.get("arguments")
    return Call(name, arguments, as_text(item.get("call_id")) or None)


READER = Reader("codex", recognises, every=read)
