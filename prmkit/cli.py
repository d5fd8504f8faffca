"""The border between the scripts and the library: arguments in, exit code out, and everything a person sees.

stdout carries the result, stderr the narration. Nothing else in prmkit writes to either.
"""

import argparse
import errno
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from prmkit.errors import ExitCode, Interrupted, PrmkitError
from prmkit.files import DISK_FULL

log = logging.getLogger("prmkit")


def run(command: Callable[[argparse.Namespace], ExitCode], parser: argparse.ArgumentParser) -> int:
    """Parse the command line, run `command`, and turn every expected error into one message and an exit code.

    Returns:
        The exit code, for `sys.exit`. Unexpected errors keep their traceback: they are ours to mend.
    """
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    for library in ("httpx", "httpcore"):  # a line a request
        logging.getLogger(library).setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        # Intermixed: `train.py lora_rank=8 --export seed=1` is as good as all key=value texts in one place.
        code = command(parser.parse_intermixed_args())
        _flush()
        return code
    except (PrmkitError, Interrupted) as error:
        log.error("error: %s", error)
        return error.exit_code
    except KeyboardInterrupt:
        log.error("interrupted")
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        _leave_stdout()  # the reader (`| head`) has gone
        return ExitCode.DONE
    except OSError as error:
        if error.filename is None and error.errno not in _WORLDS_FAULT:
            raise
        if error.filename == _STDOUT:
            _leave_stdout()
        where = "" if error.filename is None else f"{error.filename}: "
        log.error("error: %s%s.", where, error.strerror)
        return ExitCode.DATA


_STDOUT = "stdout"
_WORLDS_FAULT = (*DISK_FULL, errno.EROFS, errno.EACCES, errno.EPERM)
"""Errors that are the disk's or the system's also where they do not name a file."""


def _leave_stdout() -> None:
    # Point stdout at nothing, or Python complains once more as it exits.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _flush() -> None:
    with _naming_stdout():
        sys.stdout.flush()


@contextmanager
def _naming_stdout() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        error.filename = error.filename or _STDOUT
        raise


def _raise_terminated(_signal: int, _frame: FrameType | None) -> None:
    raise Interrupted("terminated", ExitCode.TERMINATED)


def emit(text: str) -> None:
    """Write one line of result to stdout."""
    with _naming_stdout():
        sys.stdout.write(text + "\n")


def emit_json(value: Any) -> None:
    """Write a result that a machine reads to stdout, as indented JSON."""
    emit(json.dumps(value, indent=2, ensure_ascii=False))


def emit_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, numeric: Sequence[str] = ()
) -> None:
    """Write a table to stdout. Nothing is cut off when stdout is a file or a pipe.

    Args:
        title: stands above the table; an empty string leaves it out.
        columns: the header of each column.
        rows: one sequence of texts a row, as long as `columns`.
        numeric: the columns that are set flush right.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title) if title else None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(Text(column), justify="right" if column in numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    # Where nobody looks at a terminal there is no width to keep to, and rich would assume 80.
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 10_000)
    if not sys.stdout.isatty():
        console.width = max(console.measure(table).maximum, 1)
    console.print(table)


def narrate_mapping(title: str, values: Mapping[str, object]) -> None:
    """Write names and values to stderr, aligned."""
    width = max(map(len, values), default=0)
    lines = [f"  {name:<{width}}  {value}" for name, value in values.items()]
    log.info("\n".join([title, *lines]))


def progress_bar(*, unit_is_bytes: bool = False) -> Any:
    """A `rich.progress.Progress` on stderr with rate and time left; silent when stderr is not a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    amount = [DownloadColumn(), TransferSpeedColumn()] if unit_is_bytes else [MofNCompleteColumn()]
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *amount,
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )
