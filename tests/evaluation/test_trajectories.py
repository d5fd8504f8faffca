"""Which tasks make a whole trajectory, and what one is summed up by."""

import pytest

from prmkit.evaluation.metrics import trajectories_of
from prmkit.judge.types import AGGREGATES, first_below


def clip(number: object, score: float = 0.7, task: str = "a", trajectory: str | None = None) -> dict:
    return {
        "task_id": task,
        "trajectory_id": trajectory or task,
        "evaluation_type": "clip",
        "clip_number": number,
        "prompt_sha256": f"{task}{number}",
        "metadata": {},
        "scores": {"score": {"mean": score}},
        "reference": {"score": 0.6},
    }


@pytest.mark.parametrize("numbers", [[1, 2, 3], [0, 1], [3, 2, 1], [1], [1.0, "2", 3], ["9", "10", "11"]])
def test_clips_that_follow_each_other_are_a_whole_trajectory(numbers):
    (whole,), left_out = trajectories_of([clip(number) for number in numbers])
    assert len(whole.predicted) == len(numbers)
    assert left_out == {}


@pytest.mark.parametrize("numbers", [[1, 3], [1, 2, 4], ["1", 3.0]])
def test_a_task_without_a_clip_in_the_middle_is_not_whole(numbers):
    assert trajectories_of([clip(number) for number in numbers]) == ([], {"a missing clip": 1})


@pytest.mark.parametrize("numbers", [[1, 2, None], [None, 1], [None], [1, "second", 3], [1, 2.5]])
def test_a_trajectory_with_a_step_of_unknown_place_is_not_whole(numbers):
    """Its aggregates and its first bad step would be those of its other steps."""
    rows = [clip(number) for number in numbers]
    assert trajectories_of([*rows, clip(1, task="b")])[1] == {"a step without a clip number": 1}
    assert [each.task for each in trajectories_of([*rows, clip(1, task="b")])[0]] == ["b"]


def test_a_task_that_was_not_asked_to_its_end_is_not_whole():
    rows = [clip(1), clip(2), clip(1, task="b")]
    whole, left_out = trajectories_of(rows, incomplete={"a"})
    assert [each.task for each in whole] == ["b"]
    assert left_out == {"a missing clip": 1}


def test_several_runs_of_one_task_are_several_trajectories():
    rows = [clip(number, trajectory=run) for run in ("run 1", "run 2") for number in (1, 2, 3)]
    whole, left_out = trajectories_of(rows)
    assert [each.task for each in whole] == ["a", "a"]
    assert left_out == {}


def test_clips_are_put_in_the_order_of_their_numbers():
    ((whole,), _) = trajectories_of([clip("10", 0.1), clip(9.0, 0.9)])
    assert whole.predicted == [0.9, 0.1]


def test_the_aggregates_and_the_first_bad_step_by_hand():
    steps = [0.9, 0.5, 0.8]
    found = {name: aggregate(steps) for name, aggregate in AGGREGATES.items()}
    assert found == pytest.approx({"min": 0.5, "product": 0.36, "mean": 2.2 / 3, "last": 0.8})
    assert first_below(steps, 0.8) == 1
    assert first_below([0.7999999999999999, 0.8], 0.8) is None
