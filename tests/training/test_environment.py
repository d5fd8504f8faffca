"""Versions, GPUs, packages, disk space and settings, each in a state that a user can meet."""

import importlib
import shutil
from pathlib import Path
from typing import Any

import pytest

from prmkit.training import environment as checks
from prmkit.training.checks import Status, check_settings
from prmkit.training.environment import GIBIBYTE, Gpu, Machine
from prmkit.training.model_checks import check_named_files
from prmkit.training.monitoring import check_swanlab

A100 = Gpu("NVIDIA A100", 40 * GIBIBYTE, 39 * GIBIBYTE, (8, 0))


def test_this_environment_goes_together() -> None:
    for check in (checks.check_python(), checks.check_versions(), checks.check_command()):
        assert check.status is Status.OK, check


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let another version of a package be found first, as a second installation would."""

    def install(name: str, version: str, *requires: str) -> None:
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        (folder / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {each}" for each in requires), ""]))
        monkeypatch.syspath_prepend(str(tmp_path))
        importlib.invalidate_caches()

    return install


def test_a_torchvision_for_another_torch(distribution: Any) -> None:
    distribution("torchvision", "0.28.0", "torch==2.13.0")
    found = checks.check_versions()
    assert found.status is Status.ERROR
    assert "torchvision needs torch==2.13.0, but 2.11.0" in found.found
    assert "--install-deps" in found.advice


def test_a_torchaudio_for_another_torch(distribution: Any) -> None:
    distribution("torchaudio", "2.13.0")
    assert "torchaudio 2.13.0 is for another torch than 2.11.0" in checks.check_versions().found


def test_a_transformers_that_llama_factory_refuses(distribution: Any) -> None:
    distribution("transformers", "5.9.0")
    assert "llamafactory needs transformers" in checks.check_versions().found


@pytest.mark.parametrize(
    ("gpus", "processes", "values", "status"),
    [
        ((A100,), 1, {}, Status.OK),
        ((A100, A100), 2, {}, Status.OK),
        ((A100,), 2, {}, Status.ERROR),
        ((), 1, {}, Status.WARNING),
        ((), 1, {"quantization_bit": 4}, Status.ERROR),
        ((Gpu("NVIDIA A100", 40 * GIBIBYTE, 9 * GIBIBYTE, (8, 0)),), 1, {}, Status.WARNING),
    ],
)
def test_gpus(gpus: tuple[Gpu, ...], processes: int, values: dict[str, Any], status: Status) -> None:
    assert checks.check_gpu(values, Machine(gpus, 8), processes=processes, parameters=10**6).status is status


def test_a_large_model_on_a_cpu_is_an_error() -> None:
    found = checks.check_gpu({}, Machine((), 8), processes=1, parameters=7_600_000_000)
    assert (found.status, "7.6 B parameters" in found.found) == (Status.ERROR, True)


@pytest.mark.parametrize(
    ("values", "dropped", "status", "reported"),
    [
        ({"bf16": True, "tf32": True}, {}, Status.OK, "bf16, tf32"),
        (
            {"use_cpu": True},
            {"bf16": "this machine has no GPU"},
            Status.OK,
            "float32, without bf16: this machine has no",
        ),
        ({"fp16": True}, {"bf16": "Tesla T4 does not support bf16"}, Status.OK, "fp16, without bf16: Tesla T4"),
        ({}, {}, Status.WARNING, "float32"),
    ],
)
def test_precision(values: dict[str, Any], dropped: dict[str, str], status: Status, reported: str) -> None:
    found = checks.check_precision(values, dropped)
    assert (found.status, found.found.startswith(reported)) == (status, True)


@pytest.mark.parametrize(
    ("values", "package"),
    [
        ({"enable_liger_kernel": True}, "liger-kernel"),
        ({"deepspeed": "zero2.json"}, "deepspeed"),
        ({"quantization_bit": 4}, "bitsandbytes"),
        ({"quantization_bit": 4, "quantization_method": "hqq"}, "hqq"),
        ({"use_unsloth": True}, "unsloth"),
    ],
)
def test_packages_that_are_asked_for(values: dict[str, Any], package: str) -> None:
    missing = checks.check_packages(values, Machine((), 2))
    assert (missing.status, f"pip install {package}" in missing.advice) == (Status.ERROR, True)
    assert checks.check_packages(values, Machine((), 2, {package: "1"})).status is Status.OK


def test_what_was_looked_for_is_said() -> None:
    """transformers knows what its optimizers and loggers need: nothing is claimed of them here."""
    machine = Machine((), 2, {"matplotlib": "3"})
    assert checks.check_packages({"plot_loss": True}, machine).found == "installed for plot_loss"
    assert checks.check_packages({"optim": "lomo"}, machine).found == "none needed"


def test_disk_space(tmp_path: Path) -> None:
    values = {"output_dir": str(tmp_path / "saves" / "run"), "save_total_limit": 3}
    assert "will keep 4 checkpoints of 10 MiB" in checks.check_disk(values, 10 << 20).found
    full = checks.check_disk(values, float(shutil.disk_usage(tmp_path).free))
    assert (full.status, "save_total_limit=1" in full.advice) == (Status.ERROR, True)
    twenty = {**values, "save_total_limit": None, "save_strategy": "steps", "save_steps": 0.05}
    assert "21 checkpoints" in checks.check_disk(twenty, 1 << 20).found
    assert checks.check_disk(values, None).status is Status.OK


@pytest.mark.parametrize(
    ("settings", "reported"),
    [
        ({"save_strategy": "no"}, "1 checkpoint of"),
        ({"save_steps": 500, "max_steps": 20_000}, "41 checkpoints of 1 MiB"),
        ({"save_strategy": "epoch", "num_train_epochs": 2.5}, "4 checkpoints of"),
        ({"save_steps": 500}, "2 checkpoints of 1 MiB or more, because without save_total_limit all are kept"),
    ],
)
def test_checkpoints_that_nobody_limits(tmp_path: Path, settings: dict[str, Any], reported: str) -> None:
    assert reported in checks.check_disk({"output_dir": str(tmp_path / "run"), **settings}, 1 << 20).found


@pytest.mark.parametrize("key", ["output_dir", "export_dir"])
@pytest.mark.parametrize(
    ("place", "reported"),
    [("file", "is a file, not a folder"), ("file/run", "is a file, not a folder"), ("/dev/null/x", "is a file"),
     ("x" * 300, "File name too long"), ("é" * 110, "a name of 220 bytes is too long; at most 200")],
)  # fmt: skip
def test_folders_that_cannot_be_made(tmp_path: Path, key: str, place: str, reported: str) -> None:
    (tmp_path / "file").touch()
    values = {"output_dir": str(tmp_path / "saves"), key: str(tmp_path / place)}
    found = checks.check_disk(values, None)
    assert (found.status, reported in found.found, found.found.startswith(f"{key}: ")) == (Status.ERROR, True, True)


def test_a_run_name_that_cannot_be_made(tmp_path: Path) -> None:
    found = checks.check_disk({"output_dir": str(tmp_path / "run"), "run_name": "x" * 300}, None)
    assert (found.status, "run_name" in found.found) == (Status.ERROR, True)


def test_swanlab_is_reported() -> None:
    off = check_swanlab({}, {"use_swanlab": "not logged in; for local runs: pip install x"}, {})
    assert (off.status, off.found, off.advice) == (
        Status.WARNING, "off: not logged in", "For local runs: pip install x")  # fmt: skip
    on = check_swanlab(
        {"use_swanlab": True, "swanlab_mode": "local", "swanlab_project": "p"},
        {},
        {"swanlab_mode": "derived: no login"},
    )
    assert (on.status, on.found) == (Status.OK, "local, project p (no login)")
    assert check_swanlab({}, {}, {}).found == "off"


@pytest.mark.parametrize(
    ("values", "reported"),
    [
        ({"warmup_ratio": 0.1}, "warmup_steps: 0.1"),
        ({"logging_dir": "logs"}, "TENSORBOARD_LOGGING_DIR"),
        ({"overwrite_cache": True}, "Remove it"),
        ({"overwrite_output_dir": True}, "--overwrite"),
        ({"learning_rate": 0.1}, "0.0001 is usual"),
        ({"learning_rate": 1e-3, "finetuning_type": "full"}, "1e-05 is usual"),
        ({"max_samples": 100}, "real run"),
        ({"torch_compile": True}, "Remove it"),
        ({"stage": "dpo"}, "stage: sft"),
        ({"train_on_prompt": True}, "Remove it"),
        ({"neftune_noise_alpha": 5}, "Remove it"),
        ({"save_only_model": True}, "Remove it"),
    ],
)
def test_settings_that_deserve_a_word(values: dict[str, Any], reported: str) -> None:
    (found,) = check_settings(values)
    assert (found.status, reported in found.advice) == (Status.WARNING, True)


def test_checkpoints_and_adapters_that_are_not_there(tmp_path: Path) -> None:
    complete = tmp_path / "run" / "checkpoint-500"
    complete.mkdir(parents=True)
    (complete / "trainer_state.json").write_text("{}")
    assert check_named_files({"resume_from_checkpoint": str(complete)}) == []
    (found,) = check_named_files({"resume_from_checkpoint": str(tmp_path / "run" / "checkpoint-400")})
    assert (found.status, str(complete) in found.advice) == (Status.ERROR, True)
    (missing,) = check_named_files({"adapter_name_or_path": str(tmp_path)})
    assert missing.status is Status.ERROR


def test_usual_settings_deserve_none() -> None:
    assert list(check_settings({"learning_rate": 1e-4, "warmup_steps": 0.1})) == []
