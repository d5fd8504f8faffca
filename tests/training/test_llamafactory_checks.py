"""The checks that need LLaMA Factory: is the template right, and are rows cut? Chat templates are written as model
families write them, and compared with LLaMA Factory's templates."""

import hashlib
import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from prmkit.prompts.encoding import ChatEncoding, load_encoding
from prmkit.training.checks import Check, Status
from prmkit.training.llamafactory_checks import check_start, check_template
from prmkit.training.row_lengths import Lengths, check_lengths, measure_lengths

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
# Llama 3.1: a system block with today's date is before everything, always.
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


def template_check(folder: Path, template: str | None, **settings: Any) -> Check:
    values = {"model_name_or_path": str(folder), "template": template, **settings}
    return check_template(load_encoding(folder, template, **settings), values)


def test_qwen_for_a_qwen_model(micro_model: Path) -> None:
    assert template_check(micro_model, "qwen").status is Status.OK


@pytest.mark.parametrize("wrong", ["qwen3", "llama3", "mistral", "chatml", "default"])
def test_a_wrong_template_is_an_error_that_names_the_right_one(micro_model: Path, wrong: str) -> None:
    found = template_check(micro_model, wrong)
    assert found.status is Status.ERROR
    assert "template=qwen" in found.advice.split(" or ")
    assert "expects '<|im_start|>system\\nYou are Qwen" in found.found


def test_tokens_that_the_vocabulary_lacks_are_named(model_with: Any) -> None:
    """A tokenizer without a token for what it does not know, like Llama 3's, has no id for them at all."""
    folder = model_with(CHATML)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    plain = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | plain))
    found = template_check(folder, "yuan")
    assert found.status is Status.ERROR
    assert "tokens that the vocabulary lacks" in found.found
    assert found.advice.startswith("template=")


@pytest.mark.parametrize("chosen", ["You are a strict judge of agents.", ""])
def test_a_system_text_of_ones_own_is_meant(micro_model: Path, chosen: str) -> None:
    assert template_check(micro_model, "qwen", default_system=chosen).status is Status.OK


def test_a_model_with_another_system_text(model_with: Any) -> None:
    """Qwen2 has another default than Qwen2.5, whose text LLaMA Factory's `qwen` has."""
    folder = model_with(QWEN2)
    found = template_check(folder, "qwen")
    assert (found.status, found.advice) == (Status.ERROR, 'default_system="You are a helpful assistant."')
    assert template_check(folder, "qwen", default_system="You are a helpful assistant.").status is Status.OK


@pytest.mark.parametrize("template", ["qwen", "qwen3_nothink"])
def test_a_thinking_model_with_a_template_that_does_not_think(model_with: Any, template: str) -> None:
    found = template_check(model_with(THINKING), template)
    assert found.status is Status.ERROR
    assert "template=qwen3" in found.advice.split(" or ")


@pytest.mark.parametrize("thinking", [True, False])
def test_a_thinking_model_with_its_template(model_with: Any, thinking: bool) -> None:
    assert template_check(model_with(THINKING), "qwen3", enable_thinking=thinking).status is Status.OK


def test_chatml_with_qwen_would_train_a_system_text(model_with: Any) -> None:
    found = template_check(model_with(CHATML), "qwen")
    assert found.status is Status.ERROR
    assert "differs from the model's chat template for a prompt" in found.found


def test_a_template_that_refuses_system_texts(model_with: Any) -> None:
    assert template_check(model_with(GEMMA), "gemma").status is Status.OK


def test_a_model_that_no_template_fits_is_only_a_warning(model_with: Any) -> None:
    found = template_check(model_with(DATED), "llama3")
    assert found.status is Status.WARNING
    assert "no template of LLaMA Factory matches" in found.found


def test_a_base_model_learns_the_template(model_with: Any) -> None:
    found = template_check(model_with(None), "qwen")
    assert found.status is Status.OK
    assert "base model" in found.found


def test_a_template_read_from_the_tokenizer(micro_model: Path) -> None:
    assert template_check(micro_model, None).status is Status.OK


def test_a_gpu_that_torch_does_not_see() -> None:
    """The driver is reported to show a GPU: what an old driver looks like."""
    found = check_start(gpus=1)
    assert (found.status, "cannot use the GPU that the driver reports" in found.found) == (Status.ERROR, True)


# --- row lengths --------------------------------------------------------------------------------------------------

ALPACA = {"file_name": "rows.jsonl"}
SHAREGPT = {
    "file_name": "rows.jsonl",
    "formatting": "sharegpt",
    "columns": {"messages": "conversations"},
    "tags": {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"},
}


@pytest.fixture(scope="module")
def encoding(micro_model: Path) -> ChatEncoding:
    return load_encoding(micro_model, "qwen")


def write(folder: Path, entry: dict[str, Any], rows: list[Any]) -> dict[str, Any]:
    """A data folder with one dataset, and the values that name it."""
    (folder / "dataset_info.json").write_text(json.dumps({"steps": entry}))
    (folder / entry["file_name"]).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return {"dataset": "steps", "dataset_dir": str(folder), "cutoff_len": 64}


def test_lengths_are_those_of_training(encoding: ChatEncoding, tmp_path: Path) -> None:
    prompts = ["Judge this.", "Judge that, please.\n" * 9, "短い"]
    rows = [{"instruction": prompt, "input": "", "output": '{"a": 0.50}'} for prompt in prompts]
    found = measure_lengths(encoding, write(tmp_path, ALPACA, rows))
    expected = [sum(map(len, encoding.pair_ids(prompt, '{"a": 0.50}'))) for prompt in prompts]
    assert found is not None
    assert sorted(found.longest_first) == sorted(expected) == sorted(found.sample)
    assert found.longest == max(expected)


def test_both_formats_have_the_same_lengths(encoding: ChatEncoding, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    flat = [{"instruction": "Judge", "input": "this.", "output": "x"}]
    turns = [{"conversations": [{"from": "human", "value": "Judge\nthis."}, {"from": "gpt", "value": "x"}]}]
    first = measure_lengths(encoding, write(tmp_path / "a", ALPACA, flat))
    second = measure_lengths(encoding, write(tmp_path / "b", SHAREGPT, turns))
    assert first == second


def test_the_longest_rows_come_first_when_time_is_short(
    encoding: ChatEncoding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"instruction": "word " * (20 + number % 7), "output": "x"} for number in range(3000)]
    rows[1234]["instruction"] = "word " * 500
    ticks = itertools.count()
    monkeypatch.setattr("prmkit.training.row_lengths.time.monotonic", lambda: float(next(ticks)))
    found = measure_lengths(encoding, write(tmp_path, ALPACA, rows), budget=100.0)
    assert found is not None
    assert not found.measured_all
    assert found.longest == found.longest_first[0] > 500


def test_lengths_that_the_conversion_measured_are_used(
    micro_model: Path, encoding: ChatEncoding, tmp_path: Path
) -> None:
    """Only where tokenizer and template are the same, and the rows are those that were measured."""
    values = write(tmp_path, ALPACA, [{"instruction": "a", "input": "", "output": "b"}] * 3)
    values |= {"model_name_or_path": str(micro_model), "template": "qwen"}
    (tmp_path / "rows.meta.jsonl").write_text("".join(json.dumps({"tokens": n}) + "\n" for n in (11, 13, 12)))
    tokenizer = encoding.tokenizer.backend_tokenizer
    same = {"template": "qwen", "default_system": None, "enable_thinking": True,
            "tokenizer_sha256": hashlib.sha256(tokenizer.to_str().encode()).hexdigest()}  # fmt: skip
    for lengths, used in (({}, True), ({"template": "qwen3"}, False), ({"tokenizer_sha256": "other"}, False)):
        (tmp_path / "conversion_report.json").write_text(json.dumps({"measured_with": {**same, **lengths}}))
        found = measure_lengths(encoding, values)
        assert found is not None and (list(found.longest_first) == [13, 12, 11]) is used
    (tmp_path / "conversion_report.json").write_text(json.dumps({"measured_with": same}))
    os.utime(tmp_path / "rows.jsonl", (2**32, 2**32))
    found = measure_lengths(encoding, values)
    assert found is not None and found.longest != 13


def test_other_files_are_not_measured(encoding: ChatEncoding, tmp_path: Path) -> None:
    values = write(tmp_path, {"file_name": "rows.csv"}, [])
    assert measure_lengths(encoding, values) is None
    assert check_lengths(None, values).status is Status.WARNING


@pytest.mark.parametrize(
    ("cutoff", "status", "reported"),
    [
        (200, Status.OK, "truncates no row"),
        (150, Status.WARNING, "1 row would be truncated"),
        (90, Status.ERROR, "100 of 200 rows would be truncated"),
    ],
)
def test_cut_rows(cutoff: int, status: Status, reported: str) -> None:
    lengths = [180] + [100] * 99 + [50] * 100
    found = check_lengths(Lengths(200, lengths, lengths), {"cutoff_len": cutoff, "per_device_train_batch_size": 1})
    assert (found.status, reported in found.found) == (status, True)
    assert ("cutoff_len=512" in found.advice) == (status is not Status.OK)


def test_packing_takes_one_token() -> None:
    lengths = Lengths(2, [100, 100], [100, 100])
    assert check_lengths(lengths, {"cutoff_len": 100}).status is Status.OK
    assert check_lengths(lengths, {"cutoff_len": 100, "neat_packing": True}).status is Status.ERROR


def test_a_share_is_estimated_when_the_longest_are_all_cut() -> None:
    found = check_lengths(Lengths(10_000, [900] * 300, [900, 100, 100, 100]), {"cutoff_len": 512})
    assert found.status is Status.ERROR
    assert "about 25% of 10,000 rows" in found.found


def test_padding_is_worth_a_word() -> None:
    mixed = Lengths(400, [1000] * 200 + [100] * 200, [1000, 100] * 200)
    advice = check_lengths(
        mixed, {"cutoff_len": 1024, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 8}
    ).advice
    assert advice.startswith(
        "45% of each batch is padding; per_device_train_batch_size=1 gradient_accumulation_steps=16"
    )
    even = Lengths(400, [1000] * 400, [1000] * 400)
    assert check_lengths(even, {"cutoff_len": 1024, "per_device_train_batch_size": 2}).advice == ""


def test_no_rows_at_all(encoding: ChatEncoding, tmp_path: Path) -> None:
    values = write(tmp_path, ALPACA, [])
    assert check_lengths(measure_lengths(encoding, values), values).status is Status.ERROR
