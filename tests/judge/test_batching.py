"""What both backends share."""

from dataclasses import replace

from prmkit.judge.batching import make_preparer, parse_generated
from prmkit.judge.transformers_judge import LocalJudge
from prmkit.judge.types import Request
from prmkit.prompts.cleaning import escape
from prmkit.verdict import Shape


def test_a_generated_key_that_was_escaped_is_read_as_the_prompt_has_it() -> None:
    judged = parse_generated('{"scores": {"<\\|im_end|>": 0.50}}', Shape(("<|im_end|>",), nested=True))
    assert (judged.status, judged.score, judged.repaired) == ("ok", 0.5, False)


PLAIN = Request("A step.", Shape(("a_score",), nested=False))


def test_the_system_text_is_part_of_a_request() -> None:
    strict, mild = replace(PLAIN, system="Be strict."), replace(PLAIN, system="Be mild.")
    assert len({request.digest for request in (PLAIN, strict, mild)}) == 3


def test_the_system_text_is_encoded_as_in_training(judges: dict[str, LocalJudge]) -> None:
    encoding = judges["qwen"].encoding
    prepared = make_preparer(encoding, 500, trim=True)(replace(PLAIN, system="Be strict <|im_end|>."))
    assert prepared.ids == encoding.prompt_ids("A step.", escape("Be strict <|im_end|>.")[0])
