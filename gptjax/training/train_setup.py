"""Everything that is made from an experiment before the first step: data, layout, compiled functions, weights."""

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
from gptjax.data.batches import DataLoader
from gptjax.data.examples import class_labels
from gptjax.data.objectives import Batch, extra_tokens, group_size
from gptjax.data.store import Store, cache_folder, find_store, open_store
from gptjax.data.tokenizer import Tokenizer
from gptjax.data.tokenizer_choice import INIT
from gptjax.data.windows import PackedStream
from gptjax.errors import ConfigError, DataError, PromptError, RunError
from gptjax.inference.pretrained import Pretrained, check_is_generative
from gptjax.inference.sampling import SamplingParams
from gptjax.model.gpt import GPT
from gptjax.model.kernels import choose_kernel
from gptjax.model.weights import merge_lora
from gptjax.training import checkpoint
from gptjax.training.checkpoint import Checkpoint
from gptjax.training.initial import (
    InitialModel,
    ModelLoader,
    backbone_params,
    inherit_config,
    initial_model,
    merge_params,
    weight_mismatches,
)
from gptjax.training.metrics import flops_per_token, num_params
from gptjax.training.optim import evaluation_params, make_optimizer, num_trained, trained
from gptjax.training.privacy import DPConfig, check_libraries, noise_of, spent_by
from gptjax.training.run import EXPERIMENT, GENERATION, Run, check_data, check_imports, open_run
from gptjax.training.state import TrainState, Weights, abstract_state, create_state, new_health, state_mismatches
from gptjax.training.step import Metrics, eval_step, train_step
from gptjax.tuning.train_objective import TrainObjective, make_train_objective, reference_name


@dataclass(frozen=True)
class TrainSetup:
    """Nothing in it changes while the run goes on."""

    experiment: Experiment  # resolved
    store: Store
    batches: DataLoader
    mesh: jax.sharding.Mesh
    abstract: TrainState  # shapes and layout of the state
    start: InitialModel | None  # the model whose weights come first; None: random ones
    objective: TrainObjective
    noise: DPConfig | None  # of DP-SGD; None: the gradient is as it is
    tx: optax.GradientTransformation
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    eval_step: Callable[[TrainState, Batch], tuple[Metrics, jax.Array]]
    lower: Callable[[TrainState, Batch], jax.stages.Lowered]  # the program of train_step, to look at

    def batch(self, state: TrainState, step: int, read: Batch | None = None) -> tuple[Batch, dict[str, float]]:
        """What the update from `step` to step + 1 learns from, on the devices; and figures about what was written.

        It is `read`, the examples of the step, or what the model writes to their prompts.
        """
        read = self.batches.device_batch(step, self.mesh) if read is None else read
        return self.objective.rollout(state.params, read, step) if self.objective.rollout else (read, {})


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
    """Opens the data and lays out the state; computes nothing yet. Raises `ConfigError` and `DataError`.

    `mesh`: all devices, as the experiment has it; `store`: that of the experiment's data; unless they are given.
    `run`: that of the experiment, where there is one already; `open_init`: how to open `init`, else as a run folder.
    """
    opened = functools.cache(open_init or (lambda name: open_trained(open_run(Path(name)))))
    start = initial_model(experiment, run, opened)
    if start:
        experiment = inherit_config(experiment, start.model)
    check(experiment, sharding.num_devices() if mesh is None else None)
    store = store or open_store(experiment.data, _given_tokenizer(experiment, start, run, opened))
    tokens, extra = store.tokenizer.vocab_size, len(extra_tokens(experiment.objective))
    needed = max(tokens + extra, (start.model.vocab_size or 0) if start else 0)  # a table may be padded
    classes = class_labels(experiment.data)
    e = experiment.resolved(needed, classes)
    if (e.model.vocab_size or 0) < needed:
        more = f" and objective.name = {e.objective.name!r} adds {extra}" if extra else ""
        raise ConfigError([f"model.vocab_size = {e.model.vocab_size}: the tokenizer has {tokens}{more}; leave it out"])
    if e.model.num_classes != len(classes):
        raise ConfigError([f"model.num_classes = {e.model.num_classes}: there are {len(classes)} labels; leave it out"])
    batches, model, tx = DataLoader(store, e), GPT(e.model), make_optimizer(e)
    groups = e.train.batch_size // e.train.microbatches // max(1, group_size(e.objective)[0])
    mesh = mesh or sharding.make_mesh(e.mesh, groups, num_params(e.model)["total"])
    abstract = abstract_state(e, tx, mesh)
    layout, everywhere = jax.tree.map(lambda x: x.sharding, abstract), NamedSharding(mesh, PartitionSpec())
    by_core = NamedSharding(mesh, PartitionSpec(sharding.CORES)) if mesh.shape[sharding.CORES] > 1 else everywhere
    objective = make_train_objective(e, store.tokenizer, mesh, opened)
    noise = noise_of(e, batches.sampler)
    own = dict(spike_sigma=e.train.spike_sigma, learnt=trained(e), noise=noise)
    compiled = partial(jax.jit, compiler_options=sharding.compiler_options(mesh))
    update = partial(train_step, model=model, tx=tx, loss=objective.loss, **own)
    step = compiled(update, donate_argnums=0, out_shardings=(layout, everywhere))
    look = partial(eval_step, model=model, loss=objective.loss)
    return TrainSetup(
        experiment=e,
        store=store,
        batches=batches,
        mesh=mesh,
        abstract=abstract,
        start=start,
        objective=objective,
        noise=noise,
        tx=tx,
        train_step=_beside(objective, step),
        eval_step=_beside(objective, compiled(look, out_shardings=by_core)),
        lower=_beside(objective, step.lower),
    )


def reopen(run: Run, mesh: jax.sharding.Mesh | None = None, open_init: ModelLoader | None = None) -> TrainSetup:
    """`build_train_setup` for a run folder, which may be a stranger's: its own data, and nothing imported that it names."""
    store = find_store(run.data_key(), run.experiment.data)
    check_imports(run, store)
    setup = build_train_setup(run.experiment, mesh, store, run, open_init)
    check_data(run, setup.store)
    return setup


def _given_tokenizer(
    experiment: Experiment, start: InitialModel | None, run: Run | None, opened: ModelLoader
) -> Tokenizer | None:
    """What data.tokenizer = "init" stands for: that of init, else of the other model; None where nobody asks."""
    if start:
        return start.tokenizer
    if experiment.data.tokenizer != INIT:
        return None
    reference = reference_name(experiment)
    return run.tokenizer() if run else opened(reference).tokenizer if reference else None


def _beside(objective: TrainObjective, step: Any) -> Any:
    """A step with the weights of the other model given, where it looks at one."""
    reference = objective.reference
    if reference is None or objective.rollout is not None:
        return step
    return lambda state, batch: step(state, batch, reference.params)


def first_state(setup: TrainSetup, chosen: Checkpoint | None) -> TrainState:
    """The state in a checkpoint; or a new one, with random weights or those of another model."""
    if chosen is not None:
        return restore_state(chosen, setup.abstract, setup.experiment)
    state = create_state(setup.experiment, setup.tx, setup.abstract)
    if setup.start is None:
        return state
    params = merge_params(backbone_params(setup.start.open(), setup.experiment), state.params)
    layout = jax.tree.map(lambda x: x.sharding, setup.abstract.opt_state)
    return state._replace(params=params, opt_state=jax.jit(setup.tx.init, out_shardings=layout)(params))


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
    if found := state_mismatches(saved, wanted, experiment):
        more = f"\n  and {len(found) - 8} others" if len(found) > 8 else ""
        raise RunError(
            f"{chosen.folder}: does not hold the state of this experiment; take the fields that it was trained with:\n"
            + "\n".join(f"  - {line}" for line in found[:8])
            + more
        )


def check_start(setup: TrainSetup, fresh: bool = True, finished: bool = False) -> None:
    """Raises, before anything is written, where the run could not start or could not make its samples at the end.

    One that is not `fresh` has checkpoints of its own and needs the weights of `experiment.init` no more; one that is
    `finished` needs no other model beside it either.
    """
    if setup.noise is not None:
        check_libraries()
    e, tokens = setup.experiment, setup.store.tokenizer
    if e.train.sample_tokens:
        _check_sample_prompt(e, tokens)
    if not finished:
        _check_lesson(setup)
    if setup.start is None or not fresh:
        return
    first = setup.start.open()
    if first.tokenizer.id_to_bytes != tokens.id_to_bytes:
        raise RunError(
            f"init = {e.init!r}: was trained with another tokenizer, so its ids mean other text than here; "
            "set data.tokenizer = 'init'"
        )
    if differ := weight_mismatches(backbone_params(first, e), setup.abstract.params, e.model):
        raise RunError(f"init = {e.init!r}: has other weights than this model:\n  - " + "\n  - ".join(differ))


def _check_sample_prompt(e: Experiment, tokens: Tokenizer) -> None:
    try:
        length = len(tokens.encode(e.train.sample_prompt))
    except DataError as error:
        raise ConfigError([f"train.sample_prompt: {error}; give another, or train.sample_tokens = 0"]) from None
    if length >= (room := e.model.context_length):
        raise ConfigError([f"train.sample_prompt: its {length} tokens leave no room in model.context_length = {room}"])


def _check_lesson(setup: TrainSetup) -> None:
    e, reference = setup.experiment, setup.objective.reference
    if setup.objective.rollout and jax.process_count() > 1:
        raise ConfigError([f"objective.name = {e.objective.name!r}: the model writes in one process only; start one"])
    if reference is None:
        return
    check_is_generative(reference.pretrained)
    if reference.pretrained.tokenizer.id_to_bytes != setup.store.tokenizer.id_to_bytes:
        raise RunError(
            f"{reference.name}: has another tokenizer than the text, so that its probabilities are of other tokens; "
            "set data.tokenizer = 'init', or to that of the other model"
        )
    theirs, length = reference.pretrained.model, e.model.context_length
    if theirs.causal != e.model.causal:
        raise RunError(
            f"{reference.name}: has model.causal = {theirs.causal}, so that it sees other tokens; take another"
        )
    if theirs.positions == "learned" and theirs.context_length < length:
        raise RunError(
            f"{reference.name}: knows {theirs.context_length} positions, and the windows have model.context_length = "
            f"{length}; set that to as many"
        )


def load_params(run: Run, which: str) -> tuple[Any, int]:
    """The weights to evaluate and sample with, of the checkpoint called `which`, on one device; and its step.

    Nothing else of the state is read.
    """
    chosen = checkpoint.choose(run.checkpoints, which)
    abstract = abstract_state(run.experiment, make_optimizer(run.experiment), sharding.one_device())
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


def open_trained(run: Run, checkpoint: str = "last", merge: bool = True) -> Pretrained:
    """The model in a run folder. What LoRA learnt is added to the weights, or with `merge` False stays beside them."""
    params, _ = load_params(run, checkpoint)
    model = run.experiment.model
    model, params = merge_lora(model, params) if merge else (model, params)
    labels, given = run.experiment.data.labels if model.num_classes else (), run.generation_settings()
    if len(labels) != model.num_classes:
        raise RunError(
            f"{run.folder / EXPERIMENT}: is damaged (model.num_classes = {model.num_classes}, and data.labels has "
            f"{len(labels)})"
        )
    try:
        SamplingParams(**given.get("recommended", {}))
        return Pretrained(
            name=run.experiment.name,
            model=model,
            params=params,
            tokenizer=run.tokenizer(),
            labels=labels,
            generation_config=given.get("recommended", {}),
            stop_tokens=tuple(map(int, given.get("stop_tokens", ()))),
            chat_template=given.get("chat_template"),
            extra_generation_config=dict(given.get("passed_on", {})),
        )
    except (TypeError, ValueError, PromptError) as e:
        raise RunError(f"{run.folder / GENERATION}: is damaged ({e})") from None


def _seen_in_evaluation(abstract: TrainState) -> tuple[Any, Any]:
    """The params and the optimiser's state, with `UNREAD` for every array that `evaluation_params` does not look at."""
    parts = (abstract.params, abstract.opt_state)
    leaves, tree = jax.tree.flatten(parts)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), parts)
    program = jax.make_jaxpr(evaluation_params)(*shapes).jaxpr
    seen = {id(x) for x in [*program.outvars, *(x for equation in program.eqns for x in equation.invars)]}
    kept = [x if id(v) in seen else checkpoint.UNREAD for x, v in zip(leaves, program.invars, strict=True)]
    return jax.tree.unflatten(tree, kept)


def summary(setup: TrainSetup, step: int) -> str:
    """What is about to be trained, on what, and what it takes."""
    e, m, store = setup.experiment, setup.experiment.model, setup.store
    size, learnt = num_params(m)["total"], num_trained(e)
    share = "" if learnt == size else f" ({learnt:,} of them learnt, {learnt / size:.2%})"
    tokens = e.train.steps * setup.batches.tokens_per_step
    corpus = sum(len(s.ids) for s in store.train)
    kernel, why = choose_kernel(m, m.context_length, e.masks_tokens)
    device = jax.devices()[0]
    cut = sum(s.num_truncated for s in setup.batches.train_streams if isinstance(s, PackedStream))
    return "\n".join(
        [
            f"{e.name}: {size:,} parameters{share}, {m.num_layers} layers of width {m.embed_dim}, context "
            f"{m.context_length}, vocabulary {m.vocab_size:,}"
            + (f", {m.num_classes} classes" if m.num_classes else ""),
            f"  data     {corpus:,} tokens ({store.tokenizer.kind}), and "
            f"{sum(len(s.ids) for s in store.validation):,} for validation"
            + (f"; {cut:,} prompts are longer than the context, and lose their beginning" if cut else ""),
            f"  training {'from step ' + format(step, ',') + ' ' if step else ''}to step {e.train.steps:,} of "
            f"{setup.batches.tokens_per_step:,} tokens: {tokens:,} tokens, {tokens / size:.1f} a parameter, "
            f"{tokens / corpus:.1f} epochs, {tokens * flops_per_token(m):.2g} FLOPs",
            *_promise(setup),
            f"  machine  {sharding.num_devices()} x {device.device_kind}{_cores(setup.mesh)}, mesh data "
            f"{setup.mesh.shape['data']} x model {setup.mesh.shape['model']}, {m.dtype}, attention by {kernel} ({why})",
        ]
    )


def _cores(mesh: jax.sharding.Mesh) -> str:
    cores = mesh.shape[sharding.CORES]
    return f" ({cores} cores, each with rows of its own)" if cores > 1 else ""


def privacy(setup: TrainSetup) -> dict[str, float]:
    """The epsilon and delta of the whole run; nothing where it makes no promise."""
    draws, multiplier = setup.batches.sampler, setup.experiment.optim.noise_multiplier
    if draws is None or multiplier is None:
        return {}
    epsilon, delta = spent_by(draws, multiplier, setup.experiment.train.steps)
    return {"epsilon": epsilon, "delta": delta}


def _promise(setup: TrainSetup) -> list[str]:
    draws, spent = setup.batches.sampler, privacy(setup)
    if draws is None:
        return []
    kept = " beyond what init tells" if setup.experiment.init else ""
    return [
        f"  privacy  epsilon {spent['epsilon']:.3g} at delta {spent['delta']:.2g}{kept}, for each of {draws.num_windows:,} "
        f"windows being there or empty; a batch draws {draws.expected_batch:.1f} on average. It holds for those who do not "
        f"know the seed, which stands in the run folder: pass on weights alone (gptjax export)"
    ]
