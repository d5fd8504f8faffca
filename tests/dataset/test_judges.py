"""Several judges on one prompt: agreement, consensus, and prompts that are too contested."""

import json
import random
import subprocess
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from prmkit.dataset.settings import Split
from prmkit.rows import SELECTED_BY, WEIGHT
from tests.dataset.conftest import Convert, Path, prompt_of, read_lines, row_of

Script = Callable[..., "subprocess.CompletedProcess[str]"]


def judged(content: str, **scores: float) -> list[dict[str, object]]:
    return [row_of(prompt_of(content), score=score, judge=judge) for judge, score in scores.items()]


@pytest.mark.parametrize(("aggregate", "score"), [("mean", 0.6), ("median", 0.7)])
def test_the_consensus_has_one_row_a_prompt(convert_rows: Convert, data: Path, aggregate: str, score: float) -> None:
    rows = judged("a", one=0.2, two=0.7, three=0.9) + judged("b", one=0.4)
    convert_rows(rows, aggregate=aggregate, split=Split(0.0))
    lines = read_lines(data / "reward_model_consensus.jsonl")
    assert [json.loads(line["output"])["reasonableness_score"] for line in lines] == [score, 0.4]
    traced = read_lines(data / "reward_model_consensus.meta.jsonl")
    assert traced[0]["line"] == 2, "the words are those of the judge nearest to the aggregate"
    assert traced[0]["metadata"]["model_name"] == f"{aggregate} of 3 judges"
    assert traced[0]["scores"] == {"reasonableness_score": score}
    assert len(read_lines(data / "reward_model_full.jsonl")) == 4


def test_the_consensus_keeps_to_the_sides(convert_rows: Convert, data: Path) -> None:
    rows = judged("a", one=0.2, two=0.7) + [
        row_of(prompt_of("b"), task="held", judge=judge, score=score) for judge, score in (("one", 0.1), ("two", 0.2))
    ]
    convert_rows(rows, aggregate="mean", split=Split(tasks=frozenset({"held"})))
    assert len(read_lines(data / "reward_model_consensus.jsonl")) == 1
    (held_out,) = read_lines(data / "reward_model_consensus_eval.jsonl")
    assert json.loads(held_out["output"])["reasonableness_score"] == 0.15


def test_scores_are_aggregated_key_by_key(convert_rows: Convert, data: Path) -> None:
    answers = {"one": {"a": 0.2, "b": 0.4}, "two": {"a": 0.4, "b": 1.0}, "three": {"a": 0.9}}
    rows = [
        row_of("Judge this run.", json.dumps({"scores": scores, "summary": judge}), judge=judge)
        for judge, scores in answers.items()
    ]
    convert_rows(rows, aggregate="mean")
    (line,) = read_lines(data / "reward_model_consensus.jsonl")
    assert line["output"] == '{"scores": {"a": 0.50, "b": 0.70}, "summary": "two"}'


def test_a_judge_who_answers_twice_has_one_voice(convert_rows: Convert, data: Path) -> None:
    rows = judged("a", one=0.2) + judged("a", one=0.4) + judged("a", two=0.9)
    convert_rows(rows, aggregate="mean")
    (line,) = read_lines(data / "reward_model_consensus.jsonl")
    assert json.loads(line["output"])["reasonableness_score"] == 0.6


def test_a_prompt_that_was_asked_in_any_case_has_no_weight(convert_rows: Convert, data: Path) -> None:
    def chosen(rows: list[dict[str, object]], by: str, weight: object) -> list[dict[str, object]]:
        return [row | {"metadata": row["metadata"] | {SELECTED_BY: by, WEIGHT: weight}} for row in rows]

    once, again = judged("a", one=0.2, two=0.5), judged("a", one=0.2)
    kinds = {
        "audited twice": (chosen(once, "audit", 10.0) + chosen(again, "audit", 2), ("audit", 2)),
        "later all": (chosen(once, "audit", 10.0) + again, (None, None)),
        "one judge of all": (again + chosen(judged("a", two=0.2, three=0.2), "audit", 10.0), (None, None)),
    }
    for kind, (rows, expected) in kinds.items():
        report = convert_rows(rows, aggregate="mean", split=Split(0.0))
        assert not report["self_agreement"], f"{kind}: the same answer twice is no second answer"
        found = {}
        for name in ("consensus", "one"):
            (line,) = read_lines(data / f"reward_model_{name}.meta.jsonl")
            found[name] = (line["metadata"].get(SELECTED_BY), line["metadata"].get(WEIGHT))
        assert found == {"consensus": expected, "one": expected}, kind


@pytest.mark.parametrize("weight", [0, -1.0, None, "10", True, {}, [2], 1e301])
def test_a_weight_that_is_no_weight_is_rejected(weight: object, convert_rows: Convert, data: Path) -> None:
    rows = judged("a", one=0.2) + judged("b", one=0.4)
    rows[0]["metadata"][WEIGHT] = weight
    report = convert_rows(rows)
    assert report["rejected"] == {"damaged selection_weight": 1}
    (rejected,) = read_lines(data / "rejected.jsonl")
    assert rejected["reason"].startswith("metadata.selection_weight is")
    assert rejected["reason"].endswith("; it must be a number above 0")


def test_contested_prompts_are_rejected(convert_rows: Convert, data: Path) -> None:
    rows = judged("a", one=0.2, two=0.5) + judged("b", one=0.2, two=0.51) + judged("c", one=0.0)
    report = convert_rows(rows, max_disagreement=0.3)
    assert report["rejected"] == {"judges differ too much": 2}
    assert {row["reason"] for row in read_lines(data / "rejected.jsonl")} == {
        "judges differ by 0.31 on reasonableness_score"
    }
    assert sum(report["rows"].values()) == 3


def test_agreement_is_what_numpy_finds(convert_rows: Convert) -> None:
    choose = random.Random(0)
    pairs = [(choose.randrange(101) / 100, choose.randrange(101) / 100) for _ in range(200)]
    rows = [row for number, (one, other) in enumerate(pairs) for row in judged(str(number), a=one, b=other)]
    (found,) = convert_rows(rows)["judge_agreement"]
    columns = np.array(pairs)
    assert found["pearson"] == pytest.approx(np.corrcoef(columns.T)[0, 1], abs=1e-4)
    assert found["mean_absolute_difference"] == pytest.approx(np.abs(columns[:, 0] - columns[:, 1]).mean(), abs=1e-4)
    assert (found["n"], found["prompts"]) == (200, 200)


@pytest.mark.parametrize("scores", [[(0.5, 0.6)], [(0.5, 0.6), (0.5, 0.7)], [(0.0, 0.0)] * 5])
def test_agreement_that_is_not_defined_is_null(convert_rows: Convert, scores: Sequence[tuple[float, float]]) -> None:
    rows = [row for number, (one, other) in enumerate(scores) for row in judged(str(number), a=one, b=other)]
    assert convert_rows(rows)["judge_agreement"][0]["pearson"] is None


def test_agreement_by_type_and_pair(convert_rows: Convert) -> None:
    rows = [
        row_of(prompt_of(f"{kind} {number}"), judge=judge, kind=kind, score=(number * place % 10) / 10)
        for kind in ("clip", "final")
        for number in range(5)
        for place, judge in enumerate(("one", "two", "three"), start=1)
    ]
    pairs = convert_rows(rows)["judge_agreement"]
    assert [(pair["evaluation_type"], pair["judges"], pair["n"]) for pair in pairs] == [
        (kind, pair, 5) for kind in ("clip", "final") for pair in (["one", "three"], ["one", "two"], ["three", "two"])
    ]


def test_a_lenient_judge_is_corrected_in_the_consensus(convert_rows: Convert, data: Path) -> None:
    """The kind judge gives 0.2 more; prompts that it alone answered come out as the others would have scored them."""
    truth = [round(0.1 + 0.02 * number, 2) for number in range(30)]
    rows = [row for number, score in enumerate(truth) for row in judged(str(number), kind=score + 0.2, fair=score)]
    rows += judged("kind alone", kind=0.7) + judged("fair alone", fair=0.5)
    report = convert_rows(rows, aggregate="mean", split=Split(0.0))
    assert report["leniency"]["offsets"] == {"fair": pytest.approx(-0.1), "kind": pytest.approx(0.1)}
    assert _consensus(data)[-2:] == [0.6, 0.6]
    convert_rows(rows, aggregate="mean", split=Split(0.0), leniency_correction=False)
    assert _consensus(data)[-2:] == [0.7, 0.5]


def _consensus(data: Path) -> list[float]:
    return [row["scores"]["reasonableness_score"] for row in read_lines(data / "reward_model_consensus.meta.jsonl")]


def test_answers_that_a_judge_gave_again_measure_its_noise(convert_rows: Convert) -> None:
    rows = judged("a", one=0.2) + judged("a", one=0.4) + judged("b", one=0.5)
    rows.append(row_of(prompt_of("b"), score=0.5, judge="one", timestamp="later"))
    copied = [*rows, rows[0], rows[2]]
    for given in (rows, copied):
        report = convert_rows(given)
        assert report["rows_answered_again"] == 2
        assert report["self_agreement"] == [
            {"judge": "one", "evaluation_type": "clip", "key": "reasonableness_score", "pairs": 2, "pearson": 1.0,
             "mean_absolute_difference": 0.1, "mean_squared_difference": 0.02}
        ]  # fmt: skip


def test_many_judges_are_compared_in_linear_time(convert_rows: Convert, data: Path, script: Script) -> None:
    rows = [row_of(prompt_of(str(number)), judge=f"judge-{judge}", score=(judge * 7 + number) % 100 / 100)
            for number in range(5) for judge in range(200)]  # fmt: skip
    report = convert_rows(rows)
    assert len(report["judge_agreement"]) == 50 * 49 / 2
    done = script("convert_dataset.py", "--input", report["inputs"][0]["source"], "--output-dir", data)
    assert "and 1,215 more" in done.stdout
    assert "200 judges; the 50 with the most rows are compared" in done.stdout
    assert len(done.stdout.splitlines()) < 60
    assert done.stdout.splitlines()[-1].startswith("next: python train.py")
