"""From a line of the input to the row that is trained on, or the reason why it is set aside.

What happens here depends on the line alone; what depends on other lines happens in `resolve` and `write`.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from prmkit.dataset.formats import training_row
from prmkit.dataset.lengths import LengthGuard, Measured
from prmkit.dataset.processes import Advance
from prmkit.dataset.record import LONGEST_LINE, Record, Rejected, parse_line, read_record
from prmkit.dataset.settings import Settings
from prmkit.dataset.sources import Block, Source, lines_of
from prmkit.dataset.stage import ROWS_A_BLOCK, Facts, Group, Indexed, StageWriter
from prmkit.errors import DataError
from prmkit.prompts.leaked_scores import count_leaked_scores, mask_leaked_scores
from prmkit.prompts.special_tokens import neutralise
from prmkit.verdict import Shape, Unreadable, Verdict, asked_shape, read_verdict, render_verdict

_TEXT_SHOWN = 10_000
"""Characters of a line that is no JSON, in rejected.jsonl."""
_LONGEST_REMEMBERED = 100_000
"""Characters of a prompt that is remembered for the next judge's row."""


@dataclass
class Prepared:
    """What a worker tells of the blocks that it prepared."""

    groups: list[Group] = field(default_factory=list)
    """By the number that stands in the facts of the rows."""
    lines: int = 0
    """All but the blank ones."""
    admitted: int = 0
    """Rows whose form is known and that the filters want."""
    rows_by_side: Counter[bool] = field(default_factory=Counter)
    """By held-out; of all rows whose form is known, wanted or not."""
    types: Counter[str] = field(default_factory=Counter)
    judges: Counter[str] = field(default_factory=Counter)
    tasks: Counter[str] = field(default_factory=Counter)
    """Rows by value, of all rows whose form is known; counted only where there are filters."""


class _Read(NamedTuple):
    """A row whose form is known."""

    line_number: int
    row: Any
    """As it is shown where it is set aside."""
    record: Record


class _Admitted(NamedTuple):
    """A row that the filters want."""

    read: _Read
    prompt: "_CleanPrompt"
    held_out: bool


class _Judged(NamedTuple):
    """A row whose verdict is known."""

    admitted: _Admitted
    verdict: Verdict
    canonical: str


class Preparer:
    """One worker's rows on their way from lines to the stage."""

    def __init__(self, settings: Settings, guard: LengthGuard | None, writer: StageWriter) -> None:
        self._settings = settings
        self._guard = guard
        self._writer = writer
        self._groups: dict[Group, int] = {}
        self.told = Prepared()

    def prepare_block(self, number: int, block: Block, source: Source) -> None:
        """Stage the rows of a block, and those that are set aside.

        Goes step by step over the whole block: the code and the tables of one step stay in the processor's cache.
        benchmarks/RESULTS.md says what that saves; more steps gained nothing.
        """
        lines = lines_of(block, source)
        read = [row for line_number, line in lines if (row := self._read(source, block, line_number, line))]
        admitted = [wanted for row in read if (wanted := self._admit(row))]
        verdicts = [read_verdict(wanted.read.record.answer, wanted.prompt.asked) for wanted in admitted]
        pairs = zip(admitted, verdicts, strict=True)
        judged = [known for wanted, verdict in pairs if (known := self._judge(source, wanted, verdict))]
        for known in judged:
            self._stage(number, source, known)
        self._writer.end_block()
        self.told.groups = list(self._groups)

    def _read(self, source: Source, block: Block, line_number: int, line: bytes) -> _Read | None:
        self.told.lines += 1
        row: Any = None
        try:
            if block.too_long:
                raise Rejected(f"line of {block.size:,} bytes, at most {LONGEST_LINE:,} are read", "line too long")
            row = parse_line(line)
            return _Read(line_number, row, read_record(line, row))
        except Rejected as rejected:
            shown = line.decode(errors="replace")[:_TEXT_SHOWN] if row is None else row
            self._set_aside(source, line_number, shown, rejected)
            return None

    def _set_aside(self, source: Source, line_number: int, row: Any, rejected: Rejected) -> None:
        entry = rejected_entry(source.name, line_number, rejected.reason, row)
        self._writer.add_rejected(line_number, entry, rejected.kind, rejected.tokens)

    def _admit(self, read: _Read) -> _Admitted | None:
        record = read.record
        prompt = _cleaned(record.prompt, self._settings.mask_leaked_scores)
        held_out = self._settings.split.holds_out(record.task, prompt.digest)
        self.told.rows_by_side[held_out] += 1
        if self._settings.filters:
            self._count(record)
            if not self._settings.filters.admit(record):
                if held_out:
                    self._writer.note_held_out(prompt.digest)
                return None
        self.told.admitted += 1
        return _Admitted(read, prompt, held_out)

    def _judge(self, source: Source, admitted: _Admitted, verdict: Verdict | Unreadable) -> _Judged | None:
        read = admitted.read
        if isinstance(verdict, Unreadable):
            self._set_aside(source, read.line_number, read.row, Rejected(verdict.reason, verdict.kind))
            return None
        if _repeats_example(verdict, read.record.prompt):
            self._set_aside(source, read.line_number, read.row, Rejected("repeats the prompt's example"))
            return None
        return _Judged(admitted, verdict, render_verdict(verdict))

    def _stage(self, block: int, source: Source, judged: _Judged) -> None:
        (read, prompt, held_out), verdict, canonical = judged
        record = read.record
        label, markers = neutralise(canonical if self._settings.labels == "canonical" else record.answer, answer=True)
        measured = self._measure(source, read, prompt.text, label)
        if measured is None:
            return
        row = training_row(measured.prompt, label, self._settings.form)
        sidecar = {
            "id": row_id(prompt.sha256, record.judge, label),
            "source": source.name,
            "line": read.line_number,
            "prompt_sha256": prompt.sha256,
            "repairs": verdict.repairs,
            "scores": verdict.scores,
            "metadata": record.metadata,
        }
        sidecar_line = orjson.dumps(sidecar, option=orjson.OPT_APPEND_NEWLINE)
        group = Group(record.evaluation_type, record.judge, record.task, held_out)
        scores = {key: round(score * 100) for key, score in verdict.scores.items()}
        facts = Facts(
            row_size=len(row),
            sidecar_size=len(sidecar_line),
            line=read.line_number,
            group=self._groups.setdefault(group, len(self._groups)),
            scores=scores,
            prompt_characters=len(record.prompt),
            label_characters=len(label),
            tokens=measured.tokens,
            tokens_left_out=measured.tokens_left_out,
            characters_left_out=measured.characters_left_out,
            markers=prompt.markers + markers,
            leaked_scores=prompt.leaked_scores,
            repairs=list(verdict.repairs),
        )
        place = block * ROWS_A_BLOCK + self._writer.rows_in_block
        digest = hashlib.blake2b(canonical.encode(), digest_size=8).hexdigest()
        indexed = Indexed(prompt.digest, place, record.judge, record.evaluation_type, held_out, digest, scores)
        self._writer.add_row(row, sidecar_line, facts, indexed)

    def _measure(self, source: Source, read: _Read, prompt: str, label: str) -> Measured | None:
        if self._guard is None:
            return Measured(prompt, 0, 0, 0)
        try:
            return self._guard.fit(prompt, label)
        except Rejected as rejected:
            self._set_aside(source, read.line_number, read.row, rejected)
            return None
        except DataError as error:
            raise DataError(f"{source.name}:{read.line_number}: {error}") from error

    def _count(self, record: Record) -> None:
        for counter, value in (
            (self.told.types, record.evaluation_type),
            (self.told.judges, record.judge),
            (self.told.tasks, record.task),
        ):
            if value is not None:
                counter[value] += 1


def prepare_share(
    blocks: Iterable[tuple[int, Block]],
    sources: Sequence[Source],
    settings: Settings,
    guard: LengthGuard | None,
    stage: Path,
    worker: int,
    index_digits: int,
    advance: Advance,
) -> Prepared:
    """Prepare a worker's share of the numbered blocks, and stage it.

    Raises:
        DataError: the length guard is to refuse rows that are too long, and one is.
    """
    with StageWriter(stage, worker, index_digits) as writer:
        preparer = Preparer(settings, guard, writer)
        for number, block in blocks:
            preparer.prepare_block(number, block, sources[block.source])
            advance(block.size)
    return preparer.told


class _CleanPrompt(NamedTuple):
    text: str
    """Neutralised, and masked where that is wanted."""
    sha256: str
    """Of the prompt as the user wrote it."""
    digest: str
    """What prompts are told apart by: of the prompt as it is trained on, before trimming."""
    markers: int
    leaked_scores: int
    asked: Shape | None
    """What the judge was asked for."""


def _cleaned(prompt: str, mask: bool) -> _CleanPrompt:
    return (_clean_remembered if len(prompt) <= _LONGEST_REMEMBERED else _clean)(prompt, mask)


def _clean(prompt: str, mask: bool) -> _CleanPrompt:
    sha256 = hashlib.sha256(prompt.encode()).hexdigest()
    digest = sha256
    if mask:
        prompt, leaked_scores = mask_leaked_scores(prompt)
        digest = hashlib.sha256(prompt.encode()).hexdigest() if leaked_scores else sha256
    else:
        leaked_scores = count_leaked_scores(prompt)
    text, markers = neutralise(prompt)
    return _CleanPrompt(text, sha256, digest[:16], markers, leaked_scores, asked_shape(prompt))


# The rows of several judges on one prompt mostly stand together.
_clean_remembered = lru_cache(maxsize=8)(_clean)


def _repeats_example(verdict: Verdict, prompt: str) -> bool:
    """Whether the summary is the example text of the prompt's output schema."""
    summary = verdict.texts.get("summary")
    if not isinstance(summary, str) or not summary:
        return False
    schema = prompt[prompt.rfind('"summary"') :]
    return schema.startswith('"summary"') and f'"{summary}"' in schema[: len(summary) + 100]


def row_id(prompt_sha256: str, judge: str | None, label: str) -> str:
    """What a row is called: the same in every conversion, format and split."""
    return hashlib.blake2b(f"{prompt_sha256}\n{judge}\n{label}".encode(), digest_size=8).hexdigest()


def rejected_entry(source: str, line_number: int, reason: str, row: Any) -> bytes:
    """One line of rejected.jsonl."""
    entry = {"source": source, "line": line_number, "reason": reason, "row": row}
    return orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE)
