"""Ctrl-C and kill at the front end: a checkpoint is saved, nothing keeps running, and the same command continues."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import Started, start_command, wait_for
from terminal import ENVIRONMENT, copy_project, few_tasks

pytestmark = [pytest.mark.llamafactory, pytest.mark.new_processes]
COMMAND = ("./run_training.sh", "-d", "reward_model_clip", "logging_steps=1", "eval_strategy=no")


@pytest.fixture(scope="module")
def project(root: Path, tiny_model: Path, sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copy_project(root, tmp_path_factory.mktemp("signals") / "my project")
    shutil.copytree(tiny_model, folder / "model", dirs_exist_ok=True)
    (folder / "finetune.jsonl").write_text(few_tasks(sample), encoding="utf-8")
    return folder


def steps_of(project: Path) -> int:
    log = project / "logs" / "trainer_log.jsonl"
    return len(log.read_text(encoding="utf-8").splitlines()) if log.exists() else 0


def press_ctrl_c(run: Started) -> None:
    """In a terminal the signal reaches every process of the group, the shell as well as train.py."""
    os.killpg(run.process.pid, signal.SIGINT)


def terminate_the_shell(run: Started) -> None:
    run.process.send_signal(signal.SIGTERM)


@pytest.mark.parametrize(("stop", "code"), [(press_ctrl_c, 130), (terminate_the_shell, 143)])
def test_stopped_by_a_signal(project: Path, stop: Callable[[Started], None], code: int) -> None:
    name = stop.__name__
    arguments = (*COMMAND, "num_train_epochs=100", f"output_dir=saves/{name}")
    before = steps_of(project)
    record = project / "saves" / name / "run.json"
    with start_command(arguments, project, **ENVIRONMENT) as run:
        assert wait_for(record.exists, 120) and wait_for(lambda: 2 <= steps_of(project) != before, 120), run.living()
        stop(run)
        said = run.ends(code, within=60)
    assert "same command" in said and "without saving" not in said, said
    assert json.loads(record.read_text())["status"] == "interrupted"
    assert list((project / "saves" / name).glob("checkpoint-*")), said
