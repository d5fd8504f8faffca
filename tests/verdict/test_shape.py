"""Which scores a prompt asks for."""

import pytest

from prmkit.judge.scorer import ShapeOf
from prmkit.prompts.truncation import start_of_question
from prmkit.verdict import Shape, Verdict, asked_shape, is_score_key, read_verdict


@pytest.mark.parametrize(
    ("prompt", "shape"),
    [
        ('Answer:\n{\n  "clip_score": 0.85,  // c\n  "summary": "s"\n}', Shape(("clip_score",), False)),
        ('{"a_score": 0.8, // c\n "b_score": 0.7, "summary": "s"}', Shape(("a_score", "b_score"), False)),
        ('Answer: {"a_score": 0.1}' + "x" * 5_000, Shape(("a_score",), False)),
        ('Answer:\n{"scores": {"a": 0.1,\n "b": 0.2}, "summary": "s"}\n\nBe fair.', Shape(("a", "b"), True)),
        ('<result>{"scores": {"x": 1}}</result> Answer: {"last_score": 0.9}', Shape(("last_score",), False)),
        ('<result>{"x_score": 1}</result> Answer: {"scores": {"a": 0.1}}', Shape(("a",), True)),
        ('{"reasoning": "...", "a_score": 0.7}', Shape(("a_score",), False)),
        ('{"analysis": "...", "scores": {"a": 0.7, "b": 0.8}}', Shape(("a", "b"), True)),
        ('{"type": "object", "properties": {"why": {"type": "string"}, "a_score": {"type": "number"}}}',
         Shape(("a_score",), False)),
        ('{"properties": {"scores": {"properties": {"a": {"type": "number"}}}}}', Shape(("a",), True)),
        ('{"scores": {"a": {"score": 0.7, "reason": "..."}, "b": {"score": 0.8}}}', Shape(("a", "b"), True)),
        ('{"a": {"score": 0.7, "reason": "..."}, "b": {"score": 0.8, "reason": "..."}}', Shape(("a", "b"), False)),
        ('{"scores": [{"name": "a", "score": 0.7}, {"name": "b", "score": 0.8}]}', Shape(("a", "b"), True)),
        ('{"scores": [{"name": "<criterion>", "score": 0.7}]}', None),
        ("{“a_score”: 0.7}", Shape(("a_score",), False)),
        ("{'a_score': 0.7, 'why': '...'}", Shape(("a_score",), False)),
        ('{\n  // 0 to 1\n  "a_score": <float>, /* "b_score": */\n  "why": ...}', Shape(("a_score",), False)),
        ('{{"a_score": 0.7, "why": "..."}}', Shape(("a_score",), False)),
        ('Used {"x": {. Answer: {"evaluation": {"a_score": 0.7}, "why": "..."}', Shape(("a_score",), False)),
        ('Reply as JSON: {"Reason": "...", "Score": 0.7}', Shape(("Score",), False)),
        ('Found: [{"Title": "t", "Score": 0.93}]\nHow good was it?', None),
        ('{"overallScore": 0.7, "why": "..."}', Shape(("overallScore",), False)),
        ('{"scored": 0.7, "why": "..."}', None),
        ('Reply as JSON: {"reason": "...", "score": 0.7}', Shape(("score",), False)),
        ('Answer in JSON: [{"name": "a", "score": 0.7}, {"name": "b", "score": 0.8}]', None),
        ('Found: [{"title": "t", "url": "u", "score": 0.93}]\nHow good was it?', None),
        ("How good was it?", None),
    ],
)  # fmt: skip
def test_the_shape_that_a_prompt_asks_for_is_the_last_one_in_it(prompt: str, shape: Shape | None) -> None:
    assert asked_shape(prompt) == shape


@pytest.mark.parametrize("key", ["Score", "step_score", "overallScore", "STEP_SCORE"])
def test_the_case_of_a_score_key_changes_nothing(key: str) -> None:
    """Neither which key a prompt asks for, nor how its answer is read, nor which part of the prompt is the question."""
    prompt = f'Judge.\n\n{"A step. " * 20}\n\nRate it:\n{{"{key}": 0.0}}\n\n{"Be fair. " * 1_000}'
    shape = Shape((key,), nested=False)
    assert is_score_key(key) and asked_shape(prompt) == shape
    assert ShapeOf((key,))("x", "clip") == ShapeOf(known={"clip": [key]})("x", "clip") == shape
    for asked in (shape, None):
        verdict = read_verdict(f'{{"{key}": 0.5, "retries": 1}}', asked)
        assert isinstance(verdict, Verdict) and verdict.shape == shape
    assert prompt[start_of_question(prompt) :].startswith("Rate it:")


def test_a_long_prompt_is_read_from_its_end() -> None:
    schema = '{"a_score": 0.7, "summary": "..."}'
    prompt = '{"x": {' * 3_000 + '"score": 0.1}' + f"\n\nAnswer in JSON:\n{schema}\n\nBe fair."
    assert asked_shape(prompt) == Shape(("a_score",), False)


@pytest.mark.parametrize("data", ['{"name": "x", "credit_score": 710}', '{"match": "A-B", "scores": {"home": 1}}'])
def test_data_after_an_announced_schema_is_not_taken_for_the_schema(data: str) -> None:
    """The schema may come first; then nothing says which object is meant, and the judge's answers decide."""
    schema = 'Answer with JSON: {"score": <0 to 1>, "reason": "..."}'
    assert asked_shape(f"{schema}\nThe step:\nCall: find\nResult: {data}") is None
    assert asked_shape(f"The step:\nResult: {data}\n{schema}") == Shape(("score",), nested=False)
    assert asked_shape(f"The step:\nResult: {data}", system=schema) is None
    assert asked_shape("The step:\nResult: none", system=schema) == Shape(("score",), nested=False)
    assert asked_shape(f'{schema}\nResult: {data}\nAnswer in this format:\n```json\n{{"step_score": 0.5}}\n```') == (
        Shape(("step_score",), nested=False)
    )
