"""The loss over the whole validation text, during a run and afterwards."""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from gptjax import sharding
from gptjax.data.store import find_store
from gptjax.training import checkpoint
from gptjax.training.metrics import num_params
from gptjax.training.run import Run, check_data
from gptjax.training.state import TrainState
from gptjax.training.workshop import Workshop, one_device, prepare, restore_state

Figures = dict[str, Any]


def evaluate(shop: Workshop, state: TrainState, beat: Callable[[], None] = lambda: None) -> Figures:
    """Loss over the whole validation text: nats a token, and bits a byte, which do not depend on the tokenizer.

    Bits a byte count the bytes of the tokens that are asked for; `end_of_text` has none, its cost is spread over them.
    """
    piece_bytes = np.zeros(shop.experiment.model.vocab_size or 0)
    piece_bytes[: shop.store.tokenizer.vocab_size] = [len(piece) for piece in shop.store.tokenizer.pieces]
    nats, answers, num_bytes = [], [], 0.0
    for batch in shop.batches.validation():
        beat()
        num_bytes += float((piece_bytes[batch.targets] * batch.weights).sum())
        total, count = shop.eval_step(state, sharding.place(batch, ("batch", "length"), shop.mesh))
        nats.append(total)
        answers.append(count)
    total_nats, total_answers = (float(np.sum(np.array(jax.device_get(x), np.float64))) for x in (nats, answers))
    return {
        "val_loss": total_nats / total_answers,
        "val_bits_per_byte": total_nats / math.log(2) / max(num_bytes, 1.0),
        "val_tokens": int(total_answers),
        "val_bytes": int(num_bytes),
    }


def evaluate_run(run: Run, which: str = "last") -> Figures:
    """`evaluate` for a checkpoint of a run folder, on one device; with the step and size of the model."""
    store = find_store(run.data_key(), run.experiment.data)
    shop = prepare(run.experiment, one_device(), store)
    check_data(run, shop.store)
    chosen = checkpoint.choose(run.checkpoints, which)
    with jax.set_mesh(shop.mesh):
        state = restore_state(chosen, shop.abstract, shop.experiment)
        began = time.perf_counter()
        figures = evaluate(shop, state)
    seconds = time.perf_counter() - began
    place = chosen.place or shop.batches.place(chosen.step)
    return figures | {
        "steps": chosen.step,
        "tokens": place.tokens,
        "seconds": seconds,
        "tokens_per_second": figures["val_tokens"] / seconds,
        "num_params": num_params(shop.experiment.model)["total"],
    }
