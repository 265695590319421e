"""Plots of runs. The only file that needs matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.errors import GptjaxError
from gptjax.lab.comparison import Comparison
from gptjax.lab.curves import Curves, curves, limits, smooth
from gptjax.lab.labels import plain
from gptjax.lab.text_report import loss_unit
from gptjax.training.run import Run

COLORS = ("#1f4e8c", "#c8541b", "#3f7d4f", "#7a4f9a", "#b98500", "#c73f7f", "#557a12", "#54606e")


def plot_loss(run: Run) -> Path | None:
    """Plots the training and validation loss into RUN/loss.png; None if matplotlib is not installed."""
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
    axes.plot(*train.T, color="#9db7d5", linewidth=0.8, label="training, each step")
    axes.plot(train[:, 0], smooth(train[:, 1]), color="#1f4e8c", linewidth=1.6, label="training, smoothed")
    if len(val):
        axes.plot(*val.T, color="#c8541b", linewidth=1.6, marker="o", markersize=3.5, label="validation")
        axes.annotate(f"{val[-1, 1]:.4f}", val[-1], (4, 6), textcoords="offset points", color="#c8541b", fontsize=9)
    unit = "label" if run.experiment.model.num_classes else "token"
    axes.set(xlabel="step", ylabel=f"loss (nats/{unit})", title=plain(run.experiment.name, 80))
    axes.margins(x=0.06)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path = run.folder / "loss.png"
    figure.savefig(path)
    return path


def check_can_plot(path: Path) -> None:
    """Raises `GptjaxError` if a plot could not be drawn or written."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise GptjaxError(f"{path}: needs matplotlib, which is not installed; pip install 'gptjax[report]'") from None
    if path.suffix != ".png" or not path.parent.is_dir():
        raise GptjaxError(f"{path}: must end in .png, in a folder that exists")


def plot_by_position(bins: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Plots the loss by position, with its standard error; `bins` as from `scoring.LossTotals.by_position`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    centres = [(b["from"] * b["to"]) ** 0.5 for b in bins]  # the middle of a bin on a logarithmic axis
    errors = [b["error"] or 0.0 for b in bins]
    axes.errorbar(centres, [b["loss"] for b in bins], errors, color="#1f4e8c", linewidth=1.6, marker="o",
                  markersize=3.5, capsize=2.5, elinewidth=1, label="mean and its standard error")  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(centres, [str(b["to"]) if b["from"] == b["to"] else f"{b['from']}-{b['to']}" for b in bins])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis="x", labelsize=7.5)
    axes.set(xlabel="position (tokens of context)", ylabel="loss (nats/token)", title=plain(title))
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)


def plot_by_distance(
    distances: Sequence[int], curves: Mapping[str, np.ndarray], context: int, chance: float, path: Path
) -> None:
    """Plots accuracy by distance in tokens: for each name a curve with a band; [3, distances] are value, low, high."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for (name, curve), color in zip(curves.items(), COLORS, strict=False):
        value, low, high = np.clip(curve, 0, 1)
        axes.fill_between(distances, low, high, color=color, alpha=0.18, linewidth=0)
        axes.plot(distances, value, color=color, linewidth=1.6, marker="o", markersize=3.5, label=plain(name))
    axes.axvline(context, color="#888888", linewidth=0.8)
    axes.annotate("training context", (context, 0.02), (4, 0), textcoords="offset points", color="#666666", fontsize=8)
    axes.axhline(chance, color="#888888", linewidth=0.8, linestyle=":", label="chance")
    axes.set_xscale("log", base=2)
    axes.set_xticks(distances, [str(d) for d in distances])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis="x", labelsize=7.5)
    axes.set(xlabel="tokens between fact and answer", ylabel="accuracy", ylim=(0, 1.03))
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center left")
    figure.savefig(path)


def plot_scaling(prediction: Mapping[str, Any], score: Mapping[str, Any] | None, path: Path) -> Path | None:
    """Plots the small runs, the fitted law with its band, the prediction and, if it is done, the large run.

    `prediction` and `score` as in prediction.json and score.json of `scaling`. None if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator, NullFormatter, ScalarFormatter
    except ImportError:
        return None
    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    law, band, large = prediction["law"], prediction["band"], prediction["large"]
    a, b, c, unit = law["a"][0], law["b"][0], law["c"], law["unit"][0]
    compute = np.array(band["flops"])
    percent = f"{prediction['confidence']:.0%} interval"
    low, high = prediction["interval"]
    axes.fill_between(compute, band["low"], band["high"], color=COLORS[0], alpha=0.15, linewidth=0, label=percent)
    axes.plot(compute, a * (compute / unit) ** b + c, color=COLORS[0], linewidth=1.6,
              label=f"$L(C) = {a:.3f} x^{{{b:.3f}}} + {c:.3f}$, $x = C$ / {unit:.2e}")  # fmt: skip
    runs = np.array([(run["flops"], run["loss"]) for run in prediction["runs"]])
    axes.plot(*runs.T, "o", color=COLORS[0], markersize=5, label="small runs")
    error = [[prediction["loss"] - low], [high - prediction["loss"]]]
    axes.errorbar([large["flops"]], [prediction["loss"]], error, fmt="o", markerfacecolor="white", color=COLORS[0],
                  markersize=6, capsize=3, label=f"prediction, registered {prediction['registered'][:16]}")  # fmt: skip
    if score:
        axes.plot(large["flops"], score["loss"], "*", color=COLORS[1], markersize=12, zorder=3,
                  label=f"large run: {score['loss']:.4f} ({score['relative_error']:+.2%})")  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="training compute (FLOPs)", ylabel="validation loss (nats/token)",
             title=plain(large["name"]))  # fmt: skip
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)
    return path


def plot_comparison(c: Comparison, path: Path, title: str) -> None:
    """Plots the loss curves of all variants, and the differences with their intervals, into a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    compared = [(i, row) for i, row in enumerate(c.rows) if row.difference is not None]
    figure = Figure(figsize=(15 if compared else 10, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(plain(title, 120))
    panels = figure.subplots(1, 3 if compared else 2)
    for axes, (key, name) in zip(panels, (("loss", "training loss, smoothed"), ("val_loss", "validation loss")),
                                 strict=False):  # fmt: skip
        _draw_curves(axes, [(plain(row.variant.label), curves(row.variant, key)) for row in c.rows])
        axes.set(xlabel="step", ylabel=loss_unit(c), title=name)
    panels[0].legend(frameon=False, fontsize=8)
    if compared:
        axes = panels[2]
        for i, row in compared:
            d = row.difference
            assert d is not None
            error = None if np.isnan(d.low) else [[d.value - d.low], [d.high - d.value]]
            axes.errorbar([d.value], [-i], xerr=error, color=COLORS[i % len(COLORS)], marker="o", capsize=3)
        axes.axvline(0, color="#888888", linewidth=0.8, linestyle=":")
        axes.set_yticks(
            [-i for i, _ in compared], [f"{plain(row.variant.label)}\n{row.verdict.outcome}" for _, row in compared]
        )
        axes.set(
            title=plain(f"{c.metric}: difference from {c.baseline}", 80),
            ylim=(-compared[-1][0] - 0.6, -compared[0][0] + 0.6),
        )
    for axes in panels:
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Software": "gptjax"})


def _draw_curves(axes: Any, named: Sequence[tuple[str, Curves]]) -> None:
    """Means with bands; unfinished runs are dotted."""
    shown = []
    for number, (name, group) in enumerate(named):
        color = COLORS[number % len(COLORS)]
        c = group.finished
        if c is not None:
            shown.append(c)
            axes.fill_between(c.steps, c.low, c.high, color=color, alpha=0.18, linewidth=0)
            axes.plot(c.steps, c.mean, color=color, linewidth=1.6, label=name)
        for part in group.unfinished:
            axes.plot(part.steps, part.mean, color=color, linewidth=1, linestyle=":")
            shown.append(part)
    if shown:
        axes.set_ylim(limits(shown))
