"""The files of a conversion appear all at once, and replace those of the previous one all at once.

Renaming file after file would, for a moment or permanently after a kill, leave some files of the new conversion among
those of the old one: with another split that is a leak. So during the change each name becomes a symbolic link through
`.current`, which points to the folder of the old files. Replacing `.current` is one atomic step, after which every name
points to the new file. Then the files themselves replace their links.

At rest, the folder has plain files and no links of ours. A kill leaves links, always all old or all new, that read like
the files; `recover` turns them into plain files. (A relative link that the user put in place of a file is broken from a
kill until `recover`.) Needs a file system with hard and symbolic links.
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
"""With more files than this, one sync of everything is cheaper: an fsync takes 2 ms, and there may be thousands."""


def make_stage(folder: Path) -> Path:
    """Make a conversion's working folder, inside its output folder because renaming needs a single file system."""
    return Path(tempfile.mkdtemp(prefix=_STAGE, dir=folder))


def recover(folder: Path) -> None:
    """Clean up after an interrupted conversion, to all old or all new files. Needs exclusive use of the folder.

    Raises:
        DataError: there is a `.current` that no conversion made. Following it would move other people's files.
    """
    _check_tasks_folder(folder)
    current = folder / _CURRENT
    if os.path.lexists(current):
        if not _is_ours(current):
            raise DataError(f"{current}: not made by a conversion. Check where it points, then remove it.")
        _settle(folder)
    for left in folder.glob(_STAGE + "*"):
        if not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)


def _is_ours(current: Path) -> bool:
    """Whether `.current` points into a conversion's working folder right here, which we own."""
    if not current.is_symlink() or not _OURS.fullmatch(target := os.readlink(current)):  # noqa: PTH115
        return False
    stage, files = current.parent / Path(target).parent, current.parent / target
    folders = [path for path in (stage, files) if path.is_dir() and not path.is_symlink()]
    return len(folders) == 2 and all(path.stat().st_uid == os.geteuid() for path in folders)


def _check_tasks_folder(folder: Path) -> None:
    if (folder / TASKS).is_symlink():
        raise DataError(f"{folder / TASKS}: a link, which may lead to others' files. Remove it, and convert again.")


def names_in_folder(folder: Path) -> Iterator[str]:
    """The files of a data folder by name, including those of single tasks."""
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


def publish(folder: Path, stage: Path, new: Path, obsolete: Iterable[str]) -> None:
    """Put the files of `new` in their places in `folder`, and remove those that are `obsolete`, in one step.

    Args:
        folder: what LLaMA Factory reads.
        stage: from `make_stage(folder)`.
        new: a complete folder inside `stage`, with its files synced to the disk.
        obsolete: names of the files in `folder` to remove.

    Raises:
        DataError: a folder is in the way of a file, or the disk failed after the new files were in place.
        OSError: the disk is full, or the file system has no links; `recover` brings the old files back.
    """
    names, files = set(names_in_folder(new)), set(names_in_folder(folder))
    if in_the_way := sorted(name for name in names - files if os.path.lexists(folder / name)):
        raise DataError(f"{folder / in_the_way[0]}: a folder is in the way of a file. Move it away.")
    sync(new)
    old = stage / "old"
    old.mkdir()
    if any("/" in name for name in names | files):
        (old / TASKS).mkdir()
        if not (folder / TASKS).is_dir():
            (folder / TASKS).mkdir()
    names |= files & set(obsolete)
    for name in names & files:
        os.link(folder / name, old / name)
    _point(folder / _CURRENT, old.relative_to(folder), stage)
    for name in names:
        _point(folder / name, _through_current(name), stage)
    _sync_names(folder)
    _point(folder / _CURRENT, new.relative_to(folder), stage)
    try:
        sync(folder)
        _settle(folder)
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}, after the new data was in place. Convert again.") from error


def _through_current(name: str) -> str:
    return "../" * name.count("/") + f"{_CURRENT}/{name}"


def _point(link: Path, target: Path | str, stage: Path) -> None:
    """Make `link` point to `target`, atomically, whatever was there before."""
    made = os.path.join(stage, "link")  # noqa: PTH118
    os.symlink(target, made)  # noqa: PTH211
    os.replace(made, link)  # noqa: PTH105


def _settle(folder: Path) -> None:
    """Replace links by the files that they point to; broken links are removed."""
    for name in list(names_in_folder(folder)):
        link = os.path.join(folder, name)  # noqa: PTH118
        if os.path.islink(link) and os.readlink(link) == _through_current(name):  # noqa: PTH114, PTH115
            file = os.path.join(folder, _CURRENT, name)  # noqa: PTH118
            if os.path.lexists(file):  # what was there may itself be a link made by the user
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
