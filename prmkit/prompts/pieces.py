"""LLaMA Factory's token ids without importing it: the strings that a template puts around each text.

Importing LLaMA Factory takes 5 CPU seconds and 0.8 GB, more than everything else in most conversions. So a child
process asks its code once what it encodes around a system text, a prompt and an answer; the result is kept in the
user's cache, under a name made from everything that it depends on. The texts themselves are encoded here by
`tokenizers`.
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
from typing import Any

from prmkit import cli
from prmkit.errors import DataError
from prmkit.files import read_json, sha256_of, write_json
from prmkit.llamafactory_schema import installed_version, template_sources
from prmkit.prompts.encoding import ChatEncoding, load_encoding

Piece = str | int
"""A string to encode, or the id of a token."""
_MARKS = SYSTEM, PROMPT, ANSWER = "\ue000system\ue001", "\ue000prompt\ue001", "\ue000answer\ue001"
_MARK = re.compile("(" + "|".join(_MARKS) + ")")
_PROBES = ("", "a", " \n b\n ", "{{content}} {0} %s", "ä\u2028\t")
"""Texts that a template must treat in the same way as the marks."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                    "chat_template.jinja", "chat_template.json", "config.json", "generation_config.json")  # fmt: skip
_PATIENCE = 120.0
"""Seconds for the child process."""


@dataclass(frozen=True)
class Pieces:
    """What a template encodes for one turn."""

    tokenizer_json: str
    with_system: tuple[list[Piece], list[Piece]]
    """The pieces of prompt and answer, with marks in place of the texts; for a row that has a system text."""
    without_system: tuple[list[Piece], list[Piece]]
    unless: list[str]
    """Words in an answer that make the template behave differently (it removes or keeps a chain of thought)."""

    @cached_property
    def _backend(self) -> Any:
        from tokenizers import Tokenizer

        backend = Tokenizer.from_str(self.tokenizer_json)
        backend.no_truncation()
        backend.no_padding()
        return backend

    @property
    def tokenizer_sha256(self) -> str:
        """Identifies the tokenizer: the SHA-256 of its JSON, in hexadecimal."""
        return hashlib.sha256(self.tokenizer_json.encode()).hexdigest()

    def knows(self, answer: str) -> bool:
        """Whether the pieces apply to a row with this answer."""
        return not any(word in answer for word in self.unless)

    def prompt_ids(self, prompt: str, system: str | None = None) -> list[int]:
        """Token ids of the prompt, as `ChatEncoding.prompt_ids`."""
        ids: list[int] = []
        for piece in self._filled(prompt, "", system)[0]:
            ids += [piece] if isinstance(piece, int) else self._backend.encode(piece, add_special_tokens=False).ids
        return ids

    def pair_lengths(self, rows: Sequence[tuple[str | None, str, str]]) -> list[tuple[int, int]]:
        """The number of token ids of each row (system text, prompt and answer).

        Every distinct string is encoded once; all of them together, on all cores.
        """
        filled = [self._filled(prompt, answer, system) for system, prompt, answer in rows]
        texts = list(dict.fromkeys(piece for pair in filled for side in pair for piece in side if type(piece) is str))
        encoded = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        lengths: dict[Piece, int] = dict(zip(texts, map(len, encoded), strict=True))
        # A piece that is an id is not in `lengths`, and counts as one token.
        return [(sum(lengths.get(each, 1) for each in prompt), sum(lengths.get(each, 1) for each in answer))
                for prompt, answer in filled]  # fmt: skip

    def _filled(self, prompt: str, answer: str, system: str | None) -> tuple[list[Piece], list[Piece]]:
        texts = {PROMPT: prompt, ANSWER: answer, SYSTEM: system or ""}
        sides = self.with_system if system else self.without_system
        made = [[_fill(piece, texts) for piece in side] for side in sides]
        return made[0], made[1]


def _fill(piece: Piece, texts: dict[str, str]) -> Piece:
    # Split first, so that a mark in a text stays what it is.
    return piece if isinstance(piece, int) else "".join(texts.get(part, part) for part in _MARK.split(piece))


def load_pieces(
    folder: Path, template: str | None, *, default_system: str | None = None, enable_thinking: bool | None = True
) -> Pieces | None:
    """The pieces of a template, from the cache or from a child process that asks LLaMA Factory.

    Args:
        folder: the tokenizer's folder.
        template: LLaMA Factory's name of the template; None parses the tokenizer's chat template.
        default_system: LLaMA Factory's key of this name.
        enable_thinking: LLaMA Factory's key of this name.

    Returns:
        None if there are none: the tokenizer is not a folder with a tokenizer.json or cannot be loaded, or the template
        does more than put strings around texts. Then `load_encoding` does the work, or reports the error.
    """
    if not (folder / "tokenizer.json").is_file():
        return None
    asked = {"folder": str(folder.resolve()), "template": template, "default_system": default_system,
             "enable_thinking": enable_thinking}  # fmt: skip
    file = _cache_file(folder, asked)
    if file:
        with contextlib.suppress(DataError, TypeError):  # not there yet, or damaged
            return Pieces(**read_json(file))
    found = _ask_child(asked)
    if found is None:
        return None
    if file:
        with contextlib.suppress(OSError):  # the home folder is not writable: the child is asked every time
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, found)
    return Pieces(**found)


def _cache_file(folder: Path, asked: dict[str, Any]) -> Path | None:
    """Where the result is kept; None for a user without a home folder, as in some containers."""
    known = {
        "asked": {key: value for key, value in asked.items() if key != "folder"},
        "versions": [installed_version(name) for name in ("llamafactory", "transformers", "tokenizers")],
        "sources": [sha256_of(path) for path in (Path(__file__), *template_sources())],
        "tokenizer": {name: sha256_of(folder / name) for name in _TOKENIZER_FILES if (folder / name).is_file()},
    }
    name = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 - Path.home() may raise
    return Path(cache, "prmkit", "templates", f"{name}.json") if os.path.isabs(cache) else None  # noqa: PTH117


def _ask_child(asked: dict[str, Any]) -> Any:
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "prmkit.prompts.pieces", json.dumps(asked)]
    environment = {**os.environ, "PYTHONPATH": path, "LLAMAFACTORY_VERBOSITY": "ERROR"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, timeout=_PATIENCE, check=False)
        return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError):
        return None


# --- the child --------------------------------------------------------------------------------------------------------


class _Recorder:
    """A tokenizer whose ids of a string are the string."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[Piece]:
        if add_special_tokens:
            raise ValueError("a template that adds special tokens by the tokenizer")
        return [text]


def pieces_of(encoding: ChatEncoding) -> Pieces | None:
    """Ask a template what it encodes; None if that depends on more than the positions of the texts."""
    from llamafactory.data.template import Template

    recording = ChatEncoding(_Recorder(encoding.tokenizer), encoding.template)
    template = encoding.template
    # A template with its own encoding of turns looks for thoughts in the answer.
    is_plain = type(template).encode_multiturn is Template.encode_multiturn
    found = Pieces(
        encoding.tokenizer.backend_tokenizer.to_str(),
        recording.pair_ids(PROMPT, ANSWER, SYSTEM),  # type: ignore[arg-type]
        recording.pair_ids(PROMPT, ANSWER),  # type: ignore[arg-type]
        [] if is_plain else [word.strip() for word in template.thought_words],
    )
    probes = [(prompt, answer, system) for prompt in _PROBES for answer in _PROBES for system in (None, *_PROBES)]
    same = all(_without_empty(recording.pair_ids(*probe)) == _without_empty(found._filled(*probe)) for probe in probes)
    return found if same else None


def _without_empty(sides: Iterable[Iterable[Piece]]) -> list[list[Piece]]:
    return [[piece for piece in side if piece != ""] for side in sides]


def _main() -> None:
    cli.relax_collector()
    asked = json.loads(sys.argv[1])
    encoding = load_encoding(Path(asked.pop("folder")), local_files_only=True, **asked)
    found = pieces_of(encoding)
    cli.emit_json_line(json.dumps(asdict(found) if found else None))


if __name__ == "__main__":
    _main()
