"""Measure the lengths of the rows in tokens, and check whether LLaMA Factory will truncate some of them.

LLaMA Factory silently truncates a row that is too long at the end of its *prompt*: the question and the beginning of
the answer's turn are lost, and the label stays. So the longest rows are measured first, and then a random sample, until
the time budget is spent.
"""

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from prmkit.dataset_info import Entry, read_entries, split_names
from prmkit.errors import DataError
from prmkit.files import read_json, read_jsonl
from prmkit.llamafactory_schema import setting
from prmkit.paths import REPORT
from prmkit.prompts.encoding import ChatEncoding
from prmkit.training.checks import Check, error, ok, warning

BUDGET_SECONDS = 4.0
SAMPLE = 400
FEW = 0.01
"""Up to this fraction of truncated rows, there is only a warning."""
MINIMUM_PADDING = 0.15
"""Padding is mentioned if it is at least this fraction of a batch."""


def check_rows(encoding: ChatEncoding | None, values: Mapping[str, Any]) -> tuple[Check, int | None]:
    """Check whether rows will be truncated; also return the longest row in tokens, if it could be measured."""
    if encoding is None:
        return warning("row lengths", "not measured (no tokenizer)", "Fix the model folder first."), None
    try:
        lengths = measure_lengths(encoding, values)
    except DataError as failure:
        return warning("row lengths", f"not measured: {failure}", "Fix the dataset first."), None
    return check_lengths(lengths, values), lengths.longest if lengths else None


@dataclass(frozen=True)
class Lengths:
    """Rows and their lengths in tokens, prompt and answer together."""

    rows: int
    longest_first: Sequence[int]
    """Lengths of the rows with the most bytes, in descending order of bytes."""
    sample: Sequence[int]
    """Lengths of rows drawn at random, in random order."""

    @property
    def longest(self) -> int:
        """Tokens of the longest measured row."""
        return max((*self.longest_first, *self.sample), default=0)

    @property
    def measured_all(self) -> bool:
        """Whether every row was measured."""
        return len(self.longest_first) >= self.rows


def measure_lengths(
    encoding: ChatEncoding, values: Mapping[str, Any], budget: float = BUDGET_SECONDS
) -> Lengths | None:
    """Measure the rows of `dataset` and `eval_dataset`; None for file types that are not read here.

    Args:
        encoding: the encoding of the model and the configured template.
        values: LLaMA Factory's keys.
        budget: seconds.
    """
    folder = Path(str(setting(values, "dataset_dir")))
    entries = read_entries(folder)
    names = [*split_names(values.get("dataset")), *split_names(values.get("eval_dataset"))]
    chosen = [entries[name] for name in names if name in entries]
    if not chosen or any(entry.file is None or entry.file.suffix != ".jsonl" for entry in chosen):
        return None
    if converted := _converted_lengths(encoding, folder / REPORT, chosen, values):
        sample = random.Random(0).sample(converted, min(SAMPLE, len(converted)))  # noqa: S311
        return Lengths(len(converted), sorted(converted, reverse=True), sample)
    rows = [row for entry in chosen for row in _row_offsets(entry)]
    sample_rows = random.Random(0).sample(rows, min(SAMPLE, len(rows)))  # noqa: S311
    lengths = _measure_in_time(encoding, sorted(rows, key=lambda row: -row.size), budget * 0.6)
    longest_first = list(lengths.values())
    if len(lengths) < len(rows):
        lengths |= _measure_in_time(encoding, [row for row in sample_rows if row not in lengths], budget * 0.4)
    return Lengths(len(rows), longest_first, [lengths[row] for row in sample_rows if row in lengths])


def _converted_lengths(
    encoding: ChatEncoding, report: Path, entries: Sequence[Entry], values: Mapping[str, Any]
) -> list[int]:
    """Return the lengths that the conversion measured, if it measured all rows with this tokenizer and template."""
    try:
        measured = read_json(report)["measured_with"]
        same = (
            measured["template"] == values.get("template")
            and measured["default_system"] == values.get("default_system")
            and measured["enable_thinking"] == setting(values, "enable_thinking")
            and measured["tokenizer_sha256"] == encoding.tokenizer_sha256
        )
        written = report.stat().st_mtime
        # The report is written last; a newer dataset was changed by something else.
        if not same or any(e.file is None or e.sidecar is None or e.file.stat().st_mtime > written for e in entries):
            return []
        return [int(row["tokens"]) for entry in entries if entry.sidecar for row in read_jsonl(entry.sidecar)]
    except (DataError, OSError, LookupError, TypeError, ValueError, AttributeError):
        return []


class _RowOffset(NamedTuple):
    file: Path
    offset: int
    size: int
    entry: Entry


def _row_offsets(entry: Entry) -> Iterator[_RowOffset]:
    offset, file = 0, entry.file or Path()
    with file.open("rb") as stream:
        for line in stream:
            if line.strip():
                yield _RowOffset(file, offset, len(line), entry)
            offset += len(line)


def _measure_in_time(encoding: ChatEncoding, rows: Sequence[_RowOffset], budget: float) -> dict[_RowOffset, int]:
    lengths: dict[_RowOffset, int] = {}
    end = time.monotonic() + budget
    for row in rows:
        if time.monotonic() > end:
            break
        with row.file.open("rb") as stream:
            stream.seek(row.offset)
            content = orjson.loads(stream.readline())
        try:
            system, prompt, answer = row.entry.read(content)
        except ValueError as failure:
            raise DataError(f"{row.file}: {failure}") from failure
        lengths[row] = sum(map(len, encoding.pair_ids(prompt, answer, system)))
    return lengths


def check_lengths(lengths: Lengths | None, values: Mapping[str, Any]) -> Check:
    """Report whether rows will be truncated, and which `cutoff_len` would be long enough."""
    if lengths is None:
        return warning(
            "row lengths", "not measured: the dataset is not a JSONL file", "Compare cutoff_len with your longest row."
        )
    if not lengths.rows:
        return error("row lengths", "the dataset has no rows", "Convert the data again: python convert_dataset.py")
    cutoff = int(setting(values, "cutoff_len")) - (1 if values.get("packing") or values.get("neat_packing") else 0)
    measured = "" if lengths.measured_all else f", {len(lengths.longest_first):,} longest measured"
    size = f"{lengths.rows:,} rows{measured}, the longest has {lengths.longest:,} tokens"
    if lengths.longest <= cutoff:
        return ok("row lengths", f"{size}; cutoff_len {cutoff:,} truncates no row", _padding(lengths, values))
    truncated, fraction = _truncated(lengths, cutoff)
    loss = "losing the question at the end of the prompt"
    found = f"{truncated} would be truncated at cutoff_len {cutoff:,}, {loss} ({size})"
    needed = -(-lengths.longest // 512) * 512
    advice = f"cutoff_len={needed}, or shorten these rows in the conversion: --too-long trim"
    return warning("row lengths", found, advice) if fraction <= FEW else error("row lengths", found, advice)


def _truncated(lengths: Lengths, cutoff: int) -> tuple[str, float]:
    """Return how many rows would be truncated, in words, and their fraction."""
    counted = sum(length > cutoff for length in lengths.longest_first)
    fraction = sum(length > cutoff for length in lengths.sample) / max(1, len(lengths.sample))
    if lengths.measured_all or counted < len(lengths.longest_first):
        return f"{counted:,} of {lengths.rows:,} rows" if counted != 1 else "1 row", counted / lengths.rows
    return f"about {fraction:.0%} of {lengths.rows:,} rows", fraction


def _padding(lengths: Lengths, values: Mapping[str, Any]) -> str:
    """Say how much padding batches of one row would save; empty if it is little."""
    batch = int(setting(values, "per_device_train_batch_size"))
    accumulation = int(setting(values, "gradient_accumulation_steps"))
    sample = lengths.sample
    if batch < 2 or len(sample) < batch or values.get("neat_packing"):
        return ""
    padded = sum(max(sample[start : start + batch]) * batch for start in range(0, len(sample) - batch + 1, batch))
    real = sum(sample[: len(sample) // batch * batch])
    wasted = 1 - real / padded
    if wasted < MINIMUM_PADDING:
        return ""
    flags = f"per_device_train_batch_size=1 gradient_accumulation_steps={batch * accumulation}"
    return f"{wasted:.0%} of each batch is padding; {flags} gives the same training without it."
