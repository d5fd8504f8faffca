"""Where judges come from: what makes two the same, what is asked of the hub, and damaged files."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from prmkit.errors import DataError, UsageError
from prmkit.files import write_json
from prmkit.judge import sources
from prmkit.judge.sources import (
    JudgeSource,
    check_folders,
    config_of_run,
    fingerprint_of,
    judge_source_of_export,
    judge_source_of_run,
    read_object,
)
from prmkit.judge.transformers_judge import load_model

CONFIG = {"model_name_or_path": "model", "template": "qwen", "cutoff_len": 512}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder, entered, with a run and an export; the weights are a few bytes."""
    monkeypatch.chdir(tmp_path)
    write_json(Path("run/run.json"), {"config": CONFIG})
    write_json(Path("run/adapter_config.json"), {"peft_type": "LORA"})
    Path("run/adapter_model.safetensors").write_bytes(b"weights")
    for folder in ("model", "exported"):
        write_json(Path(folder, "config.json"), {})
        Path(folder, "model.safetensors").write_bytes(b"weights")
    write_json(Path("exported/prmkit.json"), {"template": "qwen", "cutoff_len": 512})
    return tmp_path


def test_a_judge_is_the_same_wherever_its_folders_are(project: Path) -> None:
    before = fingerprint_of(judge_source_of_run(Path("run")))
    shutil.copytree(project, copy := project / "elsewhere" / "copy", ignore=lambda *_: ["elsewhere"])
    assert judge_source_of_run(copy / "run").model == copy / "model"
    assert fingerprint_of(judge_source_of_run(copy / "run")) == before


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("file", ["run/adapter_model.safetensors", "model/model.safetensors", "model/tokenizer.json"])
def test_other_contents_or_settings_are_another_judge(file: str) -> None:
    run = judge_source_of_run(Path("run"))
    before = fingerprint_of(run)
    assert fingerprint_of(replace(run, cutoff_len=99)) != before
    os.utime("model/model.safetensors", (0, 0))
    assert fingerprint_of(run) == before
    Path(file).write_bytes(b"heights")
    assert fingerprint_of(run) != before


def test_large_weights_are_hashed_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LARGE_FILE", 1 << 20)
    monkeypatch.setattr("prmkit.files._BLOCK", 4096)
    model, weights = JudgeSource(tmp_path), bytearray(4 << 20)
    prints = []
    for change in (None, 0, len(weights) - 1, len(weights) // 2):
        if change is not None:
            weights[change : change + 16384] = b"x" * len(weights[change : change + 16384])
        (tmp_path / "model.safetensors").write_bytes(weights)
        prints.append(str(fingerprint_of(model)))
    assert len(set(prints)) == 4


@pytest.mark.usefixtures("project")
def test_a_run_that_changed_its_base_model_names_its_own_export() -> None:
    write_json(Path("run/run.json"), {"config": CONFIG | {"rope_scaling": "linear", "export_dir": "elsewhere/mine"}})
    with pytest.raises(UsageError, match=r"rope_scaling.*--model elsewhere/mine"):
        judge_source_of_run(Path("run"))


def test_a_run_finds_its_base_model_from_any_folder(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the path from the run's folder, by the absolute one, or, in an older record, in a folder above."""
    monkeypatch.chdir("/")
    run, model = project / "run", project / "model"
    assert judge_source_of_run(run).model == model
    for places in ({"relative": "../model", "path": "/gone"}, {"relative": "../gone", "path": str(model)}):
        write_json(run / "run.json", {"config": CONFIG, "base_model": places})
        assert judge_source_of_run(run).model == model
    write_json(run / "run.json", {"config": CONFIG | {"model_name_or_path": "Qwen/Qwen2.5-7B"}})
    assert judge_source_of_run(run).model == Path("Qwen/Qwen2.5-7B")


@pytest.mark.usefixtures("project")
def test_a_recorded_trust_in_code_is_not_taken_over() -> None:
    write_json(Path("run/run.json"), {"config": CONFIG | {"trust_remote_code": True}})
    assert judge_source_of_run(Path("run")).trust_remote_code is False


def test_code_of_a_model_is_not_run_unless_that_is_typed(model_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(model_folders["qwen"], tmp_path / "model")
    mark = tmp_path / "it ran"
    (folder / "code.py").write_text(f"open({str(mark)!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"model_type": "mine", "auto_map": {"AutoConfig": "code.C"}})
    with pytest.raises(UsageError, match=r"comes with Python code\. Read it, then add --trust-remote-code"):
        load_model(JudgeSource(folder, template="qwen"))
    assert not mark.exists()


@pytest.mark.usefixtures("project")
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_internet(monkeypatch: pytest.MonkeyPatch) -> None:
    for missing in (JudgeSource(Path("nowhere")), JudgeSource(Path("model"), Path("nowhere"))):
        with pytest.raises(DataError, match=r"^nowhere: no such folder\. Check --run or --model\.$"):
            check_folders(missing)
        with pytest.raises(DataError, match="no such folder"):
            fingerprint_of(missing)
    with pytest.raises(DataError, match=r"^nowhere: no such folder, but run needs this base model\. Move it back\.$"):
        check_folders(JudgeSource(Path("nowhere"), Path("run")))
    monkeypatch.setattr(sources, "_in_cache", lambda name: name == "Qwen/Qwen2.5-7B")
    check_folders(JudgeSource(Path("Qwen/Qwen2.5-7B"), Path("run")))


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    ("record", "fault"),
    [
        ([], "not a JSON object"),
        ({}, "config is missing, expected an object"),
        ({"config": None}, "config is None"),
        ({"config": {}}, "model_name_or_path is missing, expected a string"),
        ({"config": CONFIG | {"model_name_or_path": None}}, "model_name_or_path is None"),
        ({"config": CONFIG | {"cutoff_len": "long"}}, "cutoff_len is 'long', expected a whole number"),
        ({"config": CONFIG | {"cutoff_len": True}}, "cutoff_len is True"),
        ({"config": CONFIG | {"template": 5}}, "template is 5"),
    ],
)
def test_a_damaged_record_of_a_run_is_named(record: object, fault: str) -> None:
    write_json(Path("run/run.json"), record)
    with pytest.raises(DataError, match=rf"^run/run\.json: damaged: {fault}"):
        judge_source_of_run(Path("run"))


@pytest.mark.usefixtures("project")
def test_a_damaged_note_in_an_export_is_named() -> None:
    for note, fault in (([], "not a JSON object"), ({"cutoff_len": "512"}, "cutoff_len is '512'")):
        write_json(Path("exported/prmkit.json"), note)
        with pytest.raises(DataError, match=rf"^exported/prmkit\.json: damaged: {fault}"):
            judge_source_of_export(Path("exported"))


@pytest.mark.usefixtures("project")
def test_what_a_run_leaves_unset_is_as_llama_factory_has_it() -> None:
    unset = dict.fromkeys(("template", "default_system", "enable_thinking", "cutoff_len"))
    write_json(Path("run/run.json"), {"config": CONFIG | unset})
    source = judge_source_of_run(Path("run"))
    assert (source.template, source.enable_thinking, source.cutoff_len) == (None, None, 2048)


def test_a_folder_with_nothing_but_a_configuration_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "resolved_config.yaml").write_text("template: qwen\n")
    with pytest.raises(DataError, match=r"no run\.json"):
        config_of_run(tmp_path)


def test_an_object_is_read_with_the_keys_that_it_must_have(tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    write_json(file, {"name": "x", "size": 3})
    assert read_object(file, name=str, size=int) == {"name": "x", "size": 3}
    with pytest.raises(DataError, match="size is 3, expected an object"):
        read_object(file, size=dict)
