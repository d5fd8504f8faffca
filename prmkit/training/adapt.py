"""Fit a config to the data and the machine: what is derived, what is left out, and why.

Nothing here changes what is learnt from a row; it is about what can run, and how fast.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from prmkit.errors import DataError
from prmkit.paths import HELD_OUT_SUFFIX
from prmkit.training.entries import Shape, folder_of, held_out_names, names_in, read_entries, shape_of
from prmkit.training.machine import Machine
from prmkit.training.swanlab_mode import resolve_swanlab

NO_GPU = "this machine has no GPU"
AMPERE = (8, 0)

EVALUATION_KEYS = (
    "eval_dataset", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "do_eval", "compute_accuracy",
    "per_device_eval_batch_size", "load_best_model_at_end", "metric_for_best_model", "greater_is_better",
    "early_stopping_steps",
)  # fmt: skip
"""What means nothing when there is nothing to evaluate on."""

BATCH_BYTES = 3_000_000
"""Text that one preprocessing batch holds. 2,000 rows of 30,000 characters took 2.75 GB at 1,000 rows a batch and
1.15 GB at 100, at the same speed."""
ROWS_PER_WORKER = 500
"""Fewer rows are tokenised faster than a worker process starts."""


@dataclass
class Adaptation:
    """What fitting changed, collected."""

    derived: dict[str, tuple[Any, str]] = field(default_factory=dict)
    """Key to new value and reason."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Key to reason."""

    def drop(self, values: Mapping[str, Any], names: Iterable[str], reason: str) -> None:
        """Leave out those of `names` that say something."""
        self.dropped |= {name: reason for name in names if name in values and values[name] not in (None, False)}

    def applied_to(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values after fitting."""
        merged = {**values, **{name: value for name, (value, _) in self.derived.items()}}
        return {name: value for name, value in merged.items() if name not in self.dropped}


def fit_held_out(values: Mapping[str, Any], overridden: Mapping[str, bool]) -> Adaptation:
    """Let the held-out side follow the dataset, and do without evaluation where there is none.

    Args:
        values: as the user set them, unchecked.
        overridden: keys that the command line names; False for those that it takes out of the file.
    """
    adaptation = Adaptation()
    if overridden.get("eval_dataset") is False:
        adaptation.drop(values, EVALUATION_KEYS, "eval_dataset was taken out")
        return adaptation
    names, asked = names_in(values.get("dataset")), names_in(values.get("eval_dataset"))
    follows = "dataset" in overridden and asked and "eval_dataset" not in overridden
    try:
        known = list(read_entries(folder_of(values)))
    except DataError:
        known = held_out_names(names, [name + HELD_OUT_SUFFIX for name in names])  # the preflight tells
    sides = held_out_names(names, known)
    if not follows and (not asked or asked != held_out_names(names, asked) or asked == sides):
        return adaptation
    if sides:
        if sides != asked:
            adaptation.derived["eval_dataset"] = (",".join(sides), "the held-out side of the dataset")
    else:
        adaptation.drop(values, EVALUATION_KEYS, f"{', '.join(names)} has no held-out rows")
    return adaptation


def fit_machine(values: Mapping[str, Any], machine: Machine, *, torchrun: bool, adaptation: Adaptation) -> None:
    """Fit checked values to the machine.

    Args:
        values: checked, with the held-out side in place.
        machine: what training can count on.
        torchrun: whether torchrun starts the training.
        adaptation: what changes is added here.
    """
    if "do_train" not in values:
        adaptation.derived["do_train"] = (True, "without it LLaMA Factory trains nothing")
    if values.get("use_cpu") or (not machine.gpus and "use_cpu" not in values):
        _fit_cpu(values, machine, adaptation)
    elif machine.gpus:
        _fit_gpus(values, machine, adaptation)
    _fit_backend(values, machine, adaptation, torchrun=torchrun)
    _fit_preprocessing(values, machine, adaptation)
    if "per_device_eval_batch_size" not in values and (values.get("eval_dataset") or values.get("val_size")):
        reason = "LLaMA Factory's 8 hold the logits of eight rows at once, tens of GB on long rows"
        adaptation.derived["per_device_eval_batch_size"] = (1, reason)
    _fit_swanlab(values, machine, adaptation)


def _fit_cpu(values: Mapping[str, Any], machine: Machine, adaptation: Adaptation) -> None:
    reason = "use_cpu is set" if machine.gpus else NO_GPU
    if "use_cpu" not in values:
        adaptation.derived["use_cpu"] = (True, reason)
    half = ("bf16", "fp16", "pure_bf16", "tf32", "bf16_full_eval", "fp16_full_eval")
    adaptation.drop(values, (*half, "enable_liger_kernel", "deepspeed"), reason)
    if values.get("flash_attn") == "fa2":
        adaptation.dropped["flash_attn"] = reason


def _fit_gpus(values: Mapping[str, Any], machine: Machine, adaptation: Adaptation) -> None:
    weakest = min(machine.gpus, key=lambda gpu: gpu.capability)
    if weakest.capability < AMPERE:
        reason = f"{weakest.name} knows no bf16"
        if values.get("bf16") and "fp16" not in values:
            adaptation.derived["fp16"] = (True, reason)
        adaptation.drop(values, ("bf16", "pure_bf16", "bf16_full_eval"), reason)
        adaptation.drop(values, ("tf32",), f"{weakest.name} knows no tf32")
    half = any(values.get(name) for name in ("bf16", "fp16", "pure_bf16"))
    has_flash_attention = "flash-attn" in machine.packages and weakest.capability >= AMPERE
    if "flash_attn" not in values and has_flash_attention and half:
        adaptation.derived["flash_attn"] = ("fa2", "flash-attn is installed: faster than SDPA on long rows")
    if values.get("flash_attn") == "fa2" and not has_flash_attention:
        adaptation.dropped["flash_attn"] = "flash-attn is not installed for this GPU; torch's SDPA does the same"
    if "enable_liger_kernel" not in values and "liger-kernel" in machine.packages:
        adaptation.derived["enable_liger_kernel"] = (True, "liger-kernel is installed: faster, and no whole logits")


def _fit_backend(values: Mapping[str, Any], machine: Machine, adaptation: Adaptation, *, torchrun: bool) -> None:
    if "ddp_backend" not in values:
        return
    if not torchrun:
        adaptation.dropped["ddp_backend"] = "only one process trains"
    elif values["ddp_backend"] == "nccl" and not machine.gpus:
        adaptation.derived["ddp_backend"] = ("gloo", NO_GPU)


def _fit_preprocessing(values: Mapping[str, Any], machine: Machine, adaptation: Adaptation) -> None:
    shape = _shape(values)
    most = max(1, min(machine.cores, 16 if shape is None else shape.rows // ROWS_PER_WORKER))
    asked = values.get("preprocessing_num_workers")
    if asked is None or asked > most:
        enough = f"{machine.cores} cores" if most == machine.cores else f"{shape.rows if shape else 0} rows"
        adaptation.derived["preprocessing_num_workers"] = (most, f"enough for {enough}")
    if "preprocessing_batch_size" not in values and shape is not None:
        rows = max(16, BATCH_BYTES // max(1, shape.bytes_per_row))
        if rows < 1000:
            reason = f"rows of {shape.bytes_per_row:,} bytes; more at once only take memory"
            adaptation.derived["preprocessing_batch_size"] = (rows, reason)


def _shape(values: Mapping[str, Any]) -> Shape | None:
    try:
        entries = read_entries(folder_of(values))
    except DataError:
        return None
    return shape_of(entries[name] for name in names_in(values.get("dataset")) if name in entries)


def _fit_swanlab(values: Mapping[str, Any], machine: Machine, adaptation: Adaptation) -> None:
    if not values.get("use_swanlab"):
        return
    choice = resolve_swanlab(values, machine.packages)
    if choice.mode is None:
        adaptation.drop(values, [name for name in values if "swanlab" in name], choice.reason)
    elif choice.mode != values.get("swanlab_mode"):
        adaptation.derived["swanlab_mode"] = (choice.mode, choice.reason)
