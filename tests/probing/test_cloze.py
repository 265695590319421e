"""Cloze predictions against brute force: every possible text, scored token by token."""

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
from gptjax.probing.cloze import ClozeItem, make_cloze_items, mask_id, predict_bidirectional, predict_left_to_right

LETTERS = CharTokenizer("abcdefghij", has_eos=True)  # 11 ids, as `tiny_model` has
END = LETTERS.eos_id


def pretrained(**changes) -> Pretrained:
    model = tiny_model(**changes)
    params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
    return Pretrained("tiny", model, jax.tree.map(lambda x: 6 * x, params), LETTERS)  # confident: context matters


@pytest.fixture(scope="module")
def causal() -> Pretrained:
    return pretrained()


@pytest.fixture(scope="module")
def masked() -> Pretrained:
    return pretrained(causal=False, vocab_size=12)


def random_items(count: int) -> list[ClozeItem]:
    """Texts of 5, 9 and 16 tokens, so that few programs are compiled, with items anywhere but at their first token."""
    rng = np.random.default_rng(count)
    texts = [rng.integers(0, 10, (5, 9, 16)[i % 3]).astype(np.int32) for i in range(count)]
    return [ClozeItem(ids, int(rng.integers(1, len(ids)))) for ids in texts]


@partial(jax.jit, static_argnames="model")
def forward(params, tokens, *, model):
    return jax.nn.log_softmax(GPT(model).apply({"params": params}, tokens)[0])


def log_probabilities(p: Pretrained, ids) -> np.ndarray:
    """float64 [len(ids), vocab] by one plain pass over one text; a causal model does not see padding after it."""
    padded = np.append(ids, np.zeros(16 - len(ids), int)) if p.model.causal else np.asarray(ids)
    return np.asarray(forward(p.params, padded[None], model=p.model), np.float64)[: len(ids)]


def text_log_probability(p: Pretrained, ids) -> float:
    """ln of the probability of a text given its first token."""
    return float(log_probabilities(p, ids)[np.arange(len(ids) - 1), ids[1:]].sum())


def with_token(item: ClozeItem, token: int) -> np.ndarray:
    ids = item.ids.copy()
    ids[item.position] = token
    return ids


def test_bidirectional_prediction_of_a_causal_model_uses_bayes_rule(causal):
    items = random_items(12)
    expected = [max(range(10), key=lambda v: text_log_probability(causal, with_token(item, v))) for item in items]
    assert predict_bidirectional(causal, items, candidates=11, batch_size=5).tolist() == expected
    assert expected != predict_left_to_right(causal, items).tolist()  # the right side matters


def test_with_fewer_candidates_they_are_the_top_ones_after_the_left_side(causal):
    items = random_items(12)
    expected = []
    for item in items:
        left = log_probabilities(causal, item.ids[: item.position])[-1, :10]
        top = np.argsort(-left)[:3]
        expected.append(max(top, key=lambda v: text_log_probability(causal, with_token(item, v))))
    assert predict_bidirectional(causal, items, candidates=3).tolist() == expected
    np.testing.assert_array_equal(
        predict_bidirectional(causal, items, candidates=1), predict_left_to_right(causal, items)
    )


def test_left_to_right_prediction_of_a_causal_model_is_its_next_token(causal):
    items = random_items(20)
    expected = [log_probabilities(causal, item.ids[: item.position])[-1, :10].argmax() for item in items]
    assert predict_left_to_right(causal, items, batch_size=7).tolist() == expected


def test_a_masked_model_reads_a_mask_in_the_gap(masked):
    items = random_items(20)
    assert mask_id(masked) == 11
    both = [log_probabilities(masked, with_token(item, 11))[item.position, :10].argmax() for item in items]
    assert predict_bidirectional(masked, items, batch_size=7).tolist() == both
    cut = [ClozeItem(item.ids[: item.position + 1], item.position) for item in items]
    np.testing.assert_array_equal(predict_left_to_right(masked, items), predict_bidirectional(masked, cut))
    assert both != predict_left_to_right(masked, items).tolist()


@pytest.mark.parametrize("predict", [predict_left_to_right, predict_bidirectional])
def test_the_hidden_token_is_not_used(causal, masked, predict):
    items = random_items(12)
    others = [item._replace(ids=with_token(item, (item.target + 1) % 10)) for item in items]
    for model in (causal, masked):
        np.testing.assert_array_equal(predict(model, items), predict(model, others))


def test_only_allowed_tokens_are_predicted(causal, masked):
    items = random_items(12)
    own = np.stack([[i % 10, (i + 3) % 10] for i in range(12)])
    for model in (causal, masked):
        for predict in (predict_left_to_right, predict_bidirectional):
            assert set(predict(model, items, np.array([2, 7]))) <= {2, 7}
            assert (predict(model, items, own)[:, None] == own).any(-1).all()
            assert set(predict(model, items)) <= set(range(10))  # never the end of a text or the mask


def test_gaps_are_sampled_by_the_seed_among_text_tokens():
    rng = np.random.default_rng(0)
    texts = [np.append(rng.integers(0, 10, n), END).astype(np.int32) for n in rng.integers(1, 30, 60)]
    fit = [ids.tolist() for ids in texts if 3 <= len(ids) <= 20]
    items = make_cloze_items(texts, 10, 20, LETTERS, seed=3)
    assert [(g.ids.tolist(), g.position) for g in items] == [
        (g.ids.tolist(), g.position) for g in make_cloze_items(iter(texts), 10, 20, LETTERS, seed=3)
    ]
    assert [g.position for g in items] != [g.position for g in make_cloze_items(texts, 10, 20, LETTERS, seed=4)]
    for item in make_cloze_items(texts, len(fit), 20, LETTERS, seed=0):
        assert item.ids.tolist() in fit
        assert 1 <= item.position < len(item.ids) - 1  # neither the first token nor the end
    with pytest.raises(DataError, match=f"{len(fit) + 1} texts of 2 to 20 tokens.*found {len(fit)}"):
        make_cloze_items(texts, len(fit) + 1, 20, LETTERS, seed=0)


def test_unsupported_models_are_refused(causal, masked):
    blind = dataclasses.replace(masked, model=dataclasses.replace(masked.model, vocab_size=11))
    with pytest.raises(PromptError, match=r"no mask token.*objective\.name = 'mlm'"):
        predict_bidirectional(blind, random_items(2))
    long = [ClozeItem(np.zeros(18, np.int32), 17)]
    with pytest.raises(PromptError, match=r"learned positions for 16 tokens.*has 17"):
        predict_left_to_right(causal, long)
    with pytest.raises(PromptError, match=r"learned positions for 16 tokens.*has 18"):
        predict_bidirectional(masked, long)
    with pytest.raises(PromptError, match="is a classifier"):
        predict_left_to_right(dataclasses.replace(causal, labels=("good", "bad")), random_items(2))
