"""Model folders that are not whole, each broken in one way."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prmkit.errors import DataError
from prmkit.training.check import Check, Status
from prmkit.training.model_folder import check_model_folder, read_weights


def check(folder: Path | str) -> Check:
    return check_model_folder({"model_name_or_path": str(folder)})


@pytest.fixture
def folder(micro_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(micro_model, tmp_path / "model"))


def sharded(folder: Path) -> None:
    """Save the model again in several files with an index."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="1MB")


def test_a_whole_folder(folder: Path) -> None:
    found = check(folder)
    assert (found.status, found.advice) == (Status.OK, "")
    assert "qwen2" in found.found


def test_a_whole_folder_of_several_files(folder: Path) -> None:
    whole = read_weights(folder)
    sharded(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert check(folder).status is Status.OK
    assert read_weights(folder).keys() == whole.keys()


def cut(path: Path, by: int) -> None:
    path.write_bytes(path.read_bytes()[:-by])


def index(folder: Path, text: str) -> None:
    """Put an index in the place of the weights."""
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)


def configure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def headed(path: Path, header: Any) -> None:
    """Write a safetensors file of nothing but a header."""
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)


BREAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "config is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "not JSON"),
    "config of nothing": (lambda folder: (folder / "config.json").write_text("{}"), "names no model_type"),
    "no tokenizer": (lambda folder: [path.unlink() for path in folder.glob("tokenizer.json")], "no tokenizer"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
    "an index of nothing": (lambda folder: index(folder, "{}"), "model.safetensors.index.json: no index"),
    "an index that is a list": (lambda folder: index(folder, "[]"), "model.safetensors.index.json: no index"),
    "an index of no files": (lambda folder: index(folder, '{"weight_map": 5}'), "index.json: no index"),
    "an index that is no JSON": (lambda folder: index(folder, "{"), "model.safetensors.index.json: not JSON"),
    "a size that is a text": (
        lambda folder: configure(folder, hidden_size="x"), "config.json: hidden_size is 'x', not a number"),
    "weights with a list for a header": (
        lambda folder: headed(folder / "model.safetensors", []), "model.safetensors is not a whole safetensors file"),
    "weights without a place": (
        lambda folder: headed(folder / "model.safetensors", {"a": {"dtype": "F32", "shape": [1]}}), "not a whole"),
    "weights cut off": (lambda folder: cut(folder / "model.safetensors", 100), "is cut off"),
    "weights are a page": (
        lambda folder: (folder / "model.safetensors").write_text("<html>Not found</html>"), "not a whole safetensors"),
    "weights are a pointer": (
        lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "git lfs pull"),
}  # fmt: skip


@pytest.mark.parametrize("way", BREAKS)
def test_a_broken_folder(folder: Path, way: str) -> None:
    breaks, told = BREAKS[way]
    breaks(folder)
    found = check(folder)
    assert (found.status, told in found.found) == (Status.ERROR, True), found.found
    assert found.advice


def test_one_damaged_file_hides_no_other(folder: Path) -> None:
    index(folder, "{")
    (folder / "tokenizer.json").unlink()
    found = check(folder).found
    assert "no tokenizer" in found
    assert "not JSON" in found


@pytest.mark.parametrize("text", ["{}", "[]", "{"])
def test_sizes_of_a_damaged_folder_are_an_error_of_one_line(folder: Path, text: str) -> None:
    index(folder, text)
    with pytest.raises(DataError, match=r"model\.safetensors\.index\.json"):
        read_weights(folder)


def test_a_model_that_is_missing_from_a_folder_is_no_name_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert check("models/Qwen2.5-7B").status is Status.WARNING
    (tmp_path / "models").mkdir()
    found = check("models/Qwen2.5-7B")
    assert (found.status, found.found) == (Status.ERROR, "model directory not found: models/Qwen2.5-7B")


def test_a_missing_shard_is_named(folder: Path) -> None:
    sharded(folder)
    gone = max(folder.glob("model-*.safetensors"))
    gone.unlink()
    found = check(folder)
    assert found.status is Status.ERROR
    assert "1 of the " in found.found
    assert gone.name in found.found


def test_files_one_level_too_deep(folder: Path, tmp_path: Path) -> None:
    outer = tmp_path / "outer"
    outer.mkdir()
    folder.rename(outer / "Qwen2.5-7B-Instruct")
    found = check(outer)
    assert found.status is Status.ERROR
    assert "not directly in" in found.found
    assert f"model_name_or_path={outer / 'Qwen2.5-7B-Instruct'}" in found.advice


def test_a_hub_cache_is_one_level_too_deep_as_well(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "cache" / "models--Qwen--Qwen2.5-7B" / "snapshots"
    place.mkdir(parents=True)
    folder.rename(place / "0123abc")
    assert f"model_name_or_path={place / '0123abc'}" in check(tmp_path / "cache").advice


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert check(tmp_path / "nowhere").found.startswith("model directory not found")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".gitkeep").touch()
    assert check(tmp_path / "empty").found.endswith("is empty")


def test_a_name_of_the_hub_is_only_a_warning() -> None:
    assert check("Qwen/Qwen2.5-7B-Instruct").status is Status.WARNING


def test_what_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "holds an adapter" in check(tmp_path).found
    (tmp_path / "adapter_config.json").rename(tmp_path / "model.gguf")
    assert "GGUF" in check(tmp_path).found
