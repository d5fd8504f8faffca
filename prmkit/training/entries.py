"""The dataset entries that a config names, as LLaMA Factory finds them in `dataset_info.json`."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prmkit.errors import DataError
from prmkit.files import read_json
from prmkit.paths import HELD_OUT_SUFFIX, INFO

SAMPLED_BYTES = 1 << 20


@dataclass(frozen=True, eq=False)
class Entry:
    """One entry of `dataset_info.json`; each is itself alone, so that it can be a key."""

    name: str
    file: Path | None
    """The local file or folder; None for a dataset that comes from a hub or a script."""
    formatting: str
    columns: Mapping[str, str] | None
    tags: Mapping[str, str] | None
    ranking: bool = False
    """Whether its rows are pairs of a better and a worse answer."""
    num_samples: int | None = None
    """How many rows LLaMA Factory draws; None takes each row once."""


@dataclass(frozen=True)
class Shape:
    """How much data there is; estimated from the beginning of every file."""

    rows: int
    bytes_per_row: int


def names_in(value: Any) -> list[str]:
    """The names in a value of `dataset`, `lora_target` and the like: a text with commas, or a list."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else []
    return [str(part).strip() for part in parts]


def folder_of(values: Mapping[str, Any]) -> Path:
    """The folder that holds `dataset_info.json`."""
    return Path(str(values.get("dataset_dir", "data")))


def read_entries(folder: Path) -> dict[str, Entry]:
    """Every entry by name.

    Raises:
        DataError: there is no `dataset_info.json` in the folder, or it is not a JSON object of objects.
    """
    path = folder / INFO
    if not path.is_file():
        raise DataError(f"{path} is missing. Convert the data first: python convert_dataset.py")
    info = read_json(path)
    if not isinstance(info, dict) or not all(isinstance(raw, dict) for raw in info.values()):
        raise DataError(f"{path}: not an object of dataset entries. Convert the data again: python convert_dataset.py")
    for name, raw in info.items():
        if wrong := [f"{key} is {raw[key]!r}" for key, kind in _TYPES.items() if not isinstance(raw.get(key), kind)]:
            hint = "Convert the data again: python convert_dataset.py"
            raise DataError(f"{path}: {name}: {wrong[0]}, which LLaMA Factory cannot use. {hint}")
    return {name: _entry(name, raw, folder) for name, raw in info.items()}


_TYPES: dict[str, Any] = {
    "file_name": str | None, "formatting": str | None, "columns": dict | None, "tags": dict | None,
    "num_samples": int | None,
}  # fmt: skip


def _entry(name: str, raw: Mapping[str, Any], folder: Path) -> Entry:
    file = folder / raw["file_name"] if raw.get("file_name") else None
    formatting, ranking = raw.get("formatting", "alpaca"), bool(raw.get("ranking"))
    return Entry(name, file, formatting, raw.get("columns"), raw.get("tags"), ranking, raw.get("num_samples"))


def held_out_names(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """The held-out sides of some datasets, as far as there are any."""
    return [side for name in names if (side := name + HELD_OUT_SUFFIX) in set(known)]


def shape_of(entries: Iterable[Entry]) -> Shape | None:
    """Rows and bytes a row over all files; None when there is nothing to look at. Takes milliseconds."""
    total = rows = 0
    for entry in entries:
        if entry.file is None or not entry.file.is_file():
            continue
        size = entry.file.stat().st_size
        with entry.file.open("rb") as stream:
            sample = stream.read(SAMPLED_BYTES)
        if sample:
            total += size
            rows += max(1, round(size * max(1, sample.count(b"\n")) / len(sample)))
    return Shape(rows, total // rows) if rows else None
