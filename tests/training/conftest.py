"""A project folder with a tiny model and tiny data, and a run in it that tests share: LLaMA Factory starts slowly."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from layout import ROWS, MakeProject, row, write_config
from processes import start

from prmkit.files import exclusive_lock


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The shared run is a run of LLaMA Factory: what needs it is marked so."""
    for item in items:
        if "finished" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.llamafactory)


@pytest.fixture(scope="session")
def micro_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model whose tokenizer was trained on the rows of these tests."""
    from tools.demo.tiny_model import build_tiny_model

    folder = tmp_path_factory.mktemp("micro")
    sample = folder / "sample.jsonl"
    rows = [row(number) for number in range(ROWS)]
    turns = [[{"value": "You are Qwen. " + each["instruction"]}, {"value": each["output"]}] for each in rows]
    sample.write_text("".join(json.dumps({"conversations": pair}) + "\n" for pair in turns), encoding="utf-8")
    build_tiny_model(sample, folder / "model")
    return folder / "model"


@pytest.fixture(scope="session")
def make_project(micro_model: Path) -> MakeProject:
    """Lay out a user's folder: model/, data/, config.yaml."""

    def make(folder: Path, **changes: Any) -> Path:
        (folder / "data").mkdir(parents=True)
        shutil.copytree(micro_model, folder / "model")
        rows = [json.dumps(row(number)) + "\n" for number in range(ROWS)]
        (folder / "data" / "steps.jsonl").write_text("".join(rows[8:]), encoding="utf-8")
        (folder / "data" / "steps_eval.jsonl").write_text("".join(rows[:8]), encoding="utf-8")
        entries = {name: {"file_name": f"{name}.jsonl"} for name in ("steps", "steps_eval")}
        (folder / "data" / "dataset_info.json").write_text(json.dumps(entries), encoding="utf-8")
        (folder / "data" / "conversion_report.json").write_text('{"held_out": {"tasks": 2, "sha256": "c0ffee"}}')
        write_config(folder / "config.yaml", **changes)
        return folder

    return make


@pytest.fixture(scope="session")
def finished(make_project: MakeProject, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose run `saves/run` is finished and exported. Not to be changed: see `finished_copy`."""
    parallel = "PYTEST_XDIST_WORKER" in os.environ
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if parallel else base) / "finished"  # the workers' folders are side by side
    with exclusive_lock(shared, "training", patience=600):
        project = shared / "a finished project"
        if not (project / "shown.txt").exists():
            make_project(project)
            (project / "exported_model").mkdir()
            (project / "exported_model" / ".gitkeep").touch()
            shown = start(project, "--export").ends(0)
            (project / "shown.txt").write_text(shown)
    return project


@pytest.fixture
def finished_copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished project that a test may spoil."""
    return Path(shutil.copytree(finished, tmp_path / "project"))


@pytest.fixture
def killed_copy(finished_copy: Path) -> Path:
    """The finished project as a kill in the middle would have left it: checkpoints, no final files."""
    run = finished_copy / "saves" / "run"
    for name in ("adapter_model.safetensors", "trainer_state.json"):
        (run / name).unlink()
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "status": "running", "ended": None}))
    return finished_copy
