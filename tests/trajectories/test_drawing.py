"""Scored runs on the terminal and on a page."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from prmkit.trajectories.drawing import MOST_RUNS_ON_A_PAGE, ScoredRun, emit_scored, scored_run, write_run_page
from prmkit.trajectory import Call, Message, Result, Step, Trajectory

EVIL = '<script>alert("x")</script>'


def scored(*scores: float | None, name: str = "r") -> ScoredRun:
    steps = tuple(
        Step(n, f"{EVIL} {n}", calls=(Call("look", {"at": EVIL}, "c"),) if n == 1 else (),
             results=(Result(EVIL, "c", error=True),), incoming=(Message(EVIL, EVIL),), agent=EVIL)
        for n in range(1, len(scores) + 1)
    )  # fmt: skip
    results = [
        {"score": score, "label_mass": 0.9, "reason": None if score is not None else "too long",
         "metadata": {"clip_number": n}}
        for n, score in enumerate(scores, start=1)
    ]  # fmt: skip
    return scored_run(Trajectory(name, "t", f"Find it. {EVIL}", steps), reversed(results), 0.5)


def test_scores_are_put_to_their_steps() -> None:
    run = scored(0.9, None, 0.4, 0.1)
    assert [each.score for each in run.steps] == [0.9, None, 0.4, 0.1]
    assert run.first_bad == 3 and run.worst and run.worst.step.n == 4
    assert scored(None).first_bad is None and scored(None).worst is None
    assert scored(0.5).first_bad is None


def test_a_table_of_steps_marks_the_first_bad_one(capsys: pytest.CaptureFixture[str]) -> None:
    emit_scored([scored(0.9, 0.4, None, 0.1)])
    lines = capsys.readouterr().out.splitlines()
    (marked,) = [line for line in lines if "first bad step" in line]
    assert marked.split()[:2] == ["2", "0.40"]
    assert any("step 3 has no score: too long" in line for line in lines)


def test_a_step_is_not_the_first_bad_one_for_sure_after_one_without_a_score_that_holds() -> None:
    run = scored(0.9, None, 0.4, 0.1)
    assert [run.mark(each) for each in run.steps] == ["", "", "first known bad step", ""]
    unsure = replace(run, steps=[replace(run.steps[0], is_unsure=True), *run.steps[2:]])
    assert unsure.mark(unsure.steps[0]) == "unsure"


def test_a_table_of_runs_begins_with_the_worst(capsys: pytest.CaptureFixture[str]) -> None:
    emit_scored([scored(0.9, name="good"), scored(0.9, 0.1, name="bad"), scored(None, name="none")])
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines if line.split() and line.split()[0] in ("good", "bad", "none")]
    assert names == ["bad", "good", "none"]


def test_the_page_shows_every_step_and_opens_the_worst(tmp_path: Path) -> None:
    write_run_page(tmp_path / "page.html", [scored(0.9, None, 0.4, 0.1)], "saves/x")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert re.findall(r'<details id="run-1-step-(\d)"( open)?>', page) == [
        ("1", ""),
        ("2", ""),
        ("3", ""),
        ("4", " open"),
    ]
    assert (
        page.count("first bad step") == page.count("first known bad step") == 1
    )  # in the line below the heading, and at the step
    assert "too long" in page and "saves/x" in page and "0.90" in page
    assert 'href="#run-1-step-3"' in page


def test_nothing_from_a_run_becomes_markup(tmp_path: Path) -> None:
    write_run_page(tmp_path / "page.html", [scored(0.9, 0.2)], EVIL)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page


def test_a_page_is_bounded_and_says_so(tmp_path: Path) -> None:
    write_run_page(tmp_path / "page.html", [scored(0.9, name=str(n)) for n in range(MOST_RUNS_ON_A_PAGE + 3)], "x")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<h2>") == MOST_RUNS_ON_A_PAGE and "3 more runs" in page


def test_long_texts_are_cut_on_the_page(tmp_path: Path) -> None:
    run = Trajectory("r", "t", "x" * 500_000, (Step(1, "y" * 500_000),))
    write_run_page(tmp_path / "page.html", [scored_run(run, [], 0.5)], "x")
    assert (tmp_path / "page.html").stat().st_size < 40_000
