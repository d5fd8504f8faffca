"""metrics.json, recomputed with scipy and scikit-learn from predictions; judges of known quality."""

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from synthetic import CONSTANTS, MEDIANS, constant, copier, noisy, predictions_of, pure_noise, usual, write_data_folder

from prmkit.evaluation import grade, summary
from prmkit.evaluation.baselines import _bounds
from prmkit.evaluation.estimates import Estimate, undefined
from prmkit.evaluation.evaluate import metrics_of
from prmkit.evaluation.heldout import HeldOut, read_held_out
from prmkit.evaluation.metrics import METRICS, STRICT, trajectory_metrics

NAME = "reward_model_full_eval"


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> HeldOut:
    return read_held_out(write_data_folder(tmp_path_factory.mktemp("data"), tasks=40), NAME)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> HeldOut:
    """A quarter of it, for what does not depend on how much there is."""
    return read_held_out(write_data_folder(tmp_path_factory.mktemp("small"), tasks=10), NAME)


@pytest.fixture(scope="module")
def rows(held_out: HeldOut) -> list[dict]:
    # Through JSON, as they come back from the disk.
    return json.loads(json.dumps(predictions_of(held_out, noisy(0.15))))


@pytest.fixture(scope="module")
def metrics(held_out: HeldOut, rows: list[dict]) -> dict:
    return metrics_of(rows, predictions_of(held_out, pure_noise(1)), held_out, CONSTANTS)


def group(metrics: dict, kind: str, key: str = "all") -> dict:
    return next(each for each in metrics["groups"] if (each["evaluation_type"], each["key"]) == (kind, key))


def pairs(rows: list[dict], kind: str | None = None, key: str | None = None) -> np.ndarray:
    """Predicted and reference of a group, read from the rows as a stranger would."""
    found = [
        (
            row["scores"][name]["mean"],
            row["reference"][name],
            row["scores"][name]["below"]["0.5"],
            row["scores"][name]["median"],
        )
        for row in rows
        for name in row["scores"]
        if name in row["reference"] and kind in (None, row["evaluation_type"]) and key in (None, name)
    ]
    return np.array(found)


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        (None, None),
        ("clip", None),
        ("clip", "reasonableness_score"),
        ("final", "answer_correctness"),
        ("category", None),
    ],
)
def test_every_metric_is_what_scipy_and_scikit_learn_say(metrics, rows, kind, key):
    from sklearn import metrics as sk

    found = group(metrics, kind or "all", key or "all")["judge"]
    predicted, reference, below, medians = pairs(rows, kind, key).T
    bad = reference < 0.5
    bands = [np.searchsorted([0.2, 0.4, 0.6, 0.8], values, side="right") for values in (predicted, reference)]
    expected = {
        "mae": sk.mean_absolute_error(reference, medians),
        "rmse": sk.root_mean_squared_error(reference, predicted),
        "bias": np.mean(predicted - reference),
        "pearson": stats.pearsonr(predicted, reference).statistic,
        "spearman": stats.spearmanr(predicted, reference).statistic,
        "kendall": stats.kendalltau(predicted, reference).statistic,
        "kappa": sk.cohen_kappa_score(*bands, labels=range(5), weights="quadratic"),
    }
    assert {name: found[name]["value"] for name in expected} == pytest.approx(expected, abs=1e-9)
    decisions = {
        "auroc": sk.roc_auc_score(bad, -predicted),
        "average_precision": sk.average_precision_score(bad, -predicted),
        "brier": sk.brier_score_loss(bad, below),
    }
    assert {name: found["bad_step"]["0.5"][name]["value"] for name in decisions} == pytest.approx(decisions, abs=1e-9)
    assert found["mae"]["n"] == len(predicted)


def test_pairs_are_counted_with_the_tasks_that_have_some(metrics, rows):
    steps: dict[str, list[str]] = {}
    for row in rows:
        if "reasonableness_score" in row["scores"]:
            steps.setdefault(row["task_id"], []).append(row["id"])
    numbers = [len(ids) for ids in steps.values() if len(ids) > 1]
    found = group(metrics, "clip", "reasonableness_score")["judge"]["pairwise_accuracy"]
    assert (found["n"], found["tasks"]) == (sum(n * (n - 1) // 2 for n in numbers), len(numbers))


def test_the_shown_correlation_is_the_mean_over_keys(metrics, rows):
    for kind, keys in (("clip", ["reasonableness_score", "correctness_score"]), ("final", list(MEDIANS["final"]))):
        parts = [pairs(rows, kind, key) for key in keys]
        orders = [stats.spearmanr(part[:, 0], part[:, 1]).statistic for part in parts]
        found = group(metrics, kind)["judge"]["spearman_within_keys"]
        assert found["value"] == pytest.approx(np.average(orders, weights=list(map(len, parts))))
    single = group(metrics, "final", "answer_correctness")["judge"]
    assert single["spearman_within_keys"] == pytest.approx(single["spearman"])


def test_skill_compares_the_mean_with_a_mean_and_the_median_with_a_median(metrics, rows):
    from sklearn import metrics as sk

    predicted, reference, _, medians = pairs(rows, "clip", "reasonableness_score").T
    mean, median = CONSTANTS["clip"]["reasonableness_score"]
    by_rmse = 1 - sk.root_mean_squared_error(reference, predicted) / np.sqrt(np.mean((mean - reference) ** 2))
    by_mae = 1 - np.mean(np.abs(medians - reference)) / np.mean(np.abs(median - reference))
    found = group(metrics, "clip", "reasonableness_score")
    assert found["judge"]["skill"]["value"] == pytest.approx(by_rmse)
    assert found["judge"]["skill_mae"]["value"] == pytest.approx(by_mae)
    constant = found["baselines"]["constant"]
    assert constant["mae"]["value"] == pytest.approx(np.mean(np.abs(median - reference)))
    assert constant["rmse"]["value"] == pytest.approx(np.sqrt(np.mean((mean - reference) ** 2)))


def test_every_entry_of_the_table_is_in_metrics_json_and_every_header_on_the_terminal(metrics):
    judge = metrics["groups"][0]["judge"]
    for metric in METRICS:
        assert metric.name in (judge["bad_step"][STRICT] if metric.at_thresholds else judge)
        assert not metric.header or metric.header in summary.COLUMNS


def test_intervals_hold_their_values(metrics):
    names = ("mae", "rmse", "bias", "skill", "pearson", "spearman")
    found = [each["judge"][name] for each in metrics["groups"] if each["tasks"] >= 20 for name in names]
    assert all(each["low"] <= each["value"] <= each["high"] for each in found) and len(found) > 50


def walk_estimates(value):
    if isinstance(value, dict):
        if {"value", "low", "high", "n", "tasks"} <= set(value):
            yield value
        else:
            for item in value.values():
                yield from walk_estimates(item)
    elif isinstance(value, list):
        for item in value:
            yield from walk_estimates(item)


@pytest.mark.parametrize("name", ["noisy", "constant", "usual", "noise", "copier"])
def test_nothing_is_ever_nan_and_what_is_missing_says_why(measured, name):
    json.dumps(measured(name), allow_nan=False)
    found = list(walk_estimates(measured(name)))
    assert len(found) > 500
    assert all(each["reason"] for each in found if each["value"] is None or each["low"] is None)


def test_the_ceiling_is_how_the_judges_agree_on_the_same_prompts(metrics, held_out):
    one, other = held_out.judges
    scores = np.array(
        [
            (prompt.references[one][key], prompt.references[other][key])
            for prompt in held_out.prompts
            if prompt.evaluation_type == "clip" and len(prompt.references) == 2
            for key in prompt.references[one]
        ]
    )
    ceiling = group(metrics, "clip")["ceiling"]
    (pair,) = ceiling["pairs"]
    r = stats.pearsonr(*scores.T).statistic
    assert pair["judges"] == [one, other] and pair["pearson"]["n"] == len(scores)
    assert pair["pearson"]["value"] == pytest.approx(r)
    assert pair["mae"]["value"] == pytest.approx(np.mean(np.abs(scores[:, 0] - scores[:, 1])))
    bounds = ceiling["bounds"]["pearson"]
    assert bounds["one_judge"]["value"] == pytest.approx(math.sqrt(r))
    several = np.mean([len(p.references) for p in held_out.prompts if p.evaluation_type == "clip"])
    assert bounds["mean_judge"]["value"] == pytest.approx(math.sqrt(several * r / (1 + (several - 1) * r)))


def test_the_bound_holds_for_a_judge_that_knows_the_truth():
    # Two judges with the same noise, and a third party who knows what both mean: it reaches the bound and not more.
    generator = np.random.default_rng(0)
    truth = generator.normal(0, 1, 20_000)
    one, other = (truth + generator.normal(0, 0.7, len(truth)) for _ in range(2))
    agreement = Estimate(float(stats.pearsonr(one, other).statistic), None, None, len(truth), 1)
    bounds = _bounds([agreement], judges=2.0, itself=undefined("nobody answered twice"), against=None)
    assert stats.pearsonr(truth, one).statistic == pytest.approx(bounds["one_judge"].value, abs=0.01)
    assert stats.pearsonr(truth, (one + other) / 2).statistic == pytest.approx(bounds["mean_judge"].value, abs=0.01)


# --- judges that are bad, each in its own way -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(held_out: HeldOut) -> Callable[[str], dict]:
    judges = {
        "noisy": noisy(0.08),
        "constant": constant(),
        "usual": usual(),
        "noise": pure_noise(),
        "copier": copier(),
    }

    @cache
    def measured_judge(name: str) -> dict:
        return metrics_of(predictions_of(held_out, judges[name]), None, held_out, CONSTANTS)

    return measured_judge


def conclusions_of(metrics: dict) -> dict[str, grade.Conclusion]:
    return {each.evaluation_type: each for each in grade.conclusions(metrics)}


def test_a_judge_that_has_learnt_is_called_useful(measured):
    clip = conclusions_of(measured("noisy"))["clip"]
    assert clip.grade == "useful"
    assert "as well as the judges agree with each other" in clip.headline


def test_a_constant_judge_is_called_one(measured):
    found = conclusions_of(measured("constant"))
    assert {each.grade for each in found.values()} == {"not_useful"}
    assert "gives everything the same score" in found["clip"].headline


def test_a_constant_judge_has_no_order_and_no_skill(measured):
    judge = group(measured("constant"), "clip", "reasonableness_score")["judge"]
    assert judge["spearman"]["value"] is None and "always the same" in judge["spearman"]["reason"]
    assert abs(judge["skill"]["value"]) < 0.05
    assert judge["kappa"]["value"] == pytest.approx(0.0)
    assert judge["bad_step"]["0.5"]["auroc"]["value"] == pytest.approx(0.5)
    assert judge["bad_step"]["0.5"]["average_precision"]["value"] == pytest.approx(
        judge["bad_step"]["0.5"]["bad_share"]["value"]
    )
    assert judge["pairwise_accuracy"]["value"] == pytest.approx(judge["pairwise_always_tied"]["value"])


def test_a_judge_that_says_each_keys_usual_score_is_no_better_than_a_constant(measured):
    clip = group(measured("usual"), "clip")["judge"]
    assert clip["spearman"]["low"] > 0  # so it would pass, with its two keys pooled
    assert clip["spearman_within_keys"]["value"] is None
    assert {each.grade for each in conclusions_of(measured("usual")).values()} == {"not_useful"}


def test_noise_is_called_noise(measured):
    found = conclusions_of(measured("noise"))
    assert {each.grade for each in found.values()} == {"not_useful"}
    everything = group(measured("noise"), "all")["judge"]
    assert everything["skill"]["value"] < 0
    assert everything["spearman"]["low"] < 0 < everything["spearman"]["high"]


def test_a_copier_looks_great_until_it_is_compared_with_copying(measured):
    category = group(measured("copier"), "category")
    assert category["judge"]["spearman"]["value"] > 0.7  # so it would pass, seen by itself
    copying = category["baselines"]["copy"]
    assert abs(copying["skill"]["value"]) < 0.1
    assert copying["judge_equals_copy"]["value"] > 0.5 > copying["reference_equals_copy"]["value"]
    found = conclusions_of(measured("copier"))
    assert {kind: each.grade for kind, each in found.items()} == dict.fromkeys(found, "not_useful")
    assert "repeats the scores that the prompt shows" in found["category"].headline


def test_the_copy_baseline_is_the_better_of_mean_and_last(metrics, rows):
    leaked = [row for row in rows if row["evaluation_type"] == "final"]
    errors = {
        which: np.mean([abs(row[field] - row["reference"][key]) for row in leaked for key in row["reference"]])
        for which, field in (("mean", "leaked_score"), ("last", "leaked_last"))
    }
    copying = group(metrics, "final")["baselines"]["copy"]
    assert copying["copied"] == min(errors, key=errors.get)
    assert copying["copy"]["mae"]["value"] == pytest.approx(min(errors.values()))


def test_the_base_model_is_measured_on_the_same_scores(metrics):
    base = group(metrics, "clip")["baselines"]["base_model"]
    assert base["base"]["mae"]["n"] == base["judge"]["mae"]["n"]
    assert base["base"]["mae"]["value"] > base["judge"]["mae"]["value"]
    assert base["skill"]["value"] > 0.5


# --- where there is little, or something is missing -------------------------------------------------------------------


def test_few_scores_give_errors_but_no_order(held_out):
    rows = predictions_of(held_out, noisy(0.1))[:4]
    metrics = metrics_of(rows, None, held_out, CONSTANTS)
    everything = group(metrics, "all")["judge"]
    assert everything["mae"]["value"] is not None
    assert "at least 10" in everything["spearman"]["reason"] or everything["spearman"]["low"] is None
    assert {each.grade for each in grade.conclusions(metrics)} == {"unknown"}


def test_generated_scores_have_no_probability_and_say_so(held_out):
    metrics = metrics_of(predictions_of(held_out, noisy(0.1), mode="generate")[:120], None, held_out, CONSTANTS)
    decision = group(metrics, "clip")["judge"]["bad_step"]["0.5"]
    assert decision["auroc"]["value"] > 0.9
    assert decision["brier"]["value"] is None and decision["brier"]["reason"] == "nothing to measure"


def test_prompts_without_scores_are_counted_and_enter_no_metric(small):
    rows = predictions_of(small, noisy(0.1))
    lost = rows[0]["scores"]
    rows[0] |= {"status": "too_long", "reason": "9,000 tokens", "scores": {}}
    metrics = metrics_of(rows, None, small, CONSTANTS)
    assert metrics["validity"]["all"]["statuses"] == {"too_long": 1, "ok": len(rows) - 1}
    assert metrics["validity"]["all"]["reasons"] == {"9,000 tokens": 1}
    assert group(metrics, "all")["scores"] == sum(len(row["scores"]) for row in rows) > 0 < len(lost)
    assert metrics["trajectory"]["left_out"] == {"a step without a score": 1}
    assert "1 9,000 tokens" in summary.validity_sentence(metrics)


@pytest.mark.parametrize("nothing", [None, math.nan])
def test_scores_that_are_not_numbers_are_counted_and_enter_no_metric(small, nothing):
    rows = predictions_of(small, noisy(0.1))
    for row in rows[::3]:
        for score in row["scores"].values():
            score |= dict.fromkeys(score, nothing) | {"below": None}
    metrics = metrics_of(rows, None, small, CONSTANTS)
    every = metrics["validity"]["all"]
    assert 0 < group(metrics, "all")["scores"] == every["scores_made"] < every["scores_asked"]
    assert metrics["trajectory"]["left_out"]["a step without a score"]
    assert "nan" not in " ".join([*summary.conclusion_lines(metrics), str(summary.main_table(metrics))])
    json.dumps(metrics, allow_nan=False)


def test_undefined_metrics_are_reported_without_a_number(metrics):
    undefined = json.loads(json.dumps(metrics))
    for each in walk_estimates(undefined):
        each |= {"value": None, "low": None, "high": None, "reason": "not defined for these scores"}
    assert {each.grade for each in grade.conclusions(undefined)} == {"unknown"}
    assert "label mass is – on average" in summary.conclusion_lines(undefined)[-1]
    assert summary.main_table(undefined, intervals=True)


def test_without_training_labels_the_best_constant_in_hindsight_is_the_baseline(held_out):
    rows = predictions_of(held_out, noisy(0.1))[:60]
    found = group(metrics_of(rows, None, held_out, {}), "clip", "reasonableness_score")
    reference = pairs(rows, "clip", "reasonableness_score")[:, 1]
    assert found["baselines"]["constant"]["rmse"]["value"] == pytest.approx(np.std(reference))


# --- trajectories -----------------------------------------------------------------------------------------------------


def test_step_scores_against_the_answer_by_hand(metrics, rows):
    clips: dict[str, list[tuple[int, float]]] = {}
    outcomes = {}
    for row in rows:
        if row["evaluation_type"] == "clip":
            (score,) = row["scores"].values()
            clips.setdefault(row["task_id"], []).append((row["clip_number"], score["mean"]))
        if row["evaluation_type"] == "final":
            outcomes[row["task_id"]] = row["reference"]["answer_correctness"]
    steps = {task: [score for _, score in sorted(scores)] for task, scores in clips.items()}
    for name, together in {"min": min, "product": math.prod, "mean": np.mean, "last": lambda s: s[-1]}.items():
        expected = stats.spearmanr([together(steps[t]) for t in outcomes], [outcomes[t] for t in outcomes]).statistic
        found = metrics["trajectory"]["aggregates"][name]["judge"]["spearman"]
        assert found["value"] == pytest.approx(expected)
        assert found["n"] == len(outcomes)


def test_a_perfect_judge_finds_every_first_bad_step(held_out):
    perfect = predictions_of(held_out, lambda prompt, key: prompt.reference.get(key, 0.5), mode="generate")
    first = trajectory_metrics(perfect)["first_bad_step"]["0.5"]
    assert first["f1"].value == pytest.approx(1.0)
    assert first["found"] == first["with_bad_step"] > 0
    never = trajectory_metrics(predictions_of(held_out, constant(0.9)))
    assert never["first_bad_step"]["0.5"]["f1"].value == 0.0


def test_a_task_that_was_run_twice_is_left_out_of_the_trajectories(held_out):
    rows = predictions_of(held_out, noisy(0.1))
    clip = next(row for row in rows if row["evaluation_type"] == "clip")
    again = clip | {"prompt_sha256": "another"}
    assert trajectory_metrics([*rows, again])["left_out"] == {
        "two prompts for one clip number (give each run a trajectory_id)": 1
    }


# --- the held-out rows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("formatting", ["alpaca", "sharegpt"])
def test_rows_of_one_prompt_become_one_with_every_judge(tmp_path: Path, formatting: str):
    held_out = read_held_out(write_data_folder(tmp_path, tasks=3, formatting=formatting), NAME)
    assert len({prompt.prompt_sha256 for prompt in held_out.prompts}) == len(held_out.prompts) < held_out.rows
    both = next(prompt for prompt in held_out.prompts if len(prompt.references) == 2)
    key = both.shape.keys[0]
    mean = np.mean([scores[key] for scores in both.references.values()])
    assert both.reference[key] == pytest.approx(mean, abs=0.01)  # corrected for leniency


def test_both_formats_are_the_same_reference(tmp_path: Path):
    alpaca, sharegpt = (
        read_held_out(write_data_folder(tmp_path / formatting, tasks=3, formatting=formatting), NAME)
        for formatting in ("alpaca", "sharegpt")
    )
    assert alpaca.sha256 == sharegpt.sha256
    assert [prompt.prompt for prompt in alpaca.prompts] == [prompt.prompt for prompt in sharegpt.prompts]


def test_a_model_that_does_not_want_to_score_is_not_called_a_judge(held_out):
    rows = predictions_of(held_out, noisy(0.05))
    for row in rows:
        for score in row["scores"].values():
            score["label_mass"] = 0.02
    metrics = metrics_of(rows, None, held_out, CONSTANTS)
    found = conclusions_of(metrics)
    assert {each.grade for each in found.values()} == {"not_useful"}
    assert "2% of its probability" in found["clip"].headline
    assert "below one half for 100.0% of the scores" in summary.validity_sentence(metrics)
