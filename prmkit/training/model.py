"""Read a model's sizes from its files, without loading it, and estimate the memory that training takes on each GPU.

The estimate's parts, all in bytes:

weights      frozen numbers as stored in memory: 2 bytes in bf16; 0.5 in 4-bit plus quantization constants, which are
             one float32 per block of 64, or 0.127 bit per number with double quantization (Dettmers et al. 2023, QLoRA,
             section 3).
states       trained numbers: float32 weight, gradient and Adam's two moments, 16 bytes (Rajbhandari et al. 2020, ZeRO,
             section 3.1, with the float32 weights that LLaMA Factory upcasts to), and the bf16 copy that autocast
             keeps, 2. ZeRO and FSDP divide what they shard by the number of processes (the same paper, section 5).
activations  what the backward pass needs from the forward pass, counted as by Korthikanti et al. 2022 (Reducing
             Activation Recomputation, section 4), but for a block of RMSNorm, grouped-query attention and gated
             MLP, with LoRA, and without the attention matrix, which FlashAttention and SDPA never store. With gradient
             checkpointing each layer keeps only its input, and one layer at a time is recomputed in full.
logits       vocabulary x tokens, three times in float32: log-softmax, its gradient, and the logits' gradient. Liger
             computes them in chunks that take about as much memory as the hidden states (Hsu et al. 2024, section 3.2).
reserve      the CUDA context, and a share for fragmentation.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from prmkit.dataset_info import split_names
from prmkit.errors import DataError
from prmkit.files import read_json
from prmkit.llamafactory_schema import setting
from prmkit.training.checkpoints import Weight, read_weights
from prmkit.training.checks import Check, error, ok, warning
from prmkit.training.environment import GIBIBYTE, Machine

# --- memory -------------------------------------------------------------------------------------------------------

CUDA_CONTEXT = 800 << 20
FRAGMENTATION = 0.05

ADAM_STATE = 18
"""Bytes for each trained number: float32 weight, gradient, two moments, and autocast's bf16 copy."""
PURE_BF16_STATE = 8
"""The same with pure_bf16: weight, gradient and both moments in bf16."""

LOGIT_BYTES = 12
"""Bytes that the loss keeps per logit at its peak, in the backward pass of the cross entropy."""


@dataclass(frozen=True)
class Model:
    """The sizes of a model that the estimate needs, as counts of numbers."""

    layers: int
    hidden: int
    intermediate: int
    """Width of the MLP; for a mixture of experts, of all experts that one token passes through."""
    query: int
    """Width of all query heads together."""
    key_value: int
    """Width of all key heads together."""
    heads: int
    vocabulary: int
    linear: tuple[tuple[int, int], ...]
    """Outputs and inputs of every linear layer inside the blocks, which `lora_target: all` trains."""
    linear_names: tuple[str, ...]
    embedding: int
    """Numbers in the input embeddings and, if it is a separate tensor, the output layer."""
    parameters: int


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    weights: float
    states: float
    activations: float
    logits: float

    @property
    def reserve(self) -> float:
        """Memory that CUDA itself takes."""
        return CUDA_CONTEXT + FRAGMENTATION * (self.weights + self.states + self.activations + self.logits)

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return self.weights + self.states + self.activations + self.logits + self.reserve


def read_model(folder: Path) -> Model:
    """Read a model's sizes from its config.json and the headers of its safetensors.

    Raises:
        DataError: the files are missing, not JSON, or of an architecture whose sizes are unknown.
    """
    config = read_json(folder / "config.json")
    weights = read_weights(folder)
    try:
        config = config.get("text_config", config)
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        head = config.get("head_dim") or config.get("kv_channels") or hidden // heads
        experts = config.get("moe_intermediate_size", 0) * config.get("num_experts_per_tok", 0)
        linear = {name: weight for name, weight in weights.items() if _is_linear(name, weight)}
        return Model(
            layers=_either(config, "num_hidden_layers", "num_layers"),
            hidden=hidden,
            intermediate=experts or _either(config, "intermediate_size", "ffn_hidden_size"),
            query=heads * head,
            key_value=(config.get("num_key_value_heads") or config.get("multi_query_group_num") or heads) * head,
            heads=heads,
            vocabulary=_either(config, "vocab_size", "padded_vocab_size"),
            linear=tuple((weight.shape[0], weight.shape[1]) for weight in linear.values()),
            linear_names=tuple(linear),
            embedding=sum(weight.size for name, weight in weights.items() if _is_embedding(name)),
            parameters=sum(weight.size for weight in weights.values()),
        )
    except KeyError as error:
        raise DataError(f"{folder}/config.json: no {error}, so the memory cannot be estimated.") from error
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise DataError(f"{folder}/config.json: {error}, so the memory cannot be estimated.") from error


def _either(config: Mapping[str, Any], name: str, chatglm: str) -> int:
    return int(config[name] if name in config else config[chatglm])


def _is_linear(name: str, weight: Weight) -> bool:
    # Experts are one three-dimensional parameter in memory, which LoRA skips.
    in_a_block = ".layers." in name or ".h." in name
    return name.endswith(".weight") and len(weight.shape) == 2 and in_a_block and ".experts." not in name


def _is_embedding(name: str) -> bool:
    return name.endswith(
        ("embed_tokens.weight", "lm_head.weight", "wte.weight", "word_embeddings.weight", "output_layer.weight")
    )


def lora_parameters(model: Model, values: Mapping[str, Any]) -> int:
    """Count the numbers that LoRA trains: rank x (inputs + outputs) per target (Hu et al. 2021, section 4.1)."""
    rank = int(setting(values, "lora_rank"))
    wanted = split_names(setting(values, "lora_target"))
    pairs = zip(model.linear_names, model.linear, strict=True)
    chosen = [shape for name, shape in pairs if wanted == ["all"] or name.split(".")[-2] in wanted]
    adapter = sum(rank * (outputs + inputs) for outputs, inputs in chosen)
    # additional_target trains whole layers as well.
    extra = values.get("additional_target") or ""
    return adapter + (model.embedding if "embed_tokens" in extra or "lm_head" in extra else 0)


def estimate(model: Model, values: Mapping[str, Any], *, tokens: int, world_size: int = 1) -> Memory:
    """Estimate one GPU's memory at the peak of a training step.

    Args:
        model: the model's sizes.
        values: LLaMA Factory's keys.
        tokens: the tokens of the longest row, after truncation.
        world_size: the number of training processes, over all nodes.
    """
    in_batch = int(setting(values, "per_device_train_batch_size")) * tokens
    weights, states = _weights_and_states(model, values, world_size)
    return Memory(weights, states, _activations(model, values, in_batch, tokens), _logits(model, values, in_batch))


def _shards(values: Mapping[str, Any]) -> tuple[bool, bool]:
    """Return whether optimizer states are sharded over the processes, and whether weights are."""
    if values.get("fsdp"):
        return True, True
    stage = zero_stage(values)
    return stage >= 1, stage >= 3


def zero_stage(values: Mapping[str, Any]) -> int:
    """Return the ZeRO stage in the config's DeepSpeed file; 0 without one."""
    deepspeed = values.get("deepspeed")
    if not isinstance(deepspeed, str) or not Path(deepspeed).is_file():
        return 0
    try:
        return int(read_json(Path(deepspeed)).get("zero_optimization", {}).get("stage", 0))
    except (DataError, AttributeError, ValueError):
        return 0


def _weights_and_states(model: Model, values: Mapping[str, Any], world_size: int) -> tuple[float, float]:
    full, half = _trains_base(values), _half(values)
    states_sharded, weights_sharded = _shards(values)
    per_state = PURE_BF16_STATE if values.get("pure_bf16") else ADAM_STATE
    trained = model.parameters if full else lora_parameters(model, values)
    if full and states_sharded and not values.get("fsdp"):
        # DeepSpeed keeps bf16 weights in addition to float32 masters: weights 2, gradients 2, masters and moments 12.
        weights: float = half * model.parameters / (world_size if weights_sharded else 1)
        return weights, 14 * trained / world_size
    weights = 0 if full else _frozen_bytes(model, values, half) / (world_size if weights_sharded else 1)
    return weights, per_state * trained / (world_size if states_sharded else 1)


def _frozen_bytes(model: Model, values: Mapping[str, Any], half: int) -> float:
    bits = int(values.get("quantization_bit") or 0)
    if not bits:
        return half * model.parameters
    in_linear = sum(outputs * inputs for outputs, inputs in model.linear)
    constants = 0.127 if setting(values, "double_quantization") else 0.5
    return in_linear * (bits + constants) / 8 + half * (model.parameters - in_linear)


def saved_per_token(model: Model, values: Mapping[str, Any]) -> float:
    """Return the bytes that one block keeps per token for its backward pass, without the attention matrix."""
    half, liger = _half(values), bool(values.get("enable_liger_kernel"))
    hidden, wide, query, key = model.hidden, model.intermediate, model.query, model.key_value
    inputs = 5 * hidden + query + wide  # of the linear layers: three at attention, its output, gate and up, down
    attention = half * (2 * query + 2 * key)
    # gate, its SiLU and up; Liger recomputes the SiLU.
    mlp = half * wide * (2 if liger else 3)
    if _trains_base(values):
        # Weights are float32, and so are the numbers between blocks: a norm keeps its input and the normed numbers.
        return 2 * hidden * (4 if liger else 8) + attention + mlp + half * inputs
    # A frozen norm keeps its input in float32, or with Liger in 16 bits. Every adapter keeps its own input, and a mask.
    norms = 2 * hidden * (half if liger else 4)
    return norms + attention + mlp + inputs * (half + (1 if values.get("lora_dropout") else 0))


def _half(values: Mapping[str, Any]) -> int:
    return 2 if values.get("bf16") or values.get("fp16") or values.get("pure_bf16") else 4


def _trains_base(values: Mapping[str, Any]) -> bool:
    return setting(values, "finetuning_type") in ("full", "freeze")


def _activations(model: Model, values: Mapping[str, Any], in_batch: int, tokens: int) -> float:
    half = _half(values)
    block = in_batch * saved_per_token(model, values)
    if values.get("flash_attn") == "disabled":
        # Scores, their float32 softmax and its copy: heads x tokens x tokens for each row.
        block += in_batch * tokens * model.heads * (2 * half + 4)
    # The gradients that pass through the widest part of the block.
    passing = in_batch * half * (2 * model.hidden + 3 * model.intermediate)
    if values.get("disable_gradient_checkpointing"):
        return model.layers * block + passing
    kept = model.layers * in_batch * model.hidden * (4 if _trains_base(values) else half)
    return kept + block + passing


def _logits(model: Model, values: Mapping[str, Any], in_batch: int) -> float:
    if values.get("enable_liger_kernel"):
        chunk = ceil(in_batch / ceil(model.vocabulary / model.hidden))
        return chunk * model.vocabulary * LOGIT_BYTES + 2.0 * in_batch * model.hidden * _half(values)
    return in_batch * model.vocabulary * (LOGIT_BYTES + (4.0 if values.get("upcast_lmhead_output") else 0.0))


def remedies(
    model: Model, values: Mapping[str, Any], *, tokens: int, world_size: int, budget: float
) -> list[tuple[str, Memory]]:
    """Return the flags to fit into `budget` bytes, and the memory that training then takes.

    The mildest changes come first. Each entry includes the flags before it, and the list ends with the first that fits.
    """
    steps: list[tuple[str, Memory]] = []
    now, typed = dict(values), ""
    for saving in savings(values):
        now |= saving.changes
        typed = f"{typed} {saving.flags}".strip()
        memory = estimate(model, now, tokens=tokens, world_size=world_size)
        steps.append((typed, memory))
        if memory.total <= budget:
            break
    return steps


@dataclass(frozen=True)
class Saving:
    """A change of the config that saves memory without truncating rows."""

    changes: Mapping[str, Any]
    why: str

    @property
    def flags(self) -> str:
        """The change as arguments of train.py."""
        return " ".join(f"{key}={str(value).lower()}" for key, value in self.changes.items())


def savings(values: Mapping[str, Any]) -> list[Saving]:
    """Return the memory-saving changes that this config does not have yet, the mildest first."""
    found = []
    batch = int(setting(values, "per_device_train_batch_size"))
    if batch > 1:
        accumulation = batch * int(setting(values, "gradient_accumulation_steps"))
        changes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": accumulation}
        found.append(Saving(changes, "the same effective batch in smaller parts"))
    if values.get("disable_gradient_checkpointing"):
        found.append(Saving({"disable_gradient_checkpointing": False}, "gradient checkpointing; slower"))
    if not values.get("enable_liger_kernel"):
        why = "after pip install liger-kernel; computes the logits in chunks"
        found.append(Saving({"enable_liger_kernel": True}, why))
    if setting(values, "finetuning_type") == "lora" and not values.get("quantization_bit"):
        why = "the base model in 4-bit; needs bitsandbytes; see configs/24gb_qlora.yaml"
        found.append(Saving({"quantization_bit": 4}, why))
    return found


def checkpoint_bytes(model: Model, values: Mapping[str, Any]) -> float:
    """Return the bytes of one checkpoint on disk: trained numbers and, unless it is left out, the optimizer's state."""
    weight, optimizer = 4, 8  # float32, and Adam's two moments
    if values.get("pure_bf16"):
        weight, optimizer = 2, 4
    elif _trains_base(values) and zero_stage(values):
        weight, optimizer = 2, 12  # DeepSpeed saves bf16 weights, and its float32 masters with the moments
    trained = model.parameters if _trains_base(values) else lora_parameters(model, values)
    return trained * (weight + (0 if values.get("save_only_model") else optimizer))


# --- does it fit? -------------------------------------------------------------------------------------------------

SURE_TO_FAIL = 1.15
"""The estimate is accurate to about 15 %: a run that needs more than this times the free memory will not fit."""
COMFORTABLE = 0.75
"""Below this fraction of the free memory, memory can be traded for speed."""


def check_memory(
    model: Model | None, values: Any, machine: Machine, *, tokens: int, world_size: int
) -> Iterator[Check]:
    budget = machine.memory_budget
    if not budget:
        return
    if model is None:
        yield warning("memory", "not estimated: the model's sizes are unknown", "Watch nvidia-smi at the start.")
        return
    memory = estimate(model, values, tokens=tokens, world_size=world_size)
    found = f"about {_parts(memory)} at {tokens:,} tokens per row; {budget / GIBIBYTE:.0f} GiB free"
    if memory.total <= budget:
        yield ok("memory", found, _faster(model, values, budget=budget, tokens=tokens, world_size=world_size))
        return
    smaller = remedies(model, values, tokens=tokens, world_size=world_size, budget=budget)
    steps = [f"{flags} ({less.total / GIBIBYTE:.0f} GiB)" for flags, less in smaller]
    fits = bool(smaller) and smaller[-1][1].total <= budget
    last = "" if fits else "; then a shorter cutoff_len, or more GPUs with configs/multi_gpu_zero2.yaml"
    advice = "Try, in this order: " + "; ".join(steps) + last
    sure = memory.total > SURE_TO_FAIL * budget
    yield error("memory", f"{found}; will not fit", advice) if sure else warning("memory", f"{found}; tight", advice)


def _parts(memory: Memory) -> str:
    parts = {
        "weights": memory.weights,
        "LoRA and optimizer" if memory.weights else "weights and optimizer": memory.states,
        "activations": memory.activations,
        "logits": memory.logits,
        "reserve": memory.reserve,
    }
    listed = ", ".join(f"{name} {size / GIBIBYTE:.1f}" for name, size in parts.items() if size)
    return f"{memory.total / GIBIBYTE:.1f} GiB ({listed})"


def _faster(model: Model, values: Any, *, budget: float, tokens: int, world_size: int) -> str:
    if values.get("disable_gradient_checkpointing") or values.get("use_cpu"):
        return ""
    faster_values = {**values, "disable_gradient_checkpointing": True}
    memory = estimate(model, faster_values, tokens=tokens, world_size=world_size)
    if memory.total > COMFORTABLE * budget:
        return ""
    faster = f"disable_gradient_checkpointing=true would be faster and take {memory.total / GIBIBYTE:.0f} GiB."
    return faster + (
        "" if values.get("neat_packing") else " Packed rows would also be faster: see configs/80gb_lora.yaml."
    )
