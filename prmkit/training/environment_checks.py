"""Is this machine ready to train? Versions, programs, GPUs, packages, disk space and monitoring; no heavy imports."""

import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from math import ceil
from pathlib import Path
from typing import Any

from prmkit.training.check import Check, error, ok, warning
from prmkit.training.machine import GIBIBYTE, Machine, installed_version

INSTALL = "./run_training.sh --install-deps"
TESTED_PYTHON = (3, 11)
GO_TOGETHER = ("llamafactory", "transformers", "peft", "trl", "accelerate", "datasets", "torchvision")
"""Packages whose own demands on other versions are looked at."""

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
"""Bytes. File systems take 255, and logs and folders that are moved aside get longer names than the run."""
TOO_LARGE_FOR_A_CPU = 500_000_000
QUANTIZERS = {"bnb": "bitsandbytes", "hqq": "hqq", "eetq": "eetq"}


def check_python() -> Check:
    """The Python that the pinned versions were tested with."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] == TESTED_PYTHON:
        return ok("Python", version)
    wanted = ".".join(map(str, TESTED_PYTHON))
    return warning("Python", version, f"The pinned versions are tested with {wanted}.")


def check_versions() -> Check:
    """Do the installed versions go together, by what the packages themselves demand? Takes milliseconds."""
    problems = list(_unmet(GO_TOGETHER))
    torch, audio = installed_version("torch"), installed_version("torchaudio")
    # torchaudio demands nothing of torch in its metadata and then fails to load.
    if torch and audio and torch.split("+")[0].split(".")[:2] != audio.split("+")[0].split(".")[:2]:
        problems.append(f"torchaudio {audio} is for another torch than {torch}")
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
                yield f"{name} needs {requirement.name}{requirement.specifier}, and {installed} is installed"


def check_command() -> Check:
    """`llamafactory-cli` beside this Python, where its other programs are too."""
    program = Path(sys.executable).parent / "llamafactory-cli"
    if program.exists():
        return ok("llamafactory-cli", str(program))
    elsewhere = shutil.which("llamafactory-cli")
    found = f"not beside {sys.executable}" + (f", but in {elsewhere}, for another Python" if elsewhere else "")
    return error("llamafactory-cli", found, f"Install it for this Python: {INSTALL}")


def check_gpu(values: Mapping[str, Any], machine: Machine, *, processes: int, parameters: int) -> Check:
    """GPUs there, enough of them, not taken by somebody else, and able to do what the config asks of them.

    Args:
        values: LLaMA Factory's keys.
        machine: what training can count on.
        processes: how many train on this machine.
        parameters: of the model; 0 when it is not known.
    """
    if not machine.gpus:
        if parameters > TOO_LARGE_FOR_A_CPU:
            found = f"none, and {parameters / 1e9:.1f} B parameters would train for weeks on a CPU"
            return error("GPU", found, "Start where nvidia-smi shows a GPU.")
        if values.get("quantization_bit") or values.get("use_unsloth") or values.get("fp8"):
            return error(
                "GPU", "none, and the config asks for one (quantization, unsloth or fp8)", "Change these keys."
            )
        advice = "Start where nvidia-smi shows a GPU; set use_cpu=false for another maker's."
        return warning("GPU", "none: training on the CPU, for tiny models only", advice)
    names = ", ".join(
        f"{gpu.name} ({gpu.free / GIBIBYTE:.0f} of {gpu.total / GIBIBYTE:.0f} GiB free)" for gpu in machine.gpus
    )
    if processes > len(machine.gpus):
        return error("GPU", f"{names}; {processes} processes asked for", f"--nproc {len(machine.gpus)}")
    busy = [gpu for gpu in machine.gpus[:processes] if gpu.free < 0.9 * gpu.total]
    if busy:
        return warning("GPU", f"{names}: another process is on it", "Look with nvidia-smi, and stop it if it is yours.")
    return ok("GPU", names)


def check_precision(values: Mapping[str, Any], dropped: Mapping[str, str]) -> Check:
    """The numbers that are trained in, and what the machine could not do of what the config asked for."""
    chosen = [name for name in ("pure_bf16", "bf16", "fp16", "fp8", "tf32") if values.get(name)]
    found = ", ".join(chosen) or "float32"
    missed = [name for name in ("pure_bf16", "bf16", "fp16", "tf32") if name in dropped]
    if missed:
        found += f", without {' and '.join(missed)}: {dropped[missed[0]]}"
    if not chosen and not values.get("use_cpu"):
        advice = "bf16=true tf32=true take half the memory and a fraction of the time on an A100 or newer."
        return warning("precision", found, advice)
    return ok("precision", found)


def check_packages(values: Mapping[str, Any], machine: Machine) -> Check:
    """Packages that a switch in the config asks for and that LLaMA Factory does not bring.

    Those of `optim` and `report_to` are known to transformers alone: see the check of the trainer.
    """
    needed = {key: package for key, package in NEEDED_BY.items() if values.get(key)}
    quantizer = QUANTIZERS.get(str(values.get("quantization_method", "bnb")))
    if values.get("quantization_bit") and quantizer:
        needed["quantization_bit"] = quantizer
    missing = {package: key for key, package in needed.items() if package not in machine.packages}
    if not missing:
        return ok("packages", f"nothing is missing for {', '.join(needed)}" if needed else "no switch asks for one")
    found = ", ".join(f"{package} is missing for {key}" for package, key in missing.items())
    return error("packages", found, f"pip install {' '.join(missing)}, or leave out: {', '.join(missing.values())}")


def check_disk(values: Mapping[str, Any], checkpoint_bytes: float | None) -> Check:
    """Room for the checkpoints that are kept at once, the one that is being written, and the final files.

    Args:
        values: LLaMA Factory's keys.
        checkpoint_bytes: of one checkpoint; None when it is not known.
    """
    folder = Path(str(values.get("output_dir", "trainer_output"))).absolute()
    places = {"output_dir": folder}
    if "run_name" in values:
        places["run_name"] = folder.parent / str(values["run_name"])
    if "export_dir" in values:
        places["export_dir"] = Path(str(values["export_dir"])).absolute()
    problems = [f"{key}: {problem}" for key, place in places.items() if (problem := _cannot_be_made(place))]
    if problems:
        return error("disk", "; ".join(problems), "Choose another folder.")
    existing = _nearest_existing(folder)
    free = shutil.disk_usage(existing).free
    found = f"{free / GIBIBYTE:,.1f} GiB free in {existing}"
    if checkpoint_bytes is None:
        return ok("disk", found)
    limit = values.get("save_total_limit")
    kept = int(limit) if limit else _checkpoints(values)
    at_once = 2 if kept is None else kept + 1
    needed = checkpoint_bytes * (at_once + 0.5)
    found += f"; {at_once} checkpoint{'s' * (at_once != 1)} of {_size(checkpoint_bytes)} at once"
    if kept is None:
        found += " at least: without save_total_limit all are kept"
    if needed > free:
        advice = "save_total_limit=1, save_only_model=true (cannot be resumed), or an output_dir with more room."
        return error("disk", f"{found}: not enough", advice)
    return ok("disk", found)


def _nearest_existing(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def _cannot_be_made(folder: Path) -> str | None:
    """Why there can be no folder of this name, if it is so."""
    try:
        existing = _nearest_existing(folder)
    except OSError as failure:  # a name that is too long, or a folder that may not be looked into
        return f"{folder}: {failure.strerror}"
    if not existing.is_dir():
        return f"{existing} is a file, not a folder"
    if len(os.fsencode(folder.name)) > LONGEST_NAME:
        return f"a name of {len(os.fsencode(folder.name))} bytes is too long; at most {LONGEST_NAME}"
    return None if os.access(existing, os.W_OK | os.X_OK) else f"{existing} cannot be written to"


def _size(count: float) -> str:
    return f"{count / GIBIBYTE:.1f} GiB" if count > GIBIBYTE / 10 else f"{count / (1 << 20):.0f} MiB"


def _checkpoints(values: Mapping[str, Any]) -> int | None:
    """How many checkpoints a run without a limit keeps; None where that depends on the number of rows."""
    strategy, steps = values.get("save_strategy", "steps"), float(values.get("save_steps", 500))
    max_steps = max(int(values.get("max_steps") or 0), 0)
    if strategy == "no":
        return 0
    if strategy == "steps" and steps < 1:
        return round(1 / steps)
    if strategy == "steps" and max_steps:
        return int(max_steps // steps)
    return ceil(float(values.get("num_train_epochs", 3))) if strategy == "epoch" and not max_steps else None


def check_swanlab(values: Mapping[str, Any], dropped: Mapping[str, str], sources: Mapping[str, str]) -> Check:
    """Where SwanLab puts the run; decided when the config was resolved."""
    if "use_swanlab" in dropped:
        reason, _, advice = dropped["use_swanlab"].partition("; ")
        return warning("SwanLab", f"off: {reason}", advice.capitalize())
    if not values.get("use_swanlab"):
        return ok("SwanLab", "off")
    mode = values.get("swanlab_mode", "cloud")
    reason = sources.get("swanlab_mode", "")
    said = f" ({reason.removeprefix('derived: ')})" if reason.startswith("derived") else ""
    return ok("SwanLab", f"{mode}, project {values.get('swanlab_project', 'llamafactory')}{said}")
