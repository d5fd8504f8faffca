"""From runs and answers to finetune.jsonl: no network, and the same bytes every time."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from prmkit.collection.questions import Answers, Ask, Question, next_of
from prmkit.trajectories.rows import step_metadata
from prmkit.verdict import Verdict, render_verdict


@dataclass
class Tally:
    """What became of the questions."""

    asked: Counter[str] = field(default_factory=Counter)
    """Steps, by judge; repetitions do not count."""
    missing: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Steps without a verdict, by judge and reason."""
    repeated: dict[str, list[float]] = field(default_factory=dict)
    """How far a judge's second scores are from its first ones, by judge."""

    @property
    def share_missing(self) -> float:
        """Of all steps that were asked for."""
        return self.missing.total() / self.asked.total() if self.asked else 0.0


def rows_of_answers(
    questions: Iterable[Question], answers: Answers, failures: dict[tuple[str, str, bool], str], tally: Tally
) -> Iterator[dict[str, Any]]:
    """One row for each step with a verdict, in the order of the questions.

    Args:
        questions: those of all judges.
        answers: what was answered.
        failures: why questions have no answer, where that is known.
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
            continue
        for step, prompt in question.prompts.items():
            score = sum(verdicts[step].scores.values()) / len(verdicts[step].scores)
            place = (judge, question.run.trajectory_id, step)
            if question.repeat and place in scores:
                tally.repeated.setdefault(judge, []).append(abs(score - scores[place]))
            scores.setdefault(place, score)
            yield _row(question, step, prompt, verdicts[step], found.answer)


def _row(question: Question, step: int, prompt: str, verdict: Verdict, answer: Any) -> dict[str, Any]:
    metadata = {
        "model_name": question.judge.name,
        "provider": question.judge.host,
        "evaluation_type": "clip",
        "category": None,
        "timestamp": datetime.fromtimestamp(answer["time"], UTC).strftime("%Y-%m-%d %H:%M:%S"),
        **step_metadata(question.run, step, question.rubric),
        "per": "run" if question.per_run else "step",
        "reference_shown": question.reference_shown,
    }
    if question.repeat:
        metadata["repeat"] = True
    if question.selection:
        metadata |= {"selected_by": question.selection[0], "selection_weight": question.selection[1]}
    said = [{"from": "human", "value": prompt}, {"from": "gpt", "value": render_verdict(verdict)}]
    return {"conversations": said, "metadata": metadata}
