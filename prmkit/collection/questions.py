"""Pure functions from runs, judges and stored answers to the next requests and the results.

Every question is a chain of requests: if an answer was cut off, it is requested once more with twice the tokens; if it
cannot be read, up to two more times with the reason. Each request has a key, the hash of everything sent. So the same
function picks the next request during the collection and derives the result later, even with a newer verdict parser.
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
_TOKENS_PER_STEP = 100
"""Tokens per step in an answer about a complete run: a score, the type of an error, and one or two sentences."""
_QUOTED = 2000
"""The maximum number of characters of an unreadable answer to send back with the reason."""

Answers = Mapping[str, Mapping[str, Any]]
"""Key -> answer (a line of answers.jsonl)."""


@dataclass(frozen=True)
class Question:
    """A question to one judge about one step, or about all steps of a run in one request."""

    judge: StrongJudge
    run: Trajectory
    rubric: Rubric
    text: str
    """The text sent to the judge."""
    prompts: Mapping[int, str]
    """Step number -> prompt, as in the rows and as the trained judge will get it."""
    per_run: bool
    repeat: bool = False
    """Whether the judge is asked a second time, to measure its self-agreement."""
    reference_shown: bool = False
    selection: tuple[str, float] | None = None
    """Why the step was selected, and the inverse of its selection probability; None if all steps are asked about."""

    @property
    def name(self) -> str:
        """The name of the step or the run in messages."""
        return self.run.trajectory_id if self.per_run else f"{self.run.trajectory_id}#{next(iter(self.prompts))}"


@dataclass(frozen=True)
class NextRequest:
    """The next request to send."""

    key: str
    body: Mapping[str, Any]
    """The messages and parameters; the model's name is sent as well."""
    attempt: int
    most_tokens: int
    """The maximum number of tokens of the answer."""

    @property
    def prompt_tokens(self) -> int:
        """The estimated number of tokens of the messages."""
        return sum(tokens(str(message["content"])) + 4 for message in self.body["messages"])


@dataclass(frozen=True)
class QuestionResult:
    """The final result of a question."""

    verdicts: Mapping[int, Verdict]
    """Step -> verdict; empty if nothing could be read."""
    reason: str | None = None
    """The reason why there are no verdicts."""
    answer: Mapping[str, Any] | None = None
    """The last line of answers.jsonl that was used."""


def next_of(question: Question, answers: Answers) -> NextRequest | QuestionResult:
    """Replay a question's chain of requests; return the next request or the result."""
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
            return QuestionResult(read, answer=answer)
        if again == _ASKED_AGAIN:
            if answer["finish_reason"] == "length":
                read = f"cut off at {limit} tokens; raise {limit_name} ({read})"
            return QuestionResult({}, read, answer)
        again += 1
        said = {"role": "assistant", "content": answer["text"][:_QUOTED] or "(nothing)"}
        demand = f"This cannot be used: {read}. Answer again, with nothing but the JSON object that was asked for."
        messages = [*first, said, {"role": "user", "content": demand}]


def _limit(question: Question) -> tuple[str, int]:
    """Return the parameter that limits an answer's tokens, and its value: judges.yaml's, or enough for a long run."""
    name, limit = question.judge.limit
    if question.per_run and name not in question.judge.parameters:
        limit = max(limit, _TOKENS_PER_STEP * len(question.prompts))
    return name, limit


def _ask(
    question: Question, messages: Sequence[Mapping[str, str]], limit: Mapping[str, int], attempt: int
) -> NextRequest:
    judge = question.judge
    body = {"messages": list(messages), **judge.parameters, **limit, **_response_format(question)}
    request = [judge.model, body, question.rubric.sha256, attempt, question.repeat]
    key = hashlib.sha256(json.dumps(request, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    return NextRequest(key.hexdigest(), body, attempt, next(iter(limit.values())))


def _response_format(question: Question) -> dict[str, Any]:
    if question.judge.json == "prompt":
        return {}
    if question.judge.json == "object":
        return {"response_format": {"type": "json_object"}}
    schema = _run_schema(question) if question.per_run else _step_schema(question.rubric)
    named = {"name": "verdict", "schema": schema, "strict": True}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def _step_schema(rubric: Rubric) -> dict[str, Any]:
    """Return the answer's schema. Reasons come first, so that the judge reasons before it writes its score."""
    number = {"type": "number", "minimum": 0, "maximum": 1}
    scores = dict.fromkeys(rubric.keys, number)
    properties: dict[str, Any] = {"reasoning": {"type": "string"}}
    if rubric.error_types:
        properties["error_type"] = {"type": "string", "enum": list(rubric.error_types)}
    properties |= scores if len(rubric.keys) == 1 else {"scores": _object(scores)}
    return _object(properties)


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
    """Return the verdicts in an answer, or the reason why there are none."""
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
    """Read the verdicts of all steps. Missing or extra steps are refused: later numbers may be shifted."""
    body = text.strip().removeprefix("```json").removeprefix("```").removesuffix("```")
    try:
        given = json.loads(body, object_pairs_hook=unique_members)
        entries = {entry.pop("step"): entry for entry in given["steps"]}
    except Refusal as refusal:
        return refusal.reason
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return 'not {"steps": [{"step": 1, …}, …]}'
    numbered = all(type(step) is int for step in entries)  # otherwise True would count as 1
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
    """Yield the questions about one run to one judge: one per step, or one about all steps."""
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
    """Return whether an item is in a random sample of this fraction; a hash of its names decides, so repeats agree."""
    position = int.from_bytes(hashlib.sha256("\n".join(names).encode("utf-8", "surrogatepass")).digest()[:8])
    return position < share * 2**64
