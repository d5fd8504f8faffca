"""What to ask, and what an answer means: a pure function of runs, judges and the answers so far.

Every question is a chain of requests: if an answer was cut off, it is requested once more with twice the tokens; if it
cannot be read, up to two more times with the reason. Each request has a key, the hash of everything sent. So the same
function decides what to ask next while collecting, and what the result is afterwards, even if the reader of verdicts
has improved since.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prmkit.collection.judges import StrongJudge
from prmkit.prompts.step import Rubric, run_prompt, step_prompts, tokens
from prmkit.trajectory import Trajectory
from prmkit.verdict import Shape, Unreadable, Verdict, asked_shape, read_verdict
from prmkit.verdict.repair import Refusal, unique_members

_ASKED_AGAIN = 2
_TOKENS_A_STEP = 100
"""Tokens per step in an answer about a whole run: a score, the type of an error, and one or two sentences."""
_QUOTED = 2000
"""The most characters of an unreadable answer to send back with the reason."""

Answers = Mapping[str, Mapping[str, Any]]
"""What judges answered, by key: lines of answers.jsonl."""


@dataclass(frozen=True)
class Question:
    """One step, or all steps of a run in one call, for one judge."""

    judge: StrongJudge
    run: Trajectory
    rubric: Rubric
    text: str
    """The text sent to the judge."""
    prompts: Mapping[int, str]
    """Step number -> its prompt, as rows have it and as the trained judge will see it."""
    per_run: bool
    repeat: bool = False
    """Whether this asks the same judge a second time, to measure its agreement with itself."""
    reference_shown: bool = False
    selection: tuple[str, float] | None = None
    """Why this step was selected, and the inverse of the selection probability; None if all steps are asked about."""

    @property
    def name(self) -> str:
        """The step or run, as messages name it."""
        return self.run.trajectory_id if self.per_run else f"{self.run.trajectory_id}#{next(iter(self.prompts))}"


@dataclass(frozen=True)
class Ask:
    """The next request of a question."""

    key: str
    body: Mapping[str, Any]
    """Messages and parameters, sent along with the model's name."""
    attempt: int
    most_tokens: int
    """Of the answer."""

    @property
    def prompt_tokens(self) -> int:
        """An estimate."""
        return sum(tokens(str(message["content"])) + 4 for message in self.body["messages"])


@dataclass(frozen=True)
class Settled:
    """The outcome of a question."""

    verdicts: Mapping[int, Verdict]
    """Step -> verdict; empty if nothing could be read."""
    reason: str | None = None
    """Why there are no verdicts."""
    answer: Mapping[str, Any] | None = None
    """The last line of answers.jsonl that was used."""


def next_of(question: Question, answers: Answers) -> Ask | Settled:
    """Follow the chain of a question: returns the next request, or the outcome."""
    first = [{"role": "user", "content": question.text}]
    messages: list[dict[str, str]] = first
    limit_name, limit = _limit(question)
    again, has_more_room, attempt = 0, False, 0
    while True:
        ask = _ask(question, messages, {limit_name: limit}, attempt)
        answer = answers.get(ask.key)
        if answer is None:
            return ask
        attempt += 1
        if answer["finish_reason"] == "length" and not has_more_room:
            has_more_room, limit = True, 2 * limit
            continue
        read = _read(question, answer)
        if not isinstance(read, str):
            return Settled(read, answer=answer)
        if again == _ASKED_AGAIN:
            if answer["finish_reason"] == "length":
                read = f"cut off at {limit} tokens; raise {limit_name} ({read})"
            return Settled({}, read, answer)
        again += 1
        said = {"role": "assistant", "content": answer["text"][:_QUOTED] or "(nothing)"}
        demand = f"This cannot be used: {read}. Answer again, with nothing but the JSON object that was asked for."
        messages = [*first, said, {"role": "user", "content": demand}]


def _limit(question: Question) -> tuple[str, int]:
    """The parameter that limits an answer, and its tokens: more for a long run, unless judges.yaml sets them."""
    name, limit = question.judge.limit
    if question.per_run and name not in question.judge.parameters:
        limit = max(limit, _TOKENS_A_STEP * len(question.prompts))
    return name, limit


def _ask(question: Question, messages: Sequence[Mapping[str, str]], limit: Mapping[str, int], attempt: int) -> Ask:
    judge = question.judge
    body = {"messages": list(messages), **judge.parameters, **limit, **_response_format(question)}
    asked = [judge.model, body, question.rubric.sha256, attempt, question.repeat]
    key = hashlib.sha256(json.dumps(asked, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    return Ask(key.hexdigest(), body, attempt, next(iter(limit.values())))


def _response_format(question: Question) -> dict[str, Any]:
    if question.judge.json == "prompt":
        return {}
    if question.judge.json == "object":
        return {"response_format": {"type": "json_object"}}
    schema = _run_schema(question) if question.per_run else _step_schema(question.rubric)
    named = {"name": "verdict", "schema": schema, "strict": True}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def _step_schema(rubric: Rubric) -> dict[str, Any]:
    """The answer's schema. Reasons come first, so that the judge reasons before it writes its score."""
    number = {"type": "number", "minimum": 0, "maximum": 1}
    scores = dict.fromkeys(rubric.keys, number)
    given: dict[str, Any] = {"reasoning": {"type": "string"}}
    if rubric.error_types:
        given["error_type"] = {"type": "string", "enum": list(rubric.error_types)}
    given |= scores if len(rubric.keys) == 1 else {"scores": _object(scores)}
    return _object(given)


def _run_schema(question: Question) -> dict[str, Any]:
    step = _step_schema(question.rubric)
    one = _object({"step": {"type": "integer"}, **step["properties"]})
    return _object({"steps": {"type": "array", "items": one}})


def _object(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object", "properties": dict(properties), "required": list(properties), "additionalProperties": False,
    }  # fmt: skip


# --- answers ----------------------------------------------------------------------------------------------------------


def _read(question: Question, answer: Mapping[str, Any]) -> Mapping[int, Verdict] | str:
    """The verdicts in an answer, or why there are none."""
    text = answer["text"]
    if not text.strip():
        return "the answer is empty"
    shape = asked_shape(next(iter(question.prompts.values())))
    if question.per_run:
        return _read_run(text, question.prompts, shape)
    verdict = read_verdict(text, shape)
    ((step, _),) = question.prompts.items()
    return verdict.reason if isinstance(verdict, Unreadable) else {step: verdict}


def _read_run(text: str, prompts: Mapping[int, str], shape: Shape | None) -> Mapping[int, Verdict] | str:
    """Every step of a run from one answer. It must have exactly these steps: shifted numbers make all wrong."""
    body = text.strip().removeprefix("```json").removeprefix("```").removesuffix("```")
    try:
        given = json.loads(body, object_pairs_hook=unique_members)
        entries = {entry.pop("step"): entry for entry in given["steps"]}
    except Refusal as refusal:
        return refusal.reason
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return 'not {"steps": [{"step": 1, …}, …]}'
    numbered = all(type(step) is int for step in entries)  # True would be taken for 1
    if not numbered or entries.keys() != prompts.keys() or len(given["steps"]) != len(entries):
        return f"steps {sorted(map(str, entries))[:9]} instead of 1 to {len(prompts)}, each once"
    verdicts: dict[int, Verdict] = {}
    for step, entry in entries.items():
        verdict = read_verdict(json.dumps(entry), shape)
        if isinstance(verdict, Unreadable):
            return f"step {step}: {verdict.reason}"
        verdicts[step] = verdict
    return verdicts


# --- questions --------------------------------------------------------------------------------------------------------


def questions_of(
    run: Trajectory, judge: StrongJudge, rubric: Rubric, *, per_run: bool, with_reference: bool
) -> Iterator[Question]:
    """The questions about one run to one judge: one for each step, or one for all."""
    prompts = {prompt.step.n: prompt.text for prompt in step_prompts(run, rubric)}
    shown = with_reference and run.reference is not None
    extra = f"\n{_reference(run)}" if shown else ""
    if per_run:
        yield Question(judge, run, rubric, run_prompt(run, rubric) + extra, prompts, True, reference_shown=shown)
        return
    for step, text in prompts.items():
        yield Question(judge, run, rubric, text + extra, {step: text}, False, reference_shown=shown)


def _reference(run: Trajectory) -> str:
    return (
        f"For you alone, what the agent did not see, a correct solution:\n<reference>\n{run.reference}\n</reference>\n"
    )


def is_drawn(share: float, *names: str) -> bool:
    """Whether something is in a random share, decided by a hash of its names, so always in the same way."""
    place = int.from_bytes(hashlib.sha256("\n".join(names).encode("utf-8", "surrogatepass")).digest()[:8])
    return place < share * 2**64
