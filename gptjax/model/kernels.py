"""The decisions of the model that depend on the backend: which kernel, layout and limit of memory."""

import re

import jax

from gptjax import cpu
from gptjax.config import ModelConfig


def choose_kernel(
    config: ModelConfig,
    length: int = 0,
    masked: bool = False,
    decoding: bool = False,
    backend: str | None = None,
) -> tuple[str, str]:
    """The attention kernel to use, "xla" or "cudnn", and why.

    `length`: of training sequences, 0 without gradients; `masked`: there is a mask beyond that of the model itself;
    `backend`: default is the one in use.
    """
    backend = backend or jax.default_backend()
    if config.attention_kernel == "xla":
        return "xla", "requested"
    if backend != "gpu":
        return "xla", f"on {backend}"
    head_dim, capability = config.resolved().head_dim or 0, _capability()
    max_head_dim = 256 if capability >= (9, 0) else 128
    masked = masked or config.sliding_window is not None or config.positions == "alibi"
    obstacles = [
        reason
        for obstacle, reason in [
            (config.dtype != "bfloat16", "cuDNN needs model.dtype = 'bfloat16'"),
            (config.attention_softcap is not None, "cuDNN has no soft-cap"),
            (config.dropout > 0, "attention dropout is drawn outside cuDNN"),
            (capability < (8, 0), "cuDNN needs an NVIDIA GPU of compute capability 8.0 or later"),
            (head_dim % 8 != 0, "cuDNN needs head_dim to be a multiple of 8"),
            (head_dim > max_head_dim, f"cuDNN needs head_dim to be at most {max_head_dim} on this GPU"),
            (masked and length % 2 != 0, "cuDNN needs an even context_length to train with a mask or ALiBi"),
            (decoding, "decoding with a cache"),
        ]
        if obstacle
    ]
    if obstacles:
        return "xla", ", ".join(obstacles)
    return "cudnn", "requested" if config.attention_kernel == "cudnn" else "fused, on gpu"


def _capability() -> tuple[int, ...]:
    """CUDA compute capability of the local GPUs, (9, 0) for instance; () if they are not NVIDIA's."""
    text = getattr(jax.local_devices()[0], "compute_capability", "")
    return tuple(map(int, text.split("."))) if re.fullmatch(r"\d+\.\d+", text) else ()


def on_cpu() -> bool:
    """Whether XLA's CPU backend is in use, whose fusions and matmuls need help."""
    return jax.default_backend() == "cpu"


def low_precision_matmul_is_fast() -> bool:
    """Whether large bfloat16 products take no longer than float32 products."""
    return not on_cpu() or cpu.bfloat16_matmul_is_fast()


def limit_for_backend(on_cpu: int, on_gpu: int) -> int:
    """The limit for the backend in use."""
    return on_gpu if jax.default_backend() == "gpu" else on_cpu
