"""Read runs from files and folders in any known format, and report what was read, dropped and skipped."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prmkit.errors import DataError, UsageError
from prmkit.layouts import ANY_LENGTH, Rejected, open_lines, read_values, value_or_rejected
from prmkit.rows import is_judged_row
from prmkit.trajectories.content import mapping
from prmkit.trajectories.readers import READERS, is_other_run, messages, reader_for, record
from prmkit.trajectories.run import FieldNames, Ids, NumberedValues, Reader, Run, Turn, UnreadableValue, assemble
from prmkit.trajectories.run_fields import first_error, read_named
from prmkit.trajectories.secrets import mask, may_hold_secrets
from prmkit.trajectory import Trajectory, dump, task_id_of, with_labels

log = logging.getLogger(__name__)

_EXAMPLES = 3
"""The maximum number of line numbers to list per reason for not reading lines; the others are only counted."""


@dataclass(frozen=True)
class Options:
    """The options for reading runs."""

    format: str | None = None
    """The name of a reader; None to detect the format from the structure of the file."""
    keys: FieldNames = field(default_factory=FieldNames)
    keep_secrets: bool = False
    labels: str | None = None
    """The name of a public set with its labels in files next to the runs; None to read only runs."""
    unnamed: str | None = None
    """The name for runs without an id, to which a number is added; None to use the id of their task."""


@dataclass
class FileReport:
    """The report on one file."""

    file: str
    format: str | None = None
    runs: int = 0
    steps: int = 0
    labels: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    unreadable: Counter[str] = field(default_factory=Counter)
    """Reason -> number of lines or runs that were not read."""
    examples: dict[str, list[int]] = field(default_factory=dict)
    """Reason in `unreadable` -> numbers of lines, or of items."""
    unit: str = "line"
    """What the numbers count: `line`, or `item` in arrays and similar."""
    secrets: Counter[str] = field(default_factory=Counter)
    passed_over: str | None = None
    """The reason why the file was skipped."""

    def reject(self, reason: str, line: int) -> None:
        """Count a line or run that was not read."""
        self.unreadable[reason] += 1
        lines = self.examples.setdefault(reason, [])
        if len(lines) < _EXAMPLES:
            lines.append(line)


def warn_of_losses(reports: Sequence[FileReport]) -> None:
    """Log every skipped file, and the lines that were not read."""
    for report in reports:
        if report.passed_over:
            log.warning("skipped %s: %s", report.file, report.passed_over)
        for reason in report.unreadable:
            log.warning("%s", _not_read(report, reason))


def _not_read(report: FileReport, reason: str) -> str:
    lines = ", ".join(map(str, report.examples[reason]))
    return f"{report.file}: not read: {report.unreadable[reason]} x {reason} ({report.unit} {lines})"


def totals(reports: Sequence[FileReport]) -> Iterator[str]:
    """Yield a line about dropped and irregular content, and a line about masked secrets, for all files together."""
    for title, name in (("dropped or irregular", "lost"), ("masked", "secrets")):
        counts = sum((getattr(report, name) for report in reports), Counter[str]())
        if counts:
            yield f"{title}: " + ", ".join(f"{count:,} {kind}" for kind, count in counts.most_common())


def read_runs(
    inputs: Sequence[str | Path], options: Options | None = None, reports: list[FileReport] | None = None
) -> Iterator[Trajectory]:
    """Yield the runs of files and folders, one at a time, with ids that are unique among them.

    Args:
        inputs: files and folders. Files in a folder that are not runs are skipped; a file that the user passes must be
            readable.
        options: the options for reading.
        reports: receives one report per file, complete once its last run was yielded. Without it, an unreadable run is
            an error, because nothing would report it.

    Raises:
        DataError: an input is missing, or a file that the user passed cannot be read.
        UsageError: the format of a file is ambiguous, or --format is not a known format.
    """
    options = options or Options()
    if options.format is not None and options.format not in READERS:
        raise UsageError(f"--format {options.format}: unknown format. Known: {', '.join(READERS)}.")
    files = list(_files(inputs))
    error_labels = _error_labels(files, options)
    ids = Ids(options.unnamed)
    for given in files:
        report = FileReport(str(given.path), passed_over=given.reason)
        if reports is not None:
            reports.append(report)
        if given.reason:
            continue
        try:
            for run in _runs_of(given.path, options, report):
                run = _with_error_labels(run, error_labels) if error_labels else run
                run = ids.named(run)
                report.labels += sum(step.label is not None for step in run.steps)
                report.lost.update(run.lost)
                yield run
            if reports is None and report.unreadable:
                reason = next(iter(report.unreadable))
                raise DataError(f"{_not_read(report, reason)}. Repair or remove these runs.")
        except DataError as error:
            if given.is_named:
                raise
            report.passed_over = str(error).removeprefix(f"{given.path}: ")


@dataclass(frozen=True)
class _Input:
    path: Path
    is_named: bool
    """Whether the user passed the file itself; otherwise it is in a folder."""
    reason: str | None = None
    """The reason why the file is skipped without being opened."""


def _files(inputs: Sequence[str | Path]) -> Iterator[_Input]:
    """Yield every file; files in a folder are sorted by name."""
    seen: set[Path] = set()
    for given in inputs:
        path = Path(given)
        if not path.exists():
            raise DataError(f"{path}: no such file or folder.")
        if not (path.is_dir() or path.is_file()):
            raise DataError(f"{path}: a pipe or device, but runs are read twice to detect their format. Use a file.")
        found = list(_contents(path)) if path.is_dir() else [_Input(path, is_named=True)]
        if not found:
            raise DataError(f"{path}: an empty folder. Pass the folder with your runs.")
        for each in found:
            if each.reason or each.path.resolve() not in seen:
                seen.add(each.path.resolve())
                yield each


def _contents(folder: Path) -> Iterator[_Input]:
    """Yield the files in a folder; only report hidden files and folders, and links that lead outside the folder."""
    hidden: set[Path] = set()
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        depth = next((depth for depth, part in enumerate(parts, start=1) if part.startswith(".")), None)
        if depth is not None:
            top = folder.joinpath(*parts[:depth])
            if top not in hidden:
                yield _Input(top, is_named=False, reason="hidden. Pass it explicitly to read it.")
            hidden.add(top)
        elif path.is_symlink() and (path.is_dir() or not path.resolve().is_relative_to(folder.resolve())):
            yield _Input(path, is_named=False, reason="a symlink. Pass its target to read it.")
        elif not path.is_dir():
            yield _Input(path, is_named=False, reason=None if path.is_file() else "not a file.")


def _runs_of(path: Path, options: Options, report: FileReport) -> Iterator[Trajectory]:
    reader = READERS[options.format] if options.format else reader_for(read_values(path), str(path))
    if reader is None and options.keys.messages and options.keys.messages in _first_object(read_values(path)):
        reader = READERS[messages.READER.name]
    if reader is None:
        raise DataError(f"{path}: {_why_not(path, report)}")
    _check_keys(reader, options.keys, path)
    report.format = reader.name
    for line, found in _read(reader, path, options.keys, report):
        run = found if isinstance(found, Trajectory) else _assembled(found, reader, path, line)
        if run is None:
            report.reject("run without a step of the agent", line)
            continue
        try:
            if may_hold_secrets(dump(run)) and not options.keep_secrets:
                run = _masked(run, report)
        except RecursionError:
            report.reject("arguments that are nested too deeply to be written", line)
            continue
        report.runs += 1
        report.steps += len(run.steps)
        yield run
    if not (report.runs or report.unreadable or reader.marks):
        raise DataError(f"{path}: contains no run, although it has the format {reader.name}.")


def _masked(run: Trajectory, report: FileReport) -> Trajectory:
    masked: Trajectory = mask(run, report.secrets)
    if masked.task_id != run.task_id:  # otherwise several tasks would get the same id
        masked = replace(masked, task_id=task_id_of(run.task_id))
    return masked


def _check_keys(reader: Reader, keys: FieldNames, path: Path) -> None:
    """Refuse field names that a format cannot use: ignoring one would give runs wrong ids, outcomes or labels."""
    given = {"--list-key": keys.messages, "--task-key": keys.task, "--outcome-key": keys.outcome,
             "--label-key": keys.labels}  # fmt: skip
    if reader.one is None or reader.name == record.READER.name:
        unused = [flag for flag, name in given.items() if name]
    else:
        unused = ["--list-key"] if keys.messages and reader.name != messages.READER.name else []
    if unused:
        raise DataError(
            f"{path}: {' and '.join(unused)} cannot be used with runs of the format {reader.name}. Import such files "
            "separately, or choose another format with --format."
        )


def _with_keys(
    found: Iterator[Run | Trajectory], value: Any, reader: Reader, keys: FieldNames
) -> Iterator[Run | Trajectory]:
    """Yield the runs in a value, with the fields whose names the user passed."""
    if reader.own_keys or not (keys.task or keys.outcome or keys.labels):
        yield from found
        return
    runs = list(found)
    if len(runs) > 1:
        raise UnreadableValue("several runs in one value, so --task-key and similar flags cannot be used; remove them")
    for run in runs:
        if isinstance(run, Run):
            read_named(run, mapping(value), keys)
        yield run


def _assembled(found: Run, reader: Reader, path: Path, line: int) -> Trajectory | None:
    return assemble(found, {"format": reader.name, "file": path.name, "line": found.line or line})


def _read(reader: Reader, path: Path, keys: FieldNames, report: FileReport) -> Iterator[tuple[int, Run | Trajectory]]:
    read = reader.one
    if read is None:
        yield from _read_together(reader, path, keys, report)
        return
    for line, value in _values(path, report):
        if isinstance(value, Rejected):
            report.reject(value.reason, line)
        elif not reader.recognises(value) and not (keys.messages and isinstance(value, dict)):
            report.reject(f"does not match the format {reader.name}", line)
        else:
            try:
                yield from ((line, run) for run in _with_keys(read(value, keys), value, reader, keys))
            except UsageError as error:
                raise UsageError(f"{path}, {report.unit} {line}: {error}") from None
            except (UnreadableValue, DataError) as error:
                report.reject(str(error).removeprefix(": "), line)
            except _MALFORMED as error:
                report.reject(f"malformed ({type(error).__name__}: {error!s:.60})", line)


def _values(path: Path, report: FileReport) -> Iterator[tuple[int, Any]]:
    """`read_values`, and what the numbers count."""
    with open_lines(str(path), ANY_LENGTH) as lines:
        for line in lines:
            report.unit = line.unit
            yield line.number, value_or_rejected(line)


_MALFORMED = (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError, OverflowError)
"""Errors that readers raise: a format is detected by its structure, but its content may be malformed."""


def _read_together(
    reader: Reader, path: Path, keys: FieldNames, report: FileReport
) -> Iterator[tuple[int, Run | Trajectory]]:
    try:
        for run in reader.every(_ValidValues(path, report, reader), keys) if reader.every else ():
            yield run.line or 1 if isinstance(run, Run) else 1, run
    except UnreadableValue as error:
        raise DataError(f"{path}: {error}.") from None
    except _MALFORMED as error:
        raise DataError(f"{path}: malformed ({type(error).__name__}: {error!s:.60}).") from error


class _ValidValues:
    """The values of a file, for a reader that needs all of them; the first pass counts those that it cannot read."""

    def __init__(self, path: Path, report: FileReport, reader: Reader) -> None:
        self._path, self._report, self._reader, self._counted = path, report, reader, False

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        for line, value in _values(self._path, self._report):
            if not isinstance(value, Rejected):
                if not self._counted and not self._reader.recognises(value) and is_other_run(value, self._reader):
                    self._report.reject(f"does not match the format {self._reader.name}", line)
                yield line, value
            elif not self._counted:
                self._report.reject(value.reason, line)
        self._counted = True


def _why_not(path: Path, report: FileReport) -> str:
    """Describe a file without runs."""
    rest = iter(_values(path, report))
    number, first = next(rest, (0, None))
    if not number:
        return "contains no JSON."
    if isinstance(first, Rejected):
        reason = first.reason
        first = next((value for _, value in rest if not isinstance(value, Rejected)), first)
    if isinstance(first, Rejected):
        return f"contains no JSON; {report.unit} {number}: {reason}."
    if is_judged_row(first):
        return "has prompts about steps, not runs. Use convert_dataset.py or, without answers, score_trajectories.py."
    fields = ", ".join(map(str, list(_first_object(read_values(path)))[:6]))
    has = f" Its first object has {fields:.100}." if fields else ""
    return (
        f"unknown format of runs.{has} --list-key NAME reads the list of messages under NAME, if each message has a "
        "role (or from) and content; --help lists all formats."
    )


def _first_object(values: NumberedValues) -> Mapping[str, Any]:
    """Return the first value of a file if it is an object, otherwise an empty one."""
    return mapping(next((value for _, value in values if not isinstance(value, Rejected)), None))


# --- labels in files next to the runs --------------------------------------------------------------------------------


def _error_labels(files: Sequence[_Input], options: Options) -> dict[str, dict[int, str | None]]:
    """Read the labelled errors in the files of a set, by run. Only these are kept in memory, not the runs."""
    reader = READERS.get(options.labels or "")
    errors: dict[str, dict[int, str | None]] = {}
    if reader is None or reader.marks is None:
        return errors
    for path in (given.path for given in files if not given.reason):
        try:
            for _, value in read_values(path):
                if mark := reader.marks(value):
                    errors[mark[0]] = mark[1]
        except DataError:
            continue  # the file is reported when its runs are read
    if not errors:
        raise DataError(
            f"no input file has the labels of {options.labels}. Pass the folder with the runs and their labels."
        )
    return errors


def _with_error_labels(run: Trajectory, errors: dict[str, dict[int, str | None]]) -> Trajectory:
    """Label the known errors of a run. In the label files, run ids may have the name of a subset as a prefix."""
    ids = (run.trajectory_id, run.task_id)
    name = next((name for name in (*ids, *(each.rsplit("_", 1)[-1] for each in ids)) if name in errors), None)
    if name is None:
        return run
    turns = [Turn("agent", index=step.source_index) for step in run.steps]
    return with_labels(run, first_error(turns, errors[name], "failure"))
