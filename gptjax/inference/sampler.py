"""Continues texts: the prompt is read in one call, then one compiled step makes a token for every text at once."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gptjax import config
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import PromptError
from gptjax.inference.cache import empty_cache
from gptjax.model.attention import KVCache
from gptjax.model.gpt import GPT

BUCKET = 64  # prompts and caches are made this much longer at a time, so that few lengths are ever compiled


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Rules apply in this order: temperature, top-k, top-p."""

    temperature: float = 1.0  # divides the logits; 0 takes the likeliest token
    top_k: int | None = None  # only the k likeliest (and any that tie with the last of them)
    top_p: float | None = None  # only the likeliest that together hold this much probability (Holtzman et al. 2020)

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise PromptError(f"temperature = {self.temperature}: must not be negative; 0 takes the likeliest token")
        if self.top_k is not None and self.top_k < 1:
            raise PromptError(f"top_k = {self.top_k}: must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise PromptError(f"top_p = {self.top_p}: must be above 0 and at most 1")


def filter_logits(logits: Array, temperature: Array | float, top_k: Array | int, top_p: Array | float) -> Array:
    """Logits [..., vocab] to draw from: scaled, and -inf where a rule forbids the token. `temperature` is above 0."""
    logits = logits / temperature
    ordered = jnp.sort(logits, -1)[..., ::-1]
    kth = jnp.take_along_axis(ordered, jnp.broadcast_to(top_k - 1, (*logits.shape[:-1], 1)), -1)
    ordered = jnp.where(ordered >= kth, ordered, -jnp.inf)
    probabilities = jax.nn.softmax(ordered, -1)
    before = jnp.cumsum(probabilities, -1) - probabilities
    within = (before < top_p) | (top_p >= 1)  # the sum of many float32 may reach 1 before the last
    last = jnp.where(within, ordered, jnp.inf).min(-1, keepdims=True)
    return jnp.where(logits >= jnp.maximum(kth, last), logits, -jnp.inf)


def draw(logits: Array, keys: Array, temperature: Array, top_k: Array, top_p: Array) -> Array:
    """One token for each row of logits [B, vocab], with a key of its own: int32 [B]."""
    filtered = filter_logits(logits, jnp.where(temperature > 0, temperature, 1.0), top_k, top_p)
    drawn = jax.vmap(jax.random.categorical)(keys, filtered)
    return jnp.where(temperature > 0, drawn, logits.argmax(-1)).astype(jnp.int32)


def _row_keys(key: Array, rows: int, place: Array) -> Array:
    """A key for each text and place: what a text becomes does not depend on how many are made beside it."""
    return jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, row), place))(jnp.arange(rows))


@partial(jax.jit, static_argnames="model", donate_argnames="cache")
def _read_and_draw(
    params: Any,
    cache: KVCache,
    tokens: Array,
    start: Array,
    last: Array,
    key: Array,
    rules: tuple[Array, Array, Array],
    vocab: Array,
    *,
    model: GPT,
) -> tuple[Array, KVCache]:
    """Reads tokens [B, Q] standing at start, start + 1, ... and draws what follows the one at index `last`."""
    logits, cache = cast(tuple[Array, KVCache], model.apply({"params": params}, tokens, cache, start, method="decode"))
    keys = _row_keys(key, tokens.shape[0], start + last)
    logits = jnp.where(jnp.arange(logits.shape[-1]) < vocab, logits, -jnp.inf)  # rows that pad the table are no tokens
    return draw(jnp.take(logits, last, axis=1), keys, *rules), cache


def generate(
    model: config.Model,
    params: Any,
    prompt: np.ndarray,
    *,
    new_tokens: int,
    count: int = 1,
    sampling: Sampling | None = None,
    seed: int = 0,
    stop: int | None = None,
    vocab: int | None = None,
) -> Iterator[np.ndarray]:
    """Yields the next token of each of `count` continuations, int32 [count], up to `new_tokens` times.

    `vocab` is the number of ids that are tokens (None: all). `stop` ends a text: it is repeated for a text that has
    ended, and when all have, the iterator ends. Raises `PromptError` for an empty prompt, and for one that leaves no
    room in the context.
    """
    sampling = sampling or Sampling()
    length, total = len(prompt), len(prompt) + new_tokens
    if length == 0:
        raise PromptError("the prompt is empty; give at least one token to go on from")
    if total > model.context_length:
        raise PromptError(
            f"{length} prompt tokens and {new_tokens} new ones are more than the model's context of "
            f"{model.context_length}; shorten the prompt or ask for at most {max(0, model.context_length - length)}"
        )
    rules = (
        jnp.float32(sampling.temperature),
        jnp.int32(min(sampling.top_k or model.vocab_size or 1, model.vocab_size or 1)),
        jnp.float32(sampling.top_p or 1.0),
    )
    if not 0 <= seed < 2**63:
        raise PromptError(f"seed = {seed}: must be at least 0 and below 2**63")
    key, size = jax.random.key(seed), jnp.int32(vocab or model.vocab_size or 0)
    read = partial(_read_and_draw, params, model=GPT(model), rules=rules, key=key, vocab=size)
    return _tokens(model, read, prompt, total, count, stop)


def _tokens(
    model: config.Model,
    read: Callable[..., tuple[Array, KVCache]],
    prompt: np.ndarray,
    total: int,
    count: int,
    stop: int | None,
) -> Iterator[np.ndarray]:
    length = len(prompt)
    if length == total:
        return
    cache = empty_cache(model, count, _round_up(total, model.context_length))
    padded = np.zeros((count, _round_up(length, model.context_length)), np.int32)
    padded[:, :length] = prompt
    token, cache = read(cache, padded, jnp.int32(0), jnp.int32(length - 1))
    ended = np.zeros(count, bool)
    for place in range(length, total):
        tokens = np.asarray(token)
        if stop is not None:
            tokens = np.where(ended, stop, tokens)
            ended |= tokens == stop
        yield tokens
        if ended.all() or place + 1 == total:
            return
        token, cache = read(cache, tokens[:, None], jnp.int32(place), jnp.int32(0))


def _round_up(length: int, most: int) -> int:
    return min(-(-length // BUCKET) * BUCKET, most)


class Writer:
    """A model and its tokenizer: text in, text out."""

    def __init__(self, model: config.Model, params: Any, tokenizer: Tokenizer):
        self.model, self.params, self.tokenizer = model, params, tokenizer

    def encode(self, prompt: str) -> np.ndarray:
        """The prompt's ids; for an empty one what a document begins after: the end of another, or a line break."""
        if prompt:
            return self.tokenizer.encode(prompt)
        if self.tokenizer.end_of_text is not None:
            return np.array([self.tokenizer.end_of_text], np.int32)
        return np.array([self.tokenizer.pieces.index(b"\n") if b"\n" in self.tokenizer.pieces else 0], np.int32)

    def room(self, prompt: str, max_length: int | None, max_new_tokens: int | None) -> int:
        """How many tokens to make: the smaller of what is asked for; else what the context holds, at most 256."""
        length = len(self.encode(prompt))
        if max_length is not None and max_length <= length:
            raise PromptError(f"max_length = {max_length}: the prompt alone has {length} tokens; ask for more")
        asked = [n for n in (max_length and max_length - length, max_new_tokens) if n is not None]
        return min(asked) if asked else min(256, max(1, self.model.context_length - length))

    def texts(self, prompt: str, new_tokens: int, count: int, sampling: Sampling, seed: int) -> list[str]:
        """`count` texts, each the prompt and a continuation. The same seed gives the same texts."""
        steps = list(self._ids(prompt, new_tokens, count, sampling, seed))
        ids = np.stack(steps, 1) if steps else np.zeros((count, 0), np.int32)
        return [prompt + self.tokenizer.decode(row) for row in ids]

    def stream(self, prompt: str, new_tokens: int, sampling: Sampling, seed: int) -> Iterator[str]:
        """The first of `texts` in parts, as they are made; a part never ends inside a character."""
        steps = self._ids(prompt, new_tokens, 1, sampling, seed)  # refuses what does not fit before anything is said
        yield prompt
        yield from self.tokenizer.stream(int(ids[0]) for ids in steps)

    def _ids(self, prompt: str, new_tokens: int, count: int, sampling: Sampling, seed: int) -> Iterator[np.ndarray]:
        return generate(
            self.model,
            self.params,
            self.encode(prompt),
            new_tokens=new_tokens,
            count=count,
            sampling=sampling,
            seed=seed,
            stop=self.tokenizer.end_of_text,
            vocab=self.tokenizer.vocab_size,
        )
