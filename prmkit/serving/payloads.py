"""What clients send, as runs and steps: messages, whole runs in any form, and the plain text of RL trainers.

A trainer sends what its policy read and wrote: one string with the special tokens of the policy's chat template. A
judge would answer such a prompt with noise, so the string is split into messages here, and they are judged with the
same step prompts as in training. A string that cannot be split is refused.
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


def run_of_step(item: Mapping[str, Any], *, is_end: bool = False) -> Trajectory:
    """The run up to one step, from `task`, `history` and `step`; the last two are lists of messages.

    The step is taken to be the last of its run if it calls no tool; `last` says otherwise. `task_id` and
    `trajectory_id`, here or in `metadata`, are kept.

    Args:
        item: these parts.
        is_end: `step` may be the end of a run, with several steps of the agent.

    Raises:
        DataError: a part is missing or malformed, or `step` is not one step of the agent.
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
    count = sum(map(_is_step, now))
    if not count:  # otherwise the previous step would be judged
        raise DataError("step: has no message in which the agent says or does something.")
    if count > 1 and not is_end:
        raise DataError(
            f"step: has {count} messages in which the agent says or does something, and only one can be scored. Send "
            "each of them as a step, with those before it in history."
        )
    run = _run([*before, *now], task, lost, **names)
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
        raise NothingWritten("the agent says and does nothing in it.")
    return run


# --- the text of a policy ---------------------------------------------------------------------------------------------

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
    lost: Counter[str] = Counter()
    if not isinstance(prompt, str) or not isinstance(written, str):
        before = _turns_of_prompt(prompt, lost)
        now = _turns_of_response(written, lost)
        return _run([*before, *now], None, lost), sum(map(_is_step, before))
    chat, response = _chat_of_prompt(prompt), written
    if whole:
        prompt, written = (LEADING.sub("", text) for text in (prompt, written))
        if not written.startswith(prompt):
            raise DataError("the query does not begin with its prompt, so what the policy wrote is unknown.")
        response = written[len(prompt) :]
    if chat is None:
        return _run(_turns_of_response(response, lost), without_tokens(prompt), lost), 0
    earlier = sum(map(_is_step, turns_of_chat(chat, prompt, Counter(), is_open=True)))
    turns = turns_of_chat(chat, prompt + _opening(chat, prompt, response) + response, lost)
    if not without_tokens(response) or sum(map(_is_step, turns)) <= earlier:
        raise NothingWritten("the policy wrote nothing in it.")
    return _run(turns, None, lost), earlier


def _opening(chat: Chat, prompt: str, response: str) -> str:
    """What is missing between a prompt and an answer: nothing, or the beginning of a message of the agent."""
    last = next(reversed([*chat.message.finditer(chat.rewritten(prompt))]), None)
    if last is None:
        raise DataError("prompt: has special tokens of a chat template, but no complete message. Send all of it.")
    if (
        (is_agent(last["role"]) and not last["end"])
        or chat.message.match(without_tokens(response))
        or not without_tokens(response)
    ):
        return ""
    if not last["end"]:
        raise DataError(
            f"prompt: ends inside a message of {last['role'].lower()}, so what the policy wrote would be part of it. "
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
            raise NothingWritten("the policy wrote nothing in it.")
        return _turns_of_messages("response", written, lost)
    if chat := chat_in(written):
        return turns_of_chat(chat, chat.answer + written, lost)
    _check_is_plain("response", written)
    return _turns_of_plain(without_tokens(written), lost)


def _turns_of_messages(name: str, messages: Sequence[Any], lost: Counter[str]) -> list[Turn]:
    if not is_message_list(list(messages)):
        raise DataError(f"{name}: neither a string nor a list of messages.")
    return turns_of(list(messages), lost)


def _chat_of_prompt(prompt: str) -> Chat | None:
    """The format of a prompt; None if it is plain text, which may mention a token.

    Raises:
        DataError: it is neither.
    """
    if chat := chat_at_beginning(prompt):
        return chat
    _check_is_plain("prompt", prompt)
    if is_special(without_tokens(prompt)) or chat_in(prompt):
        raise DataError(
            "prompt: has special tokens of a chat template, but does not begin with one of its messages. Send all of "
            "it, or a list of messages."
        )
    return None


def _check_is_plain(name: str, text: str) -> None:
    if unread := unread_token(text):
        raise DataError(
            f"{name}: has {unread}, a special token of a chat template that is not split here, so a score of it would "
            "be noise. Send lists of messages."
        )


def _is_step(turn: Turn) -> bool:
    """Whether the turn becomes a step of the run."""
    return turn.role == "agent" and bool(turn.text or turn.thought or turn.calls)


def _turns_of_plain(response: str, lost: Counter[str]) -> list[Turn]:
    """The turns of text without a chat template: the tags of agents, or one answer."""
    if _TAGS.search(response):
        return turns_of_tags(response, lost)
    return turns_of([{"role": "assistant", "content": response}], lost)
