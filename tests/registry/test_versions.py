"""Versions through the command line: added, tagged, rolled back, removed; killed and at once."""

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from registry_fixtures import ROOT, make_rows, make_run

from prmkit import registered
from prmkit.errors import DataError, UsageError
from prmkit.files import sha256_of, write_json
from prmkit.paths import REPORT
from prmkit.registered import VersionId, read_history, state_of
from prmkit.trajectories.importing import Options, read_runs
from prmkit.trajectories.run import FieldNames
from prmkit.trajectory import dump
from tools.make_sample.runs import message_runs
from tools.make_sample.sample import write_rows

Manage = Callable[..., str]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs on one conversion."""
    folder = tmp_path_factory.mktemp("project")
    make_rows(folder / "rows.jsonl", range(30))
    make_run(folder, folder / "rows.jsonl", 1)
    make_run(folder, folder / "rows.jsonl", 2)
    return folder


@pytest.fixture
def judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty registry."""
    monkeypatch.setenv(registered.REGISTRY_VARIABLE, str(tmp_path / "judges"))
    yield tmp_path / "judges"


@pytest.fixture
def manage(script: Callable[..., subprocess.CompletedProcess[str]], judges: Path) -> Manage:
    """Run manage_judges.py; what it printed."""

    def run(*arguments: object, code: int = 0) -> str:
        done = script("manage_judges.py", *arguments, code=code)
        return done.stderr if code else done.stdout

    return run


@pytest.fixture
def two(project: Path, manage: Manage) -> None:
    """Both runs are registered, and each was production in turn."""
    for number in (1, 2):
        manage("add", project / "saves" / f"run{number}", "--why", f"week {number}")
        manage("tag", number, "production")


@pytest.mark.usefixtures("two")
def test_a_version_has_its_run_data_and_rows(project: Path, judges: Path, manage: Manage) -> None:
    version = judges / "judge" / "2"
    assert (version / "rows" / "rows.jsonl").read_bytes() == (project / "rows.jsonl").read_bytes()
    assert (version / "data" / "reward_model_full_eval.meta.jsonl").is_file()
    assert registered.registered_run("production") == version / "run"
    shown = json.loads(manage("show", "production", "--json"))
    assert shown["tags"] == ["production"] and shown["training_rows"] > 0
    assert "seed" in json.loads(manage("diff", 1, 2, "--json"))["settings"]


def test_data_that_was_moved_is_named(tmp_path: Path, judges: Path, manage: Manage) -> None:
    make_rows(tmp_path / "rows.jsonl", range(30))
    run = make_run(tmp_path, tmp_path / "rows.jsonl")
    data = (tmp_path / "data").rename(tmp_path / "elsewhere")
    manage("add", run, "--data-dir", data)
    assert (judges / "judge" / "1" / "data" / "reward_model_full.jsonl").is_file()
    assert (judges / "judge" / "1" / "rows" / "rows.jsonl").is_file()


@pytest.mark.usefixtures("two")
def test_a_copied_run_finds_its_base_model(project: Path, judges: Path) -> None:
    from prmkit.judge.sources import judge_source_of_run

    assert judge_source_of_run(judges / "judge" / "1" / "run").model == project / "model"


@pytest.mark.usefixtures("two")
def test_rollback_and_the_history(manage: Manage, judges: Path) -> None:
    assert "judge@1" in manage("rollback", "production", "--why", "worse in production")
    assert registered.find_version("production") == VersionId("judge", 1)
    assert "no earlier version to roll back to" in manage("rollback", "production", code=2)
    assert "is a version, not a tag" in manage("rollback", "judge@1", code=2)
    actions = [line["action"] for line in read_history(judges)]
    assert actions == ["add", "tag", "add", "tag", "rollback"]
    last = json.loads(manage("history", "--json"))[-1]
    assert (last["was"], last["version"], last["why"]) == (2, 1, "worse in production") and last["who"]


@pytest.mark.usefixtures("two")
def test_what_is_tagged_is_not_removed_and_numbers_are_not_used_twice(
    project: Path, judges: Path, manage: Manage
) -> None:
    assert "has the tag production" in manage("remove", 2, code=2)
    manage("rollback", "production")
    manage("remove", 2)
    assert not (judges / "judge" / "2").exists()
    assert "judge@3" in manage("add", project / "saves" / "run2")


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize("harm", ["changed", "deleted", "added"])
def test_a_version_whose_files_changed_is_not_used(judges: Path, manage: Manage, harm: str) -> None:
    weights = judges / "judge" / "2" / "run" / "adapter_model.safetensors"
    if harm == "changed":
        weights.chmod(0o644)
        weights.write_bytes(b"other")
    elif harm == "deleted":
        weights.unlink()
    else:
        (weights.parent / "config.json").write_text("{}")
    with pytest.raises(DataError, match=f"was {harm} after judge@2 was registered"):
        registered.registered_run("production")
    assert harm in manage("show", "production", code=1)
    assert harm in manage("tag", 2, "preview", code=1)
    manage("rollback", "production")  # which leads away from it


def test_a_rollback_never_goes_to_the_version_that_it_leaves() -> None:
    """After a removal between them, the same version would be the earlier one, too."""

    def line(action: str, version: int, **more: object) -> dict[str, object]:
        return {"time": "", "who": "", "action": action, "judge": "j", "version": version, "tag": "production", **more}

    history = [line("add", 1), line("add", 2), line("add", 3), *(line("tag", number) for number in (3, 1, 2, 1))]
    removed = [*history, line("remove", 2)]
    assert state_of(removed).tags["j", "production"] == [3, 1]
    nothing = [*removed, line("rollback", 1, was=1)]  # as earlier releases wrote it
    assert state_of([*nothing, line("rollback", 3, was=1)]).tags["j", "production"] == [3]


@pytest.mark.usefixtures("two")
def test_an_export_names_no_folder_of_this_machine(tmp_path: Path, manage: Manage) -> None:
    manage("export", "production", "--push-ready", tmp_path / "hub")
    files = {file.name for file in (tmp_path / "hub").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}
    assert json.loads((tmp_path / "hub" / "adapter_config.json").read_text())["base_model_name_or_path"] == "model"
    assert "exists" in manage("export", "production", "--push-ready", tmp_path / "hub", code=2)


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize(
    ("name", "arguments"),
    [("score_trajectories.py", ["nothing.jsonl"]), ("evaluate_judge.py", []), ("train.py", []), ("serve_judge.py", [])],
)
def test_judge_is_understood_wherever_a_run_is(
    script: Callable[..., subprocess.CompletedProcess[str]], name: str, arguments: list[str]
) -> None:
    """The run has no model to load; that it is looked for says that the version was found."""
    done = script(name, *arguments, "--judge", "staging", code=2)
    assert "staging: no such version or tag" in done.stderr and "judge@production" in done.stderr
    found = script(name, *arguments, "--judge", "production", code=1)
    assert "staging" not in found.stderr


@pytest.mark.parametrize("what", ["rows", "runs"])
def test_packed_rows_are_kept_for_a_retraining(tmp_path: Path, judges: Path, manage: Manage, what: str) -> None:
    """By themselves and by another name; the report has the hash of what is in them, or, from earlier, of the file."""
    make_rows(tmp_path / "rows.jsonl", range(30))
    if what == "runs":
        raw = tmp_path / "raw.jsonl"
        write_rows(raw, message_runs(0, 20, labelled=True))
        runs = read_runs([raw], Options(keys=FieldNames(labels="labels")))
        (tmp_path / "rows.jsonl").write_bytes(b"".join(map(dump, runs)))
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / "rows.jsonl").read_bytes()))
    run = make_run(tmp_path, packed)
    manage("add", run)
    moved = packed.rename(tmp_path / "moved.jsonl.gz")
    manage("add", run, "--name", "named", "--rows", moved)
    report = json.loads((tmp_path / "data" / REPORT).read_text())
    report["inputs"][0]["sha256"] = sha256_of(moved)  # as earlier reports have it
    write_json(tmp_path / "data" / REPORT, report)
    manage("add", run, "--name", "older", "--rows", moved)
    for place in ("judge/1/rows/rows.jsonl.gz", "named/1/rows/moved.jsonl.gz", "older/1/rows/moved.jsonl.gz"):
        assert (judges / place).read_bytes() == moved.read_bytes()


def test_names_that_mean_nothing_or_several(project: Path, manage: Manage) -> None:
    assert "no judge is registered" in manage("show", "production", code=2)
    for name in ("a", "b"):
        manage("add", project / "saves" / "run1", "--name", name)
        manage("tag", f"{name}@1", "production")
    assert "a@1 or b@1" in manage("show", "production", code=2)
    assert registered.find_version("b@production") == VersionId("b", 1)
    assert "--name" in manage("add", project / "saves" / "run1", "--name", "../out", code=2)
    for tag in ("7", "a b", ".."):
        assert "is not a valid tag" in manage("tag", "a@1", tag, code=2)


def test_a_run_that_did_not_finish_or_has_other_data_is_refused(project: Path, tmp_path: Path, manage: Manage) -> None:
    run = make_run(tmp_path, project / "rows.jsonl")
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"status": "running"}))
    assert "not finished" in manage("add", run, code=1)
    record["eval_dataset"]["sha256"] = "0" * 64
    (run / "run.json").write_text(json.dumps(record))
    assert "differs from the file" in manage("add", run, code=1)
    assert read_history(registered.registry_folder()) == []


def test_the_data_of_another_project_is_not_taken(
    project: Path, judges: Path, tmp_path: Path, manage: Manage, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path, project / "rows.jsonl")
    saves = (tmp_path / "saves").rename(tmp_path / "elsewhere")
    record = json.loads((saves / "run1" / "run.json").read_text())
    record["config"]["dataset_dir"] = "data"
    (saves / "run1" / "run.json").write_text(json.dumps(record))
    (tmp_path / "data").rename(tmp_path / "mine")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text('{"another": {"file_name": "rows.jsonl"}}')
    monkeypatch.chdir(tmp_path)
    manage("add", saves / "run1", "--name", "without")
    assert not (judges / "without" / "1" / "data").exists()


def test_commands_at_once_are_done_one_by_one(project: Path, judges: Path) -> None:
    run = project / "saves" / "run1"
    commands = [[sys.executable, str(ROOT / "manage_judges.py"), "add", str(run), "--name", f"j{n}"] for n in range(6)]
    processes = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for command in commands]
    assert [process.wait() for process in processes] == [0] * 6
    assert len(state_of(read_history(judges)).versions) == 6


def test_a_killed_command_leaves_nothing_half_done(project: Path, judges: Path, manage: Manage) -> None:
    """Adding is killed at twenty moments; after each, the version is there whole, or not at all."""
    command = [sys.executable, str(ROOT / "manage_judges.py"), "add", str(project / "saves" / "run1"), "--name"]
    began = time.monotonic()
    subprocess.run([*command, "first"], check=True, capture_output=True)
    takes = time.monotonic() - began
    for attempt in range(20):
        process = subprocess.Popen([*command, f"j{attempt}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(takes * random.Random(attempt).uniform(0.3, 1.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
        for version in state_of(read_history(judges)).versions:
            registered.check_files(version)
    manage("tag", "first@1", "production")
    known = {f"{version.name}/{version.number}" for version in state_of(read_history(judges)).versions}
    assert {str(file.parent.relative_to(judges)) for file in judges.glob("*/*/version.json")} == known
    assert not list(judges.glob("*/.adding-*"))


@pytest.mark.usefixtures("two")
def test_a_line_that_was_cut_off_never_happened(judges: Path, manage: Manage) -> None:
    with (judges / "history.jsonl").open("a") as stream:
        stream.write('{"action":"tag","judge":"judge","version":1,"tag":"prod')
    assert registered.find_version("production") == VersionId("judge", 2)
    manage("tag", 1, "preview")
    assert len(read_history(judges)) == 5
    (judges / "history.jsonl").write_text('{"action"\n')
    assert "damaged" in manage("list", code=1)


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"action": "remove", "version": 3}, "judge@3 does not exist at this point"),
        ({"action": "add", "version": 2}, "judge@2 cannot be added after judge@2"),
        ({"action": "add", "version": 1, "judge": ".."}, r"..@1 cannot be added"),
        ({"action": "tag", "version": 7, "tag": "preview"}, "judge@7 does not exist"),
        (
            {"action": "rollback", "version": 1, "was": 3, "tag": "production"},
            "production cannot go from judge@3 to judge@1",
        ),
        ({"action": "rollback", "version": 1, "was": 2, "tag": "preview"}, "preview cannot go from judge@2 to judge@1"),
        ({"action": "rename", "version": 1}, "unknown action 'rename'"),
        ({"action": "tag", "version": "1", "tag": "preview"}, "not an action"),
        ({"action": "tag", "version": 1}, "not an action"),
        ({"action": "tag", "version": 1, "tag": "preview", "time": None}, "not an action"),
    ],
)
def test_a_line_that_cannot_have_happened_is_named(
    judges: Path, manage: Manage, changes: dict[str, object], reason: str
) -> None:
    history = judges / "history.jsonl"
    whole = history.read_text()
    line = json.loads(whole.splitlines()[0]) | changes
    history.write_text(f"{whole}{json.dumps(line)}\n")
    for command in (["list"], ["history"], ["tag", "judge@1", "preview"]):
        said = manage(*command, code=1)
        assert f"history.jsonl:5: damaged ({reason}" in said and "Restore the file from a backup" in said
    assert (judges / "judge" / "2" / "version.json").is_file()


@pytest.mark.usefixtures("two")
def test_a_version_is_removed_once(judges: Path, manage: Manage) -> None:
    manage("remove", 1)
    with (judges / "history.jsonl").open("a") as stream:
        stream.write((judges / "history.jsonl").read_text().splitlines()[-1] + "\n")
    assert "history.jsonl:6: damaged (judge@1 does not exist" in manage("list", code=1)


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize("lines_left", [0, 2, None])
def test_versions_whose_lines_were_lost_are_named_and_not_deleted(
    project: Path, judges: Path, manage: Manage, lines_left: int | None
) -> None:
    """The history was truncated, is an old backup, or is gone; the versions are still worth hours of training."""
    history = judges / "history.jsonl"
    whole = history.read_bytes()
    if lines_left is None:
        history.unlink()
    else:
        history.write_bytes(b"".join(whole.splitlines(keepends=True)[:lines_left]))
    before = {file: file.read_bytes() for file in judges.rglob("*") if file.is_file() and not file.name.startswith(".")}
    for command in (["add", project / "saves" / "run1", "--name", "other"], ["tag", "judge@1", "preview"]):
        said = manage(*command, code=1)
        assert f"judge/{2 if lines_left else 1}: " in said and "Restore the file from a backup" in said
    assert all(file.read_bytes() == content for file, content in before.items())
    history.write_bytes(whole)
    manage("tag", "judge@1", "preview")


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize("command", ["add", "remove"])
def test_what_a_command_that_was_killed_at_its_end_left_is_removed(judges: Path, manage: Manage, command: str) -> None:
    """An add that renamed its folder but wrote no line, and a removal that wrote its line but deleted nothing."""
    number = 3 if command == "add" else 1
    copy = judges / "judge" / str(number)
    if command == "add":
        (judges / "judge" / ".adding-3").mkdir()
    shutil.copytree(judges / "judge" / "1", judges / "copy")
    if command == "remove":
        manage("remove", 1)
    (judges / "copy").rename(copy)
    manage("tag", 2, "preview")
    assert not copy.exists() and not list(judges.glob("*/.adding-*"))
    assert (judges / "judge" / "2" / "version.json").is_file()


def test_judge_and_run_are_two_judges(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import argparse

    from prmkit.judge.scorer import add_judge_arguments

    monkeypatch.chdir(tmp_path)
    os.environ.pop(registered.REGISTRY_VARIABLE, None)
    parser = argparse.ArgumentParser()
    add_judge_arguments(parser)
    with pytest.raises(UsageError, match="--judge and a folder are mutually exclusive"):
        parser.parse_args(["--run", "saves/run", "--judge", "production"])


@pytest.mark.network
@pytest.mark.huge
def test_a_version_is_logged_to_a_real_mlflow(project: Path, manage: Manage, tmp_path: Path) -> None:
    evaluation = project / "saves" / "run1" / "evaluation"
    evaluation.mkdir()
    summary = {"spearman": {"value": 0.8, "low": 0.7, "high": 0.9}, "types": {}}
    (evaluation / "metrics.json").write_text(json.dumps({"summary": summary}))
    said = manage("add", project / "saves" / "run1", "--mlflow", code=2)
    assert "judge@1 is registered; install mlflow-skinny" in said
    packages, store = tmp_path / "packages", tmp_path / "mlruns"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(packages), "mlflow-skinny==3.17.2"]
    subprocess.run(pip, check=True, capture_output=True)
    environment = {"MLFLOW_TRACKING_URI": store.as_uri(), "PYTHONPATH": str(packages)}
    command = [sys.executable, str(ROOT / "manage_judges.py"), "mlflow", "1"]

    def log_it(**more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, env={**os.environ, **environment, **more}, capture_output=True, text=True, check=False
        )

    refused = log_it()
    assert refused.returncode == 1 and "judge@1 is registered" in refused.stderr
    assert log_it(MLFLOW_ALLOW_FILE_STORE="true").returncode == 0
    (logged,) = store.glob("*/*/metrics/spearman")
    assert float(logged.read_text().split()[1]) == 0.8
    assert (logged.parents[1] / "tags" / "prmkit.version").read_text() == "judge@1"
    assert (logged.parents[1] / "params" / "seed").read_text() == "1"
