"""The report: one self-contained HTML file for deciding whether to use this judge."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prmkit.evaluation import grade, summary
from prmkit.evaluation.heldout import Constants, HeldOut
from prmkit.evaluation.metrics import ALL, ORDER
from prmkit.evaluation.plots import plots
from prmkit.evaluation.predictions import Row, Scores, table_of_scores
from prmkit.evaluation.robustness import COLUMNS as ROBUSTNESS_COLUMNS
from prmkit.evaluation.robustness import robustness_notes, robustness_table
from prmkit.files import render_page, write_text
from prmkit.intervals import NONE, format_estimate, percent
from prmkit.rows import EVALUATION_TYPES

TEMPLATE = Path(__file__).with_name("report.html.j2")
WORST_ERRORS = 10
_EXCERPT = 700
_WHOLE_PROMPT = 20_000
_STEP = re.compile(r"^.{0,20}\b(?:current|this) (?:clip|step)\b", re.IGNORECASE | re.MULTILINE)
_SCHEMA = re.compile(r"\bJSON\b")
_TABLES_OF_GROUPS = 4


def write_report(
    file: Path, metrics: Mapping[str, Any], rows: Sequence[Row], held_out: HeldOut, constants: Constants
) -> None:
    """Write the report, which loads no other files.

    Args:
        file: the HTML file.
        metrics: the content of `metrics.json`.
        rows: the predictions from which the metrics were made.
        held_out: the rows that were judged, for their texts.
        constants: as for `metrics_of`.
    """
    scores = table_of_scores(rows, held_out.judges, constants)
    write_text(file, report_html(metrics, plots(metrics, scores), worst_errors(scores, rows, held_out)))


def report_html(
    metrics: Mapping[str, Any], drawn: Sequence[tuple[str, str, str]], errors: Sequence[Mapping[str, Any]]
) -> str:
    """Return the report as HTML. Prompts, names and reasons are escaped, because they can contain HTML.

    Args:
        metrics: the content of `metrics.json`.
        drawn: what `plots` returns.
        errors: what `worst_errors` returns.
    """
    return render_page(
        TEMPLATE,
        name=judge_name(metrics),
        m=metrics,
        all=metrics["validity"][ALL],
        conclusions=grade.conclusions(metrics),
        explained={name: each.meaning for name, each in EVALUATION_TYPES.items()},
        next_steps=list(next_steps(metrics)),
        thresholds=_thresholds(metrics),
        main=_table(summary.COLUMNS, summary.main_table(metrics, intervals=True)),
        legend=summary.LEGEND,
        missing=summary.missing_reasons(metrics),
        validity=summary.validity_sentence(metrics),
        plots=drawn,
        errors=errors,
        robustness=_robustness(metrics.get("robustness")),
        breakdowns=[
            (key, _table(summary.BREAKDOWN_COLUMNS, rows), summary.left_out_of_breakdown(metrics, key))
            for key, rows in _breakdowns(metrics)
        ],
        abstention=_abstention(metrics),
        bad_steps=_bad_steps(metrics),
        baselines=_baselines(metrics),
        judges=_judges(metrics),
        trajectories=_trajectories(metrics["trajectory"]),
        first_errors=_first_errors(metrics["trajectory"]),
        method=_method(metrics),
    )


def judge_name(metrics: Mapping[str, Any]) -> str:
    """Return the judge's name: the run's folder, or the model's."""
    judge = metrics["judge"]
    path = Path(str(judge.get("adapter") or judge.get("model") or "judge"))
    return path.parent.name + "/" + path.name if path.name.startswith("checkpoint-") else path.name or str(path)


# --- what to do next --------------------------------------------------------------------------------------------------


def next_steps(metrics: Mapping[str, Any]) -> Iterator[tuple[str, str | None]]:
    """Yield suggestions for what to do with this judge, each with its command or None."""
    types = metrics["summary"]["types"]
    grades = {each["grade"] for each in types.values()}
    judge = metrics["judge"]
    where = f"--run {judge['adapter']}" if judge.get("adapter") else f"--model {judge.get('model')}"
    if "useful" in grades:
        names = [name for name, each in types.items() if each["grade"] == "useful"]
        command = f"python score_trajectories.py {where} steps.jsonl --output scores.jsonl --interval 0.9"
        yield f"Score new {' and '.join(names)} prompts; low and high are the ends of each score's interval.", command
    for group in summary.groups_of_types(metrics):
        if sentence := summary.bias_sentence(group):
            yield f"{group['evaluation_type']}: {sentence}", None
    if "unknown" in grades:
        yield (
            "Hold out more tasks, then train and measure again.",
            "python convert_dataset.py --eval-ratio 0.3",
        )
    if grades & {"weak", "not_useful"}:
        yield (
            "Read the worst errors below: some are errors of the judges. Fix or drop such rows, and train again.",
            None,
        )
        yield (
            "Train longer, on more tasks, or with a larger base model; then compare:",
            (f"python evaluate_judge.py --run saves/NEW --compare {judge.get('adapter') or 'saves/OLD'} --margin 0.05"),
        )
    if metrics["leniency"]["sentences"] and metrics["leniency"]["sentences"][-1].startswith("warning"):
        yield "Let two judges score some of the same prompts: their leniency can then be corrected.", None


def _thresholds(metrics: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    groups = summary.groups_of_types(metrics)
    return [(group["evaluation_type"], group["threshold"]) for group in groups if group["threshold"]]


# --- tables -----------------------------------------------------------------------------------------------------------

Table = dict[str, Any]
"""For the template: `columns` as (header, whether a narrow screen leaves it out) and `rows` of (value, small print)."""


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> Table:
    wide = {*summary.OPTIONAL[:-1], "bias"}  # the two most important columns fit on any screen
    return {
        "columns": [(column, column in wide) for column in columns],
        "rows": [[_cell(cell) for cell in row] for row in rows],
        "words": words,
    }


def _cell(text: str) -> tuple[str, str]:
    """Put an interval below its value, so that values are aligned."""
    value, bracket, rest = text.partition(" [")
    return (value, f"[{rest}") if bracket else (text, "")


def _main_groups(metrics: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [metrics["groups"][0], *summary.groups_of_types(metrics)]


def _breakdowns(metrics: Mapping[str, Any]) -> list[tuple[str, list[list[str]]]]:
    found = [(key, summary.breakdown_table(values)) for key, values in metrics["breakdowns"].items() if values]
    return found[: max(_TABLES_OF_GROUPS, len(metrics["asked_breakdowns"]))]


def _robustness(robustness: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    if robustness is None:
        return None
    meanings = {each["probe"]: each["meaning"] for each in robustness["probes"]}
    table = _table(ROBUSTNESS_COLUMNS, robustness_table(robustness))
    return {"table": table, "meanings": meanings, "notes": robustness_notes(robustness)}


def _abstention(metrics: Mapping[str, Any]) -> Table | None:
    rows = [
        [
            summary.group_name(group),
            format_estimate(judge["aurc_random"], ".3f", interval=False),
            *(format_estimate(judge["surest"][share], ".3f", interval=False) for share in ("0.9", "0.75", "0.5")),
            format_estimate(judge["aurc"], ".3f"),
            percent(judge["abstention_closed"]),
        ]
        for group in _main_groups(metrics)
        if (judge := group["judge"])["aurc"]["value"] is not None
    ]
    columns = ("scores of", "all", "most certain 90 %", "most certain 75 %", "most certain 50 %", "AURC", "gap closed")
    return _table(columns, rows) if rows else None


def _bad_steps(metrics: Mapping[str, Any]) -> Table:
    columns = (
        "scores of",
        "below",
        "bad",
        "AUROC",
        "AP",
        "recall",
        "precision",
        "Brier",
        "base rate",
        "ECE",
        "by chance",
    )
    rows = []
    for group in _main_groups(metrics):
        for threshold, of_threshold in group["judge"]["bad_step"].items():
            share = of_threshold["bad_share"]["value"]
            rows.append(
                [
                    summary.group_name(group),
                    threshold,
                    percent(of_threshold["bad_share"]),
                    *(format_estimate(of_threshold[name]) for name in ("auroc", "average_precision")),
                    *(percent(of_threshold[name]) for name in ("recall", "precision")),
                    format_estimate(of_threshold["brier"]),
                    NONE if share is None else f"{share * (1 - share):.2f}",
                    format_estimate(of_threshold["ece"]),
                    format_estimate(of_threshold["ece_by_chance"], interval=False),
                ]
            )
    return _table(columns, rows)


def _baselines(metrics: Mapping[str, Any]) -> Table:
    rows = []
    for group in _main_groups(metrics):
        name, baselines = summary.group_name(group), group["baselines"]
        rows.append([name, "this judge", *_brief(group["judge"])])
        rows += [[name, f"this judge against {judge} alone", *_brief(of)] for judge, of in group["against"].items()]
        rows.append([name, "constant", *_brief(baselines["constant"])])
        for ranking, words in (("length", "ranking by length"), ("position", "ranking by position")):
            if ranking in baselines:
                order = baselines[ranking][ORDER]
                rows.append([name, words, str(order["n"]), format_estimate(order), NONE, NONE, NONE])
        if copying := baselines.get("copy"):
            rows.append([name, f"copying the {copying['copied']} score of the prompt", *_brief(copying["copy"])])
            rows.append([name, "this judge on the same scores", *_brief(copying["judge"])])
        if base := baselines.get("base_model"):
            rows.append([name, "base model", *_brief(base["base"])])
    return _table(("scores of", "who", "n", "Spearman", "RMSE", "MAE", "bias"), rows, words=2)


def _brief(of: Mapping[str, Any]) -> list[str]:
    return [str(of["rmse"]["n"]), *(format_estimate(of.get(name)) for name in (ORDER, "rmse", "mae", "bias"))]


def _judges(metrics: Mapping[str, Any]) -> Table | None:
    rows = []
    for group in _main_groups(metrics):
        bounds = group["ceiling"]["bounds"][ORDER]
        for pair in group["ceiling"]["pairs"]:
            rows.append(
                [
                    summary.group_name(group),
                    " and ".join(pair["judges"]),
                    str(pair["mae"]["n"]),
                    format_estimate(pair[ORDER]),
                    format_estimate(pair["mae"]),
                    format_estimate(pair["bias"]),
                    format_estimate(bounds["mean_judge"], interval=False),
                    format_estimate(bounds["mean_judge_by_self"], interval=False),
                ]
            )
    columns = ("scores of", "judges", "n", "Spearman", "MAE", "bias", "noise bound", "bound by self-agreement")
    return _table(columns, rows, words=2) if rows else None


def _trajectories(trajectory: Mapping[str, Any]) -> Table | None:
    rows = [
        [name, who, *(format_estimate(of[side][metric]) for metric in ("spearman", "pearson", "auroc"))]
        for name, of in trajectory["aggregates"].items()
        for who, side in (("this judge", "judge"), ("judges' mean", "reference"))
    ]
    columns = ("steps combined by", "step scores by", "Spearman", "Pearson", "AUROC, wrong answer")
    return _table(columns, rows, words=2) if trajectory["with_outcome"] else None


def _first_errors(trajectory: Mapping[str, Any]) -> Table | None:
    rows = [
        [
            threshold,
            format_estimate(of["f1"]),
            f"{of['found']} of {of['with_bad_step']}",
            f"{of['cleared']} of {of['without_bad_step']}",
        ]
        for threshold, of in trajectory["first_bad_step"].items()
    ]
    columns = ("bad is below", "ProcessBench F1", "first bad step found", "error-free recognised")
    return _table(columns, rows) if trajectory["trajectories"] else None


# --- the worst errors -------------------------------------------------------------------------------------------------


def worst_errors(scores: Scores, rows: Sequence[Row], held_out: HeldOut) -> list[dict[str, Any]]:
    """Return the largest errors with the judged text and the judges' answers, one entry per prompt."""
    prompts = {prompt.prompt_sha256: prompt for prompt in held_out.prompts}
    worst = np.argsort(-np.abs(scores.predicted - scores.reference), kind="stable")
    found: dict[str, dict[str, Any]] = {}
    for place in worst:
        prompt = prompts.get(scores.prompt[place])
        if prompt is None or prompt.prompt_sha256 in found:
            continue
        row = rows[int(scores.row[place])]
        found[prompt.prompt_sha256] = {
            "task": prompt.task,
            "what": " · ".join(filter(None, [prompt.evaluation_type, _clip(prompt.clip_number)])),
            "key": scores.key[place],
            "judge": scores.predicted[place],
            "std": scores.std[place] if np.isfinite(scores.std[place]) else None,
            "reference": scores.reference[place],
            "step": _step_of(prompt.prompt),
            "prompt": prompt.prompt[:_WHOLE_PROMPT] + " …" * (len(prompt.prompt) > _WHOLE_PROMPT),
            "answers": {judge: _shortened(answer, 1200) for judge, answer in prompt.answers.items()},
            "text": _shortened(row["text"], 1200) if row["text"] else None,
        }
        if len(found) == WORST_ERRORS:
            break
    return list(found.values())


def _clip(number: int | None) -> str | None:
    return None if number is None else f"clip {number}"


def _step_of(prompt: str) -> str:
    """Return the part of the prompt with the step: from its heading on; without a heading, all before the schema."""
    shown = prompt[: prompt.rfind("\n", 0, asked[-1].start())] if (asked := list(_SCHEMA.finditer(prompt))) else prompt
    if headings := list(_STEP.finditer(shown)):
        return _shortened(shown[headings[-1].start() :], _EXCERPT)
    return ("… " if len(shown) > _EXCERPT else "") + shown[-_EXCERPT:]


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else text[:most].rstrip() + " …"


# --- method -----------------------------------------------------------------------------------------------------------


def _method(metrics: Mapping[str, Any]) -> dict[str, str]:
    method, held_out = metrics["method"], metrics["held_out"]
    return {
        "Reference": method["reference"],
        "Leniency": "; ".join(metrics["leniency"]["sentences"]) or "one judge, or no shared scores to compare",
        "Score": method["score"],
        "Intervals": f"{method['interval']}, {method['resamples']} resamples, from {method['min_tasks']} tasks "
        "(Field and Welsh 2007; Hesterberg 2015)",
        "Spearman": "rho within each key, averaged over keys; metrics.json also has it pooled",
        "Correlations": f"none with fewer than {method['min_scores']} scores, or if all values are equal",
        "Pairs": "accuracy with ties and tie calibration, by run (Deutsch, Foster and Freitag 2023), from 30 pairs",
        "Noise bound": "square root of the reliability of the reference (Spearman 1904; Spearman 1910, Brown 1910)",
        "ECE": "ten bins of equal width (Guo et al. 2017); by chance: the expected ECE of a perfectly calibrated judge",
        "AURC": "area under the risk-coverage curve (Geifman et al. 2019); gap closed: the fraction of the gap "
        "between random abstention and abstention by the true error",
        "Kappa": "quadratic weights (Cohen 1968), band edges 0.2, 0.4, 0.6, 0.8",
        "First bad step": "harmonic mean of the two accuracies (ProcessBench, Zheng et al. 2024)",
        "Smallest visible loss": "one-sided 5 %, power 80 %, for two judges whose errors correlate by one half",
        "Held-out data": f"{held_out['rows']} rows, {held_out['prompts']} prompts, hash {held_out['sha256'][:16]}",
        "Statuses": ", ".join(f"{status} {n}" for status, n in metrics["validity"][ALL]["statuses"].items()),
        "Judge": ", ".join(f"{key} {value}" for key, value in metrics["judge"].items() if value not in (None, "")),
    }
