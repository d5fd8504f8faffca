"""Where the record of a run is, and the files that its configuration names."""

from pathlib import Path

from prmkit.files import write_json
from prmkit.paths import base_model_of, export_folder, record_of
from prmkit.registered import results_folder, results_of


def test_a_checkpoint_has_the_record_of_its_run(tmp_path: Path) -> None:
    write_json(record := tmp_path / "saves" / "run" / "run.json", {})
    assert record_of(record.parent) == record_of(record.parent / "checkpoint-8") == record
    assert record_of(tmp_path / "saves") is record_of(tmp_path / "nothing" / "here") is None


def test_an_older_record_has_the_base_model_only_in_its_configuration(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    run, config = tmp_path / "saves" / "run", {"model_name_or_path": "./model"}
    for base in (None, {"path": "./model"}, {"relative": "../gone", "path": "model"}):
        assert base_model_of(run, {"config": config, "base_model": base}) == tmp_path / "model"
    named = {"config": {"model_name_or_path": "someone/model"}, "base_model": {"path": "someone/model"}}
    (tmp_path / "someone").mkdir()
    (tmp_path / "someone" / "model").write_text("a file of the same name")
    assert base_model_of(run, named) == Path("someone/model")


def test_an_export_is_where_the_configuration_says() -> None:
    assert export_folder({"export_dir": "judges/mine"}) == Path("judges/mine")
    assert {export_folder(config) for config in ({}, {"export_dir": None}, {"export_dir": ""})} == {
        Path("exported_model")
    }


def test_results_about_a_registered_run_are_beside_it(tmp_path: Path) -> None:
    version = tmp_path / "judges" / "steps" / "2"
    assert results_of(version / "run") == [version / "run" / "evaluation"]
    write_json(version / "version.json", {})
    assert results_of(version / "run") == [version / "run" / "evaluation", version.parent / "results" / "2"]
    assert results_folder(version / "run") == version.parent / "results" / "2"
