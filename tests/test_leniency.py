"""Leniency of judges: found where prompts are shared, taken off the mean, and admitted where it cannot be known."""

import numpy as np
import pytest
from scipy import stats

from prmkit.leniency import Leniency, corrected_mean, describe_leniency, estimate_leniency


def scored(offsets: dict[str, float], seen: dict[str, float], items: int = 2000, noise: float = 0.08):
    """Made-up scores: each judge sees its share of the items and adds its offset and noise."""
    generator = np.random.default_rng(3)
    quality = generator.uniform(0.2, 0.7, items)
    rows = []
    for true in quality:
        asked = [judge for judge in offsets if generator.uniform() < seen[judge]] or [next(iter(offsets))]
        rows.append({judge: float(true + offsets[judge] + generator.normal(0, noise)) for judge in asked})
    return quality, rows


def test_offsets_are_found_where_prompts_are_shared_by_chance() -> None:
    true = {"a": 0.0, "b": 0.2, "c": -0.1}
    _, rows = scored(true, dict.fromkeys(true, 0.6))
    leniency = estimate_leniency(rows)
    differences = {judge: leniency.offsets[judge] - leniency.offsets["a"] for judge in true}
    assert differences == pytest.approx({"a": 0.0, "b": 0.2, "c": -0.1}, abs=0.02)
    assert leniency.is_known


def test_correction_restores_the_order_that_leniency_hides() -> None:
    quality, rows = scored({"a": 0.0, "kind": 0.3}, {"a": 1.0, "kind": 0.5})
    leniency = estimate_leniency(rows)
    plain = [corrected_mean(row, Leniency()) for row in rows]
    corrected = [corrected_mean(row, leniency) for row in rows]
    orders = [stats.spearmanr(quality, means).statistic for means in (plain, corrected)]
    assert orders[1] > orders[0] + 0.05
    assert np.mean(corrected) == pytest.approx(np.mean(plain), abs=0.05)


def test_nothing_changes_where_every_judge_scored_every_prompt() -> None:
    _, rows = scored({"a": 0.0, "kind": 0.2}, {"a": 1.0, "kind": 1.0}, items=50)
    leniency = estimate_leniency(rows)
    for row in rows:
        assert corrected_mean(row, leniency) == pytest.approx(corrected_mean(row, Leniency()), abs=1e-5)


def test_judges_are_linked_through_a_third_one() -> None:
    rows = [{"a": 0.5, "b": 0.6}] * 12 + [{"b": 0.6, "c": 0.8}] * 12
    leniency = estimate_leniency(rows)
    assert leniency.groups == (("a", "b", "c"),)
    assert leniency.offsets["c"] - leniency.offsets["a"] == pytest.approx(0.3, abs=1e-5)


@pytest.mark.parametrize("shared", [0, 9])
def test_judges_that_share_too_little_are_not_corrected_but_named(shared: int) -> None:
    leniency = estimate_leniency([{"a": 0.5}, {"b": 0.9}] * 40 + [{"a": 0.5, "b": 0.9}] * shared)
    assert leniency.offsets == {"a": 0.0, "b": 0.0}
    assert not leniency.is_known
    assert "cannot be corrected" in describe_leniency(leniency)[-1]


def test_one_judge_has_nothing_to_be_corrected_and_no_warning() -> None:
    leniency = estimate_leniency([{"a": 0.5}] * 20)
    assert leniency.is_known and describe_leniency(leniency) == []
    assert describe_leniency(estimate_leniency([])) == []


def test_a_corrected_score_stays_a_score() -> None:
    leniency = Leniency({"kind": 0.2, "strict": -0.2})
    assert corrected_mean({"kind": 0.1}, leniency) == 0.0
    assert corrected_mean({"strict": 0.95}, leniency) == 1.0
