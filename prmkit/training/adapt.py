"""Fit a config to the data and the machine: what is derived, what is dropped, and why."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prmkit.training.machine import Machine


@dataclass(frozen=True)
class Adaptation:
    """What fitting changed."""

    derived: dict[str, tuple[Any, str]] = field(default_factory=dict)
    """Key to new value and reason."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Key to reason."""


def adapt(values: Mapping[str, Any], machine: Machine, *, world_size: int, torchrun: bool) -> Adaptation:
    """Fit `values` to the data and the machine."""
    adaptation = Adaptation()
    if not machine.gpus and values.get("use_cpu") is not False:
        adaptation.derived["use_cpu"] = (True, "this machine has no GPU")
        for key in ("bf16", "fp16", "tf32", "pure_bf16"):
            adaptation.dropped[key] = "this machine has no GPU"
    if not torchrun:
        adaptation.dropped["ddp_backend"] = "only one process trains"
    return adaptation
