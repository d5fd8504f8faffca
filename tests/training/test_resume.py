"""The record of a run, its checkpoints, and what a start means for a folder: runs.py, checkpoints.py, resume.py."""

import errno
import json
import re
import shlex
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from layout import STEPS, write_config
from narrated import Narrated
from processes import start

from prmkit.errors import DataError, LlamaFactoryError, PrmkitError, UsageError
from prmkit.files import sha256_of
from prmkit.paths import base_model_of
from prmkit.training import train
from prmkit.training.checkpoints import checkpoint_fault, weights_fault
from prmkit.training.monitoring import reached
from prmkit.training.options import TrainOptions, next_commands
from prmkit.training.records import (
    all_records,
    describe_dataset,
    differences,
    log_path_of,
    model_fingerprint,
    new_record,
    rows_a_step,
)
from prmkit.training.resume import (
    Action,
    back_up,
    checkpoint_folders,
    decide_start,
    free_folder,
    newest_checkpoint,
    rename_with_prefix,
    run_folder_of,
)
from prmkit.training.run import verify_run


def record_of(project: Path) -> dict[str, Any]:
    return dict(json.loads((project / "saves" / "run" / "run.json").read_text()))


def start_again(project: Path, monkeypatch: pytest.MonkeyPatch, *assignments: str, **flags: Any) -> Path | None:
    """What train.py does after its checks, in this process."""
    monkeypatch.chdir(project)
    options = TrainOptions(Path("config.yaml"), assignments, **flags)
    return train.train(options, train._prepare(options)).run


# --- the record ---------------------------------------------------------------------------------------------------


def test_the_record_says_what_was_trained_on_what_and_how_it_ended(finished: Path) -> None:
    record = record_of(finished)
    assert (record["run"], record["status"], record["steps"], record["max_steps"]) == ("run", "finished", STEPS, STEPS)
    assert record["config"]["learning_rate"] == 1e-3 and record["sources"]["learning_rate"] == "config.yaml"
    dataset = {key: value for key, value in record["dataset"].items() if key != "entry_sha256"}
    assert dataset == {
        "name": "steps", "file": "data/steps.jsonl", "sha256": sha256_of(finished / "data" / "steps.jsonl"),
    }  # fmt: skip
    assert record["base_model"]["name"] == "model" and record["base_model"]["path"] == str(finished / "model")
    assert (finished / "saves" / "run" / record["base_model"]["relative"]).samefile(finished / "model")
    assert record["eval_dataset"]["name"] == "steps_eval"
    assert record["held_out_sha256"] == "c0ffee"
    assert record["conversion_report_sha256"] == sha256_of(finished / "data" / "conversion_report.json")
    assert record["base_model"]["fingerprint"] == model_fingerprint(finished / "model")
    assert record["versions"]["llamafactory"] == version("llamafactory") and record["hardware"]["cores"] >= 1
    assert record["started"] < record["ended"] and record["resumed_from"] == []
    assert record["git"]["commit"] and "--export" in record["command"]
    state = json.loads((finished / "saves" / "run" / "trainer_state.json").read_text())
    assert record["tokens"] == state["num_input_tokens_seen"] > 0
    assert record["train_loss"] == [entry["loss"] for entry in state["log_history"] if "loss" in entry][-1]
    final = json.loads((finished / "saves" / "run" / "eval_results.json").read_text())
    assert record["eval_loss"] == final["eval_loss"]
    assert record["train_loss"] < 4, "it learnt nothing"


def test_a_new_record_has_every_field_that_is_known_only_at_the_end(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished)
    fresh = new_record(Path("saves/run"), train.resolve(TrainOptions(Path("config.yaml"))).config, 1)
    assert fresh.keys() == record_of(finished).keys()
    assert (fresh["steps"], fresh["train_loss"], fresh["ended"]) == (0, None, None)
    monkeypatch.setattr("prmkit.training.records.reached", lambda *nothing: reached(*nothing) | {"made_up": 1})
    assert new_record(Path("saves/run"), train.resolve(TrainOptions(Path("config.yaml"))).config, 1)["made_up"] == 1


def test_the_rendered_config_runs_without_us(finished: Path) -> None:
    """Read as LLaMA Factory reads it, it is what was resolved."""
    from omegaconf import OmegaConf

    rendered = OmegaConf.to_container(OmegaConf.load(finished / "saves" / "run" / "resolved_config.yaml"))
    assert rendered == record_of(finished)["config"]


def test_another_model_has_another_fingerprint(finished_copy: Path) -> None:
    weights = finished_copy / "model" / "model.safetensors"
    before = model_fingerprint(weights.parent)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert model_fingerprint(weights.parent) != before
    assert model_fingerprint(finished_copy / "nothing here") is None


def test_a_dataset_that_is_gone_has_no_hash(finished_copy: Path) -> None:
    data = finished_copy / "data"
    there = describe_dataset("steps", data)
    assert there is not None and there["sha256"] == sha256_of(data / "steps.jsonl")
    gone = {"name": "steps,other", "file": None, "sha256": None, "entry_sha256": None}
    assert describe_dataset("steps,other", data) == gone
    assert describe_dataset("", data) is None


def test_a_run_that_was_killed_is_listed_as_killed(killed_copy: Path) -> None:
    (listed,) = all_records(killed_copy / "saves")
    assert listed["status"] == "killed"


# --- checkpoints --------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def overwrite(path: Path, content: bytes) -> None:
    """Put bytes into the middle of a file, at a multiple of a page."""
    data = bytearray(path.read_bytes())
    middle = len(data) // 2 // 4096 * 4096
    data[middle : middle + len(content)] = content
    path.write_bytes(data)


def zero_page(path: Path) -> None:
    data = bytearray(path.read_bytes())
    last = len(data) // 4096 * 4096
    data[last - 4096 : last] = bytes(4096)
    path.write_bytes(data)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


SPOILT: dict[str, Callable[[Path], object]] = {
    "no trainer_state.json": lambda folder: (folder / "trainer_state.json").unlink(),
    "empty trainer_state.json": lambda folder: (folder / "trainer_state.json").write_text(""),
    "adapter missing": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "adapter cut off": lambda folder: cut(folder / "adapter_model.safetensors"),
    "adapter empty": lambda folder: (folder / "adapter_model.safetensors").write_bytes(b""),
    "optimizer missing": lambda folder: (folder / "optimizer.pt").unlink(),
    "optimizer cut off": lambda folder: cut(folder / "optimizer.pt"),
    "adapter of zeros at the end": lambda folder: zero_page(folder / "adapter_model.safetensors"),
    "adapter with infinities": lambda folder: overwrite(folder / "adapter_model.safetensors", b"\0\0\x80\x7f"),
    "adapter_config.json empty": lambda folder: (folder / "adapter_config.json").write_text(""),
    "adapter_config.json missing": lambda folder: (folder / "adapter_config.json").unlink(),
    "adapter_config.json of nothing": lambda folder: (folder / "adapter_config.json").write_text("{}"),
    "tokenizer.json empty": lambda folder: (folder / "tokenizer.json").write_text(""),
    "scheduler.pt empty": lambda folder: (folder / "scheduler.pt").write_bytes(b""),
    "scheduler.pt missing": lambda folder: (folder / "scheduler.pt").unlink(),
    "rng_state.pth missing": lambda folder: (folder / "rng_state.pth").unlink(),
    "training_args.bin empty": lambda folder: (folder / "training_args.bin").write_bytes(b""),
    "a hole in optimizer.pt": lambda folder: overwrite(folder / "optimizer.pt", b"\0" * 4096),
    "one bit of optimizer.pt": lambda folder: flip(folder / "optimizer.pt"),
    "still being written": lambda folder: (folder / "checkpoint-is-incomplete.txt").touch(),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_half_written_checkpoint_is_renamed_and_the_one_before_it_used(killed_copy: Path, how: str) -> None:
    run = killed_copy / "saves" / "run"
    newest, before = checkpoint_folders(run)
    assert checkpoint_fault(newest) is None
    SPOILT[how](newest)
    taken = newest_checkpoint(run, rename=True)
    assert taken is not None and taken.folder == before
    assert not newest.exists() and newest.with_name(f"incomplete.{newest.name}").is_dir()


def test_a_stale_checkpoint_of_an_earlier_run_is_never_taken(killed_copy: Path) -> None:
    """Higher in number, complete, and of as many steps: only the losses tell that another run wrote it."""
    run = killed_copy / "saves" / "run"
    stale = run / f"checkpoint-{STEPS + 8}"
    shutil.copytree(run / f"checkpoint-{STEPS}", stale)
    state = json.loads((stale / "trainer_state.json").read_text())
    state["global_step"] = STEPS + 8
    for entry in state["log_history"]:
        if "loss" in entry:
            entry["loss"] += 0.25
    (stale / "trainer_state.json").write_text(json.dumps(state))
    assert checkpoint_fault(stale) is None
    taken = newest_checkpoint(run, rename=True)
    assert taken is not None and taken.step == STEPS
    assert stale.with_name(f"stale.{stale.name}").is_dir()


def test_a_checkpoint_of_a_run_of_another_length_is_stale(killed_copy: Path) -> None:
    run = killed_copy / "saves" / "run"
    newest = checkpoint_folders(run)[0]
    state = json.loads((newest / "trainer_state.json").read_text())
    (newest / "trainer_state.json").write_text(json.dumps({**state, "max_steps": 500}))
    taken = newest_checkpoint(run)
    assert taken is not None and taken.folder != newest and newest.exists()


def test_a_model_in_several_files_is_complete_only_with_all_of_them(finished_copy: Path) -> None:
    model = finished_copy / "model"
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weights_fault(model) == "model-2.safetensors is not complete"
    shutil.copy(model / "model.safetensors", model / "model-2.safetensors")
    assert weights_fault(model) is None


# --- what a start means -------------------------------------------------------------------------------------------


def test_a_finished_run_says_so_and_names_what_can_be_done_next(
    finished_copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = record_of(finished_copy)
    monkeypatch.chdir(finished_copy)
    options = TrainOptions(Path("config.yaml"))
    outcome = train.train(options, train._prepare(options))
    assert capsys.readouterr().out.startswith(f"Already finished: saves/run ({STEPS} steps, last training loss ")
    shown = "\n".join(next_commands(options, outcome, evaluated=False))
    longer = f"num_train_epochs=16 output_dir=saves/run-longer resume_from_checkpoint=saves/run/checkpoint-{STEPS}"
    assert longer in shown
    assert "--overwrite" in shown and record_of(finished_copy) == before


def test_what_is_suggested_is_about_the_run_and_works(finished_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The words that were typed are in it, and the longer run trains: typed as it is printed."""
    run = finished_copy / "saves" / "run"
    run.rename(finished_copy / "saves" / "mine")
    typed = ["run_name=mine", "logging_steps=4"]
    shown = start(finished_copy, *typed).ends(0)
    suggested = dict(line.strip().split(":", 1) for line in shown.splitlines() if line.startswith("  train "))
    anew, longer = (shlex.split(suggested[name]) for name in ("train again", "train longer"))
    assert anew == ["python", "train.py", "--config", "config.yaml", *typed, "--overwrite"]
    assert longer[4:6] == ["logging_steps=4", "num_train_epochs=16"]
    start(finished_copy, *longer[4:]).ends(0)
    record = json.loads((finished_copy / "saves" / "mine-longer" / "run.json").read_text())
    assert (record["status"], record["steps"]) == ("finished", 2 * STEPS)
    assert record["resumed_from"] == [f"saves/mine/checkpoint-{STEPS}"]


@pytest.mark.parametrize(
    ("assignments", "reported"),
    [
        (["max_steps=80"], "is already at step 80"),
        (["max_steps=8"], "Increase max_steps"),
        ([], "has already trained 8 on this dataset"),
    ],
)
def test_a_finished_checkpoint_of_another_run_is_not_copied_as_a_new_run(
    finished_copy: Path, monkeypatch: pytest.MonkeyPatch, assignments: list[str], reported: str
) -> None:
    checkpoint = f"resume_from_checkpoint=saves/run/checkpoint-{STEPS}"
    with pytest.raises(UsageError, match=reported):
        start_again(finished_copy, monkeypatch, "run_name=copy", checkpoint, *assignments)
    assert not (finished_copy / "saves" / "copy" / "run.json").exists()


def test_paths_in_other_words_are_the_same_run(finished_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert start_again(finished_copy, monkeypatch, "dataset_dir=./data", "model_name_or_path=./model/") == Path(
        "saves/run"
    )


@pytest.mark.parametrize("gone", ["data", "model"])
def test_a_finished_run_says_so_without_what_it_was_made_from(
    script: Callable[..., Any], finished_copy: Path, gone: str
) -> None:
    shutil.rmtree(finished_copy / gone)
    assert "Already finished: saves/run" in script("train.py", "--config", "config.yaml", cwd=finished_copy).stdout


def test_weights_alone_are_kept_and_nothing_resumes_from_them(
    killed_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_config(killed_copy / "config.yaml", save_only_model=True)
    run = killed_copy / "saves" / "run"
    config = {**record_of(killed_copy)["config"], "save_only_model": True}
    (run / "run.json").write_text(json.dumps({**record_of(killed_copy), "config": config}))
    for folder in checkpoint_folders(run):
        (folder / "optimizer.pt").unlink()
    kept = sorted(path.name for path in run.iterdir())
    with pytest.raises(UsageError, match="was saved with save_only_model"):
        start_again(killed_copy, monkeypatch)
    assert [name for name in sorted(path.name for path in run.iterdir()) if name != ".lock"] == [
        name for name in kept if name != ".lock"
    ]


def test_renamed_checkpoints_are_out_of_llamafactorys_reach_and_do_not_pile_up(tmp_path: Path) -> None:
    """LLaMA Factory deletes the oldest of what is named checkpoint-*, `checkpoint-8.incomplete` as well."""
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

    (tmp_path / "checkpoint-8").mkdir()
    rename_with_prefix(tmp_path / "checkpoint-8", "superseded")
    for _ in range(3):
        (tmp_path / "checkpoint-8").mkdir()
        rename_with_prefix(tmp_path / "checkpoint-8", "incomplete")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["incomplete.checkpoint-8", "superseded.checkpoint-8"]
    assert not list(tmp_path.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))


def test_a_run_that_was_killed_after_its_last_step_is_finished_from_its_last_checkpoint(
    killed_copy: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LLaMA Factory would train one step too many and report the loss of that step as the run's."""
    start_again(killed_copy, monkeypatch)
    before, after = record_of(finished), record_of(killed_copy)
    adapter = "saves/run/adapter_model.safetensors"
    assert (killed_copy / adapter).read_bytes() == (finished / adapter).read_bytes()
    assert (after["status"], after["train_loss"]) == ("finished", before["train_loss"])
    assert after["resumed_from"] == [f"saves/run/checkpoint-{STEPS}"]
    assert not (killed_copy / "saves" / "run" / "optimizer.pt").exists()


def test_a_run_that_was_killed_before_its_record_was_closed_is_finished(
    finished_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished_copy / "saves" / "run"
    for folder in checkpoint_folders(run):
        shutil.rmtree(folder)
    (run / "run.json").write_text(json.dumps({**record_of(finished_copy), "status": "running", "steps": 0}))
    start_again(finished_copy, monkeypatch)
    assert (record_of(finished_copy)["status"], record_of(finished_copy)["steps"]) == ("finished", STEPS)


def test_what_llamafactory_left_is_checked_even_when_it_ended_well(
    finished_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    run = finished_copy / "saves" / "run"
    verify_run(run, {})
    state = json.loads((run / "trainer_state.json").read_text())
    (run / "trainer_state.json").write_text(json.dumps({**state, "global_step": 30}))
    with pytest.raises(LlamaFactoryError, match=f"stopped early, after 30 of {STEPS} steps"):
        verify_run(run, {})
    for loss in (float("nan"), 2.6e30, -3.5e32):
        lost = [{"step": 2, "loss": loss}]
        (run / "trainer_state.json").write_text(json.dumps({**state, "log_history": lost}))
        with pytest.raises(LlamaFactoryError, match=re.escape(f"the last loss is {loss:g}")):
            verify_run(run, {})
    cut(run / "adapter_model.safetensors")
    with pytest.raises(
        LlamaFactoryError, match=r"adapter_model\.safetensors is not complete\. See its log: \S+run\.log$"
    ):
        verify_run(run, {})


def test_a_full_disk_does_not_hide_what_the_run_failed_of(
    finished_copy: Path, monkeypatch: pytest.MonkeyPatch, narrated: Narrated
) -> None:
    from prmkit.training import run as one_start

    def full(_folder: Path, _record: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "saves/run/run.json")

    monkeypatch.setattr(one_start, "write_record", full)
    run = finished_copy / "saves" / "run"
    with pytest.raises(LlamaFactoryError, match="the cause"), one_start._recorded(run, record_of(finished_copy)):
        raise LlamaFactoryError("the cause")
    assert "saves/run/run.json: the end of the run could not be recorded: No space left on device" in narrated.text
    with pytest.raises(OSError, match="No space"), one_start._recorded(run, record_of(finished_copy)):
        pass


def test_an_unfinished_run_is_not_mixed_with_another_config(killed_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError) as refused:
        start_again(killed_copy, monkeypatch, "lora_rank=16", "logging_steps=1")
    said = str(refused.value)
    assert "contains an unfinished run with a different config" in said and "lora_rank: 8 -> 16" in said
    assert "logging_steps" not in said, "how often is logged changes nothing about what is learnt"
    assert "run_name=NAME" in said and "--overwrite" in said


@pytest.mark.parametrize(
    ("change", "reported"),
    [
        (lambda data: swap_columns(data / "dataset_info.json", "steps"), "dataset: its entry in dataset_info.json"),
        (lambda data: swap_columns(data / "dataset_info.json", "steps_eval"), "eval_dataset: its entry"),
        (lambda data: cut_rows(data / "steps_eval.jsonl"), "eval_dataset: its rows"),
        (lambda data: (data.parent / "model" / "merges.txt").write_text("a b"), "base_model: its files"),
        (lambda data: overwrite(data.parent / "model" / "model.safetensors", b"12345678"), "base_model: its files"),
    ],
)
def test_what_changes_the_meaning_of_the_data_is_another_run(
    killed_copy: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], object], reported: str
) -> None:
    change(killed_copy / "data")
    with pytest.raises(UsageError, match=reported):
        start_again(killed_copy, monkeypatch)


def swap_columns(info: Path, name: str) -> None:
    entries = json.loads(info.read_text())
    entries[name]["columns"] = {"prompt": "output", "response": "instruction"}
    info.write_text(json.dumps(entries))


def cut_rows(path: Path) -> None:
    rows = path.read_text().splitlines(keepends=True)
    path.write_text("".join(rows[: len(rows) // 2]))


def test_a_run_is_the_same_after_its_project_was_moved(
    killed_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = killed_copy.rename(tmp_path / "moved")
    record = record_of(moved)
    assert base_model_of(moved / "saves" / "run", record) == moved / "model"
    assert start_again(moved, monkeypatch) == Path("saves/run")
    assert record_of(moved)["base_model"]["path"] == str(moved / "model")


def test_a_damaged_finished_run_is_restored_from_its_checkpoint(
    finished_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = finished_copy / "saves" / "run" / "adapter_config.json"
    before = config.read_bytes()
    config.write_text("")
    start_again(finished_copy, monkeypatch)
    assert config.read_bytes() == before


def test_a_damaged_file_without_a_copy_asks_for_a_new_start(
    finished_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, name = finished_copy / "saves" / "run", "tokenizer_config.json"
    (run / name).write_text("")
    for checkpoint in checkpoint_folders(run):
        (checkpoint / name).unlink()
    with pytest.raises(LlamaFactoryError, match=f"{name} is .*, and checkpoint-{STEPS} has no intact copy"):
        start_again(finished_copy, monkeypatch)


def test_changed_data_is_another_run(killed_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = killed_copy / "data" / "steps.jsonl"
    rows.write_text(rows.read_text().replace("answered", "failed", 1))
    with pytest.raises(UsageError, match="dataset: its rows have changed"):
        start_again(killed_copy, monkeypatch)


def test_the_same_rows_a_step_are_the_same_run(killed_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The advice after an out-of-memory must not be refused."""
    monkeypatch.chdir(killed_copy)
    smaller = train.resolve(TrainOptions(Path("config.yaml"), ["gradient_accumulation_steps=4"], batch_size="1"))
    fresh = new_record(Path("saves/run"), smaller.config, 1)
    assert rows_a_step(fresh) == rows_a_step(record_of(killed_copy)) == 4
    assert differences(record_of(killed_copy), fresh) == []
    assert decide_start(Path("saves/run"), fresh).action is Action.FINISH


def test_a_finished_run_of_another_config_is_left_alone(finished_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new config's run gets the next folder, and finds it again."""
    monkeypatch.chdir(finished_copy)
    other = train.resolve(TrainOptions(Path("config.yaml"), epochs="9"))
    fresh = new_record(Path("saves/run"), other.config, 1)
    assert free_folder(Path("saves/run"), fresh) == Path("saves/run-2")
    Path("saves/run-2").mkdir()
    Path("saves/run-2/run.json").write_text(json.dumps(fresh))
    assert free_folder(Path("saves/run"), fresh) == Path("saves/run-2")
    with pytest.raises(UsageError, match="contains a finished run with a different config"):
        start_again(finished_copy, monkeypatch, "run_name=run", epochs="9")


def test_checkpoints_of_nobody_are_left_alone(finished_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (finished_copy / "saves" / "run" / "run.json").unlink()
    with pytest.raises(UsageError, match=r"no run\.json") as refused:
        start_again(finished_copy, monkeypatch)
    assert "--overwrite" in str(refused.value) and "resume_from_checkpoint=saves/run/checkpoint-N" in str(refused.value)


def test_the_checkpoint_that_the_user_names_is_taken(killed_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the guide writes it: with `./` before it, in the YAML. Higher ones are superseded, and renamed."""
    monkeypatch.chdir(killed_copy)
    earlier = checkpoint_folders(Path("saves/run"))[1]
    write_config(Path("config.yaml"), resume_from_checkpoint=f"./{earlier}")
    setting = train.resolve(TrainOptions(Path("config.yaml")))
    fresh = new_record(Path("saves/run"), setting.config, 1)
    plan = decide_start(Path("saves/run"), fresh)
    assert plan.action is Action.RESUME and plan.checkpoint is not None and plan.checkpoint.folder == earlier
    Path("saves/run/run.json").write_text(json.dumps({**plan.record, "status": "running"}))
    shutil.rmtree(earlier)  # LLaMA Factory keeps the last few alone
    newer = decide_start(Path("saves/run"), fresh)
    assert newer.checkpoint is not None and newer.checkpoint.step == STEPS, "it would never get beyond the named one"


def test_a_named_checkpoint_that_is_broken_is_refused_with_the_complete_ones(
    killed_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest, before = checkpoint_folders(killed_copy / "saves" / "run")
    cut(newest / "optimizer.pt")
    with pytest.raises(DataError, match=r"optimizer.*damaged.*Complete ones: ") as refused:
        start_again(killed_copy, monkeypatch, f"resume_from_checkpoint=saves/run/{newest.name}")
    assert before.name in str(refused.value)


@pytest.mark.parametrize(
    ("assignments", "expected"),
    [
        ([], "saves/run"),
        (["run_name=second"], "saves/second"),
        (["output_dir=elsewhere/x"], "elsewhere/x"),
        (["output_dir=elsewhere/x", "run_name=second"], "elsewhere/second"),
    ],
)
def test_where_a_run_is(finished: Path, monkeypatch: pytest.MonkeyPatch, assignments: list[str], expected: str) -> None:
    monkeypatch.chdir(finished)
    config = train.resolve(TrainOptions(Path("config.yaml"), assignments)).config
    assert run_folder_of(config.values, config.sources) == Path(expected)


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "."])
def test_a_run_name_cannot_leave_the_folder(finished: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(finished)
    with pytest.raises(PrmkitError, match="run_name"):
        start_again(finished, monkeypatch, f"run_name={name}")


def test_overwrite_moves_the_old_run_and_export_aside(finished_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is lost: the old folders are beside the new ones under the time of day, with what was put in them."""
    adapter = (finished_copy / "saves" / "run" / "adapter_model.safetensors").read_bytes()
    (finished_copy / "exported_model" / "prmkit.json").rename(finished_copy / "exported_model" / "mine.txt")
    with pytest.raises(PrmkitError, match="--overwrite"):
        start_again(finished_copy, monkeypatch, "max_steps=1", export=True)
    assert start_again(finished_copy, monkeypatch, "max_steps=1", overwrite=True, export=True) == Path("saves/run")
    assert record_of(finished_copy)["steps"] == 1
    (run,) = (finished_copy / "saves").glob("run.20*")
    assert (run / "adapter_model.safetensors").read_bytes() == adapter
    (exported,) = finished_copy.glob("exported_model.20*")
    assert (exported / "mine.txt").exists()
    assert list((finished_copy / "exported_model").glob("*.safetensors"))


def test_what_is_not_there_is_not_moved_aside(tmp_path: Path) -> None:
    assert back_up(tmp_path / "run") is None


def test_what_belongs_to_the_repository_stays_where_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "exported_model"
    folder.mkdir()
    (folder / ".gitkeep").touch()
    (folder / "config.json").touch()
    aside = back_up(folder)
    assert aside is not None and [path.name for path in aside.iterdir()] == ["config.json"]
    assert [path.name for path in folder.iterdir()] == [".gitkeep"]


@pytest.mark.parametrize(
    ("run", "log"),
    [
        ("saves/run", "logs/run.log"),
        ("./saves/run", "logs/run.log"),
        ("demo/saves/run", "demo/logs/run.log"),
        ("/scratch/saves/run", "/scratch/logs/run.log"),
        ("/scratch/run", "logs/run.log"),
        ("run", "logs/run.log"),
    ],
)
def test_logs_are_beside_saves(run: str, log: str) -> None:
    assert log_path_of(Path(run)) == Path(log)
