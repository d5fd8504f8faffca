"""Checks of the model, adapters and checkpoints in a config.

They read only the files, without LLaMA Factory, and find what would make it fail.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from prmkit.dataset_info import split_names
from prmkit.errors import DataError
from prmkit.files import read_json
from prmkit.llamafactory_schema import setting
from prmkit.training.checkpoints import read_header, read_weights, weight_files
from prmkit.training.checks import Check, error, ok, warning
from prmkit.training.model import read_model
from prmkit.training.records import read_record

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tiktoken.model", "qwen.tiktoken")
_HUB_NAME = re.compile(r"[\w-]+(\.[\w-]+)*/[\w.-]+")
_BLOCK = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")
DOWNLOAD = "Download one, for example: hf download Qwen/Qwen2.5-7B-Instruct --local-dir model"


def check_model_folder(values: Mapping[str, Any]) -> Check:
    """Check that configuration, tokenizer and every weight file exist and are complete. Takes about 10 ms."""
    name, named = "model folder", str(values["model_name_or_path"])
    folder = Path(named)
    if not folder.is_dir():
        if is_hub_name(named):
            found = f"there is no folder {named}; LLaMA Factory would download it from the hub"
            return warning(name, found, f"Download it first, so that it can be checked: hf download {named}")
        return error(name, f"model directory not found: {named}", DOWNLOAD)
    if not (folder / "config.json").is_file():
        return _check_no_config(name, folder)
    problems = list(_model_problems(folder, trusts_code=values.get("trust_remote_code") is True))
    if problems:
        return error(name, f"{folder}: {'; '.join(problems)}", "Download the model again; complete files are kept.")
    weights = read_weights(folder)
    if not weights:
        return warning(name, f"{folder}: complete, in an old format (.bin)", "Convert it to safetensors if you can.")
    count = sum(weight.size for weight in weights.values())
    return ok(name, f"{folder}: {read_json(folder / 'config.json').get('model_type')}, {count / 1e9:.3g} B parameters")


def is_hub_name(named: str) -> bool:
    """Whether a name that is not a local folder is a name on the hub.

    `models/Qwen2.5-7B` looks like one, too; but if there is a folder `models`, the model is missing from it.
    """
    return bool(_HUB_NAME.fullmatch(named)) and not Path(named).parent.is_dir()


def _check_no_config(name: str, folder: Path) -> Check:
    deeper = sorted(path.parent for path in folder.glob("*/config.json"))
    deeper += sorted(path.parent for path in folder.glob("models--*/snapshots/*/config.json"))
    if deeper:
        found = f"the model's files are in {deeper[0]}, not directly in {folder}"
        return error(name, found, f"Move them up, or run with model_name_or_path={deeper[0]}")
    if (folder / "adapter_config.json").is_file():
        found = f"{folder} contains an adapter, not a model"
        return error(name, found, "Set model_name_or_path to the base model and adapter_name_or_path to the adapter.")
    if any(folder.glob("*.gguf")):
        return error(name, f"{folder} contains GGUF files, which cannot be trained", "Download the original model.")
    content = "is empty" if all(path.name == ".gitkeep" for path in folder.iterdir()) else "has no config.json"
    return error(name, f"{folder} {content}", DOWNLOAD)


def _model_problems(folder: Path, *, trusts_code: bool) -> Iterator[str]:
    try:
        config = read_json(folder / "config.json")
    except DataError as failure:
        yield str(failure).rstrip(".")
        return
    if not isinstance(config, dict) or not config.get("model_type"):
        yield "config.json has no model_type"
        config = {}
    elif "auto_map" in config and not trusts_code and not config.get("architectures"):
        yield "the model comes with its own code, which needs trust_remote_code=true"
    yield from (
        f"config.json: {name} is {config[name]!r}, not a number"
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
        if isinstance(config.get(name), str)
    )
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        yield "no tokenizer (tokenizer.json or tokenizer.model)"
    yield from _weight_problems(folder)
    yield from _depth_problems(folder, config.get("num_hidden_layers"))


def _weight_problems(folder: Path) -> Iterator[str]:
    try:
        files = weight_files(folder)
    except DataError as failure:
        yield str(failure).rstrip(".")
        return
    if not files:
        yield "no weights (model*.safetensors)"
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        yield f"{len(missing)} of the {len(files)} weight files in the index are missing ({', '.join(missing[:3])})"
    for path in files:
        if path.is_file() and (problem := _file_problem(path)):
            yield f"{path.name} {problem}"


def _file_problem(path: Path) -> str | None:
    with path.open("rb") as stream:
        start = stream.read(40)
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the weights (git lfs pull)"
    actual = path.stat().st_size
    if path.suffix != ".safetensors":
        return None if actual > len(start) else "is truncated"
    try:
        expected = read_header(path).size
    except DataError:
        return "is not a complete safetensors file"
    return None if actual == expected else f"is truncated ({actual:,} of {expected:,} bytes)"


def _depth_problems(folder: Path, layers: Any) -> Iterator[str]:
    """Reject a config.json with more layers than the weights, because building a billion layers would take hours."""
    try:
        blocks = {int(found[1]) for name in read_weights(folder) if (found := _BLOCK.search(name))}
    except DataError:
        return
    if isinstance(layers, int) and blocks and layers > max(blocks) + 1:
        yield f"config.json says {layers:,} layers, but the weights have {max(blocks) + 1:,}"


# --- checkpoints, adapters and layers in the config ---------------------------------------------------------------


def check_named_files(values: Mapping[str, Any]) -> list[Check]:
    """Return one check per checkpoint, adapter or layer that does not fit the config."""
    rules = (_check_checkpoint, _check_adapters, _check_layers)
    return [check for rule in rules for check in rule(values)]


def _check_checkpoint(values: Mapping[str, Any]) -> Iterator[Check]:
    path = values.get("resume_from_checkpoint")
    if isinstance(path, str) and not (Path(path) / "trainer_state.json").is_file() and not _was_used(Path(path)):
        there = sorted(str(found.parent) for found in Path(path).parent.glob("checkpoint-*/trainer_state.json"))
        advice = (
            f"Available: {', '.join(there)}"
            if there
            else "Remove it; the newest checkpoint is then found automatically."
        )
        yield error("settings", f"resume_from_checkpoint: {path} is not a checkpoint", advice)


def _was_used(checkpoint: Path) -> bool:
    """Whether this checkpoint, deleted since, was already used to resume the training run next to it."""
    record = read_record(checkpoint.parent)
    return record is not None and str(checkpoint) in record["resumed_from"]


def _adapters(values: Mapping[str, Any]) -> list[Path]:
    named = values.get("adapter_name_or_path")
    return [Path(folder.strip()) for folder in named.split(",")] if isinstance(named, str) else []


def _check_adapters(values: Mapping[str, Any]) -> Iterator[Check]:
    for folder in _adapters(values):
        if not (folder / "adapter_config.json").is_file():
            found = f"adapter_name_or_path: no adapter in {folder}"
            yield error("settings", found, "Set it to a folder with adapter_config.json.")
    if _adapters(values) and not values.get("create_new_adapter"):
        yield from _check_adapter_settings(_adapters(values)[-1], values)


_ADAPTER_SETTINGS = {
    "lora_rank": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}  # fmt: skip


def _check_adapter_settings(folder: Path, values: Mapping[str, Any]) -> Iterator[Check]:
    """Check an adapter that is trained further, because it keeps its own settings, whatever the config says."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        return
    try:
        adapter = read_json(path)
    except DataError as failure:
        yield error("settings", f"adapter_name_or_path: {failure}", "Set it to a complete adapter.")
        return
    if not isinstance(adapter, dict):
        yield error("settings", f"adapter_name_or_path: {path}: not a JSON object", "Set it to a complete adapter.")
        return
    both = {
        key: (adapter.get(name, values[key]), values[key]) for key, name in _ADAPTER_SETTINGS.items() if key in values
    }
    other = [f"{key}: {configured} (it has {actual})" for key, (actual, configured) in both.items()
             if actual != configured]  # fmt: skip
    targets, wanted = adapter.get("target_modules"), _wanted_layers(values)
    if isinstance(targets, list) and wanted and wanted != set(targets):
        other.append(f"lora_target: {values['lora_target']} (it has {','.join(sorted(targets))})")
    if other:
        found = f"adapter_name_or_path: {folder} keeps its own settings, not {', '.join(other)}"
        advice = "Write its own settings, or create_new_adapter: true to merge it and train a new one."
        yield warning("settings", found, advice)


def _wanted_layers(values: Mapping[str, Any]) -> set[str]:
    """Return the layers in `lora_target`; empty if it is not set, or if the model's layers are unknown."""
    wanted = split_names(values.get("lora_target"))
    if wanted != ["all"]:
        return set(wanted)
    try:
        model = read_model(Path(str(values["model_name_or_path"])))
    except (DataError, KeyError):
        return set()
    return {name.split(".")[-2] for name in model.linear_names}


def _check_layers(values: Mapping[str, Any]) -> Iterator[Check]:
    """Find layers that the model does not have: the run fails if all are missing, and otherwise silently skips them."""
    if setting(values, "finetuning_type") not in ("lora", "oft") or values.get("use_llama_pro"):
        return
    try:
        weights = read_weights(Path(str(values["model_name_or_path"])))
    except (DataError, KeyError):
        return  # reported by the check of the model folder
    if not weights:
        return
    # An output layer that shares its weights with the input is not among the saved ones.
    layers = {name.rpartition(".")[0] for name, weight in weights.items() if len(weight.shape) > 1} | {"lm_head"}
    continued = _adapters(values) and not values.get("create_new_adapter")
    targets = [] if continued else split_names(setting(values, "lora_target"))
    for name in targets if targets != ["all"] else ():
        if not any(f".{layer}".endswith(f".{name}") for layer in layers):
            yield _unknown_layer("lora_target", name, layers)
    # Here complete blocks also count, and PEFT compares only the ends of the names.
    blocks = {".".join(parts[:end]) for name in weights if (parts := name.split(".")) for end in range(1, len(parts))}
    blocks.add("lm_head")
    for name in split_names(values.get("additional_target")):
        if not any(block.endswith(name) for block in blocks):
            yield _unknown_layer("additional_target", name, blocks)


def _unknown_layer(key: str, name: str, layers: Iterable[str]) -> Check:
    known = sorted({layer.rpartition(".")[2] for layer in layers})
    nearest = difflib.get_close_matches(name.rpartition(".")[2], known, n=1)
    there = ", ".join(layer for layer in known if not layer.isdecimal())
    hint = f"Did you mean {nearest[0]}?" if nearest else f"Its layers: {there}."
    return error("settings", f"{key}: the model has no layer {name}", hint)
