"""Two judges on the same yardstick: the difference, its interval, and when a comparison is refused or fails."""

import json
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from synthetic import MEDIANS, Judge, constant, noisy, predictions_of, write_data_folder, write_lines

from prmkit.errors import DataError, GateError
from prmkit.evaluation.compare import (
    compare,
    comparison_table,
    left_out,
    refuse_few_scores,
    refuse_low_spearman,
    refuse_worse,
)
from prmkit.evaluation.heldout import HeldOut, read_held_out
from prmkit.evaluation.metrics import metrics_of


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> HeldOut:
    return read_held_out(write_data_folder(tmp_path_factory.mktemp("data"), tasks=20), "reward_model_full_eval")


@pytest.fixture(scope="module")
def evaluated(held_out: HeldOut, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The evaluation folders of four judges."""
    judges = {"fine": noisy(0.08), "twin": noisy(0.08, seed=1), "poor": noisy(0.35), "constant": constant()}
    folder = tmp_path_factory.mktemp("evaluated")
    return {name: write_evaluation(folder / name / "evaluation", held_out, judge) for name, judge in judges.items()}


def write_evaluation(folder: Path, held_out: HeldOut, judge: Judge, rows: slice = slice(None)) -> Path:
    predictions = predictions_of(held_out, judge)[rows]
    folder.mkdir(parents=True)
    write_lines(folder / "predictions.jsonl", predictions)
    (folder / "metrics.json").write_text(json.dumps(metrics_of(predictions, None, held_out, MEDIANS)))
    return folder


def spearman_of(folder: Path) -> float:
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    pairs: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        for key in row["scores"].keys() & row["reference"].keys():
            pairs[row["evaluation_type"], key].append((row["scores"][key]["mean"], row["reference"][key]))
    large = [each for each in pairs.values() if len(each) >= 5]
    orders = [stats.spearmanr(*zip(*each, strict=True)).statistic for each in large]
    return float(np.average(orders, weights=list(map(len, large))))


def test_the_difference_is_that_of_the_two_figures(evaluated):
    everything = compare(evaluated["fine"], evaluated["poor"])["groups"][0]
    difference = everything["spearman_within_keys"]["difference"]
    assert difference["value"] == pytest.approx(spearman_of(evaluated["fine"]) - spearman_of(evaluated["poor"]))
    assert difference["low"] > 0
    assert everything["verdict"] == "better"


def test_a_worse_judge_fails_the_gate_and_a_better_one_passes(evaluated):
    refuse_worse(compare(evaluated["fine"], evaluated["poor"]))
    with pytest.raises(GateError, match="is worse than"):
        refuse_worse(compare(evaluated["poor"], evaluated["fine"]))


def test_two_equally_good_judges_show_no_difference(evaluated):
    comparison = compare(evaluated["fine"], evaluated["twin"])
    assert comparison["groups"][0]["verdict"] == "no difference shown"
    refuse_worse(comparison)
    assert all(len(row) == 10 for row in comparison_table(comparison))


def test_a_judge_compared_with_itself_does_not_differ_at_all(evaluated):
    for group in compare(evaluated["fine"], evaluated["fine"])["groups"]:
        assert group["mae"]["difference"]["low"] == group["mae"]["difference"]["high"] == 0.0


def test_pairing_makes_the_interval_narrower_than_two_separate_ones(evaluated):
    everything = compare(evaluated["fine"], evaluated["poor"])["groups"][0]["mae"]
    width = {name: figure["high"] - figure["low"] for name, figure in everything.items()}
    assert width["difference"] < width["this"] + width["other"]


def test_a_constant_judge_is_worse_though_it_has_no_order(evaluated):
    comparison = compare(evaluated["constant"], evaluated["fine"])
    assert comparison["groups"][0]["spearman_within_keys"]["difference"]["value"] is None
    assert comparison["groups"][0]["verdict"] == "worse"


def test_a_constant_judge_does_not_beat_one_with_the_right_order_by_its_error(held_out, tmp_path):
    ordered = write_evaluation(tmp_path / "ordered", held_out, lambda prompt, key: 0.45 * prompt.reference.get(key, 1))
    flat = write_evaluation(tmp_path / "flat", held_out, constant())
    comparison = compare(flat, ordered)
    everything = comparison["groups"][0]
    assert everything["mae"]["difference"]["high"] < 0
    assert everything["verdict"] == "mixed"
    with pytest.raises(GateError, match="always the same"):
        refuse_worse(comparison)
    assert compare(ordered, flat)["groups"][0]["verdict"] == "mixed"


def test_a_judge_that_makes_few_of_the_scores_fails_every_gate(held_out):
    rows = predictions_of(held_out, noisy(0.08))
    refuse_few_scores(metrics_of(rows, None, held_out, MEDIANS), "--compare")
    for row in rows[12:]:
        row |= {"status": "error", "reason": "out of memory", "scores": {}}
    with pytest.raises(
        GateError, match=r"--min-spearman: \d+ of \d+ scores were made \([\d.]+%\), at least 95% are needed"
    ):
        refuse_few_scores(metrics_of(rows, None, held_out, MEDIANS), "--min-spearman")


def test_a_comparison_can_be_of_some_prompts(evaluated, held_out):
    some = {prompt.prompt_sha256 for prompt in held_out.prompts[:40]}
    comparison = compare(evaluated["fine"], evaluated["poor"], some)
    rows = [json.loads(line) for line in (evaluated["fine"] / "predictions.jsonl").read_text().splitlines()]
    asked = sum(len(row["scores"].keys() & row["reference"].keys()) for row in rows if row["prompt_sha256"] in some)
    assert comparison["groups"][0]["scores"] == asked
    assert left_out(comparison) is None


def test_a_run_folder_is_as_good_as_its_evaluation_folder(evaluated):
    assert compare(evaluated["fine"], evaluated["poor"].parent)["other"] == str(evaluated["poor"])


def test_only_scores_of_both_are_compared_and_the_rest_is_counted(evaluated, held_out, tmp_path):
    half = write_evaluation(tmp_path / "half", held_out, noisy(0.08), slice(0, 40))
    comparison = compare(half, evaluated["fine"])
    assert comparison["scores_of_this_alone"] == 0
    assert f"left out are 0 of this judge and {comparison['scores_of_other_alone']} of the other" in left_out(
        comparison
    )
    whole = compare(evaluated["fine"], evaluated["fine"])["groups"][0]["scores"]
    assert comparison["groups"][0]["scores"] + comparison["scores_of_other_alone"] == whole


def test_another_yardstick_is_refused(evaluated, tmp_path):
    other = read_held_out(write_data_folder(tmp_path / "data", tasks=6, seed=99), "reward_model_full_eval")
    folder = write_evaluation(tmp_path / "other", other, noisy(0.1))
    with pytest.raises(DataError, match="different held-out rows"):
        compare(folder, evaluated["fine"])


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("metrics.json", "{}", r"metrics\.json: damaged: held_out is missing"),
        ("metrics.json", "[]", r"metrics\.json: damaged: it holds no object"),
        ("metrics.json", '{"held_out": {"dataset": "x"}}', "sha256 is missing"),
        ("predictions.jsonl", "{}\n", r"predictions\.jsonl: damaged: a line is no prediction"),
    ],
)
def test_a_damaged_evaluation_is_named(evaluated, tmp_path, name, text, told):
    damaged = shutil.copytree(evaluated["poor"], tmp_path / "damaged")
    (damaged / name).write_text(text)
    with pytest.raises(DataError, match=told):
        compare(evaluated["fine"], damaged)


def test_a_folder_that_was_not_evaluated_is_named(evaluated, tmp_path):
    with pytest.raises(DataError, match=f"{tmp_path}: no metrics.json"):
        compare(evaluated["fine"], tmp_path)


def test_the_least_spearman_is_a_gate(evaluated):
    fine, flat = (json.loads((evaluated[name] / "metrics.json").read_text()) for name in ("fine", "constant"))
    refuse_low_spearman(fine, 0.5)
    with pytest.raises(GateError, match="the Spearman correlation is"):
        refuse_low_spearman(fine, 0.999)
    with pytest.raises(GateError, match="there is no Spearman correlation"):
        refuse_low_spearman(flat, 0.0)
