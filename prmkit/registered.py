"""Read the registry of judges: its versions and tags, and whether a version's files are unchanged.

`history.jsonl` is the registry: a version exists, or a tag points to it, because a line says so. Each action writes and
syncs one line, so a crash cannot leave a partial action.
"""

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from prmkit.errors import DataError, UsageError
from prmkit.files import read_json, sha256_of
from prmkit.paths import EVALUATION

REGISTRY_VARIABLE = "PRMKIT_JUDGES"
HISTORY_FILE = "history.jsonl"
VERSION_FILE = "version.json"
RUN, DATA, ROWS = "run", "data", "rows"
"""Folders of a version: the training run, its training and held-out datasets, and the rows they were converted from."""
SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def registry_folder() -> Path:
    """Return the registry's folder: `judges/`, or PRMKIT_JUDGES (for cron, which starts in another directory)."""
    return Path(os.environ.get(REGISTRY_VARIABLE) or "judges")


@dataclass(frozen=True, order=True)
class VersionId:
    """A version of a judge."""

    name: str
    number: int

    def __str__(self) -> str:
        return f"{self.name}@{self.number}"


@dataclass
class RegistryState:
    """The versions and tags that result from a history."""

    versions: list[VersionId] = field(default_factory=list)
    """Those that exist, oldest first."""
    removed: list[VersionId] = field(default_factory=list)
    """Those that were removed."""
    last_number: dict[str, int] = field(default_factory=dict)
    """Judge -> its highest number ever; numbers are never reused, not even after `remove`."""
    tags: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    """(judge, tag) -> the versions that have had it, the current one last."""

    def tagged(self, name: str, tag: str) -> int | None:
        """Return the number of the version to which a tag points now; None if no version has the tag."""
        versions = self.tags.get((name, tag))
        return versions[-1] if versions else None

    def tags_of(self, version: VersionId) -> list[str]:
        """Return the tags that point to a version now."""
        return sorted(
            tag for (name, tag), held in self.tags.items() if name == version.name and held[-1:] == [version.number]
        )


def read_history(folder: Path) -> list[dict[str, Any]]:
    """Read the actions so far, without an incomplete last line, which was being written when the machine stopped.

    Raises:
        DataError: a line is damaged, or cannot have happened after the lines above it; the registry's state is unknown.
    """
    import orjson

    try:
        content = (folder / HISTORY_FILE).read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(f"{folder / HISTORY_FILE}: {error.strerror}.") from error
    lines: list[dict[str, Any]] = []
    state = RegistryState()
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            lines.append(orjson.loads(line))
            _replay(state, lines[-1])
        except (ValueError, TypeError, KeyError) as error:
            reason = error.args[0] if type(error) is ValueError else "not an action"
            raise DataError(
                f"{folder / HISTORY_FILE}:{number}: damaged ({reason}). Restore the file from a backup."
            ) from error
    return lines


def state_of(history: Sequence[Mapping[str, Any]]) -> RegistryState:
    """Replay the actions; return the resulting state."""
    state = RegistryState()
    for line in history:
        _replay(state, line)
    return state


def _replay(state: RegistryState, line: Mapping[str, Any]) -> None:
    """Change the state as an action did.

    Raises:
        ValueError: the action is unknown, or impossible in this state.
        KeyError, TypeError: it is no action.
    """
    action, version = line["action"], VersionId(line["judge"], line["version"])
    texts = (version.name, line["time"], line.get("tag", ""))
    if type(version.number) is not int or not all(isinstance(each, str) for each in texts) or "who" not in line:
        raise TypeError
    last = state.last_number.get(version.name, 0)
    if action == "add":
        if not SAFE_NAME.fullmatch(version.name) or version.number <= last:
            raise ValueError(f"{version} cannot be added after {version.name}@{last}")
        state.versions.append(version)
        state.last_number[version.name] = version.number
    elif action not in ("remove", "tag", "rollback", "refuse"):
        raise ValueError(f"unknown action {action!r:.40}")
    elif action != "refuse" and version not in state.versions:
        raise ValueError(f"{version} does not exist at this point")
    elif action == "remove":
        state.versions.remove(version)
        state.removed.append(version)
        for (judge, _), held in state.tags.items():
            left = [each for each in held if (judge, each) != (version.name, version.number)]
            # Of 1, 2, 1, only 1 is left, or a rollback from 1 would go to 1.
            held[:] = [each for each, later in pairwise([*left, None]) if each is not None and each != later]
    elif action == "tag":
        state.tags.setdefault((version.name, line["tag"]), []).append(version.number)
    elif action == "rollback" and version.number != line["was"]:  # an equal one, of earlier releases, changed nothing
        held = state.tags.get((version.name, line["tag"]), [])
        if held[-2:] != [version.number, line["was"]]:
            raise ValueError(f"{line['tag']} cannot go from {version.name}@{line['was']} to {version}")
        held.pop()


def find_version(reference: str, folder: Path | None = None) -> VersionId:
    """Resolve a reference to a version.

    Args:
        reference: a tag (`production`), a number, or either with the judge's name: `NAME@TAG`, `NAME@NUMBER`.
        folder: the registry.

    Raises:
        UsageError: no version matches, or several do.
    """
    folder = folder or registry_folder()
    state = state_of(read_history(folder))
    name, _, rest = reference.rpartition("@")
    known = list(dict.fromkeys(version.name for version in state.versions))
    if not known:
        raise UsageError(f"{folder}: no judge is registered. Add one: python manage_judges.py add saves/RUN")
    matches = [
        version
        for version in state.versions
        if name in ("", version.name)
        and (rest == str(version.number) or state.tagged(version.name, rest) == version.number)
    ]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UsageError(f"{reference} could be {' or '.join(map(str, matches))}. Add the judge's name: NAME@{rest}")
    tags = sorted({f"{name}@{tag}" for (name, tag), held in state.tags.items() if held})
    shown = ", ".join([*tags, *map(str, state.versions[-5:])])
    raise UsageError(f"{reference}: no such version or tag in {folder}. Available: {shown}.")


def folder_of_version(version: VersionId, folder: Path | None = None) -> Path:
    """Return the folder of a version."""
    return (folder or registry_folder()) / version.name / str(version.number)


def read_version(version: VersionId, folder: Path | None = None) -> dict[str, Any]:
    """Read the version.json of a version.

    Raises:
        DataError: the file is missing or damaged.
    """
    file = folder_of_version(version, folder) / VERSION_FILE
    record = read_json(file)
    if not isinstance(record, dict) or not isinstance(record.get("files"), dict):
        raise DataError(f"{file}: damaged. Restore it from a backup.")
    return record


def check_files(version: VersionId, folder: Path | None = None, *, below: str = "") -> None:
    """Check that the files of a version have not changed since it was added.

    Args:
        version: the version to check.
        folder: the registry.
        below: check only files in this folder of the version, for example `run`.

    Raises:
        DataError: a file was changed, added or deleted.
    """
    root = folder_of_version(version, folder)
    expected = {name: sha for name, sha in read_version(version, folder)["files"].items() if name.startswith(below)}
    actual = {str(file.relative_to(root)) for file in (root / below).rglob("*") if file.is_file() or file.is_symlink()}
    for name in sorted(expected.keys() | actual - {VERSION_FILE}):
        change = "was added" if name not in expected else "was deleted" if name not in actual else None
        if change is None and ((root / name).is_symlink() or sha256_of(root / name) != expected[name]):
            change = "was changed"
        if change:
            raise DataError(
                f"{root / name} {change} after {version} was registered. Restore it, or use another version."
            )


def registered_run(reference: str) -> Path:
    """Return the run folder of a registered version, after checking its files.

    Raises:
        UsageError: there is no such version.
        DataError: its files have changed since it was added.
    """
    version = find_version(reference)
    check_files(version, below=f"{RUN}/")
    return folder_of_version(version) / RUN


def is_registered(run: Path) -> bool:
    """Whether a run folder is a registry's copy, which must not be changed."""
    return run.name == RUN and (run.parent / VERSION_FILE).is_file()


def results_of(run: Path) -> list[Path]:
    """Return the folders that may have results about a training run, oldest first; new results go to the last one.

    A registered version never changes, so its later results are in a folder next to the versions.
    """
    version = run.parent
    return [run / EVALUATION, *([version.parent / "results" / version.name] if is_registered(run) else [])]


def results_folder(run: Path) -> Path:
    """Return the folder for new results about a training run."""
    return results_of(run)[-1]


class UseRegistered(argparse.Action):
    """Makes `--judge REFERENCE` mean the same as the flag that takes the run's folder."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Store the folder as the other flag does.

        Raises:
            UsageError: both flags were passed, or there is no such version.
        """
        if getattr(namespace, self.dest, None):
            raise UsageError(f"{option_string} and a folder are mutually exclusive. Use only one.")
        run = registered_run(str(values))
        setattr(namespace, self.dest, str(run) if self.dest == "export_only" else run)
