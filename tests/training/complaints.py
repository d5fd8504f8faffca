"""Resolving a config on a machine without GPU, and what a user is reported when something is wrong with it."""

from pathlib import Path

import pytest

from prmkit.errors import UsageError
from prmkit.training.config import ResolvedConfig, parse_assignment, resolve_config
from prmkit.training.environment import Machine

NO_GPU = Machine((), 2, {"swanlab": "0.10.3", "swanboard": "0.1", "matplotlib": "3"})


def resolved(path: Path, *assignments: str) -> ResolvedConfig:
    """The config of a project, resolved on a machine without GPU."""
    return resolve_config(path, [parse_assignment(text) for text in assignments], machine=NO_GPU)


def complaint(path: Path, *assignments: str) -> str:
    """What a user is reported; fails when there is nothing to tell."""
    with pytest.raises(UsageError) as caught:
        resolved(path, *assignments)
    return str(caught.value)
