"""Speculative decoding: a cheap guess of the next few tokens, checked by the model in one call.

The texts are distributed exactly as without guesses (Leviathan et al. 2023, appendix A.1): a guess is accepted with
probability min(1, p / q), and the first refused one is drawn again from max(p - q, 0). Where the likeliest token is
taken, the texts are the same token for token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gptjax import config
from gptjax.errors import PromptError
from gptjax.inference.cache import empty_cache, limit_window, slots_for
from gptjax.inference.engine import Engine
from gptjax.inference.generate import Request, Step, ask_guides, at_least_two, check, padded, row_keys
from gptjax.inference.sampling import (
    BatchedSamplingParams,
    TokenHistory,
    batch_params,
    choose,
    draw,
    likeliest,
    penalised,
    warped,
)
from gptjax.model.gpt import Cache, decode_step, unembed

GUESS, ACCEPT, REPLACE = 1, 2, 3  # what a random key is for


@dataclass
class Tally:
    """How well the guesses did."""

    guesses: int  # tokens that are guessed for each call
    calls: int = 0  # of the model, counted for each text
    tokens: int = 0  # that came out of them
    tested: int = 0  # guesses that were looked at
    accepted: int = 0  # of those

    @property
    def acceptance(self) -> float:
        """The share of guesses that were accepted, of those that were looked at: Leviathan's alpha."""
        return self.accepted / max(1, self.tested)

    @property
    def tokens_per_call(self) -> float:
        return self.tokens / max(1, self.calls)

    @property
    def expected_tokens_per_call(self) -> float:
        """(1 - alpha^(guesses + 1)) / (1 - alpha): Leviathan et al. 2023, equation 1."""
        alpha = self.acceptance
        return self.guesses + 1 if alpha == 1 else (1 - alpha ** (self.guesses + 1)) / (1 - alpha)


@runtime_checkable
class Drafter(Protocol):
    """Something that guesses how texts go on."""

    def start(
        self, requests: Sequence[Request], rules: BatchedSamplingParams, keys: Array | None, guesses: int, total: int
    ) -> None:
        """Is given the texts, without the token that the model itself chose first."""

    def guess(self, texts: list[np.ndarray]) -> tuple[np.ndarray, Array | None]:
        """Guesses [B, guesses], -1 where there is none, and the logits they were drawn from; None: they are certain."""


@dataclass
class PromptLookup:
    """Guesses that the text goes on as it did where its last few tokens stood before (Saxena 2023): costs nothing."""

    longest: int = 3  # tokens to look for; then fewer
    guesses: int = field(init=False, default=0)

    def start(
        self, requests: Sequence[Request], rules: BatchedSamplingParams, keys: Array | None, guesses: int, total: int
    ) -> None:
        self.guesses = guesses

    def guess(self, texts: list[np.ndarray]) -> tuple[np.ndarray, None]:
        found = np.full((len(texts), self.guesses), -1, np.int32)
        for row, text in enumerate(texts):
            follows = self._after_last_match(text)
            found[row, : len(follows)] = follows
        return found, None

    def _after_last_match(self, text: np.ndarray) -> np.ndarray:
        for size in range(min(self.longest, len(text) - 1), 0, -1):
            windows = np.lib.stride_tricks.sliding_window_view(text[:-1], size)
            if len(places := np.flatnonzero((windows == text[-size:]).all(1))):
                return text[places[-1] + size :][: self.guesses]
        return text[:0]


class DraftModel:
    """A smaller model with the same tokens guesses."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def start(
        self, requests: Sequence[Request], rules: BatchedSamplingParams, keys: Array | None, guesses: int, total: int
    ) -> None:
        engine = self.engine
        self.model = limit_window(engine.model, total)
        self.rules = batch_params([r.sampling for r in requests], engine.vocab, engine.rows)
        self.keys, self.guesses = keys, guesses
        tokens, places = padded([r.prompt for r in requests])
        slots = slots_for(engine.model, total + guesses, guesses + 1)
        self.read = places.max(1) + 1
        self.cache = _read(engine.params, empty_cache(self.model, len(tokens), slots), tokens, places, model=self.model)

    def guess(self, texts: list[np.ndarray]) -> tuple[np.ndarray, Array]:
        """First reads what the model has added to the texts since: one token, or two where all guesses were right."""
        places = np.array([[len(t) - 2, len(t) - 1] for t in texts])
        tokens = np.array([t[-2:] for t in texts])
        places[:, 0] = np.where(places[:, 0] >= self.read, places[:, 0], -1)
        guesses, logits, self.cache = _draft(
            self.engine.params, self.cache, tokens, places, model=self.model, rules=self.rules, keys=self.keys,
            guesses=self.guesses,
        )  # fmt: skip
        self.read = np.array([len(t) for t in texts]) + self.guesses - 1
        return np.array(guesses), logits


def speculate(
    engine: Engine, requests: Sequence[Request], drafter: Drafter, guesses: int, tally: Tally | None = None
) -> Iterator[Step]:
    """`generate`, with `guesses` tokens guessed for every call of the model; `tally` counts how it goes.

    Raises `PromptError` as `generate` does, and for rules that look back at the text.
    """
    if guesses < 1:
        raise PromptError(f"draft_tokens = {guesses}: at least 1 must be guessed")
    if any(r.sampling.remembers for r in requests):
        raise PromptError(
            "penalties and no_repeat_ngram_size look back at every token: not with guessed ones; leave out the draft"
        )
    if any(g.allowed() is not None for r in requests for g in r.guides):
        raise PromptError("a grammar is asked about every token: not with guessed ones; leave out the draft")
    if isinstance(drafter, DraftModel) and drafter.engine.vocab != engine.vocab:
        raise PromptError(
            f"the draft model has {drafter.engine.vocab} tokens and the model {engine.vocab}: they need the same"
        )
    total = check(engine, requests)
    if isinstance(drafter, DraftModel):
        try:
            check(drafter.engine, requests)
        except PromptError as e:
            raise PromptError(f"the draft model: {e}") from None
    return _rounds(engine, requests, drafter, guesses, total, tally or Tally(guesses))


def _rounds(
    engine: Engine, requests: Sequence[Request], drafter: Drafter, guesses: int, total: int, tally: Tally
) -> Iterator[Step]:
    count, model = len(requests), limit_window(engine.model, total)
    left = np.array([r.new_tokens for r in requests])
    if not left.any():
        return
    rows = at_least_two(engine, requests)
    rules, keys = batch_params([r.sampling for r in rows], engine.vocab, engine.rows), row_keys(rows)
    drafter.start(rows, rules, keys, guesses, total)
    verify = partial(_verify, engine.params, model=model, rules=rules, keys=keys)
    tokens, places = padded([r.prompt for r in rows])
    cache = empty_cache(model, len(rows), slots_for(engine.model, total + guesses, guesses + 1))
    texts = [r.prompt for r in rows]
    guessed, logits = np.full((len(rows), 0), -1, np.int32), None
    live, empty = left > 0, True
    while True:
        accepted, chosen, logprobs, cache = verify(cache, tokens, places, guessed, logits, empty=empty)
        accepted, chosen, logprobs = np.array(accepted), np.array(chosen), np.array(logprobs)
        if not empty:
            tried = (guessed[:count] >= 0).sum(1)
            tally.calls += int(live.sum())
            tally.tested += int(np.minimum(accepted[:count] + 1, tried)[live].sum())
            tally.accepted += int(accepted[:count][live].sum())
            tally.tokens += int((accepted[:count] + 1)[live].sum())
        texts = [np.append(t, c[: n + 1]).astype(np.int32) for t, c, n in zip(texts, chosen, accepted, strict=True)]
        for i in range(int(accepted[:count][live].max()) + 1):
            has = live & (accepted[:count] >= i)
            ended = ask_guides(requests, chosen[:, i], has)
            yield Step(chosen[:count, i], logprobs[:count, i], has, ended)
            left = left - has
            live = live & ~ended & (left > 0)
        if not live.any():
            return
        guessed, logits = drafter.guess(texts)
        logits = None if logits is None else _as_wide(logits, engine.rows)
        tokens = np.concatenate([[[t[-1]] for t in texts], np.maximum(guessed, 0)], 1).astype(np.int32)
        places = (np.array([[len(t) - 1] for t in texts]) + np.arange(tokens.shape[1])).astype(np.int32)
        empty = False


@partial(jax.jit, static_argnames="model", donate_argnames="cache")
def _read(params: Any, cache: Cache, tokens: Array, places: Array, *, model: config.ModelConfig) -> Cache:
    """The cache of prompts."""
    return decode_step(model, params, tokens, places, cache, prefill=True)[1]


@partial(jax.jit, static_argnames=("model", "guesses"), donate_argnames="cache")
def _draft(
    params: Any,
    cache: Cache,
    tokens: Array,
    places: Array,
    *,
    model: config.ModelConfig,
    rules: BatchedSamplingParams,
    keys: Array | None,
    guesses: int,
) -> tuple[Array, Array, Cache]:
    """Reads tokens [B, Q] and goes on: guesses [B, guesses], their logits [B, guesses, V], the cache."""

    def one(cache: Cache, tokens: Array, places: Array) -> tuple[Cache, Array, Array]:
        x, cache = decode_step(model, params, tokens, places, cache)
        logits = penalised(unembed(model, params, x[:, -1:])[:, 0], rules, _no_history(tokens))
        own = None if keys is None else jax.vmap(_key, (0, 0, None))(keys, places[:, -1] + 1, GUESS)
        return cache, choose(logits, rules, own), logits

    def body(carry: tuple[Cache, Array, Array], _: None) -> tuple[tuple[Cache, Array, Array], tuple[Array, Array]]:
        cache, token, place = carry
        cache, guess, logits = one(cache, token[:, None], place[:, None])
        return (cache, guess, place + 1), (guess, logits)

    cache, first, first_logits = one(cache, tokens, places)
    carry = (cache, first, places[:, -1] + 1)
    (cache, _, _), (more, more_logits) = jax.lax.scan(body, carry, None, length=guesses - 1)
    guessed = jnp.concatenate([first[:, None], more.T], 1)
    return guessed, jnp.concatenate([first_logits[:, None], more_logits.swapaxes(0, 1)], 1), cache


@partial(jax.jit, static_argnames=("model", "empty"), donate_argnames="cache")
def _verify(
    params: Any,
    cache: Cache,
    tokens: Array,
    places: Array,
    guessed: Array,
    guess_logits: Array | None,
    *,
    model: config.ModelConfig,
    rules: BatchedSamplingParams,
    keys: Array | None,
    empty: bool,
) -> tuple[Array, Array, Array, Cache]:
    """Reads tokens [B, Q] of which the last G were guessed. Returns how many of the guesses are accepted, [B]; the
    accepted ones, the model's own behind them, and then what does not count, [B, G + 1]; their log-probabilities.
    """
    x, cache = decode_step(model, params, tokens, places, cache, empty)
    count = guessed.shape[1]
    first = (places >= 0).sum(1) - 1 - count
    at = first[:, None] + jnp.arange(count + 1)
    raw = unembed(model, params, jnp.take_along_axis(x, at[..., None], 1))
    logits = jax.vmap(lambda l: penalised(l, rules, _no_history(tokens)), 1, 1)(raw)  # noqa: E741
    own_places = jnp.take_along_axis(places, at, 1) + 1
    if keys is None:
        own = likeliest(logits).astype(jnp.int32)
        right = guessed == own[:, :-1]
        accepted = jnp.cumprod(right, 1).sum(1)
        chosen = own
    else:
        accepted, chosen = _accept(logits, guessed, guess_logits, rules, keys, own_places)
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(raw), chosen[..., None], -1)[..., 0]
    return accepted, chosen, logprobs, cache


def _accept(
    logits: Array, guessed: Array, guess_logits: Array | None, rules: BatchedSamplingParams, keys: Array, places: Array
) -> tuple[Array, Array]:
    """How many guesses are accepted, [B], and the tokens [B, G + 1] up to the model's own that follows them."""
    p = jax.nn.softmax(jax.vmap(lambda l: warped(l, rules), 1, 1)(logits))  # noqa: E741
    count = guessed.shape[1]
    if guess_logits is None:
        q = jax.nn.one_hot(guessed, p.shape[-1])
    else:
        q = jax.nn.softmax(jax.vmap(lambda l: warped(l, rules), 1, 1)(guess_logits))  # noqa: E741
    told = jnp.maximum(guessed, 0)[..., None]
    p_of, q_of = (jnp.take_along_axis(x, told, -1)[..., 0] for x in (p[:, :count], q))
    uniform = jax.vmap(lambda k, at: jax.vmap(lambda a: jax.random.uniform(_key(k, a, ACCEPT)))(at))
    right = (guessed >= 0) & (uniform(keys, places[:, :count]) * q_of < p_of)
    accepted = jnp.cumprod(right, 1).sum(1)
    # Of the place behind the accepted guesses: what the refused one leaves over, or all where none was refused.
    here = accepted[:, None, None]
    own = jnp.take_along_axis(p, here, 1)[:, 0]
    q = jnp.where((guessed >= 0)[..., None], q, 0)
    refused = jnp.take_along_axis(jnp.pad(q, ((0, 0), (0, 1), (0, 0))), here, 1)
    rest = jnp.maximum(own - refused[:, 0], 0)
    rest = jnp.where(rest.sum(-1, keepdims=True) > 0, rest, own)  # p = q to rounding
    place = jnp.take_along_axis(places, accepted[:, None], 1)[:, 0]
    drawn = draw(jnp.log(rest), jax.vmap(_key, (0, 0, None))(keys, place, REPLACE))
    follows = jnp.pad(jnp.maximum(guessed, 0), ((0, 0), (0, 1)))
    behind = jnp.arange(count + 1) == accepted[:, None]
    return accepted, jnp.where(behind, drawn[:, None], follows)


def _as_wide(logits: Array, rows: int) -> Array:
    """Logits [..., V] for another number of ids; those that are no tokens, which pad a table, are -inf anyway."""
    more = [(0, 0)] * (logits.ndim - 1) + [(0, max(0, rows - logits.shape[-1]))]
    return jnp.pad(logits, more, constant_values=-jnp.inf)[..., :rows]


def _key(key: Array, place: Array, use: int) -> Array:
    return jax.random.fold_in(jax.random.fold_in(key, place), use)


def _no_history(tokens: Array) -> TokenHistory:
    """For rules that do not look back."""
    none = jnp.zeros(len(tokens), jnp.int32)
    return TokenHistory(jnp.zeros((len(tokens), 1), jnp.int32), none, none)
