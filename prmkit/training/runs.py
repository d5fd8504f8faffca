"""The record of a run, `saves/<run>/run.json`: what it was started with, what came of it, and how to repeat it."""

import fcntl
import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prmkit.errors import DataError
from prmkit.files import read_json, sha256_of, write_json
from prmkit.paths import REPORT
from prmkit.training.config import ResolvedConfig
from prmkit.training.entries import names_in, read_entries
from prmkit.training.machine import installed_version, this_machine

RECORD = "run.json"
RENDERED = "resolved_config.yaml"

_RECORDED_VERSIONS = (
    "llamafactory", "torch", "transformers", "peft", "trl", "datasets", "accelerate", "deepspeed", "flash-attn",
    "liger-kernel", "bitsandbytes", "swanlab",
)  # fmt: skip

# Keys that say how a run is done and watched, not what it learns: they may change between two starts of one run.
_NOT_ABOUT_LEARNING = {
    "output_dir", "run_name", "resume_from_checkpoint", "overwrite_output_dir", "overwrite_cache", "plot_loss",
    "report_to",
    "logging_dir", "log_level", "logging_steps", "logging_first_step", "logging_strategy", "logging_nan_inf_filter",
    "disable_tqdm", "save_steps", "save_strategy", "save_total_limit", "save_only_model", "eval_strategy",
    "eval_steps", "eval_delay", "eval_on_start", "do_eval", "eval_accumulation_steps", "per_device_eval_batch_size",
    "include_num_input_tokens_seen", "include_effective_tokens_per_second", "preprocessing_num_workers",
    "preprocessing_batch_size", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor",
    "dataloader_persistent_workers", "enable_jit_checkpoint", "ddp_timeout", "ddp_backend",
    "ddp_find_unused_parameters", "disable_gradient_checkpointing", "gradient_checkpointing", "use_reentrant_gc",
    "flash_attn", "enable_liger_kernel", "tf32", "low_cpu_mem_usage", "infer_dtype", "export_dir", "export_size",
    "export_device", "export_legacy_format", "use_swanlab", "swanlab_project", "swanlab_workspace",
    "swanlab_run_name", "swanlab_mode", "swanlab_logdir", "do_sample", "temperature", "top_p", "top_k",
    "max_new_tokens", "max_length", "repetition_penalty",
}  # fmt: skip
_PLACES = {"model_name_or_path", "adapter_name_or_path", "dataset_dir", "tokenized_path", "cache_dir", "deepspeed"}
# These share one number, the rows of an optimizer step; only that must stay.
_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")


_SURE_TO_BE_THERE = {
    "run", "id", "status", "config", "processes", "dataset", "base_model", "template", "started", "steps", "max_steps",
    "tokens", "train_loss", "eval_loss", "resumed_from",
}  # fmt: skip
"""Keys of every record that other code reads."""


def log_of(run_folder: Path) -> Path:
    """Where the log of a run is: in `logs`, which stands beside the `saves` that the run is in, or else here."""
    saves = run_folder.parent
    return (saves.parent if saves.name == "saves" else Path()) / "logs" / f"{run_folder.name}.log"


def now() -> str:
    """This moment in UTC, to the second, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def new_record(run_folder: Path, config: ResolvedConfig, command: list[str], processes: int) -> dict[str, Any]:
    """The record of a run that is about to start for the first time.

    Args:
        run_folder: where the run will stand.
        config: what it is started with.
        command: the command line that the user typed.
        processes: how many train, over all nodes.

    Raises:
        DataError: the conversion's report is damaged.
    """
    values = config.values
    datasets = Path(str(values.get("dataset_dir", "data")))
    conversion = datasets / REPORT
    report = read_json(conversion) if conversion.exists() else {}
    if not isinstance(report, dict):
        raise DataError(f"{conversion}: not the report of a conversion. Run convert_dataset.py again.")
    return {
        "run": run_folder.name,
        "id": os.urandom(8).hex(),
        "status": "running",
        "config": {**values, "output_dir": str(run_folder)},
        "sources": dict(config.sources),
        "command": command,
        "processes": processes,
        "versions": _versions(),
        "git": _git(),
        "dataset": describe_dataset(values.get("dataset"), datasets),
        "eval_dataset": describe_dataset(values.get("eval_dataset"), datasets),
        "held_out_sha256": report.get("held_out", {}).get("sha256"),
        "conversion_report_sha256": sha256_of(conversion) if conversion.exists() else None,
        "base_model": {
            "path": str(values["model_name_or_path"]),
            "fingerprint": model_fingerprint(Path(str(values["model_name_or_path"]))),
        },
        "template": values.get("template"),
        "default_system": values.get("default_system"),
        "enable_thinking": values.get("enable_thinking", True),
        "cutoff_len": values.get("cutoff_len", 2048),
        "hardware": _hardware(),
        "started": now(),
        "resumed_from": [],
        **_NOT_REACHED_YET,
    }


_NOT_REACHED_YET = {
    "ended": None, "steps": 0, "max_steps": None, "tokens": None, "train_loss": None, "eval_loss": None,
    "peak_gpu_memory_gib": None,
}  # fmt: skip


def describe_dataset(names: Any, folder: Path) -> dict[str, str | None] | None:
    """Name, file and hash of a dataset entry; of several, the names and files with commas and one hash over all.

    Returns:
        None when no name is given; file and hash are None where a file is not there (any more).
    """
    if not (wanted := list(filter(None, names_in(names)))):
        return None
    try:
        entries = read_entries(folder)
    except DataError:
        entries = {}
    files = [entries[name].file if name in entries else None for name in wanted]
    found = [path for path in files if path is not None and path.is_file()]
    described: dict[str, str | None] = {"name": ",".join(wanted), "file": None, "sha256": None}
    if len(found) == len(wanted):
        hashes = [sha256_of(path) for path in found]
        digest = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
        described |= {"file": ",".join(map(str, found)), "sha256": digest}
    return described


def model_fingerprint(folder: Path) -> str | None:
    """A hash that tells one model folder from another in seconds.

    Covers every JSON file, and of every weight file its name, size, first and last mebibyte: a safetensors header
    names each tensor with shape and place, and weights that were trained on differ everywhere.

    Returns:
        None where there is no such folder (a name on a hub).
    """
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in {".json", ".safetensors", ".bin"}):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as stream:
            digest.update(stream.read(1 << 20))
            stream.seek(max(path.stat().st_size - (1 << 20), 0))
            digest.update(stream.read())
    return digest.hexdigest()


def differences(record: Mapping[str, Any], fresh: Mapping[str, Any]) -> list[str]:
    """What a start would change about a run that has begun, each as `name: before -> now`; empty when it may go on.

    Args:
        record: of the run that has begun.
        fresh: from `new_record`, for the start that is wanted.
    """
    before, after = record["config"], fresh["config"]
    keys = [key for key in {**before, **after} if key not in _NOT_ABOUT_LEARNING and key not in _BATCH]
    found = [
        f"{key}: {before.get(key, 'not set')} -> {after.get(key, 'not set')}"
        for key in keys
        if _compared(key, before.get(key)) != _compared(key, after.get(key))
    ]
    if rows_a_step(record) != rows_a_step(fresh):
        found.append(f"rows an optimizer step: {rows_a_step(record)} -> {rows_a_step(fresh)}")
    found += [
        f"{what}: its content has changed since"
        for what, part in (("dataset", "sha256"), ("base_model", "fingerprint"))
        if all(side[what] and side[what][part] for side in (record, fresh)) and record[what][part] != fresh[what][part]
    ]
    return found


def _compared(key: str, value: Any) -> Any:
    """`./model` and `model` are one place."""
    return os.path.normpath(value) if key in _PLACES and isinstance(value, str) else value


def rows_a_step(record: Mapping[str, Any]) -> int:
    """How many rows one optimizer step learns from, over all processes."""
    config = record["config"]
    # LLaMA Factory's defaults.
    rows = int(config.get("per_device_train_batch_size", 8)) * int(config.get("gradient_accumulation_steps", 1))
    return rows * int(record["processes"])


def read_record(run_folder: Path) -> dict[str, Any] | None:
    """The record of a run; None when the folder holds none.

    Raises:
        DataError: it is damaged.
    """
    path = run_folder / RECORD
    if not path.exists():
        return None
    try:
        record = read_json(path)
    except DataError:
        record = None
    if not isinstance(record, dict) or not record.keys() >= _SURE_TO_BE_THERE:
        raise DataError(f"{path}: damaged. Add --overwrite, which moves the folder aside, or run_name=NAME.")
    return record


def write_record(run_folder: Path, record: Mapping[str, Any]) -> None:
    """Write the record, whole or not at all."""
    write_json(run_folder / RECORD, record)


def all_records(saves: Path) -> Iterator[dict[str, Any]]:
    """The records below a folder, oldest start first; each with its state as it really is.

    A run that was killed could not write so; it is told by the lock that nobody holds any more.
    """
    records = []
    for path in saves.glob(f"*/{RECORD}"):
        try:
            record = read_record(path.parent) or {}
        except DataError:
            record = {**dict.fromkeys(_SURE_TO_BE_THERE), "run": path.parent.name, "status": "damaged", "config": {}}
        if record["status"] == "running" and not _is_held(path.parent):
            record["status"] = "killed"
        records.append({**record, "folder": str(path.parent)})
    yield from sorted(records, key=lambda record: (record["started"] or "", record["run"]))


def _is_held(folder: Path) -> bool:
    try:
        with (folder / ".lock").open() as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def table_rows(records: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """The records as texts, in the order of `TABLE_COLUMNS`."""
    return [
        [
            Path(record["folder"]).name,
            record["status"],
            (record["dataset"] or {}).get("name", ""),
            Path(record["base_model"]["path"]).name if record["base_model"] else "",
            f"{record['steps'] or 0}/{record['max_steps'] or '?'}",
            *(f"{record[key]:.4f}" if record[key] is not None else "" for key in ("train_loss", "eval_loss")),
            (record["started"] or "").replace("T", " ")[:16],
        ]
        for record in records
    ]


TABLE_COLUMNS = ("run", "state", "dataset", "base", "steps", "train loss", "held-out loss", "started (UTC)")
NUMERIC_COLUMNS = ("steps", "train loss", "held-out loss")


# --- the surroundings ---------------------------------------------------------------------------------------------


def _versions() -> dict[str, str]:
    found = {name: version for name in _RECORDED_VERSIONS if (version := installed_version(name))}
    return {"python": platform.python_version(), **found}


def _hardware() -> dict[str, Any]:
    machine = this_machine()
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "gpus": [{"name": gpu.name, "memory_bytes": gpu.total} for gpu in machine.gpus],
        "cores": machine.cores,
        "memory_bytes": pages * size,
        "platform": platform.platform(),
    }


def _git() -> dict[str, Any] | None:
    """Commit of the checkout that prmkit runs from, and whether files in it were changed."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10)  # noqa: S607
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    return None if commit is None else {"commit": commit, "changed": bool(git("status", "--porcelain", "-uno"))}


def command_line() -> list[str]:
    """What the user typed, as a list of words."""
    return [Path(sys.executable).name, *sys.argv]
