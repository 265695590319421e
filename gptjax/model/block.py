"""One layer: attention and, unless it has none, an FFN, each with its norm, joined to the residual stream."""

from flax import linen as nn
from jax import Array

from gptjax import config
from gptjax.model import matmul, ops
from gptjax.model.attention import Attention, CacheView, KVCache
from gptjax.model.ffn import FFN
from gptjax.model.weights import declare


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the residual stream."""

    config: config.ModelConfig

    def setup(self) -> None:
        m = self.config
        self.scale = declare(self, "scale", ("embed",), nn.initializers.ones)
        if m.norm == "layernorm" and m.bias:
            self.bias = declare(self, "bias", ("embed",), nn.initializers.zeros)

    def __call__(self, x: Array) -> Array:
        """x [..., embed] -> the same shape and dtype."""
        m = self.config
        if m.norm == "rmsnorm":
            return ops.rms_norm(x, self.scale, m.norm_epsilon)
        return ops.layer_norm(x, self.scale, self.bias if m.bias else None, m.norm_epsilon)


class Dropout(nn.Module):
    """Zeroes a share of x where the caller passes a "dropout" key, that is: in training only."""

    rate: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [rows, ...] -> the same shape."""
        return ops.dropout(x, self.make_rng("dropout"), self.rate) if self.rate and self.has_rng("dropout") else x


class Block(nn.Module):
    """pre: x + f(norm(x)); post: norm(x + f(x)); f is attention, then FFN, or both side by side."""

    config: config.ModelConfig

    def setup(self) -> None:
        m = self.config
        self.attention_norm, self.attention = Norm(m), Attention(m)
        if m.ffn != "none":
            self.ffn_norm, self.ffn = Norm(m), FFN(m)
        self.dropout = Dropout(m.dropout)

    def __call__(
        self, x: Array, rope: tuple[Array, Array] | None, sight: ops.AttentionMask, cache: CacheView | None = None
    ) -> tuple[Array, KVCache | None]:
        """x [B, Q, embed] -> (x after this layer, this layer's cache): the body of the scan over layers."""
        pre = self.config.norm_placement == "pre"
        mixed, grown = self.attention(self.attention_norm(x) if pre else x, rope, sight, cache)
        if self.config.parallel_residual:
            return matmul.gradient_barrier(x + self.dropout(mixed) + self.dropout(self.ffn(self.ffn_norm(x)))), grown
        x = matmul.gradient_barrier(x + self.dropout(mixed))
        x = x if pre else self.attention_norm(x)
        if self.config.ffn == "none":
            return x, grown
        x = matmul.gradient_barrier(x + self.dropout(self.ffn(self.ffn_norm(x) if pre else x)))
        return (x if pre else self.ffn_norm(x)), grown
