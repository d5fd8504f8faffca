"""dataset_info.json: the datasets of a folder, and their column mappings.

The conversion writes it; training, evaluation and the leak audit read it here, as LLaMA Factory 0.9.5 does
(`llamafactory/data/parser.py`): an entry with `columns` or `tags` gets no defaults for those that it leaves out.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import orjson

from prmkit.errors import DataError
from prmkit.files import numbered_jsonl, read_json, read_jsonl, sha256_of
from prmkit.layouts import Rejected
from prmkit.paths import HELD_OUT_SUFFIX, INFO, sidecar_of
from prmkit.prompts.cleaning import unescape
from prmkit.registered import DATA, is_registered
from prmkit.rows import prompt_hash, task_of, trajectory_of
from prmkit.verdict import Shape, Unreadable, answer_prefix, read_answer

Format = Literal["alpaca", "sharegpt"]

_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "messages": "conversations"}
_TAGS = {
    "role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt",
    "observation_tag": "observation", "function_tag": "function_call", "system_tag": "system",
}  # fmt: skip


class RowTexts(NamedTuple):
    """The system prompt, the prompt and the answer of a dataset row."""

    system: str | None
    prompt: str
    answer: str


@dataclass(frozen=True, eq=False)
class Entry:
    """One dataset. With `eq=False`, entries are hashable by identity, so each can be a key."""

    name: str
    file: Path | None
    """The local file or folder; None for a dataset from a hub or a script."""
    formatting: str = "alpaca"
    columns: Mapping[str, str] = field(default_factory=lambda: _COLUMNS)
    """Role of a column (prompt, query, response, system, messages, …) -> its name, for the columns that exist."""
    tags: Mapping[str, str] = field(default_factory=lambda: _TAGS)
    ranking: bool = False
    """Whether it is a preference dataset, with a better and a worse answer in each row."""
    num_samples: int | None = None
    """How many rows LLaMA Factory samples; None takes each row once."""

    @property
    def sidecar(self) -> Path | None:
        """The file that traces a conversion's rows back to its input; only datasets made by prmkit have one."""
        return sidecar_of(self.file) if self.file and sidecar_of(self.file).is_file() else None

    def read(self, row: Any) -> RowTexts:
        """Return the system prompt, the prompt and the answer of a row with one question and one answer.

        Raises:
            ValueError: the row lacks the columns of its entry, or has several questions.
        """
        try:
            return self._turns(row) if self.formatting != "alpaca" else self._alpaca(row)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"a row lacks columns that {INFO} lists") from error

    def _alpaca(self, row: Mapping[str, Any]) -> RowTexts:
        names = self.columns
        parts = [row[names["prompt"]] if "prompt" in names else "", row.get(names.get("query", ""))]
        system, answer = (row.get(names.get(key, "")) for key in ("system", "response"))
        return _checked(system, "\n".join(filter(None, parts)), answer or "")

    def _turns(self, row: Mapping[str, Any]) -> RowTexts:
        turns, tags = list(row[self.columns["messages"]]), self.tags
        system = row.get(self.columns["system"]) if "system" in self.columns else None
        role, content = tags["role_tag"], tags["content_tag"]
        if turns and "system_tag" in tags and turns[0][role] == tags["system_tag"]:
            system = turns.pop(0)[content]
        if [turn[role] for turn in turns] not in ([tags["user_tag"]], [tags["user_tag"], tags["assistant_tag"]]):
            raise ValueError("a row is not one question and one answer")
        return _checked(system, turns[0][content], turns[1][content] if len(turns) > 1 else "")


def _checked(system: Any, prompt: Any, answer: Any) -> RowTexts:
    if not isinstance(prompt, str) or not isinstance(answer, str) or not isinstance(system, str | None):
        raise TypeError
    return RowTexts(system or None, prompt, answer)


def read_entries(folder: Path) -> dict[str, Entry]:
    """Read the datasets of a folder, by name.

    Raises:
        DataError: the folder has no `dataset_info.json`, or LLaMA Factory could not read it.
    """
    path = folder / INFO
    again = "Convert the data again: python convert_dataset.py"
    if not path.is_file():
        raise DataError(f"{path} is missing. Convert the data first: python convert_dataset.py")
    info = read_json(path)
    if not isinstance(info, dict) or not all(isinstance(raw, dict) for raw in info.values()):
        raise DataError(f"{path}: not an object of dataset entries. {again}")
    for name, raw in info.items():
        if wrong := [f"{key} is {raw[key]!r}" for key, kind in _TYPES.items() if not isinstance(raw.get(key), kind)]:
            raise DataError(f"{path}: {name}: {wrong[0]}, which LLaMA Factory cannot use. {again}")
    return {name: _entry(name, raw, folder) for name, raw in info.items()}


_TYPES: dict[str, Any] = {
    "file_name": str | None, "formatting": str | None, "columns": dict | None, "tags": dict | None,
    "num_samples": int | None,
}  # fmt: skip


def _entry(name: str, raw: Mapping[str, Any], folder: Path) -> Entry:
    return Entry(
        name=name,
        file=folder / raw["file_name"] if raw.get("file_name") else None,
        formatting=raw.get("formatting") or "alpaca",
        columns=_named(raw.get("columns"), _COLUMNS),
        tags=_named(raw.get("tags"), _TAGS),
        ranking=bool(raw.get("ranking")),
        num_samples=raw.get("num_samples"),
    )


def _named(given: Mapping[str, Any] | None, defaults: Mapping[str, str]) -> Mapping[str, str]:
    return defaults if given is None else {key: value for key, value in given.items() if isinstance(value, str)}


def read_sidecar(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a sidecar: the origin of each row of a dataset, its scores from 0 to 1, and its metadata.

    Raises:
        DataError: the file is missing or damaged, or a row has no hash of its prompt or an invalid task.
    """
    for row in read_jsonl(file):
        try:
            row["prompt_sha256"], task_of(row["metadata"]), trajectory_of(row["metadata"])
        except (TypeError, KeyError, AttributeError, Rejected) as error:
            raise DataError(f"{file}: not written by a conversion. Convert again.") from error
        yield row


def identities(entry: Entry) -> Iterator[tuple[str, str | None]]:
    """Yield the SHA-256 of each row's prompt (as the user wrote it, if there is a sidecar) and its task, if known.

    Raises:
        DataError: a file is damaged, or rows were added or removed after the conversion.
    """
    if entry.sidecar is None:
        yield from ((prompt_hash(texts.prompt, texts.system), None) for _, texts in texts_of(entry) if texts)
        return
    traced = 0
    for row in read_sidecar(entry.sidecar):
        traced += 1
        yield row["prompt_sha256"], task_of(row["metadata"])
    if traced != (rows := number_of_rows(entry)):
        raise DataError(
            f"{entry.file} has {rows:,} rows, but its conversion wrote {traced:,} ({entry.sidecar}). Convert again."
        )


def texts_of(entry: Entry) -> Iterator[tuple[int, RowTexts | None]]:
    """Yield line number and content of each row of a dataset; None for other columns or an empty prompt."""
    if entry.file is None:
        return
    rows = enumerate(read_json(entry.file), 1) if entry.file.suffix == ".json" else numbered_jsonl(entry.file)
    for number, row in rows:
        try:
            texts = entry.read(row)
        except ValueError:
            yield number, None
        else:
            yield number, texts if texts.prompt else None


def number_of_rows(entry: Entry) -> int | None:
    """Count the rows of a dataset; None if it is not one JSONL file."""
    if entry.file is None or entry.file.suffix != ".jsonl" or not entry.file.is_file():
        return None
    with entry.file.open("rb") as stream:
        return sum(1 for line in stream if line.strip())


def data_folder_of(run: Path, record: Mapping[str, Any]) -> Path | None:
    """Find the data folder of a training run: the first folder with the rows that it was trained on.

    Searches from the working directory and from the folders above the run's; another project may have data there under
    the same name. If no folder has those rows, returns the first one with data, or None.

    Args:
        run: the folder of the training run.
        record: the content of its `run.json`.
    """
    named = Path(record["config"].get("dataset_dir") or "data")
    places = [above / named for above in (Path(), *run.resolve().parents[:4])]
    places += [run.parent / DATA] if is_registered(run) else []
    folders = [place for place in places if (place / INFO).is_file()]
    described = record.get("dataset")
    return next((folder for folder in folders if has_rows(folder, described)), folders[0] if folders else None)


def has_rows(folder: Path, described: Any) -> bool:
    """Whether the datasets of a folder have the rows that a run's record names.

    Args:
        folder: a data folder; it may be missing.
        described: `dataset` or `eval_dataset` of the record; older records have none.
    """
    wanted = described.get("sha256") if isinstance(described, dict) else None
    return wanted is not None and rows_sha256(folder, split_names(described.get("name"))) == wanted


def rows_sha256(folder: Path, names: Sequence[str]) -> str | None:
    """The hash of a dataset's file, or one hash for the files of several; None if one of them is missing."""
    try:
        entries = read_entries(folder)
        hashes = [sha256_of(file) for name in names if name in entries and (file := entries[name].file)]
    except (DataError, OSError):
        return None
    if not names or len(hashes) < len(names):
        return None
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def split_names(value: Any) -> list[str]:
    """Split a value of `dataset`, `eval_dataset` or a similar key: a comma-separated string, or a list."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else []
    return [str(part).strip() for part in parts]


def held_out_names(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Return the held-out splits of some datasets, where they exist."""
    known = set(known)
    return [held_out for name in names if (held_out := name + HELD_OUT_SUFFIX) in known]


def label_shape(label: str, scores: Mapping[str, float]) -> Shape:
    """Return the shape of a label.

    Args:
        label: the label in the dataset.
        scores: its scores in the sidecar.
    """
    keys = tuple(scores)
    for nested in (False, True):  # a canonical label has this prefix; others must be parsed
        if label.startswith(answer_prefix(shape := Shape(keys, nested), {})):
            return shape
    answer = read_answer(unescape(label, answer=True))
    return Shape(keys, len(keys) > 1 if isinstance(answer, Unreadable) else answer.nested)


def label_shapes(folder: Path, names: Iterable[str]) -> dict[str, list[dict[str, Any]]] | None:
    """Return evaluation type (empty for rows without one) -> shapes of the labels in some datasets, by frequency.

    Takes seconds for gigabytes. None if a dataset has no sidecar, or its rows do not match it.
    """
    rows: Counter[tuple[str, Shape]] = Counter()
    try:
        entries = read_entries(folder)
        for entry in [entries[name] for name in names]:
            if entry.file is None or entry.sidecar is None:
                return None
            for row, meta in zip(read_jsonl(entry.file), read_sidecar(entry.sidecar), strict=True):
                evaluation_type = str(meta["metadata"].get("evaluation_type") or "")
                rows[evaluation_type, label_shape(entry.read(row).answer, meta["scores"])] += 1
    except (DataError, ValueError, LookupError, TypeError):
        return None  # the checks report what is damaged
    shapes: dict[str, list[dict[str, Any]]] = {}
    for (evaluation_type, shape), count in rows.most_common():
        shapes.setdefault(evaluation_type, []).append({"keys": list(shape.keys), "nested": shape.nested, "rows": count})
    return shapes


# --- what a conversion writes -------------------------------------------------------------------------------------


def training_row(prompt: str, label: str, form: Format, system: str | None = None) -> bytes:
    """Return a line of a training file. All columns are strings, because Arrow infers their types from the first 10 MB.

    Args:
        prompt: the prompt for the judge.
        label: the answer to train on.
        form: the format of the file.
        system: the system prompt, empty if the row has no system prompt; None in a file without the column.
    """
    row: dict[str, Any] = (
        {"instruction": prompt, "input": "", "output": label}
        if form == "alpaca"
        else {"conversations": [{"from": "human", "value": prompt}, {"from": "gpt", "value": label}]}
    )
    if system is not None:
        row["system"] = system
    return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)


def dataset_entry(file_name: str, form: Format, *, with_system: bool = False) -> dict[str, Any]:
    """Return the entry of a training file in dataset_info.json.

    Args:
        file_name: the name of the training file, in the folder of dataset_info.json.
        form: the format of the file.
        with_system: whether its rows have a column for the system prompt.
    """
    system = {"system": "system"} if with_system else {}
    if form == "alpaca":
        return {"file_name": file_name, "columns": {**_ALPACA_COLUMNS, **system}}
    return {
        "file_name": file_name,
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", **system},
        "tags": {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"},
    }


_ALPACA_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output"}
