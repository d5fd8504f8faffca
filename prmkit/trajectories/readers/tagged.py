"""Runs as one tagged string: `<think>`, `<tool_call>`, `<result>`, `<answer>`, in `sft_data.output` or `raw_response`.

A step begins with a thought, or with a call or an answer that follows a result; text outside the tags counts as the
agent's text.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from prmkit.trajectories.content import mapping, read_call
from prmkit.trajectories.run import Keys, Reader, Run, Turn, UnreadableValue
from prmkit.trajectories.run_fields import describe, first_of
from prmkit.trajectory import Call, Result

_TAG = re.compile(r"<(think|sub_task_think|tool_call|result|answer)>(.*?)</\1>", re.DOTALL)
_BROKEN = re.compile(r"</?(?:think|sub_task_think|tool_call|result|answer)>")


def recognises(value: Any) -> bool:
    """Whether a value has `sft_data.instruction` and `.output`, or `task_description` and `raw_response`, with tags."""
    texts = _texts(value)
    return texts is not None and _TAG.search(texts[1]) is not None


def _texts(value: Any) -> tuple[str, str] | None:
    """Return the task and the tagged text; None without them."""
    data, names = mapping(mapping(value).get("sft_data")), ("instruction", "output")
    if not data:
        data, names = mapping(value), ("task_description", "raw_response")
    task, text = (data.get(name) for name in names)
    return (task, text) if isinstance(task, str) and isinstance(text, str) else None


def read(value: Any, keys: Keys) -> Iterator[Run]:
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
        call = read_call(orjson.loads(body), lost)
    except orjson.JSONDecodeError:
        lost["calls that are not JSON"] += 1
        call = None
    return call or Call("tool_call", body)


def _turn(step: Mapping[str, Any], index: int) -> Turn:
    texts, thoughts = ("\n\n".join(step.get(key, ())) for key in ("texts", "thoughts"))
    return Turn("agent", texts, thoughts, tuple(step.get("calls", ())), tuple(step.get("results", ())), index=index)


READER = Reader("tagged", recognises, one=read, own_keys=True)
