"""The names of the files in a data folder. The packages share these files, so each name is written once, here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

INFO = "dataset_info.json"
"""LLaMA Factory's list of the datasets in the folder."""
REPORT = "conversion_report.json"
"""The report of the last conversion; training and evaluation read it."""
HELD_OUT_SUFFIX = "_eval"
"""The suffix of a held-out dataset: `reward_model_full_eval` is the held-out side of `reward_model_full`."""
SIDECAR_SUFFIX = ".meta.jsonl"
TASKS = "tasks"
"""The subfolder for datasets of single tasks, out of the way of the others."""


def sidecar_of(file: Path) -> Path:
    """The file that traces the rows of a training file back to the input, line by line."""
    return file.with_suffix(SIDECAR_SUFFIX)


def base_model_of(run_folder: Path, record: Mapping[str, Any]) -> str:
    """The base model of a run: its folder wherever the project is now, or its name on a hub.

    Found from any working directory: `relative` is the path from the run, which survives moving or copying the project;
    `path` is absolute. Records of older versions have only a `path`, relative to where the training was started.
    """
    model = record["base_model"]
    beside = run_folder / str(model.get("relative"))
    return str(beside.resolve()) if model.get("relative") and beside.is_dir() else str(model["path"])
