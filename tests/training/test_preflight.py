"""The whole preflight on real projects: everything is told at once, and LLaMA Factory's own word is among it."""

import sys
import time
from pathlib import Path

import pytest
from layout import MakeProject
from processes import start_command, wait_for
from sizes import QWEN_7B

from prmkit.training import preflight
from prmkit.training.check import Check, Status
from prmkit.training.config import parse_assignment, resolve_config
from prmkit.training.deep import STEPS, look_deep
from prmkit.training.machine import GIBIBYTE, Gpu, Machine, this_machine
from prmkit.training.preflight import errors_in, run_preflight


def checked(project: Path, *assignments: str) -> dict[str, Check]:
    """The checks of a project, by name, from its folder."""
    overrides = [parse_assignment(text) for text in assignments]
    return {check.name: check for check in run_preflight(resolve_config(project / "config.yaml", overrides))}


@pytest.fixture
def project(make_project: MakeProject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = make_project(tmp_path / "a project")
    monkeypatch.chdir(folder)
    return folder


def test_a_project_that_is_ready(project: Path) -> None:
    heavy = {"torch", "transformers", "llamafactory", "datasets"} - sys.modules.keys()
    found = checked(project)
    assert not heavy & sys.modules.keys()  # LLaMA Factory is imported by the child alone
    assert not errors_in(list(found.values())), found
    assert {"Python", "versions", "llamafactory-cli", "model folder", "datasets", "held-out", "template", "row lengths",
            "GPU", "precision", "memory", "disk", "packages", "SwanLab", *STEPS} <= found.keys()  # fmt: skip
    assert "takes all" in found["LLaMA Factory's own parser"].found
    assert "cuts none" in found["row lengths"].found


def test_a_project_with_everything_wrong_gets_one_list(project: Path) -> None:
    """The parser's own refusal comes last in the child, so that it hides nothing."""
    weights = project / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    found = checked(
        project, "template=llama3", "cutoff_len=32", "dataset=stepz", "eval_dataset=steps_eval",
        "resume_from_checkpoint=nowhere", "quantization_bit=4", 'lr_scheduler_kwargs="{broken"',
    )  # fmt: skip
    wrong = {check.name for check in errors_in(list(found.values()))}
    assert wrong == {"model folder", "datasets", "template", "row lengths", "settings", "GPU", "packages",
                     "LLaMA Factory's own parser"}  # fmt: skip
    assert found["template"].advice.startswith("template=qwen")
    assert "JSONDecodeError" in found["LLaMA Factory's own parser"].found


def test_a_tokenizer_and_a_gpu_that_cannot_be_used(project: Path) -> None:
    """The driver is said to show a GPU that torch does not see: what an old driver looks like."""
    (project / "model" / "tokenizer.json").write_text("{}")
    values = {
        "model_name_or_path": "model",
        "template": "qwen",
        "dataset": "steps",
        "dataset_dir": "data",
        "use_cpu": True,
    }
    by_name = {check.name: check for check in look_deep(values, gpus=1).checks}
    assert by_name["template"].status is Status.ERROR
    assert "cannot use the GPU that the driver shows" in by_name["LLaMA Factory starts"].found
    assert by_name["LLaMA Factory's own parser"].status is Status.OK


def test_what_the_trainer_would_die_of_after_the_model_has_loaded(project: Path) -> None:
    found = checked(project, "optim=lomo", "lr_scheduler_type=cosine_with_min_lr", "report_to=mlflow")
    assert [check.name for check in errors_in(list(found.values()))] == ["trainer"]
    told = found["trainer"].found
    assert all(word in told for word in ("lomo_optim", "min_lr_rate should be set", "requires mlflow"))


def test_a_name_of_the_hub_without_a_network_takes_no_minute(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delenv("TRANSFORMERS_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    values = {"template": "qwen", "dataset": "steps", "output_dir": "saves/run", "use_cpu": True}
    start = time.monotonic()
    hub = {check.name: check for check in look_deep({**values, "model_name_or_path": "some/model"}, gpus=0).checks}
    assert time.monotonic() - start < 40  # it took 54 seconds
    assert (hub["template"].status, hub["template"].advice) == (
        Status.ERROR, "Download the model first: hf download some/model")  # fmt: skip
    missing = look_deep({**values, "model_name_or_path": "saves/model"}, gpus=0).checks
    assert "template" in {check.name for check in errors_in(missing)}


def test_a_kill_during_the_checks_leaves_nothing(project: Path, tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    command = [
        sys.executable,
        str(Path(preflight.__file__).parents[2] / "train.py"),
        "--config",
        "config.yaml",
        "--validate-only",
    ]
    with start_command(command, project, TMPDIR=str(temporary)) as started:
        assert wait_for(lambda: started.pid_of("prmkit.training.deep"), 30)
        started.process.kill()
        assert wait_for(lambda: not started.living(), 5), started.living()
    assert list(temporary.iterdir()) == []


def test_a_torch_that_cannot_be_imported_is_told(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a torchvision for another torch looks like from outside: an import that fails."""
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    path = f"{tmp_path}:{Path(preflight.__file__).parents[2]}"
    monkeypatch.setenv("PYTHONPATH", path)
    (found,) = look_deep({"model_name_or_path": "model", "template": "qwen"}, gpus=0).checks
    assert (found.name, found.status) == ("LLaMA Factory starts", Status.ERROR)
    assert "torchvision::nms" in found.found


# --- memory, on GPUs that are not here ----------------------------------------------------------------------------

SEED = {"bf16": True, "lora_rank": 64, "lora_dropout": 0.1, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 8}  # fmt: skip


def memory_check(gibibytes: int, **values: object) -> Check:
    machine = Machine((Gpu("GPU", gibibytes * GIBIBYTE, gibibytes * GIBIBYTE, (8, 0)),), 8)
    (found,) = preflight._memory(QWEN_7B, SEED | values, machine, tokens=4096, world_size=1)
    return found


def test_memory_that_is_enough() -> None:
    found = memory_check(80)
    assert found.status is Status.OK
    assert "weights 14.2" in found.found


def test_memory_that_is_tight() -> None:
    found = memory_check(36)
    assert (found.status, "tight" in found.found) == (Status.WARNING, True)


def test_memory_that_will_not_do_gets_the_flags_to_type() -> None:
    found = memory_check(24)
    assert found.status is Status.ERROR
    assert "per_device_train_batch_size=1 gradient_accumulation_steps=16 (28 GiB)" in found.advice
    assert "enable_liger_kernel=true (21 GiB)" in found.advice
    assert "configs/multi_gpu_zero2.yaml" in memory_check(8).advice


def test_memory_to_spare_buys_speed() -> None:
    found = memory_check(140, enable_liger_kernel=True)
    assert found.advice.startswith("disable_gradient_checkpointing=true would be faster")


def test_this_machine_has_what_the_tests_suppose() -> None:
    assert this_machine().packages.keys() >= {"swanlab", "swanboard", "matplotlib"}
