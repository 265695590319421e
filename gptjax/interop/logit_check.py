"""Whether two implementations of a model say the same: the largest difference between their logits.

The other one is transformers, on PyTorch, where both are installed; else gptjax's own reading of the folder, which
shows that nothing was lost on the way, but not that the families are understood.
"""

import dataclasses
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.errors import Disagreement
from gptjax.inference.pretrained import Pretrained
from gptjax.interop.adapter import add_adapter
from gptjax.interop.huggingface import read_config, read_weights
from gptjax.model.gpt import GPT

TOLERANCE = 1e-4  # of float32 sums in another order, on logits up to 10; in proportion above
TOKENS = 64  # in each of the two texts that are compared, where the context has room for them


class Agreement(NamedTuple):
    """The outcome of a comparison."""

    difference: float  # the largest, between two logits
    tolerance: float
    other: str  # what gptjax was compared with


def compare_logits(pretrained: Pretrained, folder: Path, adapter: Path | None = None) -> Agreement:
    """Compares a model with the one in a folder of Hugging Face, on two texts of random tokens, in float32.

    `adapter`: a folder with what PEFT is to put on the other one.
    """
    length = min(TOKENS, pretrained.model.context_length)
    tokens = np.random.default_rng(0).integers(0, pretrained.model.vocab_size or 1, (2, length))
    ours = logits(pretrained.model, pretrained.params, tokens)
    needed = ["transformers", "torch", *(["peft"] if adapter else [])]
    if missing := [name for name in needed if not find_spec(name)]:
        model, params = read_weights(folder)
        params = params if adapter is None else add_adapter(adapter, read_config(folder)[0], model, params)
        theirs = logits(model, params, tokens)
        verb = "is" if len(missing) == 1 else "are"
        other = f"gptjax's own reading of the folder, as {' and '.join(missing)} {verb} not installed"
    else:
        theirs, other = transformers_logits(folder, tokens, adapter), "peft" if adapter else "transformers"
    difference = float(np.max(np.abs(ours - theirs)))
    return Agreement(difference, TOLERANCE * max(1.0, float(np.max(np.abs(theirs))) / 10), other)


def require_agreement(found: Agreement, what: str) -> str:
    """A line that tells of the outcome. Raises `Disagreement` where the two do not agree."""
    line = f"largest difference of logits to {found.other}: {found.difference:.1e}"
    if not found.difference <= found.tolerance:  # NaN is no agreement
        raise Disagreement(
            f"{what}: {line}; at most {found.tolerance:.0e} was expected. Do not use it, and report this"
        )
    return line


def logits(model: Any, params: Any, tokens: np.ndarray) -> np.ndarray:
    """gptjax's logits in float32, with matrix products as exact as the device has them."""
    plain = dataclasses.replace(model, dtype="float32", attention_kernel="xla", layers="scan", remat="none")
    with jax.default_matmul_precision("highest"):
        out = jax.jit(GPT(plain).apply)({"params": params}, jnp.asarray(tokens, jnp.int32))
    return np.asarray(out)


def transformers_logits(folder: Path, tokens: np.ndarray, adapter: Path | None = None) -> np.ndarray:
    """The logits of transformers in float32, on the CPU, with an adapter of PEFT; no code that lies there is run."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    architecture = getattr(transformers, read_config(folder)[0].architecture)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        made = architecture.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, attn_implementation="eager"
        )
        if adapter is not None:
            import peft

            made = peft.PeftModel.from_pretrained(made, str(adapter))
        return made.eval()(torch.asarray(tokens)).logits.numpy()


def rounded(pretrained: Pretrained, dtype: str) -> Pretrained:
    """The same model with its weights rounded, as an export in that dtype has them."""
    params = jax.tree.map(lambda x: np.asarray(x).astype(jnp.dtype(dtype)), pretrained.params)
    return dataclasses.replace(pretrained, params=params)
