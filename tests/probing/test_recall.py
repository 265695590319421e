"""Recall: the questions have the stated form, and models with known answers get the expected scores."""

import itertools
import re

import jax
import numpy as np
import pytest
from conftest import tiny_model
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from gptjax.data.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer
from gptjax.errors import PromptError
from gptjax.inference.pretrained import Pretrained
from gptjax.model.gpt import init_params
from gptjax.probing import recall as module
from gptjax.probing.recall import CHANCE, KEYS, VALUES, document, question, recall

even = st.integers(1, 60).map(lambda n: 2 * n)


def pairs(text: str) -> list[tuple[str, str]]:
    return list(zip(text[::2], text[1::2], strict=True))


def test_values_belong_to_one_key():
    everything = [*KEYS, *itertools.chain(*VALUES)]
    assert len(everything) == len(set(everything)) == 90
    assert {1 / len(own) for own in VALUES} == {CHANCE}


@given(st.integers(0, 5), st.integers(0, 1000), even, even)
def test_a_question_can_be_answered_by_one_earlier_pair_at_its_distance_only(seed, index, distance, length):
    text = question(seed, index, distance, length)
    assert text == question(seed, index, distance, length)
    assert len(text) == max(length, distance + 2)
    found_pairs = pairs(text)
    key, answer = found_pairs[-1]
    assert text[-1 - distance] == answer
    assert [value for k, value in found_pairs if k == key] == [answer, answer]
    facts = dict(found_pairs)
    for k, value in found_pairs:
        assert value in VALUES[KEYS.index(k)]
        assert facts[k] == value  # no key has two values


def test_training_texts_have_constant_facts_that_differ_between_texts():
    texts = [document(0, i, 200) for i in range(40)]
    for text in texts:
        found_pairs = pairs(text)
        assert len(found_pairs) == 200
        assert len(set(found_pairs)) == len({key for key, _ in found_pairs}) == len(KEYS)
    values = [dict(pairs(text))["!"] for text in texts]
    assert len(set(values)) > 4
    assert document(1, 0, 200) != texts[0] == document(0, 0, 200)


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
def test_an_untrained_model_is_right_by_chance_at_every_distance(causal):
    tokenizer = ByteTokenizer()
    model = tiny_model(vocab_size=258, causal=causal, positions="rope", head_dim=8)
    params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
    right = recall(Pretrained("untrained", model, params, tokenizer), (2, 10, 40), 300, 16, seed=0)
    assert right.shape == (3, 300)
    assert right.dtype == bool
    low, high = stats.binom.interval(0.9999, 300, CHANCE)  # one false alarm in 3,000 tests
    assert ((low <= right.sum(1)) & (right.sum(1) <= high)).all()


def test_a_reader_with_limited_memory_is_right_up_to_that_distance(monkeypatch):
    """Instead of a model, a function that knows the last 30 tokens, and otherwise answers the first value."""
    tokenizer = CharTokenizer("".join(map(chr, range(33, 123))), has_eos=False)

    def reads(pretrained, items, allowed, batch_size):
        answers = []
        for item, own in zip(items, allowed, strict=True):
            assert item.position == len(item.ids) - 1
            text = tokenizer.decode(item.ids[: item.position])
            found = re.findall(re.escape(text[-1]) + "(.)", text[-30:])
            answers.append(tokenizer.encode(found[-1])[0] if found else own[0])
        return np.array(answers)

    monkeypatch.setattr(module, "predict_left_to_right", reads)
    right = recall(Pretrained("reader", tiny_model(), {}, tokenizer), (2, 28, 30, 90), 200, 64, seed=1)
    assert right[:2].all()
    for row in right[2:]:
        assert abs(row.mean() - CHANCE) < 0.1


def test_a_tokenizer_that_joins_characters_is_refused():
    class Pairs(Tokenizer):
        kind = "pairs"

        def encode(self, text):
            return np.zeros(len(text) // 2, np.int32)

    with pytest.raises(PromptError, match=r"pairs tokenizer makes 4 tokens of the 8.*'byte' or 'char'"):
        recall(Pretrained("joined", tiny_model(), {}, Pairs([], None)), (2,), 1, 8, seed=0)
