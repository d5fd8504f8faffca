"""finetune.jsonl to data/, from the first line to the last rename.

read and prepare every row (prepare) -> decide what only the whole input can tell (resolve)
    -> append each row to its variants (write) -> audit and publish (finish)
"""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from prmkit import cli
from prmkit.dataset.finish import finish, own_file
from prmkit.dataset.lengths import LengthGuard
from prmkit.dataset.prepare import Prepared, prepare_share
from prmkit.dataset.processes import Advance, Job, in_parallel
from prmkit.dataset.publish import make_stage, recover
from prmkit.dataset.refusals import refuse_bad_input, refuse_unmatched
from prmkit.dataset.report import Tally
from prmkit.dataset.resolve import resolve
from prmkit.dataset.settings import Settings
from prmkit.dataset.sources import Source, blocks_of, find_inputs, open_sources
from prmkit.dataset.stage import Group
from prmkit.dataset.variants import CONSENSUS, FULL, held_out_name, name_values
from prmkit.dataset.write import REJECTED, Census, Consensus, Staged, write_variants
from prmkit.errors import DataError
from prmkit.files import only_one, sha256_of

log = logging.getLogger(__name__)

_PATIENCE = 1.0
"""Seconds that a conversion waits for workers of a killed one to notice."""
_FORK_FROM = 8 << 20
"""Bytes of input. Below, a second process takes longer to start than it saves."""


def convert(settings: Settings) -> dict[str, Any]:
    """Convert the inputs; nothing is changed in the output folder unless everything went well.

    Returns:
        The report, as it stands in conversion_report.json.

    Raises:
        DataError: the inputs give no training row, too many rows are set aside, the data would leak, another
            conversion is at work in the folder, or the disk is full.
    """
    names = find_inputs(settings.inputs, settings.output)
    guard = LengthGuard(settings.lengths) if settings.lengths else None
    try:
        with only_one(settings.output, "converting", patience=_PATIENCE):
            recover(settings.output)
            try:
                return _convert(settings, names, guard, make_stage(settings.output))
            finally:
                recover(settings.output)
    except OSError as error:
        raise DataError(f"{settings.output}: {error.strerror or error}. The data there is as it was.") from error


def _convert(settings: Settings, names: Sequence[str], guard: LengthGuard | None, stage: Path) -> dict[str, Any]:
    sources = open_sources(names, stage)
    size = sum(source.path.stat().st_size for source in sources)
    new = stage / "new"
    new.mkdir()
    with cli.progress_bar(unit_is_bytes=True) as progress:
        bar = progress.add_task("reading", total=size)
        prepared, hashes, blocks = _prepare(settings, sources, guard, stage, size, partial(progress.advance, bar))
        refuse_unmatched(settings.filters, prepared)
        _warn_of_unknown_tasks(settings, prepared)
        all_for_training = _only_held_out(settings, prepared)
        resolved = resolve(
            stage,
            nothing_held_out=all_for_training,
            aggregate=settings.aggregate,
            max_disagreement=settings.max_disagreement,
        )
        groups = [
            [group._replace(held_out=False) if all_for_training else group for group in share.groups]
            for share in prepared
        ]
        bar = progress.add_task("writing", total=(stage / "rows-0").stat().st_size * 2 * len(prepared))
        staged = Staged(stage, groups, blocks)
        tally, rows = _write(settings, staged, guard, new, partial(progress.advance, bar))
    refuse_bad_input(tally, settings.max_rejected)
    told = {
        "inputs": [
            {"source": source.name, "sha256": sha256, "bytes": source.path.stat().st_size}
            for source, sha256 in zip(sources, hashes, strict=True)
        ],
        "lines": sum(share.lines for share in prepared),
        "prompts": resolved.prompts,
        "prompts_a_judge_answered_differently": resolved.against_themselves,
        "judge_agreement": resolved.agreement.as_json(),
    }
    return finish(settings, told, tally, rows, new, fork=len(prepared) > 1)


def _prepare(
    settings: Settings, sources: Sequence[Source], guard: LengthGuard | None, stage: Path, size: int, advance: Advance
) -> tuple[list[Prepared], list[str], int]:
    """Stage all rows: what the workers tell, the hash of each source, and the number of blocks."""
    blocks = list(enumerate(blocks_of(sources)))
    workers = settings.processes if size > _FORK_FROM else 1
    digits = 0 if size < 256 << 20 else 1 if size < 4 << 30 else 2
    shares: list[Job] = [
        partial(prepare_share, blocks[worker::workers], sources, settings, guard, stage, worker, digits)
        for worker in range(workers)
    ]
    *prepared, hashes = in_parallel([*shares, partial(_hashes, sources)], advance, fork=workers > 1)
    return prepared, hashes, len(blocks)


def _hashes(sources: Sequence[Source], _advance: Advance) -> list[str]:
    return [sha256_of(source.path) for source in sources]


def _warn_of_unknown_tasks(settings: Settings, prepared: Sequence[Prepared]) -> None:
    if settings.split.tasks is not None and not settings.filters:
        unknown = settings.split.tasks - {group.task for told in prepared for group in told.groups}
        if unknown:
            shown = ", ".join(sorted(unknown)[:5])
            log.warning("warning: %d tasks that are to be held out are not in the input: %s", len(unknown), shown)


def _only_held_out(settings: Settings, prepared: Sequence[Prepared]) -> bool:
    """Whether the split would leave nothing to train on; then nothing is held out.

    With filters the whole input decides, wanted or not: a task must not change sides with the filters.
    """
    if settings.filters:
        return not any(told.rows_by_side[False] for told in prepared)
    return all(group.held_out for told in prepared for group in told.groups)


def _write(
    settings: Settings, staged: Staged, guard: LengthGuard | None, new: Path, advance: Advance
) -> tuple[Tally, dict[str, int]]:
    """Write all variants: the counts, and the rows by dataset."""
    consensus = None
    if settings.aggregate != "none":
        variant = f"{settings.name}_consensus" if settings.filters else CONSENSUS
        consensus = Consensus(variant, settings.aggregate, settings.form, guard)
    names, whole, parts = _placements(settings, [group for groups in staged.groups for group in groups])
    rejected = own_file(settings, REJECTED)
    (new / rejected).touch()
    census = Census(rejected)
    jobs: list[Job] = [
        lambda advance: (write_variants(staged, whole, new, census.watch, advance), census.tally),
        partial(write_variants, staged, parts, new, consensus.watch if consensus else None),
    ]
    (rows, tally), more_rows = in_parallel(jobs, advance, fork=len(staged.groups) > 1)
    rows |= more_rows
    order = [FULL, settings.name, *([consensus.variant] if consensus else []), *names]
    sides = [name for variant in order for name in (variant, held_out_name(variant)) if name in rows]
    return tally, {name: rows[name] for name in sides}


def _placements(
    settings: Settings, groups: Sequence[Group]
) -> tuple[list[str], Mapping[Group, Sequence[str]], Mapping[Group, Sequence[str]]]:
    """The names of the variants of single values, and the variants of each group in two halves of about equal weight.

    The first half is the whole and the evaluation types, the second one the judges and the tasks.
    """
    if settings.filters:
        return [], dict.fromkeys(groups, (settings.name,)), dict.fromkeys(groups, ())
    names = name_values(
        sorted({group.evaluation_type for group in groups if group.evaluation_type is not None}),
        sorted({group.judge for group in groups if group.judge is not None}),
        sorted({group.task for group in groups if group.task is not None}) if settings.task_variants else (),
    )

    def named(*keys: tuple[str, str | None]) -> list[str]:
        return [names[kind, value] for kind, value in keys if value is not None and (kind, value) in names]

    return (
        list(names.values()),
        {group: [FULL, *named(("type", group.evaluation_type))] for group in groups},
        {group: named(("judge", group.judge), ("task", group.task)) for group in groups},
    )
