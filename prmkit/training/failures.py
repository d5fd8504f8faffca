"""What went wrong inside LLaMA Factory, read from its log, and what to do about it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prmkit.training.memory import savings

_OUT_OF_MEMORY = re.compile(
    r"OutOfMemoryError|CUDA out of memory|CUBLAS_STATUS_ALLOC_FAILED|DefaultCPUAllocator: can't allocate memory"
    r"|not enough memory: you tried to allocate|std::bad_alloc|^MemoryError",
    re.MULTILINE,
)
_NO_SPACE = re.compile(r"No space left on device|Disk quota exceeded")
# The last line of a traceback. torchrun and LLaMA Factory's launcher add tracebacks of their own behind the cause.
_EXCEPTION = re.compile(
    r"^(?:\[rank\d+\]: ?)?((?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Exit|Iteration)\b.*)$", re.MULTILINE
)
_NOT_THE_CAUSE = ("torch.distributed.elastic", "ChildFailedError", "subprocess.CalledProcessError")
_LAST_LINES = 15
_READ_BYTES = 400_000


def log_tail(path: Path, begin: int) -> str:
    """The end of what was written to a log from byte `begin` on; of a progress bar only its last state."""
    with path.open("rb") as stream:
        stream.seek(max(begin, path.stat().st_size - _READ_BYTES))
        text = stream.read().decode(errors="replace")
    return "\n".join(line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n"))


def told_by(log: Path, begin: int, exit_code: int, values: Mapping[str, Any]) -> str:
    """What a child that failed left in its log, from byte `begin` on; and where the log is. See `explain`."""
    return f"{explain(log_tail(log, begin), exit_code, values)}\nThe whole log: {log}"


def explain(tail: str, exit_code: int, values: Mapping[str, Any]) -> str:
    """The cause in one line, the last lines, and advice where there is some.

    Args:
        tail: from `log_tail`.
        exit_code: 128 plus the signal's number where a signal ended the child.
        values: the run's resolved config.
    """
    causes = [cause for cause in _EXCEPTION.findall(tail) if not cause.startswith(_NOT_THE_CAUSE)]
    head = causes[-1] if causes else f"exit code {exit_code}"
    lines = [line for line in tail.splitlines() if line.strip()][-_LAST_LINES:]
    advice = _advice(tail, exit_code, values)
    return "\n".join([f"LLaMA Factory failed: {head}", *(f"  | {line}" for line in lines), *advice])


def _advice(tail: str, exit_code: int, values: Mapping[str, Any]) -> list[str]:
    if _OUT_OF_MEMORY.search(tail):
        return ["Out of memory. Try, in this order:", *_memory_advice(values)]
    if exit_code == 137:
        killed = "It was killed from outside. If nobody did, the machine ran out of memory (dmesg tells):"
        return [killed, *_memory_advice(values)]
    if _NO_SPACE.search(tail):
        return ["The disk is full. Free some space, or keep fewer checkpoints: save_total_limit=1"]
    return []


def _memory_advice(values: Mapping[str, Any]) -> list[str]:
    ways = [f"  {saving.flags}  {saving.why}" for saving in savings(values)]
    half = int(values.get("cutoff_len", 2048)) // 2
    ways.append(f"  cutoff_len={half}  convert again with the same cutoff_len, so that no label is cut")
    if not values.get("deepspeed") and not values.get("fsdp"):
        ways.append("  --nproc N  several GPUs with DeepSpeed ZeRO-2: see configs/multi_gpu_zero2.yaml")
    return ways
