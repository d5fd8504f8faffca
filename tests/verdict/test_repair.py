"""From a judge's text to the objects in it."""

import pytest

from prmkit.verdict.repair import Refusal, find_objects

PLAIN = '{"a_score": 0.9, "summary": "It searched and found."}'


def test_objects_are_found_in_their_order() -> None:
    found = find_objects('See {"name": "x"} and {"a_score": 0.1} and {"b_score": 0.2}')
    assert [one.value for one in found] == [{"name": "x"}, {"a_score": 0.1}, {"b_score": 0.2}]
    assert all("prose around the answer" in one.repairs and one.exact for one in found)


def test_the_first_object_that_is_not_json_is_the_last_one() -> None:
    whole, repaired = find_objects(f"See {PLAIN} and: {PLAIN[:-10]}")
    assert whole.exact
    assert (repaired.exact, repaired.cut_off) == (False, True)
    assert repaired.text == PLAIN[:-10], "what the judge wrote"


@pytest.mark.parametrize("text", ["", "   ", "<think>never done {", "x" * 300_000])
def test_what_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(Refusal):
        find_objects(text)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ('See [a "b", "c"] and "d".', None),
        ('It "found" {x} [1] and <b>"y"</b>.', None),
        ("Line\nand\ttab.", None),
        (r"It\'s C:\data\q \"fine\".", 'It\'s C:\\data\\q "fine".'),
    ],
)
def test_quotes_and_brackets_in_a_string_stay_in_it(written: str, meant: str | None) -> None:
    (repaired,) = find_objects(f'{{"a_score": 0.9, "summary": "{written}", "more": "m",}}')
    assert repaired.value == {"a_score": 0.9, "summary": meant or written, "more": "m"}
