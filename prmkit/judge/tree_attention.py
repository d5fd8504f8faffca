"""Compute the probabilities of many short answers to long prompts, running each distinct token through the model once.

A batch has rows, and each row is a *tree of tokens* in the KV cache: a trunk (the prompt), and on top of it every
candidate answer. Each token in the cache has a *slot*, the same index for its key and value in every layer. The earlier
tokens that a token attends to do not depend on their order in the cache, but on an explicit mask: a token attends to
its ancestors in the tree and to itself, and to no other token.

    slots      0   1   2   3   4   5   6   7
    tokens     the trunk   {   0   1   .   .           "4" and "5" are two candidates; 6 follows 4, 7 follows 5
    parents   -1   0   1   2   3   3   4   5
    mask of 7  x   x   x   x       x       x

This has three consequences. Candidates run in parallel in one pass, and later tokens do not attend to rejected ones.
Rows may have prompts of different lengths and trees of different shapes. And if the next prompt of a row begins like
the previous one (as the steps of a trajectory do), it keeps that part of the trunk, and only the rest is run.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from prmkit.errors import UsageError
from prmkit.judge.score_trie import Reading, TrieQuery, common_length

_TOKENS_A_PASS = 1024
"""The maximum number of tokens per pass, over all rows, if a mask is needed. It limits the memory for masks, and for
logits, of which each token has one per vocabulary entry."""

_MUCH_SHARED = 0.3
"""The common prefix of a batch is run once for all rows if it is at least this fraction of the longest prompt."""


def check_architecture(model: Any) -> None:
    """Reject architectures whose layers keep a recurrent state, instead of keys that a mask can hide.

    Args:
        model: a causal language model of `transformers`, or one with its own code.

    Raises:
        UsageError: the model has layers other than full and sliding-window attention, or cannot compute only some of
            the logits.
    """
    forward = getattr(model, "get_base_model", lambda: model)().forward
    if "logits_to_keep" not in inspect.signature(forward).parameters:
        raise UsageError(f"{type(model).__name__}.forward() does not accept logits_to_keep. Use --mode generate.")
    text = model.config.get_text_config(decoder=True)
    foreign = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if foreign or getattr(text, "attention_chunk_size", None) or not hasattr(text, "num_attention_heads"):
        actual = ", ".join(sorted(foreign)) or text.model_type
        needed = "Expected scores need full or sliding-window attention"
        raise UsageError(f"{needed}, but this model uses {actual}. Use --mode generate.")


@dataclass
class _Row:
    """The cached tokens of one row."""

    prompt: list[int] = field(default_factory=list)
    trunk: list[int] = field(default_factory=list)
    """The slot of each token of the prompt, by position. The last token is not included: it runs with the first
    candidates, because its logits are needed."""
    branches: dict[tuple[int, int], int] = field(default_factory=dict)
    """(parent's slot, token id) -> slot, for each token above the trunk."""
    parents: dict[int, int] = field(default_factory=dict)
    """Slot -> parent's slot, for each token above the trunk."""

    @property
    def top(self) -> int:
        """The slot of the trunk's last token; -1 without one."""
        return self.trunk[-1] if self.trunk else -1


@dataclass
class _PendingTokens:
    """Tokens to be added to a row, parents before children."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    """The parents' slots, which may be those of other pending tokens."""
    positions: list[int] = field(default_factory=list)
    wanted: list[tuple[int, int]] = field(default_factory=list)
    """(index of a pending token, token that may follow): the log-probabilities to read."""

    def add(self, token: int, parent: int, position: int) -> int:
        """Add one token, and return its index."""
        self.tokens.append(token)
        self.parents.append(parent)
        self.positions.append(position)
        return len(self.tokens) - 1


class TokenTrees:
    """The trees of a batch, and the model that evaluates them."""

    def __init__(self, model: Any, rows: int) -> None:
        """Start with empty rows.

        Args:
            model: a causal language model of `transformers`, in evaluation mode.
            rows: the number of rows.
        """
        import numpy as np
        from transformers import DynamicCache

        self._model = model
        # Without a configuration, every layer keeps all its keys; the masks apply sliding windows instead.
        self._cache = DynamicCache()
        self._rows = [_Row() for _ in range(rows)]
        self._positions = np.zeros((rows, 0), dtype=np.int64)
        """The position of the token in every slot, of shape (rows, slots)."""
        self._unread: list[_PendingTokens] = []
        """The tokens of each prompt that are not in the cache yet; they run with the first questions, in one pass."""

    def set_prompts(self, prompts: Sequence[Sequence[int]]) -> None:
        """Give every row its next prompt of at least one token, without running its prefix that is already cached.

        If there are fewer prompts than rows, the rows at the end are dropped permanently.
        """
        self._run(self._unread)
        if len(prompts) < len(self._rows):
            self._drop_rows(len(prompts))
        for row, prompt in zip(self._rows, prompts, strict=True):
            shared = common_length(row.prompt[:-1], prompt[:-1])
            row.prompt, row.trunk = list(prompt), row.trunk[:shared]
            row.branches.clear()
            row.parents.clear()
        # Slots after the last one still used by a trunk are free again.
        self._crop(max((row.top for row in self._rows), default=-1) + 1)
        if self._slots == 0:
            self._run_first_prompts()
        self._unread = [self._rest_of_trunk(row) for row in self._rows]

    def read(self, questions: Sequence[Sequence[TrieQuery]]) -> list[list[Reading]]:
        """Answer all questions about all rows' prompts together; rows may have different numbers of questions."""
        added, self._unread = self._unread or [_PendingTokens() for _ in self._rows], []
        for row, additions, row_questions in zip(self._rows, added, questions, strict=True):
            for question in row_questions:
                self._add_question(row, additions, question)
        values = map(iter, self._run(added))
        return [
            [_reading(question, row_values) for question in row_questions]
            for row_questions, row_values in zip(questions, values, strict=True)
        ]

    # --- trees --------------------------------------------------------------------------------------------------------

    @property
    def _slots(self) -> int:
        return int(self._positions.shape[1])

    def _rest_of_trunk(self, row: _Row) -> _PendingTokens:
        additions = _PendingTokens()
        for position in range(len(row.trunk), len(row.prompt) - 1):
            index = additions.add(row.prompt[position], row.top, position)
            row.trunk.append(self._slots + index)
        return additions

    def _add_question(self, row: _Row, additions: _PendingTokens, question: TrieQuery) -> None:
        """Add the tokens that a question needs and the row lacks, and note which probabilities to read.

        A token's probability is read at its predecessor, in the pass that runs the predecessor. So all tokens from the
        one before the first forced token are run, even those of an earlier pass, because their logits were discarded.
        """
        trie, slot = question.trie, row.top
        # `sequence[i]` comes just before `trie.context[i]`.
        sequence, kept = (row.prompt[-1], *trie.context), 0
        while kept < question.forced_from and (slot, sequence[kept]) in row.branches:
            slot = row.branches[slot, sequence[kept]]
            kept += 1
        for index in range(kept, len(sequence)):
            slot = self._branch(row, additions, sequence[index], slot, index)
            if question.forced_from <= index < len(trie.context):
                additions.wanted.append((slot - self._slots, trie.context[index]))
        nodes, depths = [slot], [len(trie.context)]
        for token, parent in zip(trie.tokens, trie.parents, strict=True):
            depths.append(depths[parent] + 1)
            nodes.append(self._branch(row, additions, token, nodes[parent], depths[-1]))
        additions.wanted.extend((nodes[node] - self._slots, token) for node, token in trie.edges)

    def _branch(self, row: _Row, additions: _PendingTokens, token: int, parent: int, depth: int) -> int:
        slot = self._slots + additions.add(token, parent, len(row.trunk) + depth)
        row.branches[parent, token] = slot
        row.parents[slot] = parent
        return slot

    def _with_ancestors(self, index: int, slot: int) -> list[int]:
        """Return a cached slot of one row and all its ancestors; nothing for -1, the parent of the first token."""
        row, branch = self._rows[index], []
        while slot in row.parents:
            branch.append(slot)
            slot = row.parents[slot]
        trunk = row.trunk[: self._positions[index, slot] + 1] if slot >= 0 else []
        return trunk + branch

    # --- running the model --------------------------------------------------------------------------------------------

    def _run_first_prompts(self) -> None:
        """Fill an empty cache with the prompts except their last tokens or, if they share much, with the common prefix.

        The common prefix (the rubric) is run in one row and copied to the others, so that the rest costs as if the
        prompts were that much shorter. But this needs a mask, which costs more than it saves if the prompts share
        little.

        The padding is on the right, where causal attention ignores it, so no mask is needed and the fastest kernels can
        be used. No row's tree contains the padding's slots, so no token attends to them later.
        """
        import numpy as np
        import torch

        prompts = [row.prompt[:-1] for row in self._rows]
        shared = min(common_length(prompts[0], prompt) for prompt in prompts)
        width = max(map(len, prompts))
        if len(prompts) > 1 and shared >= width * _MUCH_SHARED:
            prompts, width = [prompts[0][:shared]], shared
        ids = np.zeros((len(prompts), width), dtype=np.int64)
        for index, prompt in enumerate(prompts):
            ids[index, : len(prompt)] = prompt
        for index, row in enumerate(self._rows):
            row.trunk = list(range(len(prompts[min(index, len(prompts) - 1)])))
        if width:
            self._positions = np.tile(np.arange(width), (len(self._rows), 1))
            with torch.inference_mode():
                self._forward(torch.from_numpy(ids), logits_to_keep=1)
                if len(prompts) < len(self._rows):
                    self._cache.batch_repeat_interleave(len(self._rows))

    def _run(self, added: Sequence[_PendingTokens]) -> list[list[float]]:
        """Run the pending tokens of all rows in parallel, in as many passes as needed, and read the probabilities.

        The slot of a pending token is the number of slots before the first pass plus its index: every pass except the
        last is full, so padding comes only after the last pending token of a row.
        """
        import torch

        values = [[0.0] * len(additions.wanted) for additions in added]
        count = max((len(additions.tokens) for additions in added), default=0)
        most = max(1, _TOKENS_A_PASS // max(1, len(added)))
        with torch.inference_mode():
            for first in range(0, count, most):
                width = min(most, count - first)
                wanted = [
                    [
                        (output, index - first, token)
                        for output, (index, token) in enumerate(additions.wanted)
                        if first <= index < first + width
                    ]
                    for additions in added
                ]
                # The first tokens (the rest of a prompt) need no logits, so logits are computed only for the last ones.
                without = min((index for here in wanted for _, index, _ in here), default=width - 1)
                logits = self._run_pass(added, first, width, width - without)
                for row, here in enumerate(wanted):
                    shifted = [(output, index - without, token) for output, index, token in here]
                    for output, value in _log_probabilities(logits[row], shifted):
                        values[row][output] = value
        return values

    def _run_pass(self, added: Sequence[_PendingTokens], first: int, width: int, kept: int) -> Any:
        """Run pending tokens `first` … `first + width - 1` of every row; return logits (rows, kept, vocabulary)."""
        import numpy as np
        import torch

        cached = self._slots
        ids = np.zeros((len(added), width), dtype=np.int64)
        positions = np.zeros((len(added), width), dtype=np.int64)
        seen = np.zeros((len(added), width, cached + width), dtype=bool)
        # A fully masked row gives NaN, so every token attends to itself, including the padding.
        seen[:, np.arange(width), cached + np.arange(width)] = True
        for index, additions in enumerate(added):
            here = slice(first, first + width)
            count = len(additions.tokens[here])
            ids[index, :count] = additions.tokens[here]
            positions[index, :count] = additions.positions[here]
            parents = additions.parents[here]
            chain = _chain_length(parents, cached)  # the rest of a prompt
            seen[index, :chain, self._with_ancestors(index, parents[0]) if parents else []] = True
            seen[index, :chain, cached : cached + chain] |= np.tri(chain, dtype=bool)
            for token in range(chain, count):
                if (parent := parents[token]) >= cached:
                    seen[index, token] |= seen[index, parent - cached]
                else:
                    seen[index, token, self._with_ancestors(index, parent)] = True
        self._positions = np.concatenate([self._positions, positions], axis=1)
        return self._forward(
            torch.from_numpy(ids),
            position_ids=torch.from_numpy(positions).to(self._model.device),
            attention_mask=self._masks(seen, positions),
            logits_to_keep=kept,
        )

    def _forward(self, ids: Any, **arguments: Any) -> Any:
        """Return logits of the tokens, and append their keys and values to the cache."""
        return self._model(
            input_ids=ids.to(self._model.device), past_key_values=self._cache, use_cache=True, **arguments
        ).logits

    def _masks(self, seen: Any, positions: Any) -> Any:
        """Return the mask as the model takes it: a tensor, or one per type of layer.

        Args:
            seen: which slots each token attends to, of shape (rows, tokens, slots).
            positions: the tokens' positions, of shape (rows, tokens).
        """
        config = self._model.config.get_text_config(decoder=True)
        window = getattr(config, "sliding_window", None)
        if window is None:
            return self._additive(seen)
        distances = positions[:, :, None] - self._positions[:, None, :]
        if (distances < window).all():
            return self._additive(seen)
        near = self._additive(seen & (distances < window))
        if getattr(config, "layer_types", None) is None:
            return near
        return {"full_attention": self._additive(seen), "sliding_attention": near}

    def _additive(self, seen: Any) -> Any:
        """Return the mask as numbers to add to attention scores, which all implementations except flash accept."""
        import torch

        hidden = torch.finfo(self._model.dtype).min
        mask = torch.from_numpy(~seen).to(self._model.device)[:, None]
        return torch.zeros(mask.shape, dtype=self._model.dtype, device=mask.device).masked_fill_(mask, hidden)

    # --- shrinking the cache ------------------------------------------------------------------------------------------

    def _crop(self, slots: int) -> None:
        if slots < self._slots:
            self._positions = self._positions[:, :slots]
            self._cache.crop(slots)

    def _drop_rows(self, kept: int) -> None:
        import torch

        self._rows, self._positions = self._rows[:kept], self._positions[:kept]
        self._cache.batch_select_indices(torch.arange(kept, device=self._model.device))


def _chain_length(parents: Sequence[int], cached: int) -> int:
    """Count the tokens at the beginning of a pass that each follow the one before."""
    for index, parent in enumerate(parents[1:]):
        if parent != cached + index:
            return index + 1
    return len(parents)


def _log_probabilities(logits: Any, wanted: Sequence[tuple[int, int, int]]) -> Iterator[tuple[int, float]]:
    """Yield the log-probability of each (output index, index of a token, token after it), with its output index.

    Args:
        logits: the logits of one row, of shape (tokens, vocabulary).
        wanted: the log-probabilities to read.
    """
    if wanted:
        outputs, indices, tokens = map(list, zip(*wanted, strict=True))
        row_of = {index: row for row, index in enumerate(dict.fromkeys(indices))}
        logits = logits[list(row_of)].float()  # logits of other tokens, for example padding, are not copied
        rows = [row_of[index] for index in indices]
        yield from zip(outputs, (logits[rows, tokens] - logits.logsumexp(dim=-1)[rows]).tolist(), strict=True)


def _reading(question: TrieQuery, values: Iterator[float]) -> Reading:
    """Pop the values of one question from the row's, in the order in which `_add_question` noted them."""
    trie = question.trie
    log_reach = sum(next(values) for _ in trie.context[question.forced_from :])
    steps = [next(values) for _ in trie.edges]
    return Reading(log_reach, [sum(steps[edge] for edge in path) for path in trie.paths])
