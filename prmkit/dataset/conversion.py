"""Convert finetune.jsonl to data/, from the first row to the last rename.

prepare each row (prepare) and store it (stage) -> decide what depends on the complete input (stage, leaks)
    -> append each row to its variants (write) -> audit and publish (leaks, publish)
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from platform import python_version
from typing import Any

from prmkit import __version__, cli
from prmkit.dataset.leaks import Prompt, audit, describe_leaks, find_near_duplicates
from prmkit.dataset.lengths import LengthGuard, Measured, TooLong
from prmkit.dataset.prepare import (
    InputFile,
    PreparedRow,
    Preparer,
    RejectedRow,
    ScaleProblem,
    find_inputs,
    find_scale_problems,
    open_source,
)
from prmkit.dataset.publish import make_stage, names_in_folder, publish, recover, sync_files
from prmkit.dataset.report import (
    agreement_of,
    count_rows,
    describe_problems,
    first_rejected,
    judges_with_losses,
    leniency_of,
    self_agreement_of,
)
from prmkit.dataset.settings import PREFIX, Settings
from prmkit.dataset.stage import BOTH_SIDES, NEAR_DUPLICATE, Stage, open_stage
from prmkit.dataset.write import REJECTED, Written, both_sides, held_out_name, write_variants
from prmkit.dataset_info import Entry, read_entries
from prmkit.errors import DataError
from prmkit.files import exclusive_lock, read_json, sha256_of, write_json
from prmkit.layouts import STDIN, Line
from prmkit.leniency import Leniency
from prmkit.llamafactory_schema import installed_version
from prmkit.paths import FULL, INFO, REPORT

log = logging.getLogger(__name__)

_ROWS_AT_ONCE = 256
"""Batch size for tokenization; a larger one only costs memory."""
_MOST_REJECTED = "50%"
_SHOWN = 10


def convert(settings: Settings) -> dict[str, Any]:
    """Convert the inputs; the output folder changes only on success.

    Returns:
        The report, as in conversion_report.json.

    Raises:
        DataError: the inputs have no usable training row, too many rows are rejected, the data would leak, another
            conversion is running in the folder, or the disk is full.
    """
    names, skipped = find_inputs(settings)
    _warn_of_files(skipped, "skipped, because they are hidden, symlinks, or have no suffix of a row file")
    try:
        with exclusive_lock(settings.output, "converting", patience=1.0):
            recover(settings.output)
            _check_inputs_survive(names, settings)
            guard = LengthGuard(settings.lengths) if settings.lengths else None
            work = make_stage(settings.output)
            try:
                with open_stage(work / "rows.sqlite", names) as stage:
                    return _convert(settings, names, guard, stage, work)
            finally:
                recover(settings.output)
    except OSError as error:
        raise DataError(f"{settings.output}: {error.strerror or error}. The data there is unchanged.") from error


def _convert(
    settings: Settings, names: Sequence[str], guard: LengthGuard | None, stage: Stage, work: Path
) -> dict[str, Any]:
    sources, preparer = _read(settings, names, guard, stage)
    problems = list(find_scale_problems(preparer.values, settings))
    decided = _decide(settings, stage, preparer, problems)
    _check_enough_rows(settings, stage, problems)
    (new := work / "new").mkdir()
    written = write_variants(settings, stage, guard, new)
    report = {
        "inputs": [{"source": source.name, "sha256": source.sha256, "bytes": source.bytes} for source in sources],
        "lines": preparer.lines,
        "rubrics": sorted(preparer.rubrics),
        **decided,
        **count_rows(stage),
        "judges_with_losses": judges_with_losses(stage),
        "scale_problems": describe_problems(problems),
        "held_out": _held_out(settings, stage, new),
        "measured_with": guard.as_json() if guard else None,
    }
    stage.rows.close()
    (work / "rows.sqlite").unlink()
    return _finish(settings, report, written, new)


# --- reading ------------------------------------------------------------------------------------------------------


def _read(
    settings: Settings, names: Sequence[str], guard: LengthGuard | None, stage: Stage
) -> tuple[list[InputFile], Preparer]:
    """Store all rows of all inputs in the stage."""
    preparer, sources = Preparer(settings), []
    size = sum(Path(name).stat().st_size for name in names if name != STDIN)
    stage.sources.clear()
    with cli.progress_bar(unit_is_bytes=True) as progress:
        bar = progress.add_task("reading", total=size)
        for number, name in enumerate(names):
            with open_source(name, settings.rubric) as (source, lines):
                sources.append(source)
                stage.sources.append(source.name)
                while batch := list(islice(lines, _ROWS_AT_ONCE)):
                    _stage_rows(preparer, batch, guard, stage, number)
                    progress.advance(bar, sum(line.size for line in batch))
    if not preparer.lines:
        raise DataError(f"{', '.join(source.name for source in sources)}: no rows. Pass your rows with --input.")
    stage.index()
    return sources, preparer


def _stage_rows(
    preparer: Preparer, lines: Sequence[Line], guard: LengthGuard | None, stage: Stage, source: int
) -> None:
    rows = [row for line in lines if (row := preparer.prepare(line))]
    measured = iter(_measure([row for row in rows if isinstance(row, PreparedRow)], guard))
    for row in rows:
        if isinstance(row, RejectedRow):
            stage.add_rejected(source, row)
            continue
        length = next(measured)
        if isinstance(length, Measured):
            stage.add_row(source, row, length)
            continue
        if guard and guard.settings.too_long == "error":
            advice = "Raise cutoff_len, or choose --too-long trim or drop."
            raise DataError(f"{stage.sources[source]}:{row.line}: {length.reason}. {advice}")
        content = {"instruction": row.prompt.text, "output": row.label}
        stage.add_rejected(
            source, RejectedRow(row.line, length.kind, length.reason, content, row.row.judge, length.tokens)
        )


def _measure(rows: Sequence[PreparedRow], guard: LengthGuard | None) -> Iterator[Measured | TooLong]:
    if guard is None:
        yield from (Measured(row.prompt.text, 0, 0, 0) for row in rows)
        return
    fitted = iter(guard.fit([(row.prompt.system, row.prompt.text, row.label) for row in rows if row.wanted]))
    yield from (next(fitted) if row.wanted else Measured(row.prompt.text, 0, 0, 0) for row in rows)


def _check_inputs_survive(names: Sequence[str], settings: Settings) -> None:
    """Check that the conversion does not replace or remove an input file.

    Raises:
        DataError: it would replace or remove one.
    """
    earlier = _earlier_report(settings).get("files", [])
    for name in names:
        path = Path(name)
        if name == STDIN or settings.output.resolve() not in path.resolve().parents:
            continue
        inside = path.resolve().relative_to(settings.output.resolve()).as_posix()
        own = (settings.file_name(REJECTED), settings.file_name(REPORT), INFO, *earlier)
        starts = (settings.name,) if settings.filters else (PREFIX,)
        if inside in own or Path(inside).name.startswith(starts):
            raise DataError(f"{name} would be overwritten by this conversion. Move it out of the folder.")


def _warn_of_files(names: Sequence[str], what: str) -> None:
    if names:
        more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
        log.warning("warning: %d files or folders are %s: %s%s", len(names), what, ", ".join(names[:_SHOWN]), more)


# --- deciding -----------------------------------------------------------------------------------------------------


def _decide(settings: Settings, stage: Stage, preparer: Preparer, problems: Sequence[ScaleProblem]) -> dict[str, Any]:
    """Reject rows for reasons that need the complete input, compare the judges, and return the report on these."""
    if settings.filters and not preparer.accepted:
        raise DataError(_nothing_matched(settings, stage))
    stage.reject_other_scales(problems)
    _check_tasks(settings, stage.assign_sides(settings.split))
    _check_judges(settings, stage)
    stage.check_trajectories()
    stage.reject_prompts_on_both_sides()
    near = find_near_duplicates(lambda held_out: _prompts(stage, held_out=held_out))
    if settings.near_duplicates == "drop":
        reason = "shares {:.0%} of its words with the held-out {}"
        reasons = ((reason.format(share, held[1]), train[0]) for train, held, share in near.pairs)
        stage.reject_prompts(reasons, NEAR_DUPLICATE)
    again, self_agreement = stage.answered_again(), self_agreement_of(stage.self_agreement())
    stage.reject_duplicates()
    prompts, differently = stage.count_prompts()
    leniency, agreement = _compare_judges(stage)
    if settings.max_disagreement is not None:
        stage.reject_contested(settings.max_disagreement)
    if settings.aggregate != "none":
        stage.make_consensus(settings.aggregate, leniency if settings.leniency_correction else Leniency())
    return {
        "prompts": prompts,
        "prompts_a_judge_answered_differently": differently,
        "judge_agreement": agreement,
        "rows_answered_again": again,
        "self_agreement": self_agreement,
        "leniency": leniency_of(leniency),
        "near_duplicates": near.as_json(lambda place: place[1]),
    }


def _compare_judges(stage: Stage) -> tuple[Leniency, list[dict[str, Any]]]:
    stage.gather_voices()
    judges = stage.rows.execute("SELECT count(*) FROM compared").fetchone()[0]
    if judges < 2:
        return Leniency(), []
    return stage.leniency(), agreement_of(stage.agreement())


def _check_tasks(settings: Settings, unknown: set[str]) -> None:
    tasks = settings.split.tasks
    if tasks is None or settings.split.from_report or not unknown:
        return
    shown = ", ".join(f"{task:.80}" for task in sorted(unknown)[:5])
    if unknown == tasks:
        raise DataError(f"--eval-tasks: no row has one of these tasks ({shown}), so nothing would be held out.")
    log.warning("warning: %d tasks of --eval-tasks are not in the input: %s", len(unknown), shown)


def _check_judges(settings: Settings, stage: Stage) -> None:
    judges = {judge for (judge,) in stage.rows.execute("SELECT judge FROM row UNION SELECT judge FROM rejected")}
    if unknown := settings.scales.keys() - judges - {None}:
        shown = ", ".join(f"{judge:.80}" for judge in sorted(map(str, unknown))[:5])
        log.warning("warning: no row is from a judge of --scale: %s", shown)


def _prompts(stage: Stage, *, held_out: bool) -> Iterator[Prompt]:
    """Yield the distinct prompts of one split, grouped by task."""
    rows = stage.rows.execute(
        "SELECT prompt, min(unit), min(evaluation_type), min(number) FROM kept WHERE held_out = ? GROUP BY prompt "
        "ORDER BY 2, 4", (held_out,),
    )  # fmt: skip
    for prompt, unit, evaluation_type, number in rows:
        (text,) = stage.rows.execute("SELECT text FROM prompt WHERE id = ?", (prompt,)).fetchone()
        yield Prompt(text, unit, evaluation_type or "", (prompt, stage.place(number)))


def _nothing_matched(settings: Settings, stage: Stage) -> str:
    """Return the message if the filters accept no row: which values exist, the most frequent first."""
    lines = ["No row matches the filters."]
    filters = settings.filters
    for flag, column, wanted in (
        ("--evaluation-types", "evaluation_type", filters.evaluation_types),
        ("--model-names", "judge", filters.judges),
        ("--task-ids", "task", filters.tasks),
    ):
        if wanted is not None:
            values = stage.rows.execute(
                f"SELECT {column}, count(*) FROM row WHERE {column} IS NOT NULL GROUP BY 1 ORDER BY 2 DESC, min(number)"  # noqa: S608
            ).fetchall()
            absent = sorted(wanted - {value for value, _ in values})
            why = f"not in the input: {', '.join(absent)}" if absent else "each occurs, but no row has all of them"
            shown = ", ".join(f"{value:.80} ({count:,})" for value, count in values[:20]) or "none"
            more = f", and {len(values) - 20:,} more" if len(values) > 20 else ""
            lines += [f"  {flag} {' '.join(sorted(wanted))}  ({why})", f"    in the input: {shown}{more}"]
    return "\n".join(lines)


def _check_enough_rows(settings: Settings, stage: Stage, problems: Sequence[ScaleProblem]) -> None:
    """Check that there are rows to train on, and that not too many are rejected.

    Raises:
        DataError: the message has the reasons, each with its first row.
    """
    counts = count_rows(stage)
    rejected, kept = sum(counts["rejected"].values()), sum(counts["rows"].values())
    first = first_rejected(stage)
    reasons = "".join(
        f"\n  {n:,} x {kind}; the first: {first[kind]:.300}" for kind, n in list(counts["rejected"].items())[:_SHOWN]
    ) + "".join(f"\n  {message}" for message in describe_problems(problems))
    limit_text = settings.max_rejected or _MOST_REJECTED
    limit = _limit(limit_text, rejected + kept + counts["duplicates"])
    if not kept:
        raise DataError(f"No row can be used. Fix these problems, or pass other rows with --input:{reasons}")
    # Rows that would leak were readable, so they do not count here.
    unread = rejected - sum(counts["rejected"].get(kind, 0) for kind in (BOTH_SIDES, NEAR_DUPLICATE))
    if unread > limit:
        allowed = f"--max-rejected {limit_text} allows {limit:,}"
        if settings.max_rejected is None:
            allowed = "more than half. If that is correct, allow it with --max-rejected 100%"
        raise DataError(f"{unread:,} rows are rejected, {allowed}.{reasons}")
    if not counts["rows"]["train"]:
        tasks = stage.rows.execute("SELECT DISTINCT coalesce(task, 'rows without a task') FROM kept LIMIT 5")
        raise DataError(
            f"All usable rows belong to held-out tasks ({', '.join(f'{task:.80}' for (task,) in tasks)}), so no row is "
            "left to train on. Choose other tasks, or use --eval-ratio 0 with another --output-dir."
        )


def _limit(text: str, rows: int) -> int:
    return int(float(text.removesuffix("%")) / 100 * rows) if text.endswith("%") else int(text)


# --- the end ------------------------------------------------------------------------------------------------------


def _held_out(settings: Settings, stage: Stage, new: Path) -> dict[str, Any]:
    full = new / f"{held_out_name(settings.name if settings.filters else FULL)}.jsonl"
    tasks, all_tasks, rows, all_rows = stage.count_held_out()
    # Without task ids, prompts are the unit of the split.
    ratio = tasks / all_tasks if all_tasks else rows / max(all_rows, 1)
    return {
        "tasks": tasks,
        "rows": rows,
        "sha256": sha256_of(full) if full.exists() else None,
        "realised_ratio": round(ratio, 4),
    }


def _finish(settings: Settings, report: dict[str, Any], written: Written, new: Path) -> dict[str, Any]:
    """Audit and publish.

    Raises:
        DataError: the data would leak, or the files of an earlier conversion are damaged.
    """
    output, earlier = settings.output, _earlier_report(settings)
    info = _read_object(output / INFO)
    kept = {name: entry for name, entry in info.items() if name not in {*written.entries, *earlier.get("entries", [])}}
    near = report.pop("near_duplicates")
    audited = {**_check_leaks(output, new, written, kept), "near_duplicates": near}
    report_file = settings.file_name(REPORT)
    files = sorted([*names_in_folder(new), report_file])
    report |= {
        "leak_audit": audited,
        "variants": both_sides(written.rows),
        "settings": settings.as_json(),
        "versions": _versions(),
        "entries": list(written.entries),
        "files": files,
    }
    write_json(new / report_file, report)
    write_json(new / INFO, {**kept, **written.entries})
    written_before = {*earlier.get("files", []), INFO}  # others' entries in INFO are kept
    foreign = sorted(name for name in set(files) - written_before if (output / name).exists())
    _warn_of_files(foreign, "overwritten, although no earlier conversion created them")
    sync_files(new)
    publish(output, new.parent, new, [name for name in earlier.get("files", []) if name not in files])
    return report


def _earlier_report(settings: Settings) -> dict[str, Any]:
    """Read and check the report of the conversion that this one replaces; someone may have edited the file."""
    path = settings.output / settings.file_name(REPORT)
    report = _read_object(path)
    for key in ("entries", "files"):
        if not isinstance(names := report.get(key, []), list) or not all(isinstance(name, str) for name in names):
            raise DataError(f"{path}: damaged ({key}). Move it elsewhere, then convert again.")
    return report


def _read_object(path: Path) -> dict[str, Any]:
    value = read_json(path) if path.exists() else {}
    if not isinstance(value, dict):
        raise DataError(f"{path}: not a JSON object. Repair it, or move it elsewhere.")
    return value


def _check_leaks(output: Path, new: Path, written: Written, kept: Mapping[str, Any]) -> dict[str, Any]:
    """Audit the new files together with those of earlier conversions that stay in the folder."""
    write_json(new / INFO, written.entries)
    entries: list[Entry] = list(read_entries(new).values())
    if kept:
        earlier = read_entries(output)
        entries += [earlier[name] for name in kept if earlier[name].sidecar]
    result = audit(entries)
    if result["passed"] is False:
        raise DataError(
            f"the data would leak: {describe_leaks(result)}\nIf one of these datasets comes from an earlier "
            "conversion with another split, convert it again, or remove it from dataset_info.json."
        )
    return result


def _versions() -> dict[str, str | None]:
    packages = ("orjson", "json-repair", "llamafactory", "transformers")
    installed = {package: installed_version(package) for package in packages}
    return {"prmkit": __version__, "python": python_version(), **installed}
