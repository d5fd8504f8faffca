"""A user at a terminal, in a fresh copy of the project."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ENVIRONMENT = {"VIRTUAL_ENV": sys.prefix, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
"""Of a user who activated the environment of the tests."""


def copy_project(root: Path, folder: Path) -> Path:
    """Copy what a clone would hold, and what is not yet committed."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=root, capture_output=True, text=True
    ).stdout.split("\n")
    for name in filter(None, listed):
        if (root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, folder / name)
    return folder


def type_in(
    project: Path, line: str, *, stdin: str = "", codes: tuple[int, ...] = (0,)
) -> subprocess.CompletedProcess[str]:
    """Run a line in bash as it stands in the guide, with the environment's programs on the path."""
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=project,
        env={**os.environ, **ENVIRONMENT},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert done.returncode in codes, f"{line}\ngave {done.returncode}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    return done
