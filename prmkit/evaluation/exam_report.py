"""The results of an exam: a table of judges, constants, published judges and people; a sentence per judge; a page."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prmkit.evaluation.estimates import Estimate
from prmkit.evaluation.exam import KINDS_OF_ERRORS, NO_ERROR, Exam
from prmkit.evaluation.exam_metrics import METRICS_OF_EXAMS, Entrant
from prmkit.evaluation.summary import MIN_SCORED
from prmkit.files import render_page, write_text
from prmkit.intervals import NONE, format_estimate

TEMPLATE = Path(__file__).with_name("exam.html.j2")
PUBLISHED = Path(__file__).with_name("published_judges.yaml")
TRUSTED_FROM = 0.7
"""A judge is trusted if the lower bound of its AUROC is at least this, and above every constant's AUROC."""
EXAMINED = ("judge", "base", "other")
"""Kinds of entrants, other than constants, that answered this exam."""


def published(exam: Exam) -> list[Entrant]:
    """Return published results of judges and people on the set; none if the exam mixes sets or has incomplete runs."""
    import yaml

    if len(exam.sources) != 1 or not all(run.is_whole for run in exam.runs):
        return []  # with your own labels on some steps, it is a different exam
    parts = yaml.safe_load(PUBLISHED.read_text(encoding="utf-8")).get(exam.sources[0], [])
    return [
        Entrant(
            name,
            kind,
            {key: Estimate(value, None, None, 0, 0) for key, value in metrics.items()},
            source=part["source"],
        )
        for part in parts
        for name, kind, metrics in _listed(part)
    ]


def _listed(part: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, float]]]:
    for name, metrics in part["judges"].items():
        yield name, "published", metrics
    if "people" in part:
        yield "people with people", "people", part["people"]


# --- the table --------------------------------------------------------------------------------------------------------


def shown_metrics(entrants: Sequence[Entrant]) -> list[str]:
    """Return the metrics that the exam allows, in order."""
    own = [each for each in entrants if each.kind != "published"]
    return [name for name in METRICS_OF_EXAMS if any(name in each.metrics for each in own)]


def columns(entrants: Sequence[Entrant]) -> tuple[str, ...]:
    """Return the header of the table."""
    names = [METRICS_OF_EXAMS[name][0] for name in shown_metrics(entrants)]
    return ("who", "AUROC", "95 %", *(name for name in names if name != "AUROC"))


def optional(entrants: Sequence[Entrant]) -> tuple[str, ...]:
    """Return the columns that a narrow terminal drops, in that order."""
    kept = {"who", "AUROC", "95 %", "AP", "first error"}
    return tuple(name for name in reversed(columns(entrants)) if name not in kept)


def table(entrants: Sequence[Entrant]) -> list[tuple[str, ...]]:
    """Return one row per entrant, with cells in the order of `columns`."""
    names = [name for name in shown_metrics(entrants) if name != "auroc"]
    rows = []
    for each in entrants:
        auroc = each.metrics.get("auroc")
        first = (each.name + _MARKS.get(each.kind, ""), value_cell(auroc), interval_cell(auroc))
        rows.append((*first, *(value_cell(each.metrics.get(name)) for name in names)))
    return rows


_MARKS = {"published": " *", "people": " *"}


def value_cell(estimate: Estimate | None) -> str:
    """Format a value with three decimals, enough to recognise a published value."""
    return format_estimate(estimate.as_json() if estimate else None, ".3f", interval=False)


def interval_cell(estimate: Estimate | None) -> str:
    """Return the interval, if there is one."""
    return NONE if estimate is None or estimate.low is None else f"{estimate.low:.2f}–{estimate.high:.2f}"


def notes(exam: Exam, entrants: Sequence[Entrant]) -> list[str]:
    """Describe the data on which the table is based."""
    labelled = list(exam.labelled)
    bad, tasks = sum(step.is_bad for _, step in labelled), len({run.task_id for run in exam.runs})
    lines = [
        f"{len(labelled):,} labelled steps ({bad:,} bad) in {len(exam.runs):,} runs of {tasks:,} tasks; "
        "intervals over tasks, thresholds chosen on other tasks."
    ]
    partial = sum(not run.is_whole for run in exam.runs)
    unknown = sum(run.first_error is None for run in exam.runs) - partial
    if partial:
        lines.append(f"{partial:,} runs are incomplete, so their first errors are not evaluated.")
    if unknown:
        lines.append(f"{unknown:,} runs have unlabelled steps before any bad one, so their first error is unknown.")
    lines += [
        f"{each.name}: {each.answered:,} of {each.asked:,} labelled steps have a score; the others are ignored."
        for each in entrants
        if each.kind in EXAMINED and each.answered < each.asked
    ]
    lines += [
        f"{each.name}: {each.selected:,} of these steps were selected by ask_judges.py --first. They are weighted by "
        "the inverse of their selection probability, and first errors are not evaluated in their runs."
        for each in entrants
        if each.selected
    ]
    lines += [f"* {source}" for source in dict.fromkeys(each.source for each in entrants if each.source)]
    if any(step.kind in KINDS_OF_ERRORS for _, step in labelled) and any(run.first_error for run in exam.runs):
        lines.append(
            'This set labels no step after an error as good, so bad steps come last: compare with "position alone".'
        )
    return lines


# --- one sentence per judge -------------------------------------------------------------------------------------------


def best_constant(entrants: Sequence[Entrant], metric: str = "auroc") -> tuple[str, float] | None:
    """Return the constant with the highest value of a metric, and that value."""
    found = [
        (each.name, value)
        for each in entrants
        if each.kind == "constant" and (value := getattr(each.metrics.get(metric), "value", None)) is not None
    ]
    return max(found, key=lambda pair: pair[1], default=None)


def conclusion(judge: Entrant, entrants: Sequence[Entrant]) -> tuple[str, str]:
    """Return the conclusion (`trust`, `use with care`, `do not rely` or `cannot say`) and a sentence with the reason.

    A judge that flags nearly every run can have a high AUROC; so if first errors are known, it must also locate them
    better than every constant.
    """
    auroc = judge.metrics.get("auroc")
    if auroc is None or auroc.value is None:
        return "cannot say", f"{judge.name}: cannot say ({auroc.reason if auroc else 'no step has a score'})."
    basis = f"{auroc.n:,} steps of {auroc.tasks:,} tasks"
    if auroc.low is None:
        reason = (auroc.reason or "").removeprefix("no interval: ")
        return (
            "cannot say",
            f"{judge.name}: cannot say from {basis}: AUROC {auroc.value:.2f}, but no interval ({reason}).",
        )
    constant = best_constant(entrants)
    bar, by = (max(0.5, constant[1]), constant[0]) if constant else (0.5, "guessing")
    measured = f"AUROC {auroc.value:.2f} ({auroc.low:.2f} to {auroc.high:.2f}) on {basis}; {by} reaches {bar:.2f}"
    reservation = _reservation(judge, entrants)
    if auroc.low >= TRUSTED_FROM and auroc.low > bar and not reservation:
        return "trust", f"{judge.name}: trust it. {measured}."
    if auroc.low > 0.5 and auroc.value > bar:
        return "use with care", f"{judge.name}: use it with care. {measured}{reservation}."
    return "do not rely", f"{judge.name}: do not rely on it. {measured}."


def _reservation(judge: Entrant, entrants: Sequence[Entrant]) -> str:
    """Return why a judge with a high AUROC is still not trusted; empty if there is no reason."""
    if judge.answered < MIN_SCORED * judge.asked:
        return f"; it scored {judge.answered / judge.asked:.1%} of the labelled steps"
    found, constant = judge.metrics.get("processbench_f1"), best_constant(entrants, "processbench_f1")
    if found and found.value is not None and constant and found.value <= constant[1]:
        return f"; it locates first errors (PB-F1 {found.value:.2f}) no better than {constant[0]} ({constant[1]:.2f})"
    return ""


# --- files ------------------------------------------------------------------------------------------------------------


def exam_as_json(exam: Exam, entrants: Sequence[Entrant]) -> dict[str, Any]:
    """Return the content of `exam.json`."""
    tasks = {run.task_id for run in exam.runs}
    return {
        "exam": {
            "file": exam.file.name,
            "sha256": exam.sha256,
            "sets": exam.sources,
            "runs": len(exam.runs),
            "tasks": len(tasks),
            "labelled_steps": sum(1 for _ in exam.labelled),
            "bad_steps": sum(step.is_bad for _, step in exam.labelled),
            "runs_without_error": sum(run.first_error == NO_ERROR for run in exam.runs),
            "runs_of_unknown_error": sum(run.first_error is None for run in exam.runs),
            "weighted": any(step.weight != 1 for _, step in exam.labelled),
        },
        "entrants": [
            {
                "name": each.name,
                "kind": each.kind,
                "answered": each.answered,
                "asked": each.asked,
                "source": each.source,
                "metrics": {name: estimate.as_json() for name, estimate in each.metrics.items()},
            }
            for each in entrants
        ],
        "verdicts": {
            each.name: dict(zip(("verdict", "sentence"), conclusion(each, entrants), strict=True))
            for each in entrants
            if each.kind in EXAMINED
        },
        "trusted_from": TRUSTED_FROM,
    }


def write_exam_page(file: Path, exam: Exam, entrants: Sequence[Entrant]) -> None:
    """Write the page; it loads no other files, and everything from the data is escaped."""
    names = shown_metrics(entrants)
    page = render_page(
        TEMPLATE,
        title=exam.file.name,
        sets=exam.sources,
        conclusions=[conclusion(each, entrants) for each in entrants if each.kind in EXAMINED],
        ladders=[ladder for name in names if (ladder := _ladder(name, entrants))],
        columns=columns(entrants),
        rows=list(zip(entrants, table(entrants), strict=True)),
        notes=notes(exam, entrants),
        explained=[METRICS_OF_EXAMS[name] for name in names],
        trusted_from=TRUSTED_FROM,
    )
    write_text(file, page)


_KINDS = {
    "judge": "judge",
    "base": "base model",
    "constant": "constant",
    "published": "published",
    "other": "other judge",
    "people": "people",
}
_LADDERS = {"auroc": 0.5, "step_accuracy": 0.0, "processbench_f1": 0.0, "located": 0.0, "first_error": 0.0}
"""The metrics with a ladder plot, and the beginning of its scale."""


def _ladder(name: str, entrants: Sequence[Entrant]) -> dict[str, Any] | None:
    """Return the entrants ranked by one metric, the best first; None if fewer than two have it."""
    if name not in _LADDERS:
        return None
    known = [(each, each.metrics[name]) for each in entrants if name in each.metrics]
    rungs = [(each, estimate, estimate.value) for each, estimate in known if estimate.value is not None]
    if len(rungs) < 2:
        return None
    header, meaning = METRICS_OF_EXAMS[name]
    least = min(_LADDERS[name], *(value for *_, value in rungs))

    def percent(value: float) -> float:
        return round(100 * (max(value, least) - least) / (1 - least or 1), 2)

    return {
        "name": header,
        "explained": meaning,
        "least": f"{least:.2f}",
        "rungs": [
            {
                "name": each.name,
                "kind": each.kind,
                "kind_name": _KINDS[each.kind],
                "value": value_cell(estimate),
                "interval": interval_cell(estimate),
                "at": percent(value),
                "low": None if estimate.low is None else percent(estimate.low),
                "width": None
                if estimate.low is None or estimate.high is None
                else round(percent(estimate.high) - percent(estimate.low), 2),
            }
            for each, estimate, value in sorted(rungs, key=lambda rung: -rung[2])
        ],
    }
