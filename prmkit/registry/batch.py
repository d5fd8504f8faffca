"""What is new in a batch of rows, and whether any version was trained on what is held out now."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from prmkit import registered
from prmkit.drift import shift_of
from prmkit.errors import DataError
from prmkit.files import read_json, read_jsonl
from prmkit.paths import HELD_OUT_SUFFIX, REPORT
from prmkit.registered import DATA

FULL = "reward_model_full"
SHIFT_LIMIT = 0.25
_EXAMPLES = 5

Rows = list[dict[str, Any]]
"""Lines of sidecars: where each row comes from, its scores on the scale of 0 to 1, its metadata."""


def rows_of(data: Path) -> Rows:
    """The rows of a conversion, both sides."""
    files = [data / f"{FULL}{side}.meta.jsonl" for side in ("", HELD_OUT_SUFFIX)]
    return [row for file in files if file.is_file() for row in read_jsonl(file)]


def tasks_in(file: Path) -> set[str]:
    """The tasks of a sidecar."""
    return (
        {str(row["metadata"]["task_id"]) for row in read_jsonl(file) if row["metadata"].get("task_id") is not None}
        if file.is_file()
        else set()
    )


def describe_batch(old: Rows, new: Rows, new_report: Mapping[str, Any]) -> dict[str, Any]:
    """Compare new rows with old ones.

    Returns:
        `rows`, `rejected`, `tasks`, `judges_new`, `judges_gone`, `changed_labels` (the same judge, prompt and key with
        another score) with examples, `scores` (by evaluation type how the scores moved), and `findings`: sentences
        about what a person should look at.
    """
    before, now = _labels(old), _labels(new)
    changed = [
        (place, before[place], score)
        for place, score in now.items()
        if place in before and abs(before[place] - score) > 1e-9
    ]
    judges_before, judges_now = ({str(row["metadata"].get("model_name")) for row in rows} for rows in (old, new))
    shifts = {name: shift_of(_scores(old, name), _scores(new, name)) for name in _types(new)}
    report: dict[str, Any] = {
        "rows": len(new),
        "rejected": sum(new_report["rejected"].values()),
        "tasks": len({row["metadata"].get("task_id") for row in new}),
        "judges_new": sorted(judges_now - judges_before),
        "judges_gone": sorted(judges_before - judges_now),
        "repeated_labels": sum(place in before for place in now),
        "changed_labels": len(changed),
        "changed_examples": [
            {"prompt_sha256": prompt, "judge": judge, "key": key, "was": was, "is": score}
            for (prompt, judge, key), was, score in changed[:_EXAMPLES]
        ],
        "scores": {name: shift.as_json() for name, shift in shifts.items()},
        "types_new": sorted(set(_types(new)) - set(_types(old))),
    }
    return report | {"findings": list(_findings(report, {n: s.exceeds(SHIFT_LIMIT) for n, s in shifts.items()}))}


def _labels(rows: Rows) -> dict[tuple[str, str, str], float]:
    found: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for row in rows:
        for key, score in row["scores"].items():
            found[row["prompt_sha256"], str(row["metadata"].get("model_name")), key].append(score)
    return {place: fmean(scores) for place, scores in found.items()}


def _types(rows: Rows) -> list[str]:
    return list(dict.fromkeys(str(row["metadata"].get("evaluation_type")) for row in rows))


def _scores(rows: Rows, evaluation_type: str) -> list[float]:
    chosen = (row for row in rows if str(row["metadata"].get("evaluation_type")) == evaluation_type)
    return [fmean(row["scores"].values()) for row in chosen]


def _findings(report: Mapping[str, Any], shifted: Mapping[str, bool]) -> Iterator[str]:
    if report["rejected"]:
        yield f"{report['rejected']:,} of the new rows were rejected; rejected.jsonl has the reasons."
    if report["judges_new"]:
        yield f"Judges that had no rows before: {', '.join(report['judges_new'])}."
    if report["judges_gone"]:
        yield f"Judges without new rows: {', '.join(report['judges_gone'])}."
    if report["types_new"]:
        yield f"Evaluation types that are new: {', '.join(report['types_new'])}."
    if report["changed_labels"]:
        changed, repeated = report["changed_labels"], report["repeated_labels"]
        yield f"{changed:,} of {repeated:,} scores that were given before are different now."
    for name, exceeds in shifted.items():
        values = report["scores"][name]
        if exceeds:
            yield (
                f"The scores of {name} have shifted: mean {values['mean_reference']:.2f} before, {values['mean']:.2f} "
                f"now (PSI {values['psi']:.2f}, KS {values['ks']:.2f}, n {values['n']})."
            )


def check_sides(data: Path, name: str, folder: Path) -> int:
    """Check that no version of a judge was trained on what is held out now, or held out what is trained on now.

    Returns:
        How many versions were compared.

    Raises:
        DataError: a task or a prompt changes its side.
    """
    sides = [_identities(data / f"{FULL}{side}.meta.jsonl") for side in ("", HELD_OUT_SUFFIX)]
    state = registered.state_of(registered.read_history(folder))
    compared = 0
    for version in (each for each in state.versions if each.name == name):
        place = registered.folder_of_version(version, folder) / DATA
        record = read_json(place.parent / "run" / "run.json")
        names = [(record.get(side) or {}).get("name") for side in ("dataset", "eval_dataset")]
        theirs = [_identities(place / f"{each}.meta.jsonl") for each in names]
        for mine, other, what in ((1, 0, "trained on"), (0, 1, "held out")):
            if both := sides[mine] & theirs[other]:
                raise DataError(
                    f"{version} has {what} {len(both)} tasks and prompts that would be on the other side now, such as "
                    f"{min(both)!r:.80}. Its agreement would be measured on what it knows."
                )
        compared += 1
    return compared


def _identities(file: Path) -> set[str]:
    found: set[str] = set()
    for row in read_jsonl(file) if file.is_file() else ():
        found |= {row["prompt_sha256"], f"task {row['metadata'].get('task_id')}"}
    return found - {"task None"}


def report_of(data: Path) -> dict[str, Any]:
    """The report of a conversion."""
    return dict(read_json(data / REPORT))
