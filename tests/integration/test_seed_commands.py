"""The whole path, typed as the user's guide has it, in a copy of the project with a tiny model in ./model.

All tests of this module share one project folder and its first run, in the order of the guide. The folder's name has a
space in it on purpose.
"""

import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from terminal import copy_project, few_tasks, type_in

pytestmark = pytest.mark.llamafactory
TALK: dict[str, Any] = {"stdin": "Hello\nexit\n", "codes": (0, -signal.SIGABRT)}
"""LLaMA Factory's chat does not end its threads; on a busy machine Python may abort over them after the chat."""


@pytest.fixture(scope="module")
def project(root: Path, tiny_model: Path, sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copy_project(root, tmp_path_factory.mktemp("a user") / "my project")
    shutil.copytree(tiny_model, folder / "model", dirs_exist_ok=True)
    (folder / "finetune.jsonl").write_text(few_tasks(sample), encoding="utf-8")
    return folder


def entries(project: Path) -> dict[str, dict[str, str]]:
    listed: dict[str, dict[str, str]] = json.loads((project / "data" / "dataset_info.json").read_text())
    return listed


def test_convert(project: Path) -> None:
    type_in(project, "python convert_dataset.py --input finetune.jsonl --output-dir data")
    assert {
        "reward_model_full", "reward_model_full_eval", "reward_model_clip", "reward_model_category",
        "reward_model_final", "reward_model_deepseek_chat", "reward_model_kimi_k2_0711_preview",
        "reward_model_webshaper_qa_0",
    } <= set(entries(project))  # fmt: skip


def test_convert_with_filters(project: Path) -> None:
    before = set(entries(project))
    type_in(
        project,
        "python convert_dataset.py --input finetune.jsonl --output-dir data"
        " --evaluation-types clip --model-names deepseek-chat",
    )
    assert set(entries(project)) >= before | {"reward_model_custom"}
    rows = (project / "data" / "reward_model_custom.meta.jsonl").read_text().splitlines()
    metadata = [json.loads(row)["metadata"] for row in rows]
    assert {(row["evaluation_type"], row["model_name"]) for row in metadata} == {("clip", "deepseek-chat")}
    type_in(project, "python convert_dataset.py --input finetune.jsonl --output-dir data --task-ids webshaper_qa_0")
    rows = (project / "data" / "reward_model_custom.meta.jsonl").read_text().splitlines()
    assert {json.loads(row)["metadata"]["task_id"] for row in rows} == {"webshaper_qa_0"}


def test_validate_only(project: Path) -> None:
    type_in(project, "./run_training.sh --validate-only")
    assert not list((project / "saves").glob("*/")), "--validate-only made a run"


def test_what_is_typed_reaches_the_conversion_too(project: Path) -> None:
    """Prompts that are shortened for another length than they are trained at would be cut silently.

    The misspelt key, which only the training looks at, saves the time of its checks.
    """
    type_in(project, "./run_training.sh --validate-only cutoff_len=600 dataset_dir=elsewhere lora_rnak=8", codes=(2,))
    settings = json.loads((project / "elsewhere" / "conversion_report.json").read_text())["settings"]
    assert settings["lengths"]["cutoff_len"] == 600


def test_train_and_export(project: Path) -> None:
    type_in(project, "./run_training.sh -d reward_model_full -e 5 --export")
    run = project / "saves" / "reward_model_training"
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    assert (run / "adapter_model.safetensors").stat().st_size > 0
    assert list((project / "exported_model").glob("*.safetensors"))
    log = [json.loads(line) for line in (project / "logs" / "trainer_log.jsonl").read_text().splitlines()]
    assert log[-1]["current_steps"] == log[-1]["total_steps"]


def test_training_again_with_other_settings_keeps_the_first_run(project: Path) -> None:
    before = (project / "saves" / "reward_model_training" / "adapter_model.safetensors").read_bytes()
    type_in(project, "python train.py --config training_config.yaml")
    assert (project / "saves" / "reward_model_training" / "adapter_model.safetensors").read_bytes() == before
    runs = json.loads(type_in(project, "python train.py --runs --json").stdout)
    assert [run["status"] for run in runs] == ["finished", "finished"]


def test_the_same_command_again_says_that_it_is_finished_and_exports(project: Path) -> None:
    done = type_in(project, "python train.py --config training_config.yaml --export")
    assert "finished" in done.stdout + done.stderr
    assert "Loading LLaMA Factory" not in done.stderr, "a finished run is checked"
    again = type_in(project, "./run_training.sh")
    assert "finished" in again.stdout + again.stderr


def test_override_at_run_time(project: Path) -> None:
    type_in(
        project,
        "python train.py --config training_config.yaml --dataset reward_model_clip --epochs 5"
        " --learning-rate 2e-4 --batch-size 4",
    )
    runs = json.loads(type_in(project, "python train.py --runs --json").stdout)
    config = runs[-1]["config"]
    assert (config["dataset"], config["num_train_epochs"], config["learning_rate"]) == ("reward_model_clip", 5, 2e-4)
    assert config["per_device_train_batch_size"] == 4
    assert config["eval_dataset"] == "reward_model_clip_eval"


def test_chat_with_the_adapter(project: Path) -> None:
    chatted = type_in(
        project,
        "llamafactory-cli chat --model_name_or_path ./model --adapter_name_or_path ./saves/reward_model_training"
        " --template qwen --finetuning_type lora",
        **TALK,
    )
    assert chatted.stdout.partition("Assistant:")[2].rstrip().endswith("User:")


def test_chat_with_the_exported_model(project: Path) -> None:
    chatted = type_in(
        project,
        "llamafactory-cli chat --model_name_or_path ./exported_model --template qwen",
        **TALK,
    )
    assert chatted.stdout.partition("Assistant:")[2].rstrip().endswith("User:")


def test_the_programmatic_usage_of_the_guide_and_of_the_readme(project: Path, root: Path) -> None:
    (of_the_readme,) = re.findall(r"```python\n(from transformers .*?)```", (root / "README.md").read_text(), re.DOTALL)
    snippet = project / "snippet.py"
    snippet.write_text(
        """\
from transformers import AutoTokenizer, AutoModelForCausalLM

# Load your trained model
tokenizer = AutoTokenizer.from_pretrained("./exported_model")
model = AutoModelForCausalLM.from_pretrained("./exported_model")

# Use for evaluation
inputs = tokenizer("Your evaluation prompt here", return_tensors="pt")
outputs = model.generate(**inputs, max_new_tokens=512)
response = tokenizer.decode(outputs[0], skip_special_tokens=True)
print("LENGTH", len(response))
"""
        + of_the_readme
    )
    (length,) = re.findall(r"^LENGTH (\d+)$", type_in(project, "python snippet.py").stdout, re.MULTILINE)
    assert int(length) > 0


def test_the_notebook_example_of_the_readme_scores_and_draws_from_any_working_directory(
    project: Path, root: Path, tmp_path: Path
) -> None:
    (code,) = re.findall(r"```python\n(import json.*?)```", (root / "README.md").read_text(), re.DOTALL)
    run = project / "saves" / "reward_model_training"
    elsewhere = f"""
print(json.dumps([judgement.status for judgement in judgements]))
import os
os.chdir({str(tmp_path)!r})
print(len(prmkit.load_judge({str(run)!r}).score(['Judge: {{"score": 0.5}}'])))
"""
    (project / "notebook.py").write_text(code + elsewhere)
    *_, statuses, scored_elsewhere = type_in(project, "python notebook.py").stdout.splitlines()
    assert (project / "steps.png").read_bytes().startswith(b"\x89PNG")
    assert len(json.loads(statuses)) == 3
    assert scored_elsewhere == "1"


def test_the_new_steps_that_ship_are_scored(project: Path) -> None:
    scoring = "python score_trajectories.py --run saves/reward_model_training examples/new_steps.jsonl"
    type_in(
        project, f"{scoring} --output scored.jsonl", codes=(0, 1)
    )  # this judge is hardly trained: scores are unsure
    lines = [json.loads(line) for line in (project / "scored.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["step 1", "step 2", "step 3"]
    assert {line["status"] for line in lines} <= {"ok", "unsure"}
