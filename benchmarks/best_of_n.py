"""Best of N on tau-bench's own results, for any judge, compared with picks that do not read the runs.

    python benchmarks/best_of_n.py FOLDER/gpt-4o-airline.json                               what a judge has to beat
    python benchmarks/best_of_n.py FOLDER/gpt-4o-airline.json --run saves/reward_model_training
    python benchmarks/best_of_n.py FOLDER/gpt-4o-airline.json --predictions scores.jsonl    scores from a file

The file is historical_trajectories/gpt-4o-airline.json of sierra-research/tau-bench (59a200c, MIT): 50 tasks, four
trials each, with the reward and the messages. Any other file of runs with outcomes works, too. Arguments after the file
are passed to evaluate_judge.py; scoring resumes where it was stopped.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from prmkit.evaluation.best_of_n import attempt_of, measure_picks, runs_with_outcome  # noqa: E402


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    arguments, judge = parser.parse_known_args()
    if judge:
        command = [
            sys.executable,
            str(ROOT / "evaluate_judge.py"),
            "--best-of-n",
            str(arguments.file),
            "--json",
            *judge,
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            sys.exit(done.returncode)
        picks = json.loads(done.stdout)["picks"]
    else:
        results = measure_picks([attempt_of(run) for run in runs_with_outcome(arguments.file)])
        picks = {
            name: {str(n): each.as_json() for n, each in enumerate(by_n, start=1)} for name, by_n in results.items()
        }
    print("\n".join(table(picks)))


def table(picks: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Format the picks as a Markdown table, with the interval at the largest N."""
    sizes = list(next(iter(picks.values())))
    yield f"| pick | {' | '.join(f'N={n}' for n in sizes)} | 95 % at N={sizes[-1]} |"
    yield f"|---|{'---:|' * len(sizes)}---|"
    for name, by_n in picks.items():
        values = ["–" if by_n[n]["value"] is None else f"{by_n[n]['value']:.3f}" for n in sizes]
        low, high = by_n[sizes[-1]]["low"], by_n[sizes[-1]]["high"]
        yield f"| {name} | {' | '.join(values)} | {'–' if low is None else f'{low:.2f} to {high:.2f}'} |"


if __name__ == "__main__":
    main()
