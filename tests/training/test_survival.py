"""Real runs, really killed: the next command continues or finishes, nothing is left behind, nothing is lost."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import pytest
from layout import STEPS, MakeProject
from processes import Started, start, wait_for

from prmkit.training.checkpoints import weights_fault
from prmkit.training.resume import newest_checkpoint

KILLS = int(os.environ.get("PRMKIT_KILLS", "2"))
"""How many times the run of one process is killed; half as often the one of two."""
SEED = int(os.environ.get("PRMKIT_KILL_SEED", time.time_ns() % 1_000_000))

pytestmark = [pytest.mark.llamafactory, pytest.mark.new_processes]


def begun(project: Path, name: str = "run") -> bool:
    """Whether the run has logged its first steps."""
    return (project / "saves" / name / "trainer_log.jsonl").exists()


def seconds_of(project: Path) -> float:
    """How long the shared run took on this machine, from its start to its end."""
    record = json.loads((project / "saves" / "run" / "run.json").read_text())
    started, ended = (datetime.fromisoformat(record[key]) for key in ("started", "ended"))
    return (ended - started).total_seconds()


def kill_at_random(project: Path, kills: int, span: float, *arguments: str) -> list[Path]:
    """Kill a run so many times, each time resuming it; when it ends in between, the next run takes its place.

    Returns:
        The folders of the runs that ended, each after none or several kills.
    """
    moments = random.Random(SEED)
    ended: list[Path] = []
    while True:
        folder = project / "saves" / f"run-{len(ended)}"
        before = newest_checkpoint(folder)
        run = start(project, f"run_name={folder.name}", *arguments)
        try:
            _, said = run.process.communicate(timeout=moments.uniform(0.5, span) if kills else None)
            assert run.process.returncode == 0, f"seed {SEED}, {kills} kills to go:\n{said}"
            ended.append(folder)
            if not kills:
                return ended
        except subprocess.TimeoutExpired:
            run.process.kill()
            kills -= 1
            said = run.process.communicate()[1]
        assert wait_for(lambda run=run: not run.living(), 5.0), f"seed {SEED}, {kills} kills to go: {run.living()}"
        if before and "Run saves/" in said:
            assert f"resumes from step {before.step}" in said, f"seed {SEED}, {kills} kills to go:\n{said}"


def test_a_run_that_is_killed_at_random_moments_ends_as_if_it_had_not_been(
    make_project: MakeProject, finished: Path, tmp_path: Path
) -> None:
    """Same seed, same data, same machine: the same adapter, byte for byte, as the run that nobody touched."""
    project = make_project(tmp_path / "killed")
    untouched = (finished / "saves" / "run" / "adapter_model.safetensors").read_bytes()
    for folder in kill_at_random(project, KILLS, seconds_of(finished)):
        assert (folder / "adapter_model.safetensors").read_bytes() == untouched
        record = json.loads((folder / "run.json").read_text())
        assert (record["status"], record["steps"]) == ("finished", STEPS)
    followed = [json.loads(line) for line in (project / "logs" / "trainer_log.jsonl").read_text().splitlines()]
    logged = [entry["current_steps"] for entry in followed if "loss" in entry]
    assert set(logged) == set(range(2, STEPS + 1, 2)), "logs/trainer_log.jsonl does not show the complete run"


def test_two_processes_are_killed_and_go_on(make_project: MakeProject, finished: Path, tmp_path: Path) -> None:
    project = make_project(tmp_path / "killed twice")
    for folder in kill_at_random(project, (KILLS + 1) // 2, 1.5 * seconds_of(finished), "--nproc", "2"):
        assert weights_fault(folder) is None
        assert json.loads((folder / "run.json").read_text())["steps"] == STEPS // 2


@pytest.fixture(scope="module")
def interrupted(make_project: MakeProject, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Started]]:
    """A project in which a long run is training; it saves no checkpoint by itself."""
    project = make_project(tmp_path_factory.mktemp("interrupted") / "p", num_train_epochs=2000.0, save_steps=100_000)
    with start(project) as run:
        assert wait_for(lambda: begun(project), 300)
        yield project, run


def test_an_interrupted_run_saves_and_says_how_to_go_on(interrupted: tuple[Path, Started]) -> None:
    """First a second start is refused while it runs; then SIGINT makes it save, stop and leave no process."""
    project, run = interrupted
    refused = start(project).ends(1)
    assert "is training here" in refused
    assert json.loads((project / "saves" / "run" / "run.json").read_text())["status"] == "running"
    run.process.send_signal(signal.SIGINT)
    said = run.ends(130)
    newest = newest_checkpoint(project / "saves" / "run")
    assert newest is not None
    assert f"saves/run/{newest.folder.name} is kept. To resume, run the same command again: " in said
    assert json.loads((project / "saves" / "run" / "run.json").read_text())["status"] == "interrupted"


def test_a_closed_terminal_ends_a_run_like_a_sigterm(interrupted: tuple[Path, Started]) -> None:
    """The run resumes on a terminal, and draws its bar there when the terminal goes."""
    project, _ = interrupted
    before = newest_checkpoint(project / "saves" / "run")
    log = project / "saves" / "run" / "trainer_log.jsonl"
    size = log.stat().st_size
    ours, theirs = os.openpty()
    script = str(Path(__file__).with_name("without_checks.py"))
    hung_up = "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    hung_up += "signal.signal(signal.SIGHUP, signal.SIG_DFL); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    run = subprocess.Popen(
        [sys.executable, "-c", hung_up, script, "--config", "config.yaml"],
        cwd=project, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    os.set_blocking(ours, False)

    def has_begun() -> bool:
        with suppress(BlockingIOError):
            os.read(ours, 1 << 16)  # a terminal that nobody reads would stop the run
        return log.stat().st_size > size

    assert wait_for(has_begun, 300)
    os.close(ours)
    assert run.wait(120) == 143
    newest = newest_checkpoint(project / "saves" / "run")
    assert before is not None and newest is not None and newest.step > before.step
    assert json.loads((project / "saves" / "run" / "run.json").read_text())["status"] == "interrupted"


def test_a_checkpoint_that_cannot_be_resumed_gives_way_to_the_one_before(killed_copy: Path) -> None:
    """Complete to the last byte, but its optimizer has no groups: LLaMA Factory fails before the first step."""
    import torch

    run = killed_copy / "saves" / "run"
    shutil.rmtree(run / f"checkpoint-{STEPS}")
    newest, older = run / f"checkpoint-{STEPS - 8}", run / f"checkpoint-{STEPS - 16}"
    shutil.copytree(newest, older)
    state = json.loads((older / "trainer_state.json").read_text())
    history = [entry for entry in state["log_history"] if entry["step"] <= STEPS - 16]
    changed = {**state, "global_step": STEPS - 16, "log_history": history}
    (older / "trainer_state.json").write_text(json.dumps(changed))
    optimizer = torch.load(newest / "optimizer.pt", weights_only=False)
    torch.save({**optimizer, "param_groups": []}, newest / "optimizer.pt")
    said = start(killed_copy).ends(0)
    assert f"Resuming from saves/run/{newest.name} failed before its first step" in said
    assert f"it is kept as unusable.{newest.name}" in said and (run / f"unusable.{newest.name}").is_dir()
    record = json.loads((run / "run.json").read_text())
    assert (record["status"], record["steps"]) == ("finished", STEPS)
    assert record["resumed_from"] == [f"saves/run/{older.name}"]


def test_sigterm_makes_two_processes_save_at_the_same_step(make_project: MakeProject, tmp_path: Path) -> None:
    project = make_project(tmp_path / "two", num_train_epochs=2000.0, save_steps=100_000)
    with start(project, "--nproc", "2") as run:
        assert wait_for(lambda: begun(project), 300)
        run.process.send_signal(signal.SIGTERM)
        assert "is kept. To resume, run the same command again" in run.ends(143)
    newest = newest_checkpoint(project / "saves" / "run")
    assert newest is not None and len(list(newest.folder.glob("rng_state_*.pth"))) == 2


def test_when_a_part_is_killed_the_rest_goes_too(make_project: MakeProject, tmp_path: Path) -> None:
    """First LLaMA Factory itself, as the kernel does when memory runs out; then the supervisor above it; then both the
    supervisor and train.py, which would otherwise leave a trainer without a lock."""
    project = make_project(tmp_path / "p")
    for part, without in (("llamafactory-cli train", "supervisor.py"), ("supervisor.py", "nothing")):
        with start(project) as run:
            assert wait_for(lambda run=run: run.pid_of("llamafactory-cli train", without="supervisor.py"), 60)
            os.kill(run.pid_of(part, without), signal.SIGKILL)
            said = run.ends(3)
        assert "killed (SIGKILL)" in said and "logs/run.log" in said
    with start(project) as run:
        assert wait_for(lambda: run.pid_of("llamafactory-cli train", without="supervisor.py"), 60)
        run.process.send_signal(signal.SIGSTOP)
        os.kill(run.pid_of("supervisor.py"), signal.SIGKILL)
        run.process.kill()
        assert wait_for(lambda: not run.living(), 5.0), run.living()
