"""What is read of a user's lines."""

import codecs
import io
import json

import orjson
import pytest
from families import FLAT, prompt

from prmkit.judge.scorer import ShapeOf
from prmkit.layouts import read_lines
from prmkit.scoring.rows import RowToScore
from prmkit.scoring.rows import read_rows as read

STEP = {"id": "one", "prompt": prompt("A step.", FLAT)}


def rows(*values: object, shape_of: ShapeOf | None = None) -> list[RowToScore]:
    text = b"\n".join(value if isinstance(value, bytes) else json.dumps(value).encode() for value in values)
    return list(read(read_lines(io.BytesIO(text), "steps.jsonl"), shape_of or ShapeOf()))


def test_a_byte_order_mark_is_skipped() -> None:
    first, second = rows(codecs.BOM_UTF8 + json.dumps(STEP).encode(), STEP)
    assert first.request and second.request and first.id == "one"


def test_metadata_that_cannot_be_written_costs_its_row_alone() -> None:
    deep = orjson.loads("[" * 400 + "]" * 400)
    one, two, three = rows(STEP | {"metadata": {"deep": deep}}, STEP | {"note": deep}, STEP)
    assert "nested too deeply" in one.reason and one.reason.startswith("line 1: ") and one.id == "one"
    assert "nested too deeply" in two.reason
    assert three.request
    for row in (one, two, three):
        orjson.dumps({"id": row.id, "metadata": row.metadata})


def test_what_can_just_be_written_is_written() -> None:
    for depth in range(240, 260):
        (row,) = rows(STEP | {"metadata": {"deep": orjson.loads("[" * depth + "]" * depth)}})
        orjson.dumps({"metadata": row.metadata})


def test_the_system_text_is_asked_with_and_tells_rows_apart() -> None:
    strict, mild, plain = rows(
        {"prompt": STEP["prompt"], "system": "Be strict."},
        {"messages": [{"role": "system", "content": "Be mild."}, {"role": "user", "content": STEP["prompt"]}]},
        {"prompt": STEP["prompt"]},
    )
    assert [row.request.system for row in (strict, mild, plain)] == ["Be strict.", "Be mild.", None]
    assert (
        len({row.id for row in (strict, mild, plain)}) == len({row.request_hash for row in (strict, mild, plain)}) == 3
    )


def test_arrays_and_missing_values_of_pandas_are_read() -> None:
    both = rows(b'[{"id": 1, "prompt": "a score", "metadata": {"task_id": NaN}},\n {"id": 2, "prompt": "b"}]')
    assert [(row.id, row.metadata) for row in both] == [(1, {"task_id": None}), (2, {})]


def test_a_form_that_is_not_known_is_answered_with_the_expected_one() -> None:
    (row,) = rows({"text": "What a step."})
    assert row.request is None and "conversations" in row.reason


@pytest.mark.parametrize(("given", "kept"), [("0", 0), ('""', ""), ("true", None), ("[]", None)])
def test_the_id_of_a_row_that_cannot_be_read_is_kept(given: str, kept: object) -> None:
    (row,) = rows(f'{{"id": {given}, "prompt": ""}}'.encode())
    assert (row.id, type(row.id), row.reason) == (kept, type(kept), "line 1: empty prompt")


def test_a_trajectory_is_a_task_unless_it_says_otherwise() -> None:
    one, other = rows(
        STEP | {"metadata": {"task_id": "t", "clip_number": "2"}},
        STEP | {"metadata": {"task_id": "t", "trajectory_id": "t/1", "evaluation_type": "final"}},
    )
    assert (one.trajectory, one.task, one.clip_number, one.is_step) == ("t", "t", 2, True)
    assert (other.trajectory, other.task, other.is_step) == ("t/1", "t", False)


def test_keys_that_no_schema_shows_are_never_invented() -> None:
    (row,) = rows({"prompt": "Rate this step from 0 to 1."})
    assert row.request is None and row.reason.endswith("pass --keys, or keys in a request to a server")
