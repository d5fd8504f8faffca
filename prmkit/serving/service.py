"""The endpoints without HTTP: dictionaries in, dictionaries out, errors raised."""

import asyncio
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from prmkit.errors import DataError, PrmkitError, UsageError
from prmkit.judge.scorer import ShapeOf
from prmkit.judge.types import BAD_BELOW, SAME_SCORE, UNSCORED, rounded
from prmkit.layouts import Rejected
from prmkit.prompts.step import Rubric, step_prompts
from prmkit.rows import given_id, read_row
from prmkit.scoring.rows import RowToScore, prompt_row, step_row
from prmkit.scoring.score import Trajectories
from prmkit.serving.judges import Challenger, ScoredRow, ServedJudge
from prmkit.serving.metrics import ServerMetrics
from prmkit.serving.payloads import NothingWritten, request_id, run_of_policy, run_of_step, runs_in
from prmkit.serving.request_log import JudgeRole, RequestLog
from prmkit.serving.systemone import answer_to, check_question, key_of, run_of_state
from prmkit.trajectory import Trajectory
from prmkit.verdict import AGGREGATES

_RECENT_REWARDS = 1000

Body = Mapping[str, Any]


class NoReward(Exception):
    """A reward was requested, but a step has no reliable score."""


@dataclass
class Service:
    """One judge, and everything that its endpoints need."""

    judge: ServedJudge
    """The production judge."""
    metrics: ServerMetrics
    shape_of: ShapeOf
    rubric: Rubric | None
    """The rubric for steps of runs; None if the judge can only score ready-made prompts."""
    why_no_rubric: str = ""
    challenger: Challenger | None = None
    bad_below: float = BAD_BELOW[0]
    aggregate: str = "min"
    """How the scores of several steps become one reward."""
    unscored: str = "error"
    request_log: RequestLog | None = None
    _rewards: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT_REWARDS))

    @property
    def judges(self) -> list[ServedJudge]:
        """The loaded judges: the production judge, and the challenger if there is one."""
        return [self.judge, self.challenger.judge] if self.challenger else [self.judge]

    async def stop(self, seconds: float) -> None:
        """Stop accepting requests, finish the accepted ones, and refuse those left after `seconds`."""
        deadline = time.monotonic() + seconds
        await self.judge.engine.stop(seconds)
        if self.challenger:
            await self.challenger.finish(max(0.0, deadline - time.monotonic()))

    # --- /v1/score

    async def score(self, body: Body) -> dict[str, Any]:
        """Return one line for each of `steps`: ready-made prompts, or steps that become prompts here.

        Raises:
            DataError: the body is malformed.
        """
        steps, keys = body.get("steps"), () if body.get("keys") is None else body["keys"]
        if not isinstance(steps, list) or not all(isinstance(step, dict | str) for step in steps):
            raise DataError('steps must be a list of {"prompt"}, or of {"task", "history", "step"}.')
        if not isinstance(keys, list | tuple) or not all(isinstance(key, str) and key.strip() for key in keys):
            raise DataError("keys must be a list of score keys.")
        if len(set(keys)) < len(keys):
            raise DataError("keys lists a key twice.")
        if keys and any(_is_step(step) for step in steps):
            raise DataError(
                "keys is only allowed with ready-made prompts. For a step of a run, the judge's rubric sets the keys."
            )
        shape_of = replace(self.shape_of, keys=tuple(keys)) if keys else self.shape_of
        read = [self._row(step, number, shape_of) for number, step in enumerate(steps, start=1)]
        found = await self._lines([row for row, _ in read])
        lines = [line | {"lost": lost} for (line, _), (_, lost) in zip(found, read, strict=True)]
        return {"judge": judge_of(lines) if lines else self.judge.name, "results": lines}

    def _row(self, item: Any, number: int, shape_of: ShapeOf) -> tuple[RowToScore, dict[str, int]]:
        """Return the row to score, and the counts of what was dropped from its step, by kind."""
        item = {"prompt": item} if isinstance(item, str) else item
        known = given_id(item)
        try:
            if _is_step(item):
                run = run_of_step(item)
                row = self._step_rows(run)[-1]
                trajectory = row.trajectory if run.trajectory_id != request_id.get() else None
                row = replace(
                    row,
                    number=number,
                    id=row.id if known is None else known,
                    metadata=item.get("metadata") or {},
                    trajectory=trajectory,  # the steps of a request may belong to different runs
                )
                return row, dict(run.lost)
            return prompt_row(read_row(item), number, shape_of), {}
        except Rejected as rejected:
            reason = rejected.reason
        except RecursionError:
            reason = "nested too deeply"
        except PrmkitError as error:
            reason = str(error)
        return RowToScore(number, known, reason=reason), {}

    async def _lines(self, rows: Sequence[RowToScore]) -> list[ScoredRow]:
        if self.challenger:
            return await self.challenger.answer(self.judge, rows, self._count)
        answers = await self.judge.score(rows)
        for row, scored in zip(rows, answers, strict=True):
            self._count(row, scored, "production")
        return answers

    def _count(self, row: RowToScore, scored: ScoredRow, role: JudgeRole) -> None:
        self.metrics.count(scored.judgement, role)
        if self.request_log:
            self.request_log.add(row, scored.line, scored.line["judge"], role)

    async def first_line(self, judge: ServedJudge) -> dict[str, Any]:
        """Score one small prompt to show that a judge works; neither the metrics nor the log count it."""
        step = {"task": "What is 2 + 2?", "step": {"role": "assistant", "content": "4"}}
        prompt = {"prompt": 'Judge this step: 2 + 2 is 4. Answer with {"step_score": <score>}'}
        row, _ = self._row(step if self.rubric else prompt, 1, self.shape_of)
        (scored,) = await judge.score([row])
        return scored.line

    def _step_rows(self, run: Trajectory) -> list[RowToScore]:
        rubric = self.step_rubric()
        return [step_row(run, prompt, rubric, prompt.step.n) for prompt in step_prompts(run, rubric)]

    def step_rubric(self) -> Rubric:
        """Return the rubric for steps.

        Raises:
            UsageError: the judge was trained on ready-made prompts, so its scores of steps would be noise.
        """
        if self.rubric is None:
            raise UsageError(self.why_no_rubric)
        return self.rubric

    # --- /v1/score_trajectory

    async def score_trajectory(
        self, body: Any, format: str | None, gamma: float, bad_below: float | None
    ) -> dict[str, Any]:
        """Score every step of every run in the body, with aggregates and discounted returns.

        Raises:
            DataError: there is no run in the body, or a number is out of range.
            UsageError: the format is ambiguous or unknown, or this judge needs ready-made prompts.
        """
        self.step_rubric()
        for name, value in (("gamma", gamma), ("bad_below", bad_below)):
            if value is not None and not 0 <= value <= 1:  # with NaN, no step would be bad
                raise DataError(f"{name} must be a number from 0 to 1.")
        runs, reports = await asyncio.to_thread(runs_in, body, format)
        limit = self.bad_below if bad_below is None else bad_below
        rows = [self._step_rows(run) for run in runs]
        lines = iter(await self._lines([row for part in rows for row in part]))
        answers = []
        for run, part in zip(runs, rows, strict=True):
            answers.append(_run_answer(run, part, [next(lines)[0] for _ in part], limit, gamma))
        unread = {reason: count for report in reports for reason, count in report.unreadable.items()}
        return {"judge": judge_of(answers), "runs": answers, "unread": unread}

    # --- rewards

    async def rewards(self, body: Body) -> dict[str, Any]:
        """Implement OpenRLHF's API: lists of `query` and `prompts` in, lists of finite numbers of the same length out.

        Raises:
            DataError: the lists do not match, or a query cannot be split into messages.
            NoReward: a step has no reliable score, or the judge could not answer.
        """
        queries, prompts = body.get("query"), body.get("prompts")
        if not isinstance(queries, list) or not isinstance(prompts, list) or len(queries) != len(prompts):
            raise DataError("query and prompts must be two lists of strings of the same length.")
        if not all(isinstance(text, str) for text in [*queries, *prompts]):
            raise DataError("query and prompts must be two lists of strings of the same length.")
        pairs = enumerate(zip(prompts, queries, strict=True), start=1)
        asked = (self._reward(prompt, query, includes_prompt=True, number=number) for number, (prompt, query) in pairs)
        found = await asyncio.gather(*asked)
        values = [self._number(each.pop("score"), each["reason"], can_be_null=False) for each in found]
        logs = {key: [_finite(each[key]) for each in found] for key in ("label_mass", "unscored", "steps")}
        logs["lost"] = [float(sum(each["lost"].values())) for each in found]
        judges = [each["judge"] for each in found]
        return {"rewards": values, "scores": values, "extra_logs": logs, "judge": judges}

    async def reward(self, body: Body) -> dict[str, Any]:
        """Implement the API of slime and prmkit.rewards: one sample's `prompt` and `response` in, an object out.

        `aggregate` and `unscored` in the body override the server's.

        Raises:
            DataError: a part is missing, or the response cannot be split into messages.
            NoReward: a step has no reliable score, or the judge could not answer.
        """
        prompt, response = body.get("prompt"), body.get("response")
        if not isinstance(prompt, str | list) or not isinstance(response, str | list):
            raise DataError("prompt and response must be strings, or lists of messages.")
        configured = self._with_settings_of(body)
        reward = await configured._reward(prompt, response, includes_prompt=False)
        return reward | {"score": configured._number(reward["score"], reward["reason"], can_be_null=True)}

    def _with_settings_of(self, body: Body) -> "Service":
        """Return this service with the reward settings of a request's body."""
        settings = {name: body[name] for name in ("aggregate", "unscored") if name in body}
        for name, allowed in (("aggregate", tuple(AGGREGATES)), ("unscored", UNSCORED)):
            if name in settings and settings[name] not in allowed:
                raise DataError(f"{name} must be one of {', '.join(allowed)}.")
        return replace(self, **settings) if settings else self

    async def _reward(
        self, prompt: str | list[Any], text: str | list[Any], *, includes_prompt: bool, number: int = 1
    ) -> dict[str, Any]:
        """Aggregate the steps that the policy wrote; null if a step has no reliable score."""
        try:
            run, earlier = run_of_policy(prompt, text, includes_prompt=includes_prompt)
            run = replace(run, trajectory_id=f"{run.trajectory_id}.{number}")
            rows = self._step_rows(run)[earlier:]
        except (NothingWritten, RecursionError):  # an empty response or endless brackets must not stop a training run
            rows = []
        if not rows:
            return {
                "score": None,
                "label_mass": None,
                "steps": 0,
                "scores": [],
                "unscored": 1,
                "judge": None,
                "lost": {},
                "reason": "the policy wrote nothing that can be judged",
            }
        lines = [line for line, _ in await self._lines(rows)]
        self._check_answered(lines)
        scores = [line["score"] for line in lines if line["status"] == "ok"]
        masses = [line["label_mass"] for line in lines if line["label_mass"] is not None]
        unscored = len(lines) - len(scores)
        usable = scores if not unscored or self.unscored == "skip" else []
        return {
            "score": AGGREGATES[self.aggregate](usable) if usable else None,
            "label_mass": min(masses, default=None),
            "steps": len(lines),
            "scores": [line["score"] if line["status"] == "ok" else None for line in lines],
            "unscored": unscored,
            "judge": judge_of(lines),
            "lost": dict(run.lost),
            "reason": next((line["reason"] for line in lines if line["status"] != "ok"), None),
        }

    def _check_answered(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Raise an error if the judge could not score: null or any other substitute would be a constant reward."""
        for status, kind in (("failed", NoReward), ("error", DataError)):  # a retry helps only after `failed`
            for line in lines:
                if line["status"] == status:
                    self.metrics.unscored_rewards.labels("error").inc()
                    raise kind(f"the judge could not score a step: {line['reason']}")

    def _number(self, score: float | None, reason: str | None, *, can_be_null: bool) -> float | None:
        """Return the reward. A missing score must not silently become 0, because the policy would learn from it."""
        if score is not None:
            self._rewards.append(score)
            return score
        if self.unscored == "mean" and self._rewards:
            self.metrics.unscored_rewards.labels("mean").inc()
            return fmean(self._rewards)
        if self.unscored == "null" and can_be_null:
            self.metrics.unscored_rewards.labels("null").inc()
            return None
        self.metrics.unscored_rewards.labels("error").inc()
        raise NoReward(f"no reliable score: {reason} (serve_judge.py --unscored changes this response).")

    # --- /v1/systemone

    async def systemone(self, body: Body) -> dict[str, Any]:
        """Answer typed questions about a state, which is the end of a run.

        Raises:
            DataError: a question does not fit the judge's rubric, the state is not a run, or the judge is not sure.
            NoReward: the judge could not answer.
        """
        rubric = self.step_rubric()
        questions = body.get("questions")
        if not isinstance(questions, dict) or not questions:
            raise DataError("questions must be an object (name -> question).")
        for name, question in questions.items():
            check_question(name, question)
        keys = {name: key_of(name, question, rubric.keys) for name, question in questions.items()}
        run, unused = run_of_state(body.get("state"))
        ((line, judgement),) = await self._lines(self._step_rows(run)[-1:])
        if line["status"] != "ok":  # a retry only helps if a server or the memory failed
            kind = NoReward if line["status"] == "failed" else DataError
            raise kind(f"no reliable score: {line['reason']}")
        threshold = self.bad_below
        answers = {
            name: answer_to(question, judgement.scores[keys[name]], threshold) | {"key": keys[name]}
            for name, question in questions.items()
        }
        usage = {"input_tokens": judgement.prompt_tokens, "output_tokens": 0}
        about = {"unused_state": unused, "lost": dict(run.lost)}
        return {"model": line["judge"], "answers": answers, "usage": usage} | about


def _is_step(item: Any) -> bool:
    """Return whether an item of `steps` is a step of a run, and not a ready-made prompt."""
    return isinstance(item, Mapping) and "step" in item and "prompt" not in item


def judge_of(answers: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the judge that gave all of these answers; None if there were several."""
    names = {answer["judge"] for answer in answers}
    return names.pop() if len(names) == 1 else None


def _run_answer(
    run: Trajectory, rows: Sequence[RowToScore], lines: Sequence[Mapping[str, Any]], limit: float, gamma: float
) -> dict[str, Any]:
    summed = Trajectories(limit)
    for row, line in zip(rows, lines, strict=True):
        summed.add(row, line["score"], line["status"])
    (summary,) = summed.summaries()
    returns = _discounted([line["score"] if line["status"] == "ok" else None for line in lines], gamma)
    steps = []
    for step, line, value in zip(run.steps, lines, returns, strict=True):
        shown = {key: line[key] for key in line if key not in ("id", "metadata", "request_hash")}
        about = {"step": step.n, "source_index": step.source_index, "agent": step.agent}
        is_bad = line["score"] is not None and line["score"] < limit - SAME_SCORE
        steps.append(about | shown | {"bad": is_bad, "return": rounded(value)})
    first = next((step["step"] for step in steps if step["bad"]), None)
    about_run = {
        "trajectory_id": run.trajectory_id,
        "task_id": run.task_id,
        "judge": judge_of(steps),
        "first_bad": first,
    }
    return about_run | {"steps": steps, "aggregates": summary, "lost": dict(run.lost)}


def _discounted(scores: Sequence[float | None], gamma: float) -> list[float | None]:
    """Return the discounted sum of the scores from each step on; null up to and including the last unscored step."""
    returns: list[float | None] = []
    following: float | None = 0.0
    for score in reversed(scores):
        following = None if score is None or following is None else score + gamma * following
        returns.append(following)
    return returns[::-1]


def _finite(value: float | None) -> float:
    """Return a number for a log: trainers put these into tensors, where null and NaN would stop the training."""
    return -1.0 if value is None or not math.isfinite(value) else float(value)
