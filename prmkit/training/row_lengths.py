"""The lengths of the rows in tokens, and whether LLaMA Factory will cut some of them.

LLaMA Factory cuts a row that is too long at the end of its *prompt*, silently: the question and the beginning of the
answer's turn are lost, the label stays. So the longest rows are measured first, and a random sample after them, until
the time is up.
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
"""Up to this share of cut rows only a warning is given."""
PADDING_WORTH_SAYING = 0.15


def check_rows(encoding: ChatEncoding | None, values: Mapping[str, Any]) -> tuple[Check, int | None]:
    """Check whether rows are cut; also return the longest row in tokens, if it could be measured."""
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
    """Lengths of the rows with the most bytes, which come first."""
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
    """Measure the rows of `dataset` and `eval_dataset`; None for kinds of files that are not read here.

    Args:
        encoding: of the model and the configured template.
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
    places = [place for entry in chosen for place in _places(entry)]
    drawn = random.Random(0).sample(places, min(SAMPLE, len(places)))  # noqa: S311
    lengths = _in_time(encoding, sorted(places, key=lambda place: -place.size), budget * 0.6)
    longest_first = list(lengths.values())
    if len(lengths) < len(places):
        lengths |= _in_time(encoding, [place for place in drawn if place not in lengths], budget * 0.4)
    return Lengths(len(places), longest_first, [lengths[place] for place in drawn if place in lengths])


def _converted_lengths(
    encoding: ChatEncoding, report: Path, entries: Sequence[Entry], values: Mapping[str, Any]
) -> list[int]:
    """The lengths that the conversion measured, if it measured all rows with this tokenizer and template."""
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
            row = orjson.loads(stream.readline())
        try:
            system, prompt, answer = place.entry.read(row)
        except ValueError as failure:
            raise DataError(f"{place.file}: {failure}") from failure
        lengths[place] = sum(map(len, encoding.pair_ids(prompt, answer, system)))
    return lengths


def check_lengths(lengths: Lengths | None, values: Mapping[str, Any]) -> Check:
    """Report whether rows are cut, and which `cutoff_len` would be long enough."""
    if lengths is None:
        return warning(
            "row lengths", "not measured: the dataset is not a JSONL file", "Compare cutoff_len with your longest row."
        )
    if not lengths.rows:
        return error("row lengths", "the dataset has no rows", "Convert the data again: python convert_dataset.py")
    cutoff = int(setting(values, "cutoff_len")) - (1 if values.get("packing") or values.get("neat_packing") else 0)
    measured = "" if lengths.measured_all else f", {len(lengths.longest_first):,} longest measured"
    size = f"{lengths.rows:,} rows{measured}, the longest of {lengths.longest:,} tokens"
    if lengths.longest <= cutoff:
        return ok("row lengths", f"{size}; cutoff_len {cutoff:,} cuts none", _padding(lengths, values))
    cut, share = _cut(lengths, cutoff)
    found = f"{cut} cut at cutoff_len {cutoff:,}, at the end of the prompt, where the question is ({size})"
    needed = -(-lengths.longest // 512) * 512
    advice = f"cutoff_len={needed}, or shorten them in the conversion: --too-long trim"
    return warning("row lengths", found, advice) if share <= FEW else error("row lengths", found, advice)


def _cut(lengths: Lengths, cutoff: int) -> tuple[str, float]:
    """How many rows are cut, in words, and their share."""
    counted = sum(length > cutoff for length in lengths.longest_first)
    share = sum(length > cutoff for length in lengths.sample) / max(1, len(lengths.sample))
    if lengths.measured_all or counted < len(lengths.longest_first):
        return (f"{counted:,} of {lengths.rows:,} rows are" if counted != 1 else "1 row is"), counted / lengths.rows
    return f"about {share:.0%} of {lengths.rows:,} rows are", share


def _padding(lengths: Lengths, values: Mapping[str, Any]) -> str:
    """What batches of one row would save, if it is worth mentioning."""
    batch = int(setting(values, "per_device_train_batch_size"))
    accumulation = int(setting(values, "gradient_accumulation_steps"))
    sample = lengths.sample
    if batch < 2 or len(sample) < batch or values.get("neat_packing"):
        return ""
    padded = sum(max(sample[start : start + batch]) * batch for start in range(0, len(sample) - batch + 1, batch))
    real = sum(sample[: len(sample) // batch * batch])
    wasted = 1 - real / padded
    if wasted < PADDING_WORTH_SAYING:
        return ""
    flags = f"per_device_train_batch_size=1 gradient_accumulation_steps={batch * accumulation}"
    return f"{wasted:.0%} of each batch is padding; {flags} trains the same without it."
