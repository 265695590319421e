"""Compares the logits of two implementations of a model.

The reference is transformers on PyTorch, if both are installed. Otherwise gptjax reads the folder again: this shows
that no weight was lost, but not that the model family is implemented correctly.
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

TOLERANCE = 1e-4  # for float32 sums in another order and logits up to 10; scaled up above
TOKEN_LOSS = 64  # in each of the two compared texts, or the context length if that is less


class Agreement(NamedTuple):
    """The outcome of a comparison."""

    difference: float  # the largest difference of two logits
    tolerance: float
    reference: str  # what gptjax was compared with


def compare_logits(pretrained: Pretrained, folder: Path, adapter: Path | None = None) -> Agreement:
    """Compares a model with the one in a Hugging Face folder, on two texts of random tokens, in float32.

    `adapter`: the folder of a PEFT adapter for the latter.
    """
    length = min(TOKEN_LOSS, pretrained.model.context_length)
    tokens = np.random.default_rng(0).integers(0, pretrained.model.vocab_size or 1, (2, length))
    ours = logits(pretrained.model, pretrained.params, tokens)
    needed = ["transformers", "torch", *(["peft"] if adapter else [])]
    if missing := [name for name in needed if not find_spec(name)]:
        config, params = read_weights(folder)
        if adapter is not None:
            params = add_adapter(adapter, read_config(folder)[0], config, params)
        expected = logits(config, params, tokens)
        verb = "is" if len(missing) == 1 else "are"
        reference = f"the folder as read by gptjax ({' and '.join(missing)} {verb} not installed)"
    else:
        expected = transformers_logits(folder, tokens, adapter)
        reference = "peft" if adapter else "transformers"
    difference = float(np.max(np.abs(ours - expected)))
    return Agreement(difference, TOLERANCE * max(1.0, float(np.max(np.abs(expected))) / 10), reference)


def require_agreement(agreement: Agreement, name: str) -> str:
    """The result in one line. Raises `Disagreement` if the difference is above the tolerance."""
    line = f"largest difference of logits to {agreement.reference}: {agreement.difference:.1e}"
    if not agreement.difference <= agreement.tolerance:  # also for NaN
        raise Disagreement(
            f"{name}: {line}; at most {agreement.tolerance:.0e} was expected. Do not use this model, and report a bug"
        )
    return line


def logits(config: Any, params: Any, tokens: np.ndarray) -> np.ndarray:
    """gptjax's logits in float32, with the highest matmul precision of the device."""
    config = dataclasses.replace(config, dtype="float32", attention_kernel="xla", layers="scan", remat="none")
    with jax.default_matmul_precision("highest"):
        out = jax.jit(GPT(config).apply)({"params": params}, jnp.asarray(tokens, jnp.int32))
    return np.asarray(out)


def transformers_logits(folder: Path, tokens: np.ndarray, adapter: Path | None = None) -> np.ndarray:
    """The logits of transformers in float32 on the CPU, with an optional PEFT adapter; runs no code from the folder."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    architecture = getattr(transformers, read_config(folder)[0].architecture)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = architecture.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, attn_implementation="eager"
        )
        if adapter is not None:
            import peft

            model = peft.PeftModel.from_pretrained(model, str(adapter))
        return model.eval()(torch.asarray(tokens)).logits.numpy()


def rounded(pretrained: Pretrained, dtype: str) -> Pretrained:
    """The same model with its weights rounded to a dtype, as in an export."""
    params = jax.tree.map(lambda x: np.asarray(x).astype(jnp.dtype(dtype)), pretrained.params)
    return dataclasses.replace(pretrained, params=params)
