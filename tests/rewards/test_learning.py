"""A policy learns from a served judge what only the judge knows, and nothing from one that gives the same score to all.

Both judges are trained here and served by `serve_judge.py`, and TRL's real GRPOTrainer trains the policy. Both runs are
measured by the same judge, the one that knows the answers.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from prmkit.files import write_json
from prmkit.paths import EXPORT_NOTE
from prmkit.prompts.encoding import load_encoding
from prmkit.prompts.step import Rubric, load_rubric, step_prompts
from prmkit.serving.payloads import run_of_policy

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.network, pytest.mark.huge]

ANSWERS = {
    "Name a colour.": ("red", "green", "blue", "black", "white", "pink"),
    "Name an animal.": ("cat", "dog", "cow", "fox", "owl", "bee"),
}
RIGHT = {"Name a colour.": "blue", "Name an animal.": "fox"}
GOOD, POOR, CONSTANT = 0.95, 0.05, 0.57
RUBRIC = """
keys: [step_score]
instructions: Judge a step.
anchors: {0.0: wrong, 1.0: right}
context_tokens: 400
"""
STEPS, WINDOW = 60, 10


def judged(rubric: Rubric, question: str, answer: str) -> str:
    """The judge's prompt for one answer, as the server builds it."""
    run, _ = run_of_policy([{"role": "user", "content": question}], answer, includes_prompt=False)
    return next(step_prompts(run, rubric)).text


def train(folder: Path, pairs: list[tuple[str, str]], *, steps: int, sees_context: bool = True) -> None:
    """Train a model folder to answer prompts so; a prompt may be there several times, with different answers.

    Without `sees_context` its layers add nothing: what comes next depends on the last token alone.
    """
    import torch
    from transformers import AutoModelForCausalLM

    encoding, model = load_encoding(folder, "qwen"), AutoModelForCausalLM.from_pretrained(folder)
    for name, weights in model.named_parameters():
        if not sees_context and name.endswith(("o_proj.weight", "down_proj.weight")):
            weights.data.zero_()
            weights.requires_grad_(False)
    rows = [(encoding.prompt_ids(prompt), [*encoding.tokenizer(answer).input_ids, encoding.tokenizer.eos_token_id])
            for prompt, answer in pairs]  # fmt: skip
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((len(rows), longest), encoding.tokenizer.pad_token_id)
    labels = torch.full_like(ids, -100)
    for row, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor([*prompt, *answer])
        labels[row, len(prompt) : end] = torch.tensor(answer)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=2e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)


@contextmanager
def serving(judge: Path, rubric: Path) -> Iterator[str]:
    """The URL of `serve_judge.py` with this judge."""
    command = [sys.executable, ROOT / "serve_judge.py", "--model", judge, "--port", "0", "--rubric", rubric]
    with subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr
            yield next(found[0] for line in process.stderr if (found := re.search(r"http://\S+?:\d+", line)))
        finally:
            process.terminate()


TRAIN = """
import json, sys
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from prmkit.rewards.trl import make_reward_func

knowing_url, constant_url, model, steps, questions, output = sys.argv[1:]
knows = make_reward_func(knowing_url)
prompts = [[{"role": "user", "content": question}] for question in json.loads(questions)]
settings = trl.GRPOConfig(
    output_dir=output, per_device_train_batch_size=16, num_generations=8, max_completion_length=6, seed=0,
    max_steps=int(steps), learning_rate=5e-5, lr_scheduler_type="constant", report_to=[], use_cpu=True,
    save_strategy="no", disable_tqdm=True,
)

def train(url):
    judge = make_reward_func(url)
    given, measured = [], []
    def watched(**passed):
        given.append(judge(**passed))
        measured.append(knows(**passed))
        return given[-1]
    trl.GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model), processing_class=AutoTokenizer.from_pretrained(model),
        reward_funcs=watched, args=settings, train_dataset=Dataset.from_dict({"prompt": prompts * 64}),
    ).train()
    return {"given": given, "measured": measured}

print(json.dumps({"knowing": train(knowing_url), "constant": train(constant_url)}))
"""


def verdict(score: float) -> str:
    return f'{{"step_score": {score:.2f}}}'


def test_grpo_learns_what_only_the_judge_knows_and_nothing_from_a_constant_judge(
    tiny_model: Path, installed: Callable[..., Path], output_of: Callable[..., Any], tmp_path: Path
) -> None:
    """Takes about two minutes on two cores."""
    rubric_file = tmp_path / "rubric.yaml"
    rubric_file.write_text(RUBRIC)
    rubric = load_rubric(rubric_file)
    answers = [(question, answer) for question, answers in ANSWERS.items() for answer in answers]
    knowing = [
        (judged(rubric, question, answer), verdict(GOOD if RIGHT[question] == answer else POOR))
        for question, answer in answers
    ]
    copies = {name: Path(shutil.copytree(tiny_model, tmp_path / name)) for name in ("knowing", "constant", "policy")}
    train(copies["knowing"], knowing, steps=90)
    train(copies["constant"], [(knowing[0][0], verdict(CONSTANT))], steps=120, sees_context=False)
    train(copies["policy"], answers, steps=60)  # every answer equally often, so the right ones at one time in six
    for name in ("knowing", "constant"):
        settings = {"template": "qwen", "cutoff_len": 2048, "dtype": "float32", "rubrics": [rubric.sha256]}
        write_json(copies[name] / EXPORT_NOTE, settings)
    path = os.pathsep.join([str(installed("trl==1.16.0")), str(ROOT)])
    with serving(copies["knowing"], rubric_file) as knows, serving(copies["constant"], rubric_file) as constant:
        questions = json.dumps(list(ANSWERS))
        given = (knows, constant, copies["policy"], STEPS, questions, tmp_path / "out")
        found = output_of(sys.executable, path, TRAIN, *given, timeout=900)
    first, last = _first_and_last(found["knowing"]["measured"])
    assert last > first + 0.3 and last > 0.7, (first, last)  # 0.31 and 0.92
    first, last = _first_and_last(found["constant"]["measured"])
    assert abs(last - first) < 0.1, (first, last)  # 0.17 and 0.19: chance is one in six
    given = set(chain.from_iterable(found["constant"]["given"])) - {None}
    assert [*given] == [pytest.approx(CONSTANT, abs=0.01)]  # and not for want of rewards


def _first_and_last(rewards: list[list[float | None]]) -> tuple[float, float]:
    """The mean of the first and of the last ten training steps; what the judge is unsure of counts as wrong."""
    assert len(rewards) == STEPS
    means = [fmean(POOR if value is None else value for value in step) for step in rewards]
    return fmean(means[:WINDOW]), fmean(means[-WINDOW:])
