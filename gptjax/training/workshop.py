"""Everything that is made from an experiment before the first step: data, layout, compiled functions, weights."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from gptjax import sharding
from gptjax.checks import check
from gptjax.config import Experiment
from gptjax.data.batches import Batches
from gptjax.data.objectives import Batch
from gptjax.data.store import Store, cache_folder, open_store
from gptjax.errors import ConfigError, RunError
from gptjax.model.attention import choose_kernel
from gptjax.model.gpt import GPT
from gptjax.training import checkpoint
from gptjax.training.checkpoint import Checkpoint
from gptjax.training.metrics import flops_per_token, num_params
from gptjax.training.optim import evaluation_params, make_optimizer
from gptjax.training.run import Run, open_run
from gptjax.training.state import TrainState, Weights, abstract_state, create_state, mismatches, new_health
from gptjax.training.step import Metrics, eval_step, train_step


@dataclass(frozen=True)
class Workshop:
    """Nothing in it changes while the run goes on."""

    experiment: Experiment  # resolved
    store: Store
    batches: Batches
    mesh: jax.sharding.Mesh
    abstract: TrainState  # shapes and layout of the state
    tx: optax.GradientTransformation
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    eval_step: Callable[[TrainState, Batch], tuple[jax.Array, jax.Array]]


def enable_compilation_cache() -> None:
    """Keeps compiled programs in the cache folder, so that a second start of the same program is quick."""
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def one_device() -> jax.sharding.Mesh:
    """The mesh of this process's first device, for verbs that need no more."""
    return sharding.mesh_of(jax.local_devices()[:1], 1, 1)


def prepare(experiment: Experiment, mesh: jax.sharding.Mesh | None = None, store: Store | None = None) -> Workshop:
    """Opens the data and lays out the state; computes nothing yet. Raises `ConfigError` and `DataError`.

    `mesh`: all devices, as the experiment has it; `store`: that of the experiment's data; unless they are given.
    """
    check(experiment, jax.device_count() if mesh is None else None)
    store = store or open_store(experiment.data)
    e = experiment.resolved(store.tokenizer.vocab_size)
    if (e.model.vocab_size or 0) < store.tokenizer.vocab_size:
        raise ConfigError(
            [f"model.vocab_size = {e.model.vocab_size}: the tokenizer has {store.tokenizer.vocab_size}; leave it out"]
        )
    mesh = mesh or sharding.make_mesh(e.mesh)
    batches, model, tx = Batches(store, e), GPT(e.model), make_optimizer(e)
    abstract = abstract_state(e, tx, mesh)
    layout, everywhere = jax.tree.map(lambda x: x.sharding, abstract), NamedSharding(mesh, PartitionSpec())
    step = partial(train_step, model=model, tx=tx, z_loss=e.objective.z_loss, skip_spikes=e.train.skip_spikes)
    return Workshop(
        experiment=e,
        store=store,
        batches=batches,
        mesh=mesh,
        abstract=abstract,
        tx=tx,
        train_step=jax.jit(step, donate_argnums=0, out_shardings=(layout, everywhere)),
        eval_step=jax.jit(partial(eval_step, model=model), out_shardings=everywhere),
    )


def first_state(shop: Workshop, chosen: Checkpoint | None) -> TrainState:
    """The state in a checkpoint; or a new one, with random weights or those of `experiment.init`."""
    if chosen is not None:
        return restore_state(chosen, shop.abstract, shop.experiment)
    state = create_state(shop.experiment, shop.tx, shop.abstract)
    if shop.experiment.init is None:
        return state
    loaded, _ = load_params(open_run(Path(shop.experiment.init)), "last")
    params = jax.tree.map(lambda x, like: jax.device_put(np.asarray(x), like.sharding), loaded, shop.abstract.params)
    layout = jax.tree.map(lambda x: x.sharding, shop.abstract.opt_state)
    return state._replace(params=params, opt_state=jax.jit(shop.tx.init, out_shardings=layout)(params))


def restore_state(chosen: Checkpoint, abstract: TrainState, experiment: Experiment) -> TrainState:
    """The state in a checkpoint that `choose` found whole, laid out as `abstract` says.

    Raises `RunError` naming every array that has another shape or dtype than the experiment's, and the field behind it.
    """
    wanted, there = _saved_parts(abstract, chosen), checkpoint.saved_arrays(chosen)
    if _is_weights_only(there):
        raise RunError(
            f"{chosen.folder}: holds imported weights and nothing to train on from; name this run as init of an "
            "experiment with another --run-dir"
        )
    _check_match(chosen, there, wanted, experiment)
    saved = checkpoint.restore(chosen, wanted)
    if chosen.format == 1:
        saved["health"] = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), new_health(), abstract.health)
    return TrainState(**saved)


def _saved_parts(abstract: TrainState, chosen: Checkpoint) -> dict[str, Any]:
    return {name: part for name, part in abstract._asdict().items() if chosen.format > 1 or name != "health"}


def _is_weights_only(saved: dict[str, jax.ShapeDtypeStruct]) -> bool:
    return all(name == "step" or name.startswith("params.") for name in saved)


def _check_match(
    chosen: Checkpoint, saved: dict[str, jax.ShapeDtypeStruct], wanted: dict[str, Any], experiment: Experiment
) -> None:
    if found := mismatches(saved, wanted, experiment):
        more = f"\n  and {len(found) - 8} others" if len(found) > 8 else ""
        raise RunError(
            f"{chosen.folder}: does not hold the state of this experiment; take the fields that it was trained with:\n"
            + "\n".join(f"  - {line}" for line in found[:8])
            + more
        )


def check_start(shop: Workshop, fresh: bool = True) -> None:
    """Raises, before anything is written, where the run could not start or could not make its samples at the end.

    One that is not `fresh` has checkpoints of its own and needs the weights of `experiment.init` no more.
    """
    e, tokens = shop.experiment, shop.store.tokenizer
    length = len(tokens.encode(e.train.sample_prompt))
    room = e.model.context_length
    if e.train.sample_tokens and length >= room:
        raise ConfigError([f"train.sample_prompt: its {length} tokens leave no room in model.context_length = {room}"])
    if e.init is None or not fresh:
        return
    source = open_run(Path(e.init))
    checkpoint.choose(source.checkpoints)
    if source.tokenizer().pieces != tokens.pieces:
        raise RunError(f"init = {e.init!r}: was trained with another tokenizer, so its ids mean other text than here")
    theirs = abstract_state(source.experiment, make_optimizer(source.experiment), one_device())
    if (there := _shapes(theirs.params)) != (here := _shapes(shop.abstract.params)):
        differ = [name for name in sorted(there | here) if there.get(name) != here.get(name)]
        lines = [f"  - {name}: {there.get(name)} there, {here.get(name)} here" for name in differ]
        raise RunError(f"init = {e.init!r}: has other weights than this model:\n" + "\n".join(lines))


def load_params(run: Run, which: str) -> tuple[Any, int]:
    """The weights to evaluate and sample with, of the checkpoint called `which`, on one device; and its step.

    Nothing else of the state is read.
    """
    chosen = checkpoint.choose(run.checkpoints, which)
    abstract = abstract_state(run.experiment, make_optimizer(run.experiment), one_device())
    there = checkpoint.saved_arrays(chosen)
    wanted = Weights(abstract.step, abstract.params)._asdict()
    if not _is_weights_only(there):
        wanted = _saved_parts(abstract, chosen)
    _check_match(chosen, there, wanted, run.experiment)
    if _is_weights_only(there):
        return checkpoint.restore(chosen, wanted)["params"], chosen.step
    unread = jax.tree.map(lambda _: checkpoint.UNREAD, wanted)
    params, opt_state = _seen_in_evaluation(abstract)
    saved = checkpoint.restore(chosen, unread | {"params": params, "opt_state": opt_state})
    return evaluation_params(saved["params"], saved["opt_state"]), chosen.step


def _seen_in_evaluation(abstract: TrainState) -> tuple[Any, Any]:
    """The params and the optimiser's state, with `UNREAD` for every array that `evaluation_params` does not look at."""
    parts = (abstract.params, abstract.opt_state)
    leaves, tree = jax.tree.flatten(parts)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), parts)
    program = jax.make_jaxpr(evaluation_params)(*shapes).jaxpr
    seen = {id(x) for x in [*program.outvars, *(x for equation in program.eqns for x in equation.invars)]}
    kept = [x if id(v) in seen else checkpoint.UNREAD for x, v in zip(leaves, program.invars, strict=True)]
    return jax.tree.unflatten(tree, kept)


def summary(shop: Workshop, step: int) -> str:
    """What is about to be trained, on what, and what it takes."""
    e, m, store = shop.experiment, shop.experiment.model, shop.store
    size = num_params(m)["total"]
    tokens = e.train.steps * shop.batches.tokens_per_step
    corpus = sum(len(s.ids) for s in store.train)
    kernel, why = choose_kernel(m, jax.default_backend())
    device = jax.devices()[0]
    return "\n".join(
        [
            f"{e.name}: {size:,} parameters, {m.num_layers} layers of width {m.embed_dim}, context {m.context_length}, "
            f"vocabulary {m.vocab_size:,}",
            f"  data     {corpus:,} tokens ({store.tokenizer.kind}), and "
            f"{sum(len(s.ids) for s in store.validation):,} for validation",
            f"  training {'from step ' + format(step, ',') + ' ' if step else ''}to step {e.train.steps:,} of "
            f"{shop.batches.tokens_per_step:,} tokens: {tokens:,} tokens, {tokens / size:.1f} a parameter, "
            f"{tokens / corpus:.1f} epochs, {tokens * flops_per_token(m):.2g} FLOPs",
            f"  machine  {jax.device_count()} x {device.device_kind}, mesh data {shop.mesh.shape['data']} x model "
            f"{shop.mesh.shape['model']}, {m.dtype}, attention by {kernel} ({why})",
        ]
    )


def _shapes(params: Any) -> dict[str, tuple[int, ...]]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): x.shape for path, x in jax.tree.leaves_with_path(params)
    }
