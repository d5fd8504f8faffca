"""Two judges on the same held-out rows: the difference, its interval, and when a gate is closed."""

import json
import re
import shutil
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from synthetic import CONSTANTS, Judge, constant, made_up, noisy, predictions_of, write_data_folder, write_lines

from prmkit import cli
from prmkit.errors import DataError, GateError
from prmkit.evaluation.compare import (
    COLUMNS,
    NUMERIC,
    OPTIONAL,
    check_enough_scores,
    check_min_auroc,
    check_min_spearman,
    check_not_worse,
    compare,
    comparison_table,
    left_out,
    tasks_needed,
)
from prmkit.evaluation.evaluate import metrics_of
from prmkit.evaluation.grade import warnings
from prmkit.evaluation.heldout import HeldOut, HeldOutPrompt, read_held_out
from prmkit.evaluation.metrics import STRICT, agreement
from prmkit.evaluation.predictions import table_of_scores
from prmkit.rows import AUDIT, SELECTED_BY, WEIGHT


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> HeldOut:
    return read_held_out(write_data_folder(tmp_path_factory.mktemp("data"), tasks=20), "reward_model_full_eval")


@pytest.fixture(scope="module")
def evaluated(held_out: HeldOut, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The evaluation folders of four judges."""
    judges = {"fine": noisy(0.08), "twin": noisy(0.08, seed=1), "poor": noisy(0.35), "constant": constant()}
    folder = tmp_path_factory.mktemp("evaluated")
    return {
        name: write_evaluation(folder / name / "evaluation", held_out, judge, measured=name in ("fine", "constant"))
        for name, judge in judges.items()
    }


def write_evaluation(
    folder: Path, held_out: HeldOut, judge: Judge, rows: slice = slice(None), *, measured: bool = False
) -> Path:
    """The folder of an evaluation; unless `measured`, its metrics.json has only what a comparison reads from it."""
    predictions = predictions_of(held_out, judge)[rows]
    folder.mkdir(parents=True)
    write_lines(folder / "predictions.jsonl", predictions)
    about = {"dataset": held_out.name, "sha256": held_out.sha256, "prompts_evaluated": len(predictions)}
    metrics = metrics_of(predictions, None, held_out, CONSTANTS) if measured else {"held_out": about}
    (folder / "metrics.json").write_text(json.dumps(metrics))
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


def test_the_difference_is_that_of_the_two_metrics(evaluated):
    everything = compare(evaluated["fine"], evaluated["poor"])["groups"][0]
    difference = everything["spearman_within_keys"]["difference"]
    assert difference["value"] == pytest.approx(spearman_of(evaluated["fine"]) - spearman_of(evaluated["poor"]))
    assert difference["low"] > 0
    assert everything["verdict"] == "better"


def test_a_worse_judge_fails_the_gate_and_a_better_one_passes(evaluated):
    check_not_worse(compare(evaluated["fine"], evaluated["poor"]))
    with pytest.raises(GateError, match="is worse than"):
        check_not_worse(compare(evaluated["poor"], evaluated["fine"]))


def test_two_equally_good_judges_show_no_difference(evaluated):
    comparison = compare(evaluated["fine"], evaluated["twin"])
    assert comparison["groups"][0]["verdict"] == "no difference shown"
    check_not_worse(comparison)
    assert all(len(row) == 10 for row in comparison_table(comparison))


@pytest.mark.parametrize("width", [130, 100, 80, 60])
def test_the_comparison_fits_a_terminal_by_leaving_columns_out(evaluated, monkeypatch, capsys, width):
    table = comparison_table(compare(evaluated["fine"], evaluated["poor"]))
    monkeypatch.setattr("prmkit.cli._width", lambda stream: width)
    cli.emit_table("", COLUMNS, table, numeric=NUMERIC, optional=OPTIONAL)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width or "Δ Spearman" not in lines[0]
    assert lines[0].startswith("scores of") and lines[0].endswith("verdict")


def test_a_judge_compared_with_itself_does_not_differ_at_all(evaluated):
    for group in compare(evaluated["fine"], evaluated["fine"])["groups"]:
        assert group["mae"]["difference"]["low"] == group["mae"]["difference"]["high"] == 0.0


def test_pairing_makes_the_interval_narrower_than_two_separate_ones(evaluated):
    everything = compare(evaluated["fine"], evaluated["poor"])["groups"][0]["mae"]
    width = {name: everything[name]["high"] - everything[name]["low"] for name in ("this", "other", "difference")}
    assert width["difference"] < width["this"] + width["other"]


def test_a_constant_judge_is_worse_though_it_has_no_order(evaluated):
    comparison = compare(evaluated["constant"], evaluated["fine"])
    assert comparison["groups"][0]["spearman_within_keys"]["difference"]["value"] < -0.5
    assert comparison["groups"][0]["verdict"] == "worse"


def test_a_constant_judge_does_not_beat_one_with_the_right_order_by_its_error(held_out, tmp_path):
    ordered = write_evaluation(tmp_path / "ordered", held_out, lambda prompt, key: 0.45 * prompt.reference.get(key, 1))
    flat = write_evaluation(tmp_path / "flat", held_out, constant())
    comparison = compare(flat, ordered)
    everything = comparison["groups"][0]
    assert everything["mae"]["difference"]["high"] < 0
    assert everything["verdict"] == "mixed"
    with pytest.raises(GateError, match="is worse than"):
        check_not_worse(comparison)
    assert compare(ordered, flat)["groups"][0]["verdict"] == "mixed"


def chosen_by_first(held_out: HeldOut, audit: float, seed: int = 0) -> HeldOut:
    """The held-out prompts that ask_judges.py --first would have asked about: a judge is unsure of low scores."""
    generator, kept = np.random.default_rng(seed), []
    for prompt in held_out.prompts:
        if is_low(prompt):
            kept.append(replace(prompt, metadata={**prompt.metadata, SELECTED_BY: "unsure", WEIGHT: 1.0}))
        elif generator.uniform() < audit:
            kept.append(replace(prompt, metadata={**prompt.metadata, SELECTED_BY: AUDIT, WEIGHT: 1 / audit}))
    return replace(held_out, prompts=tuple(kept))


def is_low(prompt: HeldOutPrompt) -> bool:
    return min(prompt.reference.values()) < 0.5


def test_what_first_chose_is_weighed_back(held_out: HeldOut) -> None:
    def judge(prompt: HeldOutPrompt, key: str) -> float:  # wrong by more where it is unsure
        return min(prompt.reference.get(key, 0.5) + (0.3 if is_low(prompt) else 0.05), 1.0)

    def measured(rows: list[dict]) -> dict[str, float]:
        found = agreement(table_of_scores(rows, (), CONSTANTS))
        bad = found["bad_step"][STRICT]
        return {name: each.value for name, each in (found | {"share": bad["bad_share"], "brier": bad["brier"]}).items()
                if name in ("mae", "bias", "rmse", "share", "brier")}  # fmt: skip

    whole = measured(predictions_of(held_out, judge))
    weighted, plain = [], []
    for seed in range(20):
        rows = predictions_of(chosen_by_first(held_out, 0.3, seed), judge)
        weighted.append(measured(rows))
        plain.append(measured([row | {"metadata": {}} for row in rows]))
    for name, value in whole.items():
        assert np.mean([each[name] for each in weighted]) == pytest.approx(value, rel=0.08), name
        assert np.mean([each[name] for each in plain]) > 1.2 * value, name


def test_a_gate_opens_on_chosen_prompts_only_where_chance_chose_some_of_enough_tasks(held_out: HeldOut) -> None:
    few = chosen_by_first(held_out, 0.005)
    metrics = metrics_of(predictions_of(few, noisy(0.1)), None, few, CONSTANTS)
    with pytest.raises(GateError, match=r"--min-spearman: cannot be decided: ask_judges.py --first selected [\d,]+ of"):
        check_enough_scores(metrics, "--min-spearman")
    assert any("steps that a judge was unsure of, not all" in line for line in warnings(metrics))
    enough = chosen_by_first(held_out, 0.4)
    metrics = metrics_of(predictions_of(enough, noisy(0.1)), None, enough, CONSTANTS)
    check_enough_scores(metrics, "--min-spearman")
    assert not {SELECTED_BY, WEIGHT} & set(metrics["breakdowns"])  # hard steps are no group to be graded
    assert metrics["trajectory"]["trajectories"] == 0
    assert "steps that ask_judges.py --first selected" in metrics["trajectory"]["left_out"]
    told = next(line for line in warnings(metrics) if "--first" in line)
    effective = float(re.findall(r"as informative as ([\d,]+) prompts without", told)[0].replace(",", ""))
    assert 0.2 * len(held_out.prompts) < effective < len(enough.prompts)


def test_prompts_that_chance_chose_count_only_with_a_score(held_out: HeldOut) -> None:
    chosen = chosen_by_first(held_out, 0.4)
    rows = predictions_of(chosen, noisy(0.1))
    for row in rows:
        if row["metadata"][SELECTED_BY] == AUDIT:
            row |= {"status": "too_long", "reason": "too long", "scores": {}}
    metrics = metrics_of(rows, None, chosen, CONSTANTS)
    assert metrics["held_out"]["selection"]["audited_tasks"] == 0
    with pytest.raises(GateError, match="only 0 tasks have randomly selected prompts"):
        check_enough_scores(metrics, "--min-spearman")


def test_a_judge_that_makes_few_of_the_scores_fails_every_gate(held_out):
    rows = predictions_of(held_out, noisy(0.08))
    check_enough_scores(metrics_of(rows, None, held_out, CONSTANTS), "--compare")
    for row in rows[12:]:
        row |= {"status": "error", "reason": "out of memory", "scores": {}}
    with pytest.raises(
        GateError, match=r"--min-spearman: \d+ of \d+ scores were given \([\d.]+%\); at least 95% are needed"
    ):
        check_enough_scores(metrics_of(rows, None, held_out, CONSTANTS), "--min-spearman")


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
    assert (
        f"; 0 more of this judge and {comparison['scores_of_other_alone']} more of the other are ignored"
        in left_out(comparison)
    )
    whole = compare(evaluated["fine"], evaluated["fine"])["groups"][0]["scores"]
    assert comparison["groups"][0]["scores"] + comparison["scores_of_other_alone"] == whole


def test_other_held_out_rows_are_rejected(evaluated, tmp_path):
    other = read_held_out(write_data_folder(tmp_path / "data", tasks=6, seed=99), "reward_model_full_eval")
    folder = write_evaluation(tmp_path / "other", other, noisy(0.1))
    with pytest.raises(DataError, match="different held-out rows"):
        compare(folder, evaluated["fine"])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metrics.json", "{}", r"metrics\.json: damaged: held_out is missing"),
        ("metrics.json", "[]", r"metrics\.json: damaged: not a JSON object"),
        ("metrics.json", '{"held_out": {"dataset": "x"}}', "sha256 is missing"),
        (
            "predictions.jsonl",
            "{}\n",
            r"predictions\.jsonl:1: edited, damaged, or from an earlier version",
        ),
    ],
)
def test_a_damaged_evaluation_is_named(evaluated, tmp_path, name, text, message):
    damaged = shutil.copytree(evaluated["poor"], tmp_path / "damaged")
    (damaged / name).write_text(text)
    with pytest.raises(DataError, match=message):
        compare(evaluated["fine"], damaged)


def test_an_evaluation_that_was_interrupted_later_is_not_compared(evaluated, tmp_path):
    cut = shutil.copytree(evaluated["poor"], tmp_path / "cut")
    lines = (cut / "predictions.jsonl").read_text().splitlines(keepends=True)
    (cut / "predictions.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(DataError, match=rf"{len(lines) - 1} of {len(lines)} predictions; .* was interrupted"):
        compare(evaluated["fine"], cut)


def test_a_folder_that_was_not_evaluated_is_named(evaluated, tmp_path):
    with pytest.raises(DataError, match=f"{tmp_path}: no metrics.json"):
        compare(evaluated["fine"], tmp_path)


def test_the_least_spearman_is_a_gate(evaluated):
    fine, flat = (json.loads((evaluated[name] / "metrics.json").read_text()) for name in ("fine", "constant"))
    check_min_spearman(fine, 0.5)
    with pytest.raises(GateError, match=r"so the lower bound is below 0\.999"):
        check_min_spearman(fine, 0.999)
    with pytest.raises(GateError, match="cannot be decided"):
        check_min_spearman(flat, 0.0)


# --- gates fail closed ------------------------------------------------------------------------------------------------


def metrics_in(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def praising(prompt, key) -> float:
    """Nearly right, but every bad clip gets 0.9."""
    reference = prompt.reference[key]
    return 0.9 if prompt.evaluation_type == "clip" and reference < 0.4 else reference


def test_a_comparison_that_cannot_see_does_not_pass(tmp_path):
    few = made_up(tasks=9)
    inverted = write_evaluation(tmp_path / "inverted", few, lambda prompt, key: 1 - prompt.reference[key])
    decent = write_evaluation(tmp_path / "decent", few, noisy(0.1))
    for margin in (None, 0.05):
        with pytest.raises(GateError, match=r"cannot decide on clip \(.*at least 10 tasks are needed \(here: 9\)"):
            check_not_worse(compare(inverted, decent), margin)
    with pytest.raises(GateError, match="cannot decide"):
        check_not_worse(compare(decent, decent))


def test_a_type_without_scores_of_one_of_the_judges_is_not_passed_over(tmp_path):
    """Every answer of one judge about whole runs was too long; the other types alone would pass."""
    held_out = made_up(tasks=40)
    whole = write_evaluation(tmp_path / "whole", held_out, noisy(0.1))
    rows = predictions_of(held_out, noisy(0.1))
    for row in rows:
        if row["evaluation_type"] == "final":
            row |= {"status": "too_long", "reason": "too long", "scores": {}}
    partial = tmp_path / "partial"
    shutil.copytree(whole, partial)
    write_lines(partial / "predictions.jsonl", rows)
    for one, other in ((whole, partial), (partial, whole)):
        comparison = compare(one, other)
        assert [(row[0], row[1], row[-1]) for row in comparison_table(comparison) if row[0] == "final"] == [
            ("final", "0", "cannot decide")
        ]
        for margin in (None, 0.3):
            with pytest.raises(GateError, match=r"cannot decide on final \(no score that both gave\)"):
                check_not_worse(comparison, margin)


def test_a_loss_below_zero_is_no_loss(evaluated):
    comparison = compare(evaluated["fine"], evaluated["fine"])
    comparison["groups"] = [group for group in comparison["groups"] if group["verdict"] != "cannot decide"]
    assert "A Spearman loss of up to 0.000" in check_not_worse(comparison)


def test_a_judge_that_praises_bad_clips_fails_although_the_rest_is_better(tmp_path):
    held_out = made_up(seed=4)
    praises = write_evaluation(tmp_path / "praises", held_out, praising, measured=True)
    decent = write_evaluation(tmp_path / "decent", held_out, noisy(0.06))
    comparison = compare(praises, decent)
    assert {group["evaluation_type"]: group["verdict"] for group in comparison["groups"][1:]}["final"] != "worse"
    with pytest.raises(GateError, match=r"is worse than .* on clip"):
        check_not_worse(comparison)
    with pytest.raises(GateError, match="on clip"):
        check_not_worse(comparison, 0.05)
    with pytest.raises(GateError, match=r"--min-spearman 0\.6: clip"):
        check_min_spearman(metrics_in(praises), 0.6)


def test_noise_on_one_type_fails_the_gates_of_order_and_of_bad_steps(tmp_path):
    held_out = made_up()
    die = np.random.default_rng(1)
    folder = write_evaluation(
        tmp_path / "half",
        held_out,
        lambda p, k: p.reference[k] if p.evaluation_type == "clip" else die.uniform(),
        measured=True,
    )
    with pytest.raises(GateError, match=r"--min-spearman 0\.6: final"):
        check_min_spearman(metrics_in(folder), 0.6)
    with pytest.raises(GateError, match=r"--min-auroc 0\.7: final"):
        check_min_auroc(metrics_in(folder), 0.7)


def test_two_tasks_pass_no_gate_of_order(tmp_path):
    folder = write_evaluation(
        tmp_path / "two", made_up(tasks=2, clips=8), lambda prompt, key: prompt.reference[key], measured=True
    )
    for check in (check_min_spearman, check_min_auroc):
        with pytest.raises(GateError, match="cannot be decided"):
            check(metrics_in(folder), 0.1)


def test_scores_that_are_missing_on_one_type_close_every_gate(tmp_path):
    held_out = made_up()
    rows = predictions_of(held_out, noisy(0.05))
    for row in [row for row in rows if row["evaluation_type"] == "final"][:6]:
        row |= {"status": "unparsed", "reason": "no JSON", "scores": {}}
    with pytest.raises(GateError, match="on final were given"):
        check_enough_scores(metrics_of(rows, None, held_out, {}), "--min-auroc")


def test_a_margin_asks_for_proof_and_says_how_many_tasks_it_takes(tmp_path):
    held_out = made_up(tasks=60)
    one = write_evaluation(tmp_path / "one", held_out, noisy(0.1))
    twin = write_evaluation(tmp_path / "twin", held_out, noisy(0.1, seed=9))
    comparison = compare(one, twin)
    assert "cannot be ruled out; to require a smaller loss, use --margin X" in check_not_worse(comparison)
    assert "Non-inferior within 0.3" in check_not_worse(comparison, 0.3)
    with pytest.raises(GateError, match=r"--margin 0.01: cannot be decided; about \d+ tasks are needed"):
        check_not_worse(comparison, 0.01)
    poor = write_evaluation(tmp_path / "poor", held_out, noisy(0.5))
    with pytest.raises(GateError, match=r"--margin 0.05: .* is worse by 0.\d+"):
        check_not_worse(compare(poor, one), 0.05)


def test_the_tasks_needed_fall_with_the_square_of_the_margin():
    assert tasks_needed(0.04, 50, 0.05) == pytest.approx(198, abs=1)
    assert tasks_needed(0.04, 50, 0.1) == pytest.approx(50, abs=1)


def test_a_judge_compared_with_itself_is_not_worse_by_any_margin(evaluated):
    comparison = compare(evaluated["fine"], evaluated["fine"])
    with pytest.raises(GateError, match="cannot decide"):  # some types have too few tasks here
        check_not_worse(
            {**comparison, "groups": [comparison["groups"][0], {**comparison["groups"][1], "verdict": "cannot decide"}]}
        )
    assert check_not_worse(comparison, 0.001)
