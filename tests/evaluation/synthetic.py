"""Held-out data of the synthetic sample, and judges whose quality is known because they are made up."""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np

from prmkit.evaluation.heldout import Constants, HeldOut, HeldOutPrompt
from prmkit.evaluation.predictions import prediction_row
from prmkit.judge.score_trie import SCORES, distribution_of
from prmkit.judge.types import Distribution, Judgement
from prmkit.leniency import corrected_mean, estimate_leniency
from prmkit.prompts.cleaning import escape, leaked_scores
from prmkit.verdict import Shape, Unreadable, read_verdict, render_verdict
from tools.make_sample.sample import sample_rows

Judge = Callable[[HeldOutPrompt, str], float]
"""A prompt and a key -> the score."""

MEDIANS = {
    "clip": {"reasonableness_score": 0.65, "correctness_score": 0.8},
    "category": dict.fromkeys(
        ("tool_use_quality", "information_relevance", "content_extraction", "goal_achievement", "code_quality"), 0.65
    ),
    "final": dict.fromkeys(("task_completion", "tool_use_quality", "reasoning_coherence", "answer_correctness"), 0.7),
}

CONSTANTS: Constants = {
    name: {key: (median - 0.05, median) for key, median in keys.items()} for name, keys in MEDIANS.items()
}
"""Mean and median of the training labels."""


def write_data_folder(
    folder: Path, *, tasks: int = 12, seed: int = 7, formatting: str = "alpaca", name: str = "reward_model_full_eval"
) -> Path:
    """Write a held-out dataset and its sidecar in the form that the converter gives them."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, metas = [], []
    for line, row in enumerate(sample_rows(seed=seed, tasks=tasks), start=1):
        prompt, answer = (turn["value"] for turn in row["conversations"])
        verdict = read_verdict(answer)
        if isinstance(verdict, Unreadable):
            continue
        safe, label = escape(prompt)[0], escape(render_verdict(verdict), answer=True)[0]
        if formatting == "alpaca":
            rows.append({"instruction": safe, "input": "", "output": label})
        else:
            rows.append({"conversations": [{"from": "human", "value": safe}, {"from": "gpt", "value": label}]})
        metas.append(
            {
                "id": hashlib.sha256(f"{prompt}{row['metadata']['model_name']}{label}".encode()).hexdigest()[:16],
                "source": "finetune.jsonl",
                "line": line,
                "prompt_sha256": hashlib.sha256(prompt.encode()).hexdigest(),
                "repairs": list(verdict.repairs),
                "scores": dict(verdict.scores),
                "metadata": row["metadata"],
            }
        )
    write_lines(folder / f"{name}.jsonl", rows)
    write_lines(folder / f"{name}.meta.jsonl", metas)
    columns = {"prompt": "instruction", "query": "input", "response": "output"}
    entry = {"columns": columns} if formatting == "alpaca" else {"formatting": "sharegpt"}
    (folder / "dataset_info.json").write_text(json.dumps({name: {"file_name": f"{name}.jsonl", **entry}}))
    return folder


def write_lines(file: Path, rows: Iterable[object]) -> None:
    """Write JSONL."""
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def predictions_of(held_out: HeldOut, judge: Judge, *, mode: str = "expected") -> list[dict]:
    """What an evaluation of `judge` leaves in `predictions.jsonl`."""
    rows = []
    for prompt in held_out.prompts:
        scores = {key: judge(prompt, key) for key in prompt.shape.keys}
        given = {key: _said(score) if mode == "generate" else _felt(score) for key, score in scores.items()}
        std = None if mode == "generate" else next(iter(given.values())).std
        rows.append(prediction_row(prompt, Judgement("ok", given, prompt_tokens=len(prompt.prompt) // 4, std=std)))
    return rows


def _said(score: float) -> Distribution:
    """A score as it is read from generated text."""
    return Distribution(mean=score, median=score, mode=score, std=None, label_mass=None)


@cache
def _felt(score: float, spread: float = 0.08) -> Distribution:
    """A discrete bell around `score` that holds 97 % of the probability."""
    log = -0.5 * ((np.array(SCORES) - score) / spread) ** 2
    return distribution_of(list(log - np.logaddexp.reduce(log) + np.log(0.97)))


def noisy(noise: float, seed: int = 0) -> Judge:
    """The judges' mean plus noise: a judge that has learnt something."""
    generator = np.random.default_rng(seed)
    return lambda prompt, key: float(np.clip(prompt.reference.get(key, 0.5) + generator.normal(0, noise), 0, 1))


def constant(score: float = 0.65) -> Judge:
    """A judge that has learnt one number."""
    return lambda prompt, key: score


def usual() -> Judge:
    """A judge that says each key's training median, whatever it is shown: the likeliest way for a training to fail."""
    return lambda prompt, key: MEDIANS[prompt.evaluation_type].get(key, 0.6)


def pure_noise(seed: int = 0) -> Judge:
    """A judge that has learnt nothing."""
    generator = np.random.default_rng(seed)
    return lambda prompt, key: float(generator.uniform())


def copier(otherwise: float = 0.65) -> Judge:
    """A judge that repeats the scores that stand in the prompt, and knows nothing else."""

    def judge(prompt: HeldOutPrompt, key: str) -> float:
        leaked = leaked_scores(prompt.prompt)
        return float(np.mean(leaked)) if leaked else otherwise

    return judge


# --- a held-out set that is made up as well ---------------------------------------------------------------------------

JUDGES = ("judge_a", "judge_b")


def made_up(
    tasks: int = 60,
    clips: int = 4,
    *,
    keys: tuple[str, ...] = ("quality",),
    noise: float = 0.07,
    kinder: float = 0.0,
    asked: Callable[[int, str], bool] = lambda item, judge: True,
    judges: tuple[str, ...] = JUDGES,
    grid: float = 0.05,
    seed: int = 1,
    final: bool = True,
) -> HeldOut:
    """Steps of known quality that made-up judges have scored.

    Args:
        tasks: how many; odd ones are about code, the others about the web, and two agents share them by halves.
        clips: a task.
        keys: that every prompt asks for.
        noise: of each judge's scores.
        kinder: how much the last judge adds to the quality.
        asked: whether a judge scored an item; by its number and the judge's name.
        judges: their names.
        grid: scores are rounded to multiples of this.
        seed: another seed makes other steps.
        final: with a verdict on each whole run.
    """
    generator = np.random.default_rng(seed)
    prompts: list[HeldOutPrompt] = []
    for number in range(tasks):
        of_task = generator.normal(0.62, 0.13)
        kinds = [("clip", clip + 1) for clip in range(clips)] + [("final", None)] * final
        for kind, clip in kinds:
            quality = np.clip(of_task + generator.normal(0, 0.17 if kind == "clip" else 0.12), 0.02, 0.98)
            item = len(prompts)
            references = {
                judge: {key: _scored(quality, noise, kinder * (judge == judges[-1]), grid, generator) for key in keys}
                for judge in judges
                if asked(item, judge)
            }
            prompts.append(_made_up_prompt(number, kind, clip, keys, references, generator))
    items = [{judge: scores[key] for judge, scores in prompt.references.items()} for prompt in prompts for key in keys]
    leniency = estimate_leniency(items)
    corrected = tuple(
        replace(
            prompt,
            reference={
                key: corrected_mean({judge: scores[key] for judge, scores in prompt.references.items()}, leniency)
                for key in keys
            },
        )
        for prompt in prompts
    )
    return HeldOut("made_up_eval", Path("made_up.jsonl"), len(prompts), corrected, "sha", "file sha", leniency)


def _scored(quality: float, noise: float, kinder: float, grid: float, generator: np.random.Generator) -> float:
    score = np.clip(quality + kinder + generator.normal(0, noise), 0, 1)
    return round(float(np.round(score / grid) * grid), 6)


def _made_up_prompt(number, kind, clip, keys, references, generator) -> HeldOutPrompt:
    text = f"Task {number}, {kind} {clip}. " + "word " * int(generator.integers(20, 200))
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    group = "code" if number % 2 else "web"
    return HeldOutPrompt(
        id=sha256[:16],
        prompt=text,
        prompt_sha256=sha256,
        shape=Shape(keys, nested=len(keys) > 1),
        task=f"{group}_{number}",
        trajectory=f"{group}_{number}",
        evaluation_type=kind,
        clip_number=clip,
        metadata={"agent": "alpha" if number % 4 < 2 else "beta", "task_id": f"{group}_{number}"},
        references=references,
        reference={},
        answers={judge: json.dumps(scores) for judge, scores in references.items()},
    )


def without(rows: list[dict], left_out: Callable[[dict], bool]) -> list[dict]:
    """The predictions of a judge that wrote nothing readable for some of them."""
    unread = {"status": "unparsed", "reason": "no JSON object", "scores": {}, "score": None, "std": None}
    return [row | unread if left_out(row) else row for row in rows]
