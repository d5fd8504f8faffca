r"""Escape special tokens and mask leaked scores, for training and for scoring.

A trajectory is untrusted text: a web page, a tool's output, an agent's thought. If it contains `<|im_end|>` or
`[/INST]`, LLaMA Factory's tokenizer turns that into the real special token, and the page could close the user's turn
and write the verdict itself. So every prompt and label passes through `escape`, at conversion and at scoring.

A special token is escaped by one backslash after its first character: `<|im_end|>` becomes `<\|im_end|>`, `{{idx}}`
becomes `{\{idx}}`. A string that already reads `<\|im_end|>` gets one more, so `unescape` restores every string.
In prompts `<think>` and `<tool_call>` stay unchanged: transcripts are full of them, and they do not end a turn.
"""

import re

# Special tokens of any model family, and of LLaMA Factory itself: the first character -> patterns of the rest.
_SPECIAL = {
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
# one, so a row whose summary quotes `<think>` would be encoded differently from the other rows.
_ANSWER_SPECIAL = {**_SPECIAL, "<": (*_SPECIAL["<"], r"/?think>")}


def _patterns(tokens: dict[str, tuple[str, ...]], between: str) -> list[re.Pattern[str]]:
    # One search per first character: a pattern that begins with a literal character is found with memchr, five times
    # faster than one alternation of all.
    return [re.compile(rf"{first}{between}(?=\\*(?:{'|'.join(rest)}))") for first, rest in tokens.items()]


_PROMPT, _ANSWER = _patterns(_SPECIAL, ""), _patterns(_ANSWER_SPECIAL, "")
_PROMPT_ESCAPED, _ANSWER_ESCAPED = _patterns(_SPECIAL, r"\\"), _patterns(_ANSWER_SPECIAL, r"\\")


def escape(text: str, *, answer: bool = False) -> tuple[str, int]:
    """Escape every special token in `text`, so that it becomes plain text.

    Args:
        text: a prompt or a label.
        answer: whether `text` is the assistant's, in which thought tags also count as special tokens.

    Returns:
        The text, and the number of special tokens found in it.
    """
    count = 0
    for pattern in _ANSWER if answer else _PROMPT:
        if pattern.search(text):  # a search is cheaper than preparing a replacement, and most texts have no match
            text, more = pattern.subn(r"\g<0>\\", text)
            count += more
    return text, count


def unescape(text: str, *, answer: bool = False) -> str:
    """Undo `escape`: `unescape(escape(text)[0]) == text` for every text, with the same `answer` in both."""
    for pattern in reversed(_ANSWER_ESCAPED if answer else _PROMPT_ESCAPED):
        text = pattern.sub(lambda match: match.group()[0], text)
    return text


# --- scores of earlier evaluations ------------------------------------------------------------------------------------

# The prompts of `category` and `final` evaluations often contain the mean of the judges' clip scores: `(Score: 0.93)`.
# A judge trained on them learns to copy, but at scoring time there is nothing to copy.
_SCORE = re.compile(r"\(Score: (\d(?:\.\d+)?)\)")
MASK = "(Score: not shown)"


def mask_leaked_scores(prompt: str) -> tuple[str, int]:
    """Mask the scores of earlier evaluations in a prompt.

    Returns:
        The prompt, and how many scores were replaced.
    """
    return _SCORE.subn(MASK, prompt)


def count_leaked_scores(prompt: str) -> int:
    """Count the scores of earlier evaluations in a prompt."""
    return len(_SCORE.findall(prompt))


def leaked_scores(prompt: str) -> list[float]:
    """Return the scores of earlier evaluations in a prompt, in order."""
    return [float(score) for score in _SCORE.findall(prompt)]
