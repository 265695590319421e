"""Recomputing one step: the first module with a number that is not finite, and the examples that cause it."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from gptjax.data.batches import Batch
from gptjax.errors import RunError
from gptjax.model import ops
from gptjax.model.gpt import GPT
from gptjax.sharding import CORES, on_one_device, one_device
from gptjax.training import checkpoint
from gptjax.training.initial import ModelLoader
from gptjax.training.optim import trainable_mask
from gptjax.training.run import Run
from gptjax.training.state import TrainState, leaf_name, named_key
from gptjax.training.step import mean_gradient
from gptjax.training.train_setup import TrainSetup, first_state, reopen


@dataclass(frozen=True)
class Diagnosis:
    """What is not finite in a step; None and () if everything is finite."""

    loss: float
    grad_norm: float
    forward: str | None  # the first module, in order of execution, whose output is not finite
    backward: str | None  # the first module, from the loss backwards, with a weight gradient that is not finite
    samples: tuple[int, ...]  # the examples whose own loss is not finite

    @property
    def healthy(self) -> bool:
        return bool(np.isfinite(self.loss) and np.isfinite(self.grad_norm))

    def __str__(self) -> str:
        if self.healthy:
            return "the output and the gradient of every module are finite"
        if self.forward is None and self.backward is None:
            return "the output and the gradient of every module are finite, but the gradient norm overflows"
        forward = f"the first module with an output that is not finite is {self.forward or 'none'}"
        backward = (
            f"the first with a gradient that is not finite, from the loss backwards, is {self.backward or 'none'}"
        )
        return f"{forward}; {backward}; examples whose own loss is not finite: {list(self.samples) or 'none'}"


def diagnose(setup: TrainSetup, state: TrainState, step: int) -> Diagnosis:
    """Inspects the update from `step` to step + 1 from this state, without changing the state."""
    objective, config = setup.objective, setup.experiment.model
    model = GPT(dataclasses.replace(config, remat="none"))  # the same numbers, and every module is visible
    grad_fn = setup.grad_fn(model)
    plain_grad = mean_gradient(model, objective.loss, trainable_mask(setup.experiment))
    order: dict[str, None] = {}  # of the modules, as they run

    def inspect(state: TrainState, batch: Batch, reference: Any) -> Any:
        metrics, grads = grad_fn(state, batch, reference)
        norm = optax.tree.norm(grads)
        if setup.privacy is not None:  # after clipping all gradients are finite
            _, grads = plain_grad(state, batch, reference)
        microbatches = [jax.tree.map(lambda x, i=i: x[i], batch) for i in range(batch.tokens.shape[0])]
        outputs, rows = zip(*[_forward(state, x, model, i, order) for i, x in enumerate(microbatches)], strict=True)
        return metrics["loss"], norm, _all(*outputs), _backward(grads), jnp.stack(rows)

    batch, _ = setup.batch(state, step)
    reference = objective.reference.params if objective.reference and not objective.rollout else None
    mesh, arguments = setup.mesh, (state, batch, reference)
    if mesh.shape[CORES] > 1:
        mesh, arguments = one_device(), on_one_device(arguments)
    with jax.set_mesh(mesh):
        found = jax.jit(inspect, out_shardings=NamedSharding(mesh, PartitionSpec()))(*arguments)
    loss, norm, outputs, grads, rows = jax.device_get(found)
    sequence = _sequence(list(order), config.num_layers)
    samples = setup.batches.example_ids(step)[~rows]
    return Diagnosis(
        float(loss), float(norm), _first(sequence, outputs), _first(sequence[::-1], grads), (*samples.tolist(),)
    )


def replay(run: Run, step: int, open_init: ModelLoader | None = None) -> list[str]:
    """Recomputes step number `step` of a run from the checkpoint before it. Returns the findings as lines of text.

    `open_init`: as for `train`; needed if the run started from another model and has no checkpoint before the step.
    Raises `RunError` if the steps before it cannot be recomputed exactly.
    """
    if not 1 <= step <= run.experiment.train.steps:
        raise RunError(f"--step {step}: the run has steps 1 to {run.experiment.train.steps}")
    changed = max((change["step"] for change in run.provenance().get("changes", [])), default=0)
    setup = reopen(run, open_init=open_init)
    earlier = [c for c in checkpoint.listing(run.checkpoints) if changed <= c.step < step]
    chosen = next((c for c in reversed(earlier) if checkpoint.problem(c) is None), None)
    if chosen is None and changed:
        raise RunError(
            f"{run.folder}: has no checkpoint from step {changed}, where it was changed, to before step {step}"
        )
    with jax.set_mesh(setup.mesh):
        state = first_state(setup, chosen)
        setup.batches.seek((chosen and chosen.position) or setup.batches.position(int(state.step)))
        first = int(state.step)
        for before in range(first, step - 1):
            state, _ = setup.train_step(state, setup.batch(state, before)[0])
        found = diagnose(setup, state, step - 1)
    examples = setup.batches.example_range(step - 1)
    origin = f"the checkpoint of step {first}" if chosen else "the start"
    text = [
        f"step {step}, recomputed from {origin}: loss {found.loss:.6g}, gradient norm {found.grad_norm:.6g}",
        f"  examples  {' to '.join(map(str, examples)) or 'none'}",
    ]
    if logged := [line["loss"] for line in run.metrics() if line["step"] == step and "loss" in line]:
        same = np.isclose(logged[0], found.loss, rtol=1e-5)
        verdict = "the same" if same else "NOT the same: other devices?"
        text.append(f"  the run   logged loss {logged[0]:.6g}: {verdict}")
    text.append(f"  numbers   {found}")
    decode = setup.store.tokenizer.decode
    for number in found.samples[:3]:
        row = setup.batches.make_examples(np.array([number]))
        text.append(f"  example {number}: {decode(np.asarray(row.tokens[0]))[:200]!r}")
    return text


def _forward(state: TrainState, part: Batch, model: GPT, index: int, order: dict[str, None]) -> tuple[Any, Array]:
    """Whether the output of each module (of each layer) and the loss of each row are finite.

    Records in `order` the modules in order of execution.
    """

    def is_captured(module: Any, method: str) -> bool:
        name = ".".join(module.path) + ("" if method == "__call__" else f".{method}")
        chosen = bool(module.path) and type(module).__name__ != "Dropout" and method in ("__call__", "embed", "unembed")
        if chosen:
            order[name] = None
        return chosen

    key = jax.random.fold_in(named_key(state.key, "dropout"), state.step)
    rngs = {"dropout": jax.random.fold_in(key, index)} if model.config.dropout else {}
    inputs = (part.tokens, part.positions, part.segment_ids, part.prefix_mask)
    logits, captured = model.apply(
        {"params": state.params}, *inputs, rngs=rngs, capture_intermediates=is_captured, mutable=["intermediates"]
    )
    nll, _ = ops.cross_entropy(logits, part.targets)
    outputs: dict[str, Array] = {}
    for path, x in jax.tree.leaves_with_path(captured["intermediates"], is_leaf=lambda x: isinstance(x, tuple)):
        name = leaf_name(path).removesuffix(".__call__")
        outputs[name] = _all(*[_finite(y, name) for y in jax.tree.leaves(x)])
    return outputs, jnp.isfinite((nll * part.loss_weights).sum(-1))


def _backward(grads: Any) -> dict[str, Array]:
    """Whether the gradient of the weights of each module (of each layer) is finite."""
    found: dict[str, Array] = {}
    for path, x in jax.tree.leaves_with_path(grads):
        module = leaf_name(path).rpartition(".")[0]
        module = f"{module}.embed" if module == "embedding" else module  # the last module of the backward pass
        found[module] = _all(*[found[module]] if module in found else [], _finite(x, module))
    return found


def _finite(x: Array, module: str) -> Array:
    """Whether all numbers are finite: per layer for blocks, else one flag."""
    return jnp.isfinite(x).all(axis=tuple(range(1, x.ndim)) if module.startswith("blocks") else None)


def _all(*flags: Any) -> Any:
    return jax.tree.map(lambda *xs: jnp.stack(xs).all(0), *flags)


def _sequence(modules: list[str], layers: int) -> list[tuple[str, int | None]]:
    """(module, layer) in order of execution: before the blocks, each layer, after the blocks."""
    inner = [name for name in modules if name.startswith("blocks")]
    outer: list[tuple[str, int | None]] = [(name, None) for name in modules if name not in inner]
    before = modules.index(inner[0])
    return outer[:before] + [(name, layer) for layer in range(layers) for name in inner] + outer[before:]


def _first(sequence: list[tuple[str, int | None]], finite: dict[str, np.ndarray]) -> str | None:
    for name, layer in sequence:
        if name in finite and not np.all(finite[name] if layer is None else finite[name][layer]):
            return name if layer is None else f"{name} of layer {layer}"
    return None
