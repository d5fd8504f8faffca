"""Plain lists of messages, with the usual fields around them. Covers OpenAI chat, ShareGPT, Anthropic, LangChain,
verifiers (`prompt`, `completion`) and ART (`messages_and_choices`, groups in `trajectories`), and items of OpenAI's
Responses API; `content` reads the messages themselves."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from prmkit.rows import is_judged_row
from prmkit.trajectories.content import is_message_list, parsed, turns_of
from prmkit.trajectories.readers import codex
from prmkit.trajectories.run import FieldNames, Reader, Run, UnreadableValue
from prmkit.trajectories.run_fields import SOLUTIONS, TASK_IDS, describe

LIST_KEYS = ("messages", "conversations", "conversation", "messages_and_choices", "traj", "history", "chat", "dialog",
             "contents", "events")  # fmt: skip


def recognises(value: Any) -> bool:
    """Return whether a value is a list of messages, or has exactly one under a usual name; judged rows are not runs."""
    if isinstance(value, list):
        return _list(value) is not None
    if not isinstance(value, dict) or is_judged_row(value):
        return False
    return bool(_lists(value) or _is_completion(value) or _group(value))


def read(value: Any, keys: FieldNames) -> Iterator[Run]:
    """Yield the run of one value, or the runs of a group.

    Raises:
        UnreadableValue: the value has two lists of messages, or none under the name that the user passed.
    """
    lost: Counter[str] = Counter()
    if isinstance(value, list):
        yield Run(codex.turns_of_list(value, lost), lost)
        return
    if group := _group(value):
        shared = {name: value[name] for name in (*TASK_IDS, *SOLUTIONS, keys.task) if name in value}
        for place, member in enumerate(group):
            for run in read(shared | member, keys):
                others = value.keys() - shared.keys() - {"trajectories"} if place == 0 else ()
                run.lost.update(f"field {name[:40]} of a group" for name in others if value[name] not in (None, [], {}))
                yield run
        return
    name, messages = _messages(value, keys)
    run = Run(codex.turns_of_list(messages, lost), lost)
    if value.get("system"):  # Anthropic and ShareGPT store the system prompt outside of the messages
        run.turns[:0] = turns_of([{"role": "system", "content": value["system"]}], Counter())
    known = {"prompt", "completion"} if name == "completion" else {name}
    describe(run, value, keys, read={*known, "system"})
    yield run


def _group(value: Mapping[str, Any]) -> list[Any]:
    """Return the runs of a group (ART), if everything in it is a run."""
    group = value.get("trajectories")
    is_group = isinstance(group, list) and all(isinstance(each, dict) and _lists(each) for each in group)
    return group if is_group and group else []


def _messages(value: Mapping[str, Any], keys: FieldNames) -> tuple[str, list[Any]]:
    if keys.messages:
        if (named := _list(value.get(keys.messages))) is None:
            raise UnreadableValue(f"no list of messages under {keys.messages}: each entry needs a role and content")
        return keys.messages, named
    names = _lists(value)
    if len(names) > 1:
        raise UnreadableValue(f"lists of messages under {' and '.join(names)}; choose one with --list-key")
    if names:
        return names[0], _list(value[names[0]]) or []
    if not _is_completion(value):
        raise UnreadableValue("no list of messages; pass its key with --list-key")
    prompt = _list(value["prompt"]) or [{"role": "user", "content": value["prompt"]}]
    return "completion", [*prompt, *(_list(value["completion"]) or [])]


def _lists(value: Mapping[str, Any]) -> list[str]:
    return [name for name in LIST_KEYS if _list(value.get(name))]


def _list(value: Any) -> list[Any] | None:
    """Return a list of messages or Responses API items, which many datasets on Hugging Face store as a JSON string."""
    value = parsed(value)
    return value if is_message_list(value) or codex.is_item_list(value) else None


def _is_completion(value: Mapping[str, Any]) -> bool:
    has_prompt = isinstance(value.get("prompt"), str) or _list(value.get("prompt")) is not None
    return has_prompt and _list(value.get("completion")) is not None


READER = Reader("messages", recognises, one=read, own_keys=True)
