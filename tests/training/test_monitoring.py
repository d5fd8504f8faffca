"""Following a run: the log that can be tailed, its numbers after a resume, progress and curves."""

import json
from pathlib import Path

import pytest
from layout import STEPS
from narrated import Narrated

from prmkit.training.monitoring import (
    ResumedAt,
    corrected,
    curves,
    draw_curves,
    echoed,
    followed,
    progress,
    seconds_a_step,
    summary,
)


def entry(step: int, seconds: float, tokens: int, *, total: int = 100) -> dict[str, object]:
    """What LLaMA Factory writes, `seconds` after this launch began: it divides by the steps of all launches."""
    return {
        "current_steps": step, "total_steps": total, "loss": 1.0, "elapsed_time": f"0:00:{int(seconds):02}",
        "remaining_time": "0:00:01", "throughput": round(tokens / seconds, 2), "total_tokens": tokens,
    }  # fmt: skip


def test_without_a_resume_the_numbers_are_llamafactorys_own(finished: Path) -> None:
    original = [json.loads(line) for line in (finished / "saves/run/trainer_log.jsonl").read_text().splitlines()]
    shown = [json.loads(line) for line in (finished / "logs/trainer_log.jsonl").read_text().splitlines()]
    assert len(shown) == len(original)
    for ours, theirs in zip(shown, original, strict=True):
        assert ours["throughput"] == pytest.approx(theirs["throughput"], abs=0.02)
        same = {key for key in theirs if key not in ("throughput", "remaining_time")}
        assert {key: ours.get(key) for key in same} == {key: theirs[key] for key in same}
        minutes, seconds = map(int, ours["remaining_time"].split(":")[1:])
        their_minutes, their_seconds = map(int, theirs["remaining_time"].split(":")[1:])
        assert abs(minutes * 60 + seconds - their_minutes * 60 - their_seconds) <= 1


def test_after_a_resume_time_left_and_throughput_are_of_this_launch() -> None:
    """From step 80 with 8,000 tokens seen, 10 steps and 1,000 tokens in 20 seconds: 50 tokens a second, 20 s to go."""
    fixed = corrected(entry(90, 20.0, 9_000), ResumedAt(step=80, tokens=8_000))
    assert fixed["throughput"] == pytest.approx(50.0, rel=0.01)
    assert fixed["remaining_time"] == "0:00:20"
    assert seconds_a_step(entry(90, 20.0, 9_000), ResumedAt(80, 8_000)) == pytest.approx(2.0, rel=0.01)


@pytest.mark.parametrize(
    ("elapsed", "left"), [("0:00:10", "0:00:10"), ("1:00:00", "1:00:00"), ("1 day, 2:00:00", "1 day, 2:00:00")]
)
def test_without_counted_tokens_the_clock_is_read(elapsed: str, left: str) -> None:
    halfway = {"current_steps": 50, "total_steps": 100, "elapsed_time": elapsed, "remaining_time": "?"}
    assert corrected(halfway, ResumedAt())["remaining_time"] == left


def test_a_line_is_shown_when_it_is_complete(tmp_path: Path) -> None:
    source, target = tmp_path / "run.jsonl", tmp_path / "logs" / "trainer_log.jsonl"
    line = json.dumps(entry(2, 1.0, 100)) + "\n"
    with followed(source, target, ResumedAt()) as follower:
        assert target.exists() and follower.new_entries() == []
        source.write_text(line[:20])
        assert follower.new_entries() == []
        source.write_text(line + line[:5])
        assert [found["current_steps"] for found in follower.new_entries()] == [2]
        assert follower.new_entries() == []
    assert len(target.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    "line",
    ["", "{", "[]", "5", '{"loss": 1}', '{"current_steps": "x"}', '{"current_steps": 4, "loss": "x"}', "\0" * 40],
)
def test_a_damaged_line_ends_nothing(tmp_path: Path, line: str) -> None:
    source = tmp_path / "run.jsonl"
    with followed(source, tmp_path / "trainer_log.jsonl", ResumedAt()) as follower:
        source.write_text(line + "\n" + json.dumps(entry(2, 1.0, 100)) + "\n")
        assert [found["current_steps"] for found in follower.new_entries()] == [2]


def test_a_tail_that_began_before_the_run_continues_and_shows_this_run_alone(tmp_path: Path) -> None:
    source, target = tmp_path / "run.jsonl", tmp_path / "trainer_log.jsonl"
    target.write_text('{"current_steps": 500, "of": "another run"}\n')
    with target.open() as tail:
        source.write_text("".join(json.dumps(entry(step, step, 10 * step)) + "\n" for step in (2, 4, 6)))
        with followed(source, target, ResumedAt(step=4, tokens=40)) as follower:
            assert [json.loads(line)["current_steps"] for line in tail] == [2, 4], "6 will be trained again"
            with source.open("a") as more:
                more.write(json.dumps(entry(6, 6.0, 60)) + "\n")
            assert [found["current_steps"] for found in follower.new_entries()] == [6]
            assert [json.loads(line)["current_steps"] for line in tail] == [6]


def test_a_second_run_does_not_write_into_the_log_of_the_first(tmp_path: Path, narrated: Narrated) -> None:
    target = tmp_path / "trainer_log.jsonl"
    for name in ("a", "b"):
        (tmp_path / name).touch()
    with (
        followed(tmp_path / "a", target, ResumedAt()) as first,
        followed(tmp_path / "b", target, ResumedAt()) as second,
    ):
        assert "follows another run" in narrated.text
        (tmp_path / "b").write_text(json.dumps(entry(2, 1.0, 10)) + "\n")
        (tmp_path / "a").write_text(json.dumps(entry(8, 1.0, 10)) + "\n")
        assert len(second.new_entries()) == len(first.new_entries()) == 1
    assert [json.loads(line)["current_steps"] for line in target.read_text().splitlines()] == [8]


def test_where_nobody_sits_progress_is_a_line_now_and_then(narrated: Narrated) -> None:
    narrated.set_level("INFO")
    with progress("run", ResumedAt()) as show:
        for step in range(2, 11, 2):
            show(entry(step, step, 10 * step, total=10))
    assert [message.split(":")[0] for message in narrated.messages] == ["step 2 of 10", "step 10 of 10"]
    assert "10 tokens/s" in narrated.text and "left" in narrated.text


def test_a_long_silence_is_explained(narrated: Narrated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prmkit.training.monitoring.SILENT_SECONDS", 0.0)
    narrated.set_level("INFO")
    with progress("run", ResumedAt()) as show:
        show(None)
    assert "run: still running" in narrated.text


def test_the_summary_has_what_there_is() -> None:
    shown = summary({"loss": 0.51234, "lr": 1e-4, "throughput": 12345.6, "vram_reserved": 31.25})
    assert shown == "loss 0.5123  lr 1.0e-04  12,346 tokens/s  31.2 GiB"
    assert summary({"eval_loss": 0.7, "vram_reserved": -0.0}) == "held-out loss 0.7000"


def test_everything_llamafactory_prints_can_be_shown(tmp_path: Path, narrated: Narrated) -> None:
    path = tmp_path / "run.log"
    path.write_text("of an earlier start\n")
    narrated.set_level("INFO")
    with echoed(path, path.stat().st_size) as show, path.open("a") as stream:
        stream.write("Loading\n")
        stream.flush()
        show()
        stream.write("the last line")
    assert narrated.messages == ["Loading", "the last line"]


def test_both_curves_are_in_one_picture(finished: Path, tmp_path: Path) -> None:
    history = json.loads((finished / "saves/run/trainer_state.json").read_text())["log_history"]
    train, held_out = curves(history)
    assert [step for step, _ in train] == list(range(2, STEPS + 1, 2))
    assert {step for step, _ in held_out} == {*range(12, STEPS + 1, 12), STEPS}
    assert train[-1][1] < train[0][1]
    assert (finished / "saves" / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not draw_curves([], "empty", tmp_path / "none.png") and not (tmp_path / "none.png").exists()


@pytest.mark.parametrize("name", ["$$", r"$\frac{$", "run"])
def test_any_name_and_any_loss_can_be_plotted(tmp_path: Path, name: str) -> None:
    history = [{"step": 1, "loss": loss} for loss in (1e308, -1e308, 0.0, float("nan"), 2.0)]
    assert draw_curves(history, name, tmp_path / "loss.png")
