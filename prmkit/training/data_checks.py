"""Checks of the datasets in a config, and of what is held out of training.

They read only the files, without LLaMA Factory, and find what would make it fail or silently drop rows.
"""

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson

from prmkit.dataset_info import Entry, identities, number_of_rows, read_entries, split_names
from prmkit.errors import DataError
from prmkit.files import read_json
from prmkit.llamafactory_schema import setting
from prmkit.paths import REPORT
from prmkit.training.checks import Check, error, ok, warning

CONVERT = "python convert_dataset.py"
FORMATS = ("alpaca", "sharegpt", "openai")
RANKING_STAGES = ("rm", "dpo")
FILE_TYPES = (".arrow", ".csv", ".json", ".jsonl", ".parquet", ".txt")
SCANNED_BYTES = 256 << 20
"""The maximum number of bytes to read of a file, which takes a second; errors are nearly always near the beginning."""
CHUNK_BYTES = 10 << 20
"""Arrow takes a column's type from the first 10 MB of a file."""


def check_datasets(values: Mapping[str, Any]) -> Check:
    """Check entries, files and rows of `dataset` and `eval_dataset`."""
    folder = Path(str(setting(values, "dataset_dir")))
    try:
        entries = read_entries(folder)
    except DataError as failure:
        found, _, advice = str(failure).partition(". ")
        return error("datasets", found, advice)
    names = [*split_names(values.get("dataset")), *split_names(values.get("eval_dataset"))]
    stage = str(setting(values, "stage"))
    problems = [problem for name in names if name for problem in _entry_problems(name, entries, stage)]
    problems += _list_problems(values)
    problems += _report_problems(folder)
    if problems:
        return error("datasets", "; ".join(problems), f"Convert the data again ({CONVERT}), or choose other datasets.")
    described = ", ".join(f"{name} ({_describe_rows(entries[name])})" for name in names)
    if not all(_is_one_file(entries[name]) for name in names):
        return warning("datasets", described, "Save it as one JSONL file, so that its rows are checked and recorded.")
    return ok("datasets", described)


def _list_problems(values: Mapping[str, Any]) -> Iterator[str]:
    """Find names in a list of datasets that are empty, or whose rows LLaMA Factory would use more than once."""
    for key in ("dataset", "eval_dataset"):
        names = split_names(values.get(key))
        if "" in names:
            yield f"{key} has a comma too many"
        if repeated := sorted({name for name in names if name and names.count(name) > 1}):
            yield f"{key} names {', '.join(repeated)} more than once, so its rows would count more than once"


def _is_one_file(entry: Entry) -> bool:
    return entry.file is not None and entry.file.is_file()


def _describe_rows(entry: Entry) -> str:
    if not _is_one_file(entry):
        return "a folder: its rows are not checked" if entry.file else "from a hub or a script: not checked"
    rows = number_of_rows(entry)
    return "loadable" if rows is None else f"{rows:,} row{'s' * (rows != 1)}"


def _report_problems(folder: Path) -> Iterator[str]:
    """Check that the conversion report, whose hash every training run records, is readable."""
    path = folder / REPORT
    try:
        report = read_json(path) if path.exists() else {}
    except DataError as failure:
        yield str(failure).rstrip(".")
        return
    if not isinstance(report, dict) or not isinstance(report.get("held_out", {}), dict):
        yield f"{path}: not a conversion report"


def _entry_problems(name: str, entries: Mapping[str, Entry], stage: str) -> Iterator[str]:
    entry = entries.get(name)
    if entry is None:
        nearest = difflib.get_close_matches(name, entries, n=1)
        known = f"did you mean {nearest[0]}?" if nearest else f"known: {', '.join(list(entries)[:8]) or 'none'}"
        yield f"dataset not found: {name} ({known})"
    elif entry.formatting not in FORMATS:
        yield f"{name}: formatting is {entry.formatting}, not {' or '.join(FORMATS)}"
    elif entry.ranking != (stage in RANKING_STAGES):
        pairs, single = "preference pairs", "single answers"
        actual, needed = (pairs, single) if entry.ranking else (single, f"{pairs} (chosen, rejected)")
        yield f"{name} contains {actual}, but stage {stage} needs {needed}"
    elif stage == "kto" and "kto_tag" not in entry.columns:
        yield f"{name} has no column kto_tag, which stage kto needs"
    elif entry.file is not None and entry.file.is_dir():
        kinds = {path.suffix for path in entry.file.iterdir()}
        if len(kinds) != 1 or not kinds <= {*FILE_TYPES}:
            yield f"{entry.file} must contain files of one type ({', '.join(FILE_TYPES)}), and nothing else"
    elif entry.file is not None:
        yield from _file_problems(entry, entry.file)


def _file_problems(entry: Entry, file: Path) -> Iterator[str]:
    if not file.is_file():
        yield f"{file} is missing"
    elif file.suffix not in FILE_TYPES:
        yield f"{file}: LLaMA Factory reads {', '.join(FILE_TYPES)}"
    elif file.stat().st_size == 0:
        yield f"{file} is empty"
    elif file.suffix == ".jsonl":
        yield from _row_problems(entry, file)


def _row_problems(entry: Entry, file: Path) -> Iterator[str]:
    """Find the first row of a JSONL file that would make LLaMA Factory fail, or that it would silently drop."""
    wanted = _columns(entry)
    read = 0
    large = file.stat().st_size > CHUNK_BYTES
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            read += len(line)
            if read > SCANNED_BYTES:
                return
            if problem := _row_problem(line, wanted, others_must_be_strings=large) or _answer_problem(entry, line):
                yield f"{file}:{number}: {problem}"
                return


def _columns(entry: Entry) -> dict[str, type]:
    """Return the required columns and their types."""
    if entry.formatting != "alpaca":
        return {entry.columns.get("messages", "messages"): list}
    return {entry.columns[key]: str for key in ("prompt", "response") if key in entry.columns}


def _row_problem(line: bytes, wanted: Mapping[str, type], *, others_must_be_strings: bool) -> str | None:
    if not line.strip():
        return None
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as failure:
        return f"not JSON ({failure})"
    if not isinstance(row, dict):
        return "not an object"
    for name, kind in wanted.items():
        if name not in row:
            return f"has no column {name}"
        if not isinstance(row[name], kind):
            return f"{name} is not a {'string' if kind is str else 'list'}; LLaMA Factory would silently drop the row"
    other = [name for name, value in row.items() if name not in wanted and not isinstance(value, str)]
    if other and others_must_be_strings:
        return f"column {other[0]} is not a string; if its type changes after 10 MB, loading fails. Remove it"
    return None


def _answer_problem(entry: Entry, line: bytes) -> str | None:
    """Report an empty answer in a row with one question and one answer, which would teach a judge to write nothing."""
    if entry.ranking or not {"response", "messages"} & entry.columns.keys() or not line.strip():
        return None
    try:
        answer = entry.read(orjson.loads(line)).answer
    except ValueError:
        return None  # several turns, which LLaMA Factory reads, too
    return None if answer.strip() else "the answer is empty, so there is nothing to learn"


def check_held_out(values: Mapping[str, Any], dropped: Mapping[str, str], *, evaluate: bool = False) -> Check:
    """Check that there are held-out rows, and that they share no task and no prompt with the training rows.

    Args:
        values: LLaMA Factory's keys.
        dropped: keys that this run leaves out, and why.
        evaluate: whether the judge will be measured on them; then it is an error if there are none.
    """
    if values.get("val_size"):
        if problem := _nothing_left(values):
            return error("held-out", problem, "Use a smaller val_size, or set eval_dataset.")
        found = "val_size holds out rows at random, so steps of one task end up in both splits"
        return warning("held-out", found, "Use eval_dataset: the conversion holds out whole tasks.")
    names, held_out = split_names(values.get("dataset")), split_names(values.get("eval_dataset"))
    if not held_out:
        found = f"none: {dropped['eval_dataset']}" if "eval_dataset" in dropped else "none"
        if evaluate:
            return error("held-out", f"{found}, but --evaluate needs some", HOLD_OUT)
        return warning("held-out", f"{found}, so the judge cannot be measured", HOLD_OUT)
    if both := set(names) & set(held_out):
        return error("held-out", f"{', '.join(sorted(both))} is used for both training and evaluation", USE_EVAL)
    folder = Path(str(setting(values, "dataset_dir")))
    try:
        return _compare(folder, names, held_out)
    except (DataError, AttributeError, KeyError, TypeError) as failure:
        return error("held-out", f"could not be compared: {failure}", f"Convert the data again: {CONVERT}")


USE_EVAL = "Use its _eval dataset as eval_dataset."
HOLD_OUT = (
    f"Convert again with more held out: {CONVERT} --eval-ratio 0.3, another --split-seed, or --eval-tasks with "
    "task ids."
)


def _nothing_left(values: Mapping[str, Any]) -> str | None:
    """Say why `val_size` would leave no training row; None if it leaves some, or if the rows cannot be counted."""
    if values.get("streaming") or setting(values, "mix_strategy") != "concat":
        return None
    try:
        entries = read_entries(Path(str(setting(values, "dataset_dir"))))
    except DataError:
        return None  # reported by the check of the datasets
    chosen = [entries[name] for name in split_names(values.get("dataset")) if name in entries]
    counts = [entry.num_samples or number_of_rows(entry) for entry in chosen]
    rows = sum(min(count, values.get("max_samples") or count) for count in counts if count)
    taken = values["val_size"] if values["val_size"] >= 1 else math.ceil(values["val_size"] * rows)
    if None in counts or not rows or taken < rows:
        return None
    return f"val_size: {values['val_size']} takes all {rows:,} rows, so no row is left to train on"


_COMPARED = (".json", ".jsonl")


def _compare(folder: Path, names: list[str], held_out: list[str]) -> Check:
    audit = _audit(folder)
    if audit is not None and audit.get("passed", True) is False:
        found = f"the conversion found {audit.get('tasks_on_both_sides', '?')} tasks in both splits"
        return error("held-out", found, f"Convert the data again: {CONVERT}")
    entries = read_entries(folder)
    sides = [[entries[name] for name in side if name in entries] for side in (names, held_out)]
    if any(entry.file is None or entry.file.suffix not in _COMPARED for side in sides for entry in side):
        return ok(
            "held-out",
            f"{', '.join(held_out)}; not compared with training rows, because only JSON files can be compared",
        )
    trained, kept = map(_tasks_and_prompts, sides)
    shared_tasks, shared_prompts = trained[0] & kept[0], trained[1] & kept[1]
    if shared_tasks or shared_prompts:
        shared = f"{_count(len(shared_tasks), 'task')} and {_count(len(shared_prompts), 'prompt')}"
        example = next(iter(shared_tasks or shared_prompts))
        found = f"{shared} are also in training rows, for example {example}"
        return error("held-out", found, f"Convert both together: {CONVERT}")
    if any(entry.sidecar is None for side in sides for entry in side):
        found = f"{_count(len(kept[1]), 'prompt')}; no overlap with training; tasks are unknown (no sidecar)"
        return ok("held-out", found)
    found = f"{_count(len(kept[1]), 'prompt')} from {_count(len(kept[0]), 'task')}; no overlap with training"
    if not kept[0]:
        advice = "Rows without task_id cannot be held out by task: steps of one task may be in both splits."
        return warning("held-out", f"{found}; no row has a task", advice)
    return ok("held-out", found)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _audit(folder: Path) -> Mapping[str, Any] | None:
    path = folder / REPORT
    report = read_json(path) if path.is_file() else None
    audit = report.get("leak_audit") if isinstance(report, dict) else None
    return audit if isinstance(audit, dict) else None


def _tasks_and_prompts(entries: Iterable[Entry]) -> tuple[set[str], set[str]]:
    found = {each for entry in entries for each in identities(entry)}
    return {task for _, task in found if task is not None}, {prompt for prompt, _ in found}
