"""What serve_judge.py does under load: one request at a time against many clients, all with single steps.

    python benchmarks/serve.py --run demo/saves/step_judge                    one client, then 32
    python benchmarks/serve.py --run demo/saves/step_judge --minutes 10       and ten minutes of 32 clients: memory

Every request is one step that the server has not seen, as trainers send them: the steps of labelled runs, each with
its history, in a random order, so those of one run meet only by chance. Latency is what a client measures. Server and
clients share the machine. Memory is the server's resident set.
"""

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from prmkit.trajectories.importing import read_runs  # noqa: E402

Step = dict[str, Any]


def steps_of_runs(seed: int) -> list[Step]:
    """All steps of the labelled runs that ship, in a random order; a seed makes them new to the server."""
    found: list[Step] = []
    for run in read_runs([ROOT / "examples" / "labelled_runs.jsonl"]):
        said = [{"role": "assistant", "content": step.text or step.thought or "…"} for step in run.steps]
        for place, message in enumerate(said):
            found.append({"task": f"{run.task} (no. {seed})", "history": said[:place], "step": message})
    random.Random(seed).shuffle(found)
    return found


async def load(url: str, steps: list[Step], clients: int, seconds: float | None = None) -> dict[str, Any]:
    """Send all steps, each in a request, from so many clients; or again and again for a time."""
    waits: list[float] = []
    statuses: dict[str, int] = {}
    left = iter(steps)
    began = time.perf_counter()

    async def client(session: httpx.AsyncClient) -> None:
        for step in left:
            started = time.perf_counter()
            answer = await session.post("/v1/score", json={"steps": [step]})
            waits.append(time.perf_counter() - started)
            status = str(answer.status_code) if answer.is_error else answer.json()["results"][0]["status"]
            statuses[status] = statuses.get(status, 0) + 1
            if seconds is not None and time.perf_counter() - began > seconds:
                return

    async with httpx.AsyncClient(base_url=url, timeout=300) as session:
        await asyncio.gather(*(client(session) for _ in range(clients)))
    took = time.perf_counter() - began
    waits.sort()
    return {
        "clients": clients,
        "steps": len(waits),
        "steps_per_second": round(len(waits) / took, 1),
        "p50_ms": round(1000 * statistics.median(waits)),
        "p99_ms": round(1000 * waits[int(len(waits) * 0.99)]),
        "statuses": statuses,
    }


def resident(pid: int) -> int:
    """The resident set of a process, in MB."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) // 1024 if found else 0


def main() -> None:
    """Start a server, load it, and print one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, type=Path, help="a judge of raw runs")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--steps", type=int, default=400, help="in each part (default 400)")
    parser.add_argument("--minutes", type=float, default=0.0, help="also load it for so long, and watch the memory")
    arguments = parser.parse_args()
    command = [sys.executable, str(ROOT / "serve_judge.py"), "--run", str(arguments.run), "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "2"})
    try:
        url = next(found[0] for line in server.stderr or () if (found := re.search(r"http://\S+?:\d+", line)))
        asyncio.run(load(url, steps_of_runs(0)[:8], 1))  # warm
        for seed, clients in ((1, 1), (2, arguments.clients)):
            print(json.dumps(asyncio.run(load(url, steps_of_runs(seed)[: arguments.steps], clients))), flush=True)
        print(json.dumps({"server_mb": resident(server.pid)}), flush=True)
        if arguments.minutes:
            many = [step for seed in range(3, 400) for step in steps_of_runs(seed)]
            print(json.dumps(asyncio.run(load(url, many, arguments.clients, 60 * arguments.minutes))), flush=True)
            print(json.dumps({"server_mb": resident(server.pid)}), flush=True)
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
