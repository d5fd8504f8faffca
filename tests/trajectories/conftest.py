"""Runs in made-up files of every form, read the way the script reads them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prmkit.trajectories.importing import FileReport, Options, read_runs
from prmkit.trajectory import Trajectory

Read = Callable[..., list[Trajectory]]


@pytest.fixture
def reports() -> list[FileReport]:
    return []


@pytest.fixture
def read(tmp_path: Path, reports: list[FileReport]) -> Read:
    """Write values as lines (one value: as one document) and read the runs in them."""

    def reading(*values: Any, name: str | None = None, **options: Any) -> list[Trajectory]:
        path = tmp_path / (name or ("runs.json" if len(values) == 1 else "runs.jsonl"))
        lines = [value if isinstance(value, str) else json.dumps(value, indent=2 if len(values) == 1 else None)
                 for value in values]  # fmt: skip
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return list(read_runs([path], Options(**options), reports))

    return reading


def outline(run: Trajectory) -> list[tuple[str, str, list[tuple[str, Any]], list[str]]]:
    """Thought, text, calls and results of every step: what a judge will see of it."""
    return [
        (
            step.thought,
            step.text,
            [(call.name, call.arguments) for call in step.calls],
            [result.text for result in step.results],
        )
        for step in run.steps
    ]
