"""Pictures of the studies: losses, largest against smallest, when and where to insert, growth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from constrained_growth._style import (
    CURVES,
    GROWN,
    INK,
    KEPT,
    MARK,
    QUIET,
    figure,
    legend,
    plain,
    scale,
    tidy,
)
from constrained_growth.experiments.growth.runs import BIG
from constrained_growth.experiments.reproduction.runs import TRACE, Reproduction, final_loss
from constrained_growth.experiments.statistics import Array, smoothed

_ARMS = {
    "N1": ("small network kept (N1)", CURVES[0]),
    "N2fix": ("deeper one from the start (N2fix)", CURVES[2]),
    "N1lr": ("small network, learning rate as grown (N1lr)", CURVES[4]),
    "LImin": ("smallest sensitivity (LImin)", CURVES[3]),
    "LImax": ("largest sensitivity (LImax)", CURVES[1]),
}


def reproduction(found: Reproduction) -> Figure:
    """All pictures of one of the source's experiments on one sheet."""
    several = found.sensitivities.shape[1] > 1
    panels: list[Callable[[Axes, Reproduction], None]] = [losses]
    panels += [largest_against_smallest] if several else []
    panels += [when] if found.inserted_at else []
    panels += [sensitivities]
    width = 4.6 * len(panels) + 1.4
    made = figure(width, 4.8)
    made.get_layout_engine().set(w_pad=0.12, rect=(0, 0, 1, 0.9))  # type: ignore[union-attr]
    places = made.subplots(
        1, len(panels), squeeze=False, width_ratios=[1.25, *[1.0] * (len(panels) - 1)]
    )[0]
    for ax, draw in zip(places, panels, strict=True):
        draw(ax, found)
    experiment = found.experiment
    made.text(
        0.01,
        0.965,
        f"{experiment.name}: {experiment.family} {list(experiment.widths)}, "
        f"{len(found.seeds)} seeds from {found.seeds[0]} on",
        fontsize=13,
        fontweight="bold",
        color=INK,
        va="top",
    )
    return made


def losses(ax: Axes, found: Reproduction) -> None:
    """Training loss with and without insertion: medians, and bands from quartile to quartile."""
    several = found.sensitivities.shape[1] > 1
    for name, (label, style) in _ARMS.items():
        same = {"LImin": not several, "N1lr": found.experiment.factor == 1}
        if same.get(name):
            continue
        low, median, high = np.quantile(found.arms[name].loss, [0.25, 0.5, 0.75], axis=1)
        epochs = np.arange(len(median))
        ax.fill_between(epochs, low, high, color=style["color"], alpha=0.13, linewidth=0)
        ax.plot(epochs, median, **style, linewidth=1.8, label=label)
    ax.axvline(found.experiment.before, **MARK, label="insertion")
    ax.set_xlim(0, found.experiment.epochs)
    ax.set_ylim(0, 1.1 * float(np.median(found.arms["N1"].loss[0])))
    legend(ax)
    _named(ax, "median and quartiles", "epoch", "training loss [nats]")


def largest_against_smallest(ax: Axes, found: Reproduction) -> None:
    """Final losses of each seed, the layer with the largest against that with the smallest λ."""
    large, small = (final_loss(found.arms[name]) for name in ("LImax", "LImin"))
    top = 1.05 * float(max(large.max(), small.max()))
    ax.plot([0, top], [0, top], **MARK, label="equal")
    ax.scatter(small, large, s=14, color=GROWN, alpha=0.6, linewidths=0, label="one seed")
    ax.set(xlim=(0, top), ylim=(0, top))
    legend(ax)
    below = int((large < small).sum())
    _named(
        ax,
        f"largest lower in {below} of {len(large)}",
        "final loss, smallest sensitivity [nats]",
        "final loss, largest sensitivity [nats]",
    )


def when(ax: Axes, found: Reproduction) -> None:
    """Final loss against the epoch of the insertion."""
    epochs = list(found.inserted_at)
    values = np.stack([final_loss(runs) for runs in found.inserted_at.values()])
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75], axis=1)
    errors = np.stack([median - low, high - median])
    ax.errorbar(epochs, median, errors, color=GROWN, marker="o", capsize=3, label="inserted")
    kept = np.quantile(final_loss(found.arms["N1"]), [0.25, 0.5, 0.75])
    ax.axhspan(kept[0], kept[2], color=KEPT, alpha=0.13, linewidth=0)
    ax.axhline(kept[1], **CURVES[0], label="kept")
    ax.set_ylim(bottom=0)
    legend(ax)
    _named(
        ax, "when to insert: median and quartiles", "epoch of the insertion", "final loss [nats]"
    )


def sensitivities(ax: Axes, found: Reproduction) -> None:
    """Heat map of the median ‖λ_W‖ over site and time, as the small network trains."""
    median = np.median(found.trace, axis=1).T
    edge = np.append(found.trace_epochs, found.trace_epochs[-1] + TRACE)
    sites = np.arange(len(median) + 1) + 0.5
    shown = np.maximum(median, np.min(median, initial=1.0, where=median > 0))
    mesh = ax.pcolormesh(edge, sites, shown, cmap="Greys", norm=LogNorm(shown.min(), shown.max()))
    ax.axvline(found.experiment.before, **MARK | {"color": GROWN}, label="insertion")
    ax.invert_yaxis()
    ax.set_yticks(range(1, len(median) + 1))
    plain(ax.figure.colorbar(mesh, ax=ax, label="median ‖λ_W‖").ax.yaxis)
    legend(ax)
    _named(ax, "the small network, kept", "epoch", "after hidden layer")
    ax.grid(False)


def _named(ax: Axes, title: str, xlabel: str, ylabel: str) -> None:
    ax.set_title(title, loc="left", fontsize=10, color=INK)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    tidy(ax, "both")


_GROWTH_ARMS: dict[str, dict[str, Any]] = {
    "sensitivity": {**CURVES[1], "linewidth": 2.0},
    "random": {**CURVES[2], "linewidth": 1.4},
    "fixed": {**CURVES[3], "linewidth": 1.6},
    BIG: {**CURVES[0], "linewidth": 2.0},
    "small": {"color": QUIET, "linestyle": "-", "linewidth": 1.2},
}


def growth(found: Mapping[str, Any]) -> Figure:
    """Training loss of every arm against multiply-adds, a panel for each task."""
    curves = found["curves"]
    made = figure(4.8 * len(curves))
    panels = made.subplots(1, len(curves), squeeze=False)[0]
    for ax, task in zip(panels, curves, strict=True):
        drawn = list[float]()
        for name, runs in curves[task].items():
            style = _GROWTH_ARMS[name]
            spent, (low, median, high) = _quartiles(runs)
            ax.plot(spent, median, **style, label=name)
            drawn += [*low, *high]
            if name in (next(iter(curves[task])), BIG):
                ax.fill_between(spent, low, high, color=style["color"], alpha=0.13, linewidth=0)
        scale(ax, drawn)
        legend(ax)
        ax.set_xlabel("multiply-adds spent [10⁹]")
        about = found["settings"][task]
        title = f"{task}, {about['small']} → {about['big']} blocks, {found['seeds']} seeds"
        ax.set_title(title, loc="left", fontsize=11, color=INK)
        tidy(ax, "y")
    panels[0].set_ylabel("training loss [nats]")
    return made


def _quartiles(runs: Sequence[Mapping[str, Sequence[float]]]) -> tuple[Array, Array]:
    """What was spent, and the quartiles over seeds of the loss then, shape (3, points)."""
    spent = np.linspace(0, min(run["multiply_adds"][-1] for run in runs), 200)[1:]
    values = [np.interp(spent, run["multiply_adds"], smoothed(run["loss"])) for run in runs]
    return spent / 1e9, np.quantile(values, [0.25, 0.5, 0.75], axis=0)
