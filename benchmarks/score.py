"""What a score costs: reading probabilities against generating the whole verdict. Same model, rows, device and run.

    python benchmarks/score.py --run demo/saves/reward_model_demo     a trained judge, its held-out rows, with Spearman
    python benchmarks/score.py --train                                trains one on verdicts as long as real ones first
    python benchmarks/score.py                                        the demo's model, untrained: throughput alone
    python benchmarks/score.py --size 7b --prompt-tokens 4000         Qwen2.5-7B with random weights; needs a GPU
    python benchmarks/score.py --through http://127.0.0.1:8000/v1 --model FOLDER --template smollm2 --rows 12
                                                                      one model here and in a vLLM that serves it

Every number comes from a separate process, one after the other, after a warm-up. Peak memory is what torch allocated
on the GPU; without a GPU, the largest resident set of that process. A model with random weights never ends its
verdict, so it writes --verdict-tokens of them: 200 is what a verdict with a summary of a judge takes.

Spearman's rho comes with the 95 % interval that evaluate_judge.py gives: a bootstrap over tasks.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORK = Path(os.environ.get("PRMKIT_SCRATCH", ROOT / "benchmarks" / "scratch")) / "score"
sys.path.insert(0, str(ROOT))

from benchmarks.sizes import WORDS, random_qwen_7b  # noqa: E402
from prmkit.evaluation import estimates, heldout, statistics  # noqa: E402
from prmkit.evaluation.metrics import MIN_SCORES  # noqa: E402
from prmkit.http_client import Connection, Endpoint  # noqa: E402
from prmkit.intervals import format_estimate  # noqa: E402
from prmkit.judge.scorer import Scorer  # noqa: E402
from prmkit.judge.sources import JudgeSource, config_of_run, judge_source_of_run  # noqa: E402
from prmkit.judge.transformers_judge import LocalJudge, load_model  # noqa: E402
from prmkit.judge.types import Judgement, Request, ScoringOptions  # noqa: E402
from prmkit.prompts.encoding import ChatEncoding, load_encoding  # noqa: E402
from prmkit.verdict import Shape, Verdict, asked_shape, read_verdict, render_verdict  # noqa: E402
from tools.demo.tiny_model import build_tiny_model  # noqa: E402

WARM_UP = 2


def train_on_long_verdicts(tokens: int, epochs: int) -> Path:
    """Train the demo's judge on the sample's clips, with verdicts of about so many tokens; its run folder.

    The sample's verdicts have 27 tokens, real ones 200 and more. Here their summaries are repeated until they are as
    long.
    """
    folder = WORK / f"verdicts-of-{tokens}-tokens-{epochs}-epochs"
    run = folder / "saves" / "judge"
    if (run / "adapter_model.safetensors").exists():
        return run
    folder.mkdir(parents=True, exist_ok=True)
    build_tiny_model(ROOT / "finetune.jsonl", folder / "model")
    encoding = load_encoding(folder / "model", "qwen")
    with (ROOT / "finetune.jsonl").open() as rows, (folder / "finetune.jsonl").open("w") as longer:
        longer.writelines(json.dumps(_with_long_verdict(json.loads(row), encoding, tokens)) + "\n" for row in rows)
    convert = ["--input", str(folder / "finetune.jsonl"), "--output-dir", str(folder / "data")]
    subprocess.run([sys.executable, str(ROOT / "convert_dataset.py"), *convert], check=True, stdout=sys.stderr)
    places = [f"model_name_or_path={folder / 'model'}", f"dataset_dir={folder / 'data'}", f"output_dir={run}"]
    learnt = ["--dataset", "reward_model_clip", "--epochs", str(epochs)]
    train = ["--config", str(ROOT / "configs" / "cpu_demo.yaml"), *learnt, *places]
    subprocess.run([sys.executable, str(ROOT / "train.py"), *train], check=True, stdout=sys.stderr, cwd=folder)
    return run


def _with_long_verdict(row: dict[str, Any], encoding: ChatEncoding, tokens: int) -> dict[str, Any]:
    answer = row["conversations"][1]
    verdict = read_verdict(answer["value"])
    if isinstance(verdict, Verdict) and "summary" in verdict.texts:
        summary = str(verdict.texts["summary"])
        times = tokens // len(encoding.tokenizer(summary).input_ids)
        longer = {**verdict.texts, "summary": " ".join([summary] * max(times, 1))}
        answer["value"] = render_verdict(Verdict(verdict.scores, verdict.nested, longer))
    return row


def prompts_of_run(run: Path, count: int) -> list[heldout.HeldOutPrompt]:
    """Held-out prompts, spread over all of them."""
    held_out = heldout.read_held_out(*heldout.place_of_held_out(config_of_run(run), None, None))
    return list(held_out.prompts[:: max(len(held_out.prompts) // count, 1)][:count])


def made_up_rows(encoding: ChatEncoding, tokens: int, count: int) -> list[Request]:
    """Prompts of about `tokens` tokens, all different."""
    chance = random.Random(1)
    per_word = len(encoding.prompt_ids(" ".join(WORDS * 20))) / (20 * len(WORDS))
    texts = (" ".join(chance.choices(WORDS, k=round(tokens / per_word))) for _ in range(count))
    return [Request(text, Shape(("reasonableness_score",), nested=False)) for text in texts]


def random_judge(size: str, device: str) -> LocalJudge:
    """A judge with random weights and the demo's tokenizer."""
    folder = WORK / "model"
    build_tiny_model(ROOT / "finetune.jsonl", folder)
    source = JudgeSource(folder, template="qwen", cutoff_len=32768, device=device)
    if size == "tiny":
        return load_model(source)
    return LocalJudge(source, load_encoding(folder, "qwen"), random_qwen_7b(device))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Score all rows in one way, in this process."""
    import torch

    mode, batch_size = arguments.measure.split(":")
    judge = (
        load_model(judge_source_of_run(arguments.run))
        if arguments.run
        else random_judge(arguments.size, arguments.device)
    )
    prompts = prompts_of_run(arguments.run, arguments.rows) if arguments.run else []
    rows = [Request(prompt.prompt, prompt.shape) for prompt in prompts]
    rows = rows or made_up_rows(judge.encoding, arguments.prompt_tokens, arguments.rows)
    longest = arguments.verdict_tokens * (2 if arguments.run else 1)
    options = ScoringOptions(mode, int(batch_size), max_new_tokens=longest)
    list(judge.score(rows[:WARM_UP], options))
    if judge.model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    judgements = list(judge.score(rows, options))
    seconds = time.perf_counter() - started
    if judge.model.device.type == "cuda":
        peak, machine = torch.cuda.max_memory_allocated(), torch.cuda.get_device_name()
    else:
        peak, machine = (
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            f"CPU, {torch.get_num_threads()} threads",
        )
    return {
        "steps_per_second": len({row.prompt for row in rows}) / seconds,
        "peak": peak,
        "machine": machine,
        "prompt_tokens": sum(judgement.prompt_tokens for judgement in judgements) / len(judgements),
        "scores": [judgement.score for judgement in judgements],
    }


def spearman(scores: list[float | None], prompts: list[heldout.HeldOutPrompt]) -> str:
    """Rank correlation with the judges' mean score, its interval over tasks, and how many prompts got a score."""
    pairs = [(score, prompt) for score, prompt in zip(scores, prompts, strict=True) if score is not None]
    sample = estimates.make_sample(
        [score for score, _ in pairs],
        [sum(prompt.reference.values()) / len(prompt.reference) for _, prompt in pairs],
        [prompt.task for _, prompt in pairs],
    )
    estimate = estimates.measure(sample, statistics.spearman(sample), min_n=MIN_SCORES)
    return f"{format_estimate(estimate.as_json(), '.3f')} ({estimate.n})"


def compare(arguments: argparse.Namespace) -> None:
    """Measure each way in a separate process and print the table."""
    results: dict[tuple[str, int], dict[str, Any]] = {}
    for batch_size in arguments.batch_sizes:
        for mode in ("generate", "expected"):
            command = [sys.executable, __file__, *sys.argv[1:], "--measure", f"{mode}:{batch_size}"]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            results[mode, batch_size] = json.loads(done.stdout.splitlines()[-1])
    some = next(iter(results.values()))
    print(f"{some['machine']}; {arguments.rows} rows, {some['prompt_tokens']:.0f} prompt tokens on average\n")
    print("| batch | way | steps/s | ratio | peak memory | Spearman, 95 % interval (rows scored) |")
    print("|---|---|---|---|---|---|")
    prompts = prompts_of_run(arguments.run, arguments.rows) if arguments.run else []
    for (mode, batch_size), result in results.items():
        ratio = result["steps_per_second"] / results["generate", batch_size]["steps_per_second"]
        order = spearman(result["scores"], prompts) if prompts else "untrained"
        speed, peak = f"{result['steps_per_second']:.2f}", f"{result['peak'] / 2**20:,.0f} MiB"
        print(f"| {batch_size} | {mode} | {speed} | {ratio:.1f} | {peak} | {order} |")


def compare_through(arguments: argparse.Namespace) -> None:
    """Score prompts of the sample with the model here and with a server that has the same one, and print the table.

    The sample's prompts are real ones for a judge of clips, whatever the model; scores of one that was never trained
    mean nothing, and are compared all the same: the arithmetic is what is measured.
    """
    source = JudgeSource(arguments.model, template=arguments.template, device="cpu", dtype="float32")
    endpoint = Endpoint(arguments.through, arguments.served_name)
    sent = _count_requests()
    requests = list(_prompts_of_sample(arguments.rows))
    writing = ScoringOptions("generate", max_new_tokens=arguments.verdict_tokens)
    ways = {
        "transformers, expected": Scorer(source),
        "vLLM exact, expected": Scorer(source, endpoint),
        "transformers, generating": Scorer(source, None, writing),
        "vLLM, generating": Scorer(source, endpoint, writing),
    }
    print(f"{len(requests)} prompts, at most {arguments.verdict_tokens} tokens of a verdict\n")
    print("| way | prompts/s | requests | scored | largest difference: score, label mass |")
    print("|---|---:|---:|---:|---|")
    reference: list[Judgement] = []
    for name, scorer in ways.items():
        list(scorer.judgements(requests[-WARM_UP:]))
        sent.clear()
        started = time.perf_counter()
        found = list(scorer.judgements(requests[:-WARM_UP]))
        speed = len(found) / (time.perf_counter() - started)
        reference = reference or found
        scored = sum(judgement.score is not None for judgement in found)
        is_compared = scorer.options.mode == "expected" and found is not reference
        differ = _differences(found, reference) if is_compared else "–"
        print(f"| {name} | {speed:.2f} | {len(sent) or '–'} | {scored} | {differ} |", flush=True)


def _prompts_of_sample(count: int) -> Iterator[Request]:
    """Different prompts, spread over the file."""
    with (ROOT / "finetune.jsonl").open() as rows:
        texts = list(dict.fromkeys(json.loads(row)["conversations"][0]["value"] for row in rows))
    for text in texts[:: len(texts) // (count + WARM_UP)][: count + WARM_UP]:
        if shape := asked_shape(text):  # every prompt of the sample shows what it asks for
            yield Request(text, shape)


def _count_requests() -> list[str]:
    """The paths that are posted to from here on."""
    sent: list[str] = []
    post = Connection._post_to

    async def counted(self: Connection, url: str, body: Mapping[str, Any]) -> bytes:
        sent.append(url)
        return await post(self, url, body)

    Connection._post_to = counted  # type: ignore[method-assign]
    return sent


def _differences(found: list[Judgement], reference: list[Judgement]) -> str:
    """The largest of the score and of the label mass, over all keys of all prompts."""
    scores, masses = [0.0], [0.0]
    for one, other in zip(found, reference, strict=True):
        for key, expected in other.scores.items():
            scores.append(abs(one.scores[key].mean - expected.mean))
            masses.append(abs((one.scores[key].label_mass or 0.0) - (expected.label_mass or 0.0)))
    return f"{max(scores):.1e}, {max(masses):.1e}"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a trained run")
    parser.add_argument("--train", action="store_true", help="train a judge on verdicts of --verdict-tokens first")
    parser.add_argument("--epochs", type=int, default=10, help="of that training (default 10)")
    parser.add_argument("--size", choices=["tiny", "7b"], default="tiny", help="of the random model without --run")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=400, help="without --run")
    parser.add_argument(
        "--verdict-tokens", type=int, default=200, help="of a verdict; a trained judge may take twice as many"
    )
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--device", default="auto", help="without --run")
    parser.add_argument("--through", metavar="URL", help="a vLLM that serves --model, as OpenAI's clients take it")
    parser.add_argument("--model", type=Path, help="the folder that the server serves")
    parser.add_argument("--template", default="qwen", help="of that model")
    parser.add_argument("--served-name", default="judge", help="the name that the server gives it (default judge)")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        arguments.run = train_on_long_verdicts(arguments.verdict_tokens, arguments.epochs)
    if arguments.size == "7b" and arguments.device == "auto":
        arguments.device = "cuda"
    if arguments.through:
        compare_through(arguments)
    elif arguments.measure:
        print(json.dumps(measure(arguments)))
    else:
        compare(arguments)


if __name__ == "__main__":
    main()
