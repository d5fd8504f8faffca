"""Is the template right? Chat templates as model families write them, against LLaMA Factory's templates."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from prmkit.prompts.encoding import load_encoding
from prmkit.training.check import Check, Status
from prmkit.training.template_check import check_template

TURN = "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
OPENED = "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
CHATML = f"{{%- for m in messages %}}{TURN}{{%- endfor %}}{OPENED}"

QWEN2 = (
    "{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "{%- endif %}" + CHATML
)
EMPTY_THOUGHT = "{{ '<think>\\n\\n</think>\\n\\n' }}"
# Qwen3: no default system text, an empty thought before an answer without one, and before an unthinking answer begins.
THINKING = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    f"{{%- if m.role == 'assistant' %}}{EMPTY_THOUGHT}{{%- endif %}}"
    "{{ m.content + '<|im_end|>\\n' }}{%- endfor %}"
    f"{OPENED}{{%- if add_generation_prompt and enable_thinking is false %}}{EMPTY_THOUGHT}{{%- endif %}}"
)
# Gemma: the answer's role is called model, and a system text is refused.
GEMMA = (
    "{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{%- endif %}"
    "{%- for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' "
    "+ m.content + '<end_of_turn>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{%- endif %}"
)
# Llama 3.1: a system block with today's date stands before everything, whatever is asked.
DATED = (
    "{{ '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: 26 Jul 2024\\n\\n' }}"
    "{%- if messages[0].role == 'system' %}{{ messages[0].content }}{%- set messages = messages[1:] %}{%- endif %}"
    "{{ '<|eot_id|>' }}{%- for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' "
    "+ m.content + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)


@pytest.fixture
def model_with(micro_model: Path, tmp_path: Path) -> Any:
    """A model folder whose tokenizer has another chat template, or none."""

    def make(chat_template: str | None) -> Path:
        folder = Path(shutil.copytree(micro_model, tmp_path / "model"))
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings.pop("chat_template", None)
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        if chat_template is not None:
            (folder / "chat_template.jinja").write_text(chat_template)
        return folder

    return make


def check(folder: Path, template: str | None, **settings: Any) -> Check:
    values = {"model_name_or_path": str(folder), "template": template, **settings}
    return check_template(load_encoding(folder, template, **settings), values)


def test_qwen_for_a_qwen_model(micro_model: Path) -> None:
    assert check(micro_model, "qwen").status is Status.OK


@pytest.mark.parametrize("wrong", ["qwen3", "llama3", "mistral", "chatml", "default"])
def test_a_wrong_template_is_an_error_that_names_the_right_one(micro_model: Path, wrong: str) -> None:
    found = check(micro_model, wrong)
    assert found.status is Status.ERROR
    assert "template=qwen" in found.advice.split(" or ")
    assert "the model expects '<|im_start|>system\\nYou are Qwen" in found.found


@pytest.mark.parametrize("chosen", ["You are a strict judge of agents.", ""])
def test_a_system_text_of_ones_own_is_meant(micro_model: Path, chosen: str) -> None:
    assert check(micro_model, "qwen", default_system=chosen).status is Status.OK


def test_a_model_with_another_system_text(model_with: Any) -> None:
    """Qwen2 has another default than Qwen2.5, whose text LLaMA Factory's `qwen` has."""
    folder = model_with(QWEN2)
    found = check(folder, "qwen")
    assert (found.status, found.advice) == (Status.ERROR, 'default_system="You are a helpful assistant."')
    assert check(folder, "qwen", default_system="You are a helpful assistant.").status is Status.OK


@pytest.mark.parametrize("template", ["qwen", "qwen3_nothink"])
def test_a_thinking_model_with_a_template_that_does_not_think(model_with: Any, template: str) -> None:
    found = check(model_with(THINKING), template)
    assert found.status is Status.ERROR
    assert "template=qwen3" in found.advice.split(" or ")


@pytest.mark.parametrize("thinking", [True, False])
def test_a_thinking_model_with_its_template(model_with: Any, thinking: bool) -> None:
    assert check(model_with(THINKING), "qwen3", enable_thinking=thinking).status is Status.OK


def test_chatml_with_qwen_would_train_a_system_text(model_with: Any) -> None:
    found = check(model_with(CHATML), "qwen")
    assert found.status is Status.ERROR
    assert "renders a prompt differently" in found.found


def test_a_template_that_refuses_system_texts(model_with: Any) -> None:
    assert check(model_with(GEMMA), "gemma").status is Status.OK


def test_a_model_that_no_template_fits_is_only_a_warning(model_with: Any) -> None:
    found = check(model_with(DATED), "llama3")
    assert found.status is Status.WARNING
    assert "no template of LLaMA Factory fits" in found.found


def test_a_base_model_learns_the_template(model_with: Any) -> None:
    found = check(model_with(None), "qwen")
    assert found.status is Status.OK
    assert "base model" in found.found


def test_a_template_read_from_the_tokenizer(micro_model: Path) -> None:
    assert check(micro_model, None).status is Status.OK
