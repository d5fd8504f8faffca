"""Rows in every form that people keep them in: read whole, or rejected with the reason."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import orjson
import pytest

from prmkit.layouts import Line, Rejected, parse_line
from prmkit.rows import InputRow, prompt_hash, read_row, whole_number

PROMPT = 'Judge one step.\n\n{"reasonableness_score": 0.7, "summary": "…"}'
ANSWER = '{"reasonableness_score": 0.5, "summary": "It asked twice."}'
METADATA = {"model_name": "judge-a", "task_id": "harbour_1", "evaluation_type": "clip", "clip_number": 2}
ROW = {
    "conversations": [{"from": "human", "value": PROMPT}, {"from": "gpt", "value": ANSWER}],
    "metadata": METADATA,
}


def read(value: Any) -> InputRow:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    line = Line(1, text, len(text))
    return read_row(parse_line(line), line)


def reason(value: Any) -> str:
    with pytest.raises(Rejected) as rejected:
        read(value)
    return rejected.value.reason


def changed(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    row = json.loads(json.dumps(ROW))
    change(row)
    return row


# --- forms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        ROW,
        {"conversations": [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": ANSWER}]},
        {"messages": [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": ANSWER}]},
        {"messages": [{"from": "user", "value": PROMPT}, {"from": "assistant", "value": ANSWER}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": PROMPT}]},
                      {"role": "assistant", "content": ANSWER}]},
        {"instruction": PROMPT, "input": "", "output": ANSWER, "tools": ""},
        {"instruction": PROMPT.split("\n")[0], "input": PROMPT.partition("\n")[2], "output": ANSWER},
        {"prompt": PROMPT, "response": ANSWER},
        {"prompt": [{"role": "user", "content": PROMPT}], "completion": [{"role": "assistant", "content": ANSWER}]},
    ],
)  # fmt: skip
def test_every_dialect_says_the_same(row: dict[str, Any]) -> None:
    for form in ({**row, "metadata": METADATA}, {**row, **METADATA}, {**row, "metadata": json.dumps(METADATA)}):
        found = read(form)
        assert (found.system, found.prompt, found.answer) == (None, PROMPT, ANSWER)
        assert (found.judge, found.task, found.evaluation_type, found.clip_number) == (
            "judge-a",
            "harbour_1",
            "clip",
            2,
        )
        assert found.trajectory == "harbour_1"
        assert found.metadata == METADATA
    assert read({**row, "metadata": METADATA, "system": "Be strict."}).system == "Be strict."


def test_a_bare_prompt_has_no_answer() -> None:
    assert read({"prompt": PROMPT, "id": 7, "task_id": "x"}).answer is None
    assert read({"prompt": PROMPT, "id": 7, "task_id": "x"}).id == 7
    assert read({"messages": [{"role": "user", "content": PROMPT}]}).answer is None


def test_system_texts_are_carried_and_part_of_the_hash() -> None:
    turn = {"role": "system", "content": "Be strict."}
    rows = [
        read({**ROW, "system": "Be strict."}),
        read(changed(lambda row: row["conversations"].insert(0, {"from": "system", "value": "Be strict."}))),
        read({"messages": [turn, {"role": "user", "content": PROMPT}], "system": "Be strict."}),
    ]
    assert {row.system for row in rows} == {"Be strict."}
    assert {row.sha256 for row in rows} == {prompt_hash(PROMPT, "Be strict.")}
    assert prompt_hash(PROMPT, "Be kind.") != rows[0].sha256 != read(ROW).sha256
    assert read({**ROW, "system": ""}).sha256 == read({**ROW, "system": None}).sha256 == read(ROW).sha256
    assert "two system prompts" in reason({"messages": [turn, {"role": "user", "content": "x"}], "system": "Be kind."})


def test_copies_that_look_the_same_are_one_prompt() -> None:
    """Windows writes CRLF, and macOS takes `é` apart; both would be on two sides of the split."""
    assert prompt_hash("Café\nBar") == prompt_hash("Cafe\u0301\r\nBar") != prompt_hash("Cafe\nBar")
    assert prompt_hash("plain") == hashlib.sha256(b"plain").hexdigest()


@pytest.mark.parametrize("task", ["Café", "Cafe\u0301", " Café ", "Café\u200b", "\ufeffCafé\n"])
def test_a_name_has_one_spelling(task: str) -> None:
    assert read(changed(lambda row: row["metadata"].update(task_id=task))).task == "Café"
    assert read(changed(lambda row: row["metadata"].update(task_id=" \u200b"))).task is None


def test_a_column_that_is_null_is_not_there() -> None:
    """A table has all columns in every row."""
    turns = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": ANSWER}]
    row = read({"conversations": None, "messages": turns, "prompt": PROMPT, "completion": None})
    assert (row.prompt, row.answer) == (PROMPT, ANSWER)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            changed(lambda row: row["conversations"].extend(row["conversations"])),
            "expected one human and at most one gpt turn; found human, gpt, human",
        ),
        (changed(lambda row: row["conversations"].insert(0, row["conversations"][0])), "found human, human, gpt"),
        (changed(lambda row: row["conversations"].reverse()), "found gpt, human"),
        (changed(lambda row: row["conversations"][0].update({"from": "tool"})), "a turn is from 'tool'"),
        (changed(lambda row: row["conversations"].clear()), "not a list of turns"),
        (changed(lambda row: row.update(conversations=["a", "b"])), "not a list of turns"),
        (changed(lambda row: row["conversations"][1].update(value=0.9)), "the turn of gpt is not a string"),
        (changed(lambda row: row["conversations"][1].update(value=None)), "the turn of gpt is not a string"),
        (changed(lambda row: row["conversations"][1].update(tool_calls=[{}])), "tool calls"),
        (changed(lambda row: row.update(tools='[{"name": "search"}]')), "has `tools`"),
        (changed(lambda row: row.update(images=["a.png"])), "has `images`"),
        (changed(lambda row: row.update(system=["x"])), "system is not a string"),
        (changed(lambda row: row["conversations"][0].update(value=" \n")), "empty prompt"),
        (changed(lambda row: row.pop("conversations")), 'expected {"conversations": [{"from": "human"'),
        ({"data": [ROW, ROW]}, """jq -c '.["data"][]' FILE > rows.jsonl"""),
        ({"prompt": PROMPT, "response": ANSWER, "output": ANSWER}, "several answers"),
        (ROW | {"messages": ROW["conversations"]}, "several turns: conversations or messages"),
        (ROW | {"prompt": "Another one."}, "prompt differs from the turns"),
        (ROW | {"response": '{"score": 0.1}'}, "response differs from the turns"),
        ({"instruction": PROMPT, "output": {"score": 1}}, "the answer is not a string"),
        (changed(lambda row: row.update(metadata=[])), "metadata is not an object"),
        (changed(lambda row: row.update(metadata="{oops")), "metadata is not an object"),
        (changed(lambda row: row.update(task_id="other")), "task_id differs"),
        (changed(lambda row: row["metadata"].update(task_id=["x"])), "metadata.task_id is not a string"),
        (changed(lambda row: row["metadata"].update(model_name=True)), "metadata.model_name is not a string"),
        ([1], "not a JSON object"),
        (b"null", "not a JSON object"),
        (b"oops", "not JSON"),
        (b"\xff\xfe{}", "not UTF-8 (byte 1 of the line)"),
        (json.dumps(ROW)[:-1].encode() + b', "metadata": {}}', "the key 'metadata' occurs twice"),
        (json.dumps(ROW).replace('"from": "gpt"', '"from": "gpt", "value": "x"').encode(), "the key 'value' occurs"),
        (json.dumps(ROW).replace('"task_id"', r'"n": "\u0022\u0022", "task_id": "x", "task_id"').encode(), "'task_id'"),
    ],
)
def test_what_cannot_be_carried_is_rejected_with_the_reason(row: Any, expected: str) -> None:
    assert expected in reason(row)


def test_nan_is_null_and_other_damage_is_not_json() -> None:
    row = read(json.dumps(changed(lambda row: row["metadata"].update(category=float("nan"), clip_number=3.0))).encode())
    assert row.metadata["category"] is None
    assert row.clip_number == 3
    assert "not JSON" in reason(json.dumps(ROW).replace("harbour", "\\ud800").replace("2}", "NaN}").encode())


def test_names_are_one_however_they_are_written() -> None:
    for value in ("7", 7, 7.0):
        assert read(changed(lambda row, value=value: row["metadata"].update(task_id=value))).task == "7"
    assert read(changed(lambda row: row["metadata"].update(task_id="", model_name=None))).task is None
    flat = read(changed(lambda row: row.update(metadata={"source": "a"}, task_id="harbour_9", trajectory_id="run 4")))
    assert (flat.task, flat.trajectory) == ("harbour_9", "run 4")
    assert flat.metadata == {"source": "a", "task_id": "harbour_9", "trajectory_id": "run 4"}


@pytest.mark.parametrize("depth", [200, 254, 300, 900, 1_020])
@pytest.mark.parametrize("place", ["metadata", "beside"])
def test_deep_rows_are_read_or_rejected(depth: int, place: str) -> None:
    deep = "[" * depth + "]" * depth
    text = json.dumps(ROW)[:-1] + f', "x": {deep}' + "}"
    if place == "metadata":
        text = json.dumps(ROW).replace('"clip_number": 2', f'"x": {deep}')
    if depth == 200:
        assert orjson.dumps({"row": dict(read(text.encode()).metadata)})
    else:
        assert reason(text.encode()) == "nested too deeply"


@pytest.mark.parametrize(("value", "number"), [(1, 1), (1.0, 1), ("1", 1), (1.5, None), ("a", None), (None, None)])
def test_whole_numbers(value: Any, number: int | None) -> None:
    assert whole_number(value) == number


@pytest.mark.parametrize("number", ["123456789012345678901", "9007199254740994.0", "1e300"])
def test_an_id_that_parsers_round_is_rejected(number: str) -> None:
    """Else 123456789012345678901 and 123456789012345678902 would be one task."""
    text = json.dumps(ROW | {"metadata": {"task_id": 0}}).replace('"task_id": 0', f'"task_id": {number}')
    assert "write it as a string" in reason(text.encode())


@pytest.mark.parametrize(("beside", "inside"), [(7, "7"), ("7", 7.0), (" a", "a")])
def test_one_id_in_two_places_may_be_written_in_two_ways(beside: Any, inside: Any) -> None:
    assert read(ROW | {"task_id": beside, "metadata": {"task_id": inside}}).task == str(inside).removesuffix(".0")
