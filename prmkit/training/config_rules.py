"""What can be wrong with one key of a config: its name, its type, its value.

Names, types and choices come from the installed LLaMA Factory. What is written down here are the traps: names that went
away, and values that its parser lets pass and its trainer dies of, most of them after the model has loaded.
"""

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prmkit.llamafactory_schema import Key, llamafactory_version, logger_names, template_names
from prmkit.training.problem import Problem

SUCCESSORS = {
    "evaluation_strategy": "Write eval_strategy.",
    "group_by_length": "Write train_sampling_strategy: group_by_length.",
    "tokenizer_name_or_path": "Leave it out: the tokenizer always comes from model_name_or_path.",
    "tokenizer_name": "Leave it out: the tokenizer always comes from model_name_or_path.",
    "modules_to_save": "Write additional_target: embed_tokens,lm_head (names, with commas).",
    "torch_dtype": "For training write bf16: true or pure_bf16: true; for the export infer_dtype: bfloat16.",
    "dtype": "For training write bf16: true or pure_bf16: true; for the export infer_dtype: bfloat16.",
    "compute_dtype": "For training write bf16: true or pure_bf16: true; for the export infer_dtype: bfloat16.",
    "save_safetensors": "Leave it out: everything is saved as safetensors.",
    "experiment_name": "Write run_name or swanlab_run_name.",
    "lora_plus_scale": "Write loraplus_lr_ratio: 16.0.",
    "lora_r": "Write lora_rank.",
    "target_modules": "Write lora_target.",
    "additional_special_tokens": "Write add_special_tokens: <a>,<b> (one text, with commas).",
    "no_cuda": "Write use_cpu: true.",
    "use_mps_device": "Leave it out: the device is found.",
    "per_gpu_train_batch_size": "Write per_device_train_batch_size.",
    "per_gpu_eval_batch_size": "Write per_device_eval_batch_size.",
    "push_to_hub_token": "Write hub_token.",
    "include_inputs_for_metrics": "Write include_for_metrics: [inputs].",
    "use_legacy_prediction_loop": "Leave it out: it is gone.",
    "half_precision_backend": "Leave it out: it is gone.",
    "fp16_backend": "Leave it out: it is gone.",
    "fp16_opt_level": "Leave it out: it is gone.",
    "jit_mode_eval": "Leave it out: it is gone.",
    "xpu_backend": "Write ddp_backend.",
    "max_seq_length": "Write cutoff_len.",
    "model_max_length": "Write cutoff_len: this one follows from it.",
    "device_map": "Leave it out: the model goes to the training device.",
    "load_in_4bit": "Write quantization_bit: 4.",
    "load_in_8bit": "Write quantization_bit: 8.",
    "system": "Write default_system.",
    "system_prompt": "Write default_system.",
    "use_flash_attention_2": "Write flash_attn: fa2.",
    "attn_implementation": "Write flash_attn: fa2 or sdpa.",
    "epochs": "Write num_train_epochs.",
    "batch_size": "Write per_device_train_batch_size.",
    "lr": "Write learning_rate.",
    "learning-rate": "Write learning_rate.",
}
"""What became of keys of older versions and of neighbouring tools. Looked at only for keys that the installed LLaMA
Factory does not know."""

_TAKEN_ALL_THE_SAME: dict[str, tuple[Any, ...]] = {
    "swanlab_mode": ("offline", "disabled"),
    "resume_from_checkpoint": (True, False),
}
"""Values outside a key's own types and choices that nevertheless work."""

_EMPTY_MEANS_SOMETHING = {"default_system", "debug"}
"""`default_system: ""` leaves out the system text that the template would put in."""

_EMPTY_LIST_IS_NOTHING = {"eval_dataset", "lora_target", "additional_target"}
"""LLaMA Factory looks into these lists for at least one name."""

_AT_LEAST = {
    "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1,
    "lora_rank": 1, "lora_alpha": 1, "cutoff_len": 16, "preprocessing_num_workers": 1, "preprocessing_batch_size": 1,
    "lora_dropout": 0, "warmup_steps": 0, "weight_decay": 0, "val_size": 0, "dataloader_num_workers": 0,
    "export_size": 1, "neftune_noise_alpha": 0, "max_samples": 1, "save_total_limit": 1, "eval_delay": 0,
}  # fmt: skip
_MORE_THAN = {"learning_rate": 0, "num_train_epochs": 0, "logging_steps": 0, "save_steps": 0, "max_grad_norm": 0}
_LESS_THAN = {"lora_dropout": 1, "learning_rate": 1, "weight_decay": 1}
_RANGE_HINTS = {"max_samples": "Leave the key out to take every row."}

_REQUIRED = {
    "model_name_or_path": "Write model_name_or_path: ./model.",
    "dataset": "Write dataset: reward_model_full, or another name in dataset_info.json.",
    "output_dir": "Write output_dir: saves/NAME, the folder of this run.",
}

_QUANTIZATION_BITS = {"bnb": (4, 8), "hqq": (1, 2, 3, 4, 5, 6, 8), "eetq": (8,)}


def problems_in(values: Mapping[str, Any], keys: Mapping[str, Key]) -> list[Problem]:
    """Everything that is wrong with single keys, in their order; at most one problem a key."""
    missing = [
        Problem(name, "is not set." if values.get(name) is None else "is an empty list.", hint)
        for name, hint in _REQUIRED.items()
        if values.get(name) in (None, [])
    ]
    found = (_first(_problems_of(name, value, values, keys)) for name, value in values.items())
    return [*missing, *(problem for problem in found if problem is not None)]


def _first(problems: Iterator[Problem]) -> Problem | None:
    return next(problems, None)


def _problems_of(name: str, value: Any, values: Mapping[str, Any], keys: Mapping[str, Key]) -> Iterator[Problem]:
    key = keys.get(name)
    if key is None:
        yield unknown_key(name, keys)
        return
    yield from _trap(name, value, values)
    if value is None:
        yield from _null(key)
        return
    yield from _type(key, value)
    yield from _choice(key, value)
    yield from _range(name, value)


def unknown_key(name: str, keys: Iterable[str]) -> Problem:
    """What to say of a key that the installed LLaMA Factory does not take."""
    message = f"LLaMA Factory {llamafactory_version()} does not know this key."
    if name in SUCCESSORS:
        return Problem(name, message, SUCCESSORS[name])
    nearest = difflib.get_close_matches(name.replace("-", "_"), keys, n=1)
    return Problem(name, message, f"Did you mean {nearest[0]}?" if nearest else "Leave it out.")


def _trap(name: str, value: Any, values: Mapping[str, Any]) -> Iterator[Problem]:
    """Values that the parser lets pass and that end the run later."""
    if value == "" and name not in _EMPTY_MEANS_SOMETHING:
        yield Problem(name, "is an empty text, which LLaMA Factory takes for a value.", "Leave the key out.")
    elif value == [] and name in _EMPTY_LIST_IS_NOTHING:
        yield Problem(name, "is an empty list.", "Leave the key out.")
    elif name == "swanlab_api_key":
        yield Problem(name, "a key does not belong in a file.", "Set SWANLAB_API_KEY in the environment.")
    elif name == "adapter_name_or_path" and isinstance(value, list):
        joined = ",".join(map(str, value))
        yield Problem(name, "LLaMA Factory cannot read a list here.", f"Write one text: {joined}")
    elif name == "flash_attn" and value == "fa3":
        yield Problem(name, "fa3 ends in NotImplementedError when the model loads.", "Write fa2, sdpa or auto.")
    elif name == "do_train" and value is False:
        yield Problem(name, "is false, so nothing would be trained.", "Write do_train: true.")
    elif name == "report_to":
        yield from _report_to(value)
    elif name == "quantization_bit" and isinstance(value, int):
        method = str(values.get("quantization_method", "bnb"))
        allowed = _QUANTIZATION_BITS.get(method, (value,))
        if value not in allowed:
            hint = f"Write {' or '.join(map(str, allowed))}, or leave the key out for no quantization."
            yield Problem(name, f"{method} has no {value}-bit quantization.", hint)
    elif name == "template" and isinstance(value, str) and value not in template_names():
        nearest = " or ".join(difflib.get_close_matches(value, template_names(), n=3))
        hint = f"Did you mean {nearest}?" if nearest else "For example qwen, qwen3, llama3, mistral, chatglm3."
        yield Problem(name, f"LLaMA Factory knows no template '{value}'.", hint)


def _report_to(value: Any) -> Iterator[Problem]:
    names = value if isinstance(value, list) else [value]
    if value is None:
        yield Problem("report_to", "null is taken for the name of a logger.", "Write report_to: none.")
    elif isinstance(value, str) and "," in value:
        written = ", ".join(part.strip() for part in value.split(","))
        yield Problem("report_to", "LLaMA Factory does not split this text.", f"Write a list: report_to: [{written}]")
    elif unknown := [str(name) for name in names if name not in (*logger_names(), "none", "all")]:
        known = ", ".join(("none", *logger_names()))
        yield Problem("report_to", f"there is no logger '{', '.join(unknown)}'.", f"Known: {known}.")


def _null(key: Key) -> Iterator[Problem]:
    if "None" not in key.types:
        hint = "Leave the key out"
        hint += f" for LLaMA Factory's default, {key.default}." if isinstance(key.default, str | int | float) else "."
        yield Problem(key.name, "null is no value here.", hint)


def _type(key: Key, value: Any) -> Iterator[Problem]:
    if _fits(key, value) or value in _TAKEN_ALL_THE_SAME.get(key.name, ()):
        return
    wanted = " or ".join(sorted(_TYPE_WORDS[name] for name in key.types & _TYPE_WORDS.keys())) or "another type"
    if isinstance(value, str):
        plain = _unquoted(value)
        if plain is not None and _fits(key, plain):
            hint = f"Write {key.name}: {value} without quotes."
            yield Problem(key.name, f"'{value}' is a text in quotes; LLaMA Factory needs {wanted} here.", hint)
            return
    hint = f"Put it in quotes: '{value}'." if "str" in key.types and not isinstance(value, dict | list) else ""
    if isinstance(value, float) and value.is_integer() and "int" in key.types:
        hint = f"Write {int(value)}."
    if isinstance(value, int) and value in (0, 1) and "bool" in key.types:
        hint = f"Write {'true' if value else 'false'}."
    yield Problem(key.name, f"is {value!r}; LLaMA Factory needs {wanted} here.", hint)


_TYPE_WORDS = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "list": "a list",
    "dict": "a mapping",
}


def _fits(key: Key, value: Any) -> bool:
    if not key.types <= {*_TYPE_WORDS, "None"}:
        return True  # a class of transformers: its own parser knows
    if isinstance(value, bool):
        return "bool" in key.types
    if isinstance(value, int):
        return bool(key.types & {"int", "float"})
    return type(value).__name__ in key.types


def _unquoted(text: str) -> Any:
    """What the text would be without its quotes, or None."""
    lowered = text.strip().lower()
    if lowered in ("true", "false", "yes", "no", "on", "off"):
        return lowered in ("true", "yes", "on")
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return None


def _choice(key: Key, value: Any) -> Iterator[Problem]:
    choices = (*key.choices, *_TAKEN_ALL_THE_SAME.get(key.name, ()))
    if key.choices and isinstance(value, str) and value not in choices:
        nearest = difflib.get_close_matches(value, choices, n=1)
        hint = f"Did you mean {nearest[0]}?" if nearest else f"Write one of: {', '.join(choices)}."
        yield Problem(key.name, f"'{value}' is not one of its choices.", hint)


def _range(name: str, value: Any) -> Iterator[Problem]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    hint = _RANGE_HINTS.get(name, "")
    if not math.isfinite(value):
        yield Problem(name, f"is {value}.", "Write a number.")
    elif name in _AT_LEAST and value < _AT_LEAST[name]:
        yield Problem(name, f"is {value}; it must be at least {_AT_LEAST[name]}.", hint)
    elif name in _MORE_THAN and value <= _MORE_THAN[name]:
        yield Problem(name, f"is {value}; it must be more than {_MORE_THAN[name]}.", hint)
    elif name in _LESS_THAN and value >= _LESS_THAN[name]:
        yield Problem(name, f"is {value}; it must be less than {_LESS_THAN[name]}.", hint)
