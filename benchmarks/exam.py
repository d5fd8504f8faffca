"""Train a judge on people's labels alone: on some public sets, then examine it on another set that it has never seen.

    python benchmarks/exam.py --model demo/smollm2/model --template smollm2 \\
        who-and-when=FOLDER trajectory-judge=FOLDER

Each set in turn is the exam, and the others are the training data. The table has the trained judge, the model before
training, the constants, and the published results on the set. All commands are those of a user: import, convert, train,
examine. An interrupted command can be run again: finished training runs and scored steps are kept.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORK = Path(os.environ.get("PRMKIT_SCRATCH", ROOT / "benchmarks" / "scratch")) / "exam"
RUBRIC = Path(__file__).with_name("exam_rubric.yaml")
SHOWN = ("auroc", "average_precision", "first_error", "processbench_f1", "located")


def main() -> None:
    """Examine a judge on each set, and print a table for each."""
    arguments = _arguments()
    sets = dict(pair.split("=", 1) for pair in arguments.sets)
    for name, folder in sets.items():
        _import(name, Path(folder), arguments)
    for name in sets:
        _examine(name, [other for other in sets if other != name], arguments)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", metavar="SET=FOLDER", help="named as in import_trajectories.py --labels")
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="the base model")
    parser.add_argument("--template", required=True, help="LLaMA Factory's template for the model")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "cpu_smollm2.yaml", metavar="FILE")
    parser.add_argument("--steps", type=int, default=380, metavar="N", help="number of optimizer steps (default 380)")
    parser.add_argument("--runs", type=int, metavar="N", help="at most N runs of each exam (default: all)")
    parser.add_argument("--rubric", type=Path, default=RUBRIC, metavar="FILE", help="the rubric (default: a short one)")
    return parser.parse_args()


def _import(name: str, folder: Path, arguments: argparse.Namespace) -> None:
    """Write the rows to train on, and an exam of the first runs, ordered by the hash of their ids."""
    rows = WORK / f"{name}.jsonl"
    _run("import_trajectories.py", "--labels", name, folder, "--output", rows, "--rubric", arguments.rubric)
    runs = list(_lines(rows.with_suffix(".runs.jsonl")))
    runs.sort(key=lambda run: hashlib.sha256(run["trajectory_id"].encode()).digest())
    _write_if_changed(WORK / f"{name}_exam.jsonl", runs[: arguments.runs])


def _examine(name: str, others: list[str], arguments: argparse.Namespace) -> None:
    data, run = WORK / f"data_for_{name}", WORK / "saves" / f"judge_for_{name}"
    if not (run / "adapter_config.json").is_file():
        rows = [WORK / f"{other}.jsonl" for other in others]
        _run("convert_dataset.py", "--input", *rows, "--output-dir", data, "--eval-ratio", "0.05", "--no-task-variants")
        keys = {
            "model_name_or_path": arguments.model.resolve(), "template": arguments.template, "dataset_dir": data,
            "dataset": "reward_model_clip", "eval_dataset": "reward_model_clip_eval", "output_dir": run,
            "max_steps": arguments.steps, "cutoff_len": 1280,
        }  # fmt: skip
        _run("train.py", "--config", arguments.config, *(f"{key}={value}" for key, value in keys.items()))
    exam = WORK / f"{name}_exam.jsonl"
    shown = _run(
        "evaluate_judge.py", "--run", run, "--exam", exam, "--baseline", "--json", "--rubric", arguments.rubric,
        "--data-dir", data, "--min-label-mass", 0,
    )  # fmt: skip
    print(f"\nTrained on {', '.join(others)}; examined on {name}\n")
    for line in table(json.loads(shown)):
        print(line, flush=True)


def table(result: dict[str, Any]) -> Iterator[str]:
    """Format the entrants of an exam as a Markdown table, with the interval of AUROC."""
    exam = result["exam"]
    yield (
        f"{exam['labelled_steps']:,} labelled steps ({exam['bad_steps']:,} bad), {exam['runs']} runs, "
        f"{exam['tasks']} tasks\n"
    )
    yield "| | AUROC | 95 % | AP | first error | PB-F1 | step ±0 |"
    yield "|---|---:|---|---:|---:|---:|---:|"
    for entrant in result["entrants"]:
        values = [entrant["metrics"].get(name, {}) for name in SHOWN]
        cells = ["–" if each.get("value") is None else f"{each['value']:.3f}" for each in values]
        low, high = values[0].get("low"), values[0].get("high")
        name = entrant["name"] + (" *" if entrant["source"] else "")
        interval = "–" if low is None else f"{low:.2f} to {high:.2f}"
        yield f"| {name} | {cells[0]} | {interval} | {' | '.join(cells[1:])} |"
    yield from (f"\n\\* {source}" for source in dict.fromkeys(e["source"] for e in result["entrants"] if e["source"]))


def _run(script: str, *arguments: object) -> str:
    """Run a script and return its stdout; its stderr goes to the terminal."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, cwd=ROOT)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}")
    return done.stdout


def _lines(file: Path) -> Iterator[Any]:
    with file.open(encoding="utf-8") as stream:
        yield from map(json.loads, stream)


def _write_if_changed(file: Path, values: list[Any]) -> None:
    text = "".join(json.dumps(value) + "\n" for value in values)
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
