"""Judged rows as users have them, and conversions of them."""

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prmkit.dataset.conversion import convert
from prmkit.dataset.settings import Settings

SCHEMA = """Please evaluate this clip in the following JSON format:
{
    "reasonableness_score": 0.85,  // Score from 0.0 to 1.0
    "summary": "What was done in this clip."
}

Evaluation Guidelines:
- 0.8-1.0: excellent
- 0.0-0.2: very poor
"""


def prompt_of(content: str, task: str = "Find it.") -> str:
    """A clip's prompt."""
    return f"""
You are judging one step of an agent.

Task Description: "{task}"

Previous Clips Summary: This is the first step.

Current Clip (Clip 1):
Tool Category: web
Tools Used: web-search
Content:
{content}

{SCHEMA}"""


def row_of(
    prompt: str,
    answer: str | None = None,
    *,
    score: float = 0.9,
    judge: Any = "judge-a",
    task: Any = "task_1",
    kind: Any = "clip",
    **metadata: Any,
) -> dict[str, Any]:
    """A row of finetune.jsonl."""
    if answer is None:
        answer = json.dumps({"reasonableness_score": score, "summary": "Searched."})
    return {
        "conversations": [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}],
        "metadata": {"model_name": judge, "task_id": task, "evaluation_type": kind, **metadata},
    }


def many_rows(tasks: int = 30, clips: int = 3, judges: Iterable[str] = ("judge-a", "judge-b")) -> list[dict[str, Any]]:
    """Rows of several tasks, judges and types, every one another prompt for each judge to answer."""
    return [
        row_of(
            prompt_of(f"Step {clip} of {task}: <think>search</think>", task=f"Task {task}"),
            score=round(((task * 7 + clip * 13 + number * 5) % 101) / 100, 2),
            judge=judge,
            task=f"task_{task}",
            kind="final" if clip == clips - 1 else "clip",
            clip_number=clip + 1,
            category=None if clip else "web",
        )
        for task in range(tasks)
        for clip in range(clips)
        for number, judge in enumerate(judges)
    ]


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    """Write rows (bytes are lines as they are) as JSONL."""
    lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def read_lines(path: Path) -> list[Any]:
    """All values of a JSONL file."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


Convert = Callable[..., dict[str, Any]]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Where conversions write to."""
    return tmp_path / "data"


@pytest.fixture
def convert_rows(tmp_path: Path, data: Path) -> Convert:
    """Convert rows in this process: the report. Keywords are those of `Settings`."""

    def run(rows: Iterable[Any], **settings: Any) -> dict[str, Any]:
        source = write_rows(tmp_path / "finetune.jsonl", rows)
        return convert(replace(Settings(inputs=(str(source),), output=data), **settings))

    return run


def snapshot(folder: Path) -> dict[str, bytes]:
    """What a reader finds in a folder: the content of every file by name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for pattern in ("*", "tasks/*")
        for path in folder.glob(pattern)
        if path.is_file() and not path.name.startswith(".")
    }


def file_of(data: Path, name: str, suffix: str = ".jsonl") -> Path:
    """The file of a dataset, in the folder or in that of single tasks."""
    path = data / f"{name}{suffix}"
    return path if path.exists() else data / "tasks" / f"{name}{suffix}"
