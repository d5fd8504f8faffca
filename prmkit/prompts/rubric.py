"""What a judge of single steps is asked: score keys, rules, anchors, and how much context it gets.

A rubric is a small YAML file. Everything that shapes a prompt besides the run is in it, so one hash says whether two
sets of rows, or a row and a judge, ask the same.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from prmkit.errors import UsageError

DEFAULT_RUBRIC = Path(__file__).with_name("step_score.yaml")
BUILDER_VERSION = 1
"""Of `prmkit.prompts.step`: grows when its prompts change, so that a judge never meets prompts of another form."""
_KEY = re.compile(r"[a-z][a-z0-9_]{0,40}")
_LARGEST_SHARE = 0.2
"""Of the context, for the rubric itself: the rest is the run's."""


@dataclass(frozen=True)
class Rubric:
    """One way to judge steps."""

    keys: tuple[str, ...]
    """Score keys in their order. One key ends in `score`; several stand in a `scores` object."""
    instructions: str
    """Who judges what, and by which rules. Begins every prompt."""
    anchors: tuple[str, ...]
    """What scores mean, a line each."""
    error_types: tuple[str, ...]
    """The names that `error_type` may have; empty to leave it out of the verdict."""
    context_tokens: int
    """The longest prompt, in tokens of three bytes of UTF-8: no tokenizer is known when labels are made."""

    @cached_property
    def sha256(self) -> str:
        """Identifies the rubric together with the form of the prompts."""
        content = json.dumps([BUILDER_VERSION, asdict(self)], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def text(self) -> str:
        """What every prompt begins with."""
        scale = "\n".join(f"- {anchor}" for anchor in self.anchors)
        kinds = f"\n\nError types: {', '.join(self.error_types)}." if self.error_types else ""
        return f"{self.instructions}\n\nScores, with any value in between:\n{scale}{kinds}\n\n"

    @property
    def schema(self) -> str:
        """The verdict that is asked for: scores first, and no numbers that a judge could copy."""
        scores = ", ".join(f'"{key}": <score>' for key in self.keys)
        first = scores if len(self.keys) == 1 else f'"scores": {{{scores}}}'
        middle = ', "error_type": "<type>"' if self.error_types else ""
        return f'{{{first}{middle}, "reasoning": "<one or two sentences>"}}'


def tokens(text: str) -> int:
    """The length of a text in the unit of `Rubric.context_tokens`: on the safe side for English, close for code."""
    return -(-len(text.encode("utf-8", "surrogatepass")) // 3)


def load_rubric(path: Path | None = None) -> Rubric:
    """Read a rubric; without a path the default one.

    Raises:
        UsageError: the file is missing, or something in it is missing, misspelt or of the wrong type.
    """
    import yaml

    path = path or DEFAULT_RUBRIC
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not YAML ({str(error).splitlines()[0]}).") from error
    return _checked(content, path)


def _checked(content: Any, path: Path) -> Rubric:
    kinds = {"keys": list, "instructions": str, "anchors": dict, "error_types": list, "context_tokens": int}
    if not isinstance(content, dict) or content.keys() - kinds or kinds.keys() - {"error_types"} - content.keys():
        raise UsageError(f"{path}: a rubric has {', '.join(kinds)} and nothing else (error_types may be missing).")
    for name, value in content.items():
        if type(value) is not kinds[name]:
            raise UsageError(f"{path}: {name} is {value!r:.40}, and should be {_WORDS[kinds[name]]}.")
    keys = content["keys"]
    if (
        not keys
        or len(set(map(str, keys))) < len(keys)
        or not all(isinstance(key, str) and _KEY.fullmatch(key) for key in keys)
    ):
        raise UsageError(f"{path}: keys should be different names in lower case, such as step_score.")
    if len(keys) == 1 and not keys[0].endswith("score"):
        raise UsageError(f"{path}: a single key ends in score, such as {keys[0]}_score.")
    anchors = tuple(f"{_anchor(score, path)}: {meaning}" for score, meaning in content["anchors"].items())
    types = tuple(map(str, content.get("error_types") or ()))
    rubric = Rubric(tuple(keys), content["instructions"].strip(), anchors, types, content["context_tokens"])
    needed = int(tokens(rubric.text) / _LARGEST_SHARE)
    if rubric.context_tokens < needed:
        raise UsageError(
            f"{path}: context_tokens is {rubric.context_tokens}, and the text of the rubric leaves too little of them "
            f"for the run. Set at least {needed}, or shorten the text."
        )
    return rubric


_WORDS = {list: "a list", str: "text", dict: "a mapping from score to meaning", int: "a whole number"}


def _anchor(score: Any, path: Path) -> str:
    if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
        raise UsageError(f"{path}: the anchor {score!r} is not a number from 0 to 1.")
    return f"{score:.2f}"
