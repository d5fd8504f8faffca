"""Make the `finetune.jsonl` that ships with prmkit: synthetic judged trajectories, the same bytes for the same seed.

    python -m tools.make_sample --output finetune.jsonl

    python -m tools.make_sample --new-steps examples/new_steps.jsonl     three steps without answers, to be scored

No real agent or judge wrote any of it. It has the format and the quirks of real data: two judges of different
strictness and noise answer the same prompts; every trajectory has ordinary clips, a last clip with the answer, one
evaluation for each tool category and one for the whole trajectory; category and final prompts show the mean clip
scores; about one task in seven is not in English. 8 % of the answers are corrupted: 3 % are fenced, 1.5 % have a bare
newline and 1 % bare quotes inside a string, 1 % are truncated, 1 % are empty, 0.5 % are prose without a score.
The score follows from what the prompt shows, so that a model can learn it: see `tools.make_sample.trajectories`.
"""

import argparse
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from statistics import fmean
from typing import Any

import orjson

from prmkit import cli
from prmkit.errors import ExitCode
from prmkit.files import atomic_write
from tools.make_sample import judges, prompts
from tools.make_sample.judges import JUDGES, PROVIDER
from tools.make_sample.scenes import TOOLS
from tools.make_sample.trajectories import Answer, Clip, Trajectory, draw_trajectory

DEFAULT_TASKS = 240
"""Number of tasks in `finetune.jsonl`. The demo's judge of raw runs has other tasks: `LABELLED_TASKS` in `runs.py`."""
NEW_SEED = 29
"""The seed of a task that is not in the sample and has a fair step, a wasted one and a good one."""
FIRST_TIMESTAMP = datetime(2025, 1, 6, 9, 0, 0)

Verdict = dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """One prompt and what every judge answered, in the order of `JUDGES`."""

    prompt: str
    evaluation_type: str
    clip_number: int | None
    category: str | None
    verdicts: Sequence[Verdict]


def sample_rows(seed: int = 0, tasks: int = DEFAULT_TASKS) -> Iterator[dict[str, Any]]:
    """Yield the rows of the sample, task by task; the first tasks are the same whatever `tasks` is."""
    families: Counter[str] = Counter()
    for task in range(tasks):
        rng = random.Random(f"{seed}:{task}")
        trajectory = draw_trajectory(rng)
        task_id = f"{trajectory.family}_{families[trajectory.family]}"
        families[trajectory.family] += 1
        for turn, evaluation in enumerate(_evaluations(rng, trajectory)):
            yield from _rows(rng, evaluation, task_id, FIRST_TIMESTAMP + timedelta(minutes=7 * task, seconds=23 * turn))


def _evaluations(rng: random.Random, trajectory: Trajectory) -> Iterator[Evaluation]:
    """Judge a trajectory: its clips, its tool categories, its answer, and the trajectory as a whole."""
    question, clips, answer = trajectory.question, trajectory.clips, trajectory.answer
    verdicts = [_clip_verdicts(rng, clip) for clip in clips]
    judged = [_judged_clip(clip.number, clip.category, both) for clip, both in zip(clips, verdicts, strict=True)]

    for index, clip in enumerate(clips):
        prompt = prompts.clip_prompt(question, _history(verdicts[:index]), clip)
        yield Evaluation(prompt, "clip", clip.number, None, verdicts[index])

    for category in trajectory.categories:
        members = [index for index, clip in enumerate(clips) if clip.category == category]
        prompt = prompts.category_prompt(question, category, [judged[index] for index in members])
        qualities = _category_qualities(category, [clips[index].quality for index in members])
        yield Evaluation(prompt, "category", None, category, _overall_verdicts(rng, qualities))

    answer_verdicts = _answer_verdicts(rng, answer)
    prompt = prompts.answer_prompt(question, _history(verdicts), answer)
    yield Evaluation(prompt, "clip", answer.number, None, answer_verdicts)

    prompt = prompts.final_prompt(question, [*judged, _judged_clip(answer.number, "final", answer_verdicts)], answer)
    yield Evaluation(prompt, "final", None, "final", _overall_verdicts(rng, _final_qualities(trajectory)))


def _rows(rng: random.Random, evaluation: Evaluation, task_id: str, timestamp: datetime) -> Iterator[dict[str, Any]]:
    for judge, verdict in zip(JUDGES, evaluation.verdicts, strict=True):
        yield {
            "conversations": [
                {"from": "human", "value": evaluation.prompt},
                {"from": "gpt", "value": judges.written(rng, verdict)},
            ],
            "metadata": {
                "model_name": judge.name,
                "provider": PROVIDER,
                "task_id": task_id,
                "evaluation_type": evaluation.evaluation_type,
                "clip_number": evaluation.clip_number,
                "category": evaluation.category,
                "timestamp": str(timestamp),
            },
        }


def _clip_verdicts(rng: random.Random, clip: Clip) -> list[Verdict]:
    return [
        {
            "reasonableness_score": judges.score(judge, rng, clip.quality),
            "summary": judges.clip_summary(judge, clip),
        }
        for judge in JUDGES
    ]


def _answer_verdicts(rng: random.Random, answer: Answer) -> list[Verdict]:
    return [
        {
            "correctness_score": judges.score(judge, rng, answer.quality),
            "summary": judges.answer_summary(judge, answer),
        }
        for judge in JUDGES
    ]


def _overall_verdicts(rng: random.Random, qualities: Mapping[str, float]) -> list[Verdict]:
    """Draw the judges' verdicts on a category or a trajectory, given the true quality for each score key."""
    verdicts = []
    for judge in JUDGES:
        scores = {key: judges.score(judge, rng, quality) for key, quality in qualities.items()}
        summary = judges.overall_summary(judge, scores)
        verdicts.append({"scores": scores, "summary": summary, "reasoning": judges.reasoning(rng, scores)})
    return verdicts


def _category_qualities(category: str, clip_qualities: Sequence[float]) -> dict[str, float]:
    """Average the clips for every metric, except goal_achievement, which is that of the best clip."""
    qualities = dict.fromkeys(TOOLS[category].metrics, fmean(clip_qualities))
    return qualities | {"goal_achievement": max(clip_qualities)}


def _final_qualities(trajectory: Trajectory) -> dict[str, float]:
    steps, answer = fmean(clip.quality for clip in trajectory.clips), trajectory.answer.quality
    return {
        "task_completion": 0.2 * steps + 0.8 * answer,
        "tool_use_quality": steps,
        "reasoning_coherence": 0.6 * steps + 0.4 * answer,
        "answer_correctness": answer,
    }


def _history(verdicts: Sequence[Sequence[Verdict]]) -> str:
    """Summarise the earlier clips for a later prompt, with the first judge's sentences."""
    sentences = (f"Clip {number}: {first['summary']}" for number, (first, *_) in enumerate(verdicts, start=1))
    return " ".join(sentences) or "none, the agent starts here."


def _judged_clip(number: int, category: str, verdicts: Sequence[Verdict]) -> str:
    """Render a judged clip for category and final prompts: every judge's sentence, and the mean score."""
    sentences = " | ".join(
        f"{PROVIDER}_{judge.name}: {verdict['summary']}" for judge, verdict in zip(JUDGES, verdicts, strict=True)
    )
    mean = fmean(next(iter(verdict.values())) for verdict in verdicts)
    return f"Clip {number} ({category}): {sentences} (Score: {mean:.2f})"


def new_steps() -> Iterator[dict[str, Any]]:
    """Yield the steps of a task that is not in the sample: prompts without answers, for `score_trajectories.py`."""
    trajectory = draw_trajectory(random.Random(f"{NEW_SEED}:0"))
    for row in sample_rows(NEW_SEED, tasks=1):
        metadata = row["metadata"]
        number = metadata["clip_number"]
        if number and number <= len(trajectory.clips) and metadata["model_name"] == JUDGES[0].name:
            kept = {"task_id": "new_task", "evaluation_type": "clip", "clip_number": number}
            yield {"id": f"step {number}", "prompt": row["conversations"][0]["value"], "metadata": kept}


def write_rows(output: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows as JSONL, completely or not at all, and return their number."""
    count = 0
    with atomic_write(output) as stream:
        for row in rows:
            stream.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
            count += 1
    return count


def _command(arguments: argparse.Namespace) -> ExitCode:
    if arguments.new_steps:
        cli.emit(f"{arguments.new_steps}: {write_rows(arguments.new_steps, new_steps())} steps")
    if arguments.output:
        rows = write_rows(arguments.output, sample_rows(arguments.seed, arguments.tasks))
        cli.emit(f"{arguments.output}: {rows} rows on {arguments.tasks} tasks")
    return ExitCode.DONE


def main() -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.make_sample", description="Make a synthetic finetune.jsonl of judged trajectories."
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the sample to this file")
    seed = "another seed gives other trajectories (default %(default)s)"
    parser.add_argument("--seed", type=int, default=0, help=seed)
    parser.add_argument("--tasks", type=int, default=DEFAULT_TASKS, help="number of tasks (default %(default)s)")
    parser.add_argument("--new-steps", type=Path, metavar="FILE", help="write three steps without answers to this file")
    return cli.run(_command, parser)
