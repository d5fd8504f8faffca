"""Read the input files and prepare each row for training, or reject it with a reason.

Decisions made here depend on a single row; those that depend on other rows are made in `stage`.
"""

import hashlib
import io
import os
import re
import shlex
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple

import orjson

from prmkit.dataset.settings import Settings
from prmkit.errors import DataError
from prmkit.files import COMPRESSIONS, hash_content, open_input, open_stdin
from prmkit.layouts import ROW_SUFFIXES, STDIN, Line, Rejected, is_named, parse_line, read_lines
from prmkit.prompts.cleaning import count_leaked_scores, escape, mask_leaked_scores
from prmkit.prompts.step import load_rubric
from prmkit.rows import EXPECTED, WEIGHT, InputRow, is_weight, prompt_hash, read_row
from prmkit.trajectories.rows import labelled_rows
from prmkit.trajectory import holds_records
from prmkit.verdict import Answer, Scale, Shape, Unreadable, asked_shape, read_answer, render_verdict, score_answer
from prmkit.verdict.read import Percentage

_TEXT_SHOWN = 10_000
"""The maximum number of characters of a row that is not JSON to keep in rejected.jsonl."""
_LONGEST_REMEMBERED = 100_000
"""The maximum length of a cached prompt, in characters: rows of several judges on one prompt are usually adjacent."""
_VALUES_SHOWN, _LONGEST_VALUE = 8, 20  # in a message about a scale


# --- input files --------------------------------------------------------------------------------------------------


def find_inputs(settings: Settings) -> tuple[list[str], list[str]]:
    """Return the input files, with folders replaced by the row files in them; and the files skipped in folders.

    Raises:
        DataError: an input is missing or given twice, or a folder has no row files.
    """
    files: list[str] = []
    skipped: list[str] = []
    for name in settings.inputs:
        path = Path(name)
        if name == STDIN:
            files.append(name)
        elif path.is_dir():
            inside, others = _in_folder(path, settings.output)
            files += inside
            skipped += others
        elif path.exists():
            files.append(name)
        else:
            raise DataError(f"{name}: no such file. Pass your judged trajectories with --input.")
    if twice := sorted({name for name in files if files.count(name) > 1}):
        raise DataError(f"{twice[0]} is given twice, so every row would be in the data twice. Pass it once.")
    return files, skipped


def _in_folder(folder: Path, output: Path) -> tuple[list[str], list[str]]:
    row_files: list[str] = []
    others: list[str] = []
    for parent, folders, files in os.walk(folder):
        here = Path(parent)
        ignored = [name for name in folders if name.startswith(".") or (here / name).is_symlink()]
        others += [f"{here / name}/" for name in ignored]
        folders[:] = sorted(name for name in folders if name not in ignored and not _same(here / name, output))
        for name in sorted(files):
            path = here / name
            readable = is_named(path, ROW_SUFFIXES) and not name.startswith(".") and path.is_file()
            (row_files if readable else others).append(str(path))
    if not row_files:
        raise DataError(
            f"{folder} has no row files ({', '.join(ROW_SUFFIXES)}, also {', '.join(COMPRESSIONS)}). Check the path."
        )
    return row_files, others


def _same(one: Path, other: Path) -> bool:
    return other.exists() and one.exists() and one.samefile(other)


@dataclass
class InputFile:
    """An input file, and the hash and the size that are recorded while it is read."""

    name: str
    """The name as the user gave it."""
    sha256: str = ""
    bytes: int = 0
    """The number of hashed bytes, decompressed."""


@contextmanager
def open_source(name: str, rubric: Path | None = None) -> Iterator[tuple[InputFile, Iterator[Line]]]:
    """Read an input file row by row; afterwards, the source has the hash of the content.

    A file of runs yields one row per labelled step, numbered through the file.

    Args:
        name: the name of a file, or `-`.
        rubric: the rubric for the steps of runs; None is the default rubric.

    Raises:
        DataError: the file cannot be read, or changed while it was read; or it has runs without labelled steps.
        UsageError: the rubric cannot be used.
    """
    shown = "stdin" if name == STDIN else name.encode(errors="surrogateescape").decode(errors="backslashreplace")
    source = InputFile(shown)
    before = None if name == STDIN else _state(Path(name))
    if name != STDIN and Path(name).is_file() and holds_records(Path(name)):
        source.sha256, source.bytes = hash_content(Path(name))
        yield source, _lines_of_runs(Path(name), rubric)
    else:
        with open_stdin() if name == STDIN else open_input(Path(name)) as stream:
            hashed = _Hashing(stream)
            yield source, read_lines(io.BufferedReader(hashed, 1 << 18), shown)
            source.sha256, source.bytes = hashed.digest.hexdigest(), hashed.size
    if before is not None and before != _state(Path(name)):
        raise DataError(f"{shown} changed while it was read. Stop what writes to it, then convert again.")


def _lines_of_runs(path: Path, rubric: Path | None) -> Iterator[Line]:
    for number, row in enumerate(labelled_rows(path, load_rubric(rubric)), start=1):
        text = orjson.dumps(row)
        yield Line(number, text, len(text))


def _state(path: Path) -> tuple[int, ...]:
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}. Check the path.") from error
    regular = path.is_file()  # the size and time of a pipe are meaningless
    return (status.st_dev, status.st_ino, *((status.st_size, status.st_mtime_ns) if regular else ()))


class _Hashing(io.RawIOBase):
    """A stream that hashes and counts the bytes read from another stream."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self.digest, self.size = stream, hashlib.sha256(), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = self._stream.readinto1(buffer)  # type: ignore[attr-defined]
        self.digest.update(memoryview(buffer)[:size])
        self.size += size
        return int(size)


# --- rows ---------------------------------------------------------------------------------------------------------


class CleanPrompt(NamedTuple):
    """A prompt as it is trained on, before any trimming."""

    system: str | None
    text: str
    """The prompt with special tokens escaped, and with leaked scores masked if requested."""
    sha256: str
    """The hash of the prompt as the user wrote it, with its system prompt."""
    digest: str
    """The hash of the prompt with leaked scores masked if requested; it identifies the prompt."""
    markers: int
    leaked_scores: int
    asked: Shape | None
    """The shape of the verdict that the prompt asks for."""


class PreparedRow(NamedTuple):
    """A parsed row."""

    line: int
    row: InputRow
    wanted: bool
    """Whether the filters accept the row."""
    prompt: CleanPrompt
    label: str
    canonical: str
    scores: dict[str, float]
    repairs: tuple[str, ...]
    markers: int


class RejectedRow(NamedTuple):
    """A row that is not used."""

    line: int
    kind: str
    reason: str
    content: Any
    """The row, or its text if it is not JSON."""
    judge: str | None
    tokens: int = 0
    """The number of tokens of prompt and label, if measured."""


@dataclass
class ValuesOfKey:
    """Statistics of a judge's values of one key."""

    rows: int = 0
    """The number of answers with a number."""
    outside: int = 0
    """The number of answers with a number outside of the judge's scale."""
    fractions: int = 0
    """The number of answers strictly between 0 and 1: a judge on another scale gives no such answers."""
    low: float = float("inf")
    high: float = float("-inf")
    numbers: list[str] = field(default_factory=list)
    """Examples of the numbers outside of the scale."""
    words: int = 0
    """The number of answers with a word that the scale does not map."""
    unknown: list[str] = field(default_factory=list)
    """Examples of these words."""


class Preparer:
    """Prepares rows one by one, and collects the statistics for later decisions about the complete input."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.lines = 0
        """The number of rows in the input, also in unknown formats."""
        self.accepted = 0
        """The number of rows in a known format that the filters accept."""
        self.values: dict[tuple[str | None, str], ValuesOfKey] = defaultdict(ValuesOfKey)
        """(judge, key) -> statistics of the values; only for rows that the filters accept."""
        self.rubrics: set[str] = set()
        """Hashes of the rubrics for steps of raw runs; only for rows that the filters accept."""

    def prepare(self, line: Line) -> PreparedRow | RejectedRow | None:
        """Prepare the row of a line; None for an unusable row that the filters exclude."""
        self.lines += 1
        content: Any = None
        row: InputRow | None = None
        try:
            content = parse_line(line)
            row = read_row(content, line)
            return self._prepare(line, row)
        except Rejected as rejected:
            if row is not None and not self._settings.filters.accept(row):
                return None
            shown = line.text.decode(errors="replace")[:_TEXT_SHOWN] if content is None else content
            judge = None if row is None else row.judge
            return RejectedRow(line.number, rejected.kind, rejected.reason, shown, judge)

    def _prepare(self, line: Line, row: InputRow) -> PreparedRow:
        wanted = self._settings.filters.accept(row)
        self.accepted += wanted
        if wanted and isinstance(rubric := row.metadata.get("rubric"), str):
            self.rubrics.add(rubric)
        if row.answer is None:
            raise Rejected(f"no judge answer; expected {EXPECTED}", "no judge answer")
        if not is_weight(weight := row.metadata.get(WEIGHT, 1.0)):
            raise Rejected(
                f"metadata.{WEIGHT} is {str(weight)[:20]!r}; it must be a number above 0", f"damaged {WEIGHT}"
            )
        if _BARE_DATE.fullmatch(row.prompt):
            raise Rejected("the prompt is a bare date, which would be read as a timestamp", "the prompt is a bare date")
        prompt = _cleaned(row.prompt, row.system, self._settings.mask_leaked_scores)
        answer = read_answer(row.answer, prompt.asked)
        if isinstance(answer, Unreadable):
            raise Rejected(answer.reason, answer.kind)
        scale = self._settings.scale_of(row.judge)
        if wanted:
            self._count(row.judge, answer, scale)
        verdict = score_answer(answer, scale)
        if isinstance(verdict, Unreadable):
            raise Rejected(verdict.reason, verdict.kind)
        if _repeats_example(verdict.texts.get("summary"), row.prompt):
            raise Rejected("copies the example in the prompt's schema")
        canonical = render_verdict(verdict)
        label, markers = escape(canonical if self._settings.labels == "canonical" else row.answer, answer=True)
        return PreparedRow(
            line.number, row, wanted, prompt, label, canonical, dict(verdict.scores), verdict.repairs, markers
        )

    def _count(self, judge: str | None, answer: Answer, scale: Scale | None) -> None:
        scale = scale or Scale()
        for key, value in answer.values.items():
            counted = self.values[judge, key]
            if isinstance(value, bool | str):
                known, examples = str(value).lower() in scale.words, counted.unknown
                counted.words += not known
            elif isinstance(value, Percentage) and scale != Scale(words=scale.words):
                continue  # it says nothing about the judge's scale
            else:
                known, examples = scale.low <= value <= scale.high, counted.numbers
                counted.rows += 1
                counted.outside += not known
                counted.fractions += 0 < value < 1
                counted.low, counted.high = min(counted.low, value), max(counted.high, value)
            if not known and len(examples) < _VALUES_SHOWN and (shown := str(value)[:_LONGEST_VALUE]) not in examples:
                examples.append(shown)


# If every string of a column is a bare date, Arrow reads timestamps, and LLaMA Factory then drops every row.
_BARE_DATE = re.compile(r"\s*\d{4}-\d{2}-\d{2}(?:[ T]\d{2}(?::?\d{2}){0,2}(?:\.\d+)?(?:Z|[+-]\d{2}:?\d{2})?)?\s*")


def _cleaned(prompt: str, system: str | None, mask: bool) -> CleanPrompt:
    return (_clean_remembered if len(prompt) <= _LONGEST_REMEMBERED else _clean)(prompt, system, mask)


def _clean(prompt: str, system: str | None, mask: bool) -> CleanPrompt:
    sha256 = digest = prompt_hash(prompt, system)
    masked, leaked_scores = mask_leaked_scores(prompt) if mask else (prompt, count_leaked_scores(prompt))
    if masked != prompt:
        digest = prompt_hash(masked, system)
    text, markers = escape(masked)
    if system:
        system, more = escape(system)
        markers += more
    return CleanPrompt(system, text, sha256, digest, markers, leaked_scores, asked_shape(prompt, system))


# The rows of several judges on one prompt usually follow each other.
_clean_remembered = lru_cache(maxsize=8)(_clean)


def _repeats_example(summary: Any, prompt: str) -> bool:
    """Whether the summary is the example text of the prompt's output schema."""
    if not isinstance(summary, str) or not summary:
        return False
    schema = prompt[prompt.rfind('"summary"') :]
    return schema.startswith('"summary"') and f'"{summary}"' in schema[: len(summary) + 100]


class ScaleProblem(NamedTuple):
    """A judge whose values of a key are outside of its scale, or are words without a score."""

    judge: str | None
    key: str
    is_scale: bool
    """True: numbers on another scale, so none of them is a score. False: words, so only their rows are rejected."""
    message: str


def find_scale_problems(
    values: Mapping[tuple[str | None, str], ValuesOfKey], settings: Settings
) -> Iterator[ScaleProblem]:
    """Find judges and keys with values outside of the judge's scale in more than a few rows, each with what to do.

    A judge on a scale of 1 to 10 gives 2 to 10, which are out of range, and 1, which is not: its worst score would
    become the best label. So none of its rows is used until its scale is set. A judge is on another scale if many of
    its values are out of range, or a single one if it never gives a fraction, for this key or another one.
    """
    beyond = {
        judge for (judge, _), stats in values.items() if _are_many(stats) or (stats.outside and not stats.fractions)
    }
    for (judge, key), stats in values.items():
        name, scale = judge or "a judge without a name", settings.scale_of(judge)
        only_integers = stats.rows and not stats.fractions
        if _are_many(stats) or (scale is None and judge in beyond and only_integers):
            scale = scale or Scale()
            of_judge = [each for (name_of, _), each in values.items() if name_of == judge and each.rows]
            flag = f"--scale {shlex.quote(f'{judge}=')}" if judge else "--scale "
            why = (
                f"(for example {', '.join(stats.numbers)}); {stats.outside:,} of {stats.rows:,} rows are outside of "
                f"{scale.low:g} to {scale.high:g}"
                if stats.outside
                else "in integers, and another of its keys has numbers out of range"
            )
            yield ScaleProblem(judge, key, True, (
                f"{key} of {name} ranges from {stats.low:g} to {stats.high:g} {why}, so all its rows with {key} are "
                f"rejected. Set its scale, for example {flag}{_guess(of_judge, between=':' if judge else ' ')}"
            ))  # fmt: skip
        elif scale and scale.high >= _RARELY_BELOW_1 and stats.high <= 1 and stats.fractions >= _FEWEST_OUTSIDE:
            own = shlex.quote(f"{judge}=0:1") if judge else "JUDGE=0:1, and its name to the rows"
            yield ScaleProblem(judge, key, True, (
                f"{key} of {name} ranges from {stats.low:g} to {stats.high:g}, but --scale says {scale.low:g} to "
                f"{scale.high:g}, so all its rows with {key} are rejected. If it scores from 0 to 1, add --scale {own}"
            ))  # fmt: skip
        elif stats.words >= _FEWEST_OUTSIDE:
            words = ", ".join(stats.unknown)
            yield ScaleProblem(judge, key, False, (
                f"{key} of {name} is a word ({words}) in {stats.words:,} rows, which are rejected. "
                f"Map the words to scores, for example --map {_words(stats.unknown)}"
            ))  # fmt: skip


def _are_many(stats: ValuesOfKey) -> bool:
    return stats.outside >= _FEWEST_OUTSIDE and stats.outside >= _SHARE_OUTSIDE * stats.rows


# With fewer rows outside of the scale, or a smaller fraction, only these rows are rejected.
_FEWEST_OUTSIDE, _SHARE_OUTSIDE = 3, 0.02
_RARELY_BELOW_1 = 5.0
"""A judge on a scale that ends here or above does not give several fractions below 1 and nothing above 1."""


def _guess(of_judge: Sequence[ValuesOfKey], *, between: str) -> str:
    low, highest = min(stats.low for stats in of_judge), max(stats.high for stats in of_judge)
    low = 1 if low >= 1 else min(low, 0)
    high = next((str(end) for end in (1, 5, 10, 100) if highest <= end), "HIGHEST")
    return f"{low:g}{between}{high}"


_GOOD = {"pass", "passed", "true", "yes", "good", "correct", "success"}


def _words(examples: Sequence[str]) -> str:
    words = [word.lower() for word in examples if len(word) < _LONGEST_VALUE] or ["pass", "fail"]
    return " ".join(shlex.quote(f"{word}={int(word in _GOOD)}") for word in words)


def rejected_entry(source: str, line: int, reason: str, content: Any) -> bytes:
    """Return one line of rejected.jsonl."""
    entry = {"source": source, "line": line, "reason": reason, "row": content}
    try:
        return orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE)
    except orjson.JSONEncodeError:  # nested too deeply for orjson
        return orjson.dumps({**entry, "row": repr(content)[:_TEXT_SHOWN]}, option=orjson.OPT_APPEND_NEWLINE)


def row_id(prompt_sha256: str, judge: str | None, label: str) -> str:
    """Return the id of a row, which is the same in every conversion, format and split."""
    return hashlib.blake2b(f"{prompt_sha256}\n{judge}\n{label}".encode(), digest_size=8).hexdigest()
