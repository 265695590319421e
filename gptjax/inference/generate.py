"""Goes on with texts: the prompts are read in one call, then one compiled step makes a token for every text at once.

Lengths are rounded up to those of `cache.bucket`, so that a program is compiled for each number of texts, bucket of
prompt lengths, bucket of total lengths and set of rules in use, and never for a single token or value.
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
from gptjax.inference.cache import bucket, empty_cache, limit_window, rolls, slots_for
from gptjax.inference.engine import Engine
from gptjax.inference.sampling import (
    BatchedSamplingParams,
    SamplingParams,
    TokenHistory,
    batch_params,
    choose,
    penalised,
)
from gptjax.model.gpt import Cache, decode_step, unembed

MOST_TOKENS = 1 << 24  # of one text


@runtime_checkable
class TokenConstraint(Protocol):
    """Something that follows one text and has a say in it: stop tokens, stop strings, a grammar."""

    def allowed(self) -> np.ndarray | None:
        """The tokens that may come next, bool [vocab]; None for any: who says so once is not asked again."""

    def take(self, token: int) -> bool:
        """Is told of every token; whether the text ends with this one."""


@dataclass(frozen=True)
class Request:
    """One text to go on with."""

    prompt: np.ndarray  # int32 ids, at least one
    new_tokens: int  # to make at most
    sampling: SamplingParams = field(default_factory=SamplingParams)
    seed: int = 0  # the same seed gives the same text, whatever is made beside it
    copy: int = 0  # tells apart the texts made from one prompt and seed
    guides: tuple[TokenConstraint, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Step:
    """What one step has made."""

    tokens: np.ndarray  # int32 [texts]
    logprobs: np.ndarray  # float32 [texts]: ln of each token's probability under the model, before any rule
    live: np.ndarray  # bool [texts]: whether the token belongs to the text, which had not ended before
    ended: np.ndarray  # bool [texts]: whether a guide of the text ended it with this token


def check(engine: Engine, requests: Sequence[Request]) -> int:
    """The tokens of the longest text. Raises `PromptError` for a request that the model cannot serve."""
    for r in requests:
        if len(r.prompt) == 0:
            raise PromptError("the prompt is empty; give at least one token to go on from")
        if not 0 <= r.prompt.min() <= r.prompt.max() < engine.vocab:
            raise PromptError(f"the prompt holds ids that are no tokens; there are ids 0 to {engine.vocab - 1}")
        if not 0 <= r.seed < 2**63:
            raise PromptError(f"seed = {r.seed}: must be at least 0 and below 2**63")
        length, room = len(r.prompt), engine.model.context_length
        if not 0 <= r.new_tokens <= MOST_TOKENS:
            raise PromptError(f"{r.new_tokens} new tokens: must be at least 0 and at most {MOST_TOKENS:,}")
        if length + r.new_tokens > room and not rolls(engine.model):
            raise PromptError(
                f"{length} prompt tokens and {r.new_tokens} new ones are more than the model's context of {room}; "
                f"shorten the prompt{f' or ask for at most {room - length}' if room > length else ''}"
            )
    return max(len(r.prompt) + r.new_tokens for r in requests)


def generate(engine: Engine, requests: Sequence[Request]) -> Iterator[Step]:
    """Yields a token for every text until all have ended. Raises `PromptError` before anything is computed."""
    total = check(engine, requests)
    rows = at_least_two(engine, requests)
    return _steps(engine, requests, rows, batch_params([r.sampling for r in rows], engine.vocab, engine.rows), total)


def _steps(
    engine: Engine, requests: Sequence[Request], rows: Sequence[Request], rules: BatchedSamplingParams, total: int
) -> Iterator[Step]:
    count, model = len(requests), limit_window(engine.model, total)
    left = np.array([r.new_tokens for r in requests])
    if not left.any():
        return
    keys = row_keys(rows)
    tokens, places = padded([r.prompt for r in rows])
    cache = empty_cache(model, len(rows), slots_for(engine.model, total))
    history = start_history(tokens, places, total)
    read_and_choose = partial(_read_and_choose, engine.params, model=model, rules=rules, keys=keys)

    def allowed() -> np.ndarray | None:
        mask = allowed_of(requests, engine.rows)
        return mask if mask is None else np.resize(mask, (len(rows), engine.rows))

    live, mask = left > 0, allowed()
    step = read_and_choose(cache, history, mask, tokens, places)
    while True:
        token, logprob, history, cache = step
        more = (left > live).any()
        if more and mask is None:  # the next step begins before its token is known here: a CPU waits for Python else
            step = read_and_choose(cache, history, None)
        made = np.array(token)
        if (stuck := np.flatnonzero(live & (made[:count] < 0))).size:
            raise PromptError(f"text {stuck[0]}: the rules leave no token to go on with; loosen them")
        ended = ask_guides(requests, made, live)
        yield Step(made[:count], np.array(logprob)[:count], live, ended)
        left = left - live
        live = live & ~ended & (left > 0)
        if not live.any():
            return
        if mask is not None:
            mask = allowed()
            step = read_and_choose(cache, history, mask)


@partial(jax.jit, static_argnames=("model",), donate_argnames=("cache", "history"))
def _read_and_choose(
    params: Any,
    cache: Cache,
    history: TokenHistory,
    allowed: Array | None,
    tokens: Array | None = None,
    places: Array | None = None,
    *,
    model: config.ModelConfig,
    rules: BatchedSamplingParams,
    keys: Array | None,
) -> tuple[Array, Array, TokenHistory, Cache]:
    """Reads the first tokens [B, Q] at their places, or the last of the history, and chooses what follows each row."""
    empty = tokens is not None
    if tokens is None or places is None:
        places = jnp.minimum(history.lengths, history.tokens.shape[1])[:, None] - 1  # a text that has ended may be out
        tokens = jnp.take_along_axis(history.tokens, places, 1)
    x, cache = decode_step(model, params, tokens, places, cache, empty)
    last = (places >= 0).sum(1) - 1
    logits = unembed(model, params, jnp.take_along_axis(x, last[:, None, None], 1))[:, 0]
    token = choose(penalised(logits, rules, history, allowed), rules, keys_at(keys, history.lengths))
    history = remember(history, token[:, None], jnp.ones(len(token), jnp.int32))
    logprob = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(token, 0)[:, None], 1)[:, 0]
    return token, logprob, history, cache


def at_least_two(engine: Engine, requests: Sequence[Request]) -> list[Request]:
    """A single text goes twice where that is faster: products of one narrow row are the slowest on a CPU."""
    alone = len(requests) == 1 and engine.narrow and jax.default_backend() == "cpu"
    return [*requests, *requests] if alone else list(requests)


def padded(prompts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of any lengths as one array [B, Q], and the place of each token; -1 in the padding, which comes last."""
    width = bucket(max(map(len, prompts)))
    tokens, places = np.zeros((len(prompts), width), np.int32), np.full((len(prompts), width), -1, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)], places[row, : len(prompt)] = prompt, np.arange(len(prompt))
    return tokens, places


def ask_guides(requests: Sequence[Request], tokens: np.ndarray, live: np.ndarray) -> np.ndarray:
    """Tells the guides of every live text of its token; which texts end with it, bool [texts]."""
    ended = np.zeros(len(requests), bool)
    for i in map(int, np.flatnonzero(live)):
        ended[i] = any([guide.take(int(tokens[i])) for guide in requests[i].guides])  # every guide is told
    return ended


def start_history(tokens: np.ndarray, places: np.ndarray, total: int) -> TokenHistory:
    """The prompts, with room for texts of `total` tokens."""
    lengths = places.max(1) + 1
    room = np.zeros((len(tokens), max(bucket(total), tokens.shape[1])), np.int32)
    room[:, : tokens.shape[1]] = tokens
    return TokenHistory(jnp.asarray(room), jnp.asarray(lengths), jnp.asarray(lengths))


def remember(history: TokenHistory, tokens: Array, count: Array) -> TokenHistory:
    """Adds the first `count` [B] of tokens [B, Q] to each text."""
    ahead = jnp.arange(tokens.shape[1])
    at = jnp.where(ahead < count[:, None], history.lengths[:, None] + ahead, history.tokens.shape[1])
    written = history.tokens.at[jnp.arange(len(tokens))[:, None], at].set(jnp.maximum(tokens, 0), mode="drop")
    return TokenHistory(written, history.prompts, history.lengths + count)


def row_keys(requests: Sequence[Request]) -> Array | None:
    """A random key for each text, from its seed and copy alone; None where nothing is drawn."""
    if all(r.sampling.temperature == 0 for r in requests):
        return None
    keys = [  # a seed of more than 32 bits would lose the others
        jax.random.fold_in(jax.random.fold_in(jax.random.key(r.seed & 0xFFFFFFFF), r.seed >> 32), r.copy)
        for r in requests
    ]
    return jnp.stack(keys)


def keys_at(keys: Array | None, places: Array) -> Array | None:
    """The keys of the tokens at places [B]."""
    return None if keys is None else jax.vmap(jax.random.fold_in)(keys, places)


def allowed_of(requests: Sequence[Request], rows: int) -> np.ndarray | None:
    """What all guides of each text allow, bool [B, rows]; None where none forbids anything."""
    masks = [[m for g in r.guides if (m := g.allowed()) is not None] for r in requests]
    if not any(masks):
        return None
    allowed = np.zeros((len(requests), rows), bool)
    for row, own in enumerate(masks):
        allowed[row] = np.concatenate([np.all(own, 0), np.zeros(rows - len(own[0]), bool)]) if own else True
    return allowed
