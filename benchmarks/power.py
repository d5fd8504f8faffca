"""The statistical power of a held-out set of a given size: how often each gate of evaluate_judge.py is met or fails.

The judges are simulated, so the truth is known: a score is `reference + error`, and two judges share half of their
error variance. Each gate is run as the command runs it, on the scores of one evaluation type, four per task.

    python benchmarks/power.py --repeat 200
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from prmkit.errors import GateError
from prmkit.evaluation import compare, estimates, statistics
from prmkit.evaluation.estimates import as_json
from prmkit.evaluation.metrics import ALL
from prmkit.evaluation.predictions import Scores, by_mean

SIZES = (10, 20, 60, 200)
STEPS = 4
ERROR = 0.11
"""Standard deviation of the reference judge's error, which gives a Spearman correlation of about 0.85."""
MARGIN = 0.05


def made_up(tasks: int, noise: float, generator: np.random.Generator) -> tuple[Scores, Scores]:
    """Simulate two judges on the same steps, whose errors have the standard deviations `noise` and `ERROR`."""
    task = np.repeat(np.arange(tasks), STEPS)
    n = len(task)
    quality = np.clip(generator.normal(0.62, 0.13, tasks)[task] + generator.normal(0, 0.17, n), 0, 1)
    common = 0.5**0.5 * generator.normal(0, 1, n)
    errors = [common + 0.5**0.5 * generator.normal(0, 1, n) for _ in range(2)]
    judges = [np.clip(quality + size * error, 0, 1) for size, error in zip((noise, ERROR), errors, strict=True)]
    one, other = (_scores(predicted, quality, task) for predicted in judges)
    return one, other


def _scores(predicted: Any, reference: Any, task: Any) -> Scores:
    n, missing = len(task), np.full(len(task), np.nan)
    words = np.array(["clip"] * n, dtype=object)
    prompts = np.array([str(i) for i in range(n)], dtype=object)
    zeros = np.zeros(n, np.int64)
    return Scores(
        row=np.arange(n), prompt=prompts, evaluation_type=words, key=words, task=task, trajectory=task, kind=zeros,
        clip_number=missing, prompt_characters=missing, predicted=predicted, median=predicted, std=missing,
        below=np.full((n, 2), np.nan), reference=reference, references=reference[:, None],
        constant_mean=np.full(n, reference.mean()), constant_median=np.full(n, np.median(reference)),
        leaked_mean=missing, leaked_last=missing, weight=np.ones(n), judge_weights=np.ones((n, 1)),
    )  # fmt: skip


def outcomes(one: Scores, other: Scores) -> dict[str, bool]:
    """Return whether each gate fails or, for the margin and for 0.6, is met."""
    groups = [{"evaluation_type": name} | compare._differences(one, other) for name in (ALL, "clip")]
    compare._decide(groups)
    comparison = {"this": "this", "other": "other", "groups": as_json(groups)}
    sample = by_mean(one)
    order = estimates.measure(sample, statistics.spearman_within(sample), min_n=10)
    return {
        "worse": _fails(comparison, None),
        "within margin": not _fails(comparison, MARGIN),
        "above 0.6": order.low is not None and order.low >= 0.6,
    }


def _fails(comparison: dict[str, Any], margin: float | None) -> bool:
    try:
        compare.check_not_worse(comparison, margin)
    except GateError:
        return True
    return False


def true_loss(noise: float) -> float:
    """Return how much lower the Spearman correlation of a judge with this error is."""
    one, other = made_up(20_000, noise, np.random.default_rng(0))
    orders = [
        statistics.spearman_within(sample)(np.ones((1, sample.tasks)))[0] for sample in map(by_mean, (one, other))
    ]
    return float(orders[1] - orders[0])


def main() -> int:
    """Print the table for the README."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=200, metavar="N", help="simulations per cell (default 200)")
    arguments = parser.parse_args()
    header = " | ".join(f"{tasks} tasks" for tasks in SIZES)
    rows: dict[str, list[str]] = {}
    for noise in (ERROR, 0.125, 0.14, 0.17, 0.25):
        loss = true_loss(noise)
        for tasks in SIZES:
            generator = np.random.default_rng(tasks)
            found = [outcomes(*made_up(tasks, noise, generator)) for _ in range(arguments.repeat)]
            for gate in found[0]:
                share = sum(each[gate] for each in found) / len(found)
                rows.setdefault(f"{gate} | {abs(loss):.3f}", []).append(f"{share:.0%}")
    sys.stdout.write(f"gate | true loss of Spearman | {header}\n")
    for name, cells in sorted(rows.items()):
        sys.stdout.write(f"{name} | {' | '.join(cells)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
