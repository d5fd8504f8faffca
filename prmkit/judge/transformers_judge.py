"""Score with a local model. No other module of prmkit loads a model."""

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

from prmkit.errors import DataError, UsageError
from prmkit.judge.batching import EncodedPrompt, judgements_in_order, make_preparer, parse_generated
from prmkit.judge.score_trie import TrieOf, VerdictReader, common_length, tries_of
from prmkit.judge.sources import JudgeSource, check_folders, encoding_of, needs_trust, read_object
from prmkit.judge.tree_attention import TokenTrees, check_architecture
from prmkit.judge.types import DEFAULT_OPTIONS, Judgement, Request, ScoringOptions
from prmkit.prompts.encoding import ChatEncoding

log = logging.getLogger("prmkit")

_READ_AHEAD = 64
"""Sort at least this many requests together, which gives batches with little padding and puts the steps of a trajectory
next to each other."""
_BATCHES_READ_AHEAD = 8

Chain = Sequence[EncodedPrompt]
"""Prompts that are run one after another in one row of a batch, because each shares a prefix with the previous one."""


@dataclass(frozen=True)
class LocalJudge:
    """A loaded model and the encoding that it was trained with."""

    source: JudgeSource
    encoding: ChatEncoding
    model: Any
    """A `transformers` or `peft` causal language model in evaluation mode."""

    def score(self, requests: Iterable[Request], options: ScoringOptions = DEFAULT_OPTIONS) -> Iterator[Judgement]:
        """Judge any number of requests; equal ones are judged once.

        Args:
            requests: read as needed, some dozens ahead.
            asking: inference settings; the batch size is reduced if the GPU's memory is too small.

        Yields:
            One judgement per request, in order.

        Raises:
            UsageError: expected scores cannot be read from this tokenizer, template or architecture.
        """
        chains_of: Callable[[Sequence[EncodedPrompt]], list[list[int]]]
        if options.mode == "expected":
            check_architecture(self.model)
            chains_of = partial(_chains, side_by_side=self.model.device.type != "cpu")
            answer = partial(self._expected, min_label_mass=options.min_label_mass)
        else:
            chains_of, answer = _single_chains, partial(self._generated, max_new_tokens=options.max_new_tokens)
        return judgements_in_order(
            requests,
            make_preparer(self.encoding, self.source.cutoff_len, trim=options.trim),
            lambda ready: _in_batches(ready, chains_of(ready), options.batch_size, answer),
            window=max(_READ_AHEAD, options.batch_size * _BATCHES_READ_AHEAD),
        )

    def _expected(self, chains: Sequence[Chain], min_label_mass: float) -> list[list[Judgement]]:
        """Read the scores of chains, longest first, whose prompts all have the same number of keys."""
        trees = TokenTrees(self.model, len(chains))
        judgements: list[list[Judgement]] = [[] for _ in chains]
        for turn in range(len(chains[0])):
            prompts = [chain[turn] for chain in chains if len(chain) > turn]
            trees.set_prompts([prompt.ids for prompt in prompts])
            readers = [VerdictReader(prompt.shape, self._trie_of, min_label_mass) for prompt in prompts]
            while any(questions := [reader.questions() for reader in readers]):
                for reader, readings in zip(readers, trees.read(questions), strict=True):
                    if readings:
                        reader.read(readings)
            for given, reader in zip(judgements, readers, strict=False):
                given.append(reader.judgement())
        return judgements

    @cached_property
    def _trie_of(self) -> TrieOf:
        return tries_of(self.encoding)

    def _generated(self, chains: Sequence[Chain], max_new_tokens: int) -> list[list[Judgement]]:
        """Generate verdicts greedily; every chain has one prompt."""
        import torch

        batch = [prompt for (prompt,) in chains]
        width = max(len(prompt.ids) for prompt in batch)
        ids = torch.zeros((len(batch), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(batch):
            ids[row, width - len(prompt.ids) :] = torch.tensor(prompt.ids)
            mask[row, width - len(prompt.ids) :] = 1
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
        answers = [list(takewhile(lambda token: token not in stop_ids, answer)) for answer in written]
        texts = map(self.encoding.tokenizer.decode, answers)
        return [[parse_generated(text, prompt.shape)] for text, prompt in zip(texts, batch, strict=True)]


# --- batches ----------------------------------------------------------------------------------------------------------

BatchFunction = Callable[[Sequence[Chain]], list[list[Judgement]]]


def _chains(ready: Sequence[EncodedPrompt], *, side_by_side: bool) -> list[list[int]]:
    """Sort prompts by their tokens, split them where one shares little with the previous one, and return indices.

    In this order, no earlier prompt shares more with a prompt than its predecessor. The steps of a trajectory share
    most of their tokens.

    Args:
        ready: the prompts.
        side_by_side: ignore the prefix that all prompts share, for example the rubric, because a batch runs it once
            for all rows, and a GPU runs several rows in the time of one. A CPU takes as long either way, and longer
            for rows of different lengths.
    """
    chains: list[list[int]] = []
    order = sorted(range(len(ready)), key=lambda index: (len(ready[index].shape.keys), ready[index].ids))
    shared = [common_length(ready[one].ids, ready[other].ids) for one, other in pairwise(order)]
    by_all = min(shared, default=0) if side_by_side else 0
    for index, in_common in zip(order, [0, *shared], strict=False):
        this, last = ready[index], ready[chains[-1][-1]] if chains else None
        is_next = last is not None and len(last.shape.keys) == len(this.shape.keys)
        if is_next and in_common - by_all >= (len(this.ids) - by_all) / 3:
            chains[-1].append(index)
        else:
            chains.append([index])
    return chains


def _single_chains(ready: Sequence[EncodedPrompt]) -> list[list[int]]:
    return [[index] for index in range(len(ready))]


def _in_batches(
    ready: Sequence[EncodedPrompt], chains: Sequence[list[int]], batch_size: int, answer: BatchFunction
) -> list[Judgement]:
    """Judge in batches of chains with equally many keys, longest first, so that running out of memory occurs first."""

    def order(chain: list[int]) -> tuple[int, int, int]:
        last = ready[chain[-1]]
        return len(last.shape.keys), -len(chain), -len(last.ids)

    rest = sorted(chains, key=order)
    judgements: dict[int, Judgement] = {}
    while rest:
        batch = [chain for chain in rest[:batch_size] if order(chain)[0] == order(rest[0])[0]]
        rest = rest[len(batch) :]
        answers = _as_memory_allows([[ready[index] for index in chain] for chain in batch], answer)
        for chain, given in zip(batch, answers, strict=True):
            judgements.update(zip(chain, given, strict=True))
    return [judgements[index] for index in range(len(ready))]


def _as_memory_allows(chains: Sequence[Chain], answer: BatchFunction) -> list[list[Judgement]]:
    """Judge all chains at once, or in halves if the GPU's memory is too small; a prompt too large by itself fails."""
    import torch

    try:
        return answer(chains)
    except torch.OutOfMemoryError as error:
        shortage = _first_line(error)
    # Outside the handler, whose traceback would keep the tensors alive.
    torch.cuda.empty_cache()
    if len(chains) > 1:
        log.warning("out of GPU memory with batch size %d; retrying with half", len(chains))
        middle = len(chains) // 2
        return [*_as_memory_allows(chains[:middle], answer), *_as_memory_allows(chains[middle:], answer)]
    (chain,) = chains
    if len(chain) > 1:
        middle = len(chain) // 2
        halves = [_as_memory_allows([half], answer)[0] for half in (chain[:middle], chain[middle:])]
        return [[*halves[0], *halves[1]]]
    return [[Judgement("failed", reason=f"out of memory: {shortage}")]]


# --- loading ----------------------------------------------------------------------------------------------------------


def load_model(source: JudgeSource) -> LocalJudge:
    """Load the tokenizer, the model and its adapter. Takes about ten seconds plus the time to read the weights.

    Raises:
        DataError: a folder is missing, or nothing in it can be loaded.
        UsageError: an unknown template, device or dtype, or a model with its own code, which was not allowed to run.
    """
    _check_complete(source)
    return LocalJudge(source, encoding_of(source), _load_weights(source))


def _load_weights(source: JudgeSource) -> Any:
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
            # Gemma 2 caps its attention scores, which fused kernels cannot do; LLaMA Factory also trains it this way.
            attn_implementation="eager" if config.model_type == "gemma2" else None,
        )
        if source.adapter is not None:
            model = _with_adapter(model, source.adapter)
        model = model.to(device)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        failure = DataError(
            f"{source.adapter or source.model}: cannot be loaded ({_first_line(error)}). Export or download it again."
        )
        raise needs_trust(source, error) or failure from error
    # The model's own config may have a repetition penalty, which would change digits.
    model.generation_config = GenerationConfig()
    return model.eval()


def _check_complete(source: JudgeSource) -> None:
    """Check for weights and settings, without which the libraries look for a name on a hub, or raise a traceback.

    Raises:
        DataError: something is missing or damaged.
    """
    check_folders(source)
    if source.model.is_dir():
        read_object(source.model / "config.json")
        _check_weights(source.model, "")
    if source.adapter is not None:
        read_object(source.adapter / "adapter_config.json", peft_type=str)
        _check_weights(source.adapter, "adapter_model")


def _check_weights(folder: Path, beginning: str) -> None:
    if not any(file.suffix in (".safetensors", ".bin") for file in folder.glob(f"{beginning}*")):
        raise DataError(f"{folder}: no weights ({beginning or 'model'}*.safetensors). Download or train it again.")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _with_adapter(model: Any, adapter: Path) -> Any:
    """Add the adapter to the model; merge it if that loses nothing."""
    import torch
    from peft import PeftModel

    with warnings.catch_warnings():
        if not model.config.tie_word_embeddings:  # peft warns about every model whose embeddings were trained
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        adapted = PeftModel.from_pretrained(model, str(adapter))
    # Merging in float32 changes scores by 1e-7 and avoids the small matrices of every layer, which take a quarter of
    # the time on a CPU. In bfloat16, merging would round the adapter away.
    return adapted.merge_and_unload(safe_merge=True) if model.dtype == torch.float32 else adapted


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name} is not a torch device. Use cpu, cuda or cuda:0.") from error
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # depends on how torch was built
        raise UsageError(f"torch cannot use --device {name} on this machine. Use --device cpu.") from error
    return device


def _dtype(source: JudgeSource, device: Any) -> str:
    if source.dtype != "auto":
        return source.dtype
    return "float32" if device.type == "cpu" else source.trained_dtype
