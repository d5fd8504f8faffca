"""From a judge's text to the object in it: every reading, the surest one first."""

import subprocess
import sys
from pathlib import Path

import pytest

from prmkit.verdict.repair import CUT_OFF, Refusal, find_objects

PLAIN = '{"a_score": 0.9, "summary": "It searched and found."}'

ORDINARY = [
    PLAIN,
    f"```json\n{PLAIN}\n```",
    f"So: {PLAIN} There.",
    PLAIN.replace(" and ", "\nand "),
    PLAIN.replace("searched", 'said "here", and "there"'),
    PLAIN.replace('"}', '",}'),
    PLAIN.replace(", ", ", // why\n", 1),
    PLAIN.replace(", ", " ", 1),
    PLAIN.replace("found", r"found \d+"),
    PLAIN[:-10],
]


def test_ordinary_faults_do_not_need_json_repair(root: Path) -> None:
    """It takes 6 ms an answer; were it asked for every fourth one, it would be most of a conversion."""
    program = (
        f"import sys\nfrom prmkit.verdict import Verdict, read_verdict\n"
        f"assert all(isinstance(read_verdict(text), Verdict) for text in {ORDINARY!r})\n"
        f"assert 'json_repair' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=root, check=True)


def test_several_objects_are_offered_in_their_order() -> None:
    found = list(find_objects('See {"name": "x"} and {"a_score": 0.1} and {"b_score": 0.2}'))
    assert [reading.value for reading in found][:3] == [{"name": "x"}, {"a_score": 0.1}, {"b_score": 0.2}]
    assert all("prose around the answer" in reading.repairs for reading in found[:3])


def test_the_text_of_a_reading_is_what_the_judge_wrote() -> None:
    (found, *_) = find_objects(f"So: {PLAIN[:-10]}")
    assert found.text == PLAIN[:-10]
    assert CUT_OFF in found.repairs


def test_without_an_object_there_is_no_reading() -> None:
    assert not list(find_objects("no object"))


@pytest.mark.parametrize("text", ["", "   ", "<think>never done {", "x" * 300_000])
def test_what_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(Refusal):
        list(find_objects(text))
