"""Probabilities of many short answers behind long prompts: one prefill, then one tree-masked forward pass a score key.

The KV cache of a batch is a bag of slots, each with a token and a position, and every row has its own list of the slots
that it sees. So rows may have prompts of different lengths and trees of different shapes, tokens that were tried and
not chosen are simply not seen any more, and nothing is computed twice or copied out of the cache.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prmkit.errors import UsageError
from prmkit.judge.score_trie import ScoreTrie, common_length


def refuse_unsuitable(model: Any) -> None:
    """Refuse architectures whose layers keep a running state instead of keys that a mask can hide.

    Args:
        model: a causal language model of `transformers`, or one that came with its own code.

    Raises:
        UsageError: the model has other layers than full and sliding-window attention, or its code knows nothing of
            computing a part of the logits.
    """
    forward = getattr(model, "get_base_model", lambda: model)().forward
    if "logits_to_keep" not in inspect.signature(forward).parameters:
        raise UsageError(f"the code of {type(model).__name__} takes no logits_to_keep. Use --mode generate.")
    text = model.config.get_text_config(decoder=True)
    foreign = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if foreign or getattr(text, "attention_chunk_size", None) or not hasattr(text, "num_attention_heads"):
        kinds = ", ".join(sorted(foreign)) or text.model_type
        raise UsageError(f"expected scores need attention that a mask can steer, not {kinds}. Use --mode generate.")


@dataclass(frozen=True)
class _Block:
    """The tokens that one row adds in one forward pass: a chain that goes on from the cache, then the trie's nodes."""

    trie: ScoreTrie
    kept: int
    """How many cached tokens behind the prompt it goes on from."""
    chain: tuple[int, ...]
    """Ends in the trie's root, so there is always one."""

    @property
    def tokens(self) -> tuple[int, ...]:
        return (*self.chain, *self.trie.tokens)

    @property
    def parents(self) -> list[int]:
        """The index of each token's parent, which stands before it; -1 for the first one, whose parent is cached."""
        root = len(self.chain) - 1
        return [*range(-1, root), *(root + parent for parent in self.trie.parents)]


class PromptTrees:
    """A batch of prompts in the KV cache, and the answers that grow behind them."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]]) -> None:
        """Prefill the prompts but for their last tokens, which begin the first trees.

        The padding stands on the right, where causal attention keeps it from being seen: so no mask is needed, and the
        fastest kernels can be used. Its slots are hidden from all that comes later.

        Args:
            model: a causal language model of `transformers`, in evaluation mode.
            prompts: token ids, at least two in each.
        """
        import numpy as np
        import torch
        from transformers import DynamicCache

        self._model = model
        # Without a configuration every layer keeps all its keys; sliding windows are cut into the masks instead.
        self._cache = DynamicCache()
        self._prompt_lengths = [len(prompt) - 1 for prompt in prompts]
        # What each row has in the cache behind that, in order: (token, slot).
        self._answers: list[list[tuple[int, int]]] = [[] for _ in prompts]
        self._last_tokens = [prompt[-1] for prompt in prompts]
        self._blocks: list[_Block] = []

        width = max(self._prompt_lengths)
        ids = np.zeros((len(prompts), width), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt) - 1] = prompt[:-1]
        self._positions = np.tile(np.arange(width), (len(prompts), 1))
        with torch.inference_mode():
            self._forward(torch.from_numpy(ids), logits_to_keep=1)

    def _forward(self, ids: Any, **arguments: Any) -> Any:
        ids = ids.to(self._model.device)
        return self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, **arguments).logits

    def log_probabilities(self, tries: Sequence[ScoreTrie]) -> list[list[float]]:
        """Natural logarithms of the probabilities of `SCORES`, for every row of the batch.

        Args:
            tries: one a row; their contexts go on from what `choose` chose. What is cached of them is not run again.
        """
        import torch

        self._blocks = [self._block(row, trie) for row, trie in enumerate(tries)]
        # Trees stand flush right, so that one number says which positions need logits: a vocabulary of 150,000 for
        # every token of a long prompt would fit nowhere.
        nodes = [1 + len(trie.tokens) for trie in tries]
        with torch.inference_mode():
            logits = self._run_blocks(logits_to_keep=max(nodes))
            return [
                _path_sums(trie, logits[row, -count:])
                for row, (trie, count) in enumerate(zip(tries, nodes, strict=True))
            ]

    def _block(self, row: int, trie: ScoreTrie) -> _Block:
        sequence = (self._last_tokens[row], *trie.context)
        kept = min(common_length([token for token, _ in self._answers[row]], sequence), len(sequence) - 1)
        return _Block(trie, kept, sequence[kept:])

    def _run_blocks(self, *, logits_to_keep: int) -> Any:
        import numpy as np
        import torch

        rows, cached = self._positions.shape
        width = max(len(block.tokens) for block in self._blocks)
        ids = np.zeros((rows, width), dtype=np.int64)
        positions = np.zeros((rows, width), dtype=np.int64)
        seen = np.zeros((rows, width, cached + width), dtype=bool)
        # A query that sees nothing would be NaN, so the padding sees itself.
        seen[:, np.arange(width), cached + np.arange(width)] = True
        for row, block in enumerate(self._blocks):
            first = width - len(block.tokens)
            history = self._answers[row][: block.kept]
            seen[row, first:, : self._prompt_lengths[row]] = True
            seen[row, first:, [slot for _, slot in history]] = True
            ids[row, first:] = block.tokens
            positions[row, first] = self._prompt_lengths[row] + block.kept
            for index, parent in enumerate(block.parents[1:], start=first + 1):
                seen[row, index] |= seen[row, first + parent]
                positions[row, index] = positions[row, first + parent] + 1
            chain = range(cached + first, cached + first + len(block.chain))
            self._answers[row] = [*history, *zip(block.chain, chain, strict=True)]
        self._positions = np.concatenate([self._positions, positions], axis=1)
        return self._forward(
            torch.from_numpy(ids),
            position_ids=torch.from_numpy(positions).to(self._model.device),
            attention_mask=self._masks(seen, positions),
            logits_to_keep=logits_to_keep,
        )

    def _masks(self, seen: Any, positions: Any) -> Any:
        """What the model takes as its mask: a tensor, or one for each kind of its layers.

        Args:
            seen: which slots each query sees, of shape (rows, queries, slots).
            positions: of the queries, of shape (rows, queries).
        """
        config = self._model.config.get_text_config(decoder=True)
        window = getattr(config, "sliding_window", None)
        distances = positions[:, :, None] - self._positions[:, None, :]
        if window is None or (distances < window).all():
            return self._additive(seen)
        near = self._additive(seen & (distances < window))
        if getattr(config, "layer_types", None) is None:
            return near
        return {"full_attention": self._additive(seen), "sliding_attention": near}

    def _additive(self, seen: Any) -> Any:
        """The mask as numbers to add to attention scores, which every attention implementation but flash takes."""
        import torch

        hidden = torch.finfo(self._model.dtype).min
        mask = torch.from_numpy(~seen).to(self._model.device)[:, None]
        return torch.zeros(mask.shape, dtype=self._model.dtype, device=mask.device).masked_fill_(mask, hidden)

    def choose(self, row: int, candidate: int) -> None:
        """Let a row's answer go on behind one of `SCORES`, by its index; its tokens stay in the cache."""
        block = self._blocks[row]
        first_inner = self._positions.shape[1] - len(block.trie.tokens)
        for edge in block.trie.paths[candidate][1:]:
            node = block.trie.edges[edge][0]
            self._answers[row].append((block.trie.tokens[node - 1], first_inner + node - 1))


def _path_sums(trie: ScoreTrie, logits: Any) -> list[float]:
    """The log-probability of every candidate.

    Args:
        trie: the candidates.
        logits: of shape (1 + inner nodes, vocabulary), the root's first.
    """
    nodes, tokens = map(list, zip(*trie.edges, strict=True))
    logits = logits.float()
    steps = (logits[nodes, tokens] - logits.logsumexp(dim=-1)[nodes]).tolist()
    return [sum(steps[edge] for edge in path) for path in trie.paths]
