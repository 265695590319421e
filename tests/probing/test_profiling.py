"""A profile names what the step is made of, and changes nothing."""

import jax
import pytest
from conftest import one_device, tiny_run

from gptjax.errors import GptjaxError
from gptjax.probing.profiling import profile
from gptjax.training.workshop import first_state, prepare
from gptjax.verbs.profile import as_text
from gptjax.verbs.profile import profile as verb


@pytest.mark.parametrize("layers", ["scan", "unrolled"])
def test_every_module_of_the_step_is_found_both_ways(tmp_path, layers):
    shop = prepare(tiny_run(tmp_path, **{"model.layers": layers}), one_device())
    with jax.set_mesh(shop.mesh):
        state = first_state(shop, None)
    found = profile(shop, state, tmp_path / "trace", steps=2)
    times = found.by("module", "way")
    for module in ("attention", "ffn", "head"):
        assert times[module, "forward"] > 0 and times[module, "backward"] > 0
    assert times["optimiser", "update"] > 0
    assert sum(times.values()) == pytest.approx(found.busy)
    assert list(times.values()) == sorted(times.values(), reverse=True)
    assert all(o.calls >= 0.5 for o in found.operations)
    _, listed = as_text(found, 3, tmp_path).split("the 3 longest of ")
    rows = listed.split("\n\n")[0].splitlines()[1:]
    assert [row.split()[0] for row in rows] == [o.name for o in found.operations[:3]]


def test_steps_must_be_some():
    with pytest.raises(GptjaxError, match="--steps 0: must be at least 1"):
        verb(["experiments/quickstart.py", "--steps", "0"])
