"""The tiny base model: small, seeded, and in everything else a Qwen2 like any other."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prmkit.errors import DataError
from tools.demo.tiny_model import build_tiny_model
from tools.make_sample.sample import sample_rows, write_rows


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def small_sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sample") / "finetune.jsonl"
    write_rows(path, sample_rows(tasks=5))
    return path


def test_it_loads_as_any_model_and_has_one_to_three_million_weights(tiny_model: Path, tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert model.config.model_type == "qwen2"
    assert 1_000_000 <= model.num_parameters() <= 3_000_000
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, tokenizer.pad_token_id]
    ids = tokenizer("A clip", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3, min_new_tokens=3).shape == (1, ids.shape[1] + 3)


def test_every_digit_is_a_token_of_its_own(tokenizer: Any) -> None:
    for score in ("0.00", "0.05", "0.95", "1.00"):
        assert tokenizer.tokenize(score) == list(score)
    assert sorted(token for token in tokenizer.get_vocab() if re.search("[0-9]", token)) == list("0123456789")


@pytest.mark.parametrize(
    "text", ["What is the sum?", "Wie groß?", "¿Cuántos metros?", "开放年份", "運賃", "متحف", "\x00 🙂"]
)
def test_any_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_special_tokens_are_qwen_s_and_never_split(tokenizer: Any) -> None:
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    ids = [len(tokenizer) - 3, len(tokenizer) - 2, len(tokenizer) - 1]
    assert tokenizer("".join(names)).input_ids == ids
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == ""


@pytest.mark.parametrize("system", [None, "You are a judge."])
def test_its_chat_template_renders_what_llama_factory_s_template_renders(tokenizer: Any, system: str | None) -> None:
    from llamafactory.data.template import get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments

    own_template = tokenizer.chat_template
    template = get_template_and_fix_tokenizer(tokenizer, DataArguments(template="qwen"))
    turns = [{"role": "user", "content": "A clip.\nRate it."}, {"role": "assistant", "content": '{"a_score": 0.90}'}]
    prompt, answer = template.encode_oneturn(tokenizer, turns, system)

    whole = [{"role": "system", "content": system}, *turns] if system else turns
    rendered = tokenizer.apply_chat_template(whole[:-1], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(prompt) == rendered
    assert tokenizer(rendered, add_special_tokens=False).input_ids == prompt
    assert tokenizer.decode(prompt + answer) == tokenizer.apply_chat_template(whole, tokenize=False)
    # LLaMA Factory found nothing to change.
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.chat_template == own_template


def test_a_second_build_does_nothing_and_another_seed_builds_again(small_sample: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    assert build_tiny_model(small_sample, model)
    first = _contents(model)
    assert not build_tiny_model(small_sample, model)
    assert _contents(model) == first
    assert build_tiny_model(small_sample, model, seed=1)
    changed = {name for name, content in _contents(model).items() if content != first[name]}
    assert changed == {"model.safetensors", "recipe.json"}


def test_the_same_sample_and_seed_give_the_same_bytes(small_sample: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        build_tiny_model(small_sample, tmp_path / name)
    assert _contents(tmp_path / "one") == _contents(tmp_path / "two")


def test_what_a_killed_build_left_is_in_nobody_s_way(small_sample: Path, tmp_path: Path) -> None:
    left = tmp_path / ".model.part"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    assert build_tiny_model(small_sample, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").num_parameters() > 500_000


def test_somebody_else_s_folder_is_left_alone(small_sample: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="not the demo's model"):
        build_tiny_model(small_sample, tmp_path)
    assert _contents(tmp_path) == {"thesis.txt": b"years of work"}


def test_a_missing_sample_is_one_line_and_exit_1(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.demo.tiny_model", "--sample", "no.jsonl", "--output", str(tmp_path / "m")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: no.jsonl: no such file.")


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
