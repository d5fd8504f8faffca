"""train.py as a user types it: the checks before the run, and every way it can end (flow.py, attempt.py)."""

import json
import shutil
from pathlib import Path

import pytest
from layout import STEPS, MakeProject, Script
from processes import start

from prmkit.training.records import all_records


@pytest.fixture
def project(make_project: MakeProject, tmp_path: Path) -> Path:
    return make_project(tmp_path / "my project")


def test_the_whole_way_from_any_folder(script: Script, project: Path) -> None:
    """Checks, training, result: with a blank in the path, from another folder than the script's."""
    done = script(
        "train.py", "lora_alpha=8", "--config", "config.yaml", "-e", "1", "-lr", "2e-3", "-bs", "8", "lora_rank=4",
        cwd=project,
    )  # fmt: skip
    assert done.stdout.startswith("Trained: saves/run (5 steps, last training loss ")
    assert "score_trajectories.py --run saves/run" in done.stdout.splitlines()[-2]
    for shown in ("learning_rate", "0.002  (--learning-rate)", "(key=value)", "ok       template:"):
        assert shown in done.stderr, shown
    config = json.loads((project / "saves" / "run" / "run.json").read_text())["config"]
    assert (config["num_train_epochs"], config["per_device_train_batch_size"]) == (1, 8)
    assert (config["lora_rank"], config["lora_alpha"]) == (4, 8), "key=value may stand before and behind flags"


def test_llamafactorys_failure_is_told_with_its_last_lines(project: Path) -> None:
    """No label is text, so LLaMA Factory drops every row; the checks, left out here, would have told it before."""
    rows = project / "data" / "steps.jsonl"
    rows.write_text("".join(json.dumps({"instruction": "a", "input": "", "output": 1}) + "\n" for _ in range(4)))
    failed = start(project, "--verbose")
    _, said = failed.process.communicate(timeout=300)
    assert failed.process.returncode == 3
    assert "error: LLaMA Factory failed: RuntimeError: Cannot find valid samples" in said
    assert "The complete log: logs/run.log" in said and "start the same command again: " in said
    assert "Running tokenizer on dataset" in said, "--verbose shows everything"
    (listed,) = all_records(project / "saves")
    assert listed["status"] == "failed"


def test_validating_checks_everything_and_starts_nothing(script: Script, project: Path) -> None:
    done = script("train.py", "--config", "config.yaml", "--validate-only", cwd=project)
    assert "ready to train" in done.stdout
    assert not (project / "saves").exists() and not (project / "logs").exists()
    shutil.rmtree(project / "model")
    failed = script("train.py", "--config", "config.yaml", "--doctor", "--json", cwd=project, code=2)
    assert [check for check in json.loads(failed.stdout) if check["status"] == "error"]
    assert not (project / "saves").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["learning_rtae=1e-3"], "learning_rate"),
        (["nonsense"], "'nonsense' is not key=value"),
        (["--nnodes", "two"], "--nnodes two"),
        (["--nproc", "0"], "--nproc 0"),
        (["--nproc", "1", "--node-rank", "1"], "--node-rank 1: expected 0 to 0"),
        (["--node-rank", "-1"], "--node-rank -1"),
        (["--nnodes", "2", "--node-rank", "5", "--master-addr", "10.9.9.9"], "--node-rank 5: expected 0 to 1"),
        (["--nnodes", "4:2", "--rdzv-id", "a", "--master-addr", "here"], "the first number is the smaller one"),
        (["--nnodes", "1:2", "--master-addr", "here"], "needs --rdzv-id"),
        (["--nnodes", "2"], "need --master-addr"),
        (["--master-port", "999999"], "--master-port 999999"),
        (["--max-restarts", "-1"], "--max-restarts -1"),
        (["--export-only", "--validate-only"], "Give one of them"),
        (["--export-only", "saves/run", "exprot_dir=x"], "exprot_dir"),
        (["--export-only", "saves/run", "-d", "steps", "lora_rank=8"], "dataset, lora_rank"),
        (["--export-only", "lora_rank=8"], "lora_rank: a run is exported as it was trained"),
        (
            ["--export-only", "saves/run", "infer_dtype=flaot16"],
            "infer_dtype: 'flaot16' is not one of its choices. Did you mean float16?",
        ),
        (["--export-only", "saves/run", "export_size=[1"], "export_size: '[1' is not a YAML value"),
        (["--export-only", "saves/run", "export_size=0"], "export_size: is 0; it must be at least 1"),
        (["--export-only", "saves/run", "export_dir=config.yaml"], "config.yaml: is a file"),
        (["--export-only", "saves/run", "export_dir=.", "--overwrite"], "folder that this was started in"),
        (["--runs", "--config", "missing.yaml"], "missing.yaml"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["--exprot"], "Did you mean --export?"),
        (["--lora-rank", "8"], "Write lora_rank=8"),
        (["--lora-rank=8"], "Write lora_rank=8"),
    ],
)
def test_a_wrong_command_line_is_refused_at_once(
    script: Script, finished: Path, arguments: list[str], said: str
) -> None:
    refused = script("train.py", "--config", "config.yaml", *arguments, cwd=finished, code=2)
    assert said in refused.stderr


def test_a_config_with_many_mistakes_and_a_missing_model_gets_one_report(script: Script, project: Path) -> None:
    shutil.rmtree(project / "model")
    wrong = ["learning_rtae=1e-3", "lora_rank='8'", "dataset=stepz", "bf16=maybe"]
    said = script("train.py", "--config", "config.yaml", *wrong, cwd=project, code=2).stderr
    assert "5 errors" in said
    assert all(told in said for told in ("model directory not found", "stepz", "Did you mean learning_rate?"))


def test_runs_are_listed_with_their_numbers(script: Script, finished: Path, tmp_path: Path) -> None:
    shown = script("train.py", "--config", "config.yaml", "--runs", cwd=finished).stdout
    assert "finished" in shown and f"{STEPS}/{STEPS}" in shown and "steps" in shown
    (listed,) = json.loads(script("train.py", "--config", "config.yaml", "--runs", "--json", cwd=finished).stdout)
    assert (listed["run"], listed["folder"], listed["steps"]) == ("run", "saves/run", STEPS)
    assert "no runs yet" in script("train.py", "--runs", cwd=tmp_path).stdout
    elsewhere = script("train.py", "--config", "config.yaml", "--runs", "output_dir=other/x", cwd=finished).stdout
    assert "other: no runs yet" in elsewhere


@pytest.mark.parametrize("text", ["{}", "[]", '{"status": "fin'])
def test_a_damaged_record_does_not_hide_the_others(script: Script, finished_copy: Path, text: str) -> None:
    (finished_copy / "saves" / "bad").mkdir()
    (finished_copy / "saves" / "bad" / "run.json").write_text(text)
    shown = script("train.py", "--config", "config.yaml", "--runs", cwd=finished_copy).stdout
    assert "damaged" in shown and "finished" in shown
    json.loads(script("train.py", "--config", "config.yaml", "--runs", "--json", cwd=finished_copy).stdout)
    refused = script("train.py", "--config", "config.yaml", "run_name=bad", cwd=finished_copy, code=1).stderr
    assert "saves/bad/run.json: damaged" in refused and "--overwrite" in refused


def test_a_place_where_nothing_can_be_is_told_by_the_checks(script: Script, project: Path) -> None:
    """The kinds of such places are tested with the check itself."""
    done = script("train.py", "--config", "config.yaml", "--doctor", "output_dir=config.yaml/x", cwd=project, code=2)
    assert "not ready to train" in done.stdout, done.stderr


def test_the_checks_see_what_stands_in_the_folder(script: Script, killed_copy: Path) -> None:
    """That an unfinished run of the same config goes on is tested by going on with it."""
    checked = ["train.py", "--config", "config.yaml", "--validate-only"]
    done = script(*checked, "lora_rank=4", cwd=killed_copy, code=2)
    assert "contains an unfinished run of another config" in done.stdout
    before = sorted(path.name for path in (killed_copy / "saves").rglob("*"))
    script(*checked, "--overwrite", "lora_rank=4", cwd=killed_copy)
    assert sorted(path.name for path in (killed_copy / "saves").rglob("*")) == before, "looking changed something"


def test_the_shared_run_said_what_it_made_and_what_comes_next(finished: Path) -> None:
    shown = (finished / "shown.txt").read_text()
    assert f"Trained: saves/run ({STEPS} steps" in shown and "Exported: exported_model" in shown
    assert "python evaluate_judge.py --run saves/run" in shown
