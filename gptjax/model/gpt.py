"""The whole model: token and position embedding, a stack of blocks, a head.

`GPT(config).apply({"params": p}, tokens)` gives logits; pass `rngs={"dropout": key}` to train with dropout. The weights
of all layers are stacked along a leading "layers" axis, so that scan and unrolled depth share one checkpoint.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from jax import Array

from gptjax import config
from gptjax.model import ops
from gptjax.model.attention import KVCache
from gptjax.model.block import Block, Dropout, Norm
from gptjax.model.weights import Axes, Declared, declare
from gptjax.sharding import constrain

REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Embedding(nn.Module):
    """Token table, learned position table where there is one, and the head where it is not tied."""

    config: config.Model

    def setup(self) -> None:
        m = self.config
        init = nn.initializers.normal(m.init_std)
        self.tokens = declare(self, "tokens", ("vocab", "embed"), init)
        if m.positions == "learned":
            self.positions = declare(self, "positions", ("positions", "embed"), init)
        if not m.tie_embeddings:
            self.head = declare(self, "head", ("embed", "vocab"), init)

    def encode(self, tokens: Array, positions: Array) -> Array:
        """int32 tokens [B, Q] and positions [Q] or [B, Q] -> [B, Q, embed]."""
        x = self.tokens[tokens]
        return x + self.positions[positions] if self.config.positions == "learned" else x

    def decode(self, x: Array) -> Array:
        """[B, Q, embed] -> float32 logits [B, Q, vocab]."""
        if self.config.tie_embeddings:
            return jnp.einsum("bqe,ve->bqv", x, self.tokens, preferred_element_type=jnp.float32)
        return jnp.einsum("bqe,ev->bqv", x, self.head, preferred_element_type=jnp.float32)


class GPT(nn.Module):
    """A decoder-only transformer, or an encoder where `config.causal` is False."""

    config: config.Model

    def setup(self) -> None:
        m = self.config
        self.embedding = Embedding(m)
        self.dropout = Dropout(m.dropout)
        block = Block
        if m.remat != "none":
            block = nn.remat(Block, policy=REMAT_POLICIES[m.remat], prevent_cse=m.layers == "unrolled")
        self.blocks = nn.scan(
            block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=m.num_layers,
            unroll=m.num_layers if m.layers == "unrolled" else 1,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(m)
        if m.norm_placement == "pre":
            self.final_norm = Norm(m)

    def __call__(self, tokens: Array, positions: Array | None = None, segments: Array | None = None) -> Array:
        """int32 tokens [B, L] -> float32 logits [B, L, vocab].

        `positions` [B, L] counts within documents and `segments` [B, L] numbers them; None: one document a row.
        """
        places = jnp.arange(tokens.shape[1])
        x, _ = self.features(
            tokens, places if positions is None else positions, ops.Sight(places, places, segments, segments)
        )
        return self.logits(x)

    def decode(self, tokens: Array, cache: KVCache, start: Array) -> tuple[Array, KVCache]:
        """Continues a text: tokens [B, Q] stand at places start, start + 1, ...; the cache holds what came before.

        Returns float32 logits [B, Q, vocab] and the cache with these tokens in it. The caller makes sure that
        start + Q is no more than the cache is long.
        """
        places = start + jnp.arange(tokens.shape[1])
        sight = ops.Sight(places, jnp.arange(cache.keys.shape[2]))
        x, grown = self.features(tokens, places, sight, cache)
        assert grown is not None
        return self.logits(x), grown

    def features(
        self, tokens: Array, positions: Array, sight: ops.Sight, cache: KVCache | None = None
    ) -> tuple[Array, KVCache | None]:
        """tokens [B, Q] -> what the head reads, [B, Q, embed], and the cache."""
        m = self.config
        x = constrain(self.dropout(self.embedding.encode(tokens, positions)), "batch", "length", "features")
        rope = ops.rope_table(m, positions) if m.positions == "rope" else None
        x, cache = self.blocks(x, cache, rope, sight)
        return (self.final_norm(x) if m.norm_placement == "pre" else x), cache

    def logits(self, x: Array) -> Array:
        """[B, Q, embed] -> float32 [B, Q, vocab]."""
        return constrain(ops.softcap(self.embedding.decode(x), self.config.logit_softcap), "batch", "length", "vocab")


Params = dict[str, "Params | Array"]


def init_params(model: config.Model, key: Array) -> Params:
    """Random weights: float32 arrays in a nested dict."""
    return meta.unbox(_declared(model, key))


@functools.cache
def weight_axes(model: config.Model) -> dict[str, "dict | Axes"]:
    """The names of the axes of every weight, in the shape of the params."""
    boxes = jax.eval_shape(lambda key: _declared(model, key), jax.random.key(0))
    return jax.tree.map(lambda box: box.axes, boxes, is_leaf=lambda x: isinstance(x, Declared))


def _declared(model: config.Model, key: Array) -> Params:
    model = dataclasses.replace(model, layers="scan")  # the same weights, and less to compile
    return GPT(model).init(key, jnp.zeros((1, 1), jnp.int32))["params"]
