"""Public sets of runs with human labels of steps. Each module reads its set's files as they are published.

A labelled error says nothing about the steps after it (`run_fields.first_error`), so they stay unlabelled.
"""

SETS = ("agentprocessbench", "agentrx", "prmbench", "trajectory-judge", "who-and-when")
"""The names of the formats with labels; hyphens are optional on the command line."""


def set_named(name: str) -> str | None:
    """Find a set by its name, in any spelling; None for an unknown name."""
    plain = name.lower().replace("-", "").replace("_", "").replace("&", "and").replace(" ", "")
    return next((known for known in SETS if known.replace("-", "") == plain), None)
