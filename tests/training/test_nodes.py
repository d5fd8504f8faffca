"""Several nodes, played by several commands on this machine: they meet, train one run, and survive each other."""

import json
import os
import signal
import socket
from pathlib import Path

import pytest
from layout import STEPS, MakeProject
from processes import start, wait_for

from prmkit.training.checkpoints import weights_fault
from prmkit.training.resume import newest_checkpoint

pytestmark = [pytest.mark.llamafactory, pytest.mark.new_processes]


def free_port() -> str:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return str(listening.getsockname()[1])


def record_of(project: Path) -> dict[str, object]:
    return dict(json.loads((project / "saves" / "run" / "run.json").read_text()))


def test_two_nodes_train_one_run(make_project: MakeProject, tmp_path: Path) -> None:
    project = make_project(tmp_path / "p")
    nodes = ("--nproc", "1", "--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", free_port())
    with start(project, *nodes) as first, start(project, *nodes, "--node-rank", "1") as second:
        said = first.ends(0)
        second.ends(0)
    assert "Waiting for the other nodes" in said
    assert (record_of(project)["steps"], record_of(project)["processes"]) == (STEPS // 2, 2)
    assert weights_fault(project / "saves" / "run") is None
    assert (project / "logs" / "run.node1.log").exists()
    assert [path.name for path in (project / "saves").iterdir()] == ["run"]


def test_an_elastic_run_continues_when_a_worker_is_killed(
    make_project: MakeProject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun starts it again, and it resumes from the newest complete checkpoint, not from a half-written one."""
    monkeypatch.setenv("LLAMAFACTORY_VERBOSITY", "INFO")  # other tests make it quiet, and its log is looked at
    # At each of its two starts torchrun waits 30 seconds for a second node, which never comes.
    monkeypatch.setenv("PET_RDZV_CONF", "last_call_timeout=1")
    project = make_project(tmp_path / "p", save_steps=4)
    saves = project / "saves" / "run"
    elastic = ("--nnodes", "1:2", "--rdzv-id", "job", "--master-addr", "127.0.0.1", "--master-port", free_port())
    with start(project, "--nproc", "1", *elastic, "--max-restarts", "1") as run:
        assert wait_for(lambda: newest_checkpoint(saves), 300), run.living()
        worker = run.pid_of("prmkit.training.worker", without="torch.distributed.run")
        assert worker, run.living()
        os.kill(worker, signal.SIGKILL)
        (saves / "checkpoint-79").mkdir()
        run.ends(0)
    record = record_of(project)
    assert (record["status"], record["steps"]) == ("finished", STEPS)
    log = (project / "logs" / "run.log").read_text()
    assert log.count("***** Running training *****") == 2, "no worker was started again"
    assert "Resuming training from checkpoint with epoch" in log
    assert weights_fault(project / "saves" / "run") is None
