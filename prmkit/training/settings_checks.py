"""Settings that LLaMA Factory takes and that do something else than one would think, or end the run later."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from prmkit.errors import DataError
from prmkit.files import read_json
from prmkit.training.check import Check, error, warning
from prmkit.training.entries import names_in
from prmkit.training.memory import read_model
from prmkit.training.model_folder import read_weights
from prmkit.training.runs import read_record

NAME = "settings"


def check_settings(values: Mapping[str, Any]) -> list[Check]:
    """One check for each setting that deserves a word; nothing when there is none."""
    rules = (_resuming, _said_differently, _schedule, _method, _targets, _adapter, _tokenized)
    return [check for rule in rules for check in rule(values)]


def _resuming(values: Mapping[str, Any]) -> Iterator[Check]:
    path = values.get("resume_from_checkpoint")
    if isinstance(path, str) and not (Path(path) / "trainer_state.json").is_file() and not _went_on_from(Path(path)):
        there = sorted(str(found.parent) for found in Path(path).parent.glob("checkpoint-*/trainer_state.json"))
        advice = f"There are: {', '.join(there)}" if there else "Leave it out: the newest whole checkpoint is found."
        yield error(NAME, f"resume_from_checkpoint: {path} is no whole checkpoint", advice)
    for folder in _adapters(values):
        if not (folder / "adapter_config.json").is_file():
            yield error(
                NAME, f"adapter_name_or_path: no adapter in {folder}", "Name a folder with adapter_config.json."
            )
    if values.get("save_only_model") and values.get("save_strategy", "steps") != "no":
        found = "save_only_model saves no optimizer: no checkpoint can be gone on from, and a killed run begins anew"
        yield warning(NAME, found, "Leave it out; save_total_limit: 1 saves room as well.")


def _adapters(values: Mapping[str, Any]) -> list[Path]:
    named = values.get("adapter_name_or_path")
    return [Path(folder.strip()) for folder in named.split(",")] if isinstance(named, str) else []


def _continued(values: Mapping[str, Any]) -> Path | None:
    """The adapter that is trained on: the last one, unless a new one is made over them all."""
    adapters = [] if values.get("create_new_adapter") else _adapters(values)
    return adapters[-1] if adapters else None


def _went_on_from(checkpoint: Path) -> bool:
    """Whether the run beside it went on from this checkpoint before LLaMA Factory removed it as one too old."""
    record = read_record(checkpoint.parent)
    return record is not None and str(checkpoint) in record["resumed_from"]


def _said_differently(values: Mapping[str, Any]) -> Iterator[Check]:
    if "warmup_ratio" in values:
        advice = f"Write warmup_steps: {values['warmup_ratio']} (below 1 it is a share of the run)."
        yield warning(NAME, "warmup_ratio is going away", advice)
    if "logging_dir" in values:
        yield warning(NAME, "logging_dir does nothing", "TensorBoard's folder is set by TENSORBOARD_LOGGING_DIR.")
    if values.get("overwrite_cache"):
        found = "overwrite_cache tokenises everything again at every start; changed files are noticed without it"
        yield warning(NAME, found, "Leave it out.")
    if values.get("overwrite_output_dir"):
        found = "overwrite_output_dir keeps the old run's checkpoints, and a later resume may pick one of them"
        yield warning(NAME, found, "Leave it out; train.py --overwrite moves the old run aside.")


def _schedule(values: Mapping[str, Any]) -> Iterator[Check]:
    rate = values.get("learning_rate", 5e-5)
    full = values.get("finetuning_type", "lora") in ("full", "freeze")
    usual = 1e-4 if full else 5e-3
    if rate > usual:
        kind = "full fine-tuning" if full else "LoRA"
        yield warning(NAME, f"learning_rate {rate:g} is high for {kind}", f"Usual is {1e-5 if full else 1e-4:g}.")
    if values.get("max_steps", -1) > 0 and "num_train_epochs" in values:
        found = f"max_steps: {values['max_steps']} ends the run, whatever num_train_epochs says"
        yield warning(NAME, found, "Leave one of them out.")
    if values.get("torch_compile"):
        yield warning(NAME, "torch_compile compiles anew for every length of row", "Leave it out.")
    if values.get("max_samples"):
        found = f"max_samples: only the first {values['max_samples']} rows of each dataset are used, held-out rows too"
        yield warning(NAME, found, "Leave it out for a real run.")


def _method(values: Mapping[str, Any]) -> Iterator[Check]:
    if values.get("neftune_noise_alpha"):
        yield warning(NAME, "neftune_noise_alpha adds noise that helps chatting, not scores", "Leave it out.")
    if values.get("stage", "sft") != "sft":
        found = f"stage: {values['stage']} learns something else than to write verdicts"
        yield warning(NAME, found, "Write stage: sft.")
    if values.get("train_on_prompt"):
        yield warning(NAME, "train_on_prompt learns to write prompts, not only verdicts", "Leave it out.")


# --- what is trained in the model ---------------------------------------------------------------------------------


def _targets(values: Mapping[str, Any]) -> Iterator[Check]:
    """Layers that the model does not have: all of them wrong end the run, some of them are passed over in silence."""
    if values.get("finetuning_type", "lora") not in ("lora", "oft") or values.get("use_llama_pro"):
        return
    try:
        weights = read_weights(Path(str(values["model_name_or_path"])))
    except (DataError, KeyError):
        return  # the check of the model folder tells
    if not weights:
        return
    # An output layer that shares its weights with the input is not among the saved ones.
    layers = {name.rpartition(".")[0] for name, weight in weights.items() if len(weight.shape) > 1} | {"lm_head"}
    targets = [] if _continued(values) else names_in(values.get("lora_target", "all"))
    for name in targets if targets != ["all"] else ():
        if not any(f".{layer}".endswith(f".{name}") for layer in layers):
            yield _unknown_layer("lora_target", name, layers)
    # Here whole blocks count as well, and PEFT compares the ends of the names alone.
    blocks = {".".join(parts[:end]) for name in weights if (parts := name.split(".")) for end in range(1, len(parts))}
    blocks.add("lm_head")
    for name in names_in(values.get("additional_target")):
        if not any(block.endswith(name) for block in blocks):
            yield _unknown_layer("additional_target", name, blocks)


def _unknown_layer(key: str, name: str, layers: Iterable[str]) -> Check:
    known = sorted({layer.rpartition(".")[2] for layer in layers})
    nearest = difflib.get_close_matches(name.rpartition(".")[2], known, n=1)
    there = ", ".join(layer for layer in known if not layer.isdecimal())
    hint = f"Did you mean {nearest[0]}?" if nearest else f"There are: {there}."
    return error(NAME, f"{key}: the model has no layer {name}", hint)


def _adapter(values: Mapping[str, Any]) -> Iterator[Check]:
    """An adapter that is trained on keeps the shape that it has, whatever the config says."""
    folder = _continued(values)
    if folder is None or not (folder / "adapter_config.json").is_file():
        return
    try:
        has = read_json(folder / "adapter_config.json")
    except DataError as failure:
        yield error(NAME, f"adapter_name_or_path: {failure}", "Name a whole adapter.")
        return
    if not isinstance(has, dict):
        yield error(NAME, f"adapter_name_or_path: {folder}/adapter_config.json: not an object", "Name a whole adapter.")
        return
    same = {key: (has.get(name, values[key]), values[key]) for key, name in _SHAPE.items() if key in values}
    other = [f"{key}: {asked} (it has {own})" for key, (own, asked) in same.items() if own != asked]
    targets, wanted = has.get("target_modules"), _wanted_targets(values)
    if isinstance(targets, list) and wanted and wanted != set(targets):
        other.append(f"lora_target: {values['lora_target']} (it has {','.join(sorted(targets))})")
    if other:
        found = f"adapter_name_or_path: {folder} is trained on as it is, without {', '.join(other)}"
        advice = "Write what it has, or create_new_adapter: true to merge it and train a new one."
        yield warning(NAME, found, advice)


_SHAPE = {"lora_rank": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "use_rslora": "use_rslora",
          "use_dora": "use_dora"}  # fmt: skip


def _wanted_targets(values: Mapping[str, Any]) -> set[str]:
    """The layers that `lora_target` names; none when it is not set, or when the model does not say which are all."""
    wanted = names_in(values.get("lora_target"))
    if wanted != ["all"]:
        return set(wanted)
    try:
        model = read_model(Path(str(values["model_name_or_path"])))
    except (DataError, KeyError):
        return set()
    return {name.split(".")[-2] for name in model.linear_names}


# --- rows that were tokenised before ------------------------------------------------------------------------------


def _tokenized(values: Mapping[str, Any]) -> Iterator[Check]:
    if "tokenized_path" not in values:
        return
    path = Path(str(values["tokenized_path"]))
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return  # this run writes it
    saved = (path / "dataset_dict.json").is_file() or all(
        (path / name).is_file() for name in ("state.json", "dataset_info.json")
    )
    if saved:
        found = f"tokenized_path: the rows in {path} are used, whatever dataset and template say"
        yield warning(NAME, found, "Leave it out, or name a new folder.")
    else:
        yield error(NAME, f"tokenized_path: {path} holds no saved dataset", "Leave it out, or name a new folder.")
