"""From the stage to the files of the variants: every row goes into each of its variants, in the input's order.

A row is serialised once, when it is prepared; here its bytes are only appended.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

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
from prmkit.markers import neutralise, restore
from prmkit.verdict import Unreadable, Verdict, read_verdict, render_verdict

log = logging.getLogger(__name__)

REJECTED = "rejected.jsonl"
_SIDECAR = ".meta.jsonl"


def data_file(variant: str) -> str:
    """The training file of a variant."""
    return f"{variant}.jsonl"


def sidecar_file(variant: str) -> str:
    """The file that traces the rows of a variant back to the input."""
    return variant + _SIDECAR


class StagedRow(NamedTuple):
    """A row together with what was decided on it."""

    group: Group
    facts: Facts
    row: bytes
    sidecar: bytes
    decision: Decision | None


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
                decided = None
                if decision is not None and decision.number == number:
                    decided, decision = decision, next(decisions, None)
                rows.append(StagedRow(self.groups[block.worker][facts.group], facts, row, sidecar, decided))
            yield block, rows


@dataclass(frozen=True)
class Consensus:
    """How rows of the consensus are made."""

    variant: str
    aggregate: str
    form: Format
    guard: LengthGuard | None


def write_variants(
    staged: Staged,
    placement: Mapping[Group, Sequence[str]],
    consensus: Consensus | None,
    output: Path,
    advance: Advance,
) -> dict[str, int]:
    """Append every row to the variants of its group.

    Args:
        staged: the rows.
        placement: the variants by group; each one's held-out side is found from the group.
        consensus: what to make of the rows that stand for several judges; None leaves it out.
        output: the folder of the files.
        advance: told of the bytes.

    Returns:
        How many rows each dataset has, by name.
    """
    names = {
        group: [held_out_name(variant) if group.held_out else variant for variant in variants]
        for group, variants in placement.items()
    }
    with Appender(output) as appender:
        for _, rows in staged.read():
            for row in rows:
                if row.decision is None or row.decision.set_aside is None:
                    for name in names[row.group]:
                        appender.append(data_file(name), row.row)
                        appender.append(sidecar_file(name), row.sidecar)
                    if consensus and row.decision and row.decision.consensus:
                        _append_consensus(row, row.decision.consensus, row.decision.judges, consensus, appender)
            advance(sum(row.facts.row_size for row in rows))
        return {
            name.removesuffix(".jsonl"): lines for name, lines in appender.lines.items() if not name.endswith(_SIDECAR)
        }


def tally_rows(staged: Staged, rejected: Path) -> Tally:
    """Count every row for the report, and write those that are set aside to `rejected`, in the order of the input."""
    tally = Tally()
    with rejected.open("wb") as stream:
        for block, rows in staged.read():
            entries = list(block.rejected)
            for row in rows:
                if row.decision is None or row.decision.set_aside is None:
                    tally.add_row(row.group, row.facts)
                elif row.decision.set_aside == DUPLICATE:
                    tally.duplicates += 1
                else:
                    entry = _entry_of(row, row.decision.reason)
                    entries.append((row.facts.line, entry, row.decision.set_aside, row.facts.tokens))
            entries.sort(key=lambda entry: entry[0])
            for _, entry, kind, tokens in entries:
                stream.write(entry)
                tally.add_rejected(kind, entry, tokens)
    return tally


def _entry_of(row: StagedRow, reason: str) -> bytes:
    sidecar = orjson.loads(row.sidecar)
    return rejected_entry(sidecar["source"], sidecar["line"], reason, orjson.loads(row.row))


def _append_consensus(
    row: StagedRow, hundredths: Mapping[str, int], judges: int, consensus: Consensus, appender: Appender
) -> None:
    """Repeat a row with the aggregated scores in place of its judge's own."""
    prompt, label = prompt_and_label(row.row, consensus.form)
    verdict = read_verdict(restore(label, answer=True))
    if isinstance(verdict, Unreadable):
        raise ValueError(f"{verdict.reason}, in an answer that was read before: {label}")
    scores = {key: score / 100 for key, score in hundredths.items()}
    label, _ = neutralise(render_verdict(Verdict(scores, verdict.nested, verdict.texts)), answer=True)
    sidecar = orjson.loads(row.sidecar)
    if consensus.guard:
        try:
            prompt = consensus.guard.fit(prompt, label).prompt
        except Rejected as rejected:  # the judge's own row fitted, by a token or two
            log.warning("%s:%d: left out of the consensus: %s", sidecar["source"], sidecar["line"], rejected.reason)
            return
    judge = f"{consensus.aggregate} of {judges} judges"
    sidecar |= {
        "id": row_id(sidecar["prompt_sha256"], judge, label),
        "scores": scores,
        "metadata": sidecar["metadata"] | {"model_name": judge},
    }
    name = held_out_name(consensus.variant) if row.group.held_out else consensus.variant
    appender.append(data_file(name), training_row(prompt, label, consensus.form))
    appender.append(sidecar_file(name), orjson.dumps(sidecar, option=orjson.OPT_APPEND_NEWLINE))
