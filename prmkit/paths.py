"""File names in a data folder and in the folder of a training run, and the current locations of files recorded there.

The packages share these files, so each name is written once, here.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

# --- a data folder ----------------------------------------------------------------------------------------------------

INFO = "dataset_info.json"
"""LLaMA Factory's list of the datasets in the folder."""
REPORT = "conversion_report.json"
"""The report of the last conversion; training and evaluation read it."""
FULL = "reward_model_full"
"""The dataset with every accepted row."""
HELD_OUT_SUFFIX = "_eval"
"""The suffix of a held-out dataset: `reward_model_full_eval` is the held-out split of `reward_model_full`."""
SIDECAR_SUFFIX = ".meta.jsonl"
TASKS = "tasks"
"""The subfolder for datasets of single tasks, separate from the others."""


def sidecar_of(file: Path) -> Path:
    """Return the path of the file that traces the rows of a training file back to the input, line by line."""
    return file.with_suffix(SIDECAR_SUFFIX)


# --- the folder of a training run -------------------------------------------------------------------------------------

RUN_RECORD = "run.json"
"""The settings and the results of a training run; a folder with this file is a training run."""
EVALUATION = "evaluation"
"""The subfolder for the results about the trained judge."""
METRICS_FILE = "metrics.json"
"""The agreement of a judge with the held-out labels."""
PREDICTIONS_FILE = "predictions.jsonl"
"""A judge's scores of the held-out prompts."""
EXPORT_NOTE = "prmkit.json"
"""The settings that an exported model needs, in its folder; written last: an export without it is incomplete."""


DEFAULT_EXPORT = "exported_model"


def export_folder(config: Mapping[str, Any]) -> Path:
    """Return the folder of the exported model of a training run with this configuration."""
    return Path(str(config.get("export_dir") or DEFAULT_EXPORT))


def record_of(folder: Path) -> Path | None:
    """Find the run.json of a training run, given its folder or one of its checkpoints; None if it is neither."""
    return next((file for each in (folder, folder.parent) if (file := each / RUN_RECORD).is_file()), None)


def base_model_of(run: Path, record: Mapping[str, Any]) -> Path:
    """Find the base model of a training run: its folder, wherever the project is now, or its name on a hub.

    Projects are moved and copied, and used from any folder, so the recorded path relative to the training run is tried
    first, then the absolute one. An older run.json has only the path in the configuration.

    Args:
        run: the folder of the training run.
        record: the content of its `run.json`, with `model_name_or_path` in its configuration.
    """
    recorded = record.get("base_model")
    paths = recorded if isinstance(recorded, dict) else {}
    relative, absolute = paths.get("relative"), paths.get("path")
    if isinstance(relative, str) and (near := run.resolve() / relative).is_dir():
        return near.resolve()
    if isinstance(absolute, str) and Path(absolute).is_absolute():
        return Path(absolute)
    # Usually relative to a folder above the run's: the project, or the one that contains the registry.
    named = Path(record["config"]["model_name_or_path"])
    candidates = (above / named for above in run.resolve().parents[:4])
    return next((folder for folder in candidates if folder.is_dir()), named)
