"""The end of a conversion: audit what was written, tell what was done, put everything in its place."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any

from prmkit import __version__
from prmkit.dataset.audit import Dataset, audit
from prmkit.dataset.formats import dataset_entry
from prmkit.dataset.processes import in_parallel
from prmkit.dataset.publish import publish, sync_files
from prmkit.dataset.report import Tally
from prmkit.dataset.settings import Settings
from prmkit.dataset.variants import FULL, held_out_name
from prmkit.dataset.write import data_file
from prmkit.errors import DataError
from prmkit.files import read_json, sha256_of, write_json
from prmkit.paths import HELD_OUT_SUFFIX, INFO, REPORT

log = logging.getLogger(__name__)


def own_file(settings: Settings, name: str) -> str:
    """A conversion with filters leaves the report and the rejected rows of the main one alone."""
    return f"{settings.name}.{name.removeprefix('conversion_')}" if settings.filters else name


def finish(
    settings: Settings, told: Mapping[str, Any], tally: Tally, rows: Mapping[str, int], new: Path, *, fork: bool
) -> dict[str, Any]:
    """Audit and publish.

    Args:
        settings: of the conversion.
        told: what the report says of reading and deciding.
        tally: what it says of the rows.
        rows: how many rows each dataset has, by name, in the order in which to list them.
        new: the folder with their files, complete; it lies in the folder of the conversion's work.
        fork: use a second process.

    Returns:
        The report.

    Raises:
        DataError: the data would leak, or what an earlier conversion left is damaged.
    """
    entries = {name: dataset_entry(data_file(name), settings.form) for name in rows}
    info, earlier = _read_object(settings.output / INFO), _read_object(settings.output / own_file(settings, REPORT))
    kept = {name: entry for name, entry in info.items() if name not in {*entries, *earlier.get("entries", [])}}
    audited, _ = in_parallel(
        [lambda _: _refuse_leaks(settings.output, new, entries, kept), lambda _: _clear_and_sync(new)],
        lambda _: None,
        fork=fork,
    )
    report_file = own_file(settings, REPORT)
    files = sorted([*(path.name for path in new.iterdir()), report_file])
    report = {
        **told,
        **tally.as_json(),
        "held_out": _held_out(settings, tally, new),
        "leak_audit": audited,
        "variants": _variants(rows),
        "settings": settings.as_json(),
        "versions": _versions(),
        "entries": list(entries),
        "files": files,
    }
    write_json(new / report_file, report)
    write_json(new / INFO, kept | entries)
    _warn_of_others_files(settings.output, set(files) - set(earlier.get("files", [])))
    publish(settings.output, new.parent, new, _obsolete(earlier, files))
    return report


def _clear_and_sync(new: Path) -> None:
    """Remove what the conversion is done with, and wait for the disk."""
    for left in new.parent.iterdir():
        if left.is_file():
            left.unlink()
    sync_files(new)


def _obsolete(earlier: Mapping[str, Any], files: Sequence[str]) -> list[str]:
    """What an earlier conversion wrote and this one does not.

    A report is a file that anybody may edit: only plain names in the folder itself are ever removed.
    """
    return [name for name in earlier.get("files", []) if name not in files and Path(name).name == name]


def _warn_of_others_files(output: Path, names: Iterable[str]) -> None:
    there = sorted(name for name in names if (output / name).exists())
    if there:
        log.warning("warning: %s: replaced, though no earlier conversion lists them", ", ".join(there[:10]))


def _read_object(path: Path) -> dict[str, Any]:
    value = read_json(path) if path.exists() else {}
    if not isinstance(value, dict):
        raise DataError(f"{path}: not a JSON object. Mend it, or move it away.")
    return value


def _refuse_leaks(output: Path, new: Path, entries: Mapping[str, Any], kept: Mapping[str, Any]) -> dict[str, Any]:
    """Audit what was written, together with what earlier conversions wrote and what stays beside it."""
    datasets = [Dataset(name, new / entry["file_name"], entry) for name, entry in entries.items()]
    for name, entry in kept.items():
        if isinstance(entry, dict) and isinstance(entry.get("file_name"), str):
            earlier = Dataset(name, output / entry["file_name"], entry)
            if earlier.sidecar.is_file():
                datasets.append(earlier)
    found = audit(datasets)
    if not found["passed"]:
        raise DataError(
            f"the data would leak: {leaks_told(found)}\nWhere one of these datasets comes from an earlier conversion "
            "with another split, convert it again, or remove it from dataset_info.json."
        )
    return found


def leaks_told(found: Mapping[str, Any]) -> str:
    """What an audit found, in words."""
    examples = "".join(
        f"\n  {what} {value} stands in {example['stands_in']} and in a held-out dataset"
        for example in found["examples"]
        for what, value in example.items()
        if what != "stands_in"
    )
    tasks, prompts = found["tasks_on_both_sides"], found["prompts_on_both_sides"]
    return f"{tasks:,} tasks and {prompts:,} prompts stand on both sides.{examples}"


def _held_out(settings: Settings, tally: Tally, new: Path) -> dict[str, Any]:
    whole = new / data_file(held_out_name(settings.name if settings.filters else FULL))
    tasks, rows = tally.tasks(held_out=True), tally.rows(held_out=True)
    # Where no row names its task, each prompt is held out by itself.
    ratio = tasks / tally.tasks() if tally.tasks() else rows / max(tally.rows(), 1)
    return {
        "tasks": tasks,
        "rows": rows,
        "sha256": sha256_of(whole) if whole.exists() else None,
        "realised_ratio": round(ratio, 4),
    }


def _variants(rows: Mapping[str, int]) -> dict[str, dict[str, int]]:
    variants = dict.fromkeys(name.removesuffix(HELD_OUT_SUFFIX) for name in rows)
    return {
        variant: {"train": rows.get(variant, 0), "held_out": rows.get(held_out_name(variant), 0)}
        for variant in variants
    }


def _versions() -> dict[str, str | None]:
    packages = ("orjson", "json-repair", "llamafactory", "transformers")
    return {"prmkit": __version__, "python": python_version(), **{package: _version(package) for package in packages}}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
