"""The report: whole by itself, safe with hostile texts, and saying what the figures say."""

import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from synthetic import MEDIANS, constant, copier, noisy, predictions_of, write_data_folder

from prmkit.evaluation import summary
from prmkit.evaluation.heldout import HeldOut, read_held_out
from prmkit.evaluation.metrics import metrics_of
from prmkit.evaluation.predictions import table_of_scores
from prmkit.evaluation.report import report_html, write_report

JUDGE = {"model": "model", "adapter": "saves/a_run", "template": "qwen"}
HOSTILE = "<script>alert('x')</script> $\\frac{1}{2}$ & \"判官\" </svg>"


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> HeldOut:
    return read_held_out(write_data_folder(tmp_path_factory.mktemp("data"), tasks=14), "reward_model_full_eval")


def report_of(held_out: HeldOut, rows: list[dict], judges: list[str] | None = None) -> tuple[str, dict]:
    metrics = {"judge": JUDGE, "mode": "expected"} | metrics_of(rows, None, held_out, MEDIANS)
    return report_html(metrics, table_of_scores(rows, judges or held_out.judges, MEDIANS)), metrics


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


def test_every_picture_is_whole_and_their_ids_do_not_clash(reported):
    html, _ = reported
    pictures = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(pictures) == 6
    referred: list[set[str]] = []
    for picture in pictures:
        ElementTree.fromstring(picture)
        referred.append(set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", picture)))
    ids = [set(re.findall(r'\bid="([^"]+)"', picture)) for picture in pictures]
    for number, needed in enumerate(referred):
        assert needed <= ids[number]
        assert not any(needed & others for other, others in enumerate(ids) if other != number)


def test_the_verdict_stands_before_the_figures_and_says_what_they_say(reported):
    html, metrics = reported
    text = " ".join(read(html).texts)
    spearman = next(g for g in metrics["groups"] if g["evaluation_type"] == "clip")["judge"][summary.ORDER]
    assert summary.shown(spearman) in text[: text.index("Figures")]
    for conclusion in summary.conclusions(metrics):
        assert conclusion.headline in text
        assert all(sentence in text for sentence in conclusion.sentences)


def test_hostile_names_stay_texts(held_out):
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
    assert html.count("<svg") == html.count("</svg>") == 6
    assert any(HOSTILE in text for text in reader.texts)


def test_a_picture_is_drawn_also_where_there_is_little(held_out):
    for rows in (predictions_of(held_out, constant())[:1], predictions_of(held_out, noisy(0.1), mode="generate")[:7]):
        html, metrics = report_of(held_out, rows)
        assert "<svg" in html
        assert "nan" not in " ".join(read(html).texts).lower()
        assert summary.main_table(metrics)


def renamed(rows: list[dict], names: list[str]) -> list[dict]:
    """The same predictions with other evaluation types, each of them as often."""
    return [row | {"evaluation_type": names[number % len(names)]} for number, row in enumerate(rows)]


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize(
    "names", [["_hidden", "_other"], ["k" * 3000, "clip"], [f"evaluation type number {n}" for n in range(9)]]
)
def test_pictures_are_legible_whatever_and_however_many_the_evaluation_types_are(held_out, names):
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
    assert "two judges agree with each other at 0.50 on average over 2 pairs" in " ".join(summary._sentences(group))


def test_the_report_of_a_copier_says_so_at_the_top(held_out):
    html, _ = report_of(held_out, predictions_of(held_out, copier()))
    assert "repeats the scores that stand in the prompt" in html[: html.index("<h2>")]


def test_the_same_evaluation_gives_the_same_file(held_out, tmp_path):
    rows = predictions_of(held_out, noisy(0.1))[:30]
    metrics = {"judge": JUDGE, "mode": "expected"} | metrics_of(rows, None, held_out, MEDIANS)
    scores = table_of_scores(rows, held_out.judges, MEDIANS)
    for name in ("one.html", "two.html"):
        write_report(tmp_path / name, metrics, scores)
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()
