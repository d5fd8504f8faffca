"""Retraining: what is reported about new rows, what is refused before training, and one real retraining."""

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from registry_fixtures import ROOT, make_rows, make_run

from prmkit import registered
from prmkit.dataset.command import make_parser, settings_of
from prmkit.dataset.settings import Settings
from prmkit.drift import shift_of
from prmkit.errors import DataError
from prmkit.files import exclusive_lock, sha256_of
from prmkit.registry import versions
from prmkit.registry.batch import (
    HELD_OUT,
    TRAINING,
    Job,
    Retraining,
    _conversion_flags,
    accepted_rows_of,
    check_sides,
    convert_all,
    describe_batch,
    tasks_in,
)
from prmkit.registry.retrain import _contradiction, _drops, _key_of, show_retraining
from prmkit.registry.versions import Addition, add_version
from prmkit.trajectories.importing import Options, read_runs
from prmkit.trajectories.run import FieldNames
from prmkit.trajectory import dump
from tools.make_sample.runs import message_runs
from tools.make_sample.sample import write_rows

Script = Callable[..., subprocess.CompletedProcess[str]]


def sidecar(prompt: str, score: float, judge: str = "a", kind: str = "clip", task: str = "t") -> dict[str, Any]:
    """A line of a sidecar."""
    metadata = {"model_name": judge, "evaluation_type": kind, "task_id": task}
    return {"prompt_sha256": prompt, "scores": {"score": score}, "metadata": metadata}


def test_changed_labels_and_other_judges_are_found() -> None:
    old = [sidecar("p1", 0.2), sidecar("p2", 0.4), sidecar("p3", 0.6, judge="b")]
    new = [sidecar("p1", 0.2), sidecar("p2", 0.9), sidecar("p4", 0.5, judge="c", kind="final")]
    report = describe_batch(old, new, {"rejected": {"not JSON": 2}})
    assert (report["repeated_labels"], report["changed_labels"]) == (2, 1)
    assert report["changed_examples"] == [{"prompt_sha256": "p2", "judge": "a", "key": "score", "was": 0.4, "is": 0.9}]
    assert (report["judges_new"], report["judges_gone"], report["types_new"]) == (["c"], ["b"], ["final"])
    assert len(report["findings"]) == 5


def test_shifted_scores_are_found_and_chance_is_not_a_shift() -> None:
    rng = np.random.default_rng(0)
    same = [shift_of(rng.uniform(size=200), rng.uniform(size=100)).exceeds(0.25) for _ in range(100)]
    assert sum(same) == 0
    assert shift_of(rng.uniform(size=200), rng.uniform(size=100) ** 3).exceeds(0.25)
    few = shift_of([0.5] * 200, [0.1] * 10)
    assert few.psi is None and not few.exceeds(0.25)
    rows = [sidecar(f"p{n}", 0.9) for n in range(100)]
    report = describe_batch(rows, [sidecar(f"q{n}", 0.1) for n in range(100)], {"rejected": {}})
    assert "have shifted: mean 0.90 before, 0.10 now" in report["findings"][0]


def test_a_judge_that_agrees_less_with_new_labels_is_reported() -> None:
    def metrics(low: float | None, value: float, high: float | None) -> dict[str, Any]:
        return {"summary": {"types": {"clip": {"spearman": {"low": low, "value": value, "high": high}}}}}

    parent = registered.VersionId("judge", 1)
    (said,) = _drops(metrics(0.8, 0.9, 0.95), metrics(0.1, 0.4, 0.7), parent)
    assert "(Spearman 0.40 [0.10, 0.70]) than with the old ones (0.90 [0.80, 0.95])" in said
    assert not _drops(metrics(0.8, 0.9, 0.95), metrics(0.7, 0.85, 0.9), parent)
    assert not _drops(metrics(0.8, 0.9, 0.95), metrics(None, 0.4, None), parent)
    assert _contradiction(metrics(-0.9, -0.5, -0.1), parent) and not _contradiction(metrics(-0.9, -0.5, 0.1), parent)


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A registry with one version in production, whose weights cannot be loaded."""
    make_rows(tmp_path / "rows.jsonl", range(30))
    judges = tmp_path / "judges"
    monkeypatch.setenv(registered.REGISTRY_VARIABLE, str(judges))
    add_version(judges, Addition(make_run(tmp_path, tmp_path / "rows.jsonl"), "judge"))
    return judges


def test_a_task_that_changes_its_side_is_a_leak(registry: Path, tmp_path: Path) -> None:
    data = registry / "judge" / "1" / "data"
    assert check_sides(data, "judge", registry) == 1
    swapped = tmp_path / "swapped"
    swapped.mkdir()
    full = "reward_model_full"
    (swapped / f"{full}_eval.meta.jsonl").write_bytes((data / f"{full}.meta.jsonl").read_bytes())
    with pytest.raises(DataError, match="judge@1 was trained on"):
        check_sides(swapped, "judge", registry)


def test_rows_that_the_version_has_are_nothing_to_do(registry: Path, tmp_path: Path, script: Script) -> None:
    done = script("manage_judges.py", "retrain", 1, "--new", tmp_path / "rows.jsonl", "--json")
    assert json.loads(done.stdout)["version"] == "judge@1"
    assert json.loads(done.stdout)["promoted"] is False
    assert json.loads(done.stdout)["gate"]["passed"] is None
    assert "was already trained on these rows" in done.stderr
    versions.tag_version(registry, "judge@1", "production", None)
    typed = ["retrain", "production", "--new", tmp_path / "rows.jsonl", "--promote-if-better"]
    said = script("manage_judges.py", *typed).stdout
    assert said == "judge@1: was already trained on these rows. No gate was measured.\n"


@pytest.mark.parametrize("passed", [True, False])
def test_only_the_command_that_made_a_version_gets_its_gate_again(
    registry: Path, tmp_path: Path, script: Script, passed: bool
) -> None:
    """The version has other rows, too: those of its parent, about which its gate says nothing."""
    make_rows(tmp_path / "week.jsonl", range(40, 50))
    week, old = tmp_path / "week.jsonl", tmp_path / "rows.jsonl"
    asked = Retraining("judge@1", (week,), "base", 1.0, 0.05, (), False, False)
    gate = {"passed": passed, "reasons": [] if passed else ["worse"]}
    details = {"key": _key_of(asked, "judge@1", [sha256_of(week)]), "parent": "judge@1", "gate": gate,
               "report": {"findings": ["as before"]}}  # fmt: skip
    run = make_run(tmp_path, old, 2)
    add_version(registry, Addition(run, "judge", keep_rows=(old, week), parent="judge@1", details=details))
    versions.tag_version(registry, "judge@2", "production", None)
    typed = ["manage_judges.py", "retrain", "production", "--json", "--new"]
    again = json.loads(script(*typed, week, code=0 if passed else 4).stdout)
    assert (again["gate"], again["report"], again["promoted"]) == (gate, details["report"], True)
    for others in ([old], [old, week], [week, "--margin", "0.2"]):
        result = json.loads(script(*typed, *others).stdout)
        assert (result["gate"]["passed"], result["report"], result["promoted"]) == (None, None, False)


@pytest.mark.parametrize(("reference", "tag"), [("1", "production"), ("judge@1", "production"), ("preview", "preview")])
def test_the_tag_of_a_promoted_version_is_shown(reference: str, tag: str, capsys: pytest.CaptureFixture[str]) -> None:
    gate = {"passed": True, "reasons": []}
    result = {"version": "judge@2", "parent": "judge@1", "promoted": True, "gate": gate, "report": None}
    show_retraining(result, Retraining(reference, (), "base", 1.0, 0.0, (), promote=True, accept_contradiction=False))
    assert f"judge@2 now has the tag {tag}.\n" in capsys.readouterr().out


@pytest.mark.llamafactory
def test_lengths_are_measured_with_what_will_be_trained(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: Script
) -> None:
    """A system text that the guard leaves out would let LLaMA Factory cut rows that just fit."""
    monkeypatch.setenv(registered.REGISTRY_VARIABLE, str(tmp_path / "judges"))
    make_rows(tmp_path / "rows.jsonl", range(30))
    make_rows(tmp_path / "new.jsonl", range(40, 60))
    config = {"model_name_or_path": str(tiny_model), "template": "qwen", "cutoff_len": 400, "neat_packing": True,
              "default_system": "You are strict.", "finetuning_type": "lora"}  # fmt: skip
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    typed = ["--input", tmp_path / "rows.jsonl", "--output-dir", tmp_path / "data", "--eval-ratio", "0.3"]
    script("convert_dataset.py", *typed, "--no-task-variants", "--config", tmp_path / "config.yaml")
    run = make_run(tmp_path, tmp_path / "rows.jsonl")
    record = json.loads((run / "run.json").read_text())
    base = {**record["base_model"], "path": str(tiny_model), "relative": None}
    config["dataset_dir"] = str(tmp_path / "data")
    (run / "run.json").write_text(json.dumps({**record, "config": config, "base_model": base}))
    parent = add_version(tmp_path / "judges", Addition(run, "judge"))
    asked = Retraining("judge@1", (tmp_path / "new.jsonl",), "base", 1.0, 0.05, ("cutoff_len=300",), False, False)
    work = tmp_path / "work"
    work.mkdir()
    convert_all(Job(asked, tmp_path / "judges", parent, work, "key"))
    for name in ("first", "all", "new"):
        lengths = json.loads((work / name / "conversion_report.json").read_text())["settings"]["lengths"]
        assert (lengths["default_system"], lengths["cutoff_len"], lengths["packing"]) == ("You are strict.", 300, True)


def labelled_runs(file: Path) -> None:
    raw = file.with_name("raw.jsonl")
    write_rows(raw, message_runs(0, 30, labelled=True))
    file.write_bytes(b"".join(map(dump, read_runs([raw], Options(keys=FieldNames(labels="labels"))))))
    raw.unlink()


def lines_and_an_array(file: Path) -> None:
    make_rows(file, range(15))
    make_rows(file.with_name("more"), range(15, 30))
    rows = [json.loads(line) for line in file.with_name("more").read_text().splitlines()]
    file.with_name("spread.json").write_text(json.dumps(rows, indent=1))


@pytest.mark.parametrize("write", [labelled_runs, lines_and_an_array])
def test_all_rows_of_a_share_of_the_old_tasks_are_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None]
) -> None:
    monkeypatch.setenv(registered.REGISTRY_VARIABLE, str(tmp_path / "judges"))
    (tmp_path / "old").mkdir()
    write(tmp_path / "old" / "rows.jsonl")
    make_rows(tmp_path / "new.jsonl", range(40, 50), word="refund")
    parent = add_version(tmp_path / "judges", Addition(make_run(tmp_path, tmp_path / "old"), "judge"))
    asked = Retraining("judge@1", (tmp_path / "new.jsonl",), "base", 0.4, 0.05, (), False, False)
    job = Job(asked, tmp_path / "judges", parent, tmp_path / "work", "key")
    job.work.mkdir()
    convert_all(job)
    used, known = (Counter(row["metadata"]["task_id"] for row in accepted_rows_of(job.work / name))
                   for name in ("data", "all"))  # fmt: skip
    assert all(used[task] == known[task] for task in used)
    assert tasks_in(job.work / "data", HELD_OUT) == tasks_in(job.work / "all", HELD_OUT)
    old = tasks_in(job.parent_folder / "data", TRAINING)
    assert 0.2 < len(old & set(used)) / len(old) < 0.8


def test_full_fine_tuning_has_no_adapter_to_start_from(registry: Path, tmp_path: Path, script: Script) -> None:
    make_rows(tmp_path / "new.jsonl", range(40, 50))
    run = make_run(tmp_path, tmp_path / "rows.jsonl", 3)
    (run / "adapter_config.json").unlink()
    version = add_version(registry, Addition(run, "judge"))
    done = script("manage_judges.py", "retrain", version, "--new", tmp_path / "new.jsonl", "--from", "adapter", code=2)
    assert "--from base" in done.stderr


def test_a_second_retraining_is_refused_with_a_sentence(registry: Path, tmp_path: Path, script: Script) -> None:
    make_rows(tmp_path / "new.jsonl", range(40, 50))
    with exclusive_lock(registry / "judge", "retraining", lock=".retrain.lock"):
        done = script("manage_judges.py", "retrain", 1, "--new", tmp_path / "new.jsonl", code=1)
    assert f"process {os.getpid()} is retraining here" in done.stderr


def test_what_cannot_be_retrained_is_refused_before_any_work(registry: Path, tmp_path: Path, script: Script) -> None:
    make_rows(tmp_path / "new.jsonl", range(40, 50))
    (tmp_path / "rows.jsonl").unlink()
    version = add_version(registry, Addition(make_run(tmp_path, tmp_path / "rows.jsonl", 2), "judge"))
    done = script("manage_judges.py", "retrain", version, "--new", tmp_path / "new.jsonl", code=2)
    assert "--rows" in done.stderr
    done = script("manage_judges.py", "retrain", 1, "--new", tmp_path / "none.jsonl", code=1)
    assert "none.jsonl" in done.stderr


@pytest.mark.slow
@pytest.mark.llamafactory
def test_a_week_with_a_real_training_and_a_poisoned_one(tmp_path: Path) -> None:
    """The whole quarter is benchmarks/quarter.py; here are its first week and inverted labels."""
    program = """if True:
        import benchmarks.quarter as quarter
        quarter.POISON = 2
        raise SystemExit(quarter.main())
    """
    command = [sys.executable, "-c", program, "--work", str(tmp_path), "--weeks", "2", "--kills", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    weeks = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert weeks[0]["after"] == "judge@2"
    assert weeks[1]["version"] is None and "contradict" in weeks[1]["reasons"][0]


def test_every_setting_of_a_conversion_is_repeated() -> None:
    """One that is new is added to the flags, or to those that a retraining decides itself."""
    read: set[str] = set()

    class Recorded(dict[str, Any]):
        def __getitem__(self, key: str) -> Any:
            read.add(key)
            return super().__getitem__(key)

    settings = Recorded(Settings(("rows.jsonl",), Path("data")).as_json())
    _conversion_flags(_job(Path()), settings)
    assert read | {"inputs", "output", "filters", "name", "split", "task_variants"} == settings.keys()


def _job(work: Path) -> Job:
    asked = Retraining("steps@1", (), "base", 1.0, 0.0, (), promote=False, accept_contradiction=False)
    return Job(asked, work / "judges", registered.VersionId("steps", 1), work, "key")


REPEATED = {
    "--rubric": ["mine.yaml"], "--format": ["sharegpt"], "--labels": ["verbatim"], "--mask-leaked-scores": [],
    "--max-rejected": ["7%"], "--near-duplicates": ["drop"], "--scale": ["judge-a=1:10", "=1:5"],
    "--map": ["pass=1", "fail=0.2345678"], "--aggregate": ["median"], "--no-leniency-correction": [],
    "--max-disagreement": ["0.3"], "--too-long": ["drop"],
}  # fmt: skip
NOT_REPEATED = {
    "--input": "old and new rows",
    "--output-dir": "the folders of the retraining",
    "--no-task-variants": "always given: nobody trains on these variants",
    "--json": "changes no data",
    "--audit": "changes no data",
    "--evaluation-types": "filtered data is refused",
    "--model-names": "filtered data is refused",
    "--task-ids": "filtered data is refused",
    "--name": "filtered data is refused",
    "--eval-ratio": "the split is kept task by task",
    "--split-seed": "the split is kept task by task",
    "--eval-tasks": "the split is kept task by task",
    "--config": "the configuration of the new training",
    "assignments": "those of --set",
    "--tokenizer": "the model of the new training",
    "--template": "from the configuration of the new training",
    "--cutoff-len": "from the configuration of the new training",
}
"""Option of the conversion -> what a retraining has in its place."""


def test_every_option_of_the_conversion_is_repeated_or_the_reason_is_known() -> None:
    shown = [action for action in make_parser(None)._actions if action.help != argparse.SUPPRESS]
    options = {action.option_strings[-1] if action.option_strings else action.dest for action in shown}
    assert options - {"--help"} == REPEATED.keys() | NOT_REPEATED.keys()
    assert not REPEATED.keys() & NOT_REPEATED.keys()


@pytest.mark.parametrize("option", REPEATED)
def test_an_option_of_the_conversion_is_repeated(option: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    job = _job(tmp_path)
    config = {"model_name_or_path": str(model), "cutoff_len": 400}
    (job.parent_folder / "run").mkdir(parents=True)
    (job.parent_folder / "run" / "run.json").write_text(
        json.dumps({"config": config, "base_model": {"path": str(model)}})
    )
    parse = make_parser(None).parse_intermixed_args
    typed = ["--tokenizer", str(model), "--cutoff-len", "400"]
    before = settings_of(parse([*typed, option, *REPEATED[option]]))
    assert before != settings_of(parse(typed))
    now = settings_of(parse([str(flag) for flag in _conversion_flags(job, before.as_json())]))
    assert replace(now, output=before.output, task_variants=True) == before
