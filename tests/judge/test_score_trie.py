"""The 101 scores as tries, and what their probabilities say."""

import math
import random

import numpy as np
import pytest
from families import NESTED, prompts

from prmkit.errors import UsageError
from prmkit.judge.score_trie import SCORES, _trie, answer_ids, believable, distribution_of, score_trie, tries_of
from prmkit.judge.transformers_judge import Judge
from prmkit.judge.types import Judgement
from prmkit.prompts.encoding import load_encoding
from prmkit.prompts.special_tokens import neutralise
from prmkit.verdict import Shape, Verdict, asked_shape, render_verdict

FLAT = Shape(("reasonableness_score",), nested=False)


def spelt(trie, candidate: int) -> list[int]:
    return [*trie.context, *(trie.edges[edge][1] for edge in trie.paths[candidate])]


@pytest.mark.parametrize("shape", [FLAT, asked_shape(NESTED)])
def test_paths_spell_what_training_tokenises(judge: Judge, shape: Shape) -> None:
    chosen = dict.fromkeys(shape.keys[:-1], 0.95)
    trie = score_trie(judge.encoding, shape, chosen)
    opened = (
        '{"reasonableness_score": '
        if shape is FLAT
        else '{"scores": {"relevance": 0.95, "use_of_tools": 0.95, "progress": '
    )
    behind = ', "' if shape is FLAT else '}, "'
    for candidate, score in enumerate(SCORES):
        ids = answer_ids(judge.encoding, f"{opened}{score:.2f}{behind}")
        spelling = spelt(trie, candidate)
        assert ids[: len(spelling)] == spelling


def test_numbers_are_written_in_several_ways(judges: dict[str, Judge]) -> None:
    """Else the families would test one thing four times."""
    lengths = {}
    for name, judge in judges.items():
        paths = score_trie(judge.encoding, FLAT, {}).paths
        lengths[name] = {len(path) for path in paths}
    assert lengths["qwen"] == {4}
    assert lengths["llama3"] == {3, 4}
    assert len(lengths["gemma2"]) > 1
    assert min(lengths["melting"]) < 3


def test_a_trie_that_is_known_fits_behind_other_scores(judge: Judge) -> None:
    """The short way gives what tokenising all candidates gives."""
    shape, choose = asked_shape(NESTED), random.Random(0)
    assert shape is not None
    trie = tries_of(judge.encoding)
    for _ in range(10):
        position = choose.randrange(len(shape.keys))
        scored = {key: distribution_of([-abs(i - choose.randrange(101)) for i in range(101)]) for key in shape.keys}
        before = {key: scored[key] for key in shape.keys[:position]}
        assert trie(shape, before) == score_trie(judge.encoding, shape, {key: before[key].mode for key in before})


def test_nodes_stand_behind_their_parents(judge: Judge) -> None:
    trie = score_trie(judge.encoding, FLAT, {})
    assert all(parent < node for node, parent in enumerate(trie.parents, start=1))
    assert {node for node, _ in trie.edges} == set(range(len(trie.tokens) + 1))


def test_digits_that_melt_with_the_comma_take_it_along() -> None:
    """As a tokenizer would that makes one token of `0,` and none of `5,`."""
    alone = [[1, 10], [1, 15]]
    melted = [[1, 99], [1, 15, 7]]
    assert _trie(alone).paths == ((0,), (1,))
    trie = _trie(melted)
    assert [spelt(trie, candidate) for candidate in (0, 1)] == melted


@pytest.mark.parametrize("sequences", [[[1, 2], [1, 2]], [[1, 2], [1, 2, 3]], [[1], [1, 3]]])
def test_scores_that_cannot_be_told_apart_are_refused(sequences: list[list[int]]) -> None:
    with pytest.raises(UsageError, match="tell all scores apart"):
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


@pytest.mark.parametrize(
    "broken",
    [[math.nan] * 101, [-2.0] * 50 + [math.nan] + [-2.0] * 50, [-math.inf] * 101, [math.inf] + [-2.0] * 100],
    ids=["all NaN", "one NaN", "no score possible", "infinite"],
)
def test_what_is_not_a_number_is_no_score(broken: list[float]) -> None:
    judgement = believable(Judgement("ok", {"a_score": distribution_of(broken)}))
    assert (judgement.status, judgement.score) == ("error", None)
    assert judgement.reason.startswith("the model's probabilities are not numbers; ")


def test_a_score_that_some_cannot_have_is_still_one() -> None:
    sure = Judgement("ok", {"a_score": distribution_of([-math.inf] * 100 + [0.0])})
    assert believable(sure) is sure
    assert sure.score == 1.0


def test_a_key_out_of_a_schema_cannot_be_a_control_token(judges: dict[str, Judge]) -> None:
    """A page in the prompt may bring the schema; training wrote such a key with its marker marked."""
    encoding, shape = judges["qwen"].encoding, asked_shape('{"scores": {"<|im_end|>": 0.5, "<think>": 0.5}}')
    assert shape is not None
    end = encoding.tokenizer.convert_tokens_to_ids("<|im_end|>")
    scored = {"<|im_end|>": distribution_of([-1.0] * 101)}
    for trie in (tries_of(encoding)(shape, {}), tries_of(encoding)(shape, scored)):
        assert end not in trie.context
    label = neutralise(render_verdict(Verdict({"<|im_end|>": 0.0, "<think>": 0.0}, nested=True, texts={})), answer=True)
    assert encoding.tokenizer.decode(spelt(tries_of(encoding)(shape, scored), 0)) in label[0]


def test_even_distribution_prefers_the_lower_mode() -> None:
    distribution = distribution_of([-math.log(101)] * 101)
    assert distribution.mode == 0.0
    assert distribution.mean == pytest.approx(0.5)
    assert distribution.label_mass == pytest.approx(1.0)
