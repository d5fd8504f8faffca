"""Small public-set look-alikes: made-up runs in the forms of AgentProcessBench, Who&When and trajectory-judge."""

import json
import random
from pathlib import Path
from typing import Any

TERNARY = (1, 1, 0, -1)


def write_lines(file: Path, values: list[Any]) -> Path:
    file.write_text("".join(json.dumps(value) + "\n" for value in values))
    return file


def every_step_labelled(tasks: int = 12, samples: int = 2) -> list[dict[str, Any]]:
    """Runs with a label of -1, 0 or 1 for every step, as AgentProcessBench has them."""
    chance = random.Random(1)
    return [_labelled_run(task, sample, chance) for task in range(tasks) for sample in range(samples)]


def _labelled_run(task: int, sample: int, chance: random.Random) -> dict[str, Any]:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Use tools."},
        {"role": "user", "content": f"Question {task}?"},
    ]
    labels = {}
    for step in range(chance.randint(2, 4)):
        labels[str(len(messages))] = chance.choice(TERNARY)
        messages.append({"role": "assistant", "content": f"I look up {task} in book {sample}, page {step}."})
        messages.append({"role": "user", "content": "Go on."})
    return {
        "question": f"Question {task}?", "messages": messages, "query_index": task, "sample_index": sample,
        "data_source": "quiz", "step_labels": labels, "final_label": chance.choice((1, -1)),
    }  # fmt: skip


def first_error_marked(runs: int = 12) -> list[dict[str, Any]]:
    """Failed runs of two agents with one mistake each, as Who&When has them."""
    chance = random.Random(2)
    values = []
    for number in range(runs):
        names = [chance.choice(("Searcher", "Coder", "Coder")) for _ in range(5)]
        mistake = (1, 2, 1, 3)[number % 4]
        values.append({
            "history": [{"role": "assistant", "name": name, "content": f"{name} works on {number}.{place}."}
                        for place, name in enumerate(names)],
            "question": f"Question {number} of the failed?", "question_ID": f"q{number}",
            "mistake_step": str(mistake), "mistake_agent": names[mistake], "is_correct": False,
        })  # fmt: skip
    return values


def injected_faults(tasks: int = 12) -> list[dict[str, Any]]:
    """A clean run and a faulty one of each task, as trajectory-judge has them; half of the faults are silent."""
    values = []
    for task in range(tasks):
        for faulty in (False, True):
            steps = [
                {"index": step, "thought": f"Thought {task}.{step}", "call": {"tool": "t", "args": {"n": step}},
                 "observation": {"ok": True, "data": {"task": task, "step": step, "faulty": faulty}}}
                for step in range(4)
            ]  # fmt: skip
            label = {
                "faulty": faulty, "failure_step": task % 3 + 1 if faulty else None,
                "failure_type": "skipped" if faulty else None, "outcome_correct": not faulty or task % 2 == 0,
            }  # fmt: skip
            name = f"I-{task}-{'fault' if faulty else 'clean'}"
            values.append({"trajectory_id": name, "instance_id": f"I-{task}", "goal": f"Goal {task}.",
                           "steps": steps, "label": label})  # fmt: skip
    return values
