"""Generated texts against a full forward pass for every token: greedy, ragged batches, ring buffers, seeds, limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_model

from gptjax.data.tokenizer import ByteTokenizer
from gptjax.errors import PromptError
from gptjax.inference.cache import bucket, cache_length_for
from gptjax.inference.engine import make_engine
from gptjax.inference.generate import Request, generate
from gptjax.inference.pretrained import Pretrained
from gptjax.inference.sampling import SamplingParams
from gptjax.model.gpt import GPT, init_params

MODEL = tiny_model(vocab_size=257, context_length=32)
GREEDY = SamplingParams(temperature=0)


def pretrained_of(model, scale=12.0):
    """Weights large enough that the next token depends on the text."""
    params = jax.tree.map(lambda x: scale * x, jax.jit(lambda: init_params(model, jax.random.key(0)))())
    return Pretrained("tiny", model, params, ByteTokenizer())


@pytest.fixture(scope="module")
def engine():
    return make_engine(pretrained_of(MODEL))


def made(engine, requests):
    """The ids of every text."""
    steps = list(generate(engine, requests))
    return [[int(s.tokens[i]) for s in steps if s.live[i]] for i in range(len(requests))]


def request_of(prompt, new_tokens=10, **settings):
    return Request(np.array(prompt, np.int32), new_tokens, **settings)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, params, tokens):
    return GPT(model).apply({"params": params}, tokens)


def greedy_without_cache(model, params, prompt, new_tokens, length=64):
    text = list(prompt)
    for _ in range(new_tokens):
        padded = np.zeros((1, length), np.int32)
        padded[0, : len(text)] = text
        text.append(int(logits_of(model, params, padded)[0, len(text) - 1].argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize(
    "changes",
    [{}, dict(positions="rope", num_kv_heads=1), dict(positions="alibi", sliding_window=5),
     dict(positions="rope", sliding_window=3, norm="rmsnorm"), dict(dtype="bfloat16")],
    ids=["plain", "gqa", "alibi-window", "rope-window", "bfloat16"],
)  # fmt: skip
def test_greedy_decoding_is_that_of_full_forward_passes(changes):
    """Prompts of three lengths in one batch; with a sliding window a text is longer than its cache."""
    model = tiny_model(vocab_size=257, context_length=64, **changes)
    pretrained = pretrained_of(model)
    prompts = [[72, 101, 108, 108, 111], list(range(40)), [7]]
    texts = made(make_engine(pretrained), [request_of(p, 14, sampling=GREEDY) for p in prompts])
    alike = [greedy_without_cache(model, pretrained.params, p, 14) == t for p, t in zip(prompts, texts, strict=True)]
    assert all(alike) if model.dtype == "float32" else any(alike), "bfloat16 may break a tie differently"


def test_a_model_of_attention_alone_generates():
    made = generate(make_engine(pretrained_of(tiny_model(vocab_size=257, ffn="none"))), [request_of([1, 2, 3], 4)])
    assert len(list(made)) == 4


def test_beyond_the_context_a_text_attends_to_the_last_tokens_only():
    """A model without learned positions has no length limit: beyond the context it has a sliding window."""
    model = tiny_model(vocab_size=257, context_length=16, positions="rope")
    pretrained = pretrained_of(model)
    (text,) = made(make_engine(pretrained), [request_of(range(20), 30, sampling=GREEDY)])
    windowed = tiny_model(vocab_size=257, context_length=64, positions="rope", sliding_window=16)
    assert text == greedy_without_cache(windowed, pretrained.params, list(range(20)), 30)
    assert cache_length_for(model, 1000) == bucket(16) and cache_length_for(MODEL, 20) == 24
    assert cache_length_for(model, 1000, per_step=30) >= 16 + 29


def test_few_lengths_are_compiled():
    assert [bucket(n) for n in (1, 16, 17, 24, 25, 32, 33, 48, 49, 64, 65, 96, 97, 128)] == [
        16, 16, 24, 24, 32, 32, 48, 48, 64, 64, 96, 96, 128, 128]  # fmt: skip
    assert len({bucket(n) for n in range(1, 4097)}) == 17


def test_a_text_depends_on_its_seed_and_not_on_its_batch(engine):
    alone = made(engine, [request_of([1, 2, 3], seed=5)])
    many = made(
        engine, [request_of([9] * 7, seed=1), request_of([1, 2, 3], seed=5), request_of([1, 2, 3], seed=5, copy=1)]
    )
    assert many[1] == alone[0] and many[2] != alone[0]
    assert (
        made(engine, [request_of([1, 2, 3], seed=6)])
        != alone
        != made(engine, [request_of([1, 2, 3], seed=5 + (1 << 40))])
    )
    assert made(engine, [request_of([1, 2, 3], seed=5)]) == alone


def test_each_text_has_its_own_sampling_params_and_length(engine):
    requests = [
        request_of([1, 2, 3], 4, sampling=GREEDY),
        request_of([1, 2, 3], 9, sampling=SamplingParams(temperature=5.0, top_k=3), seed=2),
        request_of([1, 2, 3], 6, sampling=SamplingParams(temperature=0, logit_bias=((65, 1e4),))),
    ]
    texts = made(engine, requests)
    assert [len(t) for t in texts] == [4, 9, 6] and texts[2] == [65] * 6
    for request, text in zip(requests, texts, strict=True):
        assert made(engine, [request]) == [text]


def test_log_probabilities_are_those_of_the_model(engine):
    request = request_of([1, 2, 3], 6, sampling=SamplingParams(temperature=2.0, top_k=5, repetition_penalty=1.5))
    steps = list(generate(engine, [request]))
    ids = [1, 2, 3] + [int(s.tokens[0]) for s in steps]
    logits = GPT(MODEL).apply({"params": pretrained_of(MODEL).params}, jnp.array([ids]))
    expected = jax.nn.log_softmax(logits[0])[jnp.arange(2, 8), jnp.array(ids[3:])]
    np.testing.assert_allclose([s.logprobs[0] for s in steps], expected, rtol=1e-3, atol=1e-4)


def test_nothing_is_compiled_for_a_token_or_a_prompt(engine):
    from gptjax.inference.generate import _decode_and_sample

    made(engine, [request_of([1, 2, 3], 8)])
    before = _decode_and_sample._cache_size()
    made(engine, [request_of([5] * 11, 20, seed=9, sampling=SamplingParams(0.3))])
    made(engine, [request_of([5] * 11, 20, seed=9, sampling=SamplingParams(0.4))])
    assert _decode_and_sample._cache_size() == before + 2, (
        "once for the prefill and once for the steps, with temperature"
    )


def test_invalid_requests_are_refused(engine):
    for request, message in [
        (request_of([], 3), "the prompt is empty"),
        (request_of([1] * 30, 3), r"more than the model's context length of 32; .* generate at most 2 tokens"),
        (request_of([1, 257], 3), "ids that are not tokens; ids are 0 to 256"),
        (request_of([1], 3, seed=-1), "seed = -1"),
    ]:
        with pytest.raises(PromptError, match=message):
            generate(engine, [request])
    assert [len(t) for t in made(engine, [request_of([1] * 30, 2), request_of([1], 0)])] == [2, 0]
    with pytest.raises(PromptError, match="allow no token"):
        made(engine, [request_of([1], 5, sampling=SamplingParams(logit_bias=tuple((i, -np.inf) for i in range(257))))])


def test_a_bidirectional_model_cannot_generate():
    with pytest.raises(PromptError, match=r"model.causal = False"):
        make_engine(pretrained_of(tiny_model(vocab_size=257, causal=False)))


@pytest.mark.slow
def test_int8_changes_little_and_takes_a_quarter_of_the_bytes():
    model = tiny_model(vocab_size=257, context_length=32, embed_dim=64, num_heads=4, ffn="swiglu", tie_embeddings=False)
    pretrained = pretrained_of(model, 1.0)
    whole, small = make_engine(pretrained), make_engine(pretrained, "int8")
    assert small.weight_bytes < 0.3 * whole.weight_bytes
    assert small.params["blocks"][0]["ffn"]["up"].values.dtype == jnp.int8
    prompt = request_of(range(20), 1, sampling=GREEDY)
    a, b = (next(iter(generate(e, [prompt]))).logprobs[0] for e in (whole, small))
    assert abs(a - b) < 0.02
    with pytest.raises(PromptError, match=r"dtype = 'int4': must be one of float32, bfloat16, int8"):
        make_engine(pretrained, "int4")


def test_bfloat16_is_near_float32():
    model = tiny_model(vocab_size=257, context_length=32, embed_dim=64, num_heads=4, ffn="swiglu", tie_embeddings=False)
    whole, narrow = (make_engine(pretrained_of(model, 1.0), dtype) for dtype in (None, "bfloat16"))
    for texts in ([range(20)], [range(20), range(3)]):
        requests = [request_of(text, 1, sampling=GREEDY) for text in texts]
        a, b = (next(iter(generate(engine, requests))) for engine in (whole, narrow))
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=0.05)


class EndsAfter:
    """A constraint that allows every token and ends a text after some tokens."""

    def __init__(self, tokens):
        self.remaining, self.accepted = tokens, []

    def allowed(self):
        return None

    def accept(self, token):
        self.accepted.append(token)
        self.remaining -= 1
        return self.remaining == 0


def test_a_text_may_end_early_and_the_others_continue(engine):
    whole = made(engine, [request_of([1, 2, 3], 9), request_of([7, 8], 9)])
    constraint = EndsAfter(2)
    early, late = made(engine, [request_of([1, 2, 3], 9, constraints=(constraint,)), request_of([7, 8], 9)])
    assert (early, late) == (whole[0][:2], whole[1]) and constraint.accepted == early, "it gets no token after the end"
    assert made(engine, [request_of([1, 2, 3], 9, constraints=(EndsAfter(3),))]) == [whole[0][:3]]
