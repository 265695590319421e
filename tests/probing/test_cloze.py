"""What fills a gap, against brute force: every text that there could be, scored one token after the other."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from conftest import tiny_model

from gptjax.data.tokenizer import CharTokenizer
from gptjax.errors import DataError, PromptError
from gptjax.inference.pretrained import Pretrained
from gptjax.model.gpt import GPT, init_params
from gptjax.probing.cloze import ClozeItem, hide, mask_id, predict_bidirectional, predict_left_to_right

LETTERS = CharTokenizer("abcdefghij", has_eos=True)  # 11 ids, as `tiny_model` has
END = LETTERS.eos_id


def pretrained(**changes) -> Pretrained:
    model = tiny_model(**changes)
    params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
    return Pretrained("tiny", model, jax.tree.map(lambda x: 6 * x, params), LETTERS)  # decided: context matters


@pytest.fixture(scope="module")
def causal() -> Pretrained:
    return pretrained()


@pytest.fixture(scope="module")
def masked() -> Pretrained:
    return pretrained(causal=False, vocab_size=12)


def random_gaps(count: int) -> list[ClozeItem]:
    """Texts of 5, 9 and 16 tokens, so that few programs are compiled, with gaps anywhere but at their first token."""
    rng = np.random.default_rng(count)
    texts = [rng.integers(0, 10, (5, 9, 16)[i % 3]).astype(np.int32) for i in range(count)]
    return [ClozeItem(ids, int(rng.integers(1, len(ids)))) for ids in texts]


@partial(jax.jit, static_argnames="model")
def forward(params, tokens, *, model):
    return jax.nn.log_softmax(GPT(model).apply({"params": params}, tokens)[0])


def log_probabilities(p: Pretrained, ids) -> np.ndarray:
    """float64 [len(ids), vocab] by one plain pass over one text; a causal model may read padding after it."""
    padded = np.append(ids, np.zeros(16 - len(ids), int)) if p.model.causal else np.asarray(ids)
    return np.asarray(forward(p.params, padded[None], model=p.model), np.float64)[: len(ids)]


def of_whole_text(p: Pretrained, ids) -> float:
    """ln of the probability of a text given its first token."""
    return float(log_probabilities(p, ids)[np.arange(len(ids) - 1), ids[1:]].sum())


def with_token(gap: ClozeItem, token: int) -> np.ndarray:
    ids = gap.ids.copy()
    ids[gap.place] = token
    return ids


def test_from_both_sides_a_causal_model_goes_by_the_rule_of_bayes(causal):
    gaps = random_gaps(12)
    expected = [max(range(10), key=lambda v: of_whole_text(causal, with_token(gap, v))) for gap in gaps]
    assert predict_bidirectional(causal, gaps, candidates=11, batch_size=5).tolist() == expected
    assert expected != predict_left_to_right(causal, gaps).tolist()  # what stands to the right tells something


def test_with_fewer_candidates_they_are_the_likeliest_after_the_left_side(causal):
    gaps = random_gaps(12)
    expected = []
    for gap in gaps:
        left = log_probabilities(causal, gap.ids[: gap.place])[-1, :10]
        likeliest = np.argsort(-left)[:3]
        expected.append(max(likeliest, key=lambda v: of_whole_text(causal, with_token(gap, v))))
    assert predict_bidirectional(causal, gaps, candidates=3).tolist() == expected
    np.testing.assert_array_equal(
        predict_bidirectional(causal, gaps, candidates=1), predict_left_to_right(causal, gaps)
    )


def test_from_the_left_a_causal_model_names_the_likeliest_next_token(causal):
    gaps = random_gaps(20)
    expected = [log_probabilities(causal, gap.ids[: gap.place])[-1, :10].argmax() for gap in gaps]
    assert predict_left_to_right(causal, gaps, batch_size=7).tolist() == expected


def test_a_masked_model_reads_a_mask_in_the_gap(masked):
    gaps = random_gaps(20)
    assert mask_id(masked) == 11
    both = [log_probabilities(masked, with_token(gap, 11))[gap.place, :10].argmax() for gap in gaps]
    assert predict_bidirectional(masked, gaps, batch_size=7).tolist() == both
    cut = [ClozeItem(gap.ids[: gap.place + 1], gap.place) for gap in gaps]
    np.testing.assert_array_equal(predict_left_to_right(masked, gaps), predict_bidirectional(masked, cut))
    assert both != predict_left_to_right(masked, gaps).tolist()


@pytest.mark.parametrize("ask", [predict_left_to_right, predict_bidirectional])
def test_what_is_hidden_is_not_seen(causal, masked, ask):
    gaps = random_gaps(12)
    others = [gap._replace(ids=with_token(gap, (gap.truth + 1) % 10)) for gap in gaps]
    for model in (causal, masked):
        np.testing.assert_array_equal(ask(model, gaps), ask(model, others))


def test_only_what_is_allowed_is_named(causal, masked):
    gaps = random_gaps(12)
    own = np.stack([[i % 10, (i + 3) % 10] for i in range(12)])
    for model in (causal, masked):
        for ask in (predict_left_to_right, predict_bidirectional):
            assert set(ask(model, gaps, np.array([2, 7]))) <= {2, 7}
            assert (ask(model, gaps, own)[:, None] == own).any(-1).all()
            assert set(ask(model, gaps)) <= set(range(10))  # never the end of a text or the mask


def test_gaps_are_drawn_by_the_seed_where_text_stands():
    rng = np.random.default_rng(0)
    texts = [np.append(rng.integers(0, 10, n), END).astype(np.int32) for n in rng.integers(1, 30, 60)]
    fit = [ids.tolist() for ids in texts if 3 <= len(ids) <= 20]
    gaps = hide(texts, 10, 20, LETTERS, seed=3)
    assert [(g.ids.tolist(), g.place) for g in gaps] == [
        (g.ids.tolist(), g.place) for g in hide(iter(texts), 10, 20, LETTERS, seed=3)
    ]
    assert [g.place for g in gaps] != [g.place for g in hide(texts, 10, 20, LETTERS, seed=4)]
    for gap in hide(texts, len(fit), 20, LETTERS, seed=0):
        assert gap.ids.tolist() in fit
        assert 1 <= gap.place < len(gap.ids) - 1  # neither the first token nor the end
    with pytest.raises(DataError, match=f"{len(fit) + 1} texts of 2 to 20 tokens.*there are {len(fit)}"):
        hide(texts, len(fit) + 1, 20, LETTERS, seed=0)


def test_models_that_cannot_be_asked_are_refused(causal, masked):
    blind = dataclasses.replace(masked, model=dataclasses.replace(masked.model, vocab_size=11))
    with pytest.raises(PromptError, match=r"no mask.*objective\.name = 'mlm'"):
        predict_bidirectional(blind, random_gaps(2))
    long = [ClozeItem(np.zeros(18, np.int32), 17)]
    with pytest.raises(PromptError, match=r"learned positions for 16 tokens.*has 17"):
        predict_left_to_right(causal, long)
    with pytest.raises(PromptError, match=r"learned positions for 16 tokens.*has 18"):
        predict_bidirectional(masked, long)
    with pytest.raises(PromptError, match="tells classes"):
        predict_left_to_right(dataclasses.replace(causal, labels=("good", "bad")), random_gaps(2))
