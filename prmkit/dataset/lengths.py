"""The length guard: no row reaches LLaMA Factory that it would cut.

LLaMA Factory 0.9.5 cuts an over-long prompt from the right, in silence: the output schema and the assistant's header
go, and a long label loses its closing brace and its end of turn.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from prmkit.dataset.record import Rejected
from prmkit.errors import DataError
from prmkit.prompts.encoding import ChatEncoding, load_encoding
from prmkit.prompts.truncation import trim_prompt

TooLong = Literal["trim", "drop", "error", "keep"]


@dataclass(frozen=True)
class LengthSettings:
    """What rows are measured with, and what becomes of those that would be cut."""

    tokenizer: Path
    template: str | None
    cutoff_len: int
    too_long: TooLong = "trim"
    packing: bool = False
    """LLaMA Factory's `packing` or `neat_packing`: it keeps one token of `cutoff_len` for itself then."""
    default_system: str | None = None
    enable_thinking: bool | None = True
    trust_remote_code: bool = False


class Measured(NamedTuple):
    """A row after the guard."""

    prompt: str
    tokens: int
    """Of prompt and label before anything was left out."""
    tokens_left_out: int
    characters_left_out: int


class LengthGuard:
    """Measures rows with LLaMA Factory's own encoding."""

    def __init__(self, settings: LengthSettings) -> None:
        """Load the tokenizer and the template, which takes about 8 seconds.

        Raises:
            DataError: the folder holds no tokenizer.
            UsageError: LLaMA Factory knows no such template.
        """
        self.settings = settings
        self._encoding = _load(settings)
        self._last_prompt: tuple[str, int] = ("", 0)

    def fit(self, prompt: str, label: str) -> Measured:
        """Measure a row, and make it fit as the settings say.

        Args:
            prompt: neutralised, as it will stand in the training file.
            label: likewise.

        Raises:
            Rejected: the row is too long and is to be dropped, or cannot be made to fit.
            DataError: the row is too long, and the settings make that an error.
        """
        prompt_tokens, label_tokens = self._measure(prompt, label)
        tokens = prompt_tokens + label_tokens
        room = self.settings.cutoff_len - self.settings.packing - label_tokens
        if prompt_tokens <= room or self.settings.too_long == "keep":
            return Measured(prompt, tokens, 0, 0)
        long = f"too long: {tokens:,} tokens, cutoff_len is {self.settings.cutoff_len:,}"
        if self.settings.too_long == "error":
            raise DataError(f"{long}. Raise cutoff_len, or choose --too-long trim or drop.")
        if self.settings.too_long == "drop":
            raise Rejected(long, "too long", tokens)
        trimmed = trim_prompt(prompt, self._encoding, room)
        if trimmed is None:
            reason = f"{long}, and what must stay of the prompt does not fit"
            raise Rejected(reason, "too long, and not to be trimmed", tokens)
        return Measured(trimmed.text, tokens, prompt_tokens - trimmed.tokens, trimmed.characters_left_out)

    def _measure(self, prompt: str, label: str) -> tuple[int, int]:
        # Several judges answer one prompt, and their rows mostly stand together: a prompt's tokens are counted once.
        if prompt == self._last_prompt[0]:
            return self._last_prompt[1], len(self._encoding.pair_ids("", label)[1])
        prompt_ids, label_ids = self._encoding.pair_ids(prompt, label)
        self._last_prompt = (prompt, len(prompt_ids))
        return len(prompt_ids), len(label_ids)


def _load(settings: LengthSettings) -> ChatEncoding:
    encoding = load_encoding(
        settings.tokenizer,
        settings.template,
        default_system=settings.default_system,
        enable_thinking=settings.enable_thinking,
        trust_remote_code=settings.trust_remote_code,
    )
    # Prompts beyond the model's context are what the guard is for; transformers would warn of each kind of them.
    encoding.tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return encoding


def quantiles(lengths: Mapping[int, int], shares: tuple[float, ...]) -> dict[str, int]:
    """The smallest lengths that cover these shares of the rows.

    Args:
        lengths: how many rows have each length.
        shares: 0 to 1.

    Returns:
        Lengths by share in percent; empty when there are no rows.
    """
    if not lengths:
        return {}
    rows = sum(lengths.values())
    covering = {}
    for share in shares:
        covered = 0
        for length in sorted(lengths):
            covered += lengths[length]
            if covered >= share * rows - 1e-9:
                covering[f"{share:.0%}"] = length
                break
    return covering
