"""The summary of a run at its start: what is trained, on what, and what it costs."""

import jax

from gptjax import sharding
from gptjax.data.windows import PackedStream
from gptjax.model.attention import choose_kernel
from gptjax.model.size import flops_per_token, num_params
from gptjax.objectives import make_objective
from gptjax.training.optim import num_trainable
from gptjax.training.privacy import spent_by
from gptjax.training.train_setup import TrainSetup


def summary(setup: TrainSetup, step: int) -> str:
    """A few lines for a run that starts at `step`."""
    return "\n".join([_model(setup), _data(setup), _training(setup, step), *_privacy(setup), _machine(setup)])


def _model(setup: TrainSetup) -> str:
    e, m = setup.experiment, setup.experiment.model
    size, trainable = num_params(m)["total"], num_trainable(e)
    share = "" if trainable == size else f" ({trainable:,} trainable, {trainable / size:.2%})"
    classes = f", {m.num_classes} classes" if m.num_classes else ""
    return (
        f"{e.name}: {size:,} parameters{share}, {m.num_layers} layers, width {m.embed_dim}, context "
        f"{m.context_length}, vocabulary {m.vocab_size:,}{classes}"
    )


def _data(setup: TrainSetup) -> str:
    store = setup.store
    text = (
        f"  data     {_num_tokens(setup):,} tokens ({store.tokenizer.kind}), and "
        f"{sum(len(s.ids) for s in store.validation):,} for validation"
    )
    truncated = sum(s.num_truncated for s in setup.batches.train_streams if isinstance(s, PackedStream))
    if truncated:
        text += f"; {truncated:,} prompts are longer than the context and are truncated on the left"
    return text


def _training(setup: TrainSetup, step: int) -> str:
    m, steps, per_step = setup.experiment.model, setup.experiment.train.steps, setup.batches.tokens_per_step
    tokens = steps * per_step
    start = f"from step {step:,} " if step else ""
    return (
        f"  training {start}to step {steps:,} of {per_step:,} tokens/step: {tokens:,} tokens, "
        f"{tokens / num_params(m)['total']:.1f} tokens/parameter, {tokens / _num_tokens(setup):.1f} epochs, "
        f"{tokens * flops_per_token(m):.2g} FLOPs"
    )


def _machine(setup: TrainSetup) -> str:
    m, mesh = setup.experiment.model, setup.mesh
    kernel, why = choose_kernel(m, m.context_length, make_objective(setup.experiment).masks_tokens())
    cores = f" ({mesh.shape[sharding.CORES]} cores, data-parallel)" if mesh.shape[sharding.CORES] > 1 else ""
    return (
        f"  machine  {sharding.num_devices()} x {jax.devices()[0].device_kind}{cores}, mesh data "
        f"{mesh.shape['data']} x model {mesh.shape['model']}, {m.dtype}, {kernel} attention ({why})"
    )


def privacy(setup: TrainSetup) -> dict[str, float]:
    """Epsilon and delta of the whole run; empty without DP-SGD."""
    sampler, multiplier = setup.batches.sampler, setup.experiment.optim.noise_multiplier
    if sampler is None or multiplier is None:
        return {}
    epsilon, delta = spent_by(sampler, multiplier, setup.experiment.train.steps)
    return {"epsilon": epsilon, "delta": delta}


def _privacy(setup: TrainSetup) -> list[str]:
    sampler, spent = setup.batches.sampler, privacy(setup)
    if sampler is None:
        return []
    beyond = " (beyond what init reveals)" if setup.experiment.init else ""
    return [
        f"  privacy  epsilon {spent['epsilon']:.3g} at delta {spent['delta']:.2g}{beyond}, for each of "
        f"{sampler.num_windows:,} windows; batches have {sampler.expected_batch:.1f} windows on average. Whoever knows "
        "the seed, which is in the run folder, is not covered: publish only the weights (gptjax export)"
    ]


def _num_tokens(setup: TrainSetup) -> int:
    return sum(len(s.ids) for s in setup.store.train)
