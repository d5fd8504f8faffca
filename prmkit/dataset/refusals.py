"""When a conversion ends without data, and what the user is told then."""

from collections import Counter
from collections.abc import Sequence

from prmkit.dataset.filters import Filters, nothing_matched
from prmkit.dataset.prepare import Prepared
from prmkit.dataset.report import Tally
from prmkit.errors import DataError


def refuse_unmatched(filters: Filters, prepared: Sequence[Prepared]) -> None:
    """Refuse filters that admit no row.

    Raises:
        DataError: with the values that exist.
    """
    if filters and not any(told.admitted for told in prepared):
        types, judges, tasks = (
            sum((getattr(told, name) for told in prepared), Counter[str]()) for name in ("types", "judges", "tasks")
        )
        raise DataError(nothing_matched(filters, types, judges, tasks))


def refuse_bad_input(tally: Tally, max_rejected: str | None) -> None:
    """Refuse an input that gives no training rows, or of which too many rows are set aside.

    Args:
        tally: of the whole input.
        max_rejected: a share (`5%`) or a number of rows.

    Raises:
        DataError: with the reasons, and where each first occurs.
    """
    rejected, kept = sum(tally.rejected.values()), tally.rows()
    if max_rejected is not None:
        limit = _limit(max_rejected, rejected + kept + tally.duplicates)
        if rejected > limit:
            raise DataError(
                f"{rejected:,} rows are set aside, --max-rejected {max_rejected} admits {limit:,}.{_reasons(tally)}"
            )
    if not kept:
        raise DataError(f"No row can be used.{_reasons(tally)}")
    if not tally.rows(held_out=False):
        tasks = ", ".join(f"{task:.80}" for task in list(tally.values("task"))[:5] if task) or "rows without a task"
        raise DataError(
            f"Every row that can be used is held out ({tasks}): the judge is measured on these, so it must not train "
            "on them. Choose other tasks, or use --eval-ratio 0 with an --output-dir of its own."
        )


def _limit(text: str, rows: int) -> int:
    return int(float(text.removesuffix("%")) / 100 * rows) if text.endswith("%") else int(text)


def _reasons(tally: Tally) -> str:
    return "".join(
        f"\n  {n:,} x {kind}; the first one: {tally.first_rejected[kind]:.300}"
        for kind, n in tally.rejected.most_common(10)
    )
