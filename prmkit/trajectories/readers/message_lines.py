"""One message per line, or one array of messages: the file is the run."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from prmkit.trajectories.content import role_name, turns_of, unwrapped
from prmkit.trajectories.run import FieldNames, NumberedValues, Reader, Run

_CONTENT = {"content", "value", "tool_calls", "parts"}


def recognises(value: Any) -> bool:
    """Return whether a value is a single message."""
    return isinstance(value, dict) and bool(role_name(value)) and bool(_CONTENT & unwrapped(value).keys())


def read(values: NumberedValues, _keys: FieldNames) -> Iterator[Run]:
    """Yield the only run of a file."""
    lost: Counter[str] = Counter()
    yield Run(turns_of([value for _, value in values], lost), lost)


READER = Reader("message-lines", recognises, every=read)
