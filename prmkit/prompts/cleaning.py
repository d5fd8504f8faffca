r"""What is removed from texts before training and scoring: control tokens, and scores that give the answer away.

A trajectory is text from outside: a web page, a tool's output, an agent's thought. If it contains `<|im_end|>` or
`[/INST]`, LLaMA Factory's tokenizer turns that into the real control token, and the page could close the user's turn
and write the verdict itself. So every prompt and label passes through `neutralise`, at conversion and at scoring.

The mark is one backslash after the first character: `<|im_end|>` becomes `<\|im_end|>`, `{{idx}}` becomes `{\{idx}}`.
A string that already reads `<\|im_end|>` gets one more, so that `restore` gives every string back exactly.
In prompts `<think>` and `<tool_call>` stay unchanged: transcripts are full of them, and they do not end a turn.
"""

import re

# Everything that some model family's tokenizer, or LLaMA Factory itself, treats as control: the first character, then
# what may follow it.
_MARKERS = {
    "<": (
        r"\|[^\s|<>]{1,64}\|?>",  # ChatML, Llama 3, Phi, GLM, InternLM; Gemma 4 without the second bar
        r"[a-z_]{1,32}\|>",  # Gemma 4
        r"｜[^\s｜<>]{1,64}｜>",  # DeepSeek
        r"/?(?:s|bos|eos|pad|unk|mask|cls|sep)>",  # Llama 2, Mistral, Gemma
        r"(?:start|end)_of_(?:turn|image)>",  # Gemma
        r"(?:beginning|end)_of_sentence>",  # MiniMax
        r"(?:_user|_bot|_system|_end|eod|sop|/?role)>",  # TeleChat, Yuan, GLM 4, Bailing
        r"</?SYS>>",  # Llama 2
        r"(?:image|video|audio)>",  # placeholders of LLaMA Factory's multimodal templates
    ),
    r"\[": (
        r"/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|TOOL_CONTENT)\]",  # Mistral
        r"(?:IMG|IMG_BREAK|IMG_END|gMASK|sMASK|MASK)\]",  # Pixtral, ChatGLM
        r"\|[^\s|\[\]]{1,64}\|\]",  # EXAONE
        r"e~\[",  # MiniMax
    ),
    r"\]": (r"~!?b[\[\]]",),  # MiniMax
    r"\{": (r"\{(?:idx|content)\}\}",),  # slots of LLaMA Factory's formatter
}
# LLaMA Factory's reasoning templates (qwen3 …) cut thoughts out of answers and add an empty thought to answers without
# one, so a summary that quotes `<think>` would be trained in another form than the other rows.
_ANSWER_MARKERS = {**_MARKERS, "<": (*_MARKERS["<"], r"/?think>")}


def _patterns(markers: dict[str, tuple[str, ...]], between: str) -> list[re.Pattern[str]]:
    # One search for each first character: a pattern that begins with one literal character is found with memchr, five
    # times faster than an alternation of all.
    return [re.compile(rf"{first}{between}(?=\\*(?:{'|'.join(rest)}))") for first, rest in markers.items()]


_PROMPT, _ANSWER = _patterns(_MARKERS, ""), _patterns(_ANSWER_MARKERS, "")
_PROMPT_MARKED, _ANSWER_MARKED = _patterns(_MARKERS, r"\\"), _patterns(_ANSWER_MARKERS, r"\\")


def neutralise(text: str, *, answer: bool = False) -> tuple[str, int]:
    """Turn every control marker in `text` into plain text.

    Args:
        text: a prompt or a label.
        answer: whether `text` is the assistant's, in which thought tags also count as control markers.

    Returns:
        The text, and the number of markers found in it.
    """
    found = 0
    for pattern in _ANSWER if answer else _PROMPT:
        if pattern.search(text):  # a search is cheaper than preparing a replacement, and most texts have no marker
            text, more = pattern.subn(r"\g<0>\\", text)
            found += more
    return text, found


def restore(text: str, *, answer: bool = False) -> str:
    """Undo `neutralise`: `restore(neutralise(text)[0]) == text` for every text, with the same `answer` in both."""
    for pattern in reversed(_ANSWER_MARKED if answer else _PROMPT_MARKED):
        text = pattern.sub(lambda match: match.group()[0], text)
    return text


# --- scores of earlier evaluations ------------------------------------------------------------------------------------

# The prompts of `category` and `final` evaluations often contain the mean of the judges' clip scores: `(Score: 0.93)`.
# A judge trained on them learns to copy, but at scoring time there is nothing to copy.
_SCORE = re.compile(r"\(Score: (\d(?:\.\d+)?)\)")
MASK = "(Score: not shown)"


def mask_leaked_scores(prompt: str) -> tuple[str, int]:
    """Replace the scores of earlier evaluations in a prompt.

    Returns:
        The prompt, and how many scores were replaced.
    """
    return _SCORE.subn(MASK, prompt)


def count_leaked_scores(prompt: str) -> int:
    """How many scores of earlier evaluations a prompt contains."""
    return len(_SCORE.findall(prompt))


def leaked_scores(prompt: str) -> list[float]:
    """The scores of earlier evaluations in a prompt, in order."""
    return [float(score) for score in _SCORE.findall(prompt)]
