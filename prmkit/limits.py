"""A limit of time and memory for other people's code that runs inside ours: chat templates, above all.

A chat template is a program: `{% for %}` loops of any length, `'x' * 10**10`. The sandbox in which transformers renders
it keeps it away from files, but lets it run for days.
"""

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from prmkit.errors import DataError


@contextmanager
def limited(what: str, *, seconds: float = 10.0, memory: int = 1 << 30) -> Iterator[None]:
    """Limit how long a block runs, and how much memory it takes on top of what the process has now.

    Works only in the main thread, because it uses SIGALRM, and cannot be nested.

    Args:
        what: the subject of the error message, such as `chat_template.jinja`.
        seconds: of wall-clock time.
        memory: bytes of address space.

    Raises:
        DataError: a limit was reached.
    """

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = _address_space() + memory
    limit = min([limit, *(each for each in (soft, hard) if each != resource.RLIM_INFINITY)])
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except TimeoutError as error:
        raise DataError(f"{what}: still running after {seconds:g} seconds. Replace it.") from error
    except MemoryError as error:
        raise DataError(f"{what}: needs more than {memory / (1 << 30):g} GiB of memory. Replace it.") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()
