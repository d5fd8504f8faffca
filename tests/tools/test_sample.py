"""The synthetic sample: the bytes that ship, the schema of real rows, and scores that can be learnt."""

import json
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from statistics import correlation, fmean
from typing import Any

import pytest

from tools.make_sample import judges
from tools.make_sample.judges import JUDGES
from tools.make_sample.prompts import EXAMPLE_SCORES
from tools.make_sample.sample import DEFAULT_TASKS, new_steps, sample_rows, write_rows
from tools.make_sample.scenes import PHRASEBOOKS, TOOLS
from tools.make_sample.trajectories import OUTCOME_QUALITY, STANDING_QUALITY, draw_trajectory

Row = dict[str, Any]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return list(sample_rows())


def prompt_of(row: Row) -> str:
    return str(row["conversations"][0]["value"])


def answer_of(row: Row) -> str:
    return str(row["conversations"][1]["value"])


def verdict_of(row: Row) -> dict[str, Any] | None:
    """The verdict, where the answer is valid JSON."""
    try:
        return dict(json.loads(answer_of(row)))
    except json.JSONDecodeError:
        return None


def scores_of(verdict: dict[str, Any]) -> dict[str, float]:
    return verdict.get("scores") or {key: value for key, value in verdict.items() if key.endswith("_score")}


def test_the_sample_that_ships_is_what_the_generator_makes(sample: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "again.jsonl", sample_rows())
    assert (tmp_path / "again.jsonl").read_bytes() == sample.read_bytes()
    assert sample.stat().st_size <= 16_000 * DEFAULT_TASKS


def test_the_new_steps_that_ship_are_what_the_generator_makes(root: Path, sample: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "again.jsonl", new_steps())
    assert (tmp_path / "again.jsonl").read_bytes() == (root / "examples" / "new_steps.jsonl").read_bytes()
    steps = list(new_steps())
    assert [step["metadata"]["clip_number"] for step in steps] == [1, 2, 3]
    known = {prompt_of(row) for row in map(json.loads, sample.read_text(encoding="utf-8").splitlines())}
    assert not known & {step["prompt"] for step in steps}


def test_another_seed_gives_another_sample_and_fewer_tasks_the_first_ones(rows: list[Row]) -> None:
    few = list(sample_rows(tasks=5))
    assert few == rows[: len(few)]
    assert few != list(sample_rows(seed=1, tasks=5))


def test_command_line(root: Path, tmp_path: Path) -> None:
    output = tmp_path / "a folder" / "made.jsonl"
    command = [sys.executable, "-m", "tools.make_sample", "--output", str(output), "--seed", "3", "--tasks", "4"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    made = [json.loads(line) for line in output.read_text().splitlines()]
    assert made == list(sample_rows(seed=3, tasks=4))
    assert done.stdout == f"{output}: {len(made)} rows on 4 tasks\n"


def test_rows_have_the_schema_of_real_rows(rows: list[Row]) -> None:
    keys = ["model_name", "provider", "task_id", "evaluation_type", "clip_number", "category", "timestamp"]
    for row in rows:
        assert list(row) == ["conversations", "metadata"]
        assert [list(turn) for turn in row["conversations"]] == [["from", "value"]] * 2
        assert [turn["from"] for turn in row["conversations"]] == ["human", "gpt"]
        assert all(isinstance(turn["value"], str) for turn in row["conversations"])
        metadata = row["metadata"]
        assert list(metadata) == keys
        assert metadata["evaluation_type"] in ("clip", "category", "final")
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", metadata["timestamp"])
        if metadata["evaluation_type"] == "clip":
            assert isinstance(metadata["clip_number"], int)
            assert metadata["category"] is None
        else:
            assert metadata["clip_number"] is None
            assert metadata["category"] in ({"final"} if metadata["evaluation_type"] == "final" else TOOLS)


def test_verdicts_have_the_schema_of_real_verdicts(rows: list[Row]) -> None:
    shapes: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    reasonings: Counter[type] = Counter()
    for row in rows:
        verdict = verdict_of(row)
        if verdict is None:
            continue
        shapes[row["metadata"]["evaluation_type"]].add(tuple(verdict))
        assert isinstance(verdict["summary"], str)
        assert all(0.0 <= score <= 1.0 for score in scores_of(verdict).values())
        reasonings[type(verdict.get("reasoning"))] += 1
    overall = {("scores", "summary", "reasoning")}
    clip = {("reasonableness_score", "summary"), ("correctness_score", "summary")}
    assert shapes == {"clip": clip, "category": overall, "final": overall}
    assert reasonings[str] > reasonings[dict] > 20


def test_every_prompt_is_answered_once_by_each_judge(rows: list[Row]) -> None:
    names = [judge.name for judge in JUDGES]
    assert len(names) == 2
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert prompt_of(first) == prompt_of(second)
        assert first["metadata"]["model_name"] == names[0]
        # All but the judge is the same.
        assert first["metadata"] | {"model_name": names[1]} == second["metadata"]


def test_a_clip_does_not_say_who_judges_it(rows: list[Row]) -> None:
    prompts = [prompt_of(row) for row in rows if row["metadata"]["evaluation_type"] == "clip"]
    assert not [prompt for prompt in prompts for judge in JUDGES if judge.name in prompt]


def test_every_trajectory_has_clips_an_answer_and_one_final_evaluation(rows: list[Row]) -> None:
    tasks: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["metadata"]["model_name"] == JUDGES[0].name:
            tasks[row["metadata"]["task_id"]].append(row)
    assert len(tasks) == DEFAULT_TASKS >= 120
    # The task that the guide's commands name.
    assert "webshaper_qa_0" in tasks
    for task in tasks.values():
        clips = [row["metadata"]["clip_number"] for row in task if row["metadata"]["evaluation_type"] == "clip"]
        assert clips == list(range(1, len(clips) + 1))
        answers = ["Ground Truth Answer:" in prompt_of(row) for row in task if row["metadata"]["clip_number"]]
        assert answers == [False] * (len(clips) - 1) + [True]
        assert [row["metadata"]["evaluation_type"] for row in task].count("final") == 1


def test_tools_languages_and_ways_to_fail_are_all_there(rows: list[Row]) -> None:
    trajectories = [draw_trajectory(random.Random(f"0:{task}")) for task in range(DEFAULT_TASKS)]
    clips = [clip for trajectory in trajectories for clip in trajectory.clips]
    assert {clip.category for clip in clips} == {*TOOLS, "none"}
    assert {clip.outcome for clip in clips} == set(OUTCOME_QUALITY)
    assert {trajectory.answer.standing for trajectory in trajectories} == set(STANDING_QUALITY)
    languages = Counter(trajectory.language for trajectory in trajectories)
    assert set(languages) == set(PHRASEBOOKS)
    assert 0.75 < languages["en"] / DEFAULT_TASKS < 0.95


def test_a_repeated_call_is_the_call_before_it_word_for_word() -> None:
    pairs = [
        (before, clip)
        for task in range(DEFAULT_TASKS)
        for clips in [draw_trajectory(random.Random(f"0:{task}")).clips]
        for before, clip in pairwise(clips)
        if clip.outcome == "again"
    ]
    assert len(pairs) > 5
    assert all((before.call, before.result) == (clip.call, clip.result) for before, clip in pairs)


def test_the_judges_follow_the_quality_and_agree_as_two_real_judges_do(rows: list[Row]) -> None:
    clips: dict[tuple[str, int], dict[str, float]] = defaultdict(dict)
    for row in rows:
        verdict, metadata = verdict_of(row), row["metadata"]
        if verdict and metadata["evaluation_type"] == "clip":
            (score,) = scores_of(verdict).values()
            clips[metadata["task_id"], metadata["clip_number"]][metadata["model_name"]] = score
    both = {clip: tuple(scores.values()) for clip, scores in clips.items() if len(scores) == 2}
    lenient, strict = zip(*both.values(), strict=True)
    assert 0.8 < correlation(lenient, strict) < 0.95
    assert fmean(lenient) > fmean(strict) + 0.03

    quality = _qualities()
    means = {clip: fmean(scores) for clip, scores in both.items()}
    assert correlation([quality[clip] for clip in means], list(means.values())) > 0.9


def _qualities() -> dict[tuple[str, int], float]:
    """Task and clip number -> the quality that was drawn."""
    qualities = {}
    families: Counter[str] = Counter()
    for task in range(DEFAULT_TASKS):
        trajectory = draw_trajectory(random.Random(f"0:{task}"))
        task_id = f"{trajectory.family}_{families[trajectory.family]}"
        families[trajectory.family] += 1
        for step in (*trajectory.clips, trajectory.answer):
            qualities[task_id, step.number] = step.quality
    return qualities


def test_the_example_numbers_say_nothing_about_the_answer(rows: list[Row]) -> None:
    seen = defaultdict(set)
    for row in rows:
        schema = prompt_of(row).split("Answer in this JSON format:")[1].split("Five bands")[0]
        examples = tuple(float(number) for number in re.findall(r'_?[a-z]+": (\d\.\d\d)', schema))
        seen[row["metadata"]["evaluation_type"]].add(examples)
    assert seen["clip"] == {EXAMPLE_SCORES[:1]}
    assert seen["category"] == {EXAMPLE_SCORES[:3]}
    assert seen["final"] == {EXAMPLE_SCORES}


def test_category_and_final_prompts_carry_the_mean_clip_scores(rows: list[Row]) -> None:
    for row in rows:
        shown = re.findall(r"\(Score: (\d\.\d\d)\)", prompt_of(row))
        assert bool(shown) == (row["metadata"]["evaluation_type"] != "clip")


def test_some_answers_are_broken_as_the_module_says(rows: list[Row]) -> None:
    answers = [answer_of(row) for row in rows]
    shares = {
        "fenced": fmean(answer.startswith("```json") for answer in answers),
        "empty": fmean(not answer for answer in answers),
        "prose": fmean(bool(answer) and "{" not in answer for answer in answers),
        "cut off": fmean(answer.startswith("{") and not answer.endswith("}") for answer in answers),
    }
    expected = {"fenced": 0.03, "empty": 0.01, "prose": 0.005, "cut off": 0.01}
    assert shares == pytest.approx(expected, abs=0.01)
    assert all(share > 0 for share in shares.values())
    unreadable = fmean(verdict_of(row) is None for row in rows)
    assert unreadable == pytest.approx(sum(share for share, _ in judges.MESSES), abs=0.02)


@pytest.mark.parametrize("mess", [mess for _, mess in judges.MESSES], ids=lambda mess: mess.__name__)
def test_every_mess_breaks_an_answer_of_every_kind(mess: Any, rows: list[Row]) -> None:
    whole = {tuple(verdict): answer_of(row) for row in rows if (verdict := verdict_of(row))}
    assert len(whole) == 3
    for answer in whole.values():
        with pytest.raises(json.JSONDecodeError):
            json.loads(mess(answer))
