"""The report: one HTML file with everything in it, for the person who must decide whether to use this judge."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from prmkit.evaluation import plots, summary
from prmkit.evaluation.predictions import Scores
from prmkit.evaluation.summary import ALL, NONE, shown
from prmkit.files import write_text

LARGEST_ERRORS = 12


def write_report(file: Path, metrics: Mapping[str, Any], scores: Scores) -> None:
    """Write the report; it refers to nothing outside of itself.

    Args:
        file: the HTML file.
        metrics: the content of `metrics.json`.
        scores: the predictions that the figures were made of.
    """
    write_text(file, report_html(metrics, scores))


def report_html(metrics: Mapping[str, Any], scores: Scores) -> str:
    """The report as HTML. Every text from outside is escaped: prompts, names and reasons may hold anything."""
    held_out = metrics["held_out"]
    title = f"How good is this judge? {held_out['dataset']}"
    body = [
        f"<h1>{escape(title)}</h1>",
        _subtitle(metrics),
        _verdict(metrics),
        "<h2>Figures</h2>",
        _table(summary.COLUMNS, summary.main_table(metrics, intervals=True)),
        _missing(metrics),
        "<h2>Pictures</h2>",
        *(_picture(*picture) for picture in plots.pictures(metrics, scores)),
        "<h2>Bad steps</h2>",
        _bad_steps(metrics),
        "<h2>Baselines and single judges</h2>",
        _baselines(metrics),
        _ceiling(metrics),
        "<h2>Whole trajectories</h2>",
        _trajectories(metrics["trajectory"]),
        "<h2>The largest errors</h2>",
        _largest_errors(scores, held_out["judges"]),
        "<h2>How it was measured</h2>",
        _method(metrics),
    ]
    return _PAGE.format(title=escape(title), style=_STYLE, body="\n".join(body))


# --- the verdict ------------------------------------------------------------------------------------------------------


def _subtitle(metrics: Mapping[str, Any]) -> str:
    judge, held_out = metrics["judge"], metrics["held_out"]
    name = f"{judge['adapter']} on {judge['model']}" if judge.get("adapter") else str(judge["model"])
    judges = ", ".join(map(str, held_out["judges"]))
    part = "" if held_out["prompts_evaluated"] == held_out["prompts"] else f" of {held_out['prompts']}"
    return (
        f"<p class='subtitle'>Judge: <b>{escape(name)}</b>, {escape(metrics['mode'])} mode. Measured on "
        f"{held_out['prompts_evaluated']}{part} held-out prompts of {held_out['tasks_evaluated']} tasks, against the "
        f"mean of {escape(judges)} (the mean judge).</p>"
    )


def _verdict(metrics: Mapping[str, Any]) -> str:
    found = summary.conclusions(metrics)
    blocks = [f"<p class='short'>{escape(summary.in_short(found))}</p>"]
    for each in found:
        sentences = "".join(f"<li>{escape(sentence)}</li>" for sentence in each.sentences)
        blocks.append(
            f"<div class='verdict {each.standing}'><h3><span>{escape(each.kind)}</span> {escape(each.headline)}</h3>"
            f"<ul>{sentences}</ul></div>"
        )
    return "\n".join(blocks) + f"<p>{escape(summary.validity_sentence(metrics))}</p>"


def _missing(metrics: Mapping[str, Any]) -> str:
    reasons = summary.reasons(metrics)
    missing = f"<p class='note'>Without a figure: {escape('; '.join(reasons))}.</p>" if reasons else ""
    notes = f"In brackets: 95 % intervals, by resampling whole tasks. {summary.LEGEND}"
    return f"<p class='note'>{escape(notes)}</p>{missing}"


def _picture(title: str, caption: str, svg: str) -> str:
    return (
        f"<figure role='img' aria-label='{escape(title)}'><figcaption><b>{escape(title)}.</b> {escape(caption)}"
        f"</figcaption>{svg}</figure>"
    )


# --- tables -----------------------------------------------------------------------------------------------------------


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> str:
    """A table whose first `texts` columns are words, the others numbers."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(_cell(text) for text in row) + "</tr>" for row in rows)
    table = f"<table class='texts{texts}'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<div class='wide'>{table}</div>"


def _cell(text: str) -> str:
    # The interval goes under its value, so that values stand below each other.
    value, bracket, rest = text.partition(" [")
    if not bracket or not rest.endswith("]"):
        return f"<td>{escape(text)}</td>"
    return f"<td>{escape(value)}<small>[{escape(rest)}</small></td>"


def _bad_steps(metrics: Mapping[str, Any]) -> str:
    columns = ("scores of", "bad is below", "bad", "AUROC", "average precision", "Brier", "always the base rate", "ECE")
    rows = []
    for group in _main_groups(metrics):
        for limit, figures_of in group["judge"]["bad_step"].items():
            share = figures_of["bad_share"]["value"]
            rows.append(
                [
                    summary.group_name(group),
                    limit,
                    summary.percent(figures_of["bad_share"]),
                    *(shown(figures_of[name]) for name in ("auroc", "average_precision", "brier")),
                    NONE if share is None else f"{share * (1 - share):.2f}",
                    shown(figures_of["ece"]),
                ]
            )
    return _table(columns, rows) + (
        "<p class='note'>AUROC: 0.5 is chance. Average precision: compare with the share of bad steps. Brier and ECE "
        "(lower is better) are those of the judge's own probability that the score is below the border; a judge that "
        "always says the base rate reaches the Brier score in the column beside it.</p>"
    )


def _main_groups(metrics: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [metrics["groups"][0], *summary.groups_of_kind(metrics)]


def _baselines(metrics: Mapping[str, Any]) -> str:
    rows = []
    for group in _main_groups(metrics):
        name = summary.group_name(group)
        rows.append([name, "this judge", *_brief(group["judge"])])
        for judge, figures_of in group["against"].items():
            rows.append([name, f"this judge against {judge} alone", *_brief(figures_of)])
        baselines = group["baselines"]
        if "training_median" in baselines:
            rows.append([name, "training median", *_brief(baselines["training_median"])])
        if copying := baselines.get("copy"):
            which = "mean" if copying["copied"] == "mean" else "last"
            rows.append([name, f"copying the {which} score of the prompt", *_brief(copying["copy"])])
            rows.append([name, "this judge on the same scores", *_brief(copying["judge"])])
        if base := baselines.get("base_model"):
            rows.append([name, "base model", *_brief(base["base"])])
    return _table(("scores of", "who", "n", "MAE", "bias", "Pearson", "Spearman"), rows, texts=2)


def _brief(of: Mapping[str, Any]) -> list[str]:
    return [str(of["mae"]["n"]), *(shown(of.get(name)) for name in ("mae", "bias", "pearson", summary.ORDER))]


def _ceiling(metrics: Mapping[str, Any]) -> str:
    rows = []
    for group in _main_groups(metrics):
        for pair in group["ceiling"]["pairs"]:
            rows.append(
                [
                    summary.group_name(group),
                    " and ".join(pair["judges"]),
                    str(pair["mae"]["n"]),
                    shown(pair["mae"]),
                    *(
                        shown(figure)
                        for name, bounds in group["ceiling"]["bounds"].items()
                        for figure in (pair[name], bounds["one_judge"], bounds["mean_judge"])
                    ),
                ]
            )
    if not rows:
        return "<p>No prompt was answered by two judges, so it is not known how far judges agree.</p>"
    bounds = ("against one: at most", "against the mean: at most")
    columns = ("scores of", "judges", "n", "MAE", "Pearson", *bounds, "Spearman", *bounds)
    return "<h3>How far the judges agree with each other</h3>" + _table(columns, rows, texts=2)


def _trajectories(trajectory: Mapping[str, Any]) -> str:
    if not trajectory["trajectories"]:
        return "<p>No task has scores for all of its clips.</p>"
    rows = [
        [name, who, *(shown(of[who_key][figure]) for figure in ("spearman", "pearson", "auroc"))]
        for name, of in trajectory["aggregates"].items()
        for who, who_key in (("this judge", "judge"), ("mean judge", "reference"))
    ]
    text = (
        f"<p>{trajectory['trajectories']} whole trajectories, {trajectory['with_outcome']} with a judged "
        f"<code>{escape(trajectory['outcome'])}</code>. What the scores of the steps, put together, say about it:</p>"
    )
    left_out = ", ".join(f"{count} with {reason}" for reason, count in trajectory["left_out"].items())
    text += f"<p>Left out: {escape(left_out)}.</p>" if left_out else ""
    columns = ("steps put together by", "whose steps", "Spearman", "Pearson", "AUROC, wrong answer")
    text += _table(columns, rows, texts=2)
    firsts = [
        [
            limit,
            shown(of["f1"]),
            f"{of['found']} of {of['with_bad_step']}",
            f"{of['cleared']} of {of['without_bad_step']}",
        ]
        for limit, of in trajectory["first_bad_step"].items()
    ]
    text += "<h3>Finding the first bad step</h3>"
    return text + _table(("bad is below", "ProcessBench F1", "first one found", "flawless cleared"), firsts)


def _largest_errors(scores: Scores, judges: Sequence[str]) -> str:
    worst = np.argsort(-np.abs(scores.predicted - scores.reference), kind="stable")[:LARGEST_ERRORS]
    some = scores.where(worst)
    columns = ("prompt", "task", "score of", "this judge", "± std", "mean judge", *judges)
    rows = [
        [
            some.prompt[row][:12],
            some.task[row],
            f"{some.evaluation_type[row]} · {some.key[row]}",
            *(_number(value) for value in (some.predicted[row], some.std[row], some.reference[row])),
            *(_number(value) for value in some.references[row]),
        ]
        for row in range(len(some))
    ]
    return _table(columns, rows, texts=3) + (
        "<p class='note'>The prompt is named by the beginning of its <code>prompt_sha256</code> in "
        "<code>predictions.jsonl</code>. Read a few: some large errors are the judges'.</p>"
    )


def _number(value: float) -> str:
    return f"{value:.2f}" if np.isfinite(value) else NONE


# --- method -----------------------------------------------------------------------------------------------------------


def _method(metrics: Mapping[str, Any]) -> str:
    method, held_out = metrics["method"], metrics["held_out"]
    facts = {
        "Reference": method["reference"],
        "Score": method["score"],
        "Intervals": f"{method['interval']}, {method['resamples']} resamples, from {method['fewest_tasks']} tasks on",
        "Spearman": "rho within each key, averaged over keys; metrics.json has it pooled as well",
        "Correlations": f"none below {method['fewest_scores']} scores, none where everything is the same",
        "Pairs in task": "accuracy with ties and tie calibration, by task (Deutsch, Foster and Freitag 2023)",
        "Bound by noise": "square root of the reliability of the reference (Spearman 1904; Spearman 1910, Brown 1910)",
        "ECE": "ten bins of equal width (Guo et al. 2017)",
        "Kappa": "quadratic weights (Cohen 1968), bands meeting at 0.2, 0.4, 0.6, 0.8",
        "First bad step": "harmonic mean of the two accuracies (ProcessBench, Zheng et al. 2024)",
        "Held-out data": f"{held_out['rows']} rows, {held_out['prompts']} prompts, yardstick {held_out['sha256'][:16]}",
        "Statuses": ", ".join(f"{status} {n}" for status, n in metrics["validity"][ALL]["statuses"].items()),
        "Judge": ", ".join(f"{key} {value}" for key, value in metrics["judge"].items() if value not in (None, "")),
    }
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(text))}</dd>" for name, text in facts.items())
    return f"<dl>{items}</dl>"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

_STYLE = """
body { font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; color: #111; max-width: 64rem; margin: 2rem auto;
  padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; }
h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #bbb; }
h3 { font-size: 1rem; margin-bottom: 0.3rem; }
.subtitle, .note { color: #444; }
.note { font-size: 0.87rem; }
.verdict { border-left: 0.5rem solid #555; padding: 0.1rem 1rem; margin: 0.8rem 0; background: #f6f6f6;
  break-inside: avoid; }
.verdict.good { border-left-color: #0072B2; }
.verdict.weak { border-left-color: #E69F00; border-left-style: dashed; }
.verdict.useless { border-left-color: #D55E00; border-left-style: double; }
.verdict.unknown { border-left-style: dotted; }
.verdict h3 span { border: 1px solid #555; border-radius: 0.2rem; padding: 0 0.4rem; font-weight: normal; }
.verdict ul { margin: 0.2rem 0 0.6rem; padding-left: 1.2rem; }
.short { font-size: 1.15rem; font-weight: bold; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 0.25rem 0.55rem; vertical-align: top; border-bottom: 1px solid #ddd; }
th { border-bottom: 2px solid #555; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; white-space: pre; }
.texts2 :is(td, th):nth-child(2), .texts3 :is(td, th):nth-child(-n + 3) { text-align: left; }
td small { display: block; color: #555; white-space: nowrap; }
tr { break-inside: avoid; }
figure { margin: 1.4rem 0; break-inside: avoid; }
figcaption { font-size: 0.9rem; max-width: 46rem; }
figure svg { max-width: 100%; height: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.2rem 1rem; font-size: 0.87rem; }
dt { font-weight: bold; } dd { margin: 0; overflow-wrap: anywhere; }
@media print { body { margin: 0; max-width: none; font-size: 11px; } .wide { overflow: visible; } }
"""
