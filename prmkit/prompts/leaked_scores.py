"""Scores that prompts give away.

The prompts of `category` and `final` evaluations often contain the mean of the judges' clip scores, as
`(Score: 0.93)`. A judge that is trained on them learns to copy, and when it scores there is nothing to copy from.
"""

import re

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
