"""The table of a sweep's trials: live in a terminal, else a line for each change. The only file that needs rich."""

import time
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from gptjax.lab.progress import TrialState, last_lines
from gptjax.lab.trials import Trial

STYLES = {"done": "green", "running": "bold", "waiting": "cyan", "failed": "bold red", "cancelled": "yellow",
          "stopped": "yellow", "new": "dim"}  # fmt: skip
ROWS = 40  # of the live table at most; running trials come first


def console(error: bool = False) -> Console:
    """Standard output or error; 200 columns wide if it is not a terminal."""
    console = Console(stderr=error, highlight=False)
    if not console.is_terminal:
        console.width = 200
    return console


def table(trials: Sequence[Trial], states: Mapping[str, TrialState], left: Mapping[str, float] | None = None) -> Table:
    """All trials with their states; `left`: the estimated seconds that each still takes."""
    rows = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name, justify in (("trial", "left"), ("state", "left"), ("step", "right"), ("loss", "right"),
                          ("val loss", "right"), ("time", "right"), ("", "left")):  # fmt: skip
        rows.add_column(name, justify=justify, no_wrap=name != "trial", overflow="fold")  # type: ignore[arg-type]
    for trial in trials:
        s = states[trial.name]
        steps = f"{s.step:,}/{trial.experiment.train.steps:,}"
        takes = ""
        if s.seconds:
            takes = duration(s.seconds)
        elif left:
            takes = f"~{duration(left[trial.name])} left"
        cells = (steps, _number(s.loss), _number(s.val_loss), takes, escape(s.why))
        rows.add_row(escape(trial.name), f"[{STYLES[s.status]}]{s.status}[/]", *cells)
    return rows


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


def counts(states: Mapping[str, TrialState]) -> str:
    """The number of trials in each state."""
    statuses = [s.status for s in states.values()]
    return ", ".join(f"{statuses.count(status)} {status}" for status in STYLES if status in statuses)


class LiveTable:
    """Shows the trials while they are trained, and the last lines of the log of each that fails."""

    def __init__(self) -> None:
        self._console = console(error=True)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._started = time.monotonic()
        self._first_call = True

    def __enter__(self) -> "LiveTable":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def __call__(self, trials: Sequence[Trial], states: Mapping[str, TrialState], changed: Sequence[str]) -> None:
        """Shows the states; `changed`: the names of trials whose state has changed."""
        by_name = {trial.name: trial for trial in trials}
        for name in changed:
            s = states[name]
            if s.status == "failed" and not self._first_call:
                self._console.print(f"[bold red]{escape(name)} failed[/] ({escape(s.why)}). The last lines of its log:")
                for line in last_lines(by_name[name]):
                    self._console.print(f"    {line}", markup=False, soft_wrap=True)
            elif not self._console.is_terminal and not (self._first_call and s.status == "new"):
                value = "" if s.val_loss is None else f", val loss {s.val_loss:.4f}"
                self._console.print(f"{name}: {s.status}{value}{f' ({s.why})' if s.why else ''}", markup=False)
        self._first_call = False
        if self._console.is_terminal:
            order = ("running", "waiting", "failed", "new", "stopped", "cancelled", "done")
            shown = sorted(trials, key=lambda t: order.index(states[t.name].status))[:ROWS]
            rows = table([trial for trial in trials if trial in shown], states)
            rows.caption = f"{counts(states)}; {duration(time.monotonic() - self._started)}"
            rows.caption_justify = "left"
            self._live.update(rows, refresh=True)
