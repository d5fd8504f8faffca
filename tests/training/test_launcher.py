"""Starting and stopping children: llamafactory.py, supervisor.py, worker.py; and why they failed: failures.py."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import wait_for

from prmkit.errors import ExitCode, Interrupted
from prmkit.training import supervisor
from prmkit.training.launcher import Launch, child_environment, explain, log_tail, run_to_end, started, train_command

# As torchrun does: workers in sessions of their own, which a signal to the group would not reach.
FAMILY = "setsid sleep 300 & setsid sh -c 'sleep 300 & exec sleep 300' & "


def supervised(*command: str, to: str = "child") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-I", supervisor.__file__, to, *command],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def family_of(process: subprocess.Popen[str], size: int) -> list[int]:
    assert wait_for(lambda: len(supervisor.descendants_of(process.pid)) >= size, 10)
    return supervisor.descendants_of(process.pid)


def living(pids: list[int]) -> list[int]:
    """Those that still run; a dead one may are in the table for seconds until the system's first process reads it."""
    states = supervisor._processes()
    return [pid for pid in pids if pid in states and states[pid][1] != "Z"]


@pytest.mark.parametrize(
    ("script", "code"), [("exit 0", 0), ("exit 3", 3), ("kill -9 $$", 137), ("kill -TERM $$", 143)]
)
def test_the_supervisor_ends_as_its_command_does(script: str, code: int) -> None:
    process = supervised("sh", "-c", script)
    assert process.wait(10) == code


def test_nothing_outlives_a_command_that_ends(tmp_path: Path) -> None:
    process = supervised("sh", "-c", FAMILY + f"while [ ! -e '{tmp_path}/go' ]; do sleep 0.1; done")
    family = family_of(process, 4)
    (tmp_path / "go").touch()
    assert process.wait(10) == 0
    assert wait_for(lambda: not living(family), 2)


def test_nothing_outlives_the_one_who_holds_the_pipe() -> None:
    """Whatever ended train.py, a kill -9 too, its end of the pipe is closed by the kernel."""
    process = supervised("sh", "-c", FAMILY + "sleep 300")
    family = family_of(process, 5)
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(10) == 137
    assert wait_for(lambda: not living(family), 2)


def test_sigterm_is_passed_on_and_a_second_one_ends_everything() -> None:
    process = supervised("sh", "-c", "trap 'echo saving' TERM; echo ready; while :; do sleep 0.1; done")
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "saving\n"
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 137


def test_sigterm_passes_torchrun_by_and_reaches_its_workers() -> None:
    worker = "trap 'echo worker; exit 0' TERM; echo ready; while :; do sleep 0.1; done"
    process = supervised(
        "sh", "-c", f"trap 'echo agent' TERM; setsid sh -c \"{worker}\" & wait; exit 0", to="grandchildren"
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    assert process.stdout.read() == "worker\n"


def test_a_child_that_was_asked_to_stop_may_save_first(tmp_path: Path) -> None:
    script = f"trap 'sleep 0.5; touch {tmp_path}/saved' TERM; touch {tmp_path}/ready; while :; do sleep 0.1; done"

    def interrupt() -> None:
        if (tmp_path / "ready").exists() and not (tmp_path / "reported").exists():
            (tmp_path / "reported").touch()
            os.kill(os.getpid(), signal.SIGINT)

    with started(["bash", "-c", script], tmp_path / "log") as child, pytest.raises(Interrupted) as stopped:
        run_to_end(child, interrupt, is_saved=(tmp_path / "saved").exists, patience=lambda: 30)
    assert stopped.value.exit_code == ExitCode.INTERRUPTED
    assert (tmp_path / "saved").exists()
    assert child.process.poll() is not None
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_child_that_will_not_stop_is_waited_for_no_longer_than_patience(tmp_path: Path) -> None:
    def interrupt() -> None:
        if (tmp_path / "ready").exists() and not (tmp_path / "reported").exists():
            (tmp_path / "reported").touch()
            os.kill(os.getpid(), signal.SIGTERM)

    script = f"trap '' TERM; touch {tmp_path}/ready; while :; do sleep 0.1; done"
    began = time.monotonic()
    with started(["bash", "-c", script], tmp_path / "log") as child, pytest.raises(Interrupted) as stopped:
        run_to_end(child, interrupt, is_saved=lambda: False, patience=lambda: 1.0)
    assert stopped.value.exit_code == ExitCode.TERMINATED
    assert 1.0 < time.monotonic() - began < 10


# --- command lines ------------------------------------------------------------------------------------------------


def test_one_process_is_llamafactorys_own_command_beside_this_python() -> None:
    line = train_command(Path("a b.yaml"), Launch(), 1, torchrun=False)
    assert line == [str(Path(sys.executable).parent / "llamafactory-cli"), "train", "a b.yaml"]


@pytest.mark.parametrize(
    ("launch", "expected"),
    [
        (Launch(), ["--nproc-per-node=4", "--nnodes=1", "--standalone"]),
        (Launch(master_port=29501), ["--node-rank=0", "--master-addr=127.0.0.1", "--master-port=29501"]),
        (
            Launch(nnodes="2", node_rank=1, master_addr="10.0.0.1"),
            ["--nnodes=2", "--node-rank=1", "--master-addr=10.0.0.1", "--master-port=29500"],
        ),
        (
            Launch(nnodes="1:4", rdzv_id="job", master_addr="10.0.0.1", max_restarts=3),
            ["--nnodes=1:4", "--rdzv-id=job", "--rdzv-endpoint=10.0.0.1:29500", "--max-restarts=3"],
        ),
    ],
)
def test_several_processes_are_started_by_torchrun(launch: Launch, expected: list[str]) -> None:
    """torchrun's own parser understands every line."""
    from torch.distributed.run import get_args_parser

    line = train_command(Path("my config.yaml"), launch, 4, torchrun=True)
    assert set(expected) <= set(line)
    assert line[:3] == [sys.executable, "-m", "torch.distributed.run"]
    parsed = get_args_parser().parse_args(line[3:])
    assert (parsed.training_script, parsed.training_script_args) == ("prmkit.training.worker", ["my config.yaml"])
    assert parsed.nproc_per_node == "4" and parsed.module


def test_orders_left_over_in_the_shell_reach_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_TORCHRUN", "NNODES", "RANK", "USE_RAY"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SWANLAB_API_KEY", "secret")
    environment = child_environment()
    assert not {"FORCE_TORCHRUN", "NNODES", "RANK", "USE_RAY"} & environment.keys()
    assert environment["SWANLAB_API_KEY"] == "secret" and environment["RECORD_VRAM"] == "1"


# --- failures -----------------------------------------------------------------------------------------------------

CONFIG = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8, "cutoff_len": 4096}


def test_running_out_of_memory_is_answered_with_what_to_type(tmp_path: Path) -> None:
    """The message is torch's own: it is asked for a petabyte."""
    with (tmp_path / "log").open("wb") as log:
        subprocess.run([sys.executable, "-c", "import torch; torch.empty(1 << 50)"], stderr=log, check=False)
    said = explain(log_tail(tmp_path / "log", 0), 1, CONFIG)
    assert said.startswith("LLaMA Factory failed: RuntimeError: ")
    assert "per_device_train_batch_size=1 gradient_accumulation_steps=16" in said
    assert "cutoff_len=2048" in said and "enable_liger_kernel=true" in said and "quantization_bit=4" in said
    assert "ZeRO-2" in said


@pytest.mark.parametrize(
    "line",
    [
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has a total capacity of 39.4 GiB",
        "[rank1]: torch.cuda.OutOfMemoryError: CUDA out of memory.",
        "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_a_gpu_that_is_full_is_recognised(line: str) -> None:
    assert "Out of memory. Try, in this order:" in explain(f"Traceback\n{line}\n", 1, CONFIG)


def test_the_cause_is_reported_from_what_torchrun_adds() -> None:
    tail = "\n".join(
        [
            "Traceback (most recent call last):",
            "[rank0]: ValueError: Undefined dataset steps in dataset_info.json.",
            "torch.distributed.elastic.multiprocessing.errors.ChildFailedError:",
            "subprocess.CalledProcessError: Command '['torchrun']' returned non-zero exit status 1.",
        ]
    )
    said = explain(tail, 1, CONFIG)
    assert said.splitlines()[0] == "LLaMA Factory failed: ValueError: Undefined dataset steps in dataset_info.json."
    assert "memory" not in said


def test_a_full_disk_and_a_kill_are_recognised() -> None:
    assert "save_total_limit=1" in explain("OSError: [Errno 28] No space left on device", 1, CONFIG)
    assert "killed (SIGKILL)" in explain("Training", 137, CONFIG)
    assert explain("", 7, CONFIG) == "LLaMA Factory failed: exit code 7"


def test_of_a_progress_bar_only_its_last_state_is_shown(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(
        b"an earlier start\n" + b"  0%|  | 0/9\r 50%|# | 4/9\r100%|##| 9/9\nValueError: x\r\n"
    )
    assert log_tail(tmp_path / "log", 17) == "100%|##| 9/9\nValueError: x\n"
