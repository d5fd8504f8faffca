"""Request the judges' answers, store them in answers.jsonl, and turn them into rows of finetune.jsonl.

Every answer is one line, written to disk before it is used, because it was paid for. Each judge gets as many concurrent
requests as it allows, within the budget. Creating the rows needs no network and always gives the same bytes.
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
from prmkit.collection.questions import Answers, NextRequest, Question, next_of
from prmkit.errors import DataError
from prmkit.files import end_of_last_line
from prmkit.http_client import ChatAnswer, Connection, Endpoint, RowFailure, ServerState, together
from prmkit.resumable import appending
from prmkit.rows import SELECTED_BY, WEIGHT
from prmkit.trajectories.rows import judged_metadata
from prmkit.verdict import Verdict, render_verdict

log = logging.getLogger("prmkit")

_FIELD_TYPES: Mapping[str, Any] = {
    "key": str, "judge": str, "model": str, "text": str, "cost": (int, float), "time": (int, float),
}  # fmt: skip
_LATEST = datetime(9999, 1, 1, tzinfo=UTC).timestamp()


def read_answers(path: Path) -> dict[str, dict[str, Any]]:
    """Return the answers by key; of duplicates, the first. Ignore an incomplete last line, left by a killed command.

    Raises:
        DataError: a line is damaged.
    """
    if not path.exists():
        return {}
    answers: dict[str, dict[str, Any]] = {}
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.endswith(b"\n") or _is_complete(line):
                answer = _answer(line, f"{path}:{number}")
                answers.setdefault(answer["key"], answer)
    return answers


def _is_complete(line: bytes) -> bool:
    """Return whether the last line is complete except for its line break, which an editor may have removed."""
    try:
        return isinstance(orjson.loads(line), dict)
    except orjson.JSONDecodeError:
        return False


def _answer(line: bytes, location: str) -> dict[str, Any]:
    try:
        answer = orjson.loads(line)
        is_valid = isinstance(answer, dict) and all(isinstance(answer[key], kind) for key, kind in _FIELD_TYPES.items())
    except (orjson.JSONDecodeError, KeyError):
        is_valid = False
    if not is_valid or "finish_reason" not in answer or not 0 <= answer["time"] < _LATEST:
        raise DataError(f"{location}: damaged line. Repair or delete only this line: the other answers were paid for.")
    return dict(answer)


def _line(question: Question, ask: NextRequest, answer: ChatAnswer, started: float) -> dict[str, Any]:
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
    """Yield a function that appends an answer to the file; when it returns, the answer is on the disk.

    Raises:
        OSError: the file cannot be written; the error contains its path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as stream:
        end = end_of_last_line(stream.fileno())
        stream.seek(end)
        if _is_complete(stream.read()):
            stream.write(b"\n")
        else:  # otherwise the next answer would be appended to an incomplete line
            stream.truncate(end)
    with appending(path, synced=True) as record:
        yield record


# --- requests ---------------------------------------------------------------------------------------------------------

_ROUNDING = 1e-9
_ATTEMPTS = 10
"""The maximum number of attempts for a request while the server is busy: about four minutes without `Retry-After`."""


@dataclass
class Collection:
    """The progress of a collection: answers, costs and failures so far."""

    answers: dict[str, dict[str, Any]]
    """Key -> answer; grows during the run."""
    max_cost: float | None = None
    costs: Counter[str] = field(default_factory=Counter)
    """Judge -> its cost in this run, at the user's prices."""
    reserved: float = 0.0
    """The maximum cost of the requests in flight."""
    is_exhausted: bool = False
    """Whether the budget is exhausted."""
    failures: dict[tuple[str, str, bool], str] = field(default_factory=dict)
    """(judge, question, whether it is a repetition) -> why it got no answer in this run."""
    stopped: dict[str, str] = field(default_factory=dict)
    """Judge -> why it gets no more requests."""
    under_way: dict[str, asyncio.Event] = field(default_factory=dict)
    """Key of a request in flight -> event that is set when the request ends."""

    @property
    def spent(self) -> float:
        """The cost of this run."""
        return math.fsum(self.costs.values())

    def reserve(self, judge: StrongJudge, ask: NextRequest) -> float | None:
        """Reserve the maximum cost of a request and return it; None if it would exceed the budget."""
        most = judge.cost(ask.prompt_tokens, ask.most_tokens)
        if self.max_cost is not None and self.spent + self.reserved + most > self.max_cost + _ROUNDING:
            return None
        self.reserved += most
        return most


def collect(
    questions: Callable[[], Iterator[Question]], judges: Sequence[StrongJudge], answers_file: Path, state: Collection
) -> None:
    """Send all requests that have no answer yet.

    Args:
        questions: the questions to all judges, always in the same order.
        judges: the judges to ask.
        answers_file: answers.jsonl.
        state: the state so far; it is updated.

    Raises:
        UsageError: the variable of an API key is empty.
        OSError: the answers cannot be written.
    """
    endpoints = {judge.name: _endpoint(judge) for judge in judges}
    open_questions = Counter(
        question.judge.name for question in questions() if isinstance(next_of(question, state.answers), NextRequest)
    )
    if not open_questions:
        return
    with recording(answers_file) as record, cli.progress_bar() as progress:
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
                if isinstance(next_of(question, state.answers), NextRequest):
                    await _follow(question, connection, state, record)
                    advance(judge)

        await together(worker() for _ in range(judge.concurrency))


async def _follow(
    question: Question, connection: Connection, state: Collection, record: Callable[[Mapping[str, Any]], None]
) -> None:
    """Send follow-up requests until the question has a result or fails."""
    while isinstance(ask := next_of(question, state.answers), NextRequest):
        # Another run may have the same first steps, and so an identical request in flight.
        if same := state.under_way.get(ask.key):
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


async def _send(
    question: Question, ask: NextRequest, connection: Connection, state: Collection
) -> dict[str, Any] | None:
    """Send one request within the budget; if there is no answer, return None and keep the reason in `state`."""
    judge = question.judge
    reserved = state.reserve(judge, ask)
    while reserved is None and state.reserved > 0:  # requests in flight usually cost less than reserved
        await asyncio.sleep(0.02)
        reserved = state.reserve(judge, ask)
    if reserved is None:
        if not state.is_exhausted:
            log.warning("--max-cost %g reached; sending no more requests", state.max_cost)
        state.is_exhausted = True
        return None
    started = time.time()
    try:
        return _line(question, ask, await connection.chat(ask.body), started)
    except RowFailure as failure:
        reason = str(failure).removeprefix(judge.base_url).lstrip(": ")  # the report already names the judge
        state.failures[judge.name, question.name, question.repeat] = reason
    except DataError as error:  # the server refuses the key, does not have the model, or cannot be reached
        # The client's advice mentions flags of other commands.
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
class VerdictCounts:
    """Counts of the results of all questions."""

    asked: Counter[str] = field(default_factory=Counter)
    """Judge -> number of steps, without repetitions."""
    missing: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(judge, reason) -> number of steps without a verdict."""
    unreadable: int = 0
    """The number of missing verdicts whose answers were still unreadable after all retries."""
    repeated: dict[str, list[float]] = field(default_factory=dict)
    """Judge -> absolute differences between its second and its first scores."""

    @property
    def share_missing(self) -> float:
        """The fraction of requested verdicts that are missing."""
        return self.missing.total() / self.asked.total() if self.asked else 0.0


def rows_of_answers(
    questions: Iterable[Question], answers: Answers, failures: dict[tuple[str, str, bool], str], tally: VerdictCounts
) -> Iterator[dict[str, Any]]:
    """Yield one row per step with a verdict, in the order of the questions.

    Args:
        questions: the questions to all judges.
        answers: the answers so far.
        failures: the reasons why questions have no answer, if known.
        tally: the counts, which are updated.
    """
    scores: dict[tuple[str, str, int], float] = {}
    for question in questions:
        judge, result = question.judge.name, next_of(question, answers)
        verdicts = {} if isinstance(result, NextRequest) else result.verdicts
        if not question.repeat:
            tally.asked[judge] += len(question.prompts)
        if isinstance(result, NextRequest) or result.answer is None or not verdicts:
            known = failures.get((judge, question.name, question.repeat), "not asked yet")
            reason = known if isinstance(result, NextRequest) else f"unreadable: {result.reason}"
            if not question.repeat:
                tally.missing[judge, reason] += len(question.prompts)
                tally.unreadable += 0 if isinstance(result, NextRequest) else len(question.prompts)
            continue
        for step, prompt in question.prompts.items():
            score = sum(verdicts[step].scores.values()) / len(verdicts[step].scores)
            scored = (judge, question.run.trajectory_id, step)
            if question.repeat and scored in scores:
                tally.repeated.setdefault(judge, []).append(abs(score - scores[scored]))
            scores.setdefault(scored, score)
            yield _row(question, step, prompt, verdicts[step], result.answer)


def _row(question: Question, step: int, prompt: str, verdict: Verdict, answer: Any) -> dict[str, Any]:
    judge, time = question.judge, datetime.fromtimestamp(answer["time"], UTC).strftime("%Y-%m-%d %H:%M:%S")
    metadata = judged_metadata(question.run, step, question.rubric, judge.name, judge.host, time)
    metadata |= {"per": "run" if question.per_run else "step", "reference_shown": question.reference_shown}
    if question.repeat:
        metadata["repeat"] = True
    if question.selection:
        metadata |= {SELECTED_BY: question.selection[0], WEIGHT: question.selection[1]}
    turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": render_verdict(verdict)}]
    return {"conversations": turns, "metadata": metadata}
