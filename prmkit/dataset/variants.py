"""The names of the variants: safe as file names, unique, and the same in every run over the same values."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping

from prmkit.paths import HELD_OUT_SUFFIX

PREFIX = "reward_model_"
FULL = PREFIX + "full"
CONSENSUS = PREFIX + "consensus"
CUSTOM = PREFIX + "custom"

_EVALUATION_TYPES = ("clip", "category", "final")
# A judge who is called so gets a hash behind his name, whether or not the input has a variant that he would clash with:
# names must not change when data arrives.
_RESERVED = {"full", "custom", "consensus", "eval"}
_LONGEST = 60
"""Characters of a value in a name. File systems stop at 255 bytes."""


def held_out_name(variant: str) -> str:
    """The name of a variant's held-out side."""
    return variant + HELD_OUT_SUFFIX


def name_values(types: Iterable[str], judges: Iterable[str], tasks: Iterable[str]) -> dict[tuple[str, str], str]:
    """Name the variants of all evaluation types, judges and tasks.

    Values that would get the same name, get a hash behind it, all of them; so does what is too long, or says nothing
    once it is safe. The three evaluation types that every input has keep their plain names.

    Returns:
        The names by kind (`type`, `judge` or `task`) and value.
    """
    plain = {
        (kind, value): _safe(value)
        for kind, values in (("type", types), ("judge", judges), ("task", tasks))
        for value in values
    }
    taken = Counter(plain.values())
    return {key: PREFIX + _unique(key, safe, taken) for key, safe in plain.items()}


def _safe(value: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", value[: 4 * _LONGEST].lower()).strip("_")


def _unique(key: tuple[str, str], safe: str, taken: Mapping[str, int]) -> str:
    kind, value = key
    if kind == "type" and value in _EVALUATION_TYPES:
        return value
    clashes = taken[safe] > 1 or safe in _RESERVED or safe in _EVALUATION_TYPES or safe.endswith(HELD_OUT_SUFFIX)
    if safe and not clashes and len(safe) <= _LONGEST and len(value) <= 4 * _LONGEST:
        return safe
    digest = hashlib.blake2b(f"{kind}:{value}".encode(errors="surrogatepass"), digest_size=4).hexdigest()
    return f"{safe[:_LONGEST].strip('_') or kind}_{digest}"
