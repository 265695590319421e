"""The math of a GPT as pure functions of arrays. The modules declare weights and call these functions.

In shapes, `query` and `key` are numbers of tokens, `heads` and `kv_heads` numbers of heads. Reductions that would lose
precision (norms, softmax, cross-entropy) run in float32 whatever the dtype of the inputs is.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from gptjax.model.matmul import AnyArray, barrier, einsum_f32
from gptjax.sharding import global_row_index


def layer_norm(
    x: Float[Array, "*batch embed"],
    scale: Float[Array, " embed"],
    bias: Float[Array, " embed"] | None,
    epsilon: float,
) -> Float[Array, "*batch embed"]:
    """Zero mean and unit variance over the last axis, then scale and bias (Ba et al. 2016). Keeps x's dtype."""
    return _norm(epsilon, True, x, scale, bias)


def rms_norm(
    x: Float[Array, "*batch embed"], scale: Float[Array, " embed"], epsilon: float
) -> Float[Array, "*batch embed"]:
    """Unit root mean square over the last axis, then scale (Zhang & Sennrich 2019). Keeps x's dtype."""
    return _norm(epsilon, False, x, scale, None)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _norm(epsilon: float, center: bool, x: Array, scale: Array, bias: Array | None) -> Array:
    """Saves x and two numbers per row for the backward pass, and recomputes there all that is as large as x."""
    return _norm_forward(epsilon, center, x, scale, bias)[0]


class _NormResiduals(NamedTuple):
    """What the backward pass of a norm needs."""

    x: Array
    mean: Array | None
    inverse_std: Array  # 1 / sqrt(variance), or 1 / sqrt(mean square)
    scale: Array
    bias: Array | None

    def normalized(self) -> Array:
        """x before scale and bias: float32."""
        x = self.x.astype(jnp.float32)
        if self.mean is not None:
            x = x - self.mean
        return x * self.inverse_std


def _norm_forward(
    epsilon: float, center: bool, x: Array, scale: Array, bias: Array | None
) -> tuple[Array, _NormResiduals]:
    y = x.astype(jnp.float32)
    mean = barrier(y.mean(-1, keepdims=True)) if center else None
    variance = jnp.square(y if mean is None else y - mean).mean(-1, keepdims=True)
    residuals = _NormResiduals(x, mean, barrier(jax.lax.rsqrt(variance + epsilon)), scale, bias)
    y = residuals.normalized() * scale.astype(jnp.float32)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y.astype(x.dtype), residuals


def _norm_backward(
    epsilon: float, center: bool, residuals: _NormResiduals, dy: Array
) -> tuple[Array, Array, Array | None]:
    x, _, inverse_std, scale, bias = residuals
    dy = dy.astype(jnp.float32)
    normalized = residuals.normalized()
    rows = tuple(range(dy.ndim - 1))
    d_normalized = dy * scale
    dx = d_normalized - normalized * barrier((d_normalized * normalized).mean(-1, keepdims=True))
    if center:
        dx = dx - barrier(d_normalized.mean(-1, keepdims=True))
    dx = inverse_std * dx
    d_scale = (dy * normalized).sum(rows).astype(scale.dtype)
    d_bias = None if bias is None else dy.sum(rows).astype(bias.dtype)
    return dx.astype(x.dtype), d_scale, d_bias


_norm.defvjp(_norm_forward, _norm_backward)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # Primer (So et al. 2021)
    "swiglu": jax.nn.silu,  # of the gate (Shazeer 2020)
    "geglu": lambda x: jax.nn.gelu(x, approximate=True),  # of the gate
}


def activate(name: str, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """An activation, computed in float32 and returned in x's dtype. The backward pass recomputes it from x."""
    return jax.checkpoint(lambda x: ACTIVATIONS[name](x.astype(jnp.float32)).astype(x.dtype))(x)


def softcap(x: Float[Array, "*shape"], cap: float | None) -> Float[Array, "*shape"]:
    """`cap tanh(x / cap)`: never beyond +-cap (Gemma 2). None returns x."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def dropout(x: Float[Array, " rows *shape"], key: Array, rate: float) -> Float[Array, " rows *shape"]:
    """Sets a fraction of x to zero and scales the rest up, so that the mean does not change.

    One random byte decides each element, as in FlashAttention: the fraction is `rate` to the nearest 1/256, and the
    scale is exact for that. Random numbers of 32 bits would cost as much as the rest of attention on a CPU. Each row
    has its own key, so that it drops the same elements on whichever core it is.
    """
    keys = jax.vmap(partial(jax.random.fold_in, key))(global_row_index(x.shape[0]))
    words = jax.vmap(lambda key: jax.random.bits(key, (*x.shape[1:-1], -(-x.shape[-1] // 4)), jnp.uint32))(keys)
    random_bytes = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]
    dropped = round(rate * 256)
    return jnp.where(random_bytes >= dropped, x * (256 / (256 - dropped)), jnp.zeros_like(x))


def attention(
    query: Float[Array, "batch query heads head_dim"],
    key: Float[Array, "batch key kv_heads head_dim"],
    value: Float[Array, "batch key kv_heads head_dim"],
    *,
    mask: Bool[Array, "#batch 1 query key"] | None,
    bias: Float[Array, "#batch heads query key"] | None = None,
    cap: float | None = None,
    dropout_factors: Float[Array, "batch heads query key"] | None = None,
) -> Float[Array, "batch query heads head_dim"]:
    """Softmax attention, in the query's dtype.

    kv_heads divides heads: head n reads key/value head n // (heads / kv_heads). `mask` is true where a query attends to
    a key; a query that attends to no key gets the mean of the values. `bias` is added to the scores. The attention
    weights are multiplied by `dropout_factors`, which get no gradient.
    """
    return _attend(cap, query, key, value, _ScoreModifiers(mask, bias, dropout_factors))


class _ScoreModifiers(NamedTuple):
    """What changes scores and attention weights."""

    mask: Array | None
    bias: Array | None
    dropout_factors: Array | None

    def modify(self, scores: Array) -> Array:
        """Scores [batch, heads, query, key] with bias and mask."""
        if self.bias is not None:
            scores = scores + self.bias
        return scores if self.mask is None else jnp.where(self.mask, scores, jnp.finfo(jnp.float32).min)

    def drop(self, weights: Array) -> Array:
        """Attention weights [batch, heads, query, key], or their gradient, with dropout."""
        return weights if self.dropout_factors is None else weights * self.dropout_factors


class _AttentionResiduals(NamedTuple):
    """What the backward pass of attention needs."""

    query: Array
    key: Array
    value: Array
    modifiers: _ScoreModifiers
    exp_scores: Array  # e^(score - largest score of the row), [batch, heads, query, key]
    total: Array  # their sum over keys, [batch, heads, query, 1]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(cap: float | None, query: Array, key: Array, value: Array, modifiers: _ScoreModifiers) -> Array:
    """Divides by the softmax's sum after the product with the values, which has fewer elements than the weights.

    The backward pass does the same, as in FlashAttention (Dao et al. 2022): half the passes over the scores.
    """
    return _attend_forward(cap, query, key, value, modifiers)[0]


def _attend_forward(
    cap: float | None, query: Array, key: Array, value: Array, modifiers: _ScoreModifiers
) -> tuple[Array, _AttentionResiduals]:
    scores = modifiers.modify(_scores(cap, query, key))
    exp_scores = jnp.exp(scores - scores.max(-1, keepdims=True))
    total = exp_scores.sum(-1, keepdims=True)
    y = _weighted_values(modifiers.drop(exp_scores).astype(value.dtype), value) / total
    residuals = _AttentionResiduals(query, key, value, modifiers, exp_scores, total)
    return y.astype(query.dtype).swapaxes(1, 2), residuals


def _attend_backward(
    cap: float | None, residuals: _AttentionResiduals, dy: Array
) -> tuple[Array | _ScoreModifiers, ...]:
    query, key, value, modifiers, exp_scores, total = residuals
    _, values_vjp = jax.vjp(_weighted_values, modifiers.drop(exp_scores).astype(value.dtype), value)
    d_weights, d_value = values_vjp(dy.swapaxes(1, 2).astype(jnp.float32) / total)
    d_weights = modifiers.drop(d_weights.astype(jnp.float32))
    d_scores = exp_scores * (d_weights - (exp_scores * d_weights).sum(-1, keepdims=True) / total)
    if modifiers.mask is not None:
        d_scores = jnp.where(modifiers.mask, d_scores, 0)
    _, scores_vjp = jax.vjp(partial(_scores, cap), query, key)
    d_bias = None
    if modifiers.bias is not None:
        _, bias_vjp = jax.vjp(lambda bias: jnp.broadcast_to(bias.astype(jnp.float32), d_scores.shape), modifiers.bias)
        (d_bias,) = bias_vjp(d_scores)
    return *scores_vjp(d_scores), d_value, _ScoreModifiers(None, d_bias, None)


_attend.defvjp(_attend_forward, _attend_backward)


def _scores(cap: float | None, query: Array, key: Array) -> Array:
    """[batch, query, heads, head_dim] with [batch, key, kv_heads, head_dim] -> float32 [batch, heads, query, key].

    The queries that share a key head are rows of one matrix, so that this is one plain batched product.
    """
    query, key = (query * query.shape[-1] ** -0.5).swapaxes(1, 2), key.swapaxes(1, 2)
    rows = query.reshape(*key.shape[:2], -1, query.shape[-1])
    scores = einsum_f32("bmrh,bmkh->bmrk", rows, key, jnp.float32)
    return softcap(scores, cap).reshape(*query.shape[:3], -1)


def _weighted_values(weights: Array, value: Array) -> Array:
    """[batch, heads, query, key] with [batch, key, kv_heads, head_dim] -> float32 [batch, heads, query, head_dim]."""
    value = value.swapaxes(1, 2)
    rows = weights.reshape(*value.shape[:2], -1, weights.shape[-1])
    return einsum_f32("bmrk,bmkh->bmrh", rows, value, jnp.float32).reshape(*weights.shape[:3], -1)


def cross_entropy(
    logits: Float[AnyArray, "*batch vocab"], targets: Int[AnyArray, "*batch"]
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    """The negative log-likelihood of each target in nats, and log Z; both float32.

    A masked sum selects the target's logit. Unlike a gather it works if the vocabulary is sharded.
    """
    logits = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, -1)
    is_target = jnp.arange(logits.shape[-1]) == jnp.asarray(targets)[..., None]
    return log_z - jnp.where(is_target, logits, 0).sum(-1), log_z
