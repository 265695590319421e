"""Optimisers, schedules and weight averages: `make_optimizer` turns `OptimConfig` into one optax transformation.

The weights of all layers are stacked, and heads have axes of their own, so whatever treats a weight as a matrix (Muon,
Adafactor) is told by the names of the axes what its rows, columns and layers are.
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
    """Clipping, the update rule with decoupled decay on matrices, the schedule, and the average of the weights."""
    o, learnt = experiment.optim, trained(experiment)
    axes = pick(weight_axes(experiment.model), learnt)
    clipped = o.noise_multiplier is not None  # already, window by window
    parts = [clip(o.clip_norm)] if o.clip_norm and not clipped else []
    wider = experiment.model.width_multiplier if experiment.model.mup_base_width else None
    parts.append(_update_rule(o, make_schedule(o, experiment.train.steps), axes, wider))
    if o.layer_decay != 1:
        parts.append(scale_layers(o.layer_decay, axes, experiment.model.num_layers))
    if o.ema_decay:
        parts.append(average_weights(o.ema_decay))
    return only(optax.chain(*parts), learnt)


def trained(experiment: Experiment) -> Tree:
    """True for the weights that are learnt: all that match none of `optim.freeze`; with LoRA only what is new.

    Raises `ConfigError` for a pattern that no weight matches, and where nothing is left to learn.
    """
    freeze, lora = experiment.optim.freeze, experiment.model.lora_rank > 0
    unused = set(freeze)

    def learnt(path: tuple[Any, ...], _: Axes) -> bool:
        keys = [part.key for part in path]
        name = ".".join(keys)
        matched = {pattern for pattern in freeze if matches(pattern, keys)}
        unused.difference_update(matched)
        new = "_lora_" in name or name.startswith("classifier.")
        return (new or not lora) and not matched

    chosen = jax.tree.map_with_path(learnt, weight_axes(experiment.model), is_leaf=_is_axes)
    if unused:
        raise ConfigError([f"optim.freeze: no weight is called {min(unused)!r}; there is blocks.ffn.up, for instance"])
    if not any(jax.tree.leaves(chosen)):
        raise ConfigError([f"optim.freeze = {freeze}: leaves nothing to learn; freeze less"])
    return chosen


def num_trained(experiment: Experiment) -> int:
    """How many numbers are learnt, of a resolved experiment."""
    sizes = axis_sizes(experiment.model)
    learnt = pick(weight_axes(experiment.model), trained(experiment))
    return sum(math.prod(sizes[name] for name in names) for names in jax.tree.leaves(learnt, is_leaf=_is_axes))


def pick(tree: Tree, learnt: Tree) -> Tree:
    """A tree in the shape of the weights, with nothing where they are frozen."""
    return jax.tree.map(lambda chosen, x: x if chosen else None, learnt, tree)


def only(inner: optax.GradientTransformation, learnt: Tree) -> optax.GradientTransformation:
    """A transformation that sees the weights to be learnt alone: the others have no moments and no updates."""
    if all(jax.tree.leaves(learnt)):
        return inner

    def update(updates: Tree, state: Tree, params: Tree | None = None) -> tuple[Tree, Tree]:
        moved, state = inner.update(pick(updates, learnt), state, None if params is None else pick(params, learnt))
        return jax.tree.map(lambda u, m: jnp.zeros_like(u) if m is None else m, updates, moved), state

    return optax.GradientTransformation(lambda params: inner.init(pick(params, learnt)), update)


def clip(norm: float) -> optax.GradientTransformation:
    """Gradients with a global norm of at most `norm`, all times one factor (Pascanu et al. 2013).

    optax divides every number by the norm, which makes XLA write a second copy of the gradients.
    """

    def scaled(updates: Tree, _: Tree) -> Tree:
        factor = norm / jnp.maximum(optax.tree.norm(updates), norm)
        return jax.tree.map(lambda x: x * factor, updates)

    return optax.stateless(scaled)


def scale_layers(decay: float, axes: Tree, num_layers: int) -> optax.GradientTransformation:
    """Updates of layer i of n times `decay` ** (n - 1 - i), those of the embedding times `decay` ** n.

    Rates that fall from the top down (Howard & Ruder 2018).
    """

    def scale(path: tuple[Any, ...], names: Axes, update: Array) -> Array:
        if names[0] == "layers":
            factors = decay ** jnp.arange(num_layers - 1, -1, -1.0)
            return update * factors.reshape(-1, *[1] * (update.ndim - 1))
        is_input = path[0].key == "embedding" and not in_output_head([part.key for part in path])
        return update * decay**num_layers if is_input else update

    return optax.stateless(lambda updates, _: jax.tree.map_with_path(scale, axes, updates, is_leaf=_is_axes))


def scale_hidden(wider: float, axes: Tree) -> optax.GradientTransformation:
    """Updates of matrices whose two sides both grow with the width, over how many times wider the model is.

    The rates of muP for Adam (Yang et al. 2022, table 8); decay, which comes after, stays the same at every width.
    """

    def scale(names: Axes, update: Array) -> Array:
        growing = [name for name in names if AXES[name].scales_with_width]
        return update / wider if len(growing) > 1 else update

    return optax.stateless(lambda updates, _: jax.tree.map(scale, axes, updates, is_leaf=_is_axes))


def make_schedule(o: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate of the update after s others: a linear warm-up to the peak, then the chosen decline.

    It counts updates that were taken: one that was skipped leaves the next its rate.
    The first update already moves (rate peak / (warmup + 1)) and the last one is made at the final rate. WSD falls like
    1 - sqrt over the last `cooldown_fraction` of the run (Haegele et al. 2024).
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
    """How far the schedule is: int32. A step that was skipped left its counter, as all of the state, as it was."""
    kind = optax.ScaleByScheduleState
    states = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kind))
    return next(s.count for s in states if isinstance(s, kind))


def _update_rule(
    o: OptimConfig, rate: optax.Schedule, axes: Tree, wider: float | None = None
) -> optax.GradientTransformation:
    matrices = decayed(axes)
    decay = optax.add_decayed_weights(o.weight_decay, matrices) if o.weight_decay else optax.identity()
    step = optax.scale_by_learning_rate(rate)
    if o.name in ("adamw", "lion"):
        direction = (
            optax.scale_by_adam(o.beta1, o.beta2, o.epsilon)
            if o.name == "adamw"
            else optax.scale_by_lion(o.beta1, o.beta2)
        )
        scaled = [scale_hidden(wider, axes)] if wider is not None else []
        return optax.chain(direction, *scaled, decay, step)
    if o.name == "sgd":
        return optax.chain(optax.trace(o.beta1) if o.beta1 else optax.identity(), decay, step)
    if o.name == "adafactor":
        factored = per_layer(optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)), axes)
        return optax.chain(factored, decay, step)
    if o.name == "muon":
        directions = contrib.muon(  # at rate 1, so that decay and schedule are the same as everywhere
            1.0,
            beta=o.beta1,
            adam_b1=o.beta1,
            adam_b2=o.beta2,
            muon_weight_dimension_numbers=muon_dimensions(axes),
            consistent_rms=0.2,  # updates as large as AdamW's, so that one rate serves both (Liu et al. 2025)
        )
        return optax.chain(directions, optax.scale(-1.0), decay, step)
    base = optax.chain(optax.scale_by_adam(0.0, o.beta2, o.epsilon), decay, step)
    return contrib.schedule_free(base, rate, b1=o.beta1)


def decayed(axes: Tree) -> Tree:
    """True for the weights that decay: matrices and embeddings, not biases and scales."""
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
    """Lets a transformation see each layer's weights alone, the axes of a head joined: plain matrices and vectors."""

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
    """The axes of a weight, those of a head taken together: layers, rows and columns, where it has them."""
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


def average_weights(decay: float) -> optax.GradientTransformation:
    """Keeps `a = decay a + (1 - decay) params` of the params after each update, starting from the initial ones."""

    def update(updates: Tree, state: EmaState, params: Tree) -> tuple[Tree, EmaState]:
        moved = jax.tree.map(lambda a, p, u: decay * a + (1 - decay) * (p + u), state.params, params, updates)
        return updates, EmaState(moved)

    return optax.GradientTransformation(EmaState, update)


def evaluation_params(params: Tree, opt_state: Tree) -> Tree:
    """The weights to evaluate and sample with: the average where there is one, else the params themselves."""
    kinds = (EmaState, contrib.ScheduleFreeState)
    states = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kinds))
    if averages := [s for s in states if isinstance(s, EmaState)]:
        found = averages[0].params
    elif free := [s for s in states if isinstance(s, contrib.ScheduleFreeState)]:
        learnt = jax.tree.map(lambda p, z: z is not None, params, free[0].z)
        found = contrib.schedule_free_eval_params(free[0], pick(params, learnt))
    else:
        return params
    return jax.tree.map(lambda p, f: p if f is None else f, params, found)  # what is frozen has no average
