"""The files that a config names, each damaged in one way: models, datasets, held-out rows, adapters, saved rows."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prmkit.errors import DataError
from prmkit.training.checkpoints import read_weights
from prmkit.training.checks import Check, Status
from prmkit.training.data_checks import check_datasets, check_held_out
from prmkit.training.model_checks import check_model_folder, check_named_files

# --- the model ----------------------------------------------------------------------------------------------------


def model_check(folder: Path | str) -> Check:
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


def test_a_complete_folder(folder: Path) -> None:
    found = model_check(folder)
    assert (found.status, found.advice) == (Status.OK, "")
    assert "qwen2" in found.found


def test_a_complete_folder_of_several_files(folder: Path) -> None:
    complete = read_weights(folder)
    sharded(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert model_check(folder).status is Status.OK
    assert read_weights(folder).keys() == complete.keys()


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
    "config of nothing": (lambda folder: (folder / "config.json").write_text("{}"), "has no model_type"),
    "no tokenizer": (lambda folder: [path.unlink() for path in folder.glob("tokenizer.json")], "no tokenizer"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
    "an index of nothing": (lambda folder: index(folder, "{}"), "model.safetensors.index.json: not an index"),
    "an index that is a list": (lambda folder: index(folder, "[]"), "model.safetensors.index.json: not an index"),
    "an index of no files": (lambda folder: index(folder, '{"weight_map": 5}'), "index.json: not an index"),
    "an index that is no JSON": (lambda folder: index(folder, "{"), "model.safetensors.index.json: not JSON"),
    "a size that is a string": (
        lambda folder: configure(folder, hidden_size="x"), "config.json: hidden_size is 'x', not a number"),
    "weights with a list for a header": (
        lambda folder: headed(folder / "model.safetensors", []), "not a complete safetensors file"),
    "weights without a place": (
        lambda folder: headed(folder / "model.safetensors", {"a": {"dtype": "F32", "shape": [1]}}), "not a complete"),
    "weights cut off": (lambda folder: cut(folder / "model.safetensors", 100), "is truncated"),
    "weights are a page": (
        lambda folder: (folder / "model.safetensors").write_text("<html>Not found</html>"), "not a complete"),
    "weights are a pointer": (
        lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "git lfs pull"),
}  # fmt: skip


@pytest.mark.parametrize("way", BREAKS)
def test_a_broken_folder(folder: Path, way: str) -> None:
    breaks, reported = BREAKS[way]
    breaks(folder)
    found = model_check(folder)
    assert (found.status, reported in found.found) == (Status.ERROR, True), found.found
    assert found.advice


def test_one_damaged_file_hides_no_other(folder: Path) -> None:
    index(folder, "{")
    (folder / "tokenizer.json").unlink()
    found = model_check(folder).found
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
    assert model_check("models/Qwen2.5-7B").status is Status.WARNING
    (tmp_path / "models").mkdir()
    found = model_check("models/Qwen2.5-7B")
    assert (found.status, found.found) == (Status.ERROR, "model directory not found: models/Qwen2.5-7B")


def test_a_missing_shard_is_named(folder: Path) -> None:
    sharded(folder)
    gone = max(folder.glob("model-*.safetensors"))
    gone.unlink()
    found = model_check(folder)
    assert found.status is Status.ERROR
    assert "1 of the " in found.found
    assert gone.name in found.found


def test_files_one_level_too_deep(folder: Path, tmp_path: Path) -> None:
    outer = tmp_path / "outer"
    outer.mkdir()
    folder.rename(outer / "Qwen2.5-7B-Instruct")
    found = model_check(outer)
    assert found.status is Status.ERROR
    assert "not directly in" in found.found
    assert f"model_name_or_path={outer / 'Qwen2.5-7B-Instruct'}" in found.advice


def test_a_hub_cache_is_one_level_too_deep_as_well(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "cache" / "models--Qwen--Qwen2.5-7B" / "snapshots"
    place.mkdir(parents=True)
    folder.rename(place / "0123abc")
    assert f"model_name_or_path={place / '0123abc'}" in model_check(tmp_path / "cache").advice


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert model_check(tmp_path / "nowhere").found.startswith("model directory not found")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".gitkeep").touch()
    assert model_check(tmp_path / "empty").found.endswith("is empty")


def test_a_name_of_the_hub_is_only_a_warning() -> None:
    assert model_check("Qwen/Qwen2.5-7B-Instruct").status is Status.WARNING


def test_what_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "contains an adapter" in model_check(tmp_path).found
    (tmp_path / "adapter_config.json").rename(tmp_path / "model.gguf")
    assert "GGUF" in model_check(tmp_path).found


# --- the datasets -------------------------------------------------------------------------------------------------

GOOD = {"instruction": "Judge this.", "input": "", "output": '{"a": 0.50}'}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write(tmp_path, "steps", [GOOD] * 5)
    write(tmp_path, "steps_eval", [GOOD | {"instruction": "Judge that."}])
    return tmp_path


def write(folder: Path, name: str, rows: list[Any], **entry: Any) -> None:
    """Add one dataset to a folder; a row that is a string is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    path = folder / "dataset_info.json"
    info = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(info | {name: {"file_name": f"{name}.jsonl"} | entry}))


def trace(folder: Path, name: str, *rows: tuple[str, str]) -> None:
    """Write rows, and the sidecar that names the task and the prompt of each."""
    lines = [json.dumps({"prompt_sha256": prompt, "metadata": {"task_id": task}}) for task, prompt in rows]
    (folder / f"{name}.meta.jsonl").write_text("\n".join(lines) + "\n")
    texts = [json.dumps({"instruction": prompt, "output": "x"}) for _, prompt in rows]
    (folder / f"{name}.jsonl").write_text("\n".join(texts) + "\n")


def dataset_check(folder: Path, dataset: str = "steps", eval_dataset: str | None = "steps_eval") -> Check:
    return check_datasets({"dataset": dataset, "eval_dataset": eval_dataset, "dataset_dir": str(folder)})


def held_out(folder: Path, **values: Any) -> Check:
    base = {"dataset": "steps", "eval_dataset": "steps_eval", "dataset_dir": str(folder)}
    return check_held_out({**base, **values}, {})


def test_datasets_that_can_be_loaded(data: Path) -> None:
    found = dataset_check(data)
    assert (found.status, found.found) == (Status.OK, "steps (5 rows), steps_eval (1 row)")


def test_before_the_conversion(tmp_path: Path) -> None:
    found = dataset_check(tmp_path)
    assert found.status is Status.ERROR
    assert found.found.endswith("dataset_info.json is missing")
    assert "python convert_dataset.py" in found.advice


@pytest.mark.parametrize(
    ("names", "reported"),
    [("steps,", "dataset has a comma too many"), ("steps, steps", "names steps more than once")],
)
def test_a_list_of_datasets_with_a_slip(data: Path, names: str, reported: str) -> None:
    found = dataset_check(data, names)
    assert (found.status, reported in found.found) == (Status.ERROR, True)


def test_a_dataset_that_is_not_there(data: Path) -> None:
    assert "dataset not found: stepz (did you mean steps?)" in dataset_check(data, "stepz").found
    assert "known: steps, steps_eval" in dataset_check(data, "zzz").found


@pytest.mark.parametrize(
    ("rows", "reported"),
    [
        ([GOOD, "{"], ":2: not JSON"),
        ([GOOD, "[]"], ":2: not an object"),
        ([GOOD, {"instruction": "x"}], ":2: has no column output"),
        ([GOOD | {"output": {"a": 0.5}}], ":1: output is not a string; LLaMA Factory would silently drop the row"),
        ([GOOD | {"output": None}], ":1: output is not a string"),
        ([GOOD | {"instruction": 5}], ":1: instruction is not a string"),
        ([], "is empty"),
    ],
)
def test_rows_that_would_be_lost(data: Path, rows: list[Any], reported: str) -> None:
    write(data, "bad", rows)
    found = dataset_check(data, "bad")
    assert (found.status, reported in found.found) == (Status.ERROR, True), found.found


def test_columns_that_are_mapped(data: Path) -> None:
    columns = {"prompt": "question", "response": "verdict"}
    write(data, "mapped", [{"question": "a", "verdict": "b"}], columns=columns)
    assert dataset_check(data, "mapped").status is Status.OK
    write(data, "mapped", [GOOD], columns=columns)
    assert "has no column question" in dataset_check(data, "mapped").found


def test_conversations(data: Path) -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    write(data, "chat", [{"conversations": turns}], formatting="sharegpt")
    assert dataset_check(data, "chat").status is Status.OK
    write(data, "chat", [{"conversations": "a"}], formatting="sharegpt")
    assert "conversations is not a list" in dataset_check(data, "chat").found


def test_a_column_whose_type_changes_late_is_found_only_where_it_harms(data: Path) -> None:
    rows: list[Any] = [GOOD | {"category": None, "output": "x" * 1000}]
    write(data, "small", rows * 5)
    assert dataset_check(data, "small").status is Status.OK
    write(data, "large", rows * 11_000)
    assert "column category is not a string" in dataset_check(data, "large").found


def test_files_that_are_missing_or_of_another_kind(data: Path) -> None:
    (data / "steps.jsonl").unlink()
    assert "steps.jsonl is missing" in dataset_check(data).found
    write(data, "steps", [GOOD], file_name="steps.JSONL")
    (data / "steps.JSONL").write_text("{}")
    assert "LLaMA Factory reads .arrow" in dataset_check(data).found
    write(data, "odd", [GOOD], formatting="parrot")
    assert "formatting is parrot" in dataset_check(data, "odd").found


def test_a_dataset_that_is_a_folder(data: Path) -> None:
    """LLaMA Factory takes it; nothing is claimed of rows that are not looked at."""
    write(data, "parts", [GOOD], file_name="parts")
    (data / "parts").mkdir()
    assert "parts must contain files of one type" in dataset_check(data, "parts").found
    (data / "parts" / "a.jsonl").write_text(json.dumps(GOOD))
    found = dataset_check(data, "parts")
    assert (found.status, "parts (a folder: its rows are not checked)" in found.found) == (Status.WARNING, True)
    (data / "parts" / ".DS_Store").touch()
    assert dataset_check(data, "parts").status is Status.ERROR


def test_a_dataset_of_a_hub(data: Path) -> None:
    info = json.loads((data / "dataset_info.json").read_text())
    (data / "dataset_info.json").write_text(json.dumps(info | {"far": {"hf_hub_url": "someone/something"}}))
    found = dataset_check(data, "far")
    assert (found.status, "far (from a hub or a script: not checked)" in found.found) == (Status.WARNING, True)


@pytest.mark.parametrize(("key", "value"), [("file_name", 5), ("columns", ["prompt"]), ("tags", "x")])
def test_an_entry_of_another_type(data: Path, key: str, value: Any) -> None:
    write(data, "odd", [GOOD], **{key: value})
    found = dataset_check(data)
    assert found.status is Status.ERROR
    assert f"dataset_info.json: odd: {key} is {value!r}" in found.found


@pytest.mark.parametrize("text", ["[]", "{", '{"held_out": 5}'])
def test_a_report_of_the_conversion_that_is_damaged(data: Path, text: str) -> None:
    """Every run records it, and would end in an error after all checks."""
    (data / "conversion_report.json").write_text(text)
    found = dataset_check(data)
    assert (found.status, "conversion_report.json: not" in found.found) == (Status.ERROR, True)
    assert "python convert_dataset.py" in found.advice
    held_out(data)


@pytest.mark.parametrize("stage", ["rm", "dpo", "kto"])
def test_a_stage_that_learns_from_other_rows(data: Path, stage: str) -> None:
    values = {"dataset": "steps", "dataset_dir": str(data), "stage": stage}
    found = check_datasets(values)
    assert (found.status, f"stage {stage} needs" in found.found) == (Status.ERROR, True)


def test_pairs_are_for_other_stages(data: Path) -> None:
    columns = {"prompt": "instruction", "chosen": "good", "rejected": "bad"}
    write(data, "pairs", [{"instruction": "a", "good": "b", "bad": "c"}], ranking=True, columns=columns)
    assert "pairs contains preference pairs" in dataset_check(data, "pairs", None).found
    assert check_datasets({"dataset": "pairs", "dataset_dir": str(data), "stage": "dpo"}).status is Status.OK


def test_held_out_rows_apart(data: Path) -> None:
    trace(data, "steps", ("task 1", "aa"), ("task 2", "bb"))
    trace(data, "steps_eval", ("task 3", "cc"))
    found = held_out(data)
    assert (found.status, found.found) == (Status.OK, "1 prompt from 1 task; no overlap with training")


@pytest.mark.parametrize(
    ("leaked", "reported"), [(("task 1", "zz"), "1 task and 0 prompts"), (("task 9", "bb"), "0 tasks and 1 prompt")]
)
def test_held_out_rows_that_leak(data: Path, leaked: tuple[str, str], reported: str) -> None:
    trace(data, "steps", ("task 1", "aa"), ("task 2", "bb"))
    trace(data, "steps_eval", ("task 3", "cc"), leaked)
    found = held_out(data)
    assert (found.status, reported in found.found) == (Status.ERROR, True)


def test_rows_that_no_sidecar_describes(data: Path) -> None:
    """Rows that somebody appended after the conversion cannot be compared by their tasks."""
    trace(data, "steps", ("task 1", "aa"), ("task 2", "bb"))
    trace(data, "steps_eval", ("task 3", "cc"))
    with (data / "steps.jsonl").open("a") as stream:
        stream.write(json.dumps({"instruction": "cc", "output": "x"}) + "\n")
    found = held_out(data)
    assert (found.status, "has 3 rows, but its conversion wrote 2" in found.found) == (Status.ERROR, True)
    (data / "steps.meta.jsonl").unlink()
    (data / "steps_eval.meta.jsonl").unlink()
    assert (held_out(data).status, "1 prompt are also in training rows" in held_out(data).found) == (Status.ERROR, True)
    write(data, "steps", [{"instruction": "aa", "output": "x"}])
    assert (held_out(data).status, "1 prompt; no overlap with training" in held_out(data).found) == (Status.OK, True)


@pytest.mark.parametrize("answer", ["", "  \n"])
def test_an_empty_answer_is_nothing_to_learn(data: Path, answer: str) -> None:
    write(data, "steps", [{"instruction": "a", "output": "b"}, {"instruction": "c", "output": answer}])
    assert "steps.jsonl:2: the answer is empty" in dataset_check(data).found
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": answer}]
    write(data, "steps", [{"conversations": turns}], formatting="sharegpt")
    assert "steps.jsonl:1: the answer is empty" in dataset_check(data).found


def test_what_the_conversion_found_is_believed(data: Path) -> None:
    audit = {"passed": False, "tasks_on_both_sides": 4}
    (data / "conversion_report.json").write_text(json.dumps({"leak_audit": audit}))
    found = held_out(data)
    assert (found.status, "4 tasks in both splits" in found.found) == (Status.ERROR, True)


def test_other_ways_to_have_no_honest_held_out_rows(data: Path) -> None:
    assert held_out(data, eval_dataset="steps").status is Status.ERROR
    assert "at random" in held_out(data, eval_dataset=None, val_size=0.1).found
    assert held_out(data, eval_dataset=None).status is Status.WARNING
    said = check_held_out(
        {"dataset": "steps", "dataset_dir": str(data)}, {"eval_dataset": "steps has no held-out rows"}
    )
    assert said.found.startswith("none: steps has no held-out rows")


@pytest.mark.parametrize(
    ("values", "status"),
    [
        ({"val_size": 100000}, Status.ERROR),
        ({"val_size": 5}, Status.ERROR),
        ({"val_size": 4}, Status.WARNING),
        ({"val_size": 4, "max_samples": 3}, Status.ERROR),
        ({"val_size": 0.9}, Status.ERROR),
        ({"val_size": 0.2}, Status.WARNING),
        ({"val_size": 5, "streaming": True}, Status.WARNING),
        ({"val_size": 5, "dataset": "steps,steps_eval"}, Status.WARNING),
    ],
)
def test_a_val_size_that_leaves_nothing(data: Path, values: dict[str, Any], status: Status) -> None:
    found = held_out(data, eval_dataset=None, **values)
    assert (found.status, "no row is left to train on" in found.found) == (status, status is Status.ERROR)


def test_a_sidecar_that_is_damaged_hides_what_leaks(data: Path) -> None:
    trace(data, "steps", ("task 1", "aa"))
    (data / "steps_eval.meta.jsonl").write_text('{"no": "prompt"}\n')
    assert held_out(data).status is Status.ERROR


# --- what the config names ----------------------------------------------------------------------------------------


@pytest.fixture
def named(micro_model: Path) -> Any:
    """The settings checks of a config with a real model."""

    def settings(**values: Any) -> list[Check]:
        return check_named_files({"model_name_or_path": str(micro_model), **values})

    return settings


# --- layers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "reported", "advice"),
    [
        ({"lora_target": "foo"}, "lora_target: the model has no layer foo", "Its layers: "),
        ({"lora_target": "q_proj,vproj"}, "no layer vproj", "Did you mean v_proj?"),
        ({"lora_target": ["q_proj", "vproj"]}, "no layer vproj", "Did you mean v_proj?"),
        ({"lora_target": "all,q_proj"}, "no layer all", "Its layers: "),
        ({"lora_target": "input_layernorm"}, "no layer input_layernorm", "Its layers: "),
        ({"lora_target": "self_attn"}, "no layer self_attn", "Its layers: "),
        ({"lora_target": ".*q_proj"}, "no layer .*q_proj", "Did you mean q_proj?"),
        ({"additional_target": "foo"}, "additional_target: the model has no layer foo", "Its layers: "),
        ({"additional_target": "embed_token"}, "no layer embed_token", "Did you mean embed_tokens?"),
    ],
)
def test_layers_that_the_model_does_not_have(named: Any, values: dict[str, Any], reported: str, advice: str) -> None:
    (found,) = named(**values)
    assert (found.status, reported in found.found, found.advice.startswith(advice)) == (Status.ERROR, True, True), found


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
def test_layers_that_it_has(named: Any, values: dict[str, Any]) -> None:
    assert named(**values) == []


def test_a_damaged_model_is_reported_by_its_own_check(named: Any, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    assert named(model_name_or_path=str(tmp_path), lora_target="foo") == []
    (tmp_path / "gone.safetensors").write_text("<html>")
    assert named(model_name_or_path=str(tmp_path), lora_target="foo") == []


# --- adapters -----------------------------------------------------------------------------------------------------

EVERY_LAYER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapter(folder: Path, **shape: Any) -> str:
    folder.mkdir()
    complete = {"r": 8, "lora_alpha": 16, "target_modules": EVERY_LAYER, **shape}
    (folder / "adapter_config.json").write_text(json.dumps(complete))
    return str(folder)


@pytest.mark.parametrize(
    ("values", "reported"),
    [
        ({"lora_rank": 4}, "keeps its own settings, not lora_rank: 4 (it has 8)"),
        ({"lora_rank": 4, "lora_alpha": 8}, "lora_rank: 4 (it has 8), lora_alpha: 8 (it has 16)"),
        ({"lora_target": "q_proj"}, "lora_target: q_proj (it has "),
    ],
)
def test_an_adapter_keeps_its_shape(named: Any, tmp_path: Path, values: dict[str, Any], reported: str) -> None:
    (found,) = named(adapter_name_or_path=adapter(tmp_path / "x"), **values)
    assert (found.status, reported in found.found) == (Status.WARNING, True), found
    assert "create_new_adapter" in found.advice


def test_an_adapter_of_fewer_layers_than_all(named: Any, tmp_path: Path) -> None:
    (found,) = named(adapter_name_or_path=adapter(tmp_path / "x", target_modules=["q_proj"]), lora_target="all")
    assert "lora_target: all (it has q_proj)" in found.found


def test_an_adapter_of_the_shape_that_is_asked_for(named: Any, tmp_path: Path) -> None:
    same = {"lora_rank": 8, "lora_alpha": 16, "lora_target": "all"}
    assert named(adapter_name_or_path=adapter(tmp_path / "x"), **same) == []
    assert named(adapter_name_or_path=str(tmp_path / "x")) == []
    assert named(adapter_name_or_path=str(tmp_path / "x"), lora_rank=4, create_new_adapter=True) == []
    assert named(adapter_name_or_path=f"{adapter(tmp_path / 'y', r=4)}, {tmp_path / 'x'}", **same) == []


@pytest.mark.parametrize("text", ["[]", "{"])
def test_a_damaged_adapter(named: Any, tmp_path: Path, text: str) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    (found,) = named(adapter_name_or_path=str(tmp_path))
    assert (found.status, "adapter_config.json: not" in found.found) == (Status.ERROR, True)
