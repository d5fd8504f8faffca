"""A user at a terminal, in a fresh copy of the project."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ENVIRONMENT = {"VIRTUAL_ENV": sys.prefix, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
"""Of a user who activated the environment of the tests."""
TASKS_KEPT = 2
"""Of the sample's tasks: one is held out, and the other trains in seconds."""


def copy_project(root: Path, folder: Path) -> Path:
    """Copy what a clone would have, and what is not yet committed."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=root, capture_output=True, text=True
    ).stdout.split("\n")
    for name in filter(None, listed):
        if (root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, folder / name)
    return folder


def few_tasks(sample: Path) -> str:
    """The sample's rows of a few tasks, with and without held-out ones, among them the one that the guide names."""
    from prmkit.dataset.settings import Split

    lines = sample.read_text(encoding="utf-8").splitlines(keepends=True)
    task_of = [json.loads(line)["metadata"]["task_id"] for line in lines]
    tasks = list(dict.fromkeys(["webshaper_qa_0", *task_of]))
    held_out = [task for task in tasks if Split().holds_out(task)][: TASKS_KEPT // 2]
    kept = {*held_out, *[task for task in tasks if task not in held_out][: TASKS_KEPT - len(held_out)]}
    return "".join(line for line, task in zip(lines, task_of, strict=True) if task in kept)


def type_in(
    project: Path, line: str, *, stdin: str = "", codes: tuple[int, ...] = (0,)
) -> subprocess.CompletedProcess[str]:
    """Run a line in bash exactly as the guide has it, with the environment's programs on the path."""
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
