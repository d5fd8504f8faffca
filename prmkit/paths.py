"""What the files of a data folder are called. The wings meet in these files, so each name is written once, here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

INFO = "dataset_info.json"
"""LLaMA Factory's list of the datasets in the folder."""
REPORT = "conversion_report.json"
"""What the last conversion did; written by it, read by training and evaluation."""
HELD_OUT_SUFFIX = "_eval"
"""What the name of a held-out dataset ends in: `reward_model_full_eval` is the held-out side of `reward_model_full`."""
SIDECAR_SUFFIX = ".meta.jsonl"
TASKS = "tasks"
"""Folder in the data folder with the datasets of single tasks, out of the way of the others."""


def sidecar_of(file: Path) -> Path:
    """The file that traces the rows of a training file back to the input, line by line."""
    return file.with_suffix(SIDECAR_SUFFIX)


def base_model_of(run_folder: Path, record: Mapping[str, Any]) -> str:
    """The base model of a run: its folder wherever the project is now, or its name on a hub.

    Found from any working directory: `relative` leads there from the run, also after the project was moved or copied;
    `path` is absolute. Records of older versions have only a `path`, relative to where the training was started.
    """
    model = record["base_model"]
    beside = run_folder / str(model.get("relative"))
    return str(beside.resolve()) if model.get("relative") and beside.is_dir() else str(model["path"])
