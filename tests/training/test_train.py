"""train.py as a user types it: the checks before the run, and every way it can end (flow.py, attempt.py)."""

import json
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from layout import ROWS, STEPS, MakeProject, Script, row, write_config
from processes import start

from prmkit.evaluation import command
from prmkit.judge.scorer import Scorer, judge_source_in
from prmkit.judge.types import Request
from prmkit.training import train
from prmkit.training.checks import Status
from prmkit.training.options import Outcome, TrainOptions
from prmkit.training.records import all_records
from prmkit.verdict import Shape


@pytest.fixture
def project(make_project: MakeProject, tmp_path: Path) -> Path:
    return make_project(tmp_path / "my project")


@pytest.mark.llamafactory
def test_the_complete_way_from_any_folder(script: Script, project: Path) -> None:
    """Checks, training, result: with a space in the path, from another folder than the script's."""
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
    assert (config["lora_rank"], config["lora_alpha"]) == (4, 8), "key=value may come before and after flags"


@pytest.mark.llamafactory
@pytest.mark.parametrize("nested", [False, True])
def test_a_judge_is_asked_for_verdicts_of_the_shape_that_it_learnt(nested: bool, script: Script, project: Path) -> None:
    """No prompt shows which scores it asks for, and a key without `score` says nothing about its place."""
    rows = []
    for number in range(ROWS):
        scores = {"quality": 2.5 * (number % 4)}
        answer = json.dumps(({"scores": scores} if nested else scores) | {"reasoning": "It is so."})
        metadata = {"task_id": number // 2, "evaluation_type": "clip", "model_name": "anna", "clip_number": number}
        rows.append({"prompt": row(number)["instruction"], "response": answer, "metadata": metadata})
    (project / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    names = {"dataset": "reward_model_clip", "eval_dataset": "reward_model_clip_eval"}
    write_config(project / "config.yaml", **names, learning_rate=1e-2)
    script("convert_dataset.py", "--input", "rows.jsonl", "--scale", "0", "10", "--config", "config.yaml", cwd=project)
    script("train.py", "--config", "config.yaml", "--export", cwd=project)
    (project / "new.jsonl").write_text(json.dumps({key: rows[0][key] for key in ("prompt", "metadata")}) + "\n")
    shutil.rmtree(project / "data")  # the judge itself knows what it learnt

    shape = Shape(("quality",), nested)
    for judge in (("--run", "saves/run"), ("--model", "exported_model")):
        done = script("score_trajectories.py", "new.jsonl", *judge, cwd=project)
        (line,) = map(json.loads, done.stdout.splitlines())
        assert line["status"] == "ok" and line["request_hash"] == Request(rows[0]["prompt"], shape).digest.hex()
        asked_otherwise = replace(shape, nested=not nested)
        source = judge_source_in(project / judge[1])
        (unsure,) = Scorer(source).judgements([Request(rows[0]["prompt"], asked_otherwise)])
        assert unsure.status == "unsure", "it was asked in a form that it has never seen"


@pytest.mark.llamafactory
def test_llamafactorys_failure_is_reported_with_its_last_lines(project: Path) -> None:
    """No label is text, so LLaMA Factory drops every row; the checks, left out here, would have reported it before."""
    rows = project / "data" / "steps.jsonl"
    rows.write_text("".join(json.dumps({"instruction": "a", "input": "", "output": 1}) + "\n" for _ in range(4)))
    failed = start(project, "--verbose")
    _, said = failed.process.communicate(timeout=300)
    assert failed.process.returncode == 3
    assert "error: LLaMA Factory failed: RuntimeError: Cannot find valid samples" in said
    assert "The complete log: logs/run.log" in said and "run the same command again: " in said
    assert "Running tokenizer on dataset" in said, "--verbose shows everything"
    (listed,) = all_records(project / "saves")
    assert listed["status"] == "failed"


@pytest.mark.llamafactory
def test_validating_checks_everything_and_starts_nothing(script: Script, project: Path) -> None:
    done = script("train.py", "--config", "config.yaml", "--validate-only", "--overwrite", cwd=project)
    assert "ready to train" in done.stdout and done.stdout.endswith("train.py --config config.yaml --overwrite\n")
    assert not (project / "saves").exists() and not (project / "logs").exists()
    shutil.rmtree(project / "model")
    place = "output_dir=config.yaml/x"
    failed = script("train.py", "--config", "config.yaml", "--doctor", "--json", place, cwd=project, code=2)
    errors = {check["name"] for check in json.loads(failed.stdout) if check["status"] == "error"}
    assert {"model folder", "disk"} <= errors
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
        (["--nnodes", "4:2", "--rdzv-id", "a", "--master-addr", "here"], "the first number must not be the larger one"),
        (["--nnodes", "1:2", "--master-addr", "here"], "needs --rdzv-id"),
        (["--nnodes", "2"], "need --master-addr"),
        (["--master-port", "999999"], "--master-port 999999"),
        (["--max-restarts", "-1"], "--max-restarts -1"),
        (["--export-only", "--validate-only"], "--validate-only are mutually exclusive"),
        (["--export-only", "saves/run", "exprot_dir=x"], "exprot_dir"),
        (["--export-only", "saves/run", "-d", "steps", "lora_rank=8"], "dataset, lora_rank"),
        (["--export-only", "lora_rank=8"], "lora_rank cannot be set for an export"),
        (
            ["--export-only", "saves/run", "infer_dtype=flaot16"],
            "infer_dtype: 'flaot16' is not a valid value. Did you mean float16?",
        ),
        (["--export-only", "saves/run", "export_size=[1"], "export_size: '[1' is not a YAML value"),
        (["--export-only", "saves/run", "export_size=0"], "export_size: is 0; it must be at least 1"),
        (["--export-only", "saves/run", "export_dir=config.yaml"], "config.yaml is a file"),
        (["--export-only", "saves/run", "export_dir=.", "--overwrite"], "is the current folder"),
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
    assert all(reported in said for reported in ("model directory not found", "stepz", "Did you mean learning_rate?"))


def test_runs_are_listed_with_their_numbers(script: Script, finished: Path, tmp_path: Path) -> None:
    shown = script("train.py", "--config", "config.yaml", "--runs", cwd=finished).stdout
    assert "finished" in shown and f"{STEPS}/{STEPS}" in shown and "steps" in shown
    (listed,) = json.loads(script("train.py", "--config", "config.yaml", "--runs", "--json", cwd=finished).stdout)
    assert (listed["run"], listed["folder"], listed["steps"]) == ("run", "saves/run", STEPS)
    assert "no runs yet" in script("train.py", "--runs", cwd=tmp_path).stdout
    elsewhere = script("train.py", "--config", "config.yaml", "--runs", "output_dir=other/x", cwd=finished).stdout
    assert "other: no runs yet" in elsewhere


def test_an_export_alone_does_not_start_another_training(script: Script, finished_copy: Path) -> None:
    """After a run with overrides, `--export` means that run: hours of training must be asked for."""
    write_config(finished_copy / "config.yaml", num_train_epochs=9.0)
    refused = script("train.py", "--config", "config.yaml", "--export", "--force", cwd=finished_copy, code=2).stderr
    assert "num_train_epochs: 8.0 -> 9.0" in refused and "Nothing was trained" in refused
    assert "--export-only saves/run" in refused and "--export run_name=run-2" in refused
    assert not (finished_copy / "saves" / "run-2").exists()


@pytest.mark.llamafactory
def test_evaluation_without_held_out_rows_fails_before_training(script: Script, project: Path) -> None:
    refused = script("train.py", "--config", "config.yaml", "--evaluate", "eval_dataset=", cwd=project, code=2).stderr
    reported = refused.partition("error: the checks found")[2]
    assert all(flag in reported for flag in ("--eval-ratio 0.3", "--split-seed", "--eval-tasks"))
    assert not (project / "saves").exists()


def test_code_of_a_model_is_not_run_for_a_run_of_others(script: Script, finished_copy: Path) -> None:
    path = finished_copy / "saves" / "run" / "run.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "config": {**record["config"], "trust_remote_code": True}}))
    refused = script("train.py", "--config", "config.yaml", "--export-only", "saves/run", cwd=finished_copy, code=2)
    assert "add trust_remote_code=true" in refused.stderr


RECORD_KEYS = ("config", "base_model", "dataset", "processes", "steps", "train_loss", "started", "resumed_from")


@pytest.mark.parametrize("value", ["x", 5, [5], None, {"path": 5}])
def test_a_record_of_other_types_ends_nothing(script: Script, finished_copy: Path, value: object) -> None:
    record = json.loads((finished_copy / "saves" / "run" / "run.json").read_text())
    for key in RECORD_KEYS:
        (finished_copy / "saves" / key).mkdir()
        (finished_copy / "saves" / key / "run.json").write_text(json.dumps({**record, key: value}))
    assert "finished" in script("train.py", "--config", "config.yaml", "--runs", cwd=finished_copy).stdout


@pytest.mark.parametrize("text", ["{}", "[]", '{"status": "fin'])
def test_a_damaged_record_does_not_hide_the_others(script: Script, finished_copy: Path, text: str) -> None:
    (finished_copy / "saves" / "bad").mkdir()
    (finished_copy / "saves" / "bad" / "run.json").write_text(text)
    shown = script("train.py", "--config", "config.yaml", "--runs", cwd=finished_copy).stdout
    assert "damaged" in shown and "finished" in shown
    json.loads(script("train.py", "--config", "config.yaml", "--runs", "--json", cwd=finished_copy).stdout)
    refused = script("train.py", "--config", "config.yaml", "run_name=bad", cwd=finished_copy, code=1).stderr
    assert "saves/bad/run.json: damaged" in refused and "--overwrite" in refused


def test_the_checks_see_what_is_in_the_folder(killed_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That an unfinished run of the same config is resumed is tested by resuming it."""
    monkeypatch.chdir(killed_copy)
    before = sorted(path.name for path in Path("saves").rglob("*"))
    other = TrainOptions(Path("config.yaml"), ["lora_rank=4"])
    (found,) = train._check_run_folder(other, train._prepare(other))
    assert found.status is Status.ERROR and "contains an unfinished run with a different config" in found.found
    replaced = replace(other, overwrite=True)
    assert list(train._check_run_folder(replaced, train._prepare(replaced))) == []
    assert sorted(path.name for path in Path("saves").rglob("*")) == before, "looking changed something"


def test_the_shared_run_said_what_it_made_and_what_comes_next(finished: Path) -> None:
    shown = (finished / "shown.txt").read_text()
    assert f"Trained: saves/run ({STEPS} steps" in shown and "Exported: exported_model" in shown
    assert "python evaluate_judge.py --run saves/run" in shown


@pytest.mark.parametrize("trusts", [True, False])
@pytest.mark.parametrize("json_flag", [[], ["--json"]])
def test_a_model_with_its_own_code_is_also_measured_and_compared_with_its_export(
    trusts: bool, json_flag: list[str], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever typed `trust_remote_code=true` for the training has allowed it for the rest of the command, too; and with
    `--json` the rest of the command prints nothing."""
    record = {"config": {"trust_remote_code": trusts}}
    outcome = Outcome(run=tmp_path / "run", record=record, exported=tmp_path / "exported")
    passed: list[tuple[bool, bool]] = []
    for name in ("evaluate_run", "prove_export"):
        monkeypatch.setattr(command, name, lambda *_, trust_remote_code, show: passed.append((trust_remote_code, show)))
    monkeypatch.setattr(train, "execute", lambda options: outcome)
    monkeypatch.setattr(sys, "argv", ["train.py", "--evaluate", "--export", *json_flag])
    with pytest.raises(SystemExit):
        runpy.run_path(str(root / "train.py"), run_name="__main__")
    assert passed == [(trusts, not json_flag)] * 2
