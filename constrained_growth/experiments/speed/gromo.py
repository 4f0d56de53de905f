"""The decision of GroMo where to grow a perceptron, if GroMo is installed (`pip install gromo`)."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from constrained_growth.experiments.speed.networks import CLASSES, INPUTS


def gromo_decision(
    depth: int,
    width: int,
    data: Iterable[tuple[Tensor, Tensor]],
    loss_fn: Callable[[Tensor, Tensor], Tensor],
) -> Callable[[], list[float]] | None:
    """What GroMo does to say where neurons would help: its first-order improvement of each layer.

    That is a pass over the data in which statistics are summed, then the best new neurons of
    every hidden layer, as many as there are. None without GroMo.

    Source:
        Verbockhaven et al., arXiv 2405.19816; https://github.com/growingnet/gromo.
    """
    if importlib.util.find_spec("gromo") is None:
        return None
    containers: Any = importlib.import_module("gromo.containers.growing_mlp")
    device = torch.device("cpu")
    network = containers.GrowingMLP(INPUTS, CLASSES, width, depth, nn.ReLU(), device=device)

    def decide() -> list[float]:
        with warnings.catch_warnings():  # of pseudo-inverses
            warnings.simplefilter("ignore")
            network.init_computation()
            for input, target in data:
                network.zero_grad()
                loss_fn(network(input), target).backward()
                network.update_computation()
            network.compute_optimal_updates(maximum_added_neurons=width)
            found = [float(layer.first_order_improvement) for layer in network.layers[1:]]
            network.reset_computation()
            for layer in network.layers[1:]:
                layer.delete_update()
        return found

    return decide
