"""The length check: no row that LLaMA Factory would cut reaches it.

LLaMA Factory 0.9.5 silently cuts a prompt that is too long from the right: the output schema and the assistant's header
are lost, and a long label loses its closing brace and its end of turn.

The check needs LLaMA Factory's token ids, but importing it takes 5 CPU seconds and 0.8 GB, more than everything else in
most conversions. So a child process renders the template once with placeholders, to find the strings around a system
prompt, a prompt and an answer; the result is cached for the user, under a hash of everything that it depends on. The
texts themselves are encoded here by `tokenizers`.
"""

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from prmkit import cli
from prmkit.dataset.settings import LengthSettings
from prmkit.errors import DataError
from prmkit.files import read_json, sha256_of, write_json
from prmkit.llamafactory_schema import installed_version, template_sources
from prmkit.prompts.encoding import ChatEncoding, load_encoding
from prmkit.prompts.truncation import trim_prompt

_REMEMBERED = 100_000
"""The maximum number of cached prompt lengths: another judge's rows on these prompts may be in another file."""


class Measured(NamedTuple):
    """The length of a row that fits, after any trimming."""

    prompt: str
    tokens: int
    """The number of tokens of prompt and label before trimming; 0 without a length check."""
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
        """Find out what the template encodes: in milliseconds if it is cached, otherwise in about 8 seconds.

        Raises:
            DataError: the folder has no tokenizer.
            UsageError: LLaMA Factory has no such template.
        """
        self.settings = settings
        self._pieces = None if settings.trust_remote_code else load_pieces(settings.tokenizer, **self._template())
        self._prompts: dict[bytes, int] = {}
        if self._pieces is None:
            self._encoding.tokenizer  # noqa: B018 - fail early, not at the first row

    def _template(self) -> dict[str, Any]:
        settings = self.settings
        return {"template": settings.template, "default_system": settings.default_system,
                "enable_thinking": settings.enable_thinking}  # fmt: skip

    @cached_property
    def _encoding(self) -> ChatEncoding:
        """LLaMA Factory's own encoder, for rows to which the pieces do not apply."""
        settings = self.settings
        encoding = load_encoding(settings.tokenizer, trust_remote_code=settings.trust_remote_code, **self._template())
        # The check exists for prompts beyond the model's context; transformers would also warn about them.
        encoding.tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
        return encoding

    def fit(self, rows: Sequence[tuple[str | None, str, str]]) -> list[Measured | TooLong]:
        """Measure rows, and trim or reject them according to the settings.

        Args:
            rows: system prompt, prompt and label of each row, as they will be in the training file.
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
            reason = f"{long}, and even the untrimmable part of the prompt does not fit"
            return TooLong("too long, and cannot be trimmed", reason, tokens)
        return Measured(trimmed.text, tokens, prompt_tokens - trimmed.tokens, trimmed.characters_left_out)

    def _prompt_tokens(self, prompts: Sequence[tuple[str | None, str]]) -> list[int]:
        """Return the number of token ids of each prompt, including its system prompt."""
        keys = [hashlib.blake2b(f"{system}\0{text}".encode(), digest_size=12).digest() for system, text in prompts]
        new = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in self._prompts}
        measured = self._pair_lengths([(system, text, "") for system, text in new.values()])
        counted = dict(zip(new, (tokens for tokens, _ in measured), strict=True))
        lengths = [counted[key] if key in counted else self._prompts[key] for key in keys]
        if len(self._prompts) > _REMEMBERED:
            self._prompts.clear()
        self._prompts |= counted
        return lengths

    def _label_tokens(self, labels: Iterable[str]) -> list[int]:
        return [tokens for _, tokens in self._pair_lengths([(None, "", label) for label in labels])]

    def _pair_lengths(self, rows: Sequence[tuple[str | None, str, str]]) -> list[tuple[int, int]]:
        """Return the numbers of token ids of prompt and answer, for rows of system prompt, prompt and answer."""
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
        """Return the settings with which lengths were measured, so that they can be reused."""
        settings = self.settings
        return {
            "tokenizer_sha256": (self._pieces or self._encoding).tokenizer_sha256,
            "template": settings.template,
            "default_system": settings.default_system,
            "enable_thinking": settings.enable_thinking,
            "cutoff_len": settings.cutoff_len,
        }


# --- LLaMA Factory's token ids without importing it -------------------------------------------------------------------

Piece = str | int
"""A string to encode, or the id of a token."""
_PLACEHOLDERS = SYSTEM, PROMPT, ANSWER = "\ue000system\ue001", "\ue000prompt\ue001", "\ue000answer\ue001"
_PLACEHOLDER = re.compile("(" + "|".join(_PLACEHOLDERS) + ")")
_PROBES = ("", "a", " \n b\n ", "{{content}} {0} %s", "ä\u2028\t")
"""Probe strings, which the template must treat like the placeholders."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                    "chat_template.jinja", "chat_template.json", "config.json", "generation_config.json")  # fmt: skip
_CHILD_TIMEOUT = 120.0
"""Seconds for the child process."""


@dataclass(frozen=True)
class Pieces:
    """The pieces that a template encodes for one turn."""

    tokenizer_json: str
    with_system: tuple[list[Piece], list[Piece]]
    """The pieces of prompt and answer, with placeholders for the texts; for a row with a system prompt."""
    without_system: tuple[list[Piece], list[Piece]]
    unless: list[str]
    """Words in an answer to which the pieces do not apply, because the template removes or keeps a chain of thought."""

    @cached_property
    def _backend(self) -> Any:
        from tokenizers import Tokenizer

        backend = Tokenizer.from_str(self.tokenizer_json)
        backend.no_truncation()
        backend.no_padding()
        return backend

    @property
    def tokenizer_sha256(self) -> str:
        """The SHA-256 of the tokenizer's JSON, in hexadecimal."""
        return hashlib.sha256(self.tokenizer_json.encode()).hexdigest()

    def knows(self, answer: str) -> bool:
        """Whether the pieces apply to a row with this answer."""
        return not any(word in answer for word in self.unless)

    def prompt_ids(self, prompt: str, system: str | None = None) -> list[int]:
        """Return the token ids of the prompt, as `ChatEncoding.prompt_ids` does."""
        ids: list[int] = []
        for piece in self._filled(prompt, "", system)[0]:
            ids += [piece] if isinstance(piece, int) else self._backend.encode(piece, add_special_tokens=False).ids
        return ids

    def pair_lengths(self, rows: Sequence[tuple[str | None, str, str]]) -> list[tuple[int, int]]:
        """Return the numbers of token ids of prompt and answer, for rows of system prompt, prompt and answer.

        Every distinct string is encoded once, all of them in one batch on all cores.
        """
        filled = [self._filled(prompt, answer, system) for system, prompt, answer in rows]
        texts = list(dict.fromkeys(piece for pair in filled for part in pair for piece in part if type(piece) is str))
        encoded = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        lengths: dict[Piece, int] = dict(zip(texts, map(len, encoded), strict=True))
        # A piece that is an id is not in `lengths`, and counts as one token.
        return [(sum(lengths.get(each, 1) for each in prompt), sum(lengths.get(each, 1) for each in answer))
                for prompt, answer in filled]  # fmt: skip

    def _filled(self, prompt: str, answer: str, system: str | None) -> tuple[list[Piece], list[Piece]]:
        texts = {PROMPT: prompt, ANSWER: answer, SYSTEM: system or ""}
        pair = self.with_system if system else self.without_system
        filled = [[_fill(piece, texts) for piece in part] for part in pair]
        return filled[0], filled[1]


def _fill(piece: Piece, texts: dict[str, str]) -> Piece:
    # Split first, so that a placeholder within a text stays unchanged.
    return piece if isinstance(piece, int) else "".join(texts.get(part, part) for part in _PLACEHOLDER.split(piece))


def load_pieces(
    folder: Path, template: str | None, *, default_system: str | None = None, enable_thinking: bool | None = True
) -> Pieces | None:
    """Load the pieces of a template, from the cache or from a child process that runs LLaMA Factory.

    Args:
        folder: the tokenizer's folder.
        template: LLaMA Factory's name of the template; None parses the tokenizer's chat template.
        default_system: LLaMA Factory's key of this name.
        enable_thinking: LLaMA Factory's key of this name.

    Returns:
        None if `folder` has no tokenizer.json, the tokenizer cannot be loaded, or the template does more than put
        strings around texts. Then `load_encoding` does the work, or reports the error.
    """
    if not (folder / "tokenizer.json").is_file():
        return None
    request = {"folder": str(folder.resolve()), "template": template, "default_system": default_system,
               "enable_thinking": enable_thinking}  # fmt: skip
    file = _cache_file(folder, request)
    if file:
        with contextlib.suppress(DataError, TypeError):  # not there yet, or damaged
            return Pieces(**read_json(file))
    pieces = _run_child(request)
    if pieces is None:
        return None
    if file:
        with contextlib.suppress(OSError):  # the home folder is not writable: the child runs every time
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, pieces)
    return Pieces(**pieces)


def _cache_file(folder: Path, request: dict[str, Any]) -> Path | None:
    """Return the path of the cached result; None for a user without a home folder, as in some containers."""
    known = {
        "request": {key: value for key, value in request.items() if key != "folder"},
        "versions": [installed_version(name) for name in ("llamafactory", "transformers", "tokenizers")],
        "sources": [sha256_of(path) for path in (Path(__file__), *template_sources())],
        "tokenizer": {name: sha256_of(folder / name) for name in _TOKENIZER_FILES if (folder / name).is_file()},
    }
    name = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 - Path.home() may raise
    return Path(cache, "prmkit", "templates", f"{name}.json") if os.path.isabs(cache) else None  # noqa: PTH117


def _run_child(request: dict[str, Any]) -> Any:
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "prmkit.dataset.lengths", json.dumps(request)]
    environment = {**os.environ, "PYTHONPATH": path, "LLAMAFACTORY_VERBOSITY": "ERROR"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, timeout=_CHILD_TIMEOUT, check=False)
        return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError):
        return None


# --- the child --------------------------------------------------------------------------------------------------------


class _Recorder:
    """A fake tokenizer that "encodes" a string to itself, to record what a template encodes."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[Piece]:
        if add_special_tokens:
            raise ValueError("the template lets the tokenizer add special tokens")
        return [text]


def pieces_of(encoding: ChatEncoding) -> Pieces | None:
    """Record what a template encodes; None if that depends on the content of the texts."""
    from llamafactory.data.template import Template

    recording = ChatEncoding(_Recorder(encoding.tokenizer), encoding.template)
    template = encoding.template
    # Templates that override the encoding of turns look for thoughts in the answer.
    is_plain = type(template).encode_multiturn is Template.encode_multiturn
    pieces = Pieces(
        encoding.tokenizer.backend_tokenizer.to_str(),
        recording.pair_ids(PROMPT, ANSWER, SYSTEM),  # type: ignore[arg-type]
        recording.pair_ids(PROMPT, ANSWER),  # type: ignore[arg-type]
        [] if is_plain else [word.strip() for word in template.thought_words],
    )
    probes = [(prompt, answer, system) for prompt in _PROBES for answer in _PROBES for system in (None, *_PROBES)]
    same = all(_without_empty(recording.pair_ids(*probe)) == _without_empty(pieces._filled(*probe)) for probe in probes)
    return pieces if same else None


def _without_empty(pair: Iterable[Iterable[Piece]]) -> list[list[Piece]]:
    return [[piece for piece in part if piece != ""] for part in pair]


def _main() -> None:
    cli.relax_collector()
    request = json.loads(sys.argv[1])
    encoding = load_encoding(Path(request.pop("folder")), local_files_only=True, **request)
    pieces = pieces_of(encoding)
    cli.emit_json_line(json.dumps(asdict(pieces) if pieces else None))


if __name__ == "__main__":
    _main()
