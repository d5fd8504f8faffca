"""Where a judge comes from: a training run, an exported model, or folders that the user names."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from prmkit.errors import DataError, UsageError
from prmkit.files import read_json, sha256_of
from prmkit.prompts.encoding import ChatEncoding, load_encoding

log = logging.getLogger(__name__)

DEFAULT_CUTOFF_LEN = 2048
"""LLaMA Factory's own default."""

EXPORT_FILE = "prmkit.json"
"""What an exported model must be asked with; written into its folder by `train.py --export`."""


@dataclass(frozen=True)
class JudgeSource:
    """Everything that `load_judge` needs."""

    model: Path
    """The base model, or a whole fine-tuned one; its tokenizer is the judge's."""
    adapter: Path | None = None
    """LoRA weights on top of `model`."""
    template: str | None = None
    """LLaMA Factory's template; None parses the tokenizer's chat template."""
    default_system: str | None = None
    enable_thinking: bool | None = True
    cutoff_len: int = DEFAULT_CUTOFF_LEN
    """Tokens of prompt and answer together, as in training."""
    trained_dtype: str = "float32"
    """`float32`, `bfloat16` or `float16`: what the weights were computed in while training."""
    dtype: str = "auto"
    """What to compute in: one of these, or `auto`: as trained on a GPU, float32 on a CPU."""
    device: str = "auto"
    """A torch device, or `auto`: a GPU where there is one."""
    trust_remote_code: bool = False


# These change the base model while LLaMA Factory loads it; plain transformers would load another model.
_CHANGING_KEYS = ("rope_scaling", "resize_vocab", "add_tokens", "add_special_tokens", "create_new_adapter")


def judge_source_of_run(run_folder: Path) -> JudgeSource:
    """The judge that a run of `train.py` has trained, with the template, system text and lengths of its training.

    A QLoRA adapter is put on the unquantised base, as it is when it is exported.

    Args:
        run_folder: `saves/<run>`, or a checkpoint folder in it.

    Raises:
        DataError: no run stands there, or it has left no weights yet.
        UsageError: the run changed its base model in a way that only its export carries.
    """
    record = _record_of(run_folder)
    config = _config_in(record)
    changing = [key for key in _CHANGING_KEYS if config.get(key)]
    if changing:
        raise UsageError(
            f"{run_folder}: trained with {', '.join(changing)}, which changes the base model as it loads. "
            "Export the run (train.py --export-only) and judge with --model exported_model."
        )
    if trust := bool(config.get("trust_remote_code")):
        log.warning("warning: %s was trained with trust_remote_code: Python code of the model will run", run_folder)
    is_adapter = config.get("finetuning_type", "lora") == "lora"
    weights = "adapter_config.json" if is_adapter else "config.json"
    if not (run_folder / weights).is_file():
        raise DataError(f"{run_folder}: no {weights}, so no trained weights. Let the run finish, or name a checkpoint.")
    check_keys(record, config, model_name_or_path=str)
    return JudgeSource(
        model=Path(config["model_name_or_path"]) if is_adapter else run_folder,
        adapter=run_folder if is_adapter else None,
        **_asked_with(record, config),
        trained_dtype=_dtype_of(config),
        trust_remote_code=trust,
    )


def config_of_run(folder: Path) -> dict[str, Any]:
    """The resolved configuration of a run, read from its folder or, for a checkpoint, from the one above.

    Raises:
        DataError: no run stands there, or its record is damaged.
    """
    return _config_in(_record_of(folder))


def _record_of(folder: Path) -> Path:
    for place in (folder, folder.parent):
        if (place / "run.json").is_file():
            return place / "run.json"
    raise DataError(f"{folder}: no run.json, so no run of train.py. Name a folder in saves/, or use --model.")


def _config_in(record: Path) -> dict[str, Any]:
    return dict(read_object(record, config=dict)["config"])


def _asked_with(file: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Template, system text, thinking mode and length: the same keys in a run's configuration and beside an export."""
    defaults = {"template": None, "default_system": None, "enable_thinking": True, "cutoff_len": DEFAULT_CUTOFF_LEN}
    kinds = {"template": str, "default_system": str, "enable_thinking": bool, "cutoff_len": int}
    given = {key: settings[key] for key in kinds if settings.get(key) is not None}
    check_keys(file, given, **{key: kinds[key] for key in given})
    # LLaMA Factory tells a thinking mode of null from one that is not set.
    unset = {"enable_thinking": None} if settings.get("enable_thinking", True) is None else {}
    return defaults | given | unset


def _dtype_of(config: dict[str, Any]) -> str:
    if config.get("bf16") or config.get("pure_bf16"):
        return "bfloat16"
    return "float16" if config.get("fp16") else "float32"


def judge_source_of_export(folder: Path) -> JudgeSource:
    """The judge that `train.py --export` has merged into one model.

    Raises:
        DataError: the folder holds no model, or not what it must be asked with.
    """
    if not (folder / "config.json").is_file():
        raise DataError(f"{folder}: no config.json, so no model. Export one with: python train.py --export-only")
    settings = read_object(folder / EXPORT_FILE)
    return JudgeSource(
        model=folder,
        **_asked_with(folder / EXPORT_FILE, settings),
        trained_dtype=settings.get("dtype") or "float32",
    )


def encoding_of(source: JudgeSource) -> ChatEncoding:
    """The judge's tokenizer and template, set up as in its training. Nothing is downloaded.

    Raises:
        DataError: there is no such folder, or it holds no tokenizer that can be loaded.
        UsageError: LLaMA Factory knows no such template.
    """
    check_folders(source)
    return load_encoding(
        source.model,
        source.template,
        default_system=source.default_system,
        enable_thinking=source.enable_thinking,
        trust_remote_code=source.trust_remote_code,
        local_files_only=True,
    )


def check_folders(source: JudgeSource) -> None:
    """Refuse a judge whose folders are not there: the libraries would look for a mistyped one on the internet.

    A run may have been trained on a model of the hub, which then lies in the hub's cache.

    Raises:
        DataError: one is missing.
    """
    for folder in (source.model, source.adapter):
        if folder is not None and not folder.is_dir() and not (folder == source.model and _in_cache(str(folder))):
            raise DataError(f"{folder}: no such folder.")


def _in_cache(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:  # a path is no name
        return False


def fingerprint_of(source: JudgeSource) -> dict[str, Any]:
    """What tells a judge from any other: its settings, and an adapter's hash or a model's file sizes and times.

    Raises:
        DataError: there is no such judge.
    """
    check_folders(source)
    if source.adapter:
        weights = {file.name: sha256_of(file) for file in sorted(source.adapter.glob("adapter_model.*"))}
    else:
        files = sorted(file for file in source.model.glob("*") if file.suffix in (".safetensors", ".bin"))
        weights = {file.name: f"{file.stat().st_size} bytes of {file.stat().st_mtime_ns}" for file in files}
    folders = {
        name: path.resolve() for name in ("model", "adapter") if (path := getattr(source, name)) and path.is_dir()
    }
    return described(replace(source, **folders)) | {"weights": weights}


def described(source: JudgeSource) -> dict[str, Any]:
    """A source as JSON has it."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(source).items()}


# --- files that may be damaged ----------------------------------------------------------------------------------------

_KINDS = {dict: "an object", str: "a text", int: "a whole number", bool: "true or false"}


def read_object(file: Path, **keys: type) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Args:
        file: written by this project or by one of the libraries that it stands on.
        keys: what the object must have, and of which type.

    Raises:
        DataError: the file is missing or damaged.
    """
    found = read_json(file)
    if not isinstance(found, dict):
        raise DataError(f"{file}: damaged: it holds no object. Make it anew, or restore it.")
    check_keys(file, found, **keys)
    return found


def check_keys(file: Path, found: Mapping[str, Any], **keys: type) -> None:
    """Refuse an object that has not what it must have.

    Raises:
        DataError: a key is missing, or of another type.
    """
    for key, kind in keys.items():
        if not isinstance(found.get(key), kind) or (kind is int and isinstance(found[key], bool)):
            stands = f"{key} is {found[key]!r:.60}" if key in found else f"{key} is missing"
            raise DataError(f"{file}: damaged: {stands}, expected {_KINDS[kind]}. Make it anew, or restore it.")
