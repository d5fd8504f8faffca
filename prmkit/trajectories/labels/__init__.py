"""Public sets of runs with labels that people gave to steps. Each module reads its set's files as they are published.

A marked error says nothing about the steps after it (`run_fields.first_error`), so they stay unlabelled.
"""

SETS = ("agentprocessbench", "agentrx", "prmbench", "trajectory-judge", "who-and-when")
"""The names of the forms that carry labels; spelt with or without hyphens."""


def set_named(name: str) -> str | None:
    """The form of a set, however its name is spelt; None for a name that is not one."""
    plain = name.lower().replace("-", "").replace("_", "").replace("&", "and").replace(" ", "")
    return next((form for form in SETS if form.replace("-", "") == plain), None)
