"""What the files of a data folder are called. The wings meet in these files, so their names stand here once."""

from pathlib import Path

INFO = "dataset_info.json"
"""LLaMA Factory's list of the datasets in the folder."""
REPORT = "conversion_report.json"
"""What the last conversion did; written by it, read by training and evaluation."""
HELD_OUT_SUFFIX = "_eval"
"""Behind the name of a variant: its held-out side."""
SIDECAR_SUFFIX = ".meta.jsonl"
TASKS = "tasks"
"""Folder in the data folder with the datasets of single tasks, out of the way of the others."""


def sidecar_of(file: Path) -> Path:
    """The file that traces the rows of a training file back to the input, line by line."""
    return file.with_suffix(SIDECAR_SUFFIX)
