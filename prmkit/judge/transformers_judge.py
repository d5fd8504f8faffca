"""The judge: a fine-tuned model that scores steps. The only module of prmkit that loads a model."""

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from prmkit.errors import DataError, UsageError
from prmkit.judge.batching import Prepared, judgements_in_order, preparing, read_written
from prmkit.judge.score_trie import TrieOf, distribution_of, mean_std, tries_of
from prmkit.judge.sources import JudgeSource, encoding_of, read_object, refuse_missing
from prmkit.judge.tree_attention import PromptTrees, refuse_unsuitable
from prmkit.judge.types import Distribution, Judgement, Mode, Request
from prmkit.prompts.encoding import ChatEncoding

log = logging.getLogger("prmkit")

_BATCHES_READ_AHEAD = 8
"""Requests of as many batches are sorted by length together: enough for batches with little padding."""


@dataclass(frozen=True)
class Judge:
    """A loaded model and the encoding that it was trained with."""

    source: JudgeSource
    encoding: ChatEncoding
    model: Any
    """A `transformers` or `peft` causal language model in evaluation mode."""

    def score(
        self,
        requests: Iterable[Request],
        *,
        batch_size: int = 8,
        mode: Mode = "expected",
        trim: bool = True,
        max_new_tokens: int = 1024,
    ) -> Iterator[Judgement]:
        """Judge any number of requests; equal ones are judged once.

        Args:
            requests: read as they are needed, a few batches ahead.
            batch_size: the most prompts to run at once. When the GPU's memory is too small, fewer are.
            mode: read probabilities, or let the model write.
            trim: shorten prompts that are too long, as the conversion does; else they are `too_long`.
            max_new_tokens: the longest verdict to write, in generate mode.

        Yields:
            One judgement a request, in their order.

        Raises:
            UsageError: expected scores cannot be read from this tokenizer, template or architecture.
        """
        if mode == "expected":
            refuse_unsuitable(self.model)
            answer: Callable[[Sequence[Prepared]], list[Judgement]] = self._expected
        else:

            def answer(batch: Sequence[Prepared]) -> list[Judgement]:
                return self._generated(batch, max_new_tokens)

        return judgements_in_order(
            requests,
            preparing(self.encoding, self.source.cutoff_len, trim=trim),
            lambda ready: _by_length(ready, batch_size, answer),
            window=batch_size * _BATCHES_READ_AHEAD,
        )

    def _expected(self, batch: Sequence[Prepared]) -> list[Judgement]:
        """Read the scores of prompts that have the same number of keys."""
        trees = PromptTrees(self.model, [prepared.ids for prepared in batch])
        scores: list[dict[str, Distribution]] = [{} for _ in batch]
        for position in range(len(batch[0].shape.keys)):
            tries = [self._trie(prepared.shape, given) for prepared, given in zip(batch, scores, strict=True)]
            for row, log_probabilities in enumerate(trees.log_probabilities(tries)):
                distribution = distribution_of(log_probabilities)
                scores[row][batch[row].shape.keys[position]] = distribution
                trees.choose(row, round(distribution.mode * 100))
        return [Judgement("ok", given, std=mean_std(given)) for given in scores]

    @cached_property
    def _trie(self) -> TrieOf:
        return tries_of(self.encoding)

    def _generated(self, batch: Sequence[Prepared], max_new_tokens: int) -> list[Judgement]:
        """Let the model write its verdicts, greedily."""
        import torch

        width = max(len(prepared.ids) for prepared in batch)
        ids = torch.zeros((len(batch), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prepared in enumerate(batch):
            ids[row, width - len(prepared.ids) :] = torch.tensor(prepared.ids)
            mask[row, width - len(prepared.ids) :] = 1
        stop_ids = self.encoding.stop_ids
        with torch.inference_mode():
            written = self.model.generate(
                input_ids=ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                do_sample=False,
                max_new_tokens=max_new_tokens,
                eos_token_id=stop_ids,
                pad_token_id=stop_ids[0],
            )[:, width:].tolist()
        return [
            read_written(self.encoding.tokenizer.decode(_until(answer, stop_ids)), prepared.shape)
            for answer, prepared in zip(written, batch, strict=True)
        ]


def _until(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    end = next((position for position, token in enumerate(ids) if token in stop_ids), len(ids))
    return ids[:end]


def _by_length(
    ready: Sequence[Prepared], batch_size: int, answer: Callable[[Sequence[Prepared]], list[Judgement]]
) -> list[Judgement]:
    """Judge in batches of like length and equally many keys, the longest first: what does not fit shows at once."""
    order = sorted(range(len(ready)), key=lambda index: (len(ready[index].shape.keys), -len(ready[index].ids)))
    judgements: dict[int, Judgement] = {}
    while order:
        keys = len(ready[order[0]].shape.keys)
        batch = [index for index in order[:batch_size] if len(ready[index].shape.keys) == keys]
        order = order[len(batch) :]
        judgements.update(zip(batch, _as_memory_allows([ready[index] for index in batch], answer), strict=True))
    return [judgements[index] for index in range(len(ready))]


def _as_memory_allows(
    batch: Sequence[Prepared], answer: Callable[[Sequence[Prepared]], list[Judgement]]
) -> list[Judgement]:
    import torch

    try:
        return answer(batch)
    except torch.OutOfMemoryError as error:
        shortage = _first_line(error)
    # Outside of the handler, whose traceback would keep the tensors alive.
    torch.cuda.empty_cache()
    if len(batch) == 1:
        return [Judgement("failed", reason=f"out of memory: {shortage}")]
    log.warning("out of GPU memory with %d prompts at once: trying half as many", len(batch))
    middle = len(batch) // 2
    return [*_as_memory_allows(batch[:middle], answer), *_as_memory_allows(batch[middle:], answer)]


def load_judge(source: JudgeSource) -> Judge:
    """Load the tokenizer, the model and its adapter. Takes about ten seconds besides reading the weights.

    Raises:
        DataError: a folder is missing, or holds nothing that can be loaded.
        UsageError: an unknown template, device or dtype.
    """
    _refuse_incomplete(source)
    return Judge(source, encoding_of(source), _load_model(source))


def _load_model(source: JudgeSource) -> Any:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    device = _device(source.device)
    local = {"trust_remote_code": source.trust_remote_code, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(str(source.model), **local)
        model = AutoModelForCausalLM.from_pretrained(
            str(source.model),
            config=config,
            dtype=getattr(torch, _dtype(source, device)),
            **local,
            # Gemma 2 caps its attention scores, which the fused kernels cannot; LLaMA Factory trains it so as well.
            attn_implementation="eager" if config.model_type == "gemma2" else None,
        )
        if source.adapter is not None:
            model = _with_adapter(model, source.adapter)
        model = model.to(device)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise DataError(f"{source.adapter or source.model}: cannot be loaded ({_first_line(error)}).") from error
    # The model's own may hold a repetition penalty, which would bend digits.
    model.generation_config = GenerationConfig()
    return model.eval()


def _refuse_incomplete(source: JudgeSource) -> None:
    """Refuse folders without weights or with damaged settings, which the libraries take for names on a hub or die of.

    Raises:
        DataError: something is missing or damaged.
    """
    refuse_missing(source)
    if source.model.is_dir():
        read_object(source.model / "config.json")
        _refuse_without_weights(source.model, "")
    if source.adapter is not None:
        read_object(source.adapter / "adapter_config.json", peft_type=str)
        _refuse_without_weights(source.adapter, "adapter_model")


def _refuse_without_weights(folder: Path, beginning: str) -> None:
    if not any(file.suffix in (".safetensors", ".bin") for file in folder.glob(f"{beginning}*")):
        raise DataError(f"{folder}: no weights ({beginning or 'model'}*.safetensors). Download or train it again.")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _with_adapter(model: Any, adapter: Path) -> Any:
    from peft import PeftModel

    with warnings.catch_warnings():
        if not model.config.tie_word_embeddings:  # peft says so of every model whose embeddings were trained
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        return PeftModel.from_pretrained(model, str(adapter))


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device: torch knows no '{name}'. Use cpu, cuda or cuda:0.") from error
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # by how torch was built
        raise UsageError(f"device: torch finds no {name} here; use --device cpu.") from error
    return device


def _dtype(source: JudgeSource, device: Any) -> str:
    if source.dtype != "auto":
        return source.dtype
    return "float32" if device.type == "cpu" else source.trained_dtype
