"""Layers, adapters and saved rows that a config names, compared with the files that they are about."""

import json
from pathlib import Path
from typing import Any

import pytest

from prmkit.training.check import Check, Status
from prmkit.training.settings_checks import check_settings


@pytest.fixture
def check(micro_model: Path) -> Any:
    """The settings checks of a config with a real model."""

    def settings(**values: Any) -> list[Check]:
        return check_settings({"model_name_or_path": str(micro_model), **values})

    return settings


# --- layers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "told", "advice"),
    [
        ({"lora_target": "foo"}, "lora_target: the model has no layer foo", "There are: "),
        ({"lora_target": "q_proj,vproj"}, "no layer vproj", "Did you mean v_proj?"),
        ({"lora_target": ["q_proj", "vproj"]}, "no layer vproj", "Did you mean v_proj?"),
        ({"lora_target": "all,q_proj"}, "no layer all", "There are: "),
        ({"lora_target": "input_layernorm"}, "no layer input_layernorm", "There are: "),
        ({"lora_target": "self_attn"}, "no layer self_attn", "There are: "),
        ({"lora_target": ".*q_proj"}, "no layer .*q_proj", "Did you mean q_proj?"),
        ({"additional_target": "foo"}, "additional_target: the model has no layer foo", "There are: "),
        ({"additional_target": "embed_token"}, "no layer embed_token", "Did you mean embed_tokens?"),
    ],
)
def test_layers_that_the_model_does_not_have(check: Any, values: dict[str, Any], told: str, advice: str) -> None:
    (found,) = check(**values)
    assert (found.status, told in found.found, found.advice.startswith(advice)) == (Status.ERROR, True, True), found


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"lora_target": "all"},
        {"lora_target": "q_proj,v_proj"},
        {"lora_target": "layers.0.self_attn.q_proj"},
        {"lora_target": "all", "additional_target": "embed_tokens,lm_head"},
        {"additional_target": "model.norm"},
        {"additional_target": "mlp"},
        {"lora_target": "foo", "finetuning_type": "full"},
        {"lora_target": "foo", "model_name_or_path": "someone/something"},
    ],
)
def test_layers_that_it_has(check: Any, values: dict[str, Any]) -> None:
    assert check(**values) == []


def test_a_damaged_model_is_told_by_its_own_check(check: Any, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    assert check(model_name_or_path=str(tmp_path), lora_target="foo") == []
    (tmp_path / "gone.safetensors").write_text("<html>")
    assert check(model_name_or_path=str(tmp_path), lora_target="foo") == []


# --- adapters -----------------------------------------------------------------------------------------------------

EVERY_LAYER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapter(folder: Path, **shape: Any) -> str:
    folder.mkdir()
    whole = {"r": 8, "lora_alpha": 16, "target_modules": EVERY_LAYER, **shape}
    (folder / "adapter_config.json").write_text(json.dumps(whole))
    return str(folder)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"lora_rank": 4}, "without lora_rank: 4 (it has 8)"),
        ({"lora_rank": 4, "lora_alpha": 8}, "lora_rank: 4 (it has 8), lora_alpha: 8 (it has 16)"),
        ({"lora_target": "q_proj"}, "lora_target: q_proj (it has "),
    ],
)
def test_an_adapter_keeps_its_shape(check: Any, tmp_path: Path, values: dict[str, Any], told: str) -> None:
    (found,) = check(adapter_name_or_path=adapter(tmp_path / "x"), **values)
    assert (found.status, told in found.found) == (Status.WARNING, True), found
    assert "create_new_adapter" in found.advice


def test_an_adapter_of_fewer_layers_than_all(check: Any, tmp_path: Path) -> None:
    (found,) = check(adapter_name_or_path=adapter(tmp_path / "x", target_modules=["q_proj"]), lora_target="all")
    assert "lora_target: all (it has q_proj)" in found.found


def test_an_adapter_of_the_shape_that_is_asked_for(check: Any, tmp_path: Path) -> None:
    same = {"lora_rank": 8, "lora_alpha": 16, "lora_target": "all"}
    assert check(adapter_name_or_path=adapter(tmp_path / "x"), **same) == []
    assert check(adapter_name_or_path=str(tmp_path / "x")) == []
    assert check(adapter_name_or_path=str(tmp_path / "x"), lora_rank=4, create_new_adapter=True) == []
    assert check(adapter_name_or_path=f"{adapter(tmp_path / 'y', r=4)}, {tmp_path / 'x'}", **same) == []


@pytest.mark.parametrize("text", ["[]", "{"])
def test_a_damaged_adapter(check: Any, tmp_path: Path, text: str) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    (found,) = check(adapter_name_or_path=str(tmp_path))
    assert (found.status, "adapter_config.json: not" in found.found) == (Status.ERROR, True)


# --- rows that were tokenised before ------------------------------------------------------------------------------


def test_rows_that_were_tokenised_before(check: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows"
    assert check(tokenized_path=str(path)) == []
    path.mkdir()
    assert check(tokenized_path=str(path)) == []
    (path / "notes.txt").touch()
    (found,) = check(tokenized_path=str(path))
    assert (found.status, "holds no saved dataset" in found.found) == (Status.ERROR, True)
    (path / "dataset_dict.json").touch()
    (found,) = check(tokenized_path=str(path))
    assert (found.status, "whatever dataset and template say" in found.found) == (Status.WARNING, True)


def test_a_file_is_no_place_for_rows(check: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert check(tokenized_path=str(tmp_path / "file"))[0].status is Status.ERROR


def test_what_datasets_saves_is_known_for_it(check: Any, tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_dict({"input_ids": [[1]]})
    for name, saved in (("one", rows), ("several", DatasetDict({"train": rows}))):
        saved.save_to_disk(tmp_path / name)
        assert check(tokenized_path=str(tmp_path / name))[0].status is Status.WARNING
