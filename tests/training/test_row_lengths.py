"""Row lengths in tokens: nothing is cut without a word."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from prmkit.prompts.encoding import ChatEncoding, load_encoding
from prmkit.training.check import Status
from prmkit.training.row_lengths import Lengths, check_lengths, measure

ALPACA = {"file_name": "rows.jsonl"}
SHAREGPT = {
    "file_name": "rows.jsonl",
    "formatting": "sharegpt",
    "columns": {"messages": "conversations"},
    "tags": {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"},
}


@pytest.fixture(scope="module")
def encoding(micro_model: Path) -> ChatEncoding:
    return load_encoding(micro_model, "qwen")


def write(folder: Path, entry: dict[str, Any], rows: list[Any]) -> dict[str, Any]:
    """A data folder with one dataset, and the values that name it."""
    (folder / "dataset_info.json").write_text(json.dumps({"steps": entry}))
    (folder / entry["file_name"]).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return {"dataset": "steps", "dataset_dir": str(folder), "cutoff_len": 64}


def test_lengths_are_those_of_training(encoding: ChatEncoding, tmp_path: Path) -> None:
    prompts = ["Judge this.", "Judge that, please.\n" * 9, "短い"]
    rows = [{"instruction": prompt, "input": "", "output": '{"a": 0.50}'} for prompt in prompts]
    found = measure(encoding, write(tmp_path, ALPACA, rows))
    expected = [sum(map(len, encoding.pair_ids(prompt, '{"a": 0.50}'))) for prompt in prompts]
    assert found is not None
    assert sorted(found.longest_first) == sorted(expected) == sorted(found.sample)
    assert found.longest == max(expected)


def test_both_formats_have_the_same_lengths(encoding: ChatEncoding, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    flat = [{"instruction": "Judge", "input": "this.", "output": "x"}]
    turns = [{"conversations": [{"from": "human", "value": "Judge\nthis."}, {"from": "gpt", "value": "x"}]}]
    first = measure(encoding, write(tmp_path / "a", ALPACA, flat))
    second = measure(encoding, write(tmp_path / "b", SHAREGPT, turns))
    assert first == second


def test_the_longest_rows_come_first_when_time_is_short(
    encoding: ChatEncoding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"instruction": "word " * (20 + number % 7), "output": "x"} for number in range(3000)]
    rows[1234]["instruction"] = "word " * 500
    ticks = itertools.count()
    monkeypatch.setattr("prmkit.training.row_lengths.time.monotonic", lambda: float(next(ticks)))
    found = measure(encoding, write(tmp_path, ALPACA, rows), budget=100.0)
    assert found is not None
    assert not found.measured_all
    assert found.longest == found.longest_first[0] > 500


def test_other_files_are_not_measured(encoding: ChatEncoding, tmp_path: Path) -> None:
    values = write(tmp_path, {"file_name": "rows.csv"}, [])
    assert measure(encoding, values) is None
    assert check_lengths(None, values).status is Status.WARNING


@pytest.mark.parametrize(
    ("cutoff", "status", "told"),
    [
        (200, Status.OK, "cuts none"),
        (150, Status.WARNING, "1 row is cut"),
        (90, Status.ERROR, "100 of 200 rows are cut"),
    ],
)
def test_cut_rows(cutoff: int, status: Status, told: str) -> None:
    lengths = [180] + [100] * 99 + [50] * 100
    found = check_lengths(Lengths(200, lengths, lengths), {"cutoff_len": cutoff, "per_device_train_batch_size": 1})
    assert (found.status, told in found.found) == (status, True)
    assert ("cutoff_len=512" in found.advice) == (status is not Status.OK)


def test_packing_takes_one_token() -> None:
    lengths = Lengths(2, [100, 100], [100, 100])
    assert check_lengths(lengths, {"cutoff_len": 100}).status is Status.OK
    assert check_lengths(lengths, {"cutoff_len": 100, "neat_packing": True}).status is Status.ERROR


def test_a_share_is_estimated_when_the_longest_are_all_cut() -> None:
    found = check_lengths(Lengths(10_000, [900] * 300, [900, 100, 100, 100]), {"cutoff_len": 512})
    assert found.status is Status.ERROR
    assert "about 25% of 10,000 rows" in found.found


def test_padding_is_worth_a_word() -> None:
    mixed = Lengths(400, [1000] * 200 + [100] * 200, [1000, 100] * 200)
    advice = check_lengths(
        mixed, {"cutoff_len": 1024, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 8}
    ).advice
    assert advice.startswith(
        "45% of each batch is padding; per_device_train_batch_size=1 gradient_accumulation_steps=16"
    )
    even = Lengths(400, [1000] * 400, [1000] * 400)
    assert check_lengths(even, {"cutoff_len": 1024, "per_device_train_batch_size": 2}).advice == ""


def test_no_rows_at_all(encoding: ChatEncoding, tmp_path: Path) -> None:
    values = write(tmp_path, ALPACA, [])
    assert check_lengths(measure(encoding, values), values).status is Status.ERROR
