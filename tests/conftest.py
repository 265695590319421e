"""Eight CPU devices, an empty cache, and small helpers that many tests use. Settings must stand before JAX starts."""

import json
import os
import tempfile

from compilation import QUICK_FLAGS

os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {QUICK_FLAGS}"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers share the folder of the process that started them
    os.environ["GPTJAX_CACHE"] = tempfile.mkdtemp(prefix="gptjax-tests-")

from pathlib import Path

from jaxtyping import install_import_hook

# checks the shapes and dtypes of every call of these modules against their annotations
CHECKED = ("gptjax.model", "gptjax.training.step", "gptjax.objectives", "gptjax.inference")
install_import_hook(CHECKED, "shape_checks.check")

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from gptjax.config import Experiment, ModelConfig
from gptjax.sharding import one_device
from gptjax.training import checkpoint, train
from gptjax.training.restore import restore_state
from gptjax.training.run import open_run
from gptjax.training.state import leaf_name
from gptjax.training.train_setup import build_train_setup, enable_compilation_cache

# the same examples every time; `--hypothesis-profile default` looks further
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("same")
enable_compilation_cache()  # in the temporary folder: what one test compiled, the next one finds
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

TINY = Experiment(name="tiny").override(
    model=dict(context_length=16, num_layers=2, embed_dim=16, num_heads=2),
    optim=dict(warmup_steps=2, learning_rate=1e-2),
    train=dict(steps=6, batch_size=8, eval_every=3, checkpoint_every=3, log_every=1, sample_tokens=8),
)


def tiny_model(**changes) -> ModelConfig:
    """A resolved model of two layers that compiles in a moment."""
    return TINY.override(model=dict(vocab_size=11) | changes).model.resolved()


def write_corpus(folder: Path, size: int = 6000) -> Path:
    """A small text file with some structure to learn."""
    path = folder / "corpus.txt"
    path.write_text("".join(f"line {i} is {i * i % 97}\n" for i in range(size // 14)))
    return path


def tiny_run(folder: Path, **changes) -> Experiment:
    """`TINY` on a small corpus of its own, whose validation text is short."""
    return TINY.override({"data.source": str(write_corpus(folder))} | changes)


def fine_tuning(folder: Path, init: Path, **changes) -> Experiment:
    """`TINY` from a run on: LoRA, some weights frozen and rates by layer, on a table with a rule that can be learnt.

    The answer is the letter after the prompt's.
    """
    rows = ({"letter": chr(97 + i % 25), "number": i, "next": chr(98 + i % 25)} for i in range(400))
    (folder / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = dict(source=str(folder / "table.jsonl"), prompt="{letter}{number}:", answer="{next}", tokenizer="init")
    model = dict(lora_rank=2, lora_targets=("query", "out", "up"), dropout=0.1)
    e = TINY.override(init=str(init), model=model, data=data | {"val_fraction": 0.2}, objective=dict(name="sft"))
    return e.override({"optim.freeze": ("*.out_lora_down",), "optim.layer_decay": 0.8} | changes)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data, where there is one."""
    if "GPTJAX_DATA" not in os.environ:
        pytest.skip("GPTJAX_DATA is not set: it names the folder with the real data")
    return Path(os.environ["GPTJAX_DATA"]).resolve()


@pytest.fixture
def single_device(monkeypatch):
    """Runs on one of the eight devices, so that batches need not divide by eight and compiling is quick."""
    use_one_device(monkeypatch)


def use_one_device(monkeypatch) -> None:
    """What the fixture `single_device` does, for fixtures of a wider scope."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr("gptjax.sharding.make_mesh", lambda *_: one_device())


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    """The folder of a run of 6 steps with checkpoints 2, 4 and 6 on one device. Copy it before you harm it."""
    folder = tmp_path_factory.mktemp("finished")
    e = tiny_run(folder, **{"train.checkpoint_every": 2, "train.eval_every": 2, "train.keep_last": 3})
    with pytest.MonkeyPatch.context() as patch:
        use_one_device(patch)
        train.train(e, folder / "run")
    return folder / "run"


def restored(folder: Path, which: str = "last", folder_of_checkpoints: Path | None = None) -> dict:
    """Everything that a checkpoint of a run holds, as host arrays by their dotted names."""
    run = open_run(folder)
    setup = build_train_setup(run.experiment, one_device())
    state = restore_state(
        checkpoint.choose(folder_of_checkpoints or run.checkpoints, which), setup.abstract, setup.experiment
    )
    return {leaf_name(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(state)}


def assert_same(a: dict, b: dict) -> None:
    """Two of what `restored` gives have the same bits."""
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].tobytes() == b[name].tobytes(), name
