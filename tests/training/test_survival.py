"""Real runs, really killed: the next command goes on or finishes, nothing is left behind, nothing is lost."""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest
from layout import STEPS, MakeProject
from processes import Started, start, wait_for

from prmkit.training.resume import newest_checkpoint, weights_fault

KILLS = int(os.environ.get("PRMKIT_KILLS", "3"))
"""How many times the run of one process is killed; half as often the one of two."""
SEED = int(os.environ.get("PRMKIT_KILL_SEED", time.time_ns() % 1_000_000))

pytestmark = pytest.mark.llamafactory


def begun(project: Path, name: str = "run") -> bool:
    """Whether the run has logged its first steps."""
    return (project / "saves" / name / "trainer_log.jsonl").exists()


def seconds_of(project: Path) -> float:
    """How long the shared run took on this machine, from its start to its end."""
    record = json.loads((project / "saves" / "run" / "run.json").read_text())
    started, ended = (datetime.fromisoformat(record[key]) for key in ("started", "ended"))
    return (ended - started).total_seconds()


def kill_at_random(project: Path, kills: int, span: float, *arguments: str) -> list[Path]:
    """Kill a run so many times, each time going on with it; when it ends in between, the next run takes its place.

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
    assert set(logged) == set(range(2, STEPS + 1, 2)), "logs/trainer_log.jsonl does not show the whole run"


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
    """First a second start is refused while it runs; then SIGINT makes it save, stop and leave nothing behind."""
    project, run = interrupted
    refused = start(project).ends(1)
    assert "is training here" in refused
    assert json.loads((project / "saves" / "run" / "run.json").read_text())["status"] == "running"
    run.process.send_signal(signal.SIGINT)
    said = run.ends(130)
    newest = newest_checkpoint(project / "saves" / "run")
    assert newest is not None
    assert f"saves/run/{newest.folder.name} is kept. To resume, start the same command again: " in said
    assert json.loads((project / "saves" / "run" / "run.json").read_text())["status"] == "interrupted"


def test_sigterm_makes_two_processes_save_at_the_same_step(make_project: MakeProject, tmp_path: Path) -> None:
    project = make_project(tmp_path / "two", num_train_epochs=2000.0, save_steps=100_000)
    with start(project, "--nproc", "2") as run:
        assert wait_for(lambda: begun(project), 300)
        run.process.send_signal(signal.SIGTERM)
        assert "is kept. To resume, start the same command again" in run.ends(143)
    newest = newest_checkpoint(project / "saves" / "run")
    assert newest is not None and len(list(newest.folder.glob("rng_state_*.pth"))) == 2


def test_when_a_part_is_killed_the_rest_goes_too(make_project: MakeProject, tmp_path: Path) -> None:
    """First LLaMA Factory itself, as the kernel does when memory runs out; then the supervisor above it."""
    project = make_project(tmp_path / "p")
    for part, without in (("llamafactory-cli train", "supervisor.py"), ("supervisor.py", "nothing")):
        with start(project) as run:
            assert wait_for(lambda run=run: run.pid_of("llamafactory-cli train", without="supervisor.py"), 60)
            os.kill(run.pid_of(part, without), signal.SIGKILL)
            said = run.ends(3)
        assert "killed from outside" in said and "logs/run.log" in said
