"""The leak audit: does any task or prompt of a held-out dataset also stand in a training dataset?

It reads what was written and knows nothing of how the split was made. It also reads datasets that others wrote: where
no sidecar traces the rows back to tasks, prompts are compared alone.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prmkit.errors import DataError
from prmkit.files import read_json, read_jsonl
from prmkit.paths import HELD_OUT_SUFFIX, INFO, sidecar_of

_PROMPTS_A_PASS = 200_000
"""Held-out prompts that are compared at once, at about 100 bytes each; beyond, the files are read once more."""
_EXAMPLES = 5
_HELD_OUT_ELSEWHERE = re.compile(r"[_-](?:eval|val|valid|validation|test|dev|held_?out)$", re.IGNORECASE)


@dataclass(frozen=True)
class Dataset:
    """One entry of dataset_info.json with its file."""

    name: str
    path: Path
    entry: Mapping[str, Any]

    @property
    def sidecar(self) -> Path:
        """Where our conversion keeps what traces the rows back; others' datasets have none."""
        return sidecar_of(self.path)

    @property
    def held_out(self) -> bool:
        """Whether the name says that the rows are for evaluation."""
        if self.sidecar.exists():
            return self.name.endswith(HELD_OUT_SUFFIX)
        return bool(_HELD_OUT_ELSEWHERE.search(self.name))


def read_datasets(folder: Path) -> list[Dataset]:
    """The datasets of a folder whose files lie there too, as its dataset_info.json lists them.

    Raises:
        DataError: there is no dataset_info.json, or it is damaged, or it names a file that is missing.
    """
    info = folder / INFO
    listed = read_json(info)
    if not isinstance(listed, dict):
        raise DataError(f"{info}: not an object of datasets.")
    datasets = [
        Dataset(name, folder / entry["file_name"], entry)
        for name, entry in listed.items()
        if isinstance(entry, dict) and isinstance(entry.get("file_name"), str)
    ]
    for dataset in datasets:
        if not dataset.path.is_file():
            raise DataError(f"{dataset.path}: missing, though {info} lists it as {dataset.name}. Convert again.")
    return datasets


def audit(datasets: Sequence[Dataset]) -> dict[str, Any]:
    """Compare every held-out dataset with every training dataset.

    Returns:
        `passed`, what was compared, and examples of what stands on both sides.

    Raises:
        DataError: a file is damaged.
    """
    held_out = [dataset for dataset in datasets if dataset.held_out]
    training = [dataset for dataset in datasets if not dataset.held_out]
    rows, tasks = 0, set()
    for dataset in held_out:
        for _, task in _rows_of(dataset):
            rows += 1
            tasks.add(task)
    tasks.discard("")

    shared: dict[tuple[str, str], str] = {}
    passes = -(-rows // _PROMPTS_A_PASS)
    for number in range(passes):
        prompts = {
            prompt for dataset in held_out for prompt, _ in _rows_of(dataset) if _pass_of(prompt, passes) == number
        }
        for dataset in training:
            for prompt, task in _rows_of(dataset):
                if task in tasks:
                    shared.setdefault(("task", task), dataset.name)
                if prompt in prompts:
                    shared.setdefault(("prompt_sha256", prompt), dataset.name)
    return {
        "passed": not shared,
        "training_datasets": len(training),
        "held_out_datasets": len(held_out),
        "held_out_rows": rows,
        "held_out_tasks": len(tasks),
        "tasks_on_both_sides": sum(what == "task" for what, _ in shared),
        "prompts_on_both_sides": sum(what == "prompt_sha256" for what, _ in shared),
        "examples": [{what: value, "stands_in": name} for (what, value), name in list(shared.items())[:_EXAMPLES]],
    }


def _pass_of(prompt: str, passes: int) -> int:
    return int(prompt[:8], 16) % passes


def _rows_of(dataset: Dataset) -> Iterator[tuple[str, str]]:
    """The SHA-256 of each row's prompt, as the user wrote it where that is known; and its task, empty for none."""
    if dataset.sidecar.exists():
        for traced in read_jsonl(dataset.sidecar):
            try:
                task = traced["metadata"].get("task_id")
                yield traced["prompt_sha256"], "" if task is None else str(task)
            except (TypeError, KeyError, AttributeError) as error:
                raise DataError(f"{dataset.sidecar}: not written by a conversion. Convert again.") from error
        return
    rows = read_json(dataset.path) if dataset.path.suffix == ".json" else read_jsonl(dataset.path)
    for row in rows:
        if prompt := _prompt_of(row, dataset.entry):
            yield hashlib.sha256(prompt.encode(errors="surrogatepass")).hexdigest(), ""


def _prompt_of(row: Any, entry: Mapping[str, Any]) -> str:
    """What a row of someone else's dataset asks: the first turn that is no system text."""
    if not isinstance(row, dict):
        return ""
    columns, tags = entry.get("columns") or {}, entry.get("tags") or {}
    if entry.get("formatting", "alpaca") != "alpaca":
        for turn in row.get(columns.get("messages", "conversations")) or []:
            if isinstance(turn, dict) and turn.get(tags.get("role_tag", "from")) != tags.get("system_tag", "system"):
                return str(turn.get(tags.get("content_tag", "value"), ""))
        return ""
    parts = row.get(columns.get("prompt", "instruction")), row.get(columns.get("query", "input"))
    return "\n".join(str(part) for part in parts if part)
