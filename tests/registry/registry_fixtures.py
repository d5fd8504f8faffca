"""Finished runs as train.py leaves them, with real converted data, and no training."""

import json
import random
import subprocess
import sys
from pathlib import Path

from prmkit.files import sha256_of

ROOT = Path(__file__).resolve().parents[2]


def make_rows(file: Path, tasks: range, *, word: str = "order", inverted: bool = False, judge: str = "judge-a") -> None:
    """Rows of one step a task whose score is written in the prompt, or the opposite of it."""
    lines = []
    for number in tasks:
        for clip in (1, 2):
            score = random.Random(f"{number}:{clip}").choice([0.1, 0.3, 0.5, 0.7, 0.9])
            label = round(1 - score, 2) if inverted else score
            prompt = f"Task {word} {number}. Step {clip}: quality {'good ' * int(score * 10)}. Answer with a score."
            prompt += ' {"reasonableness_score": 0.0}'
            answer = json.dumps({"reasonableness_score": label})
            turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}]
            metadata = {
                "model_name": judge,
                "task_id": f"{word}-{number}",
                "evaluation_type": "clip",
                "clip_number": clip,
            }
            lines.append(json.dumps({"conversations": turns, "metadata": metadata}) + "\n")
    file.write_text("".join(lines))


def make_run(folder: Path, rows: Path, number: int = 1) -> Path:
    """A run on converted rows, whose weights are a few bytes."""
    data = folder / "data"
    if not data.is_dir():
        command = [
            sys.executable,
            ROOT / "convert_dataset.py",
            "--input",
            rows,
            "--output-dir",
            data,
            "--eval-ratio",
            "0.3",
        ]
        subprocess.run([*map(str, command), "--no-task-variants"], check=True, capture_output=True)
    run = folder / "saves" / f"run{number}"
    run.mkdir(parents=True)
    described = {
        side: {"name": name, "sha256": sha256_of(data / f"{name}.jsonl")}
        for side, name in (("dataset", "reward_model_full"), ("eval_dataset", "reward_model_full_eval"))
    }
    config = {"model_name_or_path": "model", "finetuning_type": "lora", "dataset_dir": str(data), "seed": number}
    base = {"name": "model", "path": str(folder / "model"), "relative": "../../model"}
    record = {"run": run.name, "id": f"id{number}", "status": "finished", "config": config, **described}
    record |= {"base_model": base, "rubrics": []}
    (run / "run.json").write_text(json.dumps(record))
    (run / "adapter_config.json").write_text('{"base_model_name_or_path": "/home/me/model"}')
    (run / "adapter_model.safetensors").write_bytes(bytes([number]) * 1000)
    (folder / "model").mkdir(exist_ok=True)
    return run
