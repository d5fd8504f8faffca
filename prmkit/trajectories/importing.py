"""Runs from files and folders of any known form, and a report on what was read, lost and skipped."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prmkit.errors import DataError, UsageError
from prmkit.files import open_input
from prmkit.row_lines import is_named
from prmkit.trajectories.content import mapping
from prmkit.trajectories.documents import SUFFIXES, Broken, Document, check_kind
from prmkit.trajectories.readers import READERS, messages, reader_for, record
from prmkit.trajectories.readers.messages import is_judged_row
from prmkit.trajectories.run import Ids, Keys, NumberedValues, Reader, Run, Turn, UnreadableValue, assemble
from prmkit.trajectories.run_fields import first_error, read_named
from prmkit.trajectories.secrets import mask, may_hold_secrets
from prmkit.trajectory import Trajectory, dump, with_labels

log = logging.getLogger(__name__)

_EXAMPLES = 3
"""How many places are named for each reason why something was not read; the rest are counted."""


@dataclass(frozen=True)
class Options:
    """How runs are read."""

    format: str | None = None
    """The name of a reader; None recognises the form by its structure."""
    keys: Keys = field(default_factory=Keys)
    keep_secrets: bool = False
    labels: str | None = None
    """The name of a public set whose labels are in files next to the runs; None to read only runs."""


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
    """Reason in `unreadable` -> line numbers."""
    secrets: Counter[str] = field(default_factory=Counter)
    passed_over: str | None = None
    """Why nothing was read from the file."""

    def reject(self, reason: str, line: int) -> None:
        """Count a line or run that was not read."""
        self.unreadable[reason] += 1
        places = self.examples.setdefault(reason, [])
        if len(places) < _EXAMPLES:
            places.append(line)


def warn_of_losses(reports: Sequence[FileReport]) -> None:
    """Name every skipped file, and the places where something was not read."""
    for report in reports:
        if report.passed_over:
            log.warning("skipped %s: %s", report.file, report.passed_over)
        for reason, count in report.unreadable.items():
            lines = ", ".join(map(str, report.examples[reason]))
            log.warning("%s: not read: %d x %s (line %s)", report.file, count, reason, lines)


def totals(reports: Sequence[FileReport]) -> Iterator[str]:
    """Yield a line on what has no place in the record, and one on what was masked, over all files."""
    for title, name in (("not placed", "lost"), ("masked", "secrets")):
        counts = sum((getattr(report, name) for report in reports), Counter[str]())
        if counts:
            yield f"{title}: " + ", ".join(f"{count:,} {kind}" for kind, count in counts.most_common())


def read_runs(
    inputs: Sequence[str | Path], options: Options | None = None, reports: list[FileReport] | None = None
) -> Iterator[Trajectory]:
    """Yield the runs of files and folders, one at a time, with ids that are unique among them.

    Args:
        inputs: files and folders. Files in a folder that are not runs are skipped; a file named by the user must be
            readable.
        options: how to read.
        reports: gets one report for each file, complete once its last run was yielded.

    Raises:
        DataError: an input is missing, or a named file cannot be read.
        UsageError: the form of a file is ambiguous, or --format is not a known form.
    """
    options = options or Options()
    if options.format is not None and options.format not in READERS:
        raise UsageError(f"--format {options.format}: not a form of runs. Known: {', '.join(READERS)}.")
    files = list(_files(inputs))
    marks = _marks(files, options)
    ids = Ids()
    for given in files:
        report = FileReport(str(given.path), passed_over=given.reason)
        if reports is not None:
            reports.append(report)
        if given.reason:
            continue
        try:
            for run in _runs_of(given.path, options, report):
                run = _marked(run, marks) if marks else run
                run = ids.named(run)
                report.labels += sum(step.label is not None for step in run.steps)
                report.lost.update(run.lost)
                yield run
        except DataError as error:
            if given.is_named:
                raise
            report.passed_over = str(error).removeprefix(f"{given.path}: ")


@dataclass(frozen=True)
class _Input:
    path: Path
    is_named: bool
    """Whether the user named it; otherwise it is in a folder."""
    reason: str | None = None
    """Why it is skipped without looking into it."""


def _files(inputs: Sequence[str | Path]) -> Iterator[_Input]:
    """Every file; those in folders in the order of their names."""
    seen: set[Path] = set()
    for given in inputs:
        path = Path(given)
        if not path.exists():
            raise DataError(f"{path}: no such file or folder.")
        found = list(_contents(path)) if path.is_dir() else [_Input(path, is_named=True)]
        if not found:
            raise DataError(f"{path}: an empty folder. Name the folder with your runs.")
        for each in found:
            if each.reason or each.path.resolve() not in seen:
                seen.add(each.path.resolve())
                yield each


def _contents(folder: Path) -> Iterator[_Input]:
    """The files in a folder. Hidden files and links out of it are reported, not read; a hidden folder counts once."""
    hidden: set[Path] = set()
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        depth = next((depth for depth, part in enumerate(parts, start=1) if part.startswith(".")), None)
        if depth is not None:
            top = folder.joinpath(*parts[:depth])
            if top not in hidden:
                yield _Input(top, is_named=False, reason="hidden. Name it to read it.")
            hidden.add(top)
        elif path.is_symlink() and (path.is_dir() or not path.resolve().is_relative_to(folder.resolve())):
            yield _Input(path, is_named=False, reason="a link. Name what it points to.")
        elif not path.is_dir():
            yield _Input(path, is_named=False, reason=None if path.is_file() else "not a file.")


def _runs_of(path: Path, options: Options, report: FileReport) -> Iterator[Trajectory]:
    if not is_named(path, SUFFIXES):
        _check_is_json(path)
    document = Document(path)
    reader = READERS[options.format] if options.format else reader_for(document, str(path))
    if reader is None and options.keys.messages and options.keys.messages in _first_object(document):
        reader = READERS[messages.READER.name]
    if reader is None:
        raise DataError(f"{path}: {_why_not(document)}")
    _check_keys(reader, options.keys, path)
    report.format = reader.name
    for line, found in _read(reader, document, options.keys, report):
        run = found if isinstance(found, Trajectory) else _assembled(found, reader, path, line)
        if run is None:
            report.reject("run without a step of the agent", line)
            continue
        try:
            if may_hold_secrets(dump(run)) and not options.keep_secrets:
                run = mask(run, report.secrets)
        except RecursionError:
            report.reject("arguments that are nested too deeply to be written", line)
            continue
        report.runs += 1
        report.steps += len(run.steps)
        yield run
    if not (report.runs or report.unreadable or reader.marks):
        raise DataError(f"{path}: no run in it, although it has the form {reader.name}.")


def _check_keys(reader: Reader, keys: Keys, path: Path) -> None:
    """Refuse field names that runs of a form cannot use: ignoring one would give runs other ids, outcomes or labels."""
    given = {"--list-key": keys.messages, "--task-key": keys.task, "--outcome-key": keys.outcome,
             "--label-key": keys.labels}  # fmt: skip
    if reader.one is None or reader.name == record.READER.name:
        unused = [flag for flag, name in given.items() if name]
    else:
        unused = ["--list-key"] if keys.messages and reader.name != messages.READER.name else []
    if unused:
        raise DataError(
            f"{path}: {' and '.join(unused)} cannot be used with runs of the form {reader.name}. Import such files "
            "separately without it, or name another form with --format."
        )


def _with_keys(found: Iterator[Run | Trajectory], value: Any, reader: Reader, keys: Keys) -> Iterator[Run | Trajectory]:
    """The runs of a value, with the fields whose names the user gave."""
    if reader.own_keys or not (keys.task or keys.outcome or keys.labels):
        yield from found
        return
    runs = list(found)
    if len(runs) > 1:
        raise UnreadableValue("several runs, so that field names such as --task-key name none of them; leave them out")
    for run in runs:
        if isinstance(run, Run):
            read_named(run, mapping(value), keys)
        yield run


def _check_is_json(path: Path) -> None:
    with open_input(path) as stream:
        head = stream.read(256)
    check_kind(head, str(path))
    if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] not in (b"{", b"["):
        raise DataError(f"{path}: not JSON.")


def _assembled(found: Run, reader: Reader, path: Path, line: int) -> Trajectory | None:
    return assemble(found, {"format": reader.name, "file": path.name, "line": found.line or line})


def _read(reader: Reader, document: Document, keys: Keys, report: FileReport) -> Iterator[tuple[int, Run | Trajectory]]:
    read = reader.one
    if read is None:
        yield from _read_whole(reader, document, keys, report)
        return
    for line, value in document:
        if isinstance(value, Broken):
            report.reject(value.reason, line)
        elif not reader.recognises(value) and not (keys.messages and isinstance(value, dict)):
            report.reject(f"not of the form {reader.name}", line)
        else:
            try:
                yield from ((line, run) for run in _with_keys(read(value, keys), value, reader, keys))
            except UsageError as error:
                raise UsageError(f"{document.path}, line {line}: {error}") from None
            except (UnreadableValue, DataError) as error:
                report.reject(str(error).removeprefix(": "), line)
            except _DAMAGE as error:
                report.reject(f"damaged inside ({type(error).__name__}: {error!s:.60})", line)


_DAMAGE = (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError)
"""Errors that readers raise: a form is recognised by its outline, but its content may be anything, at any depth."""


def _read_whole(
    reader: Reader, document: Document, keys: Keys, report: FileReport
) -> Iterator[tuple[int, Run | Trajectory]]:
    try:
        for run in reader.every(_Whole(document, report), keys) if reader.every else ():
            yield run.line or 1 if isinstance(run, Run) else 1, run
    except UnreadableValue as error:
        raise DataError(f"{document.path}: {error}.") from None
    except _DAMAGE as error:
        raise DataError(f"{document.path}: damaged inside ({type(error).__name__}: {error!s:.60}).") from error


class _Whole:
    """The values of a file for a reader that needs all of them; broken lines are counted the first time."""

    def __init__(self, document: Document, report: FileReport) -> None:
        self._document, self._report, self._counted = document, report, False

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        for line, value in self._document:
            if not isinstance(value, Broken):
                yield line, value
            elif not self._counted:
                self._report.reject(value.reason, line)
        self._counted = True


def _why_not(values: NumberedValues) -> str:
    """Describe a file without runs."""
    first = next((value for _, value in values if not isinstance(value, Broken)), None)
    if first is None:
        return "no JSON in it."
    if is_judged_row(first):
        return (
            "prompts of single steps, not runs: for convert_dataset.py, or without answers for score_trajectories.py."
        )
    fields = ", ".join(map(str, list(_first_object(values))[:6]))
    has = f" Its first object has {fields:.100}." if fields else ""
    return (
        f"not a known form of runs.{has} --list-key NAME reads the list of messages under NAME, if each of them has a "
        "role (or from) and content; --help lists all forms."
    )


def _first_object(values: NumberedValues) -> Mapping[str, Any]:
    """The first value of a file if it is an object, and else an empty one."""
    return mapping(next((value for _, value in values if not isinstance(value, Broken)), None))


# --- labels in files next to the runs --------------------------------------------------------------------------------


def _marks(files: Sequence[_Input], options: Options) -> dict[str, dict[int, str | None]]:
    """Run -> errors named in the files of a set. This is small: the runs themselves are not kept."""
    reader = READERS.get(options.labels or "")
    found: dict[str, dict[int, str | None]] = {}
    if reader is None or reader.marks is None:
        return found
    for path in (given.path for given in files if not given.reason):
        try:
            for _, value in Document(path):
                if mark := reader.marks(value):
                    found[mark[0]] = mark[1]
        except DataError:
            continue  # the file is named when it is read for runs
    if not found:
        raise DataError(f"no file with the labels of {options.labels} among the inputs. Name the folder that has both.")
    return found


def _marked(run: Trajectory, marks: dict[str, dict[int, str | None]]) -> Trajectory:
    """The run with its known errors. Ids may be prefixed with the name of a part of the set."""
    names = {name for given in (run.trajectory_id, run.task_id) for name in (given, given.rsplit("_", 1)[-1])}
    for name in names & marks.keys():
        turns = [Turn("agent", index=step.source_index) for step in run.steps]
        return with_labels(run, first_error(turns, marks[name], "failure"))
    return run
