"""The rows of a retraining: the new ones by themselves, and old and new ones together, every task on its side."""

import hashlib
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import prmkit
from prmkit import registered
from prmkit.errors import DataError, UsageError
from prmkit.files import read_json, write_text
from prmkit.paths import HELD_OUT_SUFFIX, REPORT, base_model_of
from prmkit.registered import DATA, ROWS, RUN, VersionId
from prmkit.registry import batch
from prmkit.rows import open_rows
from prmkit.training.supervisor import die_with_parent

log = logging.getLogger("prmkit")

_SCRIPTS = Path(prmkit.__file__).resolve().parent.parent


@dataclass(frozen=True)
class Retraining:
    """What was asked for."""

    reference: str
    new: tuple[Path, ...]
    start: str
    """`adapter` or `base`: what the training starts from."""
    replay: float
    """The share of the old training tasks that is trained on again, 0 to 1."""
    margin: float
    settings: tuple[str, ...]
    """`key=value` of LLaMA Factory."""
    promote: bool
    accept_contradiction: bool
    why: str | None = None


@dataclass(frozen=True)
class Job:
    """One retraining at work."""

    asked: Retraining
    registry: Path
    parent: VersionId
    work: Path
    key: str

    @property
    def parent_folder(self) -> Path:
        """The folder of the parent's version."""
        return registered.folder_of_version(self.parent, self.registry)


def convert_all(job: Job) -> None:
    """New rows by themselves, then old and new together, with every task on the side that it has always had."""
    old = kept_rows(job)
    settings = read_json(job.parent_folder / DATA / REPORT)["settings"]
    if any(settings["filters"].values()):
        raise UsageError(
            f"{job.parent}: its data was filtered, and whole files are converted here. Add a version with all rows."
        )
    flags = _conversion_flags(job, settings)
    details = registered.read_version(job.parent, job.registry)["details"]
    split = details.get("split") or {key: settings["split"][key] for key in ("ratio", "seed")}
    by_hash = ["--eval-ratio", split["ratio"], "--split-seed", split["seed"]]
    _convert(job, "first", job.asked.new, [*flags, *by_hash])
    tasks = job.work / "held_out_tasks.txt"
    if not tasks.is_file():
        held, trained = (
            batch.tasks_in(job.parent_folder / DATA / f"{name}.meta.jsonl") for name in _datasets(job)[::-1]
        )
        report = batch.report_of(job.parent_folder / DATA)
        if report["settings"]["split"]["tasks"]:
            held |= set(report["settings"]["split"]["tasks"])
        held |= set(details.get("held_out_tasks", []))
        trained |= set(details.get("training_tasks", []))
        drawn = batch.tasks_in(job.work / "first" / f"{batch.FULL}{HELD_OUT_SUFFIX}.meta.jsonl")
        write_text(tasks, "".join(f"{task}\n" for task in sorted(held | (drawn - trained))))
    listed = ["--eval-tasks", tasks]
    _convert(job, "all", [*old, *job.asked.new], [*flags, *listed])
    held_now = set(tasks.read_text(encoding="utf-8").splitlines())
    in_new = {str(row["metadata"].get("task_id")) for row in batch.rows_of(job.work / "first")}
    if held_now & in_new:
        _convert(job, "new", job.asked.new, [*flags, *listed])
    if job.asked.replay < 1:
        replayed = _replayed(job, old, held_now)
        _convert(job, "data", [*([replayed] if replayed else []), *job.asked.new], [*flags, *listed])
    compared = batch.check_sides(training_data(job), job.parent.name, job.registry)
    log.info("%d versions were checked: none was trained on what is held out.", compared)


def training_data(job: Job) -> Path:
    return job.work / ("all" if job.asked.replay >= 1 else "data")


def kept_rows(job: Job) -> list[Path]:
    rows = sorted((job.parent_folder / ROWS).glob("*"))
    if not rows:
        raise UsageError(f"{job.parent}: registered without its rows, so it cannot be retrained. Add one with --rows.")
    return rows


def _datasets(job: Job) -> tuple[str, str]:
    record = read_json(job.parent_folder / RUN / "run.json")
    names = [(record.get(side) or {}).get("name") for side in ("dataset", "eval_dataset")]
    if names != [batch.FULL, batch.FULL + HELD_OUT_SUFFIX]:
        raise UsageError(
            f"{job.parent}: was trained on {names[0]} and measured on {names[1]}; retraining needs {batch.FULL}."
        )
    return batch.FULL, batch.FULL + HELD_OUT_SUFFIX


def _conversion_flags(job: Job, settings: Mapping[str, Any]) -> list[Any]:
    """The flags of the conversion that the parent's data was made with."""
    flags: list[Any] = ["--format", settings["form"], "--labels", settings["labels"], "--no-task-variants"]
    flags += ["--aggregate", settings["aggregate"], "--near-duplicates", settings["near_duplicates"]]
    flags += ["--mask-leaked-scores"] if settings["mask_leaked_scores"] else []
    flags += [] if settings["leniency_correction"] else ["--no-leniency-correction"]
    for flag, key in (
        ("--max-disagreement", "max_disagreement"),
        ("--max-rejected", "max_rejected"),
        ("--rubric", "rubric"),
    ):
        flags += [flag, settings[key]] if settings[key] is not None else []
    words: dict[str, float] = {}
    for judge, scale in settings["scales"].items():
        low, high = f"{scale['low']:g}", f"{scale['high']:g}"
        flags += ["--scale", *([f"{judge}={low}:{high}"] if judge else [low, high])]
        words |= scale["words"]
    flags += ["--map", *(f"{word}={score:g}" for word, score in words.items())] if words else []
    if lengths := settings["lengths"]:
        flags += [
            "--tokenizer",
            base_model(job),
            "--cutoff-len",
            lengths["cutoff_len"],
            "--too-long",
            lengths["too_long"],
        ]
        flags += ["--template", lengths["template"]] if lengths["template"] else []
    return flags


def _convert(job: Job, name: str, inputs: Sequence[Path], flags: Sequence[Any]) -> None:
    if not (job.work / name / REPORT).is_file():
        absolute = [file.resolve() for file in inputs]
        run_script("convert_dataset.py", ["--input", *absolute, "--output-dir", job.work / name, *flags, "--no-next"])


def _replayed(job: Job, old: Sequence[Path], held_out: set[str]) -> Path | None:
    """Old rows that are used again: all of the held-out tasks, and a share of the others, drawn by their names."""
    names = {str(file.resolve()): file for file in old}
    lines: dict[Path, set[int]] = {file: set() for file in old}
    for row in batch.rows_of(job.work / "all"):
        task, file = str(row["metadata"].get("task_id")), names.get(str(Path(row["source"]).resolve()))
        place = int.from_bytes(hashlib.blake2b(f"replay:{task}".encode(), digest_size=8).digest())
        if file is not None and (task in held_out or place < job.asked.replay * 2**64):
            lines[file].add(row["line"])
    target = job.work / "replayed.jsonl"
    parts = []
    for file, numbers in lines.items():
        with open_rows(str(file)) as found:
            parts += [line.text.rstrip(b"\n") + b"\n" for line in found if line.number in numbers]
    write_text(target, b"".join(parts).decode("utf-8", errors="surrogateescape")) if parts else None
    return target if parts else None


def base_model(job: Job) -> str:
    run = job.parent_folder / RUN
    model = base_model_of(run, read_json(run / "run.json"))
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def run_script(script: str, arguments: Sequence[Any], *, check: bool = True) -> int:
    """Run one of the scripts; its results are its files. It ends when this process is killed."""
    command = [sys.executable, str(_SCRIPTS / script), *map(str, arguments)]
    log.info("$ python %s %s", script, shlex.join(command[2:]))
    parent = os.getpid()
    # Its stdout is narration here: ours is the result.
    done = subprocess.run(command, stdout=sys.__stderr__, preexec_fn=lambda: die_with_parent(parent), check=False)
    if check and done.returncode:
        code = done.returncode
        raise DataError(f"{script} failed with exit code {code}; the reason is above. The same command continues.")
    return int(done.returncode)
