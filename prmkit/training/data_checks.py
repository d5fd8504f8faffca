"""Are the datasets there, can LLaMA Factory load them, and does nothing that is held out stand in the training rows?"""

import difflib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson

from prmkit.errors import DataError
from prmkit.files import read_json, read_jsonl
from prmkit.paths import REPORT, SIDECAR_SUFFIX
from prmkit.training.check import Check, error, ok, warning
from prmkit.training.entries import Entry, folder_of, names_in, read_entries

CONVERT = "python convert_dataset.py"
FORMATS = ("alpaca", "sharegpt", "openai")
RANKING_STAGES = ("rm", "dpo")
FILE_TYPES = (".arrow", ".csv", ".json", ".jsonl", ".parquet", ".txt")
SCANNED_BYTES = 256 << 20
"""A second of reading; what is wrong in a file is nearly always wrong near its start."""
CHUNK_BYTES = 10 << 20
"""Arrow fixes a column's type by the first 10 MB of a file."""


def check_datasets(values: Mapping[str, Any]) -> Check:
    """Entries, files and rows of `dataset` and `eval_dataset`."""
    folder = folder_of(values)
    try:
        entries = read_entries(folder)
    except DataError as failure:
        found, _, advice = str(failure).partition(". ")
        return error("datasets", found, advice)
    names = [*names_in(values.get("dataset")), *names_in(values.get("eval_dataset"))]
    stage = str(values.get("stage", "sft"))
    problems = [problem for name in names for problem in _entry_problems(name, entries, stage)]
    problems += _report_problems(folder)
    if problems:
        return error("datasets", "; ".join(problems), f"Convert the data again ({CONVERT}), or name another dataset.")
    told = ", ".join(f"{name} ({_rows_told(entries[name])})" for name in names)
    if not all(_is_one_file(entries[name]) for name in names):
        return warning("datasets", told, "Save it as one JSONL file, so that its rows are checked and recorded.")
    return ok("datasets", told)


def _is_one_file(entry: Entry) -> bool:
    return entry.file is not None and entry.file.is_file()


def _rows_told(entry: Entry) -> str:
    if not _is_one_file(entry):
        return "a folder: its rows are not looked at" if entry.file else "from a hub or a script: not looked at"
    rows = _rows_of(entry)
    return "loadable" if rows is None else f"{rows:,} rows"


def _rows_of(entry: Entry) -> int | None:
    """How many rows a dataset has; None when its file is of a kind that is not read here."""
    if entry.file is None or entry.file.suffix != ".jsonl" or not entry.file.is_file():
        return None
    with entry.file.open("rb") as stream:
        return sum(1 for line in stream if line.strip())


def _report_problems(folder: Path) -> Iterator[str]:
    """Is the conversion's report, which every run records, as the conversion wrote it?"""
    path = folder / REPORT
    try:
        report = read_json(path) if path.exists() else {}
    except DataError as failure:
        yield str(failure).rstrip(".")
        return
    if not isinstance(report, dict) or not isinstance(report.get("held_out", {}), dict):
        yield f"{path}: not a report of the conversion"


def _entry_problems(name: str, entries: Mapping[str, Entry], stage: str) -> Iterator[str]:
    entry = entries.get(name)
    if entry is None:
        nearest = difflib.get_close_matches(name, entries, n=1)
        known = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(list(entries)[:8]) or 'none'}"
        yield f"dataset not found: {name} ({known})"
    elif entry.formatting not in FORMATS:
        yield f"{name}: formatting is {entry.formatting}, not {' or '.join(FORMATS)}"
    elif entry.ranking != (stage in RANKING_STAGES):
        holds, wanted = ("pairs", "single answers") if entry.ranking else ("single answers", "pairs: chosen, rejected")
        yield f"{name} holds {holds}, and stage: {stage} learns from {wanted}"
    elif stage == "kto" and "kto_tag" not in (entry.columns or {}):
        yield f"{name} has no column kto_tag, which stage: kto learns from"
    elif entry.file is not None and entry.file.is_dir():
        kinds = {path.suffix for path in entry.file.iterdir()}
        if len(kinds) != 1 or not kinds <= {*FILE_TYPES}:
            yield f"{entry.file} must hold files of one kind ({', '.join(FILE_TYPES)}), and nothing else"
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
    """The first thing in a JSONL file that would make LLaMA Factory fail, or drop a row without a word."""
    wanted = _columns(entry)
    read = 0
    large = file.stat().st_size > CHUNK_BYTES
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            read += len(line)
            if read > SCANNED_BYTES:
                return
            if problem := _row_problem(line, wanted, others_must_be_text=large):
                yield f"{file}:{number}: {problem}"
                return


def _columns(entry: Entry) -> dict[str, type]:
    """The columns that must be there, and what they must hold."""
    columns = entry.columns
    if entry.formatting != "alpaca":
        return {
            (columns or {}).get("messages", "conversations" if entry.formatting == "sharegpt" else "messages"): list
        }
    if columns is None:
        return {"instruction": str, "output": str}
    return {columns[key]: str for key in ("prompt", "response") if key in columns}


def _row_problem(line: bytes, wanted: Mapping[str, type], *, others_must_be_text: bool) -> str | None:
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
            return f"{name} is no {'text' if kind is str else 'list'}, and LLaMA Factory would drop the row"
    other = [name for name, value in row.items() if name not in wanted and not isinstance(value, str)]
    if other and others_must_be_text:
        return f"column {other[0]} is no text; once its type changes after 10 MB, loading fails. Leave such columns out"
    return None


def check_held_out(values: Mapping[str, Any], dropped: Mapping[str, str]) -> Check:
    """No task and no prompt of the held-out rows stands in the training rows."""
    if values.get("val_size"):
        if problem := _nothing_left(values):
            return error("held-out", problem, "Write a smaller val_size, or use eval_dataset.")
        found = "val_size takes rows at random, so steps of one task come to stand on both sides"
        return warning("held-out", found, "Use eval_dataset: the conversion holds out whole tasks.")
    names, held_out = names_in(values.get("dataset")), names_in(values.get("eval_dataset"))
    if not held_out:
        found = f"none: {dropped['eval_dataset']}" if "eval_dataset" in dropped else "none"
        return warning("held-out", found, "Without held-out rows nobody can say how good the judge is.")
    if both := set(names) & set(held_out):
        return error("held-out", f"{', '.join(sorted(both))} is trained on and held out", "Name its held-out side.")
    folder = folder_of(values)
    try:
        return _compare(folder, names, held_out)
    except (DataError, AttributeError, KeyError, TypeError) as failure:
        return warning("held-out", f"could not be compared: {failure}", f"Convert the data again: {CONVERT}")


def _nothing_left(values: Mapping[str, Any]) -> str | None:
    """Why `val_size` takes every row, if it does and the rows can be counted."""
    if values.get("streaming") or values.get("mix_strategy", "concat") != "concat":
        return None
    try:
        entries = read_entries(folder_of(values))
    except DataError:
        return None  # the check of the datasets tells
    chosen = [entries[name] for name in names_in(values.get("dataset")) if name in entries]
    counts = [entry.num_samples or _rows_of(entry) for entry in chosen]
    rows = sum(min(count, values.get("max_samples") or count) for count in counts if count)
    taken = values["val_size"] if values["val_size"] >= 1 else math.ceil(values["val_size"] * rows)
    if None in counts or not rows or taken < rows:
        return None
    return f"val_size: {values['val_size']} takes all {rows:,} rows, and none is left to train on"


def _compare(folder: Path, names: list[str], held_out: list[str]) -> Check:
    audit = _audit(folder)
    if audit is not None and not audit.get("passed", True):
        found = f"the conversion found {audit.get('tasks_on_both_sides', '?')} tasks on both sides"
        return error("held-out", found, f"Convert the data again: {CONVERT}")
    sides = [[folder / f"{name}{SIDECAR_SUFFIX}" for name in side] for side in (names, held_out)]
    if not all(path.is_file() for side in sides for path in side):
        return ok("held-out", f"{', '.join(held_out)}; not compared, for these rows say nothing of their tasks")
    trained, kept = (_identities(side) for side in sides)
    shared_tasks, shared_prompts = trained[0] & kept[0], trained[1] & kept[1]
    if shared_tasks or shared_prompts:
        example = next(iter(shared_tasks or shared_prompts))
        found = (
            f"{len(shared_tasks):,} tasks and {len(shared_prompts):,} prompts are also trained on, such as {example}"
        )
        return error("held-out", found, f"Convert both together: {CONVERT}")
    return ok("held-out", f"{len(kept[1]):,} prompts of {len(kept[0]):,} tasks, none of them trained on")


def _audit(folder: Path) -> Mapping[str, Any] | None:
    path = folder / REPORT
    report = read_json(path) if path.is_file() else None
    audit = report.get("leak_audit") if isinstance(report, dict) else None
    return audit if isinstance(audit, dict) else None


def _identities(sidecars: list[Path]) -> tuple[set[str], set[str]]:
    """Tasks and prompts of some rows."""
    tasks: set[str] = set()
    prompts: set[str] = set()
    for row in (row for path in sidecars for row in read_jsonl(path)):
        prompts.add(row["prompt_sha256"])
        if task := row["metadata"].get("task_id"):
            tasks.add(str(task))
    return tasks, prompts
