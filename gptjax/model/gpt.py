"""The whole model: token and position embedding, a stack of blocks, a head for tokens or for classes.

`GPT(config).apply({"params": p}, tokens)` gives logits; pass `rngs={"dropout": key}` to train with dropout. The weights
of all layers are stacked along a leading "layers" axis, so that scan and unrolled depth share one checkpoint.
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

from gptjax import config
from gptjax.model import matmul, ops
from gptjax.model.attention import CacheView, KVCache
from gptjax.model.block import Block, Dropout, Norm
from gptjax.model.weights import TOKEN_EMBEDDING, Axes, AxisNamed, declare
from gptjax.sharding import constrain

REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Embedding(nn.Module):
    """Token table, learned position table where there is one, and the head where it is not tied.

    A model that tells classes has no head for tokens: nothing would learn it.
    """

    config: config.ModelConfig

    def setup(self) -> None:
        m = self.config
        init = nn.initializers.normal(m.init_std)
        self.tokens = declare(self, TOKEN_EMBEDDING, ("vocab", "embed"), init)
        if m.positions == "learned":
            self.positions = declare(self, "positions", ("positions", "embed"), init)
        for_tokens = m.num_classes == 0
        if for_tokens and not m.tie_embeddings:
            self.head = declare(self, "head", ("embed", "vocab"), init)
        if m.embedding_norm:
            self.norm = Norm(m)
        if for_tokens and m.head == "mlm":
            self.transform = declare(self, "transform", ("embed", "features"), nn.initializers.normal(m.mup_init_std))
            self.transform_bias = declare(self, "transform_bias", ("features",), nn.initializers.zeros)
            self.transform_norm = Norm(m)
            self.head_bias = declare(self, "head_bias", ("vocab",), nn.initializers.zeros)

    def embed(self, tokens: Array, positions: Array) -> Array:
        """int32 tokens [B, Q] and positions [Q] or [B, Q] -> [B, Q, embed]."""
        m = self.config
        x = matmul.lookup(self.tokens, tokens).astype(m.dtype)
        x = x + self.positions[positions] if m.positions == "learned" else x
        return self.norm(x) if m.embedding_norm else x

    def unembed(self, x: Array) -> Array:
        """[B, Q, embed] -> float32 logits [B, Q, vocab]."""
        m = self.config
        if m.head == "mlm":
            x = self.transform_norm(ops.activate(m.ffn, matmul.linear(x, self.transform, self.transform_bias)))
        x = x / m.width_multiplier if m.mup_base_width else x
        logits = matmul.logits(x, self.tokens, self.head if not m.tie_embeddings else None)
        return logits + self.head_bias.astype(jnp.float32) if m.head == "mlm" else logits


class Classifier(nn.Module):
    """The head of a model that tells classes: one linear layer, read at every token.

    A module of its own beside the embedding: rates that fall from the top down and patterns of frozen weights treat it
    as what it is, the top.
    """

    config: config.ModelConfig

    def setup(self) -> None:
        self.weight = declare(self, "weight", ("embed", "classes"), nn.initializers.normal(self.config.init_std))
        self.bias = declare(self, "bias", ("classes",), nn.initializers.zeros)

    def __call__(self, x: Array) -> Array:
        """[B, Q, embed] -> float32 logits [B, Q, classes]."""
        return matmul.linear(x.astype(jnp.float32) / self.config.width_multiplier, self.weight, self.bias)


class GPT(nn.Module):
    """A decoder-only transformer, or an encoder where `config.causal` is False."""

    config: config.ModelConfig

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
            in_axes=(nn.broadcast, nn.broadcast),
            length=m.num_layers,
            unroll=m.num_layers if m.layers == "unrolled" else 1,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(m)
        if m.norm_placement == "pre":
            self.final_norm = Norm(m)
        if m.num_classes:
            self.classifier = Classifier(m)

    def __call__(
        self,
        tokens: Array,
        positions: Array | None = None,
        segments: Array | None = None,
        prefix: Array | None = None,
    ) -> Array:
        """int32 tokens [B, L] -> float32 logits [B, L, vocab], or [B, L, classes] where the model tells these.

        `positions` [B, L] counts within documents and `segments` [B, L] numbers them; None: one document a row.
        `prefix` bool [B, L]: tokens that those before them in their document see as well; None: none.
        """
        return self.logits(self.hidden_states(tokens, positions, segments, prefix))

    def hidden_states(
        self,
        tokens: Array,
        positions: Array | None = None,
        segments: Array | None = None,
        prefix: Array | None = None,
    ) -> Array:
        """All but the head, as above: -> [B, L, embed], what `logits` are made of."""
        places = jnp.arange(tokens.shape[1])
        positions = places if positions is None else positions
        m = self.config
        x = constrain(self.dropout(self.embedding.embed(tokens, positions)), "batch", "length", "features")
        rope = ops.rope_table(m, positions) if m.positions == "rope" else None
        x, _ = self.blocks(x, rope, ops.AttentionMask(places, places, segments, segments, prefix))
        return self.final_norm(x) if m.norm_placement == "pre" else x

    def logits(self, x: Array) -> Array:
        """[B, Q, embed] -> float32 [B, Q, vocab or classes]."""
        head, told = (self.classifier, "classes") if self.config.num_classes else (self.embedding.unembed, "vocab")
        return constrain(ops.softcap(head(x), self.config.logit_softcap), "batch", "length", told)


Params = dict[str, "Params | Array"]
Cache = tuple[KVCache, ...]  # one for each layer


def init_params(model: config.ModelConfig, key: Array) -> Params:
    """Random weights: float32 arrays in a nested dict."""
    return meta.unbox(_declared(model, key))


@functools.cache
def weight_axes(model: config.ModelConfig) -> dict[str, "dict | Axes"]:
    """The names of the axes of every weight, in the shape of the params."""
    boxes = jax.eval_shape(lambda key: _declared(model, key), jax.random.key(0))
    return jax.tree.map(lambda box: box.axes, boxes, is_leaf=lambda x: isinstance(x, AxisNamed))


@functools.partial(jax.jit, static_argnums=0)  # traced once for all who ask for shapes: a tenth of a second each time
def _declared(model: config.ModelConfig, key: Array) -> Params:
    model = dataclasses.replace(model, layers="scan")  # the same weights, and less to compile
    return GPT(model).init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def decode_step(
    model: config.ModelConfig, params: Any, tokens: Array, places: Array, cache: Cache, prefill: bool = False
) -> tuple[Array, Cache]:
    """Goes on with texts of any lengths: tokens [B, Q] that stand at places [B, Q] of theirs.

    Returns what `unembed` makes logits of, [B, Q, embed], and the cache with these tokens in it. `params` are those of
    `unstack_layers`. Places count up along a row; a negative one is padding. The cache rolls: the token at place p lies
    in slot p mod slots. The caller makes sure that there are Q - 1 slots more than tokens to be seen. `empty`: these
    are the first tokens, however many, and they see each other only.
    """
    m, slots = model, cache[0].keys.shape[2]
    x = Embedding(m).apply({"params": params["embedding"]}, tokens, jnp.maximum(places, 0), method="embed")
    rope = ops.rope_table(m, places) if m.positions == "rope" else None
    last = places.max(1, keepdims=True)
    kept = (places >= 0) & (places > last - slots)
    barrier = (
        last - (last - jnp.arange(slots)) % slots
    )  # the place of the token in each slot: the last that belongs there
    sight = ops.AttentionMask(places, places if prefill else barrier)
    grown = []
    for layer, before in zip(params["blocks"], cache, strict=True):
        given = CacheView(before, jnp.where(kept, places % slots, slots), prefill)
        x, after = cast(tuple[Array, KVCache], Block(m).apply({"params": layer}, x, rope, sight, given))
        grown.append(after)
    if m.norm_placement == "pre":
        x = Norm(m).apply({"params": params["final_norm"]}, x)
    return cast(Array, x), tuple(grown)


def unembed(model: config.ModelConfig, params: Any, x: Array) -> Array:
    """What `decode_step` returned, [B, Q, embed] -> float32 logits [B, Q, vocab]."""
    logits = Embedding(model).apply({"params": params["embedding"]}, x, method="unembed")
    return ops.softcap(cast(Array, logits), model.logit_softcap)


def unstack_layers(params: Any) -> Any:
    """The weights with those of each layer by themselves, `blocks` a tuple, so that no step copies any of them."""
    count = jax.tree.leaves(params["blocks"])[0].shape[0]
    layers = (jax.tree.map(itemgetter(i), params["blocks"]) for i in range(count))
    return params | {"blocks": tuple(layers)}
