"""Looking at one step again: which module first gave a number that is not finite, and on which examples."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from gptjax.data.objectives import Batch
from gptjax.errors import RunError
from gptjax.model import ops
from gptjax.model.gpt import GPT
from gptjax.sharding import CORES, on_one_device, one_device
from gptjax.training import checkpoint
from gptjax.training.initial import ModelLoader
from gptjax.training.optim import trained
from gptjax.training.run import Run
from gptjax.training.state import TrainState, leaf_name, named_key
from gptjax.training.step import loss_and_gradient
from gptjax.training.train_setup import TrainSetup, first_state, reopen


@dataclass(frozen=True)
class Diagnosis:
    """What is not finite in a step; None and () where everything is."""

    loss: float
    grad_norm: float
    forward: str | None  # the first module, in the order in which they run, whose output is not finite
    backward: str | None  # the first, from the loss down, whose weights have a gradient that is not finite
    samples: tuple[int, ...]  # the examples whose own loss is not finite

    @property
    def healthy(self) -> bool:
        return bool(np.isfinite(self.loss) and np.isfinite(self.grad_norm))

    def __str__(self) -> str:
        if self.healthy:
            return "every module's output and gradient are finite"
        if self.forward is None and self.backward is None:
            return "every module's output and every gradient is finite, their norm overflows"
        forward = f"the first module without a finite output is {self.forward or 'none'}"
        backward = f"from the loss down, the first without a finite gradient is {self.backward or 'none'}"
        return f"{forward}; {backward}; examples without a finite loss: {list(self.samples) or 'none alone'}"


def diagnose(setup: TrainSetup, state: TrainState, step: int) -> Diagnosis:
    """Looks into the update from `step` to step + 1, made from this state; the state stays as it is."""
    m, objective, learnt = setup.experiment.model, setup.objective, trained(setup.experiment)
    weights = objective.reference.params if objective.reference and not objective.rollout else None
    model = GPT(dataclasses.replace(m, remat="none"))  # the same numbers, and every module to be seen
    order: dict[str, None] = {}  # of the modules, as they run

    def look(state: TrainState, batch: Batch, weights: Any) -> Any:
        shown, grads = loss_and_gradient(state, batch, model, objective.loss, learnt, weights, setup.noise)
        norm = optax.tree.norm(grads)
        if setup.noise is not None:  # clipping leaves nothing that is not finite to be found
            grads = loss_and_gradient(state, batch, model, objective.loss, learnt, weights)[1]
        parts = [jax.tree.map(lambda x, i=i: x[i], batch) for i in range(batch.tokens.shape[0])]
        outputs, rows = zip(*[_forward(state, part, model, i, order) for i, part in enumerate(parts)], strict=True)
        return shown["loss"], norm, _all(*outputs), _backward(grads), jnp.stack(rows)

    batch, _ = setup.batch(state, step)
    mesh, given = setup.mesh, (state, batch, weights)
    if mesh.shape[CORES] > 1:
        mesh, given = one_device(), on_one_device(given)
    with jax.set_mesh(mesh):
        found = jax.jit(look, out_shardings=NamedSharding(mesh, PartitionSpec()))(*given)
    loss, norm, outputs, grads, rows = jax.device_get(found)
    sequence = _sequence(list(order), m.num_layers)
    samples = setup.batches.example_ids(step)[~rows]
    return Diagnosis(
        float(loss), float(norm), _first(sequence, outputs), _first(sequence[::-1], grads), (*samples.tolist(),)
    )


def replay(run: Run, step: int, open_init: ModelLoader | None = None) -> list[str]:
    """Makes step number `step` of a run again, from the checkpoint before it; what was found, as lines of text.

    `open_init` is needed as for `train`, where the run began with another model and has no checkpoint before the step.
    Raises `RunError` where the steps before it cannot be made again as they were.
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
        f"step {step}, made again from {origin}: loss {found.loss:.6g}, gradient norm {found.grad_norm:.6g}",
        f"  examples  {' to '.join(map(str, examples)) or 'none'}",
    ]
    if logged := [line["loss"] for line in run.metrics() if line["step"] == step and "loss" in line]:
        same = np.isclose(logged[0], found.loss, rtol=1e-5)
        text.append(
            f"  the run   logged loss {logged[0]:.6g}: {'the same' if same else 'NOT the same: other devices?'}"
        )
    text.append(f"  numbers   {found}")
    pieces = setup.store.tokenizer.decode
    for number in found.samples[:3]:
        row = setup.batches.make_examples(np.array([number]))
        text.append(f"  example {number}: {pieces(np.asarray(row.tokens[0]))[:200]!r}")
    return text


def _forward(state: TrainState, part: Batch, model: GPT, index: int, order: dict[str, None]) -> tuple[Any, Array]:
    """Whether each module's output is finite (by layer, where there are layers), and each row's loss.

    Notes in `order` which modules run, in their order.
    """

    def watched(module: Any, method: str) -> bool:
        name = ".".join(module.path) + ("" if method == "__call__" else f".{method}")
        chosen = bool(module.path) and type(module).__name__ != "Dropout" and method in ("__call__", "embed", "unembed")
        if chosen:
            order[name] = None
        return chosen

    key = jax.random.fold_in(named_key(state.key, "dropout"), state.step)
    rngs = {"dropout": jax.random.fold_in(key, index)} if model.config.dropout else {}
    reads = (part.tokens, part.positions, part.segment_ids, part.prefix_mask)
    logits, captured = model.apply(
        {"params": state.params}, *reads, rngs=rngs, capture_intermediates=watched, mutable=["intermediates"]
    )
    nats, _ = ops.cross_entropy(logits, part.targets)
    outputs: dict[str, Array] = {}
    for path, x in jax.tree.leaves_with_path(captured["intermediates"], is_leaf=lambda x: isinstance(x, tuple)):
        name = leaf_name(path).removesuffix(".__call__")
        outputs[name] = _all(*[_finite(y, name) for y in jax.tree.leaves(x)])
    return outputs, jnp.isfinite((nats * part.loss_weights).sum(-1))


def _backward(grads: Any) -> dict[str, Array]:
    """Whether the gradient of each module's weights is finite (by layer, where there are layers)."""
    found: dict[str, Array] = {}
    for path, x in jax.tree.leaves_with_path(grads):
        module = leaf_name(path).rpartition(".")[0]
        module = f"{module}.embed" if module == "embedding" else module  # the last that it passes on its way back
        found[module] = _all(*[found[module]] if module in found else [], _finite(x, module))
    return found


def _finite(x: Array, module: str) -> Array:
    """Whether all numbers are finite: of each layer, or of the whole."""
    return jnp.isfinite(x).all(axis=tuple(range(1, x.ndim)) if module.startswith("blocks") else None)


def _all(*flags: Any) -> Any:
    return jax.tree.map(lambda *xs: jnp.stack(xs).all(0), *flags)


def _sequence(modules: list[str], layers: int) -> list[tuple[str, int | None]]:
    """(module, layer) in the order in which they run: what stands before the blocks, each layer, what comes after."""
    inner = [name for name in modules if name.startswith("blocks")]
    outer: list[tuple[str, int | None]] = [(name, None) for name in modules if name not in inner]
    before = modules.index(inner[0])
    return outer[:before] + [(name, layer) for layer in range(layers) for name in inner] + outer[before:]


def _first(sequence: list[tuple[str, int | None]], finite: dict[str, np.ndarray]) -> str | None:
    for name, layer in sequence:
        if name in finite and not np.all(finite[name] if layer is None else finite[name][layer]):
            return name if layer is None else f"{name} of layer {layer}"
    return None
