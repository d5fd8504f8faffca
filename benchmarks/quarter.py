"""Twelve weeks in the life of a judge: one batch per week, a shift in week 7, inverted labels in week 9.

    python benchmarks/quarter.py --work FOLDER [--weeks 12] [--kills 20]

Everything except the rows and the size of the model is real: convert_dataset.py, LLaMA Factory, evaluate_judge.py and
manage_judges.py as cron would run them. It fails unless the poisoned batch is refused, the shift is reported, rollback
works, and the registered versions are complete after every SIGKILL.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from prmkit import registered  # noqa: E402
from tools.demo.tiny_model import build_tiny_model  # noqa: E402

SHIFT, POISON = 7, 9
TASKS = 40
GRADES = {0.1: "failed", 0.3: "weak", 0.5: "partial", 0.7: "sound", 0.9: "excellent"}
LATER_GRADES = {0.1: "broken", 0.3: "thin", 0.5: "mixed", 0.7: "decent", 0.9: "superb"}
"""The words from the shift on, which no earlier judge has seen."""
CONFIG: dict[str, Any] = {
    "stage": "sft", "do_train": True, "template": "qwen", "finetuning_type": "lora", "use_cpu": True,
    "dataset": "reward_model_full", "eval_dataset": "reward_model_full_eval", "cutoff_len": 256,
    "preprocessing_num_workers": 1, "learning_rate": 3.0e-3, "max_steps": 15, "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1, "lr_scheduler_type": "cosine", "lora_rank": 32, "lora_alpha": 64,
    "lora_target": "all", "additional_target": "embed_tokens,lm_head", "dataloader_pin_memory": False,
    "disable_gradient_checkpointing": True, "logging_steps": 20, "save_strategy": "steps", "save_steps": 20,
    "save_total_limit": 1, "eval_strategy": "no", "report_to": "none", "seed": 1,
}  # fmt: skip


def write_week(file: Path, week: int) -> Path:
    """Write the rows of a week: one word of each prompt determines its score; the shifted weeks use other tools."""
    rng = random.Random(week)
    tool, grades = ("search", GRADES) if week < SHIFT else ("browser", LATER_GRADES)
    lines = []
    for number in range(TASKS):
        task = f"week{week:02d}-task{number:02d}"
        for clip in (1, 2, 3):
            weights = [1, 1, 1, 1, 1] if week < SHIFT else [5, 3, 1, 1, 1]
            score = rng.choices(list(GRADES), weights)[0]
            label = round(1 - score, 2) if week == POISON else score
            prompt = f"Task {task}, step {clip}. The agent used {tool}. The result was {grades[score]}.\n"
            prompt += 'Answer with JSON: {"reasonableness_score": 0.0}'
            answer = json.dumps({"reasonableness_score": label})
            metadata = {"model_name": "judge-a", "task_id": task, "evaluation_type": "clip", "clip_number": clip}
            turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}]
            lines.append(json.dumps({"conversations": turns, "metadata": metadata}) + "\n")
    file.write_text("".join(lines), encoding="utf-8")
    return file


def run(script: str, *arguments: object, expected: tuple[int, ...] = (0,)) -> subprocess.CompletedProcess[str]:
    """Run one of the scripts, as a user would."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in expected:
        raise SystemExit(
            f"{script} {arguments}: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
    return done


def retraining(week: int, rows: Path) -> list[str]:
    """Return the arguments of the command that cron runs every week."""
    command = [
        "retrain",
        "production",
        "--new",
        str(rows),
        "--promote-if-better",
        "--margin",
        "0.15",
        "--json",
        "--set",
        "max_steps=60",
    ]
    return [*command, "--why", f"week {week}"]


def check_whole(judges: Path) -> None:
    """Check that every version in the history exists and is complete."""
    for version in registered.state_of(registered.read_history(judges)).versions:
        registered.check_files(version, judges)


def kill_at_random(command: list[str], kills: int, longest: float, judges: Path) -> int:
    """Start a command and kill it after a random time, repeatedly; return how often it was killed."""
    done = 0
    for attempt in range(kills):
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "manage_judges.py"), *command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(random.Random(attempt).uniform(0.2, longest))
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            done += 1
        check_whole(judges)
    return done


def first_judge(work: Path) -> None:
    """Train the judge of week 0, and put it in production."""
    rows = write_week(work / "week00.jsonl", 0)
    build_tiny_model(rows, work / "model")
    run("convert_dataset.py", "--input", rows, "--output-dir", work / "data", "--eval-ratio", 0.4, "--no-task-variants")
    config = CONFIG | {"model_name_or_path": str(work / "model"), "dataset_dir": str(work / "data")}
    config |= {"output_dir": str(work / "saves" / "first")}
    (work / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    run("train.py", "--config", work / "config.yaml", "--evaluate")
    run("manage_judges.py", "add", work / "saves" / "first", "--why", "the first judge")
    run("manage_judges.py", "tag", "judge@1", "production")


def main() -> int:
    """Simulate the quarter and print what happened, one line per week."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--weeks", type=int, default=12)
    parser.add_argument("--kills", type=int, default=20)
    arguments = parser.parse_args()
    work: Path = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    judges = work / "judges"
    os.environ |= {registered.REGISTRY_VARIABLE: str(judges), "OMP_NUM_THREADS": "1"}
    if not judges.is_dir():
        first_judge(work)
    failures: list[str] = []
    for week in range(1, arguments.weeks + 1):
        rows = write_week(work / f"week{week:02d}.jsonl", week)
        began = time.monotonic()
        before = registered.find_version("production", judges)
        killed = kill_at_random(retraining(week, rows), arguments.kills, 25.0, judges) if week == 2 else 0
        if week == 3:
            failures += two_crons(week, rows)
        done = run("manage_judges.py", *retraining(week, rows), expected=(0, 4))
        result = json.loads(done.stdout)
        after = registered.find_version("production", judges)
        shift = [each for each in result["report"]["findings"] if "shifted" in each]
        line = {"week": week, "before": str(before), "after": str(after), "version": result["version"],
                "reasons": result["gate"]["reasons"], "shift": shift, "killed": killed,
                "seconds": round(time.monotonic() - began)}  # fmt: skip
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()
        check_whole(judges)
        failures += [f"week {week}: the shift was not reported"] if week == SHIFT and not shift else []
        failures += ["the poisoned batch was promoted"] if week == POISON and after != before else []
    failures += roll_back(judges)
    sys.stdout.write(run("manage_judges.py", "history").stdout)
    sys.stdout.write("\n".join(failures or ["all checks passed"]) + "\n")
    return len(failures)


def two_crons(week: int, rows: Path) -> list[str]:
    """Start two retrainings at once: one must run, and the other must report this and exit."""
    command = [sys.executable, str(ROOT / "manage_judges.py"), *retraining(week, rows)]
    both = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[1] for process in both]
    refused = [
        text for process, text in zip(both, said, strict=True) if process.returncode == 1 and "is retraining" in text
    ]
    return [] if len(refused) == 1 else [f"two crons: {[process.returncode for process in both]}"]


def roll_back(judges: Path) -> list[str]:
    """Roll production back to the previous version, if there was one."""
    held = registered.state_of(registered.read_history(judges)).tags["judge", "production"]
    if len(held) < 2:
        return ["nothing was promoted, so nothing could be rolled back"]
    run("manage_judges.py", "rollback", "production", "--why", "the end of the quarter")
    now = registered.find_version("production", judges).number
    return [] if now == held[-2] else ["rollback led to the wrong version"]


if __name__ == "__main__":
    sys.exit(main())
