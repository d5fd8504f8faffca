"""Runs as one tagged string: `<think>`, `<tool_call>`, `<result>`, `<answer>`, in `sft_data.output` or `raw_response`.

A step begins with a thought, or with a call or an answer that follows a result; text outside the tags counts as the
agent's text. The second half of this module reads text rendered by a chat template, with its special tokens.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from prmkit.layouts import exact_loads
from prmkit.trajectories.content import ROLES, mapping, read_call, turns_of
from prmkit.trajectories.run import FieldNames, Reader, Run, Turn, UnreadableValue
from prmkit.trajectories.run_fields import describe, first_of
from prmkit.trajectory import Call, Result

_TAG = re.compile(r"<(think|sub_task_think|tool_call|result|answer)>(.*?)</\1>", re.DOTALL)
_BROKEN = re.compile(r"</?(?:think|sub_task_think|tool_call|result|answer)>")


def recognises(value: Any) -> bool:
    """Return whether a value has tagged `sft_data.output` or `raw_response`, and the task."""
    texts = _texts(value)
    return texts is not None and _TAG.search(texts[1]) is not None


def _texts(value: Any) -> tuple[str, str] | None:
    """Return the task and the tagged text; None if the value does not have them."""
    data, names = mapping(mapping(value).get("sft_data")), ("instruction", "output")
    if not data:
        data, names = mapping(value), ("task_description", "raw_response")
    task, text = (data.get(name) for name in names)
    return (task, text) if isinstance(task, str) and isinstance(text, str) else None


def read(value: Any, keys: FieldNames) -> Iterator[Run]:
    """Yield the run of one value."""
    if not (texts := _texts(value)):
        raise UnreadableValue("no tagged text")
    task, text = texts
    lost: Counter[str] = Counter()
    run = Run(turns_of_tags(text, lost), lost, task=task, reference=first_of(value, ("answer",)))
    read_here = ("sft_data", "task_description", "raw_response", "final_result", "conversations")
    describe(run, value, keys, read=(*read_here, "tool_call_statistics"))
    yield run


def turns_of_tags(text: str, lost: Counter[str]) -> list[Turn]:
    """Return the steps of a tagged text."""
    turns: list[Turn] = []
    step: dict[str, Any] = {}
    end = 0

    def close() -> None:
        nonlocal step
        if step:
            turns.append(_turn(step, len(turns)))
        step = {}

    for match in _TAG.finditer(text):
        tag, body, between = match.group(1), match.group(2).strip(), text[end : match.start()].strip()
        end = match.end()
        lost["broken tags"] += len(_BROKEN.findall(between)) + len(_BROKEN.findall(body))
        if between:
            if "results" in step:
                close()
            step.setdefault("texts", []).append(between)
        if tag != "result" and (
            "results" in step or (tag.endswith("think") and ("calls" in step or "answered" in step))
        ):
            close()
        _add(step, tag, body, lost)
    if rest := text[end:].strip():
        lost["broken tags"] += len(_BROKEN.findall(rest))
        if "results" in step:
            close()
        step.setdefault("texts", []).append(rest)
    close()
    return turns


def _add(step: dict[str, Any], tag: str, body: str, lost: Counter[str]) -> None:
    if tag == "tool_call":
        step.setdefault("calls", []).append(_call(body, lost))
    elif tag == "result":
        step.setdefault("results", []).append(Result(body))
    else:
        step.setdefault("thoughts" if tag.endswith("think") else "texts", []).append(body)
        if tag == "answer":
            step["answered"] = True


def _call(body: str, lost: Counter[str]) -> Call:
    try:
        call = read_call(exact_loads(body), lost)
    except orjson.JSONDecodeError:
        lost["calls that are not JSON"] += 1
        call = None
    return call or Call("tool_call", body)


def _turn(step: Mapping[str, Any], index: int) -> Turn:
    texts, thoughts = ("\n\n".join(step.get(key, ())) for key in ("texts", "thoughts"))
    return Turn("agent", texts, thoughts, tuple(step.get("calls", ())), tuple(step.get("results", ())), index=index)


READER = Reader("tagged", recognises, one=read, own_keys=True)


# --- the text of a chat template --------------------------------------------------------------------------------------

_NOT_TEXT = (
    r"<\|(?:begin_of_text|endoftext|end_of_text|im_end|eot_id|eom_id|end|pad|finetune_right_pad_id)\|>|<s>|</s>|<bos>|"
    r"<eos>|<pad>|<end_of_turn>|<｜(?:begin▁of▁sentence|end▁of▁sentence|▁pad▁)｜>|\[gMASK\]|<sop>"
)
LEADING = re.compile(rf"\A(?:{_NOT_TEXT})+")
"""Special tokens at the beginning of a text: a decoded query may have one that its prompt does not."""
_BEFORE = re.compile(rf"\A(?:\s|{_NOT_TEXT})+")
_AFTER = re.compile(rf"(?:{_NOT_TEXT})\Z")
_LONGEST_TOKEN = 40


@dataclass(frozen=True)
class Chat:
    """The format in which a family of chat templates writes messages."""

    message: re.Pattern[str]
    """One message: `role`, `text`, and `end`, which is empty if the message is still open."""
    begins: re.Pattern[str]
    """Matches the beginning of a prompt."""
    occurs: re.Pattern[str]
    """Matches what only text in this format contains: a mere mention of a token is not enough."""
    answer: str
    """The beginning of an answer of the agent."""
    rewritten: Callable[[str], str]
    """Rewrites tool calls and everything else that is outside of messages."""


def _chat(
    begin: str,
    roles: str,
    after: str,
    ends: Sequence[str],
    answer: str,
    begins: str = "",
    occurs: str = "",
    rewritten: Callable[[str], str] = str,
) -> Chat:
    end = "|".join(map(re.escape, ends))
    role = begin.replace("ROLE", f"(?P<role>{roles})")
    following = begin.replace("ROLE", f"(?:{roles})")
    return Chat(
        re.compile(f"{role}{after}(?P<text>.*?)(?P<end>{end}|(?={following})|\\Z)", re.DOTALL),
        re.compile(begins or following + after, re.DOTALL),
        re.compile(occurs or following + after, re.DOTALL),
        answer,
        rewritten,
    )


def _tagged_call(name: str, arguments: str) -> str:
    """Return a call in the format of Qwen and Hermes, which `_agent_message` reads."""
    body = json.dumps({"name": name.strip(), "arguments": arguments}, ensure_ascii=False).replace("<", "\\u003c")
    return f"<tool_call>{body}</tool_call>"


def _tagged_calls(body: str) -> str:
    """Put one JSON call, or each of a list, into the tags of Qwen and Hermes; anything else into a single such tag."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        value = None
    calls = value if isinstance(value, list) else [value]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        return f"<tool_call>{body.strip()}</tool_call>"
    bodies = [json.dumps(call, ensure_ascii=False).replace("<", "\\u003c") for call in calls]
    return "".join(f"<tool_call>{each}</tool_call>" for each in bodies)


_LLAMA_CALL = re.compile(r"<\|python_tag\|>(.*?)(?=<\|eo[tm]_id\|>|<\|start_header_id\|>|\Z)", re.DOTALL)
_LLAMA_JSON = re.compile(
    r"(<\|start_header_id\|>assistant<\|end_header_id\|>\s*)"
    r'([\[{]\s*\{?\s*"(?:name|parameters)"\s*:(?:(?!<\|eo[tm]_id\|>|<\|start_header_id\|>).)*[\]}])(?=\s*(?:<\|eo[tm]_id\|>|\Z))',
    re.DOTALL,
)


def _llama(text: str) -> str:
    text = _LLAMA_CALL.sub(lambda found: _tagged_calls(found[1]), text)
    return _LLAMA_JSON.sub(lambda found: found[1] + _tagged_calls(found[2]), text)


_GLM_CALL = re.compile(r"(?<=<\|assistant\|>)\s*([\w.-]+)\n(\{[^<]*\})\s*(?=<\|observation\|>)")


def _glm(text: str) -> str:
    return _GLM_CALL.sub(lambda found: _tagged_call(found[1], found[2]), text)


_DEEPSEEK_ROLE = re.compile(r"<｜(?:System|User|Assistant|Tool)｜>")
_DEEPSEEK_CALL = re.compile(
    r"<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>([^\n<]+)\n```json\n(.*?)\n```|([^\n<]+)<｜tool▁sep｜>(.*?))\s*"
    r"(?:<｜tool▁call▁end｜>|\Z)",
    re.DOTALL,
)
_DEEPSEEK_RESULT = re.compile(r"<｜tool▁output▁begin｜>(.*?)(?:<｜tool▁output▁end｜>|\Z)", re.DOTALL)
_DEEPSEEK_LISTS = re.compile(r"\s*<｜tool▁(?:calls|outputs)▁(?:begin|end)｜>\s*")


def _deepseek(text: str) -> str:
    text = _DEEPSEEK_CALL.sub(lambda found: _tagged_call(found[1] or found[3], found[2] or found[4] or ""), text)
    end = "<｜end▁of▁sentence｜>"
    text = _DEEPSEEK_RESULT.sub(lambda found: f"{end}<｜Tool｜>{found[1]}{end}<｜Assistant｜>", text)
    text = _DEEPSEEK_LISTS.sub("", text).replace("<｜Assistant｜></think>", "<｜Assistant｜>")
    first = _DEEPSEEK_ROLE.search(text)
    system = without_tokens(text[: first.start()]) if first else ""  # its template marks every role except this one
    return f"<｜System｜>{system}{end}{text[first.start() :]}" if first and system else text


_MISTRAL = (
    (
        re.compile(r"\[(SYSTEM_PROMPT|AVAILABLE_TOOLS)\]((?:(?!\[\1\]).)*?)\[/\1\]", re.DOTALL),
        r"<|im_start|>system\n\2<|im_end|>\n",
    ),
    (
        re.compile(r"\[INST\]\s*<<SYS>>((?:(?!\[INST\]).)*?)<</SYS>>\s*", re.DOTALL),
        r"<|im_start|>system\n\1<|im_end|>\n<|im_start|>user\n",
    ),
    (re.compile(r"\[INST\]\s*"), "<|im_start|>user\n"),
    (re.compile(r"\s*\[/INST\]\s*"), "<|im_end|>\n<|im_start|>assistant\n"),
    (re.compile(r"\[TOOL_RESULTS\]\s*(?:[\w-]*\[TOOL_CONTENT\])?\s*"), "<|im_end|>\n<|im_start|>tool\n"),
    (re.compile(r"\s*\[/TOOL_RESULTS\]\s*"), "<|im_end|>\n<|im_start|>assistant\n"),
    (re.compile(r"\[THINK\]"), "<think>"),
    (re.compile(r"\[/THINK\]"), "</think>"),
    (re.compile(r"</s>"), "<|im_end|>\n"),
)
"""Mistral marks only the user's turns; rewritten as ChatML, answers also have an end."""
_MISTRAL_CALL = re.compile(r"\[TOOL_CALLS\](.*?)(?=\[TOOL_CALLS\]|\[TOOL_RESULTS\]|</s>|\[INST\]|\Z)", re.DOTALL)
_MISTRAL_NAMED = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\][\w-]*)?\s*(?:\[ARGS\])?\s*(\{.*)", re.DOTALL)


def _mistral(text: str) -> str:
    def calls(found: re.Match[str]) -> str:
        named = _MISTRAL_NAMED.fullmatch(found[1])
        return _tagged_call(named[1], named[2]) if named else _tagged_calls(found[1])

    text = _MISTRAL_CALL.sub(calls, text)
    for pattern, chatml in _MISTRAL:
        text = pattern.sub(chatml, text)
    return text


_ANY = "system|developer|user|assistant|tool|observation|ipython|model"
_CHATML = (r"<\|im_start\|>ROLE", _ANY, r"(?:\n|<\|im_sep\|>)", ("<|im_end|>",), "<|im_start|>assistant\n")
CHATS = (
    _chat(*_CHATML),
    _chat(
        r"<\|start_header_id\|>ROLE<\|end_header_id\|>", _ANY, r"\n*", ("<|eot_id|>", "<|eom_id|>"),
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        occurs=rf"<\|start_header_id\|>(?:{_ANY})<\|end_header_id\|>|<\|python_tag\|>",
        rewritten=_llama,
    ),
    _chat(r"<start_of_turn>ROLE", _ANY, r"\n", ("<end_of_turn>",), "<start_of_turn>model\n"),
    _chat(
        r"<｜ROLE｜>", "System|User|Assistant|Tool", "", ("<｜end▁of▁sentence｜>",), "<｜Assistant｜>",
        begins=r"<｜(?:System|User)｜>|(?<=<｜begin▁of▁sentence｜>).*<｜User｜>|"
        r"(?=.*<｜User｜>)(?>.*<｜Assistant｜>)\s*(?:</?think>\s*)*\Z",
        occurs=r"<｜(?:User|Assistant|Tool)｜>\s*\Z|<｜end▁of▁sentence｜>\s*<｜(?:User|Assistant|Tool)｜>|<｜tool▁\w+｜>",
        rewritten=_deepseek,
    ),
    _chat(
        *_CHATML,
        begins=r"\[(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS)\]",
        occurs=r"\[/INST\]\s*\Z|\[TOOL_CALLS\]\s*(?:\[\s*[{\]]|[\w.-]+\s*(?:\[ARGS\]|\[CALL_ID\]|\{))|"
        r"\[/TOOL_RESULTS\]",
        rewritten=_mistral,
    ),
    _chat(
        r"<\|ROLE\|>", _ANY, r"\n?", ("<|end|>", "<|endoftext|>", "</s>"), "<|assistant|>\n",
        occurs=rf"(?:<\|end\|>|<\|endoftext\|>|</s>)\s*<\|(?:{_ANY})\|>|<\|(?:{_ANY})\|>\s*(?:\n|\Z)",
        rewritten=_glm,
    ),
)  # fmt: skip
"""ChatML (Qwen, many others), Llama 3, Gemma, DeepSeek, Mistral and Llama 2, and Phi, Zephyr and GLM."""
_SPECIAL = re.compile(
    r"<\|[\w.-]{1,40}\|>|<｜[^｜<>\s]{1,40}｜>|\[\|\w{1,40}\|\]|<\|turn>|<turn\|>|<extra_id_\d+>|<seed:\w+>|\]~b\]"
)
"""Matches what looks like a special token of any model family."""
_KNOWN = re.compile(
    rf"{_NOT_TEXT}|<\|(?:im_start|im_sep|start_header_id|end_header_id|python_tag|{_ANY}|fim_\w+|repo_name|file_sep|"
    r"(?:vision|image|video|box|quad|object_ref)_\w+|reserved_special_token_\d+)\|>|<｜(?:System|User|Assistant|Tool)｜>|"
    r"<｜(?:tool|fim)▁\w+｜>"
)
"""Special tokens of the families in `CHATS`."""
_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_ANSWER = re.compile(r"<tool_response>(.*?)(?:</tool_response>|\Z)", re.DOTALL)


def chat_at_beginning(prompt: str) -> Chat | None:
    """Return the format of a prompt; None if it does not begin like one of the formats."""
    leading = _BEFORE.match(prompt)
    return next((chat for chat in CHATS if chat.begins.match(prompt, leading.end() if leading else 0)), None)


def chat_in(text: str) -> Chat | None:
    """Return the format of the messages in a text, wherever they begin; None if it contains no messages."""
    return next((chat for chat in CHATS if chat.occurs.search(text)), None)


def is_special(text: str) -> bool:
    """Return whether a text begins with a special token of any model family."""
    return _SPECIAL.match(text) is not None


def unread_token(text: str) -> str | None:
    """Return the first special token of a model family that is not in `CHATS`."""
    return next((found[0] for found in _SPECIAL.finditer(text) if not _KNOWN.fullmatch(found[0])), None)


def without_tokens(text: str) -> str:
    """Return text without the special tokens and the whitespace around it."""
    text = _BEFORE.sub("", text).rstrip()
    while found := _AFTER.search(text, max(0, len(text) - _LONGEST_TOKEN)):
        text = text[: found.start()].rstrip()
    return text


def is_agent(role: str) -> bool:
    """Return whether a message of this role is the agent's."""
    return ROLES.get(role.lower()) == "agent"


def turns_of_chat(chat: Chat, text: str, lost: Counter[str], *, is_open: bool = False) -> list[Turn]:
    """Return the turns of a text in the format of a chat template.

    Args:
        chat: the format.
        text: the messages.
        lost: counts text outside of messages.
        is_open: drop the last message if it has no end token.
    """
    text, end = chat.rewritten(text), 0
    messages: list[dict[str, Any]] = []
    for found in chat.message.finditer(text):
        lost["text outside of messages"] += bool(without_tokens(text[end : found.start()]))
        end = found.end()
        if is_open and end == len(text) and not found["end"]:
            break
        messages += _messages(found["role"].lower(), without_tokens(found["text"]))
    lost["text outside of messages"] += bool(without_tokens(text[end:]))
    return turns_of(messages, lost)


def _messages(role: str, content: str) -> list[dict[str, Any]]:
    if is_agent(role):
        return [_agent_message(content)] if content else []
    answers = _ANSWER.findall(content)  # Qwen and Hermes write tool results in user messages
    rest = _ANSWER.sub("\n", content).strip()
    results = [{"role": "tool", "content": answer.strip()} for answer in answers]
    return [*results, *([{"role": role, "content": rest}] if rest else [])]


def _agent_message(content: str) -> dict[str, Any]:
    calls = []
    for body in _CALL.findall(content):
        try:
            call = json.loads(body)
        except (ValueError, RecursionError):
            call = None
        known = isinstance(call, dict) and isinstance(call.get("name"), str)
        calls.append(call if known else {"name": "tool_call", "arguments": body.strip()})
    return {"role": "assistant", "content": _CALL.sub("", content).strip(), "tool_calls": calls}
