"""What an answer to a question about all steps of a run means, without a server."""

import json
from typing import Any

import pytest

from prmkit.collection.questions import _read_run
from prmkit.verdict import Shape

SHAPE = Shape(("step_score",), nested=False)
PROMPTS = {1: "first", 2: "second"}


def read(*steps: str | dict[str, Any]) -> Any:
    listed = ", ".join(step if isinstance(step, str) else json.dumps(step) for step in steps)
    return _read_run(f'{{"steps": [{listed}]}}', PROMPTS, SHAPE)


def test_every_step_has_its_own_verdict() -> None:
    found = read({"step": 1, "step_score": 0.9}, {"step": 2, "step_score": 0.1})
    assert {step: verdict.scores for step, verdict in found.items()} == {1: {"step_score": 0.9}, 2: {"step_score": 0.1}}


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        (['{"step": 1, "step_score": 0.9, "step_score": 0.1}', '{"step": 2, "step_score": 0.5}'],
         "two different values for step_score"),
        ([{"step": 1, "step_score": 0.9}], "steps ['1'] instead of 1 to 2, each once"),
        ([{"step": True, "step_score": 0.9}, {"step": 2, "step_score": 0.1}],
         "steps ['2', 'True'] instead of 1 to 2, each once"),
        ([{"step": 1, "step_score": 9}, {"step": 2, "step_score": 0.1}], "step 1: score 9 of step_score is out of "
         "range"),
    ],
)  # fmt: skip
def test_an_answer_with_an_ambiguity_gives_no_verdict(steps: list[Any], reason: str) -> None:
    assert read(*steps) == reason


def test_two_lists_of_steps_give_no_verdict() -> None:
    text = '{"steps": [{"step": 1, "step_score": 0.9}], "steps": []}'
    assert _read_run(text, PROMPTS, SHAPE) == "two different values for steps"
