"""Bulk scoring: one line out for every line in, in order, continued where it stopped."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from families import FLAT, NESTED, prompt

from prmkit.errors import DataError, UsageError
from prmkit.judge.scorer import Scorer, ShapeOf
from prmkit.judge.sources import JudgeSource
from prmkit.judge.transformers_judge import LocalJudge
from prmkit.judge.types import Distribution, Judgement, Mode, ScoringOptions
from prmkit.layouts import read_lines
from prmkit.prompts.step import load_rubric
from prmkit.scoring.rows import RunsToScore, read_rows
from prmkit.scoring.score import ScoringJob, run_job, score_rows, trajectories_file
from prmkit.verdict import Shape


def row(number: int, *, schema: str = FLAT, task: str = "one", label: str | None = None) -> dict:
    turns = [{"from": "human", "value": prompt(f"Step {number} of {task}.", schema)}]
    if label is not None:
        turns.append({"from": "gpt", "value": label})
    return {"conversations": turns, "metadata": {"task_id": task, "evaluation_type": "clip", "clip_number": number}}


ROWS = [
    json.dumps(row(1)),
    "{broken",
    json.dumps(row(2, label='{"reasonableness_score": 0.0}')),
    "",
    json.dumps({"id": "mine", "prompt": prompt("A step.", NESTED), "note": "kept"}),
    json.dumps({"id": 7, "prompt": "No schema here."}),
    json.dumps([1, 2]),
    json.dumps({"conversations": [{"from": "gpt", "value": "only the judge"}]}),
    json.dumps(row(1)),
]


class Scripted(Scorer):
    """A scorer that judges with a function."""

    def judgements(self, requests, mode=None):
        return self.function(requests, mode or self.options.mode)


def scorer(function, mode: Mode = "expected") -> Scripted:
    made = Scripted(JudgeSource(Path("nowhere")), options=ScoringOptions(mode))
    object.__setattr__(made, "function", function)
    return made


@pytest.fixture
def score(judges: dict[str, LocalJudge], monkeypatch: pytest.MonkeyPatch):
    """A random judge that is sure of itself: any share of its probability is enough."""
    judge = judges["llama3"]
    monkeypatch.setattr("prmkit.judge.score_trie.LOW_REACH", 0.0)
    return scorer(
        lambda requests, mode: judge.score(
            requests, ScoringOptions(mode, batch_size=2, max_new_tokens=6, min_label_mass=0.0)
        )
    )


def job(source: Path, output: Path | None, **changes) -> ScoringJob:
    settings = {"shape_of": ShapeOf(), "summaries": False, "bad_below": None} | changes
    return ScoringJob(input=str(source), output=output, **settings)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "steps.jsonl"
    path.write_text("\n".join(ROWS) + "\n")
    return path


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_line_gets_one_in_its_place(source: Path, tmp_path: Path, score) -> None:
    output = tmp_path / "scores.jsonl"
    assert run_job(job(source, output), score, {}) is False
    results = lines_of(output)
    assert [result["status"] for result in results] == ["ok", "error", "ok", "ok", "error", "error", "error", "ok"]
    assert [result["id"] for result in results][3:6] == ["mine", 7, None]
    assert results[3]["metadata"] == {"note": "kept"}
    assert results[0] == results[7], "equal prompts have equal scores and ids"
    assert results[0]["metadata"] == {"task_id": "one", "evaluation_type": "clip", "clip_number": 1}
    assert list(results[3]["scores"]) == ["relevance", "use_of_tools", "progress"]
    assert results[3]["score"] == pytest.approx(sum(results[3]["scores"].values()) / 3, abs=1e-6)
    assert all(0 <= result["label_mass"] <= 1 and result["std"] > 0 for result in results if result["status"] == "ok")
    reasons = [result["reason"] for result in results]
    assert reasons[1].startswith("line 2: not JSON")
    assert "--keys" in reasons[4]
    assert reasons[5] == "line 7: not a JSON object"
    assert reasons[6].startswith("line 8: ")


def test_a_judge_that_does_not_want_to_score_is_reported(source: Path, tmp_path: Path, judges, narrated) -> None:
    narrated.set_level("INFO")
    wild = scorer(lambda requests, mode: judges["llama3"].score(requests, ScoringOptions(mode=mode)))
    assert run_job(job(source, tmp_path / "wild.jsonl"), wild, {}) is False
    assert all(result["scores"] for result in lines_of(tmp_path / "wild.jsonl") if result["status"] == "unsure")
    assert "8 rows: 4 unsure, 4 error" in narrated.text
    assert "4 of them are unsure" in narrated.text
    narrated.clear()
    sure = scripted({"Step": 0.9, "A step": 0.9})
    run_job(job(source, tmp_path / "sure.jsonl"), sure, {})
    assert "unsure" not in narrated.text


def test_the_judges_turn_is_never_seen(tmp_path: Path, score) -> None:
    """A label in the row must not change its score."""
    source, output = tmp_path / "steps.jsonl", tmp_path / "scores.jsonl"
    source.write_text(
        "".join(json.dumps(row(1, label=label)) + "\n" for label in (None, '{"reasonableness_score": 0.0}'))
    )
    assert run_job(job(source, output), score, {}) is True
    bare, labelled = lines_of(output)
    assert bare == labelled


@pytest.mark.parametrize("kept_bytes", [0.0, 0.3, 0.62, 0.999, 1.0])
def test_a_run_that_was_cut_off_is_continued(source: Path, tmp_path: Path, score, kept_bytes: float) -> None:
    output = tmp_path / "scores.jsonl"
    run_job(job(source, output), score, {"judge": 1})
    whole = output.read_bytes()
    output.write_bytes(whole[: int(len(whole) * kept_bytes)])
    asked = []

    def counting(requests, mode):
        for judgement in score.judgements(requests, mode):
            asked.append(judgement)
            yield judgement

    assert run_job(job(source, output), scorer(counting), {"judge": 1}) is False
    assert lines_of(output) == [json.loads(line) for line in whole.splitlines()]
    lines = [json.loads(line) for line in whole.splitlines()]
    kept = whole[: int(len(whole) * kept_bytes)].count(b"\n")
    left = {line["request_hash"] for line in lines[kept:] if line["status"] == "ok"}
    assert len(asked) == len(left), "what was scored already was scored again, or something left out"


def test_two_jobs_do_not_write_one_output(source: Path, tmp_path: Path, score) -> None:
    output = tmp_path / "scores.jsonl"
    refused = []

    def meanwhile(requests, mode):
        for judgement in score.judgements(requests, mode):
            with pytest.raises(DataError, match="is writing scores"):
                run_job(job(source, output), score, {})
            run_job(job(source, tmp_path / "others.jsonl"), score, {})
            refused.append(judgement)
            yield judgement

    run_job(job(source, output), scorer(meanwhile), {})
    assert refused
    assert lines_of(output) == lines_of(tmp_path / "others.jsonl")


def test_scores_of_another_input_are_not_continued(source: Path, tmp_path: Path, score) -> None:
    output = tmp_path / "scores.jsonl"
    run_job(job(source, output), score, {})
    source.write_text("\n".join(reversed(ROWS)))
    with pytest.raises(UsageError, match="another --output"):
        run_job(job(source, output), score, {})


def asking_for(*steps: str) -> list[str]:
    return [json.dumps({"id": number, "prompt": prompt(step, FLAT)}) for number, step in enumerate(steps)]


def test_scores_of_other_prompts_under_the_same_ids_are_not_continued(tmp_path: Path) -> None:
    source, output = tmp_path / "steps.jsonl", tmp_path / "scores.jsonl"
    source.write_text("\n".join(asking_for("Step A.", "Step B.")))
    run_job(job(source, output), scripted({"Step A": 0.1, "Step B": 0.2}), {})
    whole = output.read_bytes()
    source.write_text("\n".join(asking_for("Step A.", "Step C.")))
    with pytest.raises(
        UsageError, match=r"scores\.jsonl: line 2 is about 1, but row 2 of the input has a different prompt"
    ):
        run_job(job(source, output), scripted({"Step": 0.9}), {})
    source.write_text("\n".join(asking_for("Step A.", "Step B.")))
    with pytest.raises(UsageError, match="or different score keys"):
        run_job(job(source, output, shape_of=ShapeOf(("correctness_score",))), scripted({"Step": 0.9}), {})
    assert output.read_bytes() == whole
    assert lines_of(output)[0]["request_hash"] != lines_of(output)[1]["request_hash"]


def test_a_line_that_was_corrected_gets_its_score(tmp_path: Path) -> None:
    source, output = tmp_path / "steps.jsonl", tmp_path / "scores.jsonl"
    whole = asking_for("Step A.", "Step B.", "Step C.")
    source.write_text("\n".join([whole[0], whole[1][:-1], whole[2]]))
    assert run_job(job(source, output), scripted({"Step": 0.1}), {}) is False
    source.write_text("\n".join(whole))
    assert run_job(job(source, output), scripted({"Step A": 0.9, "Step B": 0.2, "Step C": 0.9}), {}) is True
    assert [result["score"] for result in lines_of(output)] == [0.1, 0.2, 0.1]


def failing(*steps: str):
    """A judge whose server fails for these steps."""

    def score(requests, _mode) -> Iterator[Judgement]:
        for request in requests:
            if any(step in request.prompt for step in steps):
                yield Judgement("failed", reason="the request failed after 6 attempts")
            else:
                yield Judgement("ok", {"reasonableness_score": Distribution(0.5, 0.5, 0.5, 0.0, 1.0)})

    return scorer(score)


def test_what_a_server_failed_at_is_asked_again_and_nothing_else(tmp_path: Path, narrated) -> None:
    narrated.set_level("INFO")
    source, output = tmp_path / "steps.jsonl", tmp_path / "scores.jsonl"
    rows = asking_for(*(f"Step {letter}." for letter in "ABCDE"))
    source.write_text("\n".join(rows[:4]))
    assert run_job(job(source, output), failing("Step B", "Step D"), {}) is False
    assert [result["status"] for result in lines_of(output)] == ["ok", "failed", "ok", "failed"]
    source.write_text("\n".join(rows))
    again = {"Step B": 0.1, "Step D": 0.2, "Step E": None}
    assert run_job(job(source, output, bad_below=0.5), scripted(again), {}) is False
    results = lines_of(output)
    assert [result["score"] for result in results] == [0.5, 0.1, 0.5, 0.2, None]
    assert "2 rows are already scored" in narrated.text and "2 rows that failed are retried" in narrated.text
    assert run_job(job(source, output), scripted({}), {}) is False, "a row that is too long was asked for again"
    assert lines_of(output) == results


def test_what_was_retried_is_kept_when_the_run_is_stopped(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("prmkit.scoring.score.WINDOW", 2)
    source, output = tmp_path / "steps.jsonl", tmp_path / "scores.jsonl"
    source.write_text("\n".join(asking_for("Step A.", "Step B.", "Step C.")))
    run_job(job(source, output), failing("Step A", "Step C"), {})

    def stopped(requests, mode):
        if any("Step C" in request.prompt for request in requests):
            raise KeyboardInterrupt
        yield from scripted({"Step A": 0.1}).judgements(requests, mode)

    with pytest.raises(KeyboardInterrupt):
        run_job(job(source, output), scorer(stopped), {})
    assert [(result["status"], result["score"]) for result in lines_of(output)] == [
        ("ok", 0.1), ("ok", 0.5), ("failed", None),
    ]  # fmt: skip


def test_scores_of_another_judge_are_moved_away(source: Path, tmp_path: Path, score) -> None:
    output = tmp_path / "scores.jsonl"
    run_job(job(source, output), score, {"judge": 1})
    first = output.read_text()
    run_job(job(source, output), score, {"judge": 2})
    assert (tmp_path / "scores.old1.jsonl").read_text() == first
    assert len(lines_of(output)) == 8


def results(source: bytes, score: Scorer, **changes) -> list[dict]:
    rows = read_rows(read_lines(io.BytesIO(source), "steps.jsonl"), ShapeOf())
    return [result for _, result in score_rows(((row, None) for row in rows), score, job(Path(), None, **changes))]


def test_aggregates_of_earlier_scores_do_not_stay_next_to_new_ones(
    source: Path, tmp_path: Path, score, narrated
) -> None:
    output = tmp_path / "scores.jsonl"
    aggregates = trajectories_file(output)
    run_job(job(source, output, bad_below=0.5), score, {"judge": "A"})
    run_job(job(source, output), score, {"judge": "A"})  # nothing is new
    assert aggregates.is_file() and "removed" not in narrated.text
    for fingerprint, more in (("B", ""), ("B", json.dumps(row(3)) + "\n")):
        source.write_text(source.read_text().rstrip("\n") + "\n" + more)
        run_job(job(source, output), score, {"judge": fingerprint})
        assert not aggregates.exists() and "removed, because it was about earlier scores" in narrated.text
        run_job(job(source, output, bad_below=0.5), score, {"judge": fingerprint})
        assert aggregates.is_file()


@pytest.mark.parametrize(
    "line", ['{"a": 1}', '{"id": 1, "score": "0.5", "status": "ok", "request_hash": "x", "metadata": {}}']
)
def test_a_line_that_was_replaced_is_named(source: Path, tmp_path: Path, score, line: str) -> None:
    output = tmp_path / "scores.jsonl"
    run_job(job(source, output), score, {})
    output.write_text("\n".join([line, *output.read_text().splitlines()[1:]]) + "\n")
    with pytest.raises(DataError, match=r"scores\.jsonl:1: not a line of scores"):
        run_job(job(source, output, bad_below=0.5), score, {})


def test_no_judge_is_loaded_for_nothing() -> None:
    (result,) = results(b"{\n", Scorer(JudgeSource(Path("nowhere"))))
    assert result["status"] == "error"


def test_written_verdicts_are_added_when_asked_for_and_kept_when_unreadable(source: Path, score) -> None:
    plain = results(source.read_bytes(), score)
    assert not any("text" in result for result in plain)
    with_text = results(source.read_bytes(), score, summaries=True)
    assert [result | {"text": 0} for result in with_text if "text" in result] == [
        result | {"text": 0} for result in plain if result["status"] == "ok"
    ]
    written = results(source.read_bytes(), scorer(score.function, "generate"))
    assert [result["status"] for result in written if "text" in result] == ["unparsed"] * 4
    assert written[0]["text"] == with_text[0]["text"] != ""
    assert written[0]["score"] is None, "what cannot be read is not a number"


@pytest.mark.parametrize(
    ("shape_of", "text", "evaluation_type", "expected"),
    [
        (ShapeOf(), prompt("x", FLAT), "clip", Shape(("reasonableness_score",), nested=False)),
        (ShapeOf(), prompt("x", NESTED), "final", Shape(("relevance", "use_of_tools", "progress"), nested=True)),
        (ShapeOf(("progress",)), prompt("x", NESTED), "final", Shape(("progress",), nested=True)),
        (ShapeOf(("correctness_score",)), "x", "clip", Shape(("correctness_score",), nested=False)),
        (ShapeOf(known={"final": ["a", "b"]}), "x", "final", Shape(("a", "b"), nested=True)),
        (ShapeOf(known={"clip": ["a_score"]}), "x", "clip", Shape(("a_score",), nested=False)),
    ],
)
def test_scores_to_ask_for(shape_of: ShapeOf, text: str, evaluation_type: str, expected: Shape) -> None:
    assert shape_of(text, evaluation_type) == expected


def test_scores_that_could_be_either_are_not_guessed() -> None:
    reason = ShapeOf(known={"clip": ["reasonableness_score", "correctness_score"]})("x", "clip")
    assert reason == (
        "the prompt shows no score keys, and several are possible (reasonableness_score or "
        "correctness_score); "
        "pass --keys, or keys in a request to a server"
    )


FLAT_QUALITY, NESTED_QUALITY = Shape(("quality",), nested=False), Shape(("quality",), nested=True)
TWO = Shape(("safety", "quality"), nested=False)


@pytest.mark.parametrize(
    ("learnt", "given", "expected"),
    [
        ({"clip": [FLAT_QUALITY]}, {}, FLAT_QUALITY),
        ({"": [FLAT_QUALITY]}, {"evaluation_type": None}, FLAT_QUALITY),
        ({"clip": [NESTED_QUALITY, FLAT_QUALITY]}, {}, NESTED_QUALITY),  # the more frequent one
        ({"clip": [TWO, FLAT_QUALITY]}, {}, TWO),
        ({"clip": [FLAT_QUALITY, TWO]}, {}, "several are possible (quality or safety, quality)"),
        ({"final": [FLAT_QUALITY]}, {}, "none are known for its evaluation type"),
        ({"clip": [FLAT_QUALITY]}, {"keys": ("quality",)}, FLAT_QUALITY),
        ({"final": [FLAT_QUALITY]}, {"keys": ("quality",)}, FLAT_QUALITY),
        ({"clip": [NESTED_QUALITY], "final": [FLAT_QUALITY]}, {"keys": ("quality",)}, NESTED_QUALITY),
        ({"clip": [TWO]}, {"keys": ("quality", "safety")}, Shape(("quality", "safety"), nested=False)),
        ({"clip": [TWO]}, {"keys": ("quality",)}, NESTED_QUALITY),  # not learnt: the rule for all judges
        ({"clip": [FLAT_QUALITY]}, {"known": {"clip": ["safety"]}}, Shape(("safety",), nested=True)),
        ({"clip": [FLAT_QUALITY]}, {"known": {"clip": ["quality"]}}, FLAT_QUALITY),
        ({"clip": [FLAT_QUALITY]}, {"system": 'Answer in JSON: {"a_score": 0.5}'}, Shape(("a_score",), nested=False)),
    ],
)
def test_a_judge_is_asked_for_what_it_learnt(learnt: Any, given: dict[str, Any], expected: Shape | str) -> None:
    given = {"keys": (), "known": {}, "evaluation_type": "clip", "system": None} | given
    shape = ShapeOf(given["keys"], given["known"], learnt)("x", given["evaluation_type"], given["system"])
    assert shape == expected if isinstance(expected, Shape) else expected in shape


def scripted(scores: dict[str, float | None]):
    """A judge that gives the score that was written down for a step."""

    def score(requests, _mode) -> Iterator[Judgement]:
        for request in requests:
            value = next(value for step, value in scores.items() if step in request.prompt)
            point = None if value is None else Distribution(value, value, value, 0.0, 1.0)
            yield Judgement("ok", {"reasonableness_score": point}) if point else Judgement("too_long", reason="long")

    return scorer(score)


def test_trajectories_are_summed_up(tmp_path: Path) -> None:
    scores = {"Step 1 of one": 0.9, "Step 2 of one": 0.4, "Step 3 of one": 0.8, "Step 1 of two": 0.7}
    scores |= {"Step 1 of three": 0.9, "Step 2 of three": None}
    rows = [row(3), row(1), row(2), row(1), row(1, task="two"), row(1, task="three"), row(2, task="three")]
    final = row(9)
    final["metadata"]["evaluation_type"] = "final"
    scores["Step 9 of one"] = 0.0
    source, output = tmp_path / "steps.jsonl", tmp_path / "scores.jsonl"
    source.write_text("".join(json.dumps(each) + "\n" for each in [*rows, final]))
    run_job(job(source, output, bad_below=0.5), scripted(scores), {})
    one, two, three = lines_of(trajectories_file(output))
    assert one == {
        "trajectory_id": "one",
        "task_id": "one",
        "steps": 3,
        "missing": 0,
        "unscored": 0,
        "unsure": 0,
        "unnumbered": 0,
        "min": 0.4,
        "product": 0.288,
        "mean": 0.7,
        "last": 0.8,
        "first_bad_step": 1,
        "first_bad_clip": 2,
    }
    assert (two["steps"], two["min"], two["first_bad_step"]) == (1, 0.7, None)
    expected = {"trajectory_id": "three", "task_id": "three", "steps": 2, "missing": 0, "unscored": 1, "unsure": 0}
    expected["unnumbered"] = 0
    assert three == expected | dict.fromkeys(["min", "product", "mean", "last", "first_bad_step", "first_bad_clip"])


def test_a_run_that_cannot_be_read_is_no_success(tmp_path: Path) -> None:
    runs = tmp_path / "runs.jsonl"
    run = {"messages": [{"role": "user", "content": "Go."}, {"role": "assistant", "content": "Done."}]}
    for broken, is_whole in (("", True), (json.dumps(run)[:40] + "\n", False)):
        runs.write_text(json.dumps(run) + "\n" + broken)
        whole = job(runs, None, runs=RunsToScore(str(runs), load_rubric(), 0.5, "a judge"))
        assert run_job(whole, scripted({"": 0.5}), {}) is is_whole


def summed_up(tmp_path: Path, rows: list[str]) -> list[dict]:
    (tmp_path / "steps.jsonl").write_text("\n".join(rows))
    run_job(job(tmp_path / "steps.jsonl", tmp_path / "sums.jsonl", bad_below=0.5), scripted({"Step": 0.7}), {})
    return lines_of(trajectories_file(tmp_path / "sums.jsonl"))


def test_a_trajectory_with_a_gap_is_not_summed_up_as_a_whole_one(tmp_path: Path, narrated) -> None:
    rows = [json.dumps(row(number)) for number in (3, 4, 5)] + [
        json.dumps(row(number, task="two")) for number in (0, 1)
    ]
    whole, two = summed_up(tmp_path, rows)
    assert (whole["steps"], whole["missing"], whole["mean"], two["mean"]) == (3, 0, 0.7, 0.7)
    assert "no trajectory" not in narrated.text
    (tmp_path / "sums.jsonl").unlink()
    gap, two = summed_up(tmp_path, [rows[0], rows[1][:-1], *rows[2:]])
    assert (gap["steps"], gap["missing"], gap["unscored"]) == (2, 1, 0)
    assert {gap[name] for name in ("min", "product", "mean", "last", "first_bad_step", "first_bad_clip")} == {None}
    assert two["mean"] == 0.7
    assert "have no task_id: 1." in narrated.text


def test_a_first_step_that_is_missing_is_noticed_where_rows_name_the_length(tmp_path: Path) -> None:
    tail, whole = row(2), [row(number, task="two") for number in (1, 2)]
    for each in (tail, *whole):
        each["metadata"]["steps"] = 2
    one, two = summed_up(tmp_path, list(map(json.dumps, (tail, *whole))))
    assert (one["missing"], one["min"], one["last"], two["missing"], two["min"]) == (1, None, None, 0, 0.7)


def test_rows_that_are_no_steps_are_counted_with_their_type(tmp_path: Path, narrated) -> None:
    other = row(1)
    other["metadata"]["evaluation_type"] = "Clip"
    narrated.set_level("INFO")
    assert summed_up(tmp_path, [json.dumps(other)]) == []
    assert "(by evaluation type): 1 Clip" in narrated.text


def test_the_order_of_a_run_is_not_guessed_where_only_some_steps_have_a_number(tmp_path: Path) -> None:
    late = row(3)
    del late["metadata"]["clip_number"]
    rows = list(map(json.dumps, (late, row(1), row(2))))
    scores = {"Step 1": 0.9, "Step 2": 0.8, "Step 3": 0.3}
    (tmp_path / "steps.jsonl").write_text("\n".join(rows))
    run_job(job(tmp_path / "steps.jsonl", tmp_path / "sums.jsonl", bad_below=0.5), scripted(scores), {})
    (one,) = lines_of(trajectories_file(tmp_path / "sums.jsonl"))
    assert (one["unnumbered"], one["min"], one["mean"]) == (1, 0.3, pytest.approx(2 / 3, abs=1e-5))
    assert (one["last"], one["first_bad_step"], one["first_bad_clip"]) == (None, None, None)


@pytest.mark.parametrize("line", ["{", '{"prompt": ""}', '{"id": "named", "prompt": ""}', '{"id": 0, "prompt": ""}'])
def test_a_line_that_cannot_be_read_may_be_a_step_that_is_missing(tmp_path: Path, narrated, line: str) -> None:
    summed_up(tmp_path, [json.dumps(row(1)), line])
    assert "have no task_id: 1." in narrated.text


@pytest.mark.parametrize("spelt", [float, str, lambda number: f" {number} "])
def test_clip_numbers_as_spreadsheets_write_them_are_numbers(tmp_path: Path, spelt) -> None:
    rows = [row(number) for number in (10, 9)]
    for each in rows:
        each["metadata"]["clip_number"] = spelt(each["metadata"]["clip_number"])
    (one,) = summed_up(tmp_path, list(map(json.dumps, rows)))
    assert (one["steps"], one["missing"], one["mean"]) == (2, 0, 0.7)


def of(task: str, trajectory: str, number: int) -> str:
    each = row(number, task=f"{task}, {trajectory}")
    return json.dumps(each | {"metadata": each["metadata"] | {"task_id": task, "trajectory_id": trajectory}})


def test_runs_of_one_task_are_summed_up_apart(tmp_path: Path) -> None:
    rows = [of("t", trajectory, number) for number in (1, 2) for trajectory in ("a", "b")]
    sums = summed_up(tmp_path, rows)
    assert [(each["trajectory_id"], each["task_id"], each["steps"]) for each in sums] == [("a", "t", 2), ("b", "t", 2)]


def test_two_prompts_for_one_clip_ask_for_a_trajectory_id(tmp_path: Path) -> None:
    rows = [json.dumps(row(1)), json.dumps(row(1)), of("one", "", 1)]
    with pytest.raises(
        DataError, match=r"line 3: clip 1 of one already occurred with a different prompt.*its own trajectory_id"
    ):
        summed_up(tmp_path, rows)


@pytest.mark.parametrize("numbers", [(None, None), (1, None), (None, 1), (1, 1)])
def test_two_judges_rows_of_one_prompt_are_one_step(tmp_path: Path, numbers: tuple[int | None, int | None]) -> None:
    rows = [row(1), row(1), row(2), row(2)]
    for place, each in enumerate(rows):
        each["metadata"] |= {"model_name": f"judge {place % 2}", "clip_number": numbers[place % 2] and place // 2 + 1}
    (one,) = summed_up(tmp_path, list(map(json.dumps, rows)))
    assert (one["steps"], one["missing"], one["product"]) == (2, 0, 0.49)


def test_steps_with_one_prompt_and_other_numbers_are_several(tmp_path: Path) -> None:
    rows = [{**row(1), "metadata": {**row(1)["metadata"], "clip_number": number}} for number in (1, 2)]
    (one,) = summed_up(tmp_path, list(map(json.dumps, rows)))
    assert (one["steps"], one["product"]) == (2, 0.49)


def test_lines_that_cannot_be_judged_are_not_one_step(tmp_path: Path) -> None:
    rows = [{"prompt": f"no keys {number}", "metadata": {"task_id": "one"}} for number in (1, 2)]
    (one,) = summed_up(tmp_path, list(map(json.dumps, rows)))
    assert (one["steps"], one["unscored"]) == (2, 2)


def test_a_trajectory_with_an_unsure_step_is_not_summed_up(tmp_path: Path) -> None:
    def unsure(requests, _mode) -> Iterator[Judgement]:
        for _ in requests:
            yield Judgement("unsure", {"reasonableness_score": Distribution(0.5, 0.5, 0.5, 0.0, 0.1)}, "thin")

    source, output = tmp_path / "steps.jsonl", tmp_path / "scores.jsonl"
    source.write_text(json.dumps(row(1)))
    assert run_job(job(source, output, bad_below=0.5), scorer(unsure), {}) is False
    (result,), (total,) = lines_of(output), lines_of(trajectories_file(output))
    assert (result["score"], result["reason"]) == (0.5, "thin")
    assert (total["unsure"], total["unscored"], total["mean"]) == (1, 0, None)
