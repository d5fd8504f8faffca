"""The length guard: no row that LLaMA Factory would cut reaches it.

LLaMA Factory 0.9.5 silently cuts a prompt that is too long from the right: the output schema and the assistant's header
are lost, and a long label loses its closing brace and its end of turn.
"""

import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from prmkit.dataset.settings import LengthSettings
from prmkit.prompts.encoding import ChatEncoding, load_encoding
from prmkit.prompts.pieces import load_pieces
from prmkit.prompts.truncation import trim_prompt

_REMEMBERED = 100_000
"""The most prompts whose length is remembered: another judge's rows on them may be in another file."""


class Measured(NamedTuple):
    """A row after the guard."""

    prompt: str
    tokens: int
    """The number of tokens of prompt and label before anything was left out; 0 without a guard."""
    tokens_left_out: int
    characters_left_out: int


class TooLong(NamedTuple):
    """A row that does not fit."""

    kind: str
    reason: str
    tokens: int


class LengthGuard:
    """Measures rows with LLaMA Factory's own template and the model's tokenizer."""

    def __init__(self, settings: LengthSettings) -> None:
        """Find out what the template encodes: in milliseconds if it is cached, else in about 8 seconds.

        Raises:
            DataError: the folder has no tokenizer.
            UsageError: LLaMA Factory has no such template.
        """
        self.settings = settings
        self._pieces = None if settings.trust_remote_code else load_pieces(settings.tokenizer, **self._template())
        self._prompts: dict[bytes, int] = {}
        if self._pieces is None:
            self._encoding.tokenizer  # noqa: B018 - what is wrong is raised now, and not at the first row

    def _template(self) -> dict[str, Any]:
        settings = self.settings
        return {"template": settings.template, "default_system": settings.default_system,
                "enable_thinking": settings.enable_thinking}  # fmt: skip

    @cached_property
    def _encoding(self) -> ChatEncoding:
        """LLaMA Factory's own encoder, for rows to which the pieces do not apply."""
        settings = self.settings
        encoding = load_encoding(settings.tokenizer, trust_remote_code=settings.trust_remote_code, **self._template())
        # The guard exists for prompts beyond the model's context; transformers would also warn about them.
        encoding.tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
        return encoding

    def fit(self, rows: Sequence[tuple[str | None, str, str]]) -> list[Measured | TooLong]:
        """Measure rows, and make them fit according to the settings.

        Args:
            rows: system text, prompt and label of each, as they will be in the training file.
        """
        prompts = self._prompt_tokens([(system, prompt) for system, prompt, _ in rows])
        labels = self._label_tokens([label for _, _, label in rows])
        return [self._fit(*row[:2], *tokens) for row, *tokens in zip(rows, prompts, labels, strict=True)]

    def _fit(self, system: str | None, prompt: str, prompt_tokens: int, label_tokens: int) -> Measured | TooLong:
        tokens = prompt_tokens + label_tokens
        room = self.settings.cutoff_len - self.settings.packing - label_tokens
        if prompt_tokens <= room or self.settings.too_long == "keep":
            return Measured(prompt, tokens, 0, 0)
        long = f"too long: {tokens:,} tokens, cutoff_len is {self.settings.cutoff_len:,}"
        if self.settings.too_long != "trim":
            return TooLong("too long", long, tokens)
        trimmed = trim_prompt(prompt, self._pieces or self._encoding, room, system)
        if trimmed is None:
            reason = f"{long}, and the part of the prompt that must stay does not fit"
            return TooLong("too long, and cannot be trimmed", reason, tokens)
        return Measured(trimmed.text, tokens, prompt_tokens - trimmed.tokens, trimmed.characters_left_out)

    def _prompt_tokens(self, prompts: Sequence[tuple[str | None, str]]) -> list[int]:
        """The number of token ids of each prompt, including its system text."""
        keys = [hashlib.blake2b(f"{system}\0{text}".encode(), digest_size=12).digest() for system, text in prompts]
        new = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in self._prompts}
        measured = self._pair_lengths([(system, text, "") for system, text in new.values()])
        counted = dict(zip(new, (tokens for tokens, _ in measured), strict=True))
        found = [counted[key] if key in counted else self._prompts[key] for key in keys]
        if len(self._prompts) > _REMEMBERED:
            self._prompts.clear()
        self._prompts |= counted
        return found

    def _label_tokens(self, labels: Iterable[str]) -> list[int]:
        return [tokens for _, tokens in self._pair_lengths([(None, "", label) for label in labels])]

    def _pair_lengths(self, rows: Sequence[tuple[str | None, str, str]]) -> list[tuple[int, int]]:
        """The numbers of token ids of prompt and answer, for rows of system text, prompt and answer."""
        pieces = self._pieces
        known = [row for row in rows if pieces and pieces.knows(row[2])]
        measured = iter(pieces.pair_lengths(known) if pieces else ())
        lengths = []
        for system, prompt, answer in rows:
            if pieces and pieces.knows(answer):
                lengths.append(next(measured))
            else:
                prompt_ids, answer_ids = self._encoding.pair_ids(prompt, answer, system)
                lengths.append((len(prompt_ids), len(answer_ids)))
        return lengths

    def as_json(self) -> dict[str, Any]:
        """What the lengths were measured with, so that others can reuse them."""
        settings = self.settings
        return {
            "tokenizer_sha256": (self._pieces or self._encoding).tokenizer_sha256,
            "template": settings.template,
            "default_system": settings.default_system,
            "enable_thinking": settings.enable_thinking,
            "cutoff_len": settings.cutoff_len,
        }
