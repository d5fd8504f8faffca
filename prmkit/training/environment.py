"""Find this machine's GPUs, cores and packages, and check that it is ready to train; takes milliseconds."""

import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from math import ceil
from pathlib import Path
from typing import Any

from prmkit.llamafactory_schema import installed_version, setting
from prmkit.training.checks import Check, error, ok, warning

GIBIBYTE = 1 << 30
INSTALL = "./run_training.sh --install-deps"


# --- what the machine has -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU. Sizes are bytes."""

    name: str
    total: int
    free: int
    capability: tuple[int, int]
    """CUDA compute capability; bf16, tf32 and FlashAttention-2 need 8.0 (Ampere) or higher."""


@dataclass(frozen=True)
class Machine:
    """What training can use of a machine."""

    gpus: tuple[Gpu, ...]
    cores: int
    packages: Mapping[str, str] = field(default_factory=dict)
    """Distribution name -> version, of the installed `OPTIONAL_PACKAGES`."""
    memory: int = 0
    """Free bytes of main memory; 0 if unknown."""

    @property
    def memory_budget(self) -> int:
        """Free bytes per training process: of the GPU with the least free memory or, without GPUs, of main memory."""
        return min((gpu.free for gpu in self.gpus), default=self.memory)


OPTIONAL_PACKAGES = (
    "liger-kernel", "flash-attn", "deepspeed", "bitsandbytes", "unsloth", "swanlab", "swanboard", "matplotlib",
    "galore_torch", "apollo_torch", "badam", "adam-mini", "hqq", "eetq", "rouge_chinese",
)  # fmt: skip


def this_machine() -> Machine:
    """Describe this machine without importing torch. A GPU that `CUDA_VISIBLE_DEVICES` hides does not count."""
    installed = {name: version for name in OPTIONAL_PACKAGES if (version := installed_version(name))}
    return Machine(_visible_gpus(), len(os.sched_getaffinity(0)), installed, _available_memory())


def _available_memory() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    kibibytes = (int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return next(kibibytes, 0) * 1024


def _visible_gpus() -> tuple[Gpu, ...]:
    import pynvml  # type: ignore[import-untyped]

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()  # no driver
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        identities = [pynvml.nvmlDeviceGetUUID(handle) for handle in handles]
        chosen = visible_indices(os.environ.get("CUDA_VISIBLE_DEVICES"), identities)
        return tuple(_gpu(handles[index]) for index in chosen)
    finally:
        pynvml.nvmlShutdown()


def _gpu(handle: object) -> Gpu:
    import pynvml

    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        total, free = int(memory.total), int(memory.free)
    except pynvml.NVMLError_NotSupported:
        total = free = _available_memory()  # a GPU that shares the machine's memory
    return Gpu(str(pynvml.nvmlDeviceGetName(handle)), total, free, (int(major), int(minor)))


def visible_indices(variable: str | None, identities: list[str]) -> list[int]:
    """Return the GPUs that `CUDA_VISIBLE_DEVICES` shows, as CUDA reads it: numbers or UUIDs, up to an invalid one.

    Args:
        variable: its value; None shows all.
        identities: the UUID of every GPU, in the driver's order.
    """
    if variable is None:
        return list(range(len(identities)))
    chosen: list[int] = []
    for entry in filter(None, map(str.strip, variable.split(","))):
        by_identity = [index for index, identity in enumerate(identities) if identity.startswith(entry)]
        index = int(entry) if entry.isdecimal() else (by_identity or [-1])[0]
        if not 0 <= index < len(identities):
            break
        chosen.append(index)
    return chosen


# --- is it ready? ---------------------------------------------------------------------------------------------------

TESTED_PYTHON = (3, 11)
GO_TOGETHER = ("llamafactory", "transformers", "peft", "trl", "accelerate", "datasets", "torchvision")
"""Packages whose requirements on each other are checked."""

NEEDED_BY = {
    "enable_liger_kernel": "liger-kernel",
    "use_unsloth": "unsloth",
    "deepspeed": "deepspeed",
    "use_galore": "galore_torch",
    "use_apollo": "apollo_torch",
    "use_badam": "badam",
    "use_adam_mini": "adam-mini",
    "plot_loss": "matplotlib",
    "predict_with_generate": "rouge_chinese",
}
LONGEST_NAME = 200
"""The maximum number of bytes in a run's name. File systems allow 255, but logs and renamed folders need more."""
TOO_LARGE_FOR_A_CPU = 500_000_000
QUANTIZERS = {"bnb": "bitsandbytes", "hqq": "hqq", "eetq": "eetq"}


def check_python() -> Check:
    """Check that this is the Python version with which the pinned packages were tested."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] == TESTED_PYTHON:
        return ok("Python", version)
    wanted = ".".join(map(str, TESTED_PYTHON))
    return warning("Python", version, f"The pinned versions are tested with {wanted}.")


def check_versions() -> Check:
    """Check that the installed versions fit together, by the packages' own requirements."""
    problems = list(_unmet(GO_TOGETHER))
    torch, audio = installed_version("torch"), installed_version("torchaudio")
    # torchaudio's metadata does not require a torch version, but it fails to load with another one.
    if torch and audio and torch.split("+")[0].split(".")[:2] != audio.split("+")[0].split(".")[:2]:
        problems.append(f"torchaudio {audio} does not match torch {torch}")
    if problems:
        return error("versions", "; ".join(problems), f"Install the set that was tested together: {INSTALL}")
    shown = ", ".join(f"{name} {installed_version(name)}" for name in ("llamafactory", "transformers", "torch"))
    return ok("versions", shown)


def _unmet(names: tuple[str, ...]) -> Iterator[str]:
    from packaging.requirements import Requirement

    for name in names:
        if installed_version(name) is None:
            yield f"{name} is not installed"
            continue
        for requirement in map(Requirement, metadata.requires(name) or []):
            if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
                continue
            installed = installed_version(requirement.name)
            if installed and not requirement.specifier.contains(installed, prereleases=True):
                yield f"{name} needs {requirement.name}{requirement.specifier}, but {installed} is installed"


def check_command() -> Check:
    """Check that `llamafactory-cli` is installed for this Python."""
    program = Path(sys.executable).parent / "llamafactory-cli"
    if program.exists():
        return ok("llamafactory-cli", str(program))
    elsewhere = shutil.which("llamafactory-cli")
    found = f"not installed for {sys.executable}" + (f", only for another Python ({elsewhere})" if elsewhere else "")
    return error("llamafactory-cli", found, f"Install it for this Python: {INSTALL}")


def check_gpu(values: Mapping[str, Any], machine: Machine, *, processes: int, parameters: int) -> Check:
    """Check that there are enough GPUs, that they are free, and that they support the config.

    Args:
        values: LLaMA Factory's keys.
        machine: what training can use.
        processes: the number of training processes on this machine.
        parameters: the number of parameters of the model; 0 if unknown.
    """
    if not machine.gpus:
        if parameters > TOO_LARGE_FOR_A_CPU:
            found = f"none; training {parameters / 1e9:.1f} B parameters on a CPU would take weeks"
            return error("GPU", found, "Run on a machine where nvidia-smi lists a GPU.")
        if values.get("quantization_bit") or values.get("use_unsloth") or values.get("fp8"):
            return error("GPU", "none, but the config needs one (quantization, unsloth or fp8)", "Change these keys.")
        advice = "Run on a machine where nvidia-smi lists a GPU; for GPUs of other vendors, set use_cpu=false."
        return warning("GPU", "none; training will run on the CPU, which is only fast enough for tiny models", advice)
    names = ", ".join(
        f"{gpu.name} ({gpu.free / GIBIBYTE:.0f} of {gpu.total / GIBIBYTE:.0f} GiB free)" for gpu in machine.gpus
    )
    if processes > len(machine.gpus):
        return error("GPU", f"{names}; {processes} processes requested", f"--nproc {len(machine.gpus)}")
    busy = [gpu for gpu in machine.gpus[:processes] if gpu.free < 0.9 * gpu.total]
    if busy:
        advice = "Find the process with nvidia-smi, and stop it if it is yours."
        return warning("GPU", f"{names}: in use by another process", advice)
    return ok("GPU", names)


def check_precision(values: Mapping[str, Any], dropped: Mapping[str, str]) -> Check:
    """Report the number format of the training, and the formats in the config that the machine does not support."""
    chosen = [name for name in ("pure_bf16", "bf16", "fp16", "fp8", "tf32") if values.get(name)]
    found = ", ".join(chosen) or "float32"
    missed = [name for name in ("pure_bf16", "bf16", "fp16", "tf32") if name in dropped]
    if missed:
        found += f", without {' and '.join(missed)}: {dropped[missed[0]]}"
    if not chosen and not values.get("use_cpu"):
        advice = "On an A100 or newer, bf16=true tf32=true halve the memory and take a fraction of the time."
        return warning("precision", found, advice)
    return ok("precision", found)


def check_packages(values: Mapping[str, Any], machine: Machine) -> Check:
    """Check for packages that the config needs but LLaMA Factory does not install.

    Those that `optim` and `report_to` need are covered by the check of the trainer.
    """
    needed = {key: package for key, package in NEEDED_BY.items() if values.get(key)}
    quantizer = QUANTIZERS.get(str(setting(values, "quantization_method")))
    if values.get("quantization_bit") and quantizer:
        needed["quantization_bit"] = quantizer
    missing = {package: key for key, package in needed.items() if package not in machine.packages}
    if not missing:
        return ok("packages", f"installed for {', '.join(needed)}" if needed else "none needed")
    found = "; ".join(f"{key} needs {package}, which is not installed" for package, key in missing.items())
    return error("packages", found, f"pip install {' '.join(missing)}, or remove {', '.join(missing.values())}")


def check_owned_folders(values: Mapping[str, Any]) -> Iterator[Check]:
    """Check the folders that `--overwrite` renames with everything in them: a training run's and an export's."""
    kept = {"dataset_dir": Path(str(setting(values, "dataset_dir")))}
    if "model_name_or_path" in values:
        kept["model_name_or_path"] = Path(str(values["model_name_or_path"]))
    runs = _owned_folders(values)
    export = runs.pop("export_dir", None)
    for name, folder in runs.items():
        yield from _check_overlap(name, folder, kept)
    if export is not None:
        # An export may be inside its run's folder; it is then renamed with it.
        yield from _check_overlap("export_dir", export, {**kept, **runs})


def _owned_folders(values: Mapping[str, Any]) -> dict[str, Path]:
    """Return the folders of a training run and its export, by the keys that set them."""
    folders = {}
    if "output_dir" in values:
        folders["output_dir"] = Path(str(values["output_dir"]))
        if "run_name" in values:
            folders["run_name"] = folders["output_dir"].absolute().parent / str(values["run_name"])
    if "export_dir" in values:
        folders["export_dir"] = Path(str(values["export_dir"]))
    return folders


def _check_overlap(name: str, folder: Path, others: Mapping[str, Path]) -> Iterator[Check]:
    """Find the first problem with renaming or overwriting a folder: what else would be affected."""
    hint, resolved = "Choose another folder, for example saves/NAME.", folder.resolve()
    if Path.cwd().is_relative_to(resolved):
        yield error(name, f"{folder} is the current folder, or one above it", hint)
        return
    for key, other in others.items():
        if other.resolve() == resolved:
            yield error(name, f"is the folder of {key}; its files would be overwritten", hint)
            return
        if other.resolve().is_relative_to(resolved):
            yield error(name, f"{folder} contains the folder of {key}, which would be renamed with it", hint)
            return


def check_disk(values: Mapping[str, Any], checkpoint_bytes: float | None) -> Check:
    """Check the disk space for the checkpoints kept at once, the one being written, and the final files.

    Args:
        values: LLaMA Factory's keys.
        checkpoint_bytes: the size of one checkpoint; None if unknown.
    """
    folders = {key: folder.absolute() for key, folder in _owned_folders(values).items()}
    problems = [f"{key}: {problem}" for key, folder in folders.items() if (problem := _why_not_writable(folder))]
    if problems:
        return error("disk", "; ".join(problems), "Choose another folder.")
    existing = _nearest_existing(folders["output_dir"])
    free = shutil.disk_usage(existing).free
    found = f"{free / GIBIBYTE:,.1f} GiB free in {existing}"
    if checkpoint_bytes is None:
        return ok("disk", found)
    limit = values.get("save_total_limit")
    kept = int(limit) if limit else _checkpoints(values)
    at_once = 2 if kept is None else kept + 1
    needed = checkpoint_bytes * (at_once + 0.5)
    found += f"; will keep {at_once} checkpoint{'s' * (at_once != 1)} of {_size(checkpoint_bytes)}"
    if kept is None:
        found += " or more, because without save_total_limit all are kept"
    if needed > free:
        advice = "Free some space, set save_total_limit=1, or choose an output_dir on another disk."
        return error("disk", f"{found}: not enough", advice)
    return ok("disk", found)


def _nearest_existing(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def _why_not_writable(folder: Path) -> str | None:
    """Say why no folder of this name can be created; None if it can."""
    try:
        existing = _nearest_existing(folder)
    except OSError as failure:  # a name that is too long, or a folder without permission
        return f"{folder}: {failure.strerror}"
    if not existing.is_dir():
        return f"{existing} is a file, not a folder"
    if len(os.fsencode(folder.name)) > LONGEST_NAME:
        return f"a name of {len(os.fsencode(folder.name))} bytes is too long; at most {LONGEST_NAME}"
    return None if os.access(existing, os.W_OK | os.X_OK) else f"{existing} cannot be written to"


def _size(count: float) -> str:
    return f"{count / GIBIBYTE:.1f} GiB" if count > GIBIBYTE / 10 else f"{count / (1 << 20):.0f} MiB"


def _checkpoints(values: Mapping[str, Any]) -> int | None:
    """Count the checkpoints that a run without a limit keeps; None if that depends on the number of rows."""
    strategy, steps = setting(values, "save_strategy"), float(setting(values, "save_steps"))
    max_steps = max(int(values.get("max_steps") or 0), 0)
    if strategy == "no":
        return 0
    if strategy == "steps" and steps < 1:
        return round(1 / steps)
    if strategy == "steps" and max_steps:
        return int(max_steps // steps)
    return ceil(float(setting(values, "num_train_epochs"))) if strategy == "epoch" and not max_steps else None
