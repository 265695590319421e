"""Everything that is built from an experiment before the first step: data, shapes, shardings, compiled functions."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from gptjax import sharding
from gptjax.checks import check
from gptjax.config import Experiment
from gptjax.data.batches import Batch, DataLoader
from gptjax.data.examples import class_labels
from gptjax.data.store import Store, cache_folder, find_store, open_store
from gptjax.data.tokenizer import Tokenizer
from gptjax.data.tokenizer_choice import INIT
from gptjax.errors import ConfigError
from gptjax.model.gpt import GPT
from gptjax.model.size import num_params
from gptjax.objectives import make_objective
from gptjax.objectives.base import TrainObjective, make_train_objective
from gptjax.objectives.losses import Metrics
from gptjax.objectives.reference import ReferenceModel
from gptjax.training.checkpoint import Checkpoint
from gptjax.training.initial import (
    InitialModel,
    ModelLoader,
    backbone_params,
    inherit_config,
    initial_model,
    merge_params,
)
from gptjax.training.optim import make_optimizer, trainable_mask
from gptjax.training.privacy import DPConfig, dp_config, private_gradient
from gptjax.training.restore import open_trained, restore_state
from gptjax.training.run import Run, check_data, check_imports, open_run
from gptjax.training.state import TrainState, abstract_state, create_state
from gptjax.training.step import GradFn, eval_step, mean_gradient, train_step


@dataclass(frozen=True)
class TrainSetup:
    """Nothing in it changes during the run."""

    experiment: Experiment  # resolved
    store: Store
    batches: DataLoader
    mesh: jax.sharding.Mesh
    abstract: TrainState  # shapes and shardings of the state
    initial: InitialModel | None  # the model whose weights the run starts from; None: random weights
    objective: TrainObjective
    privacy: DPConfig | None  # of DP-SGD; None: plain gradients
    tx: optax.GradientTransformation
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    eval_step: Callable[[TrainState, Batch], tuple[Metrics, jax.Array]]
    lower: Callable[[TrainState, Batch], jax.stages.Lowered]  # lowers `train_step`, to inspect its program

    def batch(self, state: TrainState, step: int, examples: Batch | None = None) -> tuple[Batch, dict[str, float]]:
        """The batch of the update from `step` to step + 1, on the devices, and metrics of sampled answers.

        It consists of the examples of the step, or of answers that the model samples for their prompts.
        """
        if examples is None:
            examples = self.batches.device_batch(step, self.mesh)
        if self.objective.rollout is None:
            return examples, {}
        return self.objective.rollout(state.params, examples, step)

    def grad_fn(self, model: GPT) -> GradFn:
        """The gradient function of the experiment, for a model that may differ in remat or layout."""
        return _grad_fn(self.experiment, model, self.objective, self.privacy)


def enable_compilation_cache() -> None:
    """Keeps compiled programs in the cache folder, so that a second start of the same program is quick."""
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def build_train_setup(
    experiment: Experiment,
    mesh: jax.sharding.Mesh | None = None,
    store: Store | None = None,
    run: Run | None = None,
    open_init: ModelLoader | None = None,
) -> TrainSetup:
    """Opens the data and plans the state; computes nothing yet. Raises `ConfigError` and `DataError`.

    `mesh`: None for all devices, as the experiment says; `store`: None for that of the experiment's data; `run`: the
    run folder of the experiment, if it exists; `open_init`: opens `init`, by default as a run folder.
    """
    opened = functools.cache(open_init or (lambda name: open_trained(open_run(Path(name)))))
    initial = initial_model(experiment, run, opened)
    if initial:
        experiment = inherit_config(experiment, initial.model)
    check(experiment, sharding.num_devices() if mesh is None else None)
    store = store or open_store(experiment.data, _tokenizer_of_init(experiment, initial, run, opened))
    e = _resolve(experiment, store, initial)
    objective = make_objective(e)
    if mesh is None:
        groups = e.train.batch_size // e.train.microbatches // max(1, objective.group().rows)
        mesh = sharding.make_mesh(e.mesh, groups, num_params(e.model)["total"])
    tx = make_optimizer(e)
    batches = DataLoader(store, e, objective)
    train_objective = make_train_objective(objective, store.tokenizer, mesh, opened)
    privacy = dp_config(e, batches.sampler)
    abstract = abstract_state(e, tx, mesh)
    train, evaluate, lower = _compiled(e, mesh, abstract, train_objective, privacy, tx)
    return TrainSetup(
        experiment=e,
        store=store,
        batches=batches,
        mesh=mesh,
        abstract=abstract,
        initial=initial,
        objective=train_objective,
        privacy=privacy,
        tx=tx,
        train_step=train,
        eval_step=evaluate,
        lower=lower,
    )


def _resolve(experiment: Experiment, store: Store, initial: InitialModel | None) -> Experiment:
    """The experiment with its derived fields, which must agree with the tokenizer and the labels."""
    tokens, extra = store.tokenizer.vocab_size, len(make_objective(experiment).extra_tokens())
    needed = tokens + extra
    if initial is not None:
        needed = max(needed, initial.model.vocab_size or 0)  # the table may be padded
    labels = class_labels(experiment.data)
    e = experiment.resolved(needed, labels)
    if (e.model.vocab_size or 0) < needed:
        more = f" and objective.name = {e.objective.name!r} adds {extra}" if extra else ""
        raise ConfigError([f"model.vocab_size = {e.model.vocab_size}: the tokenizer has {tokens}{more}; leave it out"])
    if e.model.num_classes != len(labels):
        raise ConfigError([f"model.num_classes = {e.model.num_classes}: there are {len(labels)} labels; leave it out"])
    return e


def _grad_fn(e: Experiment, model: GPT, objective: TrainObjective, privacy: DPConfig | None) -> GradFn:
    trainable = trainable_mask(e)
    if privacy is None:
        return mean_gradient(model, objective.loss, trainable)
    return private_gradient(model, objective.loss, trainable, privacy)


def _compiled(
    e: Experiment,
    mesh: jax.sharding.Mesh,
    abstract: TrainState,
    objective: TrainObjective,
    privacy: DPConfig | None,
    tx: optax.GradientTransformation,
) -> list[Callable[..., Any]]:
    """`train_step`, `eval_step` and `lower` of the setup. jax compiles at the first call."""
    model = GPT(e.model)
    compiled = partial(jax.jit, compiler_options=sharding.compiler_options(mesh))
    replicated = NamedSharding(mesh, PartitionSpec())
    per_core = NamedSharding(mesh, PartitionSpec(sharding.CORES)) if mesh.shape[sharding.CORES] > 1 else replicated
    update = partial(
        train_step,
        grad_fn=_grad_fn(e, model, objective, privacy),
        tx=tx,
        spike_sigma=e.train.spike_sigma,
        loss_decides=privacy is None,
    )
    state_shardings = jax.tree.map(lambda x: x.sharding, abstract)
    train = compiled(update, donate_argnums=0, out_shardings=(state_shardings, replicated))
    evaluate = compiled(partial(eval_step, model=model, loss=objective.loss), out_shardings=per_core)
    functions: list[Callable[..., Any]] = [train, evaluate, train.lower]
    if objective.reference is None or objective.rollout is not None:
        return functions
    return [_with_reference(f, objective.reference) for f in functions]  # the loss needs the reference model's weights


def _with_reference(function: Callable[..., Any], reference: ReferenceModel) -> Callable[..., Any]:
    """The function of a state and a batch, which opens the reference model when it is first called."""
    return lambda state, batch: function(state, batch, reference.params)


def reopen(run: Run, mesh: jax.sharding.Mesh | None = None, open_init: ModelLoader | None = None) -> TrainSetup:
    """`build_train_setup` for a run folder, which may be untrusted: only its own data, and no imports that it names."""
    store = find_store(run.data_key(), run.experiment.data)
    check_imports(run, store)
    setup = build_train_setup(run.experiment, mesh, store, run, open_init)
    check_data(run, setup.store)
    return setup


def first_state(setup: TrainSetup, chosen: Checkpoint | None) -> TrainState:
    """The state of a checkpoint; or a new one, with random weights or those of the initial model."""
    if chosen is not None:
        return restore_state(chosen, setup.abstract, setup.experiment)
    state = create_state(setup.experiment, setup.tx, setup.abstract)
    if setup.initial is None:
        return state
    params = merge_params(backbone_params(setup.initial.open(), setup.experiment), state.params)
    shardings = jax.tree.map(lambda x: x.sharding, setup.abstract.opt_state)
    return state._replace(params=params, opt_state=jax.jit(setup.tx.init, out_shardings=shardings)(params))


def _tokenizer_of_init(
    experiment: Experiment, initial: InitialModel | None, run: Run | None, opened: ModelLoader
) -> Tokenizer | None:
    """The tokenizer of data.tokenizer = "init": that of init, else of the reference model; None if not needed."""
    if initial:
        return initial.tokenizer
    if experiment.data.tokenizer != INIT:
        return None
    if run:
        return run.tokenizer()
    reference = make_objective(experiment).reference_name()
    return opened(reference).tokenizer if reference else None
