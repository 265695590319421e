"""Hyperparameter search: each trial depends on the results of earlier ones. The only file that needs Optuna.

optuna.journal   every trial and its result; the same command resumes the same search
"""

import contextlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

from gptjax.atomic_io import read_json
from gptjax.checks import check
from gptjax.config import Search, Uniform
from gptjax.errors import ConfigError, GptjaxError, RunError
from gptjax.lab.progress import write_note
from gptjax.lab.sweep import States
from gptjax.lab.trials import Trial, write_sweep
from gptjax.training.run import METRICS, RESULT

JOURNAL = "optuna.journal"
Method = Literal["random", "tpe", "halving"]


class SearchPlan:
    """Asks Optuna for the next trial whenever a worker is free, until there are `count`.

    tpe: Bergstra et al. 2011. halving: random values; at every evaluation the worse trials are pruned, by asynchronous
    successive halving (Li et al. 2020). Raises `ConfigError` for an invalid space or base experiment, and `RunError` if
    the folder holds another search.
    """

    def __init__(self, search: Search, method: Method, count: int, workers: int, folder: Path):
        optuna = _optuna()
        e = search.experiment
        if method == "halving" and not 0 < e.train.eval_every < e.train.steps:
            problem = "halving compares trials at these steps; it must be at least 1 and less than train.steps"
            raise ConfigError([f"train.eval_every = {e.train.eval_every}: {problem}"])
        check(e.override({path: _lowest(values) for path, values in search.space.items()}))
        self._search = search
        self._count = count
        self._workers = workers
        self._folder = folder
        self._space = {path: _distribution(optuna, values) for path, values in search.space.items()}
        self._study = _open_study(optuna, search, method, folder)
        self._states = optuna.trial.TrialState
        self._finished = optuna.exceptions.UpdateFinishedTrialError
        self._running: dict[str, Any] = {}  # name -> Optuna's trial, without a result yet
        self._known: dict[str, Trial] = {}
        self._pruned: set[str] = set()
        self._reported: dict[str, int] = {}
        for frozen in self._study.trials:
            if frozen.params.keys() != self._space.keys():
                continue  # killed before all of its values were known, or made for another space
            self._add(frozen.number, frozen.params)
            if frozen.state == self._states.RUNNING:
                self._running[self._name(frozen.number)] = optuna.trial.Trial(self._study, frozen._trial_id)
            elif frozen.state != self._states.COMPLETE:
                self._pruned.add(self._name(frozen.number))
        if self._known:  # a kill may have come between creating a trial and writing it
            write_sweep(folder, list(self._known.values()))

    def trials(self, states: States) -> Sequence[Trial]:
        for name in list(self._running):
            if name in states:
                self._report_result(name, states)
        while len(self._known) < self._count and len(self._running) < self._workers:
            trial = self._study.ask(self._space)
            self._running[self._name(trial.number)] = trial
            write_sweep(self._folder, [self._add(trial.number, trial.params)])
        return list(self._known.values())

    def pruned(self, states: States) -> Collection[str]:
        return self._pruned

    def best(self) -> tuple[str, float, dict[str, Any]] | None:
        """Name, metric and values of the best trial so far; None before the first is done."""
        try:
            best = self._study.best_trial
        except ValueError:
            return None
        return self._name(best.number), best.value, best.params

    def _name(self, number: int) -> str:
        return f"{self._search.experiment.name}-{number:04d}"

    def _add(self, number: int, params: dict[str, Any]) -> Trial:
        name, e = self._name(number), self._search.experiment
        self._known[name] = Trial(name, e.seed, e.override({"name": name} | params), self._folder / name)
        return self._known[name]

    def _report_result(self, name: str, states: States) -> None:
        """Reports a trial that is done, failed or pruned to Optuna; another command may have done so before."""
        state = states[name]
        trial = self._known[name]
        number = self._running[name].number
        if not state.done and self._study.get_trials(deepcopy=False)[number].state.is_finished():
            self._pruned.add(name)
            del self._running[name]
            return
        value = None
        outcome = self._states.FAIL
        if state.done:
            result = read_json(trial.folder / RESULT)
            if self._search.metric not in result:
                raise GptjaxError(
                    f"{trial.folder / RESULT}: has no {self._search.metric}; set another metric in the search"
                )
            value = result[self._search.metric]  # None: it is not finite
            outcome = self._states.FAIL if value is None else self._states.COMPLETE
        elif state.status != "failed":
            if not self._should_prune(name):
                return
            outcome = self._states.PRUNED
            write_note(trial, "cancelled", why=f"pruned at step {self._reported[name]:,}")
        if outcome != self._states.COMPLETE:
            self._pruned.add(name)
        self._study.tell(self._running.pop(name), value, outcome, skip_if_finished=True)

    def _should_prune(self, name: str) -> bool:
        """Whether a running trial should be pruned, by its validation losses so far."""
        path = self._known[name].folder / METRICS
        for line in path.read_text().splitlines() if path.exists() else []:
            with contextlib.suppress(ValueError):
                values = json.loads(line)
                if "val_loss" in values and values["step"] > self._reported.get(name, 0):
                    self._reported[name] = values["step"]
                    with contextlib.suppress(self._finished):  # another command has reported it
                        self._running[name].report(values["val_loss"], values["step"])
                    if self._running[name].should_prune():
                        return True
        return False


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise GptjaxError("--search: needs Optuna, which is not installed; pip install 'gptjax[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _open_study(optuna: Any, search: Search, method: Method, folder: Path) -> Any:
    """Optuna's study in a folder. Raises `RunError` if the folder holds another search."""
    folder.mkdir(parents=True, exist_ok=True)
    backend = optuna.storages.journal.JournalFileBackend(str(folder / JOURNAL))
    e = search.experiment
    sampler = optuna.samplers.TPESampler if method == "tpe" else optuna.samplers.RandomSampler
    halving = optuna.pruners.SuccessiveHalvingPruner(min_resource=max(1, e.train.eval_every), reduction_factor=3)
    study = optuna.create_study(
        storage=optuna.storages.JournalStorage(backend),
        study_name=e.name,
        load_if_exists=True,
        pruner=halving if method == "halving" else optuna.pruners.NopPruner(),
        direction="minimize" if search.lower_is_better else "maximize",
    )
    wanted = f"{'least' if search.lower_is_better else 'most'} {search.metric}"  # kept in the journal
    existing = study.user_attrs.get("wanted", wanted)
    if existing != wanted:
        raise RunError(f"{folder}: holds a search for the {existing}, not for the {wanted}; choose another --run-dir")
    study.set_user_attr("wanted", wanted)
    study.sampler = sampler(seed=e.seed + len(study.trials))  # a resumed search draws other values
    return study


def _distribution(optuna: Any, values: Uniform | Sequence[Any]) -> Any:
    if not isinstance(values, Uniform):
        return optuna.distributions.CategoricalDistribution(tuple(values))
    distribution = optuna.distributions.FloatDistribution
    if isinstance(values.low, int) and isinstance(values.high, int):
        distribution = optuna.distributions.IntDistribution
    return distribution(values.low, values.high, log=values.log)


def _lowest(values: Uniform | Sequence[Any]) -> Any:
    return values.low if isinstance(values, Uniform) else values[0]
