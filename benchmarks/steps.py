"""One update of the same GPT-2 with gptjax and with PyTorch (transformers), for the benchmarks that compare them.

Both have learned positions, LayerNorm, tanh-GELU, biases, a tied head and no dropout, and learn random tokens with
AdamW and clipping.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptjax.config import Experiment

Step = Callable[[], None]


@dataclass(frozen=True)
class Shape:
    """Of a model and its batch."""

    layers: int
    heads: int
    width: int
    context: int
    batch: int
    vocab: int = 65


def gptjax_step(shape: Shape, dtype: str) -> tuple[Step, dict[str, float]]:
    """An update of the shape with gptjax, and the figures of `step_of`."""
    from gptjax.config import Experiment

    return step_of(
        Experiment().override(
            model=dict(vocab_size=shape.vocab, num_layers=shape.layers, num_heads=shape.heads, embed_dim=shape.width,
                       context_length=shape.context, dtype=dtype, layers="unrolled"),
            train=dict(batch_size=shape.batch),
        )
    )  # fmt: skip


def step_of(e: "Experiment") -> tuple[Step, dict[str, float]]:
    """An update of an experiment on random tokens, as `gptjax train` compiles it; the bytes that it takes in addition
    to the state, and its FLOPs/token."""
    from functools import partial

    import jax
    import numpy as np

    from gptjax import cpu, sharding
    from gptjax.data.batches import Batch
    from gptjax.model.gpt import GPT
    from gptjax.model.size import flops_per_token, num_params
    from gptjax.training.optim import make_optimizer, trainable_mask
    from gptjax.training.state import abstract_state, create_state
    from gptjax.training.step import TOKEN_LOSS, mean_gradient, train_step

    cpu.use_cores()
    cpu.release_after_compiling()
    m, rows = e.model, e.train.batch_size
    tx, mesh = make_optimizer(e), sharding.make_mesh(e.mesh, rows, num_params(m)["total"])
    abstract = abstract_state(e, tx, mesh)
    layout = jax.tree.map(lambda x: x.sharding, abstract)
    how = dict(donate_argnums=0, out_shardings=(layout, jax.NamedSharding(mesh, jax.P())))
    update = partial(train_step, grad_fn=mean_gradient(GPT(m), TOKEN_LOSS, trainable_mask(e)), tx=tx)
    tokens = np.random.default_rng(0).integers(0, m.vocab_size, (1, rows, m.context_length + 1)).astype(np.int32)
    data = Batch(tokens[..., :-1], tokens[..., 1:], np.ones((1, rows, m.context_length), np.float32))
    data = sharding.shard_from_host(data, ("microbatch", "batch", "length"), mesh)
    with jax.set_mesh(mesh):
        box = [create_state(e, tx, abstract)]
        step = jax.jit(update, compiler_options=sharding.compiler_options(mesh), **how).lower(box[0], data).compile()

    def one() -> None:
        with jax.set_mesh(mesh):
            box[0], metrics = step(box[0], data)
            jax.block_until_ready(metrics)

    return one, {"step": step.memory_analysis().temp_size_in_bytes, "flops": flops_per_token(m)}


def torch_step(shape: Shape, dtype: str, kind: str, device: str = "cpu") -> tuple[Step, dict[str, float]]:
    """An update in eager or compiled PyTorch, with SDPA attention, and autocast for bfloat16.

    "eager" and "compile" have AdamW as PyTorch chooses it, which on a CPU is a loop over the weights (so has nanoGPT);
    "eager-fused" and "compile-fused" its quickest one. Compiled are the model and its loss, together.
    """
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = dict(vocab_size=shape.vocab, n_positions=shape.context, n_embd=shape.width, n_layer=shape.layers)
    no_dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    config = GPT2Config(**sizes, **no_dropout, n_head=shape.heads, attn_implementation="sdpa", use_cache=False)
    model = GPT2LMHeadModel(config).to(device)
    fused = True if device == "cuda" or kind.endswith("-fused") else None
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=fused)
    tokens = torch.randint(0, shape.vocab, (shape.batch, shape.context + 1), device=device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def loss_of(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = model(inputs).logits
        return torch.nn.functional.cross_entropy(logits.float().view(-1, shape.vocab), targets.view(-1))

    run = torch.compile(loss_of) if kind.startswith("compile") else loss_of

    def one() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = run(inputs, targets)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return one, {}


def make(kind: str, shape: Shape, dtype: str, device: str = "cpu") -> tuple[Step, dict[str, float]]:
    """The step of a contestant, "gptjax" or a kind of PyTorch's, made three times."""
    if kind == "gptjax":
        made, figures = gptjax_step(shape, dtype)
    else:
        made, figures = torch_step(shape, dtype, kind, device)
    for _ in range(3):
        made()
    return made, figures
