"""Convert request bodies to runs and steps: messages, complete runs in any format, and the plain text of RL trainers.

A trainer sends its policy's prompt and response as strings with the special tokens of the policy's chat template. A
judge's scores of such strings would be noise, so they are split into messages here, which are judged with the same step
prompts as in training. A string that cannot be split is refused.
"""

import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson

from prmkit.errors import DataError
from prmkit.rows import name_in
from prmkit.trajectories.content import is_message_list, turns_of
from prmkit.trajectories.importing import FileReport, Options, read_runs
from prmkit.trajectories.readers.tagged import (
    LEADING,
    Chat,
    chat_at_beginning,
    chat_in,
    is_agent,
    is_special,
    turns_of_chat,
    turns_of_tags,
    unread_token,
    without_tokens,
)
from prmkit.trajectories.run import Run, Turn, assemble
from prmkit.trajectory import Trajectory

_SOURCE = {"format": "http"}

request_id: ContextVar[str] = ContextVar("request_id", default="request")
"""The id of the current HTTP request, which identifies a run that has no other id."""


class NothingWritten(DataError):
    """A policy's response contains no step, because the policy ended it immediately."""


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
    # If runs were numbered within a task, as in a file, the only run of each request would always get the same id.
    options = Options(format, unnamed=request_id.get())
    with tempfile.TemporaryDirectory(prefix="prmkit-") as folder:
        file = Path(folder) / "request.json"
        file.write_bytes(_written(body))
        try:
            runs = list(read_runs([file], options, reports))
        except DataError as error:
            message = str(error).replace(str(file), "the request")
            raise DataError(re.sub(r" [^.]*--format\b.*", "", message)) from None
    if not runs:
        reasons = [reason for report in reports for reason in report.unreadable]
        raise DataError(f"the request contains no run{': ' if reasons else '.'}{'; '.join(reasons)}")
    return runs, reports


def _written(body: Any) -> bytes:
    try:
        return orjson.dumps([body] if is_message_list(body) else body)
    except TypeError:  # orjson writes fewer levels than it reads, and raises this
        raise DataError("the request is nested too deeply.") from None


def run_of_step(item: Mapping[str, Any], *, is_end: bool = False) -> Trajectory:
    """Return the run up to one step, from `task`, `history` and `step`; the last two are lists of messages.

    By default, the step counts as the last of its run if it calls no tool; `last` overrides this. `task_id` and
    `trajectory_id`, here or in `metadata`, are kept.

    Args:
        item: the object with these parts.
        is_end: whether `step` may be the end of a run, with several steps of the agent.

    Raises:
        DataError: a part is missing or malformed, or `step` is not one step of the agent.
    """
    task, history, step = _joined(item.get("task")), item.get("history") or [], item.get("step")
    if not isinstance(task, str) or not task.strip():
        raise DataError("task must be a string or a list of text parts: what the agent was asked.")
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
    count = sum(map(_is_step, now))
    if not count:  # otherwise the previous step would be judged
        raise DataError("step must contain an assistant message with text or a tool call.")
    if count > 1 and not is_end:
        raise DataError(
            f"step has {count} assistant messages with text or a tool call, and only one can be scored. Send "
            "each of them as a step, with those before it in history."
        )
    run = _run([*before, *now], task, lost, **names)
    calls = run.steps[-1].calls
    last = not calls if item.get("last") is None else item["last"]
    if not isinstance(last, bool):  # otherwise the string "false" would count as true
        raise DataError("last must be true or false.")
    return replace(run, steps=(*run.steps[:-1], replace(run.steps[-1], last=last)))


def _joined(content: Any) -> Any:
    """Return the text of a list of text parts, as in chat messages; anything else is returned unchanged."""
    if not isinstance(content, list):
        return content
    texts = [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
    return "\n".join(texts) if texts and len(texts) == len(content) else content


def _run(
    turns: Sequence[Turn],
    task: str | None,
    lost: Counter[str],
    task_id: str | None = None,
    trajectory_id: str | None = None,
) -> Trajectory:
    numbered = [replace(turn, index=place) for place, turn in enumerate(turns)]
    named = trajectory_id or request_id.get()
    run = assemble(Run(numbered, lost, task=task, task_id=task_id, trajectory_id=named), _SOURCE)
    if run is None:
        raise NothingWritten("the run contains no agent step.")
    return run


# --- the strings of a policy ------------------------------------------------------------------------------------------

_TAGS = re.compile(r"<(?:think|tool_call|result|answer)>")


def run_of_policy(
    prompt: str | Sequence[Any], text: str | Sequence[Any], *, includes_prompt: bool
) -> tuple[Trajectory, int]:
    """Convert a policy's prompt and response to a run, and return how many of its steps were already in the prompt.

    Args:
        prompt: the policy's prompt: a string with or without the tokens of a chat template, or messages.
        text: the policy's response, as a string or as messages. Tool results in it become the steps' results.
        includes_prompt: whether `text` is a string that begins with the prompt.

    Raises:
        NothingWritten: no message of the agent in the response has any content.
        DataError: a string cannot be split into messages, so a score of it would be noise.
    """
    lost: Counter[str] = Counter()
    if not isinstance(prompt, str) or not isinstance(text, str):
        before = _turns_of_prompt(prompt, lost)
        now = _turns_of_response(text, lost)
        return _run([*before, *now], None, lost), sum(map(_is_step, before))
    chat, response = _chat_of_prompt(prompt), text
    if includes_prompt:
        prompt, text = (LEADING.sub("", each) for each in (prompt, text))
        if not text.startswith(prompt):
            raise DataError("the query does not begin with its prompt, so it is unknown what the policy wrote.")
        response = text[len(prompt) :]
    if chat is None:
        return _run(_turns_of_response(response, lost), without_tokens(prompt), lost), 0
    earlier = sum(map(_is_step, turns_of_chat(chat, prompt, Counter(), is_open=True)))
    turns = turns_of_chat(chat, prompt + _opening(chat, prompt, response) + response, lost)
    if not without_tokens(response) or sum(map(_is_step, turns)) <= earlier:
        raise NothingWritten("the response is empty.")
    return _run(turns, None, lost), earlier


def _opening(chat: Chat, prompt: str, response: str) -> str:
    """Return the text missing between a prompt and an answer: none, or the beginning of an agent message."""
    last = next(reversed([*chat.message.finditer(chat.rewritten(prompt))]), None)
    if last is None:
        raise DataError(
            "prompt has special tokens of a chat template, but no complete message. Send the complete prompt."
        )
    if (
        (is_agent(last["role"]) and not last["end"])
        or chat.message.match(without_tokens(response))
        or not without_tokens(response)
    ):
        return ""
    if not last["end"]:
        raise DataError(
            f"prompt ends inside a message of {last['role'].lower()}, so the policy's text would be part of it. "
            "End the prompt with the beginning of the agent's answer (add_generation_prompt)."
        )
    return chat.answer


def _turns_of_prompt(prompt: str | Sequence[Any], lost: Counter[str]) -> list[Turn]:
    if not isinstance(prompt, str):
        return _turns_of_messages("prompt", prompt, lost)
    if chat := _chat_of_prompt(prompt):
        return turns_of_chat(chat, prompt, lost)
    return turns_of([{"role": "user", "content": without_tokens(prompt)}], lost)


def _turns_of_response(written: str | Sequence[Any], lost: Counter[str]) -> list[Turn]:
    if not isinstance(written, str):
        if not written:
            raise NothingWritten("the response is empty.")
        return _turns_of_messages("response", written, lost)
    if chat := chat_in(written):
        return turns_of_chat(chat, chat.answer + written, lost)
    _check_is_plain("response", written)
    return _turns_of_plain(without_tokens(written), lost)


def _turns_of_messages(name: str, messages: Sequence[Any], lost: Counter[str]) -> list[Turn]:
    if not is_message_list(list(messages)):
        raise DataError(f"{name} must be a string or a list of messages.")
    return turns_of(list(messages), lost)


def _chat_of_prompt(prompt: str) -> Chat | None:
    """Return the format of a prompt; None if it is plain text, which may mention a token.

    Raises:
        DataError: it is neither.
    """
    if chat := chat_at_beginning(prompt):
        return chat
    _check_is_plain("prompt", prompt)
    if is_special(without_tokens(prompt)) or chat_in(prompt):
        raise DataError(
            "prompt has special tokens of a chat template, but does not begin with a message. Send the complete "
            "prompt, or a list of messages."
        )
    return None


def _check_is_plain(name: str, text: str) -> None:
    if unread := unread_token(text):
        raise DataError(
            f"{name} has {unread}, a special token of a chat template that cannot be split here, so a score would "
            "be noise. Send lists of messages."
        )


def _is_step(turn: Turn) -> bool:
    """Return whether the turn becomes a step of the run."""
    return turn.role == "agent" and bool(turn.text or turn.thought or turn.calls)


def _turns_of_plain(response: str, lost: Counter[str]) -> list[Turn]:
    """Return the turns of text without a chat template: tagged text, or one answer."""
    if _TAGS.search(response):
        return turns_of_tags(response, lost)
    return turns_of([{"role": "assistant", "content": response}], lost)
