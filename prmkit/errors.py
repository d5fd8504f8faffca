"""The exit codes, and the one family of errors that a user can cause.

Every error says what is wrong, where, and what to do next. `prmkit.cli.run` is the only place that catches them.
"""

from enum import IntEnum


class ExitCode(IntEnum):
    """What the process tells its caller. 130 and 143 follow the shell: 128 plus the signal's number."""

    DONE = 0
    DATA = 1
    """The data or the world is wrong: a missing file, an unreadable row, a full disk."""
    USAGE = 2
    """The command line or the configuration is wrong."""
    LLAMAFACTORY = 3
    """LLaMA Factory failed, or did not leave what it should have left."""
    GATE = 4
    """Everything ran, and a threshold that the user set was not met."""
    INTERRUPTED = 130
    TERMINATED = 143


class PrmkitError(Exception):
    """Something that a user can cause and can mend. Its text is shown without a traceback."""

    exit_code = ExitCode.DATA


class DataError(PrmkitError):
    """The data or the world is wrong."""


class UsageError(PrmkitError):
    """The command line or the configuration is wrong."""

    exit_code = ExitCode.USAGE


class LlamaFactoryError(PrmkitError):
    """LLaMA Factory failed, or did not leave what it should have left."""

    exit_code = ExitCode.LLAMAFACTORY


class GateError(PrmkitError):
    """A threshold that the user set was not met."""

    exit_code = ExitCode.GATE


class Interrupted(BaseException):
    """A signal stopped the work; what was done so far is kept.

    No `Exception`, as KeyboardInterrupt is none: it is raised wherever the signal arrives, and a library at work there
    (logging, for one) would take it for an error of its own and go on.

    Args:
        message: what was kept, and the command that goes on.
        exit_code: `INTERRUPTED` for SIGINT, `TERMINATED` for SIGTERM.
    """

    def __init__(self, message: str, exit_code: ExitCode = ExitCode.INTERRUPTED) -> None:
        super().__init__(message)
        self.exit_code = exit_code
