"""Work on several cores: forked processes that report back, and that end when their parent ends."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, cast

from prmkit.errors import DataError, PrmkitError

Advance = Callable[[int], None]
"""Told how many bytes were done since it was last told."""
Job = Callable[[Advance], Any]


def in_parallel(jobs: Sequence[Job], advance: Advance, *, fork: bool) -> list[Any]:
    """Run every job in a process of its own; or one after the other in this one, where that takes less time.

    Jobs are forked: they see what is in memory, and only their results (small and picklable) come back. A job whose
    parent was killed ends as soon as it next reports progress: nobody is at the other end of its pipe.

    Args:
        jobs: what is to be done.
        advance: told what the jobs are telling.
        fork: whether to start processes.

    Returns:
        The results, in the order of the jobs.

    Raises:
        PrmkitError, OSError: what a job raised.
        DataError: a process died, of which the commonest cause is a lack of memory.
    """
    if not fork:
        return [job(advance) for job in jobs]
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in jobs]
    readers = [reader for reader, _ in pipes]
    children = [
        context.Process(target=_run, args=(job, writer, readers), daemon=True)
        for job, (_, writer) in zip(jobs, pipes, strict=True)
    ]
    try:
        for child in children:
            child.start()
        for _, writer in pipes:
            writer.close()
        return _gather(readers, advance)
    finally:
        for child in children:
            if child.pid is not None:
                child.terminate()
                child.join()


def _run(job: Job, writer: Connection, readers: Sequence[Connection]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent is the one to answer it.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for reader in readers:
        reader.close()
    try:
        writer.send(("done", job(lambda amount: writer.send(("advance", amount)))))
    except BrokenPipeError:
        os._exit(1)
    except (PrmkitError, OSError) as error:
        writer.send(("failed", error))


def _gather(readers: Sequence[Connection], advance: Advance) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(readers):
        waiting = {reader: number for number, reader in enumerate(readers) if number not in results}
        for reader in cast(list[Connection], wait(list(waiting))):
            try:
                what, value = reader.recv()
            except EOFError:
                raise DataError("a worker process died; most likely the machine ran out of memory.") from None
            if what == "failed":
                raise value
            if what == "done":
                results[waiting[reader]] = value
            else:
                advance(value)
    return [results[number] for number in range(len(readers))]
