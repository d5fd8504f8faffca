"""Which of two judges is better, and whether scores drift: intervals that hold, and gates that close when blind."""

import json
import random
import subprocess
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from registry_fixtures import make_rows, make_run

from prmkit import registered
from prmkit.errors import DataError, UsageError
from prmkit.intervals import confidence_sequence
from prmkit.judge.scorer import ShapeOf
from prmkit.layouts import Line
from prmkit.registry.monitor import (
    LoggedStep,
    compare_judges,
    drift_of,
    read_outcomes,
    read_scored,
    show_ab,
    steps_of,
)
from prmkit.scoring.rows import read_rows
from prmkit.serving.request_log import RequestLog
from prmkit.trajectory import log_id


def scored(folder: Path, name: str, scores: list[float], **more: Any) -> Path:
    """An output of score_trajectories.py: two steps a run, one run a task."""
    lines = [
        {"id": f"r{n // 2}#{n % 2}", "scores": {"k": score}, "score": score, "std": 0.1, "label_mass": 0.95,
         "status": "ok", "request_hash": f"h{n}",
         "metadata": {"trajectory_id": f"r{n // 2}", "task_id": f"t{n // 2}"}, **more}
        for n, score in enumerate(scores)
    ]  # fmt: skip
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_confidence_sequence_holds_at_all_times_and_shrinks() -> None:
    """With many looks, an ordinary 95 % interval would miss the mean in far more than one of twenty sequences."""
    rng = random.Random(0)
    missed = 0
    for _ in range(200):
        mean = rng.uniform(-0.5, 0.5)
        values = [max(-1.0, min(1.0, rng.choice([mean + 0.3, mean - 0.3]))) for _ in range(300)]
        looks = [confidence_sequence(values[:n]) for n in (3, 10, 30, 100, 300)]
        missed += any(not look["low"] <= mean <= look["high"] for look in looks)
        assert looks[-1]["high"] - looks[-1]["low"] < looks[0]["high"] - looks[0]["low"]
    assert missed <= 10
    assert confidence_sequence([1.0])["low"] >= -1 and confidence_sequence([1.0])["high"] <= 1


def test_a_judge_that_predicts_success_better_is_found_and_an_equal_one_is_not(tmp_path: Path) -> None:
    rng = random.Random(1)
    truth = [float(rng.random() < 0.5) for _ in range(300)]
    good = [min(1.0, max(0.0, 0.8 * value + 0.1)) for value in truth for _ in range(2)]
    blind = [0.5 for _ in truth for _ in range(2)]
    outcomes = tmp_path / "outcomes.jsonl"
    lines = [{"trajectory_id": f"r{n}", "outcome": {"success": bool(value)}} for n, value in enumerate(truth)]
    outcomes.write_text("".join(json.dumps(line) + "\n" for line in lines))
    steps = read_scored([scored(tmp_path, "a", blind), scored(tmp_path, "b", good)])
    found = compare_judges(steps, read_outcomes(outcomes))
    assert found["outcomes"]["decision"] == "stop: B predicts success better" and found["outcomes"]["tasks"] == 300
    assert found["widest"][0]["a"] == 0.5
    same = read_scored([scored(tmp_path, "a", blind), scored(tmp_path, "c", blind)])
    assert compare_judges(same, read_outcomes(outcomes))["outcomes"]["decision"].startswith("continue")
    few = [step for step in steps if int(step.id[1:].split("#")[0]) < 6]
    assert "more tasks" in compare_judges(few, read_outcomes(outcomes))["outcomes"]["decision"]


def outcomes_of(folder: Path, truth: Sequence[float]) -> Path:
    """The outcomes of the runs of `scored`."""
    path = folder / "outcomes.jsonl"
    lines = [{"trajectory_id": f"r{n}", "outcome": value} for n, value in enumerate(truth)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_tasks_are_compared_in_the_order_of_the_logs(tmp_path: Path) -> None:
    """A confidence sequence depends on the order of its values; a set has another one in every process."""
    rng = random.Random(3)
    truth, ones, others = ([rng.random() for _ in range(60)] for _ in range(3))
    files = [scored(tmp_path, name, [score for score in scores for _ in range(2)])
             for name, scores in (("a", ones), ("b", others))]  # fmt: skip
    found = compare_judges(read_scored(files), read_outcomes(outcomes_of(tmp_path, truth)))
    gains = [(a - o) ** 2 - (b - o) ** 2 for a, b, o in zip(ones, others, truth, strict=True)]
    assert found["outcomes"]["gain_of_b"] == confidence_sequence(gains) != confidence_sequence(gains[::-1])


def test_only_runs_that_both_judges_scored_completely_are_compared(tmp_path: Path) -> None:
    """Two equal judges: one that lacks the step that went wrong must not look worse."""
    a = scored(tmp_path, "a", [0.9, 0.1] * 40)
    outcomes = read_outcomes(outcomes_of(tmp_path, [0.0] * 40))
    lines = [json.loads(line) for line in a.read_text().splitlines()]

    def against(others: list[dict[str, Any]]) -> Any:
        path = tmp_path / "b.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in others))
        return compare_judges(read_scored([a, path]), outcomes)["outcomes"]

    cut = against(lines[::2])
    assert (cut["runs"], cut["gain_of_b"]) == (0, None) and "completely" in cut["decision"]
    assert against(lines[:20])["runs"] == 10
    assert against([*lines[:2], lines[2] | {"status": "unsure"}, *lines[3:]])["runs"] == 39
    unreadable = {"request_hash": None, "status": "error", "score": None, "scores": {}}
    assert against([line | (unreadable if n in (1, 3) else {}) for n, line in enumerate(lines)])["runs"] == 38
    other_words = [line | {"request_hash": f"x{line['request_hash']}"} for line in lines]
    assert against(other_words)["runs"] == 40 and against(other_words[1:])["runs"] == 39
    same_first_step = [line | {"request_hash": "h0"} if n % 2 == 0 else line for n, line in enumerate(lines)]
    a.write_text("".join(json.dumps(line) + "\n" for line in same_first_step))
    assert against(same_first_step[:-2] + same_first_step[-1:])["runs"] == 39


KINDS = ((None, 0.9, 0.9), ("clip", 0.8, 0.8), ("category", 0.1, 0.9), ("final", 0.1, 0.9))
"""Evaluation type, score of judge a, score of judge b."""


def outputs_with_types(folder: Path) -> list[Path]:
    for number, name in enumerate("ab"):
        lines = [
            {"id": kind, "scores": {"k": scores[number]}, "score": scores[number], "status": "ok",
             "request_hash": f"{kind}", "metadata": {"trajectory_id": "r0", "evaluation_type": kind}}
            for kind, *scores in KINDS
        ]  # fmt: skip
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [folder / "a", folder / "b"]


def log_with_types(folder: Path) -> list[Path]:
    """A log as serve_judge.py writes it."""
    request_log = RequestLog(folder / "log.jsonl")
    with request_log.writing():
        for kind, *scores in KINDS:
            value = {"prompt": f"Judge {kind}.", "metadata": {"trajectory_id": "r0", "evaluation_type": kind}}
            text = json.dumps(value).encode()
            (row,) = read_rows([Line(1, text, len(text))], ShapeOf(("k",)))
            for judge, score in zip("ab", scores, strict=True):
                line = {"score": score, "std": 0.1, "label_mass": 0.9, "status": "ok"}
                request_log.add(row, line, judge, "production")
    return [request_log.file]


@pytest.mark.parametrize("write", [outputs_with_types, log_with_types])
def test_verdicts_on_categories_and_whole_runs_are_no_steps(
    tmp_path: Path, write: Callable[[Path], list[Path]]
) -> None:
    found = compare_judges(read_scored(write(tmp_path)), {"r0": 1.0})
    assert found["steps"] == 4
    assert (found["outcomes"]["runs"], found["outcomes"]["gain_of_b"]["value"]) == (1, 0.0)


def test_an_a_b_needs_two_judges_that_share_steps(tmp_path: Path) -> None:
    one = scored(tmp_path, "a", [0.5] * 4)
    with pytest.raises(UsageError, match="two judges"):
        compare_judges(read_scored([one]), None)
    unsure = scored(tmp_path, "b", [0.5] * 4, status="unsure")
    with pytest.raises(UsageError, match="no step was scored reliably by both"):
        compare_judges(read_scored([one, unsure]), None)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('\n{"x": 1}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:2"):
        read_scored([bad])
    bad.write_text('\n\n{"trajectory_id": "r", "outcome": 7}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:3: .*from 0 to 1"):
        read_outcomes(bad)
    good = tmp_path / "good.jsonl"
    good.write_text('{"trajectory_id": "r", "outcome": {"success": true, "score": 0.4}}\n')
    assert read_outcomes(good)["r"] == 1.0  # as evaluate_judge.py --best-of-n reads it


@pytest.mark.parametrize("value", [5, 1.01, True, -1, "0.5", 1e308, [0.5]])
@pytest.mark.parametrize("name", ["score", "label_mass"])
def test_a_score_that_is_none_is_rejected_with_its_line(tmp_path: Path, name: str, value: Any) -> None:
    good = scored(tmp_path, "good", [0.0, 1.0])
    bad = tmp_path / "bad.jsonl"
    bad.write_text(good.read_text() + json.dumps(json.loads(log_line(3, "a", 0.5)) | {name: value}) + "\n")
    with pytest.raises(DataError, match=rf"bad\.jsonl:3: {name} is .*, not a number from 0 to 1"):
        read_scored([good, bad])
    assert len(read_scored([good])) == 2


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [("metadata", "x", "an object"), ("keys", 3, "a list of names"), ("keys", "ab", "a list of names"),
     ("keys", [1], "a list of names"), ("scores", 3, "an object"), ("characters", "9", "a count"),
     ("status", {}, "text"), ("prompt", 1, "text"), ("time", 1, "text"), ("is_step", "no", "true or false")],
)  # fmt: skip
def test_a_field_of_another_type_is_rejected_with_its_line(tmp_path: Path, name: str, value: Any, what: str) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(log_line(2, "a", 0.5) + json.dumps(json.loads(log_line(3, "a", 0.5)) | {name: value}) + "\n")
    with pytest.raises(DataError, match=rf"bad\.jsonl:2: {name} is .*, not {what}"):
        read_scored([bad])


def test_two_outcomes_of_one_run_are_rejected(tmp_path: Path) -> None:
    file = tmp_path / "outcomes.jsonl"
    same = '{"trajectory_id": "my run", "outcome": true}\n{"trajectory_id": "my run", "outcome": 1}\n'
    file.write_text(same)
    assert read_outcomes(file)["my run"] == 1.0
    file.write_text(same + '{"trajectory_id": "my run", "outcome": 0}\n')
    with pytest.raises(DataError, match=r"outcomes\.jsonl:3: my run has a different outcome"):
        read_outcomes(file)


def test_a_run_and_a_task_may_be_called_nought(tmp_path: Path) -> None:
    """In scoring outputs, ids are as the user wrote them."""
    files = []
    for name, score in (("a", 0.5), ("b", 0.9)):
        lines = [{"id": n, "scores": {"k": score}, "score": score, "status": "ok", "request_hash": f"h{n}",
                  "metadata": {"trajectory_id": n, "task_id": float(n // 2)}} for n in range(4)]  # fmt: skip
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(line) + "\n" for line in lines))
    outcomes = tmp_path / "outcomes.jsonl"
    outcomes.write_text("".join(json.dumps({"trajectory_id": n, "outcome": 1}) + "\n" for n in range(4)))
    steps = read_scored(files)
    assert {(step.trajectory, step.task) for step in steps} == {("0", "0"), ("1", "0"), ("2", "1"), ("3", "1")}
    found = compare_judges(steps, read_outcomes(outcomes))
    assert (found["tasks"], found["outcomes"]["tasks"], found["outcomes"]["runs"]) == (2, 2, 4)
    outcomes.write_text('{"trajectory_id": [0], "outcome": 1}\n')
    with pytest.raises(DataError, match=r"outcomes\.jsonl:1: trajectory_id is neither"):
        read_outcomes(outcomes)


def held_out(scores: list[float], key: str = "k") -> list[dict[str, Any]]:
    return [{"score": score, "status": "ok", "prompt_characters": 1000, "scores": {key: {"label_mass": 0.95}}}
            for score in scores]  # fmt: skip


def test_drift_is_found_and_sameness_is_not_called_drift(tmp_path: Path) -> None:
    rng = random.Random(2)
    then = [rng.random() for _ in range(600)]
    same = read_scored([scored(tmp_path, "same", [rng.random() for _ in range(600)])])
    found = drift_of(same, held_out(then), 0.25)
    assert not found["findings"] and not found["undecided"]
    assert {what: each["verdict"] for what, each in found["groups"]["k"].items()} == {
        "score": "stable",
        "label mass": "stable",
    }
    lower = read_scored([scored(tmp_path, "lower", [0.5 * rng.random() for _ in range(600)])])
    assert any("k: score (PSI" in each for each in drift_of(lower, held_out(then), 0.25)["findings"])
    unsure = read_scored([scored(tmp_path, "unsure", [0.5] * 600, status="unsure")])
    assert any("unsure" in each for each in drift_of(unsure, held_out([0.5] * 600), 0.25)["findings"])
    few = drift_of(same[:40], held_out(then), 0.25)
    assert few["undecided"] == ["k"] and not few["findings"]


def _keyed(folder: Path, counts: Mapping[str, int]) -> list[LoggedStep]:
    """Logged steps, as many per score key as named; the key `none` for lines without keys."""
    lines = [json.loads(log_line(n, "a", 0.99)) | {"keys": None if key == "none" else [key]}
             for key, count in counts.items() for n in range(count)]  # fmt: skip
    steps: list[LoggedStep] = _scored_lines(folder, lines)
    return steps


@pytest.mark.parametrize(
    ("counts", "undecided"),
    [
        ({f"k{n}": 40 for n in range(30)}, [f"k{n}" for n in range(30)]),
        ({"k": 500, **{f"k{n}": 40 for n in range(8)}}, [f"k{n}" for n in range(8)]),
        ({"k": 500, "k1": 40}, []),
        ({"k": 500, "none": 100}, ["steps without score keys"]),
        ({"k": 500, "none": 10}, []),
        ({"none": 100}, ["steps without score keys"]),
    ],
)
def test_small_groups_are_undecided_together(tmp_path: Path, counts: dict[str, int], undecided: list[str]) -> None:
    """A tenth of the steps may have rare score keys, and not all of the steps."""
    then = [line for key in counts for line in held_out([0.99] * (100 if key == "k" else 20), key)]
    found = drift_of(_keyed(tmp_path, counts), then, 0.25)
    assert (found["undecided"], found["findings"]) == (undecided, [])


def test_steps_are_compared_with_held_out_rows_of_the_same_score_keys(tmp_path: Path) -> None:
    """A log of steps alone must not look shifted because the held-out rows also have verdicts on whole runs."""
    steps = read_scored([scored(tmp_path, "steps", [0.2, 0.4] * 100)])
    mixed = [*held_out([0.2, 0.4] * 100), *held_out([0.9] * 200, "whole_run")]
    assert not drift_of(steps, mixed, 0.25)["findings"]
    assert "never evaluated" in drift_of(steps, held_out([0.9] * 200, "whole_run"), 0.25)["findings"][0]


def _scored_lines(folder: Path, lines: list[dict[str, Any]]) -> Any:
    log = folder / "other.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_scored([log])


def log_line(n: int, judge: str, score: float, *, days_ago: float = 0, text: str | None = None) -> str:
    """A line as serve_judge.py --log-requests writes it."""
    time = (datetime.now(UTC) - timedelta(days=days_ago)).isoformat()
    line = {"time": time, "id": f"r{n}", "judge": judge, "role": "production", "request_hash": f"h{n}", "keys": ["k"],
            "task": f"t{n}", "trajectory": f"t{n}", "score": score, "std": 0.1, "label_mass": 0.95,
            "status": "ok", "characters": 1000, "prompt": text}  # fmt: skip
    return json.dumps(line) + "\n"


def test_a_request_log_is_read_by_judge_and_by_day(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    old = [log_line(n, "judge@1", 0.9, days_ago=30) for n in range(100)]
    log.write_text("".join([*old, *(log_line(100 + n, "judge@1", 0.2) for n in range(60)), log_line(0, "judge@2", 0)]))
    assert len(read_scored([log], days=1e12)) == 161
    recent = read_scored([log], days=7)
    assert len(recent) == 61 and len(steps_of("judge@1", recent)) == 60
    assert drift_of(steps_of("judge@1", recent), held_out([0.2] * 100), 0.25)["findings"] == []
    assert drift_of(steps_of("judge@1", read_scored([log])), held_out([0.2] * 100), 0.25)["findings"]
    with pytest.raises(DataError, match=r"has only steps from judge@1, judge@2"):
        steps_of("judge@3", recent)
    with pytest.raises(UsageError, match="Only request logs"):
        read_scored([scored(tmp_path, "scores", [0.5])], days=7)
    with pytest.raises(DataError, match=r"last 0\.001 days"):
        log.write_text("".join(old))
        read_scored([log], days=0.001)


def test_outcomes_are_found_for_ids_that_the_log_hashes(tmp_path: Path) -> None:
    log, outcomes = tmp_path / "log.jsonl", tmp_path / "outcomes.jsonl"
    names = [f"run {n} of the agent" for n in range(5)]
    lines = [json.loads(log_line(n, judge, score)) | {"trajectory": log_id(name), "task": None}
             for n, name in enumerate(names) for judge, score in (("a", 0.2), ("b", 0.9))]  # fmt: skip
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    outcomes.write_text("".join(json.dumps({"trajectory_id": name, "outcome": True}) + "\n" for name in names))
    found = compare_judges(read_scored([log]), read_outcomes(outcomes))
    assert (found["outcomes"]["runs"], found["outcomes"]["tasks"]) == (5, 5)


def test_the_texts_where_two_judges_differ_are_shown_if_they_were_logged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log.jsonl"
    pairs = [(n, 0.5, 0.5) for n in range(20)] + [(20, 0.1, 0.9)]
    lines = [log_line(n, judge, score, text=f"step {n}") for n, a, b in pairs for judge, score in (("a", a), ("b", b))]
    log.write_text("".join(lines))
    shadow_first = [json.loads(line) for line in lines]
    for line in shadow_first:
        line["role"] = "shadow" if line["judge"] == "a" else "production"
    found = compare_judges(_scored_lines(tmp_path, shadow_first), None)
    assert (found["a"], found["b"]) == ("b", "a")
    show_ab(compare_judges(read_scored([log]), None))
    shown = capsys.readouterr().out
    assert "step 20" in shown and "r20" in shown and "0.10" in shown and "0.90" in shown


@pytest.mark.slow
def test_drift_a_b_and_the_page_from_the_command_line(
    tmp_path: Path, script: Callable[..., subprocess.CompletedProcess[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(registered.REGISTRY_VARIABLE, str(tmp_path / "judges"))
    make_rows(tmp_path / "rows.jsonl", range(30))
    run = make_run(tmp_path, tmp_path / "rows.jsonl")
    script("manage_judges.py", "add", run)
    log = tmp_path / "log.jsonl"
    log.write_text("".join(log_line(n, "judge@1", 0.2 + n % 5 / 10, text="<b>step</b>") for n in range(100)))
    assert "was never measured" in script("manage_judges.py", "drift", 1, log, code=1).stderr
    results = tmp_path / "judges" / "judge" / "results" / "1"
    results.mkdir(parents=True)
    lines = held_out([0.2 + n % 5 / 10 for n in range(200)])
    (results / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "stable" in script("manage_judges.py", "drift", 1, log).stdout
    with log.open("a") as stream:
        stream.write("".join(log_line(n, "judge@2", 0.9) for n in range(100)))
    assert "stable" in script("manage_judges.py", "drift", 1, log).stdout  # the other judge is not this one's drift
    shifted = tmp_path / "shifted.jsonl"
    shifted.write_text("".join(log_line(n, "judge@1", 0.9) for n in range(100)))
    assert "has drifted: k: score" in script("manage_judges.py", "drift", 1, shifted, code=4).stderr
    few = tmp_path / "few.jsonl"
    few.write_text("".join(log_line(n, "judge@1", 0.9) for n in range(10)))
    assert "too few scores" in script("manage_judges.py", "drift", 1, few, code=4).stderr
    rare = [json.loads(log_line(n, "judge@1", 0.9)) | {"keys": [f"k{n % 12}"]} for n in range(120)]
    few.write_text("".join(json.dumps(line) + "\n" for line in rare))
    measured = [line for n in range(12) for line in held_out([0.9] * 9, f"k{n}")]
    (results / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in measured))
    said = script("manage_judges.py", "drift", 1, few, code=4).stderr
    assert "too few scores of k0 and k1 and k2 and 9 other groups to decide" in said
    (results / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = json.loads(script("manage_judges.py", "ab", log, "--json").stdout)
    assert (found["a"], found["b"], found["steps"], found["tasks"]) == ("judge@1", "judge@2", 100, 100)
    link, hard = tmp_path / "link.html", tmp_path / "hard.html"
    link.symlink_to(log)
    hard.hardlink_to(log)
    history, version = (tmp_path / "judges" / name for name in ("history.jsonl", "judge/1/version.json"))
    before = [each.read_bytes() for each in (log, history, version)]
    for output in (log, link, hard, history):
        said = script("manage_judges.py", "page", "--logs", few, log, "--output", output, code=2).stderr
        assert "is also the input. Choose another output file" in said
    assert "must not change" in script("manage_judges.py", "page", "--output", version, code=2).stderr
    assert [each.read_bytes() for each in (log, history, version)] == before and link.is_symlink()
    page = tmp_path / "judges.html"
    script("manage_judges.py", "page", "--logs", log, "--output", page)
    html = page.read_text()
    assert "judge@2 minus judge@1" in html and "Drift of judge@1" in html and "add: judge@1" in html
    assert "<b>step" not in html
