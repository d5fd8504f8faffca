"""Publish the files of a conversion atomically.

Renaming file after file would, for a moment, or permanently if killed, leave some files of the new conversion among
those of the old one: with another split that is a leak. So during the change each name becomes a symbolic link through
`.current`, which points to the folder of the old files. Replacing `.current` is one atomic step, after which every name
points to the new file. Then the files themselves replace their links.

Except during a publish, the folder has plain files and no links of prmkit. A killed process leaves links, always all
old or all new, that can be read like the files; `recover` turns them into plain files. (A relative link that the user
created in place of a file is broken after a killed conversion, until `recover`.) Needs a file system with hard and
symbolic links.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from prmkit.errors import DataError
from prmkit.files import sync
from prmkit.paths import TASKS

_CURRENT = ".current"
_STAGE = ".conversion-"
_OURS = re.compile(rf"{re.escape(_STAGE)}[^/]+/(?:old|new)")
_SYNCED_ONE_BY_ONE = 200
"""With more files than this, one sync of the system is cheaper: an fsync takes 2 ms, and there may be thousands."""


def make_stage(folder: Path) -> Path:
    """Create a conversion's working folder, in its output folder because renaming needs a single file system."""
    return Path(tempfile.mkdtemp(prefix=_STAGE, dir=folder))


def recover(folder: Path) -> None:
    """Clean up after an interrupted conversion, to all old or all new files. Needs exclusive use of the folder.

    Raises:
        DataError: there is a `.current` that no conversion created. Following it could move other people's files.
    """
    _check_tasks_folder(folder)
    current = folder / _CURRENT
    if os.path.lexists(current):
        if not _is_ours(current):
            raise DataError(f"{current}: not created by prmkit. Check where it points, then remove it.")
        _settle(folder)
    for left in folder.glob(_STAGE + "*"):
        if not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)


def _is_ours(current: Path) -> bool:
    """Whether `.current` points into a conversion's working folder right here, which we own."""
    if not current.is_symlink() or not _OURS.fullmatch(target := os.readlink(current)):  # noqa: PTH115
        return False
    work, files = current.parent / Path(target).parent, current.parent / target
    folders = [path for path in (work, files) if path.is_dir() and not path.is_symlink()]
    return len(folders) == 2 and all(path.stat().st_uid == os.geteuid() for path in folders)


def _check_tasks_folder(folder: Path) -> None:
    if (folder / TASKS).is_symlink():
        raise DataError(f"{folder / TASKS} is a symlink, which prmkit does not follow. Remove it, then convert again.")


def names_in_folder(folder: Path) -> Iterator[str]:
    """Yield the names of the files of a data folder, including those of single tasks."""
    for parent, prefix in ((folder, ""), (folder / TASKS, f"{TASKS}/")):
        if parent.is_dir():
            with os.scandir(parent) as entries:
                yield from (prefix + entry.name for entry in entries if not _is_folder(entry))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def sync_files(folder: Path) -> None:
    """Wait until the files of a folder are on the disk."""
    paths = [folder / name for name in names_in_folder(folder)]
    if len(paths) > _SYNCED_ONE_BY_ONE:
        os.sync()
    else:
        for path in paths:
            sync(path)


def publish(folder: Path, work: Path, new: Path, obsolete: Iterable[str]) -> None:
    """Move the files of `new` to `folder`, and remove the `obsolete` ones, in one step.

    Args:
        folder: the folder that LLaMA Factory reads.
        work: the working folder from `make_stage(folder)`.
        new: a complete folder inside `work`, with its files synced to the disk.
        obsolete: names of the files in `folder` to remove.

    Raises:
        DataError: a folder has the name of a new file, or the disk failed after the new files were in place.
        OSError: the disk is full, or the file system has no links; `recover` restores the old files.
    """
    names, files = set(names_in_folder(new)), set(names_in_folder(folder))
    if blocked := sorted(name for name in names - files if os.path.lexists(folder / name)):
        raise DataError(f"{folder / blocked[0]} is a folder, but a file must be written there. Move it elsewhere.")
    sync(new)
    old = work / "old"
    old.mkdir()
    if any("/" in name for name in names | files):
        (old / TASKS).mkdir()
        if not (folder / TASKS).is_dir():
            (folder / TASKS).mkdir()
    names |= files & set(obsolete)
    for name in names & files:
        os.link(folder / name, old / name)
    _point(folder / _CURRENT, old.relative_to(folder), work)
    for name in names:
        _point(folder / name, _through_current(name), work)
    _sync_names(folder)
    _point(folder / _CURRENT, new.relative_to(folder), work)
    try:
        sync(folder)
        _settle(folder)
    except OSError as error:
        done = "while cleaning up after the new data was in place"
        raise DataError(f"{folder}: {error.strerror}, {done}. Convert again.") from error


def _through_current(name: str) -> str:
    return "../" * name.count("/") + f"{_CURRENT}/{name}"


def _point(link: Path, target: Path | str, work: Path) -> None:
    """Make `link` point to `target`, atomically, whatever was there before."""
    new = os.path.join(work, "link")  # noqa: PTH118
    os.symlink(target, new)  # noqa: PTH211
    os.replace(new, link)  # noqa: PTH105


def _settle(folder: Path) -> None:
    """Replace links by the files that they point to; broken links are removed."""
    for name in list(names_in_folder(folder)):
        link = os.path.join(folder, name)  # noqa: PTH118
        if os.path.islink(link) and os.readlink(link) == _through_current(name):  # noqa: PTH114, PTH115
            file = os.path.join(folder, _CURRENT, name)  # noqa: PTH118
            if os.path.lexists(file):  # the old file may itself be a link that the user created
                os.replace(file, link)  # noqa: PTH105
            else:
                os.unlink(link)  # noqa: PTH108
    _sync_names(folder)
    tasks = folder / TASKS
    if tasks.is_dir() and not any(tasks.iterdir()):
        tasks.rmdir()
    (folder / _CURRENT).unlink()


def _sync_names(folder: Path) -> None:
    for parent in (folder, folder / TASKS):
        if parent.is_dir():
            sync(parent)
