"""The judges' answers (answers.jsonl), and the rows of finetune.jsonl that are made from them.

One line per answer, written to disk before it is used, because it was paid for. Making the rows needs no network and
gives the same bytes every time.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from prmkit.collection.questions import Answers, Ask, Question, next_of
from prmkit.errors import DataError
from prmkit.files import end_of_last_line
from prmkit.resumable import appending
from prmkit.rows import SELECTED_BY, WEIGHT
from prmkit.trajectories.rows import judged_metadata
from prmkit.verdict import Verdict, render_verdict

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
