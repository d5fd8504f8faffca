"""Which rows the user asked for."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from prmkit.dataset.record import Record

_VALUES_SHOWN = 20


@dataclass(frozen=True)
class Filters:
    """The values that a row must have; None admits every value. All three must agree."""

    evaluation_types: frozenset[str] | None = None
    judges: frozenset[str] | None = None
    tasks: frozenset[str] | None = None

    def __bool__(self) -> bool:
        return self != Filters()

    def admit(self, record: Record) -> bool:
        """Whether a row is wanted."""
        return (
            (self.evaluation_types is None or record.evaluation_type in self.evaluation_types)
            and (self.judges is None or record.judge in self.judges)
            and (self.tasks is None or record.task in self.tasks)
        )


def nothing_matched(filters: Filters, types: Counter[str], judges: Counter[str], tasks: Counter[str]) -> str:
    """What to tell a user whose filters admit no row: which values exist, the frequent ones first."""
    lines = ["No row matches the filters."]
    for flag, wanted, existing in (
        ("--evaluation-types", filters.evaluation_types, types),
        ("--model-names", filters.judges, judges),
        ("--task-ids", filters.tasks, tasks),
    ):
        if wanted is not None:
            lines.append(f"  {flag} {' '.join(sorted(wanted))}{_judged(wanted, existing)}")
            lines.append(f"    in the input: {_shortened(existing)}")
    return "\n".join(lines)


def _judged(wanted: Collection[str], existing: Collection[str]) -> str:
    absent = sorted(set(wanted) - set(existing))
    return f"  (not in the input: {', '.join(absent)})" if absent else "  (each is in the input, but not together)"


def _shortened(existing: Counter[str]) -> str:
    if not existing:
        return "none"
    names = [f"{name:.80} ({count:,})" for name, count in existing.most_common(_VALUES_SHOWN)]
    more = len(existing) - len(names)
    return ", ".join(names) + (f", and {more:,} more" if more else "")
