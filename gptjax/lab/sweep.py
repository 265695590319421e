"""Trains what is missing of a sweep, and shows how far all of it is.

Nothing about it is kept in memory alone: who starts the same sweep again finds what is done by its result, what another
process trains by its lock, and what was broken off by its checkpoint.
"""

import contextlib
import signal
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Protocol

from gptjax.errors import Interrupted
from gptjax.lab.progress import State, state_of
from gptjax.lab.trials import Trial

LOOK_SECONDS = 0.5  # between two looks at the trials
States = Mapping[str, State]  # by the names of the trials
Show = Callable[[Sequence[Trial], States, Sequence[str]], None]  # all trials, and the names of those that have changed


class Job(Protocol):
    """A trial that somebody was asked to train."""

    def poll(self) -> int | None:
        """The exit code; None while it is not over."""

    def stop(self) -> None:
        """Asks it to save and stop."""

    def kill(self) -> None:
        """Stops it at once."""


class Runner(Protocol):
    """Where trials are trained."""

    def adopt(self, trials: Sequence[Trial]) -> Mapping[str, Job]:
        """Those that an earlier command asked for here, and that are not over."""

    def start(self, trials: Sequence[Trial], measured: Mapping[str, int]) -> Mapping[str, Job]:
        """Starts those for which there is room; `measured`: bytes that trials of a variant were seen to take."""


class Plan(Protocol):
    """Which trials there are to be."""

    def trials(self, states: States) -> Sequence[Trial]:
        """All that are known by now; later ones may depend on how earlier ones went."""

    def given_up(self, states: States) -> Collection[str]:
        """The names of those that are not to be trained on."""


class FixedPlan:
    """A plan that is known from the start."""

    def __init__(self, trials: Sequence[Trial]):
        self._trials = trials

    def trials(self, states: States) -> Sequence[Trial]:
        return self._trials

    def given_up(self, states: States) -> Collection[str]:
        return ()


def train_missing(plan: Plan, runner: Runner, show: Show) -> dict[str, State]:
    """Trains all trials that are not done and that nobody else trains; returns where each is in the end.

    A trial that fails does not stop the others. Raises `Interrupted` after Ctrl-C or SIGTERM, with the trials saved; at
    a second one they are stopped at once.
    """
    jobs: dict[str, Job] = {}
    tried: set[str] = set()
    states: dict[str, State] = {}
    by_name: dict[str, Trial] = {}
    told = 0  # of the requests to stop, those that the jobs know of
    with _stop_requests() as asked:
        jobs |= runner.adopt(plan.trials(states))
        tried |= jobs.keys()
        while True:
            for name in [name for name, job in jobs.items() if job.poll() is not None]:
                del jobs[name]
            if asked and not jobs:
                still = [name for name, s in states.items() if not s.over and not state_of(by_name[name]).over]
                others = f"; trained by other processes still: {', '.join(still)}" if still else ""
                raise Interrupted(f"{asked[0]}: every trial of this command is saved; the same command goes on{others}")
            before, trials = states, plan.trials(states)
            by_name = {trial.name: trial for trial in trials}
            states = {trial.name: _look(trial, before.get(trial.name), trial.name in jobs) for trial in trials}
            given_up = plan.given_up(states)
            if not asked:
                for name in jobs.keys() & given_up:
                    jobs[name].stop()
                left = [t for t in trials if t.name not in tried and t.name not in given_up]
                measured = {t.variant: m for t in trials if (m := states[t.name].memory_bytes)}
                started = runner.start([t for t in left if states[t.name].over and not states[t.name].done], measured)
                tried |= started.keys()
                jobs |= started
                states |= {trial.name: state_of(trial, True) for trial in trials if trial.name in started}
            show(trials, states, [name for name, s in states.items() if s.status != _status(before.get(name))])
            over = (s.done or name in given_up or (s.over and name in tried) for name, s in states.items())
            if not jobs and not asked and all(over) and len(plan.trials(states)) == len(trials):
                return states
            told = _wait(asked, told, jobs)


def _look(trial: Trial, before: State | None, ours: bool) -> State:
    return before if before and before.done else state_of(trial, ours)


def _status(state: State | None) -> str | None:
    return state.status if state else None


def _wait(asked: list[str], told: int, jobs: Mapping[str, Job]) -> int:
    """Passes some time, and passes requests to stop on to all jobs; returns how many of them the jobs know of now.

    A request may have come before this waits: while a cluster was asked for its queue, say.
    """
    until = time.monotonic() + LOOK_SECONDS
    while time.monotonic() < until and len(asked) == told:
        time.sleep(0.05)
    if (now := len(asked)) > told:
        for job in jobs.values():
            job.stop() if now == 1 else job.kill()
    return now


@contextlib.contextmanager
def _stop_requests() -> Iterator[list[str]]:
    """The names of the signals that asked to stop, as they come."""
    asked: list[str] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {n: signal.signal(n, lambda number, _: asked.append(signal.Signals(number).name)) for n in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
