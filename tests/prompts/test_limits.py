"""Foreign code is stopped when it takes too long or too much memory, and the process is as it was afterwards."""

import resource
import signal

import pytest

from prmkit.errors import DataError
from prmkit.prompts.encoding import limited

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a * b %}{% endfor %}{% endfor %}"


def render(template: str) -> str:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return ImmutableSandboxedEnvironment().from_string(template).render()


@pytest.mark.parametrize(
    ("template", "reported"),
    [(ENDLESS, "still running after 0.3 seconds"), ("{{ 'x' * 10**10 }}", "more than 0.25 GiB of memory")],
)
def test_a_template_without_an_end_is_stopped(template: str, reported: str) -> None:
    before = signal.getsignal(signal.SIGALRM), resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(DataError, match=reported), limited("chat_template.jinja", seconds=0.3, memory=1 << 28):
        render(template)
    assert (signal.getsignal(signal.SIGALRM), resource.getrlimit(resource.RLIMIT_AS)) == before
    assert len("x" * (1 << 29)) == 1 << 29, "memory is limited inside the block alone"


def test_what_ends_in_time_is_left_alone() -> None:
    with limited("chat_template.jinja", seconds=5):
        assert render("{{ 1 + 1 }}") == "2"
