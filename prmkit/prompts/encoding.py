"""Encode prompts and answers exactly as LLaMA Factory encodes them for training.

The length check, the preflight and the judge all use this module, so a prompt has the same token ids in scoring as in
training. Special tokens in the texts must already be escaped, as in the training files.

Use `limited` around any call that renders a model's own chat template.
"""

import copy
import hashlib
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from prmkit.errors import DataError, UsageError


class EncodesPrompts(Protocol):
    """An object that encodes prompts."""

    def prompt_ids(self, prompt: str, system: str | None = None) -> list[int]:
        """Return the token ids of the prompt, up to the beginning of the answer."""


@dataclass(frozen=True)
class ChatEncoding:
    """A tokenizer with one of LLaMA Factory's chat templates."""

    tokenizer: Any
    """A `transformers` tokenizer, with the special tokens that the template needs."""
    template: Any
    """A private copy of a `llamafactory.data.template.Template`: LLaMA Factory's registry stays unchanged."""
    own_chat_template: Any = None
    """The model's own chat template; some of LLaMA Factory's templates replace the tokenizer's."""

    def pair_ids(self, prompt: str, answer: str, system: str | None = None) -> tuple[list[int], list[int]]:
        """Return a training row's token ids, before truncation: the prompt's, and the answer's with its end of turn.

        Args:
            prompt: the user's turn.
            answer: the assistant's turn.
            system: the row's `system` column, which replaces the default system prompt; None and "" keep the default,
                as in LLaMA Factory for a row whose column is empty.
        """
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        ((prompt_ids, answer_ids),) = self.template.encode_multiturn(self.tokenizer, messages, system, None)
        if self.template.efficient_eos:
            # These templates share one end token between turns; SupervisedDatasetProcessor adds the last one.
            answer_ids = [*answer_ids, self.tokenizer.eos_token_id]
        return prompt_ids, answer_ids

    def prompt_ids(self, prompt: str, system: str | None = None) -> list[int]:
        """Return the token ids of the prompt, up to the beginning of the answer."""
        return self.pair_ids(prompt, "", system)[0]

    def opened_ids(self, prompt: str, answer_so_far: str, system: str | None = None) -> list[int]:
        """Return the token ids of the prompt and an unfinished answer, as in training but without the end-of-turn
        token.

        Raises:
            UsageError: this template's end-of-turn token merges with the answer's last token, so it cannot be removed.
        """
        prompt_ids, answer_ids = self.pair_ids(prompt, answer_so_far, system)
        end = self._end_of_turn_ids
        if end and answer_ids[-len(end) :] != end:
            raise UsageError(
                "this template's end-of-turn token cannot be separated from the answer. Use --mode generate."
            )
        return prompt_ids + answer_ids[: len(answer_ids) - len(end)]

    @cached_property
    def empty_prompt_length(self) -> int:
        """The number of token ids of an empty prompt."""
        return len(self.prompt_ids(""))

    @cached_property
    def _end_of_turn_ids(self) -> list[int]:
        # Some templates (mistral) also write something before the answer, so a placeholder marks the answer's position.
        content = "\N{OBJECT REPLACEMENT CHARACTER}"
        elements = self.template.format_assistant.apply(content=content)
        answer = next(i for i, element in enumerate(elements) if isinstance(element, str) and content in element)
        after = [elements[answer].partition(content)[2], *elements[answer + 1 :]]
        end: list[int] = self.template._convert_elements_to_ids(self.tokenizer, after)
        return [*end, self.tokenizer.eos_token_id] if self.template.efficient_eos else end

    @property
    def tokenizer_sha256(self) -> str:
        """The SHA-256 of the tokenizer's JSON or, without it, of its vocabulary; in hexadecimal."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        content = backend.to_str() if backend is not None else repr(sorted(self.tokenizer.get_vocab().items()))
        return hashlib.sha256(content.encode()).hexdigest()

    @cached_property
    def stop_ids(self) -> list[int]:
        """The token ids that end an answer."""
        ids: list[int] = self.template.get_stop_token_ids(self.tokenizer)
        return ids


def load_encoding(
    model_folder: Path,
    template: str | None,
    *,
    default_system: str | None = None,
    enable_thinking: bool | None = True,
    trust_remote_code: bool = False,
    local_files_only: bool = False,
) -> ChatEncoding:
    """Load the tokenizer of `model_folder` with one of LLaMA Factory's templates.

    Takes about 8 seconds, mostly for LLaMA Factory's imports.

    Args:
        model_folder: the folder with the tokenizer's files.
        template: a name that LLaMA Factory knows (`qwen`, `llama3`, …); None parses the tokenizer's chat template.
        default_system: LLaMA Factory's key of this name; None keeps the template's default, "" removes it.
        enable_thinking: LLaMA Factory's key of this name; only reasoning templates (`qwen3`, …) use it.
        trust_remote_code: run Python code that comes with the model.
        local_files_only: do not contact the hub, even if `model_folder` is the name of a model there.

    Raises:
        DataError: the folder has no tokenizer that `transformers` can load.
        UsageError: LLaMA Factory has no such template.
    """
    # LLaMA Factory logs to stdout, which is for results.
    os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "ERROR")
    from llamafactory.data.template import TEMPLATES, get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments
    from transformers import AutoTokenizer

    if template is not None and template not in TEMPLATES:
        raise UsageError(f"template: LLaMA Factory has no '{template}'.{_nearest(template, TEMPLATES)}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(model_folder), trust_remote_code=trust_remote_code, local_files_only=local_files_only
        )
    except (OSError, ValueError) as error:
        raise DataError(f"{model_folder}: no tokenizer that can be loaded ({str(error).splitlines()[0]}).") from error

    arguments = DataArguments(template=template, default_system=default_system, enable_thinking=enable_thinking)
    own, registry = getattr(tokenizer, "chat_template", None), dict(TEMPLATES)
    TEMPLATES.update({name: copy.deepcopy(entry) for name, entry in registry.items() if name == template})
    try:
        return ChatEncoding(tokenizer, get_template_and_fix_tokenizer(tokenizer, arguments), own)
    finally:
        # get_template_and_fix_tokenizer writes the system prompt and the thinking mode into the shared registry.
        TEMPLATES.update(registry)


def _nearest(name: str, known: Any) -> str:
    import difflib

    nearest = difflib.get_close_matches(name, list(known), n=3)
    return f" Did you mean {' or '.join(nearest)}?" if nearest else ""


# --- limits for the model's chat template -----------------------------------------------------------------------------

# A chat template is a program: `{% for %}` loops of any length, `'x' * 10**10`. The sandbox in which transformers
# renders it blocks access to files, but limits neither time nor memory.


@contextmanager
def limited(what: str, *, seconds: float = 10.0, memory: int = 1 << 30) -> Iterator[None]:
    """Limit how long a block runs, and how much memory it takes in addition to what the process has now.

    Works only in the main thread, because it uses SIGALRM, and cannot be nested.

    Args:
        what: the subject of the error message, for example `chat_template.jinja`.
        seconds: the limit of wall-clock time.
        memory: the limit of additional address space, in bytes.

    Raises:
        DataError: a limit was reached.
    """

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = _address_space() + memory
    limit = min([limit, *(each for each in (soft, hard) if each != resource.RLIM_INFINITY)])
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except TimeoutError as error:
        raise DataError(f"{what}: still running after {seconds:g} seconds. Replace it.") from error
    except MemoryError as error:
        raise DataError(f"{what}: needs more than {memory / (1 << 30):g} GiB of memory. Replace it.") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()
