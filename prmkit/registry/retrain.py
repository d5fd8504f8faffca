"""Retrain a version with new rows: convert, compare, train, measure both versions, decide, register.

Every stage leaves a file that is complete or absent, in a folder named after a hash of the inputs. The same command
skips completed stages, so a killed retraining resumes, and a completed one returns the same result again.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prmkit import cli, registered
from prmkit.errors import GateError, LlamaFactoryError
from prmkit.evaluation import compare
from prmkit.files import exclusive_lock, read_json, sha256_of, write_json
from prmkit.paths import METRICS_FILE, REPORT, RUN_RECORD
from prmkit.registered import DATA, ROWS, RUN, VersionId
from prmkit.registry import batch, describe, versions
from prmkit.registry.batch import (
    Job,
    Retraining,
    convert_all,
    kept_rows,
    run_script,
    trained_run_of,
    training_data,
    write_config,
)

log = logging.getLogger("prmkit")

RESULT = "result.json"


def retrain(registry: Path, asked: Retraining) -> dict[str, Any]:
    """Train a version from another one and new rows, and tag it if requested and if the gate is met.

    Returns:
        `version` (None if nothing was trained), `parent`, `promoted`, `gate` (`reasons`, and `passed`, which is None if
        nothing is new: then no gate was measured), `report`.

    Raises:
        DataError: another retraining is running, the rows cannot be read, or held-out rows would leak.
        UsageError: the version was registered without its rows, or was trained on filtered data.
        LlamaFactoryError: the training failed.
    """
    parent = registered.find_version(asked.reference, registry)
    with exclusive_lock(registry / parent.name, "retraining", lock=".retrain.lock", patience=2.0):
        parent = registered.find_version(asked.reference, registry)  # the tag may have moved while this waited
        registered.check_files(parent, registry)
        hashes = sorted(sha256_of(file) for file in asked.new)
        known = registered.read_version(parent, registry)["files"]
        if set(hashes) <= {sha for name, sha in known.items() if name.startswith(f"{ROWS}/")}:
            return _already_in(parent, registry, asked, hashes)
        key = _key_of(asked, parent, hashes)
        job = Job(asked, registry, parent, registry / parent.name / f".retrain-{key}", key)
        job.work.mkdir(parents=True, exist_ok=True)
        done = job.work / RESULT
        return _promote(job, dict(read_json(done)) if done.is_file() else _work(job))


def _key_of(asked: Retraining, parent: VersionId | str, hashes: Sequence[str]) -> str:
    """Return a key that identifies a retraining: the same command has the same key."""
    what = [str(parent), hashes, asked.start, asked.replay, asked.margin, asked.settings, asked.accept_contradiction]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def _already_in(version: VersionId, registry: Path, asked: Retraining, hashes: Sequence[str]) -> dict[str, Any]:
    """Return the result for rows on which the version was already trained, with its gate only for the same command."""
    details = registered.read_version(version, registry)["details"]
    log.info("%s was already trained on these rows; nothing to do.", version)
    result = {"version": str(version), "parent": details.get("parent"), "promoted": False, "report": None,
              "gate": {"passed": None, "reasons": ["nothing is new, so no gate was measured"]}}  # fmt: skip
    if details.get("key") == _key_of(asked, details.get("parent"), hashes):
        is_tagged = not asked.reference.rpartition("@")[2].isdigit()  # then the tag already points to it
        result |= {"promoted": is_tagged, "gate": details["gate"], "report": details["report"]}
    return result


def _work(job: Job) -> dict[str, Any]:
    convert_all(job)
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
    for each in ("first", "new", "all", "data", "saves", "logs"):  # the version has copies of everything needed
        shutil.rmtree(job.work / each, ignore_errors=True)
    return result


def _promote(job: Job, result: dict[str, Any]) -> dict[str, Any]:
    if not (result["version"] and result["gate"]["passed"] and job.asked.promote):
        return result
    tag = _tag_of(job.asked)
    version = registered.find_version(result["version"], job.registry)
    rolled_back = {"action": "rollback", "judge": job.parent.name, "tag": tag, "was": version.number}
    if any(rolled_back.items() <= line.items() for line in registered.read_history(job.registry)):
        log.warning("warning: %s was rolled back earlier, so it was not promoted. Tag it manually.", version)
        return result
    why = job.asked.why or f"better than {job.parent} by the gate of its retraining"
    versions.tag_version(job.registry, result["version"], tag, why, expected=job.parent)
    return result | {"promoted": True}


def _tag_of(asked: Retraining) -> str:
    tag = asked.reference.rpartition("@")[2]
    return "production" if tag.isdigit() else tag


# --- before training --------------------------------------------------------------------------------------------------


def _report(job: Job) -> dict[str, Any]:
    file = job.work / "report.json"
    if file.is_file():
        return dict(read_json(file))
    first = job.work / "first"
    new = {file.resolve() for file in job.asked.new}
    old_rows = [row for row in batch.accepted_rows_of(job.work / "all") if Path(row["source"]).resolve() not in new]
    report = batch.describe_batch(old_rows, batch.accepted_rows_of(first), read_json(first / REPORT))
    report["contradicts"] = None
    known = _evaluate(job, job.parent_folder / RUN, job.parent_folder / DATA, "old_on_old")
    if (job.work / "new" / REPORT).is_file():
        metrics = _evaluate(job, job.parent_folder / RUN, job.work / "new", "old_on_new")
        report["findings"] += _drops(known, metrics, job.parent)
        report["contradicts"] = _contradiction(metrics, job.parent)
    report["findings"] += [report["contradicts"]] if report["contradicts"] else []
    write_json(file, report)
    return report


def _drops(known: Mapping[str, Any], metrics: Mapping[str, Any], parent: VersionId) -> list[str]:
    """Describe evaluation types for which the judge agrees significantly less with the new labels than with the old."""
    found = []
    for name, summary in metrics["summary"]["types"].items():
        before = (known["summary"]["types"].get(name) or {}).get("spearman") or {}
        now = summary["spearman"]
        if None not in (before.get("low"), now.get("high")) and now["high"] < before["low"]:
            found.append(
                f"{parent} agrees less with the new {name} labels (Spearman {describe.shown_estimate(now)}) than with "
                f"the old ones ({describe.shown_estimate(before)}): either the runs are different or the labels are "
                "worse."
            )
    return found


def _contradiction(metrics: Mapping[str, Any], parent: VersionId) -> str | None:
    """Describe a reversed ranking of the new rows: the judge or the labels are wrong, and a person must decide."""
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


def _train(job: Job) -> Path:
    run = trained_run_of(job)
    record = run / RUN_RECORD
    if record.is_file() and read_json(record).get("status") == "finished":
        return run
    code = run_script("train.py", ["--config", write_config(job), *job.asked.settings], check=False)
    if code or read_json(record).get("status") != "finished":
        raise LlamaFactoryError(
            f"{run}: training failed (exit code {code}); see above. Run the same command again to continue."
        )
    return run


def _evaluate(job: Job, run: Path, data: Path, name: str) -> dict[str, Any]:
    folder = job.work / name
    if not (folder / METRICS_FILE).is_file():
        held_out = ["--data-dir", data, "--dataset", batch.HELD_OUT]
        run_script("evaluate_judge.py", ["--run", run, *held_out, "--output", folder])
    return dict(read_json(folder / METRICS_FILE))


def _decide(job: Job, run: Path, report: Mapping[str, Any]) -> dict[str, Any]:
    """Check the gate: not worse on the old held-out rows, and better on the new ones. If undecided, it is not met."""
    reasons = [report["contradicts"]] if report["contradicts"] else []
    comparisons = {}
    for side, data in (("old", job.parent_folder / DATA), ("new", job.work / "new")):
        if not (data / REPORT).is_file():
            reasons.append(f"{side} rows: undecided, because there are no held-out rows.")
            continue
        metrics = _evaluate(job, run, data, f"new_on_{side}")
        found = compare.compare(job.work / f"new_on_{side}", job.work / f"old_on_{side}")
        comparisons[side] = found["groups"]
        try:
            compare.check_enough_scores(metrics, f"{side} rows")
            compare.check_not_worse(found, job.asked.margin)
        except GateError as error:
            reasons.append(f"{side} rows: {str(error).replace(str(job.work), 'retraining')}")
        conclusion = found["groups"][0]["verdict"]
        if side == "new" and conclusion != "better":
            reasons.append(f"new rows: not significantly better ({conclusion}).")
    return {"passed": not reasons, "reasons": reasons, "margin": job.asked.margin, "comparisons": comparisons}


def _register(job: Job, run: Path, gate: Mapping[str, Any], report: Mapping[str, Any]) -> VersionId:
    state = registered.state_of(registered.read_history(job.registry))
    for version in state.versions:  # a killed attempt may have already registered it
        if registered.read_version(version, job.registry)["details"].get("key") == job.key:
            return version
    settings = read_json(job.parent_folder / DATA / REPORT)["settings"]
    details = registered.read_version(job.parent, job.registry)["details"]
    everything, on_all = job.work / "all", "new_on_all"
    _evaluate(job, run, training_data(job), on_all)  # all rows that are now held out, of old and new tasks
    files = ", ".join(file.name for file in job.asked.new)
    addition = versions.Addition(
        run=run,
        name=job.parent.name,
        data=training_data(job),
        keep_rows=(*kept_rows(job), *job.asked.new),
        evaluation=job.work / on_all,
        parent=str(job.parent),
        why=job.asked.why or f"retrained with {files}; gate {'met' if gate['passed'] else 'not met'}",
        details={
            "key": job.key,
            "parent": str(job.parent),
            "split": details.get("split") or {key: settings["split"][key] for key in ("ratio", "seed")},
            "held_out_tasks": sorted(batch.tasks_in(everything, batch.HELD_OUT)),
            "training_tasks": sorted(batch.tasks_in(everything, batch.TRAINING)),
            "gate": dict(gate),
            "report": dict(report),
        },
    )
    return versions.add_version(job.registry, addition)


def show_retraining(result: Mapping[str, Any], asked: Retraining) -> None:
    """Show the findings, training and decision of a retraining."""
    for sentence in (result["report"] or {}).get("findings", []):
        cli.emit(f"new rows: {sentence}")
    if result["gate"]["passed"] is None:
        cli.emit(f"{result['version']}: was already trained on these rows. No gate was measured.")
        return
    if result["version"]:
        cli.emit(f"{result['version']} is registered; its parent is {result['parent']}.")
    else:
        cli.emit(f"Nothing was trained; {result['parent']} is unchanged.")
    cli.emit("gate: met" if result["gate"]["passed"] else "gate: not met")
    for reason in result["gate"]["reasons"]:
        cli.emit(f"  {reason}")
    if result["promoted"]:
        cli.emit(f"{result['version']} now has the tag {_tag_of(asked)}.")
    elif result["gate"]["passed"]:
        cli.emit(f"next: python manage_judges.py tag {result['version']} production")
