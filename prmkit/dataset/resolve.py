"""What only the whole input can tell of a row: whether it repeats another, or stands on both sides, or is contested.

Works through the index in parts that hold the same prompts, so memory stays constant: with 256 parts, about 2 bytes a
row of the input.
"""

import heapq
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

import orjson

from prmkit.dataset.agreement import Agreement
from prmkit.dataset.settings import Aggregate
from prmkit.dataset.stage import UNWANTED, Indexed, index_parts, read_index

DUPLICATE = "duplicate"
BOTH_SIDES = "the prompt is also held out"
CONTESTED = "judges differ too much"


class Decision(NamedTuple):
    """What becomes of one row."""

    number: int
    """`Indexed.number`."""
    set_aside: str
    """The kind of reason; empty for a row that stays."""
    reason: str
    """Empty for a row that stays."""
    consensus: Mapping[str, int] | None
    """The row is to be repeated in the consensus, with these scores in hundredths."""
    judges: int
    """How many judges the consensus is of."""


@dataclass
class Resolved:
    """What was found."""

    prompts: int = 0
    against_themselves: int = 0
    """Prompts that one judge answered with different verdicts."""
    agreement: Agreement = field(default_factory=Agreement)


def resolve(stage: Path, *, nothing_held_out: bool, aggregate: Aggregate, max_disagreement: float | None) -> Resolved:
    """Decide on the staged rows; the decisions are left in the stage for `read_decisions`.

    Args:
        stage: the folder with the index.
        nothing_held_out: every row is for training, whatever its own side says.
        aggregate: how the consensus is made; `none` makes none.
        max_disagreement: prompts on whose scores the judges lie further apart (0 to 1) are set aside.
    """
    found = Resolved()
    for number, paths in enumerate(index_parts(stage)):
        prompts: dict[str, list[Indexed]] = defaultdict(list)
        for row in read_index(paths):
            prompts[row.prompt].append(row)
        decisions: list[Decision] = []
        for rows in prompts.values():
            rows.sort(key=_number_of)
            decisions += _decide(rows, found, nothing_held_out, aggregate, max_disagreement)
        decisions.sort(key=_number_of)
        with (stage / f"decisions-{number}").open("wb") as stream:
            stream.writelines(orjson.dumps(tuple(made), option=orjson.OPT_APPEND_NEWLINE) for made in decisions)
    return found


def read_decisions(stage: Path) -> Iterator[Decision]:
    """The decisions in the order of the input; rows without one stay as they are."""
    with ExitStack() as stack:
        parts = [stack.enter_context(path.open("rb")) for path in sorted(stage.glob("decisions-*"))]
        yield from heapq.merge(*(map(_decision, part) for part in parts), key=_number_of)


def _decision(line: bytes) -> Decision:
    return Decision._make(orjson.loads(line))


def _number_of(row: Indexed | Decision) -> int:
    return row.number


def _decide(
    rows: Sequence[Indexed],
    found: Resolved,
    nothing_held_out: bool,
    aggregate: Aggregate,
    max_disagreement: float | None,
) -> Iterator[Decision]:
    """Decide on the rows of one prompt."""
    held_out = not nothing_held_out and any(row.held_out for row in rows)
    rows = [row for row in rows if row.number != UNWANTED]
    if not rows:
        return
    found.prompts += 1
    kept: dict[tuple[str | None, str], Indexed] = {}
    for row in rows:
        if held_out and not row.held_out:
            yield Decision(row.number, BOTH_SIDES, BOTH_SIDES, None, 0)
        elif (row.judge, row.verdict) in kept:
            yield Decision(row.number, DUPLICATE, DUPLICATE, None, 0)
        else:
            kept[row.judge, row.verdict] = row
    if len(kept) == 1 and aggregate == "none":
        return
    by_judge: dict[str | None, list[Indexed]] = defaultdict(list)
    for row in kept.values():
        by_judge[row.judge].append(row)
    found.against_themselves += len(by_judge) < len(kept)
    means = {judge: _mean_scores(of_judge) for judge, of_judge in by_judge.items()}
    named = sorted(judge for judge in means if judge is not None)
    for one, other in combinations(named, 2):
        found.agreement.add(rows[0].evaluation_type, one, other, means[one], means[other])

    if max_disagreement is not None:
        key, spread = _widest(list(means.values()))
        if spread > 100 * max_disagreement + 1e-9:
            reason = f"judges differ by {spread / 100:.2f} on {key}"
            yield from (Decision(row.number, CONTESTED, reason, None, 0) for row in kept.values())
            return
    if aggregate != "none":
        yield _consensus(list(kept.values()), list(means.values()), aggregate)


def _mean_scores(rows: Sequence[Indexed]) -> dict[str, float]:
    """A judge's scores; one who answered a prompt more than once has one voice all the same."""
    if len(rows) == 1:
        return dict(rows[0].scores)
    return {key: mean(row.scores[key] for row in rows if key in row.scores) for key in _keys(rows)}


def _keys(rows: Sequence[Indexed]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row.scores))


def _widest(of_judges: Sequence[Mapping[str, float]]) -> tuple[str, float]:
    widest = ("", 0.0)
    for key in dict.fromkeys(key for scores in of_judges for key in scores):
        values = [scores[key] for scores in of_judges if key in scores]
        widest = max(widest, (key, max(values) - min(values)), key=lambda pair: pair[1])
    return widest


def _consensus(rows: Sequence[Indexed], of_judges: Sequence[Mapping[str, float]], aggregate: Aggregate) -> Decision:
    """Aggregate key by key, and choose the row whose words go with it: the nearest of those with the most keys."""
    combine = mean if aggregate == "mean" else median
    keys = dict.fromkeys(key for scores in of_judges for key in scores)
    scores = {key: combine([one[key] for one in of_judges if key in one]) for key in keys}

    def distance(row: Indexed) -> tuple[int, float, int]:
        apart = sum(abs(score - scores[key]) for key, score in row.scores.items()) / len(row.scores)
        return -len(row.scores), apart, row.number

    nearest = min(rows, key=distance)
    hundredths = {key: int(scores[key] + 0.5) for key in nearest.scores}
    return Decision(nearest.number, "", "", hundredths, len(of_judges))
