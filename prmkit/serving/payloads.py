"""Convert request bodies to runs and steps: messages, complete runs in any format, and the plain text of RL trainers.

A trainer sends its policy's prompt and response as strings with the special tokens of the policy's chat template. A
judge's scores of such strings would be noise, so they are split into messages here, which are judged with the same step
prompts as in training. A string that cannot be split is refused.
"""

import json
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from prmkit.errors import DataError
from prmkit.rows import name_in
from prmkit.trajectories.content import ROLES, is_message_list, turns_of
from prmkit.trajectories.importing import FileReport, Options, read_runs
from prmkit.trajectories.readers.tagged import turns_of_tags
from prmkit.trajectories.run import Run, Turn, assemble
from prmkit.trajectory import Trajectory, task_id_of

_SOURCE = {"format": "http"}

request_id: ContextVar[str] = ContextVar("request_id", default="request")
"""The id of the current HTTP request, which is the name of a run without another name."""


class NothingWritten(DataError):
    """A policy's response has no step, because the policy ended it at once, as policies sometimes do."""


def runs_in(body: Any, format: str | None) -> tuple[list[Trajectory], list[FileReport]]:
    """Read the runs in the body of a request, in any format that `import_trajectories.py` reads.

    Args:
        body: the content of a file in that format; an array of lines for JSONL.
        format: the name of the format; None to detect it.

    Raises:
        DataError: there is no run in the body.
        UsageError: several formats match, or there is no format of that name.
    """
    reports: list[FileReport] = []
    with tempfile.TemporaryDirectory(prefix="prmkit-") as folder:
        file = Path(folder) / "request.json"
        file.write_bytes(_written(body))
        try:
            runs = list(read_runs([file], Options(format), reports))
        except DataError as error:
            message = str(error).replace(str(file), "the request")
            raise DataError(re.sub(r" [^.]*--format\b.*", "", message)) from None
    runs = [_with_request_id(run) for run in runs]
    if not runs:
        reasons = [reason for report in reports for reason in report.unreadable]
        raise DataError(f"the request contains no run{': ' if reasons else '.'}{'; '.join(reasons)}")
    return runs, reports


def _written(body: Any) -> bytes:
    try:
        return orjson.dumps([body] if is_message_list(body) else body)
    except TypeError:  # orjson writes fewer levels than it reads, and raises this
        raise DataError("the request is nested too deeply.") from None


def _with_request_id(run: Trajectory) -> Trajectory:
    """Put the request's id into the run's name, if the client sent no name for the run or the task.

    The importer numbers the runs of a task within a file. Here, every request would start with the same number, and
    runs of different requests would share a name.
    """
    default = task_id_of(run.task)
    if run.task_id != default or not run.trajectory_id.startswith(f"{default}."):
        return run
    return replace(run, trajectory_id=f"{request_id.get()}.{run.trajectory_id.removeprefix(f'{default}.')}")


def run_of_step(item: Mapping[str, Any]) -> Trajectory:
    """Build the run up to one step from `task`, `history` and `step`; the last two are lists of messages.

    By default, the step counts as the last of its run if it calls no tool; `last` overrides this. `task_id` and
    `trajectory_id`, here or in `metadata`, are kept.

    Raises:
        DataError: a part is missing or malformed, or `step` has no text or tool call of the agent.
    """
    task, history, step = item.get("task"), item.get("history") or [], item.get("step")
    if not isinstance(task, str) or not task.strip():
        raise DataError("task must be a string (what the agent was asked).")
    step = [step] if isinstance(step, Mapping) else step
    for name, messages in (("history", history), ("step", step)):
        if messages != [] and not is_message_list(messages):
            raise DataError(
                f'{name} must be a list of messages, for example [{{"role": "assistant", "content": "…"}}].'
            )
    lost: Counter[str] = Counter()
    metadata = item.get("metadata") or {}
    if not isinstance(metadata, Mapping):
        raise DataError("metadata must be an object.")
    names = {name: name_in(item, name) or name_in(metadata, name) for name in ("task_id", "trajectory_id")}
    before, now = turns_of(history, lost), turns_of(step or [], lost)
    if not any(map(_is_step, now)):  # otherwise the previous step would be judged
        raise DataError("step must contain an assistant message with text or a tool call.")
    run = _run([*before, *now], task, **names)
    calls = run.steps[-1].calls
    last = not calls if item.get("last") is None else item["last"]
    if not isinstance(last, bool):  # "false" would be true
        raise DataError("last must be true or false.")
    return replace(run, steps=(*run.steps[:-1], replace(run.steps[-1], last=last)))


def _run(
    turns: Sequence[Turn], task: str | None, task_id: str | None = None, trajectory_id: str | None = None
) -> Trajectory:
    numbered = [replace(turn, index=index) for index, turn in enumerate(turns)]
    name = trajectory_id or request_id.get()
    run = assemble(Run(numbered, task=task, task_id=task_id, trajectory_id=name), _SOURCE)
    if run is None:
        raise NothingWritten("the run contains no agent step.")
    return run


# --- the strings of a policy ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Chat:
    """How a family of chat templates writes messages."""

    message: re.Pattern[str]
    """Matches one message: `role`, `text`, and `end`, which is empty if the message is still open."""
    answer: str
    """The beginning of an agent's answer."""


def _chat(begin: str, roles: str, after: str, ends: Sequence[str], answer: str) -> _Chat:
    end = "|".join(map(re.escape, ends))
    role = begin.replace("ROLE", f"(?P<role>{roles})")
    following = begin.replace("ROLE", f"(?:{roles})")
    return _Chat(re.compile(f"{role}{after}(?P<text>.*?)(?P<end>{end}|(?={following})|\\Z)", re.DOTALL), answer)


_ANY = "system|developer|user|assistant|tool|observation|ipython|model"
_CHATS = (
    _chat(r"<\|im_start\|>ROLE", _ANY, r"\n", ("<|im_end|>",), "<|im_start|>assistant\n"),
    _chat(
        r"<\|start_header_id\|>ROLE<\|end_header_id\|>", _ANY, r"\n*", ("<|eot_id|>", "<|eom_id|>"),
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    _chat(r"<start_of_turn>ROLE", _ANY, r"\n", ("<end_of_turn>",), "<start_of_turn>model\n"),
    _chat(r"<｜ROLE｜>", "System|User|Assistant|Tool", "", ("<｜end▁of▁sentence｜>",), "<｜Assistant｜>"),
    _chat(r"<\|ROLE\|>", _ANY, r"\n?", ("<|end|>", "<|endoftext|>", "</s>"), "<|assistant|>\n"),
)  # fmt: skip
"""ChatML (Qwen, many others), Llama 3, Gemma, DeepSeek, and Phi, Zephyr and GLM."""
_MISTRAL = (
    (re.compile(r"\[INST\]\s*"), "<|im_start|>user\n"),
    (re.compile(r"\s*\[/INST\]\s*"), "<|im_end|>\n<|im_start|>assistant\n"),
    (re.compile(r"\[TOOL_RESULTS\]\s*"), "<|im_end|>\n<|im_start|>tool\n"),
    (re.compile(r"\s*\[/TOOL_RESULTS\]\s*"), "<|im_end|>\n<|im_start|>assistant\n"),
    (re.compile(r"</s>"), "<|im_end|>\n"),
)
"""Mistral marks only the user's turns; they are rewritten as ChatML, so that answers have an end, too."""
_NOT_TEXT = re.compile(
    r"<\|(?:begin_of_text|endoftext|end_of_text|im_end|eot_id|eom_id|end)\|>|<s>|</s>|<bos>|<eos>|<pad>|<end_of_turn>|"
    r"<｜(?:begin|end)▁of▁sentence｜>"
)
_LEADING = re.compile(rf"\A(?:{_NOT_TEXT.pattern})+")
"""A decoded query may begin with a BOS token that its prompt does not have."""
_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_ANSWER = re.compile(r"<tool_response>(.*?)(?:</tool_response>|\Z)", re.DOTALL)
_TAGS = re.compile(r"<(?:think|tool_call|result|answer)>")


def run_of_policy(
    prompt: str | Sequence[Any], text: str | Sequence[Any], *, includes_prompt: bool
) -> tuple[Trajectory, int]:
    """Convert a policy's prompt and response to a run; also return how many of its steps were already in the prompt.

    Args:
        prompt: the policy's prompt: a string with or without the tokens of a chat template, or messages.
        text: the policy's response, as a string or as messages. Tool results in it become the steps' results.
        includes_prompt: whether `text` is a string that begins with the prompt.

    Raises:
        NothingWritten: no message of the agent in the response has any content.
        DataError: a string cannot be split into messages, so a score of it would be noise.
    """
    if not isinstance(prompt, str) or not isinstance(text, str):
        before = _turns_of_prompt(prompt)
        now = _turns_of_response(text)
        return _run([*before, *now], None), sum(map(_is_step, before))
    response = text
    if includes_prompt:
        prompt, text = (_LEADING.sub("", each) for each in (prompt, text))
        if not text.startswith(prompt):
            raise DataError("the query does not begin with its prompt, so the policy's response is unknown.")
        response = text[len(prompt) :]
    if "[/INST]" in prompt:
        prompt, response = _without_inst(prompt), _without_inst(response)
    chat = _chat_of(prompt)
    if chat is None:
        task = _NOT_TEXT.sub("", prompt).strip()
        return _run(_turns_of_response(response), task), 0
    complete = sum(
        _is_agent(found["role"]) and bool(found["end"] and found["text"].strip())
        for found in chat.message.finditer(prompt)
    )
    turns = _turns(chat, prompt + response)
    if sum(map(_is_step, turns)) <= complete:
        raise NothingWritten("the response is empty.")
    return _run(turns, None), complete


def _without_inst(text: str) -> str:
    for pattern, chatml in _MISTRAL:
        text = pattern.sub(lambda _, chatml=chatml: chatml, text)  # type: ignore[misc]
    return text


def _turns_of_prompt(prompt: str | Sequence[Any]) -> list[Turn]:
    if not isinstance(prompt, str):
        return _turns_of_messages("prompt", prompt)
    chat = _chat_of(prompt)
    plain = [{"role": "user", "content": _NOT_TEXT.sub("", prompt).strip()}]
    return _turns(chat, prompt) if chat else turns_of(plain, Counter())


def _turns_of_response(response: str | Sequence[Any]) -> list[Turn]:
    if not isinstance(response, str):
        if not response:
            raise NothingWritten("the response is empty.")
        return _turns_of_messages("response", response)
    return _turns_of_chat(response) or _turns_of_plain(_NOT_TEXT.sub("", response))


def _turns_of_messages(name: str, messages: Sequence[Any]) -> list[Turn]:
    if not is_message_list(list(messages)):
        raise DataError(f"{name} must be a string or a list of messages.")
    return turns_of(list(messages), Counter())


def _chat_of(text: str) -> _Chat | None:
    return next((chat for chat in _CHATS if chat.message.search(text)), None)


def _is_step(turn: Turn) -> bool:
    """Whether the turn becomes a step of the run."""
    return turn.role == "agent" and bool(turn.text or turn.thought or turn.calls)


def _is_agent(role: str) -> bool:
    return ROLES.get(role.lower()) == "agent"


def _turns_of_chat(response: str) -> list[Turn]:
    """Return the turns of a response with the tokens of a chat template; empty without such tokens."""
    chat = _chat_of(response)
    return _turns(chat, chat.answer + response) if chat else []


def _turns(chat: _Chat, text: str) -> list[Turn]:
    messages: list[dict[str, Any]] = []
    for found in chat.message.finditer(text):
        role, content = found["role"].lower(), _NOT_TEXT.sub("", found["text"]).strip()
        if _is_agent(role):
            messages.append(_agent_message(content))
        elif answers := _ANSWER.findall(content):  # Qwen and Hermes write tool results in user messages
            messages += [{"role": "tool", "content": answer.strip()} for answer in answers]
        elif content:
            messages.append({"role": role, "content": content})
    return turns_of(messages, Counter())


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


def _turns_of_plain(response: str) -> list[Turn]:
    """Return the turns of text without a chat template: agent tags, or one answer."""
    if _TAGS.search(response):
        return turns_of_tags(response, Counter())
    return turns_of([{"role": "assistant", "content": response.strip()}], Counter())
