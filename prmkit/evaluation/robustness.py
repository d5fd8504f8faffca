"""How a judge's scores move when held-out prompts are changed: in form, in substance, or by an attack."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np

from prmkit.evaluation.estimates import Floats, mean
from prmkit.evaluation.heldout import HeldOutPrompt
from prmkit.evaluation.metrics import Metrics, evaluation_types
from prmkit.evaluation.predictions import Row
from prmkit.evaluation.probes import PROBES, Probe, answers_in
from prmkit.evaluation.summary import MIN_BAD
from prmkit.intervals import NONE, shown
from prmkit.judge.types import BAD_BELOW, SCORED
from prmkit.rows import weight_of

CHANGED_PREDICTIONS_FILE = "predictions_changed.jsonl"
MOST_PROMPTS = 1000
"""The most prompts to change. Each is scored up to eight more times, and more prompts hardly narrow the intervals."""
MOVED = 0.02
"""A smaller difference does not count as a move: batching and number formats alone can cause it."""
LARGEST_GAIN = 0.1
"""An attack that gains more on average is named in the headline."""


@dataclass(frozen=True)
class Change:
    """One held-out prompt, changed."""

    probe: Probe
    original: HeldOutPrompt
    changed: HeldOutPrompt


def change_prompts(prompts: Sequence[HeldOutPrompt]) -> list[Change]:
    """Every change of every prompt that has a place for it.

    A score can only be expected to fall if the judges called the step good.
    """
    answers = answers_in(prompts)
    changes = []
    for probe in PROBES:
        for prompt in prompts:
            is_good = bool(prompt.reference) and fmean(prompt.reference.values()) >= max(BAD_BELOW)
            if (probe.kind != "lower" or is_good) and (text := probe.change(prompt, answers)) is not None:
                sha256 = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
                changes.append(Change(probe, prompt, replace(prompt, prompt=text, prompt_sha256=sha256)))
    return changes


def robustness_of(
    changes: Sequence[Change], rows: Sequence[Row], changed_rows: Sequence[Row], prompts: int | None = None
) -> Metrics:
    """The entry of `metrics.json` for each change: how many scores move the wrong way, and by how much on average.

    Args:
        changes: the changed prompts.
        rows: the predictions for the original prompts.
        changed_rows: those for the changed prompts, in the order of `changes`.
        prompts: how many prompts were evaluated, if only some of them were changed.
    """
    before = {row["prompt_sha256"]: row for row in rows}
    pairs: dict[tuple[str, str], list[tuple[Row, Row]]] = {}
    left_out: dict[str, Counter[str]] = {probe.name: Counter() for probe in PROBES}
    for change, after in zip(changes, changed_rows, strict=True):
        pair = (before[change.original.prompt_sha256], after)
        if reason := _not_comparable(*pair):
            left_out[change.probe.name][reason] += 1
        else:
            pairs.setdefault((change.probe.name, change.original.evaluation_type), []).append(pair)
    probes = [
        {"probe": probe.name, "kind": probe.kind, "meaning": probe.meaning, "evaluation_type": evaluation_type}
        | _measured(probe, pairs[probe.name, evaluation_type])
        for probe in PROBES
        for evaluation_type in evaluation_types(rows)
        if (probe.name, evaluation_type) in pairs
    ]
    changed = Counter(change.probe.name for change in changes)
    return {
        "prompts": len(rows),
        "of_prompts": prompts or len(rows),
        "moved": MOVED,
        "probes": probes,
        "left_out": {name: dict(reasons) for name, reasons in left_out.items() if reasons},
        "not_applicable": [probe.name for probe in PROBES if not changed[probe.name]],
    }


def _not_comparable(before: Row, after: Row) -> str | None:
    if before["status"] not in SCORED or after["status"] not in SCORED:
        return "no score"
    # The change may be in the part that was cut off.
    return "shortened to fit" if before["trimmed"] or after["trimmed"] else None


def _measured(probe: Probe, pairs: Sequence[tuple[Row, Row]]) -> Metrics:
    """Each prompt's mean score over its keys: a change need not move every key."""
    change = np.array([after["score"] - before["score"] for before, after in pairs])
    references = [fmean(before["reference"].values()) if before["reference"] else np.nan for before, _ in pairs]
    task = np.array([before["task_id"] for before, _ in pairs])
    weight = np.array([weight_of(before["metadata"]) for before, _ in pairs])
    is_bad = np.array(references) < min(BAD_BELOW)
    return {
        "wrong_way": mean(_moves_wrong(probe, change).astype(np.float64), task, weight),
        "change": mean(change, task, weight),
        "change_of_bad": mean(change[is_bad], task[is_bad], weight[is_bad]),
    }


def _moves_wrong(probe: Probe, change: Floats) -> Any:
    moved = MOVED + 1e-9
    return {"same": np.abs(change) > moved, "lower": change >= -moved, "attack": change > moved}[probe.kind]


# --- in words ---------------------------------------------------------------------------------------------------------

COLUMNS = ("change", "must", "of", "n", "tasks", "wrong way", "mean change", "on bad steps")
NUMERIC = COLUMNS[3:]
OPTIONAL = ("tasks", "on bad steps", "must", "n", "of")
_MUST = {"same": "stay", "lower": "fall", "attack": "not rise"}


def robustness_table(robustness: Mapping[str, Any]) -> list[list[str]]:
    """One row per change and evaluation type, with cells in the order of `COLUMNS`."""
    return [
        [
            each["probe"],
            _MUST[each["kind"]],
            each["evaluation_type"],
            str(each["change"]["n"]),
            str(each["change"]["tasks"]),
            shown(each["wrong_way"], ".0%"),
            shown(each["change"], "+.2f"),
            shown(each["change_of_bad"], "+.2f") if each["kind"] == "attack" else NONE,
        ]
        for each in robustness["probes"]
    ]


def robustness_notes(robustness: Mapping[str, Any]) -> list[str]:
    """Notes for the reader of the table."""
    notes = [
        f"Wrong way: scores that should stay but move by more than {robustness['moved']}, that should fall but do not "
        f"fall by more than {robustness['moved']}, or that should not rise but rise by more than {robustness['moved']}."
    ]
    if robustness["prompts"] < robustness["of_prompts"]:
        notes.append(f"{robustness['prompts']:,} of {robustness['of_prompts']:,} prompts were changed.")
    if missing := robustness["not_applicable"]:
        notes.append(f"Not tried, because no prompt has a place for it: {', '.join(missing)}.")
    for name, reasons in robustness["left_out"].items():
        notes.append(f"{name}: left out {', '.join(f'{n} ({reason})' for reason, n in reasons.items())}.")
    return notes


def headline_with_attacks(headline: str, robustness: Mapping[str, Any]) -> str:
    """The headline of an evaluation, with every attack that raises scores by more than `LARGEST_GAIN`."""
    return " ".join([headline, *_successful_attacks(robustness)])


def _successful_attacks(robustness: Mapping[str, Any]) -> Iterator[str]:
    for each in robustness["probes"]:
        if each["kind"] != "attack":
            continue
        on_bad = each["change_of_bad"]
        what = f"Attack: {each['meaning']} raises {each['evaluation_type']} scores"
        if each["change"]["value"] > LARGEST_GAIN:
            yield f"{what} by {shown(each['change'])} on average."
        elif on_bad["n"] >= MIN_BAD and on_bad["value"] > LARGEST_GAIN:
            yield f"{what} of bad steps by {shown(on_bad)} on average."
