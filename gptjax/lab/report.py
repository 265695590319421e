"""Pictures of runs. The only file that needs matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.errors import GptjaxError
from gptjax.training.run import Run


def plot_loss(run: Run) -> Path | None:
    """Draws the training and validation loss into RUN/loss.png; None where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    lines = run.metrics()
    train = np.array([(x["step"], x["loss"]) for x in lines if "loss" in x])
    val = np.array([(x["step"], x["val_loss"]) for x in lines if "val_loss" in x])
    if not len(train):
        return None
    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(*train.T, color="#9db7d5", linewidth=0.8, label="training, this step")
    axes.plot(train[:, 0], _smooth(train[:, 1]), color="#1f4e8c", linewidth=1.6, label="training, smoothed")
    if len(val):
        axes.plot(*val.T, color="#c8541b", linewidth=1.6, marker="o", markersize=3.5, label="validation, whole split")
        axes.annotate(f"{val[-1, 1]:.4f}", val[-1], (4, 6), textcoords="offset points", color="#c8541b", fontsize=9)
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=run.experiment.name)
    axes.margins(x=0.06)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path = run.folder / "loss.png"
    figure.savefig(path)
    return path


def check_can_plot(path: Path) -> None:
    """Raises where a picture that was asked for could not be drawn or written."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise GptjaxError(f"{path}: needs matplotlib, which is not installed; pip install 'gptjax[report]'") from None
    if path.suffix != ".png" or not path.parent.is_dir():
        raise GptjaxError(f"{path}: must end in .png and lie in a folder that exists")


def plot_by_position(bins: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draws the loss by the number of tokens seen, with its standard error; `bins` of `scoring.Totals.by_position`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = [(b["from"] * b["to"]) ** 0.5 for b in bins]  # the middle of a bin on a logarithmic axis
    errors = [b["error"] or 0.0 for b in bins]
    axes.errorbar(places, [b["loss"] for b in bins], errors, color="#1f4e8c", linewidth=1.6, marker="o", markersize=3.5,
                  capsize=2.5, elinewidth=1, label="mean and its standard error")  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [str(b["to"]) if b["from"] == b["to"] else f"{b['from']}-{b['to']}" for b in bins])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis="x", labelsize=7.5)
    axes.set(xlabel="tokens seen before", ylabel="loss (nats a token)", title=title)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)


def _smooth(values: np.ndarray) -> np.ndarray:
    """The mean of what lies around each value, nearer values counting more, over about a tenth of them on each side."""
    reach = max(1, len(values) // 10)
    kernel = 1 - np.abs(np.arange(-reach, reach + 1)) / (reach + 1)
    total, weight = (np.convolve(x, kernel)[reach : reach + len(values)] for x in (values, np.ones(len(values))))
    return total / weight
