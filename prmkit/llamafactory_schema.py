"""Read the configuration keys of the installed LLaMA Factory, and YAML files of them.

The keys, their types, choices and defaults are read from the source of its dataclasses with `ast`, because importing
them takes 7 seconds, and reading them a tenth of a second. No other module repeats a default of LLaMA Factory, so no
copy can become outdated.
"""

import ast
import importlib.util
import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from prmkit.errors import DataError, UsageError

NO_DEFAULT = object()
"""Sentinel for a default that LLaMA Factory computes when it starts."""

_ROOTS = ("ModelArguments", "DataArguments", "TrainingArguments", "FinetuningArguments", "GeneratingArguments")
# The class of transformers that LLaMA Factory's TrainingArguments extends.
_TRANSFORMERS_ROOT = "Seq2SeqTrainingArguments"
_TRANSFORMERS_FILES = ("training_args.py", "training_args_seq2seq.py", "trainer_utils.py", "debug_utils.py")


@dataclass(frozen=True)
class ConfigKey:
    """One key of LLaMA Factory's training YAML."""

    name: str
    types: frozenset[str]
    """Some of bool, int, float, str, dict, list and None; an enumeration counts as str."""
    choices: tuple[str, ...]
    """The allowed strings; empty where any value is allowed."""
    default: Any
    """`NO_DEFAULT` if the source does not give one."""


@cache
def training_keys() -> Mapping[str, ConfigKey]:
    """Return every key that `llamafactory-cli train` takes, by name.

    Raises:
        DataError: LLaMA Factory or transformers is not installed.
    """
    llamafactory, transformers = _package_folder("llamafactory"), _package_folder("transformers")
    ours = _classes([*(llamafactory / "hparams").glob("*.py"), llamafactory / "extras" / "constants.py"])
    theirs = _classes(transformers / name for name in _TRANSFORMERS_FILES)
    keys = _keys_of(_TRANSFORMERS_ROOT, theirs)
    for root in _ROOTS:
        keys |= _keys_of(root, ours)
    for name in _split_at_commas(ours):
        keys[name] = replace(keys[name], types=keys[name].types | {"list"})
    return keys


def default_of(name: str) -> Any:
    """Return LLaMA Factory's default of one key.

    Raises:
        KeyError: the installed LLaMA Factory has no such key, or computes its default when it starts.
        DataError: LLaMA Factory or transformers is not installed.
    """
    default = training_keys()[name].default
    if default is NO_DEFAULT:
        raise KeyError(name)
    return default


def setting(values: Mapping[str, Any], name: str) -> Any:
    """Return the value of a key in a config, or LLaMA Factory's default if the config does not set it."""
    return values[name] if name in values else default_of(name)


def trained_dtype(config: Mapping[str, Any]) -> str | None:
    """Return the dtype of a training config, `bfloat16` or `float16`; None if it sets neither."""
    if config.get("bf16") or config.get("pure_bf16"):
        return "bfloat16"
    return "float16" if config.get("fp16") else None


@cache
def template_names() -> tuple[str, ...]:
    """Return every chat template that LLaMA Factory registers, in LLaMA Factory's order."""
    tree = ast.parse((_package_folder("llamafactory") / "data" / "template.py").read_text())
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    registrations = (call for call in calls if getattr(call.func, "id", None) == "register_template")
    names = (keyword.value for call in registrations for keyword in call.keywords if keyword.arg == "name")
    return tuple(str(name.value) for name in names if isinstance(name, ast.Constant))


def template_sources() -> tuple[Path, ...]:
    """Return the installed files that determine what a chat template encodes."""
    folder = _package_folder("llamafactory") / "data"
    return folder / "template.py", folder / "formatter.py"


@cache
def logger_names() -> tuple[str, ...]:
    """Return every name that `report_to` accepts, except `none` and `all`."""
    tree = ast.parse((_package_folder("transformers") / "integrations" / "integration_utils.py").read_text())
    assigned = (node for node in tree.body if isinstance(node, ast.Assign))
    tables = (node.value for node in assigned if ast.unparse(node.targets[0]) == "INTEGRATION_TO_CALLBACK")
    keys = (key for table in tables if isinstance(table, ast.Dict) for key in table.keys)
    return tuple(str(key.value) for key in keys if isinstance(key, ast.Constant))


def llamafactory_version() -> str:
    """Return LLaMA Factory's installed version, without importing the package.

    Raises:
        DataError: LLaMA Factory is not installed.
    """
    _package_folder("llamafactory")
    return metadata.version("llamafactory")


def installed_version(distribution: str) -> str | None:
    """Return the version of an installed distribution; None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


REPLACEMENTS = {
    "evaluation_strategy": "Write eval_strategy.",
    "group_by_length": "Write train_sampling_strategy: group_by_length.",
    "tokenizer_name_or_path": "Remove it: the tokenizer always comes from model_name_or_path.",
    "tokenizer_name": "Remove it: the tokenizer always comes from model_name_or_path.",
    "modules_to_save": "Write additional_target: embed_tokens,lm_head (names, separated by commas).",
    "torch_dtype": "For training write bf16: true or pure_bf16: true; for the export infer_dtype: bfloat16.",
    "dtype": "For training write bf16: true or pure_bf16: true; for the export infer_dtype: bfloat16.",
    "compute_dtype": "For training write bf16: true or pure_bf16: true; for the export infer_dtype: bfloat16.",
    "save_safetensors": "Remove it: everything is saved as safetensors.",
    "experiment_name": "Write run_name or swanlab_run_name.",
    "lora_plus_scale": "Write loraplus_lr_ratio: 16.0.",
    "lora_r": "Write lora_rank.",
    "target_modules": "Write lora_target.",
    "additional_special_tokens": "Write add_special_tokens: <a>,<b> (one string, separated by commas).",
    "no_cuda": "Write use_cpu: true.",
    "use_mps_device": "Remove it: the device is found automatically.",
    "per_gpu_train_batch_size": "Write per_device_train_batch_size.",
    "per_gpu_eval_batch_size": "Write per_device_eval_batch_size.",
    "push_to_hub_token": "Remove it, and run hf auth login.",
    "include_inputs_for_metrics": "Write include_for_metrics: [inputs].",
    "use_legacy_prediction_loop": "Remove it: it no longer exists.",
    "half_precision_backend": "Remove it: it no longer exists.",
    "fp16_backend": "Remove it: it no longer exists.",
    "fp16_opt_level": "Remove it: it no longer exists.",
    "jit_mode_eval": "Remove it: it no longer exists.",
    "xpu_backend": "Write ddp_backend.",
    "max_seq_length": "Write cutoff_len.",
    "model_max_length": "Write cutoff_len, from which this one is derived.",
    "device_map": "Remove it: the model is loaded onto the training device.",
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
"""Replacements for keys of older versions and similar tools. Used only for keys that the installed LLaMA Factory does
not know."""


def _package_folder(package: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise DataError(f"{package} is not installed. Run ./run_training.sh --install-deps.")
    return Path(found.origin).parent


def _classes(paths: Iterable[Path]) -> dict[str, ast.ClassDef]:
    trees = (ast.parse(path.read_text()) for path in paths)
    return {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}


def _keys_of(class_name: str, classes: Mapping[str, ast.ClassDef]) -> dict[str, ConfigKey]:
    """Return the fields of a dataclass and its base classes, except base classes of other packages."""
    if class_name not in classes:
        return {}
    node = classes[class_name]
    keys: dict[str, ConfigKey] = {}
    for base in reversed(node.bases):
        keys |= _keys_of(ast.unparse(base), classes)
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            settings = _settings(statement.value)
            if ast.unparse(settings.get("init", ast.Constant(True))) == "True":
                keys[statement.target.id] = _key(statement.target.id, statement.annotation, settings, classes)
    return keys


def _split_at_commas(classes: Mapping[str, ast.ClassDef]) -> set[str]:
    """Return the keys that LLaMA Factory splits at commas with `split_arg`, which also accepts a list."""
    calls = (node for tree in classes.values() for node in ast.walk(tree) if isinstance(node, ast.Call))
    splits = (call.args[0] for call in calls if getattr(call.func, "id", None) == "split_arg")
    return {split.attr for split in splits if isinstance(split, ast.Attribute)}


def _settings(value: ast.expr | None) -> dict[str, ast.expr]:
    if isinstance(value, ast.Call):
        return {keyword.arg: keyword.value for keyword in value.keywords if keyword.arg}
    return {} if value is None else {"default": value}


def _key(
    name: str, annotation: ast.expr, settings: Mapping[str, ast.expr], classes: Mapping[str, ast.ClassDef]
) -> ConfigKey:
    types: set[str] = set()
    choices: list[str] = list(_listed_choices(settings.get("metadata")))
    for part in _parts(annotation):
        text = ast.unparse(part)
        if isinstance(part, ast.Subscript) and ast.unparse(part.value) == "Literal":
            values = ast.literal_eval(part.slice)
            literals = values if isinstance(values, tuple) else (values,)
            types |= {type(literal).__name__ for literal in literals}
            choices += [literal for literal in literals if isinstance(literal, str)]
        elif text in classes:
            types.add("str")
            choices += _members(classes[text])
        else:
            types.add(text.split("[")[0])
    # A list of options may also be written as one string with several of them.
    listed = () if "list" in types else tuple(choices)
    return ConfigKey(name, frozenset(types), listed, _default(settings.get("default"), classes))


def _parts(annotation: ast.expr) -> Iterator[ast.expr]:
    """Yield the members of a union, in any notation."""
    if isinstance(annotation, ast.BinOp):
        yield from _parts(annotation.left)
        yield from _parts(annotation.right)
    elif isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Optional":
        yield from _parts(annotation.slice)
        yield ast.Constant(None)
    else:
        yield annotation


def _listed_choices(settings: ast.expr | None) -> Iterator[str]:
    if isinstance(settings, ast.Dict):
        for key, value in zip(settings.keys, settings.values, strict=True):
            if isinstance(key, ast.Constant) and key.value == "choices" and isinstance(value, ast.List):
                yield from ast.literal_eval(value)


def _members(enumeration: ast.ClassDef) -> list[str]:
    values = (statement.value for statement in enumeration.body if isinstance(statement, ast.Assign))
    return [value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)]


def _default(value: ast.expr | None, classes: Mapping[str, ast.ClassDef]) -> Any:
    if isinstance(value, ast.Attribute) and ast.unparse(value.value) in classes:
        for statement in classes[ast.unparse(value.value)].body:
            if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == value.attr:
                return ast.literal_eval(statement.value)
    try:
        return NO_DEFAULT if value is None else ast.literal_eval(value)
    except ValueError:
        return NO_DEFAULT


LARGEST_FILE = 1 << 20
"""Bytes. The largest known config has 10 KB; a file this large is something else."""


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a config the way LLaMA Factory does: `1e-4` is a float, no key may appear twice, `${x}` is plain text.

    Raises:
        UsageError: the file is missing, not YAML, or not a mapping; the message gives line and column if YAML does.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        with path.open("rb") as stream:
            content = stream.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            raise UsageError(f"{path}: larger than 1 MiB, so it is not a config. Check the path.")
        loaded = OmegaConf.to_container(OmegaConf.load(io.StringIO(content.decode())))
    except RecursionError as error:
        raise UsageError(f"{path}: nested too deeply. A config is a flat list of key: value lines.") from error
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise UsageError(f"{path}: not YAML that LLaMA Factory can read. {_one_line(error)}") from error
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or 'not a mapping of keys to values'}. Check the path.") from error
    if not isinstance(loaded, dict):
        raise UsageError(f"{path}: not a mapping of keys to values.")
    if nul := [str(key) for key, value in loaded.items() if isinstance(value, str) and "\0" in value]:
        raise UsageError(f"{path}: {', '.join(nul)}: a NUL character (\\0) is not allowed. Remove it.")
    return {str(key): value for key, value in loaded.items()}


def split_assignment(text: str) -> tuple[str, str]:
    """Split `key=value` at the first `=`; a leading `--` is accepted.

    Raises:
        UsageError: there is no `=`, or nothing before it.
    """
    key, equals, value = text.removeprefix("--").partition("=")
    if not equals or not key.strip():
        raise UsageError(f"'{text}' is not key=value. Write for example lora_rank=32.")
    return key.strip(), value


def value_of(text: str) -> Any:
    """Return the value that LLaMA Factory reads from the part after `key=`; None for an empty one.

    Raises:
        ValueError: the text is not YAML.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(_one_line(error)) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
