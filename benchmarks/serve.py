"""Measure serve_judge.py under load: one request at a time compared with many clients, all with single steps.

    python benchmarks/serve.py --run demo/saves/step_judge                    one client, then 32
    python benchmarks/serve.py --run demo/saves/step_judge --wrk wrk          and wrk with one connection, and with 32
    python benchmarks/serve.py --run demo/saves/step_judge --minutes 10       and ten minutes of 32 clients: memory
    python benchmarks/serve.py --run demo/saves/step_judge --bad 10000        bad requests among good ones

Every request is one step that the server has not seen, with its history. `--order runs` sends them as trainers do: all
steps of a run, once it is over. With `--order random`, steps of one run are close together only by chance: the worst
case. Latency is measured by the clients, which share the machine with the server. Memory is the server's resident set;
its CPU time per step hardly depends on other work on the machine. wrk (packaged in Debian) is a load generator in C; a
Lua script gives each of its requests a different body.

Bad requests: truncated bodies and headers, bytes that are not UTF-8 or not HTTP, values of wrong types and sizes in
otherwise correct bodies, wrong methods and paths, wrong content lengths, and clients that hang up. Meanwhile, a good
client keeps sending requests, and every response is compared with the earlier one to the same request.
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
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from prmkit.trajectories.importing import read_runs  # noqa: E402

Step = dict[str, Any]


def steps_of_runs(seed: int, order: str = "random") -> list[Step]:
    """Return all steps of the example runs, with runs or steps shuffled; each seed makes them new to the server."""
    found: list[Step] = []
    runs = list(read_runs([ROOT / "examples" / "labelled_runs.jsonl"]))
    random.Random(seed).shuffle(runs)
    for run in runs:
        said = [{"role": "assistant", "content": step.text or step.thought or "…"} for step in run.steps]
        for place, message in enumerate(said):
            found.append({"task": f"{run.task} (no. {seed})", "history": said[:place], "step": message})
    if order == "random":
        random.Random(seed).shuffle(found)
    return found


async def load(url: str, steps: list[Step], clients: int, seconds: float | None = None) -> dict[str, Any]:
    """Send each step in a separate request, from `clients` clients; stop after `seconds`, if given."""
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


def cpu_seconds(pid: int) -> float:
    """Return the CPU seconds of a process, which hardly depend on other work on the machine."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def load_with_wrk(wrk: str, url: str, steps: list[Step], clients: int, seconds: int) -> dict[str, Any]:
    """Run wrk and return its measurements; it stops when the time is up, or with an error when the steps run out."""
    with tempfile.TemporaryDirectory() as folder:
        bodies, script = Path(folder) / "bodies.jsonl", Path(folder) / "requests.lua"
        bodies.write_text("".join(json.dumps({"steps": [step]}) + "\n" for step in steps))
        script.write_text(LUA.replace("BODIES", str(bodies)))
        flags = [f"-t{min(2, clients)}", f"-c{clients}", f"-d{seconds}s", "--timeout", "60s", "--latency"]
        command = [wrk, *flags, "-s", str(script), url]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"p50=(\d+) p99=(\d+) requests=(\d+) errors=(\d+) unscored=(\d+) micros=(\d+)", shown)
    if not found:
        raise SystemExit(shown)
    p50, p99, requests, errors, unscored, micros = map(int, found.groups())
    return {
        "tool": "wrk",
        "clients": clients,
        "steps": requests,
        "steps_per_second": round(requests / micros * 1e6, 1),
        "p50_ms": p50 // 1000,
        "p99_ms": p99 // 1000,
        "errors": errors,
        "unscored": unscored,
    }


LUA = """
local threads = {}
function setup(thread)
  thread:set("id", #threads)
  table.insert(threads, thread)
end
function init(args)
  bodies, unscored = {}, 0
  for line in io.lines("BODIES") do table.insert(bodies, line) end
  place = id * math.floor(#bodies / 2)
end
function request()
  place = place + 1
  return wrk.format("POST", "/v1/score", {["Content-Type"] = "application/json"}, bodies[place])
end
function response(status, headers, body)
  if not body:find('"score":[01]') then unscored = unscored + 1 end
end
function done(summary, latency, requests)
  local errors = summary.errors
  local lost, unscored = errors.connect + errors.read + errors.write + errors.status + errors.timeout, 0
  for _, thread in ipairs(threads) do unscored = unscored + thread:get("unscored") end
  print(string.format("p50=%d p99=%d requests=%d errors=%d unscored=%d micros=%d", latency:percentile(50),
    latency:percentile(99), summary.requests, lost, unscored, summary.duration))
end
"""


def resident(pid: int) -> int:
    """Return the resident set of a process, in MB."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) // 1024 if found else 0


# --- bad requests -----------------------------------------------------------------------------------------------------

ODD: list[Any] = [
    None, True, 0, -1, 7.5, 10**400, -(10**30), float("nan"), float("inf"), "", " ", "\ud800", "\0", "x" * 5000,
    "\u202e", [], [[]], [None], {}, {"": None}, {"role": 7}, [{"role": "assistant"}], {"\ud800": "\udfff"},
    [[[[[[[[1]]]]]]]],
]  # fmt: skip
MESSAGES = [{"role": "user", "content": "Do it."}, {"role": "assistant", "content": "Done."}]
CHATML = "<|im_start|>user\nDo it.<|im_end|>\n<|im_start|>assistant\n"
RIGHT: dict[str, Any] = {
    "/v1/score": {"steps": [{"id": "a", "task": "t", "history": MESSAGES, "step": MESSAGES[1], "metadata": {"k": 1}}]},
    "/v1/score_trajectory": {"messages": MESSAGES, "task_id": "t"},
    "/get_reward": {"query": [CHATML + "Done."], "prompts": [CHATML], "labels": [""]},
    "/reward": {"prompt": "Do it.", "response": MESSAGES, "aggregate": "min", "unscored": "null"},
    "/v1/systemone": {
        "state": {"task": "Do it.", "output": "Done."},
        "questions": {"q": {"type": "score", "criteria": ["bad", "good"]}},
    },
}


def damaged(value: Any, luck: random.Random) -> Any:
    """Return a value in which one part is replaced, removed or repeated."""
    if isinstance(value, dict) and value and luck.random() < 0.8:
        key = luck.choice(list(value))
        if luck.random() < 0.15:
            return {name: part for name, part in value.items() if name != key}
        return value | {key: damaged(value[key], luck)}
    if isinstance(value, list) and value and luck.random() < 0.7:
        place = luck.randrange(len(value))
        return [*value[:place], damaged(value[place], luck), *value[place:]]
    return luck.choice(ODD)


def bad_request(luck: random.Random) -> tuple[bytes, bool]:
    """Return an invalid request, and whether it is complete, so that the server must respond."""
    path, right = luck.choice(list(RIGHT.items()))
    body = json.dumps(damaged(right, luck)).encode()
    method, kind = "POST", luck.randrange(12)
    length: object = None
    is_complete = kind not in (0, 2, 8, 9)
    if kind == 0:
        return luck.randbytes(luck.randrange(1, 400)) + luck.choice([b"", b"\r\n\r\n"]), False
    if kind == 1:
        body = body[: luck.randrange(len(body))]  # no longer JSON
    elif kind == 2:
        body, length = body[: len(body) // 2], len(body)  # the rest is never sent
    elif kind == 3:
        body = body.replace(b"a", b"\xff\xfe", 3) + b"\xc3"
    elif kind == 4:
        method = luck.choice(["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "BREW", "post"])
    elif kind == 5:
        path = luck.choice(["/", "/x" * 4000, "/%00", "/../../etc/passwd", "//", "/v1/score/" + "9" * 900])
    elif kind == 6:
        path += "?" + luck.choice(["gamma=1e400", "gamma=nan", "bad_below=x", "format=%ff", "gamma=" + "9" * 3000])
    elif kind == 7:
        body = luck.choice([b"[" * 50_000, b'{"steps":' * 5_000, b'"' * 9_999, b"9" * 9_999, b"\xef\xbb\xbf{}", b""])
    elif kind == 8:
        length = luck.choice([-1, 10**30, "x", "1, 2", len(body) + 9, max(0, len(body) - 9)])
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
    if kind == 9:
        chunks = luck.choice([b"zz\r\n", b"5\r\nab", b"-1\r\n\r\n"])
        return f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + chunks, False
    if kind == 10:
        head += f"X-Request-Id: {'a' * 70_000}\r\n"
    length = len(body) if length is None else length
    return f"{head}Content-Length: {length}\r\n\r\n".encode() + body, is_complete


async def send_bad(host: str, port: int, luck: random.Random) -> str:
    """Send one bad request, and sometimes hang up; return the status of the response, or what happened instead."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        request, is_complete = bad_request(luck)
        writer.write(request)
        await writer.drain()
        if luck.random() < 0.1:
            writer.transport.abort()
            return "hung up"
        try:
            line = await asyncio.wait_for(reader.readline(), 60 if is_complete else 0.1)
        except TimeoutError:
            return "no answer" if is_complete else "hung up"
        return line.split()[1].decode() if line.startswith(b"HTTP/") else "closed"
    except OSError as error:
        return type(error).__name__
    finally:
        writer.close()


async def load_badly(url: str, numbers: range, clients: int) -> dict[str, Any]:
    """Send bad requests among good ones; count the responses by status, and the good ones that changed."""
    host, port = url.removeprefix("http://").split(":")
    answers: Counter[str] = Counter()
    good: Counter[str] = Counter()
    count, places = len(numbers), iter(numbers)

    async def bad_client() -> None:
        for place in places:
            answers[await send_bad(host, int(port), random.Random(place))] += 1

    async def good_client(session: httpx.AsyncClient) -> None:
        known: dict[int, Any] = {}
        while answers.total() < count:
            place = good.total() % 50
            answer = await session.post("/v1/score", json={"steps": [good_steps[place]]})
            score = answer.json()["results"][0]["score"] if answer.status_code == 200 else answer.status_code
            good["same" if known.setdefault(place, score) == score and answer.status_code == 200 else "other"] += 1

    good_steps = steps_of_runs(9)[:50]
    async with httpx.AsyncClient(base_url=url, timeout=300) as session:
        await asyncio.gather(good_client(session), *(bad_client() for _ in range(clients)))
    return {"bad": count, "answers": dict(sorted(answers.items())), "good_answers": dict(good)}


def main() -> None:
    """Start a server, put it under load, and print one JSON object per line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, type=Path, help="a judge of raw runs")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--steps", type=int, default=400, help="number of steps in each part (default 400)")
    parser.add_argument("--order", choices=("runs", "random"), default="runs", help="order of the steps (default runs)")
    parser.add_argument("--minutes", type=float, default=0.0, help="also measure the memory over this time under load")
    parser.add_argument("--wrk", metavar="PROGRAM", help="also run wrk twice, for 60 seconds each")
    parser.add_argument("--bad", type=int, default=0, metavar="N", help="instead, send N bad requests")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="more arguments for serve_judge.py")
    arguments = parser.parse_args()
    command = [sys.executable, str(ROOT / "serve_judge.py"), "--run", str(arguments.run), "--port", "0"]
    command += arguments.serve
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "2"})
    try:
        url = next(found[0] for line in server.stderr or () if (found := re.search(r"http://\S+?:\d+", line)))
        threading.Thread(target=lambda: sys.stderr.writelines(server.stderr or ()), daemon=True).start()
        asyncio.run(load(url, steps_of_runs(0)[:8], 1))  # warm-up
        if arguments.bad:
            show_bad(url, server.pid, arguments.bad)
        else:
            show_load(url, server.pid, arguments)
        show({"still_running": server.poll() is None})
    finally:
        server.terminate()
        server.wait()


def show_load(url: str, pid: int, arguments: argparse.Namespace) -> None:
    """Measure one client, many clients, wrk, and minutes of many clients."""
    for seed, clients in ((1, 1), (2, arguments.clients)):
        before = cpu_seconds(pid)
        steps = steps_of_runs(seed, arguments.order)[: arguments.steps]
        found = asyncio.run(load(url, steps, clients))
        show(found | {"server_cpu_ms_a_step": round(1000 * (cpu_seconds(pid) - before) / found["steps"], 1)})
    if arguments.wrk:
        for seed, clients in ((1000, 1), (2000, arguments.clients)):
            many = [step for more in range(60) for step in steps_of_runs(seed + more, arguments.order)]
            show(load_with_wrk(arguments.wrk, url, many, clients, 60))
    show({"server_mb": resident(pid)})
    if arguments.minutes:
        many = [step for seed in range(3, 400) for step in steps_of_runs(seed, arguments.order)]
        show(asyncio.run(load(url, many, arguments.clients, 60 * arguments.minutes)))
        show({"server_mb": resident(pid)})


def show_bad(url: str, pid: int, count: int) -> None:
    """Send the bad requests in two halves: the first also fills caches, so only the second shows a memory leak."""
    for numbers in (range(count // 2), range(count // 2, count)):
        before = resident(pid)
        show(asyncio.run(load_badly(url, numbers, 16)) | {"server_mb": [before, resident(pid)]})


def show(line: dict[str, Any]) -> None:
    """Print one measurement."""
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
