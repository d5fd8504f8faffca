"""Every config that ships goes through LLaMA Factory's own parser, and what is read from its source is what it says."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sizes import QWEN_7B

from prmkit.llamafactory_schema import NO_DEFAULT, logger_names, read_yaml, template_names, training_keys
from prmkit.training.checks import REPLACEMENTS
from prmkit.training.config import parse_assignment, resolve_config
from prmkit.training.environment import GIBIBYTE, Gpu, Machine
from prmkit.training.model import estimate

ROOT = Path(__file__).resolve().parents[2]
DEFAULT = ROOT / "training_config.yaml"
SITUATIONS = sorted((ROOT / "configs").glob("*.yaml"))
SHARED = "### As in training_config.yaml"


@pytest.fixture(scope="session")
def llama_factory(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What LLaMA Factory says about itself and about every shipped config; one start for all these tests."""
    program = Path(__file__).with_name("parse_configs.py")
    output = tmp_path_factory.mktemp("output") / "run"
    command = [sys.executable, str(program), str(output), str(DEFAULT), *map(str, SITUATIONS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


# --- what is read from the source ---------------------------------------------------------------------------------


@pytest.mark.llamafactory
def test_keys_are_those_of_the_dataclasses(llama_factory: dict[str, Any]) -> None:
    assert training_keys().keys() == llama_factory["keys"].keys()
    assert len(training_keys()) > 300


@pytest.mark.llamafactory
def test_defaults_are_those_of_the_dataclasses(llama_factory: dict[str, Any]) -> None:
    said = {name: key.default for name, key in training_keys().items() if key.default is not NO_DEFAULT}
    assert said == {name: llama_factory["keys"][name] for name in said}
    assert len(said) > 330


@pytest.mark.llamafactory
def test_templates_and_loggers_are_those_that_are_registered(llama_factory: dict[str, Any]) -> None:
    assert list(template_names()) == llama_factory["templates"]
    assert list(logger_names()) == llama_factory["loggers"]


def test_no_key_that_exists_is_called_gone() -> None:
    assert not REPLACEMENTS.keys() & training_keys().keys()


def test_successors_exist() -> None:
    """Every name in a piece of advice that looks like a key is one."""
    words = {word.strip(":,.") for advice in REPLACEMENTS.values() for word in advice.split()}
    named = {word for word in words if "_" in word}
    values = {"group_by_length", "embed_tokens", "embed_tokens,lm_head"}
    assert named - values <= training_keys().keys()
    assert len(named) > 15


# --- the configs --------------------------------------------------------------------------------------------------


@pytest.mark.llamafactory
@pytest.mark.parametrize("path", [DEFAULT, *SITUATIONS], ids=lambda path: path.name)
def test_llama_factory_takes_it(llama_factory: dict[str, Any], path: Path) -> None:
    found = llama_factory["parsed"][str(path)]
    assert "error" not in found, found
    values = read_yaml(path)
    assert found["dataset"] == [values["dataset"]]
    assert found["learning_rate"] == values["learning_rate"]
    assert found["eval_strategy"] == values.get("eval_strategy", "no")
    assert found["finetuning_type"] == values.get("finetuning_type", "lora")


@pytest.mark.parametrize("path", [DEFAULT, *SITUATIONS], ids=lambda path: path.name)
def test_we_take_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    gpu = Gpu("NVIDIA H200", 141 * GIBIBYTE, 140 * GIBIBYTE, (9, 0))
    machine = Machine((gpu,) * 8, 64, {"deepspeed": "0.16", "bitsandbytes": "0.48"})
    found = resolve_config(path, machine=machine, torchrun=True)
    assert not found.dropped.keys() - {"use_swanlab", "swanlab_project", "swanlab_mode"}


@pytest.mark.parametrize("path", [DEFAULT, *SITUATIONS], ids=lambda path: path.name)
def test_its_first_line_says_when_to_take_it(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ")
    assert any(word in first for word in ("GPU", "A100", "H200", "CPU", "machines"))


@pytest.mark.parametrize("path", SITUATIONS, ids=lambda path: path.name)
def test_what_a_situation_shares_is_what_the_default_says(path: Path) -> None:
    text = path.read_text()
    if SHARED not in text:
        assert path.resolve() == DEFAULT or path.name in ("cpu_demo.yaml", "cpu_smollm2.yaml")
        return
    default, values = read_yaml(DEFAULT), read_yaml(path)
    shared = [line.split(":")[0] for line in text.split(SHARED)[1].splitlines()[1:] if line.strip()]
    assert {key: values[key] for key in shared} == {key: default[key] for key in shared}
    changed = values.keys() - set(shared)
    assert not [key for key in changed if values[key] == default.get(key)]
    lora_only = {key for key in default if key.startswith("lora_")} if values["finetuning_type"] == "full" else set()
    assert default.keys() - lora_only <= values.keys()


def test_the_default_is_the_guide_s() -> None:
    values = read_yaml(DEFAULT)
    guide = {
        "dataset": "reward_model_full", "model_name_or_path": "./model", "template": "qwen", "learning_rate": 1e-4,
        "num_train_epochs": 3.0, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 8, "lora_rank": 64,
        "lora_alpha": 128, "lora_dropout": 0.1, "bf16": True, "tf32": True, "cutoff_len": 4096,
        "swanlab_project": "reward_model_training",
    }  # fmt: skip
    assert guide.items() <= values.items()
    assert Path(values["output_dir"]) == Path("saves/reward_model_training")
    assert Path(values["export_dir"]) == Path("exported_model")


@pytest.mark.parametrize(
    ("name", "room", "world_size"),
    [("a100_40gb_lora.yaml", 39.4, 1), ("24gb_qlora.yaml", 23.6, 1), ("multi_gpu_zero2.yaml", 39.4, 4),
     ("full_finetuning_zero3.yaml", 39.4, 8), ("two_nodes.yaml", 39.4, 16), ("h200_long_context.yaml", 139.8, 1),
     ("80gb_lora.yaml", 79.1, 1)],
)  # fmt: skip
def test_seven_billion_parameters_fit_where_it_says(
    name: str, room: float, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    values = read_yaml(ROOT / "configs" / name)
    memory = estimate(QWEN_7B, values, tokens=values["cutoff_len"], world_size=world_size)
    assert room / 3 < memory.total / GIBIBYTE < room


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_files_leave_every_size_to_the_config(stage: int) -> None:
    settings = json.loads((ROOT / "configs" / "deepspeed" / f"zero{stage}.json").read_text())
    assert settings["zero_optimization"]["stage"] == stage
    for key in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    ):
        assert settings[key] == "auto"
    assert settings["bf16"]["enabled"] == settings["fp16"]["enabled"] == "auto"


def test_overrides_of_the_guide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    typed = ["dataset=reward_model_clip", "num_train_epochs=5", "learning_rate=2e-4", "per_device_train_batch_size=4"]
    values = resolve_config(DEFAULT, [parse_assignment(text) for text in typed]).values
    assert (values["num_train_epochs"], values["learning_rate"]) == (5, 2e-4)
