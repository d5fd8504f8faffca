"""The length guard: no row reaches LLaMA Factory that it would cut.

LLaMA Factory 0.9.5 cuts a prompt that is too long from the right without a word: the output schema and the assistant's
header go, and a long label loses its closing brace and its end of turn.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from prmkit.dataset.settings import LengthSettings
from prmkit.prompts.encoding import ChatEncoding, load_encoding
from prmkit.prompts.truncation import trim_prompt

_REMEMBERED = 100_000
"""Prompts whose tokens are remembered, for judges whose rows are in another file."""


class Measured(NamedTuple):
    """A row after the guard."""

    prompt: str
    tokens: int
    """Of prompt and label before anything was left out; 0 without a guard."""
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
        """Load the tokenizer and the template, which takes about 8 seconds.

        Raises:
            DataError: the folder holds no tokenizer.
            UsageError: LLaMA Factory knows no such template.
        """
        self.settings = settings
        self._encoding = load_encoding(
            settings.tokenizer,
            settings.template,
            default_system=settings.default_system,
            enable_thinking=settings.enable_thinking,
            trust_remote_code=settings.trust_remote_code,
        )
        # Prompts beyond the model's context are what the guard is for; transformers would warn of each kind of them.
        self._encoding.tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
        self._prompts: dict[bytes, int] = {}

    def fit(self, rows: Sequence[tuple[str | None, str, str]]) -> list[Measured | TooLong]:
        """Measure rows, and make them fit as the settings say.

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
        trimmed = trim_prompt(prompt, self._encoding, room, system)
        if trimmed is None:
            reason = f"{long}, and what must stay of the prompt does not fit"
            return TooLong("too long, and cannot be trimmed", reason, tokens)
        return Measured(trimmed.text, tokens, prompt_tokens - trimmed.tokens, trimmed.characters_left_out)

    def _prompt_tokens(self, prompts: Sequence[tuple[str | None, str]]) -> list[int]:
        """How many token ids each prompt takes, its system text included."""
        keys = [hashlib.blake2b(f"{system}\0{text}".encode(), digest_size=12).digest() for system, text in prompts]
        new = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in self._prompts}
        measured = pair_lengths(self._encoding, [(system, text, "") for system, text in new.values()])
        counted = dict(zip(new, (tokens for tokens, _ in measured), strict=True))
        found = [counted[key] if key in counted else self._prompts[key] for key in keys]
        if len(self._prompts) > _REMEMBERED:
            self._prompts.clear()
        self._prompts |= counted
        return found

    def _label_tokens(self, labels: Iterable[str]) -> list[int]:
        return [tokens for _, tokens in pair_lengths(self._encoding, [(None, "", label) for label in labels])]

    def as_json(self) -> dict[str, Any]:
        """What the lengths were measured with, for whoever wants to use them again."""
        settings = self.settings
        tokenizer = self._encoding.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        content = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
        return {
            "tokenizer_sha256": hashlib.sha256(content.encode()).hexdigest(),
            "template": settings.template,
            "default_system": settings.default_system,
            "enable_thinking": settings.enable_thinking,
            "cutoff_len": settings.cutoff_len,
        }


class _Recorder:
    """A tokenizer that notes the strings that a template wants encoded, or answers with as many ids as they have.

    The template's own code decides what is encoded, so a row has the length that LLaMA Factory gives it. All strings
    of many rows are then encoded at once, each distinct one once, on all cores.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.lengths: dict[str, int] = {}
        self.wanted: dict[str, None] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode(self, text: str, add_special_tokens: bool = True, **options: Any) -> list[int]:
        """Ids of the right number and of no meaning; none for a string that was not measured yet."""
        if add_special_tokens or options:
            return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens, **options))
        if text not in self.lengths:
            self.wanted[text] = None
            return []
        return [0] * self.lengths[text]

    def measure_wanted(self) -> None:
        """Encode what was noted."""
        texts = list(self.wanted)
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            lengths = [len(self._tokenizer.encode(text, add_special_tokens=False)) for text in texts]
        else:
            backend.no_truncation()
            backend.no_padding()
            lengths = [len(encoded) for encoded in backend.encode_batch_fast(texts, add_special_tokens=False)]
        self.lengths |= zip(texts, lengths, strict=True)
        self.wanted.clear()


def pair_lengths(encoding: ChatEncoding, rows: Iterable[tuple[str | None, str, str]]) -> list[tuple[int, int]]:
    """How many token ids `encoding.pair_ids` gives the prompt and the answer of each row, measured together.

    Args:
        encoding: of the model and the template.
        rows: system text, prompt and answer.
    """
    rows = list(rows)
    recorder = _Recorder(encoding.tokenizer)
    recording = ChatEncoding(recorder, encoding.template)
    for system, prompt, answer in rows:
        recording.pair_ids(prompt, answer, system)
    recorder.measure_wanted()
    pairs = (recording.pair_ids(prompt, answer, system) for system, prompt, answer in rows)
    return [(len(prompt_ids), len(answer_ids)) for prompt_ids, answer_ids in pairs]
