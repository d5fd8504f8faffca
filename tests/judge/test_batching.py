"""What both backends share."""

import math

from families import NESTED, prompt

from prmkit.judge.batching import Prepared, judgements_in_order, read_written
from prmkit.judge.score_trie import distribution_of
from prmkit.judge.types import Judgement, Request
from prmkit.verdict import Shape, asked_shape


def test_a_model_that_computes_no_numbers_gives_an_error_and_no_score() -> None:
    shape = asked_shape(NESTED)
    requests = [Request(prompt(step, NESTED), shape) for step in ("good", "bad")]

    def judge_all(ready: list[Prepared]) -> list[Judgement]:
        values = {"good": -2.0, "bad": math.nan}
        return [Judgement("ok", {key: distribution_of([values[p.ids]] * 101) for key in shape.keys}) for p in ready]

    def prepare(request: Request) -> Prepared:
        return Prepared("good" if "good" in request.prompt else "bad", request.shape, trimmed=False)

    good, bad = judgements_in_order(requests, prepare, judge_all, window=2)
    assert good.status == "ok" and good.score is not None
    assert bad.status == "error" and bad.score is None and "not numbers" in bad.reason


def test_a_written_key_with_a_marker_is_read_as_the_prompt_has_it() -> None:
    judged = read_written('{"scores": {"<\\|im_end|>": 0.50}}', Shape(("<|im_end|>",), nested=True))
    assert (judged.status, judged.score, judged.repaired) == ("ok", 0.5, False)
