"""What a conversion prints: tables, and below them what the user should know of the data."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from prmkit import cli

log = logging.getLogger(__name__)

_VARIANTS_SHOWN = 15
_KINDS_SHOWN = 15
_NOTABLE = 0.05
"""Difference between the wished and the realised share of held-out tasks that is worth a word."""


def show_summary(report: Mapping[str, Any]) -> None:
    """Print the summary of a conversion to stdout."""
    variants = report["variants"]
    rows = [[name, f"{counts['train']:,}", f"{counts['held_out']:,}"] for name, counts in variants.items()]
    more = len(rows) - _VARIANTS_SHOWN
    if more > 0:
        rows = [*rows[:_VARIANTS_SHOWN], [f"... and {more:,} more", "", ""]]
    cli.emit_table("", ("variant", "train", "held out"), rows, numeric=("train", "held out"))
    if report["rejected"]:
        kinds = [[kind, f"{n:,}"] for kind, n in list(report["rejected"].items())[:_KINDS_SHOWN]]
        cli.emit_table("", ("set aside (rejected.jsonl)", "rows"), kinds, numeric=("rows",))
    if report["judge_agreement"]:
        columns = ("agreement of judges", "on", "prompts", "scores", "correlation", "mean difference")
        cli.emit_table("", columns, map(_agreement_row, report["judge_agreement"]), numeric=columns[2:])
    for line in _notes(report):
        cli.emit(line)


def _agreement_row(pair: Mapping[str, Any]) -> list[str]:
    correlation = "-" if pair["pearson"] is None else f"{pair['pearson']:.2f}"
    difference = f"{pair['mean_absolute_difference']:.2f}"
    kind = pair["evaluation_type"] or ""
    return [" / ".join(pair["judges"]), kind, f"{pair['prompts']:,}", f"{pair['n']:,}", correlation, difference]


def _notes(report: Mapping[str, Any]) -> Iterator[str]:
    rows = sum(report["rows"].values())
    rejected = sum(report["rejected"].values())
    yield (
        f"{report['lines']:,} lines: {rows:,} rows kept, {rejected:,} set aside, {report['duplicates']:,} duplicates"
    )
    repaired, held_out = report["repaired"], report["held_out"]
    if repaired["rows"]:
        kinds = ", ".join(f"{kind} {n:,}" for kind, n in repaired["repairs"].items())
        yield f"answers that were no valid JSON and were repaired: {repaired['rows']:,} ({kinds})"
    if report["markers"]["rows"]:
        yield f"rows with control markers, which were made plain text: {report['markers']['rows']:,}"
    if report["leaked_scores"]["rows"]:
        done = "masked" if report["settings"]["mask_leaked_scores"] else "use --mask-leaked-scores to mask them"
        yield f"rows whose prompt carries scores of earlier evaluations: {report['leaked_scores']['rows']:,} ({done})"
    if report["prompts_a_judge_answered_differently"]:
        yield f"prompts with different verdicts of one judge: {report['prompts_a_judge_answered_differently']:,}"
    yield from _held_out_notes(report, held_out)
    yield from _length_notes(report)


def _held_out_notes(report: Mapping[str, Any], held_out: Mapping[str, Any]) -> Iterator[str]:
    split = report["settings"]["split"]
    what = ("tasks", held_out["tasks"], report["tasks"])
    if not report["tasks"]:
        what = ("rows, which name no task,", held_out["rows"], sum(report["rows"].values()))
    share = f"{what[1]:,} of {what[2]:,} {what[0]} are held out ({held_out['realised_ratio']:.0%})"
    if split["tasks"] is not None or abs(held_out["realised_ratio"] - split["ratio"]) < _NOTABLE:
        yield share
    else:
        yield f"{share}; {split['ratio']:.0%} was asked for, and few do not divide like many"


def _length_notes(report: Mapping[str, Any]) -> Iterator[str]:
    tokens, lengths = report["lengths"]["tokens"], report["settings"]["lengths"]
    if not tokens or not lengths:
        return
    covering = ", ".join(f"{tokens[share]:,} covers {share}" for share in ("95%", "99%", "100%"))
    yield f"cutoff_len is {lengths['cutoff_len']:,}; {covering} of the rows"
    if report["trimmed"]["rows"]:
        rows, left_out = report["trimmed"]["rows"], report["trimmed"]["tokens_left_out"]
        yield f"prompts shortened in the middle: {rows:,}, by {left_out:,} tokens in all"
