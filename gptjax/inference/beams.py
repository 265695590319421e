"""Beam search: the most likely texts, rather than the most likely next tokens.

The same search as `transformers.generate(num_beams=...)`, token for token: log-probabilities are summed, finished texts
are compared by their sum over length ** length_penalty, and the search ends when no running text can improve on them.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from gptjax.config import ModelConfig
from gptjax.errors import PromptError
from gptjax.inference.cache import cache_length_for, empty_cache, limit_window
from gptjax.inference.engine import Engine
from gptjax.inference.generate import (
    DecodeInputs,
    DecoderState,
    Request,
    append_tokens,
    check_requests,
    next_token_logits,
    pad_prompts,
    start_history,
)
from gptjax.inference.sampling import BatchedSamplingParams, batch_params, process_logits
from gptjax.model.gpt import Params


@dataclass(frozen=True)
class BeamConfig:
    """The settings of a beam search."""

    count: int = 4  # texts that are extended in parallel
    length_penalty: float = 1.0  # the power of the length that a sum is divided by: above 0 prefers longer texts
    early_stopping: bool | Literal["never"] = False  # True: as soon as `count` are finished; "never": no heuristic

    def __post_init__(self) -> None:
        if self.count < 1:
            raise PromptError(f"num_beams = {self.count}: must be at least 1")


@dataclass(frozen=True)
class Hypothesis:
    """A finished text."""

    ids: np.ndarray  # int32: the continuation
    score: float  # sum of log-probabilities over length ** length_penalty
    finished: bool  # by a stop token, not by the length limit


class Beams(NamedTuple):
    """The running texts, each as its parent among the rows of the state and the tokens that it adds to that."""

    parents: Int[Array, " beams"]
    new_tokens: Int[Array, "beams new"]
    scores: Float[Array, " beams"]  # sums of log-probabilities


def beam_search(
    engine: Engine, request: Request, beam_config: BeamConfig, stop_tokens: tuple[int, ...] = ()
) -> list[Hypothesis]:
    """The best `beam_config.count` continuations, best first. Of the request's `sampling` only penalties apply.

    Raises `PromptError` as `generate` does.
    """
    total, num_beams = check_requests(engine, [request]), beam_config.count
    num_kept = min(max(2, 1 + len(stop_tokens)) * num_beams, engine.vocab_size)
    inputs = pad_prompts([request.prompt])
    cache = empty_cache(engine.config, 1, cache_length_for(engine.config, total))
    state = DecoderState(cache, start_history(inputs, total))
    sampling = batch_params([request.sampling], engine.vocab_size, engine.padded_vocab_size)
    config = limit_window(engine.config, total)
    extend = partial(_extend, engine.params, config=config, sampling=sampling, num_kept=num_kept)
    beams = Beams(jnp.zeros(1, jnp.int32), jnp.zeros((1, 0), jnp.int32), jnp.zeros(1))
    texts = [np.zeros(0, np.int32)]  # the continuation of each beam
    finished: list[Hypothesis] = []
    for length in range(1, request.new_tokens + 1):
        scores, index, state = extend(state, inputs, beams, prefill=length == 1)
        scores = np.array(scores)
        parent, token = np.divmod(np.array(index), engine.padded_vocab_size)
        candidates = [np.append(texts[p], t).astype(np.int32) for p, t in zip(parent, token, strict=True)]
        is_stop = np.isin(token, stop_tokens)
        is_last = length == request.new_tokens
        penalty = np.float32(length**beam_config.length_penalty)
        finished += [
            Hypothesis(text, float(score / penalty), bool(stop))
            for score, text, stop in zip(scores[:num_beams], candidates[:num_beams], is_stop[:num_beams], strict=True)
            if stop or is_last
        ]
        finished = sorted(finished, key=lambda f: -f.score)[:num_beams]
        running = np.flatnonzero(~is_stop)[:num_beams]
        if is_last or not len(running):
            break
        if _is_settled(finished, float(scores[running[0]]), length, request.new_tokens, beam_config):
            break
        texts = [candidates[i] for i in running]
        new_tokens = jnp.asarray(token[running, None], jnp.int32)
        beams = Beams(jnp.asarray(parent[running], jnp.int32), new_tokens, jnp.asarray(scores[running]))
        inputs = DecodeInputs(new_tokens, jnp.full(new_tokens.shape, len(request.prompt) + length - 1, jnp.int32))
    return finished


def _is_settled(
    finished: list[Hypothesis], best_running: float, length: int, max_length: int, beam_config: BeamConfig
) -> bool:
    """Whether no running text can still be among the best finished ones."""
    if len(finished) < beam_config.count:
        return False
    if beam_config.early_stopping is True:
        return True
    if beam_config.early_stopping == "never" and beam_config.length_penalty > 0:
        length = max_length
    return best_running / length**beam_config.length_penalty <= finished[-1].score


@partial(jax.jit, static_argnames=("config", "num_kept", "prefill"))
def _extend(
    params: Params,
    state: DecoderState,
    inputs: DecodeInputs,
    beams: Beams,
    *,
    config: ModelConfig,
    sampling: BatchedSamplingParams,
    num_kept: int,
    prefill: bool,
) -> tuple[Float[Array, " kept"], Int[Array, " kept"], DecoderState]:
    """The `num_kept` best texts that are one token longer: their sums, and beam x vocab + token of each."""
    cache, history = jax.tree.map(lambda x: x[beams.parents], state)
    num_new = jnp.full(len(beams.parents), beams.new_tokens.shape[1])
    history = append_tokens(history, beams.new_tokens, num_new)
    logits, cache = next_token_logits(config, params, inputs, cache, prefill)
    repeated = jax.tree.map(lambda x: jnp.repeat(x, len(beams.parents), 0), sampling)
    logprobs = process_logits(jax.nn.log_softmax(logits), repeated, history)
    scores, index = jax.lax.top_k((beams.scores[:, None] + logprobs).reshape(-1), num_kept)
    return scores, index, DecoderState(cache, history)
