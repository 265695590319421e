"""Scores of texts, against one forward pass for each token and against independent arithmetic."""

import dataclasses
import math
from functools import partial

import jax
import numpy as np
import pytest
from conftest import tiny_model

from gptjax.data.tokenizer import ByteTokenizer, CharTokenizer
from gptjax.errors import PromptError
from gptjax.inference import scoring
from gptjax.inference.pretrained import Pretrained
from gptjax.inference.scoring import LossTotals, Scorer, ScoreRequest, evaluate_texts, score, windows
from gptjax.model.gpt import GPT, init_params

LETTERS = "abcdefghij"  # and the end of a text: 11 ids, as `tiny_model` has


def pretrained(tokenizer=None, **changes) -> Pretrained:
    model = tiny_model(**changes)
    params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
    params = jax.tree.map(lambda x: 4 * x, params)  # confident, so that context matters
    return Pretrained("tiny", model, params, tokenizer or CharTokenizer(LETTERS, has_eos=True))


def random_ids(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, len(LETTERS), count).astype(np.int32)


def full_logits(p: Pretrained, ids) -> np.ndarray:
    """float64 [len(ids), vocab] by one plain pass."""
    return np.asarray(forward(p.params, np.asarray(ids)[None], model=p.model)[0], np.float64)


@partial(jax.jit, static_argnames="model")
def forward(params, tokens, *, model):
    return GPT(model).apply({"params": params}, tokens)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.fixture(scope="module")
def tiny() -> Pretrained:
    return pretrained()


@pytest.mark.parametrize("stride", [1, 5, 16, None])
def test_every_token_is_scored_once_as_one_pass_for_each_token_would(tiny, stride):
    ids, context = random_ids(41), tiny.model.context_length
    scored = score(tiny, ids, stride, batch_size=3)
    assert len(scored.nll) == len(scored.context_sizes) == 41
    whole = np.concatenate([[tiny.tokenizer.eos_id], ids])  # a text is conditioned on the EOS token
    padded = np.zeros(context, np.int32)
    for i in range(41):
        context_size = scored.context_sizes[i]
        assert context_size >= min(i + 1, context - (stride or context) + 1)
        padded[:context_size] = whole[i + 1 - context_size : i + 1]
        expected = -log_softmax(full_logits(tiny, padded))[context_size - 1, ids[i]]
        assert scored.nll[i] == pytest.approx(expected, abs=1e-4)
    if stride == 1:
        np.testing.assert_array_equal(scored.context_sizes, np.minimum(np.arange(1, 42), context))


@pytest.mark.parametrize("length, stride", [(8, 3), (8, 7), (12, 4), (17, 16), (17, 1)])
def test_windows_are_those_of_the_guide_to_perplexity_of_transformers(length, stride):
    """Its loop, with a model that reads `length` tokens and does not use the last: a window here is one shorter."""
    p = pretrained(CharTokenizer(LETTERS + "k", has_eos=False), context_length=17)
    ids = random_ids(45, seed=length)
    nll, count, before = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + length, len(ids))
        labels = ids[begin:end].copy()
        labels[: len(labels) - (end - before)] = -100
        predicted = log_softmax(full_logits(p, ids[begin:end]))[:-1]
        for row, label in zip(predicted, labels[1:], strict=True):
            nll, count = nll - (row[label] if label != -100 else 0), count + (label != -100)
        before = end
        if end == len(ids):
            break
    scored = score(p, ids, stride, window=length - 1)
    assert len(scored.nll) == count == len(ids) - 1  # nothing precedes the first
    assert scored.loss == pytest.approx(nll / count, rel=1e-5)


def test_a_score_depends_on_no_neighbour_batch_or_padding(tiny):
    texts = [random_ids(n, seed=n) for n in (0, 1, 50, 3, 16, 17, 2)]
    for batch_size in (1, 4, 32):
        together = list(Scorer(tiny, batch_size).texts(texts, 4))
        for text, scored in zip(texts, together, strict=True):
            assert len(scored.nll) == len(text)
            np.testing.assert_allclose(scored.nll, score(tiny, text, 4).nll, rtol=1e-4, atol=1e-5)
    assert math.isnan(together[0].loss)


def test_more_texts_than_fit_into_a_block(tiny, monkeypatch):
    monkeypatch.setattr(scoring, "BATCHES_PER_BLOCK", 2)
    texts = [random_ids(1 + n % 20, seed=n) for n in range(23)]
    for text, scored in zip(texts, Scorer(tiny, 2).texts(iter(texts), 3), strict=True):
        np.testing.assert_allclose(scored.nll, score(tiny, text, 3).nll, rtol=1e-4, atol=1e-5)


def test_logits_in_chunks_are_the_same(tiny, monkeypatch):
    ids = random_ids(100)
    whole = score(tiny, ids)
    monkeypatch.setattr(scoring, "MAX_LOGITS", 11 * 40)
    jax.clear_caches()
    np.testing.assert_allclose(score(tiny, ids).nll, whole.nll, rtol=1e-5)


def test_requests_that_differ_in_their_last_token_share_a_row(tiny, monkeypatch):
    context = random_ids(9)
    requests = [ScoreRequest(np.append(context, last).astype(np.int32), 1 + last % 3) for last in range(10)]
    scorer, read = Scorer(tiny, 4), []
    compute = scorer._compute
    monkeypatch.setattr(scorer, "_compute", lambda own, rows: read.append(set(rows)) or compute(own, rows))
    scores = list(scorer.score_batch(requests))
    assert read == [{0}]
    log_p = log_softmax(full_logits(tiny, context))[-1]
    for request, token_scores in zip(requests, scores, strict=True):
        assert token_scores.nll[-1] == pytest.approx(-log_p[request.ids[-1]], abs=1e-4)
        assert len(token_scores.nll) == request.num_targets
    assert [bool(a.is_argmax[-1]) for a in scores] == [last == log_p.argmax() for last in range(10)]


@pytest.mark.parametrize("positions", ["rope", "alibi", "none"])
def test_windows_may_be_longer_than_the_context_without_learned_positions(positions):
    p = pretrained(positions=positions)
    ids = random_ids(30)
    expected = -log_softmax(full_logits(p, np.append(10, ids)))[np.arange(30), ids]
    np.testing.assert_allclose(score(p, ids, window=40).nll, expected, atol=1e-4)


def test_invalid_scoring_settings_are_refused(tiny):
    for words, message in [
        (dict(window=17), "at most 16"),
        (dict(window=0), "at least 1"),
        (dict(stride=0), "stride = 0"),
        (dict(stride=9, window=8), "at most the 8 tokens"),
        (dict(dtype="float16"), "must be one of float32, bfloat16"),
        (dict(batch_size=0), "batch_size = 0"),
    ]:
        with pytest.raises(PromptError, match=message):
            score(tiny, random_ids(5), **words)
    with pytest.raises(PromptError, match=r"model\.causal = False"):
        Scorer(pretrained(causal=False))


def test_a_narrower_dtype_gives_nearly_the_same(tiny):
    ids = random_ids(64)
    exact, narrow = (score(tiny, ids, dtype=dtype) for dtype in (None, "bfloat16"))
    assert narrow.nll.dtype == np.float32 and 0 < abs(narrow.loss - exact.loss) < 0.2 * exact.loss


def test_metrics_count_each_document_from_its_beginning(tiny):
    documents = ["abc", "", "jihgfedcba" * 4, "ab"]
    totals = evaluate_texts(Scorer(tiny), iter(documents), stride=8)
    each = [score(tiny, tiny.tokenizer.encode(d), 8).nll for d in documents]
    nll = np.concatenate(each)
    f = totals.metrics()
    assert (f["tokens"], f["bytes"], f["documents"]) == (45, 45, 4)
    assert f["loss"] == pytest.approx(nll.mean(), rel=1e-5)
    assert f["perplexity"] == pytest.approx(math.exp(nll.mean()), rel=1e-4)
    assert f["bits_per_byte"] == pytest.approx(nll.sum() / math.log(2) / 45, rel=1e-5)


def test_bytes_are_those_of_the_scored_text():
    p = pretrained(CharTokenizer("äbcdefghijk", has_eos=False))
    f = evaluate_texts(Scorer(p), ["ää", "bä"]).metrics()
    assert (f["tokens"], f["bytes"]) == (2, 4), "the first character of each is not scored"
    p = pretrained(ByteTokenizer(), vocab_size=257)
    f = evaluate_texts(Scorer(p), ["ää", "€"]).metrics()
    assert (f["tokens"], f["bytes"]) == (7, 7), "each begins after the EOS token"


def test_loss_by_position_is_the_mean_of_bins_that_double(tiny):
    ids = random_ids(200)
    scored, totals = score(tiny, ids, stride=16), LossTotals(16)
    totals.add(scored, 200)
    bins = totals.by_position()
    assert [(b["from"], b["to"]) for b in bins] == [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16)]
    for b in bins:
        own = scored.nll[(scored.context_sizes >= b["from"]) & (scored.context_sizes <= b["to"])].astype(np.float64)
        assert b["tokens"] == len(own)
        assert b["loss"] == pytest.approx(own.mean()) and b["error"] == pytest.approx(own.std(ddof=1) / len(own) ** 0.5)
    assert sum(b["tokens"] for b in bins) == 200
    alone = LossTotals(16)
    alone.add(score(tiny, ids[:1]), 1)
    assert [b["error"] for b in alone.by_position()] == [None]


def test_a_window_of_one_token_and_odd_sizes():
    for window, stride, count in [(1, 1, 5), (3, 2, 8), (10, 9, 27)]:
        requests = list(windows(np.arange(count + 1, dtype=np.int32), window, stride))
        targets = np.concatenate([p.ids[len(p.ids) - p.num_targets :] for p in requests])
        np.testing.assert_array_equal(targets, np.arange(1, count + 1))
        assert all(len(p.ids) <= window + 1 for p in requests)


def test_the_kernel_that_was_trained_with_need_not_be_here(tiny):
    elsewhere = dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, attention_kernel="cudnn"))
    np.testing.assert_array_equal(score(elsewhere, random_ids(9)).nll, score(tiny, random_ids(9)).nll)


def test_int8_costs_little_loss():
    """The same loss as the int8 engine that generates has, and near that of float32."""
    model = tiny_model(vocab_size=257, context_length=32, embed_dim=64, num_heads=4, layers="scan")
    made = Pretrained("tiny", model, init_params(model, jax.random.key(0)), ByteTokenizer())
    text = np.random.default_rng(0).integers(0, 256, 31).astype(np.int32)
    exact, small = (next(iter(Scorer(made, dtype=d).texts([text]))) for d in (None, "int8"))
    assert 0 < abs(small.loss - exact.loss) < 0.01
    np.testing.assert_allclose(small.nll, exact.nll, atol=0.1)
