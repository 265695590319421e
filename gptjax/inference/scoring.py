"""How likely given tokens are under a model: long texts in sliding windows, and many short texts in few batches.

A text is scored from its first token on, conditioned on `bos_id` if the tokenizer has one, else `eos_id`; if it has
neither, the first token is given and not scored. The windows are those of transformers' guide to perplexity: each
covers the context, moves by `stride`, and scores the tokens that no window before it has scored, so that every token
except the first ones is conditioned on at least `window - stride` others.
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
from jaxtyping import Bool, Float, Int

from gptjax.config import ModelConfig
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import PromptError
from gptjax.inference.cache import bucket, is_unbounded, padded_length
from gptjax.inference.engine import prepare_for_inference
from gptjax.inference.pretrained import Pretrained, check_is_generative
from gptjax.model import ops
from gptjax.model.chunks import map_in_chunks, num_chunks
from gptjax.model.gpt import GPT, Params

BATCHES_PER_BLOCK = 64  # batches whose requests are sorted by length together
MAX_LOGITS = 1 << 25  # computed at once: 128 MiB in float32


class ScoreRequest(NamedTuple):
    """A sequence whose last tokens are scored, each conditioned on everything before it in the sequence."""

    ids: np.ndarray  # int32 [n]
    num_targets: int  # at most n - 1


class TokenScores(NamedTuple):
    """The scores of the targets of a `ScoreRequest`."""

    nll: np.ndarray  # float32 [num_targets]: negative log-likelihood of each token, in nats
    is_argmax: np.ndarray  # bool [num_targets]: whether greedy decoding would have chosen the token


@dataclass(frozen=True)
class DocumentScores:
    """The scores of a document."""

    nll: np.ndarray  # float32 [tokens scored]: negative log-likelihood of each, in nats
    context_sizes: np.ndarray  # int32 [tokens scored]: the number of tokens before each in its window

    @property
    def loss(self) -> float:
        """Nats per token; NaN if no token is scored."""
        return float(self.nll.mean(dtype=np.float64)) if len(self.nll) else math.nan


class Scorer:
    """A model prepared to score. A program is compiled for each bucket of lengths and of numbers of targets."""

    def __init__(self, pretrained: Pretrained, batch_size: int = 8, dtype: str | None = None):
        """Computes `batch_size` rows at once, in `dtype` (as for `prepare_for_inference`; losses always in float32).

        Raises `PromptError` for a model with bidirectional attention.
        """
        check_is_generative(pretrained)
        if not pretrained.model.causal:
            raise PromptError(
                f"{pretrained.name}: its attention is bidirectional (model.causal = False), so a token has no "
                "probability given the tokens before it; use a causal model"
            )
        if batch_size < 1:
            raise PromptError(f"batch_size = {batch_size}: must be at least 1")
        self.config, self.params = prepare_for_inference(pretrained, dtype)
        self.pretrained, self.tokenizer, self.batch_size = pretrained, pretrained.tokenizer, batch_size

    def texts(
        self, texts: Iterable[np.ndarray], stride: int | None = None, window: int | None = None
    ) -> Iterator[DocumentScores]:
        """Scores texts of any lengths, given as int32 ids [n], independently and in order; they are read lazily.

        `window`: the number of tokens read at once (None: the context). `stride`: by how many tokens a window moves
        (None: all, so that windows do not overlap). A token is scored once, in the first window that contains it.
        Raises `PromptError` for an invalid window or stride.
        """
        window, stride = self.resolve_window(window, stride)
        first = first_token(self.tokenizer)
        block: list[list[ScoreRequest]] = []
        for ids in texts:
            text = ids if first is None else np.concatenate([[first], ids])
            block.append(list(windows(text.astype(np.int32), window, stride)))
            if sum(map(len, block)) >= BATCHES_PER_BLOCK * self.batch_size:
                yield from self._score_documents(block)
                block = []
        yield from self._score_documents(block)

    def _score_documents(self, documents: Sequence[Sequence[ScoreRequest]]) -> Iterator[DocumentScores]:
        """The scores of documents that are given as their windows."""
        scores = self.score_batch(itertools.chain(*documents))
        for requests in documents:
            nll = [window.nll for window in itertools.islice(scores, len(requests))]
            sizes = [np.arange(len(r.ids) - r.num_targets, len(r.ids)) for r in requests]
            yield DocumentScores(_concatenate(nll, np.float32), _concatenate(sizes, np.int32))

    def resolve_window(self, window: int | None, stride: int | None) -> tuple[int, int]:
        """The window and stride, with defaults for None."""
        context = self.config.context_length
        if window is None:
            window = context
        if window < 1:
            raise PromptError(f"context = {window}: must be at least 1")
        if window > context and not is_unbounded(self.config):
            raise PromptError(
                f"context = {window}: must be at least 1 and at most {context}, the number of learned positions of "
                f"{self.pretrained.name}"
            )
        if stride is None:
            stride = window
        if not 1 <= stride <= window:
            raise PromptError(f"stride = {stride}: must be at least 1 and at most the {window} tokens of a window")
        return window, stride

    def score_batch(self, requests: Iterable[ScoreRequest]) -> Iterator[TokenScores]:
        """The scores of sequences of at most `context + 1` tokens, in their order.

        Requests are read lazily, many at a time, sorted by length and padded to the longest of their batch. Those that
        differ only in their last token (the choices of a question) share a row.
        """
        stream = iter(requests)
        while block := list(itertools.islice(stream, BATCHES_PER_BLOCK * self.batch_size)):
            yield from self._score_block(block)

    def _score_block(self, requests: Sequence[ScoreRequest]) -> list[TokenScores]:
        rows: dict[bytes, list[int]] = {}  # input tokens -> the requests that share them
        for index, request in enumerate(requests):
            rows.setdefault(request.ids[:-1].astype(np.int32).tobytes(), []).append(index)
        order = sorted(rows, key=len, reverse=True)
        scores: list[TokenScores | None] = [None] * len(requests)
        pending: list[tuple[list[int], tuple[Array, Array]]] = []
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            indices = [index for key in batch for index in rows[key]]
            row_of = [row for row, key in enumerate(batch) for _ in rows[key]]
            pending.append((indices, self._compute([requests[i] for i in indices], row_of)))
            if len(pending) > 1:  # the device computes the next batch while this one is fetched
                _distribute(requests, *pending.pop(0), scores)
        for indices, computed in pending:
            _distribute(requests, indices, computed, scores)
        return [s for s in scores if s is not None]

    def _compute(self, requests: Sequence[ScoreRequest], row_of: Sequence[int]) -> tuple[Array, Array]:
        """Starts the computation of one batch of requests, each with its row."""
        length = padded_length(self.config, max(len(r.ids) - 1 for r in requests))
        tokens = np.zeros((self.batch_size, length), np.int32)
        rows, positions, targets = np.zeros((3, bucket(sum(r.num_targets for r in requests))), np.int32)
        start = 0
        for request, row in zip(requests, row_of, strict=True):
            length = len(request.ids)
            here = slice(start, start + request.num_targets)
            tokens[row, : length - 1] = request.ids[:-1]
            rows[here] = row
            positions[here] = np.arange(length - 1 - request.num_targets, length - 1)
            targets[here] = request.ids[length - request.num_targets :]
            start = here.stop
        return _token_scores(self.params, tokens, rows, positions, targets, config=self.config)


def score(
    pretrained: Pretrained,
    ids: np.ndarray,
    stride: int | None = None,
    window: int | None = None,
    batch_size: int = 8,
    dtype: str | None = None,
) -> DocumentScores:
    """The scores of one long text; see `Scorer.texts`."""
    return next(Scorer(pretrained, batch_size, dtype).texts([ids], stride, window))


def windows(ids: np.ndarray, window: int, stride: int) -> Iterator[ScoreRequest]:
    """The windows of a text whose first token is given: every other token is the target of one of them.

    They are those of transformers' guide to perplexity with `max_length = window + 1` (its models also read the last
    token of a window, without using the output).
    """
    start, scored = 0, 0
    while scored < len(ids) - 1:
        end = min(start + window, len(ids) - 1)
        yield ScoreRequest(ids[start : end + 1], end - scored)
        start += stride
        scored = end


def first_token(tokenizer: Tokenizer) -> int | None:
    """The token that the first token of a text is conditioned on: BOS, else EOS, else none."""
    return tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id


class LossTotals:
    """Sums over many texts, and the metrics that follow from them."""

    def __init__(self, window: int):
        self.documents = 0
        self.bytes = 0
        self.count, self.nll, self.squares = np.zeros((3, window + 1))  # by context size

    def add(self, scores: DocumentScores, num_bytes: int) -> None:
        """Adds a text whose scored part has `num_bytes` bytes in UTF-8."""
        nll = scores.nll.astype(np.float64)
        self.documents += 1
        self.bytes += num_bytes
        for sums, values in [(self.count, np.ones_like(nll)), (self.nll, nll), (self.squares, nll**2)]:
            sums += np.bincount(scores.context_sizes, values, len(sums))

    def metrics(self) -> dict[str, Any]:
        """loss (nats/token), perplexity (e to the loss), bits_per_byte, and the size of the text."""
        tokens, nll = int(self.count.sum()), float(self.nll.sum())
        loss = nll / tokens if tokens else math.nan
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": nll / math.log(2) / max(self.bytes, 1),
            "tokens": tokens,
            "bytes": self.bytes,
            "documents": self.documents,
        }

    def by_position(self) -> list[dict[str, Any]]:
        """The loss by context size, in bins that double: 1, 2, 3-4, 5-8, ... Empty bins are left out.

        `error`: the standard error of the mean, as if the tokens were independent; None for a single token.
        """
        bins, low = [], 1
        while low < len(self.count):
            high = min(1 << (low - 1).bit_length(), len(self.count) - 1)
            count, nll, squares = (float(x[low : high + 1].sum()) for x in (self.count, self.nll, self.squares))
            if count:
                variance = max(squares - nll**2 / count, 0.0) / max(count - 1, 1)
                error = math.sqrt(variance / count) if count > 1 else None
                bins.append({"from": low, "to": high, "tokens": int(count), "loss": nll / count, "error": error})
            low = high + 1
        return bins


def evaluate_texts(
    scorer: Scorer, documents: Iterable[str], stride: int | None = None, window: int | None = None
) -> LossTotals:
    """Scores documents, each independently from its beginning; the EOS token after it is not scored.

    Bytes are those of the documents in UTF-8, without those of a first token that is not scored, so that bits_per_byte
    does not depend on the tokenizer.
    """
    totals = LossTotals(scorer.resolve_window(window, stride)[0])
    num_bytes: deque[int] = deque()  # of the texts that are not yet scored

    def encoded() -> Iterator[np.ndarray]:
        for text in documents:
            ids = scorer.tokenizer.encode(text)
            unscored = scorer.tokenizer.decode_bytes(ids[: first_token(scorer.tokenizer) is None])
            num_bytes.append(len(text.encode()) - len(unscored))
            yield ids

    for scores in scorer.texts(encoded(), stride, window):
        totals.add(scores, num_bytes.popleft())
    return totals


@partial(jax.jit, static_argnames="config")
def _token_scores(
    params: Params,
    tokens: Int[Array, "batch length"],
    rows: Int[Array, " targets"],
    positions: Int[Array, " targets"],
    targets: Int[Array, " targets"],
    *,
    config: ModelConfig,
) -> tuple[Float[Array, " targets"], Bool[Array, " targets"]]:
    """The negative log-likelihood of each target after the token at its row and position, and whether it is the argmax.

    Logits are computed for the targets only, and at most `MAX_LOGITS` at once.
    """
    assert config.vocab_size
    x: Any = GPT(config).apply({"params": params}, tokens, method="hidden_states")
    x = x[rows, positions]

    def score_chunk(chunk: tuple[Array, Array]) -> tuple[Array, Array]:
        x, targets = chunk
        logits: Any = GPT(config).apply({"params": params}, x[None], method="logits")
        return ops.cross_entropy(logits[0], targets)[0], logits[0].argmax(-1) == targets

    chunks = num_chunks(len(targets), config.vocab_size, MAX_LOGITS)
    nll, is_argmax = map_in_chunks(score_chunk, (x, targets), chunks, axis=0)
    return nll, is_argmax


def _distribute(
    requests: Sequence[ScoreRequest],
    indices: Sequence[int],
    computed: tuple[Array, Array],
    scores: list[TokenScores | None],
) -> None:
    """Splits the results of a batch by request."""
    nll, is_argmax = (np.asarray(x) for x in computed)
    start = 0
    for index in indices:
        here = slice(start, start + requests[index].num_targets)
        scores[index] = TokenScores(nll[here], is_argmax[here])
        start = here.stop


def _concatenate(arrays: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *arrays]).astype(dtype)
