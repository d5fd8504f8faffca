"""Write each staged row into all of its variants, in the order of the input."""

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from prmkit.dataset.lengths import LengthGuard, TooLong
from prmkit.dataset.prepare import rejected_entry, row_id
from prmkit.dataset.settings import CONSENSUS, PREFIX, Settings
from prmkit.dataset.stage import DUPLICATE, Stage
from prmkit.dataset_info import dataset_entry, training_row
from prmkit.files import write_all
from prmkit.paths import FULL, HELD_OUT_SUFFIX, SIDECAR_SUFFIX, TASKS
from prmkit.prompts.cleaning import escape, unescape
from prmkit.rows import EVALUATION_TYPES, SELECTED_BY, WEIGHT, without_selection
from prmkit.verdict import Unreadable, Verdict, asked_shape, read_answer, render_verdict

log = logging.getLogger(__name__)

REJECTED = "rejected.jsonl"
_HELD = 8 << 20
"""The maximum number of buffered bytes, for all files together."""


# --- names --------------------------------------------------------------------------------------------------------

# A judge with one of these names always gets a hash after its name, even without a clash, so that names do not change
# when data is added.
_RESERVED = {"full", "custom", "consensus", "eval"}
_LONGEST = 60
"""The maximum number of characters of a value in a dataset's name. File systems allow 255 bytes."""


def held_out_name(variant: str) -> str:
    """Return the name of a variant's held-out split."""
    return variant + HELD_OUT_SUFFIX


def name_values(types: Iterable[str], judges: Iterable[str], tasks: Iterable[str]) -> dict[tuple[str, str], str]:
    """Name the variants of all evaluation types, judges and tasks: safe as file names, unique, and stable.

    Values that would get the same name all get a hash after it; so do values that are too long, or that are empty after
    unsafe characters are removed. The known evaluation types keep their plain names.

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
    if kind == "type" and value in EVALUATION_TYPES:
        return value
    clashes = taken[safe] > 1 or safe in _RESERVED or safe in EVALUATION_TYPES or safe.endswith(HELD_OUT_SUFFIX)
    if safe and not clashes and len(safe) <= _LONGEST and len(value) <= 4 * _LONGEST:
        return safe
    digest = hashlib.blake2b(f"{kind}:{value}".encode(errors="surrogatepass"), digest_size=4).hexdigest()
    return f"{safe[:_LONGEST].strip('_') or kind}_{digest}"


# --- files --------------------------------------------------------------------------------------------------------


class Written(NamedTuple):
    """The datasets that were written."""

    rows: Mapping[str, int]
    """Dataset -> number of rows, in the order in which to list the datasets."""
    entries: Mapping[str, Mapping[str, Any]]
    """The entries of dataset_info.json, in the same order."""


def write_variants(settings: Settings, stage: Stage, guard: LengthGuard | None, output: Path) -> Written:
    """Write every kept row into its variants, with sidecars, and every rejected one into rejected.jsonl.

    Args:
        settings: the settings of the conversion.
        stage: the rows, after all decisions.
        guard: measures the labels of the consensus.
        output: an empty folder.
    """
    with_system = bool(stage.rows.execute("SELECT 1 FROM prompt WHERE system IS NOT NULL LIMIT 1").fetchone())
    names = {} if settings.filters else _names(settings, stage)
    folders = {name: f"{TASKS}/" if kind == "task" else "" for (kind, _), name in names.items()}
    consensus = f"{settings.name}_consensus" if settings.filters else CONSENSUS
    rows: Counter[str] = Counter()
    (output / settings.file_name(REJECTED)).touch()
    with _appending(output) as append:
        for staged in _kept_rows(stage):
            line = training_row(staged.prompt, staged.label, settings.form, _system(staged, with_system))
            for variant in _variants_of(staged, settings, names):
                name = held_out_name(variant) if staged.held_out else variant
                path = folders.get(variant, "") + name
                append(f"{path}.jsonl", line)
                append(f"{path}{SIDECAR_SUFFIX}", staged.sidecar + b"\n")
                rows[name] += 1
            if staged.consensus and (made := _consensus_row(staged, settings, guard, with_system)):
                name = held_out_name(consensus) if staged.held_out else consensus
                append(f"{name}.jsonl", made[0])
                append(f"{name}{SIDECAR_SUFFIX}", made[1])
                rows[name] += 1
        for entry in _rejected_entries(stage, settings):
            append(settings.file_name(REJECTED), entry)
    order = [FULL, settings.name, consensus, *names.values()]
    listed = [(name, variant) for variant in order for name in (variant, held_out_name(variant)) if name in rows]
    entries = {
        name: dataset_entry(f"{folders.get(variant, '')}{name}.jsonl", settings.form, with_system=with_system)
        for name, variant in listed
    }
    return Written({name: rows[name] for name, _ in listed}, entries)


def _names(settings: Settings, stage: Stage) -> dict[tuple[str, str], str]:
    def values(column: str) -> list[str]:
        rows = stage.rows.execute(f"SELECT DISTINCT {column} FROM kept WHERE {column} IS NOT NULL ORDER BY {column}")  # noqa: S608
        return [value for (value,) in rows]

    return name_values(values("evaluation_type"), values("judge"), values("task") if settings.task_variants else ())


class _StagedRow(NamedTuple):
    """A row that is kept."""

    evaluation_type: str | None
    judge: str | None
    task: str | None
    held_out: int
    system: str | None
    prompt: str
    label: str
    sidecar: bytes
    consensus: bytes | None
    """Key -> score in hundredths, as JSON, if the row represents its prompt in the consensus."""
    judges: int | None
    """The number of judges that the consensus combines."""
    lightest: bytes | None
    """The sidecar of the prompt's row with the lowest weight."""


def _kept_rows(stage: Stage) -> Iterator[_StagedRow]:
    rows = stage.rows.execute(
        "SELECT evaluation_type, judge, task, held_out, system, coalesce(body.trimmed, text), body.label, "
        "body.sidecar, consensus.scores, consensus.judges, lightest.sidecar "
        "FROM kept CROSS JOIN prompt ON prompt.id = kept.prompt "
        "CROSS JOIN body ON body.number = kept.number LEFT JOIN consensus ON consensus.number = kept.number "
        "LEFT JOIN body AS lightest ON lightest.number = consensus.lightest "
        "ORDER BY kept.number"
    )
    return map(_StagedRow._make, rows)


def _variants_of(row: _StagedRow, settings: Settings, names: Mapping[tuple[str, str], str]) -> Iterator[str]:
    if settings.filters:
        yield settings.name
        return
    yield FULL
    for kind, value in (("type", row.evaluation_type), ("judge", row.judge), ("task", row.task)):
        if value is not None and (kind, value) in names:
            yield names[kind, value]


def _system(row: _StagedRow, with_system: bool) -> str | None:
    return row.system or "" if with_system else None


@contextmanager
def _appending(folder: Path) -> Iterator[Any]:
    """Yield a buffered append function for thousands of files: each file is open only while its buffer is written."""
    held: dict[str, list[bytes]] = {}
    size = 0
    (folder / TASKS).mkdir()

    def append(name: str, line: bytes) -> None:
        nonlocal size
        held.setdefault(name, []).append(line)
        size += len(line)
        if size > _HELD:
            write()

    def write() -> None:
        nonlocal size
        for name, lines in held.items():
            with open(f"{folder}/{name}", "ab", buffering=0) as stream:  # noqa: PTH123 - thousands of names
                write_all(stream.write, b"".join(lines))
        held.clear()
        size = 0

    yield append
    write()
    if not any((folder / TASKS).iterdir()):
        (folder / TASKS).rmdir()


def _rejected_entries(stage: Stage, settings: Settings) -> Iterator[bytes]:
    """Yield the lines of rejected.jsonl in the order of the input."""
    numbers = stage.rows.execute(
        "SELECT number, entry, NULL FROM rejected UNION ALL SELECT number, NULL, reason FROM row "
        "WHERE wanted AND status IS NOT NULL AND status != ? ORDER BY number", (DUPLICATE,),
    )  # fmt: skip
    for number, entry, reason in numbers:
        if entry is None:
            source, line, system, prompt, label = stage.rows.execute(
                "SELECT source, line, system, text, label FROM row JOIN prompt ON prompt.id = prompt "
                "JOIN body ON body.number = row.number WHERE row.number = ?", (number,),
            ).fetchone()  # fmt: skip
            row = orjson.loads(training_row(prompt, label, settings.form, system))
            entry = rejected_entry(stage.sources[source], line, reason, row)
        yield entry


def _consensus_row(
    row: _StagedRow, settings: Settings, guard: LengthGuard | None, with_system: bool
) -> tuple[bytes, bytes] | None:
    """Return the consensus row, with the combined scores of all judges, as its line and its sidecar's line.

    Returns None for a row that must be dropped.
    """
    sidecar = orjson.loads(row.sidecar)
    asked = asked_shape(unescape(row.prompt), unescape(row.system) if row.system else None)
    answer = read_answer(unescape(row.label, answer=True), asked)
    if isinstance(answer, Unreadable):
        _warn_of_left_out(sidecar, answer.reason)
        return None
    scores = {key: score / 100 for key, score in orjson.loads(row.consensus or b"{}").items()}
    label, _ = escape(render_verdict(Verdict(scores, answer.nested, answer.texts)), answer=True)
    prompt = row.prompt
    if guard:
        (measured,) = guard.fit([(row.system, prompt, label)])
        if isinstance(measured, TooLong):  # the single judge's label may have been a few tokens shorter
            _warn_of_left_out(sidecar, measured.reason)
            return None
        prompt = measured.prompt
        sidecar["tokens"] = measured.tokens - measured.tokens_left_out
    judge = f"{settings.aggregate} of {row.judges} judges"
    sidecar |= {
        "id": row_id(sidecar["prompt_sha256"], judge, label),
        "scores": scores,
        "metadata": _selected_as(sidecar["metadata"], orjson.loads(row.lightest or b"{}")) | {"model_name": judge},
    }
    line = training_row(prompt, label, settings.form, _system(row, with_system))
    return line, orjson.dumps(sidecar, option=orjson.OPT_APPEND_NEWLINE)


def _selected_as(metadata: Mapping[str, Any], lightest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata with the selection of the lightest row; with none if a judge got the prompt anyway."""
    return without_selection(metadata) | {
        name: lightest["metadata"][name] for name in (SELECTED_BY, WEIGHT) if name in lightest["metadata"]
    }


def _warn_of_left_out(sidecar: Mapping[str, Any], reason: str) -> None:
    log.warning("%s:%d: not used in the consensus: %s", sidecar["source"], sidecar["line"], reason)


def both_sides(rows: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Return variant -> number of rows in each split."""
    variants: Sequence[str] = list(dict.fromkeys(name.removesuffix(HELD_OUT_SUFFIX) for name in rows))
    return {
        variant: {"train": rows.get(variant, 0), "held_out": rows.get(held_out_name(variant), 0)}
        for variant in variants
    }
