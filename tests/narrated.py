"""What the package logs during a test. pytest's own plugin visits 1,500 loggers three times a test, for 8 seconds."""

import logging


class Narrated(logging.Handler):
    """Collects what the loggers of prmkit say, from WARNING on unless `set_level` says otherwise."""

    def __init__(self) -> None:
        """Begin with nothing."""
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message."""
        self.messages.append(record.getMessage())

    @property
    def text(self) -> str:
        """All messages, one per line."""
        return "\n".join(self.messages)

    def set_level(self, level: int | str) -> None:
        """Collect from this level on."""
        self.setLevel(level)

    def clear(self) -> None:
        """Forget what was said."""
        self.messages.clear()
