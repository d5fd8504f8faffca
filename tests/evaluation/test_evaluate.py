"""The evaluation of a real, tiny judge: its files, continuing after a kill, and the command line around it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import orjson
import pytest
from synthetic import CONSTANTS, noisy, predictions_of, write_data_folder, write_lines

from prmkit.errors import DataError, ExitCode, UsageError
from prmkit.evaluation import evaluate
from prmkit.evaluation.evaluate import EvaluationSettings
from prmkit.evaluation.heldout import HeldOutPrompt, place_of_held_out, read_held_out, sampled, training_constants
from prmkit.evaluation.predictions import resume
from prmkit.judge.sources import JudgeSource
from prmkit.judge.types import Request, ScoringOptions
from prmkit.resumable import reopen
from prmkit.rows import SELECTED_BY, WEIGHT, weight_of

REPOSITORY = Path(__file__).parents[2]
NAME = "reward_model_full_eval"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data_folder(tmp_path_factory.mktemp("data"), tasks=4)


@pytest.fixture(scope="module")
def source(model_folders: dict[str, Path]) -> JudgeSource:
    return JudgeSource(model_folders["qwen"], template="qwen", cutoff_len=2048)


@pytest.fixture(scope="module")
def evaluation(data: Path, source: JudgeSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished evaluation."""
    folder = tmp_path_factory.mktemp("evaluation")
    evaluate.evaluate(source, read_held_out(data, NAME), CONSTANTS, folder, EvaluationSettings(), None)
    return folder


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def test_every_prompt_has_one_line_with_what_the_judge_said(evaluation, data, judges):
    held_out = read_held_out(data, NAME)
    rows = {row["prompt_sha256"]: row for row in rows_of(evaluation)}
    assert set(rows) == {prompt.prompt_sha256 for prompt in held_out.prompts}
    assert len(rows_of(evaluation)) == len(rows)
    prompt = held_out.prompts[-1]
    (alone,) = judges["qwen"].score([Request(prompt.prompt, prompt.shape)])
    row = rows[prompt.prompt_sha256]
    assert row["status"] == alone.status
    assert row["references"] == prompt.references
    for key, said in alone.scores.items():
        assert row["scores"][key]["mean"] == pytest.approx(said.mean, abs=1e-4)
        assert row["scores"][key]["below"]["0.5"] == pytest.approx(said.below[0.5], abs=1e-4)


def test_metrics_and_report_are_written_with_the_predictions(evaluation):
    metrics = orjson.loads((evaluation / "metrics.json").read_bytes())
    assert metrics["groups"][0]["scores"] == sum(len(row["scores"]) for row in rows_of(evaluation))
    assert metrics["judge"]["template"] == "qwen" and metrics["mode"] == "expected"
    assert (evaluation / "report.html").read_text().startswith("<!doctype html>")


def test_a_limit_for_the_label_mass_is_used_and_is_another_evaluation(evaluation, data, source, tmp_path):
    assert "ok" in {row["status"] for row in rows_of(evaluation)}
    shutil.copytree(evaluation, tmp_path / "strict")
    settings = EvaluationSettings(ScoringOptions(min_label_mass=1.0), limit=3)
    evaluate.evaluate(source, read_held_out(data, NAME), CONSTANTS, tmp_path / "strict", settings, None)
    rows = rows_of(tmp_path / "strict")
    assert len(rows) == 3 and all("label_mass" in row["reason"] for row in rows)


def test_a_second_evaluation_scores_nothing_again(evaluation, data, source, monkeypatch):
    # Without its weights the judge could not be asked even once.
    before = (evaluation / "predictions.jsonl").read_bytes()
    monkeypatch.setattr(evaluate, "_judged", None)
    evaluate.evaluate(source, read_held_out(data, NAME), CONSTANTS, evaluation, EvaluationSettings(), None)
    assert (evaluation / "predictions.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_killed_evaluation_continues_where_it_stopped(data, source, tmp_path):
    command = [
        *(sys.executable, "evaluate_judge.py", "--model", str(source.model), "--template", "qwen"),
        *("--data-dir", str(data), "--output", str(tmp_path), "--cutoff-len", "2048", "--batch-size", "1"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    predictions = tmp_path / "predictions.jsonl"
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and (not predictions.is_file() or predictions.read_bytes().count(b"\n") < 2):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, "it was done before it could be killed"
    kept = predictions.read_bytes()
    whole = kept[: kept.rfind(b"\n") + 1]
    predictions.write_bytes(whole + b'{"id":"half a li')  # what a kill in the middle of a write leaves
    again = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == ExitCode.DONE, again.stderr
    assert "prompts are already scored" in again.stderr
    assert predictions.read_bytes().startswith(whole)
    hashes = [row["prompt_sha256"] for row in rows_of(tmp_path)]
    assert len(hashes) == len(set(hashes)) == len(read_held_out(data, NAME).prompts)
    assert "reasonableness_score" in again.stdout and str(tmp_path / "report.html") in again.stdout


def test_predictions_of_another_kind_are_kept_aside_not_mixed(tmp_path):
    file = tmp_path / "predictions.jsonl"
    assert reopen(file, {"judge": "one"}) == []
    write_lines(file, [{"prompt_sha256": "a"}])
    assert reopen(file, {"judge": "one"}) == [{"prompt_sha256": "a"}]
    assert reopen(file, {"judge": "two"}) == []
    assert not file.exists()
    assert json.loads((tmp_path / "predictions.old1.jsonl").read_text()) == {"prompt_sha256": "a"}


def test_the_base_model_is_asked_beside_an_adapter_only(data, source, tmp_path):
    with pytest.raises(UsageError, match="needs a judge with an adapter"):
        evaluate.evaluate(
            source, read_held_out(data, NAME), CONSTANTS, tmp_path, EvaluationSettings(with_base=True), None
        )


def test_results_do_not_go_where_a_file_is(data, source, tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match="is a file, but the results need a folder"):
            evaluate.evaluate(source, read_held_out(data, NAME), CONSTANTS, folder, EvaluationSettings(), None)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_judge_that_can_score_nothing_is_an_error_with_the_reason(data, source, tmp_path):
    from dataclasses import replace

    tight = replace(source, cutoff_len=40)
    with pytest.raises(DataError, match=r"none of \d+ prompts got a score. .* tokens"):
        evaluate.evaluate(
            tight, read_held_out(data, NAME), CONSTANTS, tmp_path, EvaluationSettings(ScoringOptions(trim=False)), None
        )


def tasks_of(prompts: Iterable[HeldOutPrompt]) -> Counter[str]:
    return Counter(prompt.task for prompt in prompts)


def test_a_limit_takes_the_same_prompts_and_more(data):
    prompts = read_held_out(data, NAME).prompts
    for limit in range(1, len(prompts)):
        few, more = (list(sampled(prompts, each)) for each in (limit, limit + 1))
        assert more[: len(few)] == few and 0 < len(few) <= limit
    assert sorted(p.id for p in sampled(prompts, None)) == sorted(p.id for p in prompts)


def test_a_limit_cuts_between_tasks_unless_the_first_one_is_larger(data):
    prompts = read_held_out(data, NAME).prompts
    (first, size), (_, next_size), *_ = tasks_of(sampled(prompts, None)).items()
    assert tasks_of(sampled(prompts, size + next_size - 1)) == {first: size}
    assert tasks_of(sampled(prompts, size - 1)) == {first: size - 1}
    whole = tasks_of(prompts)
    assert all(n == whole[task] for task, n in tasks_of(sampled(prompts, len(prompts) - 1)).items())


# --- where the held-out rows are --------------------------------------------------------------------------------------


def test_a_run_is_measured_on_its_own_held_out_rows():
    config = {"dataset_dir": "elsewhere", "eval_dataset": "reward_model_clip_eval"}
    assert place_of_held_out(config, None, None) == (Path("elsewhere"), "reward_model_clip_eval")
    assert place_of_held_out(config, Path("here"), "mine") == (Path("here"), "mine")
    assert place_of_held_out({}, None, None) == (Path("data"), NAME)
    with pytest.raises(UsageError, match="--dataset a_eval"):
        place_of_held_out({"eval_dataset": "a_eval, b_eval"}, None, None)


def test_a_dataset_that_is_not_there_names_those_that_are(data):
    with pytest.raises(UsageError, match=f"The held-out datasets are {NAME}"):
        read_held_out(data, "reward_model_clip_eval")


def test_a_sidecar_that_does_not_fit_is_an_error(tmp_path):
    folder = write_data_folder(tmp_path, tasks=2)
    sidecar = folder / f"{NAME}.meta.jsonl"
    sidecar.write_text("".join(sidecar.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(DataError, match="do not match"):
        read_held_out(folder, NAME)


def test_rows_for_training_are_not_taken_for_held_out_ones(tmp_path):
    folder = write_data_folder(tmp_path, tasks=2, name="reward_model_clip")
    with pytest.raises(UsageError, match=r"these rows are for training.* --dataset reward_model_clip_eval"):
        read_held_out(folder, "reward_model_clip")


def test_a_run_is_not_measured_on_what_it_was_trained_on():
    config = {"dataset": "reward_model_full, another_eval", "eval_dataset": "reward_model_full"}
    with pytest.raises(UsageError, match=r"the run was trained on it.* --dataset reward_model_full_eval"):
        place_of_held_out(config, None, None)
    with pytest.raises(UsageError, match="another_eval: the run was trained on it"):
        place_of_held_out(config, Path("elsewhere"), "another_eval")
    assert place_of_held_out(config, None, "reward_model_full_eval")[1] == "reward_model_full_eval"


def test_the_constants_are_those_of_the_training_rows_of_the_same_variant(tmp_path):
    folder = write_data_folder(tmp_path, tasks=2)
    assert training_constants(folder, NAME) == {}
    (folder / "reward_model_full.meta.jsonl").write_bytes((folder / f"{NAME}.meta.jsonl").read_bytes())
    found = training_constants(folder, NAME)
    scores = [row["scores"] for row in map(json.loads, (folder / f"{NAME}.meta.jsonl").read_text().splitlines())]
    clips = [each["reasonableness_score"] for each in scores if "reasonableness_score" in each]
    assert found["clip"]["reasonableness_score"] == pytest.approx((np.mean(clips), np.median(clips)))
    metas = [json.loads(line) for line in (folder / f"{NAME}.meta.jsonl").read_text().splitlines()]
    for meta in metas:
        meta["metadata"][WEIGHT] = 1 + 3 * (meta["scores"].get("reasonableness_score", 1) < 0.6)
    write_lines(folder / "reward_model_full.meta.jsonl", metas)
    often = np.repeat(clips, [4 if score < 0.6 else 1 for score in clips])
    found = training_constants(folder, NAME)["clip"]["reasonableness_score"]
    assert found == pytest.approx((np.mean(often), np.median(often)))


def test_a_prompt_weighs_as_its_most_certain_row_and_a_bad_weight_is_an_error(tmp_path):
    folder = write_data_folder(tmp_path, tasks=4)
    sidecar = folder / f"{NAME}.meta.jsonl"
    metas = [json.loads(line) for line in sidecar.read_text().splitlines()]
    rows_of = Counter(meta["prompt_sha256"] for meta in metas)
    one, other, *_ = (sha256 for sha256, count in rows_of.items() if count > 1)
    plain = read_held_out(folder, NAME)

    def weighted(sha256: str, *selections: dict) -> HeldOutPrompt:
        for meta, selection in zip([m for m in metas if m["prompt_sha256"] == sha256], selections, strict=False):
            meta["metadata"] |= selection
        write_lines(sidecar, metas)
        assert read_held_out(folder, NAME).sha256 != plain.sha256
        return next(prompt for prompt in read_held_out(folder, NAME).prompts if prompt.prompt_sha256 == sha256)

    audit, unsure = ({SELECTED_BY: by, WEIGHT: weight} for by, weight in (("audit", 5.0), ("unsure", 1.0)))
    every = rows_of[one]
    assert weighted(one, *[audit] * every).metadata.items() >= audit.items()
    assert weighted(one, audit, *[unsure] * (every - 1)).metadata.items() >= unsure.items()
    mixed = weighted(other, audit)
    assert WEIGHT not in mixed.metadata  # its other rows were asked for whatever the judge said
    assert list(mixed.weights.values()) == [5.0] and mixed.weights.keys() < mixed.references.keys()
    for wrong in (0, -1.0, "2", None, True, float("inf")):
        with pytest.raises(DataError, match=r"metadata\.selection_weight of a row of task .* must be a number above 0"):
            weight_of({"task_id": "t", WEIGHT: wrong})


def test_rows_without_an_evaluation_type_are_a_group_of_that_name(tmp_path):
    folder = write_data_folder(tmp_path, tasks=2)
    sidecar = folder / f"{NAME}.meta.jsonl"
    metas = [json.loads(line) for line in sidecar.read_text().splitlines()]
    for meta in metas:
        meta["metadata"].pop("evaluation_type", None)
    for file in (sidecar, folder / "reward_model_full.meta.jsonl"):
        write_lines(file, metas)
    assert {prompt.evaluation_type for prompt in read_held_out(folder, NAME).prompts} == {"no type"}
    assert training_constants(folder, NAME).keys() == {"no type"}


def test_a_task_called_nought_is_a_task_and_clip_numbers_are_read_as_they_come(tmp_path):
    folder = write_data_folder(tmp_path, tasks=1)
    sidecar = folder / f"{NAME}.meta.jsonl"
    metas = [json.loads(line) for line in sidecar.read_text().splitlines()]
    numbers = [1.0, "1", "first", None, 2]
    for meta in metas:
        position = int(meta["prompt_sha256"], 16) % len(numbers)
        meta["metadata"] |= {"task_id": 0, "clip_number": numbers[position]}
    write_lines(sidecar, metas)
    for prompt in read_held_out(folder, NAME).prompts:
        assert prompt.task == "0"
        assert prompt.clip_number == [1, 1, None, None, 2][int(prompt.prompt_sha256, 16) % len(numbers)]


def test_the_judge_gets_a_control_marker_in_a_prompt_as_the_user_wrote_it(tmp_path):
    folder = write_data_folder(tmp_path, tasks=1)
    file = folder / f"{NAME}.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[0]["instruction"] = "<\\|im_end|> " + rows[0]["instruction"]
    write_lines(file, rows)
    assert read_held_out(folder, NAME).prompts[0].prompt.startswith("<|im_end|> ")


# --- the command line -------------------------------------------------------------------------------------------------


def evaluate_judge(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "evaluate_judge.py", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def test_every_gate_that_fails_is_named_after_the_metrics_and_the_exit_code_is_4(evaluation, data, source):
    asked = ("--model", source.model, "--template", "qwen", "--cutoff-len", 2048, "--data-dir", data)
    result = evaluate_judge(*asked, "--output", evaluation, "--json", "--min-spearman", "0.99", "--compare", evaluation)
    assert result.returncode == ExitCode.GATE, result.stderr
    printed = json.loads(result.stdout)
    assert printed["comparison"]["groups"][0]["verdict"] == "cannot decide"
    assert "--compare: cannot decide on clip" in result.stderr
    assert "--min-spearman 0.99: clip: cannot be decided" in result.stderr and "Traceback" not in result.stderr
    assert (evaluation / "comparison.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--run", "/nowhere"), ExitCode.DATA, "not a training run"),
        (("--run", "a", "--model", "b"), ExitCode.USAGE, "--run and --model are mutually exclusive"),
        (("--limit", "0"), ExitCode.USAGE, "--limit"),
        (("--model", "nowhere"), ExitCode.DATA, "error: nowhere: no such folder. Check --run or --model."),
        (("--min-spearman", "nan"), ExitCode.USAGE, "--min-spearman"),
        (("--parity", "--tolerance", "inf"), ExitCode.USAGE, "--tolerance"),
        (("--margin", "0.05"), ExitCode.USAGE, "Add --compare RUN"),
        (("--margin", "0", "--compare", "x"), ExitCode.USAGE, "must be above 0"),
    ],
)
def test_mistakes_are_reported_without_a_traceback(arguments, code, message):
    result = evaluate_judge(*arguments)
    assert result.returncode == code
    assert message in result.stderr and "Traceback" not in result.stderr
    assert not result.stdout


def test_predictions_are_read_as_they_are_written(data, tmp_path):
    rows = predictions_of(read_held_out(data, NAME), noisy(0.1))
    file = tmp_path / "predictions.jsonl"
    resume(file, {})
    assert list(evaluate.append_rows(file, rows)) == rows
    assert resume(file, {}) == json.loads(json.dumps(rows))
