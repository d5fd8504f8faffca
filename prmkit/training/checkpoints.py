"""Read weights and checkpoints on disk, and check that they are complete, without loading them."""

import bisect
import json
import mmap
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from prmkit.errors import DataError
from prmkit.files import read_json

NO_OPTIMIZER = "the optimizer state is missing or damaged"
"""What is wrong with a checkpoint that `save_only_model` wrote, or whose writer was killed."""


# --- safetensors --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weight:
    """One tensor of a checkpoint."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """The number of values in the tensor."""
        size = 1
        for length in self.shape:
            size *= length
        return size


@dataclass(frozen=True)
class Tensors:
    """The header of a safetensors file: https://github.com/huggingface/safetensors#format."""

    weights: Mapping[str, Weight]
    spans: Mapping[str, tuple[int, int]]
    """Tensor -> offsets in the file at which its bytes begin and end."""
    size: int
    """The size in bytes of a complete file with this header."""


_LARGEST_HEADER = 100_000_000  # the limit of the format itself


def read_header(path: Path) -> Tensors:
    """Read a safetensors header: 8 bytes with the length N (little endian), N bytes of JSON, then the tensors' bytes.

    Raises:
        DataError: the file has no such header.
    """
    try:
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(_LARGEST_HEADER, path.stat().st_size):
                raise struct.error("the header is longer than the file")
            header = orjson.loads(stream.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        weights = {name: Weight(entry["dtype"], tuple(map(int, entry["shape"]))) for name, entry in entries.items()}
        begin = 8 + length
        spans = {name: (begin + int(entry["data_offsets"][0]), begin + int(entry["data_offsets"][1]))
                 for name, entry in entries.items()}  # fmt: skip
    except OSError as failure:
        raise DataError(f"{path}: {failure.strerror}. Download it again.") from failure
    except (struct.error, ValueError, LookupError, TypeError, AttributeError) as failure:
        raise DataError(f"{path}: not a complete safetensors file. Download it again.") from failure
    return Tensors(weights, spans, max((end for _, end in spans.values()), default=begin))


def weight_files(folder: Path) -> list[Path]:
    """List the weight files that transformers would load, in its order of preference.

    Raises:
        DataError: the index of the files is damaged.
    """
    for name in (
        "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
    ):  # fmt: skip
        path = folder / name
        if path.is_file():
            return _files_in_index(path) if path.suffix == ".json" else [path]
    return []


def _files_in_index(index: Path) -> list[Path]:
    try:
        return [index.parent / name for name in sorted({str(n) for n in read_json(index)["weight_map"].values()})]
    except (KeyError, TypeError, AttributeError) as failure:
        raise DataError(f"{index}: not an index of weight files. Download it again.") from failure


def read_weights(folder: Path) -> dict[str, Weight]:
    """Return every tensor of a safetensors model by name; empty for other formats. Reads only the headers.

    Raises:
        DataError: an index or a header is damaged.
    """
    files = [path for path in weight_files(folder) if path.suffix == ".safetensors"]
    return {name: weight for path in files for name, weight in read_header(path).weights.items()}


# --- what the trainer wrote ----------------------------------------------------------------------------------------


def read_state(folder: Path) -> dict[str, Any] | None:
    """Read `trainer_state.json`; None if it is missing or damaged."""
    try:
        # Python's own parser, because a loss that is not a number is written as NaN.
        state = json.loads((folder / "trainer_state.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(state, dict) or not all(type(state.get(key)) is int for key in ("global_step", "max_steps")):
        return None
    history, tokens = state.get("log_history"), state.get("num_input_tokens_seen")
    entries = [entry for entry in history if _is_logged(entry)] if isinstance(history, list) else []
    return {**state, "log_history": entries, "num_input_tokens_seen": tokens if type(tokens) is int else 0}


def _is_logged(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("step"), int)
        and all(isinstance(entry.get(key, 0.0), int | float) for key in ("loss", "eval_loss"))
    )


TRAINER_LOG = "trainer_log.jsonl"
"""Losses, speed and time left, written by LLaMA Factory into the run folder as it trains."""


def parse_log_line(line: bytes) -> dict[str, Any] | None:
    """Parse one line of `trainer_log.jsonl`; None for a damaged line (killed process, full disk)."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    numbers = ("total_steps", "loss", "eval_loss", "lr", "throughput", "total_tokens", "vram_reserved")
    is_entry = isinstance(entry, dict) and isinstance(entry.get("current_steps"), int)
    return entry if is_entry and all(isinstance(entry.get(key, 0), int | float) for key in numbers) else None


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of `trainer_log.jsonl`, without damaged ones."""
    for line in path.read_bytes().splitlines() if path.exists() else []:
        if (entry := parse_log_line(line)) is not None:
            yield entry


# --- is it complete? ----------------------------------------------------------------------------------------------


def weights_fault(folder: Path) -> str | None:
    """Say what is wrong with a folder's weights (an adapter, or a model in one or more files), by header and size."""
    try:
        names = _weight_names(folder)
    except DataError as failure:
        return str(failure).rstrip(".")
    if not names:
        return "adapter_model.safetensors is missing"
    return next((f"{name} is not complete" for name in names if not _is_complete_file(folder / name)), None)


def _weight_names(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [name for name in ("adapter_model.safetensors", "model.safetensors") if (folder / name).exists()][:1]
    try:
        return sorted({str(name) for name in read_json(index)["weight_map"].values()})
    except (KeyError, TypeError, AttributeError) as failure:
        raise DataError(f"{index.name} is not an index.") from failure


def _is_complete_file(path: Path) -> bool:
    try:
        header = read_header(path)
        return bool(header.weights) and path.stat().st_size == header.size
    except (DataError, OSError):
        return False


def content_fault(folder: Path) -> str | None:
    """Say what is wrong with a folder of weights after reading every byte, about a second per gigabyte.

    In addition to `weights_fault`, it finds JSON files that are empty or damaged, pages of zeros in the weights (which
    a power failure leaves), and numbers that are not finite.
    """
    if fault := weights_fault(folder):
        return fault
    config = "adapter_config.json" if (folder / "adapter_model.safetensors").exists() else "config.json"
    for name in (config, *(name for name in ("tokenizer.json", "tokenizer_config.json") if (folder / name).exists())):
        try:
            if not isinstance(content := read_json(folder / name), dict) or not content:
                return f"{name} is empty"
        except DataError:
            return f"{name} is missing or damaged"
    return next((fault for name in _weight_names(folder) if (fault := _numbers_fault(folder / name))), None)


_PAGE = 4096
_EXPONENTS = {"F32": ("<u4", 0x7F800000), "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80)}
"""Type -> NumPy's type of the same size, and the bits that are all set only in infinities and NaN (IEEE 754)."""
_CHUNK = 1 << 26


def _numbers_fault(path: Path) -> str | None:
    header = read_header(path)
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for name, weight in header.weights.items():
            begin, end = header.spans[name]
            if weight.dtype in _EXPONENTS and not _is_finite(content, begin, end, *_EXPONENTS[weight.dtype]):
                return f"{path.name}: {name} contains numbers that are not finite"
        zeroed = _zeroed_tensor(content, header)
    return f"{path.name}: {zeroed} has a page of zeros" if zeroed else None


def _is_finite(content: mmap.mmap, begin: int, end: int, kind: str, exponent: int) -> bool:
    import numpy

    return all(
        bool(((numpy.frombuffer(content[start : min(start + _CHUNK, end)], kind) & exponent) != exponent).all())
        for start in range(begin, end, _CHUNK)
    )


def _zeroed_tensor(content: mmap.mmap, header: Tensors) -> str | None:
    """Name a tensor that was overwritten with a page of zeros.

    Zeros are normal in embeddings (rows), in biases, and in a tensor that has not been trained yet (LoRA's B starts
    as zeros). LoRA's A is never all zeros.
    """
    spans = sorted((*span, name) for name, span in header.spans.items() if not _may_be_zero(name, header))
    ends = [end for _, end, _ in spans]
    for page in _zero_pages(content):
        for begin, end, name in spans[bisect.bisect_right(ends, page) :]:
            if begin >= page + _PAGE:
                break
            overlap = min(end, page + _PAGE) - max(begin, page)
            if overlap >= _PAGE // 16 and ("lora_A" in name or _has_numbers(content, begin, end)):
                return name
    return None


def _may_be_zero(name: str, header: Tensors) -> bool:
    return len(header.weights[name].shape) < 2 or "embed" in name or "lm_head" in name


def _zero_pages(content: mmap.mmap) -> Iterator[int]:
    """Yield the offsets at which pages of zeros begin."""
    import numpy

    for start in range(0, len(content) // _PAGE * _PAGE, _CHUNK):
        chunk = content[start : min(start + _CHUNK, len(content) // _PAGE * _PAGE)]
        used = numpy.frombuffer(chunk, "<u8").reshape(-1, _PAGE // 8).any(axis=1)
        yield from (start + int(page) * _PAGE for page in numpy.flatnonzero(~used))


def _has_numbers(content: mmap.mmap, begin: int, end: int) -> bool:
    return any(content[start : min(start + _CHUNK, end)].strip(b"\0") for start in range(begin, end, _CHUNK))


def checkpoint_fault(folder: Path, *, contents: bool = True) -> str | None:
    """Say why training cannot be resumed from a checkpoint folder; None if the checkpoint is complete.

    Args:
        folder: `checkpoint-N`.
        contents: whether to read every byte, not only names and sizes.
    """
    if (folder / "checkpoint-is-incomplete.txt").exists():
        return "it was being written when the run ended"
    state = read_state(folder)
    if state is None:
        return "trainer_state.json is missing or damaged"
    if folder.name.startswith("checkpoint-") and folder.name != f"checkpoint-{state['global_step']}":
        return f"it is from step {state['global_step']}, not from the step in its name"
    if fault := content_fault(folder) if contents else weights_fault(folder):
        return fault
    return _optimizer_fault(folder, contents=contents)


def _optimizer_fault(folder: Path, *, contents: bool) -> str | None:
    # One process or DDP; FSDP; DeepSpeed, one file per process. torch.save writes zip files with checksums.
    optimizers = [path for name in ("optimizer.pt", "optimizer.bin", "global_step*/*optim_states.pt")
                  for path in folder.glob(name)]  # fmt: skip
    if not optimizers or not all(map(zipfile.is_zipfile, optimizers)):
        return NO_OPTIMIZER
    if not contents:
        return None
    if (folder / "optimizer.pt").exists():
        needed = ("scheduler.pt", "training_args.bin")
        if missing := [name for name in needed if not (folder / name).exists()]:
            return f"{missing[0]} is missing"
        if not list(folder.glob("rng_state*.pth")):
            return "rng_state.pth is missing"
    saved = [*optimizers, *folder.glob("*.pt"), *folder.glob("*.pth"), *folder.glob("training_args.bin")]
    return next((f"{path.name} is damaged" for path in dict.fromkeys(saved) if not _is_intact_zip(path)), None)


def _is_intact_zip(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile, ValueError, EOFError, NotImplementedError):
        return False
