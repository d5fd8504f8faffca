"""Compare the guide's own settings with this repository's defaults, in one run on one machine.

    python benchmarks/train.py                                        a model of a million weights, on any machine
    python benchmarks/train.py --size 7b --words 3000 --cutoff 8192   Qwen2.5-7B with random weights; needs a GPU

Both ways learn the same: same rows, same rows an optimizer step, same LoRA, same cutoff_len. They differ in what is
about speed and memory alone:

- guide: the keys that the guide which this project began with writes (batch 2 x 8, bf16, tf32), and LLaMA Factory's
  defaults for all else;
- prmkit: training_config.yaml as train.py resolves it here (Liger and FlashAttention-2 where they are installed, fused
  optimizer, preprocessing fitted to rows and cores).

Both are started by the same launcher, each from an empty cache. The first step is left out of the tokens per second.
Peak memory is the GPU's reserved memory as LLaMA Factory logs it; without a GPU, the largest resident set of the
training process (VmHWM).
"""

import argparse
import json
import os
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "benchmarks" / "scratch" / "train"
sys.path.insert(0, str(ROOT))

from benchmarks.sizes import QWEN_7B, WORDS  # noqa: E402
from prmkit.demo.tiny_model import build_tiny_model  # noqa: E402
from prmkit.training.config import Override, render_yaml, resolve_config  # noqa: E402
from prmkit.training.environment import this_machine  # noqa: E402
from prmkit.training.launcher import Launch, run_to_end, started, train_command  # noqa: E402
from prmkit.training.supervisor import descendants_of  # noqa: E402

DIGITS = {"tokens a second": ",.0f", "peak memory, GiB": ",.2f", "first step after, s": ",.1f", "loss": ""}
"""How the figures are shown. The loss with all of its digits: equal ones say that both ways learnt the same."""


def write_rows(path: Path, rows: int, words: int, seed: int) -> None:
    """Rows of about as many words as a judged step has; lengths vary by half, as they do in the wild."""
    draw = random.Random(seed)
    with path.open("w") as stream:
        for _ in range(rows):
            text = " ".join(draw.choices(WORDS, k=draw.randint(words // 2, words * 3 // 2)))
            label = json.dumps({"reasonableness_score": draw.randint(0, 100) / 100, "summary": "as it should be"})
            stream.write(json.dumps({"instruction": text, "input": "", "output": label}) + "\n")


def build_model(size: str) -> None:
    """The tiny model; for 7b the same tokenizer with random weights of the real architecture, in bfloat16."""
    sample = WORK / "sample.jsonl"
    turns = [{"value": " ".join(WORDS)}, {"value": '{"reasonableness_score": 0.95, "summary": "as it should be"}'}]
    sample.write_text(json.dumps({"conversations": turns}) + "\n")
    build_tiny_model(sample, WORK / "tiny")
    if size == "tiny" or (WORK / "7b" / "config.json").exists():
        return
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    torch.set_default_dtype(torch.bfloat16)
    Qwen2ForCausalLM(Qwen2Config(**QWEN_7B, dtype="bfloat16")).save_pretrained(WORK / "7b")
    AutoTokenizer.from_pretrained(WORK / "tiny").save_pretrained(WORK / "7b")
    torch.set_default_dtype(torch.float32)


def shared_keys(size: str, steps: int, cutoff: int) -> dict[str, Any]:
    """What both ways have in common."""
    return {
        "model_name_or_path": str(WORK / size), "template": "qwen", "dataset": "rows", "dataset_dir": str(WORK),
        "cutoff_len": cutoff, "max_steps": steps, "logging_steps": 1, "save_strategy": "no", "seed": 42,
        "data_seed": 42, "warmup_steps": 0.1, "report_to": "none", "include_num_input_tokens_seen": True,
    }  # fmt: skip


def guide_config(size: str, steps: int, cutoff: int) -> dict[str, Any]:
    """The keys that the guide writes."""
    values = {
        **shared_keys(size, steps, cutoff), "stage": "sft", "do_train": True, "finetuning_type": "lora",
        "lora_rank": 64, "lora_alpha": 128, "lora_dropout": 0.1, "lora_target": "all", "learning_rate": 1e-4,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 8, "lr_scheduler_type": "cosine",
        "preprocessing_num_workers": 16, "overwrite_cache": True,
    }  # fmt: skip
    return {**values, "bf16": True, "tf32": True} if this_machine().gpus else {**values, "use_cpu": True}


def prmkit_config(size: str, steps: int, cutoff: int) -> dict[str, Any]:
    """training_config.yaml, resolved for this machine."""
    without = ("eval_dataset", "eval_strategy", "eval_steps", "use_swanlab", "plot_loss", "save_steps")
    changes = {**dict.fromkeys(without, ""), **shared_keys(size, steps, cutoff)}
    overrides = [Override(key, str(value), "benchmark") for key, value in changes.items()]
    return dict(resolve_config(ROOT / "training_config.yaml", overrides).values)


def measure(name: str, values: dict[str, Any]) -> dict[str, float]:
    """Train once and read off what it took."""
    folder = WORK / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "config.yaml").write_text(render_yaml({**values, "output_dir": str(folder / "run")}))
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
    trainer_log, first_step, largest = folder / "run" / "trainer_log.jsonl", 0.0, 0

    def look() -> None:
        nonlocal first_step, largest
        if not first_step and trainer_log.exists():
            first_step = time.perf_counter() - began
        largest = max([largest, *map(resident_bytes, descendants_of(child.process.pid))])

    began = time.perf_counter()
    command = train_command(folder / "config.yaml", Launch(), 1, torchrun=False)
    with started(command, folder / "log") as child:
        code = run_to_end(child, look, is_saved=lambda: True, patience=lambda: 0.0)
    if code:
        sys.exit(f"{name} failed, see {folder / 'log'}")
    entries = [json.loads(line) for line in trainer_log.read_text().splitlines()]
    entries = [entry for entry in entries if "loss" in entry]
    first, last = entries[0], entries[-1]
    seconds = [entry["total_tokens"] / entry["throughput"] for entry in (first, last)]
    gpu = max(entry.get("vram_reserved", 0.0) for entry in entries)
    return {
        "tokens a second": (last["total_tokens"] - first["total_tokens"]) / (seconds[1] - seconds[0]),
        "peak memory, GiB": gpu if gpu > 0 else largest / (1 << 30),
        "first step after, s": first_step,
        "loss": last["loss"],
    }


def resident_bytes(pid: int) -> int:
    """The largest resident set that a process has had."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def main() -> None:
    """Measure both ways, and print a table for RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["tiny", "7b"], default="tiny")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps, of 16 rows each (default 8)")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--words", type=int, default=150, help="of a row, on average (default 150; real: 3000)")
    parser.add_argument("--cutoff", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=2, help="the ways take turns; the better one counts (default 2)")
    given = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    build_model(given.size)
    write_rows(WORK / "rows.jsonl", given.rows, given.words, seed=1)
    (WORK / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.jsonl"}}))
    ways = {"guide": guide_config, "prmkit": prmkit_config}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for _ in range(given.repeat):
        for name, config in ways.items():
            found[name].append(measure(name, config(given.size, given.steps, given.cutoff)))
            print(name, found[name][-1], file=sys.stderr)
    machine = this_machine()
    print(f"GPUs: {', '.join(gpu.name for gpu in machine.gpus) or 'none'}; cores: {machine.cores}; {given}")
    print("| | guide | prmkit | ratio |\n|---|---|---|---|")
    for key in found["guide"][0]:
        best = max if key == "tokens a second" else min
        guide, ours = (best(run[key] for run in found[name]) for name in ways)
        label = f"loss after {given.steps} steps" if key == "loss" else key
        print(f"| {label} | {guide:{DIGITS[key]}} | {ours:{DIGITS[key]}} | {ours / guide:.2f} |")


if __name__ == "__main__":
    main()
