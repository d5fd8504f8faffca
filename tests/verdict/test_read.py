"""Verdicts: what is read, what is refused, and that nothing is ever made up."""

import json
import time
import tracemalloc
from collections.abc import Iterator
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prmkit.verdict import (
    Scale,
    Shape,
    Unreadable,
    Verdict,
    answer_prefix,
    read_answer,
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


def test_json_is_read_without_repair() -> None:
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
        (PLAIN.replace("searched", 'searched "the web"'), "syntax"),
        (PLAIN.replace("it.", 'the "page", and "it"'), "syntax"),
        (PLAIN.replace('"}', '",\n}'), "syntax"),
        (PLAIN.replace(", ", ",  // from 0.0 to 1.0\n", 1), "syntax"),
        (PLAIN.replace(", ", " /* high */, ", 1), "syntax"),
        (PLAIN.replace(", ", "\n", 1), "syntax"),
        (PLAIN.replace("found", r"found C:\data\new"), "syntax"),
        (PLAIN[:-20], "cut off"),
        (PLAIN[:-1], "cut off"),
        (PLAIN.replace('"', "'"), "syntax"),
        (PLAIN.replace('"reasonableness_score"', "reasonableness_score"), "syntax"),
    ],
)
def test_an_answer_that_is_not_json_is_repaired_and_marked(text: str, repair: str) -> None:
    verdict = read(text)
    assert verdict.scores == {"reasonableness_score": 0.9}
    assert repair in verdict.repairs


def test_quotes_and_newlines_stay_in_the_text() -> None:
    text = PLAIN.replace("searched", 'asked\nfor "the web"')
    assert read(text).texts["summary"] == 'The agent asked\nfor "the web" and found it.'


def test_the_last_text_of_an_answer_that_was_cut_off_ends_after_its_last_whole_sentence() -> None:
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
        ('Asked for ["a", "b"] and more.', None),
        ('He ranked "X" #1 in the list.', None),
        ('See "A" // "B" there.', None),
        (r"It\'s the agent\'s.", "It's the agent's."),
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
    "text",
    [
        '{"a_score": 0.85, "summary": "Called search with {"query": "x", "page": 1}."}',
        '{"scores": {"a_score": 0.85}}, "summary": "The object of the scores is closed too early."}',
        "{'a_score': 0.85, 'summary': 's', 'summary': 'another one'}",
    ],
)
def test_a_repair_that_splits_or_drops_a_text_keeps_the_scores_alone(text: str) -> None:
    verdict = read_verdict(text, Shape(("a_score",), nested=False))
    assert isinstance(verdict, Verdict), verdict.reason
    assert (verdict.scores, verdict.texts) == ({"a_score": 0.85}, {})
    assert verdict.repairs[-1] == "texts left out"
    assert isinstance(read_verdict(text), Unreadable)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"summary": "Then: "no", then "why": because.", "a_score": 0.85}', "repairing it would lose text"),
        ('{"summary": "It sent {"a_score": 0.85, "page": 1}."}', "the scores are not together in one object"),
        ("{'a_score': 0.85, 'summary': 's', 'a_score': 0.65}", "two different scores for a_score"),
    ],
)
def test_a_score_after_a_split_text_is_refused(text: str, why: str) -> None:
    verdict = read_verdict(text, Shape(("a_score",), nested=False))
    assert isinstance(verdict, Unreadable)
    assert verdict.reason == why


@pytest.mark.parametrize(
    "text",
    [
        f'{PLAIN}\nThe tool call was:\n```json\n{{"query": "x"}}\n```',
        f'The call {{"query": "x"}} was apt. So:\n{PLAIN}',
        f'```json\n{{"query": "x"}}\n```\n{PLAIN}',
        f"<thinking>Draft:\n```json\n{DRAFT}\n```\nToo harsh.</thinking>\n{PLAIN}",
        f"<think>Its `<think> … </think>` is fine. Draft: {DRAFT}</think>\n{PLAIN}",
        f"Perhaps {DRAFT}?\n</think>\n\n{PLAIN}",
        f'{{"task_id": "x", "evaluation": {PLAIN}}}',
        f'{{"clip_number": 1, "evaluation": {PLAIN}}}',
        f"[{PLAIN}]",
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


BOTH = Shape(("quality", "goal"), nested=True)
ONE = Shape(("reasonableness_score",), nested=False)


@pytest.mark.parametrize(
    ("text", "texts"),
    [
        ('{"scores": {"quality": {"score": 0.5, "reason": "Slow."}, "goal": {"score": 0.85, "reason": "Met."}}}',
         {"reasoning": {"quality": "Slow.", "goal": "Met."}}),
        ('{"scores": [{"name": "quality", "score": 0.5}, {"name": "goal", "score": 0.85}], "summary": "s"}',
         {"summary": "s"}),
        ('[{"criterion": "quality", "score": 0.5}, {"criterion": "goal", "score": 0.85}]', {}),
        ('{"goal": {"score": 0.85, "why": "Met."}, "quality": {"score": 0.5, "why": "Slow."}}',
         {"reasoning": {"quality": "Slow.", "goal": "Met."}}),
        ('{"criteria": {"quality": {"rating": 0.5}, "goal": {"rating": 0.85}}, "notes": "n"}', {"notes": "n"}),
        ('{"evaluation": {"quality": 0.5, "goal": 0.85}, "summary": "s"}', {"summary": "s"}),
        ('{"quality": 0.5, "goal": 0.85, "summary": "s"}', {"summary": "s"}),
        ('{"result": {"evaluation": {"scores": {"quality": 0.5, "goal": 0.85}}}}', {}),
        ('{"scores": {"quality": 0.5, "goal": 0.85}, "overall_score": 0.65, "confidence": 0.8}',
         {"overall_score": 0.65, "confidence": 0.8}),
        ('{"scores": {"quality": 0.5, "quality_summary": "Slow.", "goal": 0.85, "goal_summary": "Met."}}',
         {"quality_summary": "Slow.", "goal_summary": "Met."}),
        ('{"scores": {"Quality": 0.5, "GOAL": 0.85}, "summary": {"quality": "0.9 was near.", "goal": "Met."}}',
         {"summary": {"quality": "0.9 was near.", "goal": "Met."}}),
    ],
)  # fmt: skip
def test_scores_in_other_shapes_are_read_under_the_keys_that_were_asked_for(text: str, texts: dict[str, str]) -> None:
    verdict = read_verdict(text, BOTH)
    assert isinstance(verdict, Verdict), verdict.reason
    assert (verdict.scores, verdict.nested, verdict.texts) == ({"quality": 0.5, "goal": 0.85}, True, texts)
    assert read_verdict(render_verdict(verdict), BOTH) == verdict


@pytest.mark.parametrize(
    "text",
    ['{"reasonableness_score": {"score": 0.8}}', '{"reasonableness": {"score": 0.8}}', '{"reasonableness": 0.8}',
     '{"score": 0.8}', '{"scores": {"reasonableness_score": 0.8}}'],
)  # fmt: skip
def test_a_lone_score_is_the_one_that_was_asked_for(text: str) -> None:
    verdict = read_verdict(text, ONE)
    assert isinstance(verdict, Verdict), verdict.reason
    assert verdict.scores == {"reasonableness_score": 0.8}
    assert read('{"relevance": {"score": 0.9, "reason": "r"}}').scores == {"relevance": 0.9}, "never a key `score`"


@pytest.mark.parametrize(
    "text",
    ["{“reasonableness_score”: 0.9, “summary”: “He said “fine”.”}", "{”reasonableness_score”: 0.9, ”summary”: ”s”}",
     '{"reasonableness_score"：0.9，"summary"："好，很好。"}', '｛"reasonableness_score": 0.9, "summary": "s"｝',
     "{「reasonableness_score」: 0.9, 「summary」: 「s」}", "{«reasonableness_score»: 0.9, «summary»: «s»}",
     "{„reasonableness_score“: 0.9, „summary“: „s“}", '{"reasonableness_score": "０.９"}',
     '{"reasonableness_score": "0,9"}', '{"reasonableness_score":\u00a00.9,\u3000"summary": "s"}'],
)  # fmt: skip
def test_other_punctuation_is_read(text: str) -> None:
    assert read(text).scores == {"reasonableness_score": 0.9}


MARKERS = [
    ("<THINK>", "</THINK>"), ("<thinking>", "</thinking>"), ("<seed:think>", "</seed:think>"), ("[THINK]", "[/THINK]"),
    ("<reflection>", "</reflection>"), ("<antThinking>", "</antThinking>"), ("◁think▷", "◁/think▷"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"), ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    ("<|channel>thought\n", "<channel|>"), ("<unused94>thought\n", "<unused95>"), ("【思考】", "【/思考】"),
    ("<some_new_name>", "</some_new_name>"), ('<think budget="low">', "</think>"),
]  # fmt: skip


@pytest.mark.parametrize(("opening", "closing"), MARKERS)
@pytest.mark.parametrize(
    "layout", ["{0}Perhaps {1} No.{2}\n{3}", "{0}\n{1}\nNo.\n{2}\n\n```json\n{3}\n```", "So.{0}{1}{2}{3}"]
)
def test_a_thought_is_never_the_answer(opening: str, closing: str, layout: str) -> None:
    text = layout.format(opening, DRAFT, closing, PLAIN)
    assert read(text).scores == {"reasonableness_score": 0.9}
    cut = layout.format(opening, DRAFT, "", "It was too low. I will")
    assert reason(cut) == "cut off before the first score"


@pytest.mark.parametrize(
    "text",
    [f"<answer>{PLAIN}</answer>", f"<|begin_of_box|>{PLAIN}<|end_of_box|>", f"{PLAIN}<|im_end|>",
     f"My evaluation: {PLAIN}"],
)  # fmt: skip
def test_markers_of_an_answer_are_no_thoughts(text: str) -> None:
    assert read(text).scores == {"reasonableness_score": 0.9}


# --- scales -------------------------------------------------------------------------------------------------------


def test_values_are_read_as_they_are_written_and_scored_by_a_scale() -> None:
    answer = read_answer('{"scores": {"a": 7, "b": "pass", "c": true}}')
    assert not isinstance(answer, Unreadable)
    assert answer.values == {"a": 7, "b": "pass", "c": True}
    scale = Scale(1, 10, {"pass": 1.0, "true": 1.0})
    verdict = read_verdict('{"scores": {"a": 7, "b": "pass", "c": true}}', scale=scale)
    assert isinstance(verdict, Verdict)
    assert verdict.scores == {"a": 0.67, "b": 1.0, "c": 1.0}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("1", 0.0),
        ("10", 1.0),
        ("5.5", 0.5),
        ("0", None),
        ("11", None),
        ('"90%"', None),
        ('"no"', None),
        ("false", None),
    ],
)
def test_a_scale_is_a_range(value: str, expected: float | None) -> None:
    verdict = read_verdict(f'{{"a_score": {value}}}', scale=Scale(1, 10, {"yes": 1.0}))
    assert (verdict.scores["a_score"] if isinstance(verdict, Verdict) else None) == expected


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "empty answer"),
        (" \n\ufeff ", "empty answer"),
        ("I cannot judge this.", "no JSON object"),
        ("[]", "a list that is not one verdict"),
        ("0.9", "no JSON object"),
        ('{"summary": "s"}', "no score"),
        ('{"scores": {}, "summary": "s"}', "no score"),
        ('{"reasonableness_score": 1.7}', "score 1.7 of reasonableness_score is out of range"),
        ('{"reasonableness_score": -0.1}', "score -0.1 of reasonableness_score is out of range"),
        ('{"reasonableness_score": 85}', "score 85 of reasonableness_score is out of range"),
        ('{"reasonableness_score": true}', "score True of reasonableness_score is not a number"),
        ('{"reasonableness_score": null}', "score None of reasonableness_score is not a number"),
        ('{"reasonableness_score": "high"}', "score high of reasonableness_score is not a number"),
        ('{"reasonableness_score": "8/10"}', "score 8/10 of reasonableness_score is not a number"),
        ('{"reasonableness_score": NaN}', "NaN is not a JSON number"),
        ('{"reasonableness_score": ' + "1" * 5_000 + "}", "score 1111111111111111111111111111111111111... of "
         "reasonableness_score is out of range"),
        ('{"summary": "s', "cut off before the first score"),
        ("{", "cut off before the first score"),
        ('<think>Perhaps {"reasonableness_score": 0.1}', "cut off before the first score"),
        ('{"reasonableness_score": 0.8', "cut off inside the scores"),
        ('{"reasonableness_score": 0.9, "correctness_score": 0.', "cut off inside the scores"),
        ('{"scores": {"a": 0.5, "b": 0.8', "cut off inside the scores"),
        ('{"scores": {"a": 0.5, ', "cut off inside the scores"),
        (PLAIN + PLAIN.replace("0.9", "0.3"), "the scores share a line with other text"),
        (f"{PLAIN}\n{PLAIN.replace('0.9', '0.3')}", "two different verdicts"),
        ('{"a_score": 0.1}\n{"b_score": 0.2}', "two different verdicts"),
        ('{"scores": {"a": 0.1}, "scores": {"b": 0.2}}', "two different values for scores"),
        ('{"a_score": 0.1, "a_score": 0.2}', "two different values for a_score"),
        ('{"a_score": 0.1, "summary": "s", "summary": "t"}', "two different values for summary"),
        ('{"a_score": 0.1, "x": ' + "[" * 3_000 + "]" * 3_000 + "}", "nested too deeply"),
        ('{"a_score": 0.1, "x": ' + "[" * 600 + "]" * 600 + "}", "cannot be written as JSON (Recursion limit reached)"),
        ("x" * 200_001, "longer than 200,000 characters"),
        ('{"reasonableness_score": "0.95%"}', "score 0.95% of reasonableness_score is not a number"),
        ("{'reasonableness_score': 01}", "score 1 of reasonableness_score is unclear"),
        (f"Clip 1 got {UNQUOTED}. Clip 2:\n{PLAIN}", "the scores share a line with other text"),
        (f"{PLAIN}\nWait:\n{UNQUOTED}", "two different verdicts"),
        (f"```json\n{DRAFT}\n```\nWait. Corrected:\n{PLAIN}", "two different verdicts"),
        (f"{DRAFT}\nIn the end:\n```json\n{PLAIN}\n```", "two different verdicts"),
        (f'{PLAIN}\n\nCorrection: "reasonableness_score": 0.35', "the text around the answer may change it"),
        (f'{PLAIN}\n{{"correctness_score": 0.1, "summary": "a "b" c"}}', "two different verdicts"),
        ("[{'a_score': 0.9}, {'a_score': 0.3}]", "a list that is not one verdict"),
        ('{"clip_1": {"a_score": 0.9}, "clip_2": {"a_score": 0.3}}', "several objects with scores"),
        ('{"error": "rate limit exceeded", "retry_after": 1}', "no score"),
        ('{"scores": [0.85, 0.8], "confidence": 0.9}', "no score"),
        ('{\n **"scores"**: {"a": 0.5}, "summary": "s"}', "repairing it would lose text"),
        ('{"scores": {"a": "1/2"}}', "score 1/2 of a is not a number"),
        ('{"a_score": 1.0000001}', "score 1.0000001 of a_score is out of range"),
        (f"A first guess: {DRAFT} But no, it is too low. I will", "the scores share a line with other text"),
        (f"Perhaps `{DRAFT}`.", "the scores share a line with other text"),
        (f"A first guess:\n{DRAFT}\nThe page names it.", "the text around the answer may change it"),
        (f"{DRAFT}\nWait, the page names it.", "the text around the answer may change it"),
        (f"{DRAFT}\nThe score is 0.85.", "the text around the answer has another number"),
        (f"{DRAFT}\nReasonableness: **1**", "the text around the answer has another number"),
        (f"{DRAFT}\nOr 35 %.", "the text around the answer has another number"),
        ('{"a_score": 0.9}, "summary": "s"}', "repairing it would lose text"),
        ('{"scores": {"a": 0.9}\n},\n"summary": "s"}', "repairing it would lose text"),
        ('```json\n{"a_score": 0.8}5,\n"summary": "s"}\n```', "the scores share a line with other text"),
        (f"{DRAFT}\n<think>Hm.", "the text around the answer may change it"),
        (f"I cannot evaluate this step. A template:\n{DRAFT}", "the text around the answer may change it"),
        (f"{DRAFT}\nI'm unable to see the page.", "the text around the answer may change it"),
        (f"Example of the format:\n{DRAFT}", "the text around the answer may change it"),
        (f"{PLAIN}\nPlease ignore the above.", "the text around the answer may change it"),
        ('{"step": 1, "rating": "good"}', "no score"),
        ('{"id": 0, "verdict": "bad"}', "no score"),
        ('{"a_score": {"score": 0.9, "rating": 0.2}}', "two different scores for score and rating"),
        ('{"qua/lity_score": 0.5}', "a score is named qua/lity_score"),
        ('{"a_score": 0.5, " b_score": 0.5}', "a score is named  b_score"),
        ('{"a_score": "8.5%"}', "score 8.5% of a_score is not a number"),
        ('{"summary": "s", "evaluation": {"a_score": 0.5, "summary": "t"}}', "two different values for summary"),
        ('{"a_score": 0.9, "summary": "' + 'a "b" c' * 2_000 + '"}', "not JSON, and too long to be repaired"),
        ("".join(f'{{"x": {n}}}\n' for n in range(61)), "more than 60 objects"),
        (f"{DRAFT}\n<think>Too low?</think>", "no answer after the thought"),
        (f"{DRAFT}\nThe second page names it, so I", "cut off after the answer, which may have been a draft"),
        ('{"scores": {' + ", ".join(f'"k{n}": 0.5' for n in range(101)) + "}}", "more than 100 scores"),
    ],
)  # fmt: skip
def test_every_refusal_has_its_reason(text: str, expected: str) -> None:
    assert reason(text) == expected


def test_a_score_that_is_given_twice_has_one_value() -> None:
    twice = "two different scores for quality"
    assert asked_for('{"scores": {"quality": 0.7}, "quality": 0.2}', "quality", nested=True) == twice
    assert asked_for('{"quality_score": 0.9, "quality": 0.1}', "quality", nested=True) == twice
    assert asked_for('{"scores": {"quality": 0.7}, "quality": "Good."}', "quality") == twice  # flat, it has one place
    verdict = read_verdict('{"scores": {"quality": 0.7}, "quality": 0.70, "step": 2}', Shape(("quality",), nested=True))
    assert isinstance(verdict, Verdict) and verdict.texts == {"step": 2}
    explained = '{"scores": {"quality": 0.7}, "quality": "Good."}'
    assert asked_for(explained, "quality", nested=True) == {"quality": 0.7}


def test_a_misspelt_key_is_refused() -> None:
    misspelt = PLAIN.replace("reasonableness", "reasonablenes")
    assert asked_for(misspelt, "reasonableness_score") == "reasonableness_score is missing"
    assert asked_for(NESTED.replace("goal", "gaol"), "quality", "goal") == "goal is missing"


def asked_for(text: str, *keys: str, nested: bool = False) -> dict[str, float] | str:
    verdict = read_verdict(text, Shape(keys, nested))
    return dict(verdict.scores) if isinstance(verdict, Verdict) else verdict.reason


def test_what_was_asked_for_distinguishes_scores_from_other_numbers() -> None:
    assert asked_for('{"elegance": 0.4, "clip_number": 1}', "elegance") == {"elegance": 0.4}
    assert asked_for('{"code": 0, "message": "internal error"}', "elegance") == "elegance is missing"
    assert asked_for('{"Elegance": "0.4", "depth": 0.5}', "elegance", "depth") == {"elegance": 0.4, "depth": 0.5}
    assert asked_for(PLAIN.replace("reasonableness_score", "Reasonableness Score"), "reasonableness_score") == {
        "reasonableness_score": 0.9
    }
    assert asked_for(PLAIN, "correctness_score") == "correctness_score is missing"
    quoted = 'It found {"title": "x", "score": 0.93, ...}.'
    assert asked_for(quoted, "correctness_score") == "the scores share a line with other text"
    found = 'It found:\n{"title": "x", "score": 0.93}\nA good page.'
    assert asked_for(found, "correctness_score") == "scores other than those requested"
    for other in ("confidence", "tool_result", "error"):
        quoted = f'{{"{other}": {{"score": 0.95}}, "summary": "A bad step."}}'
        assert asked_for(quoted, "correctness_score") == "correctness_score is missing"
    assert asked_for('{"evaluation": {"score": 0.9}, "summary": "s"}', "correctness_score") == {
        "correctness_score": 0.9
    }
    assert asked_for('{"a_score": 0.9, "summary": "cut', "a_score", "b_score") == "cut off inside the scores"
    assert asked_for('{"scores": {"a": 0.9}, "b": 0.8}', "a", "b", nested=True) == (
        "the scores are not together in one object"
    )


def test_a_decimal_comma_is_no_zero() -> None:
    assert "reasonableness_score" in reason('{"reasonableness_score": 0,85, "summary": "s"}')


def test_refusals_are_counted_by_kind() -> None:
    kinds = {read_verdict(f'{{"a_score": {number}}}').kind for number in ("1.7", "2.0", "-3")}  # type: ignore[union-attr]
    assert kinds == {"a score is out of range"}


# --- nothing is made up -------------------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
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


QUOTED = PLAIN.replace("searched", 'searched "the web"')
KEYED = NESTED.replace("0.85", '"85%"')
CRITERIA = '{"scores": {"quality": {"score": 0.5, "reason": "Fine."}, "goal": {"score": 0.85, "reason": "Met."}}}'
SAMPLES = [
    *((text, Shape(("reasonableness_score",), nested=False), {"reasonableness_score": 0.9}) for text in (
        PLAIN, QUOTED, PLAIN.replace('"', "'"), PLAIN.replace(", ", "，").replace('"', "“", 1).replace('"', "”", 1),
        f"```json\n{QUOTED}\n```", f"Here it is:\n{PLAIN}\nI hope it helps.", f"<think>Hm.</think>\n{PLAIN}",
        PLAIN.replace('"}', '",\n}'), PLAIN.replace(", ", ",  // from 0 to 1\n", 1),
    )),
    *((text, Shape(("quality", "goal"), nested=True), {"quality": 0.5, "goal": 0.85}) for text in (
        NESTED, KEYED, CRITERIA, json.dumps(json.loads(NESTED), indent=4), NESTED.replace("Good.", 'It is "good".'),
        '{"scores": [{"name": "quality", "score": 0.5}, {"name": "goal", "score": 0.85}], "summary": "Fine."}',
    )),
]  # fmt: skip
FAULTY = [*"\"\\\n{}[],: '.%/#“：_*`<>-", "", " // see above\n", ' "and so", it "went" ']
"""What a fault puts into an answer, or in the place of one of its characters."""


def faults(count: int) -> Iterator[tuple[str, Shape, dict[str, float]]]:
    """Answers with one fault or cut off; a digit is never lost alone, for no reader could see that."""
    chance = Random(1)
    for _ in range(count):
        text, asked, scores = chance.choice(SAMPLES)
        at, taken = chance.randrange(len(text)), chance.choice((0, 0, 1))
        if chance.random() < 0.4:
            yield text[:at], asked, scores
        elif not (taken and text[at].isdigit()):
            yield text[:at] + chance.choice(FAULTY) + text[at + taken :], asked, scores


@pytest.mark.slow
def test_a_fault_never_gives_another_score_and_never_takes_long() -> None:
    kept = count = 0
    read_verdict(QUOTED)  # imports json-repair
    for text, asked, scores in faults(20_000):
        started = time.process_time()
        verdict = read_verdict(text, asked)
        assert time.process_time() - started < 1, text
        count += 1
        if isinstance(verdict, Verdict):
            kept += 1
            assert verdict.scores == scores, text
    assert kept > count / 2


LONG = [
    "```" + " " * 190_000 + "x",
    PLAIN + "{" * 150_000,
    '{"a_score": 0.9, "b": {"a_score":' + " " * 190_000 + '"x"}}',
    '{"a_score": 0.5, "summary": "The page was {   "x": "y" and so on."',
    '{"a_score": 0.9, "s": "' + '["x' * 6_000 + ']"}',
    '{"a_score": 0.9, "s": (' + "(" * 15_000,
    "[" + '{"a_score": 0.9 "a_score": 0.9 ' * 600,
    "{'a_score': 0.9, 's': '" + "it's, " * 3_300 + "'}",
    PLAIN + "\n" + "reasonableness_score," * 1_900,
    "<|" * 90_000 + PLAIN,
    '{"a_score": 0.9, ' + "]{x y" * 2_000,
    '{"a_score": 0.9 "s": ' + "<{" * 25 + "x ytruenull...)" * 340,
    '{"a_score": 0.9 "s": ' + """0.9['"k":\\"(""" * 8 + '*/"' * 1_950,
    "{" + ", ".join(f'"k{n}": {{}}' for n in range(14_000)) + "}",
    "<think>" * 28_000,
    "</think> x" * 19_000 + PLAIN,
]


@pytest.mark.parametrize("text", LONG)
def test_no_answer_takes_more_than_a_second(text: str) -> None:
    read_verdict(QUOTED)
    started = time.process_time()
    read_verdict(text, Shape(("reasonableness_score",), nested=False))
    assert time.process_time() - started < 1


@pytest.mark.parametrize("text", LONG[1:5])
def test_no_answer_takes_more_than_100_megabytes(text: str) -> None:
    read_verdict(QUOTED)
    tracemalloc.start()
    read_verdict(text)
    assert tracemalloc.get_traced_memory()[1] < 100 << 20
    tracemalloc.stop()


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
