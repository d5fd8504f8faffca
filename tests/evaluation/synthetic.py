"""Held-out data of the synthetic sample, and judges whose quality is known because they are made up."""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from prmkit.evaluation.heldout import HeldOut, HeldOutPrompt, Medians
from prmkit.evaluation.predictions import prediction_row
from prmkit.judge.score_trie import SCORES, distribution_of
from prmkit.judge.types import Distribution, Judgement
from prmkit.prompts.leaked_scores import leaked_scores
from prmkit.prompts.special_tokens import neutralise
from prmkit.verdict import Unreadable, read_verdict, render_verdict
from tools.make_sample.sample import sample_rows

Judge = Callable[[HeldOutPrompt, str], float]
"""A prompt and a key -> the score."""

MEDIANS: Medians = {
    "clip": {"reasonableness_score": 0.65, "correctness_score": 0.8},
    "category": dict.fromkeys(
        ("tool_use_quality", "information_relevance", "content_extraction", "goal_achievement", "code_quality"), 0.65
    ),
    "final": dict.fromkeys(("task_completion", "tool_use_quality", "reasoning_coherence", "answer_correctness"), 0.7),
}


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
        safe, label = neutralise(prompt)[0], neutralise(render_verdict(verdict), answer=True)[0]
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
        rows.append(prediction_row(prompt, Judgement("ok", given, prompt_tokens=len(prompt.prompt) // 4)))
    return rows


def _said(score: float) -> Distribution:
    """A score as it is read from generated text."""
    return Distribution(mean=score, median=score, mode=score, std=None, label_mass=None)


def _felt(score: float, spread: float = 0.08) -> Distribution:
    """A discrete bell around `score` that holds 97 % of the probability."""
    log = -0.5 * ((np.array(SCORES) - score) / spread) ** 2
    return distribution_of(list(log - np.logaddexp.reduce(log) + np.log(0.97)))


def noisy(noise: float, seed: int = 0) -> Judge:
    """The mean judge plus noise: a judge that has learnt something."""
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
