"""The predictions of an evaluation that goes on."""

import json
from pathlib import Path
from typing import Any

import pytest

from prmkit.errors import DataError
from prmkit.evaluation.predictions import resume
from prmkit.resumable import append_rows

SCORE = {"mean": 0.5, "median": 0.5, "mode": 0.5, "std": 0.1, "label_mass": 1.0, "below": None}
PREDICTION: dict[str, Any] = {
    "prompt_sha256": "a", "task_id": "t", "trajectory_id": "t", "evaluation_type": "clip", "clip_number": 1,
    "metadata": {}, "prompt_characters": 9, "status": "ok", "scores": {"score": SCORE}, "score": 0.5, "std": 0.1,
    "reference": {"score": 0.5}, "references": {}, "leaked_score": None, "leaked_last": None,
    "id": "a", "reason": None, "text": None, "prompt_tokens": 3, "repaired": False, "trimmed": False,
}  # fmt: skip


def test_predictions_that_failed_are_made_again_and_others_are_not(tmp_path: Path) -> None:
    file = tmp_path / "predictions.jsonl"
    rows = [PREDICTION | {"prompt_sha256": status, "status": status}
            for status in ("ok", "failed", "too_long", "unparsed", "error")]  # fmt: skip
    resume(file, {"judge": "one"})
    list(append_rows(file, rows))
    lasting = [row for row in rows if row["status"] != "failed"]
    assert resume(file, {"judge": "one"}) == lasting
    assert list(map(json.loads, file.read_text().splitlines())) == lasting


@pytest.mark.parametrize(
    "edited",
    [
        [],
        {},
        {key: value for key, value in PREDICTION.items() if key != "task_id"},
        PREDICTION | {"scores": None},
        PREDICTION | {"scores": {"score": SCORE | {"mean": "0.5"}}},
        PREDICTION | {"scores": {"score": SCORE | {"mean": 5}}},
        PREDICTION | {"scores": {"score": {"mean": 0.5}}},
    ],
)
def test_an_edited_prediction_is_named(tmp_path: Path, edited: Any) -> None:
    file = tmp_path / "predictions.jsonl"
    resume(file, {"judge": "one"})
    file.write_text(f"{json.dumps(PREDICTION)}\n{json.dumps(edited)}\n")
    with pytest.raises(DataError, match=r"predictions\.jsonl:2: (edited, )?damaged"):
        resume(file, {"judge": "one"})
