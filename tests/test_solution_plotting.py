"""The pictures of a solution show the numbers they are given."""

import math

import numpy as np
from helpers import candidate, classified, feedforward, solved
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

import constrained_growth as cg
from constrained_growth import plotting as plots

FOUND = {
    "a": cg.Sensitivity(0.2, 0.1, baseline=0.15, site="1"),
    "b": cg.Sensitivity(0.4, math.nan, baseline=0.15, site="1"),
    "c": cg.Sensitivity(0.3, 0.05, baseline=0.15, site="3"),
}


def bars(ax: Axes) -> list[Rectangle]:
    return [patch for patch in ax.patches if isinstance(patch, Rectangle)]


def labels(ax: Axes) -> list[str]:
    legend = ax.get_legend()
    assert legend is not None
    return [text.get_text() for text in legend.get_texts()]


def test_bars_show_the_sensitivities_and_highlight_the_chosen() -> None:
    ax = plots.plot_sensitivities(FOUND, chosen=("b",))
    assert [bar.get_width() for bar in bars(ax)] == [0.2, 0.4, 0.3]
    colours = [bar.get_facecolor() for bar in bars(ax)]
    assert colours[0] == colours[2] != colours[1]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b", "c"]
    assert np.diff(ax.get_yticks()).tolist() == [1.0, 1.5]  # more room before the next site
    assert ax.yaxis.get_inverted()
    assert [bool(bar.get_hatch()) for bar in bars(ax)] == [False, True, False]
    kinds = [
        "chosen",
        "not chosen",
        "± standard error",
        "mean gradient norm of the layers in place",
    ]
    assert sorted(labels(ax)) == sorted(kinds)


def test_bars_of_a_solution_highlight_its_decision() -> None:
    model = feedforward(2, 4, 4, 3)
    solution = solved(model, classified(20), candidate("1"), candidate("3"), rule=cg.TopK(1))
    ax = plots.plot_sensitivities(solution)
    widths = [s.value for s in solution.sensitivities.values()]
    assert [bar.get_width() for bar in bars(ax)] == widths
    bold = [t.get_text() for t in ax.get_yticklabels() if t.get_fontweight() == "bold"]
    assert tuple(bold) == solution.decision.chosen
    figure = solution.plot()
    assert [bar.get_width() for bar in bars(figure.axes[0])] == widths
    assert figure.get_suptitle() == f"insert {', '.join(solution.decision.chosen)}"


def test_ticks_are_plain_numbers_and_every_panel_is_readable_in_grey() -> None:
    """Also where an axis spans less than a decade; curves differ in more than their colours."""
    run = plots.plot_run(
        [6.0, 0.9], {1: "a"}, {1: {"a": 0.3, "b": 3.4}, 2: {"a": 0.1}}, {1: ("a",)}
    )
    for figure in (run, plots.plot_sensitivities(FOUND, chosen=("c",)).figure):
        figure.canvas.draw()
        for ax in figure.axes:
            ticks = [text.get_text() for text in (*ax.get_xticklabels(), *ax.get_yticklabels())]
            assert not any("×" in text or "times" in text or "^" in text for text in ticks)
            assert ax.get_legend() or ax.get_label() == "<colorbar>"
            shown = [line for line in ax.get_lines() if not str(line.get_label()).startswith("_")]
            dashes = [vars(line)["_dash_pattern"] for line in shown]
            looks = [(d, line.get_marker()) for d, line in zip(dashes, shown, strict=True)]
            assert len({str(look) for look in looks}) == len(looks)
