"""Sampling against brute force: which tokens a rule leaves, how often they are drawn, and that seeds mean something."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.data.tokenizer import ByteTokenizer, CharTokenizer
from gptjax.errors import PromptError
from gptjax.inference.sampler import Sampling, Writer, draw, filter_logits, generate
from gptjax.model.gpt import GPT, init_params

MODEL = tiny_model(vocab_size=257, context_length=32)


@pytest.fixture(scope="module")
def params():
    """Weights large enough that the next token depends on the text."""
    return jax.tree.map(lambda x: 12 * x, jax.jit(lambda: init_params(MODEL, jax.random.key(0)))())


def left_by_brute_force(logits, temperature, top_k, top_p):
    """Indices that may be drawn, one row, by the definitions."""
    scaled = np.float64(logits) / temperature
    order = np.argsort(-scaled, kind="stable")[: top_k or None]
    probabilities = np.exp(scaled[order] - scaled[order].max())
    probabilities /= probabilities.sum()
    before = np.cumsum(probabilities) - probabilities
    return set(order[before < (top_p or 2.0) - 1e-6].tolist())


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    temperature=st.floats(0.2, 3),
    top_k=st.none() | st.integers(1, 12),
    top_p=st.none() | st.floats(0.05, 0.999),
)
def test_rules_leave_the_tokens_that_their_definitions_leave(seed, temperature, top_k, top_p):
    logits = np.random.default_rng(seed).normal(0, 2, 12).astype(np.float32)
    filtered = np.array(
        filter_logits(jnp.array(logits), temperature, jnp.int32(top_k or 12), jnp.float32(top_p or 1.0))
    )
    left = set(np.flatnonzero(np.isfinite(filtered)).tolist())
    expected = left_by_brute_force(logits, temperature, top_k, top_p)
    boundary = left_by_brute_force(logits, temperature, top_k, (top_p or 2.0) + 2e-6)
    assert expected <= left <= boundary | expected
    kept = sorted(left)
    np.testing.assert_allclose(filtered[kept], logits[kept] / np.float32(temperature), rtol=1e-5)


def test_tokens_are_drawn_with_their_probabilities():
    logits = np.array([2.0, 1.0, 0.0, -1.0, 3.0], np.float32)
    keys = jax.random.split(jax.random.key(0), 20_000)
    rules = (jnp.float32(0.7), jnp.int32(4), jnp.float32(1.0))
    drawn = np.array(jax.jit(draw)(jnp.tile(logits, (20_000, 1)), keys, *rules))
    expected = np.exp(np.where(logits >= 0, logits / 0.7, -np.inf))
    expected = expected / expected.sum() * 20_000
    counts = np.bincount(drawn, minlength=5)
    assert counts[3] == 0
    chosen = expected > 0
    chi_square = ((counts[chosen] - expected[chosen]) ** 2 / expected[chosen]).sum()
    assert chi_square < 16.27, "beyond the 99.9% quantile for 3 degrees of freedom"


def ids_of(params, prompt, **options):
    return np.stack(list(generate(MODEL, params, np.array(prompt), **options)), 1)


def test_greedy_is_the_likeliest_token_of_the_whole_model(params):
    prompt = [72, 101, 108, 108, 111]
    text = list(prompt)
    apply = jax.jit(lambda t: GPT(MODEL).apply({"params": params}, t))
    for _ in range(12):
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(text)] = text
        text.append(int(apply(padded)[0, len(text) - 1].argmax()))
    made = ids_of(params, prompt, new_tokens=12, sampling=Sampling(temperature=0))
    assert made[0].tolist() == text[5:]


def test_a_text_depends_on_its_seed_and_not_on_its_company(params):
    one = ids_of(params, [1, 2, 3], new_tokens=10, seed=5)
    many = ids_of(params, [1, 2, 3], new_tokens=10, seed=5, count=4)
    np.testing.assert_array_equal(one[0], many[0])
    assert len({tuple(row) for row in many.tolist()}) == 4
    assert not np.array_equal(one, ids_of(params, [1, 2, 3], new_tokens=10, seed=6))
    np.testing.assert_array_equal(many, ids_of(params, [1, 2, 3], new_tokens=10, seed=5, count=4))


def test_a_text_ends_at_the_stop_token(params):
    free = ids_of(params, [1, 2, 3], new_tokens=12, seed=1, count=3)
    stop = int(free[0, 4])
    stopped = ids_of(params, [1, 2, 3], new_tokens=12, seed=1, count=3, stop=stop)
    for before, after in zip(free, stopped, strict=True):
        end = np.flatnonzero(before == stop)[0] if stop in before else stopped.shape[1]
        np.testing.assert_array_equal(after[: end + 1], before[: min(end + 1, stopped.shape[1])])
        assert np.all(after[end:] == stop)


def test_what_does_not_fit_the_context_is_refused(params):
    with pytest.raises(PromptError, match="the prompt is empty"):
        ids_of(params, np.zeros(0, np.int32), new_tokens=3)
    with pytest.raises(PromptError, match=r"more than the model's context of 32; .* ask for at most 2"):
        ids_of(params, [1] * 30, new_tokens=3)
    assert ids_of(params, [1] * 30, new_tokens=2).shape == (1, 2)
    for wrong in (dict(temperature=-1.0), dict(top_k=0), dict(top_p=0.0), dict(top_p=1.1)):
        with pytest.raises(PromptError, match=next(iter(wrong))):
            Sampling(**wrong)


def test_streamed_text_is_the_text(params):
    writer = Writer(MODEL, params, ByteTokenizer())
    streamed = "".join(writer.stream("字😀", 20, Sampling(), seed=3))
    assert streamed == writer.texts("字😀", 20, 3, Sampling(), seed=3)[0]
    assert streamed.startswith("字😀")
    assert writer.texts("", 4, 1, Sampling(), seed=0)[0] is not None, "an empty prompt begins a document"


def test_rows_that_pad_the_table_are_never_drawn(params):
    made = ids_of(params, [1, 2], new_tokens=20, count=8, vocab=5, sampling=Sampling(temperature=5.0))
    assert made.max() < 5


def test_room_is_what_was_asked_for_and_fits(params):
    writer = Writer(MODEL, params, ByteTokenizer())
    assert writer.room("abc", None, None) == 29
    assert writer.room("abc", 10, None) == 7
    assert writer.room("abc", 10, 4) == 4
    with pytest.raises(PromptError, match="max_length = 3: the prompt alone has 3 tokens"):
        writer.room("abc", 3, None)
    char = Writer(MODEL, params, CharTokenizer("\nab", has_end_of_text=False))
    assert char.encode("").tolist() == [0]
