"""The model: token and position embedding, a stack of blocks, and a head for tokens or classes.

`GPT(config).apply({"params": p}, tokens)` returns logits; pass `rngs={"dropout": key}` to train with dropout. The
weights of all layers are stacked along a leading "layers" axis, so that scan and unrolled layers share one checkpoint.
"""

import dataclasses
import functools
from operator import itemgetter
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from jax import Array
from jaxtyping import Bool, Float, Int

from gptjax.config import ModelConfig
from gptjax.model import matmul, ops
from gptjax.model.attention import CacheView, KVCache
from gptjax.model.axes import Axes
from gptjax.model.block import Block, Dropout, Norm
from gptjax.model.matmul import AnyArray
from gptjax.model.positions import AttentionMask, rope_table
from gptjax.model.weights import TOKEN_EMBEDDING, AxisNamed, declare
from gptjax.sharding import constrain

REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Embedding(nn.Module):
    """Token embeddings, learned position embeddings, and the output head for tokens if it is not tied.

    A classifier has no output head for tokens, as nothing would train it.
    """

    config: ModelConfig

    def setup(self) -> None:
        config = self.config
        init = nn.initializers.normal(config.init_std)
        self.tokens = declare(self, TOKEN_EMBEDDING, ("vocab", "embed"), init)
        if config.positions == "learned":
            self.positions = declare(self, "positions", ("positions", "embed"), init)
        predicts_tokens = config.num_classes == 0
        if predicts_tokens and not config.tie_embeddings:
            self.head = declare(self, "head", ("embed", "vocab"), init)
        if config.embedding_norm:
            self.norm = Norm(config)
        if predicts_tokens and config.head == "mlm":
            matrix = nn.initializers.normal(config.mup_init_std)
            self.transform = declare(self, "transform", ("embed", "features"), matrix)
            self.transform_bias = declare(self, "transform_bias", ("features",), nn.initializers.zeros)
            self.transform_norm = Norm(config)
            self.head_bias = declare(self, "head_bias", ("vocab",), nn.initializers.zeros)

    def embed(
        self, tokens: Int[AnyArray, "batch length"], positions: Int[AnyArray, "*batch length"]
    ) -> Float[Array, "batch length embed"]:
        """The input of the first block. `positions`: [length] or [batch, length]."""
        config = self.config
        x = matmul.lookup(self.tokens, tokens).astype(config.dtype)
        if config.positions == "learned":
            x = x + self.positions[positions]
        return self.norm(x) if config.embedding_norm else x

    def unembed(self, x: Float[Array, "batch length embed"]) -> Float[Array, "batch length vocab"]:
        """Logits in float32."""
        config = self.config
        if config.head == "mlm":
            x = ops.activate(config.ffn, matmul.linear(x, self.transform, self.transform_bias))
            x = self.transform_norm(x)
        if config.mup_base_width:
            x = x / config.width_multiplier
        logits = matmul.logits(x, self.tokens, None if config.tie_embeddings else self.head)
        return logits + self.head_bias.astype(jnp.float32) if config.head == "mlm" else logits


class Classifier(nn.Module):
    """The classification head: one linear layer, applied to every token.

    It is a module outside the embedding, so that layer-wise learning rates and patterns of frozen weights treat it as
    the top of the model.
    """

    config: ModelConfig

    def setup(self) -> None:
        self.weight = declare(self, "weight", ("embed", "classes"), nn.initializers.normal(self.config.init_std))
        self.bias = declare(self, "bias", ("classes",), nn.initializers.zeros)

    def __call__(self, x: Float[Array, "batch length embed"]) -> Float[Array, "batch length classes"]:
        """Logits in float32."""
        return matmul.linear(x.astype(jnp.float32) / self.config.width_multiplier, self.weight, self.bias)


class GPT(nn.Module):
    """A decoder-only transformer, or an encoder if `config.causal` is False."""

    config: ModelConfig

    def setup(self) -> None:
        config = self.config
        self.embedding = Embedding(config)
        self.dropout = Dropout(config.dropout)
        block = Block
        if config.remat != "none":
            unrolled = config.layers == "unrolled"
            block = nn.remat(Block, policy=REMAT_POLICIES[config.remat], prevent_cse=unrolled)
        self.blocks = nn.scan(
            block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=config.num_layers,
            unroll=config.num_layers if config.layers == "unrolled" else 1,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(config)
        if config.norm_placement == "pre":
            self.final_norm = Norm(config)
        if config.num_classes:
            self.classifier = Classifier(config)

    def __call__(
        self,
        tokens: Int[AnyArray, "batch length"],
        positions: Int[AnyArray, "batch length"] | None = None,
        segment_ids: Int[AnyArray, "batch length"] | None = None,
        prefix_mask: Bool[AnyArray, "batch length"] | None = None,
    ) -> Float[Array, "batch length outputs"]:
        """Logits in float32, for all tokens of the vocabulary or for the classes of a classifier.

        `positions` count within documents and `segment_ids` number the documents; None: one document per row.
        `prefix_mask`: tokens that earlier tokens of their document may attend to as well; None: none.
        """
        return self.logits(self.hidden_states(tokens, positions, segment_ids, prefix_mask))

    def hidden_states(
        self,
        tokens: Int[AnyArray, "batch length"],
        positions: Int[AnyArray, "batch length"] | None = None,
        segment_ids: Int[AnyArray, "batch length"] | None = None,
        prefix_mask: Bool[AnyArray, "batch length"] | None = None,
    ) -> Float[Array, "batch length embed"]:
        """The input of the head; arguments as above."""
        config = self.config
        index = jnp.arange(tokens.shape[1])
        if positions is None:
            positions = index
        x = constrain(self.dropout(self.embedding.embed(tokens, positions)), "batch", "length", "features")
        rope = rope_table(config, positions) if config.positions == "rope" else None
        x, _ = self.blocks(x, rope, AttentionMask(index, index, segment_ids, segment_ids, prefix_mask))
        return self.final_norm(x) if config.norm_placement == "pre" else x

    def logits(self, x: Float[Array, "batch length embed"]) -> Float[Array, "batch length outputs"]:
        """Logits in float32, of hidden states."""
        if self.config.num_classes:
            logits, axis = self.classifier(x), "classes"
        else:
            logits, axis = self.embedding.unembed(x), "vocab"
        return constrain(ops.softcap(logits, self.config.logit_softcap), "batch", "length", axis)


Params = dict[str, Any]  # nested dicts of arrays
Cache = tuple[KVCache, ...]  # one for each layer


def init_params(config: ModelConfig, key: Array) -> Params:
    """Random weights in float32."""
    return meta.unbox(_declared(config, key))


@functools.cache
def weight_axes(config: ModelConfig) -> dict[str, "dict | Axes"]:
    """The names of the axes of every weight, in the shape of the params."""
    boxes = jax.eval_shape(lambda key: _declared(config, key), jax.random.key(0))
    return jax.tree.map(lambda box: box.axes, boxes, is_leaf=lambda x: isinstance(x, AxisNamed))


@functools.partial(jax.jit, static_argnums=0)  # traced once for all that need shapes: each trace takes 0.1 s
def _declared(config: ModelConfig, key: Array) -> Params:
    config = dataclasses.replace(config, layers="scan")  # the same weights, and less to compile
    return GPT(config).init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def decode_step(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "batch query"],
    positions: Int[Array, "batch query"],
    cache: Cache,
    prefill: bool = False,
) -> tuple[Float[Array, "batch query embed"], Cache]:
    """Appends tokens to sequences of any lengths. Returns the hidden states for `unembed`, and the new cache.

    `params` are those of `unstack_layers`. Positions increase along a row; a negative one is padding. The cache is a
    ring: the token at position p is stored in slot p mod slots. The caller makes sure that there are query - 1 slots
    more than tokens to attend to. `prefill`: the cache is empty, so the tokens, however many, attend only to each
    other.
    """
    num_slots = cache[0].keys.shape[2]
    embedding = Embedding(config)
    x = embedding.apply({"params": params["embedding"]}, tokens, jnp.maximum(positions, 0), method="embed")
    rope = rope_table(config, positions) if config.positions == "rope" else None
    last = positions.max(1, keepdims=True)
    stored = (positions >= 0) & (positions > last - num_slots)
    slots = jnp.where(stored, positions % num_slots, num_slots)
    slot_positions = last - (last - jnp.arange(num_slots)) % num_slots  # of the last token that belongs in each slot
    mask = AttentionMask(positions, positions if prefill else slot_positions)
    new_cache = []
    for layer_params, layer_cache in zip(params["blocks"], cache, strict=True):
        view = CacheView(layer_cache, slots, prefill)
        x, new_layer_cache = Block(config).apply({"params": layer_params}, x, rope, mask, view)
        new_cache.append(cast(KVCache, new_layer_cache))
    if config.norm_placement == "pre":
        x = Norm(config).apply({"params": params["final_norm"]}, x)
    return cast(Array, x), tuple(new_cache)


def unembed(
    config: ModelConfig, params: Params, x: Float[Array, "batch query embed"]
) -> Float[Array, "batch query vocab"]:
    """Logits in float32 of the hidden states that `decode_step` returned."""
    logits = Embedding(config).apply({"params": params["embedding"]}, x, method="unembed")
    return ops.softcap(cast(Array, logits), config.logit_softcap)


def unstack_layers(params: Params) -> Params:
    """The params with `blocks` as a tuple of the weights of each layer, so that no decoding step copies them."""
    num_layers = jax.tree.leaves(params["blocks"])[0].shape[0]
    layers = (jax.tree.map(itemgetter(i), params["blocks"]) for i in range(num_layers))
    return params | {"blocks": tuple(layers)}
