"""Measure convert_dataset.py against other ways of writing the same variants, in one run on one machine.

    python benchmarks/convert.py --megabytes 200 1000

Each way reads the same synthetic input (3 evaluation types, 4 judges, 2 per prompt, 2,000 tasks; 4 in 10 answers are
not valid JSON) and writes reward_model_full and one variant for each evaluation type, judge and task:

- prmkit: this converter, with all its checks: verdicts, canonical labels, markers, duplicates, split, audit;
- usual: load all rows, filter the list for each variant, json.dump(indent=2);
- polars: read_ndjson, filter, write_ndjson;
- duckdb: read_json, COPY ... TO for each variant;
- copy: a plain copy of the tree that prmkit wrote, which shows the speed of the disk.

Only prmkit reads the verdicts; the others copy them unread. Each way runs in a separate process. Peak memory is the
sum of the proportional set sizes (PSS) of the process and its children, sampled ten times per second; CPU seconds
include the children. prmkit waits until its files are on the disk, while the others leave them in the page cache:
the second column of seconds includes the wait for the disk for all of them.

The disk needs space for about 25 times the input, added up over all sizes: each of the five ways writes about four
times the input, and nothing is deleted until all of them are done. The reason: ext4 without a journal does not reuse an
inode for one to six minutes after its file was deleted, and every new file in that block group has to skip all of those
first (recently_deleted() in fs/ext4/ialloc.c of the kernel). Creating 1,000 files took 0.7 to 0.9 seconds after
thousands of deletions instead of 0.05, so a way that ran after the deletion of another's tree would take seconds
longer. For the same reason, wait six minutes between two runs.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "benchmarks" / "scratch"
sys.path.insert(0, str(ROOT))

from benchmarks.measuring import run_measured  # noqa: E402

TASKS = 2_000
JUDGES = ("deepseek-chat", "kimi-k2-0711-preview", "judge-c", "judge-d")


# --- the input ----------------------------------------------------------------------------------------------------

_WORDS = """
the agent searched result page table query answer evidence step tool call returned status team season match record
stadium attendance river bridge chapter author volume engine valve orbit launch archive index entry
Straße größer résumé naïve 東京 データ 搜索 结果 Москва запрос
"""

_CLIP = """
You are judging one step of an agent.

Task Description: "{task}"

Previous Clips Summary: {history}

Current Clip (Clip {number}):
Tool Category: web
Tools Used: web-search
Content:
<think>{thought}</think>
<tool_call>
{{"name": "web-search", "arguments": {{"query": "{query}"}}}}
</tool_call>
<result>{result}</result>

Please evaluate this clip in the following JSON format:
{{
    "reasonableness_score": 0.85,  // Score from 0.0 to 1.0
    "summary": "What was done in this clip."
}}
"""

_WHOLE = """
You are judging {what} of an agent.

Task Description: "{task}"

Clips: {history} (Score: 0.{hundredths:02d})

Please provide your evaluation in the following JSON format:
{{
    "scores": {{
        "tool_use_quality": 0.85,
        "goal_achievement": 0.80
    }},
    "summary": "One sentence.",
    "reasoning": "Why."
}}
"""


def write_input(path: Path, megabytes: int) -> None:
    """Write about `megabytes` MB, the same every time. The file appears only when it is complete."""
    choose = random.Random(0)
    words = _WORDS.split()
    sentences = [" ".join(choose.choices(words, k=choose.randint(6, 18))) + "." for _ in range(4_000)]

    def prose(characters: int) -> str:
        return " ".join(choose.choices(sentences, k=max(characters // 80, 1)))

    goal = megabytes * 1_000_000
    part = path.with_suffix(".part")
    with part.open("w", encoding="utf-8") as stream:
        written = 0
        for task in range(TASKS):
            judges = choose.sample(JUDGES, 2)
            question = prose(200)
            attempt = 0
            while written < goal * (task + 1) / TASKS:
                attempt += 1
                names = {"task_id": f"webshaper_qa_{task}", "trajectory_id": f"webshaper_qa_{task}-{attempt}"}
                for kind, number, prompt in _prompts(choose, prose, question):
                    for judge in judges:
                        about = {**names, "model_name": judge, "evaluation_type": kind, "clip_number": number}
                        line = _row(choose, prose, prompt, about)
                        stream.write(line)
                        written += len(line.encode())
    part.replace(path)


def _prompts(choose: random.Random, prose: Callable[[int], str], task: str) -> Iterator[tuple[str, int | None, str]]:
    """Yield evaluation type, clip number and prompt of everything that is judged in one run."""
    for number in range(1, 8):
        yield (
            "clip",
            number,
            _CLIP.format(
                task=task,
                history=prose(800),
                number=number,
                thought=prose(400),
                query=prose(80),
                result=prose(choose.randint(500, 6_000)),
            ),
        )
    for kind in ("category", "final"):
        history = prose(2_500)
        yield kind, None, _WHOLE.format(what=kind, task=task, history=history, hundredths=choose.randrange(100))


def _row(choose: random.Random, prose: Callable[[int], str], prompt: str, about: dict[str, Any]) -> str:
    def score() -> float:
        return choose.randrange(0, 101, 5) / 100

    verdict: dict[str, Any] = {"reasonableness_score": score(), "summary": prose(700)}
    if about["evaluation_type"] != "clip":
        scores = {"tool_use_quality": score(), "goal_achievement": score()}
        verdict = {"scores": scores, "summary": prose(150), "reasoning": prose(900)}
    row = {
        "conversations": [
            {"from": "human", "value": prompt},
            {"from": "gpt", "value": _as_judges_write(choose, verdict)},
        ],
        "metadata": {
            **about,
            "provider": "benchmark",
            "category": "web" if about["evaluation_type"] == "category" else None,
            "timestamp": "2025-08-17 19:02:53",
        },
    }
    return json.dumps(row, ensure_ascii=False) + "\n"


def _as_judges_write(choose: random.Random, verdict: dict[str, Any]) -> str:
    """Return the verdict as text; 4 in 10 are not valid JSON, with faults about as frequent as real judges' faults."""
    text = json.dumps(verdict, indent=4, ensure_ascii=False)
    fault = choose.random()
    if fault < 0.20:
        return f"```json\n{text}\n```"
    if fault < 0.28:
        return text.replace(". ", ".\n", 3)
    if fault < 0.33:
        return text.replace(" agent ", ' "agent" ', 2)
    if fault < 0.36:
        return text[: len(text) * 3 // 4]
    if fault < 0.38:
        return text.removesuffix("\n}") + ",\n}"
    if fault < 0.39:
        return "Here is my evaluation:\n" + text
    return "" if fault < 0.40 else text


# --- the ways -----------------------------------------------------------------------------------------------------


def prmkit_way(source: Path, output: Path) -> None:
    """Run prmkit's converter as a user would."""
    command = [sys.executable, str(ROOT / "convert_dataset.py"), "--input", str(source), "--output-dir", str(output)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def usual_way(source: Path, output: Path) -> None:
    """Load everything into one list, and filter it for each variant."""
    with source.open(encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]

    def write(name: str, chosen: list[dict[str, Any]]) -> None:
        data = [
            {
                "instruction": row["conversations"][0]["value"],
                "input": "",
                "output": row["conversations"][1]["value"],
                "metadata": row["metadata"],
            }
            for row in chosen
        ]
        with (output / f"{name}.json").open("w", encoding="utf-8") as written:
            json.dump(data, written, ensure_ascii=False, indent=2)

    write("full", rows)
    for key in ("evaluation_type", "model_name", "task_id"):
        for value in sorted({row["metadata"][key] for row in rows}):
            write(value, [row for row in rows if row["metadata"][key] == value])


def polars_way(source: Path, output: Path) -> None:
    """Load columns, and group them once for each kind of variant."""
    import polars

    rows = polars.read_ndjson(source)
    rows = rows.select(
        polars.col("conversations").list.get(0).struct.field("value").alias("instruction"),
        polars.lit("").alias("input"),
        polars.col("conversations").list.get(1).struct.field("value").alias("output"),
        *(polars.col("metadata").struct.field(key) for key in ("evaluation_type", "model_name", "task_id")),
    )
    texts = ("instruction", "input", "output")
    rows.select(texts).write_ndjson(output / "full.jsonl")
    for key in ("evaluation_type", "model_name", "task_id"):
        for (value,), part in rows.partition_by(key, as_dict=True).items():
            part.select(texts).write_ndjson(output / f"{value}.jsonl")


def duckdb_way(source: Path, output: Path) -> None:
    """Load a table, and run a query for each variant."""
    import duckdb

    connection = duckdb.connect()
    connection.execute(
        "CREATE TABLE rows AS SELECT conversations[1].value AS instruction, '' AS input, "
        "conversations[2].value AS output, metadata.evaluation_type AS evaluation_type, "
        "metadata.model_name AS model_name, metadata.task_id AS task_id "
        "FROM read_json(?, format='newline_delimited', maximum_object_size=100000000)",
        [str(source)],
    )
    columns = "SELECT instruction, input, output FROM rows"
    connection.execute(f"COPY ({columns}) TO '{output / 'full.jsonl'}' (FORMAT json)")
    for key in ("evaluation_type", "model_name", "task_id"):
        for (value,) in connection.execute(f"SELECT DISTINCT {key} FROM rows").fetchall():  # noqa: S608
            target = output / f"{value}.jsonl"
            connection.execute(f"COPY ({columns} WHERE {key} = '{value}') TO '{target}' (FORMAT json)")


def copy_way(source: Path, output: Path) -> None:
    """Copy the tree that prmkit wrote in the same run, file by file."""
    shutil.copytree(output.parent / "prmkit", output, dirs_exist_ok=True)


WAYS: dict[str, Callable[[Path, Path], None]] = {
    "prmkit": prmkit_way,
    "copy": copy_way,
    "polars": polars_way,
    "duckdb": duckdb_way,
    "usual": usual_way,
}


def label(way: str) -> str:
    """Return the name of a way in the tables of RESULTS.md."""
    if way in ("polars", "duckdb"):
        return f"{way} {version(way)}"
    return "copy of the tree" if way == "copy" else way


# --- measuring ----------------------------------------------------------------------------------------------------


def measure(way: str, source: Path, output: Path) -> dict[str, float]:
    """Run one way in a separate process: seconds, CPU seconds, peak memory in MB, and MB written.

    Args:
        way: one of `WAYS`.
        source: the input.
        output: a folder that does not exist yet; its content is kept.
    """
    output.mkdir()
    os.sync()
    started = time.perf_counter()
    measured, code = run_measured([sys.executable, __file__, "--run", way, source, output])
    os.sync()
    synced = time.perf_counter() - started
    if code:
        raise SystemExit(f"{way} failed")
    return {
        **measured._asdict(),
        "synced": synced,
        "written_mb": sum(path.stat().st_size for path in output.rglob("*") if path.is_file()) / 1e6,
    }


def main() -> None:
    """Run the command line; with --run, act as the process that is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[200], help="sizes of the input (default 200)")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="ways, in this order")
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        way, source, output = arguments.run
        WAYS[way](Path(source), Path(output))
        return
    if "copy" in arguments.ways and "prmkit" not in arguments.ways[: arguments.ways.index("copy")]:
        parser.error("copy needs the tree that prmkit writes. List prmkit before it: --ways prmkit copy")
    if len(set(arguments.ways)) < len(arguments.ways):
        parser.error("a way is listed twice. To measure it again, run the benchmark again.")
    # One stack for all sizes: deleting the files of the first size would slow down the second.
    with ExitStack() as kept:
        for megabytes in arguments.megabytes:
            compare(megabytes, arguments.ways, kept)


def compare(megabytes: int, ways: Sequence[str], kept: ExitStack) -> None:
    """Measure each way on an input of one size and print the table.

    Args:
        megabytes: the size of the input.
        ways: keys of `WAYS`, in the order in which to measure them.
        kept: removes their files at the end.
    """
    folder = WORK / str(megabytes)
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "input.jsonl"
    if not source.exists():
        write_input(source, megabytes)
    written = Path(kept.enter_context(tempfile.TemporaryDirectory(dir=folder)))
    print(f"\n| {_described(source)} | seconds | to the disk | CPU seconds | peak MB | MB written |")
    print("|---|---:|---:|---:|---:|---:|")
    for way in ways:
        numbers = measure(way, source, written / way)
        shown = [f"{numbers[name]:.1f}" for name in ("seconds", "synced", "cpu")]
        shown += [f"{numbers[name]:,.0f}" for name in ("peak_mb", "written_mb")]
        print(f"| {label(way)} | {' | '.join(shown)} |", flush=True)


def _described(source: Path) -> str:
    with source.open("rb") as stream:
        rows = sum(1 for _ in stream)
    size = source.stat().st_size
    shown = f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"
    return f"{shown} ({rows:,} rows)"


if __name__ == "__main__":
    main()
