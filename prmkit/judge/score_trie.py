"""The 101 scores as token sequences, and what their probabilities say.

A tokenizer may make one token of `95`, or of ` 0`, or of `0.`, so nothing is assumed of digits: every candidate is
tokenised together with the answer before it, and the sequences are laid over each other as a trie. The probability of
a score is then the product of the probabilities along its path.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from prmkit.errors import UsageError
from prmkit.judge.types import BAD_BELOW, Distribution, Judgement
from prmkit.prompts.encoding import ChatEncoding
from prmkit.prompts.special_tokens import neutralise
from prmkit.verdict import Shape, answer_prefix

SCORES = tuple(hundredths / 100 for hundredths in range(101))
"""Every score that a canonical label can carry."""


@dataclass(frozen=True)
class ScoreTrie:
    """The candidates of one score key, behind one beginning of an answer.

    Node 0 is the root: the last token that all candidates share. Nodes 1 … m are the inner nodes below it, parents
    before children. The leaves, a candidate's last token each, are no nodes: nothing follows them.
    """

    context: tuple[int, ...]
    """Token ids of the answer up to the root. Empty if the candidates share nothing, and the prompt's end is the root.
    """
    tokens: tuple[int, ...]
    """Token id of each inner node below the root; node `i` has `tokens[i - 1]`."""
    parents: tuple[int, ...]
    """Parent of each inner node below the root."""
    edges: tuple[tuple[int, int], ...]
    """(node, token that follows): what the model's probability is needed of."""
    paths: tuple[tuple[int, ...], ...]
    """For each of `SCORES` the edges from the root to its leaf."""


def answer_ids(encoding: ChatEncoding, answer: str) -> list[int]:
    """Token ids of an answer that goes on, without the prompt.

    LLaMA Factory tokenises the turns one by one, so these do not depend on the prompt: `opened_ids(prompt, answer)` is
    `prompt_ids(prompt) + answer_ids(answer)` for every prompt, and a trie fits all of them.
    """
    return encoding.opened_ids("", answer)[len(encoding.prompt_ids("")) :]


TrieOf = Callable[[Shape, Mapping[str, Distribution]], ScoreTrie]
"""The trie of the next key of a shape, behind the keys that are scored already."""


def tries_of(encoding: ChatEncoding) -> TrieOf:
    """Make tries, each of them once.

    A score is followed by its likeliest value: so the next one is read behind the answer that the model would have
    written itself, and not behind a mean, which may be a number that it never writes.

    A trie takes 202 answers to tokenise, 30 ms or so, and a verdict of four scores has a million beginnings. What
    stands behind a key hardly ever depends on the scores before it, so a few answers tell whether a known trie fits.
    """

    @lru_cache(maxsize=256)
    def pattern(shape: Shape, position: int) -> tuple[ScoreTrie, list[list[int]]]:
        chosen = dict.fromkeys(shape.keys[:position], 0.0)
        trie = score_trie(encoding, shape, chosen)
        return trie, [ids[len(trie.context) :] for ids in _probes(encoding, shape, chosen)]

    @lru_cache(maxsize=4096)
    def trie(shape: Shape, chosen: tuple[tuple[str, float], ...]) -> ScoreTrie:
        known, endings = pattern(shape, len(chosen))
        probes = _probes(encoding, shape, dict(chosen))
        contexts = {tuple(ids[: -len(ending)]) for ids, ending in zip(probes, endings, strict=True)}
        if len(contexts) == 1 and all(ids[-len(e) :] == e for ids, e in zip(probes, endings, strict=True)):
            return replace(known, context=contexts.pop())
        return score_trie(encoding, shape, dict(chosen))

    return lambda shape, scored: trie(shape, tuple((key, scored[key].mode) for key in scored))


def score_trie(encoding: ChatEncoding, shape: Shape, chosen: Mapping[str, float]) -> ScoreTrie:
    """The trie of the first key of `shape` that is not in `chosen`.

    Where the tokenizer melts a score's last digits with what the label writes behind them, all candidates are taken
    with that, because that is what the model saw in training; else without it.

    Raises:
        UsageError: the tokenizer writes two scores with the same tokens.
    """
    prefix, follower = _around(shape, chosen)
    alone = [answer_ids(encoding, f"{prefix}{score:.2f}") for score in SCORES]
    followed = [answer_ids(encoding, f"{prefix}{score:.2f}{follower}") for score in SCORES]
    melts = any(longer[: len(ids)] != ids for ids, longer in zip(alone, followed, strict=True))
    return _trie(followed if melts else alone)


_PROBED = (0.0, 0.37, 0.95, 1.0)


def _probes(encoding: ChatEncoding, shape: Shape, chosen: Mapping[str, float]) -> list[list[int]]:
    """Token ids of a few of the candidates of `score_trie`, with what the label writes behind them."""
    prefix, follower = _around(shape, chosen)
    return [answer_ids(encoding, f"{prefix}{score:.2f}{follower}") for score in _PROBED]


def _around(shape: Shape, chosen: Mapping[str, float]) -> tuple[str, str]:
    """What a label has before the next score, and behind it."""
    is_last = len(chosen) == len(shape.keys) - 1
    return label_beginning(shape, chosen), '}, "' if shape.nested and is_last else ', "'


def label_beginning(shape: Shape, chosen: Mapping[str, float]) -> str:
    """`answer_prefix` as training had it: a key that a prompt's schema brings cannot be a control token."""
    return neutralise(answer_prefix(shape, chosen), answer=True)[0]


def _trie(sequences: Sequence[list[int]]) -> ScoreTrie:
    """Lay token sequences over each other.

    Raises:
        UsageError: one is the beginning of another, or equal to it.
    """
    shared = common_length(min(sequences), max(sequences))
    inner: dict[tuple[int, ...], int] = {(): 0}
    edges: dict[tuple[int, int], int] = {}
    tokens: list[int] = []
    parents: list[int] = []
    paths = []
    for sequence in sequences:
        rest, path = tuple(sequence[shared:]), []
        for depth, token in enumerate(rest):
            if depth and rest[:depth] not in inner:
                parents.append(inner[rest[: depth - 1]])
                tokens.append(rest[depth - 1])
                inner[rest[:depth]] = len(tokens)
            path.append(edges.setdefault((inner[rest[:depth]], token), len(edges)))
        paths.append(tuple(path))
    if len({path[-1] for path in paths if path}) < len(sequences) or any(tuple(s[shared:]) in inner for s in sequences):
        raise UsageError("this tokenizer cannot tell all scores apart; score with --mode generate.")
    return ScoreTrie(tuple(sequences[0][:shared]), tuple(tokens), tuple(parents), tuple(edges), tuple(paths))


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many items two sequences share from their beginning."""
    for position, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return position
    return min(len(one), len(other))


def distribution_of(log_probabilities: Sequence[float]) -> Distribution:
    """Read the log-probabilities of `SCORES`; they need not add up to one.

    Where a model computes no numbers (NaN), or no score is possible at all, the mean is NaN: see `believable`.
    """
    highest = max(log_probabilities)
    if not math.isfinite(math.fsum(map(math.exp, log_probabilities))) or highest == -math.inf:
        return Distribution(math.nan, math.nan, SCORES[0], math.nan, math.nan)
    weights = [math.exp(value - highest) for value in log_probabilities]
    total = math.fsum(weights)
    shares = [weight / total for weight in weights]
    mean = math.fsum(share * score for share, score in zip(shares, SCORES, strict=True))
    variance = math.fsum(share * (score - mean) ** 2 for share, score in zip(shares, SCORES, strict=True))
    return Distribution(
        mean=mean,
        median=_median(shares),
        mode=SCORES[log_probabilities.index(highest)],
        std=math.sqrt(variance),
        label_mass=min(total * math.exp(highest), 1.0),
        below={
            limit: math.fsum(share for share, score in zip(shares, SCORES, strict=True) if score < limit)
            for limit in BAD_BELOW
        },
    )


def believable(judgement: Judgement) -> Judgement:
    """The judgement, or an error in its place where a score is not a number."""
    if all(math.isfinite(distribution.mean) for distribution in judgement.scores.values()):
        return judgement
    reason = (
        "the model's probabilities are not numbers; score with --dtype float32 (float16 overflows in many models), "
        "and look whether its training has diverged"
    )
    return Judgement("error", reason=reason, text=judgement.text)


def _median(shares: Sequence[float]) -> float:
    below = 0.0
    for score, share in zip(SCORES, shares, strict=True):
        below += share
        if below >= 0.5:
            return score
    return SCORES[-1]


def mean_std(scores: Mapping[str, Distribution]) -> float | None:
    """The mean of the keys' standard deviations; None when there are none."""
    known = [each.std for each in scores.values() if each.std is not None]
    return sum(known) / len(known) if known else None
