"""Everything that the user decides about a conversion."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from prmkit.dataset.filters import Filters
from prmkit.dataset.formats import Format
from prmkit.dataset.lengths import LengthSettings
from prmkit.dataset.split import Split
from prmkit.dataset.variants import CUSTOM

Labels = Literal["canonical", "verbatim"]
Aggregate = Literal["none", "mean", "median"]


@dataclass(frozen=True)
class Settings:
    """One conversion."""

    inputs: tuple[str, ...]
    output: Path
    filters: Filters = field(default_factory=Filters)
    name: str = CUSTOM
    """Of the variant that filters write."""
    form: Format = "alpaca"
    labels: Labels = "canonical"
    split: Split = field(default_factory=Split)
    aggregate: Aggregate = "none"
    max_disagreement: float | None = None
    mask_leaked_scores: bool = False
    max_rejected: str | None = None
    """A share (`5%`) or a number of rows."""
    task_variants: bool = True
    lengths: LengthSettings | None = None
    processes: int = 2

    def as_json(self) -> dict[str, Any]:
        """The settings for the report."""
        return {key: _plain(value) for key, value in asdict(self).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, frozenset):
        return sorted(value)
    return str(value) if isinstance(value, Path) else value
