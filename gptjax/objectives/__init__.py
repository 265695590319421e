"""What a model learns to predict, and by which loss: a file for each objective.

Your own objective is a subclass of `Objective` in a module of yours, named by `objective.name = "module:Class"`. It is
imported for your own experiment files, never because a run folder names it (see `training/run.py`).
"""

import difflib
import importlib
from collections.abc import Iterator

from gptjax.config import RENAMED_OBJECTIVES, Experiment, ObjectiveConfig
from gptjax.errors import ConfigError
from gptjax.objectives.base import Objective
from gptjax.objectives.causal import Causal
from gptjax.objectives.distill import Distill
from gptjax.objectives.dpo import DPO
from gptjax.objectives.fim import FIM
from gptjax.objectives.grpo import GRPO
from gptjax.objectives.mlm import MLM
from gptjax.objectives.prefix_lm import PrefixLM
from gptjax.objectives.rloo import RLOO
from gptjax.objectives.sft import SFT

OBJECTIVES: dict[str, type[Objective]] = {
    "causal": Causal,
    "prefix_lm": PrefixLM,
    "mlm": MLM,
    "fim": FIM,
    "sft": SFT,
    "dpo": DPO,
    "rloo": RLOO,
    "grpo": GRPO,
    "distill": Distill,
}


def make_objective(experiment: Experiment) -> Objective:
    """The objective of an experiment. Raises `ConfigError` for an unknown name."""
    return objective_class(experiment.objective.name)(experiment)


def objective_class(name: str) -> type[Objective]:
    """The class of a name in `OBJECTIVES`, or the class `module:Class`. Raises `ConfigError` if there is none."""
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    if ":" in name:
        return _import_class(name)
    if name in RENAMED_OBJECTIVES:
        raise ConfigError([f"objective.name = {name!r}: is now called {RENAMED_OBJECTIVES[name]!r}"])
    near = difflib.get_close_matches(name, OBJECTIVES, 1, 0.5)
    suggestion = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(
        [
            f"objective.name = {name!r}: no such objective; {suggestion}There are {', '.join(OBJECTIVES)}; your "
            "own is named module:Class"
        ]
    )


def name_problems(name: object) -> dict[str, str]:
    """The message for an unknown name, by its field; empty for a known name, and for what is no text at all."""
    try:
        if isinstance(name, str):
            objective_class(name)
    except ConfigError as e:
        return {"objective.name": e.problems[0]}
    return {}


def _import_class(name: str) -> type[Objective]:
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as e:  # of the user's own module
        problem = f"objective.name = {name!r}: cannot be imported ({type(e).__name__}: {e})"
        raise ConfigError([f"{problem}; name a class as module:Class"]) from None
    if not (isinstance(found, type) and issubclass(found, Objective)):
        raise ConfigError(
            [f"objective.name = {name!r}: must be a subclass of gptjax.objectives.Objective, and is {found!r}"]
        )
    return found


def objective_problems(experiment: Experiment) -> Iterator[str]:
    """A message for each rule about the objective that the experiment breaks."""
    objective, e, o = make_objective(experiment), experiment, experiment.objective
    if not (e.model.causal or objective.bidirectional or e.data.answers == "classes"):
        yield (
            f"model.causal = False: objective.name = {o.name!r} predicts tokens that the model would see; set "
            f"model.causal = True, or objective.name = {_which('bidirectional')}"
        )
    if objective.needs_answers and not e.with_answers:
        yield (
            f"objective.name = {o.name!r}: needs examples with answers; set data.prompt and data.answer, or use a "
            "source task:NAME"
        )
    if e.data.answers == "classes" and not objective.predicts_classes:
        yield (
            f"objective.name = {o.name!r}: with data.answers = 'classes' only the labels are predicted; set "
            f"objective.name = {_which('predicts_classes')}"
        )
    if e.data.rejected is not None and not objective.reads_rejected:
        yield f"data.rejected: is read with objective.name = {_which('reads_rejected')} only; leave it out"
    if objective.group().rows > 1 and not isinstance(e.data.source, str) and len(e.data.source) > 1:
        yield (
            f"data.source = {e.data.source!r}: objective.name = {o.name!r} reads rows that belong together; give one "
            "source"
        )
    yield from _unused_fields(o, objective.fields)
    yield from objective.problems()


def _unused_fields(config: ObjectiveConfig, fields: tuple[str, ...]) -> Iterator[str]:
    owned = {field for kind in OBJECTIVES.values() for field in kind.fields}
    for field in sorted(owned.difference(fields)):
        value = getattr(config, field)
        if value != getattr(ObjectiveConfig(), field):
            owners = [repr(name) for name, kind in OBJECTIVES.items() if field in kind.fields]
            remedy = f"set objective.name = {' or '.join(owners)}"
            if field == "z_loss":
                remedy = "leave it out"
            yield f"objective.{field} = {value}: has no effect with objective.name = {config.name!r}; {remedy}"


def _which(attribute: str) -> str:
    return " or ".join(repr(name) for name, kind in OBJECTIVES.items() if getattr(kind, attribute))
