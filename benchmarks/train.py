"""Compare the settings that this project began with and its current ones, in one run on one machine.

    python benchmarks/train.py                                        a model of a million weights, on any machine
    python benchmarks/train.py --size 7b --words 1500 --cutoff 4096   Qwen2.5-7B with random weights; needs a GPU

All ways train on the same rows with the same LoRA, the same cutoff_len and, except where rows are packed, the same rows
in each optimizer step. They differ only in speed and memory:

- guide: the settings that this project began with (batches of 2 x 8, bf16, tf32), and LLaMA Factory's defaults for
  everything else;
- prmkit: training_config.yaml as train.py resolves it here (Liger and FlashAttention-2 where they are installed, fused
  optimizer, preprocessing fitted to rows and cores);
- single: prmkit with batches of one row (1 x 16), so that nothing is padded;
- unchecked: single without gradient checkpointing, which avoids recomputation but takes more memory;
- packed: prmkit with several rows in one sequence, which do not attend to each other (neat_packing);
- batched: packed, with four sequences at once;
- fastest: packed and unchecked;
- compiled: fastest, with torch.compile.

Every way is started by the same launcher with an empty cache. Tokens are counted without padding and without the first
step. Peak memory is the GPU memory that LLaMA Factory logs, next to prmkit's estimate; without a GPU, it is the largest
resident set of the training process (VmHWM).
"""

import argparse
import json
import math
import os
import random
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORK = Path(os.environ.get("PRMKIT_SCRATCH", ROOT / "benchmarks" / "scratch")) / "train"
sys.path.insert(0, str(ROOT))

from benchmarks.sizes import WORDS, save_qwen_7b  # noqa: E402
from prmkit.training.config import Override, render_yaml, resolve_config  # noqa: E402
from prmkit.training.environment import this_machine  # noqa: E402
from prmkit.training.launcher import Launch, run_to_end, started, train_command  # noqa: E402
from prmkit.training.model import estimate, read_model  # noqa: E402
from prmkit.training.supervisor import descendants_of  # noqa: E402
from tools.demo.tiny_model import build_tiny_model  # noqa: E402

SINGLE = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16}
UNCHECKED = {"disable_gradient_checkpointing": True}
PACKED = {"neat_packing": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
CHANGES: Mapping[str, Mapping[str, Any]] = {
    "prmkit": {},
    "single": SINGLE,
    "unchecked": {**SINGLE, **UNCHECKED},
    "packed": PACKED,
    "batched": {**PACKED, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "fastest": {**PACKED, **UNCHECKED},
    "compiled": {**PACKED, **UNCHECKED, "torch_compile": True},
}
"""The ways other than `guide`, and what each changes in training_config.yaml."""

ROWS_A_STEP = 16
SPREAD = 0.6
"""Standard deviation of the logarithm of the rows' lengths: one row in twenty has over 2.7 times the median, because
prompts grow in the course of a run."""

DIGITS = {"tokens a second": ",.0f", "GiB allocated": ",.2f", "GiB estimated": ",.2f", "first step after, s": ",.1f"}
"""The formats of the numbers; all others, such as the loss, are shown with all their digits."""


def write_rows(path: Path, rows: int, words: int, longest: int, seed: int) -> None:
    """Write rows as long as those of judged steps, of at most `longest` words of one token or slightly more."""
    draw = random.Random(seed)
    with path.open("w") as stream:
        for _ in range(rows):
            count = min(longest, max(16, round(draw.lognormvariate(math.log(words), SPREAD))))
            text = " ".join(draw.choices(WORDS, k=count))
            label = json.dumps({"reasonableness_score": draw.randint(0, 100) / 100, "summary": "as it should be"})
            stream.write(json.dumps({"instruction": text, "input": "", "output": label}) + "\n")


def build_model(size: str) -> None:
    """Build the tiny model; for 7b, use its tokenizer with random weights of the real architecture, in bfloat16."""
    WORK.mkdir(parents=True, exist_ok=True)
    sample = WORK / "sample.jsonl"
    turns = [{"value": " ".join(WORDS)}, {"value": '{"reasonableness_score": 0.95, "summary": "as it should be"}'}]
    sample.write_text(json.dumps({"conversations": turns}) + "\n")
    build_tiny_model(sample, WORK / "tiny")
    if size == "7b" and not (WORK / "7b" / "config.json").exists():
        save_qwen_7b(WORK / "7b", tokenizer=WORK / "tiny")


def measured_lengths(size: str) -> list[int]:
    """Return each row's number of tokens, prompt plus answer, as LLaMA Factory encodes them."""
    from prmkit.prompts.encoding import load_encoding

    encoding = load_encoding(WORK / size, "qwen")
    rows = map(json.loads, (WORK / "rows.jsonl").read_text().splitlines())
    return [sum(map(len, encoding.pair_ids(row["instruction"], row["output"]))) for row in rows]


def shared_keys(size: str, steps: int, cutoff: int) -> dict[str, Any]:
    """Return the keys that all ways share."""
    return {
        "model_name_or_path": str(WORK / size), "template": "qwen", "dataset": "rows", "dataset_dir": str(WORK),
        "cutoff_len": cutoff, "max_steps": steps, "logging_steps": 1, "save_strategy": "no", "seed": 42,
        "data_seed": 42, "warmup_steps": 0.1, "report_to": "none", "include_num_input_tokens_seen": "non_padding",
    }  # fmt: skip


def guide_config(size: str, steps: int, cutoff: int) -> dict[str, Any]:
    """Return the keys of `guide`."""
    values = {
        **shared_keys(size, steps, cutoff), "stage": "sft", "do_train": True, "finetuning_type": "lora",
        "lora_rank": 64, "lora_alpha": 128, "lora_dropout": 0.1, "lora_target": "all", "learning_rate": 1e-4,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 8, "lr_scheduler_type": "cosine",
        "preprocessing_num_workers": 16, "overwrite_cache": True,
    }  # fmt: skip
    return {**values, "bf16": True, "tf32": True} if this_machine().gpus else {**values, "use_cpu": True}


def config_of(way: str, size: str, steps: int, cutoff: int) -> dict[str, Any]:
    """Return the keys of one way; except for `guide`, they are training_config.yaml, resolved for this machine."""
    if way == "guide":
        return guide_config(size, steps, cutoff)
    without = ("eval_dataset", "eval_strategy", "eval_steps", "use_swanlab", "plot_loss", "save_steps")
    changes = {**dict.fromkeys(without, ""), **shared_keys(size, steps, cutoff), **CHANGES[way]}
    overrides = [Override(key, str(value), "benchmark") for key, value in changes.items()]
    return dict(resolve_config(ROOT / "training_config.yaml", overrides).values)


def measure(way: str, values: Mapping[str, Any], lengths: list[int]) -> dict[str, float]:
    """Train once, and return speed, memory and loss."""
    folder = WORK / way
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
        sys.exit(f"{way} failed; the end of {folder / 'log'}:\n{(folder / 'log').read_text()[-2000:]}")
    entries = [json.loads(line) for line in trainer_log.read_text().splitlines()]
    entries = [entry for entry in entries if "loss" in entry]
    gpu = max(entry.get("vram_allocated", 0.0) for entry in entries)
    return {
        "tokens a second": tokens_per_second(entries) * filled(values, lengths, entries[0]),
        "GiB allocated": gpu if gpu > 0 else largest / (1 << 30),
        "GiB reserved": max(entry.get("vram_reserved", 0.0) for entry in entries),
        "GiB estimated": estimated(values, lengths),
        "first step after, s": first_step,
        "loss": entries[-1]["loss"],
    }


def tokens_per_second(entries: list[dict[str, Any]]) -> float:
    """Return the tokens per second after the first step, as LLaMA Factory counts tokens."""
    first, last = entries[0], entries[-1]
    seconds = [entry["total_tokens"] / entry["throughput"] for entry in (first, last)]
    return float((last["total_tokens"] - first["total_tokens"]) / (seconds[1] - seconds[0]))


def filled(values: Mapping[str, Any], lengths: list[int], first: Mapping[str, Any]) -> float:
    """Return the fraction of the counted tokens that belong to rows: less than 1 if padding is counted as well.

    Args:
        values: LLaMA Factory's keys.
        lengths: the lengths of all rows, in tokens.
        first: LLaMA Factory's log entry of the first step; its `epoch` gives the number of packed sequences.
    """
    if values["include_num_input_tokens_seen"] == "non_padding":
        return 1.0
    in_a_step = int(values["per_device_train_batch_size"]) * int(values["gradient_accumulation_steps"])
    sequences = round(in_a_step / float(first["epoch"]))
    return sum(lengths) / (sequences * int(values["cutoff_len"]))


def estimated(values: Mapping[str, Any], lengths: list[int]) -> float:
    """Return the estimate of prmkit's checks before a run, in GiB."""
    model = read_model(Path(values["model_name_or_path"]))
    tokens = int(values["cutoff_len"]) if values.get("neat_packing") else min(max(lengths), int(values["cutoff_len"]))
    return float(estimate(model, values, tokens=tokens).total / (1 << 30))


def resident_bytes(pid: int) -> int:
    """Return the largest resident set that a process has had, in bytes."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def prepare(size: str, rows: int, words: int, cutoff: int) -> list[int]:
    """Build the model and the rows; return the rows' lengths in tokens."""
    build_model(size)
    write_rows(WORK / "rows.jsonl", rows, words, int(cutoff * 0.8), seed=1)  # no row is truncated
    (WORK / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.jsonl"}}))
    return measured_lengths(size)


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """Format the ways side by side, with the ratios of their speed and memory to those of the first."""
    ways = list(found)
    lines = [f"| | {' | '.join(ways)} |", f"|---|{'---:|' * len(ways)}"]
    for key in found[ways[0]]:
        lines.append(f"| {key} | {' | '.join(format(found[way][key], DIGITS.get(key, '')) for way in ways)} |")
    for key in ("tokens a second", "GiB allocated"):
        ratios = (f"{found[way][key] / found[ways[0]][key]:.2f}" for way in ways)
        lines.append(f"| {key}, ratio | {' | '.join(ratios)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure the ways alternately, and print a table for RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["tiny", "7b"], default="tiny")
    parser.add_argument("--ways", nargs="+", choices=["guide", *CHANGES], default=["guide", "prmkit"])
    parser.add_argument("--steps", type=int, default=8, help=f"optimizer steps of {ROWS_A_STEP} rows (default 8)")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--words", type=int, default=150, help="median words per row (default 150; realistic: 1500)")
    parser.add_argument("--cutoff", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=2, help="runs per way; the fastest counts (default 2)")
    given = parser.parse_args()
    lengths = prepare(given.size, given.rows, given.words, given.cutoff)
    found: dict[str, dict[str, float]] = {}
    for _ in range(given.repeat):
        for way in given.ways:
            values = config_of(way, given.size, given.steps, given.cutoff)
            run = measure(way, values, lengths)
            print(way, run, file=sys.stderr)
            found[way] = max(found.get(way, run), run, key=lambda run: run["tokens a second"])
    machine = this_machine()
    print(f"GPUs: {', '.join(gpu.name for gpu in machine.gpus) or 'none'}; cores: {machine.cores}; {given}")
    print(table(found))


if __name__ == "__main__":
    main()
