"""One judge for many clients: their single prompts are judged in batches, and equal prompts once.

Everything here runs in one event loop, so nothing needs a lock; the judge runs in a separate thread, the only one that
touches the model.
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
"""The most prompts that are judged together. The backend sorts them by length and shares their prefixes."""
_REMEMBERED = 4096
"""The number of judgements kept, so that a repeated prompt costs nothing. About 5 MB."""

_FAULTS = (
    RuntimeError, MemoryError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError,
    OSError,
)  # fmt: skip
"""What libraries raise inside a model: out of memory, or a bug that one odd prompt triggers."""


class Busy(Exception):
    """The queue stayed full for as long as a client should wait."""


class Stopping(Exception):
    """The server is shutting down and accepts no more prompts."""


@dataclass
class Engine:
    """Judges requests as they arrive."""

    scorer: Scorer
    window: float = 0.005
    """Seconds that an idle judge waits for more prompts after the first one."""
    limit: int = 1024
    """The most prompts that may wait at once."""
    patience: float = 60.0
    """Seconds that a client waits for a place in the queue."""
    on_batch: Callable[[int, float], None] = lambda size, seconds: None
    """Called after every batch."""
    on_cache_hit: Callable[[], None] = lambda: None
    _waiting: "OrderedDict[bytes, Request]" = field(default_factory=OrderedDict)
    _answers: dict[bytes, "asyncio.Future[Judgement]"] = field(default_factory=dict)
    """The hashes of prompts that wait or are being judged."""
    _known: "OrderedDict[bytes, Judgement]" = field(default_factory=OrderedDict)
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)
    _left: asyncio.Condition = field(default_factory=asyncio.Condition)
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "judge"))
    is_stopping: bool = False
    _is_over: bool = False
    """Nothing more is judged, including prompts that wait for a place."""
    refused: int = 0
    """Prompts that were not judged before the server had to stop: the judge's thread may hang on them."""

    def load(self) -> None:
        """Load the judge now, in the thread that will use it: a second pool of compute threads would slow it down.

        Raises:
            DataError, UsageError: the judge cannot be loaded.
        """
        self._thread.submit(lambda: self.scorer.backend).result()

    @property
    def depth(self) -> int:
        """How many prompts wait or are being judged."""
        return len(self._answers)

    async def judge(self, requests: Sequence[Request]) -> list[Judgement]:
        """Judge some prompts, together with those of all other clients.

        Raises:
            Busy: there was no place in the queue for `patience` seconds.
            Stopping: the server is shutting down.
        """
        keys = [request.digest for request in requests]
        new = {key: request for key, request in zip(keys, requests, strict=True) if not self._is_known(key)}
        found = {key: self._known[key] for key in keys if key in self._known}
        await self._wait_for_places(len(new))
        loop = asyncio.get_running_loop()
        for key, request in new.items():
            if key not in self._answers:  # another client may have sent the same prompt while this one waited
                self._answers[key] = loop.create_future()
                self._waiting[key] = request
        self._arrived.set()
        # Shielded: a client that hangs up must not cancel what another client also waits for.
        answers = {key: asyncio.shield(self._answers[key]) for key in new}
        found |= dict(zip(answers, await asyncio.gather(*answers.values()), strict=True))
        return [found[key] for key in keys]

    def _is_known(self, key: bytes) -> bool:
        if key not in self._known:
            return False
        self._known.move_to_end(key)
        self.on_cache_hit()
        return True

    async def _wait_for_places(self, count: int) -> None:
        """Wait for room; a request with more prompts than the queue has places gets in when it is empty."""
        if self.is_stopping:
            raise Stopping
        async with self._left:
            try:
                await asyncio.wait_for(
                    self._left.wait_for(lambda: self._is_over or self._has_places(count)), self.patience
                )
            except TimeoutError:
                raise Busy from None
        if self._is_over:
            raise Stopping

    def _has_places(self, count: int) -> bool:
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
            if answer := self._answers.pop(key, None):  # none if the judgement came too late
                answer.set_result(judgement)
            if judgement.status != "failed":
                self._known[key] = judgement
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        async with self._left:
            self._left.notify_all()

    def _score(self, batch: Sequence[Request]) -> list[Judgement]:
        """Runs in the judge's thread. Every failure becomes an answer: the server must survive it."""
        try:
            return list(self.scorer.judgements(batch))
        except PrmkitError as error:
            fault: Exception = error
        except _FAULTS as error:
            if len(batch) > 1:  # a single prompt may be to blame, and must not cost the others their answers
                middle = len(batch) // 2
                return self._score(batch[:middle]) + self._score(batch[middle:])
            fault = error
        log.warning("%d prompts could not be judged: %s: %s", len(batch), type(fault).__name__, fault)
        return [Judgement("failed", reason=str(fault) or type(fault).__name__)] * len(batch)

    async def stop(self, seconds: float) -> int:
        """Accept nothing more, finish what was accepted, and refuse what is not finished in time.

        Returns:
            How many prompts were refused.
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
            answer.exception()  # if the client hung up, nobody else would retrieve the exception
        self._is_over = True
        async with self._left:
            self._left.notify_all()
        self.refused += len(left)
        return len(left)
