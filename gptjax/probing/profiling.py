"""Where the time of a training step goes: a trace of some steps, by operation and by module.

The trace is JAX's own (`jax.profiler`) and opens in Perfetto or XProf. The compiled program says what an operation is
for: XLA keeps the module and the function of every operation, for a fusion those of the last one.
"""

import re
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import jax

from gptjax.errors import GptjaxError
from gptjax.training.state import TrainState
from gptjax.training.train_setup import TrainSetup

WARM_UP = 3  # steps before the trace: the first compiles
MODULES = {  # a part of the op_name of an operation -> its module
    "embedding.embed": "embedding",
    "embedding.unembed": "head",
    "classifier": "head",
    "attention": "attention",
    "ffn": "ffn",
    "attention_norm": "norms",
    "ffn_norm": "norms",
    "final_norm": "norms",
    "dropout": "dropout",
    "cond": "optimiser",
    "psum": "sum over cores",
    "psum:reduce_sum": "sum over cores",
}
OTHER = "loss and the rest"
CONTROL_FLOW = re.compile(r'^\s*(?:ROOT )?%?([\w.-]+) = [^"\n]*? (?:while|conditional|call)\(', re.MULTILINE)


@dataclass(frozen=True)
class Operation:
    """One operation of the compiled step."""

    name: str  # XLA's
    module: str  # one of `MODULES`, or the rest
    way: str  # forward, backward, or update
    seconds: float  # per step, summed over its calls, mean over the devices
    calls: float  # per step and device


@dataclass(frozen=True)
class Profile:
    """The times in a trace."""

    step_seconds: float
    operations: tuple[Operation, ...]  # the slowest first

    @property
    def busy(self) -> float:
        """Seconds per step spent in operations; more than the step if several run at once."""
        return sum(o.seconds for o in self.operations)

    def by(self, *fields: str) -> dict[tuple[str, ...], float]:
        """Seconds per step, summed by fields of the operations, the largest first."""
        totals: dict[tuple[str, ...], float] = defaultdict(float)
        for o in self.operations:
            totals[*(getattr(o, field) for field in fields)] += o.seconds
        return dict(sorted(totals.items(), key=lambda item: -item[1]))


def profile(setup: TrainSetup, state: TrainState, folder: Path, steps: int) -> Profile:
    """Trains from a state and traces `steps` steps into a folder. Does not change the run folder."""
    first = int(state.step)
    with jax.set_mesh(setup.mesh):
        batches = [setup.batch(state, first + i)[0] for i in range(WARM_UP)]
        program = setup.lower(state, batches[0]).compile().as_text() or ""
        for batch in batches:
            state, metrics = setup.train_step(state, batch)
        jax.block_until_ready(metrics)
        batch = batches[-1]
        with jax.profiler.trace(str(folder)):
            start = time.perf_counter()
            for _ in range(steps):
                state, metrics = setup.train_step(state, batch)
                jax.block_until_ready(metrics)
            seconds = (time.perf_counter() - start) / steps
    durations, calls = _events(folder)
    if not durations:
        raise GptjaxError(f"{folder}: the trace contains no operation of the step on {jax.default_backend()}")
    sources = _sources(program)
    control_flow = set(CONTROL_FLOW.findall(program))
    scale = 1 / (steps * len(setup.mesh.local_devices))  # the trace covers the devices of this process
    operations = [
        Operation(name, *sources.get(name, (OTHER, "update")), durations[name] * scale, calls[name] * scale)
        for name in sorted(durations, key=lambda name: -durations[name])
        if name not in control_flow  # its time is that of the operations inside it, which are in the trace too
    ]
    return Profile(seconds, tuple(operations))


def _events(folder: Path) -> tuple[dict[str, float], dict[str, int]]:
    """The total seconds and the number of calls of each operation in the newest trace of a folder."""
    newest = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    durations: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for plane in jax.profiler.ProfileData.from_file(str(newest)).planes:
        for line in plane.lines:
            for event in line.events:
                if name := next((str(value) for stat, value in event.stats if stat == "hlo_op"), None):
                    durations[name] += event.duration_ns / 1e9
                    calls[name] += 1
    return durations, calls


def _sources(program: str) -> dict[str, tuple[str, str]]:
    """(module, way) of every operation of a compiled program that has an op_name."""
    found = re.findall(r"^\s*(?:ROOT )?%?([\w.-]+) = .*op_name=\"([^\"]*)\"", program, re.MULTILINE)
    return {name: (_module(op_name), _way(op_name)) for name, op_name in found}


def _module(op_name: str) -> str:
    return next((MODULES[part] for part in re.split(r"[/()]", op_name) if part in MODULES), OTHER)


def _way(op_name: str) -> str:
    if "transpose(" in op_name:
        return "backward"
    return "forward" if "jvp(" in op_name else "update"
