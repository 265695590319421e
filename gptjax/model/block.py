"""One layer: attention and an optional FFN, each with its norm, added to the residual stream."""

from flax import linen as nn
from jax import Array
from jaxtyping import Float

from gptjax.config import ModelConfig
from gptjax.model import matmul, ops
from gptjax.model.attention import Attention, CacheView, KVCache
from gptjax.model.ffn import FFN
from gptjax.model.positions import AttentionMask, RopeTable
from gptjax.model.weights import declare


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the residual stream."""

    config: ModelConfig

    def setup(self) -> None:
        config = self.config
        self.scale = declare(self, "scale", ("embed",), nn.initializers.ones)
        if config.norm == "layernorm" and config.bias:
            self.bias = declare(self, "bias", ("embed",), nn.initializers.zeros)

    def __call__(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch embed"]:
        """The normalized x, in x's dtype."""
        config = self.config
        if config.norm == "rmsnorm":
            return ops.rms_norm(x, self.scale, config.norm_epsilon)
        return ops.layer_norm(x, self.scale, self.bias if config.bias else None, config.norm_epsilon)


class Dropout(nn.Module):
    """Dropout if the caller passes a "dropout" key, which is in training only."""

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, " batch *shape"]) -> Float[Array, " batch *shape"]:
        """x with a fraction of its elements set to zero."""
        if not self.rate or not self.has_rng("dropout"):
            return x
        return ops.dropout(x, self.make_rng("dropout"), self.rate)


class Block(nn.Module):
    """pre: x + f(norm(x)); post: norm(x + f(x)); f is attention, then the FFN, or both in parallel."""

    config: ModelConfig

    def setup(self) -> None:
        config = self.config
        self.attention_norm = Norm(config)
        self.attention = Attention(config)
        if config.ffn != "none":
            self.ffn_norm = Norm(config)
            self.ffn = FFN(config)
        self.dropout = Dropout(config.dropout)

    def __call__(
        self,
        x: Float[Array, "batch query embed"],
        rope: RopeTable | None,
        mask: AttentionMask,
        cache: CacheView | None = None,
    ) -> tuple[Float[Array, "batch query embed"], KVCache | None]:
        """x after this layer, and the layer's new cache: the body of the scan over layers."""
        pre_norm = self.config.norm_placement == "pre"
        attended, new_cache = self.attention(self.attention_norm(x) if pre_norm else x, rope, mask, cache)
        if self.config.parallel_residual:
            x = x + self.dropout(attended) + self.dropout(self.ffn(self.ffn_norm(x)))
            return matmul.gradient_barrier(x), new_cache
        x = matmul.gradient_barrier(x + self.dropout(attended))
        if not pre_norm:
            x = self.attention_norm(x)
        if self.config.ffn == "none":
            return x, new_cache
        x = matmul.gradient_barrier(x + self.dropout(self.ffn(self.ffn_norm(x) if pre_norm else x)))
        return (x if pre_norm else self.ffn_norm(x)), new_cache
