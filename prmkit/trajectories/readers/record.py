"""Trajectory records: runs that were imported before."""

from collections.abc import Iterator
from typing import Any

from prmkit.trajectories.run import FieldNames, Reader
from prmkit.trajectory import Trajectory, is_record, load


def read(value: Any, _keys: FieldNames) -> Iterator[Trajectory]:
    """Yield the run of one line."""
    yield load(value, "")


READER = Reader("trajectories", is_record, one=read)
