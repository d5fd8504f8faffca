"""Fitting a config to the data and the machine: what is derived, what is left out, and that it is reported."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from layout import write_config

from prmkit.errors import UsageError
from prmkit.training.config import ResolvedConfig, parse_assignment, resolve_config
from prmkit.training.environment import GIBIBYTE, Gpu, Machine, this_machine, visible_indices
from prmkit.training.monitoring import resolve_swanlab

DASHBOARD = {"swanlab": "0.10.3", "swanboard": "0.1"}
FAST = {"flash-attn": "2.8", "liger-kernel": "0.6"}
NO_GPU = Machine((), 4, DASHBOARD)
A100 = Machine((Gpu("NVIDIA A100-SXM4-40GB", 40 * GIBIBYTE, 39 * GIBIBYTE, (8, 0)),), 16, DASHBOARD)
T4 = Machine((Gpu("Tesla T4", 15 * GIBIBYTE, 15 * GIBIBYTE, (7, 5)),), 4, DASHBOARD)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with converted data: `steps` has a held-out side, `odd` has none."""
    data = tmp_path / "data"
    data.mkdir()
    for name, rows in {"steps": 2000, "steps_eval": 5, "odd": 3, "more": 3, "more_eval": 3}.items():
        (data / f"{name}.jsonl").write_text('{"instruction": "a", "output": "b"}\n' * rows)
    entries = {path.stem: {"file_name": path.name} for path in data.glob("*.jsonl")}
    (data / "dataset_info.json").write_text(json.dumps(entries))
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path / "config.yaml", use_cpu=None)
    return tmp_path


def resolved(project: Path, *assignments: str, machine: Machine = NO_GPU, torchrun: bool = False) -> ResolvedConfig:
    overrides = [parse_assignment(text) for text in assignments]
    return resolve_config(project / "config.yaml", overrides, machine=machine, torchrun=torchrun)


# --- held-out data ------------------------------------------------------------------------------------------------


def test_held_out_side_follows_the_dataset(project: Path) -> None:
    found = resolved(project, "dataset=more")
    assert found.values["eval_dataset"] == "more_eval"
    assert found.sources["eval_dataset"] == "derived: the held-out split of the dataset"


def test_held_out_sides_of_several_datasets(project: Path) -> None:
    assert resolved(project, "dataset=steps,odd,more").values["eval_dataset"] == "steps_eval,more_eval"


def test_a_held_out_side_that_was_asked_for_stays(project: Path) -> None:
    found = resolved(project, "dataset=more", "eval_dataset=steps_eval")
    assert found.values["eval_dataset"] == "steps_eval"


def test_without_held_out_rows_there_is_no_evaluation(project: Path) -> None:
    found = resolved(project, "dataset=odd")
    assert not {"eval_dataset", "eval_strategy", "eval_steps", "per_device_eval_batch_size"} & found.values.keys()
    assert found.dropped["eval_strategy"] == "odd has no held-out rows"


def test_a_config_whose_held_out_side_is_not_there(project: Path) -> None:
    write_config(project / "config.yaml", use_cpu=None, dataset="odd", eval_dataset="odd_eval")
    assert resolved(project).dropped["eval_dataset"] == "odd has no held-out rows"


def test_taking_the_held_out_side_out_ends_evaluation(project: Path) -> None:
    found = resolved(project, "eval_dataset=")
    assert "eval_strategy" not in found.values
    assert found.dropped["eval_strategy"] == "eval_dataset was removed"


def test_before_the_conversion_nothing_is_taken_away(project: Path) -> None:
    (project / "data" / "dataset_info.json").unlink()
    assert resolved(project, "dataset=more").values["eval_dataset"] == "more_eval"


# --- machine ------------------------------------------------------------------------------------------------------


def test_without_a_gpu(project: Path) -> None:
    found = resolved(project, "bf16=true", "tf32=true", "flash_attn=fa2")
    assert found.values["use_cpu"] is True
    assert found.sources["use_cpu"] == "derived: this machine has no GPU"
    assert dict(found.dropped) == dict.fromkeys(("bf16", "tf32", "flash_attn"), "this machine has no GPU")


def test_a_cpu_that_is_asked_not_to_be_used_is_believed(project: Path) -> None:
    assert resolved(project, "use_cpu=false", "bf16=true").values["bf16"] is True


def test_a_cpu_that_is_asked_for_beside_a_gpu(project: Path) -> None:
    found = resolved(project, "use_cpu=true", "bf16=true", machine=Machine(A100.gpus, 16, DASHBOARD | FAST))
    assert not {"flash_attn", "enable_liger_kernel", "bf16"} & found.values.keys()
    assert found.dropped["bf16"] == "use_cpu is set"


def test_an_a100_gets_what_was_asked(project: Path) -> None:
    found = resolved(project, "bf16=true", "tf32=true", machine=A100)
    assert (found.values["bf16"], found.values["tf32"]) == (True, True)
    assert not {"use_cpu", "flash_attn", "enable_liger_kernel", "fp16"} & found.values.keys()


def test_an_old_gpu_gets_fp16(project: Path) -> None:
    found = resolved(project, "bf16=true", "tf32=true", machine=T4)
    assert found.values["fp16"] is True
    assert found.sources["fp16"] == "derived: Tesla T4 does not support bf16"
    assert found.dropped.keys() == {"bf16", "tf32"}


def test_fast_kernels_are_used_where_they_are_installed(project: Path) -> None:
    machine = Machine(A100.gpus, 16, DASHBOARD | FAST)
    found = resolved(project, "bf16=true", machine=machine)
    assert (found.values["flash_attn"], found.values["enable_liger_kernel"]) == ("fa2", True)
    assert "installed" in found.sources["enable_liger_kernel"]
    chosen = resolved(project, "bf16=true", "flash_attn=sdpa", "enable_liger_kernel=false", machine=machine)
    assert (chosen.values["flash_attn"], chosen.values["enable_liger_kernel"]) == ("sdpa", False)
    assert "enable_liger_kernel" not in resolved(project, "torch_compile=true", machine=machine).values


def test_tokens_of_packed_rows_are_counted_with_their_padding(project: Path) -> None:
    """The Trainer sums attention masks, which for packed rows logged -1e20 tokens a second."""
    asked = "include_num_input_tokens_seen=non_padding"
    assert resolved(project, asked, "neat_packing=true").values["include_num_input_tokens_seen"] == "all"
    assert resolved(project, asked).values["include_num_input_tokens_seen"] == "non_padding"


def test_flash_attention_in_float32_would_fail(project: Path) -> None:
    assert "flash_attn" not in resolved(project, machine=Machine(A100.gpus, 16, DASHBOARD | FAST)).values


def test_flash_attention_that_is_not_installed(project: Path) -> None:
    found = resolved(project, "bf16=true", "flash_attn=fa2", machine=A100)
    assert "SDPA" in found.dropped["flash_attn"]


@pytest.mark.parametrize(
    ("machine", "torchrun", "backend"), [(A100, False, None), (A100, True, "nccl"), (NO_GPU, True, "gloo")]
)
def test_backend_of_several_processes(project: Path, machine: Machine, torchrun: bool, backend: str | None) -> None:
    found = resolved(project, "ddp_backend=nccl", machine=machine, torchrun=torchrun)
    assert found.values.get("ddp_backend") == backend
    assert ("ddp_backend" in found.dropped) == (backend is None)


def test_do_train_is_put_in(project: Path) -> None:
    assert resolved(project, "do_train=").values["do_train"] is True


def test_workers_are_cut_to_cores_and_rows(project: Path) -> None:
    asked = "preprocessing_num_workers=16"
    assert resolved(project, asked, machine=A100).values["preprocessing_num_workers"] == 4  # 2,000 rows
    assert resolved(project, asked, machine=Machine((), 2, DASHBOARD)).values["preprocessing_num_workers"] == 2
    assert resolved(project, "dataset=odd", asked).values["preprocessing_num_workers"] == 1
    assert resolved(project, "preprocessing_num_workers=3").sources["preprocessing_num_workers"] == "key=value"


def test_batches_of_long_rows_are_small(project: Path) -> None:
    assert "preprocessing_batch_size" not in resolved(project).values
    row = json.dumps({"instruction": "x" * 30_000, "output": "b"})
    (project / "data" / "steps.jsonl").write_text(f"{row}\n" * 20)
    found = resolved(project)
    assert 90 <= found.values["preprocessing_batch_size"] <= 100
    assert "rows of 30," in found.sources["preprocessing_batch_size"]


def test_held_out_rows_are_evaluated_one_by_one(project: Path) -> None:
    found = resolved(project, "per_device_eval_batch_size=")
    assert found.values["per_device_eval_batch_size"] == 1
    assert "8 rows in memory" in found.sources["per_device_eval_batch_size"]
    assert "per_device_eval_batch_size" not in resolved(project, "dataset=odd", "per_device_eval_batch_size=").values


def test_this_machine_is_looked_at_in_no_time() -> None:
    machine = this_machine()
    assert machine.cores >= 1
    assert "swanlab" in machine.packages


@pytest.mark.parametrize(
    ("setting", "chosen"),
    [(None, [0, 1, 2]), ("", []), ("1", [1]), ("2,0", [2, 0]), ("0,-1,1", [0]), ("7", []), ("GPU-bb", [1]),
     ("GPU-cc,GPU-aa", [2, 0]), ("MIG-x", [])],
)  # fmt: skip
def test_visible_gpus_are_read_as_cuda_reads_them(setting: str | None, chosen: list[int]) -> None:
    assert visible_indices(setting, ["GPU-aa1", "GPU-bb1", "GPU-cc1"]) == chosen


# --- SwanLab ------------------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[str]:
    """A listener, as SwanLab's server would."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment in which nobody is logged in."""
    monkeypatch.chdir(tmp_path)
    return {"SWANLAB_SAVE_DIR": str(tmp_path / "home")}


def test_swanlab_in_the_cloud_for_a_key_in_the_environment(nobody: dict[str, str], server: str) -> None:
    environment = nobody | {"SWANLAB_API_KEY": "k", "SWANLAB_API_HOST": server}
    assert resolve_swanlab({"use_swanlab": True}, DASHBOARD, environment)[0] == "cloud"


def test_swanlab_in_the_cloud_for_an_earlier_login(nobody: dict[str, str], server: str) -> None:
    home = Path(nobody["SWANLAB_SAVE_DIR"])
    home.mkdir()
    (home / ".netrc").write_text(f"machine {server}\nlogin {server}\npassword secret\n")
    assert resolve_swanlab({"use_swanlab": True}, DASHBOARD, nobody)[0] == "cloud"


def test_swanlab_on_this_machine_when_nobody_is_logged_in(nobody: dict[str, str]) -> None:
    mode, reason = resolve_swanlab({"use_swanlab": True, "swanlab_mode": "cloud"}, DASHBOARD, nobody)
    assert (mode, reason.split(";")[0]) == ("local", "not logged in to SwanLab")


def test_swanlab_on_this_machine_without_network(nobody: dict[str, str]) -> None:
    environment = nobody | {"SWANLAB_API_KEY": "k", "SWANLAB_API_HOST": "http://127.0.0.1:9"}
    mode, reason = resolve_swanlab({"use_swanlab": True}, DASHBOARD, environment)
    assert mode == "local"
    assert "cannot be reached" in reason


@pytest.mark.parametrize("mode", [None, "cloud", "local"])
def test_swanlab_off_without_its_dashboard(nobody: dict[str, str], mode: str | None) -> None:
    used, reason = resolve_swanlab({"swanlab_mode": mode}, {"swanlab": "0.10.3"}, nobody)
    assert used is None
    assert "pip install 'swanlab[dashboard]'" in reason


@pytest.mark.parametrize("mode", ["local", "offline", "disabled"])
def test_swanlab_as_asked(nobody: dict[str, str], mode: str) -> None:
    assert resolve_swanlab({"swanlab_mode": mode}, DASHBOARD, nobody)[0] == mode


def test_swanlab_that_is_not_installed_leaves_no_key(project: Path) -> None:
    found = resolved(project, "use_swanlab=true", "swanlab_project=p", machine=Machine((), 4))
    assert not [key for key in found.values if "swanlab" in key]
    assert found.dropped["use_swanlab"] == "swanlab is not installed"


def test_problems_come_before_fitting(project: Path) -> None:
    with pytest.raises(UsageError, match="tf32"):
        resolved(project, "tf32='yes'")
