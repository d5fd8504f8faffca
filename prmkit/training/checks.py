"""The class of a check's result, and all checks of a config that need neither this machine nor other files.

Names, types, choices and defaults come from the installed LLaMA Factory (`prmkit.llamafactory_schema`). The rules below
are for settings that its parser accepts, but that fail after the model has loaded, or silently do something else.
The parser's own errors are not repeated here, because it runs before every training run
(`prmkit.training.llamafactory_checks`).
"""

import difflib
import math
import re
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from prmkit.dataset_info import split_names
from prmkit.llamafactory_schema import (
    NO_DEFAULT,
    REPLACEMENTS,
    ConfigKey,
    installed_version,
    llamafactory_version,
    logger_names,
    setting,
    template_names,
    training_keys,
)

Values = Mapping[str, Any]


class Status(StrEnum):
    """Errors stop a run unless `--force` is given; warnings are only shown."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True)
class Check:
    """The result of one check: its subject, what it found, and what to do about it."""

    name: str
    """The subject of the check; for a check of one key, the key."""
    status: Status
    found: str
    advice: str = ""
    """What to do; empty if there is nothing to do."""


def ok(name: str, found: str, advice: str = "") -> Check:
    """Return the result of a check that found nothing wrong."""
    return Check(name, Status.OK, found, advice)


def warning(name: str, found: str, advice: str) -> Check:
    """Return a warning: the run would finish, but might not be what the user meant."""
    return Check(name, Status.WARNING, found, advice)


def error(name: str, found: str, advice: str = "") -> Check:
    """Return an error: the run would fail or be worthless."""
    return Check(name, Status.ERROR, found, advice)


def errors_in(checks: Sequence[Check]) -> list[Check]:
    """Return the checks that stop a run."""
    return [check for check in checks if check.status is Status.ERROR]


# --- single keys --------------------------------------------------------------------------------------------------

_ACCEPTED_ANYWAY: dict[str, tuple[Any, ...]] = {
    "swanlab_mode": ("offline", "disabled"),
    "resume_from_checkpoint": (True, False),
}
"""Values outside a key's own types and choices that nevertheless work."""


def is_accepted_anyway(name: str, value: Any) -> bool:
    """Return whether a key may have a value that is outside its own types and choices."""
    return value in _ACCEPTED_ANYWAY.get(name, ())


_EMPTY_IS_A_VALUE = {"default_system", "debug"}
"""Keys that may be an empty string: `default_system: ""` removes the system prompt that the template would add."""

_EMPTY_LIST_FAILS = {"eval_dataset", "lora_target", "additional_target"}
"""LLaMA Factory expects at least one name in these lists."""

_AT_LEAST = {
    "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1,
    "lora_rank": 1, "lora_alpha": 1, "cutoff_len": 16, "preprocessing_num_workers": 1, "preprocessing_batch_size": 1,
    "lora_dropout": 0, "warmup_steps": 0, "weight_decay": 0, "val_size": 0, "dataloader_num_workers": 0,
    "export_size": 1, "neftune_noise_alpha": 0, "max_samples": 1, "save_total_limit": 1, "eval_delay": 0,
}  # fmt: skip
_MORE_THAN = {"learning_rate": 0, "num_train_epochs": 0, "logging_steps": 0, "save_steps": 0, "max_grad_norm": 0}
_LESS_THAN = {"lora_dropout": 1, "learning_rate": 1, "weight_decay": 1}
_RANGE_HINTS = {"max_samples": "Remove the key to use every row."}

_REQUIRED = {
    "model_name_or_path": "Write model_name_or_path: ./model.",
    "dataset": "Write dataset: reward_model_full, or another name in dataset_info.json.",
    "output_dir": "Write output_dir: saves/NAME, the folder of this run.",
}

_QUANTIZATION_BITS = {"bnb": (4, 8), "hqq": (1, 2, 3, 4, 5, 6, 8), "eetq": (8,)}
_SECRET = re.compile(r"_token$|api_key$|_secret$|_webhook_url$")
_PASSWORD_IN_URL = re.compile(r"://[^/\s:@]*:[^/\s@]+@")


def is_secret(key: str) -> bool:
    """Return whether a key contains a secret, whose value must not be printed or recorded."""
    return bool(_SECRET.search(key))


def check_known_keys(values: Values) -> list[Check]:
    """Return what is wrong with single keys, in their order; at most one error per key."""
    keys = training_keys()
    missing = [
        error(name, "is not set" if values.get(name) is None else "is an empty list", hint)
        for name, hint in _REQUIRED.items()
        if values.get(name) in (None, [])
    ]
    found = (next(_errors_of(name, value, values, keys), None) for name, value in values.items())
    return [*missing, *(each for each in found if each is not None)]


def _errors_of(name: str, value: Any, values: Values, keys: Mapping[str, ConfigKey]) -> Iterator[Check]:
    key = keys.get(name)
    if key is None:
        yield unknown_key(name, keys)
        return
    yield from _check_trap(name, value, values)
    if value is None:
        if "None" not in key.types:
            default = f" for LLaMA Factory's default, {key.default}" if isinstance(key.default, str | int) else ""
            yield error(name, "null is not allowed", f"Remove the key{default}.")
        return
    yield from _check_type(key, value)
    yield from _check_choice(key, value)
    yield from _check_range(name, value)


def unknown_key(name: str, keys: Iterable[str]) -> Check:
    """Return the error for a key that the installed LLaMA Factory does not accept."""
    message = f"LLaMA Factory {llamafactory_version()} has no such key"
    if name in REPLACEMENTS:
        return error(name, message, REPLACEMENTS[name])
    nearest = difflib.get_close_matches(name.replace("-", "_"), keys, n=1)
    return error(name, message, f"Did you mean {nearest[0]}?" if nearest else "Remove it.")


def _check_trap(name: str, value: Any, values: Values) -> Iterator[Check]:
    """Find values that the parser accepts and that fail later."""
    if is_secret(name) or (isinstance(value, str) and _PASSWORD_IN_URL.search(value)):
        hint = "Log in once (hf auth login, swanlab login), or set HF_TOKEN or SWANLAB_API_KEY in the environment."
        yield error(name, "secrets are not allowed in a config or on the command line", hint)
    elif value == "" and name not in _EMPTY_IS_A_VALUE:
        yield error(name, "is an empty string, which LLaMA Factory treats as a value", "Remove the key.")
    elif value == [] and name in _EMPTY_LIST_FAILS:
        yield error(name, "is an empty list", "Remove the key.")
    elif name == "adapter_name_or_path" and isinstance(value, list):
        joined = ",".join(map(str, value))
        yield error(name, "LLaMA Factory cannot read a list here", f"Write one string: {joined}")
    elif name == "flash_attn" and value == "fa3":
        yield error(name, "fa3 raises NotImplementedError when the model loads", "Write fa2, sdpa or auto.")
    elif name == "tokenized_path":
        found = "LLaMA Factory trains on the rows in this folder, whatever dataset is set to"
        yield error(name, found, "Remove the key, so that the checks and run.json describe the rows that are used.")
    elif name == "do_train" and value is False:
        yield error(name, "is false, so nothing would be trained", "Write do_train: true.")
    elif name == "report_to":
        yield from _check_report_to(value)
    elif name == "quantization_bit" and isinstance(value, int):
        method = str(setting(values, "quantization_method"))
        allowed = _QUANTIZATION_BITS.get(method, (value,))
        if value not in allowed:
            hint = f"Write {' or '.join(map(str, allowed))}, or remove the key for no quantization."
            yield error(name, f"{method} does not support {value}-bit quantization", hint)
    elif name == "template" and isinstance(value, str) and value not in template_names():
        nearest = " or ".join(difflib.get_close_matches(value, template_names(), n=3))
        hint = f"Did you mean {nearest}?" if nearest else "For example qwen, qwen3, llama3, mistral, chatglm3."
        yield error(name, f"LLaMA Factory has no template '{value}'", hint)


def _check_report_to(value: Any) -> Iterator[Check]:
    names = value if isinstance(value, list) else [value]
    if value is None:
        yield error("report_to", "null is read as the name of a logger", "Write report_to: none.")
    elif isinstance(value, str) and "," in value:
        written = ", ".join(part.strip() for part in value.split(","))
        yield error("report_to", "LLaMA Factory does not split this string", f"Write a list: report_to: [{written}]")
    elif unknown := [str(name) for name in names if name not in (*logger_names(), "none", "all")]:
        known = ", ".join(("none", *logger_names()))
        yield error("report_to", f"there is no logger '{', '.join(unknown)}'", f"Known: {known}.")


def _check_type(key: ConfigKey, value: Any) -> Iterator[Check]:
    if _fits(key, value) or value in _ACCEPTED_ANYWAY.get(key.name, ()):
        return
    wanted = " or ".join(sorted(_TYPE_WORDS[name] for name in key.types & _TYPE_WORDS.keys())) or "another type"
    plain = _unquoted(value) if isinstance(value, str) else None
    if plain is not None and _fits(key, plain):
        hint = f"Write {key.name}: {value} without quotes."
        yield error(key.name, f"'{value}' is a string in quotes; LLaMA Factory needs {wanted} here", hint)
        return
    hint = f"Put it in quotes: '{value}'." if "str" in key.types and not isinstance(value, dict | list) else ""
    if isinstance(value, float) and value.is_integer() and "int" in key.types:
        hint = f"Write {int(value)}."
    if isinstance(value, int) and value in (0, 1) and "bool" in key.types:
        hint = f"Write {'true' if value else 'false'}."
    yield error(key.name, f"is {value!r}; LLaMA Factory needs {wanted} here", hint)


_TYPE_WORDS = {
    "bool": "true or false", "int": "a whole number", "float": "a number", "str": "a string", "list": "a list",
    "dict": "a mapping",
}  # fmt: skip


def _fits(key: ConfigKey, value: Any) -> bool:
    if not key.types <= {*_TYPE_WORDS, "None"}:
        return True  # a class of transformers: its own parser checks it
    if isinstance(value, bool):
        return "bool" in key.types
    if isinstance(value, int):
        return bool(key.types & {"int", "float"})
    return type(value).__name__ in key.types


def _unquoted(text: str) -> Any:
    """Return the value that a string would have without its quotes; None if that would be a string, too."""
    lowered = text.strip().lower()
    if lowered in ("true", "false", "yes", "no", "on", "off"):
        return lowered in ("true", "yes", "on")
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return None


def _check_choice(key: ConfigKey, value: Any) -> Iterator[Check]:
    choices = (*key.choices, *_ACCEPTED_ANYWAY.get(key.name, ()))
    if key.choices and isinstance(value, str) and value not in choices:
        nearest = difflib.get_close_matches(value, choices, n=1)
        hint = f"Did you mean {nearest[0]}?" if nearest else f"Use one of: {', '.join(choices)}."
        yield error(key.name, f"'{value}' is not a valid value", hint)


def _check_range(name: str, value: Any) -> Iterator[Check]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    hint = _RANGE_HINTS.get(name, "")
    if not math.isfinite(value):
        yield error(name, f"is {value}", "Use a number.")
    elif name in _AT_LEAST and value < _AT_LEAST[name]:
        yield error(name, f"is {value}; it must be at least {_AT_LEAST[name]}", hint)
    elif name in _MORE_THAN and value <= _MORE_THAN[name]:
        yield error(name, f"is {value}; it must be more than {_MORE_THAN[name]}", hint)
    elif name in _LESS_THAN and value >= _LESS_THAN[name]:
        yield error(name, f"is {value}; it must be less than {_LESS_THAN[name]}", hint)


# --- conflicts between keys that LLaMA Factory's parser does not notice -------------------------------------------


def check_conflicts(values: Values) -> list[Check]:
    """Return the conflicts between keys.

    Args:
        values: LLaMA Factory's keys, without those that are wrong by themselves.
    """
    defaults = {name: key.default for name, key in training_keys().items() if key.default is not NO_DEFAULT}
    effective = ChainMap(dict(values), defaults)
    rules: tuple[Callable[[Values, Values], Iterator[Check]], ...] = (
        _check_rows, _check_schedule, _check_metric, _check_loggers,
    )  # fmt: skip
    return [found for rule in rules for found in rule(effective, values)]


def _check_rows(config: Values, given: Values) -> Iterator[Check]:
    val_size = config["val_size"]
    if isinstance(val_size, float) and val_size >= 1:
        hint = f"To hold out a number of rows, write {val_size:.0f}."
        yield error("val_size", f"is {val_size}; a fraction must be below 1", hint)
    if config["streaming"] and config["dataloader_num_workers"] < 1:
        message = "needs a data-loader worker; otherwise reading a local file ends in StopIteration"
        yield error("streaming", message, "Set dataloader_num_workers: 1.")
    if config["packing"] and not config["neat_packing"]:
        message = "without neat_packing, packed rows attend to the rows before them"
        yield error("packing", message, "Set neat_packing: true, or remove packing.")
    if config["neat_packing"] and config["flash_attn"] == "fa2" and config["per_device_train_batch_size"] > 1:
        hint = "Write per_device_train_batch_size: 1 and multiply gradient_accumulation_steps."
        yield error("neat_packing", "supports only batch size 1 with flash_attn: fa2", hint)
    if config["torch_compile"] and config["enable_liger_kernel"]:
        message = "miscompiles the kernels of enable_liger_kernel: the loss is then 1e30, or negative"
        yield error("torch_compile", message, "Remove torch_compile.")
    if config["dataloader_num_workers"] < 1 and given.get("dataloader_persistent_workers"):
        hint = "Set dataloader_num_workers: 2."
        yield error("dataloader_persistent_workers", "has no effect without data-loader workers", hint)


def _check_schedule(config: Values, given: Values) -> Iterator[Check]:
    if "warmup_ratio" in given and "warmup_steps" in given:
        hint = "Keep warmup_steps: 0.1 (below 1 it is a fraction of the run)."
        yield error("warmup_ratio", "is set together with warmup_steps, and LLaMA Factory uses only the ratio", hint)
    deepspeed = given.get("deepspeed")
    # A launch checks this only under torchrun, after every process has started.
    if isinstance(deepspeed, str) and not deepspeed.startswith("{") and not Path(deepspeed).is_file():
        yield error("deepspeed", f"there is no file {deepspeed} below {Path.cwd()}", "See configs/deepspeed/.")
    for name, is_requested in (
        ("save_strategy", config["save_strategy"] == "best"),
        ("early_stopping_steps", "early_stopping_steps" in given),
    ):
        if is_requested and "metric_for_best_model" not in given and not config["load_best_model_at_end"]:
            yield error(name, "needs metric_for_best_model", "Write metric_for_best_model: loss.")


_LOOKS_AT_LOSS = ("reduce_lr_on_plateau", "greedy")

METRICS_OF = {
    "compute_accuracy": ("accuracy",),
    "predict_with_generate": ("rouge-1", "rouge-2", "rouge-l", "bleu-4"),
}
"""Key -> the metrics that LLaMA Factory computes besides the loss when the key is set."""


def _check_metric(config: Values, given: Values) -> Iterator[Check]:
    """Check that an evaluation computes the metric that chooses the best checkpoint."""
    follows_loss = config["load_best_model_at_end"] or config["lr_scheduler_type"] in _LOOKS_AT_LOSS
    metric = given.get("metric_for_best_model", "loss" if follows_loss else None)
    if metric is None or config["eval_strategy"] == "no" or config["stage"] != "sft":
        return
    # With predict_with_generate no loss is computed.
    measured = [] if config["predict_with_generate"] else ["loss"]
    measured += [name for key, names in METRICS_OF.items() if config[key] for name in names]
    if config["eval_on_each_dataset"]:
        measured = [f"{dataset}_{name}" for dataset in split_names(config["eval_dataset"]) for name in measured]
    if str(metric).removeprefix("eval_") not in measured:
        hint = f"Write metric_for_best_model: {' or '.join(measured)}."
        yield error("metric_for_best_model", f"'{metric}' is not computed in evaluation", hint)


def _check_loggers(config: Values, _given: Values) -> Iterator[Check]:
    loggers = config["report_to"] if isinstance(config["report_to"], list) else [config["report_to"]]
    message = "the swanlab logger of transformers does not work with the installed swanlab"
    if "swanlab" in loggers and not config["use_swanlab"]:
        yield error("report_to", message, "Write use_swanlab: true and report_to: none.")
    elif "all" in loggers and not config["use_swanlab"] and installed_version("swanlab"):
        yield error("report_to", f"all uses every installed logger, and {message}", "List the loggers that you want.")


# --- unexpected effects of settings -------------------------------------------------------------------------------


def check_settings(values: Values) -> Iterator[Check]:
    """Warn about settings that are accepted but rarely intended."""
    rate, full = setting(values, "learning_rate"), setting(values, "finetuning_type") in ("full", "freeze")
    if rate > (1e-4 if full else 5e-3):
        kind, usual = ("full fine-tuning", 1e-5) if full else ("LoRA", 1e-4)
        yield warning("settings", f"learning_rate {rate:g} is high for {kind}", f"{usual:g} is usual.")
    if setting(values, "stage") != "sft":
        found = f"stage: {values['stage']} does not train the model to produce verdicts"
        yield warning("settings", found, "Write stage: sft.")
    for key, (found, advice) in _RARELY_MEANT.items():
        if values.get(key):
            yield warning("settings", found.format(values[key]), advice.format(values[key]))


_RARELY_MEANT = {
    "warmup_ratio": ("warmup_ratio is deprecated", "Write warmup_steps: {} (below 1 it is a fraction of the run)."),
    "logging_dir": ("logging_dir has no effect", "TensorBoard's folder is set by TENSORBOARD_LOGGING_DIR."),
    "overwrite_cache": (
        "overwrite_cache tokenizes everything again at every start, although changed files are noticed without it",
        "Remove it.",
    ),
    "overwrite_output_dir": (
        "overwrite_output_dir keeps the old run's checkpoints, and a later resume may pick one of them",
        "Remove it; train.py --overwrite renames the old run.",
    ),
    "torch_compile": ("torch_compile compiles again for every row length", "Remove it."),
    "max_samples": (
        "max_samples: only the first {} rows of each dataset are used, including held-out datasets",
        "Remove it for a real run.",
    ),
    "neftune_noise_alpha": ("neftune_noise_alpha adds noise that helps chat models, not scoring", "Remove it."),
    "train_on_prompt": ("train_on_prompt trains on the prompts as well as the verdicts", "Remove it."),
    "save_only_model": (
        "save_only_model saves no optimizer state, so an interrupted run cannot be resumed",
        "Remove it; save_total_limit: 1 saves disk space as well.",
    ),
}
"""Key -> what was found and what to do; `{}` is the value."""
