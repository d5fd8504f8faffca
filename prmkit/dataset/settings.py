"""Everything that the user decides about a conversion, with the defaults."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prmkit.errors import DataError
from prmkit.verdict import Scale

if TYPE_CHECKING:  # they need packages, and --help shows defaults from here without any
    from prmkit.dataset_info import Format
    from prmkit.rows import InputRow

PREFIX = "reward_model_"
CONSENSUS = PREFIX + "consensus"
CUSTOM = PREFIX + "custom"

LabelStyle = Literal["canonical", "verbatim"]
Aggregate = Literal["none", "mean", "median"]
LengthPolicy = Literal["trim", "drop", "error", "keep"]


@dataclass(frozen=True)
class Filters:
    """The values that a row must have; None accepts every value. A row must pass all three filters."""

    evaluation_types: frozenset[str] | None = None
    judges: frozenset[str] | None = None
    tasks: frozenset[str] | None = None

    def __bool__(self) -> bool:
        return self != Filters()

    def accept(self, row: "InputRow") -> bool:
        """Whether a row is wanted."""
        return (
            (self.evaluation_types is None or row.evaluation_type in self.evaluation_types)
            and (self.judges is None or row.judge in self.judges)
            and (self.tasks is None or row.task in self.tasks)
        )


@dataclass(frozen=True)
class Split:
    """How tasks are held out. A task's side depends on its name and the seed, so new data does not move it."""

    ratio: float = 0.1
    """The expected share of tasks that are held out, 0 to 1."""
    seed: int = 0
    tasks: frozenset[str] | None = None
    """The user's list of held-out tasks; it replaces ratio and seed."""
    from_report: bool = False
    """The split was read from the folder's previous conversion report, not given on the command line."""

    def place(self, task: str) -> int:
        """The task's hash, 0 to 2**64; tasks whose hash is below `ratio` * 2**64 are held out."""
        digest = hashlib.blake2b(f"{self.seed}:{task}".encode(errors="surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digest)

    def holds_out(self, task: str) -> bool:
        """Whether a task is held out, whatever other tasks exist."""
        return task in self.tasks if self.tasks is not None else self.place(task) < self.ratio * 2**64


def read_tasks(path: Path) -> frozenset[str]:
    """The tasks of a file with one task per line; empty lines are skipped.

    Raises:
        DataError: the file cannot be read, or lists no task.
    """
    from prmkit.rows import as_name  # it imports orjson, and --help does without

    try:
        tasks = frozenset(filter(None, map(as_name, path.read_text(encoding="utf-8-sig").splitlines())))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8.") from error
    if not tasks:
        raise DataError(f"{path}: lists no task. Write one task per line, or hold out none with --eval-ratio 0.")
    return tasks


@dataclass(frozen=True)
class LengthSettings:
    """How rows are measured, and what happens to those that LLaMA Factory would cut."""

    tokenizer: Path
    template: str | None
    cutoff_len: int
    too_long: LengthPolicy = "trim"
    packing: bool = False
    """LLaMA Factory's `packing` or `neat_packing`: it then uses one token of `cutoff_len` itself."""
    default_system: str | None = None
    enable_thinking: bool | None = True
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Settings:
    """One conversion."""

    inputs: tuple[str, ...]
    output: Path
    filters: Filters = field(default_factory=Filters)
    name: str = CUSTOM
    """The name of the filtered variant."""
    form: "Format" = "alpaca"
    labels: LabelStyle = "canonical"
    split: Split = field(default_factory=Split)
    scales: Mapping[str | None, Scale] = field(default_factory=dict)
    """Judge -> scale; None applies to every other judge."""
    aggregate: Aggregate = "none"
    leniency_correction: bool = True
    max_disagreement: float | None = None
    near_duplicates: Literal["keep", "drop"] = "keep"
    mask_leaked_scores: bool = False
    max_rejected: str | None = None
    """A share (`5%`) or a number of rows; None is half of the rows."""
    task_variants: bool = True
    lengths: LengthSettings | None = None
    rubric: Path | None = None
    """The rubric for the steps of labelled runs; None is the default rubric."""

    def scale_of(self, judge: str | None) -> Scale | None:
        """The scale that a judge uses; None for 0 to 1."""
        return self.scales.get(judge, self.scales.get(None))

    def file_name(self, name: str) -> str:
        """The name of a report or list of rejected rows: a filtered conversion does not replace the main one's."""
        return f"{self.name}.{name.removeprefix('conversion_')}" if self.filters else name

    def as_json(self) -> dict[str, Any]:
        """The settings for the report."""
        values = {**asdict(self), "scales": {judge or "": asdict(scale) for judge, scale in self.scales.items()}}
        del values["split"]["from_report"]
        return {key: _plain(value) for key, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, frozenset):
        return sorted(value)
    return str(value) if isinstance(value, Path) else value
