"""Beam search: the likeliest whole texts rather than the likeliest next tokens.

The same search as `transformers.generate(num_beams=...)`, token for token: log-probabilities are summed, finished texts
are compared by their sum over length ** length_penalty, and the search ends where no running text can improve on them.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gptjax import config
from gptjax.errors import PromptError
from gptjax.inference.cache import empty_cache, limit_window, slots_for
from gptjax.inference.engine import Engine
from gptjax.inference.generate import Request, check, padded, remember, start_history
from gptjax.inference.sampling import BatchedSamplingParams, TokenHistory, batch_params, penalised
from gptjax.model.gpt import Cache, decode_step, unembed


@dataclass(frozen=True)
class BeamConfig:
    """How texts are searched for."""

    count: int = 4  # texts that are followed at once
    length_penalty: float = 1.0  # power of the length that a sum is divided by: above 0 prefers longer texts
    early_stopping: bool | Literal["never"] = False  # True: as soon as `count` have ended; "never": no guess is made

    def __post_init__(self) -> None:
        if self.count < 1:
            raise PromptError(f"num_beams = {self.count}: must be at least 1")


@dataclass(frozen=True)
class Hypothesis:
    """A whole text."""

    ids: np.ndarray  # int32: the continuation
    score: float  # sum of log-probabilities over length ** length_penalty
    ended: bool  # with a stop token


def beam_search(
    engine: Engine, request: Request, beams: BeamConfig, stop_tokens: tuple[int, ...] = ()
) -> list[Hypothesis]:
    """The best `beams.count` continuations, best first. The request's `sampling` gives penalties; nothing is drawn.

    Raises `PromptError` as `generate` does.
    """
    total = check(engine, [request])
    model, width = limit_window(engine.model, total), beams.count
    keep = min(max(2, 1 + len(stop_tokens)) * width, engine.vocab)
    tokens, places = padded([request.prompt])
    history = start_history(tokens, places, total)
    cache = empty_cache(model, 1, slots_for(engine.model, total))
    rules = batch_params([request.sampling], engine.vocab, engine.rows)
    extend = partial(_extend, engine.params, model=model, rules=rules, keep=keep)
    running = [(np.float32(0), np.zeros(0, np.int32))]  # sums and continuations
    finished: list[Hypothesis] = []
    parents, made = np.zeros(1, np.int32), np.zeros((1, 0), np.int32)
    for length in range(1, request.new_tokens + 1):
        sums = np.array([s for s, _ in running], np.float32)
        values, index, cache, history = extend(cache, history, parents, made, tokens, places, sums, empty=length == 1)
        owner, token = np.divmod(np.array(index), engine.rows)
        texts = [np.append(running[o][1], t).astype(np.int32) for o, t in zip(owner, token, strict=True)]
        ends = np.isin(token, stop_tokens)
        last = length == request.new_tokens
        penalty = np.float32(length**beams.length_penalty)
        finished += [
            Hypothesis(text, float(value / penalty), bool(end))
            for value, text, end in zip(np.array(values)[:width], texts[:width], ends[:width], strict=True)
            if end or last
        ]
        finished = sorted(finished, key=lambda f: -f.score)[:width]
        on = np.flatnonzero(~ends)[:width]
        if last or not len(on) or _settled(finished, float(values[on[0]]), length, request.new_tokens, beams):
            break
        running = [(np.float32(values[i]), texts[i]) for i in on]
        parents, made = owner[on].astype(np.int32), token[on, None].astype(np.int32)
        tokens = made
        places = np.full((len(on), 1), len(request.prompt) + length - 1, np.int32)
    return finished


def _settled(finished: list[Hypothesis], best_running: float, length: int, most: int, beams: BeamConfig) -> bool:
    """Whether no running text can still come among the finished ones."""
    if len(finished) < beams.count:
        return False
    if beams.early_stopping is True:
        return True
    reach = most if beams.early_stopping == "never" and beams.length_penalty > 0 else length
    return best_running / reach**beams.length_penalty <= finished[-1].score


@partial(jax.jit, static_argnames=("model", "keep", "empty"))
def _extend(
    params: Any,
    cache: Cache,
    history: TokenHistory,
    parents: Array,
    made: Array,
    tokens: Array,
    places: Array,
    sums: Array,
    *,
    model: config.ModelConfig,
    rules: BatchedSamplingParams,
    keep: int,
    empty: bool,
) -> tuple[Array, Array, Cache, TokenHistory]:
    """The `keep` best texts that are one token longer: their sums, and row x vocab + token of each.

    Row i goes on from row `parents[i]` of the cache and history, to which `made[i]` is added.
    """
    cache, history = jax.tree.map(lambda x: x[parents], (cache, history))
    history = remember(history, made, jnp.full(len(parents), made.shape[1]))
    x, cache = decode_step(model, params, tokens, places, cache, empty)
    last = (places >= 0).sum(1) - 1
    logits = unembed(model, params, jnp.take_along_axis(x, last[:, None, None], 1))[:, 0]
    of_each = jax.tree.map(lambda rule: jnp.repeat(rule, len(parents), 0), rules)
    logprobs = penalised(jax.nn.log_softmax(logits), of_each, history)
    values, index = jax.lax.top_k((sums[:, None] + logprobs).reshape(-1), keep)
    return values, index, cache, history
