"""Where a judge comes from: a training run, an exported model, or folders on the command line."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prmkit.errors import DataError, UsageError
from prmkit.files import LARGE_FILE, read_json, sha256_of, spread_blocks
from prmkit.llamafactory_schema import default_of, setting, trained_dtype
from prmkit.paths import EXPORT_NOTE, RUN_RECORD, base_model_of, export_folder, record_of
from prmkit.prompts.encoding import ChatEncoding, load_encoding
from prmkit.verdict.types import Shape


@dataclass(frozen=True)
class JudgeSource:
    """Everything needed to load a judge."""

    model: Path
    """The base model, or a complete fine-tuned model; its tokenizer is the judge's."""
    adapter: Path | None = None
    """LoRA weights on top of `model`."""
    template: str | None = None
    """LLaMA Factory's template; None parses the tokenizer's chat template."""
    default_system: str | None = None
    enable_thinking: bool | None = True
    cutoff_len: int = field(default_factory=lambda: int(default_of("cutoff_len")))
    """Maximum tokens of prompt plus answer, as in training."""
    trained_dtype: str = "float32"
    """`float32`, `bfloat16` or `float16`: the dtype of the training."""
    dtype: str = "auto"
    """The dtype to compute in: one of these, or `auto` for `trained_dtype` on a GPU and float32 on a CPU."""
    device: str = "auto"
    """A torch device, or `auto` for a GPU if there is one."""
    trust_remote_code: bool = False
    """Whether to run Python code that comes with the model. Only the user decides: files may be a stranger's."""
    rubrics: tuple[str, ...] | None = field(default=None, compare=False)
    """Hashes of the rubrics in its training rows; empty for a judge trained on other prompts, None if nothing is known
    about its training."""
    shapes: Mapping[str, Sequence[Shape]] | None = field(default=None, compare=False)
    """Evaluation type -> the shapes of the labels in its training rows, most frequent first; None if not recorded."""


# These keys change the base model while LLaMA Factory loads it; plain transformers would load a different model.
_CHANGING_KEYS = ("rope_scaling", "resize_vocab", "add_tokens", "add_special_tokens", "create_new_adapter")


def is_run(folder: Path) -> bool:
    """Whether a folder is a training run, or one of its checkpoints."""
    return record_of(folder) is not None


def judge_source_of_run(run_folder: Path) -> JudgeSource:
    """Return the judge of a training run, with the template, system prompt and lengths of its training.

    A QLoRA adapter is put on the unquantised base, as it is when it is exported.

    Args:
        run_folder: `saves/<run>`, or a checkpoint folder in it.

    Raises:
        DataError: the folder is not a run, or the run has no weights yet.
        UsageError: the run changed its base model in a way that only its export contains.
    """
    record = _record_of(run_folder)
    content = read_object(record, config=dict)
    config = content["config"]
    changing = [key for key in _CHANGING_KEYS if config.get(key)]
    if changing:
        raise UsageError(
            f"{run_folder}: trained with {', '.join(changing)}, which changes the base model as it loads. "
            f"Export it (train.py --export-only) and pass --model {export_folder(config)}."
        )
    is_adapter = setting(config, "finetuning_type") == "lora"
    weights = "adapter_config.json" if is_adapter else "config.json"
    if not (run_folder / weights).is_file():
        raise DataError(
            f"{run_folder}: no trained weights (no {weights}). Let the run finish, or pass a checkpoint folder."
        )
    check_keys(record, config, model_name_or_path=str)
    return JudgeSource(
        model=base_model_of(record.parent, content) if is_adapter else run_folder,
        adapter=run_folder if is_adapter else None,
        **_asked_with(record, config),
        trained_dtype=trained_dtype(config) or "float32",
        rubrics=_rubrics_in(record, content),
        shapes=_shapes_in(record, content),
    )


def config_of_run(folder: Path) -> dict[str, Any]:
    """Read the resolved config of a training run from its folder or, for a checkpoint, from the folder above.

    Raises:
        DataError: the folder is not a training run, or its run.json is damaged.
    """
    return dict(read_object(_record_of(folder), config=dict)["config"])


def data_of_run(folder: Path) -> Path | None:
    """Find the data of a training run, or of a checkpoint's run, where it is now; None if it is not found.

    Raises:
        DataError: the folder is not a training run, or its run.json is damaged.
    """
    from prmkit.dataset_info import data_folder_of  # needs orjson, and --help works without packages

    record = _record_of(folder)
    return data_folder_of(record.parent, read_object(record, config=dict))


def _record_of(folder: Path) -> Path:
    if record := record_of(folder):
        return record
    raise DataError(f"{folder}: not a training run (no {RUN_RECORD}). Pass a folder in saves/, or use --model.")


def _asked_with(file: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return template, system prompt, thinking mode and length, which have the same keys in a run and in an export."""
    kinds = {"template": str, "default_system": str, "enable_thinking": bool, "cutoff_len": int}
    given = {key: settings[key] for key in kinds if settings.get(key) is not None}
    check_keys(file, given, **{key: kinds[key] for key in given})
    # For LLaMA Factory, enable_thinking: null differs from an absent key.
    unset = {"enable_thinking": None} if settings.get("enable_thinking", True) is None else {}
    return {key: default_of(key) for key in kinds} | given | unset


def judge_source_of_export(folder: Path) -> JudgeSource:
    """Return the judge that `train.py --export` has merged into one model.

    Raises:
        DataError: the folder has no model, or its settings are missing.
    """
    if not (folder / "config.json").is_file():
        raise DataError(f"{folder}: no model (no config.json). Export one with: python train.py --export-only")
    settings = read_object(folder / EXPORT_NOTE)
    return JudgeSource(
        model=folder,
        **_asked_with(folder / EXPORT_NOTE, settings),
        trained_dtype=settings.get("dtype") or "float32",
        rubrics=_rubrics_in(folder / EXPORT_NOTE, settings),
        shapes=_shapes_in(folder / EXPORT_NOTE, settings),
    )


def _rubrics_in(file: Path, record: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the rubrics in a record; a record without the key is older than rubrics: the list is empty."""
    rubrics = record.get("rubrics", [])
    if not isinstance(rubrics, list):
        raise DataError(f"{file}: damaged: rubrics is not a list.")
    return tuple(map(str, rubrics))


def _shapes_in(file: Path, record: Mapping[str, Any]) -> Mapping[str, Sequence[Shape]] | None:
    """Return the shapes of the training labels in a record; None for an older record without them."""
    if record.get("label_shapes") is None:
        return None
    try:
        return {
            str(evaluation_type): tuple(Shape(tuple(map(str, each["keys"])), bool(each["nested"])) for each in shapes)
            for evaluation_type, shapes in record["label_shapes"].items()
        }
    except (AttributeError, LookupError, TypeError) as error:
        raise DataError(f"{file}: damaged: label_shapes. Create it again, or restore a backup.") from error


def encoding_of(source: JudgeSource) -> ChatEncoding:
    """Load the judge's tokenizer and template, set up as in its training. Nothing is downloaded.

    Raises:
        DataError: there is no such folder, or it has no tokenizer that can be loaded.
        UsageError: LLaMA Factory has no such template, or the tokenizer has its own code, which was not allowed to run.
    """
    check_folders(source)
    try:
        return load_encoding(
            source.model,
            source.template,
            default_system=source.default_system,
            enable_thinking=source.enable_thinking,
            trust_remote_code=source.trust_remote_code,
            local_files_only=True,
        )
    except DataError as error:
        raise needs_trust(source, error) or error from error


def needs_trust(source: JudgeSource, error: Exception) -> UsageError | None:
    """Return the error to raise if `transformers` failed because a model's own code was not allowed to run."""
    if "trust_remote_code" not in str(error):
        return None
    return UsageError(f"{source.model} comes with Python code. Read it, then add --trust-remote-code to run it.")


def check_folders(source: JudgeSource) -> None:
    """Reject a judge whose folders do not exist: the libraries would look for a mistyped folder on the internet.

    A model from the hub is accepted if it is in the hub's cache, as it is after a training run with it.

    Raises:
        DataError: a folder is missing.
    """
    for folder in (source.model, source.adapter):
        if folder is not None and not folder.is_dir() and not (folder == source.model and _in_cache(str(folder))):
            if source.adapter is not None and folder == source.model:
                raise DataError(f"{folder}: no such folder, but {source.adapter} needs this base model. Move it back.")
            raise DataError(f"{folder}: no such folder. Check --run or --model.")


def _in_cache(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:  # a path is not a valid name
        return False


# --- what makes two judges the same -----------------------------------------------------------------------------------

_TOKENIZER_FILES = ("*token*", "vocab*", "merges.txt", "*.model", "chat_template*")
_SAMPLES = 256


def fingerprint_of(source: JudgeSource) -> dict[str, Any]:
    """Return what determines a judge's scores: weights, tokenizer and settings by content, so that a copy is the same.

    Raises:
        DataError: there is no such judge.
    """
    weights = {
        name: _contents(folder, ("*.safetensors", "*.bin", "config.json", "adapter_config.json"))
        for name, folder in (("model", source.model), ("adapter", source.adapter))
        if folder is not None
    }
    settings = {"trained_dtype": source.trained_dtype, "dtype": source.dtype, "device": source.device}
    return encoding_fingerprint(source) | settings | {"weights": weights}


def encoding_fingerprint(source: JudgeSource) -> dict[str, Any]:
    """Return what determines the token ids of a judge's prompts.

    Raises:
        DataError: there is no such judge.
    """
    check_folders(source)
    return {
        "tokenizer": _contents(source.model, _TOKENIZER_FILES),
        "template": source.template,
        "default_system": source.default_system,
        "enable_thinking": source.enable_thinking,
        "cutoff_len": source.cutoff_len,
    }


def _contents(folder: Path, patterns: tuple[str, ...]) -> dict[str, str] | str:
    """Return file name -> hash; for a model in the hub's cache, its name."""
    if not folder.is_dir():
        return str(folder)
    files = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    return {file.name: _content_hash(file) for file in sorted(files)}


def _content_hash(file: Path) -> str:
    """Hash the complete file, or many parts of a large one."""
    size = file.stat().st_size
    if size <= LARGE_FILE:
        return sha256_of(file)
    parts = hashlib.sha256(str(size).encode())
    for block in spread_blocks(file, _SAMPLES):
        parts.update(block)
    return f"sampled {parts.hexdigest()}"


def described(source: JudgeSource) -> dict[str, Any]:
    """Return a source as JSON values."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(source).items()}


# --- files that may be damaged ----------------------------------------------------------------------------------------

_KINDS = {dict: "an object", str: "a string", int: "a whole number", bool: "true or false"}


def read_object(file: Path, **keys: type) -> dict[str, Any]:
    """Read a JSON file that must be an object.

    Args:
        file: written by this project or by one of the libraries that it uses.
        keys: the required keys and their types.

    Raises:
        DataError: the file is missing or damaged.
    """
    found = read_json(file)
    if not isinstance(found, dict):
        raise DataError(f"{file}: damaged: not a JSON object. Create it again, or restore a backup.")
    check_keys(file, found, **keys)
    return found


def check_keys(file: Path, found: Mapping[str, Any], **keys: type) -> None:
    """Reject an object that lacks a required key.

    Raises:
        DataError: a key is missing, or of another type.
    """
    for key, kind in keys.items():
        if not isinstance(found.get(key), kind) or (kind is int and isinstance(found[key], bool)):
            fault = f"{key} is {found[key]!r:.60}" if key in found else f"{key} is missing"
            raise DataError(f"{file}: damaged: {fault}, expected {_KINDS[kind]}. Create it again, or restore a backup.")
