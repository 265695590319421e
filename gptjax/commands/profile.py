"""`gptjax profile`: where the time of a training step goes."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from gptjax.commands import is_run, parse, start_jax
from gptjax.errors import GptjaxError

if TYPE_CHECKING:
    from gptjax.probing.profiling import Profile


@dataclass(frozen=True)
class Options:
    """Trace some updates, without what the model writes for them; the run, where it is one, stays as it is."""

    what: Positional[str]  # a run folder, whose last checkpoint is gone on from, or an experiment file
    steps: int = 10  # to trace
    out: Path | None = None  # folder of the trace; None: profiles/NAME
    top: int = 15  # operations to show
    json: bool = False  # print one JSON object on stdout


def profile(arguments: list[str]) -> None:
    """A run or an experiment file -> a trace, and tables of operations and modules."""
    options: Options = parse(Options, arguments, "profile")
    for name in ("steps", "top"):
        if getattr(options, name) < 1:
            raise GptjaxError(f"--{name} {getattr(options, name)}: must be at least 1")
    start_jax()
    import jax

    from gptjax.interop.open import open_model
    from gptjax.loading import load_experiment
    from gptjax.probing.profiling import profile
    from gptjax.training import checkpoint
    from gptjax.training.run import open_run
    from gptjax.training.train_setup import build_train_setup, check_start, first_state, reopen

    if is_run(options.what):
        run = open_run(Path(options.what))
        setup, chosen = reopen(run, open_init=open_model), checkpoint.choose_to_go_on(run.checkpoints, None)
    else:
        setup, chosen = build_train_setup(load_experiment(options.what), open_init=open_model), None
    check_start(setup, fresh=chosen is None)
    with jax.set_mesh(setup.mesh):
        state = first_state(setup, chosen)
        setup.batches.seek((chosen and chosen.position) or setup.batches.position(int(state.step)))
    folder = options.out or Path("profiles") / setup.experiment.name
    found = profile(setup, state, folder, options.steps)
    if options.json:
        print(json.dumps(asdict(found) | {"trace": str(folder)}))
    else:
        print(as_text(found, options.top, folder))


def as_text(found: "Profile", top: int, folder: Path) -> str:
    """Two tables: by module, and the operations that take longest."""

    def share(seconds: float) -> str:
        return f"{seconds * 1e3:9.3f} ms {seconds / found.busy:6.1%}"

    shown = [f"  {' '.join(key):<32} {share(seconds)}" for key, seconds in found.by("module", "way").items()]
    longest = [
        f"  {o.name[:44]:<44} {share(o.seconds)} {o.calls:7.1f}  {o.module}, {o.way}" for o in found.operations[:top]
    ]
    return "\n".join(
        [
            f"{found.step_seconds * 1e3:.2f} ms a step, in which each device works for {found.busy * 1e3:.2f} ms",
            "",
            "by module                              a step  share",
            *shown,
            "",
            f"the {len(longest)} longest of {len(found.operations)} operations           a step  share   calls  whose",
            *longest,
            "",
            f"the trace is in {folder}: open the .trace.json.gz in it with ui.perfetto.dev",
        ]
    )
