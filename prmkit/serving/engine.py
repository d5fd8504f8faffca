"""Judge the prompts of many clients in batches, and identical prompts only once.

Everything here runs in one event loop, so no locks are needed; the judge runs in a separate thread, and only this
thread uses the model.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from prmkit.errors import PrmkitError
from prmkit.judge.scorer import Scorer
from prmkit.judge.types import Judgement, Request

log = logging.getLogger("prmkit")

BATCH = 64
"""The maximum number of prompts that are judged together. The backend sorts them and shares their prefixes."""
_REMEMBERED = 4096
"""The number of judgements in the cache, about 5 MB; a repeated prompt then costs nothing."""

_MODEL_ERRORS = (
    RuntimeError, MemoryError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError,
    OSError,
)  # fmt: skip
"""Errors that libraries raise inside a model: out of memory, or a bug that an unusual prompt triggers."""


class Busy(Exception):
    """The queue was full for longer than a client should wait."""


class Stopping(Exception):
    """The server is shutting down and accepts no more prompts."""


@dataclass
class Engine:
    """Judges requests as they arrive."""

    scorer: Scorer
    window: float = 0.005
    """Seconds that an idle judge waits for more prompts after the first one."""
    limit: int = 1024
    """The maximum number of prompts in the queue."""
    patience: float = 60.0
    """Seconds that a client waits for the queue to have room."""
    on_batch: Callable[[int, float], None] = lambda size, seconds: None
    """Called after every batch."""
    on_cache_hit: Callable[[], None] = lambda: None
    _waiting: "OrderedDict[bytes, Request]" = field(default_factory=OrderedDict)
    _answers: dict[bytes, "asyncio.Future[Judgement]"] = field(default_factory=dict)
    """Hash of a prompt that waits or is being judged -> the future of its judgement."""
    _known: "OrderedDict[bytes, Judgement]" = field(default_factory=OrderedDict)
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)
    _left: asyncio.Condition = field(default_factory=asyncio.Condition)
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "judge"))
    is_stopping: bool = False
    _is_over: bool = False
    """Whether judging has ended, even for prompts that wait for the queue."""
    refused: int = 0
    """The number of prompts that were not judged before the server stopped; the judge's thread may hang on them."""

    def load(self) -> None:
        """Load the judge now, in the thread that will use it, because a second pool of compute threads would slow it
        down.

        Raises:
            DataError, UsageError: the judge cannot be loaded.
        """
        self._thread.submit(lambda: self.scorer.backend).result()

    @property
    def depth(self) -> int:
        """The number of prompts that wait or are being judged."""
        return len(self._answers)

    async def judge(self, requests: Sequence[Request]) -> list[Judgement]:
        """Judge some prompts, together with those of all other clients.

        Raises:
            Busy: the queue was full for `patience` seconds.
            Stopping: the server is shutting down.
        """
        keys = [request.digest for request in requests]
        new = {key: request for key, request in zip(keys, requests, strict=True) if not self._is_known(key)}
        judgements = {key: self._known[key] for key in keys if key in self._known}
        await self._wait_for_room(len(new))
        loop = asyncio.get_running_loop()
        for key, request in new.items():
            if key not in self._answers:  # another client may have sent the same prompt while this one waited
                self._answers[key] = loop.create_future()
                self._waiting[key] = request
        self._arrived.set()
        # Shielded, because a client that disconnects must not cancel a judgement for which another client waits.
        answers = {key: asyncio.shield(self._answers[key]) for key in new}
        judgements |= dict(zip(answers, await asyncio.gather(*answers.values()), strict=True))
        return [judgements[key] for key in keys]

    def _is_known(self, key: bytes) -> bool:
        if key not in self._known:
            return False
        self._known.move_to_end(key)
        self.on_cache_hit()
        return True

    async def _wait_for_room(self, count: int) -> None:
        """Wait for room in the queue; a request with more prompts than the queue holds is accepted when it is empty."""
        if self.is_stopping:
            raise Stopping
        async with self._left:
            try:
                await asyncio.wait_for(
                    self._left.wait_for(lambda: self._is_over or self._has_room(count)), self.patience
                )
            except TimeoutError:
                raise Busy from None
        if self._is_over:
            raise Stopping

    def _has_room(self, count: int) -> bool:
        return not self._waiting or len(self._waiting) + count <= self.limit

    async def run(self) -> None:
        """Judge until cancelled."""
        while True:
            await self._arrived.wait()
            if len(self._waiting) < BATCH:
                await asyncio.sleep(self.window)
            self._arrived.clear()
            while self._waiting:
                await self._judge_batch()

    async def _judge_batch(self) -> None:
        keys = list(self._waiting)[:BATCH]
        batch = [self._waiting.pop(key) for key in keys]
        started = time.perf_counter()
        judgements = await asyncio.get_running_loop().run_in_executor(self._thread, self._score, batch)
        self.on_batch(len(batch), time.perf_counter() - started)
        for key, judgement in zip(keys, judgements, strict=True):
            if answer := self._answers.pop(key, None):  # None if the judgement came too late
                answer.set_result(judgement)
            if judgement.status != "failed":
                self._known[key] = judgement
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        async with self._left:
            self._left.notify_all()

    def _score(self, batch: Sequence[Request]) -> list[Judgement]:
        """Judge a batch in the judge's thread; every failure becomes a judgement, so that the server survives it."""
        try:
            return list(self.scorer.judgements(batch))
        except PrmkitError as error:
            problem: Exception = error
        except _MODEL_ERRORS as error:
            if len(batch) > 1:  # the failure of a single prompt must not affect the others
                middle = len(batch) // 2
                return self._score(batch[:middle]) + self._score(batch[middle:])
            problem = error
        log.warning("%d prompts could not be judged: %s: %s", len(batch), type(problem).__name__, problem)
        return [Judgement("failed", reason=str(problem) or type(problem).__name__)] * len(batch)

    async def stop(self, seconds: float) -> int:
        """Stop accepting prompts, finish the accepted ones, and refuse those that are not finished in time.

        Returns:
            The number of refused prompts.
        """
        self.is_stopping = True
        deadline = time.monotonic() + seconds
        while self._answers and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        left = list(self._answers.values())
        self._waiting.clear()
        self._answers.clear()
        for answer in left:
            answer.set_exception(Stopping())
            answer.exception()  # if the client disconnected, nothing else would retrieve the exception
        self._is_over = True
        async with self._left:
            self._left.notify_all()
        self.refused += len(left)
        return len(left)
