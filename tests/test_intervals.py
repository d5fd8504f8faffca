"""Conformal intervals: they hold as often as they say, widen with the judge's own uncertainty, and fit one judge."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from prmkit.errors import DataError
from prmkit.intervals import (
    CALIBRATION_FILE,
    MIN_STD,
    Abstention,
    calibrated_judge,
    fit_calibration,
    load_abstention,
    read_calibration,
    write_calibration,
)

JUDGE = {"weights": {"adapter_model.safetensors": "ab12"}}


def errors(n: int, seed: int):
    """Scores whose error is twice as large as the judge's own std says."""
    generator = np.random.default_rng(seed)
    std = generator.uniform(0.02, 0.1, n)
    score = np.full(n, 0.5)
    return score, std, score + generator.normal(0, 2 * std)


def equally(ratios: Iterable[float]) -> list[tuple[float, float]]:
    """Each ratio speaks for one score."""
    return [(float(ratio), 1.0) for ratio in ratios]


def test_weighted_errors_are_errors_that_are_there_as_often() -> None:
    ratios = np.random.default_rng(0).exponential(size=400)
    weighted = fit_calibration({"clip": [(ratio, 1.0 + 4.0 * (ratio < 1)) for ratio in ratios]}, JUDGE)
    repeated = fit_calibration({"clip": equally(np.repeat(ratios, np.where(ratios < 1, 5, 1)))}, JUDGE)
    assert 250 < weighted.counts["clip"] < 400  # what is there five times tells less than five others would
    for level in (0.5, 0.9):
        ends = [each.interval(0.5, 0.1, "clip", level) for each in (weighted, repeated)]
        assert ends[0] == pytest.approx(ends[1], abs=0.003)


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95])
@pytest.mark.parametrize("n", [60, 5000])
def test_an_interval_holds_as_often_as_it_says(level: float, n: int) -> None:
    held = []
    for seed in range(200 if n < 100 else 3):
        score, std, truth = errors(n + 500, seed)
        ratios = np.abs(score - truth)[:n] / std[:n]
        calibration = fit_calibration({"clip": equally(ratios)}, JUDGE)
        for x, s, t in zip(score[n:], std[n:], truth[n:], strict=True):
            low, high = calibration.interval(x, s, "clip", level)
            held.append(low <= t <= high)
    assert np.mean(held) == pytest.approx(level, abs=0.02)


def test_few_errors_allow_no_high_level() -> None:
    calibration = fit_calibration({"clip": equally([1.0] * 8)}, JUDGE)
    assert calibration.interval(0.5, 0.1, "clip", 0.9) == (0.0, 1.0)
    assert calibration.interval(0.5, 0.1, "clip", 0.8) == pytest.approx((0.4, 0.6))


def test_a_type_with_few_errors_uses_those_of_all() -> None:
    calibration = fit_calibration({"clip": equally([1.0] * 100), "final": equally([3.0] * 5)}, JUDGE)
    for evaluation_type in ("final", "unseen", None):
        assert calibration.interval(0.5, 0.1, evaluation_type, 0.5) == pytest.approx((0.4, 0.6))


def test_a_score_without_spread_has_no_interval_and_a_certain_one_a_narrow_one() -> None:
    calibration = fit_calibration({"clip": equally([1.0] * 100)}, JUDGE)
    assert calibration.interval(0.5, None, "clip", 0.9) is None
    assert calibration.interval(0.5, 0.0, "clip", 0.9) == pytest.approx((0.5 - MIN_STD, 0.5 + MIN_STD))


def test_it_is_read_back_for_its_judge_alone(tmp_path: Path) -> None:
    calibration = fit_calibration({"clip": equally([1.0, 0.5] * 40), "final": equally([2.0] * 40)}, JUDGE)
    write_calibration(tmp_path, calibration)
    assert read_calibration(tmp_path, JUDGE) == calibration
    with pytest.raises(DataError, match="other weights"):
        read_calibration(tmp_path, {"weights": {}})


@pytest.mark.parametrize(
    "content", ["{}", "[]", '{"judge": {}, "counts": {"all": 2}, "ratios": {"all": [2.0, 1.0]}}', '{"ratios": {}}']
)
def test_a_damaged_or_missing_file_is_reported(tmp_path: Path, content: str) -> None:
    with pytest.raises(DataError, match="not found"):
        read_calibration(tmp_path, JUDGE)
    (tmp_path / CALIBRATION_FILE).write_text(content)
    with pytest.raises(DataError, match="damaged"):
        read_calibration(tmp_path, JUDGE)


LINE = {"score": 0.5, "std": 0.1, "status": "ok", "reason": None}


def test_a_line_gets_its_ends_and_a_wide_one_is_unsure() -> None:
    calibration = fit_calibration({"clip": equally([1.0] * 100)}, JUDGE)
    line = Abstention(calibration, 0.9).add_interval(LINE, "clip")
    assert (line["low"], line["high"], line["status"]) == (0.4, 0.6, "ok")
    assert Abstention(calibration, 0.9, max_width=0.25).add_interval(LINE, "clip") == line
    unsure = Abstention(calibration, 0.9, max_width=0.15).add_interval(LINE, "clip")
    assert unsure["status"] == "unsure" and unsure["score"] == 0.5
    assert "90% interval has a width of 0.20 (at most 0.15)" in unsure["reason"]


def test_a_line_without_a_score_keeps_its_status_and_one_without_spread_is_unsure() -> None:
    abstention = Abstention(fit_calibration({"clip": equally([1.0] * 100)}, JUDGE), 0.9, max_width=0.9)
    error = abstention.add_interval({"score": None, "std": None, "status": "error", "reason": "no prompt"}, None)
    assert (error["low"], error["status"], error["reason"]) == (None, "error", "no prompt")
    assert abstention.add_interval({**LINE, "std": None}, "clip")["status"] == "unsure"


def test_the_flags_read_the_calibration_of_the_judge_whatever_it_is_computed_on(tmp_path: Path) -> None:
    write_calibration(
        tmp_path, fit_calibration({"clip": equally([1.0] * 100)}, calibrated_judge({**JUDGE, "device": "cpu"}))
    )
    on_gpu = {**JUDGE, "device": "cuda", "dtype": "bfloat16"}
    assert load_abstention(tmp_path, on_gpu, None, None) is None
    found = load_abstention(tmp_path, on_gpu, None, 0.3)
    assert found is not None and (found.level, found.max_width) == (0.9, 0.3)
    with pytest.raises(DataError, match="other weights"):
        load_abstention(tmp_path, {"weights": {}}, 0.9, None)
