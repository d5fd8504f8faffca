"""The command line of convert_dataset.py, as a user types it."""

import gzip
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.dataset.conftest import many_rows, prompt_of, read_lines, row_of, write_rows

Script = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "finetune.jsonl", [*many_rows(tasks=30), b"oops"])


def test_without_arguments_it_reads_finetune_jsonl_and_writes_data(source: Path, script: Script) -> None:
    done = script("convert_dataset.py", cwd=source.parent)
    assert (source.parent / "data" / "dataset_info.json").exists()
    for said in ("reward_model_full", "held out", "not JSON", "181 rows read: 180 kept, 1 rejected, 0 duplicates"):
        assert said in done.stdout
    assert "judge-a / judge-b" in done.stdout
    assert done.stderr.strip() == ""


@pytest.mark.parametrize(
    ("typed", "advice"),
    [
        ("", "--config training_config.yaml --dataset reward_model_full"),
        ("--output-dir elsewhere", "--config training_config.yaml --dataset reward_model_full dataset_dir=elsewhere"),
        ("--config next.yaml", "--config next.yaml --dataset reward_model_full"),
        ("--config next.yaml cutoff_len=99", "--config next.yaml --dataset reward_model_full cutoff_len=99"),
        (
            "--config next.yaml cutoff_len=99 --cutoff-len 88 --output-dir data",
            "--config next.yaml --dataset reward_model_full cutoff_len=88 dataset_dir=data",
        ),
        (
            "--config next.yaml --template qwen",
            "--config next.yaml --dataset reward_model_full template=qwen",
        ),
        ("--config next.yaml dataset_dir=mine", "--config next.yaml --dataset reward_model_full dataset_dir=mine"),
        ("--config next.yaml --model-names judge-a", "--config next.yaml --dataset reward_model_custom"),
    ],
)
def test_the_next_command_trains_with_the_same_settings(source: Path, script: Script, typed: str, advice: str) -> None:
    (source.parent / "next.yaml").write_text("model_name_or_path: not_here\ndataset_dir: ./of_config\n")
    done = script("convert_dataset.py", *typed.split(), cwd=source.parent)
    assert done.stdout.splitlines()[-1] == f"next: python train.py {advice}"


def test_the_report_on_stdout(source: Path, data: Path, script: Script) -> None:
    done = script("convert_dataset.py", "--input", source, "--output-dir", data, "--json")
    assert json.loads(done.stdout) == json.loads((data / "conversion_report.json").read_text())


def test_several_inputs_and_stdin(source: Path, data: Path, tmp_path: Path, script: Script) -> None:
    packed = tmp_path / "more.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps(row_of(prompt_of("one more"))).encode()))
    line = json.dumps(row_of(prompt_of("from stdin")))
    script("convert_dataset.py", "--input", source, packed, "-", "--output-dir", data, stdin=line)
    traced = [
        *read_lines(data / "reward_model_full.meta.jsonl"),
        *read_lines(data / "reward_model_full_eval.meta.jsonl"),
    ]
    assert {row["source"] for row in traced} == {str(source), str(packed), "stdin"}


def test_filters_hold_out_what_the_conversion_in_the_folder_holds_out(source: Path, data: Path, script: Script) -> None:
    where = ("--input", source, "--output-dir", data)
    script("convert_dataset.py", *where, "--split-seed", 7, "--eval-ratio", 0.4)
    held_out = {row["metadata"]["task_id"] for row in read_lines(data / "reward_model_full_eval.meta.jsonl")}
    script("convert_dataset.py", *where, "--model-names", "judge-a", "--name", "one_judge")
    traced = read_lines(data / "one_judge_eval.meta.jsonl")
    assert {row["metadata"]["task_id"] for row in traced} == held_out
    report = json.loads((data / "one_judge.report.json").read_text())
    assert report["settings"]["split"] == {"ratio": 0.4, "seed": 7, "tasks": None}
    assert (data / "one_judge.rejected.jsonl").exists()


def test_a_list_of_held_out_tasks(source: Path, data: Path, tmp_path: Path, script: Script) -> None:
    tasks = tmp_path / "tasks.txt"
    tasks.write_text("task_3\n\n task_4 \ntask_x\n")
    done = script("convert_dataset.py", "--input", source, "--output-dir", data, "--eval-tasks", tasks)
    assert "1 tasks of --eval-tasks are not in the input: task_x" in done.stderr
    held_out = {row["metadata"]["task_id"] for row in read_lines(data / "reward_model_full_eval.meta.jsonl")}
    assert held_out == {"task_3", "task_4"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--input", "gone.jsonl"], 1, "gone.jsonl: no such file"),
        (["--input", "finetune.jsonl", "finetune.jsonl"], 1, "given twice"),
        (["--input", "empty"], 1, "empty has no row files (.jsonl"),
        (["--task-ids", "nope"], 1, "in the input: task_"),
        (["--eval-tasks", "gone.txt"], 1, "gone.txt: No such file"),
        (["--max-rejected", "0"], 1, "1 rows are rejected"),
        (["--tokenizer", "empty", "--cutoff-len", "100"], 1, "empty has no tokenizer"),
        (["--eval-ratio", "1"], 2, "--eval-ratio"),
        (["--eval-ratio", "0.1", "--eval-tasks", "x"], 2, "remove these"),
        (["--max-rejected", "many"], 2, "--max-rejected"),
        (["--max-disagreement", "30"], 2, "--max-disagreement"),
        (["--name", "x"], 2, "--name requires a filter"),
        (["--name", "../x", "--task-ids", "task_1"], 2, "--name may have letters"),
        (["--name", "reward_model_full", "--task-ids", "task_1"], 2, "a file of the main conversion"),
        (["--name", "reward_model_clip", "--task-ids", "task_1"], 2, "a file of the main conversion"),
        (["--name", "rejected", "--task-ids", "task_1"], 2, "a file of the main conversion"),
        (["--name", "x.rejected", "--task-ids", "task_1"], 2, "a file of another variant"),
        (["--name", "x.meta", "--task-ids", "task_1"], 2, "a file of another variant"),
        (["--name", "x_consensus", "--task-ids", "task_1"], 2, "a file of another variant"),
        (["--labels", "verbatim", "--scale", "1", "5"], 2, "leave out --scale and --map"),
        (["--labels", "verbatim", "--map", "pass=1"], 2, "leave out --scale and --map"),
        (["--input", "blank.jsonl"], 1, "blank.jsonl: no rows"),
        (["--audit", "data", "--near-duplicates", "drop"], 2, "--audit converts nothing"),
        (["--too-long", "error"], 2, "--too-long needs --tokenizer"),
        (["--scale", "5", "1"], 2, "--scale 5 1"),
        (["--scale", "judge-a=10"], 2, "--scale judge-a=10"),
        (["--scale", "1", "5", "--scale", "0", "9"], 2, "two ranges"),
        (["--map", "pass=2"], 2, "--map pass=2"),
        (["--map", "3=0.5"], 2, "For numbers use --scale"),
        (["--map", "A+=1"], 2, "words of letters"),
        (["--map", "good=1", "Good=0"], 2, "--map: good has two scores"),
        (["--tokenizer", "x"], 2, "--cutoff-len"),
        (["--template", "qwen"], 2, "--tokenizer"),
        (["--config", "gone.yaml"], 2, "gone.yaml"),
        (["finetune.jsonl"], 2, "Pass input files after --input"),
        (["cutoff_len=600"], 2, "pass a --config"),
        (["--config", "finetune.jsonl"], 2, "finetune.jsonl"),
        (["--labels", "short"], 2, "invalid choice"),
        (["--frobnicate"], 2, "unrecognized arguments"),
    ],
)
def test_what_cannot_be_meant_is_said(
    source: Path, script: Script, arguments: list[str], code: int, message: str
) -> None:
    (source.parent / "empty").mkdir()
    (source.parent / "blank.jsonl").write_text("\n\n")
    done = script("convert_dataset.py", *arguments, cwd=source.parent, code=code)
    assert message in done.stderr
    assert not (source.parent / "data" / "dataset_info.json").exists()


def test_all_problems_are_reported_at_once(script: Script) -> None:
    done = script("convert_dataset.py", "--eval-ratio", 2, "--max-disagreement", 3, "--cutoff-len", 0, code=2)
    assert all(flag in done.stderr for flag in ("--eval-ratio", "--max-disagreement", "--cutoff-len"))


def test_a_config_without_a_model_leaves_the_guard_out_and_says_so(source: Path, data: Path, script: Script) -> None:
    config = source.parent / "config.yaml"
    config.write_text("model_name_or_path: ./model\ntemplate: qwen\ncutoff_len: 4096\n")
    (source.parent / "model").mkdir()
    (source.parent / "model" / ".gitkeep").touch()
    done = script("convert_dataset.py", "--config", config, cwd=source.parent)
    assert "no model in model, so lengths are not checked" in done.stderr


def test_an_unwritable_folder_is_one_message(source: Path, script: Script) -> None:
    (source.parent / "data").write_text("a file is here")
    done = script("convert_dataset.py", cwd=source.parent, code=1)
    assert "data: File exists" in done.stderr


def test_a_damaged_dataset_info_is_not_overwritten(source: Path, data: Path, script: Script) -> None:
    data.mkdir()
    (data / "dataset_info.json").write_text("{oops")
    done = script("convert_dataset.py", "--input", source, "--output-dir", data, code=1)
    assert "dataset_info.json: not JSON" in done.stderr
    assert (data / "dataset_info.json").read_text() == "{oops"
