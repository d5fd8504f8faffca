"""The memory estimate, part by part, against models that are really built here."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from sizes import QWEN_7B

from prmkit.errors import DataError
from prmkit.training.checks import Check, Status
from prmkit.training.environment import GIBIBYTE, Gpu, Machine
from prmkit.training.model import (
    check_memory,
    checkpoint_bytes,
    estimate,
    lora_parameters,
    read_model,
    remedies,
    saved_per_token,
    zero_stage,
)

SEED = {"bf16": True, "lora_rank": 64, "lora_dropout": 0.1, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 8}  # fmt: skip
WIDE = {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 8, "num_key_value_heads": 2,
        "vocab_size": 1024, "max_position_embeddings": 512, "tie_word_embeddings": False}  # fmt: skip
TOKENS = 384


def build(layers: int) -> Any:
    """A Qwen2 with real proportions: grouped-query attention, an MLP two and a half times as wide."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=layers, **WIDE))


def with_adapters(model: Any, **settings: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(**settings))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wide")
    build(2).save_pretrained(path)
    return path


def test_sizes_are_the_models(folder: Path) -> None:
    model, real = read_model(folder), build(2)
    assert model.parameters == sum(parameter.numel() for parameter in real.parameters())
    assert (model.query, model.key_value, model.vocabulary) == (256, 64, 1024)
    assert model.embedding == 2 * 256 * 1024


@pytest.mark.parametrize(
    ("values", "settings"),
    [
        ({"lora_rank": 16, "lora_target": "all"}, {"r": 16, "target_modules": "all-linear"}),
        ({"lora_rank": 4, "lora_target": "q_proj,v_proj"}, {"r": 4, "target_modules": ["q_proj", "v_proj"]}),
        ({"lora_rank": 8, "lora_target": ["down_proj"]}, {"r": 8, "target_modules": ["down_proj"]}),
        (
            {"lora_rank": 8, "additional_target": "embed_tokens,lm_head"},
            {"r": 8, "target_modules": "all-linear", "modules_to_save": ["embed_tokens", "lm_head"]},
        ),
    ],
)
def test_adapters_are_as_large_as_pefts(folder: Path, values: dict[str, Any], settings: dict[str, Any]) -> None:
    trained, _ = with_adapters(build(2), **settings).get_nb_trainable_parameters()
    assert lora_parameters(read_model(folder), values) == trained


def kept_per_token(layers: int, *, adapters: bool) -> float:
    """Bytes that autograd really keeps of one token, weights left out, in bf16 as LLaMA Factory trains."""
    import torch

    model = build(layers)
    if adapters:
        # No dropout: on a CPU its masks are float32, on a GPU one byte.
        model = with_adapters(model.to(torch.bfloat16), r=8, target_modules="all-linear", lora_dropout=0.0)
        for parameter in model.parameters():
            parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
        model.get_input_embeddings().register_forward_hook(lambda _module, _inputs, output: output.requires_grad_())
    weights = {tuple(parameter.shape) for parameter in model.parameters()}
    weights |= {shape[::-1] for shape in weights}
    kept: dict[int, tuple[int, Any]] = {}

    def note(tensor: Any) -> Any:
        if tuple(tensor.shape) not in weights:
            kept[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    ids = torch.arange(TOKENS)[None]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        model.train()(input_ids=ids, labels=ids)
    return sum(size for size, _ in kept.values()) / TOKENS


@pytest.mark.parametrize("adapters", [True, False])
def test_activations_are_what_autograd_keeps(folder: Path, adapters: bool) -> None:
    """The difference between three layers and one, so that embeddings and loss cancel out."""
    measured = (kept_per_token(3, adapters=adapters) - kept_per_token(1, adapters=adapters)) / 2
    values = {"bf16": True, "finetuning_type": "lora" if adapters else "full", "lora_dropout": 0.0}
    assert saved_per_token(read_model(folder), values) == pytest.approx(measured, rel=0.08)


def test_states_are_sixteen_bytes_and_autocasts_copy(folder: Path) -> None:
    """Adam's two moments, gradient and weight, as torch really holds them for the trained numbers."""
    import torch

    model = with_adapters(build(2), r=8, target_modules="all-linear")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    sizes: Counter[str] = Counter()
    for parameter in trained:
        sizes["weight"] += parameter.nbytes
        sizes["gradient"] += (parameter.grad if parameter.grad is not None else parameter).nbytes
        sizes["moments"] += sum(state.nbytes for state in optimizer.state[parameter].values() if state.ndim)
    count = lora_parameters(read_model(folder), {"lora_rank": 8})
    memory = estimate(read_model(folder), {"lora_rank": 8}, tokens=1)
    assert sum(sizes.values()) == 16 * count
    assert memory.states == 18 * count


def test_the_guides_batch_of_two_just_fits_an_a100() -> None:
    """The seed's own experience: 2 x 8 fits 40 GB, and where it does not, 1 x 16 does."""
    assert 35 < estimate(QWEN_7B, SEED, tokens=4096).total / GIBIBYTE < 40
    smaller = SEED | {"per_device_train_batch_size": 1}
    assert estimate(QWEN_7B, smaller, tokens=4096).total / GIBIBYTE < 30


def test_what_saves_memory_saves_it_where_it_should() -> None:
    base = estimate(QWEN_7B, SEED, tokens=4096)
    liger = estimate(QWEN_7B, SEED | {"enable_liger_kernel": True}, tokens=4096)
    quantized = estimate(QWEN_7B, SEED | {"quantization_bit": 4}, tokens=4096)
    complete = estimate(QWEN_7B, SEED | {"disable_gradient_checkpointing": True}, tokens=4096)
    assert liger.logits < base.logits / 10
    assert liger.weights == base.weights
    assert 0.3 < quantized.weights / base.weights < 0.4  # embeddings stay in bf16
    assert complete.activations > 10 * base.activations
    eager = estimate(QWEN_7B, SEED | {"flash_attn": "disabled"}, tokens=4096)
    assert eager.activations > base.activations + 2 * 28 * 4096**2 * 6


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_zero_divides_what_its_paper_says(tmp_path: Path, stage: int) -> None:
    """ZeRO, table 1: mixed precision Adam is 2 + 2 + 12 bytes; stage 2 keeps the first 2, stage 3 nothing."""
    config = tmp_path / "zero.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    values = {"finetuning_type": "full", "bf16": True, "deepspeed": str(config)}
    memory = estimate(QWEN_7B, values, tokens=1, world_size=8)
    per_parameter = (memory.weights + memory.states) / QWEN_7B.parameters
    assert zero_stage(values) == stage
    assert per_parameter == pytest.approx({0: 18, 2: 2 + 14 / 8, 3: 16 / 8}[stage])


def test_fsdp_divides_everything() -> None:
    alone = estimate(QWEN_7B, SEED, tokens=4096)
    shared = estimate(QWEN_7B, SEED | {"fsdp": "full_shard"}, tokens=4096, world_size=4)
    assert (shared.weights, shared.states) == (alone.weights / 4, alone.states / 4)


def test_remedies_go_from_mild_to_strong_and_stop_when_it_fits() -> None:
    found = remedies(QWEN_7B, SEED, tokens=4096, world_size=1, budget=24 * GIBIBYTE)
    (mildest, memory), (strongest, least) = found[0], found[-1]
    assert mildest == "per_device_train_batch_size=1 gradient_accumulation_steps=16"
    assert strongest.endswith("enable_liger_kernel=true")
    assert least.total < 24 * GIBIBYTE < memory.total
    tight = remedies(QWEN_7B, SEED, tokens=4096, world_size=1, budget=16 * GIBIBYTE)
    assert tight[-1][0].endswith("quantization_bit=4")


def test_a_checkpoint_on_disk(folder: Path) -> None:
    model = read_model(folder)
    assert checkpoint_bytes(model, {"lora_rank": 8}) == 12 * lora_parameters(model, {"lora_rank": 8})
    assert checkpoint_bytes(model, {"lora_rank": 8, "save_only_model": True}) == 4 * lora_parameters(model, {})
    assert checkpoint_bytes(model, {"finetuning_type": "full"}) == 12 * model.parameters


def test_a_model_of_unknown_sizes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(DataError, match="cannot be estimated"):
        read_model(tmp_path)


def test_chatglm_names_its_sizes_otherwise(folder: Path, tmp_path: Path) -> None:
    names = {
        "num_hidden_layers": "num_layers",
        "intermediate_size": "ffn_hidden_size",
        "vocab_size": "padded_vocab_size",
        "num_key_value_heads": "multi_query_group_num",
    }
    config = json.loads((folder / "config.json").read_text())
    renamed = {names.get(key, key): value for key, value in config.items()}
    (tmp_path / "config.json").write_text(json.dumps(renamed))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    assert read_model(tmp_path) == read_model(folder)


@pytest.mark.parametrize("changes", [{"hidden_size": "x"}, {"num_attention_heads": 0}, {"text_config": []}])
def test_a_damaged_config_is_an_error_of_one_line(folder: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    damaged = json.loads((folder / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(damaged))
    with pytest.raises(DataError, match=r"config\.json: ") as caught:
        read_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_config_that_is_a_list(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(DataError, match=r"config\.json: "):
        read_model(tmp_path)


# --- memory, on GPUs that are not here ----------------------------------------------------------------------------


def memory_check(gibibytes: int, **values: object) -> Check:
    machine = Machine((Gpu("GPU", gibibytes * GIBIBYTE, gibibytes * GIBIBYTE, (8, 0)),), 8)
    (found,) = check_memory(QWEN_7B, SEED | values, machine, tokens=4096, world_size=1)
    return found


def test_memory_that_is_enough() -> None:
    found = memory_check(80)
    assert found.status is Status.OK
    assert "weights 14.2" in found.found


def test_memory_that_is_tight() -> None:
    found = memory_check(36)
    assert (found.status, "tight" in found.found) == (Status.WARNING, True)


def test_memory_that_will_not_do_gets_the_flags_to_type() -> None:
    found = memory_check(24)
    assert found.status is Status.ERROR
    assert "per_device_train_batch_size=1 gradient_accumulation_steps=16 (28 GiB)" in found.advice
    assert "enable_liger_kernel=true (21 GiB)" in found.advice
    assert "configs/multi_gpu_zero2.yaml" in memory_check(8).advice


def test_memory_to_spare_buys_speed() -> None:
    found = memory_check(140, enable_liger_kernel=True)
    assert found.advice.startswith("disable_gradient_checkpointing=true would be faster")
