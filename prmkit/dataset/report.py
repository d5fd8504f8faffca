"""The results of a conversion: conversion_report.json, and the printed summary."""
# ruff: noqa: S608 - queries consist of strings of this module; values from the data are bound

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prmkit import cli
from prmkit.dataset.prepare import ScaleProblem
from prmkit.dataset.stage import DUPLICATE, JUDGES_COMPARED, Stage
from prmkit.leniency import Leniency, describe_leniency
from prmkit.paths import HELD_OUT_SUFFIX, TASKS

_COVERED = (0.5, 0.9, 0.95, 0.99, 1.0)
_BINS = 10
_SHOWN = 10
"""The maximum number of rows of a table on the terminal."""
_LOST = 0.2
"""A judge that loses a larger fraction of its rows gets a warning."""
_HELD_OUT_OF_SPLIT = {"train": 0, "held_out": 1}


# --- counts -------------------------------------------------------------------------------------------------------


def count_rows(stage: Stage) -> dict[str, Any]:
    """Return the report's part about rows; a missing judge, task or type is an empty string."""
    one, many = _query_one(stage), stage.rows.execute
    splits = dict(many("SELECT held_out, count(*) FROM kept GROUP BY held_out").fetchall())
    return {
        "rows": {split: splits.get(number, 0) for split, number in _HELD_OUT_OF_SPLIT.items()},
        "evaluation_types": _counts(stage, "evaluation_type"),
        "judges": _counts(stage, "judge"),
        "tasks": one("count(DISTINCT task) FROM kept"),
        "duplicates": one(f"count(*) FROM row WHERE wanted AND status = '{DUPLICATE}'"),
        "rejected": _rejected(stage),
        "repaired": {"rows": one("count(*) FROM kept WHERE repairs != ''"), "repairs": _repairs(stage)},
        "markers": {"rows": one("count(*) FROM kept WHERE markers"), "markers": one("total(markers) FROM kept")},
        "leaked_scores": {
            "rows": one("count(*) FROM kept WHERE leaked_scores"), "scores": one("total(leaked_scores) FROM kept"),
        },
        "score_keys": _score_keys(stage),
        "score_histograms": _histograms(stage),
        "lengths": {
            "prompt_characters": _quantiles(stage, "prompt_characters FROM kept"),
            "label_characters": _quantiles(stage, "label_characters FROM kept"),
            "tokens": _quantiles(stage, "tokens FROM (SELECT tokens FROM kept UNION ALL SELECT tokens FROM rejected) "
                                        "WHERE tokens"),
        },
        "trimmed": {
            "rows": one("count(*) FROM kept WHERE characters_left_out"),
            "tokens_left_out": one("total(tokens_left_out) FROM kept WHERE characters_left_out"),
            "characters_left_out": one("total(characters_left_out) FROM kept"),
        },
    }  # fmt: skip


def _query_one(stage: Stage) -> Any:
    return lambda query: int(stage.rows.execute(f"SELECT {query}").fetchone()[0])


def _counts(stage: Stage, column: str) -> dict[str, int]:
    rows = stage.rows.execute(
        f"SELECT coalesce({column}, ''), count(*) FROM kept GROUP BY {column} ORDER BY count(*) DESC, min(number)"
    )
    return dict(rows.fetchall())


_ALL_REJECTED = (
    "(SELECT number, kind, reason, judge FROM rejected UNION ALL SELECT number, status, reason, judge FROM row "
    f"WHERE wanted AND status IS NOT NULL AND status != '{DUPLICATE}')"
)


def _rejected(stage: Stage) -> dict[str, int]:
    rows = stage.rows.execute(
        f"SELECT kind, count(*) FROM {_ALL_REJECTED} GROUP BY kind ORDER BY count(*) DESC, min(number)"
    )
    return dict(rows.fetchall())


def first_rejected(stage: Stage) -> dict[str, str]:
    """Return kind -> `source:line: reason` of the first rejected row."""
    rows = stage.rows.execute(f"SELECT kind, min(number), reason FROM {_ALL_REJECTED} GROUP BY kind")
    return {kind: f"{stage.place(number)}: {reason}" for kind, number, reason in rows}


def judges_with_losses(stage: Stage) -> list[dict[str, Any]]:
    """Return the judges that lose more than a fifth of their rows, with the most common reason."""
    rejections = stage.rows.execute(
        f"SELECT judge, kind, count(*) FROM {_ALL_REJECTED} WHERE judge IS NOT NULL GROUP BY judge, kind "
        "ORDER BY judge, count(*) DESC, kind"
    )
    lost: dict[str, dict[str, int]] = {}
    for judge, kind, count in rejections:
        lost.setdefault(judge, {})[kind] = count
    kept = dict(stage.rows.execute(
        f"SELECT judge, count(*) FROM row WHERE wanted AND (status IS NULL OR status = '{DUPLICATE}') GROUP BY judge"
    ).fetchall())  # fmt: skip
    rows = {judge: sum(kinds.values()) + kept.get(judge, 0) for judge, kinds in lost.items()}
    return [
        {"judge": judge, "rows": rows[judge], "rejected": sum(kinds.values()), "commonest_reason": next(iter(kinds))}
        for judge, kinds in lost.items()
        if sum(kinds.values()) > _LOST * rows[judge]
    ]


def _repairs(stage: Stage) -> dict[str, int]:
    counted: dict[str, int] = {}
    for repairs, rows in stage.rows.execute(
        "SELECT repairs, count(*) FROM kept WHERE repairs != '' GROUP BY repairs ORDER BY min(number)"
    ):
        for repair in repairs.split(","):
            counted[repair] = counted.get(repair, 0) + rows
    return dict(sorted(counted.items(), key=lambda item: -item[1]))


def _score_keys(stage: Stage) -> dict[str, list[str]]:
    keys: dict[str, list[str]] = {}
    for evaluation_type, key in stage.rows.execute(
        "SELECT coalesce(evaluation_type, ''), key FROM kept JOIN score USING (number) "
        "GROUP BY evaluation_type, key ORDER BY min(number), min(place)"
    ):
        keys.setdefault(evaluation_type, []).append(key)
    return keys


def _histograms(stage: Stage) -> dict[str, dict[str, list[int]]]:
    """Count rows of both splits in ten bins of equal width; the last one includes 1.0."""
    bins: dict[str, dict[str, list[int]]] = {
        evaluation_type: {key: [0] * _BINS for key in keys} for evaluation_type, keys in _score_keys(stage).items()
    }
    for evaluation_type, key, index, rows in stage.rows.execute(
        "SELECT coalesce(evaluation_type, ''), key, min(value / 10, 9), count(*) FROM kept JOIN score USING (number) "
        "GROUP BY 1, 2, 3"
    ):
        bins[evaluation_type][key][index] = rows
    return bins


def _quantiles(stage: Stage, lengths: str) -> dict[str, int]:
    """Return the quantiles of a length: fraction of `_COVERED`, as a percentage -> smallest length that covers it."""
    rows = stage.rows.execute(f"SELECT count(*) FROM (SELECT {lengths})").fetchone()[0]
    if not rows:
        return {}
    query = f"SELECT {lengths} ORDER BY 1 LIMIT 1 OFFSET ?"
    return {
        f"{fraction:.0%}": stage.rows.execute(query, (math.ceil(fraction * rows - 1e-9) - 1,)).fetchone()[0]
        for fraction in _COVERED
    }


# --- judges -------------------------------------------------------------------------------------------------------


def agreement_of(sums: Iterable[tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Return one entry per evaluation type and pair of judges, from `Stage.agreement`.

    `n` counts pairs of scores, several per prompt if a verdict has several; `pearson` is null if a judge always gave
    the same score; `mean_absolute_difference` is 0 to 1.
    """
    return [
        {
            "evaluation_type": evaluation_type,
            "judges": [judge, other],
            "prompts": prompts,
            "n": n,
            "pearson": _pearson(n, *rest[:5]),
            "mean_absolute_difference": round(rest[5] / n / 100, 4),
        }
        for evaluation_type, judge, other, prompts, n, *rest in sums
    ]


def self_agreement_of(sums: Iterable[tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Return one entry per judge, evaluation type and key, over prompts that the judge answered more than once.

    Half of `mean_squared_difference` is the variance of a judge's noise.
    """
    return [
        {
            "judge": judge,
            "evaluation_type": evaluation_type,
            "key": key,
            "pairs": n,
            "pearson": _pearson(n, x, y, xx, yy, xy),
            "mean_absolute_difference": round(apart / n / 100, 4),
            "mean_squared_difference": round((xx + yy - 2 * xy) / n / 1e4, 6),
        }
        for judge, evaluation_type, key, n, x, y, xx, yy, xy, apart in sums
    ]


def _pearson(n: int, x: float, y: float, xx: float, yy: float, xy: float) -> float | None:
    spread = (n * xx - x * x) * (n * yy - y * y)
    return round((n * xy - x * y) / math.sqrt(spread), 4) if n > 1 and spread > 1e-6 else None


def leniency_of(leniency: Leniency) -> dict[str, Any]:
    """Return the report's part about the judges' leniency."""
    return {
        "offsets": dict(leniency.offsets),
        "shared_scores": leniency.shared_scores,
        "groups": [list(group) for group in leniency.groups],
    }


def describe_problems(problems: Iterable[ScaleProblem]) -> list[str]:
    """Return sentences about judges on other scales; of more than ten, the rest are only counted."""
    messages = [problem.message for problem in problems]
    more = len(messages) - _SHOWN
    return messages[:_SHOWN] + ([f"and {more:,} more judges and keys"] if more > 0 else [])


# --- the summary --------------------------------------------------------------------------------------------------


def show_summary(report: Mapping[str, Any]) -> None:
    """Print the summary of a conversion to stdout."""
    files = set(report["files"])
    tasks = {name for name in report["variants"] for suffix in ("", HELD_OUT_SUFFIX)
             if f"{TASKS}/{name}{suffix}.jsonl" in files}  # fmt: skip
    shown = {name: counts for name, counts in report["variants"].items() if name not in tasks}
    rows = [[name, f"{counts['train']:,}", f"{counts['held_out']:,}"] for name, counts in shown.items()]
    _table(("variant", "train", "held out"), rows, numeric=("train", "held out"))
    if report["rejected"]:
        kinds = [[kind, f"{n:,}"] for kind, n in report["rejected"].items()]
        _table(("rejected (see rejected.jsonl)", "rows"), kinds, numeric=("rows",))
    if report["judge_agreement"]:
        columns = ("agreement of judges", "type", "prompts", "scores", "correlation", "mean difference")
        pairs = sorted(report["judge_agreement"], key=lambda pair: -pair["n"])
        _table(columns, map(_agreement_row, pairs), numeric=columns[2:], optional=("prompts", "scores", "type"))
    for line in _notes(report, len(tasks)):
        cli.emit(line)


def _table(
    columns: tuple[str, ...],
    rows: Iterable[list[str]],
    *,
    numeric: tuple[str, ...],
    optional: tuple[str, ...] = (),
) -> None:
    rows = [[row[0] if len(row[0]) <= 60 else row[0][:59] + "…", *row[1:]] for row in rows]
    more = len(rows) - _SHOWN
    if more > 1:
        rows = [*rows[:_SHOWN], [f"and {more:,} more", *[""] * (len(columns) - 1)]]
    cli.emit_table("", columns, rows, numeric=numeric, optional=optional)


def _agreement_row(pair: Mapping[str, Any]) -> list[str]:
    correlation = "-" if pair["pearson"] is None else f"{pair['pearson']:.2f}"
    difference = f"{pair['mean_absolute_difference']:.2f}"
    judges = " / ".join(judge if len(judge) <= 28 else judge[:27] + "…" for judge in pair["judges"])
    return [judges, pair["evaluation_type"] or "", f"{pair['prompts']:,}", f"{pair['n']:,}", correlation, difference]


def _notes(report: Mapping[str, Any], tasks: int) -> Iterator[str]:
    rows, rejected = sum(report["rows"].values()), sum(report["rejected"].values())
    if tasks:
        yield f"per-task variants, in {TASKS}/: {tasks:,}"
    yield f"{report['lines']:,} rows read: {rows:,} kept, {rejected:,} rejected, {report['duplicates']:,} duplicates"
    if report["repaired"]["rows"]:
        kinds = ", ".join(f"{kind} {n:,}" for kind, n in report["repaired"]["repairs"].items())
        yield f"answers that were not valid JSON and were repaired: {report['repaired']['rows']:,} ({kinds})"
    if report["markers"]["rows"]:
        yield f"rows with special tokens, which are now escaped: {report['markers']['rows']:,}"
    if report["leaked_scores"]["rows"]:
        done = "masked" if report["settings"]["mask_leaked_scores"] else "use --mask-leaked-scores to mask them"
        yield f"rows whose prompt has scores of earlier evaluations: {report['leaked_scores']['rows']:,} ({done})"
    yield from _judge_notes(report)
    yield from _held_out_notes(report)
    yield from _length_notes(report)


def _judge_notes(report: Mapping[str, Any]) -> Iterator[str]:
    yield from report["scale_problems"]
    for lost in report["judges_with_losses"][:_SHOWN]:
        yield (
            f"warning: {lost['rejected']:,} of {lost['rows']:,} rows of {lost['judge']} are rejected; "
            f"most common reason: {lost['commonest_reason']}"
        )
    if report["prompts_a_judge_answered_differently"]:
        yield f"prompts with different verdicts from one judge: {report['prompts_a_judge_answered_differently']:,}"
    if len(report["judges"]) > JUDGES_COMPARED:
        yield f"{len(report['judges']):,} judges; the {JUDGES_COMPARED} with the most rows are compared"
    leniency = report["leniency"]
    known = Leniency(leniency["offsets"], leniency["shared_scores"], tuple(map(tuple, leniency["groups"])))
    if 1 < len(leniency["offsets"]) <= _SHOWN:
        yield from describe_leniency(known)


def _held_out_notes(report: Mapping[str, Any]) -> Iterator[str]:
    held_out, split, audit = report["held_out"], report["settings"]["split"], report["leak_audit"]
    ratio = f"({held_out['realised_ratio']:.0%})"
    if report["tasks"]:
        yield f"{held_out['tasks']:,} of {report['tasks']:,} tasks are held out {ratio}"
    else:
        rows = sum(report["rows"].values())
        yield f"{held_out['rows']:,} of {rows:,} rows are held out {ratio}; no row has a task_id"
    if not held_out["rows"] and split["ratio"] > 0:
        yield "warning: no row is held out, so the judge cannot be evaluated. Add rows of a second task."
    near = audit["near_duplicates"]
    if near["prompts"]:
        done = "removed from training" if report["settings"]["near_duplicates"] == "drop" else (
            "kept; --near-duplicates drop removes them")  # fmt: skip
        yield f"warning: {near['prompts']:,} training prompts nearly repeat a held-out one ({done}):"
        for example in near["examples"]:
            yield f"  {example['training']} shares {example['share']:.0%} of its words with {example['held_out']}"
    if audit["passed"] is None and held_out["rows"]:
        yield (
            "warning: no row has a task_id (in its metadata), so one task may be in both splits, and the leak audit "
            "cannot check that"
        )
    elif audit["rows_without_a_task"]:
        yield f"held-out rows without a task (only their prompts were compared): {audit['rows_without_a_task']:,}"


def _length_notes(report: Mapping[str, Any]) -> Iterator[str]:
    tokens, lengths = report["lengths"]["tokens"], report["settings"]["lengths"]
    if not tokens or not lengths:
        return
    longer = f"99% in {tokens['99%']:,}, 100% in {tokens['100%']:,}"
    yield f"cutoff_len is {lengths['cutoff_len']:,}; 95% of the rows fit in {tokens['95%']:,} tokens, {longer}"
    if report["trimmed"]["rows"]:
        rows, left_out = report["trimmed"]["rows"], report["trimmed"]["tokens_left_out"]
        yield f"prompts shortened in the middle: {rows:,}, by {left_out:,} tokens in total"
