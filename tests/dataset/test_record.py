"""Hostile lines: each is read or set aside with a reason, and none stops the conversion."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prmkit.dataset.record import LONGEST_LINE, Rejected, parse_line, read_record
from tests.dataset.conftest import Convert, prompt_of, read_lines, row_of

GOOD = json.dumps(row_of(prompt_of("a")))


def reason(line: bytes) -> str:
    with pytest.raises(Rejected) as rejected:
        read_record(line, parse_line(line))
    return rejected.value.reason


def changed(change: Callable[[dict[str, Any]], None]) -> bytes:
    row = json.loads(GOOD)
    change(row)
    return json.dumps(row).encode()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"oops", "not JSON"),
        (b"[1]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b"\xff\xfe{}", "not UTF-8 (byte 1 of the line)"),
        (GOOD.replace("Searched", "\xe9").encode("latin-1"), "not UTF-8"),
        (GOOD.replace("0.9", "NaN", 1).replace("web-search", "\\ud800").encode(), "not JSON"),
        (b'{"a": NaN}', "not JSON"),
        (b'{"a": ' + b"[" * 5_000 + b"]" * 5_000 + b"}", "not JSON"),
        (GOOD[:-1].encode() + b', "metadata": {}}', "the key 'metadata' stands twice in one object"),
        (GOOD.replace('"task_id"', '"task_id": "other", "task_id"').encode(), "the key 'task_id' stands twice"),
        (
            GOOD.replace('"task_id"', r'"n": "\u0022\u0022\u0022\u0022", "task_id": "x", "task_id"').encode(),
            "the key 'task_id'",
        ),
        (GOOD.replace('"from": "gpt"', '"from": "gpt", "value": "x"').encode(), "the key 'value' stands twice"),
        (changed(lambda row: row.pop("conversations")), "conversations is not a list of two turns"),
        (changed(lambda row: row["conversations"].pop()), "conversations is not a list of two turns"),
        (changed(lambda row: row["conversations"].append({})), "conversations is not a list of two turns"),
        (changed(lambda row: row.update(conversations=["a", "b"])), "conversations is not a list of two turns"),
        (changed(lambda row: row["conversations"].reverse()), "the turns are not from human and gpt, in this order"),
        (changed(lambda row: row["conversations"][0].update({"from": "system"})), "the turns are not from human"),
        (changed(lambda row: row["conversations"][1].update(value=0.9)), "the value of gpt is not a text"),
        (changed(lambda row: row["conversations"][1].update(value=None)), "the value of gpt is not a text"),
        (changed(lambda row: row["conversations"][0].update(value=" \n")), "empty prompt"),
        (changed(lambda row: row["conversations"][0].update(value="2025-08-17 19:02:53")), "nothing but a date"),
        (changed(lambda row: row.update(metadata=[])), "metadata is not an object"),
        (changed(lambda row: row["metadata"].update(task_id=["x"])), "metadata.task_id is not a text"),
        (changed(lambda row: row["metadata"].update(model_name=True)), "metadata.model_name is not a text"),
    ],
)
def test_a_row_of_another_form_is_set_aside_with_the_reason(line: bytes, expected: str) -> None:
    assert expected in reason(line)


def test_what_is_missing_in_the_metadata_is_no_fault() -> None:
    line = changed(lambda row: row.pop("metadata"))
    record = read_record(line, parse_line(line))
    assert (record.judge, record.task, record.evaluation_type) == (None, None, None)
    line = changed(lambda row: row["metadata"].update(task_id=17, model_name="", category=None))
    record = read_record(line, parse_line(line))
    assert (record.task, record.judge) == ("17", None)


def test_quotes_and_colons_in_texts_are_no_keys() -> None:
    line = json.dumps(row_of(prompt_of('{"task_id": "x", "task_id": "y"} \\": "":'))).encode()
    assert read_record(line, parse_line(line)).task == "task_1"


def test_hostile_lines_stop_nothing(convert_rows: Convert, data: Path) -> None:
    wide = b'{"conversations": [' + b"[]," * 1_000_000 + b"[]]}"
    lines = [
        GOOD.encode(),
        b'{"a": "' + b"x" * (LONGEST_LINE + 10) + b'"}',
        b"[" * 2_000_000,
        b"\x00" * 1_000,
        wide,
        b'{"conversations": "\\ud800"}',
        GOOD.encode() + b"\r",
        json.dumps(row_of(prompt_of("null \x00 byte, \u2028 line"), task="\x00")).encode(),
        b"\xff" * 10,
        json.dumps(row_of(prompt_of("last"))).encode(),
    ]
    report = convert_rows(lines)
    assert sum(report["rows"].values()) == 3
    assert report["duplicates"] == 1
    rejected = read_lines(data / "rejected.jsonl")
    assert [entry["line"] for entry in rejected] == [2, 3, 4, 5, 6, 9]
    assert rejected[0]["reason"].startswith("line of 4,194,3")
    assert len(rejected[0]["row"]) == 1_000
    assert [row["line"] for row in read_lines(data / "reward_model_full.meta.jsonl")] == [1, 8, 10]


def test_a_line_of_100_mb_is_set_aside_and_its_neighbours_are_kept(tmp_path: Path, data: Path) -> None:
    from prmkit.dataset.convert import convert
    from prmkit.dataset.settings import Settings

    source = tmp_path / "input.jsonl"
    with source.open("wb") as stream:
        stream.write(b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n")
        for _ in range(100):
            stream.write(b"x" * 1_000_000)
        stream.write(b"\n" + json.dumps(row_of(prompt_of("behind"))).encode())
    report = convert(Settings(inputs=(str(source),), output=data))
    assert report["rows"]["train"] == 2
    assert report["rejected"] == {"line too long": 1}
    assert [row["line"] for row in read_lines(data / "reward_model_full.meta.jsonl")] == [1, 3]


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
PATHS: list[tuple[Any, ...]] = [
    ("conversations",), ("conversations", 0), ("conversations", 1), ("conversations", 0, "value"),
    ("conversations", 1, "value"), ("conversations", 0, "from"), ("metadata",), ("metadata", "task_id"),
    ("metadata", "model_name"), ("metadata", "evaluation_type"), ("metadata", "category"),
]  # fmt: skip


def damaged(path: tuple[Any, ...], value: Any) -> bytes:
    row = json.loads(GOOD)
    place = row
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(row).encode().replace(b"\n", b" ")


@given(
    st.lists(
        st.binary(max_size=60).map(lambda line: line.replace(b"\n", b""))
        | st.builds(damaged, st.sampled_from(PATHS), json_values),
        max_size=40,
    )
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_line_is_kept_or_set_aside(convert_rows: Convert, data: Path, lines: list[bytes]) -> None:
    report = convert_rows([row_of(prompt_of("a row that is fine"), task=None), *lines])
    filled = [line for line in lines if line.strip(b" \t\r\x0b\x0c")]
    assert report["lines"] == len(filled) + 1
    kept, set_aside = sum(report["rows"].values()), sum(report["rejected"].values())
    assert kept + set_aside + report["duplicates"] == report["lines"]
    assert len(read_lines(data / "rejected.jsonl")) == set_aside
