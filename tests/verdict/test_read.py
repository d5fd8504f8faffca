"""Verdicts: what is read, what is refused, and that nothing is ever made up."""

import json
import re
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prmkit.verdict import (
    Shape,
    Unreadable,
    Verdict,
    answer_prefix,
    asked_shape,
    read_verdict,
    render_verdict,
)

PLAIN = '{"reasonableness_score": 0.9, "summary": "The agent searched and found it."}'
DRAFT = '{"reasonableness_score": 0.3, "summary": "Draft."}'
UNQUOTED = "{'reasonableness_score': 0.3, summary: 'Draft.'}"
NESTED = (
    '{"scores": {"quality": 0.5, "goal": 0.85}, "summary": "Fine.", "reasoning": {"quality": "Good.", "goal": "Met."}}'
)


def read(text: str) -> Verdict:
    verdict = read_verdict(text)
    assert isinstance(verdict, Verdict), f"{verdict.reason}: {text}"
    return verdict


def reason(text: str) -> str:
    verdict = read_verdict(text)
    assert isinstance(verdict, Unreadable), f"{verdict}: {text}"
    assert verdict.kind
    return verdict.reason


# --- what is read -------------------------------------------------------------------------------------------------


def test_json_as_it_stands_is_read_without_repair() -> None:
    verdict = read(NESTED)
    assert verdict.scores == {"quality": 0.5, "goal": 0.85}
    assert verdict.nested
    assert verdict.texts == {"summary": "Fine.", "reasoning": {"quality": "Good.", "goal": "Met."}}
    assert verdict.repairs == ()


@pytest.mark.parametrize(
    ("text", "repair"),
    [
        (f"```json\n{PLAIN}\n```", "fenced"),
        (f"```\n{PLAIN}", "fenced"),
        (f"Here is my evaluation:\n{PLAIN}\nI hope it helps.", "prose around the answer"),
        (f'The call {{"name": "search"}} was apt.\n{PLAIN}', "prose around the answer"),
        (f'<think>Perhaps {{"reasonableness_score": 0.1}}?</think>\n{PLAIN}', "thought before the answer"),
        (PLAIN.replace(" and ", "\nand\t"), "control characters in a string"),
        (PLAIN.replace("searched", 'searched "the web"'), "quotes in a string"),
        (PLAIN.replace("it.", 'the "page", and "it"'), "quotes in a string"),
        (PLAIN.replace('"}', '",\n}'), "trailing comma"),
        (PLAIN.replace(", ", ",  // from 0.0 to 1.0\n", 1), "comment"),
        (PLAIN.replace(", ", " /* high */, ", 1), "comment"),
        (PLAIN.replace(", ", "\n", 1), "missing comma"),
        (PLAIN.replace("found", r"found C:\data\new"), "stray backslash"),
        (PLAIN[:-20], "cut off"),
        (PLAIN[:-1], "cut off"),
        (PLAIN.replace('"', "'"), "syntax"),
        (PLAIN.replace('"reasonableness_score"', "reasonableness_score"), "syntax"),
        (f"[{PLAIN}]", "list around the object"),
        (f'{{"evaluation": {PLAIN}}}', "object around the object"),
    ],
)
def test_an_answer_that_is_not_json_is_repaired_and_marked(text: str, repair: str) -> None:
    verdict = read(text)
    assert verdict.scores == {"reasonableness_score": 0.9}
    assert repair in verdict.repairs


def test_quotes_and_newlines_stay_in_the_text() -> None:
    text = PLAIN.replace("searched", 'asked\nfor "the web"')
    assert read(text).texts["summary"] == 'The agent asked\nfor "the web" and found it.'


def test_the_last_text_of_an_answer_that_was_cut_off_ends_behind_its_last_whole_sentence() -> None:
    cut = '{"a_score": 0.9, "summary": "It searched the web (v1.2). Then it fou'
    assert read(cut).texts["summary"] == "It searched the web (v1.2)."
    assert read('{"a_score": 0.9, "summary": "它搜索了。然后').texts["summary"] == "它搜索了。"
    assert read(PLAIN[: PLAIN.index("nd it")]).texts == {}, "there is none"
    cut = '{"scores": {"a": 0.9}, "summary": "S.", "reasoning": {"a": "No whole sen'
    assert read(cut).texts == {"summary": "S."}
    cut = "{'a_score': 0.9, 'summary': 'It was good. The agent sear"
    assert read(cut).texts == {"summary": "It was good."}, "json-repair's readings, too"
    assert read('{"a_score": 0.9, "steps": ["It was good. Then", "so"], "why": ["Because. And th').texts == {
        "steps": ["It was good. Then", "so"],
        "why": ["Because."],
    }


@pytest.mark.parametrize(
    "thought",
    [
        "Excellent use.",
        "Each step.",
        "0.95 because it met all.",
        "0.9 - good",
        "2 searches",
        "- good",
        ".",
        "12,000 hits",
    ],
)
def test_what_is_thought_of_a_score_is_no_second_score(thought: str) -> None:
    """The keys of the scores stand once more in a keyed reasoning, with texts that may begin like numbers."""
    answer = {"scores": {"a": 0.95, "b": 0.8}, "summary": "s", "reasoning": {"a": thought, "b": "Good."}}
    for indent in (None, 4):
        verdict = read(json.dumps(answer, indent=indent))
        assert verdict.scores == answer["scores"]
        assert read(render_verdict(verdict)) == verdict
    assert read(json.dumps(answer, indent=4).replace("Good.", 'Go "on".')).scores == answer["scores"]


@pytest.mark.parametrize(
    ("written", "summary"),
    [
        ('The call {"query": "x"} was fine.', None),
        ('Called search with {"query": "x", "page": 1}.', None),
        ('Asked for ["a", "b"] and more.', None),
        ('He ranked "X" #1 in the list.', None),
        ('See "A" // "B" there.', None),
        (r"It\'s the agent\'s.", "It's the agent's."),
        (r"\frac{1}{2} and \beta.", r"\frac{1}{2} and \beta."),
        ("The <think>x</think> is\nfine.", None),
        ("Used ```json\n[1]\n``` here.", None),
    ],
)
@pytest.mark.parametrize("layout", ["{%s, %s}", "```json\n{%s, %s}\n```", "Here:\n```\n{\n  %s,\n  %s\n}\n```\nDone."])
@pytest.mark.parametrize("summary_first", [False, True])
def test_a_text_may_quote_anything(written: str, summary: str | None, layout: str, summary_first: bool) -> None:
    members = ['"a_score": 0.85', f'"summary": "{written}"']
    verdict = read(layout % tuple(reversed(members) if summary_first else members))
    assert (verdict.scores, verdict.texts) == ({"a_score": 0.85}, {"summary": summary or written})


@pytest.mark.parametrize(
    ("text", "nested"),
    [
        ('{"scores": {"a": 0.9}}, "summary": "s", "reasoning": "r"}', True),
        ('{"a_score": 0.9}, "summary": "s", "reasoning": "r"}', False),
    ],
)
def test_an_object_that_is_closed_too_early_is_read_to_its_end(text: str, nested: bool) -> None:
    verdict = read(text)
    assert (verdict.nested, verdict.texts) == (nested, {"summary": "s", "reasoning": "r"})
    assert "brace that closes too early" in verdict.repairs


@pytest.mark.parametrize(
    "text",
    [
        f'{PLAIN}\nThe tool call was:\n```json\n{{"query": "x", "max_results": 1}}\n```',
        f'The call {{"query": "x", "page": 1}} was apt. So:\n{PLAIN}',
        f"Arguments {{'query': 'x', 'page': 1}}.\n{PLAIN}",
        f'```json\n{{"max_results": 1}}\n```\n{PLAIN}',
        f"<thinking>Draft:\n```json\n{DRAFT}\n```\nToo harsh.</thinking>\n{PLAIN}",
        f"<think>Its `<think> … </think>` is fine. Draft: {DRAFT}</think>\n{PLAIN}",
        f"Perhaps {DRAFT}?\n</think>\n\n{PLAIN}",
        f'{{"task_id": "x", "evaluation": {PLAIN}}}',
        f'{{"clip_number": 1, "evaluation": {PLAIN}}}',
        PLAIN.replace("reasonableness_score", "reasonableness_score:"),
        PLAIN.replace("reasonableness_score", " reasonableness_score "),
        f"{PLAIN}\n{PLAIN}",
    ],
)
def test_the_verdict_is_found_among_other_things(text: str) -> None:
    assert read(text).scores == {"reasonableness_score": 0.9}


def test_the_same_verdict_twice_is_one() -> None:
    assert read(f"{NESTED}\n{NESTED}").scores == {"quality": 0.5, "goal": 0.85}


@pytest.mark.parametrize(
    ("written", "score"),
    [("0.9", 0.9), ("1", 1.0), ("0", 0.0), ('"0.9"', 0.9), ('"90%"', 0.9), ('"90 %"', 0.9), ("9e-1", 0.9),
     ("0.856", 0.86), ("-0.0", 0.0), ('".9"', 0.9)],
)  # fmt: skip
def test_numbers_as_judges_write_them(written: str, score: float) -> None:
    assert read(PLAIN.replace("0.9", written)).scores == {"reasonableness_score": score}


def test_scores_of_any_name() -> None:
    assert read('{"elegance": 0.4, "summary": "s"}').scores == {"elegance": 0.4}
    assert read('{"scores": {"Güte": 0.4}}').scores == {"Güte": 0.4}


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "empty answer"),
        (" \n\ufeff ", "empty answer"),
        ("I cannot judge this.", "no JSON object"),
        ("[]", "no JSON object"),
        ("0.9", "no JSON object"),
        ('{"summary": "s"}', "no score"),
        ('{"scores": {}, "summary": "s"}', "no score"),
        ('{"reasonableness_score": 1.7}', "score 1.7 of reasonableness_score out of range"),
        ('{"reasonableness_score": -0.1}', "score -0.1 of reasonableness_score out of range"),
        ('{"reasonableness_score": 85}', "score 85 of reasonableness_score out of range"),
        ('{"reasonableness_score": true}', "score True of reasonableness_score is not a number"),
        ('{"reasonableness_score": null}', "score None of reasonableness_score is not a number"),
        ('{"reasonableness_score": "high"}', "score high of reasonableness_score is not a number"),
        ('{"reasonableness_score": "8/10"}', "score 8/10 of reasonableness_score is not a number"),
        ('{"reasonableness_score": NaN}', "NaN is not a JSON number"),
        ('{"reasonableness_score": ' + "1" * 5_000 + "}", "score 1111111111111111111111111111111111111... of "
         "reasonableness_score out of range"),
        ('{"summary": "s', "cut off before the first score"),
        ("{", "cut off before the first score"),
        ('<think>Perhaps {"reasonableness_score": 0.1}', "cut off before the first score"),
        ('{"reasonableness_score": 0.8', "cut off inside the scores"),
        ('{"reasonableness_score": 0.9, "correctness_score": 0.', "cut off inside the scores"),
        ('{"scores": {"a": 0.5, "b": 0.8', "cut off inside the scores"),
        ('{"scores": {"a": 0.5, ', "cut off inside the scores"),
        (PLAIN + PLAIN.replace("0.9", "0.3"), "two different scores for reasonableness_score"),
        ('{"a_score": 0.1}\n{"b_score": 0.2}', "two verdicts that differ"),
        ('{"scores": {"a": 0.1}, "scores": {"b": 0.2}}', "two objects of scores"),
        ('{"a_score": 0.1, "a_score": 0.2}', "two different scores for a_score"),
        ('{"scores": {"a": 0.1}, "final_score": 0.2}', "scores both inside and outside of `scores`"),
        ('{"a_score": 0.1, "x": ' + "[" * 3_000 + "]" * 3_000 + "}", "nested too deeply"),
        ('{"a_score": 0.1, "x": ' + "[" * 600 + "]" * 600 + "}", "nested too deeply"),
        ("x" * 200_001, "longer than 200,000 characters"),
        ('{"reasonableness_score": "0.95%"}', "score 0.95% of reasonableness_score is not a number"),
        ("{'reasonableness_score': 01}", "score 1 of reasonableness_score is unclear"),
        ("{'a_score': 0.85, 'summary': 's', 'a_score': 0.65}", "two different scores for a_score"),
        (f"Clip 1 got {UNQUOTED}. Clip 2:\n{PLAIN}", "two different scores for reasonableness_score"),
        (f"{PLAIN}\nWait:\n{UNQUOTED}", "two different scores for reasonableness_score"),
        (f"```json\n{DRAFT}\n```\nWait. Corrected:\n{PLAIN}", "two different scores for reasonableness_score"),
        (f"{DRAFT}\nIn the end:\n```json\n{PLAIN}\n```", "two different scores for reasonableness_score"),
        (f'{PLAIN}\n\nCorrection: "reasonableness_score": 0.35', "two different scores for reasonableness_score"),
        (f'{PLAIN}\n{{"correctness_score": 0.1, "summary": "a "b" c"}}', "two verdicts that differ"),
        ("[{'a_score': 0.9}, {'a_score': 0.3}]", "two different scores for a_score"),
        ('{"clip_1": {"a_score": 0.9}, "clip_2": {"a_score": 0.3}}', "several objects with scores"),
        ('{"error": "rate limit exceeded", "retry_after": 1}', "no score"),
        ('{"scores": [0.85, 0.8], "confidence": 0.9}', "no score"),
        ('{\n **"scores"**: {"a": 0.5}, "summary": "s"}', "the scores stand in no object"),
        ('{"a_score": 0.9, "summary": "He said "x"} and "y"} so", "more": "r"}', "unclear where the answer ends"),
        ('{"scores": {' + ", ".join(f'"k{n}": 0.5' for n in range(101)) + "}}", "more than 100 scores"),
        ('```{"```json{``````', "not to be repaired"),
    ],
)  # fmt: skip
def test_every_refusal_has_its_reason(text: str, expected: str) -> None:
    assert reason(text) == expected


def asked_for(text: str, *keys: str, nested: bool = False) -> dict[str, float] | str:
    verdict = read_verdict(text, Shape(keys, nested))
    return dict(verdict.scores) if isinstance(verdict, Verdict) else verdict.reason


def test_what_was_asked_for_tells_scores_from_other_numbers() -> None:
    assert asked_for('{"elegance": 0.4, "clip_number": 1}', "elegance") == {"elegance": 0.4}
    assert asked_for('{"code": 0, "message": "internal error"}', "elegance") == "no score"
    assert asked_for('{"Elegance": "0.4", "depth": 0.5}', "elegance", "depth") == {"elegance": 0.4, "depth": 0.5}
    assert asked_for(PLAIN.replace("reasonableness_score", "Reasonableness Score"), "reasonableness_score") == {
        "reasonableness_score": 0.9
    }
    assert asked_for(PLAIN, "correctness_score") == {"reasonableness_score": 0.9}, "named by the judge itself"
    quoted = 'It found {"title": "x", "score": 0.93, ...}.'
    assert asked_for(quoted, "correctness_score") == "other scores than were asked for"
    assert asked_for('{"a_score": 0.9, "summary": "cut', "a_score", "b_score") == "cut off inside the scores"
    assert asked_for('{"scores": {"a": 0.9}, "b": 0.8}', "a", "b", nested=True) == "b stands among the texts"


@pytest.mark.parametrize(
    "text",
    ["```" + " " * 190_000 + "x", PLAIN + "{" * 150_000, '{"a_score": 0.9, "b": {"a_score":' + " " * 190_000 + '"x"}}'],
)
def test_no_text_takes_long(text: str) -> None:
    started = time.process_time()
    read_verdict(text)
    assert time.process_time() - started < 2


def test_a_decimal_comma_is_no_zero() -> None:
    assert "reasonableness_score" in reason('{"reasonableness_score": 0,85, "summary": "s"}')


def test_refusals_are_counted_by_kind() -> None:
    kinds = {read_verdict(f'{{"a_score": {number}}}').kind for number in ("1.7", "2.0", "-3")}  # type: ignore[union-attr]
    assert kinds == {"a score is out of range"}


# --- nothing is made up -------------------------------------------------------------------------------------------

# Form feed and backspace, as JSON writes them, are read as the backslashes that judges mean.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\f\b"), max_size=40)
keys = st.text("abcdefghijklmnopqrstuvwxyz_ é", min_size=1, max_size=12).map(str.strip).filter(bool)
values = st.recursive(
    texts | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=5,
)
scores = st.dictionaries(
    keys.map(lambda key: key + "_score"), st.integers(0, 100).map(lambda n: n / 100), min_size=1, max_size=4
)
verdicts = st.builds(
    Verdict, scores, st.booleans(), st.dictionaries(keys.filter(lambda key: "score" not in key), values, max_size=3)
)


@given(verdicts)
@settings(deadline=None)
def test_rendering_then_reading_gives_the_same_verdict(verdict: Verdict) -> None:
    label = render_verdict(verdict)
    again = read(label)
    assert again == verdict
    assert again.repairs == ()
    assert list(again.scores) == list(verdict.scores)
    assert json.loads(label)
    assert label.startswith(answer_prefix(verdict.shape, verdict.scores))


@given(st.text(max_size=400) | st.text('{}[]":,.0123456789eE%-+ \n\\/`ascoresumy', max_size=300))
@settings(max_examples=200, deadline=None)
def test_any_text_gives_a_verdict_or_a_reason(text: str) -> None:
    verdict = read_verdict(text)
    if isinstance(verdict, Verdict):
        assert all(0 <= score <= 1 for score in verdict.scores.values())
        assert read(render_verdict(verdict)).scores == verdict.scores
    else:
        assert verdict.reason
        assert verdict.kind


def layouts(verdict: Verdict) -> st.SearchStrategy[str]:
    placed = {"scores": dict(verdict.scores)} if verdict.nested else dict(verdict.scores)
    answer = placed | dict(verdict.texts)
    return st.sampled_from([None, 4]).map(lambda indent: json.dumps(answer, indent=indent, ensure_ascii=False))


@given(verdicts.flatmap(lambda verdict: st.tuples(st.just(verdict), layouts(verdict))), st.data())
@settings(max_examples=150, deadline=None)
def test_an_answer_that_is_cut_off_never_gives_another_score(made: tuple[Verdict, str], data: st.DataObject) -> None:
    verdict, text = made
    cut = text[: data.draw(st.integers(0, len(text)))]
    read_again = read_verdict(cut)
    if isinstance(read_again, Verdict):
        assert all(verdict.scores.get(key) == score for key, score in read_again.scores.items())
        if verdict.nested:
            assert read_again.scores == verdict.scores


FAULTS = [
    lambda text, at: text[:at] + '"' + text[at:],
    lambda text, at: text[:at] + "\n" + text[at:],
    lambda text, at: text[:at] + "\\" + text[at:],
    lambda text, at: text[:at] + " // see above\n" + text[at:],
    lambda text, at: text[:at] + text[at + 1 :],
    lambda text, at: text[:at] + ' "and so", it "went" ' + text[at:],
]


@given(
    verdicts.flatmap(lambda verdict: st.tuples(st.just(verdict), layouts(verdict))),
    st.sampled_from(FAULTS),
    st.data(),
)
@settings(max_examples=200, deadline=None)
def test_a_fault_in_the_texts_never_changes_a_score(
    made: tuple[Verdict, str], fault: Callable[[str, int], str], data: st.DataObject
) -> None:
    verdict, text = made
    names = "|".join(re.escape(json.dumps(key, ensure_ascii=False)) for key in verdict.scores)
    behind_scores = max(match.end() for match in re.finditer(rf"(?:{names}): [\d.]+", text))
    faulty = fault(text, data.draw(st.integers(behind_scores, len(text) - 1)))
    read_again = read_verdict(faulty)
    if isinstance(read_again, Verdict):
        assert {key: verdict.scores.get(key) for key in read_again.scores} == read_again.scores


# --- the canonical form and what is asked for ---------------------------------------------------------------------


def test_labels_have_one_form() -> None:
    label = render_verdict(read('{"summary": "Ünïcode \\"quoted\\"", "correctness_score": 1}'))
    assert label == '{"correctness_score": 1.00, "summary": "Ünïcode \\"quoted\\""}'
    assert render_verdict(read(NESTED)).startswith('{"scores": {"quality": 0.50, "goal": 0.85}, "summary": "Fine."')


def test_the_prefix_goes_up_to_the_score_that_comes_next() -> None:
    shape = Shape(("a", "b"), nested=True)
    assert answer_prefix(shape, {}) == '{"scores": {"a": '
    assert answer_prefix(shape, {"a": 0.5}) == '{"scores": {"a": 0.50, "b": '
    assert answer_prefix(shape, {"a": 0.5, "b": 1.0}) == '{"scores": {"a": 0.50, "b": 1.00'


@pytest.mark.parametrize(
    ("prompt", "shape"),
    [
        ('Answer:\n{\n  "clip_score": 0.85,  // c\n  "summary": "s"\n}', Shape(("clip_score",), False)),
        ('{"a_score": 0.8, // c\n "b_score": 0.7, "summary": "s"}', Shape(("a_score", "b_score"), False)),
        ('Answer: {"a_score": 0.1}' + "x" * 5_000, Shape(("a_score",), False)),
        ('Answer:\n{"scores": {"a": 0.1,\n "b": 0.2}, "summary": "s"}\n\nBe fair.', Shape(("a", "b"), True)),
        ('<result>{"scores": {"x": 1}}</result> Answer: {"last_score": 0.9}', Shape(("last_score",), False)),
        ('<result>{"x_score": 1}</result> Answer: {"scores": {"a": 0.1}}', Shape(("a",), True)),
        ("How good was it?", None),
    ],
)  # fmt: skip
def test_the_shape_that_a_prompt_asks_for_is_the_last_one_in_it(prompt: str, shape: Shape | None) -> None:
    assert asked_shape(prompt) == shape
