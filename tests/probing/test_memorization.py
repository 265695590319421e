"""Exposure: every secret is scored as the model scores it alone, and ranks follow the definition."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from conftest import tiny_model
from hypothesis import given
from hypothesis import strategies as st

from gptjax.data.tokenizer import ByteTokenizer, CharTokenizer
from gptjax.errors import PromptError
from gptjax.inference.pretrained import Pretrained
from gptjax.inference.scoring import Scorer, ScoreRequest
from gptjax.model.gpt import init_params
from gptjax.probing.memorization import exposure, secret_nll


def pretrained(tokenizer, **changes):
    model = tiny_model(vocab_size=tokenizer.vocab_size, init_std=0.3, **changes)
    return Pretrained("tiny", model, init_params(model, jax.random.key(0)), tokenizer)


def test_all_secrets_have_the_probabilities_that_they_have_alone():
    model = pretrained(CharTokenizer("ab 0123.", has_eos=False))
    found = secret_nll(model, "ab ", "0123", 3, batch_size=5)
    assert found.shape == (64,)
    texts = [f"ab {a}{b}{c}" for a in "0123" for b in "0123" for c in "0123"]
    requests = [ScoreRequest(model.tokenizer.encode(text), 3) for text in texts]
    alone = [scores.nll.sum(dtype=np.float64) for scores in Scorer(model).score_batch(requests)]
    np.testing.assert_allclose(found, alone, rtol=1e-5)
    assert np.exp(-found).sum() < 1, "there are other symbols besides"


@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.data())
def test_exposure_is_that_of_the_definition(values, data):
    nll, secret = np.array(values, float), data.draw(st.integers(0, len(values) - 1))
    ranks = np.flatnonzero(np.sort(nll) == nll[secret]) + 1  # of all that are as likely
    assert exposure(nll, secret) == pytest.approx(math.log2(len(nll)) - math.log2(ranks.mean()))


def test_an_unseen_secret_has_about_one_and_a_half_bits():
    nll = np.random.default_rng(0).normal(size=100_000)
    bits = [exposure(nll, i) for i in range(500)]
    assert np.mean(bits) == pytest.approx(1 / math.log(2), abs=0.15)
    assert exposure(nll, int(nll.argmin())) == pytest.approx(math.log2(100_000))


def test_unsupported_models_are_refused():
    model = pretrained(ByteTokenizer())
    with pytest.raises(PromptError, match="shorten the prefix"):
        secret_nll(model, "x" * 14, "01", 4)
    with pytest.raises(PromptError, match="does not make one token of 'é'"):
        secret_nll(model, "x", "éa", 2)
    blind = dataclasses.replace(model, model=dataclasses.replace(model.model, causal=False))
    with pytest.raises(PromptError, match="attention is bidirectional"):
        secret_nll(blind, "x", "01", 2)
