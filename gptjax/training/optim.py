"""Optimizers, schedules and weight averages: `make_optimizer` turns `OptimConfig` into one optax transformation.

The weights of all layers are stacked, and attention heads have an axis of their own. Optimizers that treat a weight as
a matrix (Muon, Adafactor) find its rows, columns and layers by the names of its axes.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from optax import contrib

from gptjax.config import Experiment, OptimConfig
from gptjax.errors import ConfigError
from gptjax.model.axes import AXES, Axes, axis_sizes
from gptjax.model.gpt import weight_axes
from gptjax.model.weights import in_output_head, is_matrix, matches

Tree = Any  # params, or anything in their shape


def make_optimizer(experiment: Experiment) -> optax.GradientTransformation:
    """Clipping, the update rule with decoupled weight decay on matrices, the schedule, and the EMA of the weights."""
    o = experiment.optim
    trainable = trainable_mask(experiment)
    axes = select_trainable(weight_axes(experiment.model), trainable)
    clipped = o.noise_multiplier is not None  # DP-SGD has clipped each window's gradient
    parts = [clip(o.clip_norm)] if o.clip_norm and not clipped else []
    wider = experiment.model.width_multiplier if experiment.model.mup_base_width else None
    parts.append(_update_rule(o, make_schedule(o, experiment.train.steps), axes, wider))
    if o.layer_decay != 1:
        parts.append(layerwise_lr_decay(o.layer_decay, axes, experiment.model.num_layers))
    if o.ema_decay:
        parts.append(ema(o.ema_decay))
    return masked(optax.chain(*parts), trainable)


def trainable_mask(experiment: Experiment) -> Tree:
    """True for trainable weights: all that match no pattern of `optim.freeze`; with LoRA only the new weights.

    Raises `ConfigError` for a pattern that no weight matches, and if no weight is trainable.
    """
    freeze, lora = experiment.optim.freeze, experiment.model.lora_rank > 0
    unused = set(freeze)

    def trainable(path: tuple[Any, ...], _: Axes) -> bool:
        keys = [part.key for part in path]
        name = ".".join(keys)
        matched = {pattern for pattern in freeze if matches(pattern, keys)}
        unused.difference_update(matched)
        new = "_lora_" in name or name.startswith("classifier.")
        return (new or not lora) and not matched

    chosen = jax.tree.map_with_path(trainable, weight_axes(experiment.model), is_leaf=_is_axes)
    if unused:
        raise ConfigError([f"optim.freeze: no weight is called {min(unused)!r}; there is blocks.ffn.up, for instance"])
    if not any(jax.tree.leaves(chosen)):
        raise ConfigError([f"optim.freeze = {freeze}: leaves no trainable weights; freeze fewer"])
    return chosen


def num_trainable(experiment: Experiment) -> int:
    """The number of trainable parameters of a resolved experiment."""
    sizes = axis_sizes(experiment.model)
    trainable = select_trainable(weight_axes(experiment.model), trainable_mask(experiment))
    return sum(math.prod(sizes[name] for name in names) for names in jax.tree.leaves(trainable, is_leaf=_is_axes))


def select_trainable(tree: Tree, trainable: Tree) -> Tree:
    """A tree like the weights, with None for frozen weights."""
    return jax.tree.map(lambda chosen, x: x if chosen else None, trainable, tree)


def masked(inner: optax.GradientTransformation, trainable: Tree) -> optax.GradientTransformation:
    """A transformation of the trainable weights alone: frozen weights have no moments and no updates."""
    if all(jax.tree.leaves(trainable)):
        return inner

    def update(updates: Tree, state: Tree, params: Tree | None = None) -> tuple[Tree, Tree]:
        own_params = None if params is None else select_trainable(params, trainable)
        new, state = inner.update(select_trainable(updates, trainable), state, own_params)
        return jax.tree.map(lambda u, n: jnp.zeros_like(u) if n is None else n, updates, new), state

    return optax.GradientTransformation(lambda params: inner.init(select_trainable(params, trainable)), update)


def clip(norm: float) -> optax.GradientTransformation:
    """Scales gradients by one factor to a global norm of at most `norm` (Pascanu et al. 2013).

    optax divides every number by the norm, which makes XLA write a second copy of the gradients.
    """

    def scaled(updates: Tree, _: Tree) -> Tree:
        factor = norm / jnp.maximum(optax.tree.norm(updates), norm)
        return jax.tree.map(lambda x: x * factor, updates)

    return optax.stateless(scaled)


def layerwise_lr_decay(decay: float, axes: Tree, num_layers: int) -> optax.GradientTransformation:
    """Layer-wise learning rates (Howard & Ruder 2018).

    Multiplies the updates of layer i of n by `decay` ** (n - 1 - i), and those of the embedding by `decay` ** n.
    """

    def scale(path: tuple[Any, ...], names: Axes, update: Array) -> Array:
        if names[0] == "layers":
            factors = decay ** jnp.arange(num_layers - 1, -1, -1.0)
            return update * factors.reshape(-1, *[1] * (update.ndim - 1))
        is_input = path[0].key == "embedding" and not in_output_head([part.key for part in path])
        return update * decay**num_layers if is_input else update

    return optax.stateless(lambda updates, _: jax.tree.map_with_path(scale, axes, updates, is_leaf=_is_axes))


def mup_scale(wider: float, axes: Tree) -> optax.GradientTransformation:
    """The learning rates of muP for Adam (Yang et al. 2022, table 8).

    Divides the updates of matrices whose two sides both grow with the width by the width multiplier. Weight decay is
    applied later and does not depend on the width.
    """

    def scale(names: Axes, update: Array) -> Array:
        growing = [name for name in names if AXES[name].scales_with_width]
        return update / wider if len(growing) > 1 else update

    return optax.stateless(lambda updates, _: jax.tree.map(scale, axes, updates, is_leaf=_is_axes))


def make_schedule(o: OptimConfig, steps: int) -> optax.Schedule:
    """The learning rate as a function of the updates taken before: linear warmup to the peak, then the chosen decay.

    Skipped updates do not count. The first update has rate peak / (warmup + 1), the last one the final rate. WSD decays
    like 1 - sqrt over the last `cooldown_fraction` of the run (Haegele et al. 2024).
    """
    peak, final = o.learning_rate, o.final_learning_rate

    def rate(step: Array | int) -> Array:
        warm = (step + 1) / (o.warmup_steps + 1)
        progress = jnp.clip((step - o.warmup_steps) / max(1, steps - 1 - o.warmup_steps), 0, 1)
        if o.schedule == "cosine":
            left = 0.5 * (1 + jnp.cos(math.pi * progress))
        elif o.schedule == "linear":
            left = 1 - progress
        elif o.schedule == "wsd":
            cooldown = max(1, round(o.cooldown_fraction * steps))
            left = 1 - jnp.sqrt(jnp.clip((step - (steps - 1 - cooldown)) / cooldown, 0, 1))
        else:
            left = jnp.ones_like(progress)
        return jnp.where(step < o.warmup_steps, peak * warm, final + (peak - final) * left)

    return rate


def updates_taken(opt_state: Tree) -> Array:
    """The number of updates taken, int32: the counter of the schedule. Skipped steps do not change it."""
    kind = optax.ScaleByScheduleState
    states = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kind))
    return next(s.count for s in states if isinstance(s, kind))


def _update_rule(
    o: OptimConfig, rate: optax.Schedule, axes: Tree, wider: float | None = None
) -> optax.GradientTransformation:
    matrices = weight_decay_mask(axes)
    decay = optax.add_decayed_weights(o.weight_decay, matrices) if o.weight_decay else optax.identity()
    step = optax.scale_by_learning_rate(rate)
    if o.name in ("adamw", "lion"):
        direction = (
            optax.scale_by_adam(o.beta1, o.beta2, o.epsilon)
            if o.name == "adamw"
            else optax.scale_by_lion(o.beta1, o.beta2)
        )
        scaled = [mup_scale(wider, axes)] if wider is not None else []
        return optax.chain(direction, *scaled, decay, step)
    if o.name == "sgd":
        return optax.chain(optax.trace(o.beta1) if o.beta1 else optax.identity(), decay, step)
    if o.name == "adafactor":
        factored = per_layer(optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)), axes)
        return optax.chain(factored, decay, step)
    if o.name == "muon":
        directions = contrib.muon(  # at rate 1: weight decay and schedule are those of all optimizers
            1.0,
            beta=o.beta1,
            adam_b1=o.beta1,
            adam_b2=o.beta2,
            muon_weight_dimension_numbers=muon_dimensions(axes),
            consistent_rms=0.2,  # updates as large as AdamW's: one learning rate serves both (Liu et al. 2025)
        )
        return optax.chain(directions, optax.scale(-1.0), decay, step)
    base = optax.chain(optax.scale_by_adam(0.0, o.beta2, o.epsilon), decay, step)
    return contrib.schedule_free(base, rate, b1=o.beta1)


def weight_decay_mask(axes: Tree) -> Tree:
    """True for weights with weight decay: matrices and embeddings, not biases and scales."""
    return jax.tree.map_with_path(lambda path, _: is_matrix(path[-1].key), axes, is_leaf=_is_axes)


def muon_dimensions(axes: Tree) -> Tree:
    """Rows and columns of every hidden matrix; None, which means AdamW, for embeddings, the head and vectors."""

    def dimensions(path: tuple[Any, ...], names: Axes) -> contrib.MuonDimensionNumbers | None:
        if names[0] != "layers" or not is_matrix(path[-1].key):
            return None
        sides = [[names.index(name) for name in group] for group in _sides(names[1:])]
        return contrib.MuonDimensionNumbers(reduction_axis=tuple(sides[0]), output_axis=tuple(sides[1]))

    return jax.tree.map_with_path(dimensions, axes, is_leaf=_is_axes)


def per_layer(inner: optax.GradientTransformation, axes: Tree) -> optax.GradientTransformation:
    """Applies a transformation to each layer separately, as matrices and vectors: the axes of a head are joined."""

    def join(tree: Tree) -> Tree:
        def one(names: Axes, x: Array) -> Array:
            sizes = dict(zip(names, x.shape, strict=True))
            return x.reshape([math.prod(sizes[name] for name in group) for group in _sides(names)])

        return jax.tree.map(one, axes, tree, is_leaf=_is_axes)

    stacked = optax.GradientTransformation(jax.vmap(inner.init), jax.vmap(inner.update))
    labels = jax.tree.map(lambda names: "stacked" if names[0] == "layers" else "single", axes, is_leaf=_is_axes)
    both = optax.partition({"stacked": stacked, "single": inner}, labels)

    def update(updates: Tree, state: Tree, params: Tree | None = None) -> tuple[Tree, Tree]:
        out, state = both.update(join(updates), state, None if params is None else join(params))
        return jax.tree.map(lambda x, like: x.reshape(like.shape), out, updates), state

    return optax.GradientTransformation(lambda params: both.init(join(params)), update)


def _sides(names: Axes) -> list[list[str]]:
    """The axes of a weight in groups (layers, rows, columns); a group has both axes of attention heads."""
    groups: list[list[str]] = []
    for name in names:
        if name == "head_dim" and groups and AXES[groups[-1][0]].counts_heads:
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups


def _is_axes(x: Any) -> bool:
    return isinstance(x, tuple)


class EmaState(NamedTuple):
    """The exponential moving average of the weights."""

    params: Tree


def ema(decay: float) -> optax.GradientTransformation:
    """Keeps an exponential moving average a = decay a + (1 - decay) params, starting with the initial params."""

    def update(updates: Tree, state: EmaState, params: Tree) -> tuple[Tree, EmaState]:
        moved = jax.tree.map(lambda a, p, u: decay * a + (1 - decay) * (p + u), state.params, params, updates)
        return updates, EmaState(moved)

    return optax.GradientTransformation(EmaState, update)


def evaluation_params(params: Tree, opt_state: Tree) -> Tree:
    """The weights for evaluation and sampling: the average if there is one, else the params."""
    average = _average(opt_state)
    if average is None:
        return params
    if isinstance(average, EmaState):
        found = average.params
    else:
        trainable = jax.tree.map(lambda p, z: z is not None, params, average.z)
        found = contrib.schedule_free_eval_params(average, select_trainable(params, trainable))
    return jax.tree.map(lambda p, f: p if f is None else f, params, found)  # frozen weights have no average


def evaluation_leaves(params: Tree, opt_state: Tree, unread: Any) -> tuple[Tree, Tree]:
    """The params and the optimizer state, with `unread` for every array that `evaluation_params` does not use."""
    average = _average(opt_state)
    if isinstance(average, EmaState):
        params = jax.tree.map(lambda p, a: p if a is None else unread, params, average.params)

    def used(state: Any) -> Any:
        if isinstance(state, EmaState):
            return state
        skipped = jax.tree.map(lambda _: unread, state)
        if isinstance(state, contrib.ScheduleFreeState):
            return skipped._replace(b1=state.b1, z=state.z)
        return skipped

    return params, jax.tree.map(used, opt_state, is_leaf=_is_average)


def _average(opt_state: Tree) -> EmaState | contrib.ScheduleFreeState | None:
    states = filter(_is_average, jax.tree.leaves(opt_state, is_leaf=_is_average))
    return min(states, key=lambda state: not isinstance(state, EmaState), default=None)  # an EMA comes first


def _is_average(state: Any) -> bool:
    return isinstance(state, EmaState | contrib.ScheduleFreeState)
