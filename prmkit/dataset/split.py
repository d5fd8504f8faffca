"""Which tasks are held out: a pure function of the task, so the same in every variant and after new data arrives."""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from prmkit.errors import DataError


@dataclass(frozen=True)
class Split:
    """How tasks are held out.

    Args:
        ratio: the expected share of tasks that are held out, 0 to 1.
        seed: another seed holds other tasks out.
        tasks: the user's own list of held-out tasks; it replaces ratio and seed.
    """

    ratio: float = 0.1
    seed: int = 0
    tasks: frozenset[str] | None = None

    def holds_out(self, task: str | None, prompt_digest: str) -> bool:
        """Whether a row is held out. Rows without a task go by their prompt, so that a prompt stays on one side."""
        if self.tasks is not None:
            return task in self.tasks
        return is_held_out(prompt_digest if task is None else task, self.ratio, self.seed)


@lru_cache(maxsize=10_000)
def is_held_out(task: str, ratio: float, seed: int) -> bool:
    """Whether a task is held out; depends on nothing but the arguments."""
    digest = hashlib.blake2b(f"{seed}:{task}".encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) < ratio * 2**64


def read_tasks(path: Path) -> frozenset[str]:
    """The tasks of a file with one task a line; blank lines are passed over.

    Raises:
        DataError: the file cannot be read, or lists no task.
    """
    try:
        tasks = frozenset(filter(None, map(str.strip, path.read_text(encoding="utf-8-sig").splitlines())))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8.") from error
    if not tasks:
        raise DataError(f"{path}: lists no task. Write one task a line, or hold out none with --eval-ratio 0.")
    return tasks
