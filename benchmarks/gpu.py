"""The parts of benchmarks/gpu.sh; each runs in a separate process and adds its lines to results.jsonl.

python benchmarks/gpu.py check                what is installed, against requirements.txt, and what is missing
python benchmarks/gpu.py prepare              the random model and its rows
python benchmarks/gpu.py training --way guide one way of benchmarks/train.py, with estimated and measured memory
python benchmarks/gpu.py scoring              reading scores against generating verdicts, at batch 1 and 8
python benchmarks/gpu.py parity               adapter against merged model, batch 1 against 8, in bf16
python benchmarks/gpu.py smollm2              the demo's real model: train, measure, export
python benchmarks/gpu.py serving              the same model as a server: one client against 32
python benchmarks/gpu.py table                everything that was measured so far
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import train  # noqa: E402
from benchmarks.score import made_up_rows, random_judge  # noqa: E402
from prmkit.judge.transformers_judge import LocalJudge  # noqa: E402
from prmkit.judge.types import Mode, Request, ScoringOptions  # noqa: E402

SIZES: dict[str, dict[str, int]] = {
    # The public rows of this kind have 900 to 1,500 tokens; prompts of 30,000 characters about 7,500.
    "7b": {
        "steps": 4, "rows": 96, "words": 1400, "cutoff": 4096, "prompt": 1200, "verdict": 200, "read": 32, "written": 4,
        "served": 600,
    },
    "tiny": {
        "steps": 2, "rows": 32, "words": 40, "cutoff": 256, "prompt": 100, "verdict": 20, "read": 16, "written": 4,
        "served": 8,
    },
}  # fmt: skip
"""What is trained on and scored: `read` and `written` prompts at batch 1, four times as many written at batch 8, and
`served` steps."""

IMPORTED = ("llamafactory", "transformers", "peft", "trl", "datasets", "accelerate", "torch", "orjson", "liger-kernel")
"""Distributions that the parts need. On a CPU liger-kernel may be missing: it is not used there."""
SERVING = ("fastapi", "uvicorn", "httpx", "prometheus-client")
"""What the part `serving` needs besides, with all that these need: some of it is imported by the first request only."""


def check(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Compare what is installed with what is pinned, and import what the parts import."""
    import torch

    pinned = dict(
        line.split("==") for line in (ROOT / "requirements.txt").read_text().split() if "==" in line and line[0] != "#"
    )
    for name in IMPORTED:
        found = version(name) if is_installed(name) else "missing"
        wanted = pinned.get(name)
        yield {"package": name, "found": found, "pinned": wanted}
        if found == "missing" and not (name == "liger-kernel" and not torch.cuda.is_available()):
            sys.exit(f"{name}: not installed. Give its wheel with --wheels.")
    from llamafactory.hparams import get_train_args  # noqa: F401

    for name in SERVING if given.smollm2 else ():
        for needed in (Requirement(line) for line in requires(name) or ()):
            if (needed.marker is None or needed.marker.evaluate({"extra": ""})) and not is_installed(needed.name):
                sys.exit(f"{needed.name}: not installed, and {name} needs it. Give its wheel with --wheels.")
    for file in ("configs/cpu_smollm2.yaml", "training_config.yaml", "finetune.jsonl"):
        if not (ROOT / file).is_file():
            sys.exit(f"{file}: missing.")
    if given.smollm2 and not (given.smollm2 / "config.json").is_file():
        sys.exit(f"{given.smollm2}: no model folder.")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    yield {"gpu": gpu, "python": sys.version.split()[0], "cores": os.cpu_count()}


def is_installed(name: str) -> bool:
    """Whether a distribution is installed."""
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


def prepare(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Build the model and the rows."""
    size = SIZES[given.size]
    lengths = train.prepare(given.size, size["rows"], size["words"], size["cutoff"])
    (train.WORK / "lengths.json").write_text(json.dumps(lengths))
    yield {"rows": len(lengths), "tokens": sum(lengths), "longest": max(lengths)}


def training(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Train one way."""
    size = SIZES[given.size]
    lengths = json.loads((train.WORK / "lengths.json").read_text())
    values = train.config_of(given.way, given.size, size["steps"], size["cutoff"])
    yield {"way": given.way, **train.measure(given.way, values, lengths)}


def scoring(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Score in both modes at both batch sizes, with one model: what is compared differs in nothing else."""
    size = SIZES[given.size]
    judge = random_judge(given.size, given.device)
    counts: tuple[tuple[Mode, int], ...] = (("expected", size["read"]), ("generate", size["written"]))
    for batch_size in (1, 8):
        for mode, at_batch_1 in counts:
            count = at_batch_1 * (4 if batch_size > 1 and mode == "generate" else 1)
            rows = made_up_rows(judge.encoding, size["prompt"], count)
            list(judge.score(rows[:batch_size], ScoringOptions(mode=mode, batch_size=batch_size, max_new_tokens=4)))
            reset_peak()
            began = time.perf_counter()
            list(judge.score(rows, ScoringOptions(mode=mode, batch_size=batch_size, max_new_tokens=size["verdict"])))
            speed = count / (time.perf_counter() - began)
            yield {"mode": mode, "batch": batch_size, "steps/s": speed, "GiB": peak(), "rows": count}


def reset_peak() -> None:
    """Forget the GPU's peak memory so far."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak() -> float:
    """The GPU's peak memory in GiB; 0 without one."""
    import torch

    return torch.cuda.max_memory_allocated() / (1 << 30) if torch.cuda.is_available() else 0.0


def parity(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Compare scores of an adapter at batch 1 with batch 8, and with those of the merged model.

    The adapter has LoRA's usual A and a random B, so it changes what the model says, as a trained one does.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    judge = random_judge(given.size, given.device)
    torch.manual_seed(0)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(judge.model, LoraConfig(r=64, lora_alpha=128, target_modules=targets))
    for name, weights in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights, std=0.01)
    rows = made_up_rows(judge.encoding, SIZES[given.size]["prompt"], 16)
    adapter = LocalJudge(judge.source, judge.encoding, model.eval())
    one, eight = scores(adapter, rows, 1), scores(adapter, rows, 8)
    merged = scores(LocalJudge(judge.source, judge.encoding, model.merge_and_unload().eval()), rows, 8)
    spread = max(one) - min(one)
    for name, left, right in (("batch 1 and 8", one, eight), ("adapter and merged, batch 8", eight, merged)):
        differences = [abs(a - b) for a, b in zip(left, right, strict=True)]
        mean = sum(differences) / len(differences)
        yield {"between": name, "largest": max(differences), "mean": mean, "spread of scores": spread}


def scores(judge: LocalJudge, rows: list[Request], batch_size: int) -> list[float]:
    """The expected scores; every row must get one."""
    found = [judgement.score for judgement in judge.score(rows, ScoringOptions(batch_size=batch_size))]
    known = [score for score in found if score is not None]
    if len(known) < len(found):
        sys.exit("some prompts got no score")
    return known


def smollm2(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Run the chain of `--demo --model smollm2` with a model folder that is there already."""
    folder = train.WORK.parent / "smollm2"
    run = folder / "saves" / "judge"
    convert = ["--input", str(ROOT / "finetune.jsonl"), "--output-dir", str(folder / "data"), "--no-task-variants"]
    learn = [f"dataset_dir={folder / 'data'}", f"output_dir={run}", f"export_dir={folder / 'exported'}", "--export"]
    seconds = {
        "convert": seconds_of("convert_dataset.py", *convert),
        "train and export": seconds_of("train.py", *smollm2_settings(given), *learn),
        "evaluate": seconds_of(
            "evaluate_judge.py", "--run", str(run), *(["--limit", "8"] if given.max_steps else ["--baseline"])
        ),
    }
    metrics = (run / "evaluation" / "metrics.json").read_text()
    (given.output / "metrics.json").write_text(metrics)
    yield {"seconds": seconds}


def smollm2_settings(given: argparse.Namespace) -> list[str]:
    """Arguments of train.py that fit the demo's configuration to the model's folder and to the device."""
    settings = ["--config", str(ROOT / "configs" / "cpu_smollm2.yaml"), f"model_name_or_path={given.smollm2}"]
    settings += ["use_cpu="] if given.device == "cuda" else []
    return settings + ([f"max_steps={given.max_steps}"] if given.max_steps else [])


def seconds_of(program: str, *arguments: str) -> float:
    """Run one of the project's programs, and return how long it took."""
    began = time.perf_counter()
    subprocess.run([sys.executable, str(ROOT / program), *arguments], check=True, cwd=ROOT, stdout=sys.stderr)
    return round(time.perf_counter() - began, 1)


def serving(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Train the demo's real model on steps of runs, serve it, and load it with single steps."""
    folder = train.WORK.parent / "serving"
    folder.mkdir(parents=True, exist_ok=True)
    steps, data, run = folder / "steps.jsonl", folder / "data", folder / "saves" / "judge"
    labels = ["--labels", "column", "--label-key", "labels", "--output", str(steps)]
    seconds_of("import_trajectories.py", str(ROOT / "examples" / "labelled_runs.jsonl"), *labels)
    places = ["cutoff_len=2048", f"dataset_dir={data}", f"output_dir={run}"]
    seconds_of("convert_dataset.py", "--input", str(steps), *smollm2_settings(given), *places)
    learn = ["dataset=reward_model_full", "eval_dataset="]
    seconds_of("train.py", *smollm2_settings(given), *places, *learn)
    for batch_size in (8, 32):
        load = ["--steps", str(SIZES[given.size]["served"]), "--serve", "--batch-size", str(batch_size)]
        command = [sys.executable, str(ROOT / "benchmarks" / "serve.py"), "--run", str(run), *load]
        shown = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        for line in map(json.loads, shown.splitlines()):
            if "clients" in line:
                yield {"batch": batch_size, **line}


def table(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Print what is in results.jsonl as Markdown."""
    lines = [json.loads(line) for line in (given.output / "results.jsonl").read_text().splitlines()]
    of = {part: [line for line in lines if line["part"] == part] for part in PARTS}
    ways = {line["way"]: {k: v for k, v in line.items() if k not in ("part", "way")} for line in of["training"]}
    if ways:
        print(train.table(ways), "\n")
    written = {line["batch"]: line["steps/s"] for line in of["scoring"] if line["mode"] == "generate"}
    if of["scoring"]:
        print("| batch | way | steps/s | ratio | GiB |\n|---:|---|---:|---:|---:|")
    for line in of["scoring"]:
        ratio = line["steps/s"] / written[line["batch"]] if line["batch"] in written else float("nan")
        print(f"| {line['batch']} | {line['mode']} | {line['steps/s']:.2f} | {ratio:.1f} | {line['GiB']:.1f} |")
    for part in ("check", "prepare", "parity", "smollm2", "serving"):
        for line in of[part]:
            print(json.dumps(line)[:400])
    yield from ()


PARTS = {part.__name__: part for part in (check, prepare, training, scoring, parity, smollm2, serving, table)}


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--way", choices=["guide", *train.CHANGES], default="guide")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--smollm2", type=Path, help="the model folder of python -m tools.demo.smollm2")
    parser.add_argument("--max-steps", type=int, default=0, help="of the smollm2 part")
    parser.add_argument("--output", type=Path, default=train.WORK.parent / "gpu", help="where results.jsonl grows")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    for result in PARTS[given.part](given):
        with (given.output / "results.jsonl").open("a") as stream:
            stream.write(json.dumps({"part": given.part, **result}) + "\n")
        print(f"{given.part}: {json.dumps(result)[:300]}", file=sys.stderr)
    print(f"{given.part}: {time.perf_counter() - began:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
