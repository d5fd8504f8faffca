"""Inspect AI's logs as JSON (`inspect log convert --to json`): `samples` with messages, scores and a target.

The target is the correct answer and is stored as `reference`. Text that Inspect moved to `attachments` is restored.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from prmkit.trajectories.content import Parts, as_text, is_message_list, turns_of
from prmkit.trajectories.run import FieldNames, Reader, Run
from prmkit.trajectories.run_fields import id_of, outcome_of
from prmkit.trajectory import outcome_number

_REFERENCE = "attachment://"
_GRADES: Mapping[Any, float] = {"C": 1.0, "P": 0.5, "I": 0.0, "N": 0.0}


def recognises(value: Any) -> bool:
    """Return whether a value is a log with `eval` and `samples`, or one sample with `input`, `target` and messages."""
    if not isinstance(value, dict):
        return False
    return (isinstance(value.get("eval"), dict) and "samples" in value) or _is_sample(value)


def _is_sample(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and {"input", "target", "epoch"} <= value.keys()
        and is_message_list(value.get("messages"))
    )


def read(value: Any, _keys: FieldNames) -> Iterator[Run]:
    """Yield the runs of one log: one per sample and epoch."""
    name = as_text((value.get("eval") or {}).get("task")) if "samples" in value else ""
    for sample in (value["samples"] or ()) if "samples" in value else (value,):
        yield _run(sample, name) if _is_sample(sample) else Run([], Counter())


def _run(sample: Mapping[str, Any], name: str) -> Run:
    lost: Counter[str] = Counter()
    attachments = sample.get("attachments")
    messages = _resolved(sample["messages"], attachments if isinstance(attachments, dict) else {}, lost)
    identity = id_of(sample, "id") or ""
    return Run(
        turns_of(messages, lost),
        lost,
        task=_input(sample["input"], attachments or {}),
        task_id=f"{name}/{identity}" if name and identity else identity or None,
        trajectory_id=as_text(sample.get("uuid")) or None,
        outcome=_outcome(sample.get("scores"), lost),
        reference=as_text(sample["target"]) or None,
    )


def _input(value: Any, attachments: Mapping[str, Any]) -> str | None:
    if isinstance(value, str):
        return as_text(_resolved(value, attachments, Counter()))
    from_user = [message for message in value or () if isinstance(message, dict) and message.get("role") == "user"]
    parts = Parts(Counter())
    parts.add(_resolved(from_user[0].get("content"), attachments, Counter()) if from_user else None)
    return parts.text() or None


def _resolved(value: Any, attachments: Mapping[str, Any], lost: Counter[str]) -> Any:
    if isinstance(value, str) and value.startswith(_REFERENCE):
        text = attachments.get(value.removeprefix(_REFERENCE))
        lost["attachments that are missing"] += text is None
        return value if text is None else text
    if isinstance(value, list):
        return [_resolved(each, attachments, lost) for each in value]
    if isinstance(value, dict):
        return {key: _resolved(each, attachments, lost) for key, each in value.items()}
    return value


def _outcome(scores: Any, lost: Counter[str]) -> dict[str, Any] | None:
    """Return the outcome, if all scorers agree on it: a log does not say which of them measures success."""
    found = []
    for score in scores.values() if isinstance(scores, dict) else ():
        value = score.get("value") if isinstance(score, dict) else None
        found.append(outcome_of({"score": _GRADES.get(value, value) if isinstance(value, str) else value}))
    if found and found[0] is not None and all(outcome_number(each) == outcome_number(found[0]) for each in found):
        return found[0]
    lost["scores without one meaning"] += len(found)
    return None


READER = Reader("inspect", recognises, one=read)
