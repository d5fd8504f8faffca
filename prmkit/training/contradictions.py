"""Keys of a config that contradict each other.

LLaMA Factory's own parser finds some of these, one at a time and after 7 seconds of imports; others it never finds.
"""

from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from prmkit.llamafactory_schema import NO_DEFAULT, Key
from prmkit.training.entries import folder_of, names_in
from prmkit.training.machine import installed_version
from prmkit.training.problem import Problem

Values = Mapping[str, Any]


def contradictions_in(values: Values, keys: Mapping[str, Key]) -> list[Problem]:
    """Everything that does not go together.

    Args:
        values: what was set, without keys that are wrong by themselves.
        keys: what LLaMA Factory takes, for the defaults of the rest.
    """
    defaults = {name: key.default for name, key in keys.items() if key.default is not NO_DEFAULT}
    effective = ChainMap(dict(values), defaults)
    rules: tuple[Callable[[Values, Values], Iterator[Problem]], ...] = (
        _held_out, _rows, _packing, _schedule, _best_model, _metric, _method, _precision, _loaders, _logging, _folders,
    )  # fmt: skip
    return [problem for rule in rules for problem in rule(effective, values)]


def _held_out(config: Values, given: Values) -> Iterator[Problem]:
    val_size = config["val_size"]
    if "eval_dataset" in given and val_size:
        yield Problem("val_size", "cannot stand beside eval_dataset.", "Leave val_size out.")
    if isinstance(val_size, float) and val_size >= 1:
        yield Problem(
            "val_size", f"is {val_size}; a share must be below 1.", f"For a number of rows write {val_size:.0f}."
        )
    if "eval_dataset" in given or val_size:
        return
    for name, asks in {
        "do_eval": config["do_eval"],
        "eval_strategy": config["eval_strategy"] != "no",
        "eval_on_start": config["eval_on_start"],
        "do_predict": config["do_predict"],
    }.items():
        if asks:
            yield Problem(name, "there is no held-out data to evaluate on.", "Set eval_dataset, or leave this out.")


def _rows(config: Values, given: Values) -> Iterator[Problem]:
    if config["streaming"]:
        if given.get("max_steps", -1) <= 0:
            yield Problem("streaming", "the number of rows is not known beforehand.", "Set max_steps.")
        if "max_samples" in given:
            yield Problem("max_samples", "cannot stand beside streaming.", "Leave one of them out.")
        if config["dataloader_num_workers"] < 1:
            yield Problem("streaming", "a local file ends in StopIteration.", "Set dataloader_num_workers: 1.")
    if config["mask_history"] and config["train_on_prompt"]:
        yield Problem("mask_history", "cannot stand beside train_on_prompt.", "Leave one of them out.")
    if "interleave_probs" in given and config["mix_strategy"] == "concat":
        hint = "Set mix_strategy: interleave_under, or leave interleave_probs out."
        yield Problem("interleave_probs", "means nothing with mix_strategy: concat.", hint)


def _packing(config: Values, _given: Values) -> Iterator[Problem]:
    if config["packing"] and not config["neat_packing"]:
        message = "lets every row see the rows packed before it."
        yield Problem("packing", message, "Write neat_packing: true, which keeps them apart, or leave it out.")
    if config["neat_packing"] and config["flash_attn"] == "fa2" and config["per_device_train_batch_size"] > 1:
        hint = "Write per_device_train_batch_size: 1 and multiply gradient_accumulation_steps."
        yield Problem("neat_packing", "with flash_attn: fa2 works for batches of one only.", hint)


def _schedule(config: Values, given: Values) -> Iterator[Problem]:
    if "warmup_ratio" in given and "warmup_steps" in given:
        hint = "Keep warmup_steps: 0.1 (below 1 it is a share of the run)."
        yield Problem("warmup_ratio", "is given beside warmup_steps, and LLaMA Factory takes only the ratio.", hint)
    if config["lr_scheduler_type"] in _LOOKS_AT_LOSS and config["eval_strategy"] == "no":
        yield Problem("lr_scheduler_type", "looks at the held-out loss.", "Set eval_strategy: steps or epoch.")
    for name in ("logging_steps", "eval_steps", "save_steps"):
        steps = given.get(name)
        if isinstance(steps, float) and steps > 1 and not steps.is_integer():
            yield Problem(name, f"is {steps}.", "Above 1 write a whole number; below 1 it is a share of the run.")


def _best_model(config: Values, given: Values) -> Iterator[Problem]:
    save, evaluate = config["save_strategy"], config["eval_strategy"]
    if config["load_best_model_at_end"] and save != "best" and save != evaluate:
        message = f"save_strategy is {save} and eval_strategy {evaluate}; they must be equal."
        yield Problem("load_best_model_at_end", message, f"Write eval_strategy: {save}." if save != "no" else "")
    elif config["load_best_model_at_end"] and save == evaluate == "steps":
        every, looked_at = config["save_steps"], given.get("eval_steps", config["logging_steps"])
        if looked_at and every >= 1 and looked_at >= 1 and every % looked_at:
            message = f"save_steps ({every}) must be a multiple of eval_steps ({looked_at})."
            yield Problem("load_best_model_at_end", message, f"Write save_steps: {looked_at}.")
    if save == "best" and "metric_for_best_model" not in given and not config["load_best_model_at_end"]:
        yield Problem("save_strategy", "best by which number?", "Write metric_for_best_model: loss.")
    if "early_stopping_steps" in given:
        if evaluate == "no":
            yield Problem("early_stopping_steps", "looks at the held-out loss.", "Set eval_strategy: steps or epoch.")
        if "metric_for_best_model" not in given and not config["load_best_model_at_end"]:
            yield Problem("early_stopping_steps", "by which number?", "Write metric_for_best_model: loss.")


def _metric(config: Values, given: Values) -> Iterator[Problem]:
    """Is the number that chooses the best checkpoint among those that an evaluation gives?"""
    follows_loss = config["load_best_model_at_end"] or config["lr_scheduler_type"] in _LOOKS_AT_LOSS
    metric = given.get("metric_for_best_model", "loss" if follows_loss else None)
    if metric is None or config["eval_strategy"] == "no" or config["stage"] != "sft":
        return
    # What generates its answers computes no loss.
    measured = [] if config["predict_with_generate"] else ["loss"]
    measured += [name for key, names in METRICS_OF.items() if config[key] for name in names]
    if config["eval_on_each_dataset"]:
        measured = [f"{dataset}_{name}" for dataset in names_in(config["eval_dataset"]) for name in measured]
    if str(metric).removeprefix("eval_") not in measured:
        hint = f"Write metric_for_best_model: {' or '.join(measured)}."
        yield Problem("metric_for_best_model", f"no evaluation gives '{metric}'.", hint)


_LOOKS_AT_LOSS = ("reduce_lr_on_plateau", "greedy")

METRICS_OF = {
    "compute_accuracy": ("accuracy",),
    "predict_with_generate": ("rouge-1", "rouge-2", "rouge-l", "bleu-4"),
}
"""What LLaMA Factory measures beside the loss when a key asks for it."""


def _method(config: Values, given: Values) -> Iterator[Problem]:
    method = config["finetuning_type"]
    if method != "lora":
        for name in ("use_dora", "use_rslora", "pissa_init"):
            if config[name]:
                yield Problem(name, f"means nothing with finetuning_type: {method}.", "Leave it out.")
        for name in ("adapter_name_or_path", "loraplus_lr_ratio"):
            if name in given:
                yield Problem(name, f"means nothing with finetuning_type: {method}.", "Leave it out.")
    else:
        for name in ("use_galore", "use_apollo", "use_badam"):
            if config[name]:
                hint = "Write finetuning_type: full, or leave it out."
                yield Problem(name, "is for full fine-tuning.", hint)
    if "quantization_bit" in given:
        if method not in ("lora", "oft"):
            hint = "Write finetuning_type: lora, or leave quantization_bit out."
            yield Problem("quantization_bit", f"quantized weights cannot be trained ({method}).", hint)
        for name in ("resize_vocab", "pissa_init"):
            if config[name]:
                yield Problem(name, "cannot be done to a quantized model.", "Leave it, or quantization_bit, out.")
    if "deepspeed" in given and "fsdp" in given:
        yield Problem("fsdp", "cannot stand beside deepspeed.", "Leave one of them out.")
    deepspeed = given.get("deepspeed")
    if isinstance(deepspeed, str) and not deepspeed.startswith("{") and not Path(deepspeed).is_file():
        yield Problem("deepspeed", f"there is no file {deepspeed} below {Path.cwd()}.", "See configs/deepspeed/.")
    if config["predict_with_generate"] and config["compute_accuracy"]:
        yield Problem("compute_accuracy", "cannot stand beside predict_with_generate.", "Leave one of them out.")


def _precision(config: Values, _given: Values) -> Iterator[Problem]:
    if config["fp16"] and (config["bf16"] or config["pure_bf16"]):
        yield Problem("fp16", "cannot stand beside bf16.", "Keep bf16 on an A100 or newer, fp16 on older GPUs.")


def _loaders(config: Values, given: Values) -> Iterator[Problem]:
    if config["dataloader_num_workers"] < 1:
        for name in ("dataloader_prefetch_factor", "dataloader_persistent_workers"):
            if given.get(name):
                yield Problem(name, "is for loader processes, and there are none.", "Set dataloader_num_workers: 2.")


def _logging(config: Values, _given: Values) -> Iterator[Problem]:
    loggers = config["report_to"] if isinstance(config["report_to"], list) else [config["report_to"]]
    message = "the swanlab logger of transformers does not work with the installed swanlab."
    hint = "Write use_swanlab: true and report_to: none."
    if "swanlab" in loggers and not config["use_swanlab"]:
        yield Problem("report_to", message, hint)
    elif "all" in loggers and not config["use_swanlab"] and installed_version("swanlab"):
        yield Problem("report_to", f"all takes every logger that is installed, and {message}", "List those you want.")


def _folders(config: Values, given: Values) -> Iterator[Problem]:
    """A run and an export take the whole of their folder: `--overwrite` moves it aside with all that is in it."""
    kept = {"dataset_dir": folder_of(config)}
    if "model_name_or_path" in given:
        kept["model_name_or_path"] = Path(str(given["model_name_or_path"]))
    runs = {}
    if "output_dir" in given:
        runs["output_dir"] = Path(str(given["output_dir"]))
        if "run_name" in given:
            runs["run_name"] = runs["output_dir"].absolute().parent / str(given["run_name"])
    for name, folder in runs.items():
        yield from _lost_with(name, folder, kept)
    if "export_dir" in given:
        # Inside the run that it is made from it may stand, and goes aside with it.
        yield from _lost_with("export_dir", Path(str(given["export_dir"])), {**kept, **runs})


def _lost_with(name: str, folder: Path, others: Mapping[str, Path]) -> Iterator[Problem]:
    """The first thing that would be overwritten or moved away with a folder."""
    hint, place = "Name another folder, such as saves/NAME.", folder.resolve()
    if Path.cwd().is_relative_to(place):
        yield Problem(name, f"{folder} is the folder that you work in, or one above it.", hint)
        return
    for key, other in others.items():
        if other.resolve() == place:
            yield Problem(name, f"is the folder of {key}; its files would be overwritten.", hint)
            return
        if other.resolve().is_relative_to(place):
            yield Problem(name, f"{folder} holds the folder of {key}, which would be moved away with it.", hint)
            return
