"""Every objective predicts exactly the targets that it should, from the inputs that it should."""

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.config import Experiment
from gptjax.data.tokenizer import ByteTokenizer, CharTokenizer, WordPieceTokenizer
from gptjax.data.windows import Windows
from gptjax.errors import DataError
from gptjax.objectives import Objective, make_objective
from gptjax.objectives.base import extra_ids
from gptjax.objectives.causal import causal_batch
from gptjax.objectives.mlm import mask_vocabulary
from gptjax.objectives.prefix_lm import prefix_batch
from gptjax.objectives.sft import answer_batch

BYTES, END = ByteTokenizer(), 256
TEXT = "The 2 quick brown foxes (all of them) jump over the lazy dog; naïve cats don't. "


def rngs(rows, seed=0):
    return (np.random.default_rng((seed, row)) for row in range(rows))


def objective_of(**fields) -> Objective:
    return make_objective(Experiment().override(objective=fields))


def text_windows(rows, length, seed=0) -> Windows:
    """Rows of real words from different positions of a text, without padding."""
    ids = BYTES.encode(TEXT * (length // len(TEXT) + 3))
    starts = np.random.default_rng(seed).integers(0, 2 * len(TEXT), rows)
    ids = np.stack([ids[start : start + length + 1] for start in starts])
    return Windows(ids, np.ones(ids.shape, bool), None)


@st.composite
def packed(draw, answers=False):
    """Padded rows of documents of any lengths; with `answers` a random part of each is an answer."""
    size = draw(st.integers(2, 30))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        lengths = draw(st.lists(st.integers(1, 14), max_size=6))
        documents = np.repeat(np.arange(1, len(lengths) + 1), lengths)[:size]
        rows.append(np.pad(documents, (0, size - len(documents))))
    documents = np.array(rows, np.int32)
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    valid = documents > 0
    ids = np.where(valid, rng.integers(0, 256, documents.shape), 0).astype(np.int32)
    tracked = documents if answers or draw(st.booleans()) else None
    return Windows(ids, valid, tracked, valid & (rng.random(valid.shape) < 0.4) if answers else None)


def texts(windows):
    """(row, first, last) of every document, or of every row, one token at a time."""
    for row, valid in enumerate(windows.valid):
        size = int(valid.sum())
        number = np.ones(size) if windows.document_ids is None else windows.document_ids[row, :size]
        cuts = [0, *(i for i in range(1, size) if number[i] != number[i - 1]), size]
        yield from ((row, first, last) for first, last in pairwise(cuts) if last > first)


@given(packed(answers=True))
def test_the_targets_of_supervised_are_the_answers(windows):
    batch = answer_batch(windows)
    expected = np.zeros(windows.ids.shape)
    for row, first, last in texts(windows):
        expected[row, first + 1 : last] = windows.loss_mask[row, first + 1 : last]  # nothing precedes the first token
    np.testing.assert_array_equal(batch.loss_weights, expected[:, 1:])
    np.testing.assert_array_equal(batch.targets, windows.ids[:, 1:])


def test_supervised_refuses_text_without_answers():
    with pytest.raises(DataError, match=r"no answers.*data\.answer"):
        answer_batch(text_windows(1, 4))


@given(packed())
def test_a_prefix_ends_inside_every_text_and_all_after_it_is_a_target(windows):
    batch = prefix_batch(windows, rngs(len(windows.ids)))
    is_target = np.zeros(windows.ids.shape)
    for row, first, last in texts(windows):
        read = batch.prefix_mask[row, first:last]
        count = int(read.sum())
        assert read[:count].all() and count >= min(1, len(read)), "the prefix is the beginning"
        assert last - first == 1 or count < last - first, "and leaves something to ask for"
        is_target[row, first + count : last] = last - first > 1
    np.testing.assert_array_equal(batch.loss_weights, is_target[:, 1:])
    assert not np.any(batch.prefix_mask & ~windows.valid[:, :-1]), "padding is no prefix"
    plain = causal_batch(windows)
    for field in ("tokens", "targets", "segment_ids", "positions"):
        np.testing.assert_array_equal(getattr(batch, field), getattr(plain, field))


def test_prefixes_of_plain_text_end_uniformly():
    ends = prefix_batch(text_windows(4000, 8), rngs(4000)).prefix_mask.sum(1)
    counts = np.bincount(ends, minlength=9)
    assert counts[0] == 0
    assert ((counts[1:] - 500) ** 2 / 500).sum() < 29.9  # chi-square, 7 degrees of freedom, p = 1e-4


@given(packed(answers=True))
def test_the_prefix_of_an_example_ends_where_its_first_answer_begins(windows):
    batch = prefix_batch(windows, rngs(len(windows.ids)))
    for row, first, last in texts(windows):
        answers = np.flatnonzero(windows.loss_mask[row, first:last])
        end = first + answers[0] if len(answers) else last
        expected = np.arange(first, last) < end
        np.testing.assert_array_equal(
            batch.prefix_mask[row, first:last], expected[: len(batch.prefix_mask[row]) - first]
        )
    np.testing.assert_array_equal(batch.loss_weights, answer_batch(windows).loss_weights)


def masked_batch(windows, seed=0, tokenizer=BYTES, others=None, **fields):
    objective = objective_of(name="mlm", **fields)
    return objective.batch_maker(tokenizer)(windows, rngs(len(windows.ids), seed), others)


@settings(deadline=None)
@given(packed(), st.sampled_from([0.02, 0.15, 0.5]), st.booleans(), st.integers(0, 100))
def test_masked_changes_and_predicts_only_the_chosen_tokens(windows, rate, whole_words, seed):
    batch = masked_batch(windows, seed, mask_rate=rate, whole_words=whole_words)
    valid = windows.valid[:, :-1]
    np.testing.assert_array_equal(batch.targets, windows.ids[:, :-1])
    assert np.all((batch.tokens == batch.targets) | (batch.loss_weights == 1)), "other inputs are unchanged"
    assert not np.any(batch.loss_weights[~valid])
    np.testing.assert_array_equal(batch.loss_weights.any(1), valid.any(1)), "each row has a target"
    if not whole_words:
        expected = rate * valid.sum(1)
        assert np.all(np.abs(batch.loss_weights.sum(1) - expected) < np.maximum(1, 1 - expected + 1e-6))
    documents = valid if windows.document_ids is None else windows.document_ids[:, :-1]
    np.testing.assert_array_equal(batch.segment_ids, np.where(valid, documents, 0))
    again = masked_batch(windows, seed, mask_rate=rate, whole_words=whole_words)
    np.testing.assert_array_equal(batch.tokens, again.tokens)


def test_masked_keeps_berts_rates():
    windows = text_windows(2000, 50)
    batch = masked_batch(windows)
    is_target = batch.loss_weights == 1
    rate = is_target.mean()
    assert abs(rate - 0.15) < 4 * np.sqrt(0.15 * 0.85 / is_target.size)
    assert np.all(np.abs(is_target.mean(0) - 0.15) < 5 * np.sqrt(0.15 * 0.85 / 2000)), "every position alike"
    hidden, same = batch.tokens == 257, batch.tokens == batch.targets
    counts = np.array([(is_target & hidden).sum(), (is_target & ~hidden & ~same).sum(), (is_target & same).sum()])
    lucky = 1 / 256  # the random token is the original one
    expected = is_target.sum() * np.array([0.8, 0.1 * (1 - lucky), 0.1 + 0.1 * lucky])
    assert ((counts - expected) ** 2 / expected).sum() < 18.4  # chi-square, 2 degrees of freedom, p = 1e-4
    replaced = np.bincount(batch.tokens[is_target & ~hidden & ~same], minlength=258)
    assert replaced[256] == replaced[257] == 0, "only tokens that stand for text"
    assert (replaced[:256] > 0).mean() > 0.9
    assert not np.array_equal(batch.tokens, masked_batch(windows, seed=1).tokens)


def test_the_end_of_text_token_is_never_a_target():
    windows = text_windows(50, 20)
    windows.ids[:, ::3] = END
    batch = masked_batch(windows, mask_rate=0.9)
    assert not np.any(batch.loss_weights[windows.ids[:, :-1] == END])


def test_whole_words_are_never_split():
    windows = text_windows(300, 120)
    batch = masked_batch(windows, whole_words=True)
    for row, is_target in zip(windows.ids, batch.loss_weights, strict=True):
        inside = [byte >= 128 or chr(byte).isalnum() for byte in row.tolist()]
        for i in range(1, len(is_target)):
            if inside[i] and inside[i - 1]:
                assert is_target[i] == is_target[i - 1], f"{bytes(row.astype(np.uint8))!r} is split at {i}"
    assert 0.15 < batch.loss_weights.mean() < 0.2, "the last word may go beyond the share"


def test_words_end_where_documents_do():
    ids = np.full((200, 9), ord("a"), np.int32)
    documents = np.array([[1] * 4 + [2] * 5] * 200, np.int32)
    is_target = masked_batch(Windows(ids, documents > 0, documents), whole_words=True).loss_weights
    assert {tuple(row) for row in is_target.tolist()} == {(1, 1, 1, 1, 0, 0, 0, 0), (0, 0, 0, 0, 1, 1, 1, 1)}


WORDPIECE = json.dumps(
    {
        "version": "1.0",
        "added_tokens": [
            dict(id=i, content=word, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
            for i, word in enumerate(["[UNK]", "[CLS]", "[SEP]", "[MASK]"])
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": None,
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": False},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {
                w: i for i, w in enumerate(["[UNK]", "[CLS]", "[SEP]", "[MASK]", "play", "##ing", "##s", "a", "dog"])
            },
        },
    }
)


def test_words_of_wordpiece_continue_with_its_endings_only():
    tokenizer = WordPieceTokenizer(WORDPIECE)
    objective = objective_of(name="mlm", whole_words=True, next_sentence=True)
    v = mask_vocabulary(tokenizer, objective.extra_tokens())
    assert np.flatnonzero(v.continues_word).tolist() == [5, 6]
    assert np.flatnonzero(v.is_text).tolist() == [4, 5, 6, 7, 8]
    assert v.extra == [3, 1, 2, 9 + 3, 9 + 4], "its own [MASK], [CLS] and [SEP], and new ids for the answers"
    ids = np.tile(tokenizer.encode("a dog plays playing dogs"), (100, 1))  # a dog play ##s play ##ing dog ##s
    windows = Windows(np.pad(ids, ((0, 0), (0, 1))), np.pad(ids > 0, ((0, 0), (0, 1))), None)
    is_target = masked_batch(windows, tokenizer=tokenizer, whole_words=True, mask_rate=0.3).loss_weights
    assert np.array_equal(is_target[:, 2::2], is_target[:, 3::2])
    assert np.any(is_target[:, 0] != is_target[:, 1]), "words are chosen independently"


def test_half_of_the_second_sentences_are_negatives():
    rows, length = 2000, 20
    here = np.tile(np.arange(length + 1, dtype=np.int32), (rows, 1))
    windows, others = (Windows(ids, np.ones(ids.shape, bool), None) for ids in (here, here + 100))
    objective = objective_of(name="mlm", next_sentence=True, mask_rate=0.2)
    assert objective.needs_negatives() and not objective_of(name="mlm").needs_negatives()
    _, classify, separate, follows, elsewhere = extra_ids(objective.extra_tokens(), BYTES)
    batch = objective.batch_maker(BYTES)(windows, rngs(rows), others)
    assert np.all(batch.tokens[:, 0] == classify) and np.all(batch.tokens[:, 10] == separate), "never masked"
    assert np.all(batch.loss_weights[:, 0] == 1) and not np.any(batch.loss_weights[:, 10])
    np.testing.assert_array_equal(batch.targets[:, 1:10], here[:, :9])
    second = {follows: here[0, 9:18], elsewhere: here[0, 9:18] + 100}
    np.testing.assert_array_equal(batch.targets[:, 11:], [second[answer] for answer in batch.targets[:, 0]])
    assert abs((batch.targets[:, 0] == follows).mean() - 0.5) < 4 * 0.5 / np.sqrt(rows)
    assert batch.loss_weights[:, 1:].sum(1).mean() == pytest.approx(0.2 * 18, abs=0.05)
    assert np.all(batch.segment_ids == 1), "both halves see each other"


@given(packed(), packed(), st.integers(0, 100))
@settings(deadline=None)
def test_the_length_of_a_pair_does_not_depend_on_its_label(windows, others, seed):
    size, rows = min(x.ids.shape[1] for x in (windows, others)), min(len(x.ids) for x in (windows, others))
    windows, others = (Windows(x.ids[:rows, :size], x.valid[:rows, :size], None) for x in (windows, others))
    batch = masked_batch(windows, seed, others=others, next_sentence=True)
    for row in range(rows):
        left = min(size - 3, windows.valid[row].sum(), others.valid[row].sum())
        assert batch.segment_ids[row].sum() == (left + 2 if left >= 2 else 0)
        assert batch.loss_weights[row].any() == (left >= 2), "a row without two halves has no target"


@settings(deadline=None)
@given(packed(), st.booleans(), st.integers(0, 1000))
def test_a_rearranged_text_can_be_restored(windows, has_end, seed):
    tokenizer = BYTES if has_end else CharTokenizer("".join(map(chr, range(256))), has_eos=False)
    objective = objective_of(name="fim", fim_rate=1.0)
    marks = extra_ids(objective.extra_tokens(), tokenizer)
    assert marks == [tokenizer.vocab_size + i for i in range(3)]
    batch = objective.batch_maker(tokenizer)(windows, rngs(len(windows.ids), seed), None)
    plain = causal_batch(windows)
    for field in ("loss_weights", "segment_ids", "positions"):
        np.testing.assert_array_equal(getattr(batch, field), getattr(plain, field))
    ids = np.concatenate([batch.tokens, batch.targets[:, -1:]], 1)
    for row, first, last in texts(windows):
        found, original = ids[row, first:last].tolist(), windows.ids[row, first:last].tolist()
        if last - first <= 3 + has_end:
            assert found == original, "too short to be rearranged"
            continue
        at = [found.index(mark) for mark in marks]
        assert at[0] == 0 and at == sorted(at)
        assert not has_end or found.pop() == END
        beginning, rest, middle = found[1 : at[1]], found[at[1] + 1 : at[2]], found[at[2] + 1 :]
        assert beginning + middle + rest == original[: len(original) - 3 - has_end]


def test_fim_rearranges_its_share_and_cuts_uniformly():
    objective = objective_of(name="fim", fim_rate=0.3)
    tokens = objective.batch_maker(BYTES)(text_windows(3000, 12), rngs(3000), None).tokens
    changed = tokens[:, 0] == 257
    assert abs(changed.mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 3000)
    assert np.array_equal(changed, (tokens == 258).any(1)), "a text is rearranged or left as it is"
    lengths = (tokens[changed] == 258).argmax(1) - 1  # of the prefix: the smaller of two uniform cuts in 0 to 9
    expected = np.array([2 * (9 - i) + 1 for i in range(10)]) / 100 * changed.sum()
    assert ((np.bincount(lengths, minlength=10) - expected) ** 2 / expected).sum() < 33.7  # 9 degrees, p = 1e-4


def test_every_objective_names_the_ids_it_needs():
    assert objective_of().extra_tokens() == objective_of(name="prefix_lm").extra_tokens() == ()
    assert objective_of(name="mlm").extra_tokens() == ("mask",)
    for name in ("causal", "sft"):
        make = objective_of(name=name).batch_maker(BYTES)
        windows = text_windows(2, 6)._replace(loss_mask=np.ones((2, 7), bool))
        unused = (pytest.fail("a generator was made for nothing") for _ in range(2))
        np.testing.assert_array_equal(make(windows, unused, None).targets, windows.ids[:, 1:])
