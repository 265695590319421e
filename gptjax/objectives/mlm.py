"""Masked language modelling (BERT, Devlin et al. 2018): predict hidden tokens from both sides."""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np

from gptjax.config import ObjectiveConfig
from gptjax.data.batches import Batch, Generators, MakeBatch, positions_within
from gptjax.data.tokenizer import Tokenizer
from gptjax.data.windows import Windows
from gptjax.objectives.base import Objective, extra_ids, room_problems


class MLM(Objective):
    """Predicts a fraction `mask_rate` of the tokens, and with `next_sentence` whether two halves belong together."""

    fields = ("mask_rate", "whole_words", "next_sentence", "z_loss")
    bidirectional = True
    masks_plain_text = True

    def extra_tokens(self) -> tuple[str, ...]:
        if self.config.next_sentence:
            return "mask", "classify", "separate", "follows", "elsewhere"
        return ("mask",)

    def needs_negatives(self) -> bool:
        return self.config.next_sentence

    def batch_maker(self, tokenizer: Tokenizer) -> MakeBatch:
        vocabulary = mask_vocabulary(tokenizer, self.extra_tokens())
        return partial(mlm_batch, objective=self.config, vocabulary=vocabulary)

    def problems(self) -> Iterator[str]:
        e = self.experiment
        if e.model.causal:
            yield (
                "model.causal = True: objective.name = 'mlm' predicts a token from those after it as well; set "
                "model.causal = False"
            )
        if not self.config.next_sentence:
            return
        yield from room_problems(e)
        if e.data.document_mask or e.with_answers:
            yield (
                "objective.next_sentence = True: reads two pieces of text as one, so documents and examples are not "
                "separated; set data.document_mask = False and use plain text"
            )


class MaskVocabulary(NamedTuple):
    """What `mlm_batch` needs to know of each id, `extra_ids` included."""

    is_text: np.ndarray  # bool [ids]: stands for text, so it may be masked
    continues_word: np.ndarray  # bool [ids]: begins inside a word if the token before it ends inside one
    ends_in_word: np.ndarray  # bool [ids]: ends inside a word
    extra: list[int]  # ids of the extra tokens


def mask_vocabulary(tokenizer: Tokenizer, extra_tokens: tuple[str, ...]) -> MaskVocabulary:
    """Letters, digits and the bytes of broken UTF-8 are inside words; in WordPiece the "##" pieces are."""
    extra = extra_ids(extra_tokens, tokenizer)
    pieces = tokenizer.id_to_bytes + [b""] * len(extra)
    texts = [piece.decode(errors="surrogateescape") for piece in pieces]
    is_text = np.array([len(piece) > 0 for piece in pieces])
    if tokenizer.kind == "wordpiece":  # a piece that begins a word has a space before it
        continues = np.array([piece[:1] not in (b"", b" ") for piece in pieces])
        return MaskVocabulary(is_text, continues, np.ones_like(continues), extra)
    continues = np.array([_in_word(text[:1]) for text in texts])
    ends = np.array([_in_word(text[-1:]) for text in texts])
    return MaskVocabulary(is_text, continues, ends, extra)


def _in_word(character: str) -> bool:
    return character.isalnum() or "\udc80" <= character <= "\udcff"  # the latter: a byte of broken UTF-8


def mlm_batch(
    windows: Windows,
    rngs: Generators,
    negatives: Windows | None = None,
    *,
    objective: ObjectiveConfig,
    vocabulary: MaskVocabulary,
) -> Batch:
    """Targets are the tokens themselves, not the next ones; the loss counts the masked positions only.

    In each row `mask_rate` of the text tokens are masked, rounded up or down at random, but at least one; with
    `whole_words` whole words until there are at least as many. 80% of them become <mask>, 10% a random token, and 10%
    stay. With `next_sentence` the rows are those of `_sentence_pairs`, and the target at <classify> is <follows> or
    <elsewhere>.
    """
    v, rngs, follows = vocabulary, list(rngs), None
    if objective.next_sentence:
        assert negatives is not None, "next_sentence takes second halves from other windows"
        windows, follows = _sentence_pairs(windows, negatives, rngs, v.extra)
    targets, valid = windows.ids[:, :-1], windows.valid[:, :-1]
    segments = np.where(valid, 1 if windows.document_ids is None else windows.document_ids[:, :-1], 0).astype(np.int32)
    words = _word_numbers(targets, segments, v if objective.whole_words else None)
    tokens, weights, ordinary = targets.copy(), np.zeros(targets.shape, np.float32), np.flatnonzero(v.is_text)
    for row, rng in zip(range(len(tokens)), rngs, strict=True):
        candidates = np.flatnonzero(valid[row] & v.is_text[targets[row]])
        budget = max(1, int(objective.mask_rate * len(candidates) + rng.random()))
        chosen = candidates[_choose(words[row, candidates], budget, rng)]
        fate = rng.random(len(chosen))
        tokens[row, chosen[fate < 0.8]] = v.extra[0]
        swapped = chosen[fate >= 0.9]
        tokens[row, swapped] = rng.choice(ordinary, len(swapped))
        weights[row, chosen] = 1
    if follows is not None:
        _, _, _, yes, no = v.extra
        targets[:, 0], weights[:, 0] = np.where(follows, yes, no), valid[:, 0]
    # The padding has a segment of its own. Otherwise a bidirectional model would attend to it.
    return Batch(tokens, targets, weights, segments, positions_within(segments))


def _word_numbers(ids: np.ndarray, segments: np.ndarray, vocabulary: MaskVocabulary | None) -> np.ndarray:
    """The number of the word that each token belongs to, int64 [rows, length]; without a vocabulary one per token."""
    begins = np.ones(ids.shape, bool)
    if vocabulary is not None:
        inside = vocabulary.ends_in_word[ids[:, :-1]] & vocabulary.continues_word[ids[:, 1:]]
        begins[:, 1:] = ~inside | (segments[:, 1:] != segments[:, :-1])
    return begins.cumsum(1)


def _choose(words: np.ndarray, budget: int, rng: np.random.Generator) -> np.ndarray:
    """Random words with at least `budget` tokens together: bool, of the same shape as the word numbers [tokens]."""
    _, number, sizes = np.unique(words, return_inverse=True, return_counts=True)
    order = rng.permutation(len(sizes))
    chosen = np.zeros(len(sizes), bool)
    chosen[order] = sizes[order].cumsum() - sizes[order] < budget
    return chosen[number]


def _sentence_pairs(
    windows: Windows, negatives: Windows, rngs: list[np.random.Generator], extra: list[int]
) -> tuple[Windows, np.ndarray]:
    """<classify> A <separate> B: A is the first half of a window, B its second half or that of a negative window.

    Returns the rows and, bool [rows], whether B follows A, with probability 1/2. Both kinds have the same length, so
    the length gives nothing away. A row without room for two halves is padding. Documents are not separated.
    """
    _, classify, separate, *_ = extra
    ids, valid = np.zeros_like(windows.ids), np.zeros_like(windows.valid)
    follows = np.zeros(len(ids), bool)
    for row, rng in zip(range(len(ids)), rngs, strict=True):
        follows[row] = rng.random() < 0.5
        size = min(ids.shape[1] - 3, windows.valid[row].sum(), negatives.valid[row].sum())
        half = size // 2
        if half > 0:
            second = (windows if follows[row] else negatives).ids[row, half:size]
            ids[row, : size + 2] = [classify, *windows.ids[row, :half], separate, *second]
            valid[row, : size + 2] = True
    return Windows(ids, valid, None), follows
