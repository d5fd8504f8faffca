"""The files of a conversion appear all at once, and replace those of the one before all at once.

Renaming file after file would leave, for a moment or for good after a kill, some files of the new conversion among
those of the old one: with another split that is a leak. So for the time of the change each name becomes a symbolic link
that leads through `.current`, which leads to the folder of the old files; renaming `.current` over is one atomic step,
and from then on every name leads to the new file. Afterwards the files themselves take the places of their links.

At rest, the folder holds plain files and no links of ours. A kill leaves links behind, at any moment all old or all
new, that read like the files; `recover` makes plain files of them. (A relative link that the user put in the place of a
file leads nowhere between a kill and `recover`.) Needs a file system with hard and symbolic links.
"""

import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from prmkit.errors import DataError

_CURRENT = ".current"
_STAGE = ".conversion-"
_SYNCED_ONE_BY_ONE = 200
"""Files. An fsync takes 2 ms, and there may be thousands of files; beyond, one sync of everything is cheaper."""


def make_stage(folder: Path) -> Path:
    """Make the folder in which a conversion works, inside the one that it writes to: renaming needs one file system."""
    return Path(tempfile.mkdtemp(prefix=_STAGE, dir=folder))


def recover(folder: Path) -> None:
    """Finish what an interrupted conversion left, all old or all new: nobody else may be at work in the folder."""
    if (folder / _CURRENT).is_symlink():
        _settle(folder)
    for left in folder.glob(_STAGE + "*"):
        shutil.rmtree(left, ignore_errors=True)


def sync_files(folder: Path) -> None:
    """Wait until the files of a folder are on the disk."""
    paths = list(folder.iterdir())
    if len(paths) > _SYNCED_ONE_BY_ONE:
        os.sync()
    else:
        for path in paths:
            _sync(path)


def publish(folder: Path, stage: Path, new: Path, obsolete: Iterable[str]) -> None:
    """Put the files of `new` in their places in `folder`, and remove those that are `obsolete`, in one step.

    Args:
        folder: what LLaMA Factory reads.
        stage: from `make_stage(folder)`.
        new: a folder inside `stage`, complete, its files on the disk.
        obsolete: names of files in `folder` that go.

    Raises:
        DataError: a folder stands where a file is to go; or the disk failed when the new files had taken over.
        OSError: the disk is full, or the file system knows no links; `recover` brings the old files back.
    """
    names = set(os.listdir(new))  # noqa: PTH208 - thousands of names: pathlib takes longer than the system calls
    files, folders = _entries(folder)
    if in_the_way := sorted(names & folders):
        raise DataError(f"{folder / in_the_way[0]}: a folder stands where a file is to go. Move it away.")
    _sync(new)
    old = stage / "old"
    old.mkdir()
    names |= files & set(obsolete)
    for name in names & files:
        os.link(folder / name, old / name)
    _point(folder / _CURRENT, old.relative_to(folder), stage)
    for name in names:
        _point(folder / name, f"{_CURRENT}/{name}", stage)
    _sync(folder)
    _point(folder / _CURRENT, new.relative_to(folder), stage)
    try:
        _sync(folder)
        _settle(folder)
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}, when the new data was in its place. Convert again.") from error


def _entries(folder: Path) -> tuple[set[str], set[str]]:
    """The names in a folder: of files and broken links, and of folders and links to folders."""
    with os.scandir(folder) as entries:
        is_folder = {entry.name: entry.is_dir() for entry in entries}
    return {name for name in is_folder if not is_folder[name]}, {name for name in is_folder if is_folder[name]}


def _point(link: Path, target: Path | str, stage: Path) -> None:
    """Make `link` lead to `target`, atomically, whatever stood there."""
    made = os.path.join(stage, "link")  # noqa: PTH118
    os.symlink(target, made)  # noqa: PTH211
    os.replace(made, link)  # noqa: PTH105


def _settle(folder: Path) -> None:
    """Put the files in the places of the links that lead to them; links that lead to none go."""
    current = folder / _CURRENT
    ours = f"{_CURRENT}/"
    with os.scandir(folder) as entries:
        links = [entry.path for entry in entries if entry.is_symlink()]
    for link in links:
        target = os.readlink(link)  # noqa: PTH115
        if target.startswith(ours):
            file = os.path.join(folder, target)  # noqa: PTH118
            if os.path.lexists(file):  # what stood there may itself be a link, of the user's
                os.replace(file, link)  # noqa: PTH105
            else:
                os.unlink(link)  # noqa: PTH108
    _sync(folder)
    current.unlink()


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
