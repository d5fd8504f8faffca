"""Baselines and ceiling are measured on the same scores as the judge."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from synthetic import CONSTANTS, copier, made_up, noisy, predictions_of, write_data_folder

from prmkit.evaluation.baselines import against_each, baselines, breakdown, ceiling, grouping_keys, halves, shared
from prmkit.evaluation.estimates import undefined
from prmkit.evaluation.heldout import HeldOut, read_held_out
from prmkit.evaluation.metrics import METRICS, agreement
from prmkit.evaluation.predictions import Scores, table_of_scores

UNKNOWN = undefined("no judge answered twice")


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> HeldOut:
    return read_held_out(write_data_folder(tmp_path_factory.mktemp("data"), tasks=15), "reward_model_full_eval")


def clips(held_out: HeldOut, rows: list[dict]) -> Scores:
    scores = table_of_scores(rows, held_out.judges, CONSTANTS)
    return scores.where(scores.key == "reasonableness_score")


def test_shared_scores_are_put_side_by_side_whatever_their_order(held_out):
    rows = predictions_of(held_out, noisy(0.1))
    mine, theirs = clips(held_out, rows), clips(held_out, rows[::-1][:40])
    one, other = shared(mine, theirs)
    assert len(one) == len(theirs) < len(mine)
    assert list(one.prompt) == list(other.prompt)
    assert np.array_equal(one.predicted, other.predicted)


def test_a_judge_that_is_one_of_the_judges_agrees_with_itself(held_out):
    scores = clips(held_out, predictions_of(held_out, noisy(0.1)))
    both = scores.where(np.flatnonzero(np.isfinite(scores.references).all(axis=1)))
    twin = both.predicting(both.references[:, 0])
    against = against_each(twin, held_out.judges)
    rho = stats.spearmanr(both.references[:, 0], both.references[:, 1]).statistic
    assert against[held_out.judges[0]]["spearman_within_keys"].value == pytest.approx(1.0)
    assert against[held_out.judges[0]]["mae"].value == 0.0
    assert ceiling(twin, held_out.judges, UNKNOWN)["gap"].value == pytest.approx((1 + rho) / 2 - rho)


def test_against_one_judge_each_metric_is_what_it_is_against_their_mean(held_out):
    """The absolute error is that of the median, everywhere in the report's table."""
    scores = clips(held_out, predictions_of(held_out, noisy(0.1)))
    scores = replace(scores, median=np.round(scores.median, 1))
    given = np.isfinite(scores.references[:, 0])
    errors = np.abs(scores.median - scores.references[:, 0])[given]
    found = against_each(scores, held_out.judges)[held_out.judges[0]]
    assert found["mae"].value == pytest.approx(errors.mean())
    brief = agreement(scores, brief=True)
    assert found.keys() == brief.keys() and found["bad_step"].keys() == brief["bad_step"].keys()
    assert {metric.name for metric in METRICS if metric.brief and not metric.at_thresholds} < found.keys()


def test_a_judge_that_was_asked_only_about_selected_prompts_is_weighed_where_it_is_compared(held_out):
    chance = np.random.default_rng(0)
    asked_later = held_out.judges[1]
    prompts = tuple(replace(each, weights={asked_later: float(chance.integers(1, 6))}) for each in held_out.prompts)
    scores = clips(held_out, predictions_of(replace(held_out, prompts=prompts), noisy(0.1)))
    assert np.all(scores.weight == 1) and np.all(scores.judge_weights[:, 0] == 1)
    weight = scores.judge_weights[:, 1]
    both = np.isfinite(scores.references).all(axis=1)
    often = scores.where(np.repeat(np.flatnonzero(both), weight[both].astype(int)))
    often = replace(often, judge_weights=np.ones_like(often.judge_weights))
    found, expected = (ceiling(each, held_out.judges, UNKNOWN) for each in (scores, often))
    for name in ("pearson", "mae", "spearman_within_keys"):
        assert found["pairs"][0][name].value == pytest.approx(expected["pairs"][0][name].value)
    assert found["gap"].value == pytest.approx(expected["gap"].value)
    against, plain = (
        against_each(each, held_out.judges) for each in (scores, clips(held_out, predictions_of(held_out, noisy(0.1))))
    )
    given = np.isfinite(scores.references[:, 1])
    errors = (scores.predicted - scores.references[:, 1])[given]
    assert against[asked_later]["bias"].value == pytest.approx(np.average(errors, weights=weight[given]))
    assert against[held_out.judges[0]]["bias"] == plain[held_out.judges[0]]["bias"]


def test_one_judge_alone_has_no_ceiling_and_says_so(held_out):
    scores = clips(held_out, predictions_of(held_out, noisy(0.1)))
    alone = replace(scores, references=scores.references[:, :1])
    found = ceiling(alone, held_out.judges[:1], UNKNOWN)
    assert found["pairs"] == []
    assert found["gap"].value is None and found["gap"].reason
    assert found["bounds"]["pearson"]["mean_judge"].reason == "no score has two judges"


def test_copying_is_measured_only_where_there_is_something_to_copy(held_out):
    rows = predictions_of(held_out, copier())
    scores = table_of_scores(rows, held_out.judges, CONSTANTS)
    leaked = sum(len(row["scores"].keys() & row["reference"].keys()) for row in rows if row["leaked_score"] is not None)
    copying = baselines(scores, None)["copy"]
    assert copying["copy"]["mae"].n == copying["judge"]["mae"].n == leaked < len(scores)
    masked = [row | {"leaked_score": None, "leaked_last": None} for row in rows]
    assert "copy" not in baselines(table_of_scores(masked, held_out.judges, CONSTANTS), None)


def test_rankings_by_length_and_position_are_baselines_and_a_judge_of_length_adds_nothing():
    held_out = made_up(final=False)
    longer = tuple(
        replace(prompt, prompt="x" * int(1000 * prompt.reference["quality"] + 50)) for prompt in held_out.prompts
    )
    rows = predictions_of(replace(held_out, prompts=longer), lambda prompt, key: len(prompt.prompt) / 1100)
    found = baselines(table_of_scores(rows, held_out.judges, {}), None)
    assert found["length"]["spearman_within_keys"].value == pytest.approx(1.0, abs=0.01)
    assert found["length"]["gain"].value == pytest.approx(0.0)
    assert abs(found["position"]["spearman_within_keys"].value) < 0.3
    assert found["position"]["gain"].low > 0


def test_the_order_is_measured_on_two_halves_of_the_tasks():
    held_out = made_up(final=False)
    rows = predictions_of(held_out, noisy(0.1))
    scores = table_of_scores(rows, held_out.judges, {})
    one, other = halves(scores)
    assert one.tasks + other.tasks == 60
    assert one.n + other.n == len(scores)
    assert min(one.value, other.value) > 0.6


def test_groups_are_found_in_the_metadata_and_measured_apart():
    held_out = made_up(final=False)
    rows = predictions_of(held_out, lambda p, key: p.reference[key] if p.metadata["agent"] == "alpha" else 0.5)
    scores = table_of_scores(rows, held_out.judges, {})
    assert grouping_keys(rows) == ["task_group", "agent"]
    found = {group["value"]: group for group in breakdown(scores, rows, "agent")}
    assert found["alpha"]["spearman_within_keys"].value == pytest.approx(1.0)
    assert found["beta"]["spearman_within_keys"].value is None
    assert found["alpha"]["scores"] + found["beta"]["scores"] == len(scores)
    assert found["alpha"].keys() >= agreement(scores, brief=True).keys()
    assert breakdown(scores, rows, "language") == []
