"""The cores of a CPU as devices: how many are used, and that a run on several cores equals the run on one."""

import json
import signal

import jax
import pytest
from conftest import assert_same, restored, tiny_run
from processes import PATIENCE, start, wait_for_step, write_experiment

from gptjax import cpu, sharding
from gptjax.config import MeshConfig
from gptjax.model.axes import AXES


@pytest.mark.parametrize("rows, cores", [(8, 8), (6, 6), (12, 6), (7, 7), (20, 5), (11, 1), (1, 1)])
def test_the_number_of_cores_divides_the_rows(monkeypatch, rows, cores):
    monkeypatch.setattr(sharding, "_cores_are_devices", lambda: True)
    assert sharding.make_mesh(MeshConfig(), rows, 1000).shape == {"cores": cores, "data": 1, "model": 1}


def test_copies_of_the_weights_take_at_most_a_quarter_of_the_memory(monkeypatch):
    monkeypatch.setattr(sharding, "_cores_are_devices", lambda: True)
    monkeypatch.setattr(cpu, "memory", lambda: 112_000)
    assert [sharding.make_mesh(MeshConfig(), 8, n).size for n in (2000, 1000, 500, 250, 125)] == [1, 1, 2, 4, 8]


def test_limits_of_a_container_apply_to_cores_and_memory(monkeypatch):
    assert cpu.cores() >= 1 and cpu.memory() > 1 << 28
    limits = {"cpu.max": "50000 100000", "memory.max": "1000000\n"}
    monkeypatch.setattr(cpu, "_limit", limits.get)
    assert (cpu.cores(), cpu.memory()) == (1, 1_000_000)


@pytest.mark.parametrize(
    "processor, fast",
    [
        ("vendor_id\t: GenuineIntel\nflags\t\t: fpu avx2 avx512_bf16 amx_bf16 amx_tile\n", True),
        ("vendor_id\t: GenuineIntel\nflags\t\t: fpu avx2 avx512_bf16\n", False),
        ("vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx2 avx512_bf16\n", True),
        ("vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx2\n", False),
        ("Features\t: fp asimd bf16\n", True),
        ("", True),
    ],
)
def test_the_processor_decides_whether_bfloat16_matmul_is_fast(monkeypatch, processor, fast):
    monkeypatch.setattr(cpu, "_processor", lambda: processor)
    assert cpu.bfloat16_matmul_is_fast.__wrapped__() is fast


def test_devices_that_are_not_cores_shard_the_weights():
    assert jax.device_count() == sharding.num_devices() == 8
    assert sharding.make_mesh(MeshConfig(model=2), 8, 1000).shape == {"cores": 1, "data": 4, "model": 2}


def test_every_axis_of_a_weight_has_a_rule():
    assert AXES.keys() <= sharding.RULES.keys()


@pytest.mark.slow
def test_three_cores_train_as_one_does_and_resume_bitwise(tmp_path):
    e = tiny_run(tmp_path, **{"train.batch_size": 12, "train.microbatches": 2, "train.steps": 60, "model.dropout": 0.1})
    e = e.override({"train.checkpoint_every": 20, "train.eval_every": 20, "train.sample_tokens": 0})
    file, output = write_experiment(tmp_path, e), {}
    for cores in ("1", "3"):
        process = start(file, tmp_path / cores, JAX_NUM_CPU_DEVICES=cores)
        output[cores] = process.communicate(timeout=PATIENCE)[1]
        assert process.returncode == 0, output[cores]
    assert "(3 cores, data-parallel)" in output["3"] and "data-parallel" not in output["1"]
    one, three = (json.loads((tmp_path / cores / "result.json").read_text()) for cores in ("1", "3"))
    assert three["val_loss"] == pytest.approx(one["val_loss"], abs=1e-4)

    stopped = start(file, tmp_path / "stopped", JAX_NUM_CPU_DEVICES="3")
    wait_for_step(tmp_path / "stopped", 10, stopped)
    stopped.send_signal(signal.SIGTERM)
    stopped.communicate(timeout=PATIENCE)
    assert stopped.returncode == 75
    resumed = start(file, tmp_path / "stopped", JAX_NUM_CPU_DEVICES="3")
    assert resumed.communicate(timeout=PATIENCE) and resumed.returncode == 0
    assert_same(restored(tmp_path / "stopped"), restored(tmp_path / "3"))
