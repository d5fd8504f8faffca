"""The checks before a run: everything that would stop it or spoil it, found before the model loads."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from prmkit.training.config import ResolvedConfig
from prmkit.training.machine import Machine, this_machine


class Status(StrEnum):
    """How a check came out."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True)
class Check:
    """One check and what to do about it."""

    name: str
    status: Status
    found: str
    advice: str = ""
    """What to do; empty when all is well."""


def run_preflight(
    config: ResolvedConfig, *, machine: Machine | None = None, world_size: int = 1, torchrun: bool = False
) -> list[Check]:
    """Run every check and return them all, in the order of a training checklist. Takes under 15 seconds.

    Args:
        config: what the run would be started with.
        machine: what training can count on; this machine when it is None.
        world_size: how many processes train, over all nodes.
        torchrun: whether they are started by torchrun.
    """
    machine = machine or this_machine()
    return [_model_folder(config)]


def errors_in(checks: Sequence[Check]) -> list[Check]:
    """The checks that stop a run."""
    return [check for check in checks if check.status is Status.ERROR]


def _model_folder(config: ResolvedConfig) -> Check:
    folder = Path(config.values["model_name_or_path"])
    if not (folder / "config.json").is_file():
        return Check("model folder", Status.ERROR, f"{folder}/config.json is missing", "Download the model there.")
    return Check("model folder", Status.OK, str(folder))
