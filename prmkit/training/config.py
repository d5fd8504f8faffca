"""Resolve a YAML config plus overrides, and remember where each value came from.

Values are read as LLaMA Factory would read them and overridden from the command line. Everything is checked, and all
errors are reported together. Then unset keys are derived from the data and the machine. Nothing here imports LLaMA
Factory, and derived values never change what is learned from a row, only what can run and how fast.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prmkit.dataset_info import held_out_names, read_entries, split_names
from prmkit.errors import DataError, UsageError
from prmkit.llamafactory_schema import (
    ConfigKey,
    default_of,
    llamafactory_version,
    read_yaml,
    setting,
    split_assignment,
    training_keys,
    value_of,
)
from prmkit.paths import HELD_OUT_SUFFIX
from prmkit.training.checks import (
    Check,
    check_conflicts,
    check_known_keys,
    error,
    is_accepted_anyway,
    is_secret,
    unknown_key,
)
from prmkit.training.environment import Machine, check_owned_folders, this_machine
from prmkit.training.monitoring import resolve_swanlab


@dataclass(frozen=True)
class Override:
    """One value from the command line, as it was typed; an empty string removes the key."""

    key: str
    text: str
    source: str
    """How the user typed it: `--epochs`, or `key=value`."""


@dataclass(frozen=True)
class ResolvedConfig:
    """The config with which a training run is started."""

    values: Mapping[str, Any]
    """LLaMA Factory's keys, ready for `render_yaml`."""
    sources: Mapping[str, str]
    """Key -> where its value came from: the file, the flag, or `derived: why`."""
    dropped: Mapping[str, str]
    """Key that the user set but this run leaves out -> reason."""


def parse_assignment(text: str) -> Override:
    """Read `key=value`; see `split_assignment`."""
    return Override(*split_assignment(text), "key=value")


def resolve_config(
    path: Path,
    overrides: Sequence[Override] = (),
    *,
    machine: Machine | None = None,
    torchrun: bool = False,
    files: bool = False,
) -> ResolvedConfig:
    """Read a config, apply overrides, check it, and fit it to the data and the machine.

    Takes under a second. Paths in the config are relative to the working directory, as they are for LLaMA Factory.

    Args:
        path: the YAML.
        overrides: in the order of the command line.
        machine: what training can use; None for this machine.
        torchrun: whether torchrun starts the training; it may start a single process, for DeepSpeed.
        files: if the config has errors, also report those of the model folder and the datasets.

    Raises:
        UsageError: something is wrong with the file or the overrides; the message lists all errors.
        DataError: LLaMA Factory is not installed.
    """
    keys = training_keys()
    values, sources = _read_file(path, keys)
    errors = _apply(values, sources, overrides, keys)
    overridden = {override.key: override.key in values for override in overrides}
    if values.get("trust_remote_code") and "trust_remote_code" not in overridden:
        errors.append(error("trust_remote_code", "only works on the command line", "Add trust_remote_code=true there."))
    changes = _fit_held_out(values, overridden)
    fitted = changes.applied_to(values)
    errors += check_known_keys(fitted)
    wrong = {each.name for each in errors}
    right = {key: value for key, value in fitted.items() if key not in wrong}
    errors += [*check_conflicts(right), *check_owned_folders(right)]
    if errors:
        errors += _check_inputs(fitted, {each.name for each in errors}) if files else []
        raise UsageError(_format_errors(path, errors, sources))
    _fit_machine(fitted, machine or this_machine(), torchrun=torchrun, changes=changes)
    final = changes.applied_to(values)
    origins = {**sources, **{key: f"derived: {reason}" for key, (_, reason) in changes.derived.items()}}
    return ResolvedConfig(final, {key: origins[key] for key in final}, dict(changes.dropped))


def typed_values(overrides: Sequence[Override]) -> dict[str, Any]:
    """Return the values of overrides without a config file.

    Raises:
        UsageError: something is wrong with them; the message lists all errors.
    """
    values: dict[str, Any] = {}
    errors = _apply(values, {}, overrides, training_keys())
    errors += [each for each in check_known_keys(values) if each.name in values]
    if errors:
        raise UsageError("\n".join(_format_error(each.name, each) for each in errors))
    return values


def _check_inputs(values: Mapping[str, Any], wrong: set[str]) -> list[Check]:
    from prmkit.training.data_checks import check_datasets
    from prmkit.training.model_checks import check_model_folder

    checks = {"model_name_or_path": check_model_folder, "dataset": check_datasets}
    wanted = {key: check for key, check in checks.items() if isinstance(values.get(key), str) and key not in wrong}
    found = {key: check(values) for key, check in wanted.items()}
    return [error(key, each.found, each.advice) for key, each in found.items() if each.status == "error"]


def _format_errors(path: Path, errors: Sequence[Check], sources: Mapping[str, str]) -> str:
    """List all errors of a config in one message, with keys as typed if they are not from the file."""
    count = "1 error" if len(errors) == 1 else f"{len(errors)} errors"
    typed = {key: f"{key} ({source})" for key, source in sources.items() if source != str(path)}
    lines = [f"  {_format_error(typed.get(each.name, each.name), each)}" for each in errors]
    return "\n".join([f"{path}: {count} (LLaMA Factory {llamafactory_version()}).", *lines])


def _format_error(name: str, check: Check) -> str:
    return f"{name}: {check.found}. {check.advice}".rstrip()


def render_yaml(values: Mapping[str, Any]) -> str:
    """Write a YAML that LLaMA Factory reads back as exactly these values.

    LLaMA Factory's own writer is used, because others leave a string such as `1e-4` unquoted, which it reads as a
    number.
    """
    from omegaconf import OmegaConf

    text: str = OmegaConf.to_yaml(OmegaConf.create(dict(values)))
    return text


# --- reading ------------------------------------------------------------------------------------------------------


def _read_file(path: Path, keys: Mapping[str, ConfigKey]) -> tuple[dict[str, Any], dict[str, str]]:
    values = {key: _with_no_as_word(keys.get(key), value) for key, value in read_yaml(path).items()}
    # A null changes nothing if LLaMA Factory's default is null; otherwise it is checked.
    values = {key: value for key, value in values.items() if value is not None or not _defaults_to_null(keys.get(key))}
    return values, dict.fromkeys(values, str(path))


def _defaults_to_null(key: ConfigKey | None) -> bool:
    return key is not None and key.default is None


def _apply(
    values: dict[str, Any], sources: dict[str, str], overrides: Iterable[Override], keys: Mapping[str, ConfigKey]
) -> list[Check]:
    """Apply overrides to `values` and `sources`; return what is wrong with them."""
    errors = []
    seen: dict[str, Override] = {}
    for override in overrides:
        before = seen.setdefault(override.key, override)
        if before.text != override.text and not is_secret(override.key):
            typed = f"{before.text} ({before.source}) and {override.text} ({override.source})"
            errors.append(error(override.key, f"is given twice: {typed}", "Keep one."))
        try:
            value = _typed_value(keys.get(override.key), override.text)
        except ValueError as failure:
            errors.append(error(override.key, f"'{override.text}' is not a YAML value: {failure}"))
            continue
        if value is not None:
            values[override.key] = value
            sources[override.key] = override.source
            continue
        if override.key not in keys and override.key not in values:
            errors.append(unknown_key(override.key, keys))
        values.pop(override.key, None)
        sources.pop(override.key, None)
    return errors


def _typed_value(key: ConfigKey | None, text: str) -> Any:
    """Return the value of a string on the command line, with the type that LLaMA Factory gives its own `key=value`.

    A key that takes a string keeps the text as typed, unless it is a YAML list: `run_name=123` is the string "123", and
    `default_system="Judge: be strict"` is not a mapping.

    Raises:
        ValueError: the string is not YAML.
    """
    takes_string = key is not None and "str" in key.types
    try:
        value = _with_no_as_word(key, value_of(text))
    except ValueError:
        if takes_string:
            return text
        raise
    if key is not None and is_accepted_anyway(key.name, value):
        return value
    if key is not None and takes_string and type(value).__name__ not in key.types | {"NoneType", "list"}:
        return text
    return value


def _with_no_as_word(key: ConfigKey | None, value: Any) -> Any:
    # YAML reads an unquoted `no` as false, and LLaMA Factory then finds no strategy of that name.
    return "no" if value is False and key is not None and "no" in key.choices else value


# --- values derived from the data and the machine -----------------------------------------------------------------

NO_GPU = "this machine has no GPU"
AMPERE = (8, 0)

EVALUATION_KEYS = (
    "eval_dataset", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "do_eval", "compute_accuracy",
    "per_device_eval_batch_size", "load_best_model_at_end", "metric_for_best_model", "greater_is_better",
    "early_stopping_steps",
)  # fmt: skip
"""Keys that are meaningless without rows to evaluate on."""

BATCH_BYTES = 3_000_000
"""Bytes of text per preprocessing batch. 2,000 rows of 30,000 characters took 2.75 GB with 1,000 rows per batch and
1.15 GB with 100, at the same speed."""
ROWS_PER_WORKER = 500
"""Rows per preprocessing worker: fewer rows are tokenized faster than a worker starts."""


@dataclass
class _Changes:
    """Changes made while deriving values."""

    derived: dict[str, tuple[Any, str]] = field(default_factory=dict)
    """Key -> new value and reason."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Key to leave out -> reason."""

    def drop(self, values: Mapping[str, Any], names: Iterable[str], reason: str) -> None:
        """Leave out those of `names` that have a value other than null and false."""
        self.dropped |= {name: reason for name in names if name in values and values[name] not in (None, False)}

    def applied_to(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values with these changes."""
        merged = {**values, **{name: value for name, (value, _) in self.derived.items()}}
        return {name: value for name, value in merged.items() if name not in self.dropped}


def _fit_held_out(values: Mapping[str, Any], overridden: Mapping[str, bool]) -> _Changes:
    """Derive the held-out split from the dataset, and leave evaluation out if there are no held-out rows.

    Args:
        values: as the user set them, unchecked.
        overridden: key on the command line -> whether it still has a value; False if it was removed.
    """
    changes = _Changes()
    if overridden.get("eval_dataset") is False:
        changes.drop(values, EVALUATION_KEYS, "eval_dataset was removed")
        return changes
    names, requested = split_names(values.get("dataset")), split_names(values.get("eval_dataset"))
    follows = "dataset" in overridden and requested and "eval_dataset" not in overridden
    try:
        known = list(read_entries(Path(str(setting(values, "dataset_dir")))))
    except DataError:
        known = held_out_names(names, [name + HELD_OUT_SUFFIX for name in names])  # reported by the checks
    splits = held_out_names(names, known)
    if not follows and (not requested or requested != held_out_names(names, requested) or requested == splits):
        return changes
    if not splits:
        changes.drop(values, EVALUATION_KEYS, f"{', '.join(names)} has no held-out rows")
    elif splits != requested:
        changes.derived["eval_dataset"] = (",".join(splits), "the held-out split of the dataset")
    return changes


def _fit_machine(values: Mapping[str, Any], machine: Machine, *, torchrun: bool, changes: _Changes) -> None:
    if "do_train" not in values:
        changes.derived["do_train"] = (True, "required for training")
    if values.get("use_cpu") or (not machine.gpus and "use_cpu" not in values):
        _fit_cpu(values, machine, changes)
    elif machine.gpus:
        _fit_gpus(values, machine, changes)
    if "ddp_backend" in values and not torchrun:
        changes.dropped["ddp_backend"] = "only one process trains"
    elif values.get("ddp_backend") == "nccl" and not machine.gpus:
        changes.derived["ddp_backend"] = ("gloo", NO_GPU)
    _fit_preprocessing(values, machine, changes)
    if "per_device_eval_batch_size" not in values and (values.get("eval_dataset") or values.get("val_size")):
        rows = default_of("per_device_eval_batch_size")
        reason = f"LLaMA Factory's default of {rows} keeps the logits of {rows} rows in memory, tens of GB on long rows"
        changes.derived["per_device_eval_batch_size"] = (1, reason)
    if values.get("neat_packing") and values.get("include_num_input_tokens_seen") == "non_padding":
        reason = "the Trainer miscounts in packed rows, whose attention masks are not ones and zeros"
        changes.derived["include_num_input_tokens_seen"] = ("all", reason)
    _fit_swanlab(values, machine, changes)


def _fit_cpu(values: Mapping[str, Any], machine: Machine, changes: _Changes) -> None:
    reason = "use_cpu is set" if machine.gpus else NO_GPU
    if "use_cpu" not in values:
        changes.derived["use_cpu"] = (True, reason)
    half = ("bf16", "fp16", "pure_bf16", "tf32", "bf16_full_eval", "fp16_full_eval")
    changes.drop(values, (*half, "enable_liger_kernel", "deepspeed"), reason)
    if values.get("flash_attn") == "fa2":
        changes.dropped["flash_attn"] = reason


def _fit_gpus(values: Mapping[str, Any], machine: Machine, changes: _Changes) -> None:
    weakest = min(machine.gpus, key=lambda gpu: gpu.capability)
    if weakest.capability < AMPERE:
        reason = f"{weakest.name} does not support bf16"
        if values.get("bf16") and "fp16" not in values:
            changes.derived["fp16"] = (True, reason)
        changes.drop(values, ("bf16", "pure_bf16", "bf16_full_eval"), reason)
        changes.drop(values, ("tf32",), f"{weakest.name} does not support tf32")
    half = any(values.get(name) for name in ("bf16", "fp16", "pure_bf16"))
    has_flash_attention = "flash-attn" in machine.packages and weakest.capability >= AMPERE
    if "flash_attn" not in values and has_flash_attention and half:
        changes.derived["flash_attn"] = ("fa2", "flash-attn is installed: faster than SDPA on long rows")
    if values.get("flash_attn") == "fa2" and not has_flash_attention:
        changes.dropped["flash_attn"] = "flash-attn is not installed for this GPU; torch's SDPA gives the same results"
    if "enable_liger_kernel" not in values and "liger-kernel" in machine.packages and not values.get("torch_compile"):
        changes.derived["enable_liger_kernel"] = (True, "liger-kernel is installed: faster, and smaller logits")


def _fit_preprocessing(values: Mapping[str, Any], machine: Machine, changes: _Changes) -> None:
    rows, size = _estimate_rows(values)
    maximum = max(1, min(machine.cores, rows // ROWS_PER_WORKER if rows else 16))
    requested = values.get("preprocessing_num_workers")
    if requested is None or requested > maximum:
        reason = "one per core" if maximum == machine.cores else f"enough for {rows} rows"
        changes.derived["preprocessing_num_workers"] = (maximum, reason)
    if "preprocessing_batch_size" not in values and rows:
        batch = max(16, BATCH_BYTES // max(1, size // rows))
        if batch < 1000:
            reason = f"rows of {size // rows:,} bytes; a larger batch only costs memory"
            changes.derived["preprocessing_batch_size"] = (batch, reason)


def _estimate_rows(values: Mapping[str, Any]) -> tuple[int, int]:
    """Estimate rows and bytes of the dataset from the first megabyte of each file; zeros without local files."""
    try:
        entries = read_entries(Path(str(setting(values, "dataset_dir"))))
    except DataError:
        return 0, 0
    total = rows = 0
    for name in split_names(values.get("dataset")):
        file = entries[name].file if name in entries else None
        if file is None or not file.is_file():
            continue
        with file.open("rb") as stream:
            sample = stream.read(1 << 20)
        if sample:
            total += file.stat().st_size
            rows += max(1, round(file.stat().st_size * max(1, sample.count(b"\n")) / len(sample)))
    return rows, total


def _fit_swanlab(values: Mapping[str, Any], machine: Machine, changes: _Changes) -> None:
    if not values.get("use_swanlab"):
        return
    mode, reason = resolve_swanlab(values, machine.packages)
    if mode is None:
        changes.drop(values, [name for name in values if "swanlab" in name], reason)
    elif mode != values.get("swanlab_mode"):
        changes.derived["swanlab_mode"] = (mode, reason)
