"""The predictions of an evaluation that goes on."""

import json
from pathlib import Path

from prmkit.evaluation.predictions import resume
from prmkit.resumable import append_rows


def test_predictions_that_failed_are_made_again_and_others_are_not(tmp_path: Path) -> None:
    file = tmp_path / "predictions.jsonl"
    rows = [{"prompt_sha256": status, "status": status} for status in ("ok", "failed", "too_long", "unparsed", "error")]
    resume(file, {"judge": "one"})
    list(append_rows(file, rows))
    lasting = [row for row in rows if row["status"] != "failed"]
    assert resume(file, {"judge": "one"}) == lasting
    assert list(map(json.loads, file.read_text().splitlines())) == lasting
