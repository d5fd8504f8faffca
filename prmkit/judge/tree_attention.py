"""Probabilities of many short answers to long prompts: each distinct token is run through the model once.

A batch has rows, and each row is a *tree of tokens* in the KV cache: a trunk, which is the prompt, and on top of it
every answer that was tried. Each token in the cache has a *slot*, the same number for its key and value in every layer.
Which earlier tokens a token sees does not depend on their order in the cache but on a mask that we make: a token sees
its ancestors in the tree, and nothing else.

    slots      0   1   2   3   4   5   6   7
    tokens     the trunk   {   0   1   .   .           "4" and "5" are two candidates; 6 follows 4, 7 follows 5
    parents   -1   0   1   2   3   3   4   5
    7 sees     x   x   x   x       x       x

Three things follow. Candidates are tried side by side in one pass, and rejected candidates are simply not seen later.
Rows may have prompts of different lengths and trees of different shapes. And if the next prompt of a row begins like
the previous one (as the steps of a trajectory do), it keeps that part of the trunk: only what differs is run.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from prmkit.errors import UsageError
from prmkit.judge.score_trie import Reading, TrieQuery, common_length

_TOKENS_A_PASS = 1024
"""The most tokens in one pass, over all rows, if a mask is needed. It bounds the memory for masks and for logits, of
which each token has one per entry of the vocabulary."""

_MUCH_SHARED = 0.3
"""The common beginning of a batch is run once for all rows if it is at least this share of the longest prompt."""


def check_architecture(model: Any) -> None:
    """Reject architectures whose layers keep a running state instead of keys that a mask can hide.

    Args:
        model: a causal language model of `transformers`, or one with its own code.

    Raises:
        UsageError: the model has other layers than full and sliding-window attention, or its code cannot compute a
            part of the logits.
    """
    forward = getattr(model, "get_base_model", lambda: model)().forward
    if "logits_to_keep" not in inspect.signature(forward).parameters:
        raise UsageError(f"The code of {type(model).__name__} does not take logits_to_keep. Use --mode generate.")
    text = model.config.get_text_config(decoder=True)
    foreign = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if foreign or getattr(text, "attention_chunk_size", None) or not hasattr(text, "num_attention_heads"):
        kinds = ", ".join(sorted(foreign)) or text.model_type
        raise UsageError(f"Expected scores need attention with a free mask, not {kinds}. Use --mode generate.")


@dataclass
class _Row:
    """One row's content of the cache."""

    prompt: list[int] = field(default_factory=list)
    trunk: list[int] = field(default_factory=list)
    """The slot of each token of the prompt except the last, which is run with the first candidates because its logits
    are needed. A token's index here is its position."""
    branches: dict[tuple[int, int], int] = field(default_factory=dict)
    """(parent's slot, token id) -> slot, for each token above the trunk."""
    parents: dict[int, int] = field(default_factory=dict)
    """Slot -> parent's slot, for each token above the trunk."""

    @property
    def top(self) -> int:
        """The slot of the trunk's last token; -1 without one."""
        return self.trunk[-1] if self.trunk else -1


@dataclass
class _Additions:
    """Tokens to be added to a row, parents before children."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    """The parents' slots, which may be those of other additions."""
    positions: list[int] = field(default_factory=list)
    wanted: list[tuple[int, int]] = field(default_factory=list)
    """(index of an addition, token that may follow): the log-probabilities to read."""

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
            rows: how many.
        """
        import numpy as np
        from transformers import DynamicCache

        self._model = model
        # Without a configuration every layer keeps all its keys; sliding windows are cut into the masks instead.
        self._cache = DynamicCache()
        self._rows = [_Row() for _ in range(rows)]
        self._positions = np.zeros((rows, 0), dtype=np.int64)
        """The position of the token in every slot, of shape (rows, slots)."""
        self._unread: list[_Additions] = []
        """What of each prompt is not in the cache yet: it is run with the first questions, in one pass."""

    def set_prompts(self, prompts: Sequence[Sequence[int]]) -> None:
        """Give every row its next prompt, of at least one token; what it shares with the previous one is not run again.

        There may be fewer prompts than rows: the rows at the end are dropped permanently.
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
        """Answer all questions about every row's prompt together, however many a row has."""
        added, self._unread = self._unread or [_Additions() for _ in self._rows], []
        for row, additions, asked in zip(self._rows, added, questions, strict=True):
            for question in asked:
                self._add_question(row, additions, question)
        values = map(iter, self._run(added))
        return [
            [_reading(question, given) for question in asked] for asked, given in zip(questions, values, strict=True)
        ]

    # --- trees --------------------------------------------------------------------------------------------------------

    @property
    def _slots(self) -> int:
        return int(self._positions.shape[1])

    def _rest_of_trunk(self, row: _Row) -> _Additions:
        additions = _Additions()
        for position in range(len(row.trunk), len(row.prompt) - 1):
            index = additions.add(row.prompt[position], row.top, position)
            row.trunk.append(self._slots + index)
        return additions

    def _add_question(self, row: _Row, additions: _Additions, question: TrieQuery) -> None:
        """Add the tokens that a question needs and the row does not have yet, and note which probabilities to read.

        A token's probability is read at its predecessor, in the pass that runs the predecessor. So all tokens are run
        from the one before the first forced token, even if an earlier pass ran some of them: their logits are gone.
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

    def _branch(self, row: _Row, additions: _Additions, token: int, parent: int, depth: int) -> int:
        slot = self._slots + additions.add(token, parent, len(row.trunk) + depth)
        row.branches[parent, token] = slot
        row.parents[slot] = parent
        return slot

    def _with_ancestors(self, index: int, slot: int) -> list[int]:
        """A cached slot of one row and everything that it sees; nothing for -1, the parent of the first token."""
        row, branch = self._rows[index], []
        while slot in row.parents:
            branch.append(slot)
            slot = row.parents[slot]
        trunk = row.trunk[: self._positions[index, slot] + 1] if slot >= 0 else []
        return trunk + branch

    # --- running the model --------------------------------------------------------------------------------------------

    def _run_first_prompts(self) -> None:
        """Fill an empty cache with the prompts except their last tokens; or, if they share much, only with that part.

        The common beginning (the rubric) is run in one row and copied to the others: the rest then costs as if the
        prompts were that much shorter. But this needs a mask, which costs more than it saves if the prompts share
        little.

        The padding is on the right, where causal attention keeps it from being seen: no mask is needed, so the fastest
        kernels can be used. No row's tree contains the padding's slots, so nothing sees them later either.
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

    def _run(self, added: Sequence[_Additions]) -> list[list[float]]:
        """Run the additions of all rows side by side, in as many passes as they need, and read the probabilities.

        The slot of an addition is the number of slots before the first pass plus its index: every pass but the last
        one is full, so its padding comes after the last addition of a row.
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
                        (place, index - first, token)
                        for place, (index, token) in enumerate(additions.wanted)
                        if first <= index < first + width
                    ]
                    for additions in added
                ]
                # Logits are computed for the last tokens only: the rest of a prompt comes first, and needs none.
                without = min((index for here in wanted for _, index, _ in here), default=width - 1)
                logits = self._run_pass(added, first, width, width - without)
                for row, here in enumerate(wanted):
                    shifted = [(place, index - without, token) for place, index, token in here]
                    for place, value in _log_probabilities(logits[row], shifted):
                        values[row][place] = value
        return values

    def _run_pass(self, added: Sequence[_Additions], first: int, width: int, kept: int) -> Any:
        """Run the additions `first` … `first + width - 1` of every row; logits of shape (rows, kept, vocabulary)."""
        import numpy as np
        import torch

        cached = self._slots
        ids = np.zeros((len(added), width), dtype=np.int64)
        positions = np.zeros((len(added), width), dtype=np.int64)
        seen = np.zeros((len(added), width, cached + width), dtype=bool)
        # The attention of a token that sees nothing is NaN, so every token sees itself, including the padding.
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
            for place in range(chain, count):
                if (parent := parents[place]) >= cached:
                    seen[index, place] |= seen[index, parent - cached]
                else:
                    seen[index, place, self._with_ancestors(index, parent)] = True
        self._positions = np.concatenate([self._positions, positions], axis=1)
        return self._forward(
            torch.from_numpy(ids),
            position_ids=torch.from_numpy(positions).to(self._model.device),
            attention_mask=self._masks(seen, positions),
            logits_to_keep=kept,
        )

    def _forward(self, ids: Any, **arguments: Any) -> Any:
        """Logits of the tokens; their keys and values are appended to the cache."""
        return self._model(
            input_ids=ids.to(self._model.device), past_key_values=self._cache, use_cache=True, **arguments
        ).logits

    def _masks(self, seen: Any, positions: Any) -> Any:
        """The mask in the form that the model takes: a tensor, or one for each kind of its layers.

        Args:
            seen: which slots each token sees, of shape (rows, tokens, slots).
            positions: of the tokens, of shape (rows, tokens).
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
        """The mask as numbers to add to attention scores, which every attention implementation except flash accepts."""
        import torch

        hidden = torch.finfo(self._model.dtype).min
        mask = torch.from_numpy(~seen).to(self._model.device)[:, None]
        return torch.zeros(mask.shape, dtype=self._model.dtype, device=mask.device).masked_fill_(mask, hidden)

    # --- making room --------------------------------------------------------------------------------------------------

    def _crop(self, slots: int) -> None:
        if slots < self._slots:
            self._positions = self._positions[:, :slots]
            self._cache.crop(slots)

    def _drop_rows(self, kept: int) -> None:
        import torch

        self._rows, self._positions = self._rows[:kept], self._positions[:kept]
        self._cache.batch_select_indices(torch.arange(kept, device=self._model.device))


def _chain_length(parents: Sequence[int], cached: int) -> int:
    """How many of the first tokens of a pass each follow the one before them."""
    for index, parent in enumerate(parents[1:]):
        if parent != cached + index:
            return index + 1
    return len(parents)


def _log_probabilities(logits: Any, wanted: Sequence[tuple[int, int, int]]) -> Iterator[tuple[int, float]]:
    """Log-probabilities of (place, index of a token, token after it), each with its place.

    Args:
        logits: of one row, of shape (tokens, vocabulary).
        wanted: what to read.
    """
    if wanted:
        places, indices, tokens = map(list, zip(*wanted, strict=True))
        row_of = {index: row for row, index in enumerate(dict.fromkeys(indices))}
        logits = logits[list(row_of)].float()  # those of other tokens, such as the padding, are not copied
        rows = [row_of[index] for index in indices]
        yield from zip(places, (logits[rows, tokens] - logits.logsumexp(dim=-1)[rows]).tolist(), strict=True)


def _reading(question: TrieQuery, values: Iterator[float]) -> Reading:
    """Pop the values of one question from the row's, in the order in which `_add_question` noted them."""
    trie = question.trie
    log_reach = sum(next(values) for _ in trie.context[question.forced_from :])
    steps = [next(values) for _ in trie.edges]
    return Reading(log_reach, [sum(steps[edge] for edge in path) for path in trie.paths])
