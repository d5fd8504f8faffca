"""From a judge's text to the objects in it."""

import pytest

from prmkit.verdict.repair import CUT_OFF, Refusal, find_json, repair_objects

PLAIN = '{"a_score": 0.9, "summary": "It searched and found."}'


def test_objects_are_found_in_their_order() -> None:
    found, broken = find_json('See {"name": "x"} and {"a_score": 0.1} and {"b_score": 0.2}')
    assert [one.value for one in found] == [{"name": "x"}, {"a_score": 0.1}, {"b_score": 0.2}]
    assert all("prose around the answer" in one.repairs for one in found)
    assert not broken.starts


def test_the_text_of_an_object_is_what_the_judge_wrote() -> None:
    found, broken = find_json(f"So: {PLAIN[:-10]}")
    assert not found
    (repaired,) = repair_objects(broken)
    assert repaired.text == PLAIN[:-10]
    assert CUT_OFF in repaired.repairs


@pytest.mark.parametrize("text", ["", "   ", "<think>never done {", "x" * 300_000])
def test_what_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(Refusal):
        find_json(text)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ('It called {"query": "x", "page": 1}.', None),
        ('Then: "no", then "why": because.', None),
        ('See [a "b", "c"] and "d".', None),
        ("Line\nand\ttab.", None),
        (r"It\'s C:\data\q \"fine\".", 'It\'s C:\\data\\q "fine".'),
    ],
)
def test_quotes_and_brackets_in_a_string_stay_in_it(written: str, meant: str | None) -> None:
    _, broken = find_json(f'{{"a_score": 0.9, "summary": "{written}", "more": "m",}}')
    (repaired,) = repair_objects(broken)
    assert repaired.value == {"a_score": 0.9, "summary": meant or written, "more": "m"}
