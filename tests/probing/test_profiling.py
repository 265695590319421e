"""A profile names the modules of the step, and changes nothing."""

import re
from contextlib import nullcontext
from types import SimpleNamespace

import jax
import pytest
from conftest import one_device, tiny_run

from gptjax.commands.profile import format_profile
from gptjax.commands.profile import profile as command
from gptjax.errors import GptjaxError
from gptjax.probing import profiling
from gptjax.probing.profiling import profile
from gptjax.training.train_setup import build_train_setup, first_state


@pytest.mark.parametrize("layers", ["scan", pytest.param("unrolled", marks=pytest.mark.slow)])
def test_every_module_of_the_step_is_found_both_ways(tmp_path, layers):
    setup = build_train_setup(tiny_run(tmp_path, **{"model.layers": layers}), one_device())
    with jax.set_mesh(setup.mesh):
        state = first_state(setup, None)
    found = profile(setup, state, tmp_path / "trace", steps=2)
    times = found.by("module", "way")
    for module in ("attention", "ffn", "head"):
        assert times[module, "forward"] > 0 and times[module, "backward"] > 0
    assert times["optimiser", "update"] > 0
    assert sum(times.values()) == pytest.approx(found.busy)
    assert list(times.values()) == sorted(times.values(), reverse=True)
    assert all(o.calls >= 0.5 for o in found.operations)
    assert not [o.name for o in found.operations if re.fullmatch(r"(while|cond|conditional|call)[.\d]*", o.name)]
    _, listed = format_profile(found, 3, tmp_path).split("the 3 slowest of ")
    rows = listed.split("\n\n")[0].splitlines()[2:]
    assert [row.split()[0] for row in rows] == [o.name for o in found.operations[:3]]


def test_steps_must_be_some():
    with pytest.raises(GptjaxError, match="--steps 0: must be at least 1"):
        command(["experiments/quickstart.py", "--steps", "0"])


PROGRAM = """
%body (x: (s32[], f32[8])) -> (s32[], f32[8]) {
  %dot.1 = f32[8]{0} dot(%x, %x), metadata={op_name="jit(step)/jvp(GPT)/while/body/attention/dot"}
  ROOT %call_fusion = f32[8]{0} fusion(%dot.1), kind=kLoop, calls=%fused, metadata={op_name="a while(b"}
}
ENTRY %main {
  %while.2 = (s32[], /*index=1*/f32[8]{0:T(256)}) while(%start), condition=%c, body=%body
  cond.3 = f32[8]{0} conditional(pred, a, b), branch_computations={yes, no}, metadata={op_name="jit(step)/cond"}
  ROOT %inside = f32[8]{0} call(%cond.3), to_apply=%more
}
"""


def test_time_inside_an_operation_counts_once_and_over_the_devices_of_this_process(tmp_path, monkeypatch):
    seconds = {"dot.1": 6.0, "call_fusion": 2.0, "while.2": 8.0, "cond.3": 1.0, "inside": 3.0}
    setup = SimpleNamespace(
        mesh=SimpleNamespace(size=4, local_devices=["a", "b"]),  # of two processes
        batch=lambda state, step: (None, {}),
        lower=lambda *_: SimpleNamespace(compile=lambda: SimpleNamespace(as_text=lambda: PROGRAM)),
        train_step=lambda state, batch: (state, 0.0),
    )
    monkeypatch.setattr(jax, "set_mesh", lambda _: nullcontext())
    monkeypatch.setattr(jax.profiler, "trace", lambda _: nullcontext())
    monkeypatch.setattr(profiling, "_events", lambda _: (seconds, dict.fromkeys(seconds, 6)))
    found = profile(setup, SimpleNamespace(step=0), tmp_path, steps=3)
    assert [(o.name, o.module, o.seconds, o.calls) for o in found.operations] == [
        ("dot.1", "attention", 1.0, 1.0),
        ("call_fusion", "loss and the rest", pytest.approx(1 / 3), 1.0),
    ]
