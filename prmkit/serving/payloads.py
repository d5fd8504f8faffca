"""What clients send, as runs and steps: messages, whole runs in any form, and the plain text of RL trainers.

A trainer sends what its policy read and wrote: one string with the special tokens of the policy's chat template. A
judge would answer such a prompt with noise, so the string is split into messages here, and they are judged with the
same step prompts as in training. A string that cannot be split is refused.
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
"""The id of the HTTP request being answered: it names a run that has no other name."""


class NothingWritten(DataError):
    """There is no step in what a policy wrote: it ended its answer at once, as policies sometimes do."""


def runs_in(body: Any, form: str | None) -> tuple[list[Trajectory], list[FileReport]]:
    """The runs in the body of a request, in any form that `import_trajectories.py` reads.

    Args:
        body: the content of a file in that form; an array of lines for JSONL.
        form: the name of the form; None to recognise it.

    Raises:
        DataError: there is no run in it.
        UsageError: several forms fit, or no form has that name.
    """
    reports: list[FileReport] = []
    with tempfile.TemporaryDirectory(prefix="prmkit-") as folder:
        file = Path(folder) / "request.json"
        file.write_bytes(_written(body))
        try:
            runs = list(read_runs([file], Options(form), reports))
        except DataError as error:
            message = str(error).replace(str(file), "the request").partition(" --format")[0]
            raise DataError(message) from None
    runs = [_named(run) for run in runs]
    if not runs:
        reasons = [reason for report in reports for reason in report.unreadable]
        raise DataError(f"the request has no run in it{': ' if reasons else '.'}{'; '.join(reasons)}")
    return runs, reports


def _written(body: Any) -> bytes:
    try:
        return orjson.dumps([body] if is_message_list(body) else body)
    except TypeError:  # orjson writes fewer levels than it reads, and raises this
        raise DataError("the request is nested too deeply.") from None


def _named(run: Trajectory) -> Trajectory:
    """The run with the request's id in its name, if the client named neither run nor task.

    The importer numbers the runs of a task within a file. Here every request would start with the same number, and runs
    of different requests would share a name.
    """
    given = task_id_of(run.task)
    if run.task_id != given or not run.trajectory_id.startswith(f"{given}."):
        return run
    return replace(run, trajectory_id=f"{request_id.get()}.{run.trajectory_id.removeprefix(f'{given}.')}")


def run_of_step(item: Mapping[str, Any]) -> Trajectory:
    """The run up to one step, from `task`, `history` and `step`; the last two are lists of messages.

    The step is taken to be the last of its run if it calls no tool; `last` says otherwise. `task_id` and
    `trajectory_id`, here or in `metadata`, are kept.

    Raises:
        DataError: a part is missing or malformed, or the agent says nothing in `step`.
    """
    task, history, step = _joined(item.get("task")), item.get("history") or [], item.get("step")
    if not isinstance(task, str) or not task.strip():
        raise DataError("task: what the agent was asked, as a string or a list of text parts.")
    step = [step] if isinstance(step, Mapping) else step
    for name, messages in (("history", history), ("step", step)):
        if messages != [] and not is_message_list(messages):
            raise DataError(f'{name}: a list of messages, such as [{{"role": "assistant", "content": "…"}}].')
    lost: Counter[str] = Counter()
    metadata = item.get("metadata") or {}
    if not isinstance(metadata, Mapping):
        raise DataError("metadata: an object.")
    names = {name: name_in(item, name) or name_in(metadata, name) for name in ("task_id", "trajectory_id")}
    before, now = turns_of(history, lost), turns_of(step or [], lost)
    if not any(map(_is_step, now)):  # otherwise the previous step would be judged
        raise DataError("step: has no message in which the agent says or does something.")
    run = _run([*before, *now], task, **names)
    calls = run.steps[-1].calls
    last = not calls if item.get("last") is None else item["last"]
    if not isinstance(last, bool):  # "false" would be true
        raise DataError("last: true or false.")
    return replace(run, steps=(*run.steps[:-1], replace(run.steps[-1], last=last)))


def _joined(content: Any) -> Any:
    """The text of a list of text parts, as chat models take them; anything else unchanged."""
    if not isinstance(content, list):
        return content
    texts = [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
    return "\n".join(texts) if texts and len(texts) == len(content) else content


def _run(
    turns: Sequence[Turn], task: str | None, task_id: str | None = None, trajectory_id: str | None = None
) -> Trajectory:
    numbered = [replace(turn, index=place) for place, turn in enumerate(turns)]
    named = trajectory_id or request_id.get()
    run = assemble(Run(numbered, task=task, task_id=task_id, trajectory_id=named), _SOURCE)
    if run is None:
        raise NothingWritten("the agent says and does nothing in it.")
    return run


# --- the text of a policy ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Chat:
    """The format in which a family of chat templates writes messages."""

    message: re.Pattern[str]
    """One message: `role`, `text`, and `end`, which is empty if the message is still open."""
    answer: str
    """What an answer of the agent begins with."""


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
"""Mistral marks only the user's turns; rewritten as ChatML, answers have an end, too."""
_NOT_TEXT = re.compile(
    r"<\|(?:begin_of_text|endoftext|end_of_text|im_end|eot_id|eom_id|end)\|>|<s>|</s>|<bos>|<eos>|<pad>|<end_of_turn>|"
    r"<｜(?:begin|end)▁of▁sentence｜>"
)
_LEADING = re.compile(rf"\A(?:{_NOT_TEXT.pattern})+")
"""A decoded query may begin with a token that its prompt does not have."""
_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_ANSWER = re.compile(r"<tool_response>(.*?)(?:</tool_response>|\Z)", re.DOTALL)
_TAGS = re.compile(r"<(?:think|tool_call|result|answer)>")


def run_of_policy(prompt: str | Sequence[Any], written: str | Sequence[Any], *, whole: bool) -> tuple[Trajectory, int]:
    """What a policy wrote, as a run, and how many of the run's steps were already in its prompt.

    Args:
        prompt: what the policy was given: a string with or without the tokens of a chat template, or messages.
        written: what it wrote, as a string or as messages. Tool results in it become the steps' results.
        whole: `written` is a string that begins with the prompt.

    Raises:
        NothingWritten: no message of the agent in it has any content.
        DataError: it cannot be split into messages, so a score of it would be noise.
    """
    if not isinstance(prompt, str) or not isinstance(written, str):
        before = _turns_of_prompt(prompt)
        now = _turns_of_response(written)
        return _run([*before, *now], None), sum(map(_is_step, before))
    response = written
    if whole:
        prompt, written = (_LEADING.sub("", text) for text in (prompt, written))
        if not written.startswith(prompt):
            raise DataError("the query does not begin with its prompt, so what the policy wrote is unknown.")
        response = written[len(prompt) :]
    if "[/INST]" in prompt:
        prompt, response = _without_inst(prompt), _without_inst(response)
    chat = _chat_of(prompt)
    if chat is None:
        text = _NOT_TEXT.sub("", prompt).strip()
        return _run(_turns_of_response(response), text), 0
    complete = sum(
        _is_agent(found["role"]) and bool(found["end"] and found["text"].strip())
        for found in chat.message.finditer(prompt)
    )
    turns = _turns(chat, prompt + response)
    if sum(map(_is_step, turns)) <= complete:
        raise NothingWritten("the policy wrote nothing in it.")
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


def _turns_of_response(written: str | Sequence[Any]) -> list[Turn]:
    if not isinstance(written, str):
        if not written:
            raise NothingWritten("the policy wrote nothing in it.")
        return _turns_of_messages("response", written)
    return _turns_of_chat(written) or _turns_of_plain(_NOT_TEXT.sub("", written))


def _turns_of_messages(name: str, messages: Sequence[Any]) -> list[Turn]:
    if not is_message_list(list(messages)):
        raise DataError(f"{name}: neither a string nor a list of messages.")
    return turns_of(list(messages), Counter())


def _chat_of(text: str) -> _Chat | None:
    return next((chat for chat in _CHATS if chat.message.search(text)), None)


def _is_step(turn: Turn) -> bool:
    """Whether the turn becomes a step of the run."""
    return turn.role == "agent" and bool(turn.text or turn.thought or turn.calls)


def _is_agent(role: str) -> bool:
    return ROLES.get(role.lower()) == "agent"


def _turns_of_chat(response: str) -> list[Turn]:
    """The turns of an answer that has the tokens of a chat template; empty if it has none."""
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
    """The turns of text without a chat template: the tags of agents, or one answer."""
    if _TAGS.search(response):
        return turns_of_tags(response, Counter())
    return turns_of([{"role": "assistant", "content": response.strip()}], Counter())
