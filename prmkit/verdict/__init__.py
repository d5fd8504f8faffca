"""Reading a judge's answer, and writing it as a training label."""

from prmkit.verdict.read import read_answer, read_verdict, score_answer
from prmkit.verdict.types import (
    AGGREGATES,
    Answer,
    Scale,
    Shape,
    Unreadable,
    Verdict,
    answer_prefix,
    asked_shape,
    is_number,
    is_score_key,
    is_share,
    render_verdict,
)

__all__ = [
    "AGGREGATES",
    "Answer",
    "Scale",
    "Shape",
    "Unreadable",
    "Verdict",
    "answer_prefix",
    "asked_shape",
    "is_number",
    "is_score_key",
    "is_share",
    "read_answer",
    "read_verdict",
    "render_verdict",
    "score_answer",
]
