"""Two processes that divide the weights between them, as configs/fsdp2.yaml has it."""

import json
import os
from pathlib import Path

import pytest
from layout import MakeProject, write_config
from processes import start

from prmkit.llamafactory_schema import read_yaml
from prmkit.training.worker import announce_fsdp

FSDP2 = Path(__file__).resolve().parents[2] / "configs" / "fsdp2.yaml"
DIVIDED = {key: read_yaml(FSDP2)[key] for key in ("fsdp", "fsdp_config", "use_reentrant_gc")}
SHORT = {"max_steps": 3, "logging_steps": 1, "save_strategy": "no", "eval_strategy": None, "eval_dataset": None}


def losses(project: Path, **changes: object) -> list[float]:
    """Train with two processes and return the loss of every step."""
    write_config(project / "config.yaml", **SHORT, **changes)
    start(project, "--nproc", "2").ends(0)
    log = (project / str(changes["output_dir"]) / "trainer_log.jsonl").read_text()
    return [entry["loss"] for entry in map(json.loads, log.splitlines()) if "loss" in entry]


@pytest.mark.llamafactory
@pytest.mark.new_processes
def test_divided_weights_learn_what_undivided_ones_learn(make_project: MakeProject, tmp_path: Path) -> None:
    from prmkit.training.model import read_weights

    project = make_project(tmp_path / "project")
    complete = losses(project, output_dir="saves/complete")
    divided = losses(project, output_dir="saves/divided", **DIVIDED)
    assert divided == pytest.approx(complete, abs=1e-5)
    assert len(divided) == 3
    (project / "saves" / "divided" / "adapter_model.safetensors").rename(project / "model.safetensors")
    (project / "saves" / "complete" / "adapter_model.safetensors").rename(project / "model" / "model.safetensors")
    assert read_weights(project) == read_weights(project / "model")  # gathered again: same names and shapes


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCELERATE_USE_FSDP", "FSDP_VERSION", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("environment")
def test_fsdp_is_announced_before_the_model_is_read(tmp_path: Path) -> None:
    announce_fsdp(read_yaml(FSDP2))
    assert (os.environ["ACCELERATE_USE_FSDP"], os.environ["FSDP_VERSION"]) == ("true", "2")
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"


@pytest.mark.usefixtures("environment")
def test_nothing_is_announced_without_fsdp() -> None:
    announce_fsdp(read_yaml(FSDP2.with_name("two_nodes.yaml")))
    assert "ACCELERATE_USE_FSDP" not in os.environ
