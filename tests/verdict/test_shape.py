"""Which scores a prompt asks for."""

import pytest

from prmkit.verdict import Shape, asked_shape


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
        ('Reply as JSON: {"reason": "...", "score": 0.7}', Shape(("score",), False)),
        ('Answer in JSON: [{"name": "a", "score": 0.7}, {"name": "b", "score": 0.8}]', None),
        ('Found: [{"title": "t", "url": "u", "score": 0.93}]\nHow good was it?', None),
        ("How good was it?", None),
    ],
)  # fmt: skip
def test_the_shape_that_a_prompt_asks_for_is_the_last_one_in_it(prompt: str, shape: Shape | None) -> None:
    assert asked_shape(prompt) == shape


def test_a_long_prompt_is_read_from_its_end() -> None:
    schema = '{"a_score": 0.7, "summary": "..."}'
    prompt = '{"x": {' * 3_000 + '"score": 0.1}' + f"\n\nAnswer in JSON:\n{schema}\n\nBe fair."
    assert asked_shape(prompt) == Shape(("a_score",), False)
