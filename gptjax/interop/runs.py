"""Imports a Hugging Face model as a run folder, with its weights as a checkpoint at step 0."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.atomic_io import write_atomic
from gptjax.config import Experiment
from gptjax.data.batches import DataPosition
from gptjax.errors import ExchangeError
from gptjax.inference.pretrained import Pretrained
from gptjax.interop.files import fill_folder
from gptjax.training import checkpoint
from gptjax.training.provenance import new_provenance
from gptjax.training.run import EXPERIMENT, PROVENANCE, Run, check_room, open_run, write_generation, write_json
from gptjax.training.state import Weights, leaf_name


def import_run(
    pretrained: Pretrained, folder: Path, source: str, dtype: Literal["float32", "bfloat16"] = "float32"
) -> Run:
    """Writes a model into a new or empty run folder; `dtype` is that of the computation, the weights are float32.

    `experiment.json` is written last, so an interrupted import is not a run. Raises `ExchangeError` if the folder is
    not empty or a weight is not finite, `RunError` if the disk is full.
    """
    weights = jax.tree.map(lambda x: np.asarray(x, np.float32), pretrained.params)
    if bad := [leaf_name(path) for path, x in jax.tree.leaves_with_path(weights) if not np.isfinite(x).all()]:
        raise ExchangeError(source, [f"{bad[0]} and {len(bad) - 1} other weights have non-finite values"])
    model = dataclasses.replace(pretrained.model, dtype=dtype)
    experiment = Experiment(name=folder.resolve().name, model=model)
    with fill_folder(folder):
        check_room(folder, sum(x.nbytes for x in jax.tree.leaves(weights)))
        (folder / "tokenizer").mkdir()
        pretrained.tokenizer.save(folder / "tokenizer")
        _save(weights, Run(folder, experiment))
        write_generation(folder, pretrained)
        write_json(folder / PROVENANCE, new_provenance(None) | {"imported": source})
        write_atomic(folder / EXPERIMENT, experiment.to_json())
    return open_run(folder)


def _save(weights: Any, run: Run) -> None:
    writer = checkpoint.CheckpointWriter(run.checkpoints, keep_last=1, keep_best=0)
    try:
        writer.save(Weights(jnp.zeros((), jnp.int32), jax.tree.map(jnp.asarray, weights)), DataPosition())
    finally:
        writer.close()
