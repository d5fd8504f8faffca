"""Are the datasets there, can LLaMA Factory load them, and does nothing that is held out stand in the training rows?"""

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson

from prmkit.errors import DataError
from prmkit.files import read_json, read_jsonl
from prmkit.training.check import Check, error, ok, warning
from prmkit.training.entries import Entry, folder_of, names_in, read_entries

CONVERT = "python convert_dataset.py"
FORMATS = ("alpaca", "sharegpt", "openai")
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
    problems = [problem for name in names for problem in _entry_problems(name, entries)]
    if problems:
        return error("datasets", "; ".join(problems), f"Convert the data again ({CONVERT}), or name another dataset.")
    return ok("datasets", ", ".join(f"{name} ({_rows_told(entries[name])})" for name in names))


def _rows_told(entry: Entry) -> str:
    if entry.file is None or entry.file.suffix != ".jsonl":
        return "loadable"
    with entry.file.open("rb") as stream:
        return f"{sum(1 for line in stream if line.strip()):,} rows"


def _entry_problems(name: str, entries: Mapping[str, Entry]) -> Iterator[str]:
    entry = entries.get(name)
    if entry is None:
        nearest = difflib.get_close_matches(name, entries, n=1)
        known = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(list(entries)[:8]) or 'none'}"
        yield f"dataset not found: {name} ({known})"
    elif entry.formatting not in FORMATS:
        yield f"{name}: formatting is {entry.formatting}, not {' or '.join(FORMATS)}"
    elif entry.file is not None:
        yield from _file_problems(entry, entry.file)


def _file_problems(entry: Entry, file: Path) -> Iterator[str]:
    if not file.exists():
        yield f"{file} is missing"
    elif file.is_file() and file.suffix not in FILE_TYPES:
        yield f"{file}: LLaMA Factory reads {', '.join(FILE_TYPES)}"
    elif file.is_file() and file.stat().st_size == 0:
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


def _compare(folder: Path, names: list[str], held_out: list[str]) -> Check:
    audit = _audit(folder)
    if audit is not None and not audit.get("passed", True):
        found = f"the conversion found {audit.get('tasks_on_both_sides', '?')} tasks on both sides"
        return error("held-out", found, f"Convert the data again: {CONVERT}")
    sides = [[folder / f"{name}.meta.jsonl" for name in side] for side in (names, held_out)]
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
    path = folder / "conversion_report.json"
    audit = read_json(path).get("leak_audit") if path.is_file() else None
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
