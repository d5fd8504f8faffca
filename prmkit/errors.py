"""The exit codes, and the base class of the errors that a user can cause.

Every error says what is wrong, where, and what to do next. `prmkit.cli.run` is the only place that catches them.
"""

import errno
from enum import IntEnum


class ExitCode(IntEnum):
    """The exit code of a script. 130 and 143 follow the shell: 128 plus the signal's number."""

    DONE = 0
    DATA = 1
    """The data or the environment is wrong: a missing file, an unreadable row, a full disk."""
    USAGE = 2
    """The command line or the configuration is wrong."""
    LLAMAFACTORY = 3
    """LLaMA Factory failed, or did not write what it should have written."""
    GATE = 4
    """Everything ran, but a threshold was not met, or there is too little data to decide."""
    INTERRUPTED = 130
    TERMINATED = 143


class PrmkitError(Exception):
    """An error that a user can cause and fix. Its message is shown without a traceback."""

    exit_code = ExitCode.DATA


class DataError(PrmkitError):
    """The data or the environment is wrong."""


class UsageError(PrmkitError):
    """The command line or the configuration is wrong."""

    exit_code = ExitCode.USAGE


class LlamaFactoryError(PrmkitError):
    """LLaMA Factory failed, or did not write what it should have written."""

    exit_code = ExitCode.LLAMAFACTORY


class GateError(PrmkitError):
    """A threshold was not met, or there is too little data to decide."""

    exit_code = ExitCode.GATE


class Interrupted(BaseException):
    """A signal stopped the work; everything done so far is kept.

    Not an `Exception`, for the same reason as KeyboardInterrupt: it is raised wherever the signal arrives, where a
    library (logging, for one) would otherwise catch it as one of its own errors and continue.

    Args:
        message: what was kept, and the command that continues.
        exit_code: `INTERRUPTED` for SIGINT, `TERMINATED` for SIGTERM and SIGHUP.
    """

    def __init__(self, message: str, exit_code: ExitCode = ExitCode.INTERRUPTED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


# --- errors of the operating system -----------------------------------------------------------------------------------

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""errno values for "no space": the disk, the quota, or the maximum size of a file."""
_NOT_ALLOWED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_WRONG_PATH = frozenset({errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP})
_OTHERS = frozenset({errno.EIO, errno.ESTALE, errno.ENOLCK, errno.EMFILE, errno.ENFILE, errno.ENOMEM})


def is_environment_error(error: OSError) -> bool:
    """Whether the environment caused the error (a full disk, a missing permission) rather than a bug."""
    return error.errno in DISK_FULL | _NOT_ALLOWED | _WRONG_PATH | _OTHERS


def describe_os_error(error: OSError) -> str:
    """Return one line: the file, what is wrong with it, and, where something helps, what to do."""
    where = "" if error.filename is None else f"{error.filename}: "
    advice = ""
    if error.errno in DISK_FULL:
        advice = " Free some space or choose another folder, then run the same command again."
    elif error.errno in _NOT_ALLOWED | _WRONG_PATH:
        advice = " Choose another path, then run the same command again."
    return f"{where}{error.strerror or error}.{advice}"
