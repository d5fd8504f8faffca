"""A new version out of the one in production and new rows: convert, look, train, measure both, decide, register.

Every step leaves a file that is complete or absent, in a folder that is named after what goes in. The same command
skips the steps that are done, so a retraining that was killed continues; and one that is done answers as before.
"""

import hashlib
import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import prmkit
from prmkit import registered
from prmkit.errors import DataError, ExitCode, GateError, LlamaFactoryError, UsageError
from prmkit.evaluation import compare
from prmkit.files import exclusive_lock, read_json, sha256_of, write_json, write_text
from prmkit.paths import HELD_OUT_SUFFIX, REPORT, base_model_of
from prmkit.registered import DATA, ROWS, RUN, VersionId
from prmkit.registry import batch, versions
from prmkit.rows import open_rows
from prmkit.training.supervisor import die_with_parent

log = logging.getLogger("prmkit")

_SCRIPTS = Path(prmkit.__file__).resolve().parent.parent
RESULT = "result.json"


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


def retrain(registry: Path, asked: Retraining) -> dict[str, Any]:
    """Make a version out of another one and new rows, and tag it where that was asked for and the gate is met.

    Returns:
        `version` (None where nothing was trained), `parent`, `promoted`, `gate` (`passed`, `reasons`), `report`.

    Raises:
        DataError: another retraining is under way, the rows cannot be read, or what is held out would leak.
        UsageError: the version was registered without its rows, or with a filtered conversion.
        LlamaFactoryError: the training failed.
    """
    parent = registered.find_version(asked.reference, registry)
    with exclusive_lock(registry / parent.name, "retraining", lock=".retrain.lock", patience=2.0):
        parent = registered.find_version(asked.reference, registry)  # it may have moved while this waited
        registered.check_files(parent, registry)
        hashes = sorted(sha256_of(file) for file in asked.new)
        known = registered.read_version(parent, registry)["files"]
        if set(hashes) <= {sha for name, sha in known.items() if name.startswith(f"{ROWS}/")}:
            return _already_in(parent, registry)
        what = [
            str(parent),
            hashes,
            asked.start,
            asked.replay,
            asked.margin,
            asked.settings,
            asked.accept_contradiction,
        ]
        key = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
        job = Job(asked, registry, parent, registry / parent.name / f".retrain-{key}", key)
        job.work.mkdir(parents=True, exist_ok=True)
        result = _finish(job) if (job.work / RESULT).is_file() else _work(job)
        return _promote(job, result)


def _already_in(version: VersionId, registry: Path) -> dict[str, Any]:
    details = registered.read_version(version, registry)["details"]
    log.info("%s was trained on these rows already; nothing to do.", version)
    return {"version": str(version), "parent": details.get("parent"), "promoted": True,
            "gate": details.get("gate", {"passed": True, "reasons": []}), "report": details.get("report")}  # fmt: skip


def _finish(job: Job) -> dict[str, Any]:
    return dict(read_json(job.work / RESULT))


def _work(job: Job) -> dict[str, Any]:
    _convert_all(job)
    report = _report(job)
    for sentence in report["findings"]:
        log.warning("warning: %s", sentence)
    if report["contradicts"] and not job.asked.accept_contradiction:
        gate = {"passed": False, "reasons": [report["contradicts"]]}
        with versions.changing(job.registry):
            versions.write_history(job.registry, "refuse", report["contradicts"], judge=job.parent.name,
                                   version=job.parent.number, what="not retrained")  # fmt: skip
        return _keep_result(job, None, gate, report)
    run = _train(job)
    gate = _decide(job, run, report)
    return _keep_result(job, _register(job, run, gate, report), gate, report)


def _keep_result(
    job: Job, version: VersionId | None, gate: Mapping[str, Any], report: Mapping[str, Any]
) -> dict[str, Any]:
    result = {"version": str(version) if version else None, "parent": str(job.parent), "promoted": False,
              "gate": dict(gate), "report": dict(report)}  # fmt: skip
    write_json(job.work / RESULT, result)
    for each in ("first", "new", "all", "data", "saves", "logs"):  # the version has copies of what is needed
        shutil.rmtree(job.work / each, ignore_errors=True)
    return result


def _promote(job: Job, result: dict[str, Any]) -> dict[str, Any]:
    if not (result["version"] and result["gate"]["passed"] and job.asked.promote):
        return result
    tag = job.asked.reference.rpartition("@")[2]
    tag = "production" if tag.isdigit() else tag
    number = registered.find_version(result["version"], job.registry).number
    for line in registered.read_history(job.registry):
        if (line["action"], line.get("judge"), line.get("tag"), line.get("was")) == (
            "rollback",
            job.parent.name,
            tag,
            number,
        ):
            log.warning(
                "warning: %s was rolled back before, so it is not tagged again. Tag it by hand.", result["version"]
            )
            return result
    why = job.asked.why or f"better than {job.parent} by the gate of its retraining"
    versions.tag_version(job.registry, result["version"], tag, why, expected=job.parent)
    return result | {"promoted": True}


# --- data -------------------------------------------------------------------------------------------------------------


def _convert_all(job: Job) -> None:
    """New rows by themselves, then old and new together, with every task on the side that it has always had."""
    old = _kept_rows(job)
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
    compared = batch.check_sides(_training_data(job), job.parent.name, job.registry)
    log.info("%d versions were checked: none was trained on what is held out.", compared)


def _training_data(job: Job) -> Path:
    return job.work / ("all" if job.asked.replay >= 1 else "data")


def _kept_rows(job: Job) -> list[Path]:
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
            _base_model(job),
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
        _run("convert_dataset.py", ["--input", *absolute, "--output-dir", job.work / name, *flags, "--no-next"])


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


# --- before training --------------------------------------------------------------------------------------------------


def _report(job: Job) -> dict[str, Any]:
    file = job.work / "report.json"
    if file.is_file():
        return dict(read_json(file))
    first = job.work / "first"
    old_rows = [row for row in batch.rows_of(job.work / "all") if not _is_new(row, job)]
    report = batch.describe_batch(old_rows, batch.rows_of(first), batch.report_of(first))
    report["contradicts"] = None
    _evaluate(job, job.parent_folder / RUN, job.parent_folder / DATA, "old_on_old")
    if (job.work / "new" / REPORT).is_file():
        metrics = _evaluate(job, job.parent_folder / RUN, job.work / "new", "old_on_new")
        report["contradicts"] = _contradiction(metrics, job.parent)
    report["findings"] += [report["contradicts"]] if report["contradicts"] else []
    write_json(file, report)
    return report


def _is_new(row: Mapping[str, Any], job: Job) -> bool:
    return Path(row["source"]).resolve() in {file.resolve() for file in job.asked.new}


def _contradiction(metrics: Mapping[str, Any], parent: VersionId) -> str | None:
    """A judge that orders the new rows the wrong way round says that one of the two is wrong, and not which."""
    for name, summary in metrics["summary"]["types"].items():
        estimate = summary["spearman"]
        if estimate.get("high") is not None and estimate["high"] < 0:
            return (
                f"The labels of {name} in the new rows contradict {parent}: Spearman {estimate['value']:.2f} "
                f"[{estimate['low']:.2f}, {estimate['high']:.2f}]. If they are right and the judge is wrong, use "
                "--accept-contradiction."
            )
    return None


# --- training and measuring -------------------------------------------------------------------------------------------


def _base_model(job: Job) -> str:
    run = job.parent_folder / RUN
    model = base_model_of(run, read_json(run / "run.json"))
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def _train(job: Job) -> Path:
    run = job.work / "saves" / f"{job.parent.name}_{job.key}"
    record = run / "run.json"
    if record.is_file() and read_json(record).get("status") == "finished":
        return run
    config = dict(read_json(job.parent_folder / RUN / "run.json")["config"])
    for key in ("adapter_name_or_path", "export_dir", "resume_from_checkpoint", "eval_on_start"):
        config.pop(key, None)
    config |= {
        "model_name_or_path": _base_model(job),
        "dataset_dir": str(_training_data(job).resolve()),
        "output_dir": str(run.resolve()),
    }
    if job.asked.start == "adapter":
        config["adapter_name_or_path"] = str((job.parent_folder / RUN).resolve())
    write_text(job.work / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    code = _run("train.py", ["--config", job.work / "config.yaml", *job.asked.settings], check=False)
    if code or read_json(record).get("status") != "finished":
        raise LlamaFactoryError(
            f"{run}: training failed (exit code {code}), for the reason above. The same command continues."
        )
    return run


def _evaluate(job: Job, run: Path, data: Path, name: str) -> dict[str, Any]:
    folder = job.work / name
    if not (folder / compare.METRICS_FILE).is_file():
        held_out = ["--data-dir", data, "--dataset", batch.FULL + HELD_OUT_SUFFIX]
        _run("evaluate_judge.py", ["--run", run, *held_out, "--output", folder])
    return dict(read_json(folder / compare.METRICS_FILE))


def _decide(job: Job, run: Path, report: Mapping[str, Any]) -> dict[str, Any]:
    """Non-inferior on the old held-out rows, better on the new ones. Whatever cannot be decided is not met."""
    reasons = [report["contradicts"]] if report["contradicts"] else []
    comparisons = {}
    for side, data in (("old", job.parent_folder / DATA), ("new", job.work / "new")):
        if not (data / REPORT).is_file():
            reasons.append(f"On the {side} rows: cannot decide, nothing of them is held out.")
            continue
        metrics = _evaluate(job, run, data, f"new_on_{side}")
        found = compare.compare(job.work / f"new_on_{side}", job.work / f"old_on_{side}")
        comparisons[side] = found["groups"]
        try:
            compare.check_enough_scores(metrics, f"On the {side} rows")
            compare.check_not_worse(found, job.asked.margin)
        except GateError as error:
            reasons.append(f"On the {side} rows: {str(error).replace(str(job.work), 'retraining')}")
        verdict = found["groups"][0]["verdict"]
        if side == "new" and verdict != "better":
            reasons.append(f"On the new rows: not shown to be better ({verdict}).")
    return {"passed": not reasons, "reasons": reasons, "margin": job.asked.margin, "comparisons": comparisons}


def _register(job: Job, run: Path, gate: Mapping[str, Any], report: Mapping[str, Any]) -> VersionId:
    state = registered.state_of(registered.read_history(job.registry))
    for version in state.versions:  # registered, then killed
        if registered.read_version(version, job.registry)["details"].get("key") == job.key:
            return version
    settings = read_json(job.parent_folder / DATA / REPORT)["settings"]
    details = registered.read_version(job.parent, job.registry)["details"]
    everything = job.work / "all"
    addition = versions.Addition(
        run=run,
        name=job.parent.name,
        data=_training_data(job),
        keep_rows=(*_kept_rows(job), *job.asked.new),
        evaluation=_own_evaluation(job, run),
        parent=str(job.parent),
        why=job.asked.why or _why(job, gate),
        details={
            "key": job.key,
            "parent": str(job.parent),
            "split": details.get("split") or {key: settings["split"][key] for key in ("ratio", "seed")},
            "held_out_tasks": sorted(batch.tasks_in(everything / f"{batch.FULL}{HELD_OUT_SUFFIX}.meta.jsonl")),
            "training_tasks": sorted(batch.tasks_in(everything / f"{batch.FULL}.meta.jsonl")),
            "gate": dict(gate),
            "report": dict(report),
        },
    )
    return versions.add_version(job.registry, addition)


def _why(job: Job, gate: Mapping[str, Any]) -> str:
    files = ", ".join(file.name for file in job.asked.new)
    return f"retrained with {files}; gate {'met' if gate['passed'] else 'not met'}"


def _own_evaluation(job: Job, run: Path) -> Path:
    """The new judge on all that is held out now: the old tasks and the new ones."""
    _evaluate(job, run, _training_data(job), "new_on_all")
    return job.work / "new_on_all"


def _run(script: str, arguments: Sequence[Any], *, check: bool = True) -> int:
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


def exit_code_of(result: Mapping[str, Any]) -> ExitCode:
    """0 where the gate is met, else 4."""
    return ExitCode.DONE if result["gate"]["passed"] else ExitCode.GATE
