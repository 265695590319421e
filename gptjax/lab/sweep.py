"""Trains the missing trials of a sweep and shows the progress of all of them.

All state is on disk. The same sweep, started again, finds finished trials by their result, trials that another process
trains by their lock, and interrupted trials by their checkpoint.
"""

import contextlib
import signal
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Protocol

from gptjax.errors import Interrupted
from gptjax.lab.progress import TrialState, state_of
from gptjax.lab.trials import Trial

POLL_SECONDS = 0.5  # between two polls of the trials
States = Mapping[str, TrialState]  # by trial name
Show = Callable[
    [Sequence[Trial], States, Sequence[str]], None
]  # all trials, their states, and the names of those that changed


class Job(Protocol):
    """A trial in training."""

    def poll(self) -> int | None:
        """The exit code; None while the job runs."""

    def stop(self) -> None:
        """Requests that it saves and stops."""

    def kill(self) -> None:
        """Stops it immediately."""


class Runner(Protocol):
    """Trains trials: on this machine, on a cluster, or elsewhere."""

    def adopt(self, trials: Sequence[Trial]) -> Mapping[str, Job]:
        """The unfinished jobs of an earlier command."""

    def start(self, trials: Sequence[Trial], measured: Mapping[str, int]) -> Mapping[str, Job]:
        """Starts the trials for which there are resources; `measured`: peak memory in bytes by variant."""


class Plan(Protocol):
    """Decides which trials to train."""

    def trials(self, states: States) -> Sequence[Trial]:
        """All trials so far; later ones may depend on the results of earlier ones."""

    def pruned(self, states: States) -> Collection[str]:
        """The names of the trials that are not trained any further."""


class FixedPlan:
    """A fixed list of trials."""

    def __init__(self, trials: Sequence[Trial]):
        self._trials = trials

    def trials(self, states: States) -> Sequence[Trial]:
        return self._trials

    def pruned(self, states: States) -> Collection[str]:
        return ()


def train_missing(plan: Plan, runner: Runner, show: Show) -> dict[str, TrialState]:
    """Trains all trials that are neither done nor trained by another process; returns their final states.

    A failed trial does not stop the others. After Ctrl-C or SIGTERM the trials save and `Interrupted` is raised; a
    second signal stops them immediately.
    """
    jobs: dict[str, Job] = {}
    tried: set[str] = set()
    states: dict[str, TrialState] = {}
    by_name: dict[str, Trial] = {}
    forwarded = 0  # stop signals that the jobs have received
    with _stop_signals() as received:
        jobs |= runner.adopt(plan.trials(states))
        tried |= jobs.keys()
        while True:
            for name in [name for name, job in jobs.items() if job.poll() is not None]:
                del jobs[name]
            if received and not jobs:
                running = [name for name, s in states.items() if not s.over and not state_of(by_name[name]).over]
                others = f"; other processes still train {', '.join(running)}" if running else ""
                raise Interrupted(
                    f"{received[0]}: every trial of this command is saved; the same command resumes them{others}"
                )
            before = states
            trials = plan.trials(states)
            by_name = {trial.name: trial for trial in trials}
            states = {trial.name: _refresh(trial, before.get(trial.name), trial.name in jobs) for trial in trials}
            pruned = plan.pruned(states)
            if not received:
                for name in jobs.keys() & pruned:
                    jobs[name].stop()
                left = [t for t in trials if t.name not in tried and t.name not in pruned]
                measured = {t.variant: m for t in trials if (m := states[t.name].memory_bytes)}
                started = runner.start([t for t in left if states[t.name].over and not states[t.name].done], measured)
                tried |= started.keys()
                jobs |= started
                states |= {trial.name: state_of(trial, True) for trial in trials if trial.name in started}
            show(trials, states, [name for name, s in states.items() if s.status != _status(before.get(name))])
            over = (s.done or name in pruned or (s.over and name in tried) for name, s in states.items())
            if not jobs and not received and all(over) and len(plan.trials(states)) == len(trials):
                return states
            forwarded = _wait(received, forwarded, jobs)


def _refresh(trial: Trial, before: TrialState | None, ours: bool) -> TrialState:
    if before and before.done:
        return before
    return state_of(trial, ours)


def _status(state: TrialState | None) -> str | None:
    return state.status if state else None


def _wait(received: list[str], forwarded: int, jobs: Mapping[str, Job]) -> int:
    """Waits until the next poll and forwards stop signals to all jobs; returns the number of forwarded signals.

    A signal may have come before this call, for instance while a cluster was queried.
    """
    until = time.monotonic() + POLL_SECONDS
    while time.monotonic() < until and len(received) == forwarded:
        time.sleep(0.05)
    if len(received) > forwarded:
        for job in jobs.values():
            job.stop() if len(received) == 1 else job.kill()
    return len(received)


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[str]]:
    """The names of the received stop signals, in order."""
    received: list[str] = []
    finite_numbers = (signal.SIGINT, signal.SIGTERM)
    before = {
        n: signal.signal(n, lambda number, _: received.append(signal.Signals(number).name)) for n in finite_numbers
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
