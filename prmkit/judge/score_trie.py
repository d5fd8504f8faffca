"""Build the trie of the 101 scores' tokens, and compute distributions and verdicts with several keys from it.

A tokenizer may turn `95`, ` 0` or `0.` into one token, so nothing is assumed about digits: every candidate is tokenised
together with the answer before it, and the sequences are merged into a trie. For a tokenizer that separates all digits,
it begins like this (numbers in brackets are nodes, and the leaves are the last digits):

    root(0) ─ "0"(1) ─ "."(2) ─ "0"(3) ─ "0" … "9"      0.00 … 0.09
            │                 └ "1"(4) ─ "0" … "9"      0.10 … 0.19   …
            └ "1"(…) ─ "."(…) ─ "0"(…) ─ "0"            1.00

The probability of a score is the product of the probabilities along its path. Only the inner nodes, 15 here, have to be
run through the model, because a leaf's probability is read at its parent.
"""

import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from prmkit.errors import UsageError
from prmkit.judge.types import BAD_BELOW, LOW_REACH, Distribution, Judgement
from prmkit.prompts.cleaning import escape
from prmkit.prompts.encoding import ChatEncoding
from prmkit.verdict import Shape, answer_prefix

SCORES = tuple(hundredths / 100 for hundredths in range(101))
"""Every score that a canonical label can carry."""


@dataclass(frozen=True)
class ScoreTrie:
    """The candidates of one score key after one prefix of an answer.

    Node 0 is the root: the last token that all candidates share. Nodes 1 … m are the inner nodes below it, parents
    before children. The leaves (each candidate's last token) are not nodes, because nothing follows them.
    """

    context: tuple[int, ...]
    """Token ids of the answer up to the root; empty if the candidates share no token. Then the prompt's last token is
    the root."""
    tokens: tuple[int, ...]
    """Token id of each inner node below the root; node `i` has `tokens[i - 1]`."""
    parents: tuple[int, ...]
    """Parent of each inner node below the root."""
    edges: tuple[tuple[int, int], ...]
    """The (node, next token) pairs whose probability is needed."""
    paths: tuple[tuple[int, ...], ...]
    """The edges from the root to the leaf, for each of `SCORES`."""

    def spelled(self, candidate: int) -> tuple[int, ...]:
        """Return the token ids of the answer up to the end of one of `SCORES`, given by its index."""
        return (*self.context, *(self.edges[edge][1] for edge in self.paths[candidate]))


# --- making tries -----------------------------------------------------------------------------------------------------


def answer_ids(encoding: ChatEncoding, answer: str) -> list[int]:
    """Return the token ids of an unfinished answer, without the prompt.

    LLaMA Factory tokenises turns one by one, so these do not depend on the prompt: `opened_ids(prompt, answer)` is
    `prompt_ids(prompt) + answer_ids(answer)` for every prompt, and one trie fits all of them.
    """
    return encoding.opened_ids("", answer)[encoding.empty_prompt_length :]


TrieOf = Callable[[Shape, tuple[float, ...]], ScoreTrie]
"""The trie of the next key of a shape, given the scores before it."""


def tries_of(encoding: ChatEncoding) -> TrieOf:
    """Return a caching function that makes tries.

    The tokens after a key hardly ever depend on the scores before it, so a key's trie is made once and then reused with
    other contexts. It is reused only if all 101 answers agree token by token, because in some tokenizers a token can
    extend from one key into the next.
    """

    @lru_cache(maxsize=256)
    def first_of_its_kind(shape: Shape, position: int) -> tuple[ScoreTrie, list[list[int]], bool]:
        """Make a trie; also return the ends of its 101 answers after the context, and whether `_quick_ids` is exact."""
        given = (0.0,) * position
        answers = _answers(shape, given)
        ids = [answer_ids(encoding, each) for each in answers]
        trie = _trie(_candidates(encoding, shape, given, ids))
        return trie, [each[len(trie.context) :] for each in ids], _quick_ids(encoding, answers) == ids

    @lru_cache(maxsize=16384)
    def trie(shape: Shape, given: tuple[float, ...]) -> ScoreTrie:
        known, endings, is_quick = first_of_its_kind(shape, len(given))
        answers = _answers(shape, given)
        all_ids = _quick_ids(encoding, answers) if is_quick else [answer_ids(encoding, each) for each in answers]
        contexts = {tuple(ids[: -len(ending)]) for ids, ending in zip(all_ids, endings, strict=True)}
        agree = all(ids[-len(ending) :] == ending for ids, ending in zip(all_ids, endings, strict=True))
        if agree and len(contexts) == 1:
            return replace(known, context=contexts.pop())
        return score_trie(encoding, shape, given)

    return trie


def score_trie(encoding: ChatEncoding, shape: Shape, given: tuple[float, ...]) -> ScoreTrie:
    """Make the trie of the key of `shape` that follows the `given` scores.

    Raises:
        UsageError: the tokenizer encodes two scores as the same tokens.
    """
    followed = [answer_ids(encoding, answer) for answer in _answers(shape, given)]
    return _trie(_candidates(encoding, shape, given, followed))


def _candidates(
    encoding: ChatEncoding, shape: Shape, given: tuple[float, ...], followed: list[list[int]]
) -> list[list[int]]:
    """Return the token ids of a label up to the end of each of `SCORES`.

    If the tokenizer joins a score's last digits with the characters after them (`followed`), all candidates include
    those characters, because the model was trained that way; otherwise they do not.
    """
    beginning = label_beginning(shape, given)
    alone = [answer_ids(encoding, f"{beginning}{score:.2f}") for score in SCORES]
    joins = any(longer[: len(ids)] != ids for ids, longer in zip(alone, followed, strict=True))
    return followed if joins else alone


def _answers(shape: Shape, given: tuple[float, ...]) -> list[str]:
    """Write the beginning of a label with each of `SCORES`, including the characters after the score."""
    is_last = len(given) == len(shape.keys) - 1
    beginning, follower = label_beginning(shape, given), '}, "' if shape.nested and is_last else ', "'
    return [f"{beginning}{score:.2f}{follower}" for score in SCORES]


def label_beginning(shape: Shape, given: tuple[float, ...]) -> str:
    """Return `answer_prefix` as in training, where special tokens are escaped in keys from a prompt's schema, too."""
    chosen = dict(zip(shape.keys, given, strict=False))
    return escape(answer_prefix(shape, chosen), answer=True)[0]


def _quick_ids(encoding: ChatEncoding, answers: list[str]) -> list[list[int]]:
    """Compute `answer_ids` five times faster, correctly for most templates; callers must verify the result.

    Templates differ in what they write around an answer (mistral's has a space before it). Only that space is handled
    here.
    """
    slot = "\N{OBJECT REPLACEMENT CHARACTER}"
    elements = encoding.template.format_assistant.apply(content=slot)
    before = next(each.partition(slot)[0] for each in elements if isinstance(each, str) and slot in each)
    ids: list[list[int]] = encoding.tokenizer([before + each for each in answers], add_special_tokens=False).input_ids
    return ids


def _trie(sequences: Sequence[list[int]]) -> ScoreTrie:
    """Merge token sequences into a trie.

    Raises:
        UsageError: one sequence is a prefix of another, or equal to it.
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
        raise UsageError("This tokenizer encodes two scores as the same tokens. Score with --mode generate.")
    return ScoreTrie(tuple(sequences[0][:shared]), tuple(tokens), tuple(parents), tuple(edges), tuple(paths))


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the common prefix of two sequences."""
    for position, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return position
    return min(len(one), len(other))


# --- the distribution of one key --------------------------------------------------------------------------------------


def distribution_of(log_probabilities: Sequence[float], reach: float | None = None) -> Distribution:
    """Compute a distribution from log-probabilities of `SCORES`, whose probabilities need not add up to one.

    Raises:
        ValueError: one is not a number, or no score is possible at all.
    """
    shares, label_mass = _shares(log_probabilities)
    return _distribution(shares, label_mass, reach)


def _shares(log_probabilities: Sequence[float]) -> tuple[list[float], float]:
    """Return each score's probability given that the model writes a score, and the probability that it writes one.

    Raises:
        ValueError: one is not a number, or no score is possible at all.
    """
    highest = max(log_probabilities)
    if highest == -math.inf or not math.isfinite(math.fsum(map(math.exp, log_probabilities))):
        raise ValueError("not probabilities")
    # Relative to the highest one; otherwise probabilities of 1e-400 would all be zero as floats.
    weights = [math.exp(value - highest) for value in log_probabilities]
    total = math.fsum(weights)
    return [weight / total for weight in weights], min(total * math.exp(highest), 1.0)


def _distribution(shares: Sequence[float], label_mass: float, reach: float | None) -> Distribution:
    mean, variance = _moments(shares)
    return Distribution(
        mean=mean,
        median=_median(shares),
        mode=SCORES[shares.index(max(shares))],
        std=math.sqrt(variance),
        label_mass=label_mass,
        below={
            limit: math.fsum(share for share, score in zip(shares, SCORES, strict=True) if score < limit)
            for limit in BAD_BELOW
        },
        reach=reach,
        shares=array("d", shares),
    )


def _moments(shares: Sequence[float]) -> tuple[float, float]:
    """Return mean and variance."""
    mean = math.fsum(share * score for share, score in zip(shares, SCORES, strict=True))
    return mean, math.fsum(share * (score - mean) ** 2 for share, score in zip(shares, SCORES, strict=True))


def _median(shares: Sequence[float]) -> float:
    below = 0.0
    for score, share in zip(SCORES, shares, strict=True):
        below += share
        if below >= 0.5:
            return score
    return SCORES[-1]


# --- verdicts with several keys ---------------------------------------------------------------------------------------

_SURE = 0.8
"""Follow only the most likely value of a key if its probability is at least this."""
_FOLLOWED = 0.9
"""Otherwise follow the most likely values that together have this probability."""
_MOST_PREFIXES = 24
"""The maximum number of prefixes to follow at once (the beam width): each costs about twenty tokens per key. Judges'
scores are mostly multiples of 0.05, so all of these fit."""


@dataclass(frozen=True)
class TrieQuery:
    """A question to the model: the candidates of one key after one prefix."""

    trie: ScoreTrie
    forced_from: int
    """The index in `trie.context` of the first token that is forced on the model here. Tokens before it belong to the
    previous score, or were counted with it."""


@dataclass(frozen=True)
class Reading:
    """The model's probabilities for a `TrieQuery`."""

    log_reach: float
    """The log-probability of the forced tokens."""
    log_probabilities: Sequence[float]
    """The log-probabilities of `SCORES` after the forced tokens."""


@dataclass
class _Prefix:
    """The first scores of one possible verdict, and the distribution of its next score."""

    given: tuple[float, ...]
    weight: float
    """The prefix's fraction of the probability of all followed prefixes. Prefixes of one length add up to 1."""
    reach: float
    """The probability of all tokens that are forced before the next score."""
    spelled: tuple[int, ...]
    """Token ids up to the end of the last given score."""
    question: TrieQuery
    shares: list[float] = field(default_factory=list)
    """Probabilities of `SCORES` as the next score; they add up to 1."""
    label_mass: float = 0.0
    longer: list["_Prefix"] = field(default_factory=list)
    """The prefixes that continue this one, each with another next score."""


class VerdictReader:
    """Reads the distribution of every score of one verdict, key by key.

    The second score of a verdict depends on the first: a model that hesitates between 0.2 and 0.9 writes a second
    score that fits its choice. If the second key were read only after the most likely first score, `score` would jump
    when the two swap ranks. So verdicts are explored as a tree (beam search): the next key is read after each likely
    value of a key, and its distribution is the mean of these readings, weighted by the values' probabilities. A backend
    gets `questions()`, all for one key at a time, and passes the readings to `read()`.
    """

    def __init__(self, shape: Shape, trie_of: TrieOf, min_label_mass: float) -> None:
        """Begin with the first key.

        Args:
            shape: the keys.
            trie_of: makes the candidates.
            min_label_mass: if a key has less, only its most likely score is followed, because the judgement will be
                `unsure` anyway.
        """
        self._shape = shape
        self._trie_of = trie_of
        self._min_label_mass = min_label_mass
        self._beams = [[self._make_prefix((), 1.0, 1.0, ())]]
        self._is_broken = False

    def _make_prefix(self, given: tuple[float, ...], weight: float, reach: float, spelled: tuple[int, ...]) -> _Prefix:
        trie = self._trie_of(self._shape, given)
        question = TrieQuery(trie, common_length(spelled, trie.context))
        return _Prefix(given, weight, reach, spelled, question)

    def questions(self) -> list[TrieQuery]:
        """Return the next questions, which are independent of each other; empty when the verdict has been read."""
        if self._is_broken or self._beams[-1][0].shares:
            return []
        return [prefix.question for prefix in self._beams[-1]]

    def read(self, readings: Sequence[Reading]) -> None:
        """Take the readings for `questions()`, in order."""
        beam = self._beams[-1]
        for prefix, reading in zip(beam, readings, strict=True):
            try:
                prefix.shares, prefix.label_mass = _shares(reading.log_probabilities)
            except ValueError:
                self._is_broken = True
                return
            prefix.reach *= math.exp(reading.log_reach)
        if len(self._beams) < len(self._shape.keys):
            self._beams.append(self._continued(beam))

    def _continued(self, beam: Sequence[_Prefix]) -> list[_Prefix]:
        followed = [(prefix, value) for prefix in beam for value in self._values_to_follow(prefix)]
        # The most likely value of every prefix is kept, whatever the limit, so that each has a continuation.
        followed.sort(key=lambda pair: (pair[0].shares[pair[1]] < max(pair[0].shares), -_weight(*pair)))
        for prefix, value in followed[: max(_MOST_PREFIXES, len(beam))]:
            spelled = prefix.question.trie.spelled(value)
            given = (*prefix.given, SCORES[value])
            prefix.longer.append(self._make_prefix(given, _weight(prefix, value), prefix.reach, spelled))
        for prefix in beam:
            total = sum(longer.weight for longer in prefix.longer)
            for longer in prefix.longer:
                longer.weight *= prefix.weight / total
        return [longer for prefix in beam for longer in prefix.longer]

    def _values_to_follow(self, prefix: _Prefix) -> list[int]:
        order = sorted(range(len(SCORES)), key=lambda value: -prefix.shares[value])
        if prefix.shares[order[0]] >= _SURE or prefix.label_mass < self._min_label_mass:
            return order[:1]
        covered, count = 0.0, 0
        while covered < _FOLLOWED - 1e-9:
            covered += prefix.shares[order[count]]
            count += 1
        return order[:count]

    def judgement(self) -> Judgement:
        """Return the result; `unsure` if the model puts most probability on something other than these scores."""
        if self._is_broken:
            reason = (
                "the model returned NaN, or zero probability for every score. Use --dtype float32, because float16 "
                "overflows in many models, and check that the training has not diverged"
            )
            return Judgement("error", reason=reason)
        scores = {key: _mixture(beam) for key, beam in zip(self._shape.keys, self._beams, strict=True)}
        _, variance = _sum_moments(self._beams[0][0])
        judgement = Judgement("ok", scores, std=math.sqrt(max(variance, 0.0)) / len(scores))
        why_unsure = self._why_unsure(judgement)
        return replace(judgement, status="unsure", reason=why_unsure) if why_unsure else judgement

    def _why_unsure(self, judgement: Judgement) -> str | None:
        mass, reach = judgement.label_mass, judgement.reach
        if mass is not None and mass < self._min_label_mass:
            why = "the model puts most probability on something other than a score"
            return f"label_mass {mass:.3g} is below {self._min_label_mass:g}: {why}"
        if reach is not None and reach < LOW_REACH:
            return f"reach {reach:.3g} is below {LOW_REACH:g}: the model rarely begins a verdict with these keys"
        return None


def _weight(prefix: _Prefix, value: int) -> float:
    return prefix.weight * prefix.shares[value]


def _mixture(beam: Sequence[_Prefix]) -> Distribution:
    """Return the distribution of one key over all followed prefixes."""
    columns = zip(*(each.shares for each in beam), strict=True)
    weights = [each.weight for each in beam]
    shares = [math.fsum(w * share for w, share in zip(weights, column, strict=True)) for column in columns]
    return _distribution(
        shares,
        label_mass=math.fsum(each.weight * each.label_mass for each in beam),
        reach=math.fsum(each.weight * each.reach for each in beam),
    )


def _sum_moments(prefix: _Prefix) -> tuple[float, float]:
    """Return mean and variance of the sum of the next score and all later ones, given a prefix.

    With X the next score and R the sum of the later ones, Var(X + R) = Var(X) + Var(R) + 2 Cov(X, R). R is known after
    the followed values. After other values, its mean is assumed to be the same, so that they add nothing to the
    covariance.
    """
    mean, variance = _moments(prefix.shares)
    if not prefix.longer:
        return mean, variance
    later = [(longer.given[-1], longer.weight / prefix.weight, *_sum_moments(longer)) for longer in prefix.longer]
    later_mean = math.fsum(weight * each for _, weight, each, _ in later)
    later_variance = math.fsum(weight * (spread + (each - later_mean) ** 2) for _, weight, each, spread in later)
    covariance = math.fsum(
        prefix.shares[round(value * 100)] * (value - mean) * (each - later_mean) for value, _, each, _ in later
    )
    return mean + later_mean, variance + later_variance + 2 * covariance
