"""A judge on another scale gives no labels until the scale is named; words are mapped when their scores are given."""

import json
from typing import Any

import pytest
from narrated import Narrated

from prmkit.dataset.command import arguments_of, settings_of
from prmkit.errors import DataError
from prmkit.verdict import Scale, Unreadable, read_verdict
from tests.dataset.conftest import Convert, Path, prompt_of, read_lines, row_of

TEN = [1, 1, 2, 7, 10, 9, 1, 4]


def judged(scores: list[Any], judge: str = "judge-ten", key: str = "reasonableness_score") -> list[dict[str, Any]]:
    return [
        row_of(prompt_of(f"{judge} {number}").replace("reasonableness_score", key),
               json.dumps({key: score, "summary": "It looked."}), judge=judge, task=f"task_{number}")
        for number, score in enumerate(scores)
    ]  # fmt: skip


def labels(data: Path) -> list[float]:
    lines = [row for name in ("full", "full_eval") for row in read_lines(data / f"reward_model_{name}.meta.jsonl")]
    return [row["scores"]["reasonableness_score"] for row in sorted(lines, key=lambda row: row["line"])]


def test_none_of_its_rows_is_a_label(convert_rows: Convert, data: Path) -> None:
    with pytest.raises(DataError) as error:
        convert_rows(judged(TEN))
    for said in ("judge-ten", "reasonableness_score", "from 1 to 10", "2, 7, 10", "--scale judge-ten=1:10"):
        assert said in str(error.value)
    report = convert_rows([*judged(TEN), *judged([0.5] * 9, judge="judge-a")])
    assert report["judges"] == {"judge-a": 9}
    assert report["rejected"] == {"a score is out of range": 5, "the judge uses another scale": 3}
    assert set(labels(data)) == {0.5}
    assert report["judges_with_losses"][0]["judge"] == "judge-ten"


@pytest.mark.parametrize(
    "scores",
    [[1] * 150 + [7, 8, 10], [1] * 6 + [5], [0, 1, 1, 0, 2]],
    ids=["mostly the worst", "once above", "0, 1 and 2"],
)
def test_a_judge_that_never_gives_a_fraction_is_on_another_scale_after_one_number(
    convert_rows: Convert, scores: list[int]
) -> None:
    """Else its worst score, 1, would be the best label."""
    with pytest.raises(DataError, match="all its rows with reasonableness_score are rejected"):
        convert_rows(judged(scores))
    kept = convert_rows([*judged(scores), *judged([0, 0.5, 1] * 3, judge="judge-a")], max_rejected="100%")
    assert kept["judges"] == {"judge-a": 9}


def test_a_scale_is_that_of_a_judge_and_not_of_one_key(convert_rows: Convert, data: Path) -> None:
    """A judge on 1 to 5 gave one key only the worst score, while another judge gives it only 0 and 1."""
    fives = judged([3, 5, 2, 4], key="correctness_score")
    ones = [{**row, "metadata": row["metadata"] | {"task_id": "other"}} for row in judged([1, 1, 1])]
    others = [*judged([1, 0, 1], judge="judge-b"), *judged([1, 0.4, 1.7], judge="judge-c")]
    report = convert_rows([*fives, *ones, *others], max_rejected="100%")
    assert report["judges"] == {"judge-b": 3, "judge-c": 2}
    assert set(labels(data)) == {0.0, 0.4, 1.0}


def test_a_named_scale_maps_the_worst_to_0_and_the_best_to_1(convert_rows: Convert, data: Path) -> None:
    report = convert_rows(judged(TEN), scales={"judge-ten": Scale(1, 10)})
    assert labels(data) == [0.0, 0.0, 0.11, 0.67, 1.0, 0.89, 0.0, 0.33]
    assert report["rejected"] == {}
    assert report["settings"]["scales"] == {"judge-ten": {"low": 1, "high": 10, "words": {}}}


def test_a_wrong_scale_gives_no_labels_either(convert_rows: Convert) -> None:
    """A judge from 0 to 1 under --scale 1 5: its 1.0, the best, would become the worst."""
    with pytest.raises(DataError, match="outside of 1 to 5"):
        convert_rows(judged([1.0, 0.5, 0.7, 1, 0.2]), scales={None: Scale(1, 5)})


@pytest.mark.parametrize(("stray", "kept"), [(1, 249), (2, 248), (3, 297), (5, 0)])
def test_stray_values_cost_their_own_rows(convert_rows: Convert, stray: int, kept: int) -> None:
    rows = judged([1.7] * stray + [0.5] * (300 - stray if stray == 3 else 250 - stray), judge="judge-a")
    if not kept:
        rows = rows[:200]
        with pytest.raises(DataError, match="all its rows with reasonableness_score are rejected"):
            convert_rows(rows)
        return
    report = convert_rows(rows)
    assert sum(report["rows"].values()) == kept
    assert report["scale_problems"] == []


def test_only_the_key_on_another_scale_costs_rows(convert_rows: Convert) -> None:
    rows = judged([0.5] * 6) + judged([3, 4, 1, 5], key="effort_score")
    report = convert_rows(rows)
    assert sum(report["rows"].values()) == 6
    assert "effort_score" in report["scale_problems"][0]


@pytest.mark.parametrize("values", [["pass", "fail", "pass", "fail"], [True, False, True, False]])
def test_words_are_mapped_when_their_scores_are_given(convert_rows: Convert, data: Path, values: list[Any]) -> None:
    with pytest.raises(DataError, match=r"--map (pass|true)=1"):
        convert_rows(judged(values))
    words = {str(values[0]).lower(): 1.0, str(values[1]).lower(): 0.0}
    convert_rows(judged(values), scales={None: Scale(words=words)})
    assert labels(data) == [1.0, 0.0, 1.0, 0.0]


def test_the_flags() -> None:
    settings = settings_of(arguments_of({
        "scale": [["1", "5"], ["judge-ten=1:10", "a=b=-1:1"]], "map": ["pass=1", "FAIL=0"], "output_dir": Path("x"),
    }))  # fmt: skip
    words = {"pass": 1.0, "fail": 0.0}
    assert settings.scales == {
        None: Scale(1, 5, words), "judge-ten": Scale(1, 10, words), "a=b": Scale(-1, 1, words),
    }  # fmt: skip
    assert settings.scale_of("judge-ten") == Scale(1, 10, words)
    assert settings.scale_of("another") == settings.scale_of(None) == Scale(1, 5, words)


@pytest.mark.parametrize(
    ("scale", "given", "label"),
    [
        (Scale(0, 100), "85%", 0.85), (Scale(0, 100), 85, 0.85), (Scale(0, 10), "90%", 0.9), (Scale(0, 1), "85%", 0.85),
        (Scale(0, 100), "150%", None), (Scale(1, 5), "50%", None), (Scale(-1, 1), "50%", None),
    ],
)  # fmt: skip
def test_a_percentage_is_never_a_number_of_the_scale(scale: Scale, given: Any, label: float | None) -> None:
    """On a scale of 0 to 100, 85% would be 0.85 of 100, nearly the worst score."""
    verdict = read_verdict(json.dumps({"score": given}), None, scale)
    assert (None if isinstance(verdict, Unreadable) else verdict.scores["score"]) == label


def test_percentages_say_nothing_about_the_scale(convert_rows: Convert, data: Path) -> None:
    convert_rows(judged(["85%", "20%", "40%", "60%", 90]), scales={None: Scale(0, 100)})
    assert labels(data) == [0.85, 0.2, 0.4, 0.6, 0.9]


def test_a_judge_from_0_to_1_under_a_larger_scale_gives_no_labels(convert_rows: Convert, data: Path) -> None:
    """Its 0.8 would become 0.01."""
    rows = [*judged([80, 20, 55]), *judged([0.8, 0.2, 1, 0.4], judge="judge-a")]
    report = convert_rows(rows, scales={None: Scale(0, 100)}, max_rejected="100%")
    assert report["judges"] == {"judge-ten": 3} and set(labels(data)) == {0.8, 0.2, 0.55}
    assert "--scale judge-a=0:1" in report["scale_problems"][0]
    assert convert_rows(rows, scales={None: Scale(0, 100), "judge-a": Scale(0, 1)})["rejected"] == {}


def test_a_judge_of_a_scale_that_no_row_has_is_named(convert_rows: Convert, narrated: Narrated) -> None:
    convert_rows(judged([0.5, 0.2, 0.1]), scales={"jugde-ten": Scale(1, 10)})
    assert "no row is from a judge of --scale: jugde-ten" in narrated.text


def test_words_with_spaces_are_suggested_as_they_are_typed(convert_rows: Convert) -> None:
    with pytest.raises(DataError, match="--map 'partly met=0' pass=1"):
        convert_rows(judged(["partly met", "pass", "pass", "partly met"]))


def test_a_word_is_one_however_unicode_composes_it() -> None:
    (scale,) = settings_of(arguments_of({"map": ["genu\u0308gend=0.5"], "output_dir": Path("x")})).scales.values()
    assert scale.words == {"gen\u00fcgend": 0.5}
