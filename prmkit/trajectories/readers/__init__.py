"""The readers of all formats of runs, one module per format; the readers of traces share `traces`.

To add a format, write a module here and add its name to `_SPECIFIC`. If its files have a new suffix, add that to
`SUFFIXES` in `prmkit/layouts.py`; how compressed files are opened (`.gz`) is in `prmkit/files.py`.
"""

from collections.abc import Iterable
from typing import Any

from prmkit.errors import UsageError
from prmkit.layouts import Rejected
from prmkit.trajectories.labels import agent_process_bench, agentrx, prmbench, trajectory_judge, who_and_when
from prmkit.trajectories.readers import (
    atif,
    claude_code,
    codex,
    inspect_log,
    langfuse,
    langsmith,
    message_lines,
    messages,
    mini_swe_agent,
    otel,
    record,
    swe_agent,
    tagged,
    tau_bench,
)
from prmkit.trajectories.run import Reader

_SPECIFIC = (
    record, tau_bench, swe_agent, mini_swe_agent, inspect_log, atif, tagged, claude_code, codex, otel, langsmith,
    langfuse, who_and_when, agentrx, trajectory_judge, agent_process_bench, prmbench,
)  # fmt: skip
_PLAIN = (messages, message_lines)
"""Many specific formats also contain plain messages, so these are tried only if no specific format matches."""
READERS: dict[str, Reader] = {module.READER.name: module.READER for module in (*_SPECIFIC, *_PLAIN)}

_ENOUGH_VALUES = 20
"""The number of values after which a matching format is accepted."""
_MOST_VALUES = 1000
"""The number of values after which detection stops if no format matches."""


def reader_for(values: Iterable[tuple[int, Any]], name: str) -> Reader | None:
    """Detect the format of a file by the structure of its first values; None if no format matches.

    Raises:
        UsageError: several formats match.
    """
    matching: dict[str, int] = {}
    for count, (line, value) in enumerate(values, start=1):
        formats = [] if isinstance(value, Rejected) else formats_of(value)
        matching |= {format: line for format in formats if format not in matching}
        if specific := {format: line for format, line in matching.items() if not _is_plain(format)}:
            matching = specific  # events of a session may look like plain messages
        if len(matching) > 1:
            candidates = " and ".join(f"{format} (line {line})" for format, line in matching.items())
            raise UsageError(f"{name} matches {candidates}. Choose one with --format.")
        if (matching and count >= _ENOUGH_VALUES) or count >= _MOST_VALUES:
            break
    return READERS[next(iter(matching))] if matching else None


def is_other_run(value: Any, reader: Reader) -> bool:
    """Return whether a value is a run of another format; a single message may belong to any format."""
    return bool({*formats_of(value)} - {reader.name, message_lines.READER.name})


def _is_plain(format: str) -> bool:
    return any(module.READER.name == format for module in _PLAIN)


def formats_of(value: Any) -> list[str]:
    """Return the names of the formats that match a value."""
    specific = [module.READER.name for module in _SPECIFIC if module.READER.recognises(value)]
    return specific or [module.READER.name for module in _PLAIN if module.READER.recognises(value)][:1]
