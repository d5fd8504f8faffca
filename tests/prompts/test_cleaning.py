"""Control markers in text: every one is escaped, visibly, and can be unescaped."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prmkit.prompts.cleaning import escape, unescape

MARKERS = [
    "<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|eot_id|>", "<|start_header_id|>", "<|reserved_special_token_1|>",
    "<｜end▁of▁sentence｜>", "<s>", "</s>", "<bos>", "<eos>", "<pad>", "<unk>", "<start_of_turn>", "<end_of_turn>",
    "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "[TOOL_CALLS]", "[gMASK]", "<image>", "<video>", "<audio>",
    "{{idx}}", "{{content}}", "<|turn>", "<turn|>", "<tool|>", "[|user|]", "[|endofturn|]", "<_user>", "<_bot>",
    "<eod>", "<sop>", "<role>", "</role>", "<end_of_sentence>", "[e~[", "]~!b[", "]~b]",
]  # fmt: skip


@pytest.mark.parametrize("marker", MARKERS)
def test_a_marker_becomes_plain_text_and_back(marker: str) -> None:
    text = f"page {marker}{marker} end"
    neutral, found = escape(text)
    assert found == 2
    assert marker not in neutral
    assert unescape(neutral) == text


def test_thoughts_are_control_in_answers_only() -> None:
    assert escape("<think>x</think>") == ("<think>x</think>", 0)
    neutral, found = escape("<think>x</think>", answer=True)
    assert found == 2
    assert "<think>" not in neutral
    assert unescape(neutral, answer=True) == "<think>x</think>"


NO_CONTROL = {"<tool_response>", "</tool_response>", "<response>", "</response>", "</answer>", "###"}
"""What occurs in templates and is ordinary text to the tokenizer, or what transcripts are made of."""


def test_no_template_of_llama_factory_has_a_marker_that_stays() -> None:
    from llamafactory.data.template import TEMPLATES

    words = set()
    for template in TEMPLATES.values():
        slots = [
            slot
            for part in ("user", "assistant", "system", "observation", "prefix")
            for slot in getattr(template, f"format_{part}").slots
        ]
        words |= {word for word in [*slots, *template.stop_words] if isinstance(word, str)}
        words |= {word for slot in slots if isinstance(slot, dict) for word in slot.values()}
    markers = {
        marker
        for word in words
        for marker in re.findall(r"<<[^<>\s]+>>|<[^<>\s]{1,60}>|\[[^\[\]\s]{1,60}\]|\[e~\[|\]~!?b[\[\]]|^\S+$", word)
        if "{{" not in marker
    }
    assert len(markers) > 50
    plain = {marker for marker in markers if not escape(marker, answer=True)[1] and re.search(r"\W", marker)}
    assert plain <= NO_CONTROL


pieces = st.lists(st.sampled_from([*MARKERS, "\\", "<", "|", ">", "{", "[", "im_end", "/", " "]) | st.text(max_size=5))


@given(pieces.map("".join), st.booleans())
def test_neutralising_is_reversible_for_every_text(text: str, answer: bool) -> None:
    neutral, _ = escape(text, answer=answer)
    assert unescape(neutral, answer=answer) == text
    assert not [marker for marker in MARKERS if marker in neutral]


@given(pieces.map("".join))
def test_neutralising_twice_is_undone_by_restoring_twice(text: str) -> None:
    twice, _ = escape(escape(text)[0])
    assert unescape(unescape(twice)) == text
