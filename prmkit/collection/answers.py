"""The judges' answers: asked for, kept in answers.jsonl, and made into rows of finetune.jsonl.

One line per answer, written to disk before it is used, because it was paid for. Each judge gets as many concurrent
requests as it allows, within the budget. Making the rows needs no network and gives the same bytes every time.
"""

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from prmkit import cli
from prmkit.collection.judges import StrongJudge
from prmkit.collection.questions import Answers, Ask, Question, next_of
from prmkit.errors import DataError
from prmkit.files import end_of_last_line
from prmkit.http_client import ChatAnswer, Connection, Endpoint, RowFailure, ServerState, together
from prmkit.resumable import appending
from prmkit.rows import SELECTED_BY, WEIGHT
from prmkit.trajectories.rows import judged_metadata
from prmkit.verdict import Verdict, render_verdict

log = logging.getLogger("prmkit")

_KINDS: Mapping[str, Any] = {
    "key": str, "judge": str, "model": str, "text": str, "cost": (int, float), "time": (int, float),
}  # fmt: skip
_LATEST = datetime(9999, 1, 1, tzinfo=UTC).timestamp()


def read_answers(path: Path) -> dict[str, dict[str, Any]]:
    """Key -> answer, so far; of two with the same key, the first counts. A last line cut off by a kill is dropped.

    Raises:
        DataError: a line is damaged.
    """
    if not path.exists():
        return {}
    answers: dict[str, dict[str, Any]] = {}
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.endswith(b"\n") or _is_whole(line):
                answer = _answer(line, f"{path}:{number}")
                answers.setdefault(answer["key"], answer)
    return answers


def _is_whole(line: bytes) -> bool:
    """Whether a last line lacks only its line break, which an editor may have removed."""
    try:
        return isinstance(orjson.loads(line), dict)
    except orjson.JSONDecodeError:
        return False


def _answer(line: bytes, place: str) -> dict[str, Any]:
    try:
        answer = orjson.loads(line)
        is_whole = isinstance(answer, dict) and all(isinstance(answer[key], kind) for key, kind in _KINDS.items())
    except (orjson.JSONDecodeError, KeyError):
        is_whole = False
    if not is_whole or "finish_reason" not in answer or not 0 <= answer["time"] < _LATEST:
        raise DataError(f"{place}: damaged. Answers in this file were paid for: repair or delete only this line.")
    return dict(answer)


def _line(question: Question, ask: Ask, answer: ChatAnswer, started: float) -> dict[str, Any]:
    judge = question.judge
    tokens_in = ask.prompt_tokens if answer.tokens_in is None else answer.tokens_in
    tokens_out = (
        -(-len(answer.text.encode("utf-8", "replace")) // 3) if answer.tokens_out is None else answer.tokens_out
    )
    return {
        "key": ask.key,
        "judge": judge.name,
        "model": judge.model,
        "question": question.name,
        "attempt": ask.attempt,
        "repeat": question.repeat,
        "text": answer.text.encode("utf-8", "replace").decode(),
        "finish_reason": answer.finish_reason,
        "usage": {"prompt_tokens": answer.tokens_in, "completion_tokens": answer.tokens_out},
        "cost": round(judge.cost(tokens_in, tokens_out), 8),
        "time": round(started, 3),
        "seconds": round(time.time() - started, 3),
    }


@contextmanager
def recording(path: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A function that adds an answer to the file; when it returns, the answer is on the disk.

    Raises:
        OSError: the file cannot be written; the error names it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as stream:
        end = end_of_last_line(stream.fileno())
        stream.seek(end)
        if _is_whole(stream.read()):
            stream.write(b"\n")
        else:  # an incomplete line would spoil the next one
            stream.truncate(end)
    with appending(path, synced=True) as record:
        yield record


# --- asking -----------------------------------------------------------------------------------------------------------

_ROUNDING = 1e-9
_ATTEMPTS = 10
"""Attempts for one request while the server is busy or asks for a pause: about four minutes without `Retry-After`."""


@dataclass
class Collection:
    """The state of a collection."""

    answers: dict[str, dict[str, Any]]
    """Key -> answer; grows."""
    max_cost: float | None = None
    costs: Counter[str] = field(default_factory=Counter)
    """Judge -> its cost in this run, by the user's prices."""
    reserved: float = 0.0
    """The most that the requests in flight can cost."""
    is_exhausted: bool = False
    """The budget has no room for another request."""
    failures: dict[tuple[str, str, bool], str] = field(default_factory=dict)
    """(judge, question, whether it is a repetition) -> why it got no answer in this run."""
    stopped: dict[str, str] = field(default_factory=dict)
    """Judges that refuse everything, and why."""
    under_way: dict[str, asyncio.Event] = field(default_factory=dict)
    """Key -> event of a request without an answer yet; it is set when the request ends."""

    @property
    def spent(self) -> float:
        """The cost of this run."""
        return math.fsum(self.costs.values())

    def reserve(self, judge: StrongJudge, ask: Ask) -> float | None:
        """Reserve the most that a request can cost; None if the budget has no room for it."""
        most = judge.cost(ask.prompt_tokens, ask.most_tokens)
        if self.max_cost is not None and self.spent + self.reserved + most > self.max_cost + _ROUNDING:
            return None
        self.reserved += most
        return most


def collect(
    questions: Callable[[], Iterator[Question]], judges: Sequence[StrongJudge], into: Path, state: Collection
) -> None:
    """Ask everything that has no answer yet.

    Args:
        questions: those of all judges, always in the same order.
        judges: the judges to ask.
        into: answers.jsonl.
        state: the state so far; is filled in.

    Raises:
        UsageError: a key's variable is empty.
        OSError: the answers cannot be written.
    """
    endpoints = {judge.name: _endpoint(judge) for judge in judges}
    open_questions = Counter(
        question.judge.name for question in questions() if isinstance(next_of(question, state.answers), Ask)
    )
    if not open_questions:
        return
    with recording(into) as record, cli.progress_bar() as progress:
        bars = {name: progress.add_task(name, total=count) for name, count in open_questions.items()}

        def advance(judge: StrongJudge) -> None:
            paid = f" {state.costs[judge.name]:.2f}" if judge.price_in is not None else ""
            progress.update(bars[judge.name], advance=1, description=f"{judge.name}{paid}")

        async def everything() -> None:
            await together(
                _ask_judge(judge, endpoints[judge.name], questions, state, record, advance)
                for judge in judges
                if open_questions[judge.name]
            )

        asyncio.run(everything())


def _endpoint(judge: StrongJudge) -> Endpoint:
    return Endpoint(
        judge.base_url, judge.model, judge.key(), judge.concurrency, attempts=_ATTEMPTS, timeout=judge.timeout
    )


async def _ask_judge(
    judge: StrongJudge,
    endpoint: Endpoint,
    questions: Callable[[], Iterator[Question]],
    state: Collection,
    record: Callable[[Mapping[str, Any]], None],
    advance: Callable[[StrongJudge], None],
) -> None:
    waiting = (question for question in questions() if question.judge.name == judge.name)
    async with Connection(endpoint, ServerState()) as connection:

        async def worker() -> None:
            for question in waiting:
                if judge.name in state.stopped or state.is_exhausted:
                    return
                if isinstance(next_of(question, state.answers), Ask):
                    await _follow(question, connection, state, record)
                    advance(judge)

        await together(worker() for _ in range(judge.concurrency))


async def _follow(
    question: Question, connection: Connection, state: Collection, record: Callable[[Mapping[str, Any]], None]
) -> None:
    """Ask until the question is settled, or cannot be settled."""
    while isinstance(ask := next_of(question, state.answers), Ask):
        if same := state.under_way.get(ask.key):  # another run begins with the same steps: one answer is enough
            await same.wait()
            if question.judge.name in state.stopped:
                return
            continue
        state.under_way[ask.key] = asyncio.Event()
        try:
            line = await _send(question, ask, connection, state)
            if line is None:
                return
            state.costs[question.judge.name] += line["cost"]
            record(line)
            state.answers[ask.key] = line
        finally:
            state.under_way.pop(ask.key).set()


async def _send(question: Question, ask: Ask, connection: Connection, state: Collection) -> dict[str, Any] | None:
    """Send one request within the budget; None, with the reason in `state`, if there is no answer."""
    judge = question.judge
    reserved = state.reserve(judge, ask)
    while reserved is None and state.reserved > 0:  # requests in flight usually cost less than was reserved
        await asyncio.sleep(0.02)
        reserved = state.reserve(judge, ask)
    if reserved is None:
        if not state.is_exhausted:
            log.warning("--max-cost %g is reached; no more requests are sent", state.max_cost)
        state.is_exhausted = True
        return None
    started = time.time()
    try:
        return _line(question, ask, await connection.chat(ask.body), started)
    except RowFailure as failure:
        reason = str(failure).removeprefix(judge.base_url).lstrip(": ")  # the report names the judge anyway
        state.failures[judge.name, question.name, question.repeat] = reason
    except DataError as error:  # the server refuses the key, does not have the model, or cannot be reached
        # The client's advice names flags of other commands.
        reason = str(error).replace("--base-url", "base_url").replace("--api-key-env", "api_key_env")
        if judge.name not in state.stopped:
            log.error("%s gets no more requests: %s", judge.name, reason)
        state.stopped[judge.name] = reason
    finally:
        state.reserved -= reserved
        if abs(state.reserved) < _ROUNDING:
            state.reserved = 0.0
    return None


# --- rows -----------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """The outcome of all questions, counted."""

    asked: Counter[str] = field(default_factory=Counter)
    """Judge -> number of steps, without repetitions."""
    missing: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(judge, reason) -> number of steps without a verdict."""
    unreadable: int = 0
    """How many of the missing verdicts have an answer that stayed unreadable after every retry."""
    repeated: dict[str, list[float]] = field(default_factory=dict)
    """Judge -> differences between its second and first scores."""

    @property
    def share_missing(self) -> float:
        """The share of requested verdicts that are missing."""
        return self.missing.total() / self.asked.total() if self.asked else 0.0


def rows_of_answers(
    questions: Iterable[Question], answers: Answers, failures: dict[tuple[str, str, bool], str], tally: Tally
) -> Iterator[dict[str, Any]]:
    """One row for each step with a verdict, in the order of the questions.

    Args:
        questions: those of all judges.
        answers: the answers so far.
        failures: why questions have no answer, if known.
        tally: is filled in.
    """
    scores: dict[tuple[str, str, int], float] = {}
    for question in questions:
        judge, found = question.judge.name, next_of(question, answers)
        verdicts = {} if isinstance(found, Ask) else found.verdicts
        if not question.repeat:
            tally.asked[judge] += len(question.prompts)
        if isinstance(found, Ask) or found.answer is None or not verdicts:
            known = failures.get((judge, question.name, question.repeat), "not asked yet")
            reason = known if isinstance(found, Ask) else f"unreadable: {found.reason}"
            if not question.repeat:
                tally.missing[judge, reason] += len(question.prompts)
                tally.unreadable += 0 if isinstance(found, Ask) else len(question.prompts)
            continue
        for step, prompt in question.prompts.items():
            score = sum(verdicts[step].scores.values()) / len(verdicts[step].scores)
            place = (judge, question.run.trajectory_id, step)
            if question.repeat and place in scores:
                tally.repeated.setdefault(judge, []).append(abs(score - scores[place]))
            scores.setdefault(place, score)
            yield _row(question, step, prompt, verdicts[step], found.answer)


def _row(question: Question, step: int, prompt: str, verdict: Verdict, answer: Any) -> dict[str, Any]:
    judge, time = question.judge, datetime.fromtimestamp(answer["time"], UTC).strftime("%Y-%m-%d %H:%M:%S")
    metadata = judged_metadata(question.run, step, question.rubric, judge.name, judge.host, time)
    metadata |= {"per": "run" if question.per_run else "step", "reference_shown": question.reference_shown}
    if question.repeat:
        metadata["repeat"] = True
    if question.selection:
        metadata |= {SELECTED_BY: question.selection[0], WEIGHT: question.selection[1]}
    said = [{"from": "human", "value": prompt}, {"from": "gpt", "value": render_verdict(verdict)}]
    return {"conversations": said, "metadata": metadata}
