"""Convert a message of any framework into turns.

OpenAI chat (`tool_calls`, the older `function_call`), ShareGPT (`from`, `value`), Anthropic blocks, LangChain (`type`,
or serialised with `lc`), tau2 (`requestor`), OTel GenAI (`parts`), parts of Vercel's AI SDK, of Bedrock's Converse
(`toolUse`) and of Gemini (`functionCall`). The dialects may be mixed: each message is read according to its own fields.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import orjson

from prmkit.layouts import exact_loads
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
_TEXT_KEYS = {"type", "text", "content", "refusal", "id", "index", "annotations", "citations", "logprobs", "extras",
              "cache_control", "thought", "thoughtSignature", "thought_signature", "signature", "state",
              "providerOptions", "providerMetadata", "experimental_providerMetadata", "_meta"}  # fmt: skip
"""Keys of a text part. An object with any other key is data that a tool returned."""
_THOUGHT_PARTS = {"thinking", "reasoning", "thought", "reasoning_text", "redacted_thinking",
                  "reasoning.text", "reasoning.summary", "reasoning.encrypted"}  # fmt: skip
_KEYED_PARTS = {"toolUse": "tool_use", "toolResult": "tool_result", "functionCall": "function_call",
                "function_call": "function_call", "functionResponse": "tool_result",
                "function_response": "tool_result", "reasoningContent": "thinking", "cachePoint": "cache_point",
                "inlineData": "inline_data", "inline_data": "inline_data", "fileData": "file_data",
                "file_data": "file_data", "image": "image", "document": "document", "video": "video"}  # fmt: skip
"""Key of a Bedrock or Gemini part -> the name of its type in the other formats."""
_RETURNED = ("response", "result", "output")
_AI_SDK_OUTPUTS = {"text", "json", "content", "error-text", "error-json", "execution-denied"}
_MEDIA = re.compile(
    r"(?:input_|output_)?(?:image|audio|video|file|document|blob|uri|media)(?:_ur[li]|_data)?|inline_data"
)
_MEDIA_KEYS = {"source", "data", "url", "uri", "file", "file_id", "file_data", "file_uri", "file_url", "fileUri",
               "image", "image_url", "audio", "audio_url", "input_audio", "video", "video_url", "document", "base64",
               "mime_type", "mimeType", "media_type", "mediaType"}  # fmt: skip
_MEDIA_LISTS = ("images", "image", "videos", "audios", "audio", "attachments", "experimental_attachments")
"""Fields of a message that contain media."""
_MARKS = {"step_start", "cache_point"}
"""Types of parts without content."""
_THINK = re.compile(r"\s*<think(?:ing)?>(.*?)</think(?:ing)?>\s*", re.DOTALL)


def parsed(value: Any) -> Any:
    """Return a value, decoded if it is a JSON string."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return exact_loads(value)
        except orjson.JSONDecodeError:
            return value
    return value


def role_name(message: Any) -> str | None:
    """Return a message's role as in the source, in lower case; None for a value that is not a message."""
    if not isinstance(message, dict):
        return None
    message = unwrapped(message)
    role = message.get("role") or message.get("from") or _adk_role(message)
    if isinstance(role, str):
        return role.strip().lower() or None
    kind = str(message.get("type", "")).removesuffix("Chunk").removesuffix("Message").lower()
    return kind if kind in _LANGCHAIN_TYPES and ("content" in message or "tool_calls" in message) else None


def _adk_role(event: Mapping[str, Any]) -> Any:
    content = event.get("content")
    return content.get("role") if isinstance(content, dict) and isinstance(content.get("parts"), list) else None


def is_message_list(value: Any) -> bool:
    """Return whether a value is a list of messages, judging by its first and last elements."""
    return isinstance(value, list) and bool(value) and bool(role_name(value[0])) and bool(role_name(value[-1]))


def unwrapped(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Unwrap a message of LangChain or of a list of choices (ART)."""
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
    """Return the turns of a list of messages, each with the index of its message."""
    turns: list[Turn] = []
    for index, message in enumerate(messages):
        if role_name(message) is None:
            lost["non-message entries"] += 1
        else:
            turns += [replace(turn, index=index) for turn in read_message(message, lost)]
    return turns


def read_message(message: Mapping[str, Any], lost: Counter[str]) -> list[Turn]:
    """Return the turns of one message: several if a user message also has tool results.

    Args:
        message: a message in which `role_name` finds a role.
        lost: counts dropped or irregular content.
    """
    name, message = role_name(message) or "", unwrapped(message)
    role = ROLES.get(name)
    if name == "function_call":  # ShareGPT: the call is a separate turn
        return [_sharegpt_call(message, lost)]
    if name in ("tool", "tool_response") and isinstance(message.get("tool_messages"), list):  # tau2
        return [turn for each in message["tool_messages"] for turn in read_message({"role": "tool"} | each, lost)]
    if message.get("requestor") == "user":  # tau2: the user's device, not the agent's tool
        lost["user tool calls and results"] += 1
        return []
    parts = Parts(lost, "tool" if role == "tool" else "message")
    _add_content(message, parts)
    if role == "tool":
        return [Turn("tool", results=(*parts.results, *_results(message, parts)))]
    if role in ("system", "user"):
        if calls := parsed(message.get("tool_calls")):
            lost["user tool calls and results"] += len(calls) if isinstance(calls, list) else 1
        lost["user tool calls and results"] += len(parts.calls)
        speaker = message.get("name") if role == "user" and isinstance(message.get("name"), str) else None
        spoken = [Turn(role, parts.text(), speaker=speaker)] if parts.text() or not parts.results else []
        return ([Turn("tool", results=tuple(parts.results))] if parts.results else []) + spoken
    if role is None:
        lost[f"unknown roles treated as agents: {name[:40]}"] += 1
    return [_agent_turn(message, parts, str(message.get("role") or name) if role is None else None, lost)]


def _agent_turn(message: Mapping[str, Any], parts: "Parts", named: str | None, lost: Counter[str]) -> Turn:
    if not parts.thoughts and not isinstance(message.get("reasoning"), str):  # OpenRouter repeats the thoughts there
        parts.add(message.get("reasoning_details"))
    thoughts = [*parts.thoughts]
    for key in ("reasoning_content", "reasoning", "thinking", "thought"):
        value = message.get(key)
        if isinstance(value, str) and value.strip() and value not in thoughts:
            thoughts.append(value)
            break
    text = parts.text() or as_text(message.get("refusal"))
    if match := _THINK.match(text):
        thoughts.append(match.group(1).strip())
        text = text[match.end() :]
    speaker = named or message.get("name") or message.get("agent") or message.get("author")
    # Results inside an agent's message: tools that the provider ran.
    return Turn(
        "agent",
        text,
        "\n\n".join(filter(None, thoughts)),
        tuple(_calls(message, parts.calls, lost)),
        tuple(parts.results),
        speaker if isinstance(speaker, str) else None,
    )


def _add_content(message: Mapping[str, Any], parts: "Parts") -> None:
    content = message.get("content")
    if isinstance(content, dict) and isinstance(content.get("parts"), list):  # an event of Google's ADK
        message = {**message, "parts": content["parts"], "content": None}
    if isinstance(message.get("parts"), list):  # the AI SDK repeats their text in `content`
        parts.add(message["parts"])
    elif isinstance(message.get("toolInvocations"), list):
        parts.add([{"type": "tool-invocation", "toolInvocation": each} for each in message["toolInvocations"]])
    for key in _MEDIA_LISTS:
        if message.get(key):
            parts.lost[f"content of type {key}"] += len(message[key]) if isinstance(message[key], list) else 1
    if not parts.text():
        texts = (message.get(key) for key in ("content", "value", "text", "output"))
        parts.add(next((text for text in texts if text not in (None, "", [])), None))


def _calls(message: Mapping[str, Any], in_content: Sequence[Call], lost: Counter[str]) -> list[Call]:
    """Return the calls in a message's content and other fields; LangChain lists some of them in several places."""
    listed = parsed(message.get("tool_calls"))  # some tables store the list as JSON
    listed = listed or mapping(message.get("additional_kwargs")).get("tool_calls")
    found = list(in_content)
    for each in (listed, message.get("invalid_tool_calls"), message.get("function_call")):
        values = each if isinstance(each, list) else [each] if each else []
        found = _united(found, [call for value in values if (call := read_call(value, lost))])
    return found


def _united(calls: Sequence[Call], more: Sequence[Call]) -> list[Call]:
    """Concatenate two lists of calls; a call that is in both appears once.

    Calls within a list stay separate even if they share an id: DeepSeek, GLM and others use one id for parallel calls.
    A repeated call may have arguments that its first occurrence lacks: those of streamed blocks are not in the content.
    """
    found, waiting = list(calls), list(range(len(calls)))
    for call in more:
        place = next((place for place in waiting if call.id is not None and found[place].id == call.id), None)
        if place is None:
            found.append(call)
        else:
            waiting.remove(place)
            found[place] = found[place] if found[place].arguments else replace(call, name=found[place].name)
    return found


def read_call(value: Any, lost: Counter[str]) -> Call | None:
    """Return a tool call of any framework; a call without a name gives None and is counted in `lost`."""
    value = mapping(parsed(value))  # verifiers writes calls as JSON strings
    function = value.get("function")
    body = function if isinstance(function, dict) else value
    name = body.get("name") or body.get("toolName") or function  # Inspect: the function is the name
    if not isinstance(name, str) or not name:
        lost["calls without a name"] += 1
        return None
    given = next((body[key] for key in ("arguments", "args", "input", "parameters", "kwargs") if key in body), None)
    given = given or body.get("partial_json", given)  # LangChain's streamed blocks have their input only there
    identity = value.get("id") or value.get("call_id") or value.get("tool_call_id")
    identity = identity or value.get("toolCallId") or value.get("toolUseId")
    return Call(name, _arguments(given, lost), str(identity) if identity else None)


def _arguments(given: Any, lost: Counter[str]) -> Any:
    if not isinstance(given, str):
        return given
    try:
        return exact_loads(given) if given.strip() else {}
    except orjson.JSONDecodeError:
        lost["arguments that are not JSON"] += 1  # kept as the agent wrote them, because a judge should see this error
        return given


def _results(message: Mapping[str, Any], parts: "Parts") -> list[Result]:
    text = parts.text()
    if parts.results and not text:
        return []
    identity = message.get("tool_call_id") or message.get("tool_use_id") or message.get("id")
    error = message.get("error") or message.get("is_error") or message.get("status") == "error"
    text = _with_error(text, message.get("error"))
    return [Result(text, str(identity) if identity else None, bool(error))]


def _with_error(text: str, error: Any) -> str:
    """Return a tool's result, followed by its error unless the result already contains it."""
    said = as_text(mapping(error).get("message") or error) if isinstance(error, str | dict | list) else ""
    return text if said in text else f"{text}\n{said}".strip("\n")


def _sharegpt_call(message: Mapping[str, Any], lost: Counter[str]) -> Turn:
    """Return a turn that is a call, or a list of parallel calls, as JSON; a thought may precede it."""
    text, thought = as_text(message.get("value", message.get("content"))), ""
    if match := _THINK.match(text):
        thought, text = match.group(1).strip(), text[match.end() :]
    try:
        value = exact_loads(text)
    except orjson.JSONDecodeError:
        lost["calls that are not JSON"] += 1
        return Turn("agent", text, thought)
    calls = [call for each in (value if isinstance(value, list) else [value]) if (call := read_call(each, lost))]
    return Turn("agent", "" if calls else text, thought, tuple(calls))


class Parts:
    """The content of one message, sorted by kind."""

    def __init__(self, lost: Counter[str], of: Literal["message", "tool", "result"] = "message") -> None:
        """
        Args:
            of: `tool` for a tool's message, which has no thoughts or calls; `result` for what a tool returned, where
                all objects except text and media are data, whatever their `type`.
        """
        self.lost = lost
        self._of = of
        self._texts: list[str] = []
        self.thoughts: list[str] = []
        self.calls: list[Call] = []
        self.results: list[Result] = []

    def text(self) -> str:
        """Return the joined texts."""
        return "\n".join(self._texts)

    def add(self, content: Any) -> None:
        """Add a string, a part, or a list of parts to the lists by kind."""
        if isinstance(content, list):
            for part in content:
                self.add(part)
        elif isinstance(content, dict):
            self._add_part(content)
        elif content is not None and content != "":
            self._texts.append(as_text(content))

    def _add_part(self, given: Mapping[str, Any]) -> None:
        part = _typed(given, is_data=self._of != "message")
        kind = as_text(part.get("type")).lower().replace("-", "_")
        text = next((part[key] for key in ("text", "content", "refusal") if part.get(key) is not None), None)
        is_plain = self._of == "message" or part.keys() <= _TEXT_KEYS
        if kind in _TEXT_PARTS and is_plain and (text is not None or not part.keys() - {"type", "text", "content"}):
            self.add(text)
        elif self._of != "result" and kind.endswith(("tool_result", "tool_call_response", "function_call_output")):
            self.results.append(_part_result(part, self.lost))
        elif self._of == "message" and kind in _THOUGHT_PARTS:
            self._add_thought(part)
        elif self._of == "message" and kind.endswith(("tool_use", "tool_call", "function_call")):
            if call := read_call(part, self.lost):
                self.calls.append(call)
            if any(part.get(key) is not None for key in (*_RETURNED, "errorText")):  # a tool of the provider
                self.results.append(replace(_part_result(part, self.lost), call_id=call.id if call else None))
        elif _MEDIA.fullmatch(kind) and part.keys() & _MEDIA_KEYS:
            self._texts.append(f"[{kind}]")
            self.lost[f"content of type {kind}"] += 1
        elif kind == "step_start" and self._of == "message":  # the AI SDK joins all answers of its loop in one message
            self.lost["answers of the agent joined in one step"] += bool(self._texts or self.calls)
        elif kind not in _MARKS:
            if isinstance(given.get("encrypted_content"), str):  # from a search; only the provider can read it
                given = {key: value for key, value in given.items() if key != "encrypted_content"}
                self.lost["encrypted contents"] += 1
            self._texts.append(as_text(part["json"] if part.keys() == {"json"} else given))
            self.lost[f"content of type {kind[:40]}"] += bool(kind) and self._of == "message"

    def _add_thought(self, part: Mapping[str, Any]) -> None:
        names = ("thinking", "content", "text", "reasoning", "summary")
        inner = Parts(Counter(), "result")
        inner.add(next((part[name] for name in names if part.get(name)), None))
        if inner.text().strip():
            self.thoughts.append(inner.text())
        else:
            self.lost["thoughts that are hidden or encrypted"] += 1


def _typed(part: Mapping[str, Any], *, is_data: bool) -> dict[str, Any]:
    """Return a part with its `type`; Bedrock and Gemini use a key instead, and the AI SDK's may contain a tool's name.

    Args:
        part: the part as in the source.
        is_data: whether the part may also be an object that a tool returned.
    """
    found = {key: value for key, value in part.items() if value is not None}
    kind = found.get("type")
    if kind == "tool-invocation":
        return mapping(found.get("toolInvocation")) | {"type": "tool_call"}
    if isinstance(kind, str) and {"toolCallId", "state"} <= found.keys() and kind.startswith(("tool-", "dynamic-tool")):
        return {"toolName": kind.removeprefix("tool-")} | found | {"type": "tool_call"}
    if "type" not in found:
        for key, name in _KEYED_PARTS.items():
            if isinstance(inner := found.get(key), dict) and found.keys() <= {
                key,
                "thoughtSignature",
                "thought_signature",
            }:
                if name in ("image", "document", "video") and "source" not in inner:
                    break
                return {**inner, **mapping(inner.get("reasoningText")), "type": name}
        if isinstance(found.get("text"), str) and found.keys() <= ({"text", "annotations"} if is_data else _TEXT_KEYS):
            return found | {"type": "thought" if found.get("thought") is True else "text"}
    return found


def _part_result(part: Mapping[str, Any], lost: Counter[str]) -> Result:
    given = next((part[key] for key in ("content", *_RETURNED) if key in part), None)
    failed = any(part.get(key) is True for key in ("is_error", "isError")) or part.get("status") == "error"
    error = part.get("errorText") or part.get("error")
    failed = failed or bool(error)
    kind = as_text(mapping(given).get("type"))
    if kind in _AI_SDK_OUTPUTS and mapping(given).keys() <= {"type", "value", "reason", "providerOptions"}:
        failed = failed or kind not in ("text", "json", "content")
        given = mapping(given).get("value", mapping(given).get("reason", kind))
        given = as_text(given) if kind.endswith("json") else given
    inner = Parts(lost, "result")
    inner.add(given)
    identity = next((part[key] for key in ("tool_use_id", "call_id", "toolCallId", "toolUseId", "id") if part.get(key)),
                    None)  # fmt: skip
    return Result(_with_error(inner.text(), error), str(identity) if identity else None, failed)


def mapping(value: Any) -> dict[str, Any]:
    """Return a value if it is an object, otherwise an empty object."""
    return value if isinstance(value, dict) else {}


def as_text(value: Any) -> str:
    """Convert a value to text: strings unchanged, everything else as JSON."""
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False, default=str)
