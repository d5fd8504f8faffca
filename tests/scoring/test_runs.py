"""Raw runs scored with the rubric that the judge learnt: as it is typed, and what is refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from narrated import Narrated

from prmkit.errors import UsageError
from prmkit.files import write_json
from prmkit.paths import EXPORT_NOTE
from prmkit.prompts.step import DEFAULT_RUBRIC, load_rubric
from prmkit.rows import STEP_TYPES
from prmkit.scoring.rows import RunsToScore, check_rubric, holds_runs
from prmkit.trajectories.importing import read_runs
from prmkit.trajectories.rows import judged_metadata, step_metadata
from prmkit.trajectory import dump

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "examples" / "runs.jsonl"


def typed(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "score_trajectories.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


@pytest.fixture(scope="module")
def export(model_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported judge that was trained with the default rubric."""
    folder = tmp_path_factory.mktemp("judge") / "exported"
    shutil.copytree(model_folders["qwen"], folder)
    settings = {"template": "qwen", "cutoff_len": 4096, "dtype": "float32", "rubrics": [load_rubric().sha256]}
    write_json(folder / EXPORT_NOTE, settings)
    return folder


def test_judged_and_scored_steps_are_identified_alike() -> None:
    rubric = load_rubric()
    (run, *_), (row, *_) = read_runs([RUNS]), RunsToScore(str(RUNS), rubric, 0.5, "judge").rows()
    identity = step_metadata(run, 1, rubric)
    assert row.metadata == identity | {"step": 1} and identity["evaluation_type"] in STEP_TYPES
    judge = {"model_name": "anna", "provider": None, "category": None, "timestamp": None}
    assert judged_metadata(run, 1, rubric, "anna", None) == judge | identity


@pytest.mark.slow
def test_every_step_of_every_run_gets_a_line(export: Path, tmp_path: Path) -> None:
    shutil.copy(RUNS, tmp_path / "runs.jsonl")
    command = (
        "runs.jsonl",
        "--model",
        export,
        "--output",
        "scores.jsonl",
        "--aggregate",
        "trajectory",
        "--html",
        "p.html",
    )
    done = typed(*command, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr  # the tiny judge is unsure
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    runs = list(read_runs([RUNS]))
    expected = [(run.trajectory_id, step.n, step.source_index) for run in runs for step in run.steps]
    found = [tuple(line["metadata"][key] for key in ("trajectory_id", "step", "source_index")) for line in lines]
    assert found == expected
    assert [line["id"] for line in lines] == [f"{name}#{step}" for name, step, _ in expected]
    assert all(list(line["scores"]) == ["step_score"] for line in lines)
    summaries = [json.loads(line) for line in (tmp_path / "scores.trajectories.jsonl").read_text().splitlines()]
    assert [summary["trajectory_id"] for summary in summaries] == [run.trajectory_id for run in runs]
    assert runs[0].trajectory_id in done.stdout and "first bad" in done.stdout
    assert (tmp_path / "p.html").read_text().count("<h2>") == len(runs)
    again = typed(*command, cwd=tmp_path)
    assert f"{len(lines)} rows are already scored" in again.stderr


def rows_of(path: Path, **changes: Any) -> RunsToScore:
    return RunsToScore(str(path), load_rubric(), 0.5, "a judge", **changes)


def test_one_run_is_drawn_step_by_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = rows_of(ROOT / "examples" / "session.jsonl", page=tmp_path / "page.html")
    for row in runs.rows():
        runs.add(row, {"score": 0.1 * row.number, "label_mass": 1.0, "reason": None, "metadata": row.metadata})
    runs.draw(table=True)
    assert "first bad step" in capsys.readouterr().out
    assert "a judge" in (tmp_path / "page.html").read_text()


def test_what_a_run_loses_is_reported_and_a_form_can_be_named(tmp_path: Path, narrated: Narrated) -> None:
    (tmp_path / "runs.jsonl").write_text(json.dumps({"messages": MESSAGES, "colour": "red"}) + "\n")
    narrated.set_level("INFO")
    assert len(list(rows_of(tmp_path / "runs.jsonl", format="messages").rows())) == 1
    assert "dropped or irregular: 1 field colour" in narrated.text
    with pytest.raises(UsageError, match="unknown format"):
        list(rows_of(tmp_path / "runs.jsonl", format="nonsense").rows())


def test_runs_and_imported_runs_are_the_same_rows(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_bytes(b"".join(map(dump, read_runs([RUNS]))))
    assert list(rows_of(RUNS).rows()) == list(rows_of(tmp_path / "t.jsonl").rows())


def test_a_judge_of_ready_prompts_says_so(model_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "old"
    shutil.copytree(model_folders["qwen"], folder)
    write_json(folder / EXPORT_NOTE, {"template": "qwen", "cutoff_len": 4096})
    done = typed(RUNS, "--model", folder, cwd=tmp_path)
    assert done.returncode == 2 and "trained on ready-made prompts" in done.stderr and done.stdout == ""


def test_another_rubric_is_refused(export: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(DEFAULT_RUBRIC.read_text()) | {"context_tokens": 9000}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(content))
    done = typed(RUNS, "--model", export, "--rubric", "other.yaml", cwd=tmp_path)
    assert done.returncode == 2 and "another rubric" in done.stderr and "--rubric" in done.stderr


def test_rubrics_are_checked_against_what_was_learnt(narrated: Narrated) -> None:
    rubric = load_rubric()
    check_rubric(rubric, ["other", rubric.sha256], "x")
    check_rubric(rubric, None, "a base model")
    assert "its training rubric is unknown" in narrated.text
    for learnt in ([], ["other"]):
        with pytest.raises(UsageError):
            check_rubric(rubric, learnt, "x")


def test_flags_for_runs_need_runs(export: Path, tmp_path: Path) -> None:
    done = typed(ROOT / "examples" / "new_steps.jsonl", "--model", export, "--html", "p.html", cwd=tmp_path)
    assert done.returncode == 2 and "contains prompts" in done.stderr


def test_the_page_replaces_neither_the_input_nor_another_output(tmp_path: Path, export: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    before = shutil.copy(RUNS, runs / "runs.jsonl").read_bytes()
    (tmp_path / "link").symlink_to(runs / "runs.jsonl")
    (tmp_path / "to_come").symlink_to(tmp_path / "z.jsonl")
    (tmp_path / "notes.txt").write_text("mine")
    scored = ("--output", "z.jsonl", "--aggregate", "trajectory")
    for source, page, message in (
        (runs / "runs.jsonl", runs / "runs.jsonl", "is also the input"),
        (runs / "runs.jsonl", "link", "is also the input"),
        (runs, runs / "runs.jsonl", "is not an HTML page"),
        (runs, "notes.txt", "is not an HTML page"),
        (runs, "z.jsonl", "is the same file as z.jsonl"),
        (runs, "to_come", "is the same file as z.jsonl"),
        (runs, "./z.trajectories.jsonl", "is the same file as z.trajectories.jsonl"),
        (runs, "z.fingerprint.json", "is the same file as z.fingerprint.json"),
    ):
        done = typed(source, "--model", export, *scored, "--html", page, cwd=tmp_path)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, (page, done.stderr)
        assert (runs / "runs.jsonl").read_bytes() == before and not (tmp_path / "z.jsonl").exists()
    done = typed(runs, "--model", export, "--html", "notes.txt", cwd=tmp_path)
    assert done.returncode == 2 and (tmp_path / "notes.txt").read_text() == "mine"


MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": "Go."}, {"role": "assistant", "content": "Done."}]
PROMPT = 'Judge it. {"step_score": <score>}'


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"messages": MESSAGES}, True),
        (MESSAGES, True),
        ({"prompt": "Judge it."}, False),
        ({"id": 1, "prompt": PROMPT}, False),
        ({"messages": MESSAGES[:1]}, False),
        ({"messages": [{"role": "user", "content": PROMPT}, MESSAGES[1]]}, False),
        ({"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}],
          "metadata": {"evaluation_type": "clip"}}, False),
        ({"model": "x"}, False),
    ],
)  # fmt: skip
def test_runs_and_prompts_are_recognised(value: Any, expected: bool, tmp_path: Path) -> None:
    (tmp_path / "input.jsonl").write_text(json.dumps(value) + "\n")
    assert holds_runs(str(tmp_path / "input.jsonl")) is expected


def test_what_is_no_file_of_runs(tmp_path: Path) -> None:
    assert not holds_runs("-") and not holds_runs(str(tmp_path / "none.jsonl"))
    assert not holds_runs(str(ROOT / "finetune.jsonl")) and holds_runs(str(ROOT / "examples"))


CONFIG: dict[str, Any] = {
    "stage": "sft",
    "do_train": True,
    "template": "qwen",
    "finetuning_type": "lora",
    "lora_rank": 8,
    "lora_target": "all",
    "dataset": "reward_model_clip",
    "dataset_dir": "data",
    "cutoff_len": 1500,
    "preprocessing_num_workers": 1,
    "output_dir": "saves/run",
    "per_device_train_batch_size": 2,
    "max_steps": 2,
    "report_to": "none",
    "use_cpu": True,
}


def trained_prompts(config: dict[str, Any]) -> list[tuple[int, ...]]:
    """The token ids of every prompt that LLaMA Factory trains on."""
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    model_args, data_args, training_args, _, _ = get_train_args(dict(config))
    loaded = load_tokenizer(model_args)
    made = get_template_and_fix_tokenizer(loaded["tokenizer"], data_args)
    rows: Any = get_dataset(made, model_args, data_args, training_args, stage="sft", **loaded)["train_dataset"]
    return [tuple(row["input_ids"][: row["labels"].count(-100)]) for row in rows]


@pytest.mark.llamafactory
@pytest.mark.slow
def test_labelled_converted_trained_and_scored(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way of one file of runs: what is scored has the token ids of what was trained on."""
    from prmkit.judge.batching import EncodedPrompt, make_preparer
    from prmkit.judge.sources import encoding_of, judge_source_of_run
    from tools.make_sample.runs import message_runs
    from tools.make_sample.sample import write_rows

    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "runs.jsonl", message_runs(0, 4, labelled=True))
    config = CONFIG | {"model_name_or_path": str(tiny_model)}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    labels = ("--labels", "column", "--label-key", "labels", "--output", "rows.jsonl")
    for script, *arguments in (
        ("import_trajectories.py", "runs.jsonl", *labels),
        ("convert_dataset.py", "--input", "rows.jsonl", "--eval-ratio", "0", "--config", "config.yaml"),
        ("train.py", "--config", "config.yaml"),
        ("score_trajectories.py", "runs.jsonl", "--run", "saves/run", "--output", "scores.jsonl"),
    ):
        done = subprocess.run([sys.executable, ROOT / script, *arguments], capture_output=True, text=True)
        expected = (0, 1) if script == "score_trajectories.py" else (0,)  # after two steps it is unsure of all
        assert done.returncode in expected, done.stderr
    source = judge_source_of_run(tmp_path / "saves" / "run")
    prepare = make_preparer(encoding_of(source), config["cutoff_len"], trim=True)
    rows = list(rows_of(tmp_path / "runs.jsonl").rows())
    scored = [prepare(row.request) for row in rows if row.request]
    assert {tuple(each.ids) for each in scored if isinstance(each, EncodedPrompt)} == set(trained_prompts(config))
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [line["request_hash"] for line in lines] == [row.request_hash for row in rows]
    assert all(line["score"] is not None for line in lines)
