"""Convert a retraining's rows (new rows alone, and with the old ones), and describe what has changed."""

import hashlib
import logging
import os
import shlex
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

import prmkit
from prmkit import registered
from prmkit.dataset.prepare import open_source
from prmkit.dataset_info import read_sidecar
from prmkit.drift import shift_of
from prmkit.errors import DataError, UsageError
from prmkit.files import atomic_write, read_json, write_text
from prmkit.paths import FULL, HELD_OUT_SUFFIX, REPORT, RUN_RECORD, SIDECAR_SUFFIX, base_model_of
from prmkit.registered import DATA, ROWS, RUN, VersionId
from prmkit.registry.arguments import SHIFT_LIMIT
from prmkit.rows import task_of
from prmkit.training.supervisor import die_with_parent

log = logging.getLogger("prmkit")

_SCRIPTS = Path(prmkit.__file__).resolve().parent.parent

TRAINING, HELD_OUT = FULL, FULL + HELD_OUT_SUFFIX
"""The training split and the held-out split of a retraining's data."""
_EXAMPLES = 5


@dataclass(frozen=True)
class Retraining:
    """The user's choices for a retraining."""

    reference: str
    new: tuple[Path, ...]
    start: str
    """The start of the training: `adapter` or `base`."""
    replay: float
    """The fraction of old training tasks to train on again, 0 to 1."""
    margin: float
    settings: tuple[str, ...]
    """`key=value` arguments of LLaMA Factory."""
    promote: bool
    accept_contradiction: bool
    why: str | None = None


@dataclass(frozen=True)
class Job:
    """A retraining in progress."""

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
    """Convert new rows alone, then old and new rows together, with every task in its previous split."""
    write_config(job)  # first, so that its errors are reported before the conversion
    old = kept_rows(job)
    settings = read_json(job.parent_folder / DATA / REPORT)["settings"]
    if any(settings["filters"].values()):
        raise UsageError(
            f"{job.parent} was trained on filtered data, which retraining does not support. Add a version trained on "
            "all rows."
        )
    flags = _conversion_flags(job, settings)
    details = registered.read_version(job.parent, job.registry)["details"]
    split = details.get("split") or {key: settings["split"][key] for key in ("ratio", "seed")}
    by_hash = ["--eval-ratio", split["ratio"], "--split-seed", split["seed"]]
    _convert(job, "first", job.asked.new, [*flags, *by_hash])
    tasks = job.work / "held_out_tasks.txt"
    if not tasks.is_file():
        _check_datasets(job)
        held, trained = (tasks_in(job.parent_folder / DATA, name) for name in (HELD_OUT, TRAINING))
        held |= set(settings["split"]["tasks"] or ())
        held |= set(details.get("held_out_tasks", []))
        trained |= set(details.get("training_tasks", []))
        drawn = tasks_in(job.work / "first", HELD_OUT)
        write_text(tasks, "".join(f"{task}\n" for task in sorted(held | (drawn - trained))))
    listed = ["--eval-tasks", tasks]
    _convert(job, "all", [*old, *job.asked.new], [*flags, *listed])
    held_now = set(tasks.read_text(encoding="utf-8").splitlines())
    if held_now & _tasks(accepted_rows_of(job.work / "first")):
        _convert(job, "new", job.asked.new, [*flags, *listed])
    if job.asked.replay < 1:
        replayed = _replayed(job, old, held_now, settings["rubric"])
        _convert(job, "data", [*([replayed] if replayed else []), *job.asked.new], [*flags, *listed])
    compared = check_sides(training_data(job), job.parent.name, job.registry)
    log.info("%d versions were checked: none was trained on rows that are now held out.", compared)


def training_data(job: Job) -> Path:
    return job.work / ("all" if job.asked.replay >= 1 else "data")


def kept_rows(job: Job) -> list[Path]:
    rows = sorted((job.parent_folder / ROWS).glob("*"))
    if not rows:
        raise UsageError(
            f"{job.parent} was registered without its rows, so it cannot be retrained. Add a version with --rows."
        )
    return rows


def _check_datasets(job: Job) -> None:
    names = _datasets_of(job.parent_folder)
    if names != [TRAINING, HELD_OUT]:
        raise UsageError(
            f"{job.parent} was trained on {names[0]} and measured on {names[1]}; retraining needs {TRAINING}."
        )


def _datasets_of(version: Path) -> list[str]:
    """Return the names of a version's training and held-out datasets."""
    record = read_json(version / RUN / RUN_RECORD)
    return [str((record.get(key) or {}).get("name")) for key in ("dataset", "eval_dataset")]


def _conversion_flags(job: Job, settings: Mapping[str, Any]) -> list[Any]:
    """Return the flags of the conversion that wrote the parent's data."""
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
        low, high = str(scale["low"]), str(scale["high"])
        flags += ["--scale", *([f"{judge}={low}:{high}"] if judge else [low, high])]
        words |= scale["words"]
    flags += ["--map", *(f"{word}={score}" for word, score in words.items())] if words else []
    if lengths := settings["lengths"]:
        # With the new training settings, so that --set (cutoff_len, template) also applies to the lengths.
        flags += ["--too-long", lengths["too_long"], "--config", write_config(job), *job.asked.settings]
    return flags


def _convert(job: Job, name: str, inputs: Sequence[Path], flags: Sequence[Any]) -> None:
    if not (job.work / name / REPORT).is_file():
        absolute = [file.resolve() for file in inputs]
        run_script("convert_dataset.py", ["--input", *absolute, "--output-dir", job.work / name, *flags, "--no-next"])


def _replayed(job: Job, old: Sequence[Path], held_out: set[str], rubric: str | None) -> Path | None:
    """Write the old rows to use again: those of all held-out tasks, and of a fraction of the others, chosen by hash.

    Lines are numbered as in the conversion: in a file of labelled runs, each labelled step is one line.
    """
    names = {str(file.resolve()): file for file in old}
    lines: dict[Path, set[int]] = {file: set() for file in old}
    for row in accepted_rows_of(job.work / "all"):
        task, file = task_of(row["metadata"]), names.get(str(Path(row["source"]).resolve()))
        number = int.from_bytes(hashlib.blake2b(f"replay:{task}".encode(), digest_size=8).digest())
        if file is not None and (task in held_out or number < job.asked.replay * 2**64):
            lines[file].add(row["line"])
    target = job.work / "replayed.jsonl"
    with atomic_write(target) as stream:
        for file, numbers in lines.items():
            with open_source(str(file), Path(rubric) if rubric else None) as (_, found):
                # A row may span several lines of its file, but must be one line here.
                stream.writelines(b" ".join(line.text.splitlines()) + b"\n" for line in found if line.number in numbers)
    return target if target.stat().st_size else None


def base_model(job: Job) -> str:
    run = job.parent_folder / RUN
    model = base_model_of(run, read_json(run / RUN_RECORD))
    return str(model.resolve() if model.is_dir() else model)


def trained_run_of(job: Job) -> Path:
    """Return the folder of the training run."""
    return job.work / "saves" / f"{job.parent.name}_{job.key}"


def write_config(job: Job) -> Path:
    """Write the training config: the parent's, with the folders of this retraining.

    Raises:
        UsageError: the parent has no adapter to start from.
    """
    config = dict(read_json(job.parent_folder / RUN / RUN_RECORD)["config"])
    for key in ("adapter_name_or_path", "export_dir", "resume_from_checkpoint", "eval_on_start"):
        config.pop(key, None)
    config |= {
        "model_name_or_path": base_model(job),
        "dataset_dir": str(training_data(job).resolve()),
        "output_dir": str(trained_run_of(job).resolve()),
    }
    if job.asked.start == "adapter":
        if not (job.parent_folder / RUN / "adapter_config.json").is_file():
            raise UsageError(f"{job.parent} has no adapter to start from (full fine-tuning). Use --from base.")
        config["adapter_name_or_path"] = str((job.parent_folder / RUN).resolve())
    file = job.work / "config.yaml"
    write_text(file, yaml.safe_dump(config, sort_keys=False))
    return file


def run_script(script: str, arguments: Sequence[Any], *, check: bool = True) -> int:
    """Run one of the scripts, whose results are files; if this process is killed, so is the script."""
    command = [sys.executable, str(_SCRIPTS / script), *map(str, arguments)]
    log.info("$ python %s %s", script, shlex.join(command[2:]))
    parent = os.getpid()
    # The script's stdout goes to stderr, because this process's stdout is the result.
    done = subprocess.run(command, stdout=sys.__stderr__, preexec_fn=lambda: die_with_parent(parent), check=False)
    if check and done.returncode:
        code = done.returncode
        raise DataError(f"{script} failed with exit code {code}; see above. Run the same command again to continue.")
    return int(done.returncode)


# --- what has changed -------------------------------------------------------------------------------------------------


Rows = list[dict[str, Any]]
"""Lines of sidecars: each row's origin, its scores from 0 to 1, its metadata."""


def accepted_rows_of(data: Path) -> Rows:
    """Return the rows of a conversion, training and held-out."""
    return [row for name in (TRAINING, HELD_OUT) for row in _sidecar(data, name)]


def tasks_in(data: Path, name: str) -> set[str]:
    """Return the tasks of a dataset; empty if it does not exist."""
    return _tasks(_sidecar(data, name))


def _tasks(rows: Iterable[dict[str, Any]]) -> set[str]:
    return {task for row in rows if (task := task_of(row["metadata"])) is not None}


def _sidecar(data: Path, name: str) -> Iterator[dict[str, Any]]:
    file = data / f"{name}{SIDECAR_SUFFIX}"
    return read_sidecar(file) if file.is_file() else iter(())


def describe_batch(old: Rows, new: Rows, new_report: Mapping[str, Any]) -> dict[str, Any]:
    """Compare new rows with old ones.

    Returns:
        `rows`, `rejected`, `tasks`, `judges_new`, `judges_gone`, `changed_labels` (the same judge, prompt and key with
        another score) with examples, `scores` (evaluation type -> shift of the scores), and `findings`: sentences
        about what a person should check.
    """
    before, now = _labels(old), _labels(new)
    changed = [
        (label, before[label], score)
        for label, score in now.items()
        if label in before and abs(before[label] - score) > 1e-9
    ]
    judges_before, judges_now = ({str(row["metadata"].get("model_name")) for row in rows} for rows in (old, new))
    shifts = {name: shift_of(_scores(old, name), _scores(new, name)) for name in _types(new)}
    report: dict[str, Any] = {
        "rows": len(new),
        "rejected": sum(new_report["rejected"].values()),
        "tasks": len(_tasks(new)),
        "judges_new": sorted(judges_now - judges_before),
        "judges_gone": sorted(judges_before - judges_now),
        "repeated_labels": sum(label in before for label in now),
        "changed_labels": len(changed),
        "changed_examples": [
            {"prompt_sha256": prompt, "judge": judge, "key": key, "was": was, "is": score}
            for (prompt, judge, key), was, score in changed[:_EXAMPLES]
        ],
        "scores": {name: shift.as_json() for name, shift in shifts.items()},
        "types_new": sorted(set(_types(new)) - set(_types(old))),
    }
    return report | {"findings": list(_findings(report, {n: s.exceeds(SHIFT_LIMIT) for n, s in shifts.items()}))}


def _labels(rows: Rows) -> dict[tuple[str, str, str], float]:
    labels: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for row in rows:
        for key, score in row["scores"].items():
            labels[row["prompt_sha256"], str(row["metadata"].get("model_name")), key].append(score)
    return {label: fmean(scores) for label, scores in labels.items()}


def _types(rows: Rows) -> list[str]:
    return list(dict.fromkeys(str(row["metadata"].get("evaluation_type")) for row in rows))


def _scores(rows: Rows, evaluation_type: str) -> list[float]:
    chosen = (row for row in rows if str(row["metadata"].get("evaluation_type")) == evaluation_type)
    return [fmean(row["scores"].values()) for row in chosen]


def _findings(report: Mapping[str, Any], shifted: Mapping[str, bool]) -> Iterator[str]:
    if report["rejected"]:
        yield f"{report['rejected']:,} of the new rows were rejected; rejected.jsonl has the reasons."
    if report["judges_new"]:
        yield f"New judges: {', '.join(report['judges_new'])}."
    if report["judges_gone"]:
        yield f"Judges without new rows: {', '.join(report['judges_gone'])}."
    if report["types_new"]:
        yield f"New evaluation types: {', '.join(report['types_new'])}."
    if report["changed_labels"]:
        changed, repeated = report["changed_labels"], report["repeated_labels"]
        yield f"{changed:,} of {repeated:,} repeated scores differ from the earlier scores."
    for name, exceeds in shifted.items():
        values = report["scores"][name]
        if exceeds:
            yield (
                f"The scores of {name} have shifted: mean {values['mean_reference']:.2f} before, {values['mean']:.2f} "
                f"now (PSI {values['psi']:.2f}, KS {values['ks']:.2f}, n {values['n']})."
            )


def check_sides(data: Path, name: str, folder: Path) -> int:
    """Check that no version was trained on rows that are now held out, or measured on rows that are now for training.

    Returns:
        The number of versions that were compared.

    Raises:
        DataError: a task or a prompt changes its split.
    """
    splits = [_identities(data, split) for split in (TRAINING, HELD_OUT)]
    state = registered.state_of(registered.read_history(folder))
    compared = 0
    for version in (each for each in state.versions if each.name == name):
        version_folder = registered.folder_of_version(version, folder)
        theirs = [_identities(version_folder / DATA, each) for each in _datasets_of(version_folder)]
        for mine, other, before, now in ((1, 0, "was trained on", "held out"), (0, 1, "held out", "trained on")):
            if both := splits[mine] & theirs[other]:
                raise DataError(
                    f"{version} {before} {len(both)} tasks or prompts that are now {now}, for example "
                    f"{min(both)!r:.80}, so evaluations would be contaminated."
                )
        compared += 1
    return compared


def _identities(data: Path, name: str) -> set[str]:
    rows = list(_sidecar(data, name))
    return {row["prompt_sha256"] for row in rows} | {f"task {task}" for task in _tasks(rows)}
