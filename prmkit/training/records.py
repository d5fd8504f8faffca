"""Write, read and compare `saves/<run>/run.json`: a training run's inputs, results, and how to repeat it."""

import fcntl
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prmkit.dataset_info import label_shapes, read_entries, rows_sha256, split_names
from prmkit.errors import DataError
from prmkit.files import LARGE_FILE, read_json, sha256_of, spread_blocks, write_json
from prmkit.llamafactory_schema import installed_version, setting
from prmkit.paths import EVALUATION, INFO, METRICS_FILE, REPORT, RUN_RECORD
from prmkit.training.config import ResolvedConfig
from prmkit.training.environment import this_machine
from prmkit.training.monitoring import reached

RESOLVED_CONFIG = "resolved_config.yaml"

_RECORDED_VERSIONS = (
    "llamafactory", "torch", "transformers", "peft", "trl", "datasets", "accelerate", "deepspeed", "flash-attn",
    "liger-kernel", "bitsandbytes", "swanlab",
)  # fmt: skip

# Keys about how training is executed and monitored, not about what is learned: they may change between two starts.
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
_FOLDERS = {"model_name_or_path", "adapter_name_or_path", "dataset_dir", "cache_dir", "deepspeed"}
# Their product is the number of rows per optimizer step and device; only that must stay the same.
_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")

_REQUIRED: dict[str, type | tuple[type, ...]] = {
    "run": str, "id": str, "status": str, "config": dict, "processes": int, "dataset": (dict, type(None)),
    "base_model": dict, "template": (str, type(None)), "started": str, "steps": (int, type(None)),
    "max_steps": (int, type(None)), "tokens": (int, type(None)), "train_loss": (int, float, type(None)),
    "eval_loss": (int, float, type(None)), "resumed_from": list,
}  # fmt: skip
"""Keys that other code reads, and their types."""


def log_path_of(run_folder: Path) -> Path:
    """Return the path of a run's log: in `logs` next to the run's `saves` or, without such a folder, in `logs` here."""
    saves = run_folder.parent
    return (saves.parent if saves.name == "saves" else Path()) / "logs" / f"{run_folder.name}.log"


def now() -> str:
    """Return the current time in UTC, to the second, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


# --- making -------------------------------------------------------------------------------------------------------


def new_record(run_folder: Path, config: ResolvedConfig, processes: int) -> dict[str, Any]:
    """Make the run.json of a training run that is about to start. Hashing the dataset takes a few seconds per gigabyte.

    The final measurements come from `reached`; here they have their values before the first step.

    Args:
        run_folder: the folder of the training run.
        config: the config with which the run is started.
        processes: the number of training processes, over all nodes.
    """
    values = config.values
    data = Path(str(setting(values, "dataset_dir")))
    conversion = data / REPORT
    return {
        "run": run_folder.name,
        "id": os.urandom(8).hex(),
        "status": "running",
        "config": {**values, "output_dir": str(run_folder)},
        "sources": dict(config.sources),
        "command": [Path(sys.executable).name, *sys.argv],
        "processes": processes,
        "versions": _versions(),
        "git": _git(),
        "dataset": describe_dataset(values.get("dataset"), data),
        "eval_dataset": describe_dataset(values.get("eval_dataset"), data),
        "held_out_sha256": _held_out_hash(conversion),
        "conversion_report_sha256": sha256_of(conversion) if conversion.exists() else None,
        "rubrics": _rubrics(conversion),
        "label_shapes": label_shapes(data, filter(None, split_names(values.get("dataset")))),
        "base_model": describe_model(str(values["model_name_or_path"]), run_folder),
        "template": values.get("template"),
        "default_system": values.get("default_system"),
        "enable_thinking": setting(values, "enable_thinking"),
        "cutoff_len": setting(values, "cutoff_len"),
        "hardware": _hardware(),
        "started": now(),
        "resumed_from": [],
        "ended": None,
        **reached({}, [], None),
    }


def _held_out_hash(conversion: Path) -> Any:
    try:
        return read_json(conversion)["held_out"]["sha256"]
    except (DataError, LookupError, TypeError):
        return None  # reported by the checks


def _rubrics(conversion: Path) -> list[str]:
    """Return the hashes of the rubrics of rows from raw runs; empty for other rows."""
    try:
        return [str(rubric) for rubric in read_json(conversion)["rubrics"]]
    except (DataError, LookupError, TypeError):
        return []


def describe_model(named: str, run_folder: Path) -> dict[str, Any]:
    """Return the name, path and fingerprint of a base model.

    A folder is recorded twice, absolute and relative to the run, so that it is found from any working directory, and
    after the project has been moved or copied.
    """
    folder = Path(named)
    if not folder.is_dir():
        return {"name": named, "path": named, "relative": None, "fingerprint": None}
    relative = os.path.relpath(folder.resolve(), run_folder.resolve())
    return {
        "name": named, "path": str(folder.resolve()), "relative": relative, "fingerprint": model_fingerprint(folder),
    }  # fmt: skip


def describe_dataset(names: Any, folder: Path) -> dict[str, str | None] | None:
    """Return name, file and hashes of a dataset entry; several are joined with commas and share one hash.

    Returns:
        None if there is no name; file and hashes are None if a file is missing. `entry_sha256` covers how LLaMA Factory
        reads the file: columns, tags, formatting, number of samples.
    """
    if not (wanted := list(filter(None, split_names(names)))):
        return None
    described: dict[str, str | None] = {"name": ",".join(wanted), "file": None, "sha256": None, "entry_sha256": None}
    try:
        entries, raw = read_entries(folder), read_json(folder / INFO)
    except DataError:
        return described
    if digest := rows_sha256(folder, wanted):
        how = [{key: value for key, value in raw[name].items() if key != "file_name"} for name in wanted]
        entry = hashlib.sha256(json.dumps(how, sort_keys=True).encode()).hexdigest()
        described |= {
            "file": ",".join(str(entries[name].file) for name in wanted),
            "sha256": digest,
            "entry_sha256": entry,
        }
    return described


_FINGERPRINT = "2:"  # the version of the method: fingerprints of different versions are not compared
_SAMPLED_BLOCKS = 1024
_MODEL_FILES = {".json", ".safetensors", ".bin", ".txt", ".model", ".jinja", ".tiktoken", ".py"}


def model_fingerprint(folder: Path) -> str | None:
    """Return a hash that distinguishes model folders, within seconds.

    It covers configuration, tokenizer, chat template, code and small weight files completely. Of a weight file above
    64 MiB it covers the size and 1,024 evenly spaced blocks of 64 KiB, including the first and the last. A model that
    was trained further differs everywhere, but a change of a few bytes in a large file can be missed.

    Returns:
        None if there is no such folder (a name on a hub).
    """
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in _MODEL_FILES and path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        if size > LARGE_FILE and path.suffix in {".safetensors", ".bin"}:
            for block in spread_blocks(path, _SAMPLED_BLOCKS):
                digest.update(block)
            continue
        with path.open("rb") as stream:
            while part := stream.read(1 << 20):
                digest.update(part)
    return _FINGERPRINT + digest.hexdigest()


# --- comparing ----------------------------------------------------------------------------------------------------


def differences(record: Mapping[str, Any], fresh: Mapping[str, Any]) -> list[str]:
    """List how a start differs from a run that has begun, each as `name: before -> now`; empty for the same run.

    Args:
        record: the run.json of the run that has begun.
        fresh: from `new_record`, for the requested start.
    """
    before, after = record["config"], fresh["config"]
    keys = [key for key in {**before, **after} if key not in _NOT_ABOUT_LEARNING and key not in _BATCH]
    found = [
        f"{key}: {before.get(key, 'not set')} -> {after.get(key, 'not set')}"
        for key in keys
        if _comparable(key, before.get(key)) != _comparable(key, after.get(key))
    ]
    if rows_a_step(record) != rows_a_step(fresh):
        found.append(f"rows per optimizer step: {rows_a_step(record)} -> {rows_a_step(fresh)}")
    return found + [
        f"{what}: {changed}"
        for what, part, changed in _CONTENTS
        if _has_changed((record.get(what) or {}).get(part), (fresh.get(what) or {}).get(part))
    ]


_CONTENTS = (
    ("dataset", "sha256", "its rows have changed since"),
    ("dataset", "entry_sha256", "its entry in dataset_info.json has changed since"),
    ("eval_dataset", "sha256", "its rows have changed since"),
    ("eval_dataset", "entry_sha256", "its entry in dataset_info.json has changed since"),
    ("base_model", "fingerprint", "its files have changed since"),
)


def contents_changed(difference: str) -> bool:
    """Whether a line of `differences` is about files rather than keys of the config."""
    return any(difference == f"{what}: {changed}" for what, _, changed in _CONTENTS)


def _has_changed(before: Any, after: Any) -> bool:
    """Whether two hashes differ; they cannot be compared if one is missing or was made by another method."""
    return bool(before and after) and before != after and str(before).partition(":")[1] == str(after).partition(":")[1]


def _comparable(key: str, value: Any) -> Any:
    """Return a value as it is compared: `./model`, `model` and `/project/model` are the same folder."""
    is_folder = isinstance(value, str) and (key != "model_name_or_path" or Path(value).exists())
    return Path(value).resolve() if key in _FOLDERS and is_folder else value


def rows_a_step(record: Mapping[str, Any]) -> int:
    """Return the number of rows per optimizer step, over all processes."""
    per_device, accumulated = (int(setting(record["config"], key)) for key in _BATCH)
    return per_device * accumulated * int(record["processes"])


# --- reading and writing ------------------------------------------------------------------------------------------


def read_record(run_folder: Path) -> dict[str, Any] | None:
    """Read the run.json of a training run; None if the folder does not have one.

    Raises:
        DataError: the file is damaged.
    """
    path = run_folder / RUN_RECORD
    if not path.exists():
        return None
    try:
        record = read_json(path)
    except DataError:
        record = None
    if not isinstance(record, dict) or not all(isinstance(record.get(k, ...), t) for k, t in _REQUIRED.items()):
        raise DataError(f"{path}: damaged. Add --overwrite, which renames the folder, or run_name=NAME.")
    if not isinstance(record["base_model"].get("path"), str):
        raise DataError(f"{path}: damaged: no path of the base model. Add --overwrite, which renames the folder.")
    return record


def write_record(run_folder: Path, record: Mapping[str, Any]) -> None:
    """Write run.json completely or not at all."""
    write_json(run_folder / RUN_RECORD, record)


def all_records(saves: Path) -> Iterator[dict[str, Any]]:
    """Yield the run.json files below a folder, oldest start first; each with its actual status and its folder.

    A killed run could not record its end; it is recognised by its lock, which no process holds.
    """
    records: list[dict[str, Any]] = []
    for path in saves.glob(f"*/{RUN_RECORD}"):
        damaged: dict[str, Any] = {"run": path.parent.name, "status": "damaged", "config": {}}
        try:
            record = {**dict.fromkeys(_REQUIRED), **(read_record(path.parent) or damaged)}
        except DataError:
            record = {**dict.fromkeys(_REQUIRED), **damaged}
        if record["status"] == "running" and not _is_locked(path.parent):
            record["status"] = "killed"
        records.append({**record, "folder": str(path.parent), "spearman": _spearman(path.parent)})
    yield from sorted(records, key=lambda record: (record["started"] or "", record["run"]))


def _is_locked(folder: Path) -> bool:
    try:
        with (folder / ".lock").open() as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _spearman(run_folder: Path) -> float | None:
    """Return the agreement with the judges on held-out rows; None if it was not measured."""
    try:
        value = read_json(run_folder / EVALUATION / METRICS_FILE)["summary"]["spearman"]["value"]
    except (DataError, LookupError, TypeError):
        return None
    return float(value) if isinstance(value, int | float) else None


TABLE_COLUMNS = ("run", "state", "steps", "last train loss", "held-out loss", "Spearman", "started (UTC)", "differs in")
NUMERIC_COLUMNS = ("steps", "last train loss", "held-out loss", "Spearman")


def table_rows(records: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Format the records as strings, in the order of `TABLE_COLUMNS`."""
    differing = _differing_keys(records)
    return [
        [
            Path(record["folder"]).name,
            record["status"],
            f"{record['steps'] or 0}/{record['max_steps'] or '?'}",
            *(f"{record[key]:.4f}" if record[key] is not None else "" for key in ("train_loss", "eval_loss")),
            f"{record['spearman']:.2f}" if record["spearman"] is not None else "",
            (record["started"] or "").replace("T", " ")[:16],
            " ".join(f"{key}={record['config'][key]}" for key in differing if key in record["config"]),
        ]
        for record in records
    ]


def _differing_keys(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the keys that affect what is learned and whose values differ between records."""
    configs = [record["config"] for record in records if record["config"]]
    keys = dict.fromkeys(key for config in configs for key in config if key not in _NOT_ABOUT_LEARNING)
    return [key for key in keys if len({str(_comparable(key, config.get(key))) for config in configs}) > 1]


# --- software and hardware ----------------------------------------------------------------------------------------


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
    """Return the commit of prmkit's checkout, and whether files in it were changed; None outside of Git."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10)  # noqa: S607
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    return None if commit is None else {"commit": commit, "changed": bool(git("status", "--porcelain", "-uno"))}
