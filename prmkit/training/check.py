"""How one check of the preflight came out."""

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """Errors stop a run, unless `--force` is given; warnings are only shown."""

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
    """What to do; empty when there is nothing to do."""


def ok(name: str, found: str, advice: str = "") -> Check:
    """All is well."""
    return Check(name, Status.OK, found, advice)


def warning(name: str, found: str, advice: str) -> Check:
    """The run would go through, and might not be what was meant."""
    return Check(name, Status.WARNING, found, advice)


def error(name: str, found: str, advice: str) -> Check:
    """The run would die, or be worth nothing."""
    return Check(name, Status.ERROR, found, advice)
