"""Sampling against independent references: transformers' processors, definitions in NumPy, and chi-square."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.errors import PromptError
from gptjax.inference.sampling import (
    SamplingParams,
    TokenHistory,
    argmax,
    batch_params,
    process_logits,
    sample_token,
    warped,
)

VOCAB, ROWS, LENGTH = 23, 3, 12


def history_of(tokens, prompts, lengths):
    return TokenHistory(
        jnp.asarray(tokens, jnp.int32), jnp.asarray(prompts, jnp.int32), jnp.asarray(lengths, jnp.int32)
    )


def case(seed):
    """Random logits, and texts of several lengths that repeat themselves; what follows a text must not matter."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (ROWS, VOCAB)).astype(np.float32)
    tokens = rng.integers(0, 5, (ROWS, LENGTH))
    lengths = rng.integers(1, LENGTH + 1, ROWS)
    prompts = np.array([rng.integers(1, n + 1) for n in lengths])
    return logits, tokens, prompts, lengths


settings_drawn = st.builds(  # dicts: the type checks of SamplingParams use `random`, which a strategy may not
    dict,
    temperature=st.floats(0.2, 3),
    top_k=st.none() | st.integers(1, VOCAB + 3),
    top_p=st.none() | st.floats(0.05, 0.999),
    min_p=st.none() | st.floats(0.01, 0.9),
    repetition_penalty=st.sampled_from([1.0, 0.7, 1.3]),
    no_repeat_ngram_size=st.integers(0, 4),
    logit_bias=st.just(()) | st.lists(st.tuples(st.integers(0, VOCAB - 1), st.floats(-5, 5)), max_size=3).map(tuple),
)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), settings_of_rows=st.lists(settings_drawn, min_size=ROWS, max_size=ROWS))
def test_every_processor_is_that_of_transformers(seed, settings_of_rows):
    samplings = [SamplingParams(**row) for row in settings_of_rows]
    torch = pytest.importorskip("torch")
    g = pytest.importorskip("transformers.generation")

    logits, tokens, prompts, lengths = case(seed)
    sampling_batch = batch_params(samplings, VOCAB, VOCAB)
    kept = process_logits(jnp.asarray(logits), sampling_batch, history_of(tokens, prompts, lengths))
    ours = np.array(warped(kept, sampling_batch))
    for row, s in enumerate(samplings):
        ids = torch.tensor(tokens[row : row + 1, : lengths[row]])
        bias = {}
        for token, value in s.logit_bias:
            bias[(token,)] = bias.get((token,), 0.0) + value
        processors = [
            bool(bias) and g.SequenceBiasLogitsProcessor(bias),
            s.repetition_penalty != 1 and g.RepetitionPenaltyLogitsProcessor(s.repetition_penalty),
            s.no_repeat_ngram_size > 0 and g.NoRepeatNGramLogitsProcessor(s.no_repeat_ngram_size),
            g.TemperatureLogitsWarper(s.temperature),
            s.top_k and g.TopKLogitsWarper(s.top_k),
            s.top_p and g.TopPLogitsWarper(s.top_p),
            s.min_p and g.MinPLogitsWarper(s.min_p),
        ]
        before = theirs = torch.tensor(logits[row : row + 1])
        for processor in filter(None, processors):
            before = theirs if isinstance(processor, g.TopPLogitsWarper) else before
            theirs = processor(ids, theirs)
        theirs = theirs[0].numpy()
        if not np.isfinite(theirs).any():
            continue  # every token was forbidden: tested below
        if not _ends_between_tokens(s, before[0].numpy()):
            np.testing.assert_array_equal(np.isfinite(ours[row]), np.isfinite(theirs), str(s))
        both = np.isfinite(theirs) & np.isfinite(ours[row])
        np.testing.assert_allclose(ours[row][both], theirs[both], rtol=2e-5, atol=1e-5)


def _ends_between_tokens(s, theirs):
    """Whether the cumulative probability equals top_p within float32's precision: then either result is right."""
    if s.top_p is None:
        return False
    probabilities = np.sort(np.exp(np.float64(theirs) - theirs.max()))[::-1]
    return bool((abs(np.cumsum(probabilities) / probabilities.sum() - s.top_p) < 1e-5).any())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), presence=st.floats(-2, 2), frequency=st.floats(-2, 2))
def test_presence_and_frequency_count_the_continuation(seed, presence, frequency):
    logits, tokens, prompts, lengths = case(seed)
    sampling = SamplingParams(presence_penalty=presence, frequency_penalty=frequency)
    sampling_batch = batch_params([sampling] * ROWS, VOCAB, VOCAB)
    ours = np.array(process_logits(jnp.asarray(logits), sampling_batch, history_of(tokens, prompts, lengths)))
    for row in range(ROWS):
        made = np.bincount(tokens[row, prompts[row] : lengths[row]], minlength=VOCAB)
        np.testing.assert_allclose(ours[row], logits[row] - presence * (made > 0) - frequency * made, atol=1e-5)


def test_tokens_are_sampled_with_their_probabilities():
    logits = np.array([2.0, 1.0, 0.0, -1.0, 3.0], np.float32)
    sampling_batch = batch_params([SamplingParams(0.7, top_k=4, min_p=0.01)] * 20_000, 5, 5)
    keys = jax.random.split(jax.random.key(0), 20_000)
    drawn = np.array(sample_token(jnp.tile(logits, (20_000, 1)), sampling_batch, keys))
    expected = np.exp(np.where(logits >= 0, logits / 0.7, -np.inf))
    expected = np.where(expected / expected.max() >= 0.01, expected, 0)
    expected = expected / expected.sum() * 20_000
    counts = np.bincount(drawn, minlength=5)
    chosen = expected > 0
    assert counts[~chosen].sum() == 0 and chosen.sum() == 4
    chi_square = ((counts[chosen] - expected[chosen]) ** 2 / expected[chosen]).sum()
    assert chi_square < 16.27, "beyond the 99.9% quantile for 3 degrees of freedom"


def test_a_batch_may_mix_temperatures():
    logits = np.array([[1.0, 5.0, 2.0], [1.0, 5.0, 2.0]], np.float32)
    sampling_batch = batch_params([SamplingParams(temperature=0), SamplingParams(temperature=1e6)], 3, 3)
    drawn = [
        np.array(sample_token(jnp.asarray(logits), sampling_batch, jax.random.split(jax.random.key(i), 2)))
        for i in range(30)
    ]
    assert {int(d[0]) for d in drawn} == {1}, "temperature 0 is greedy"
    assert {int(d[1]) for d in drawn} == {0, 1, 2}


def test_an_ngram_longer_than_the_text_is_never_repeated():
    logits, history = jnp.zeros((1, 3)), history_of([[1, 1, 1, 1]], [1], [4])
    for size, allowed in ((3, 2), (4, 2), (5, 3), (10**9, 3)):  # 1 1 1 is in the text, and so is 1 1 1 1
        sampling_batch = batch_params([SamplingParams(no_repeat_ngram_size=size)], 3, 3)
        assert np.isfinite(process_logits(logits, sampling_batch, history)).sum() == allowed, size


def test_minus_one_where_no_token_is_allowed():
    logits = jnp.zeros((2, 3))
    sampling_batch = batch_params([SamplingParams(temperature=0, no_repeat_ngram_size=1)] * 2, 3, 3)
    history = history_of([[0, 1, 2], [0, 1, 1]], [1, 1], [3, 3])
    assert sample_token(process_logits(logits, sampling_batch, history), sampling_batch, None).tolist() == [-1, 2]
    allowed = jnp.array([[True, False, True], [False, False, True]])
    plain = batch_params([SamplingParams(temperature=0)] * 2, 2, 3)  # the third id is not a token
    assert sample_token(process_logits(logits, plain, history, allowed), plain, None).tolist() == [0, -1]


@pytest.mark.parametrize(
    "wrong",
    [dict(temperature=-1.0), dict(top_k=0), dict(top_p=0.0), dict(top_p=1.1), dict(min_p=1.5),
     dict(repetition_penalty=0.0), dict(no_repeat_ngram_size=-1), dict(no_repeat_ngram_size=10**24),
     dict(logit_bias=((1, float("inf")),))],
)  # fmt: skip
def test_invalid_sampling_params_are_refused(wrong):
    with pytest.raises(PromptError, match=next(iter(wrong))):
        SamplingParams(**wrong)
    with pytest.raises(PromptError, match=r"logit_bias: 7 is not a token id; ids are 0 to 4"):
        batch_params([SamplingParams(logit_bias=((7, 1.0),))], 5, 8)


def test_argmax_is_the_first_of_equals():
    logits = np.random.default_rng(0).integers(-2, 3, (50, VOCAB)).astype(np.float32)
    logits[0], logits[1, :5] = -np.inf, -np.inf
    np.testing.assert_array_equal(argmax(jnp.asarray(logits)), logits.argmax(-1) * (logits.max(-1) > -np.inf))
