"""The demo, from the shipped sample to the merged model; with few steps, as its minutes are all training."""

import re
from pathlib import Path

import pytest
from terminal import copy_project, type_in

pytestmark = [pytest.mark.llamafactory, pytest.mark.new_processes]


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def project(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_project(root, tmp_path_factory.mktemp("newcomer") / "prmkit")


def test_the_demo_trains_measures_and_exports_below_its_own_folder(project: Path) -> None:
    before = files_of(project)
    done = type_in(project, "./run_training.sh --demo --export max_steps=8 eval_strategy=no")
    made = {name for name in files_of(project) - before if "__pycache__" not in name}
    assert {name for name in made if not name.startswith("demo/")} == set()
    assert {
        "demo/model/model.safetensors",
        "demo/data/dataset_info.json",
        "demo/saves/reward_model_demo/adapter_model.safetensors",
        "demo/saves/reward_model_demo/evaluation/report.html",
        "demo/exported_model/model.safetensors",
        "demo/logs/reward_model_demo.log",
        "demo/logs/trainer_log.jsonl",
        "demo/labelled_steps.jsonl",
        "demo/saves/step_judge/adapter_model.safetensors",
        "demo/scores.jsonl",
        "demo/run.html",
    } <= made
    assert "Spearman" in done.stdout
    assert "gives the same scores as demo/saves/reward_model_demo" in done.stdout + done.stderr
    assert len(re.findall("^next:", done.stdout, re.IGNORECASE | re.MULTILINE)) == 1
    *shown, last = done.stdout.splitlines()
    assert "  use your rows:    ./run_training.sh --input my_rows.jsonl --validate-only" in shown
    assert any(line.startswith("step ") and "what the agent did" in line for line in shown)
    assert last == "  look at it:       demo/run.html in a browser"
