"""The report: self-contained, safe with hostile strings, and saying what the metrics say."""

import importlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from synthetic import CONSTANTS, constant, copier, noisy, predictions_of, write_data_folder

from prmkit import cli
from prmkit.evaluation import grade, statistics, summary
from prmkit.evaluation.evaluate import metrics_of
from prmkit.evaluation.heldout import HeldOut, read_held_out
from prmkit.evaluation.metrics import METRICS, Metric
from prmkit.evaluation.plots import _distributions, _means, plots
from prmkit.evaluation.predictions import by_mean, table_of_scores
from prmkit.evaluation.report import report_html, worst_errors, write_report
from prmkit.intervals import format_estimate
from prmkit.rows import OUTCOME

JUDGE = {"model": "model", "adapter": "saves/a_run", "template": "qwen"}
HOSTILE = "<script>alert('x')</script> $\\frac{1}{2}$ & \"判官\" </svg>"


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> HeldOut:
    return read_held_out(write_data_folder(tmp_path_factory.mktemp("data"), tasks=14), "reward_model_full_eval")


def measured(held_out: HeldOut, rows: list[dict]) -> dict:
    return {"judge": JUDGE, "mode": "expected"} | metrics_of(rows, None, held_out, CONSTANTS)


def report_of(held_out: HeldOut, rows: list[dict], judges: list[str] | None = None) -> tuple[str, dict]:
    metrics = measured(held_out, rows)
    scores = table_of_scores(rows, judges or held_out.judges, CONSTANTS)
    return report_html(metrics, plots(metrics, scores), worst_errors(scores, rows, held_out)), metrics


def without_plots(metrics: dict) -> str:
    """The report's words and tables: to draw the plots takes nearly all of its time."""
    return report_html(metrics, [], [])


@pytest.fixture(scope="module")
def reported(held_out: HeldOut) -> tuple[str, dict]:
    return report_of(held_out, predictions_of(held_out, noisy(0.12)))


class _Reader(HTMLParser):
    """Collects what a browser would see."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href", "action") and value]

    def handle_data(self, data):
        self.texts.append(data)


def read(html: str) -> _Reader:
    reader = _Reader()
    reader.feed(html)
    return reader


def test_it_refers_to_nothing_outside_of_itself(reported):
    html, _ = reported
    reader = read(html)
    assert all(address.startswith(("#", "data:")) for address in reader.addresses)
    assert not {"script", "link", "iframe", "img"} & set(reader.tags)
    assert "@import" not in html and "@font-face" not in html


def test_every_plot_is_whole_and_their_ids_do_not_clash(reported):
    html, _ = reported
    drawn = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(drawn) == 7
    referred: list[set[str]] = []
    for plot in drawn:
        ElementTree.fromstring(plot)
        referred.append(set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", plot)))
    ids = [set(re.findall(r'\bid="([^"]+)"', plot)) for plot in drawn]
    for number, needed in enumerate(referred):
        assert needed <= ids[number]
        assert not any(needed & others for other, others in enumerate(ids) if other != number)


def test_plots_are_about_all_prompts_that_the_chosen_ones_represent(held_out):
    scores = table_of_scores(predictions_of(held_out, noisy(0.12)), held_out.judges, CONSTANTS)
    weight = np.random.default_rng(0).integers(1, 6, len(scores)).astype(float)
    often = scores.where(np.repeat(np.arange(len(scores)), weight.astype(int)))
    chosen = replace(scores, weight=weight / 3, judge_weights=np.stack([weight, weight], axis=1))
    titles = [
        re.findall(r"mean [\d.]+, standard deviation [\d.]+", _distributions(each, held_out.judges))
        for each in (chosen, often, scores)
    ]
    assert titles[0] == titles[1] != titles[2]
    (mean,), (error,) = _means([(scores.predicted, weight)])
    assert mean == pytest.approx(often.predicted.mean())
    (_,), (of_equal,) = _means([(scores.predicted, scores.weight)])
    assert of_equal == pytest.approx(1.96 * np.std(scores.predicted, ddof=1) / len(scores) ** 0.5)
    assert error > of_equal  # fewer effective scores


def test_the_verdict_comes_before_the_numbers_and_says_what_they_say(reported):
    html, metrics = reported
    text = " ".join(read(html).texts)
    spearman = next(g for g in metrics["groups"] if g["evaluation_type"] == "clip")["judge"][summary.ORDER]
    assert format_estimate(spearman) in text[: text.index("The numbers")]
    assert metrics["summary"]["headline"] in text
    for conclusion in grade.conclusions(metrics):
        assert conclusion.headline in text
        assert all(condition.sentence in text for condition in conclusion.conditions)
        assert all(note in text for note in conclusion.notes)


def test_it_is_about_the_judge_and_explains_the_evaluation_types(reported):
    html, _ = reported
    assert "<title>a_run: how good is this judge?</title>" in html
    text = " ".join(read(html).texts)
    assert "one step of a run" in text and "a whole run" in text
    assert "What to do next" in text and "python evaluate_judge.py --run saves/NEW --compare saves/a_run" in text
    assert "precision" in text and "recall" in text


def test_the_worst_errors_are_shown_with_what_was_judged_and_what_the_judges_wrote(held_out, reported):
    html, _ = reported
    rows = predictions_of(held_out, noisy(0.12))
    scores = table_of_scores(rows, held_out.judges, CONSTANTS)
    errors = worst_errors(scores, rows, held_out)
    assert len(errors) == 10
    gaps = [abs(error["judge"] - error["reference"]) for error in errors]
    assert gaps == sorted(gaps, reverse=True) and gaps[0] == max(abs(scores.predicted - scores.reference))
    text = " ".join(read(html).texts)
    for error in errors:
        assert error["step"].split("\n")[0] in text
        assert all(answer in text for answer in error["answers"].values())


def test_the_columns_of_a_narrow_screen_hold_spearman_and_auroc(reported):
    html, _ = reported
    main = html[html.index("The numbers") :]
    headers = re.findall(r"<th( class=\"roomy\")?>(.*?)</th>", main[: main.index("</thead>")])
    assert [name for hidden, name in headers if not hidden] == ["scores of", "Spearman", "AUROC"]


@pytest.mark.parametrize(("width", "kept"), [(80, ("Spearman", "AUROC", "skill")), (60, ("Spearman",))])
def test_the_table_on_a_terminal_fits_by_leaving_columns_out(reported, monkeypatch, capsys, width, kept):
    _, metrics = reported
    lines = _shown(metrics, monkeypatch, capsys, width)
    assert max(map(len, lines)) <= width
    assert all(name in lines[0] for name in kept)


def test_one_entry_in_the_table_of_metrics_is_enough(held_out, monkeypatch, capsys):
    made_up = Metric("largest_error", statistics.mean_absolute_error, 1, by_mean, "made up", "what a stranger adds")
    nowhere = Metric("hidden_error", statistics.mean_absolute_error, 1, by_mean)
    try:
        with monkeypatch.context() as patch:
            patch.setattr("prmkit.evaluation.metrics.METRICS", (*METRICS, made_up, nowhere))
            importlib.reload(summary)
            metrics = measured(held_out, predictions_of(held_out, noisy(0.1)))
            html = without_plots(metrics)
            assert {"largest_error", "hidden_error"} <= json.loads(json.dumps(metrics))["groups"][0]["judge"].keys()
            main = html[html.index("The numbers") :]
            assert '<th class="roomy">made up</th>' in main and "what a stranger adds" in main
            assert "hidden_error" not in html
            shown_at = {width: _shown(metrics, patch, capsys, width)[0] for width in (None, 100)}
    finally:
        importlib.reload(summary)
    assert "made up" in shown_at[None] and "hidden_error" not in shown_at[None]
    assert "made up" not in shown_at[100] and "AUROC" in shown_at[100]


def _shown(metrics, patch, capsys, width: int | None) -> list[str]:
    """The lines of the table on a terminal of some width."""
    patch.setattr("prmkit.cli._width", lambda stream: width)
    cli.emit_table("", summary.COLUMNS, summary.main_table(metrics), optional=summary.OPTIONAL)
    return capsys.readouterr().out.splitlines()


def test_without_a_judged_outcome_the_report_says_which_score_is_missing(held_out):
    rows = predictions_of(held_out, noisy(0.1))
    for row in rows:
        row["reference"] = {key.replace(OUTCOME, "another_key"): value for key, value in row["reference"].items()}
    text = " ".join(" ".join(read(without_plots(measured(held_out, rows))).texts).split())
    assert f"0 with a judged {OUTCOME}" in text
    assert (
        f"How well step scores predict the outcome is unknown, because none of these runs has a judged {OUTCOME}"
        in text
    )


def test_every_empty_cell_of_the_table_has_a_reason(held_out):
    rows = [row for row in predictions_of(held_out, noisy(0.1)) if row["evaluation_type"] == "category"][:12]
    metrics = measured(held_out, rows)
    of_pairs = metrics["groups"][0]["judge"]["pairwise_accuracy"]
    assert of_pairs["value"] is None
    assert f"everything: {of_pairs['reason']}" in summary.missing_reasons(metrics)


def test_hostile_names_stay_strings(held_out):
    rows = predictions_of(held_out, noisy(0.1))
    renamed = []
    for row in rows:
        references = {HOSTILE if name == "deepseek-chat" else name: given for name, given in row["references"].items()}
        scores = {HOSTILE if key == "correctness_score" else key: given for key, given in row["scores"].items()}
        means = {HOSTILE if key == "correctness_score" else key: given for key, given in row["reference"].items()}
        texts = {"references": references, "scores": scores, "reference": means}
        renamed.append(row | texts | {"task_id": HOSTILE + row["task_id"]})
    renamed[0] |= {"status": "error", "reason": HOSTILE, "scores": {}}
    html, _ = report_of(held_out, renamed, [HOSTILE, "kimi-k2-0711-preview"])
    reader = read(html)
    assert "script" not in reader.tags
    assert html.count("<svg") == html.count("</svg>") == 7
    assert any(HOSTILE in text for text in reader.texts)


def test_plots_are_drawn_also_where_there_is_little(held_out):
    for rows in (predictions_of(held_out, constant())[:1], predictions_of(held_out, noisy(0.1), mode="generate")[:7]):
        html, metrics = report_of(held_out, rows)
        assert "<svg" in html
        assert "nan" not in " ".join(read(html).texts).lower()
        assert summary.main_table(metrics)


def renamed(rows: list[dict], names: list[str]) -> list[dict]:
    """The same predictions with other evaluation types, each of them as often."""
    return [row | {"evaluation_type": names[number % len(names)]} for number, row in enumerate(rows)]


@pytest.mark.slow
@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize(
    "names", [["_hidden", "_other"], ["k" * 3000, "clip"], [f"evaluation type number {n}" for n in range(9)]]
)
def test_plots_are_legible_whatever_and_however_many_the_evaluation_types_are(held_out, names):
    html, _ = report_of(held_out, renamed(predictions_of(held_out, noisy(0.1)), names))
    assert "kkkkk" * 20 not in "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    hexbin, _, calibration, *_ = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert all(name in calibration for name in names if len(name) < 50)
    width, height = map(float, re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', hexbin).groups())
    assert width < 1000
    assert height > 500 or len(names) < 5


def test_the_agreement_of_many_judges_is_that_of_all_their_pairs(reported):
    _, metrics = reported
    group = json.loads(json.dumps(metrics["groups"][0]))
    (pair,) = group["ceiling"]["pairs"]
    assert summary.judges_agreement(group) == pair[summary.ORDER]
    values = [0.8, 0.2, None]
    group["ceiling"]["pairs"] = [{summary.ORDER: pair[summary.ORDER] | {"value": value}} for value in values]
    mean = summary.judges_agreement(group)
    assert mean["value"] == pytest.approx(0.5)
    assert mean["pairs"] == 2
    assert mean["low"] is None
    assert "The Spearman correlation of two judges is 0.50 on average over 2 pairs" in summary.ceiling_sentence(group)


def test_the_report_of_a_copier_says_so_at_the_top(held_out):
    html = without_plots(measured(held_out, predictions_of(held_out, copier())))
    assert "repeats the scores that the prompt shows" in html[: html.index("<h2>")]


@pytest.mark.slow
def test_the_same_evaluation_gives_the_same_file(held_out, tmp_path):
    rows = predictions_of(held_out, noisy(0.1))[:30]
    metrics = measured(held_out, rows)
    for name in ("one.html", "two.html"):
        write_report(tmp_path / name, metrics, rows, held_out, CONSTANTS)
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()
