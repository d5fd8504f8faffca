"""Add, tag, roll back and remove versions, under one lock, with one synced history line per action."""

import getpass
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prmkit import registered
from prmkit.dataset_info import data_folder_of
from prmkit.errors import DataError, UsageError
from prmkit.files import (
    end_of_last_line,
    exclusive_lock,
    hash_content,
    read_json,
    read_jsonl,
    sha256_of,
    sync,
    write_all,
    write_json,
)
from prmkit.paths import EVALUATION, INFO, METRICS_FILE, REPORT, RUN_RECORD, sidecar_of
from prmkit.registered import DATA, ROWS, RUN, SAFE_NAME, RegistryState, VersionId

log = logging.getLogger("prmkit")

_PATIENCE = 60.0
"""Seconds that a command waits for another command."""
_NOT_COPIED = ("checkpoint-*", "global_step*", "*.part", ".lock", "runs", "*.log", f"{EVALUATION}_limit_*")
"""Files of a run that are not copied: needed only to resume it, or written while it runs."""
_ADDING = ".adding-"
"""The folder of a version that is being added has this prefix before its number."""
_PUBLIC = (
    "adapter_*", "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*",
    "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.jinja", "README.md",
    "calibration.json",
)  # fmt: skip
"""Files that are needed to load the judge; they contain neither local paths nor training data."""


@contextmanager
def changing(folder: Path) -> Iterator[RegistryState]:
    """Lock the registry against other commands, and remove leftovers of a killed command."""
    with exclusive_lock(folder, "changing versions", lock=".registry.lock", patience=_PATIENCE):
        state = registered.state_of(registered.read_history(folder))
        _remove_leftovers(folder, state)
        yield state


def _remove_leftovers(folder: Path, state: RegistryState) -> None:
    """Remove what a killed command left, but never a registered version whose history line is lost.

    Raises:
        DataError: the history has lost the line of a registered version.
    """
    removed = [registered.folder_of_version(version, folder) for version in state.removed]
    known = {registered.folder_of_version(version, folder) for version in state.versions}
    unfinished = [place for place in folder.glob(f"*/{_ADDING}[0-9]*") if _final_place(place).name.isdecimal()]
    # These versions were renamed, but their line was not written. The .adding folder is removed last, because this
    # command can be killed, too.
    removed += [final for final in map(_final_place, unfinished) if final not in known]
    for place in [*removed, *unfinished]:
        if place.is_dir():
            _remove_folder(place)
    for file in sorted(folder.glob(f"*/*/{registered.VERSION_FILE}")):
        if file.parent.name.isdecimal() and file.parent not in known:
            raise DataError(
                f"{file.parent}: {folder / registered.HISTORY_FILE} has no line for this version, so lines of the "
                "history are lost. Restore the file from a backup, or delete the version's folder."
            )


def _final_place(adding: Path) -> Path:
    """Return the final folder of a version that is first copied to `.adding-NUMBER/NUMBER`."""
    return adding.with_name(adding.name.removeprefix(_ADDING))


def _remove_folder(place: Path) -> None:
    for each in [place, *place.rglob("*")]:
        if each.is_dir() and not each.is_symlink():
            each.chmod(0o755)
    shutil.rmtree(place)


def write_history(folder: Path, action: str, why: str | None, **values: Any) -> None:
    """Append and sync one action, which takes effect with this line.

    Raises:
        OSError: the disk is full; the history is unchanged.
    """
    import orjson

    file = folder / registered.HISTORY_FILE
    line = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "who": _who(),
        "action": action,
        **values,
        "why": why,
    }
    with file.open("ab+", buffering=0) as stream:
        end = end_of_last_line(stream.fileno())
        stream.truncate(end)  # leftovers of a killed command
        try:
            write_all(stream.write, orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
            os.fsync(stream.fileno())
        except OSError as error:
            stream.truncate(end)
            error.filename = error.filename or str(file)
            raise
    sync(folder)


def _who() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # in a container, the user may have no name
        return f"user {os.getuid()}"


# --- add --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Addition:
    """What to register."""

    run: Path
    name: str
    rows: Sequence[Path] = ()
    """The conversion's input; if empty, the files in its report, if they are unchanged."""
    keep_rows: Sequence[Path] = ()
    """Rows to store instead of the conversion's input, because a retraining may convert only part of the old rows."""
    data: Path | None = None
    """The converted data; None for the folder in run.json."""
    evaluation: Path | None = None
    """A folder with metrics; None for the run's own."""
    parent: str | None = None
    why: str | None = None
    details: Mapping[str, Any] | None = None
    """Extra fields for version.json: a retraining's key, gate and report."""


def add_version(folder: Path, addition: Addition) -> VersionId:
    """Copy a finished training run into the registry, with its data and rows, and give it the next number.

    Raises:
        DataError: the run is not finished, or its data differs from what it was trained on.
        UsageError: the name cannot be a folder name.
    """
    if not SAFE_NAME.fullmatch(addition.name):
        raise UsageError(f"--name {addition.name!r}: use letters, digits, dots, dashes and underscores.")
    record = _finished(addition.run)
    with changing(folder) as state:
        parent = str(registered.find_version(addition.parent, folder)) if addition.parent else None
        version = VersionId(addition.name, state.last_number.get(addition.name, 0) + 1)
        for other in state.versions:
            if other.name == addition.name and registered.read_version(other, folder)["run_id"] == record["id"]:
                raise UsageError(f"{addition.run} is already registered as {other}.")
        final = registered.folder_of_version(version, folder)
        # The outer folder remains until the line is written: a version that has neither a line nor this folder is not
        # a remnant of a killed command, so the history has lost its line.
        adding = final.with_name(f"{_ADDING}{final.name}")
        building = adding / final.name
        building.mkdir(parents=True)
        _copy_run(addition, building / RUN)
        _copy_data(addition, record, building)
        content = _content(version, addition, record, parent, building)
        write_json(building / registered.VERSION_FILE, content)
        _make_read_only(building)
        building.rename(final)
        sync(final.parent)
        write_history(folder, "add", addition.why, judge=version.name, version=version.number, run=str(addition.run),
                      run_id=record["id"], parent=parent)  # fmt: skip
        adding.rmdir()
    return version


def _finished(run: Path) -> dict[str, Any]:
    file = run / RUN_RECORD
    if not file.is_file():
        raise DataError(f"{run}: not a training run (no {RUN_RECORD}). Pass a folder in saves/.")
    record = read_json(file)
    if record.get("status") != "finished":
        raise DataError(
            f"{run}: the training is {record.get('status')}, not finished. Run the same training command again."
        )
    return dict(record)


def _copy_run(addition: Addition, target: Path) -> None:
    shutil.copytree(addition.run, target, ignore=shutil.ignore_patterns(*_NOT_COPIED), symlinks=False)
    if addition.evaluation:
        shutil.rmtree(target / EVALUATION, ignore_errors=True)
        shutil.copytree(addition.evaluation, target / EVALUATION)
    # The base model is found relative to the run's folder, so its relative path changes.
    record = read_json(target / RUN_RECORD)
    base = record.get("base_model") or {}
    near = addition.run / str(base.get("relative"))
    if base.get("relative") and near.is_dir():
        final = _final_place(target.parent.parent) / RUN
        base["relative"] = os.path.relpath(near.resolve(), final.resolve())
        write_json(target / RUN_RECORD, {**record, "base_model": base})


def _copy_data(addition: Addition, record: Mapping[str, Any], target: Path) -> None:
    """Copy the files that retraining needs: training and held-out rows with their sidecars, and the input."""
    data = addition.data or data_folder_of(addition.run, record)
    info = read_json(data / INFO) if data else {}
    if data is None or not any((record.get(side) or {}).get("name") in info for side in ("dataset", "eval_dataset")):
        log.warning(
            "warning: the data of %s was not found, so it cannot be retrained. Pass it with --data-dir.", addition.run
        )
        return
    (target / DATA).mkdir()
    kept = {}
    for side in ("dataset", "eval_dataset"):
        described = record.get(side) or {}
        name = described.get("name")
        if name not in info:
            continue
        file = data / info[name]["file_name"]
        if sha256_of(file) != described["sha256"]:
            raise DataError(
                f"{file} differs from the file that {addition.run} was trained on. Convert the same rows again, or use "
                "--data-dir."
            )
        kept[name] = info[name]
        for each in (file, sidecar_of(file)):
            if each.is_file():
                (target / DATA / each.relative_to(data)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(each, target / DATA / each.relative_to(data))
    write_json(target / DATA / INFO, kept)
    if (data / REPORT).is_file():
        shutil.copy2(data / REPORT, target / DATA / REPORT)
        _copy_rows(addition, read_json(data / REPORT), data, target / ROWS)


def _content_hash(file: Path) -> str:
    """Return the SHA-256 of a file's decompressed content; empty if it is damaged, so that it matches no input."""
    try:
        return hash_content(file)[0]
    except DataError:
        return ""


def _copy_rows(addition: Addition, report: Mapping[str, Any], data: Path, target: Path) -> None:
    wanted = [source["sha256"] for source in report["inputs"]]
    if addition.keep_rows:
        target.mkdir()
        for number, file in enumerate(addition.keep_rows):
            shutil.copy2(file, target / f"{number:03d}_{file.name.lstrip('0123456789_') or 'rows.jsonl'}")
        return
    # Input paths are relative to the conversion's working directory, or to the project's current folder.
    folders = [Path(), *data.resolve().parents[:4]]
    reported = [folder / source["source"] for source in report["inputs"] for folder in folders]
    files = [*addition.rows] or reported
    # Older reports have the hash of the compressed file.
    by_hash = {digest: file for file in files if file.is_file() for digest in (sha256_of(file), _content_hash(file))}
    if set(wanted) - set(by_hash):
        if addition.rows:
            raise DataError("--rows: the data was not converted from these rows (their hashes differ).")
        log.warning("warning: the rows from which the data was converted are missing or were changed, so this version "
                    "cannot be retrained. Pass them with --rows.")  # fmt: skip
        return
    target.mkdir()
    for number, sha256 in enumerate(wanted):
        file = by_hash[sha256]
        shutil.copy2(file, target / (file.name if len(wanted) == 1 else f"{number:02d}_{file.name}"))


def _content(
    version: VersionId, addition: Addition, record: Mapping[str, Any], parent: str | None, building: Path
) -> dict[str, Any]:
    metrics_file = building / RUN / EVALUATION / METRICS_FILE
    metrics = read_json(metrics_file) if metrics_file.is_file() else {}
    files = {str(file.relative_to(building)): sha256_of(file) for file in sorted(building.rglob("*")) if file.is_file()}
    return {
        "judge": version.name,
        "version": version.number,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "parent": parent,
        "run": str(addition.run),
        "run_id": record["id"],
        "base_model": record["base_model"]["name"],
        "rubrics": record.get("rubrics", []),
        "conversion_report_sha256": record.get("conversion_report_sha256"),
        "training_rows": _count_lines(building / DATA, record.get("dataset")),
        "spearman": (metrics.get("summary") or {}).get("spearman"),
        "types": {
            name: each.get("spearman") for name, each in ((metrics.get("summary") or {}).get("types") or {}).items()
        },
        "evaluation_sha256": files.get(f"{RUN}/{EVALUATION}/{METRICS_FILE}"),
        "bytes": sum((building / name).stat().st_size for name in files if name.startswith(f"{RUN}/")),
        "details": dict(addition.details or {}),
        "files": files,
    }


def _count_lines(data: Path, described: Any) -> int | None:
    name = (described or {}).get("name")
    file = sidecar_of(data / f"{name}.jsonl")
    return sum(1 for _ in read_jsonl(file)) if file.is_file() else None


def _make_read_only(folder: Path) -> None:
    for each in folder.rglob("*"):
        if each.is_file():
            each.chmod(0o444)
            sync(each)


# --- tags -------------------------------------------------------------------------------------------------------------


def tag_version(
    folder: Path, reference: str, tag: str, why: str | None, *, expected: VersionId | None = None
) -> VersionId:
    """Point a tag at a version.

    Args:
        folder: the registry.
        reference: the version.
        tag: the tag.
        why: the reason, for the history.
        expected: the version that an existing tag must still point to; if not, the tag was moved in the meantime.

    Raises:
        UsageError: there is no such version, or the tag could be mistaken for a version.
        DataError: the version's files were changed.
    """
    if not SAFE_NAME.fullmatch(tag) or tag.isdigit():
        raise UsageError(f"{tag!r} is not a valid tag. Use a word, for example production or preview.")
    with changing(folder) as state:
        version = registered.find_version(reference, folder)
        registered.check_files(version, folder)
        now = state.tagged(version.name, tag)
        if expected and now not in (None, expected.number, version.number):
            raise DataError(
                f"{tag} now points to {version.name}@{now}, but {version} was compared with {expected}, so it was not "
                "promoted. To tag it anyway, use manage_judges.py tag."
            )
        if now != version.number:
            write_history(folder, "tag", why, judge=version.name, version=version.number, tag=tag)
        else:
            log.info("%s is already %s.", version, tag)
    return version


def roll_back(folder: Path, reference: str, why: str | None) -> tuple[VersionId, VersionId]:
    """Move a tag back to the version that had it before.

    Returns:
        The version that the tag pointed to, and the one that it points to now.

    Raises:
        UsageError: no version has this tag, or no version had it before.
        DataError: the earlier version's files were changed.
    """
    with changing(folder) as state:
        version = registered.find_version(reference, folder)
        tag = reference.rpartition("@")[2]
        held = state.tags.get((version.name, tag), [])
        if not held:
            raise UsageError(f"{reference} is a version, not a tag. Name the tag to move, for example production.")
        if len(held) < 2:
            raise UsageError(f"{reference} has no earlier version to roll back to; {version} is the first.")
        earlier = VersionId(version.name, held[-2])
        registered.check_files(earlier, folder)
        write_history(folder, "rollback", why, judge=version.name, version=earlier.number, tag=tag, was=version.number)
    return version, earlier


def remove_version(folder: Path, reference: str, why: str | None) -> VersionId:
    """Delete a version that no tag points to.

    Raises:
        UsageError: the version has a tag.
    """
    with changing(folder) as state:
        version = registered.find_version(reference, folder)
        if tags := state.tags_of(version):
            raise UsageError(f"{version} has the tag {' and '.join(tags)}. Tag another version first, or roll back.")
        write_history(folder, "remove", why, judge=version.name, version=version.number)
        _remove_folder(registered.folder_of_version(version, folder))
    return version


def export_version(folder: Path, reference: str, target: Path) -> VersionId:
    """Copy the files of a version that a hub needs: weights, tokenizer and model card. Nothing is uploaded.

    Raises:
        UsageError: the folder exists.
        DataError: the version's files were changed.
    """
    version = registered.find_version(reference, folder)
    registered.check_files(version, folder, below=f"{RUN}/")
    if target.exists():
        raise UsageError(f"{target} already exists. Choose a new folder.")
    building = target.with_name(f".{target.name}.part")
    shutil.rmtree(building, ignore_errors=True)
    run = registered.folder_of_version(version, folder) / RUN
    building.mkdir(parents=True)
    for file in sorted({file for pattern in _PUBLIC for file in run.glob(pattern) if file.is_file()}):
        shutil.copyfile(file, building / file.name)  # without the file mode: the registry's files are read-only
    adapter = building / "adapter_config.json"
    if adapter.is_file():  # it contains a path that exists only on this machine
        base = registered.read_version(version, folder)["base_model"]
        write_json(adapter, {**read_json(adapter), "base_model_name_or_path": base})
    building.rename(target)
    return version
