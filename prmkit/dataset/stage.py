"""What stands between reading and writing: every row in its final form, and what must be known to place it.

Rows cannot be placed while they are read: whether a prompt also stands on the held-out side, whether two values share
a name, whether a judge repeats itself is known only at the end. So each worker writes what it prepared into files of
its own, in the order of its blocks, and the rest of the conversion reads those. Memory stays constant; the disk
holds the input once more for the time of the conversion.

    rows-N, sidecars-N    the lines of the training file and of its sidecar, one after another
    rejected-N            the lines of rejected.jsonl
    facts-N               one JSON line a block: the length and the facts of every row in it
    index-X               one JSON line a row, by the first digits of its prompt's digest: what duplicates, sides and
                          agreement are found by, 100 bytes or so a row
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple

import orjson

from prmkit.dataset.appending import Appender

ROWS_A_BLOCK = 1 << 32
UNWANTED = -1
"""The number of a prompt that is held out, but with a row that the filters do not want."""
_INDEX_HELD = 256 << 10
"""Bytes. Small things that outlive the large ones around them break the heap up: with 4 MiB it grew to three times."""


class Group(NamedTuple):
    """What a row is placed by."""

    evaluation_type: str | None
    judge: str | None
    task: str | None
    held_out: bool


class Facts(NamedTuple):
    """What is known of a row besides its text."""

    row_size: int
    sidecar_size: int
    line: int
    group: int
    """Its number among the worker's groups."""
    scores: Mapping[str, int]
    """In hundredths."""
    prompt_characters: int
    label_characters: int
    tokens: int
    """Of prompt and label before trimming; 0 without a length guard."""
    tokens_left_out: int
    characters_left_out: int
    markers: int
    """Control markers that were neutralised in prompt and label."""
    leaked_scores: int
    repairs: list[str]


class Indexed(NamedTuple):
    """A row as the search for duplicates, leaks and agreement sees it."""

    prompt: str
    """Hexadecimal digest."""
    number: int
    """Block times 2**32 plus the row's place in its block: the order of the input. `UNWANTED`: there is no row."""
    judge: str | None
    evaluation_type: str | None
    held_out: bool
    verdict: str
    """Hexadecimal digest."""
    scores: dict[str, int]
    """In hundredths."""


class StageWriter:
    """Writes one worker's files. Use as a context manager."""

    def __init__(self, folder: Path, worker: int, index_digits: int) -> None:
        self._folder, self._worker, self._digits = folder, worker, index_digits
        self._rows: list[tuple[object, ...]] = []
        self._rejected: list[tuple[int, int, str, int]] = []

    def add_row(self, row: bytes, sidecar: bytes, facts: Facts, indexed: Indexed) -> None:
        """Add a row of the current block."""
        self._row_file.write(row)
        self._sidecar_file.write(sidecar)
        # orjson takes tuples, and refuses named ones.
        self._rows.append(tuple(facts))
        self._add_to_index(indexed)

    def note_held_out(self, prompt: str) -> None:
        """Note that a held-out row asks this prompt, though the row itself is not wanted."""
        self._add_to_index(Indexed(prompt, UNWANTED, None, None, True, "", {}))

    def _add_to_index(self, indexed: Indexed) -> None:
        entry = orjson.dumps(tuple(indexed), option=orjson.OPT_APPEND_NEWLINE)
        self._index.append(f"index-{self._worker}-{indexed.prompt[: self._digits]}", entry)

    @property
    def rows_in_block(self) -> int:
        """How many rows the current block has so far."""
        return len(self._rows)

    def add_rejected(self, line_number: int, entry: bytes, kind: str, tokens: int) -> None:
        """Add a row of the current block that is set aside."""
        self._rejected_file.write(entry)
        self._rejected.append((line_number, len(entry), kind, tokens))

    def end_block(self) -> None:
        """Close the current block."""
        facts = {"rows": self._rows, "rejected": self._rejected}
        self._facts_file.write(orjson.dumps(facts, option=orjson.OPT_APPEND_NEWLINE))
        self._rows, self._rejected = [], []

    def __enter__(self) -> "StageWriter":
        with ExitStack() as stack:
            self._row_file = stack.enter_context((self._folder / f"rows-{self._worker}").open("wb"))
            self._sidecar_file = stack.enter_context((self._folder / f"sidecars-{self._worker}").open("wb"))
            self._rejected_file = stack.enter_context((self._folder / f"rejected-{self._worker}").open("wb"))
            self._facts_file = stack.enter_context((self._folder / f"facts-{self._worker}").open("wb"))
            self._index = stack.enter_context(Appender(self._folder, _INDEX_HELD))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)


@dataclass(frozen=True)
class StagedBlock:
    """One block as it was prepared, with the bytes of its rows."""

    number: int
    worker: int
    rows: list[tuple[Facts, memoryview, memoryview]]
    """Facts, training row and sidecar row."""
    rejected: list[tuple[int, bytes, str, int]]
    """Line number, entry of rejected.jsonl, kind of reason, and tokens where they were measured."""


def read_stage(folder: Path, workers: int, blocks: int) -> Iterator[StagedBlock]:
    """The blocks in the order of the input; block N was prepared by worker N modulo `workers`."""
    with ExitStack() as stack:
        rows, sidecars, rejected, facts = (
            [stack.enter_context((folder / f"{name}-{worker}").open("rb")) for worker in range(workers)]
            for name in ("rows", "sidecars", "rejected", "facts")
        )
        for number in range(blocks):
            worker = number % workers
            block = orjson.loads(facts[worker].readline())
            of_rows = list(map(Facts._make, block["rows"]))
            yield StagedBlock(
                number,
                worker,
                list(
                    zip(
                        of_rows,
                        _read_pieces(rows[worker], [fact.row_size for fact in of_rows]),
                        _read_pieces(sidecars[worker], [fact.sidecar_size for fact in of_rows]),
                        strict=True,
                    )
                ),
                [(line, rejected[worker].read(size), kind, tokens) for line, size, kind, tokens in block["rejected"]],
            )


def _read_pieces(stream: BinaryIO, sizes: Sequence[int]) -> Iterator[memoryview]:
    """Pieces that stand one behind the other, from one read and without a copy each."""
    pieces = memoryview(stream.read(sum(sizes)))
    end = 0
    for size in sizes:
        start, end = end, end + size
        yield pieces[start:end]


def index_parts(folder: Path) -> list[list[Path]]:
    """The files of the index, those together that hold the same prompts."""
    parts: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("index-*")):
        parts.setdefault(path.name.split("-")[2], []).append(path)
    return list(parts.values())


def read_index(paths: list[Path]) -> Iterator[Indexed]:
    """The entries of one part of the index."""
    for path in paths:
        with path.open("rb") as lines:
            for line in lines:
                yield Indexed._make(orjson.loads(line))
