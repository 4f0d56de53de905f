"""The pictures of a solution and of an insertion show the numbers they are given."""

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


def test_bars_show_the_sensitivities_and_highlight_the_chosen() -> None:
    ax = plots.plot_sensitivities(FOUND, chosen=("b",))
    assert [bar.get_width() for bar in bars(ax)] == [0.2, 0.4, 0.3]
    colours = [bar.get_facecolor() for bar in bars(ax)]
    assert colours[0] == colours[2] != colours[1]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b", "c"]
    assert np.diff(ax.get_yticks()).tolist() == [1.0, 1.5]  # more room before the next site
    assert ax.yaxis.get_inverted()
    assert [text.get_text() for text in ax.texts] == ["mean gradient norm of the layers in place"]


def test_bars_of_a_solution_highlight_its_decision() -> None:
    model = feedforward(2, 4, 4, 3)
    solution = solved(model, classified(20), candidate("1"), candidate("3"), rule=cg.TopK(1))
    ax = plots.plot_sensitivities(solution)
    widths = [s.value for s in solution.sensitivities.values()]
    assert [bar.get_width() for bar in bars(ax)] == widths
    bold = [t.get_text() for t in ax.get_yticklabels() if t.get_fontweight() == "bold"]
    assert tuple(bold) == solution.decision.chosen


def test_curves_hold_the_losses_and_the_insertion() -> None:
    ax = plots.plot_losses([1.0, 0.5], {"kept": [0.5, 0.4], "grown": [0.5, 0.05]})
    before, kept, grown, insertion = ax.get_lines()
    assert before.get_xydata().tolist() == [[0, 1.0], [1, 0.5]]  # type: ignore[union-attr]
    assert kept.get_xydata().tolist() == [[1, 0.5], [2, 0.4]]  # type: ignore[union-attr]
    assert grown.get_xydata().tolist() == [[1, 0.5], [2, 0.05]]  # type: ignore[union-attr]
    assert np.unique(insertion.get_xdata()).tolist() == [1]
    assert (ax.get_yscale(), ax.get_ylabel()) == ("log", "training loss [nats]")
    assert plots.plot_losses([1.0, 0.9], {"kept": [0.9, 0.8]}).get_yscale() == "linear"


def test_a_curve_that_diverges_has_no_label_and_leaves_the_others_theirs() -> None:
    ax = plots.plot_losses([1.0, 0.5], {"grown": [0.5, math.nan], "kept": [0.5, 0.4]})
    event, label = ax.texts
    assert event.get_text() == "layer inserted"
    assert label.get_text() == "kept\n0.4"
    assert label.get_color() == ax.get_lines()[2].get_color()


def test_both_side_by_side() -> None:
    figure = plots.plot_growth([1.0, 0.5], {"grown": [0.5, 0.1]}, FOUND, chosen=("c",), title="T")
    losses, sensitivities = figure.axes
    assert losses.texts[0].get_text() == "c inserted"
    assert len(bars(sensitivities)) == 3
    assert [text.get_text() for text in figure.texts] == ["T", ""]
    figure = plots.plot_growth([1.0, 0.5], {"kept": [0.5, 0.1]}, FOUND)
    assert figure.axes[0].texts[0].get_text() == "nothing inserted"
