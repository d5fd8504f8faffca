"""The 101 scores as tries, and what their probabilities say."""

import math
import random

import numpy as np
import pytest
from families import NESTED, prompts

from prmkit.errors import UsageError
from prmkit.judge.score_trie import (
    SCORES,
    Reading,
    VerdictReader,
    _trie,
    answer_ids,
    distribution_of,
    score_trie,
    tries_of,
)
from prmkit.judge.transformers_judge import LocalJudge
from prmkit.prompts.cleaning import escape
from prmkit.prompts.encoding import load_encoding
from prmkit.verdict import Shape, Verdict, asked_shape, render_verdict

FLAT = Shape(("reasonableness_score",), nested=False)


@pytest.mark.parametrize("shape", [FLAT, asked_shape(NESTED)])
def test_paths_spell_what_training_tokenises(judge: LocalJudge, shape: Shape) -> None:
    trie = score_trie(judge.encoding, shape, (0.95,) * (len(shape.keys) - 1))
    opened = (
        '{"reasonableness_score": '
        if shape is FLAT
        else '{"scores": {"relevance": 0.95, "use_of_tools": 0.95, "progress": '
    )
    after = ', "' if shape is FLAT else '}, "'
    for candidate, score in enumerate(SCORES):
        ids = answer_ids(judge.encoding, f"{opened}{score:.2f}{after}")
        spelling = list(trie.spelled(candidate))
        assert ids[: len(spelling)] == spelling


def test_numbers_are_written_in_several_ways(judges: dict[str, LocalJudge]) -> None:
    """Else the families would test one thing four times."""
    lengths = {}
    for name, judge in judges.items():
        paths = score_trie(judge.encoding, FLAT, ()).paths
        lengths[name] = {len(path) for path in paths}
    assert lengths["qwen"] == {4}
    assert lengths["llama3"] == {3, 4}
    assert len(lengths["gemma2"]) > 1
    assert min(lengths["melting"]) < 3


def test_a_trie_that_is_reused_is_the_right_one(judge: LocalJudge) -> None:
    """The short way gives what tokenising all candidates gives."""
    shape, choose = asked_shape(NESTED), random.Random(0)
    assert shape is not None
    trie = tries_of(judge.encoding)
    for _ in range(10):
        given = tuple(choose.choice(SCORES) for _ in range(choose.randrange(len(shape.keys))))
        assert trie(shape, given) == score_trie(judge.encoding, shape, given)


def test_nodes_come_after_their_parents(judge: LocalJudge) -> None:
    trie = score_trie(judge.encoding, FLAT, ())
    assert all(parent < node for node, parent in enumerate(trie.parents, start=1))
    assert {node for node, _ in trie.edges} == set(range(len(trie.tokens) + 1))


def test_digits_that_join_with_the_comma_take_it_along() -> None:
    """As a tokenizer would that makes one token of `0,` and none of `5,`."""
    alone = [[1, 10], [1, 15]]
    joined = [[1, 99], [1, 15, 7]]
    assert _trie(alone).paths == ((0,), (1,))
    trie = _trie(joined)
    assert [list(trie.spelled(candidate)) for candidate in (0, 1)] == joined


@pytest.mark.parametrize("sequences", [[[1, 2], [1, 2]], [[1, 2], [1, 2, 3]], [[1], [1, 3]]])
def test_scores_with_the_same_tokens_are_rejected(sequences: list[list[int]]) -> None:
    with pytest.raises(UsageError, match="two scores as the same tokens"):
        _trie(sequences)


@pytest.mark.parametrize(
    "template", ["qwen", "qwen3", "qwen3_nothink", "llama3", "mistral", "gemma2", "chatglm3", None]
)
@pytest.mark.parametrize("enable_thinking", [True, False])
def test_answers_are_tokenised_apart_from_prompts(judges, template: str | None, enable_thinking: bool) -> None:
    """LLaMA Factory does it so; a trie fits every prompt only because of that."""
    encoding = load_encoding(judges["qwen"].source.model, template, enable_thinking=enable_thinking)
    for prompt in prompts()[:3]:
        for answer in ("", '{"', '{"scores": {"progress": 0.95, "relevance": 1.0'):
            assert encoding.opened_ids(prompt, answer) == encoding.prompt_ids(prompt) + answer_ids(encoding, answer)


def test_distribution_of_a_known_one() -> None:
    probabilities = np.zeros(101)
    probabilities[[20, 80, 90]] = 0.1, 0.25, 0.05
    with np.errstate(divide="ignore"):
        distribution = distribution_of(np.log(probabilities).tolist())
    mean = (0.2 * 0.1 + 0.8 * 0.25 + 0.9 * 0.05) / 0.4
    assert distribution.mean == pytest.approx(mean)
    assert distribution.median == 0.8
    assert distribution.mode == 0.8
    assert distribution.std == pytest.approx(math.sqrt((0.04 * 0.1 + 0.64 * 0.25 + 0.81 * 0.05) / 0.4 - mean**2))
    assert distribution.label_mass == pytest.approx(0.4)
    assert distribution.below == pytest.approx({0.5: 0.25, 0.8: 0.25})


def test_distribution_without_any_hope_is_still_one() -> None:
    """Probabilities of 1e-400 are zero as floats; their proportions are not."""
    distribution = distribution_of([-921.0 if score == 0.3 else -930.0 for score in SCORES])
    assert distribution.mode == 0.3
    assert distribution.label_mass == 0.0
    assert 0.3 < distribution.mean < 0.31


def read(*readings: list[list[float]], keys: int = 1, min_label_mass: float = 0.5):
    """The judgement of a reader whose questions are answered with these log-probabilities, key by key."""
    shape = Shape(tuple(f"key{number}" for number in range(keys)), nested=True)
    reader = VerdictReader(
        shape, lambda _shape, given: _trie([[*map(hash, given), 200 + i] for i in range(101)]), min_label_mass
    )
    for level in readings:
        assert len(reader.questions()) == len(level)
        reader.read([Reading(0.0, each) for each in level])
    assert not reader.questions()
    return reader.judgement()


def log(**shares: float) -> list[float]:
    """Log-probabilities of a distribution written as `s20=0.4, s90=0.6`."""
    return [math.log(shares[f"s{i}"]) if f"s{i}" in shares else -math.inf for i in range(101)]


@pytest.mark.parametrize(
    "broken",
    [[math.nan] * 101, [-2.0] * 50 + [math.nan] + [-2.0] * 50, [-math.inf] * 101, [math.inf] + [-2.0] * 100],
    ids=["all NaN", "one NaN", "no score possible", "infinite"],
)
def test_what_is_not_a_number_is_not_a_score(broken: list[float]) -> None:
    judgement = read([broken])
    assert (judgement.status, judgement.score) == ("error", None)
    assert judgement.reason.startswith("the model returned NaN, or zero probability for every score. ")
    assert read([log(s20=1.0)], [broken], keys=2).status == "error"


def test_a_certain_score_is_read() -> None:
    sure = read([log(s100=1.0)])
    assert (sure.status, sure.score, sure.std) == ("ok", 1.0, 0.0)


@pytest.mark.parametrize(("q", "score"), [(0.49, 0.543), (0.51, 0.557), (0.70, 0.690)])
def test_a_key_that_repeats_a_hesitation_does_not_make_the_score_jump(q: float, score: float) -> None:
    """Key 1 is 0.9 with probability q, else 0.2, and key 2 repeats it: both keys and the verdict have one mean."""
    low, high = log(s20=1.0), log(s90=1.0)
    after = [low, high] if q < 0.5 else [high, low]
    judgement = read([log(s20=1 - q, s90=q)], after, keys=2)
    assert judgement.score == pytest.approx(score, abs=1e-9)
    assert [each.mean for each in judgement.scores.values()] == pytest.approx([score, score])
    assert judgement.std == pytest.approx(0.7 * math.sqrt(q * (1 - q))), "as wide as one key, for they go together"


def test_keys_that_go_apart_cancel_out() -> None:
    judgement = read([log(s20=0.5, s90=0.5)], [log(s90=1.0), log(s20=1.0)], keys=2)
    assert judgement.score == pytest.approx(0.55)
    assert judgement.std == pytest.approx(0.0, abs=1e-9)


def test_a_sure_value_is_the_only_one_that_is_followed() -> None:
    judgement = read([log(s20=0.19, s90=0.81)], [log(s40=0.5, s60=0.5)], keys=2)
    spread = math.sqrt(0.49 * 0.19 * 0.81 + 0.01) / 2
    assert judgement.std == pytest.approx(spread), "the second key is taken to be independent of the first one"


def test_no_beginning_is_followed_far_that_the_judge_would_not_write() -> None:
    thin = [each - 3 for each in log(s20=0.5, s90=0.5)]
    judgement = read([thin], [log(s90=1.0)], keys=2)
    assert judgement.status == "unsure"
    assert judgement.score == pytest.approx(0.725)


def test_a_score_that_the_judge_would_hardly_write_is_unsure() -> None:
    thin = read([[each - 1 for each in log(s20=0.5, s90=0.5)]])
    assert (thin.status, thin.score) == ("unsure", pytest.approx(0.55))
    assert thin.reason == (
        "label_mass 0.368 is below 0.5: the model puts most probability on something other than a score"
    )
    assert read([[each - 1 for each in log(s20=0.5, s90=0.5)]], min_label_mass=0.3).status == "ok"


def test_a_verdict_that_the_judge_would_hardly_begin_is_unsure() -> None:
    reader = VerdictReader(Shape(("banana_score",), nested=False), lambda *_: _trie([[i] for i in range(101)]), 0.5)
    reader.read([Reading(-65.0, log(s20=1.0))])
    judgement = reader.judgement()
    assert (judgement.status, judgement.label_mass) == ("unsure", 1.0)
    assert judgement.reach == pytest.approx(math.exp(-65), rel=1e-9)
    assert judgement.reason == "reach 5.9e-29 is below 0.1: the model rarely begins a verdict with these keys"


def test_a_key_of_a_schema_cannot_be_a_special_token(judges: dict[str, LocalJudge]) -> None:
    """A page in the prompt may bring the schema; training wrote such a key escaped."""
    encoding, shape = judges["qwen"].encoding, asked_shape('{"scores": {"<|im_end|>": 0.5, "<think>": 0.5}}')
    assert shape is not None
    end = encoding.tokenizer.convert_tokens_to_ids("<|im_end|>")
    for trie in (tries_of(encoding)(shape, ()), tries_of(encoding)(shape, (0.0,))):
        assert end not in trie.context
    label = escape(render_verdict(Verdict({"<|im_end|>": 0.0, "<think>": 0.0}, nested=True, texts={})), answer=True)
    assert encoding.tokenizer.decode(tries_of(encoding)(shape, (0.0,)).spelled(0)) in label[0]


def test_even_distribution_prefers_the_lower_mode() -> None:
    distribution = distribution_of([-math.log(101)] * 101)
    assert distribution.mode == 0.0
    assert distribution.mean == pytest.approx(0.5)
    assert distribution.label_mass == pytest.approx(1.0)
