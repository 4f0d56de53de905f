"""The pictures of a run say what they are given, in colours and without."""

import functools
import io
import math

import numpy as np
import torch
from helpers import classified, feedforward
from matplotlib.figure import Figure
from torch import nn

import constrained_growth as cg
from constrained_growth import plotting as plots

SGD = functools.partial(torch.optim.SGD, lr=0.1)
ROUNDS = {2: {"1": 0.5, "3": 0.01}, 5: {"1": 0.2, "1.base": math.nan, "3": 0.0}}


def rendered(figure: object) -> int:
    """How many bytes the PNG has."""
    assert isinstance(figure, Figure)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return len(file.getvalue())


def test_insertions_are_marked_on_the_loss() -> None:
    ax = plots.plot_training([1.0, 0.5, 0.1], {2: "a"})
    assert ax.lines[0].get_ydata()[1] == 0.5  # type: ignore[index]
    marked = [line for line in ax.lines if line.get_marker() == "v"]
    assert [line.get_xydata().tolist() for line in marked] == [[[2.0, 0.5]]]  # type: ignore[union-attr]
    assert [text.get_text() for text in ax.texts] == ["+ a"]
    assert ax.get_yscale() == "log"
    assert rendered(ax.figure) > 5000


def test_map_has_a_row_for_each_candidate_and_a_cross_for_each_insertion() -> None:
    ax = plots.plot_sensitivity_map(ROUNDS, {2: ("3",), 5: ()})
    assert [label.get_text() for label in ax.get_yticklabels()] == ["1", "1.base", "3"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["2", "5"]
    shown = np.ma.filled(np.ma.asarray(ax.images[0].get_array()), -1.0)
    assert shown.tolist() == [[0.5, 0.2], [-1.0, -1.0], [0.01, -1.0]]
    (cross,) = [line for line in ax.lines if line.get_marker() == "X"]
    assert (list(cross.get_xdata()), list(cross.get_ydata())) == ([0], [2])  # type: ignore[arg-type]
    assert ax.images[0].get_cmap().name == "Greys"
    assert rendered(ax.figure) > 5000


def test_map_without_anything_to_show() -> None:
    assert rendered(plots.plot_sensitivity_map({1: {"a": 0.0}}, {}).figure) > 1000


def test_history_draws_itself() -> None:
    model = feedforward(2, 4, 4, 3)
    history = cg.grow(model, SGD, nn.CrossEntropyLoss(), classified(8), epochs=4, max_insertions=1)
    figure = history.plot()
    assert len(figure.axes) == 3  # loss, map, its scale
    assert rendered(figure) > 5000
    history.rounds.clear()
    assert len(history.plot().axes) == 1
