"""Every tokenizer gives back exactly the text that it was given, or refuses it by name."""

import json
import random
from pydoc_data.topics import topics

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptjax.data import tokenizer
from gptjax.data.store import chunks
from gptjax.data.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, SentencePieceTokenizer
from gptjax.errors import DataError

CORPUS = "".join(f"the {i} quick brown foxes jumped, over 字 and élan!\n\n  indent\tTab {i % 7}\n" for i in range(300))


def small_bpe() -> BPETokenizer:
    """A byte-level BPE trained here, in the form of a tokenizer.json with a special token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"],
                                  show_progress=False)  # fmt: skip
    engine.train_from_iterator([CORPUS], trainer)
    return BPETokenizer(engine.to_str())


LOSSLESS = {
    "byte": ByteTokenizer(),
    "sentencepiece": SentencePieceTokenizer.train([CORPUS], 400),
    "bpe": small_bpe(),
}
every_lossless = pytest.mark.parametrize("tokens", LOSSLESS.values(), ids=LOSSLESS)


@every_lossless
@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
@example(text="")
@example(text="  leading, trailing \n\n\r\n\t ")
@example(text="中文，汉字 and 😀👩‍👩‍👧 emoji")
@example(text="▁ the space of SentencePiece ▁▁")
@example(text="<|endoftext|><unk><0x41>[INST]</s>")
@example(text="nul \0 bell \a and \x7f")
@example(text="e\u0301 is not \u00e9; \ufeff and \uffff \U0010ffff")
def test_round_trip_is_exact(tokens, text):
    ids = tokens.encode(text)
    assert ids.dtype == np.int32
    assert tokens.decode(ids) == text
    assert tokens.end_of_text not in ids, "text can never end a document"


@every_lossless
def test_streaming_never_splits_a_character(tokens):
    text = "中文 😀👩‍👩‍👧 ok ▁"
    parts = list(tokens.stream(tokens.encode(text)))
    assert "".join(parts) == text
    assert "\ufffd" not in "".join(parts)
    cut = list(tokens.stream(tokens.encode("😀")[:-1]))
    assert "".join(cut) in ("\ufffd", ""), "an unfinished character is shown as such at the end only"


@every_lossless
def test_saved_and_loaded_is_the_same(tokens, tmp_path):
    tokens.save(tmp_path)
    loaded = tokenizer.load(tmp_path)
    assert loaded.pieces == tokens.pieces and loaded.end_of_text == tokens.end_of_text
    np.testing.assert_array_equal(loaded.encode(CORPUS), tokens.encode(CORPUS))


@every_lossless
def test_half_a_surrogate_pair_is_refused(tokens):
    with pytest.raises(DataError, match="character 3 is half of a surrogate pair"):
        tokens.encode("abc\ud800")


@every_lossless
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(1, 200))
def test_cutting_a_long_text_changes_no_token(tokens, seed, size):
    rng = random.Random(seed)
    text = "".join(rng.choice(["word", " ", "\n", "\n\n", "  ", "x", "▁", ",", "字"]) for _ in range(300))
    parts = list(chunks(text, size))
    assert "".join(parts) == text
    np.testing.assert_array_equal(np.concatenate([tokens.encode(p) for p in parts]), tokens.encode(text))


def test_char_knows_its_characters_and_names_any_other(tmp_path):
    tokens = CharTokenizer("".join(sorted(set("hello 世界😀\n"))), has_end_of_text=False)
    text = "hell 世😀\no"
    assert tokens.decode(tokens.encode(text)) == text and tokens.end_of_text is None
    for other in ("é", "\U0010ffff", "\ud800"):
        with pytest.raises(DataError, match="at character 2 is none of the"):
            tokens.encode("he" + other)
    assert "refuses any other" in tokens.caveat
    tokens.save(tmp_path)
    np.testing.assert_array_equal(tokenizer.load(tmp_path).encode(text), tokens.encode(text))


def test_sentencepiece_learns_the_same_pieces_twice_and_compresses():
    text = "".join(topics[name] for name in sorted(topics)[:40])
    once, again = (SentencePieceTokenizer.train([text], 800) for _ in range(2))
    assert once.model == again.model
    assert len(once.encode(text)) < len(text) / 2
    with pytest.raises(DataError, match=r"data\.tokenizer_vocab_size = 10"):
        SentencePieceTokenizer.train([CORPUS], 10)


def test_special_tokens_are_text_in_a_text():
    tokens = LOSSLESS["bpe"]
    assert tokens.pieces[tokens.end_of_text] == b""
    assert tokens.decode([*tokens.encode("a"), tokens.end_of_text, *tokens.encode("b")]) == "ab"


def test_a_normalising_tokenizer_says_so():
    spec = json.loads(LOSSLESS["bpe"].tokenizer_json) | {"normalizer": {"type": "NFC"}}
    assert "normalises text (NFC)" in BPETokenizer(json.dumps(spec)).caveat


@pytest.mark.parametrize("content", ["", "{", "[]", '{"decoder": null}', '{"model": {"type": "WordPiece"}}'])
def test_what_is_no_byte_level_bpe_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match="tokenizer"):
        BPETokenizer.from_path(tmp_path)


def test_missing_and_damaged_tokenizers_are_refused(tmp_path):
    with pytest.raises(DataError, match="neither a tokenizer"):
        BPETokenizer.from_path(tmp_path / "nothing")
    with pytest.raises(DataError, match="holds no tokenizer"):
        tokenizer.load(tmp_path)
    ByteTokenizer().save(tmp_path)
    path = tmp_path / tokenizer.DESCRIPTION
    path.write_text(path.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(DataError, match="format 99"):
        tokenizer.load(tmp_path)


def test_gpt2_vocabulary_gives_gpt2s_ids(real_data):
    tokens = BPETokenizer.from_path(real_data / "gpt2_bpe")
    assert tokens.vocab_size == 50257 and tokens.end_of_text == 50256
    # ids as published in the examples of openai/gpt-2 and transformers
    assert tokens.encode("Hello world").tolist() == [15496, 995]
    assert tokens.encode("Once upon a time").tolist() == [7454, 2402, 257, 640]
    assert tokens.decode(tokens.encode("naïve 中文 😀 <|endoftext|>")) == "naïve 中文 😀 <|endoftext|>"


def test_what_a_foreign_tokenizer_loses_is_said():
    spec = json.loads(LOSSLESS["bpe"].tokenizer_json)
    prefixed = json.loads(json.dumps(spec))
    prefixed["pre_tokenizer"]["add_prefix_space"] = True
    assert "does not give texts back" in BPETokenizer(json.dumps(prefixed)).caveat
    partial = json.loads(json.dumps(spec))
    del partial["model"]["vocab"]["z"]
    partial["model"]["merges"] = []
    assert "has no piece for 1 of the 256 bytes" in BPETokenizer(json.dumps(partial)).caveat
    cut = json.loads(json.dumps(spec)) | {
        "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    }
    assert BPETokenizer(json.dumps(cut)).decode(BPETokenizer(json.dumps(cut)).encode(CORPUS)) == CORPUS


def test_vocabulary_and_merges_must_belong_together(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    with pytest.raises(DataError, match="the two files are not of one tokenizer"):
        BPETokenizer.from_path(tmp_path)


def test_a_document_longer_than_the_training_limit_is_cut_not_left_out():
    assert "".join(tokenizer._training_lines(["x\n" * 100], 50)) == "x" * 25
