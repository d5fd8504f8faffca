"""Is a model folder whole? Read from its files alone: configuration, index, and the header of every weight file."""

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from prmkit.errors import DataError
from prmkit.files import read_json
from prmkit.training.check import Check, error, ok, warning

NAME = "model folder"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tiktoken.model", "qwen.tiktoken")
_HUB_NAME = re.compile(r"[\w-]+(\.[\w-]+)*/[\w.-]+")


@dataclass(frozen=True)
class Weight:
    """One tensor of a checkpoint."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        size = 1
        for length in self.shape:
            size *= length
        return size


def check_model_folder(values: Mapping[str, Any]) -> Check:
    """Configuration, tokenizer and every weight file there and whole; about ten milliseconds."""
    named = str(values["model_name_or_path"])
    folder = Path(named)
    if not folder.is_dir():
        if is_hub_name(named):
            found = f"{named} is no folder here; LLaMA Factory would download it from the hub"
            return warning(NAME, found, "Download it first, so that it can be checked: hf download")
        return error(NAME, f"model directory not found: {named}", "Download the model there.")
    if not (folder / "config.json").is_file():
        return _no_config(folder)
    problems = list(_problems(folder, trusts_code=values.get("trust_remote_code") is True))
    if problems:
        return error(NAME, f"{folder}: {'; '.join(problems)}", "Download the model again; what is whole is kept.")
    weights = read_weights(folder)
    if not weights:
        return warning(NAME, f"{folder}: whole, in an old format (.bin)", "Convert it to safetensors if you can.")
    count = sum(weight.size for weight in weights.values())
    return ok(NAME, f"{folder}: {read_json(folder / 'config.json').get('model_type')}, {count / 1e9:.3g} B parameters")


def is_hub_name(named: str) -> bool:
    """Whether a name that is no folder here is one of the hub.

    `models/Qwen2.5-7B` looks like one as well; where there is a folder `models`, the model is missing from it.
    """
    return bool(_HUB_NAME.fullmatch(named)) and not Path(named).parent.is_dir()


def _no_config(folder: Path) -> Check:
    deeper = sorted(path.parent for path in folder.glob("*/config.json"))
    deeper += sorted(path.parent for path in folder.glob("models--*/snapshots/*/config.json"))
    if deeper:
        found = f"the model's files are in {deeper[0]}, not directly in {folder}"
        return error(NAME, found, f"Move them up, or run with model_name_or_path={deeper[0]}")
    if (folder / "adapter_config.json").is_file():
        found = f"{folder} holds an adapter, not a model"
        return error(NAME, found, "Name the base model here and the adapter in adapter_name_or_path.")
    if any(folder.glob("*.gguf")):
        return error(NAME, f"{folder} holds GGUF files, which cannot be trained", "Download the original model.")
    content = "is empty" if all(path.name == ".gitkeep" for path in folder.iterdir()) else "has no config.json"
    return error(NAME, f"{folder} {content}", "Download the model there: config, tokenizer and weights.")


def _problems(folder: Path, *, trusts_code: bool) -> Iterator[str]:
    try:
        config = read_json(folder / "config.json")
    except DataError as failure:
        yield str(failure)
        return
    if not isinstance(config, dict) or not config.get("model_type"):
        yield "config.json names no model_type"
    elif "auto_map" in config and not trusts_code and not config.get("architectures"):
        yield "the model comes with its own code, which needs trust_remote_code=true"
    else:
        texts = [name for name in _SIZES if isinstance(config.get(name), str)]
        yield from (f"config.json: {name} is {config[name]!r}, not a number" for name in texts)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        yield "no tokenizer (tokenizer.json or tokenizer.model)"
    yield from _weight_problems(folder)


_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")


def _weight_problems(folder: Path) -> Iterator[str]:
    try:
        shards = _shards(folder)
    except DataError as failure:
        yield str(failure).rstrip(".")
        return
    if not shards:
        yield "no weights (model*.safetensors)"
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        yield f"{len(missing)} of the {len(shards)} weight files in the index are missing ({', '.join(missing[:3])})"
    for shard in shards:
        if shard.is_file() and (problem := _shard_problem(shard)):
            yield f"{shard.name} {problem}"


def _shards(folder: Path) -> list[Path]:
    """The weight files that transformers would load, in its order of preference.

    Raises:
        DataError: their index is damaged.
    """
    for name in (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ):
        path = folder / name
        if path.is_file():
            if path.suffix != ".json":
                return [path]
            return [folder / shard for shard in _shard_names(path)]
    return []


def _shard_names(index: Path) -> list[str]:
    try:
        return sorted({str(name) for name in read_json(index)["weight_map"].values()})
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{index}: no index of weight files. Download it again.") from error


def _shard_problem(path: Path) -> str | None:
    with path.open("rb") as stream:
        start = stream.read(40)
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the weights (git lfs pull)"
    if path.suffix != ".safetensors":
        return None if path.stat().st_size > len(start) else "is cut off"
    try:
        header = _header(path)
    except DataError:
        return "is not a whole safetensors file"
    length = struct.unpack("<Q", start[:8])[0]
    end = max((end for _, end in header.values()), default=0)
    actual = path.stat().st_size
    return None if actual == 8 + length + end else f"is cut off ({actual:,} of {8 + length + end:,} bytes)"


def _header(path: Path) -> dict[str, tuple[Weight, int]]:
    """Every tensor in the header of a safetensors file and where it ends; eight bytes of length and then JSON.

    Raises:
        DataError: there is no such header.
    """
    try:
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > path.stat().st_size:
                raise struct.error("the header is longer than the file")
            header = orjson.loads(stream.read(length))
        entries = ((name, entry) for name, entry in header.items() if name != "__metadata__")
        return {
            name: (Weight(entry["dtype"], tuple(map(int, entry["shape"]))), int(entry["data_offsets"][1]))
            for name, entry in entries
        }
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}. Download it again.") from error
    except (struct.error, ValueError, LookupError, TypeError, AttributeError, MemoryError) as error:
        raise DataError(f"{path}: not a whole safetensors file. Download it again.") from error


def read_weights(folder: Path) -> dict[str, Weight]:
    """Every tensor of a whole checkpoint in safetensors, by name; empty for other formats. Reads only the headers.

    Raises:
        DataError: an index or a header is damaged.
    """
    shards = [path for path in _shards(folder) if path.suffix == ".safetensors"]
    return {name: weight for path in shards for name, (weight, _) in _header(path).items()}
