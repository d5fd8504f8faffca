"""Terminal I/O of the scripts: argument types, exit codes, error messages, tables and progress.

stdout carries the result, stderr the narration. No other module writes to either, so this one makes all output safe to
read: it escapes control characters in the data and fits lines to the terminal, and a closed stream or terminal does not
stop the program.
"""

import argparse
import atexit
import errno
import gc
import json
import logging
import math
import os
import re
import signal
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TextIO

from prmkit.errors import ExitCode, Interrupted, PrmkitError, UsageError, describe_os_error, is_environment_error

log = logging.getLogger("prmkit")


def run(command: Callable[[argparse.Namespace], ExitCode], parser: argparse.ArgumentParser) -> int:
    """Parse the command line, run `command`, and turn every expected error into one message and an exit code.

    Returns:
        The exit code, for `sys.exit`. Unexpected errors keep their traceback: they are bugs.
    """
    relax_collector()
    _prepare_streams()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores SIGHUP, and that must stay so
            signal.signal(number, _raise_terminated)
    try:
        _check_names_are_utf8()
        # Intermixed: `train.py lora_rank=8 --export seed=1` means the same as with all key=value pairs in one place.
        code = command(parser.parse_intermixed_args())
        with _naming_stdout():
            sys.stdout.flush()
        return code
    except BaseException as error:
        code_of_error = _report(error)
        if code_of_error is None:
            raise
        return code_of_error
    finally:
        _leave_dead_stdout()


def relax_collector() -> None:
    """Raise the garbage collector's thresholds, in a process that imports torch, transformers or LLaMA Factory.

    Their imports create half a million long-lived objects, which the collector would otherwise scan repeatedly: that is
    a sixth of the time of the imports, and a quarter of the time that the process takes to exit.
    """
    gc.set_threshold(100_000, 50, 50)
    atexit.register(gc.freeze)


# --- argument types ---------------------------------------------------------------------------------------------------


def positive(text: str) -> int:
    """Parse an integer above 0."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number above 0")
    return value


def share(text: str) -> float:
    """Parse a fraction in [0, 1]."""
    return _number(text, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def level(text: str) -> float:
    """Parse a fraction in (0, 1)."""
    return _number(text, lambda value: 0 < value < 1, "a number between 0 and 1")


def amount(text: str) -> float:
    """Parse a number of at least 0, for example a cost."""
    return _number(text, lambda value: 0 <= value < math.inf, "a number of at least 0")


def seconds(text: str) -> float:
    """Parse a duration above 0."""
    return _number(text, lambda value: 0 < value < math.inf, "a number above 0")


def number(text: str) -> float:
    """Parse a finite number. NaN is rejected, because no gate could ever fail against it."""
    return _number(text, math.isfinite, "a finite number")


def _number(text: str, is_allowed: Callable[[float], bool], expected: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not is_allowed(value):  # NaN is never allowed
        raise argparse.ArgumentTypeError(f"'{text}' is not {expected}")
    return value


# --- errors -----------------------------------------------------------------------------------------------------------


def _report(error: BaseException) -> ExitCode | None:
    """Log an expected error; return its exit code, or None for a bug."""
    match error:
        case PrmkitError():
            log.error("error: %s", error)
            return error.exit_code
        case Interrupted():
            log.error("%s", error)
            return error.exit_code
        case KeyboardInterrupt():
            log.error("Interrupted. Run the same command again.")
            return ExitCode.INTERRUPTED
        case BrokenPipeError():
            return ExitCode.DONE  # the reader (`| head`) has seen enough
        case OSError() if error.filename == _STDOUT and error.errno == errno.EIO:
            return ExitCode.TERMINATED  # the terminal was closed
        case OSError() if error.filename is not None or is_environment_error(error):
            log.error("error: %s", describe_os_error(error))
            return ExitCode.DATA
        case ImportError(name=str(name)) if name.partition(".")[0] != "prmkit":
            log.error("error: %s", _advice_for_missing_package(name, error))
            return ExitCode.DATA
        case _:
            return None


def _advice_for_missing_package(name: str, error: ImportError) -> str:
    what = "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be loaded ({error})"
    return (
        f"the Python package {name.partition('.')[0]} {what} for {sys.executable}. Install the tested set with "
        "./run_training.sh --install-deps and activate it: source .venv/bin/activate"
    )


def _check_names_are_utf8() -> None:
    # Linux allows any bytes in file names; JSON, where names are recorded, does not.
    for name in (*sys.argv[1:], os.getcwd()):  # noqa: PTH109 - a string is needed
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UsageError(f"{name}: not valid UTF-8. Rename it, then run the command again.") from None


def _raise_terminated(_signal: int, _frame: FrameType | None) -> None:
    raise Interrupted("Terminated. Run the same command again.", ExitCode.TERMINATED)


# --- streams ----------------------------------------------------------------------------------------------------------


_STDOUT = "stdout"


def _prepare_streams() -> None:
    # A closed descriptor (`>&-`) would be given to the next file that is opened, which then receives our output.
    with suppress(OSError):
        while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(descriptor)
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115 - open as long as the process
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8 shows \u4e2d
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[_Narration(sys.stderr)])
    for library in ("httpx", "httpcore"):  # one line for each request
        logging.getLogger(library).setLevel(logging.WARNING)


class _ClosableStream:
    """A text stream that silently drops output once its terminal is closed."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()


class _Narration(logging.StreamHandler[Any]):
    """A log handler that writes to stderr, wrapped at the terminal's width and above any progress bar."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(_ClosableStream(stream))

    def format(self, record: logging.LogRecord) -> str:
        return _fit(visible(super().format(record)), _width(self.stream))

    def emit(self, record: logging.LogRecord) -> None:
        if _shown_bars:
            _print_above_bar(self.format(record))
        else:
            super().emit(record)


@contextmanager
def _naming_stdout() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        error.filename = error.filename or _STDOUT
        raise


def _leave_dead_stdout() -> None:
    # Python flushes stdout as it exits, and reports an error if the reader or the terminal is gone.
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# --- text that a person sees ------------------------------------------------------------------------------------------

# C0 and C1 controls (except tab and newline), marks that change the reading direction, line separators, and the
# surrogates that represent bytes of file names that are not UTF-8.
_UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    r"""Escape control characters: ESC becomes the four characters `\x1b`."""
    return _UNSAFE.sub(_escaped, text.replace("\r\n", "\n").replace("\r", "\n"))


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:
        code -= 0xDC00  # the byte that os.fsdecode could not decode
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


# Lines with a command are never wrapped, so that they can be copied; the terminal may still break them on the screen.
_COMMAND = re.compile(r"(?:^|\s)(?:python3?|pip|hf|swanlab|llamafactory\S*|source|xdg-open|open|\./\w+\.sh) [^ ]")


def _fit(text: str, width: int | None) -> str:
    """Wrap lines longer than `width` at spaces, except lines with a command; None means no limit."""
    if width is None:
        return text
    return "\n".join(line if len(line) <= width else _wrapped(line, width) for line in text.split("\n"))


def _wrapped(line: str, width: int) -> str:
    if _COMMAND.search(line):
        return line
    # In "  name   value", wrapped lines stay aligned under the value.
    indent = len(re.match(r" *(?:\S+ {2,})?", line)[0])  # type: ignore[index]
    indent = indent if indent <= width // 2 else 0
    parts = textwrap.wrap(
        line,
        width,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
    )
    return "\n".join(parts)


def _width(stream: Any) -> int | None:
    """Return the width of the terminal in columns; None if the stream is not a terminal."""
    if not stream.isatty():
        return None
    with suppress(OSError, ValueError):
        return int(os.environ.get("COLUMNS", "")) or None
    with suppress(OSError, ValueError):
        return os.get_terminal_size(stream.fileno()).columns or 80
    return 80


# --- the result -------------------------------------------------------------------------------------------------------


def emit(text: str) -> None:
    """Write text of the result to stdout. Use `emit_json_line` for a line that a machine reads."""
    _write(_fit(visible(text), _width(sys.stdout)))


def confirm(question: str) -> bool:
    """Ask the person at the terminal; anything but y or yes means no."""
    sys.stderr.write(visible(question))
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def emit_json(value: Any) -> None:
    """Write a machine-readable result to stdout, as indented JSON."""
    emit_json_line(json.dumps(value, indent=2, ensure_ascii=False))


def emit_json_line(text: str) -> None:
    """Write JSON to stdout without wrapping; control characters and unencodable ones become JSON escapes."""
    text = _UNSAFE.sub(lambda match: json.dumps(match[0])[1:-1], text.replace("\x7f", "\\u007f"))
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = re.sub(r"[^\x00-\x7f]", lambda match: json.dumps(match[0])[1:-1], text)
    _write(text)


def _write(text: str) -> None:
    if _shown_bars and sys.stdout.isatty():
        _print_above_bar(text)
        return
    with _naming_stdout():
        sys.stdout.write(text + "\n")


def emit_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    numeric: Sequence[str] = (),
    optional: Sequence[str] = (),
) -> None:
    """Write a table and an empty line to stdout. On a narrow terminal, columns are dropped; no cell is cut or wrapped.

    Args:
        title: a line above the table; no line if empty.
        columns: the headers.
        rows: one sequence of strings per row, as long as `columns`.
        numeric: the columns to align to the right.
        optional: the columns that may be dropped on a narrow terminal, in the order in which to drop them.
    """
    table = [[visible(cell).replace("\n", "\\n") for cell in row] for row in (columns, *rows)]
    widths = [max(map(_cells, column)) for column in zip(*table, strict=True)]
    kept, width = list(range(len(columns))), _width(sys.stdout)
    droppable = [columns.index(name) for name in optional]  # computed always, so that a wrong name fails early
    left_out = []
    for index in droppable:
        if width is None or sum(widths[i] + 2 for i in kept) - 2 <= width:
            break
        kept.remove(index)
        left_out.append(columns[index])
    right = {columns.index(name) for name in numeric}
    lines = ["  ".join(_aligned(row[i], widths[i], right=i in right) for i in kept).rstrip() for row in table]
    rule = "  ".join(_rule() * widths[i] for i in kept)
    _write("\n".join([*([visible(title)] if title else []), lines[0], rule, *lines[1:], ""]))
    if left_out:
        log.info("Columns left out at this width: %s. Widen the terminal or write to a file.", ", ".join(left_out))


def _rule() -> str:
    try:
        "─".encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return "-"
    return "─"


def _cells(text: str) -> int:
    """Return how many terminal columns a string takes: a Chinese character takes two."""
    from rich.cells import cell_len

    return cell_len(text)


def _aligned(text: str, width: int, *, right: bool) -> str:
    padding = " " * (width - _cells(text))
    return padding + text if right else text + padding


# --- the narration ----------------------------------------------------------------------------------------------------


def narrate_mapping(title: str, values: Mapping[str, object]) -> None:
    """Write names and values to stderr, aligned."""
    width = max(map(len, values), default=0)
    lines = [f"  {name:<{width}}  {value}" for name, value in values.items()]
    log.info("\n".join([title, *lines]))


_shown_bars: list[Any] = []
"""The progress bar on the screen now; lines are printed above it."""


def _print_above_bar(text: str) -> None:
    _shown_bars[-1].console.print(text, soft_wrap=True, markup=False, highlight=False, emoji=False)


@contextmanager
def progress_bar(*, unit_is_bytes: bool = False) -> Iterator[Any]:
    """Show a `rich.progress.Progress` on stderr with rate and time left; nothing when stderr is not a terminal."""
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
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        *amount,
        TimeRemainingColumn(),
        console=Console(file=_ClosableStream(sys.stderr)),  # type: ignore[arg-type]
        disable=not sys.stderr.isatty(),
        # Otherwise Rich would send everything written to stdout in the meantime to stderr.
        redirect_stdout=False,
        redirect_stderr=False,
    )
    with bar:
        if not bar.disable:
            _shown_bars.append(bar)
        try:
            yield bar
        finally:
            _shown_bars.clear()
