"""Merging: what is exported, what is never overwritten, and that the exported model renders what was trained."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from layout import STEPS
from processes import start
from safetensors import safe_open

from prmkit.errors import DataError, UsageError
from prmkit.prompts.encoding import load_encoding
from prmkit.training.export import (
    _fix_chat_template,
    _trained_encoding,
    check_target,
    export_dtype,
    export_values,
    find_source,
)
from prmkit.training.resume import checkpoint_folders

pytestmark = pytest.mark.llamafactory


def test_the_export_is_a_complete_model_in_the_trained_number_format(finished: Path) -> None:
    from safetensors.torch import load_file

    merged = load_file(finished / "exported_model" / "model.safetensors")
    base = load_file(finished / "model" / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in merged.items()} == {name: base[name].dtype for name in merged}
    changed = [name for name in merged if not merged[name].equal(base[name])]
    assert changed and all("proj" in name for name in changed), "LoRA was on the linear layers"
    assert not (finished / "exported_model" / ".part").exists() and (finished / "exported_model" / ".gitkeep").exists()


def test_the_export_says_where_it_comes_from_and_how_to_prompt_it(finished: Path) -> None:
    note = json.loads((finished / "exported_model" / "prmkit.json").read_text())
    record = json.loads((finished / "saves" / "run" / "run.json").read_text())
    assert (note["run_id"], note["adapter"]) == (record["id"], "saves/run")
    assert (note["template"], note["cutoff_len"], note["dtype"]) == ("qwen", 256, "float32")
    assert note["chat_template_renders_as_trained"] is True
    assert "config.json: rope_theta" in note["portable"]["corrected"] and note["portable"]["format_tried_with"]


def test_an_endless_chat_template_is_replaced(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(finished / "exported_model", tmp_path / "export"))
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    (folder / "chat_template.jinja").write_text(endless)
    monkeypatch.setattr("prmkit.training.export._LONGEST_RENDERING", 0.5)
    settings = {"template": "qwen"}
    assert _fix_chat_template(folder, _trained_encoding(folder, settings), settings)
    assert "99999" not in (folder / "chat_template.jinja").read_text()


def test_ollama_gets_a_context_that_holds_a_row_and_its_answer(finished: Path) -> None:
    """LLaMA Factory writes 4096, whatever was trained."""
    assert f"PARAMETER num_ctx {256 + 512}\n" in (finished / "exported_model" / "Modelfile").read_text()


def test_a_run_is_merged_into_its_own_base_model_from_any_folder(
    finished_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = finished_copy.rename(tmp_path / "moved")
    other = tmp_path / "other"
    shutil.copytree(moved / "model", other / "model")
    monkeypatch.chdir(other)
    values = export_values(find_source(moved / "saves" / "run"), Path("out"))
    assert Path(values["model_name_or_path"]).samefile(moved / "model")
    shutil.rmtree(moved / "model")
    file = moved / "saves" / "run" / "run.json"
    record = json.loads(file.read_text())
    record["base_model"]["path"] = str(moved / "model")  # where it was trained, if that was here
    file.write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"model: no such folder, but .*run needs this base model\. Move it back"):
        find_source(moved / "saves" / "run")


def test_the_same_export_again_is_there_already_and_foreign_files_are_refused(
    finished_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished_copy)
    target = Path("exported_model")
    assert check_target(target, find_source(Path("saves/run")), overwrite=False)
    checkpoint = find_source(checkpoint_folders(Path("saves/run"))[0])
    assert not check_target(target, checkpoint, overwrite=False)  # it will be moved aside
    assert not check_target(target, overwrite=False)
    (target / "prmkit.json").unlink()
    with pytest.raises(UsageError, match="exported_model has files that are not an export"):
        check_target(target, checkpoint, overwrite=False)
    shutil.rmtree(target)
    assert not check_target(target, overwrite=False)
    assert not check_target(Path("nowhere"), overwrite=False)


def test_a_checkpoint_is_exported_over_an_old_export_that_is_moved_aside(finished_copy: Path) -> None:
    checkpoint = f"saves/run/checkpoint-{STEPS - 8}"
    old = (finished_copy / "exported_model" / "model.safetensors").read_bytes()
    said = start(finished_copy, "--export-only", checkpoint).ends(0)
    assert "Exported: exported_model" in said and "Renamed exported_model to" in said
    (aside,) = finished_copy.glob("exported_model.20*")
    assert (aside / "model.safetensors").read_bytes() == old
    assert (finished_copy / "exported_model" / "model.safetensors").read_bytes() != old
    assert json.loads((finished_copy / "exported_model" / "prmkit.json").read_text())["adapter"] == checkpoint


def test_a_damaged_export_is_made_again(finished_copy: Path) -> None:
    weights = finished_copy / "exported_model" / "model.safetensors"
    complete = weights.read_bytes()
    weights.write_bytes(complete[:-10])
    assert "already exported" not in start(finished_copy, "--export-only", "saves/run").ends(0)
    assert weights.read_bytes() == complete
    assert "already exported" in start(finished_copy, "--export-only", "saves/run").ends(0)


def test_another_number_format_is_another_export(finished_copy: Path) -> None:
    start(finished_copy, "--export-only", "saves/run", "infer_dtype=bfloat16").ends(0)
    note = json.loads((finished_copy / "exported_model" / "prmkit.json").read_text())
    assert note["dtype"] == "bfloat16"
    with safe_open(finished_copy / "exported_model" / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118
    assert len(list(finished_copy.glob("exported_model.20*"))) == 1, "the earlier one is kept"


def test_what_cannot_be_exported_is_said(tmp_path: Path, finished_copy: Path) -> None:
    with pytest.raises(DataError, match=r"adapter_model\.safetensors is missing"):
        find_source(tmp_path)
    (finished_copy / "saves" / "run" / "run.json").unlink()
    with pytest.raises(DataError, match=r"no run\.json"):
        find_source(finished_copy / "saves" / "run")


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [({"bf16": True}, "bfloat16"), ({"pure_bf16": True}, "bfloat16"), ({"fp16": True}, "float16"), ({}, "float32")],
)
def test_the_number_format_is_the_one_that_was_trained_in(finished: Path, changes: dict[str, Any], dtype: str) -> None:
    config = {"model_name_or_path": str(finished / "model"), **changes}
    assert export_dtype(config) == dtype


def test_the_export_config_has_no_key_of_training(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LLaMA Factory's own parser takes it; it refuses every key of training."""
    from llamafactory.hparams.parser import _parse_infer_args

    monkeypatch.chdir(finished)
    values = export_values(find_source(finished / "saves" / "run"), finished / "out")
    _parse_infer_args(values)
    assert values["adapter_name_or_path"] == str(finished / "saves" / "run")
    full = find_source(finished / "saves" / "run")
    full.record["config"] |= {"finetuning_type": "full"}  # type: ignore[attr-defined]
    complete = export_values(full, finished / "out")
    assert "adapter_name_or_path" not in complete and complete["model_name_or_path"] == str(finished / "saves" / "run")


@pytest.mark.parametrize(
    "settings",
    [
        {"template": "qwen"},
        {"template": "qwen", "default_system": "Judge strictly; answer in JSON. 'Quotes' and \"more\"."},
        {"template": "qwen", "default_system": ""},
        {"template": "qwen3", "enable_thinking": False},
        {"template": "qwen3_nothink"},
        {"template": "chatml"},
        {"template": "default"},
    ],
    ids=str,
)
def test_the_exported_chat_template_renders_what_was_trained(
    finished: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    from transformers import AutoTokenizer

    folder = Path(shutil.copytree(finished / "exported_model", tmp_path / "export"))
    assert _fix_chat_template(folder, _trained_encoding(folder, settings), settings)
    encoding = load_encoding(
        finished / "model", settings["template"], default_system=settings.get("default_system"),
        enable_thinking=settings.get("enable_thinking", True),
    )  # fmt: skip
    prompt = "Was this step good? {{ braces }} 'x' \"y\" \\n\n步骤"
    rendered = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert rendered == encoding.prompt_ids(prompt)


def test_the_export_yaml_is_kept_beside_the_log(finished: Path) -> None:
    written = yaml.safe_load((finished / "logs" / "run.export.yaml").read_text())
    assert written["infer_dtype"] == "float32" and written["adapter_name_or_path"] == "saves/run"
