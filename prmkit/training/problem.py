"""One thing that is wrong with a config."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """What is wrong, and what to write instead."""

    key: str
    message: str
    hint: str = ""
