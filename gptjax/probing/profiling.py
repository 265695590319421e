"""Where the time of a training step goes: a trace of some steps, by operation and by module.

The trace is JAX's own (`jax.profiler`) and opens in Perfetto or XProf. What an operation of it is for stands in the
compiled program: XLA keeps the module and the function behind every operation, of several that it fused the last.
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
MODULES = {  # a part of the path behind an operation -> whose it is
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
REST = "loss and the rest"
AROUND = re.compile(r'^\s*(?:ROOT )?%?([\w.-]+) = [^"\n]*? (?:while|conditional|call)\(', re.MULTILINE)


@dataclass(frozen=True)
class Operation:
    """One operation of the compiled step."""

    name: str  # XLA's
    module: str  # whose it is: one of `MODULES`, or the rest
    way: str  # forward, backward, or update
    seconds: float  # a step, added over its calls, mean over the devices
    calls: float  # a step and device


@dataclass(frozen=True)
class Profile:
    """What a trace tells."""

    step_seconds: float
    operations: tuple[Operation, ...]  # the longest first

    @property
    def busy(self) -> float:
        """Seconds of a step in which a device works on an operation; where several run at once, more than the step."""
        return sum(o.seconds for o in self.operations)

    def by(self, *fields: str) -> dict[tuple[str, ...], float]:
        """Seconds a step, added up by fields of the operations; the most first."""
        total: dict[tuple[str, ...], float] = defaultdict(float)
        for o in self.operations:
            total[*(getattr(o, field) for field in fields)] += o.seconds
        return dict(sorted(total.items(), key=lambda item: -item[1]))


def profile(setup: TrainSetup, state: TrainState, folder: Path, steps: int) -> Profile:
    """Makes updates from a state and traces `steps` of them into a folder. The run folder stays as it is."""
    first = int(state.step)
    with jax.set_mesh(setup.mesh):
        batches = [setup.batch(state, first + i)[0] for i in range(WARM_UP)]
        program = setup.lower(state, batches[0]).compile().as_text() or ""
        for batch in batches:
            state, metrics = setup.train_step(state, batch)
        jax.block_until_ready(metrics)
        batch = batches[-1]
        with jax.profiler.trace(str(folder)):
            began = time.perf_counter()
            for _ in range(steps):
                state, metrics = setup.train_step(state, batch)
                jax.block_until_ready(metrics)
            seconds = (time.perf_counter() - began) / steps
    spent, calls = _events(folder)
    if not spent:
        raise GptjaxError(f"{folder}: the trace names no operation of the step on {jax.default_backend()}")
    purposes, around = _purposes(program), set(AROUND.findall(program))
    share = 1 / (steps * len(setup.mesh.local_devices))  # a trace is of this process's devices
    operations = [
        Operation(name, *purposes.get(name, (REST, "update")), spent[name] * share, calls[name] * share)
        for name in sorted(spent, key=lambda name: -spent[name])
        if name not in around  # its time is that of the operations inside, which are there too
    ]
    return Profile(seconds, tuple(operations))


def _events(folder: Path) -> tuple[dict[str, float], dict[str, int]]:
    """Seconds and number of all calls of each operation in the newest trace of a folder."""
    newest = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    spent: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for plane in jax.profiler.ProfileData.from_file(str(newest)).planes:
        for line in plane.lines:
            for event in line.events:
                if name := next((str(value) for stat, value in event.stats if stat == "hlo_op"), None):
                    spent[name] += event.duration_ns / 1e9
                    calls[name] += 1
    return spent, calls


def _purposes(program: str) -> dict[str, tuple[str, str]]:
    """(module, way) of every operation of a compiled program that says what it is for."""
    said = re.findall(r"^\s*(?:ROOT )?%?([\w.-]+) = .*op_name=\"([^\"]*)\"", program, re.MULTILINE)
    return {name: (_module(purpose), _way(purpose)) for name, purpose in said}


def _module(purpose: str) -> str:
    return next((MODULES[part] for part in re.split(r"[/()]", purpose) if part in MODULES), REST)


def _way(purpose: str) -> str:
    return "backward" if "transpose(" in purpose else "forward" if "jvp(" in purpose else "update"
