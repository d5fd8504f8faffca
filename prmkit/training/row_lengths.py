"""How long are the rows in tokens, and is any of them cut?

LLaMA Factory cuts a row that is too long at the end of its *prompt*, without a word: the question and the start of the
answer's turn go, the label stays. The longest rows are therefore measured first, and a random sample after them, until
the time is up. Runs where LLaMA Factory is already imported (`prmkit.training.deep`).
"""

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from prmkit.prompts.encoding import ChatEncoding
from prmkit.training.check import Check, error, ok, warning
from prmkit.training.entries import Entry, folder_of, names_in, read_entries

NAME = "row lengths"
BUDGET_SECONDS = 4.0
SAMPLE = 400
FEW = 0.01
"""Up to this share of cut rows is only worth a warning."""
PADDING_WORTH_SAYING = 0.15


@dataclass(frozen=True)
class Lengths:
    """Rows and their lengths in tokens, prompt and answer together."""

    rows: int
    longest_first: Sequence[int]
    """Of the rows with the most bytes."""
    sample: Sequence[int]
    """Of rows drawn at random, in random order."""

    @property
    def longest(self) -> int:
        """Tokens of the longest row that was measured."""
        return max((*self.longest_first, *self.sample), default=0)

    @property
    def measured_all(self) -> bool:
        """Whether nothing was left out."""
        return len(self.longest_first) >= self.rows


def measure(encoding: ChatEncoding, values: Mapping[str, Any], budget: float = BUDGET_SECONDS) -> Lengths | None:
    """Measure the rows of `dataset` and `eval_dataset`; None when their files are of a kind that is not read here.

    Args:
        encoding: of the model and the configured template.
        values: LLaMA Factory's keys.
        budget: seconds.
    """
    entries = read_entries(folder_of(values))
    names = [*names_in(values.get("dataset")), *names_in(values.get("eval_dataset"))]
    chosen = [entries[name] for name in names if name in entries]
    if not chosen or any(entry.file is None or entry.file.suffix != ".jsonl" for entry in chosen):
        return None
    places = [place for entry in chosen for place in _places(entry)]
    drawn = random.Random(0).sample(places, min(SAMPLE, len(places)))  # noqa: S311
    lengths = _in_time(encoding, sorted(places, key=lambda place: -place.size), budget * 0.6)
    longest_first = list(lengths.values())
    if len(lengths) < len(places):
        lengths |= _in_time(encoding, [place for place in drawn if place not in lengths], budget * 0.4)
    return Lengths(len(places), longest_first, [lengths[place] for place in drawn if place in lengths])


class _Place(NamedTuple):
    file: Path
    offset: int
    size: int
    entry: Entry


def _places(entry: Entry) -> Iterator[_Place]:
    offset, file = 0, entry.file or Path()
    with file.open("rb") as stream:
        for line in stream:
            if line.strip():
                yield _Place(file, offset, len(line), entry)
            offset += len(line)


def _in_time(encoding: ChatEncoding, places: Sequence[_Place], budget: float) -> dict[_Place, int]:
    lengths: dict[_Place, int] = {}
    end = time.monotonic() + budget
    for place in places:
        if time.monotonic() > end:
            break
        with place.file.open("rb") as stream:
            stream.seek(place.offset)
            prompt, answer = _texts(place.entry, orjson.loads(stream.readline()))
        lengths[place] = sum(map(len, encoding.pair_ids(prompt, answer)))
    return lengths


def _texts(entry: Entry, row: Mapping[str, Any]) -> tuple[str, str]:
    """The prompt and the answer of a row, as LLaMA Factory joins them from the row's columns."""
    columns = entry.columns or {}
    if entry.formatting == "sharegpt":
        turns = row.get(columns.get("messages", "conversations")) or []
        content = (entry.tags or {}).get("content_tag", "value")
        texts = [str(turn.get(content, "")) for turn in turns] or [""]
        return "\n".join(texts[:-1]), texts[-1]
    default = {"prompt": "instruction", "query": "input", "response": "output"}
    prompt, query, response = (columns.get(key, "" if columns else default[key]) for key in default)
    parts = [str(row[name]) for name in (prompt, query) if name and row.get(name)]
    return "\n".join(parts), str(row.get(response) or "")


def check_lengths(lengths: Lengths | None, values: Mapping[str, Any]) -> Check:
    """Say whether rows are cut, and what `cutoff_len` would hold them all."""
    if lengths is None:
        return warning(NAME, "not measured: the dataset is no JSONL file", "Compare cutoff_len with your longest row.")
    if not lengths.rows:
        return error(NAME, "the dataset has no rows", "Convert the data again: python convert_dataset.py")
    cutoff = int(values.get("cutoff_len", 2048)) - (1 if values.get("packing") or values.get("neat_packing") else 0)
    measured = "" if lengths.measured_all else f", {len(lengths.longest_first):,} longest measured"
    size = f"{lengths.rows:,} rows{measured}, the longest of {lengths.longest:,} tokens"
    if lengths.longest <= cutoff:
        return ok(NAME, f"{size}; cutoff_len {cutoff:,} cuts none", _padding(lengths, values))
    cut, share = _cut(lengths, cutoff)
    found = f"{cut} cut at cutoff_len {cutoff:,}, at the end of the prompt, where the question is ({size})"
    needed = -(-lengths.longest // 512) * 512
    advice = f"cutoff_len={needed}, or shorten them in the conversion: --too-long trim"
    return warning(NAME, found, advice) if share <= FEW else error(NAME, found, advice)


def _cut(lengths: Lengths, cutoff: int) -> tuple[str, float]:
    """How many rows are cut, in words, and their share."""
    counted = sum(length > cutoff for length in lengths.longest_first)
    share = sum(length > cutoff for length in lengths.sample) / max(1, len(lengths.sample))
    if lengths.measured_all or counted < len(lengths.longest_first):
        return (f"{counted:,} of {lengths.rows:,} rows are" if counted != 1 else "1 row is"), counted / lengths.rows
    return f"about {share:.0%} of {lengths.rows:,} rows are", share


def _padding(lengths: Lengths, values: Mapping[str, Any]) -> str:
    """What batches of one would save, when it is worth saying."""
    batch = int(values.get("per_device_train_batch_size", 8))
    accumulation = int(values.get("gradient_accumulation_steps", 1))
    sample = lengths.sample
    if batch < 2 or len(sample) < batch or values.get("neat_packing"):
        return ""
    padded = sum(max(sample[start : start + batch]) * batch for start in range(0, len(sample) - batch + 1, batch))
    real = sum(sample[: len(sample) // batch * batch])
    wasted = 1 - real / padded
    if wasted < PADDING_WORTH_SAYING:
        return ""
    flags = f"per_device_train_batch_size=1 gradient_accumulation_steps={batch * accumulation}"
    return f"{wasted:.0%} of each batch is padding; {flags} learns the same without it."
