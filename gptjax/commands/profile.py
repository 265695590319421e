"""`gptjax profile`: where the time of a training step goes."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import Positional

from gptjax.commands import is_run, parse, start_jax
from gptjax.commands.options import FolderOption
from gptjax.errors import GptjaxError

if TYPE_CHECKING:
    from gptjax.probing.profiling import Profile


@dataclass(frozen=True)
class Options:
    """Profile some training steps, without generating text between them; does not change the run."""

    source: Annotated[Positional[str], tyro.conf.arg(metavar="RUN|FILE")]
    """a run folder, to start from its last checkpoint, or an experiment file"""
    steps: int = 10  # steps to trace
    out: FolderOption = None  # folder of the trace; None: profiles/NAME
    top: int = 15  # operations to show
    json: bool = False  # print one JSON object


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
    from gptjax.training.preflight import check_start
    from gptjax.training.run import open_run
    from gptjax.training.train_setup import build_train_setup, first_state, reopen

    if is_run(options.source):
        run = open_run(Path(options.source))
        setup = reopen(run, open_init=open_model)
        chosen = checkpoint.choose_to_resume(run.checkpoints, None)
    else:
        setup = build_train_setup(load_experiment(options.source), open_init=open_model)
        chosen = None
    check_start(setup, fresh=chosen is None)
    with jax.set_mesh(setup.mesh):
        state = first_state(setup, chosen)
        setup.batches.seek((chosen and chosen.position) or setup.batches.position(int(state.step)))
    folder = options.out or Path("profiles") / setup.experiment.name
    result = profile(setup, state, folder, options.steps)
    if options.json:
        print(json.dumps(asdict(result) | {"trace": str(folder)}))
    else:
        print(format_profile(result, options.top, folder))


def format_profile(profile: "Profile", top: int, folder: Path) -> str:
    """Two tables: by module, and the slowest operations."""

    def time_and_share(seconds: float) -> str:
        return f"{seconds * 1e3:9.3f} {seconds / profile.busy:6.1%}"

    modules = [
        f"  {' '.join(key):<32} {time_and_share(seconds)}" for key, seconds in profile.by("module", "way").items()
    ]
    slowest = [
        f"  {o.name[:44]:<44} {time_and_share(o.seconds)} {o.calls:7.1f}  {o.module}, {o.way}"
        for o in profile.operations[:top]
    ]
    return "\n".join(
        [
            f"{profile.step_seconds * 1e3:.2f} ms/step, of which each device is busy for {profile.busy * 1e3:.2f} ms",
            "",
            "by module                            ms/step  share",
            *modules,
            "",
            f"the {len(slowest)} slowest of {len(profile.operations)} operations",
            f"  {'operation':<44} {'ms/step':>9} {'share':>6} {'calls':>7}  module",
            *slowest,
            "",
            f"The trace is in {folder}: open its .trace.json.gz with ui.perfetto.dev",
        ]
    )
