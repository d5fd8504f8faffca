"""The forms of runs that can be read, one module each; those of traces share `traces`.

A new form is a module here, and its name in `_SPECIFIC`. If its files have a suffix of their own, add that to
`SUFFIXES` in `prmkit/layouts.py`; how packed files are opened (`.gz`) is in `prmkit/files.py`.
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
"""Many specific forms also contain plain messages, so these are tried only if no specific form fits."""
READERS: dict[str, Reader] = {module.READER.name: module.READER for module in (*_SPECIFIC, *_PLAIN)}

_SAMPLE = 20
"""How many values of a file must be recognised before its form is settled."""
_PATIENCE = 1000
"""A file is given up after this many values if none was recognised."""


def reader_for(values: Iterable[tuple[int, Any]], name: str) -> Reader | None:
    """The reader for a file's form, recognised by the structure of its first values; None if no form fits.

    Raises:
        UsageError: several forms fit.
    """
    fitting: dict[str, int] = {}
    for count, (line, value) in enumerate(values, start=1):
        found = [] if isinstance(value, Rejected) else forms_of(value)
        fitting |= {form: line for form in found if form not in fitting}
        if specific := {form: line for form, line in fitting.items() if not _is_plain(form)}:
            fitting = specific  # events of a session may look like plain messages
        if len(fitting) > 1:
            places = " and ".join(f"{form} (line {line})" for form, line in fitting.items())
            raise UsageError(f"{name}: could be {places}. Name the form with --format.")
        if (fitting and count >= _SAMPLE) or count >= _PATIENCE:
            break
    return READERS[next(iter(fitting))] if fitting else None


def _is_plain(form: str) -> bool:
    return any(module.READER.name == form for module in _PLAIN)


def forms_of(value: Any) -> list[str]:
    """The names of the forms that fit a value."""
    specific = [module.READER.name for module in _SPECIFIC if module.READER.recognises(value)]
    return specific or [module.READER.name for module in _PLAIN if module.READER.recognises(value)][:1]
