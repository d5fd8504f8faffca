"""What can be wrong with a config, told before anything heavy is loaded."""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prmkit.training.schema import Key


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a config."""

    key: str
    message: str
    hint: str
    """What to write instead."""


def problems_in(values: Mapping[str, Any], keys: Mapping[str, Key]) -> list[Problem]:
    """Everything that is wrong with these values."""
    return list(_unknown(values, keys))


def _unknown(values: Mapping[str, Any], keys: Mapping[str, Key]) -> Iterator[Problem]:
    for name in values.keys() - keys.keys():
        nearest = difflib.get_close_matches(name, keys, n=1)
        hint = f"Did you mean {nearest[0]}?" if nearest else ""
        yield Problem(name, "LLaMA Factory does not know this key.", hint)
