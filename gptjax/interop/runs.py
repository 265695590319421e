"""From a folder of Hugging Face to a run folder that every verb takes: its weights as a checkpoint at step 0."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import Experiment
from gptjax.data.batches import Place
from gptjax.durable import write_durably
from gptjax.inference.pretrained import Pretrained
from gptjax.interop.saving import check_empty
from gptjax.training import checkpoint
from gptjax.training.run import EXPERIMENT, GENERATION, PROVENANCE, Run, check_room, new_provenance, open_run
from gptjax.training.state import Weights

FORMAT_VERSION = 1


def import_run(
    pretrained: Pretrained, folder: Path, source: str, dtype: Literal["float32", "bfloat16"] = "float32"
) -> Run:
    """Writes a model into a new or empty run folder; `dtype` is that of the computation, the weights are float32.

    `experiment.json` comes last, so that an import which was cut off is no run. Raises `ExchangeError` where the folder
    holds something, `RunError` where the disk has no room.
    """
    check_empty(folder)
    check_room(folder, 4 * sum(x.size for x in jax.tree.leaves(pretrained.params)))
    (folder / "tokenizer").mkdir(parents=True)
    pretrained.tokenizer.save(folder / "tokenizer")
    model = dataclasses.replace(pretrained.model, dtype=dtype)
    experiment = Experiment(name=folder.resolve().name, model=model)
    run = Run(folder, experiment)
    _save(pretrained.params, run)
    generation = {
        "format": FORMAT_VERSION,
        "recommended": pretrained.recommended,
        "stop_tokens": list(pretrained.stop_tokens),
        "chat_template": pretrained.chat_template,
    }
    _write(folder / GENERATION, generation)
    _write(folder / PROVENANCE, new_provenance(None) | {"imported": source})
    write_durably(folder / EXPERIMENT, experiment.to_json())
    return open_run(folder)


def _save(params: Any, run: Run) -> None:
    weights = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float32)), params)
    writer = checkpoint.Writer(run.checkpoints, keep_last=1, keep_best=0)
    try:
        writer.save(Weights(jnp.zeros((), jnp.int32), weights), Place())
    finally:
        writer.close()


def _write(path: Path, values: dict[str, Any]) -> None:
    write_durably(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
