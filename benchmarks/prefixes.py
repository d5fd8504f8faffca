"""The cost of prompts with a common prefix: the steps of one growing run, scored one at a time and all together.

    python benchmarks/prefixes.py --model demo/smollm2/model      the demo's real model, untrained; minutes on a CPU
    python benchmarks/prefixes.py --model demo/exported_model     the demo's tiny judge

The run has 20 steps of about 60 tokens. When prompts are scored one at a time, they cannot share any computation.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from prmkit.judge.scorer import Scorer, judge_source_in  # noqa: E402
from prmkit.judge.types import Judgement, Request  # noqa: E402
from prmkit.prompts.step import load_rubric, step_prompts  # noqa: E402
from prmkit.trajectory import Call, Result, Step, Trajectory  # noqa: E402
from prmkit.verdict import asked_shape  # noqa: E402

STEPS = 20


def growing_run() -> Trajectory:
    """Return a run short enough for all earlier steps to stay in the prompts."""
    steps = tuple(
        Step(
            number,
            text=f"I look at page {number}.",
            calls=(Call("open", {"page": number}, f"c{number}"),),
            results=(Result(f"page {number}: " + "some words of the page, " * 3, f"c{number}"),),
            last=number == STEPS,
        )
        for number in range(1, STEPS + 1)
    )
    return Trajectory("run", "task", "Find the page that lists the opening hours of the museum.", steps)


def timed(ask: Callable[[], list[Judgement]]) -> tuple[float, list[Judgement]]:
    """Return the seconds that `ask` takes, and its judgements."""
    started = time.perf_counter()
    judged = ask()
    return time.perf_counter() - started, judged


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--steps", type=int, default=STEPS, help="score only the first N steps")
    arguments = parser.parse_args()
    scorer = Scorer(replace(judge_source_in(arguments.model), cutoff_len=8192))
    prompts = [prompt.text for prompt in step_prompts(growing_run(), load_rubric())][: arguments.steps]
    requests = [Request(text, shape) for text in prompts if (shape := asked_shape(text))]
    list(scorer.judgements(requests[:1]))  # loads the model
    alone, single = timed(lambda: [next(scorer.judgements([request])) for request in requests])
    together, all_at_once = timed(lambda: list(scorer.judgements(requests)))
    differences = [abs(one.score - other.score) for one, other in zip(single, all_at_once, strict=True)
                   if one.score is not None and other.score is not None]  # fmt: skip
    found = {
        "tokens": [each.prompt_tokens for each in single][:: max(1, len(single) - 1)],
        "alone_s": round(alone, 2),
        "together_s": round(together, 2),
        "ratio": round(alone / together, 2),
        "largest_difference": max(differences),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
