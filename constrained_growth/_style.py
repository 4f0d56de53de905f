"""The look of all figures: readable in grey, with plain numbers at the ticks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from constrained_growth._extras import extra_packages

with extra_packages():
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, StrMethodFormatter
    from matplotlib.transforms import ScaledTranslation

INK = "#333333"
QUIET = "#9AA5B1"
KEPT = "#0072B2"  # blue and vermilion of Okabe and Ito, which colour-blind readers tell apart
GROWN = "#D55E00"
MARK: dict[str, Any] = {"color": INK, "linestyle": (0, (4, 3)), "linewidth": 1}
"""A moment or a limit, across the panel."""


def figure(width: float = 7, height: float = 4.2) -> Figure:
    """A new figure, of so many inches."""
    return Figure(figsize=(width, height), dpi=160, layout="constrained")


def axes(height: float) -> Axes:
    """The Axes of a new figure, `height` inches high."""
    return figure(height=height).subplots()


def tidy(ax: Axes, grid: Literal["x", "y", "both"]) -> None:
    """Apply the common style, with grid lines across the axis "x", "y" or "both"."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(QUIET)
    ax.grid(axis=grid, color=QUIET, alpha=0.3, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=10, colors=INK)
    ax.xaxis.label.set(fontsize=11, color=INK)
    ax.yaxis.label.set(fontsize=11, color=INK)


_LEGEND: dict[str, Any] = {"fontsize": 9, "labelcolor": INK, "edgecolor": "none"}


def legend(ax: Axes) -> None:
    """The legend of a panel, where there is room in it."""
    ax.legend(loc="best", framealpha=0.8, **_LEGEND)


def legend_below(ax: Axes, handles: Sequence[Any]) -> None:
    """The legend of a panel that its content fills, below the name of its axis."""
    lower = ScaledTranslation(0, -40 / 72, ax.figure.dpi_scale_trans)
    where: dict[str, Any] = {"bbox_to_anchor": (0, 0), "bbox_transform": ax.transAxes + lower}
    ax.legend(handles=handles, loc="upper left", ncols=2, borderaxespad=0, **where, **_LEGEND)


def scale(ax: Axes, losses: Iterable[float]) -> None:
    """Make the loss axis logarithmic where that shows more, with plain numbers at the ticks."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    if finite and min(finite) > 0 and max(finite) >= 5 * min(finite):
        ax.set_yscale("log")
        plain(ax.yaxis)
    else:
        ax.set_ylim(bottom=0)


def plain(axis: Axis) -> None:
    """Numbers such as 0.2, not 2 × 10⁻¹, at the ticks of a logarithmic axis."""
    low, high = sorted(axis.get_view_interval())
    wide = low > 0 and high > 1e4 * low
    axis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())
    axis.set_minor_locator(NullLocator())


def note(
    ax: Axes,
    text: str,
    x: float,
    offset: tuple[float, float],
    y: float | None = None,
    **style: Any,
) -> None:
    """Text at an offset in points from (x, y), or from x at the top of the Axes."""
    where = ax.get_xaxis_transform() if y is None else "data"
    style |= {"xytext": offset, "textcoords": "offset points", "color": INK}
    ax.annotate(text, (x, 1 if y is None else y), xycoords=where, **style)
