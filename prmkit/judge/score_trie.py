"""The 101 scores as token sequences, what their probabilities say, and verdicts with several keys.

A tokenizer may turn `95`, ` 0` or `0.` into one token, so nothing is assumed about digits: every candidate is tokenised
together with the answer before it, and the sequences are merged into a trie. For a tokenizer that separates all digits,
it begins like this (numbers are nodes, the leaves are the last digits):

    root(0) ─ "0"(1) ─ "."(2) ─ "0"(3) ─ "0" … "9"      0.00 … 0.09
            │                 └ "1"(4) ─ "0" … "9"      0.10 … 0.19   …
            └ "1"(…) ─ "."(…) ─ "0"(…) ─ "0"            1.00

The probability of a score is the product of the probabilities along its path. Only inner nodes have to be run through
the model, 15 here, because a leaf's probability is read at its parent.
"""

import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from prmkit.errors import UsageError
from prmkit.judge.types import BAD_BELOW, LOW_REACH, Distribution, Judgement
from prmkit.prompts.cleaning import neutralise
from prmkit.prompts.encoding import ChatEncoding
from prmkit.verdict import Shape, answer_prefix

SCORES = tuple(hundredths / 100 for hundredths in range(101))
"""Every score that a canonical label can carry."""


@dataclass(frozen=True)
class ScoreTrie:
    """The candidates of one score key, after one beginning of an answer.

    Node 0 is the root: the last token that all candidates share. Nodes 1 … m are the inner nodes below it, parents
    before children. The leaves, a candidate's last token each, are not nodes: nothing follows them.
    """

    context: tuple[int, ...]
    """Token ids of the answer up to the root. Empty if the candidates share nothing; the root is then the prompt's last
    token."""
    tokens: tuple[int, ...]
    """Token id of each inner node below the root; node `i` has `tokens[i - 1]`."""
    parents: tuple[int, ...]
    """Parent of each inner node below the root."""
    edges: tuple[tuple[int, int], ...]
    """The (node, next token) pairs whose probability is needed."""
    paths: tuple[tuple[int, ...], ...]
    """For each of `SCORES` the edges from the root to its leaf."""

    def spelled(self, candidate: int) -> tuple[int, ...]:
        """The token ids of the answer up to the end of one of `SCORES`, by its index."""
        return (*self.context, *(self.edges[edge][1] for edge in self.paths[candidate]))


# --- making tries -----------------------------------------------------------------------------------------------------


def answer_ids(encoding: ChatEncoding, answer: str) -> list[int]:
    """Token ids of an unfinished answer, without the prompt.

    LLaMA Factory tokenises turns one by one, so these do not depend on the prompt: `opened_ids(prompt, answer)` is
    `prompt_ids(prompt) + answer_ids(answer)` for every prompt, and one trie fits all of them.
    """
    return encoding.opened_ids("", answer)[encoding.empty_prompt_length :]


TrieOf = Callable[[Shape, tuple[float, ...]], ScoreTrie]
"""The trie of the next key of a shape, given the scores before it."""


def tries_of(encoding: ChatEncoding) -> TrieOf:
    """A function that makes each trie once.

    What comes after a key hardly ever depends on the scores before it, so a key's trie is made once and then reused
    with other contexts. It is reused only if all 101 answers agree token by token, because in some tokenizers a token
    can extend from one key into the next.
    """

    @lru_cache(maxsize=256)
    def first_of_its_kind(shape: Shape, position: int) -> tuple[ScoreTrie, list[list[int]], bool]:
        """A trie, how each of its 101 answers ends after the context, and whether quick tokenising is right here."""
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
    """The trie of a key of `shape`, the first one that is not among the `given` scores.

    Raises:
        UsageError: the tokenizer encodes two scores as the same tokens.
    """
    followed = [answer_ids(encoding, answer) for answer in _answers(shape, given)]
    return _trie(_candidates(encoding, shape, given, followed))


def _candidates(
    encoding: ChatEncoding, shape: Shape, given: tuple[float, ...], followed: list[list[int]]
) -> list[list[int]]:
    """Token ids of the beginnings of a label, up to the end of each of `SCORES`.

    If the tokenizer joins a score's last digits with what follows them in the label (`followed`), all candidates
    include that, because the model saw it in training; otherwise they do not.
    """
    beginning = label_beginning(shape, given)
    alone = [answer_ids(encoding, f"{beginning}{score:.2f}") for score in SCORES]
    joins = any(longer[: len(ids)] != ids for ids, longer in zip(alone, followed, strict=True))
    return followed if joins else alone


def _answers(shape: Shape, given: tuple[float, ...]) -> list[str]:
    """The beginnings of a label, one for each of `SCORES`, including what follows the score."""
    is_last = len(given) == len(shape.keys) - 1
    beginning, follower = label_beginning(shape, given), '}, "' if shape.nested and is_last else ', "'
    return [f"{beginning}{score:.2f}{follower}" for score in SCORES]


def label_beginning(shape: Shape, given: tuple[float, ...]) -> str:
    """`answer_prefix` as in training: a key that comes from a prompt's schema cannot be a special token."""
    chosen = dict(zip(shape.keys, given, strict=False))
    return neutralise(answer_prefix(shape, chosen), answer=True)[0]


def _quick_ids(encoding: ChatEncoding, answers: list[str]) -> list[list[int]]:
    """What `answer_ids` gives for most templates, five times faster; check that they agree before relying on it.

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
    """The length of the common prefix of two sequences."""
    for position, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return position
    return min(len(one), len(other))


# --- what the probabilities of one key say ----------------------------------------------------------------------------


def distribution_of(log_probabilities: Sequence[float], reach: float | None = None) -> Distribution:
    """Read the log-probabilities of `SCORES`, which need not add up to one.

    Raises:
        ValueError: one is not a number, or no score is possible at all.
    """
    shares, label_mass = _shares(log_probabilities)
    return _distribution(shares, label_mass, reach)


def _shares(log_probabilities: Sequence[float]) -> tuple[list[float], float]:
    """The probability of each score given that the model writes one, and the probability that it writes one.

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
    """Mean and variance."""
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
"""If a value is this likely, it is the only one after which the verdict is followed."""
_FOLLOWED = 0.9
"""Otherwise the verdict is followed after each of the likeliest values that together have this probability."""
_MOST_BEGINNINGS = 24
"""The most beginnings of a verdict to follow at once: each costs about twenty tokens per key. Judges' scores are mostly
multiples of 0.05, so all of them fit."""


@dataclass(frozen=True)
class TrieQuery:
    """A question to the model: the candidates of one key after one beginning."""

    trie: ScoreTrie
    forced_from: int
    """The index in `trie.context` of the first token that is forced on the model here. Tokens before it belong to the
    previous score, or were counted with it."""


@dataclass(frozen=True)
class Reading:
    """The model's answer to a `TrieQuery`."""

    log_reach: float
    """The log-probability of the forced tokens."""
    log_probabilities: Sequence[float]
    """The log-probabilities of `SCORES` after the forced tokens."""


@dataclass
class _Beginning:
    """The first scores of one possible verdict, and the distribution of the next one."""

    given: tuple[float, ...]
    weight: float
    """Its share of the probability of all followed beginnings. The shares of beginnings of one length add up to 1."""
    reach: float
    """The probability of all tokens that were forced up to the next score."""
    spelled: tuple[int, ...]
    """Token ids up to the end of the last given score."""
    question: TrieQuery
    shares: list[float] = field(default_factory=list)
    """Probabilities of `SCORES` as the next score; they add up to 1."""
    label_mass: float = 0.0
    longer: list["_Beginning"] = field(default_factory=list)
    """The beginnings that continue this one, each with another next score."""


class VerdictReader:
    """Reads the distribution of every score of one verdict, key after key.

    The second score of a verdict depends on the first: a model that hesitates between 0.2 and 0.9 writes a second score
    that fits its choice. If the second key were read only after the likeliest first score, `score` would jump when the
    two swap places. So the verdict is followed down a tree: after each likely value of a key the next key is read, and
    its distribution is the mean of these readings, weighted by the values' probabilities. A backend answers
    `questions()`, all of one key at a time, and passes the answers to `read()`.
    """

    def __init__(self, shape: Shape, trie_of: TrieOf, min_label_mass: float) -> None:
        """Begin with the first key.

        Args:
            shape: the keys.
            trie_of: makes the candidates.
            min_label_mass: below it, a key's scores are not worth following in full, because the judgement will be
                `unsure` anyway.
        """
        self._shape = shape
        self._trie_of = trie_of
        self._min_label_mass = min_label_mass
        self._levels = [[self._beginning((), 1.0, 1.0, ())]]
        self._is_broken = False

    def _beginning(self, given: tuple[float, ...], weight: float, reach: float, spelled: tuple[int, ...]) -> _Beginning:
        trie = self._trie_of(self._shape, given)
        question = TrieQuery(trie, common_length(spelled, trie.context))
        return _Beginning(given, weight, reach, spelled, question)

    def questions(self) -> list[TrieQuery]:
        """The next questions, independent of each other; empty when the verdict has been read."""
        if self._is_broken or self._levels[-1][0].shares:
            return []
        return [beginning.question for beginning in self._levels[-1]]

    def read(self, readings: Sequence[Reading]) -> None:
        """Take the answers to `questions()`, in order."""
        level = self._levels[-1]
        for beginning, reading in zip(level, readings, strict=True):
            try:
                beginning.shares, beginning.label_mass = _shares(reading.log_probabilities)
            except ValueError:
                self._is_broken = True
                return
            beginning.reach *= math.exp(reading.log_reach)
        if len(self._levels) < len(self._shape.keys):
            self._levels.append(self._continued(level))

    def _continued(self, level: Sequence[_Beginning]) -> list[_Beginning]:
        followed = [(beginning, value) for beginning in level for value in self._values_to_follow(beginning)]
        # The likeliest value of every beginning is kept, whatever the limit, so that each has a continuation.
        followed.sort(key=lambda pair: (pair[0].shares[pair[1]] < max(pair[0].shares), -_weight(*pair)))
        for beginning, value in followed[: max(_MOST_BEGINNINGS, len(level))]:
            spelled = beginning.question.trie.spelled(value)
            given = (*beginning.given, SCORES[value])
            beginning.longer.append(self._beginning(given, _weight(beginning, value), beginning.reach, spelled))
        for beginning in level:
            total = sum(longer.weight for longer in beginning.longer)
            for longer in beginning.longer:
                longer.weight *= beginning.weight / total
        return [longer for beginning in level for longer in beginning.longer]

    def _values_to_follow(self, beginning: _Beginning) -> list[int]:
        order = sorted(range(len(SCORES)), key=lambda value: -beginning.shares[value])
        if beginning.shares[order[0]] >= _SURE or beginning.label_mass < self._min_label_mass:
            return order[:1]
        held, count = 0.0, 0
        while held < _FOLLOWED - 1e-9:
            held += beginning.shares[order[count]]
            count += 1
        return order[:count]

    def judgement(self) -> Judgement:
        """The result; `unsure` if the model would rather write something other than these scores."""
        if self._is_broken:
            reason = (
                "the model's probabilities are not numbers. Score with --dtype float32 (float16 overflows in many "
                "models), and check that its training has not diverged"
            )
            return Judgement("error", reason=reason)
        scores = {key: _mixture(level) for key, level in zip(self._shape.keys, self._levels, strict=True)}
        _, variance = _sum_moments(self._levels[0][0])
        judgement = Judgement("ok", scores, std=math.sqrt(max(variance, 0.0)) / len(scores))
        why_unsure = self._why_unsure(judgement)
        return replace(judgement, status="unsure", reason=why_unsure) if why_unsure else judgement

    def _why_unsure(self, judgement: Judgement) -> str | None:
        mass, reach = judgement.label_mass, judgement.reach
        if mass is not None and mass < self._min_label_mass:
            return f"label_mass {mass:.3g} is below {self._min_label_mass:g}: here the model rarely writes a score"
        if reach is not None and reach < LOW_REACH:
            return f"reach {reach:.3g} is below {LOW_REACH:g}: the model rarely begins a verdict with these keys"
        return None


def _weight(beginning: _Beginning, value: int) -> float:
    return beginning.weight * beginning.shares[value]


def _mixture(level: Sequence[_Beginning]) -> Distribution:
    """The distribution of one key over all followed beginnings."""
    columns = zip(*(each.shares for each in level), strict=True)
    weights = [each.weight for each in level]
    shares = [math.fsum(w * share for w, share in zip(weights, column, strict=True)) for column in columns]
    return _distribution(
        shares,
        label_mass=math.fsum(each.weight * each.label_mass for each in level),
        reach=math.fsum(each.weight * each.reach for each in level),
    )


def _sum_moments(beginning: _Beginning) -> tuple[float, float]:
    """Mean and variance of the sum of the next score and all later ones, given a beginning.

    With X the next score and R the sum of the later ones, Var(X + R) = Var(X) + Var(R) + 2 Cov(X, R). R is known after
    the followed values. After the others it is assumed to be the same on average, so they add nothing to the
    covariance.
    """
    mean, variance = _moments(beginning.shares)
    if not beginning.longer:
        return mean, variance
    later = [(longer.given[-1], longer.weight / beginning.weight, *_sum_moments(longer)) for longer in beginning.longer]
    later_mean = math.fsum(weight * each for _, weight, each, _ in later)
    later_variance = math.fsum(weight * (spread + (each - later_mean) ** 2) for _, weight, each, spread in later)
    covariance = math.fsum(
        beginning.shares[round(value * 100)] * (value - mean) * (each - later_mean) for value, _, each, _ in later
    )
    return mean + later_mean, variance + later_variance + 2 * covariance
