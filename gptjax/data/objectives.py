"""What the model is asked to do with a window of text. Every objective makes a `Batch`, which is all that the
train step ever sees."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jax import Array

from gptjax.config import ObjectiveConfig
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import DataError


class Windows(NamedTuple):
    """Windows of a token stream: one token longer than the model's input, padded at the end."""

    ids: np.ndarray  # int32 [rows, length + 1]
    valid: np.ndarray  # bool [rows, length + 1]: false in the padding
    document_ids: np.ndarray | None  # int32 [rows, length + 1]: the document of each token, counted from 1
    loss_mask: np.ndarray | None = None  # bool [rows, length + 1]: tokens of answers; None: plain text
    classes: np.ndarray | None = None  # int16 [rows, length + 1]: class label at each token, -1: none; None: no labels


class Batch(NamedTuple):
    """What the train step reads: [rows, length] on the host, [microbatches, rows, length] on the devices."""

    tokens: np.ndarray | Array  # int32: the model's input
    targets: np.ndarray | Array  # int32: the token (or class) to predict at each position
    loss_weights: np.ndarray | Array  # float32: weight of each target in the loss; 0 in the padding
    segment_ids: np.ndarray | Array | None = None  # int32: tokens attend within their segment; None: the whole row
    positions: np.ndarray | Array | None = None  # int32: position within the segment; None: within the row
    prefix_mask: np.ndarray | Array | None = (
        None  # bool: visible to earlier tokens of the segment; None: no token is
    )
    advantages: np.ndarray | Array | None = None  # float32: of each sampled token (policy gradient); None: 1


Generators = Iterable[np.random.Generator]  # one a row, made only where they are used
MakeBatch = Callable[
    [Windows, Generators, Windows | None], Batch
]  # the last: other windows row for row; see `needs_negatives`


def make_objective(objective: ObjectiveConfig, tokenizer: Tokenizer) -> MakeBatch:
    """What makes windows into batches: a pure function of the windows and of the state of their generators."""
    match objective.name:
        case "causal":
            return causal
        case "sft" | "dpo" | "rloo" | "grpo":
            return supervised
        case "distill":
            return answers_or_all
        case "prefix_lm":
            return prefix
        case "fim":
            marks = extra_ids(objective, tokenizer)
            return partial(fill_in, rate=objective.fim_rate, marks=marks, end=tokenizer.eos_id)
        case "mlm":
            return partial(masked, objective=objective, vocabulary=vocabulary_of(objective, tokenizer))


def group_size(objective: ObjectiveConfig) -> tuple[int, int]:
    """How many rows of a batch belong together, and of how many examples they are made; (0, 0) where none do.

    dpo: the better answer and the worse one, two examples; rloo and grpo: copies of one, for an answer each.
    """
    if objective.name == "dpo":
        return 2, 2
    return (objective.num_generations, 1) if objective.name in ("rloo", "grpo") else (0, 0)


def needs_negatives(objective: ObjectiveConfig) -> bool:
    """Whether a batch is made from other random windows besides its own."""
    return objective.name == "mlm" and objective.next_sentence


def extra_tokens(objective: ObjectiveConfig) -> tuple[str, ...]:
    """What the ids stand for that the vocabulary needs after the tokenizer's last: they are read, never sampled."""
    if objective.name == "fim":
        return "prefix", "suffix", "middle"
    if objective.name == "mlm":
        return ("mask", "classify", "separate", "follows", "elsewhere") if objective.next_sentence else ("mask",)
    return ()


OWN_WORDS = {  # by which a tokenizer may have them already: BERT, RoBERTa, StarCoder, Qwen
    "mask": ("[MASK]", "<mask>"),
    "classify": ("[CLS]",),
    "separate": ("[SEP]",),
    "prefix": ("<fim_prefix>", "<|fim_prefix|>"),
    "suffix": ("<fim_suffix>", "<|fim_suffix|>"),
    "middle": ("<fim_middle>", "<|fim_middle|>"),
}


def extra_ids(objective: ObjectiveConfig, tokenizer: Tokenizer) -> list[int]:
    """The ids of `extra_tokens`: those that the tokenizer has for them already, else the ones after its last."""
    ids = []
    for after, name in enumerate(extra_tokens(objective)):
        own = [tokenizer.special_tokens[w] for w in OWN_WORDS.get(name, ()) if w in tokenizer.special_tokens]
        ids.append(own[0] if own else tokenizer.vocab_size + after)
    return ids


def causal(windows: Windows, rngs: Generators = (), others: Windows | None = None) -> Batch:
    """Predict the next token. With documents, the first token of one is never asked from the end of another."""
    ids, valid, documents, *_ = windows
    weights = valid[:, 1:] & valid[:, :-1]
    if documents is None:
        return Batch(ids[:, :-1], ids[:, 1:], weights.astype(np.float32))
    documents = np.where(valid, documents, 0)
    weights &= documents[:, 1:] == documents[:, :-1]
    segments = documents[:, :-1]
    return Batch(ids[:, :-1], ids[:, 1:], weights.astype(np.float32), segments, positions_within(segments))


def supervised(windows: Windows, rngs: Generators = (), others: Windows | None = None) -> Batch:
    """Predict the tokens of the answers, reading all the others; or the class at each token that has one.

    Raises `DataError` for text without answers.
    """
    if windows.loss_mask is None:
        raise DataError(
            "objective.name = 'sft': the text has no answers; use 'causal', or set data.prompt and data.answer"
        )
    batch = causal(windows)
    if windows.classes is not None:
        told = windows.classes[:, :-1].astype(np.int32)
        return batch._replace(targets=np.maximum(told, 0), loss_weights=(told >= 0).astype(np.float32))
    return batch._replace(loss_weights=batch.loss_weights * windows.loss_mask[:, 1:])


def answers_or_all(windows: Windows, rngs: Generators = (), others: Windows | None = None) -> Batch:
    """`supervised` where there are answers, else `causal`."""
    return causal(windows) if windows.loss_mask is None else supervised(windows)


def prefix(windows: Windows, rngs: Generators, others: Windows | None = None) -> Batch:
    """Read the beginning of each text in both directions and predict the rest (prefix LM, Raffel et al. 2020).

    A beginning ends before the first answer, and the answers are predicted; in text without answers it ends at a place
    drawn uniformly, with at least one token on either side. Texts are the documents, or the rows where those are not
    tracked.
    """
    read = np.zeros(windows.ids.shape, bool)
    for row, rng in zip(range(len(read)), rngs, strict=True):
        for first, last in _texts(windows, row):
            if windows.loss_mask is None:
                end = first + int(rng.integers(1, max(last - first, 2)))
            else:
                end = first + int(np.append(windows.loss_mask[row, first:last], True).argmax())
            read[row, first:end] = True
    batch = causal(windows) if windows.loss_mask is None else supervised(windows)
    return batch._replace(loss_weights=batch.loss_weights * ~read[:, 1:], prefix_mask=read[:, :-1])


def fill_in(
    windows: Windows,
    rngs: Generators,
    others: Windows | None = None,
    *,
    rate: float,
    marks: list[int],
    end: int | None,
) -> Batch:
    """Predict the next token, in texts of which a share of `rate` have their middle last (Bavarian et al. 2022, PSM).

    Such a text, a document or a row where those are not tracked, is cut at two uniform places and becomes
    <prefix> prefix <suffix> suffix <middle> middle <end>, with the ids `marks` and `end`. It stays as long as it was:
    its last tokens make room.
    """
    ids = windows.ids.copy()
    closing = [] if end is None else [end]  # also where the text goes on: it says that the middle has met the suffix
    for row, rng in zip(range(len(ids)), rngs, strict=True):
        for first, last in _texts(windows, row):
            kept = last - first - len(marks) - len(closing)
            if rng.random() < rate and kept > 0:
                text = ids[row, first : first + kept].tolist()
                a, b = sorted(rng.integers(0, kept + 1, 2))
                parts = zip(marks, (text[:a], text[b:], text[a:b]), strict=True)
                ids[row, first:last] = [*(i for mark, part in parts for i in (mark, *part)), *closing]
    return causal(windows._replace(ids=ids))


class Vocabulary(NamedTuple):
    """What `masked` knows of the ids: tables over all of them, `extra_ids` included."""

    text: np.ndarray  # bool [ids]: stands for some text, so that it may be asked for
    goes_on: np.ndarray  # bool [ids]: begins inside a word, if the token before it ends inside one
    open: np.ndarray  # bool [ids]: ends inside a word
    extra: list[int]  # the `extra_ids`


def vocabulary_of(objective: ObjectiveConfig, tokenizer: Tokenizer) -> Vocabulary:
    """Letters, digits and the bytes of broken UTF-8 are inside words; in WordPiece, its "##endings" are."""
    extra = extra_ids(objective, tokenizer)
    pieces = tokenizer.id_to_bytes + [b""] * len(extra)
    texts = [piece.decode(errors="surrogateescape") for piece in pieces]
    in_word = np.array([[_in_word(text[:1]), _in_word(text[-1:])] for text in texts])
    goes_on, open_ = in_word.T
    if tokenizer.kind == "wordpiece":  # which puts a space before every piece that is no ending
        goes_on, open_ = np.array([piece[:1] not in (b"", b" ") for piece in pieces]), np.ones_like(open_)
    return Vocabulary(np.array([len(piece) > 0 for piece in pieces]), goes_on, open_, extra)


def _in_word(character: str) -> bool:
    return character.isalnum() or "\udc80" <= character <= "\udcff"  # the latter: a byte of broken UTF-8


def masked(
    windows: Windows,
    rngs: Generators,
    others: Windows | None = None,
    *,
    objective: ObjectiveConfig,
    vocabulary: Vocabulary,
) -> Batch:
    """Tell which tokens were hidden, from those on both sides (BERT, Devlin et al. 2018): targets stand in place.

    In each row `mask_rate` of the tokens that stand for text are asked for, rounded up or down at random but never to
    none; or whole words, until there are at least as many. Of them 80% are replaced by <mask>, 10% by a random token,
    and 10% stay. With `next_sentence` the rows are those of `_pairs`, and <follows> or <elsewhere> is asked for at
    <classify>.
    """
    v, rngs, follows = vocabulary, list(rngs), None
    if objective.next_sentence:
        assert others is not None, "next_sentence needs other windows to take second halves from"
        windows, follows = _pairs(windows, others, rngs, v.extra)
    targets, valid = windows.ids[:, :-1], windows.valid[:, :-1]
    segments = np.where(valid, 1 if windows.document_ids is None else windows.document_ids[:, :-1], 0).astype(np.int32)
    begins = np.ones(targets.shape, bool)
    if objective.whole_words:
        inside = v.open[targets[:, :-1]] & v.goes_on[targets[:, 1:]]
        begins[:, 1:] = ~inside | (segments[:, 1:] != segments[:, :-1])
    words = begins.cumsum(1)
    tokens, weights, ordinary = targets.copy(), np.zeros(targets.shape, np.float32), np.flatnonzero(v.text)
    for row, rng in zip(range(len(tokens)), rngs, strict=True):
        places = np.flatnonzero(valid[row] & v.text[targets[row]])
        budget = max(1, int(objective.mask_rate * len(places) + rng.random()))
        chosen = places[_choose(words[row, places], budget, rng)]
        fate = rng.random(len(chosen))
        tokens[row, chosen[fate < 0.8]] = v.extra[0]
        swapped = chosen[fate >= 0.9]
        tokens[row, swapped] = rng.choice(ordinary, len(swapped))
        weights[row, chosen] = 1
    if follows is not None:
        _, _, _, yes, no = v.extra
        targets[:, 0], weights[:, 0] = np.where(follows, yes, no), valid[:, 0]
    # Padding lies in a segment of its own: nothing else would hide it from a model that looks ahead.
    return Batch(tokens, targets, weights, segments, positions_within(segments))


def _choose(words: np.ndarray, budget: int, rng: np.random.Generator) -> np.ndarray:
    """Which tokens belong to words drawn until there are `budget` tokens: bool, as the word numbers [tokens]."""
    _, number, sizes = np.unique(words, return_inverse=True, return_counts=True)
    order = rng.permutation(len(sizes))
    drawn = np.zeros(len(sizes), bool)
    drawn[order] = sizes[order].cumsum() - sizes[order] < budget
    return drawn[number]


def _pairs(windows: Windows, others: Windows, rngs: Generators, extra: list[int]) -> tuple[Windows, np.ndarray]:
    """<classify> A <separate> B: A is the first half of a window, B its second or, as often, that of the other one.

    Returns the rows and, bool [rows], whether B follows A. Both kinds are equally long, so that lengths tell nothing;
    where no two halves are left, the row is padding. Documents are not kept apart.
    """
    _, classify, separate, *_ = extra
    ids, valid = np.zeros_like(windows.ids), np.zeros_like(windows.valid)
    follows = np.zeros(len(ids), bool)
    for row, rng in zip(range(len(ids)), rngs, strict=True):
        follows[row] = rng.random() < 0.5
        size = min(ids.shape[1] - 3, windows.valid[row].sum(), others.valid[row].sum())
        half = size // 2
        if half > 0:
            second = (windows if follows[row] else others).ids[row, half:size]
            ids[row, : size + 2] = [classify, *windows.ids[row, :half], separate, *second]
            valid[row, : size + 2] = True
    return Windows(ids, valid, None), follows


def _texts(windows: Windows, row: int) -> Iterator[tuple[int, int]]:
    """Where the documents of a row begin and end; without documents, where the row does. Padding is left out."""
    size = int(windows.valid[row].sum())
    changes = [] if windows.document_ids is None else np.flatnonzero(np.diff(windows.document_ids[row, :size])).tolist()
    return pairwise(sorted({0, *(i + 1 for i in changes), size}))


def positions_within(segments: np.ndarray) -> np.ndarray:
    """For each token, how many tokens of its segment stand before it in the row: int32 [rows, length]."""
    places = np.arange(segments.shape[1], dtype=np.int32)
    begins = np.ones(segments.shape, bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return places - np.maximum.accumulate(np.where(begins, places, 0), axis=1, dtype=np.int32)
