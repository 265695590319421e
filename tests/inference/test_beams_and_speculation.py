"""Beam search against brute force, and speculative decoding against exact probabilities."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_model

from gptjax.data.tokenizer import ByteTokenizer, CharTokenizer
from gptjax.errors import PromptError
from gptjax.inference.beams import BeamConfig, beam_search
from gptjax.inference.drafters import DraftModel, PromptLookup
from gptjax.inference.engine import make_engine
from gptjax.inference.generate import Request, generate
from gptjax.inference.pretrained import Pretrained
from gptjax.inference.sampling import SamplingParams
from gptjax.inference.speculative import Tally, speculate
from gptjax.model.gpt import GPT, init_params

GREEDY = SamplingParams(temperature=0)


def pretrained_of(model, tokenizer=None, scale=12.0, seed=0):
    params = jax.tree.map(lambda x: scale * x, jax.jit(lambda: init_params(model, jax.random.key(seed)))())
    return Pretrained("tiny", model, params, tokenizer or ByteTokenizer())


@pytest.fixture(scope="module")
def small():
    """Five tokens, so that every text of four can be enumerated."""
    model = tiny_model(vocab_size=5, context_length=32)
    return pretrained_of(model, CharTokenizer("abcde", False))


@pytest.mark.slow
def test_enough_beams_find_the_most_likely_text(small):
    """5^3 beams keep every prefix: the best of all texts of four tokens is found."""
    engine = make_engine(small)
    prompt = np.array([0, 1, 2], np.int32)
    found = beam_search(engine, Request(prompt, 4, GREEDY), BeamConfig(count=125))
    texts = np.array(list(itertools.product(range(5), repeat=4)))
    whole = np.concatenate([np.tile(prompt, (len(texts), 1)), texts], 1)
    logits = jax.jit(lambda t: GPT(small.model).apply({"params": small.params}, t))(whole)
    logprobs = np.take_along_axis(np.array(jax.nn.log_softmax(logits))[:, 2:-1], texts[..., None], 2)[..., 0]
    scores = logprobs.sum(1) / 4
    order = np.argsort(-scores)
    np.testing.assert_array_equal([f.ids for f in found[:5]], texts[order[:5]])
    np.testing.assert_allclose([f.score for f in found[:5]], scores[order[:5]], rtol=1e-4)


def test_one_beam_is_greedy(small):
    engine = make_engine(small)
    request = Request(np.array([3, 1], np.int32), 9, GREEDY)
    (found,) = beam_search(engine, request, BeamConfig(count=1))
    assert found.ids.tolist() == [int(s.tokens[0]) for s in generate(engine, [request])]


MODEL = tiny_model(vocab_size=257, context_length=48)
PROMPTS = [[72, 101, 108], list(range(20)), [7, 8, 7, 8, 7]]


def texts_of(steps, count):
    steps = list(steps)
    return [[int(s.tokens[i]) for s in steps if s.live[i]] for i in range(count)]


@pytest.mark.parametrize("changes", [{}, dict(positions="rope", sliding_window=4)], ids=["plain", "window"])
@pytest.mark.parametrize("kind", ["lookup", "same", "other"])
def test_speculative_decoding_changes_no_greedy_token(changes, kind):
    model = tiny_model(vocab_size=257, context_length=48, **changes)
    engine = make_engine(pretrained_of(model))
    drafter = {
        "lookup": lambda: PromptLookup(),
        "same": lambda: DraftModel(engine),
        "other": lambda: DraftModel(make_engine(pretrained_of(model, seed=1))),
    }[kind]()
    requests = [Request(np.array(p, np.int32), n, GREEDY) for p, n in zip(PROMPTS, (25, 17, 25), strict=True)]
    tally = Tally(3)
    drafted = texts_of(speculate(engine, requests, drafter, 3, tally), 3)
    assert drafted == texts_of(generate(engine, requests), 3)
    assert tally.calls and (kind != "same" or tally.acceptance == 1), "a model agrees with itself"


def constant_model(logits):
    """A model whose next token does not depend on the text: weights 0, and the logits in the last norm's bias."""
    size = len(logits)
    model = tiny_model(vocab_size=size, context_length=4096, embed_dim=size, num_heads=1, positions="none", ffn_dim=4)
    params = jax.tree.map(jnp.zeros_like, init_params(model, jax.random.key(0)))
    params["final_norm"]["bias"] = jnp.asarray(logits, jnp.float32)
    params["embedding"]["tokens"] = jnp.eye(size)
    return make_engine(Pretrained("constant", model, params, CharTokenizer("abcdefgh"[:size], False)))


P, Q = np.log([0.5, 0.2, 0.15, 0.1, 0.05]), np.log([0.25, 0.3, 0.05, 0.2, 0.2])


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampling",
    [pytest.param(SamplingParams(), marks=pytest.mark.slow), SamplingParams(0.7, top_k=4)],
    ids=["plain", "filtered"],
)
@pytest.mark.parametrize("kind", ["draft", "lookup"])
def test_speculative_texts_have_the_models_probabilities(kind, sampling):
    engine = constant_model(P)
    drafter = DraftModel(constant_model(Q)) if kind == "draft" else PromptLookup()
    requests = [Request(np.array([0, 1], np.int32), 500, sampling, seed=i) for i in range(16)]
    tally = Tally(4)
    texts = np.array(texts_of(speculate(engine, requests, drafter, 4, tally), 16))
    expected = np.exp(P / sampling.temperature) * (np.arange(5) < (sampling.top_k or 5))
    expected = expected / expected.sum()
    chosen = expected > 0
    for seen in (texts.reshape(-1), texts[:, ::2] * 5 + texts[:, 1::2]):  # single tokens, and pairs of them
        table = expected if seen.max() < 5 else np.outer(expected, expected).reshape(-1)
        counts = np.bincount(seen.reshape(-1), minlength=len(table))
        assert counts[table == 0].sum() == 0
        counts, wanted = counts[table > 0], table[table > 0] * seen.size
        degrees = len(wanted) - 1
        chi_square = ((counts - wanted) ** 2 / wanted).sum()
        assert chi_square < degrees + 3.1 * np.sqrt(2 * degrees) + 5, "beyond the 99.9% quantile"
    assert chosen.sum() > 1 and tally.acceptance < 1


@pytest.mark.slow
@pytest.mark.parametrize("num_draft_tokens", [pytest.param(n, marks=[pytest.mark.slow] * (n != 3)) for n in (1, 3, 5)])
def test_tokens_per_call_follow_leviathans_formula(num_draft_tokens):
    """Where every draft token is accepted with the same probability: alpha = sum of min(p, q), exactly."""
    engine, draft = constant_model(P), DraftModel(constant_model(Q))
    requests = [Request(np.array([0], np.int32), 600, SamplingParams(), seed=i) for i in range(24)]
    tally = Tally(num_draft_tokens)
    list(speculate(engine, requests, draft, num_draft_tokens, tally))
    alpha = np.minimum(np.exp(P), np.exp(Q)).sum()
    formula = (1 - alpha ** (num_draft_tokens + 1)) / (1 - alpha)
    assert abs(tally.acceptance / alpha - 1) < 0.03
    assert abs(tally.tokens_per_call / formula - 1) < 0.03
    assert abs(tally.expected_tokens_per_call / formula - 1) < 0.03


@pytest.mark.slow
def test_a_draft_may_have_a_longer_table_of_the_same_tokens():
    """As the sizes of Pythia have: the padding of a table is never a token."""
    engine = make_engine(pretrained_of(MODEL))
    draft = make_engine(pretrained_of(tiny_model(vocab_size=270, context_length=48), seed=1))
    for sampling in (GREEDY, SamplingParams()):
        request = Request(np.array([1, 2, 3], np.int32), 20, sampling)
        (text,) = texts_of(speculate(engine, [request], DraftModel(draft), 3), 1)
        assert len(text) == 20 and max(text) < 257
        if sampling == GREEDY:
            assert [text] == texts_of(generate(engine, [request]), 1)


def test_unsupported_combinations_are_refused():
    engine = make_engine(pretrained_of(MODEL))
    request = Request(np.array([1], np.int32), 4, SamplingParams(repetition_penalty=1.2))
    with pytest.raises(PromptError, match="cannot be combined with speculative decoding"):
        speculate(engine, [request], PromptLookup(), 2)
    with pytest.raises(PromptError, match="draft_tokens = 0"):
        speculate(engine, [Request(np.array([1], np.int32), 4)], PromptLookup(), 0)
    with pytest.raises(PromptError, match="5 tokens and the model 257"):
        speculate(engine, [Request(np.array([1], np.int32), 4)], DraftModel(constant_model(P)), 2)
    with pytest.raises(PromptError, match="num_beams = 0"):
        BeamConfig(count=0)
