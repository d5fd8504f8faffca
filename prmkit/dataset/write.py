"""From the stage to the files of the variants: every row goes into each of its variants, in the input's order.

A row is serialised once, when it is prepared; here its bytes are only appended.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from prmkit.dataset.appending import Appender
from prmkit.dataset.formats import Format, prompt_and_label, training_row
from prmkit.dataset.lengths import LengthGuard
from prmkit.dataset.prepare import rejected_entry, row_id
from prmkit.dataset.processes import Advance
from prmkit.dataset.record import Rejected
from prmkit.dataset.report import Tally
from prmkit.dataset.resolve import DUPLICATE, Decision, read_decisions
from prmkit.dataset.stage import ROWS_A_BLOCK, Facts, Group, StagedBlock, read_stage
from prmkit.dataset.variants import held_out_name
from prmkit.paths import SIDECAR_SUFFIX
from prmkit.prompts.special_tokens import neutralise, restore
from prmkit.verdict import Unreadable, Verdict, asked_shape, read_verdict, render_verdict

log = logging.getLogger(__name__)

REJECTED = "rejected.jsonl"
_HELD = 4 << 20
"""Bytes: about a block. More took no less time, and memory."""
_VARIANTS_A_ROW = 2
"""In one call of `write_variants`."""


def data_file(variant: str) -> str:
    """The training file of a variant."""
    return f"{variant}.jsonl"


def sidecar_file(variant: str) -> str:
    """The file that traces the rows of a variant back to the input."""
    return variant + SIDECAR_SUFFIX


class StagedRow(NamedTuple):
    """A row together with what was decided on it."""

    group: Group
    facts: Facts
    row: memoryview
    sidecar: memoryview
    decision: Decision

    @property
    def stays(self) -> bool:
        """Whether the row is not set aside."""
        return not self.decision.set_aside


_NOTHING_DECIDED = Decision(-1, "", "", None, 0)


@dataclass(frozen=True)
class Staged:
    """Everything that was prepared and decided."""

    folder: Path
    groups: Sequence[Sequence[Group]]
    """By worker and number."""
    blocks: int

    def read(self) -> Iterator[tuple[StagedBlock, list[StagedRow]]]:
        """The blocks and their rows, in the order of the input."""
        decisions = read_decisions(self.folder)
        decision = next(decisions, None)
        for block in read_stage(self.folder, len(self.groups), self.blocks):
            rows = []
            for number, (facts, row, sidecar) in enumerate(block.rows, start=block.number * ROWS_A_BLOCK):
                decided = _NOTHING_DECIDED
                if decision is not None and decision.number == number:
                    decided, decision = decision, next(decisions, None)
                rows.append(StagedRow(self.groups[block.worker][facts.group], facts, row, sidecar, decided))
            yield block, rows


Watch = Callable[[Appender, StagedBlock, Sequence[StagedRow]], None]
"""Looks at each block that is written, and may append rows of its own."""


def write_variants(
    staged: Staged, placement: Mapping[Group, Sequence[str]], output: Path, watch: Watch | None, advance: Advance
) -> dict[str, int]:
    """Append every row that stays to the variants of its group.

    Args:
        staged: the rows.
        placement: the variants by group; each one's held-out side is found from the group.
        output: the folder of the files.
        watch: is shown every block.
        advance: told of the bytes.

    Returns:
        How many rows each dataset has, by name.
    """
    with Appender(output, _HELD) as appender:
        targets = {
            group: [
                (appender.collected(data_file(name)), appender.collected(sidecar_file(name)))
                for name in _sided(variants, group)
            ]
            for group, variants in placement.items()
        }
        for block, rows in staged.read():
            size = 0
            for group, facts, row, sidecar, decision in rows:
                if not decision.set_aside:
                    for data, sidecars in targets[group]:
                        data.append(row)
                        sidecars.append(sidecar)
                size += facts.row_size
            appender.count(size * _VARIANTS_A_ROW)
            if watch:
                watch(appender, block, rows)
            advance(size)
    return {
        name.removesuffix(".jsonl"): lines
        for name, lines in appender.lines.items()
        if not name.endswith(SIDECAR_SUFFIX)
    }


def _sided(variants: Sequence[str], group: Group) -> list[str]:
    return [held_out_name(variant) if group.held_out else variant for variant in variants]


# --- what watches -------------------------------------------------------------------------------------------------


class Census:
    """Counts every row for the report, and writes those that are set aside, in the order of the input."""

    def __init__(self, rejected: str) -> None:
        """
        Args:
            rejected: the file of the rows that are set aside.
        """
        self.tally = Tally()
        self._rejected = rejected

    def watch(self, appender: Appender, block: StagedBlock, rows: Sequence[StagedRow]) -> None:
        """See `Watch`."""
        entries = list(block.rejected)
        for row in rows:
            if row.stays:
                self.tally.add_row(row.group, row.facts)
            elif row.decision.set_aside == DUPLICATE:
                self.tally.duplicates += 1
            else:
                entry = _entry_of(row, row.decision.reason)
                entries.append((row.facts.line, entry, row.decision.set_aside, row.facts.tokens))
        for _, entry, kind, tokens in sorted(entries, key=lambda entry: entry[0]):
            appender.append(self._rejected, entry)
            self.tally.add_rejected(kind, entry, tokens)


def _entry_of(row: StagedRow, reason: str) -> bytes:
    sidecar = orjson.loads(row.sidecar)
    return rejected_entry(sidecar["source"], sidecar["line"], reason, orjson.loads(row.row))


@dataclass(frozen=True)
class Consensus:
    """Repeats rows that stand for several judges, with the aggregated scores in place of their judge's own."""

    variant: str
    aggregate: str
    form: Format
    guard: LengthGuard | None

    def watch(self, appender: Appender, _block: StagedBlock, rows: Sequence[StagedRow]) -> None:
        """See `Watch`."""
        for row in rows:
            if row.decision.consensus:
                self._append(appender, row, row.decision.consensus, row.decision.judges)

    def _append(self, appender: Appender, row: StagedRow, hundredths: Mapping[str, int], judges: int) -> None:
        prompt, label = prompt_and_label(row.row, self.form)
        sidecar = orjson.loads(row.sidecar)
        verdict = read_verdict(restore(label, answer=True), asked_shape(restore(prompt)))
        if isinstance(verdict, Unreadable):
            self._leave_out(sidecar, verdict.reason)
            return
        scores = {key: score / 100 for key, score in hundredths.items()}
        label, _ = neutralise(render_verdict(Verdict(scores, verdict.nested, verdict.texts)), answer=True)
        if self.guard:
            try:
                prompt = self.guard.fit(prompt, label).prompt
            except Rejected as rejected:  # the judge's own row fitted, by a token or two
                self._leave_out(sidecar, rejected.reason)
                return
        judge = f"{self.aggregate} of {judges} judges"
        sidecar |= {
            "id": row_id(sidecar["prompt_sha256"], judge, label),
            "scores": scores,
            "metadata": sidecar["metadata"] | {"model_name": judge},
        }
        (name,) = _sided([self.variant], row.group)
        appender.append(data_file(name), training_row(prompt, label, self.form))
        appender.append(sidecar_file(name), orjson.dumps(sidecar, option=orjson.OPT_APPEND_NEWLINE))

    def _leave_out(self, sidecar: Mapping[str, Any], reason: str) -> None:
        log.warning("%s:%d: left out of the consensus: %s", sidecar["source"], sidecar["line"], reason)
