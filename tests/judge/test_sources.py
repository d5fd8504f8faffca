"""Where judges come from: what tells one from another, what is asked of the hub, and damaged files."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from prmkit.errors import DataError
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


def test_a_judge_is_the_same_however_its_folders_are_written(project: Path) -> None:
    one = judge_source_of_run(Path("run"))
    other = replace(one, model=project / "run" / ".." / "model", adapter=project / "run")
    assert fingerprint_of(one) == fingerprint_of(other)
    assert fingerprint_of(one)["model"] == str(project / "model")


@pytest.mark.usefixtures("project")
def test_other_weights_settings_or_times_are_another_judge() -> None:
    run, export = judge_source_of_run(Path("run")), judge_source_of_export(Path("exported"))
    before = [fingerprint_of(run), fingerprint_of(export)]
    assert fingerprint_of(replace(run, cutoff_len=99)) != before[0]
    Path("run/adapter_model.safetensors").write_bytes(b"heights")
    os.utime("exported/model.safetensors", (0, 0))
    assert [fingerprint_of(run) == before[0], fingerprint_of(export) == before[1]] == [False, False]


@pytest.mark.usefixtures("project")
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_internet(monkeypatch: pytest.MonkeyPatch) -> None:
    for missing in (JudgeSource(Path("nowhere")), JudgeSource(Path("model"), Path("nowhere"))):
        with pytest.raises(DataError, match=r"^nowhere: no such folder\.$"):
            check_folders(missing)
        with pytest.raises(DataError, match="no such folder"):
            fingerprint_of(missing)
    monkeypatch.setattr(sources, "_in_cache", lambda name: name == "Qwen/Qwen2.5-7B")
    check_folders(JudgeSource(Path("Qwen/Qwen2.5-7B"), Path("run")))


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    ("record", "told"),
    [
        ([], "it holds no object"),
        ({}, "config is missing, expected an object"),
        ({"config": None}, "config is None"),
        ({"config": {}}, "model_name_or_path is missing, expected a text"),
        ({"config": CONFIG | {"model_name_or_path": None}}, "model_name_or_path is None"),
        ({"config": CONFIG | {"cutoff_len": "long"}}, "cutoff_len is 'long', expected a whole number"),
        ({"config": CONFIG | {"cutoff_len": True}}, "cutoff_len is True"),
        ({"config": CONFIG | {"template": 5}}, "template is 5"),
    ],
)
def test_a_damaged_record_of_a_run_is_named(record: object, told: str) -> None:
    write_json(Path("run/run.json"), record)
    with pytest.raises(DataError, match=rf"^run/run\.json: damaged: {told}"):
        judge_source_of_run(Path("run"))


@pytest.mark.usefixtures("project")
def test_a_damaged_note_beside_an_export_is_named() -> None:
    for note, told in (([], "it holds no object"), ({"cutoff_len": "512"}, "cutoff_len is '512'")):
        write_json(Path("exported/prmkit.json"), note)
        with pytest.raises(DataError, match=rf"^exported/prmkit\.json: damaged: {told}"):
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
