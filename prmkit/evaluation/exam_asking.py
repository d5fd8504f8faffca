"""Ask a judge, a local model or a server, about every step of an exam. Answered steps are never asked about again."""

import argparse
import asyncio
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice, tee
from pathlib import Path
from typing import Any

from prmkit import cli
from prmkit.errors import DataError, UsageError
from prmkit.evaluation.exam import Exam
from prmkit.evaluation.exam_answers import StepId
from prmkit.files import exclusive_lock
from prmkit.http_client import Connection, Endpoint, RowFailure, ServerState, check_url, key_from, together
from prmkit.judge.scorer import Scorer, scoring_options_of
from prmkit.judge.sources import JudgeSource
from prmkit.judge.types import SCORED, Judgement, Request, rounded
from prmkit.prompts.step import Rubric, step_prompts, step_text
from prmkit.resumable import JsonLine, append_rows, reopen
from prmkit.trajectory import Trajectory
from prmkit.verdict import Unreadable, asked_shape, is_number, read_verdict

log = logging.getLogger("prmkit")

StepKey = tuple[str, str, int]
"""The request's hash, the run's id, the step's number."""
Asked = tuple[StepKey, Request]


def prompts_of(exam: Exam, rubric: Rubric) -> Iterator[tuple[StepId, Request | None]]:
    """Yield the request for every step; None if the prompt does not ask for a score."""
    for run in exam.runs:
        if run.record is not None:
            yield from prompts_of_run(run.record, rubric)
            continue
        for step in run.steps:
            shape = asked_shape(step.prompt or "")
            yield (run.trajectory_id, step.n), Request(step.prompt or "", shape, step.system) if shape else None


def prompts_of_run(run: Trajectory, rubric: Rubric) -> Iterator[tuple[StepId, Request | None]]:
    """Yield the request for every step of one run."""
    for prompt in step_prompts(run, rubric):
        shape = asked_shape(prompt.text)
        yield (run.trajectory_id, prompt.step.n), Request(prompt.text, shape) if shape else None


def score_steps(
    source: JudgeSource, asked: Iterable[tuple[StepId, Request | None]], file: Path, arguments: argparse.Namespace
) -> dict[StepId, float]:
    """Let a model score steps; an interrupted command continues where it stopped.

    Args:
        source: the judge.
        asked: steps and the request for each; iterated over once, and not kept in memory.
        file: one line per step.
        arguments: the arguments batch_size, mode, too_long, max_new_tokens and min_label_mass.

    Returns:
        The scores of the steps that got a score.

    Raises:
        DataError: no step got a score.
    """
    scorer = Scorer(source, options=scoring_options_of(arguments))

    def answer(missing: Iterator[Asked]) -> Iterator[tuple[StepKey, JsonLine]]:
        keys, requests = tee(missing)
        judgements = scorer.judgements(request for _, request in requests)
        for (key, _), judgement in zip(keys, judgements, strict=True):
            yield key, _line(judgement)

    return _ask(asked, file, scorer.fingerprint() | {"mode": arguments.mode, "format": 1}, answer)


def _line(judgement: Judgement) -> JsonLine:
    return {
        "score": rounded(judgement.score),
        "std": rounded(judgement.std),
        "label_mass": rounded(judgement.label_mass),
        "status": judgement.status,
        "reason": judgement.reason,
    }


def _ask(
    asked: Iterable[tuple[StepId, Request | None]],
    file: Path,
    fingerprint: Mapping[str, Any],
    answer: Callable[[Iterator[Asked]], Iterator[tuple[StepKey, JsonLine]]],
) -> dict[StepId, float]:
    file.parent.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(file.parent, f"writing {file.name}", lock=f".{file.name}.lock"):
        kept = reopen(file, fingerprint, retry=("failed",))
        lines: dict[StepKey, Any] = {(line["request_hash"], line["id"], line["step"]): line for line in kept}
        if lines:
            log.info("%s: %d steps are already scored", file, len(lines))
        wanted: list[StepKey] = []

        def missing() -> Iterator[Asked]:
            for (run, step), request in asked:
                if request is not None:
                    key = (request.digest.hex(), run, step)
                    wanted.append(key)
                    if key not in lines:
                        yield key, request

        with cli.progress_bar() as progress:
            bar = progress.add_task("scoring", total=None)
            new = ({"id": key[1], "step": key[2], **line, "request_hash": key[0]} for key, line in answer(missing()))
            for line in append_rows(file, new):
                lines[line["request_hash"], line["id"], line["step"]] = line
                progress.advance(bar)
    return _scores(file, [lines[key] for key in wanted if key in lines])


def _scores(file: Path, lines: list[Any]) -> dict[StepId, float]:
    scores = {(line["id"], line["step"]): line["score"] for line in lines if line["status"] in SCORED}
    if not scores:
        reason = lines[0]["reason"] if lines else "no step asks for a score"
        raise DataError(f"{file}: none of {len(lines)} steps got a score. Reason for the first step: {reason}.")
    return scores


# --- a server ---------------------------------------------------------------------------------------------------------

_SYSTEMONE = "/systemone"
_LONGEST_VERDICT = 1024
"""The maximum number of tokens of a chat model's verdict."""
_WINDOW = 64
"""The number of steps that are asked about before their lines are written."""


def endpoint_of(arguments: argparse.Namespace) -> Endpoint:
    """Return the server of `--predict-with`.

    Raises:
        UsageError: the address is not a URL, the model's name is missing, or the key cannot be sent.
    """
    url = arguments.predict_with
    check_url(url)
    if not arguments.server_model:
        raise UsageError("--predict-with needs --server-model, the name of the model on the server.")
    return Endpoint(url.rstrip("/"), arguments.server_model, api_key=key_from(arguments.api_key_env))


def ask_server(exam: Exam, endpoint: Endpoint, rubric: Rubric, file: Path) -> dict[StepId, float]:
    """Let a server score every step: with typed questions if the URL ends in /systemone, otherwise as a chat model.

    A chat model gets the prompt that a trained judge gets, and its verdict is read like any judge's.

    Args:
        exam: the exam.
        endpoint: the server.
        rubric: the rubric for the prompts.
        file: one line per step.

    Raises:
        DataError: the server cannot be reached, or no step got a score.
        UsageError: typed questions cannot be used with this exam or rubric.
    """
    is_typed = endpoint.base_url.endswith(_SYSTEMONE)
    if is_typed and (len(rubric.keys) > 1 or len(rubric.anchors) < 2 or any(run.record is None for run in exam.runs)):
        raise UsageError(
            f"{endpoint.name}: typed questions need complete runs, and a rubric with one key and two or more anchors. "
            "Create the exam again with import_trajectories.py --labels, and keep both of its files."
        )

    records = {run.trajectory_id: run.record for run in exam.runs if run.record is not None}

    async def ask_one(connection: Connection, key: StepKey, request: Request) -> float | str:
        if is_typed:
            answer = await connection.ask_json("systemone", _typed_question(records[key[1]], key[2], rubric))
            return _read_typed(answer, rubric)
        system = [{"role": "system", "content": request.system}] if request.system else []
        messages = [*system, {"role": "user", "content": request.prompt}]
        chat = await connection.chat({"messages": messages, "temperature": 0, "max_tokens": _LONGEST_VERDICT})
        verdict = read_verdict(chat.text, request.shape)
        return verdict.reason if isinstance(verdict, Unreadable) else verdict.mean

    base = Endpoint(endpoint.base_url.removesuffix(_SYSTEMONE), endpoint.model, api_key=endpoint.api_key)

    def answer(missing: Iterator[Asked]) -> Iterator[tuple[StepKey, JsonLine]]:
        while window := list(islice(missing, _WINDOW)):
            yield from asyncio.run(_ask_window(base, window, ask_one))

    # The same model on another port gives the same answers.
    fingerprint = {"model": endpoint.model, "typed": is_typed, "rubric": rubric.sha256, "format": 2}
    return _ask(prompts_of(exam, rubric), file, fingerprint, answer)


async def _ask_window(
    endpoint: Endpoint, window: list[Asked], ask_one: Callable[..., Any]
) -> list[tuple[StepKey, JsonLine]]:
    async with Connection(endpoint, ServerState()) as connection:

        async def line_of(key: StepKey, request: Request) -> tuple[StepKey, JsonLine]:
            try:
                found = await ask_one(connection, key, request)
            except RowFailure as failure:
                return key, _server_line(None, "failed", str(failure))
            return key, _server_line(None, "unparsed", found) if isinstance(found, str) else _server_line(found)

        return await together(line_of(*asked) for asked in window)


def _server_line(score: float | None, status: str = "ok", reason: str | None = None) -> JsonLine:
    return {"score": rounded(score), "std": None, "label_mass": None, "status": status, "reason": reason}


def _typed_question(run: Trajectory, n: int, rubric: Rubric) -> dict[str, Any]:
    """Return the state up to a step, and one question about it, with the levels of the rubric."""
    history = [{"role": "assistant", "content": step_text(step)} for step in run.steps[: n - 1]]
    question = {
        "type": "score",
        "instructions": rubric.instructions,
        "criteria": [anchor.partition(": ")[2] for anchor in _levels(rubric)],
    }
    state = {"task": run.task or "(not recorded)", "history": history, "output": step_text(run.steps[n - 1])}
    return {"state": state, "questions": {rubric.keys[0]: question}}


def _levels(rubric: Rubric) -> list[str]:
    return sorted(rubric.anchors, key=lambda anchor: float(anchor.partition(":")[0]))


def _read_typed(answer: Mapping[str, Any], rubric: Rubric) -> float | str:
    """Return the score of an answer, or what is wrong with it. Levels are the numbers of the rubric's anchors."""
    answers = answer.get("answers")
    found = answers.get(rubric.keys[0]) if isinstance(answers, dict) else None
    if not isinstance(found, dict):
        return "no answer to the question"
    values = [float(anchor.partition(":")[0]) for anchor in _levels(rubric)]
    chances = found.get("probabilities")
    if isinstance(chances, dict) and chances.keys() == {str(level) for level in range(len(values))}:
        shares = list(chances.values())
        if all(map(is_number, shares)) and min(shares) >= 0 and abs(math.fsum(shares) - 1) < 0.01:
            return math.fsum(chances[str(level)] * value for level, value in enumerate(values)) / math.fsum(shares)
    level = found.get("score", found.get("choice"))
    if isinstance(level, str) and level.isdigit():
        level = int(level)
    if not is_number(level) or not 0 <= level <= len(values) - 1:
        return f"the answer {level!r:.40} is not a level from 0 to {len(values) - 1}"
    below = min(int(level), len(values) - 2)
    return values[below] + (level - below) * (values[below + 1] - values[below])
