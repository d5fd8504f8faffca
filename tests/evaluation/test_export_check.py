"""An export that judges as trained passes; each way of going wrong is found and named."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from families import prompts

from prmkit.errors import GateError
from prmkit.evaluation.export_check import check_parity
from prmkit.files import write_json
from prmkit.judge.sources import JudgeSource
from prmkit.judge.types import Request
from prmkit.verdict import asked_shape

REQUESTS = [Request(text, asked_shape(text)) for text in prompts()[:3]]

# What the qwen template renders for one turn, as the real model's tokenizer brings it.
CHAT_TEMPLATE = (
    "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, model_folders: dict[str, Path]) -> JudgeSource:
    """A base model with an adapter."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("run")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        adapted = get_peft_model(
            AutoModelForCausalLM.from_pretrained(model_folders["qwen"]),
            LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
        )
    adapted.save_pretrained(folder)
    return JudgeSource(model_folders["qwen"], folder, template="qwen")


@pytest.fixture
def exported(trained: JudgeSource, tmp_path: Path) -> JudgeSource:
    """What a merge of it leaves."""
    return JudgeSource(merged(trained, trained.model, tmp_path / "exported_model"), template="qwen")


def merged(trained: JudgeSource, base: Path, folder: Path) -> Path:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(trained.adapter))
    model.merge_and_unload().save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(trained.model)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    write_json(folder / "prmkit.json", {"template": "qwen", "adapter": str(trained.adapter)})
    return folder


def test_a_right_export_passes(trained: JudgeSource, exported: JudgeSource) -> None:
    parity = check_parity(trained, exported, REQUESTS)
    assert parity.largest < 1e-4
    assert (parity.prompts, parity.scores, parity.unequal, parity.causes) == (3, 5, 0, ())


def test_no_difference_is_too_small_for_a_tolerance_of_nothing(trained: JudgeSource, exported: JudgeSource) -> None:
    half = JudgeSource(exported.model, template="qwen", dtype="bfloat16")
    with pytest.raises(GateError, match="allowed 0"):
        check_parity(trained, half, REQUESTS, tolerance=0.0)


def _other_base(trained: JudgeSource, exported: JudgeSource) -> JudgeSource:
    import torch
    from transformers import AutoModelForCausalLM

    other = exported.model.parent / "other_base"
    model = AutoModelForCausalLM.from_pretrained(trained.model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(2.0 if name.endswith("norm.weight") else -1.0)
    model.save_pretrained(other)
    shutil.rmtree(exported.model)
    merged(trained, other, exported.model)
    return exported


def _base_alone(trained: JudgeSource, exported: JudgeSource) -> JudgeSource:
    for file in trained.model.glob("*.safetensors"):
        shutil.copy(file, exported.model)
    write_json(exported.model / "prmkit.json", {"adapter": "saves/another_run"})
    return exported


@pytest.mark.parametrize(
    ("break_it", "cause"),
    [
        (lambda trained, exported: replace(exported, template="chatml"), "template: trained with 'qwen'"),
        (lambda trained, exported: replace(exported, default_system="Be harsh."), "system prompt: trained with None"),
        (_other_base, "wrong base model: layers that adapters never change"),
        (_base_alone, "wrong adapter: exported from saves/another_run"),
    ],
)
def test_each_way_of_going_wrong_is_named(
    trained: JudgeSource,
    exported: JudgeSource,
    break_it: Callable[[JudgeSource, JudgeSource], JudgeSource],
    cause: str,
) -> None:
    with pytest.raises(GateError) as refusal:
        check_parity(trained, break_it(trained, exported), REQUESTS, tolerance=1e-3)
    assert f"1. {cause}" in str(refusal.value)
    assert "largest difference" in str(refusal.value)


def test_thinking_mode_and_dtype_are_named(trained: JudgeSource, exported: JudgeSource) -> None:
    """Neither shows in a score that is read behind a given answer, in float32; both do elsewhere."""
    thinking = replace(trained, template="qwen3", enable_thinking=True, trained_dtype="bfloat16")
    silent = replace(exported, template="qwen3", enable_thinking=False)
    causes = check_parity(thinking, silent, REQUESTS).causes
    assert causes[0] == "thinking mode: trained with True, exported with False."
    assert causes[1].startswith("dtype: trained in bfloat16, exported in float32")


def test_a_chat_template_that_renders_otherwise_is_a_warning(trained, exported, narrated) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(exported.model)
    tokenizer.chat_template = CHAT_TEMPLATE.replace("You are Qwen, created by Alibaba Cloud. ", "")
    tokenizer.save_pretrained(exported.model)
    (cause,) = check_parity(trained, exported, REQUESTS).causes
    assert cause.startswith("chat template: the export's own template renders prompts differently")
    assert "scores agree, but: chat template" in narrated.text
