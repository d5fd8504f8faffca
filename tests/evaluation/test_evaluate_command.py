"""evaluate_judge.py on a whole run: its held-out rows, its base model, its export."""

import importlib
import json
import re
import shutil
from pathlib import Path

import pytest
from synthetic import write_data_folder

from prmkit.errors import DataError, ExitCode, GateError, UsageError
from prmkit.evaluation import command
from prmkit.evaluation.command import evaluate_run, execute, prove_export
from prmkit.evaluation.summary import left_out_of_breakdown
from prmkit.files import sha256_of, write_json
from prmkit.intervals import calibrated_judge, read_calibration
from prmkit.judge.sources import fingerprint_of, judge_source_of_run

pytestmark = pytest.mark.slow  # every test scores the rows of a real model

parser = importlib.import_module("evaluate_judge")._parser


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model_folders: dict[str, Path]) -> Path:
    """What train.py leaves, as far as a judge looks at it: an adapter and run.json."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("saves") / "a_run"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        base = AutoModelForCausalLM.from_pretrained(model_folders["qwen"])
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        get_peft_model(base, lora).save_pretrained(folder)
    data = write_data_folder(tmp_path_factory.mktemp("data"), tasks=3, name="reward_model_clip_eval")
    config = {
        "model_name_or_path": str(model_folders["qwen"]),
        "template": "qwen",
        "cutoff_len": 2048,
        "dataset_dir": str(data),
        "eval_dataset": "reward_model_clip_eval",
    }
    write_json(folder / "run.json", {"config": config})
    return folder


def evaluate_judge(*arguments: object) -> ExitCode:
    return execute(parser().parse_args(list(map(str, arguments))))


def test_a_run_is_measured_on_its_own_rows_beside_its_base_model(run, capsys):
    assert evaluate_judge("--run", run, "--baseline") == ExitCode.DONE
    folder = run / "evaluation"
    assert f"report: {folder / 'report.html'}" in capsys.readouterr().out
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["held_out"]["dataset"] == "reward_model_clip_eval"
    base = metrics["groups"][0]["baselines"]["base_model"]
    assert base["base"]["mae"]["n"] == metrics["groups"][0]["scores"]
    assert base["base"]["rmse"]["value"] != metrics["groups"][0]["judge"]["rmse"]["value"]
    one, other = ((folder / name).read_text() for name in ("predictions.jsonl", "predictions_base.jsonl"))
    assert one.count("\n") == other.count("\n") == metrics["held_out"]["prompts"]


def test_a_run_is_measured_on_its_own_rows_from_any_folder(run, tmp_path, monkeypatch):
    """Its project is where its data is; data of the same names in the current folder belong to another one."""
    project, other = tmp_path / "project", tmp_path / "other"
    moved = shutil.copytree(run, project / "saves" / "a_run")
    config = json.loads((run / "run.json").read_text())["config"]
    write_data_folder(project / "data", tasks=3, name="reward_model_clip")
    write_data_folder(project / "data", tasks=2, name="reward_model_clip_eval")
    write_data_folder(other / "data", tasks=3, name="reward_model_clip_eval")
    entries = {name: {"file_name": f"{name}.jsonl"} for name in ("reward_model_clip", "reward_model_clip_eval")}
    write_json(project / "data" / "dataset_info.json", entries)
    trained = {"name": "reward_model_clip", "sha256": sha256_of(project / "data" / "reward_model_clip.jsonl")}
    write_json(moved / "run.json", {"config": config | {"dataset_dir": "data"}, "dataset": trained})
    monkeypatch.chdir(other)
    assert evaluate_judge("--run", moved, "--limit", 2) == ExitCode.DONE
    lines = (project / "data" / "reward_model_clip_eval.jsonl").read_text().splitlines()
    metrics = json.loads((moved / "evaluation_limit_2" / "metrics.json").read_text())
    assert metrics["held_out"]["prompts"] == len({json.loads(line)["instruction"] for line in lines})


# --- tasks that the judge was trained on -----------------------------------------------------------------------------


def data_folder(folder: Path, trained: int, held_out: int) -> Path:
    """The two sides of a conversion: the tasks of one seed for training, those of another held out."""
    sides = {"reward_model_clip": trained, "reward_model_clip_eval": held_out}
    for name, seed in sides.items():
        write_data_folder(folder, tasks=2, seed=seed, name=name)
    write_json(folder / "dataset_info.json", {name: {"file_name": f"{name}.jsonl"} for name in sides})
    return folder


@pytest.fixture
def trained(run: Path, tmp_path: Path) -> Path:
    """A run that was trained on tmp_path/data, before that folder is converted again."""
    data = data_folder(tmp_path / "data", trained=1, held_out=4)
    copy = shutil.copytree(run, tmp_path / "saves" / "a_run")
    shutil.rmtree(copy / "evaluation", ignore_errors=True)
    config = json.loads((run / "run.json").read_text())["config"] | {"dataset_dir": str(data)}
    sides = {
        side: {"name": name, "sha256": sha256_of(data / f"{name}.jsonl")}
        for side, name in (("dataset", "reward_model_clip"), ("eval_dataset", "reward_model_clip_eval"))
    }
    write_json(copy / "run.json", {"config": config | {"dataset": "reward_model_clip"}, **sides})
    return copy


def test_data_that_was_converted_again_since_the_training_is_refused(trained, tmp_path):
    data = data_folder(tmp_path / "data", trained=4, held_out=1)
    for measure in (lambda: evaluate_judge("--run", trained), lambda: evaluate_run(trained)):
        with pytest.raises(DataError, match=r"data: reward_model_clip is not what the judge was trained on.*again"):
            measure()
    assert not (trained / "evaluation").exists()
    # The held-out rows of the training are right wherever they are; so is the whole of the first conversion.
    data_folder(data, trained=2, held_out=4)
    assert evaluate_judge("--run", trained, "--limit", 2) == ExitCode.DONE
    data_folder(tmp_path / "first", trained=1, held_out=7)
    assert evaluate_judge("--run", trained, "--data-dir", tmp_path / "first", "--limit", 2) == ExitCode.DONE


def test_tasks_of_another_conversion_that_were_trained_on_are_refused(trained, tmp_path, capsys):
    other = data_folder(tmp_path / "other", trained=4, held_out=1)
    with pytest.raises(UsageError, match=r"clip_eval.jsonl: the judge was trained on 2 of these 2 tasks, for example"):
        evaluate_judge("--run", trained, "--data-dir", other)
    data_folder(other, trained=4, held_out=7)
    assert evaluate_judge("--run", trained, "--data-dir", other, "--limit", 2) == ExitCode.DONE
    assert "unknown whether" not in capsys.readouterr().out


def test_a_judge_of_a_held_out_split_is_not_measured_on_its_tasks(trained, tmp_path):
    data, names = tmp_path / "data", ("reward_model_clip_eval", "reward_model_other_eval")
    info = json.loads((data / "dataset_info.json").read_text())
    info[names[1]] = info[names[0]] | {"file_name": f"{names[1]}.jsonl"}
    write_json(data / "dataset_info.json", info)
    for suffix in (".jsonl", ".meta.jsonl"):
        shutil.copy(data / f"{names[0]}{suffix}", data / f"{names[1]}{suffix}")
    record = json.loads((trained / "run.json").read_text())
    write_json(trained / "run.json", record | {"dataset": record["eval_dataset"], "eval_dataset": None})
    with pytest.raises(UsageError, match="the judge was trained on 2 of these 2 tasks"):
        evaluate_judge("--run", trained, "--dataset", names[1])


def test_whether_it_was_trained_on_the_tasks_is_said_to_be_unknown_and_closes_the_gate(trained, tmp_path, capsys):
    other = data_folder(tmp_path / "other", trained=4, held_out=7)
    shutil.rmtree(tmp_path / "data")
    unknown = "It is unknown whether the judge was trained on tasks of .*its training data was not found"
    with pytest.raises(GateError, match=f"--min-spearman: {unknown}"):
        evaluate_judge("--run", trained, "--data-dir", other, "--min-spearman", -1.1)
    assert re.search(unknown, capsys.readouterr().out)
    assert re.search(unknown, (trained / "README.md").read_text().replace("\\_", "_"))


def test_an_export_knows_what_it_was_trained_on(trained, model_folders, tmp_path, capsys):
    exported = shutil.copytree(model_folders["qwen"], tmp_path / "exported_model")
    record = json.loads((trained / "run.json").read_text())
    write_json(exported / "prmkit.json", {"template": "qwen", "cutoff_len": 2048, "dataset": record["dataset"]})
    typed = ("--model", exported, "--dataset", "reward_model_clip_eval", "--output", tmp_path / "out", "--limit", 2)
    assert evaluate_judge(*typed, "--data-dir", tmp_path / "data") == ExitCode.DONE
    assert "unknown whether" not in capsys.readouterr().out
    other = data_folder(tmp_path / "other", trained=4, held_out=1)
    with pytest.raises(GateError, match="It is unknown whether"):
        evaluate_judge(*typed, "--data-dir", other, "--min-spearman", -1.1)


def test_what_train_calls_gives_the_same_files_without_scoring_again(run, capsys, narrated):
    evaluate_judge("--run", run)
    before = (run / "evaluation" / "predictions.jsonl").read_bytes()
    capsys.readouterr()
    narrated.set_level("INFO")
    evaluate_run(run)
    assert "prompts are already scored" in narrated.text
    assert (run / "evaluation" / "predictions.jsonl").read_bytes() == before
    assert "everything" in capsys.readouterr().out
    evaluate_run(run, show=False)
    assert not capsys.readouterr().out


def test_a_measured_run_has_a_model_card_and_intervals_for_its_scores(run):
    evaluate_judge("--run", run)
    assert "Agreement with the judges" in (run / "README.md").read_text()
    calibration = read_calibration(run, calibrated_judge(fingerprint_of(judge_source_of_run(run))))
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())
    assert calibration.counts["all"] == metrics["held_out"]["prompts"]
    low, high = calibration.interval(0.5, 0.1, "clip", 0.5)
    assert 0 <= low < 0.5 < high <= 1


def test_a_breakdown_by_a_metadata_key_is_printed(run, capsys):
    assert evaluate_judge("--run", run, "--by", "provider") == ExitCode.DONE
    shown = capsys.readouterr().out
    assert "By provider" in shown and "not in this table" not in shown


def test_a_breakdown_counts_what_it_leaves_out():
    metrics = {"groups": [{"scores": 1200}], "breakdowns": {"agent": [{"scores": 700}, {"scores": 300}]}}
    assert "200 of 1,200 scores are not in this table" in left_out_of_breakdown(metrics, "agent")


def test_a_breakdown_by_a_key_that_no_row_has_names_those_there_are(run):
    with pytest.raises(UsageError, match=r"--by agent: no row of .* has a name or a number .* can be used: .*provider"):
        evaluate_judge("--run", run, "--by", "agent")


def test_generated_verdicts_are_measured_too_and_what_is_unreadable_is_counted(run, tmp_path):
    # A random model writes no verdict: nothing is scored, and nothing is called zero.
    with pytest.raises(DataError, match=r"none of 4 prompts got a score"):
        evaluate_judge("--run", run, "--output", tmp_path, "--mode", "generate", "--max-new-tokens", 8, "--limit", 4)
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert {row["status"] for row in rows} == {"unparsed"}
    assert all(row["text"] is not None and row["scores"] == {} for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--parity", "2", "--min-spearman", "0.5", "--compare", "saves/a"), "remove --min-spearman, --compare"),
        (("--parity", "--limit", "5", "--mode", "generate"), "remove --limit, --mode generate"),
        (("--exported", "somewhere", "--tolerance", "0"), "--exported, --tolerance: only used with --parity"),
        (("--predictions", "answers.jsonl"), "--predictions: only used with --exam or --best-of-n"),
        (("--server-model", "m"), "--server-model: only used with --predict-with"),
        (
            ("--exam", "e", "--server-model", "m", "--api-key-env", "OPENAI_API_KEY"),
            "--server-model, --api-key-env: only",
        ),
        (("--exam", "e", "--min-spearman", "0", "--best-of-n", "b"), "--exam: remove --best-of-n, --min-spearman,"),
        (("--best-of-n", "b", "--predictions", "p"), "--best-of-n with --predictions: remove --run,"),
    ],
)
def test_what_another_kind_of_evaluation_uses_is_not_ignored(run, arguments, message):
    with pytest.raises(UsageError, match=message):
        evaluate_judge("--run", run, *arguments)


def test_every_flag_in_the_table_can_be_typed():
    assert command._USED_BY.keys() <= vars(parser().parse_args([])).keys()


def test_a_comparison_under_a_limit_is_of_the_prompts_under_it(run, tmp_path, capsys):
    evaluate_judge("--run", run)
    capsys.readouterr()
    with pytest.raises(GateError, match="cannot decide"):
        evaluate_judge("--run", run, "--compare", run, "--limit", 9, "--json")
    printed = json.loads(capsys.readouterr().out)
    assert printed["comparison"]["groups"][0]["scores"] == printed["groups"][0]["scores"]


def test_an_evaluation_under_a_limit_replaces_no_complete_one(run, tmp_path):
    whole = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation*", "README.md", "cal*"))
    evaluate_judge("--run", whole, "--limit", 2)
    assert not any((whole / name).exists() for name in ("evaluation", "README.md", "calibration.json"))
    evaluate_judge("--run", whole)
    files = [whole / "README.md", whole / "calibration.json", *(whole / "evaluation").iterdir()]
    before = {file: file.read_bytes() for file in files if file.is_file()}
    evaluate_judge("--run", whole, "--limit", 2)
    assert before == {file: file.read_bytes() for file in before}
    metrics = json.loads((whole / "evaluation_limit_2" / "metrics.json").read_text())
    assert metrics["held_out"]["prompts_evaluated"] == 2


def test_code_that_models_bring_runs_only_where_that_was_typed(run, model_folders, tmp_path, monkeypatch):
    trusting = shutil.copytree(run, tmp_path / "run")
    config = json.loads((run / "run.json").read_text())["config"]
    write_json(trusting / "run.json", {"config": config | {"trust_remote_code": True}})
    exported = shutil.copytree(model_folders["qwen"], tmp_path / "exported_model")
    write_json(exported / "prmkit.json", {"template": "qwen", "cutoff_len": 2048})
    asked = []
    monkeypatch.setattr(command, "check_parity", lambda one, other, *_, **__: asked.append((one, other)))
    evaluate_judge("--run", trusting, "--parity", 1, "--exported", exported, "--trust-remote-code")
    prove_export(trusting, exported, trust_remote_code=True)
    prove_export(trusting, exported)
    assert [one.trust_remote_code for one, _ in asked] == [True, True, False]
    assert [other.trust_remote_code for _, other in asked] == [True, True, False]


def test_an_export_of_another_model_fails_the_parity_gate(run, model_folders, tmp_path):
    exported = shutil.copytree(model_folders["qwen"], tmp_path / "exported_model")
    write_json(exported / "prmkit.json", {"template": "qwen", "cutoff_len": 2048})
    with pytest.raises(GateError, match="scores differ from those of"):
        evaluate_judge("--run", run, "--parity", 2, "--exported", exported, "--tolerance", "1e-6")


def test_changed_prompts_are_scored_once_and_are_in_table_metrics_and_report(run, tmp_path, capsys):
    asked = ("--run", run, "--output", tmp_path, "--robustness", "--limit", 3)
    assert evaluate_judge(*asked) == ExitCode.DONE
    shown = capsys.readouterr().out
    assert "Changed prompts" in shown and "Wrong way: " in shown
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert {"whitespace", "praise"} <= {each["probe"] for each in metrics["robustness"]["probes"]}
    assert "Robustness to changed prompts" in (tmp_path / "report.html").read_text()
    changed = tmp_path / "predictions_changed.jsonl"
    before = changed.read_bytes()
    changed.write_bytes(before[: len(before) // 2])  # as a kill leaves it
    assert evaluate_judge(*asked) == ExitCode.DONE
    assert sorted(map(_identity, changed.read_bytes().splitlines())) == sorted(map(_identity, before.splitlines()))


def _identity(line: bytes) -> str:
    return json.loads(line)["prompt_sha256"]


@pytest.mark.parametrize("other", [("--parity", "2"), ("--exam", "exam.jsonl"), ("--best-of-n", "runs.jsonl")])
def test_changed_prompts_are_held_out_rows(run, other):
    with pytest.raises(UsageError, match="--robustness"):
        evaluate_judge("--run", run, "--robustness", *other)
