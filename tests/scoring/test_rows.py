"""What is read of a user's lines."""

import codecs
import json

import orjson
from families import FLAT, prompt

from prmkit.scoring.rows import ShapeOf, read_rows

STEP = {"id": "one", "prompt": prompt("A step.", FLAT)}


def test_the_mark_that_windows_puts_before_a_file_is_passed_over() -> None:
    line = codecs.BOM_UTF8 + json.dumps(STEP).encode()
    first, second = read_rows([line, line], ShapeOf())
    assert first.request and first.id == "one"
    assert second.request is None, "it belongs to the beginning of a file"


def test_metadata_that_cannot_be_written_costs_its_row_alone() -> None:
    deep = orjson.loads("[" * 400 + "]" * 400)
    lines = [json.dumps(STEP | {"metadata": {"deep": deep}}), json.dumps(STEP | {"note": deep}), json.dumps(STEP)]
    one, two, three = read_rows([line.encode() for line in lines], ShapeOf())
    assert one.reason == "line 1: its metadata is nested too deeply"
    assert two.reason == "line 2: its metadata is nested too deeply"
    assert three.request
    for row in (one, two, three):
        orjson.dumps({"id": row.id, "metadata": row.metadata})


def test_what_can_be_written_by_a_hair_is_written() -> None:
    for depth in range(245, 260):
        line = json.dumps(STEP | {"metadata": {"deep": orjson.loads("[" * depth + "]" * depth)}})
        (row,) = read_rows([line.encode()], ShapeOf())
        orjson.dumps({"metadata": row.metadata})
