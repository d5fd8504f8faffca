"""What this machine has: GPUs, cores, and the packages that make training faster or possible."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

GIBIBYTE = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU. Sizes are bytes."""

    name: str
    total: int
    free: int
    capability: tuple[int, int]
    """CUDA compute capability; from 8.0 (Ampere) on bf16, tf32 and FlashAttention-2 work."""


@dataclass(frozen=True)
class Machine:
    """What training can count on."""

    gpus: tuple[Gpu, ...]
    cores: int
    packages: Mapping[str, str] = field(default_factory=dict)
    """Versions of the installed ones out of `OPTIONAL_PACKAGES`, by distribution name."""
    memory: int = 0
    """Bytes of main memory that can be had; 0 when it is not known."""

    @property
    def room(self) -> int:
        """Bytes that each training process can have: of the GPU with least to spare, or else of main memory."""
        return min((gpu.free for gpu in self.gpus), default=self.memory)


OPTIONAL_PACKAGES = (
    "liger-kernel", "flash-attn", "deepspeed", "bitsandbytes", "unsloth", "swanlab", "swanboard", "matplotlib",
    "galore_torch", "apollo_torch", "badam", "adam-mini", "hqq", "eetq", "rouge_chinese",
)  # fmt: skip


def this_machine() -> Machine:
    """Look at this machine; takes milliseconds, because torch is not asked.

    `CUDA_VISIBLE_DEVICES` is respected, so a GPU that is hidden does not count.
    """
    installed = {name: version for name in OPTIONAL_PACKAGES if (version := installed_version(name))}
    return Machine(_visible_gpus(), len(os.sched_getaffinity(0)), installed, _available_memory())


def _available_memory() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    kibibytes = (int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return next(kibibytes, 0) * 1024


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution; None when it is not there."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


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


def visible_indices(setting: str | None, identities: list[str]) -> list[int]:
    """Which GPUs `CUDA_VISIBLE_DEVICES` shows, as CUDA reads it: numbers or UUIDs, up to the first that is none.

    Args:
        setting: the variable's text; None shows all.
        identities: the UUID of every GPU, in the driver's order.
    """
    if setting is None:
        return list(range(len(identities)))
    chosen: list[int] = []
    for entry in filter(None, map(str.strip, setting.split(","))):
        by_identity = [index for index, identity in enumerate(identities) if identity.startswith(entry)]
        index = int(entry) if entry.isdecimal() else (by_identity or [-1])[0]
        if not 0 <= index < len(identities):
            break
        chosen.append(index)
    return chosen
