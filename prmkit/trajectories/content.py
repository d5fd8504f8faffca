"""From one message to turns, in every dialect in which agents' messages are written.

OpenAI chat (`tool_calls`, the older `function_call`), ShareGPT (`from`, `value`), Anthropic blocks, LangChain (`type`,
or serialised with `lc`), tau2 (`requestor`), OTel GenAI (`parts`), Vercel AI SDK parts. The dialects may be
mixed: each message is read according to its own fields.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import orjson

from prmkit.trajectories.run import Role, Turn
from prmkit.trajectory import Call, Result

ROLES: Mapping[str, Role] = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "user_proxy": "user",
    "assistant": "agent", "ai": "agent", "gpt": "agent", "model": "agent", "agent": "agent",
    "bot": "agent", "function_call": "agent", "chatbot": "agent",
    "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool", "tool_response": "tool",
}  # fmt: skip
_LANGCHAIN_TYPES = {"human", "ai", "system", "tool", "function"}
_TEXT_PARTS = {"text", "input_text", "output_text", "summary_text", "refusal"}
_THOUGHT_PARTS = {"thinking", "reasoning", "thought", "reasoning_text"}
_MEDIA = re.compile(r"image|audio|video|file|document|blob|uri|media")
_THINK = re.compile(r"\s*<think(?:ing)?>(.*?)</think(?:ing)?>\s*", re.DOTALL)


def parsed(value: Any) -> Any:
    """A value that may be JSON in a string."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return orjson.loads(value)
        except orjson.JSONDecodeError:
            return value
    return value


def role_name(message: Any) -> str | None:
    """The role of a message as its source writes it, in lower case; None for a value that is not a message."""
    if not isinstance(message, dict):
        return None
    message = unwrapped(message)
    role = message.get("role") or message.get("from")
    if isinstance(role, str):
        return role.strip().lower() or None
    kind = str(message.get("type", "")).removesuffix("Chunk").removesuffix("Message").lower()
    return kind if kind in _LANGCHAIN_TYPES and ("content" in message or "tool_calls" in message) else None


def is_message_list(value: Any) -> bool:
    """Whether a value is a list of messages, judged by its first and its last element."""
    return isinstance(value, list) and bool(value) and bool(role_name(value[0])) and bool(role_name(value[-1]))


def unwrapped(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message without the wrapping of LangChain or of a list of choices (ART)."""
    if message.get("lc") and isinstance(message.get("kwargs"), dict):
        path = message.get("id")
        name = str(path[-1]) if isinstance(path, list) and path else ""
        return {"type": name.removesuffix("Chunk").removesuffix("Message").lower()} | mapping(message["kwargs"])
    if isinstance(message.get("data"), dict) and str(message.get("type", "")).lower() in _LANGCHAIN_TYPES:
        return {"type": message["type"]} | mapping(message["data"])
    if isinstance(message.get("message"), dict) and "finish_reason" in message:
        return mapping(message["message"])
    return message


def turns_of(messages: Sequence[Any], lost: Counter[str]) -> list[Turn]:
    """The turns of a list of messages, each with the position of its message."""
    turns: list[Turn] = []
    for index, message in enumerate(messages):
        if role_name(message) is None:
            lost["entries that are not messages"] += 1
        else:
            turns += [replace(turn, index=index) for turn in read_message(message, lost)]
    return turns


def read_message(message: Mapping[str, Any], lost: Counter[str]) -> list[Turn]:
    """The turns of one message: several if a user's message also has tool results.

    Args:
        message: one in which `role_name` finds a role.
        lost: counts what cannot be placed.
    """
    name, message = role_name(message) or "", unwrapped(message)
    role = ROLES.get(name)
    if name == "function_call":  # ShareGPT: the call is a separate turn
        return [_sharegpt_call(message, lost)]
    if name in ("tool", "tool_response") and isinstance(message.get("tool_messages"), list):  # tau2
        return [turn for each in message["tool_messages"] for turn in read_message({"role": "tool"} | each, lost)]
    if message.get("requestor") == "user":  # tau2: the user's device, not the agent's tool
        lost["calls and results of the user"] += 1
        return []
    parts = Parts(lost)
    parts.add(_content(message))
    if role == "tool":
        return [Turn("tool", results=(*parts.results, *_results(message, parts)))]
    if role in ("system", "user"):
        if message.get("tool_calls"):
            lost["calls and results of the user"] += len(message["tool_calls"])
        speaker = message.get("name") if role == "user" and isinstance(message.get("name"), str) else None
        said = [Turn(role, parts.text(), speaker=speaker)] if parts.text() or not parts.results else []
        return ([Turn("tool", results=tuple(parts.results))] if parts.results else []) + said
    if role is None:
        lost[f"roles read as an agent's name: {name[:40]}"] += 1
    return [_agent_turn(message, parts, str(message.get("role") or name) if role is None else None, lost)]


def _agent_turn(message: Mapping[str, Any], parts: "Parts", named: str | None, lost: Counter[str]) -> Turn:
    thoughts = [*parts.thoughts]
    for key in ("reasoning_content", "reasoning", "thinking", "thought"):
        value = message.get(key)
        if isinstance(value, str) and value.strip() and value not in thoughts:
            thoughts.append(value)
            break
    text = parts.text()
    if match := _THINK.match(text):
        thoughts.append(match.group(1).strip())
        text = text[match.end() :]
    speaker = named or message.get("name") or message.get("agent")
    # Results inside an agent's message: tools that ran on the model's side.
    return Turn(
        "agent",
        text,
        "\n\n".join(filter(None, thoughts)),
        _distinct([*parts.calls, *_calls(message, lost)]),
        tuple(parts.results),
        speaker if isinstance(speaker, str) else None,
    )


def _content(message: Mapping[str, Any]) -> Any:
    for key in ("content", "value", "parts", "text", "output"):
        if message.get(key) is not None:
            return message[key]
    return None


def _calls(message: Mapping[str, Any], lost: Counter[str]) -> list[Call]:
    listed = message.get("tool_calls")
    listed = listed or mapping(message.get("additional_kwargs")).get("tool_calls")
    calls = [*(listed if isinstance(listed, list) else []), *(message.get("invalid_tool_calls") or [])]
    if isinstance(message.get("function_call"), dict):
        calls.append(message["function_call"])
    return [call for each in calls if (call := read_call(each, lost))]


def _distinct(calls: Sequence[Call]) -> tuple[Call, ...]:
    """Calls without repetitions: LangChain lists those of Anthropic's models both in `content` and in `tool_calls`."""
    known = {call.id: call for call in reversed(calls) if call.id is not None}
    return tuple(call for call in calls if call.id is None or known.get(call.id) is call)


def read_call(value: Any, lost: Counter[str]) -> Call | None:
    """A tool call in any dialect; None, and counted as lost, if it has no name."""
    value = mapping(parsed(value))  # verifiers writes calls as JSON in strings
    function = value.get("function")
    body = function if isinstance(function, dict) else value
    name = body.get("name") or body.get("toolName") or function  # Inspect: the function is the name
    if not isinstance(name, str) or not name:
        lost["calls without a name"] += 1
        return None
    given = next((body[key] for key in ("arguments", "args", "input", "parameters", "kwargs") if key in body), None)
    identity = value.get("id") or value.get("call_id") or value.get("tool_call_id") or value.get("toolCallId")
    return Call(name, _arguments(given, lost), str(identity) if identity else None)


def _arguments(given: Any, lost: Counter[str]) -> Any:
    if not isinstance(given, str):
        return given
    try:
        return orjson.loads(given) if given.strip() else {}
    except orjson.JSONDecodeError:
        lost["arguments that are not JSON"] += 1  # kept as the agent wrote them: a judge should see that
        return given


def _results(message: Mapping[str, Any], parts: "Parts") -> list[Result]:
    text = parts.text()
    if parts.results and not text:
        return []
    identity = message.get("tool_call_id") or message.get("tool_use_id") or message.get("id")
    error = message.get("error") or message.get("is_error") or message.get("status") == "error"
    if error and not text:
        text = as_text(mapping(error).get("message") or error) if error is not True else ""
    return [Result(text, str(identity) if identity else None, bool(error))]


def _sharegpt_call(message: Mapping[str, Any], lost: Counter[str]) -> Turn:
    """A turn that is a call, or a list of parallel calls, as JSON; a thought may precede it."""
    text, thought = as_text(message.get("value", message.get("content"))), ""
    if match := _THINK.match(text):
        thought, text = match.group(1).strip(), text[match.end() :]
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        lost["calls that are not JSON"] += 1
        return Turn("agent", text, thought)
    calls = [call for each in (value if isinstance(value, list) else [value]) if (call := read_call(each, lost))]
    return Turn("agent", "" if calls else text, thought, tuple(calls))


class Parts:
    """The content of one message, sorted by kind."""

    def __init__(self, lost: Counter[str]) -> None:
        self._lost = lost
        self._texts: list[str] = []
        self.thoughts: list[str] = []
        self.calls: list[Call] = []
        self.results: list[Result] = []

    def text(self) -> str:
        """The texts, joined."""
        return "\n".join(self._texts)

    def add(self, content: Any) -> None:
        """Sort in a string, a part, or a list of parts."""
        if isinstance(content, list):
            for part in content:
                self.add(part)
        elif isinstance(content, dict):
            self._add_part(content)
        elif content is not None and content != "":
            self._texts.append(as_text(content))

    def _add_part(self, part: Mapping[str, Any]) -> None:
        kind = str(part.get("type", "text" if "text" in part else "")).lower().replace("-", "_")
        if kind in _TEXT_PARTS:
            self.add(next((part[key] for key in ("text", "content", "refusal") if part.get(key) is not None), None))
        elif kind in _THOUGHT_PARTS:
            thought = next((part[key] for key in ("thinking", "content", "text", "reasoning") if part.get(key)), None)
            self._add_thought(thought)
        elif kind.endswith(("tool_use", "tool_call", "function_call")):
            if call := read_call(part, self._lost):
                self.calls.append(call)
        elif kind.endswith(("tool_result", "tool_call_response", "function_call_output")):
            self.results.append(_part_result(part, self._lost))
        elif _MEDIA.search(kind):
            self._texts.append(f"[{kind}]")
            self._lost[f"content of type {kind}"] += 1
        elif not kind:  # an object where text is expected: a structured result
            self._texts.append(as_text(part))
        else:
            self._lost[f"content of type {kind[:40]}"] += 1

    def _add_thought(self, thought: Any) -> None:
        if isinstance(thought, str) and thought.strip():
            self.thoughts.append(thought)
        else:
            self._lost["thoughts that are hidden or encrypted"] += 1


def _part_result(part: Mapping[str, Any], lost: Counter[str]) -> Result:
    inner = Parts(lost)
    inner.add(next((part[key] for key in ("content", "response", "result", "output") if key in part), None))
    identity = part.get("tool_use_id") or part.get("call_id") or part.get("toolCallId") or part.get("id")
    return Result(inner.text(), str(identity) if identity else None, part.get("is_error") is True)


def mapping(value: Any) -> dict[str, Any]:
    """A value that should be an object; an empty object if it is something else."""
    return value if isinstance(value, dict) else {}


def as_text(value: Any) -> str:
    """A value as text: strings unchanged, everything else as JSON."""
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False, default=str)
