"""How likely a model finds given tokens: long texts in windows that slide, and many short questions in few batches.

A text is scored from its first token on, given what a document begins after: `bos_id` where the tokenizer has
one, else `eos_id`; where it has neither, the first token is given and not scored. The windows are those of
transformers' guide to perplexity: each holds the context, moves on by `stride`, and scores the tokens that no window
before it has scored, so that every token but the first ones sees at least `window - stride` others.
"""

import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from gptjax import config
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import PromptError
from gptjax.inference.cache import bucket, rolls
from gptjax.inference.engine import set_up
from gptjax.inference.pretrained import Pretrained, check_is_generative
from gptjax.model import ops
from gptjax.model.chunks import map_in_chunks, num_chunks
from gptjax.model.gpt import GPT

AT_ONCE = 64  # batches whose parts are sorted by length before they are computed
LOGITS = 1 << 25  # that are held at once: 128 MiB in float32


class Part(NamedTuple):
    """A stretch of a text whose last tokens are asked for, each given all that stands before it in the stretch."""

    ids: np.ndarray  # int32 [n]
    asked: int  # at most n - 1


class TokenScores(NamedTuple):
    """What a model says to a `Part`."""

    nats: np.ndarray  # float32 [asked]: -ln of the probability of each token
    likeliest: np.ndarray  # bool [asked]: whether it is the token that the model would have chosen


@dataclass(frozen=True)
class DocumentScores:
    """A text under a model."""

    nats: np.ndarray  # float32 [tokens scored]: -ln of the probability of each
    seen: np.ndarray  # int32 [tokens scored]: how many tokens of its window stood before each

    @property
    def loss(self) -> float:
        """Nats a token; NaN for a text without a token that is scored."""
        return float(self.nats.mean(dtype=np.float64)) if len(self.nats) else math.nan


class Scorer:
    """A model set up to score. One program is compiled for each bucket of lengths and of numbers of questions."""

    def __init__(self, pretrained: Pretrained, batch_size: int = 8, dtype: str | None = None):
        """`batch_size` rows are computed at once, in `dtype` (as for `set_up`; the losses always in float32).

        Raises `PromptError` for a model whose tokens see what comes after them.
        """
        check_is_generative(pretrained)
        if not pretrained.model.causal:
            raise PromptError(
                f"{pretrained.name}: every token sees the whole text (model.causal = False), so that no token has a "
                "probability given those before it; give a causal model"
            )
        if batch_size < 1:
            raise PromptError(f"batch_size = {batch_size}: must be at least 1")
        self.model, self.params = set_up(pretrained, dtype)
        self.pretrained, self.tokenizer, self.batch_size = pretrained, pretrained.tokenizer, batch_size

    def texts(
        self, texts: Iterable[np.ndarray], stride: int | None = None, window: int | None = None
    ) -> Iterator[DocumentScores]:
        """Texts of any lengths, each by itself and in turn, read as they are needed: int32 ids [n] -> n nats.

        `window` is the number of tokens that are read at once (None: the context), `stride` by how many a window moves
        on (None: all, so that windows do not overlap). A token is scored once, in the first window that reaches it.
        Raises `PromptError` for a window or stride that the model cannot have.
        """
        window, stride = self.window(window, stride)
        first = first_token(self.tokenizer)
        group: list[list[Part]] = []
        for ids in texts:
            given = ids if first is None else np.concatenate([[first], ids])
            group.append(list(windows(given.astype(np.int32), window, stride)))
            if sum(map(len, group)) >= AT_ONCE * self.batch_size:
                yield from self._scored(group)
                group = []
        yield from self._scored(group)

    def _scored(self, group: Sequence[Sequence[Part]]) -> Iterator[DocumentScores]:
        """The texts whose windows these are."""
        answers = self.answer(itertools.chain(*group))
        for parts in group:
            nats = [answer.nats for answer in itertools.islice(answers, len(parts))]
            seen = [np.arange(len(p.ids) - p.asked, len(p.ids)) for p in parts]
            yield DocumentScores(_joined(nats, np.float32), _joined(seen, np.int32))

    def window(self, window: int | None, stride: int | None) -> tuple[int, int]:
        """The window and stride to use for those asked for."""
        context = self.model.context_length
        window = context if window is None else window
        if window < 1 or (window > context and not rolls(self.model)):
            raise PromptError(
                f"context = {window}: must be at least 1 and at most {context}, which is as far as the learned "
                f"positions of {self.pretrained.name} go"
                if not rolls(self.model)
                else f"context = {window}: must be at least 1"
            )
        stride = window if stride is None else stride
        if not 1 <= stride <= window:
            raise PromptError(f"stride = {stride}: must be at least 1 and at most the {window} tokens of a window")
        return window, stride

    def answer(self, parts: Iterable[Part]) -> Iterator[TokenScores]:
        """The answers to parts of at most `context + 1` tokens, in their order.

        Parts are taken up many at a time, sorted by length and padded to the longest of their batch; those that differ
        in their last token only (the choices of a question) are read once.
        """
        stream = iter(parts)
        while block := list(itertools.islice(stream, AT_ONCE * self.batch_size)):
            yield from self._answer_block(block)

    def _answer_block(self, parts: Sequence[Part]) -> list[TokenScores]:
        rows: dict[bytes, list[int]] = {}  # what is read -> the parts that ask something of it
        for number, part in enumerate(parts):
            rows.setdefault(part.ids[:-1].astype(np.int32).tobytes(), []).append(number)
        order = sorted(rows, key=len, reverse=True)
        answers: list[TokenScores | None] = [None] * len(parts)
        pending: list[tuple[list[int], tuple[Array, Array]]] = []
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            numbers = [number for row in chosen for number in rows[row]]
            row_of = [row for row, key in enumerate(chosen) for _ in rows[key]]
            pending.append((numbers, self._compute([parts[n] for n in numbers], row_of)))
            if len(pending) > 1:  # the device computes the next batch while the last one is fetched
                _hand_out(parts, *pending.pop(0), answers)
        for numbers, computed in pending:
            _hand_out(parts, numbers, computed, answers)
        return [answer for answer in answers if answer is not None]

    def _compute(self, parts: Sequence[Part], row_of: Sequence[int]) -> tuple[Array, Array]:
        """Starts the computation for the parts of one batch, each of which is asked of its row."""
        width = bucket(max(len(p.ids) - 1 for p in parts))
        if not rolls(self.model):
            width = min(width, self.model.context_length)
        tokens = np.zeros((self.batch_size, width), np.int32)
        count = sum(p.asked for p in parts)
        rows, places, targets = np.zeros((3, bucket(count)), np.int32)
        done = 0
        for part, row in zip(parts, row_of, strict=True):
            here, length = slice(done, done + part.asked), len(part.ids)
            tokens[row, : length - 1] = part.ids[:-1]
            rows[here], targets[here] = row, part.ids[length - part.asked :]
            places[here] = np.arange(length - 1 - part.asked, length - 1)
            done += part.asked
        return _nats(self.params, tokens, rows, places, targets, model=self.model)


def score(
    pretrained: Pretrained,
    ids: np.ndarray,
    stride: int | None = None,
    window: int | None = None,
    batch_size: int = 8,
    dtype: str | None = None,
) -> DocumentScores:
    """Nats of every token of a long text given what comes before it; see `Scorer.texts`."""
    return next(Scorer(pretrained, batch_size, dtype).texts([ids], stride, window))


def windows(ids: np.ndarray, window: int, stride: int) -> Iterator[Part]:
    """The windows of a text whose first token is given: every other token is asked for once.

    They are those of transformers' guide to perplexity with `max_length = window + 1` (its models read the last token
    of a window and do not use what they make of it).
    """
    start, done = 0, 0
    while done < len(ids) - 1:
        end = min(start + window, len(ids) - 1)
        yield Part(ids[start : end + 1], end - done)
        start, done = start + stride, end


def first_token(tokenizer: Tokenizer) -> int | None:
    """What the first token of a text is scored after: begin_of_text, else end_of_text, else nothing."""
    return tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id


class LossTotals:
    """Sums over many texts, and the figures that follow from them."""

    def __init__(self, window: int):
        self.documents, self.bytes = 0, 0
        self.count, self.nats, self.squares = np.zeros((3, window + 1))  # by how many tokens were seen

    def add(self, scored: DocumentScores, num_bytes: int) -> None:
        """A text of which the scored part has `num_bytes` bytes in UTF-8."""
        nats = scored.nats.astype(np.float64)
        self.documents, self.bytes = self.documents + 1, self.bytes + num_bytes
        for sums, weights in [(self.count, np.ones_like(nats)), (self.nats, nats), (self.squares, nats**2)]:
            sums += np.bincount(scored.seen, weights, len(sums))

    def figures(self) -> dict[str, Any]:
        """loss (nats a token), perplexity (e to the loss), bits_per_byte, and of how much text."""
        tokens, nats = int(self.count.sum()), float(self.nats.sum())
        loss = nats / tokens if tokens else math.nan
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": nats / math.log(2) / max(self.bytes, 1),
            "tokens": tokens,
            "bytes": self.bytes,
            "documents": self.documents,
        }

    def by_position(self) -> list[dict[str, Any]]:
        """Loss by the number of tokens seen, in bins that double: 1, 2, 3-4, 5-8, ... Empty bins are left out.

        `error` is the standard error of the mean, as if the tokens were independent; None for a single one.
        """
        bins, low = [], 1
        while low < len(self.count):
            high = min(1 << (low - 1).bit_length(), len(self.count) - 1)
            count, nats, squares = (float(x[low : high + 1].sum()) for x in (self.count, self.nats, self.squares))
            if count:
                variance = max(squares - nats**2 / count, 0.0) / max(count - 1, 1)
                error = math.sqrt(variance / count) if count > 1 else None
                bins.append({"from": low, "to": high, "tokens": int(count), "loss": nats / count, "error": error})
            low = high + 1
        return bins


def evaluate_texts(
    scorer: Scorer, documents: Iterable[str], stride: int | None = None, window: int | None = None
) -> LossTotals:
    """Scores documents, each by itself from its beginning; the end_of_text after it is not asked for.

    Bytes are those of the documents in UTF-8, less those of a first token that is not scored, so that bits a byte do
    not depend on the tokenizer.
    """
    totals = LossTotals(scorer.window(window, stride)[0])
    num_bytes: deque[int] = deque()  # of each text on its way

    def encoded() -> Iterator[np.ndarray]:
        for text in documents:
            ids = scorer.tokenizer.encode(text)
            left_out = scorer.tokenizer.decode_bytes(ids[: first_token(scorer.tokenizer) is None])
            num_bytes.append(len(text.encode()) - len(left_out))
            yield ids

    for scored in scorer.texts(encoded(), stride, window):
        totals.add(scored, num_bytes.popleft())
    return totals


@partial(jax.jit, static_argnames="model")
def _nats(
    params: Any, tokens: Array, rows: Array, places: Array, targets: Array, *, model: config.ModelConfig
) -> tuple[Array, Array]:
    """Reads tokens [B, L]; for each question [A] the nats of its target after the token at its row and place, and
    whether it is the likeliest. Logits are made for the questions only, and never more than `LOGITS` at once.
    """
    assert model.vocab_size
    x: Any = GPT(model).apply({"params": params}, tokens, method="hidden_states")
    x = x[rows, places]

    def of(chunk: tuple[Array, Array]) -> tuple[Array, Array]:
        x, targets = chunk
        logits: Any = GPT(model).apply({"params": params}, x[None], method="logits")
        return ops.cross_entropy(logits[0], targets)[0], logits[0].argmax(-1) == targets

    chunks = num_chunks(len(targets), model.vocab_size, LOGITS)
    nats, likeliest = map_in_chunks(of, (x, targets), chunks, axis=0)
    return nats, likeliest


def _hand_out(
    parts: Sequence[Part], numbers: Sequence[int], computed: tuple[Array, Array], answers: list[TokenScores | None]
) -> None:
    """Gives each part its share of what was computed."""
    nats, likeliest = (np.asarray(x) for x in computed)
    done = 0
    for number in numbers:
        here = slice(done, done + parts[number].asked)
        answers[number] = TokenScores(nats[here], likeliest[here])
        done = here.stop


def _joined(arrays: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *arrays]).astype(dtype)
