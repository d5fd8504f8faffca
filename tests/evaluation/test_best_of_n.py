"""evaluate_judge.py --best-of-n: the exact mean against counting all subsets, and tau-bench's form as it is typed."""

import importlib
import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import exam_fixtures as public
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prmkit.errors import DataError, ExitCode, UsageError
from prmkit.evaluation.best_of_n import expected_pick
from prmkit.evaluation.command import execute
from prmkit.trajectories.run_fields import OUTCOME_FIELDS

evaluate = importlib.import_module("evaluate_judge")._parser


def pick(file: Path, *arguments: object) -> dict[str, Any]:
    folder = file.parent / "out"
    typed = ["--best-of-n", file, "--output", folder, *arguments]
    assert execute(evaluate().parse_args(list(map(str, typed)))) == ExitCode.DONE
    return json.loads((folder / "best_of_n.json").read_text())


@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=7), st.integers(1, 7)
)
def test_the_mean_over_all_subsets_is_exact(runs: list[tuple[int, float]], n: int) -> None:
    n = min(n, len(runs))

    def of_subset(subset: tuple[tuple[int, float], ...]) -> float:
        best = max(score for score, _ in subset)
        tied = [outcome for score, outcome in subset if score == best]
        return sum(tied) / len(tied)

    counted = [of_subset(subset) for subset in combinations(runs, n)]
    scores, outcomes = zip(*runs, strict=True)
    assert expected_pick(scores, outcomes, n) == pytest.approx(sum(counted) / len(counted))


def test_equal_scores_in_another_order_are_a_tie(tmp_path: Path) -> None:
    """0.1 * 0.2 * 0.3 and 0.3 * 0.2 * 0.1 differ in their last digit."""
    lines = [{"task_id": task, "trajectory_id": f"{task}.{trial}", "outcome": trial, "scores": scores}
             for task in range(3) for trial, scores in enumerate(([0.1, 0.2, 0.3], [0.3, 0.2, 0.1]))]  # fmt: skip
    found = pick(public.write_lines(tmp_path / "outcomes.jsonl", lines))["picks"]
    assert {found[f"judge: {name}"]["2"]["value"] for name in ("min", "product", "mean")} == {0.5}


def test_an_outcome_may_have_each_name_that_importing_knows(tmp_path: Path) -> None:
    for name in OUTCOME_FIELDS:
        if name != "score":  # the judge's score of a step
            lines = [{"task_id": task, "trajectory_id": f"{task}.{trial}", name: bool(trial), "scores": [trial / 2]}
                     for task in range(3) for trial in range(2)]  # fmt: skip
            assert pick(public.write_lines(tmp_path / "outcomes.jsonl", lines))["picks"]["random"]["1"]["value"] == 0.5


def tau_runs(tasks: int = 10) -> list[dict[str, Any]]:
    """Three trials a task; the longest one succeeds, and in every second task no other one."""
    return [
        {
            "task_id": task, "trial": trial, "reward": float(trial == 2 or (task % 2 == 0 and trial == 1)),
            "info": {"task": {"actions": []}},
            "traj": [{"role": "user", "content": f"Task {task}."},
                     *({"role": "assistant", "content": f"Step {step} of {task}, {trial}."}
                       for step in range(trial + 1))],
        }
        for task in range(tasks) for trial in range(3)
    ]  # fmt: skip


def test_runs_of_tau_bench_with_scores_out_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "runs.json"
    file.write_text(json.dumps(tau_runs()))
    # The judge likes the second trial: right in every second task.
    lines = [
        {"id": f"{task}.{trial + 1}", "step": step + 1, "score": 0.9 if trial == 1 else 0.1}
        for task in range(10) for trial in range(3) for step in range(trial + 1)
    ]  # fmt: skip
    found = pick(file, "--predictions", public.write_lines(tmp_path / "scores.jsonl", lines))["picks"]
    at = {name: {n: round(each["value"], 6) for n, each in by_n.items()} for name, by_n in found.items()}
    assert at["random"] == {"1": 0.5, "2": 0.5, "3": 0.5}
    assert at["oracle"]["3"] == 1 and at["longest"]["3"] == 1 and at["shortest"]["3"] == 0
    assert at["judge: min"]["3"] == at["judge: mean"]["3"] == at["judge: last"]["3"] == 0.5
    assert at["judge: min"]["1"] == 0.5 and found["oracle"]["3"]["low"] is not None


def test_lines_with_scores_and_outcomes_need_nothing_else(tmp_path: Path) -> None:
    lines = [
        {"task_id": task, "trial": trial, "reward": trial, "scores": [0.5, trial / 2]}
        for task in range(3) for trial in range(2)
    ]  # fmt: skip
    found = pick(public.write_lines(tmp_path / "outcomes.jsonl", lines))["picks"]
    assert found["judge: last"]["2"]["value"] == 1 and found["random"]["2"]["value"] == 0.5


@pytest.mark.parametrize(
    "unused", ["--run saves/x", "--device cpu --rubric r.yaml --data-dir d", "--batch-size 9 --mode generate"]
)
def test_options_about_a_judge_are_refused_where_none_is_asked(unused: str, tmp_path: Path) -> None:
    lines = [{"task_id": 1, "trial": trial, "reward": trial, "scores": [0.5]} for trial in range(2)]
    file = public.write_lines(tmp_path / "outcomes.jsonl", lines)
    named = ", ".join(re.findall(r"--mode generate|--[a-z-]+", unused))
    with pytest.raises(UsageError, match=f"has outcomes but no runs, so no judge is used. Remove {named}[.]$"):
        pick(file, *unused.split())
    assert not (tmp_path / "out").exists()


def test_scored_lines_with_an_outcome_and_outcomes_beside_scores(
    tmp_path: Path, narrated: pytest.LogCaptureFixture
) -> None:
    """As score_trajectories.py writes them, with the outcome of the run added; and both in files of their own."""
    steps = [
        {"id": f"{task}.{trial}#{step}", "scores": {"step_score": 0.5}, "score": (trial + step) / 10,
         "metadata": {"task_id": str(task), "trajectory_id": f"{task}.{trial}", "step": step}}
        for task in range(3) for trial in range(2) for step in (2, 1)
    ]  # fmt: skip
    lines = [step | {"success": step["metadata"]["trajectory_id"][-1] == "1"} for step in steps]
    one = pick(public.write_lines(tmp_path / "scored.jsonl", lines))
    outcomes = [{"task_id": task, "trajectory_id": f"{task}.{trial}", "outcome": trial}
                for task in range(3) for trial in range(2)]  # fmt: skip
    scores = public.write_lines(tmp_path / "scores.jsonl", steps)
    two = pick(public.write_lines(tmp_path / "outcomes.jsonl", outcomes), "--predictions", scores)
    twice = public.write_lines(tmp_path / "scores_twice.jsonl", [*steps, steps[0]])
    assert pick(tmp_path / "outcomes.jsonl", "--predictions", twice)["picks"] == two["picks"]
    assert one["picks"] == two["picks"] and one["picks"]["judge: last"]["2"]["value"] == 1
    more = public.write_lines(tmp_path / "more.jsonl", [*steps, {"id": "other", "step": 1, "score": 1}])
    assert pick(tmp_path / "outcomes.jsonl", "--predictions", more)["picks"] == two["picks"]
    assert "more.jsonl: 1 lines about other runs" in narrated.text
    with pytest.raises(DataError, match="second line"):
        pick(public.write_lines(tmp_path / "twice.jsonl", [*lines, lines[0]]))
    found = pick(public.write_lines(tmp_path / "gap.jsonl", [lines[0], *lines[2:]]))  # the first step of a run
    assert found["tasks"] == 2


def test_a_line_after_an_empty_one_has_its_own_number(tmp_path: Path) -> None:
    (tmp_path / "outcomes.jsonl").write_text('{"task_id": 1, "outcome": 1}\n\n{"x": 1}\n')
    with pytest.raises(DataError, match=r"outcomes\.jsonl:3: unlike the first line"):
        pick(tmp_path / "outcomes.jsonl")


MESSAGES = [{"role": "user", "content": "Go."}, {"role": "assistant", "content": "Done."}]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"task_id": 1, "scores": [0.5], "reward": 7}], "an outcome from 0 to 1 .* is missing"),
        ([{"task_id": 1, "scores": [5], "reward": 1}], "not a list of numbers"),
        ([{"task_id": 1, "scores": [1], "reward": 1}], "no task has two runs"),
        ([{"task_id": 1, "trial": trial, "reward": 1} for trial in range(2)], "or pass the scores with --predictions"),
        ([{"task_id": 1, "scores": [1], "outcome": 1, "reward": 0}], r":1: its outcomes contradict .*1.* 0"),
        (
            [{"task_id": task, "trajectory_id": "0", "outcome": 1, "step": task, "score": 1} for task in (1, 2)],
            r":2: trajectory_id 0 is in task 2 and in task 1\. .* for example 2\.0",
        ),
        ([{"task_id": 1, "reward": reward, "messages": MESSAGES} for reward in (0, 100, 0)], "is 100, not from 0 to 1"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, lines: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        pick(public.write_lines(tmp_path / "outcomes.jsonl", lines))


def test_a_task_with_an_unscored_step_is_left_out_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "runs.json"
    file.write_text(json.dumps(tau_runs(3)))
    lines = [
        {"id": f"{task}.{trial + 1}", "step": step + 1, "score": 0.5}
        for task in range(3) for trial in range(3) for step in range(trial + 1) if (task, trial) != (1, 0)
    ]  # fmt: skip
    found = pick(file, "--predictions", public.write_lines(tmp_path / "scores.jsonl", lines))
    assert found["tasks"] == 2 and found["left_out"]["tasks with a step without a score"] == 1


def test_columns_about_fewer_tasks_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"task_id": task, "trajectory_id": f"{task}.{trial}", "outcome": trial % 2, "scores": [0.5]}
             for task in range(5) for trial in range(2 + task // 3)]  # fmt: skip
    pick(public.write_lines(tmp_path / "outcomes.jsonl", lines))
    assert "(remaining tasks: N=3: 2)" in capsys.readouterr().out
