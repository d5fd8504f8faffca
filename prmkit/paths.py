"""The names of the files in a data folder and in the folder of a run, and where the files that a run names are now.

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
"""The suffix of a held-out dataset: `reward_model_full_eval` is the held-out side of `reward_model_full`."""
SIDECAR_SUFFIX = ".meta.jsonl"
TASKS = "tasks"
"""The subfolder for datasets of single tasks, out of the way of the others."""


def sidecar_of(file: Path) -> Path:
    """The file that traces the rows of a training file back to the input, line by line."""
    return file.with_suffix(SIDECAR_SUFFIX)


# --- the folder of a run ----------------------------------------------------------------------------------------------

RUN_RECORD = "run.json"
"""What a run was started with, and what it has reached; a folder that has it is a run."""
EVALUATION = "evaluation"
"""The subfolder for the results about the trained judge."""
METRICS_FILE = "metrics.json"
"""How well a judge agrees with the held-out labels."""
PREDICTIONS_FILE = "predictions.jsonl"
"""A judge's scores of the held-out prompts."""
EXPORT_NOTE = "prmkit.json"
"""The settings that an exported model needs, in its folder; written last: an export without it is incomplete."""


DEFAULT_EXPORT = "exported_model"


def export_folder(config: Mapping[str, Any]) -> Path:
    """Where the exported model of a run with this configuration is."""
    return Path(str(config.get("export_dir") or DEFAULT_EXPORT))


def record_of(folder: Path) -> Path | None:
    """The record of a run, given its folder or one of its checkpoints; None if it is neither."""
    return next((file for place in (folder, folder.parent) if (file := place / RUN_RECORD).is_file()), None)


def base_model_of(run: Path, record: Mapping[str, Any]) -> Path:
    """The base model of a run: its folder wherever the project is now, or its name on a hub.

    Projects are moved and copied, and used from any folder, so the recorded path relative to the run is tried first,
    then the absolute one. Older records have only the path in the configuration.

    Args:
        run: the folder of the run.
        record: the content of its `run.json`, with `model_name_or_path` in its configuration.
    """
    recorded = record.get("base_model")
    places = recorded if isinstance(recorded, dict) else {}
    relative, absolute = places.get("relative"), places.get("path")
    if isinstance(relative, str) and (near := run.resolve() / relative).is_dir():
        return near.resolve()
    if isinstance(absolute, str) and Path(absolute).is_absolute():
        return Path(absolute)
    # Usually relative to a folder above the run's: the project, or the one that contains the registry.
    named = Path(record["config"]["model_name_or_path"])
    candidates = (above / named for above in run.resolve().parents[:4])
    return next((place for place in candidates if place.is_dir()), named)
